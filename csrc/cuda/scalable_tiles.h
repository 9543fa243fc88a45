// A tile of x = mean + S y as a product on tensor cores, for spans group and all of codec 3. A block makes a
// tile of 128 tokens x 256 columns of x (two planes of 128 numbers), going through the coded components 32 at
// a time, against the coding order: what is not coded costs nothing. A warp has 64 x 64 of them: 128 sums in
// each lane.
//
// Precision. S is float16, as calibrations hold it; y, scaled as its row of S is and shrunk into what float16
// holds, is rounded to one, so that each component is off by up to 2^-12 of itself: docs/FORMAT.md states
// that bound. Quantisation was off by up to half a step before, and a component of 2^11 steps is rounded by
// no more than that; most have less than 100. Sums are floats. Tensor cores cut off what a sum cannot hold
// instead of rounding it, each time that they add to it: so the largest components come last, and most of
// that happens while sums are small.
//
// What it costs: a step of a warp (64 x 64 x 32) is 64 tensor instructions; docs/gpu.md counts the others.
// Numbers are converted where they are multiplied, once for each tile: half as many bytes are in scratch as
// if they were stored converted, and while tensor cores are busy there are instructions to spare.
//
// Shared memory: two buffers of y (8 KB each) and four of S (16 KB each): 80 KB; the tile's x, 64 tokens at a
// time, lies where they were.
#pragma once

#include "scalable_finish.h"
#include "scalable_tensor.h"

namespace kvs {

// Where a tile's operands come from; copies of what the job says, which would be read again after each store.
struct TileSource {
  const Octet* numbers;  // of the tile's first token
  const std::uint32_t* order;
  const std::uint8_t* matrix;  // at the tile's first column
  const float* scale;
  const float* shift;          // by class
  const float* mean;           // of the tile's first column
  std::uint32_t row_bytes;     // of S
  std::uint32_t block_octets;  // from one block of components to the next
  std::uint32_t octets, columns, coded, steps;
  float factor, grow;  // of y; of the sums

  KVS_DEVICE TileSource(const KvsScalableJob& job, const std::int16_t* all_numbers,
                        const std::uint32_t* all_order, const Tile& tile)
      : numbers(reinterpret_cast<const Octet*>(all_numbers + job.numbers) +
                std::uint64_t{tile.begin} / kOctet * kLanes),
        order(all_order + job.order),
        matrix(reinterpret_cast<const std::uint8_t*>(job.matrix) + 2ull * tile.first * job.dim),
        scale(reinterpret_cast<const float*>(job.scale)),
        shift(reinterpret_cast<const PackedTables*>(job.tables)->shift[job.levels - 1]),
        mean(reinterpret_cast<const float*>(job.mean) + tile.first * job.dim),
        row_bytes(4u * job.layers * job.heads * job.dim),
        block_octets(static_cast<std::uint32_t>(padded_tokens(job.tokens) / kOctet * kLanes)),
        octets((tile.end - tile.begin + kOctet - 1) / kOctet),
        columns((tile.last - tile.first) * job.dim),
        coded(job.coded[job.levels - 1]),
        steps((coded + kLanes - 1) / kLanes),
        factor(job.shrink * level_scale(job.levels - 1u)),
        grow(job.grow) {}

  // The first component of a step: blocks from the last, and smallest, to the first; behind all of them where
  // there is no such step.
  KVS_DEVICE std::uint32_t first_of(std::uint32_t step) const {
    return step < steps ? (steps - 1 - step) * kLanes : coded;
  }
};

// One tile on its way.
class TileProduct {
 public:
  static constexpr std::uint32_t kTokens = 128, kColumns = 256, kThreads = 256;
  static constexpr std::uint32_t kWarpTokens = 64, kWarpColumns = 64, kDown = kTokens / kWarpTokens;
  static constexpr std::uint32_t kLeftBytes = 2 * kTokens * kLanes, kRightBytes = 2 * kLanes * kColumns;
  static constexpr std::uint32_t kLefts = 2, kRights = 4;
  static constexpr std::uint32_t kSharedBytes = kLefts * kLeftBytes + kRights * kRightBytes;
  static constexpr std::uint32_t kStride = kColumns + 8;  // of x: banks apart
  static_assert(kThreads / simt::kWarp * kWarpTokens * kWarpColumns == kTokens * kColumns);
  static_assert(4 * kWarpTokens * kStride <= kSharedBytes);

