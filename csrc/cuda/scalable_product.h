// Two ways to multiply a tile: 64 tokens x 32 components with 32 components x 128 columns of S, operands in
// shared memory, sums in registers. FloatProduct fuses multiplications and additions of floats. TensorProduct
// takes matrices of float16, which is what calibrations hold: y goes in as a sum of two float16, so that
// products are exact to 22 bits and the sum is a float's; two tensor instructions for what one would do with
// half the bits.
//
// Sums are taken in another order than the host's: before rounding they differ by less than 2^-20 of the
// largest value; of bf16 values 1 in 2,000 comes out as the neighbour (1,024 components, either product: it
// is the order, not float16, that does it).
#pragma once

#include "scalable_finish.h"
#include "scalable_tensor.h"

namespace kvs {

inline constexpr std::uint32_t kTileTokens = 64, kTileColumns = 128, kTileThreads = 256;

// The part of the product that a block makes now; copies of what the job says, which would be read again
// after each store.
struct Strip {
  const KvsScalableJob& job;
  const std::uint32_t* order;   // of the job
  const std::int16_t* numbers;  // of the tile's first token
  const float* scale;
  std::uint32_t tokens, all_tokens;  // of the tile, of the job
  std::uint32_t first, columns;      // of x
  std::uint32_t coded;               // components at the last level that was read
  std::uint64_t n;

  KVS_DEVICE Strip(const KvsScalableJob& of, const std::int16_t* all_numbers, const std::uint32_t* all_order,
                   const Tile& tile, std::uint32_t column)
      : job(of),
        order(all_order + of.order),
        numbers(all_numbers + of.numbers + std::uint64_t{tile.begin} * kLanes),
        scale(reinterpret_cast<const float*>(of.scale)),
        tokens(tile.end - tile.begin),
        all_tokens(of.tokens),
        first(tile.first * of.dim + column),
        columns(of.dim - column < kTileColumns ? of.dim - column : kTileColumns),
        coded(of.coded[of.levels - 1]),
        n(2ull * of.layers * of.heads * of.dim) {}

  // The numbers of the 32 components from `c` on, a row of them for each token.
  KVS_DEVICE const std::int16_t* block(std::uint32_t c) const {
    return numbers + static_cast<std::uint64_t>(c) * all_tokens;
  }
  KVS_DEVICE float shift(std::uint32_t component) const {
    return reinterpret_cast<const PackedTables*>(job.tables)->shift[job.levels - 1][class_of(component)];
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

  // Operands of 32 components on their way, from memory into registers.
  KVS_DEVICE void fetch(const Strip& strip, std::uint32_t c) {
    const std::uint32_t lane = simt::lane();
    const bool there = c + lane < strip.coded;
    const std::uint32_t component = there ? strip.order[c + lane] : 0;
    factor_ = there ? strip.scale[number_of(component)] : 0;
    shift_ = strip.shift(component);
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnNumbers; ++i) {
      const std::uint32_t token = simt::warp() + i * (kTileThreads / simt::kWarp);
      numbers_[i] = token < strip.tokens ? strip.block(c)[token * kLanes + lane] : 0;
    }
    const auto* matrix = reinterpret_cast<const float*>(strip.job.matrix) + strip.first;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnWeights; ++i) {
      const std::uint32_t row = (simt::thread() + i * kTileThreads) / kTileColumns;
      const std::uint32_t column = simt::thread() % kTileColumns;
      const bool inside = c + row < strip.coded && column < strip.columns;
      weights_[i] = inside ? matrix[number_of(strip.order[c + row]) * strip.n + column] : 0;
    }
  }

