// A tile's product without tensor cores: 64 tokens x 32 components with 32 components x 128 columns of S,
// operands in shared memory, sums in registers, multiplications and additions of floats fused. For what
// MultiplyTiles does not take: matrices of floats, and rows that are no multiple of 16 bytes.
//
// Sums are taken in another order than the host's: before rounding they differ by less than 2^-20 of the
// largest value; of bf16 values 1 in 2,000 comes out as the neighbour (1,024 components; of MultiplyTiles
// too: it is the order, not float16, that does it).
#pragma once

#include "scalable_finish.h"

namespace kvs {

inline constexpr std::uint32_t kTileTokens = 64, kTileColumns = 128, kTileThreads = 256;

// The part of the product that a block makes now; copies of what the job says, which would be read again
// after each store.
struct Strip {
  const KvsScalableJob& job;
  const std::uint32_t* order;   // of the job
  const std::int16_t* numbers;  // of the job
  const float* scale;
  std::uint32_t begin, tokens;   // of the tile
  std::uint32_t first, columns;  // of x
  std::uint32_t coded;           // components at the last level that was read
  std::uint64_t n;

  KVS_DEVICE Strip(const KvsScalableJob& of, const std::int16_t* all_numbers, const std::uint32_t* all_order,
                   const Tile& tile, std::uint32_t column)
      : job(of),
        order(all_order + of.order),
        numbers(all_numbers + of.numbers),
        scale(reinterpret_cast<const float*>(of.scale)),
        begin(tile.begin),
        tokens(tile.end - tile.begin),
        first(tile.first * of.dim + column),
        columns(of.dim - column < kTileColumns ? of.dim - column : kTileColumns),
        coded(of.coded[of.levels - 1]),
        n(2ull * of.layers * of.heads * of.dim) {}

  // The number of component `c` of the coding order and a token of the tile.
  KVS_DEVICE std::int32_t number(std::uint32_t c, std::uint32_t token) const {
    return numbers[place_of_octet(c, begin + token, job.tokens) + (begin + token) % kOctet];
  }
  // S, of component `c` and a column of the strip.
  KVS_DEVICE float weight(std::uint32_t c, std::uint32_t column) const {
    const std::uint64_t at = number_of(order[c]) * n + first + column;
    if (job.matrix_bytes == 4) return reinterpret_cast<const float*>(job.matrix)[at];
    return widen_float16_bits(reinterpret_cast<const std::uint16_t*>(job.matrix)[at]);
  }
  KVS_DEVICE float shift(std::uint32_t component) const {
    return reinterpret_cast<const PackedTables*>(job.tables)->shift[job.levels - 1][class_of(component)];
  }
};

// A thread has 4 tokens x 8 columns: 1,024 fused multiplications a step on 96 loads from shared memory.
class FloatProduct {
 public:
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
      numbers_[i] = token < strip.tokens ? strip.number(c + lane, token) : 0;
    }
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnWeights; ++i) {
      const std::uint32_t row = (simt::thread() + i * kTileThreads) / kTileColumns;
      const std::uint32_t column = simt::thread() % kTileColumns;
      const bool inside = c + row < strip.coded && column < strip.columns;
      weights_[i] = inside ? strip.weight(c + row, column) : 0;
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

}  // namespace kvs