  // All steps; shared memory is free afterwards.
  KVS_DEVICE void multiply(const TileSource& source) {
    const bool whole = source.columns == kColumns && source.octets == kTokens / kOctet;
    look_up_rows(source, 0);
    KVS_UNROLL
    for (std::uint32_t step = 0; step < kRights - 1; ++step) copy_right(source, step);
    component_ = find_component(source, 0);
    fetch_left(source, 0);
    put_left(0);
    fetch_left(source, 1);
    KVS_UNROLL_NO
    for (std::uint32_t step = 0; step < source.steps; ++step) {
      wait_for_batches<kRights - 2>();
      simt::sync_block();  // operands of this step are there, those of the step before were read
      copy_right(source, step + kRights - 1);
      put_left(step + 1);
      fetch_left(source, step + 2);
      if (whole) {
        add<true>(source, step);
      } else {
        add<false>(source, step);
      }
    }
    wait_for_batches<0>();
    simt::sync_block();
  }

  // x, with the mean, of the 64 tokens from 64 `half` on.
  KVS_DEVICE void store(const TileSource& source, std::uint32_t half) const {
    if (simt::warp() % kDown != half) return;
    auto* x = reinterpret_cast<float*>(simt::shared_memory());
    const std::uint32_t row = simt::lane() / 4;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kAcross; ++i) {
      const std::uint32_t column = first_column() + 8 * i + simt::lane() % 4 * 2;
      if (column >= source.columns) break;
      const Two mean{source.mean[column], source.mean[column + 1]};
      KVS_UNROLL
      for (std::uint32_t j = 0; j < 2 * kSums; ++j) {
        const float (&sums)[4] = sums_[j / 2][i];
        *reinterpret_cast<Two*>(x + (row + 8 * j) * kStride + column) = {
            multiply_add(sums[j % 2 * 2], source.grow, mean.first),
            multiply_add(sums[j % 2 * 2 + 1], source.grow, mean.second)};
      }
    }
  }

 private:
  static constexpr std::uint32_t kWarps = kThreads / simt::kWarp;
  static constexpr std::uint32_t kOwnOctets = kTokens / kOctet / kWarps, kOwnRows = kLanes / kWarps;
  static constexpr std::uint32_t kSums = kWarpTokens / 16, kAcross = kWarpColumns / 8;
  static constexpr std::uint32_t kRightRow = 2 * kColumns;

  struct alignas(8) Two {
    float first, second;
  };

  static KVS_DEVICE std::uint32_t first_column() { return simt::warp() / kDown * kWarpColumns; }
  static KVS_DEVICE std::uint32_t first_octet() { return simt::warp() % kDown * (kWarpTokens / kOctet); }
  static KVS_DEVICE std::uint32_t right_at(std::uint32_t step) {
    return kLefts * kLeftBytes + step % kRights * kRightBytes;
  }

  // Begins to copy rows of S, 16 bytes by each lane, a row by each warp. Where a row lies is known a step
  // before. Within eight rows places of 16 bytes change, so that the same place of all lies in all banks.
  KVS_DEVICE void copy_right(const TileSource& source, std::uint32_t step) {
    if (step < source.steps) {
      static_assert(kWarps == 8);  // so that a warp's rows are alike
      const std::uint32_t to =
          shared_address() + right_at(step) + simt::warp() * kRightRow + 16 * (simt::lane() ^ simt::warp());
      const std::uint8_t* const own = source.matrix + 16 * simt::lane();
      const std::uint32_t first = source.first_of(step) + simt::warp();
      const bool inside = 8 * simt::lane() < source.columns;
      KVS_UNROLL
      for (std::uint32_t i = 0; i < kOwnRows; ++i) {
        const std::uint8_t* from = own + std::uint64_t{rows_[i]} * source.row_bytes;
        copy_later(to + i * kWarps * kRightRow, from, inside && first + i * kWarps < source.coded);
      }
      look_up_rows(source, step + 1);
    }
    end_batch();
  }

