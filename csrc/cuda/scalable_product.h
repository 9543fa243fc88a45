// Two ways to multiply a tile: 64 tokens x 32 components with 32 components x 128 columns of S, operands in
// shared memory, sums in registers. FloatProduct fuses multiplications and additions of floats. TensorProduct
// takes matrices of float16, which is what calibrations hold: y goes in as a sum of two float16, so that
// products are exact to 22 bits and the sum is a float's; two tensor instructions for what one would do with
// half the bits.
#pragma once

#include "scalable_finish.h"
#include "scalable_tensor.h"

namespace kvs {

inline constexpr std::uint32_t kTileTokens = 64, kTileColumns = 128, kTileThreads = 256;

// The part of the product that a block makes now.
struct Strip {
  const KvsScalableJob& job;
  const std::int16_t* numbers;
  const std::uint32_t* order;
  std::uint32_t begin, end;      // tokens
  std::uint32_t first, columns;  // of x
  std::uint32_t coded;           // components at the last level that was read

  KVS_DEVICE std::uint64_t n() const { return 2ull * job.layers * job.heads * job.dim; }
  KVS_DEVICE float factor(const Component& component) const {
    return reinterpret_cast<const float*>(job.scale)[component.number];
  }
};

// A thread has 4 tokens x 8 columns: 1,024 fused multiplications a step on 96 loads from shared memory.
class FloatProduct {
 public:
  static constexpr std::uint32_t kMatrixBytes = 4;
  static constexpr std::uint32_t kOwnTokens = 4, kOwnColumns = 8, kAcross = kTileColumns / kOwnColumns;
  static constexpr std::uint32_t kTokenStride = kTileTokens + 4;  // of y: banks apart
  static constexpr std::uint32_t kSharedBytes = 4 * kLanes * (kTokenStride + kTileColumns);
  static_assert(kTileThreads == kTileTokens / kOwnTokens * kAcross);

  KVS_DEVICE void load(const Strip& strip, std::uint32_t c, std::uint8_t* shared) const {
    load_components(strip, c, reinterpret_cast<float*>(shared));
    load_rows(strip, c, reinterpret_cast<float*>(shared) + kLanes * kTokenStride);
  }

  KVS_DEVICE void add(const Strip& strip, const std::uint8_t* shared) {
    const float* y = reinterpret_cast<const float*>(shared) + simt::thread() / kAcross * kOwnTokens;
    const float* rows =
        reinterpret_cast<const float*>(shared) + kLanes * kTokenStride + simt::thread() % kAcross;
    for (std::uint32_t c = 0; c < kLanes; ++c, y += kTokenStride, rows += kTileColumns) {
      KVS_UNROLL
      for (std::uint32_t i = 0; i < kOwnColumns; ++i) {
        if (i * kAcross >= strip.columns) break;
        const float weight = rows[i * kAcross];
        KVS_UNROLL
        for (std::uint32_t row = 0; row < kOwnTokens; ++row)
          sums_[row][i] = multiply_add(y[row], weight, sums_[row][i]);
      }
    }
  }

  // x of the strip, with the mean.
  KVS_DEVICE void store(const Strip& strip, float* x, std::uint32_t stride) const {
    const auto* mean = reinterpret_cast<const float*>(strip.job.mean) + strip.first;
    float* own = x + simt::thread() / kAcross * kOwnTokens * stride;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnColumns; ++i) {
      const std::uint32_t at = simt::thread() % kAcross + i * kAcross;
      if (at >= strip.columns) break;
      KVS_UNROLL
      for (std::uint32_t row = 0; row < kOwnTokens; ++row) own[row * stride + at] = mean[at] + sums_[row][i];
    }
  }

