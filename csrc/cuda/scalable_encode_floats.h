// Encoding codec 3 with a matrix of floats, which this package's calibrations are not: y = A x by fused
// multiplications, in tiles of 64 tokens and 64 components. scalable_encode.cu has the whole.
//
// The elements of A are rounded to float with their row's factor, as the host does it.
#pragma once

#include "launch.h"
#include "scalable_encode.h"

namespace kvs {

// Shared memory: a slice of 16 numbers of both tiles, 8.5 KB.
struct MultiplyFloats {
  static constexpr std::uint32_t kThreads = 256, kResident = 3;
  static constexpr std::uint32_t kTile = 64, kSlice = 16, kOwn = 4;  // of a thread: 4 x 4 results
  static constexpr std::uint32_t kPitch = kTile + 4;                 // floats; keeps 16 bytes aligned
  static constexpr std::uint32_t kSharedBytes = 2 * 4 * kSlice * kPitch;

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count;
  ProductTiles tiles;
  KvsPages pages;
  std::uint32_t item_bytes;

  KVS_DEVICE void operator()() const {
    tiles.each(jobs, count, 4,
               [this](const KvsScalableEncodeJob& job, std::uint32_t plane, std::uint32_t token_tile,
                      std::uint32_t component_tile) {
                 const EncodeSize size = EncodeSize::of(job, pages.dim, item_bytes);
                 const std::uint32_t token = token_tile * kTile, component = component_tile * kTile;
                 const bool head = job.span == 1;
                 if (plane >= (head ? size.planes : 1) || token >= size.tokens) return;
                 if (component >= (head ? size.dim : size.components)) return;
                 multiply(job, size, plane, token, component);
               });
  }

 private:
  KVS_DEVICE static float* slice_of_x() { return reinterpret_cast<float*>(simt::shared_memory()); }
  KVS_DEVICE static float* slice_of_matrix() { return slice_of_x() + kSlice * kPitch; }

  // Where both factors and the product begin for one plane, and how many columns of the matrix there are.
  struct Factors {
    const float* matrix;
    const float* scale;
    const float* x;
    const std::uint8_t* exact;
    std::uint32_t depth, pitch, rows;  // of a row of the matrix; of x; rows of the matrix
    std::uint32_t tokens;
  };

  KVS_DEVICE void multiply(const KvsScalableEncodeJob& job, const EncodeSize& size, std::uint32_t plane,
                           std::uint32_t token, std::uint32_t component) const {
    const EncodeScratch scratch = scratch_of(job, size);
    const bool head = job.span == 1;
    const std::uint32_t depth = head ? size.dim : size.numbers, first = plane * size.dim;
    const Factors factors{reinterpret_cast<const float*>(job.matrix) + std::uint64_t{first} * size.dim,
                          reinterpret_cast<const float*>(job.scale) + first,
                          scratch.x() + first,
                          scratch.exact(),
                          depth,
                          size.numbers,
                          head ? size.dim : size.components,
                          size.tokens};
    float sums[kOwn][kOwn] = {};
    for (std::uint32_t begin = 0; begin < depth; begin += kSlice) {
      simt::sync_block();  // all have read the slice before
      load(factors, token, component, begin);
      simt::sync_block();
      add_slice(sums);
    }
    float* y = scratch.y() + first + component;
    const std::uint32_t row = token + simt::thread() / 16 * kOwn, column = simt::thread() % 16 * kOwn;
    KVS_UNROLL for (std::uint32_t i = 0; i < kOwn; ++i) {
      KVS_UNROLL for (std::uint32_t j = 0; j < kOwn; ++j) {
        if (row + i < size.tokens && component + column + j < factors.rows) {
          y[std::uint64_t{row + i} * size.components + column + j] = sums[i][j];
        }
      }
    }
  }

  // A thread loads four of each: neighbouring threads neighbouring numbers of one row. What is not there, and
  // exact tokens, are 0.
  KVS_DEVICE static void load(const Factors& factors, std::uint32_t token, std::uint32_t component,
                              std::uint32_t begin) {
    const std::uint32_t k = simt::thread() % kSlice, number = begin + k;
    KVS_UNROLL for (std::uint32_t i = 0; i < kTile * kSlice / kThreads; ++i) {
      const std::uint32_t at = simt::thread() / kSlice + i * (kThreads / kSlice);
      const std::uint32_t t = token + at, c = component + at;
      float of_x = 0, of_matrix = 0;
      if (number < factors.depth && t < factors.tokens && factors.exact[t] == 0) {
        of_x = factors.x[std::uint64_t{t} * factors.pitch + number];
      }
      if (number < factors.depth && c < factors.rows) {
        of_matrix = factors.matrix[std::uint64_t{c} * factors.depth + number] * factors.scale[c];
      }
      slice_of_x()[k * kPitch + at] = of_x;
      slice_of_matrix()[k * kPitch + at] = of_matrix;
    }
  }

  struct alignas(16) Four {
    float of[kOwn];
  };

  KVS_DEVICE static void add_slice(float (&sums)[kOwn][kOwn]) {
    const float* x = slice_of_x() + simt::thread() / 16 * kOwn;
    const float* matrix = slice_of_matrix() + simt::thread() % 16 * kOwn;
    KVS_UNROLL for (std::uint32_t k = 0; k < kSlice; ++k) {
      const Four one = *reinterpret_cast<const Four*>(x + k * kPitch);
      const Four two = *reinterpret_cast<const Four*>(matrix + k * kPitch);
      KVS_UNROLL for (std::uint32_t i = 0; i < kOwn; ++i) {
        KVS_UNROLL for (std::uint32_t j = 0; j < kOwn; ++j) {
          sums[i][j] = multiply_add(one.of[i], two.of[j], sums[i][j]);
        }
      }
    }
  }
};

}  // namespace kvs
