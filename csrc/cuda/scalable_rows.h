// Codec 3 on a GPU, second kernel, for spans channel and head: a tile is a few tokens of one stream with all
// of their numbers, because the coding order mixes layers: rows of scratch are read once, and whole.
//
// Channel: x = mean + scale * y, the CPU's bits; 2 bytes read and 2 written for each value. Head: dim
// multiplications more for a value, float; the matrix (float16: 32 KB of a plane of dim 128) comes from L2
// for each tile, four tokens to a load.
//
// Shared memory: [tokens of a tile][components] floats and, for span head, [tokens][dim] more: 64 + 16 KB at
// most.
#pragma once

#include "scalable_finish.h"

namespace kvs {

template <DeviceDtype dtype>
struct FinishRows {
  static constexpr std::uint32_t kThreads = 256, kResident = 2;
  static constexpr std::uint32_t kMostFloats = 16384, kMostTokens = 16, kTogether = 4;
  static constexpr std::uint32_t kSharedBytes = 4 * (kMostFloats + kMostTokens * 256);  // at most

  const KvsScalableJob* jobs;
  std::uint32_t count;
  std::uint32_t tile_tokens, tiles;  // tiles of a job
  std::uint32_t components;          // the most
  KvsPages pages;
  const std::int16_t* numbers;
  const std::uint32_t* order;
  const std::uint32_t* faults;

  static std::uint32_t choose_tile(std::uint32_t components) {
    const std::uint32_t tokens = kMostFloats / (components ? components : 1);
    return tokens < 1 ? 1 : tokens < kMostTokens ? tokens : kMostTokens;
  }
  static std::uint32_t shared_bytes(std::uint32_t tile_tokens, std::uint32_t components, std::uint32_t dim) {
    return 4 * tile_tokens * (components + dim);
  }

  KVS_DEVICE void operator()() const {
    const std::uint64_t all = std::uint64_t{count} * tiles;
    for (std::uint64_t i = simt::block(); i < all; i += simt::blocks()) {
      const auto index = static_cast<std::uint32_t>(i / tiles);
      const KvsScalableJob& job = jobs[index];
      const std::uint32_t begin = static_cast<std::uint32_t>(i % tiles) * tile_tokens;
      if (job.span > 1 || faults[index] != 0 || begin >= job.tokens) continue;
      const std::uint32_t end = job.tokens - begin < tile_tokens ? job.tokens : begin + tile_tokens;
      finish(job, {begin, end, 0, 2u * job.layers});
      simt::sync_block();  // before the next tile's numbers go where this one's were
    }
  }

 private:
  KVS_DEVICE float* shared_x() const { return reinterpret_cast<float*>(simt::shared_memory()); }
  KVS_DEVICE float* shared_product() const { return shared_x() + tile_tokens * components; }

  KVS_DEVICE void finish(const KvsScalableJob& job, const Tile& tile) const {
    if (job.exact_count != kRawStream) {
      fill(job, tile);
      simt::sync_block();
      reconstruct_numbers(job, tile);
      simt::sync_block();
      if (job.span == 0) {
        write_tile<dtype>(job, pages, tile, shared_x(), components);
      } else {
        write_products(job, tile);
      }
      simt::sync_block();
    }
    write_exact<dtype>(job, pages, tile);
  }

  // Factor and mean of a number of span channel.
  struct Affine {
    float scale, mean;

    KVS_DEVICE Affine(const KvsScalableJob& job, std::uint32_t i) {
      if (job.calibrated) {
        scale = reinterpret_cast<const float*>(job.scale)[i];
        mean = reinterpret_cast<const float*>(job.mean)[i];
      } else {
        scale = reinterpret_cast<const float*>(job.steps)[i / job.dim];
        mean = scale * (9.0f * static_cast<float>(reinterpret_cast<const std::int8_t*>(job.means)[i]));
      }
    }

    KVS_DEVICE float operator()(float y) const { return mean + scale * y; }
  };