 private:
  // [component][token], scaled as their rows of S are; zeros behind the last of either.
  KVS_DEVICE void load_components(const Strip& strip, std::uint32_t c, float* y) const {
    float* to = y + simt::lane() * kTokenStride;
    if (c + simt::lane() >= strip.coded) {
      for (std::uint32_t token = simt::warp(); token < kTileTokens; token += simt::warps()) to[token] = 0;
      return;
    }
    const Component component(strip.job, strip.order, c + simt::lane());
    const float factor = strip.factor(component);
    const std::int16_t* from =
        find_numbers(strip.job, strip.numbers, c + simt::lane()) + strip.begin * kLanes;
    for (std::uint32_t token = simt::warp(); token < kTileTokens; token += simt::warps()) {
      to[token] = token < strip.end - strip.begin ? component.value(from[token * kLanes]) * factor : 0;
    }
  }

  KVS_DEVICE void load_rows(const Strip& strip, std::uint32_t c, float* rows) const {
    const auto* matrix = reinterpret_cast<const float*>(strip.job.matrix) + strip.first;
    for (std::uint32_t row = simt::warp(); row < kLanes; row += simt::warps()) {
      const bool there = c + row < strip.coded;
      const std::uint64_t from = (there ? strip.order[strip.job.order + c + row] : 0) * strip.n();
      for (std::uint32_t i = simt::lane(); i < strip.columns; i += simt::kWarp) {
        rows[row * kTileColumns + i] = there ? matrix[from + i] : 0;
      }
    }
  }

  float sums_[kOwnTokens][kOwnColumns] = {};
};

// A warp has 16 tokens x 64 columns: 32 sums in each lane. Pairs of float16 whose components are neighbours
// are a word; rows of words are padded so that the lanes of a fragment read 32 banks. A step of a warp is 32
// tensor instructions on 48 loads from shared memory.
class TensorProduct {
 public:
  static constexpr std::uint32_t kMatrixBytes = 2;
  static constexpr std::uint32_t kPairs = kLanes / 2;
  static constexpr std::uint32_t kTokenStride = kPairs + 4, kRowStride = kTileColumns + 8;
  static constexpr std::uint32_t kWarpTokens = 16, kWarpColumns = 64, kDown = kTileTokens / kWarpTokens;
  static constexpr std::uint32_t kAcross = kWarpColumns / 8;
  static constexpr std::uint32_t kSharedBytes = 4 * (2 * kTileTokens * kTokenStride + kPairs * kRowStride);

  KVS_DEVICE void load(const Strip& strip, std::uint32_t c, std::uint8_t* shared) const {
    auto* words = reinterpret_cast<std::uint32_t*>(shared);
    load_components(strip, c, words);
    load_rows(strip, c, words + 2 * kTileTokens * kTokenStride);
  }

  KVS_DEVICE void add(const Strip& strip, const std::uint8_t* shared) {
    const std::uint32_t group = simt::lane() / 4, pair = simt::lane() % 4;
    const auto* high = reinterpret_cast<const std::uint32_t*>(shared);
    const std::uint32_t at = (simt::warp() % kDown * kWarpTokens + group) * kTokenStride + pair;
    const std::uint32_t* rows =
        high + 2 * kTileTokens * kTokenStride + first_column() + group + pair * kRowStride;
    KVS_UNROLL
    for (std::uint32_t half = 0; half < kPairs; half += 8) {
      std::uint32_t upper[4], lower[4];
      KVS_UNROLL
      for (std::uint32_t i = 0; i < 4; ++i) {
        const std::uint32_t place = at + half + i % 2 * 8 * kTokenStride + i / 2 * 4;
        upper[i] = high[place];
        lower[i] = high[kTileTokens * kTokenStride + place];
      }
      KVS_UNROLL
      for (std::uint32_t i = 0; i < kAcross; ++i) {
        if (first_column() + 8 * i >= strip.columns) break;
        const std::uint32_t weights[2] = {rows[half * kRowStride + 8 * i],
                                          rows[(half + 4) * kRowStride + 8 * i]};
        add_tensor_product(sums_[i], upper, weights);
        add_tensor_product(sums_[i], lower, weights);
      }
    }
  }