  // And from there into shared memory: y [component][token], scaled as their rows of S are, then these rows.
  KVS_DEVICE void put(const Strip& strip, std::uint8_t* shared) const {
    auto* y = reinterpret_cast<float*>(shared);
    const float scale = level_scale(strip.job.levels - 1u);
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnNumbers; ++i) {
      const std::uint32_t token = simt::warp() + i * (kTileThreads / simt::kWarp);
      y[simt::lane() * kTokenStride + token] = reconstruct(numbers_[i], shift_, scale) * factor_;
    }
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnWeights; ++i) {
      y[kLanes * kTokenStride + simt::thread() + i * kTileThreads] = weights_[i];
    }
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
  static constexpr std::uint32_t kOwnNumbers = kTileTokens * kLanes / kTileThreads;
  static constexpr std::uint32_t kOwnWeights = kTileColumns * kLanes / kTileThreads;

  float factor_, shift_;
  std::int32_t numbers_[kOwnNumbers];
  float weights_[kOwnWeights];
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

  // Operands of 32 components on their way, from memory into registers: two neighbours' numbers of some
  // tokens, and two columns of two neighbours' rows.
  KVS_DEVICE void fetch(const Strip& strip, std::uint32_t c) {
    const std::uint32_t pair = simt::thread() % kPairs;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < 2; ++i) {
      const bool there = c + 2 * pair + i < strip.coded;
      const std::uint32_t component = there ? strip.order[c + 2 * pair + i] : 0;
      factors_[i] = there ? strip.scale[number_of(component)] * strip.job.shrink : 0;
      shifts_[i] = strip.shift(component);
    }
    const auto* from = reinterpret_cast<const std::uint32_t*>(strip.block(c)) + pair;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnNumbers; ++i) {
      const std::uint32_t token = simt::thread() / kPairs + i * (kTileThreads / kPairs);
      numbers_[i] = token < strip.tokens ? from[token * kPairs] : 0;
    }
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnWeights; ++i) {
      const std::uint32_t first = c + 2 * ((simt::thread() + i * kTileThreads) / kTwoColumns);
      KVS_UNROLL
      for (std::uint32_t j = 0; j < 2; ++j)
        weights_[i][j] = first + j < strip.coded ? fetch_two(strip, first + j) : 0;
    }
  }

  // And from there into shared memory: y, scaled as their rows of S are and shrunk into what float16 holds,
  // as the nearest and what is left over; then these rows.
  KVS_DEVICE void put(const Strip& strip, std::uint8_t* shared) const {
    auto* words = reinterpret_cast<std::uint32_t*>(shared);
    const float scale = level_scale(strip.job.levels - 1u);
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnNumbers; ++i) {
      std::uint32_t upper = 0, lower = 0;
      KVS_UNROLL
      for (std::uint32_t j = 0; j < 2; ++j) {
        const auto number = static_cast<std::int16_t>(numbers_[i] >> 16 * j);
        const float value = reconstruct(number, shifts_[j], scale) * factors_[j];
        const std::uint32_t nearest = round_to_float16(value);
        upper |= nearest << 16 * j;
        lower |= round_to_float16(value - widen_float16_bits(nearest)) << 16 * j;
      }
      const std::uint32_t token = simt::thread() / kPairs + i * (kTileThreads / kPairs);
      words[token * kTokenStride + simt::thread() % kPairs] = upper;
      words[(kTileTokens + token) * kTokenStride + simt::thread() % kPairs] = lower;
    }
    std::uint32_t* rows = words + 2 * kTileTokens * kTokenStride + simt::thread() % kTwoColumns * 2;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnWeights; ++i) {
      std::uint32_t* row = rows + (simt::thread() + i * kTileThreads) / kTwoColumns * kRowStride;
      row[0] = (weights_[i][0] & 0xFFFF) | weights_[i][1] << 16;
      row[1] = weights_[i][0] >> 16 | (weights_[i][1] & 0xFFFF0000);
    }
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

  // Two columns of a component's row, together where they can be loaded together.
  static KVS_DEVICE std::uint32_t fetch_two(const Strip& strip, std::uint32_t c) {
    const std::uint32_t column = simt::thread() % kTwoColumns * 2;
    if (column >= strip.columns) return 0;
    const auto* matrix = reinterpret_cast<const std::uint16_t*>(strip.job.matrix) + strip.first + column;
    const std::uint16_t* from = matrix + number_of(strip.order[c]) * strip.n;
    if (strip.job.dim % 2 == 0) return *reinterpret_cast<const std::uint32_t*>(from);
    return from[0] | (column + 1 < strip.columns ? static_cast<std::uint32_t>(from[1]) << 16 : 0);
  }

  static constexpr std::uint32_t kTwoColumns = kTileColumns / 2;
  static constexpr std::uint32_t kOwnNumbers = kTileTokens * kPairs / kTileThreads;
  static constexpr std::uint32_t kOwnWeights = kTwoColumns * kPairs / kTileThreads;

  float factors_[2], shifts_[2];
  std::uint32_t numbers_[kOwnNumbers];
  std::uint32_t weights_[kOwnWeights][2];
  float sums_[kAcross][4] = {};
};

}  // namespace kvs