  KVS_DEVICE void look_up_rows(const TileSource& source, std::uint32_t step) {
    const std::uint32_t first = source.first_of(step) + simt::warp();
    const std::uint32_t* const own = source.order + first;
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnRows; ++i)
      rows_[i] = first + i * kWarps < source.coded ? number_of(own[i * kWarps]) : 0;
  }

  // The lane's component of a step, and none where there is none.
  static KVS_DEVICE std::uint32_t find_component(const TileSource& source, std::uint32_t step) {
    const std::uint32_t c = source.first_of(step) + simt::lane();
    return c < source.coded ? source.order[c] : kNone;
  }

  // The numbers of a step on their way into registers, with what they are scaled by.
  KVS_DEVICE void fetch_left(const TileSource& source, std::uint32_t step) {
    const bool there = component_ != kNone;
    factor_ = there ? source.scale[number_of(component_)] * source.factor : 0;
    shift_ = there ? source.shift[class_of(component_)] * factor_ : 0;
    component_ = find_component(source, step + 1);
    const Octet* const own = source.numbers + source.first_of(step) / kLanes * source.block_octets +
                             simt::warp() * kLanes + simt::lane();
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnOctets; ++i) {
      const bool inside = step < source.steps && simt::warp() + i * kWarps < source.octets;
      numbers_[i] = inside ? own[i * kWarps * kLanes] : Octet{};
    }
  }

  // And from there into shared memory, [octet][component][8 tokens].
  KVS_DEVICE void put_left(std::uint32_t step) const {
    auto* own = reinterpret_cast<Octet*>(simt::shared_memory() + step % kLefts * kLeftBytes) +
                simt::warp() * kLanes + simt::lane();
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kOwnOctets; ++i) {
      Octet values;
      KVS_UNROLL
      for (std::uint32_t j = 0; j < kOctet / 2; ++j)
        values.pairs[j] = round_to_float16s(value_of(number_in(numbers_[i].pairs[j], 0)),
                                            value_of(number_in(numbers_[i].pairs[j], 1)));
      own[i * kWarps * kLanes] = values;
    }
  }

  // `reconstruct` times `factor_`, which is in `shift_` already. A sign times `shift_` is exact: it does not
  // matter whether the sum is fused.
  KVS_DEVICE float value_of(std::int32_t number) const {
    const float from = static_cast<float>(number);
    const float sign = clamp_to_sign(from);
    return multiply_add(-sign, shift_, from * factor_);
  }

  // Of a tile that is not `whole`, what is beyond it is left out.
  template <bool whole>
  KVS_DEVICE void add(const TileSource& source, std::uint32_t step) {
    const std::uint32_t base = shared_address(), matrix = simt::lane() / 8, row = simt::lane() % 8;
    // Lanes 8 to 15 point at the next octet, 16 to 31 at components 8 to 15; of S: the other way around.
    const std::uint32_t left = base + step % kLefts * kLeftBytes +
                               (first_octet() + matrix % 2) * 16 * kLanes + 16 * (matrix / 2 * 8 + row);
    const std::uint32_t right =
        right_at(step) + (matrix % 2 * 8 + row) * kRightRow + 2 * first_column() + 16 * (matrix / 2 ^ row);
    KVS_UNROLL
    for (std::uint32_t half = 0; half < 2; ++half) {
      std::uint32_t weights[kAcross / 2][4];
      KVS_UNROLL
      for (std::uint32_t i = 0; i < kAcross / 2; ++i) {
        if (!whole && first_column() + 16 * i >= source.columns) break;
        load_turned(weights[i], base + (right ^ 32 * i) + half * 16 * kRightRow);
      }
      KVS_UNROLL
      for (std::uint32_t i = 0; i < kSums; ++i) {
        if (!whole && first_octet() + 2 * i >= source.octets) break;
        std::uint32_t values[4];
        load_turned(values, left + i * 32 * kLanes + half * 256);
        add_row<whole>(source, sums_[i], values, weights);
      }
    }
  }

  template <bool whole>
  static KVS_DEVICE void add_row(const TileSource& source, float (&sums)[kAcross][4],
                                 const std::uint32_t (&values)[4],
                                 const std::uint32_t (&weights)[kAcross / 2][4]) {
    KVS_UNROLL
    for (std::uint32_t i = 0; i < kAcross / 2; ++i) {
      if (!whole && first_column() + 16 * i >= source.columns) break;
      add_tensor_product(sums[2 * i], values, weights[i][0], weights[i][1]);
      add_tensor_product(sums[2 * i + 1], values, weights[i][2], weights[i][3]);
    }
  }

  static constexpr std::uint32_t kNone = 0xFFFFFFFFu;

  std::uint32_t rows_[kOwnRows];
  std::uint32_t component_;
  float factor_, shift_;  // of y: its number's factor, and what it is pulled in by
  Octet numbers_[kOwnOctets];
  float sums_[kSums][kAcross][4] = {};
};

}  // namespace kvs