  // What components are that are not coded.
  KVS_DEVICE void fill(const KvsScalableJob& job, const Tile& tile) const {
    for (std::uint32_t i = simt::thread(); i < job.components; i += simt::threads()) {
      const float value = job.span == 0 ? Affine(job, i)(0.0f) : 0.0f;
      for (std::uint32_t row = 0; row < tile.end - tile.begin; ++row)
        shared_x()[row * components + i] = value;
    }
  }

  KVS_DEVICE void reconstruct_numbers(const KvsScalableJob& job, const Tile& tile) const {
    for (std::uint32_t c = simt::thread(); c < job.coded[job.levels - 1]; c += simt::threads()) {
      const Component component(job, order, c);
      float* to = shared_x() + component.number;
      if (job.span == 0) {
        const Affine affine(job, component.number);
        put_numbers(job, tile, c, to, [&](std::int32_t q) { return affine(component.value(q)); });
      } else {
        const float factor = reinterpret_cast<const float*>(job.scale)[component.number];
        put_numbers(job, tile, c, to, [&](std::int32_t q) { return component.value(q) * factor; });
      }
    }
  }

  // What `value_of` makes of the tile's numbers of component `c`, token by token.
  template <typename ValueOf>
  KVS_DEVICE void put_numbers(const KvsScalableJob& job, const Tile& tile, std::uint32_t c, float* to,
                              const ValueOf& value_of) const {
    std::uint32_t token = tile.begin;
    while (token < tile.end) {
      const auto* from =
          reinterpret_cast<const Octet*>(numbers + job.numbers + place_of_octet(c, token, job.tokens));
      const Octet octet = *from;
      if (token % kOctet == 0 && tile.end - token >= kOctet) {
        KVS_UNROLL
        for (std::uint32_t i = 0; i < kOctet; ++i)
          to[i * components] = value_of(number_in(octet.pairs[i / 2], i % 2));
        token += kOctet;
        to += kOctet * components;
      } else {
        *to = value_of(reinterpret_cast<const std::int16_t*>(from)[token % kOctet]);
        ++token;
        to += components;
      }
    }
  }

  // Span head: each plane's components times its matrix, [component][dim].
  KVS_DEVICE void write_products(const KvsScalableJob& job, const Tile& tile) const {
    for (std::uint32_t plane = tile.first; plane < tile.last; ++plane) {
      if (job.matrix_bytes == 2) {
        multiply<std::uint16_t>(job, tile, plane);
      } else {
        multiply<float>(job, tile, plane);
      }
      simt::sync_block();
      write_tile<dtype>(job, pages, {tile.begin, tile.end, plane, plane + 1}, shared_product(), job.dim);
      simt::sync_block();
    }
  }

  template <typename Element>
  KVS_DEVICE void multiply(const KvsScalableJob& job, const Tile& tile, std::uint32_t plane) const {
    const std::uint32_t dim = job.dim, rows = tile.end - tile.begin,
                        groups = (rows + kTogether - 1) / kTogether;
    const auto* matrix = reinterpret_cast<const Element*>(job.matrix) + std::uint64_t{plane} * dim * dim;
    const auto* mean = reinterpret_cast<const float*>(job.mean) + plane * dim;
    for (std::uint32_t item = simt::thread(); item < groups * dim; item += simt::threads()) {
      const std::uint32_t column = item % dim, begin = item / dim * kTogether;
      const float* y = shared_x() + begin * components + plane * dim;
      float sums[kTogether] = {};
      for (std::uint32_t i = 0; i < dim; ++i) {
        const float weight = widen(matrix[i * dim + column]);
        for (std::uint32_t row = 0; row < kTogether; ++row) {
          sums[row] = multiply_add(begin + row < rows ? y[row * components + i] : 0.0f, weight, sums[row]);
        }
      }
      for (std::uint32_t row = 0; row < kTogether && begin + row < rows; ++row) {
        shared_product()[(begin + row) * dim + column] = mean[column] + sums[row];
      }
    }
  }

  static KVS_DEVICE float widen(std::uint16_t bits) { return widen_float16_bits(bits); }
  static KVS_DEVICE float widen(float value) { return value; }
};

}  // namespace kvs
