// Codec 3 on a GPU, second kernel, for spans group and all: x = mean + S y as a matrix product. A block makes
// a tile of 64 tokens x one plane (dim numbers), going through the coded components 32 at a time in coding
// order: those numbers are one piece of scratch, the rows of S are picked by the order, and what is not coded
// costs nothing.
//
// What it costs. Span group of 4 layers, dim 128: up to 2,048 operations for a value, 17.6 TFLOP for 128K
// tokens of an 8B model, done twice by TensorProduct. A tile of 128 columns reads 64 x 32 numbers (4 KB) and
// 32 rows of S (8 KB of float16) for 1 MFLOP, from L2 where blocks that run at once share both: planes change
// fastest, and jobs of one unit should be neighbours.
//
// Shared memory: the operands of a step (19 KB for tensor cores, 25 KB for floats), and 64 x dim floats of x:
// 51 and 57 KB at dim 128, 89 KB at most.
#pragma once

#include "scalable_product.h"

namespace kvs {

template <DeviceDtype dtype, typename Product>
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
    return Product::kSharedBytes + 4 * kTileTokens * dim;
  }

  KVS_DEVICE void operator()() const {
    const std::uint64_t each = std::uint64_t{token_tiles} * planes, all = each * count;
    for (std::uint64_t i = simt::block(); i < all; i += simt::blocks()) {
      const auto index = static_cast<std::uint32_t>(i / each);
      const auto plane = static_cast<std::uint32_t>(i % planes);
      const std::uint32_t begin = static_cast<std::uint32_t>(i % each / planes) * kTileTokens;
      const KvsScalableJob& job = jobs[index];
      if (!is_own(job) || faults[index] != 0 || begin >= job.tokens) continue;
      if (plane >= 2u * job.layers * job.heads || !is_wanted(job, plane)) continue;
      finish(job,
             {begin, job.tokens - begin < kTileTokens ? job.tokens : begin + kTileTokens, plane, plane + 1});
      simt::sync_block();  // before the next tile's operands go where this one's were
    }
  }

 private:
  static KVS_DEVICE bool is_own(const KvsScalableJob& job) {
    return job.span > 1 && (job.matrix_bytes == 4) == (Product::kMatrixBytes == 4);
  }

  KVS_DEVICE float* shared_x() const {
    return reinterpret_cast<float*>(simt::shared_memory() + Product::kSharedBytes);
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
    Product product;
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

}  // namespace kvs
