// Codec 3 on a GPU, second kernel, for spans group and all where MultiplyTiles does not take them: x = mean +
// S y as a matrix product of floats. A block makes a tile of 64 tokens x one plane (dim numbers), going
// through the coded components 32 at a time in coding order. 2,048 operations for a value in a span of 4
// layers of dim 128: some 50 TFLOP/s, 50 GB/s of bf16 on an H100, as predicted.
//
// Shared memory: the operands of a step, 25 KB, and 64 x dim floats of x: 57 KB at dim 128, 89 KB at most.
#pragma once

#include "scalable_product.h"
#include "scalable_tiles.h"

namespace kvs {

template <DeviceDtype dtype>
struct MultiplyWide {
  static constexpr std::uint32_t kThreads = kTileThreads, kResident = 2;

  const KvsScalableJob* jobs;
  std::uint32_t count;
  std::uint32_t token_tiles, planes;  // of a job, the most
  KvsPages pages;
  const std::int16_t* numbers;
  const std::uint32_t* order;
  const std::uint32_t* faults;

  static std::uint32_t shared_bytes(std::uint32_t dim) {
    return FloatProduct::kSharedBytes + 4 * kTileTokens * dim;
  }

  KVS_DEVICE void operator()() const {
    const std::uint64_t each = std::uint64_t{token_tiles} * planes, all = each * count;
    for (std::uint64_t i = simt::block(); i < all; i += simt::blocks()) {
      const auto index = static_cast<std::uint32_t>(i / each);
      const auto plane = static_cast<std::uint32_t>(i % planes);
      const std::uint32_t begin = static_cast<std::uint32_t>(i % each / planes) * kTileTokens;
      const KvsScalableJob& job = jobs[index];
      if (job.span < 2 || takes_tiles(job) || faults[index] != 0 || begin >= job.tokens) continue;
      if (plane >= 2u * job.layers * job.heads || !is_wanted(job, plane)) continue;
      finish(job,
             {begin, job.tokens - begin < kTileTokens ? job.tokens : begin + kTileTokens, plane, plane + 1});
      simt::sync_block();  // before the next tile's operands go where this one's were
    }
  }

 private:
  KVS_DEVICE float* shared_x() const {
    return reinterpret_cast<float*>(simt::shared_memory() + FloatProduct::kSharedBytes);
  }

  KVS_DEVICE void finish(const KvsScalableJob& job, const Tile& tile) const {
    if (job.exact_count != kRawStream) {
      for (std::uint32_t column = 0; column < job.dim; column += kTileColumns) multiply(job, tile, column);
      simt::sync_block();
      write_tile<dtype>(job, pages, tile, shared_x(), job.dim);
      simt::sync_block();  // exact tokens come last
    }
    write_exact<dtype>(job, pages, tile);
  }

  KVS_DEVICE void multiply(const KvsScalableJob& job, const Tile& tile, std::uint32_t column) const {
    const Strip strip(job, numbers, order, tile, column);
    FloatProduct product;
    if (strip.coded != 0) product.fetch(strip, 0);
    for (std::uint32_t c = 0; c < strip.coded; c += kLanes) {
      simt::sync_block();  // the step before has read what this one overwrites
      product.put(strip, simt::shared_memory());
      simt::sync_block();
      if (c + kLanes < strip.coded) product.fetch(strip, c + kLanes);  // arrives while this step multiplies
      product.add(strip, simt::shared_memory());
    }
    product.store(strip, shared_x() + column, job.dim);
  }
};

template <DeviceDtype dtype>
struct MultiplyTiles {
  static constexpr std::uint32_t kThreads = TileProduct::kThreads, kResident = 1;
  static constexpr std::uint32_t kSharedBytes = TileProduct::kSharedBytes;

  const KvsScalableJob* jobs;
  std::uint32_t count;
  std::uint32_t token_tiles, column_tiles;  // of a job, the most
  KvsPages pages;
  const std::int16_t* numbers;
  const std::uint32_t* order;
  const std::uint32_t* faults;

  // Tiles that are beside each other, of planes of `dim` numbers at most.
  static std::uint32_t count_columns(std::uint32_t planes, std::uint32_t dim) {
    const std::uint32_t across = TileProduct::kColumns / dim;
    return (planes + across - 1) / across;
  }

  KVS_DEVICE void operator()() const {
    const std::uint64_t each = std::uint64_t{token_tiles} * column_tiles, all = each * count;
    for (std::uint64_t i = simt::block(); i < all; i += simt::blocks()) {
      const auto index = static_cast<std::uint32_t>(i / each), within = static_cast<std::uint32_t>(i % each);
      const KvsScalableJob& job = jobs[index];
      if (!takes_tiles(job) || faults[index] != 0) continue;
      const std::uint32_t across = TileProduct::kColumns / job.dim, planes = 2u * job.layers * job.heads;
      const std::uint32_t first = within % column_tiles * across;
      const std::uint32_t begin = within / column_tiles * TileProduct::kTokens;
      if (begin >= job.tokens || first >= planes) continue;
      const Tile tile{begin, smaller(job.tokens, begin + TileProduct::kTokens), first,
                      smaller(planes, first + across)};
      if (!is_wanted(job, tile)) continue;
      finish(job, tile);
      simt::sync_block();  // before the next tile's operands go where this one's values were
    }
  }

 private:
  static KVS_DEVICE std::uint32_t smaller(std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }

  KVS_DEVICE void finish(const KvsScalableJob& job, const Tile& tile) const {
    if (job.exact_count != kRawStream) {
      const TileSource source(job, numbers, order, tile);
      TileProduct product;
      product.multiply(source);
      KVS_UNROLL
      for (std::uint32_t half = 0; half < TileProduct::kDown; ++half) {
        const std::uint32_t begin = tile.begin + half * TileProduct::kWarpTokens;
        if (begin >= tile.end) break;
        product.store(source, half);
        simt::sync_block();
        write_tile<dtype>(job, pages,
                          {begin, smaller(tile.end, begin + TileProduct::kWarpTokens), tile.first, tile.last},
                          reinterpret_cast<const float*>(simt::shared_memory()), TileProduct::kStride);
        simt::sync_block();  // exact tokens come last
      }
    }
    write_exact<dtype>(job, pages, tile);
  }
};

}  // namespace kvs
