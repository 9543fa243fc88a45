// The first encode kernel: classes of components, and rows of low bits. lossless_encode.cu has the whole.
#pragma once

#include "choose_class.h"
#include "lossless_encode.h"

namespace kvs {

// Shared memory: the costs, then for each warp its counts and a tile: 36,544 bytes for 4 warps, so that a
// multiprocessor of 227 KB holds 24.
struct LosslessClassKernel {
  static constexpr std::uint32_t kWarps = 4, kThreads = kWarps * kLanes, kResident = 6;
  static constexpr std::uint32_t kParts = 16;  // warps share a head
  static constexpr std::uint32_t kWarpBytes = LaneCounts::kBytes + BlockValues::kTileBytes;
  static constexpr std::uint32_t kSharedBytes = kCostBytes + kWarps * kWarpBytes;

  const KvsLosslessEncodeJob* jobs;
  std::uint32_t count;
  KvsPages pages;

  KVS_DEVICE void operator()() const {
    auto* costs = reinterpret_cast<std::uint32_t*>(simt::shared_memory());
    load_costs(costs);
    simt::sync_block();
    for (std::uint32_t piece = simt::block() * simt::warps() + simt::warp(); piece < count * kParts;
         piece += simt::blocks() * simt::warps()) {
      const KvsLosslessEncodeJob& job = jobs[piece / kParts];
      const std::uint32_t blocks = HeadSize::of(job, pages.dim).blocks();
      for (std::uint32_t block = piece % kParts; block < blocks; block += kParts) {
        class_block(job, block, costs);
      }
    }
  }

  KVS_DEVICE void class_block(const KvsLosslessEncodeJob& job, std::uint32_t block,
                              const std::uint32_t* costs) const {
    std::uint8_t* own = simt::shared_memory() + kCostBytes + simt::warp() * kWarpBytes;
    auto* tile = reinterpret_cast<std::uint16_t*>(own + LaneCounts::kBytes);
    const HeadSize size = HeadSize::of(job, pages.dim);
    std::uint8_t* rows = scratch_of(job) + HeadScratch::of(size).rows + size.row_bytes_before(block);
    const std::uint32_t row_bytes = size.row_bytes(block);
    const std::uint32_t tokens = job.tokens;
    const std::uint32_t counted = tokens < kMostCounted ? tokens : kMostCounted;

    const LaneCounts counts(own);
    counts.clear();
    Glance seen;
    BlockValues values(pages, job, block);
    values.fetch(0);
    for (std::uint32_t token = 0; token < tokens; token += kTileTokens) {
      simt::sync_warp();  // all have read the tile before
      values.put(tile);
      values.fetch(token + kTileTokens);
      simt::sync_warp();
      look_at(tile, token < counted ? counted - token : 0, counts, seen);
      if (token + simt::lane() / 4 < tokens) {
        pack_row(tile, rows + (token + simt::lane() / 4) * static_cast<std::uint64_t>(row_bytes), row_bytes);
      }
    }
    if (simt::lane() < size.lanes(block)) {
      classes_of(job)[block * kLanes + simt::lane()] = static_cast<std::uint16_t>(
          choose_class(counts, seen, values, static_cast<std::int32_t>(counted), costs));
    }
  }

  KVS_DEVICE static void look_at(const std::uint16_t* tile, std::uint32_t rows, const LaneCounts& counts,
                                 Glance& seen) {
    std::uint32_t values[kTileTokens];  // all are read before one is counted
    KVS_UNROLL for (std::uint32_t i = 0; i < kTileTokens; ++i) values[i] = tile[i * kLanes + simt::lane()];
    KVS_UNROLL for (std::uint32_t i = 0; i < kTileTokens; ++i) {
      if (i >= rows) break;
      seen.see(values[i]);
      counts.count(values[i]);
    }
  }

  // A lane packs 8 values of one token: 16 bytes of the tile into 6 of the row.
  KVS_DEVICE static void pack_row(const std::uint16_t* tile, std::uint8_t* row, std::uint32_t row_bytes) {
    const SixteenBytes eight = reinterpret_cast<const SixteenBytes*>(tile)[simt::lane()];
    std::uint64_t packed = 0;
    KVS_UNROLL for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t two = (eight.part[i] & 63) | (eight.part[i] >> 10 & 63 << kLowBits);
      packed |= static_cast<std::uint64_t>(two) << 12 * i;
    }
    const std::uint32_t at = simt::lane() % 4 * kLowBits;
    if (row_bytes == kLanes * kLowBits / 8) {
      auto* to = reinterpret_cast<std::uint16_t*>(row + at);
      KVS_UNROLL for (std::uint32_t i = 0; i < 3; ++i) to[i] = static_cast<std::uint16_t>(packed >> 16 * i);
    } else {
      for (std::uint32_t i = 0; i < 6 && at + i < row_bytes; ++i)
        row[at + i] = static_cast<std::uint8_t>(packed >> 8 * i);
    }
  }
};

}  // namespace kvs