  KVS_DEVICE void store(const Strip& strip, float* x, std::uint32_t stride) const {
    const auto* mean = reinterpret_cast<const float*>(strip.job.mean) + strip.first;
    const std::uint32_t token = simt::warp() % kDown * kWarpTokens + simt::lane() / 4;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kAcross; ++i) {
      KVS_UNROLL
      for (std::uint32_t j = 0; j < 4; ++j) {
        const std::uint32_t column = first_column() + 8 * i + simt::lane() % 4 * 2 + j % 2;
        if (column < strip.columns) {
          x[(token + j / 2 * 8) * stride + column] = mean[column] + sums_[i][j] * strip.job.grow;
        }
      }
    }
  }

 private:
  static KVS_DEVICE std::uint32_t first_column() { return simt::warp() / kDown * kWarpColumns; }

  // y of two neighbours, scaled as their rows of S are and shrunk into what float16 holds: the nearest, and
  // what is left over.
  KVS_DEVICE void load_components(const Strip& strip, std::uint32_t c, std::uint32_t* words) const {
    const std::uint32_t pair = simt::thread() % kPairs;
    float factors[2];
    float shifts[2];
    KVS_UNROLL
    for (std::uint32_t i = 0; i < 2; ++i) {
      const bool there = c + 2 * pair + i < strip.coded;
      const Component component(strip.job, strip.order, there ? c + 2 * pair + i : c);
      factors[i] = there ? strip.factor(component) * strip.job.shrink : 0;
      shifts[i] = component.shift;
    }
    const float scale = level_scale(strip.job.levels - 1u);
    const auto* from = reinterpret_cast<const std::uint32_t*>(find_numbers(strip.job, strip.numbers, c));
    for (std::uint32_t token = simt::thread() / kPairs; token < kTileTokens; token += kTileThreads / kPairs) {
      const bool there = token < strip.end - strip.begin;
      const std::uint32_t both = there ? from[(strip.begin + token) * kPairs + pair] : 0;
      std::uint32_t upper = 0, lower = 0;
      KVS_UNROLL
      for (std::uint32_t i = 0; i < 2; ++i) {
        const auto number = static_cast<std::int16_t>(both >> 16 * i);
        const float value = reconstruct(number, shifts[i], scale) * factors[i];
        const std::uint32_t nearest = round_to_float16(value);
        upper |= nearest << 16 * i;
        lower |= round_to_float16(value - widen_float16_bits(nearest)) << 16 * i;
      }
      words[token * kTokenStride + pair] = upper;
      words[(kTileTokens + token) * kTokenStride + pair] = lower;
    }
  }

  // Two columns of two neighbours' rows at a time where both can be loaded together.
  KVS_DEVICE void load_rows(const Strip& strip, std::uint32_t c, std::uint32_t* rows) const {
    const auto* matrix = reinterpret_cast<const std::uint16_t*>(strip.job.matrix) + strip.first;
    const bool together = strip.job.dim % 2 == 0;
    for (std::uint32_t item = simt::thread(); item < kPairs * kTileColumns / 2; item += kTileThreads) {
      const std::uint32_t pair = item / (kTileColumns / 2), column = item % (kTileColumns / 2) * 2;
      std::uint32_t found[2];  // of a component: two columns
      KVS_UNROLL
      for (std::uint32_t i = 0; i < 2; ++i) {
        const bool there = c + 2 * pair + i < strip.coded && column < strip.columns;
        const std::uint64_t component = there ? strip.order[strip.job.order + c + 2 * pair + i] : 0;
        const std::uint16_t* from = matrix + component * strip.n() + column;
        found[i] = 0;
        if (there && together) found[i] = *reinterpret_cast<const std::uint32_t*>(from);
        if (there && !together) {
          found[i] = from[0] | (column + 1 < strip.columns ? static_cast<std::uint32_t>(from[1]) << 16 : 0);
        }
      }
      rows[pair * kRowStride + column] = (found[0] & 0xFFFF) | found[1] << 16;
      rows[pair * kRowStride + column + 1] = found[0] >> 16 | (found[1] & 0xFFFF0000);
    }
  }

  float sums_[kAcross][4] = {};
};

}  // namespace kvs
