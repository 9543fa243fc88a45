// Encoding codec 3 with a matrix of float16: y = A x by tensor cores, in tiles of 128 tokens and 128
// components. scalable_encode.cu has the whole.
//
// x is the sum of two float16 (PrepareTokens), A is float16 as calibrations hold it: products are exact to 22
// bits of x, sums are a float's. The host's sums are in another order. Either is off from the exact y by at
// most 2 (n + 8) * 2^-24 of the sum of its products' magnitudes, n being the dimension of the transform:
// numbers differ from the host's where y lies that near to the middle between two.
#pragma once

#include "launch.h"
#include "scalable_encode.h"
#include "scalable_tensor.h"

namespace kvs {

// Eight warps, each 32 tokens x 64 components: for 16 numbers, 32 tensor instructions and 32 loads of
// fragments, no two lanes of which share a bank. Shared memory: a slice of 32 numbers of x, high and low, and
// of A, rows 16 bytes further apart than they are long: 30 KB.
struct MultiplyTokens {
  static constexpr std::uint32_t kThreads = 256, kResident = 2;
  static constexpr std::uint32_t kTile = 128, kSlice = 32, kStep = 16;
  static constexpr std::uint32_t kPitch = kSlice + 8;  // float16
  static constexpr std::uint32_t kPart = kTile * kPitch;
  static constexpr std::uint32_t kSharedBytes = 3 * 2 * kPart;
  static constexpr std::uint32_t kOwnTokens = 32, kOwnComponents = 64;  // of a warp
  static constexpr std::uint32_t kRows = kOwnTokens / 16, kColumns = kOwnComponents / 8;

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count;
  ProductTiles tiles;
  KvsPages pages;
  std::uint32_t item_bytes;

  KVS_DEVICE void operator()() const {
    tiles.each(jobs, count, 2,
               [this](const KvsScalableEncodeJob& job, std::uint32_t plane, std::uint32_t token_tile,
                      std::uint32_t component_tile) {
                 const Product product(job, EncodeSize::of(job, pages.dim, item_bytes), plane,
                                       token_tile * kTile, component_tile * kTile);
                 if (product.tokens != 0 && product.components != 0) multiply(product);
               });
  }

 private:
  // One tile: where both factors and y begin, and how much of it there is.
  struct Product {
    const std::uint16_t* high;
    const std::uint16_t* low;
    const std::uint16_t* matrix;
    const float* scale;
    const float* shrink;
    float* y;
    std::uint32_t depth, numbers, stride;  // of a sum; of a row of x; of a row of y
    std::uint32_t tokens, components;

    KVS_DEVICE Product(const KvsScalableEncodeJob& job, const EncodeSize& size, std::uint32_t plane,
                       std::uint32_t token, std::uint32_t component) {
      const EncodeScratch scratch = scratch_of(job, size);
      const bool head = job.span == 1;
      const std::uint32_t rows = head ? size.dim : size.components;
      const bool there = plane < (head ? size.planes : 1);
      tokens = there && token < size.tokens ? least(size.tokens - token) : 0;
      components = component < rows ? least(rows - component) : 0;
      depth = head ? size.dim : size.numbers;
      numbers = size.numbers;
      stride = size.components;
      const std::uint32_t first = plane * size.dim;  // 0 but for span head
      high = scratch.x_high() + std::uint64_t{token} * numbers + first;
      low = scratch.x_low() + std::uint64_t{token} * numbers + first;
      matrix = reinterpret_cast<const std::uint16_t*>(job.matrix) + std::uint64_t{first + component} * depth;
      scale = reinterpret_cast<const float*>(job.scale) + first + component;
      shrink = scratch.shrink() + token;
      y = scratch.y() + std::uint64_t{token} * stride + first + component;
    }

    KVS_DEVICE static std::uint32_t least(std::uint32_t left) { return left < kTile ? left : kTile; }
  };

  KVS_DEVICE static std::uint16_t* shared_part(std::uint32_t part) {
    return reinterpret_cast<std::uint16_t*>(simt::shared_memory()) + part * kPart;
  }

  KVS_DEVICE static void multiply(const Product& product) {
    const std::uint32_t token = simt::warp() / 2 * kOwnTokens, component = simt::warp() % 2 * kOwnComponents;
    // Tiles at the edges: what of them a warp has.
    const std::uint32_t rows = parts(product.tokens, token, 16, kRows);
    const std::uint32_t columns = parts(product.components, component, 8, kColumns);
    const Share of_x(product.numbers, product.tokens, product.depth);
    const Share of_matrix(product.depth, product.components, product.depth);
    float sums[kRows][kColumns][4] = {};
    for (std::uint32_t begin = 0; begin < product.depth; begin += kSlice) {
      Eight held[3][kOwnRows];
      if (product.depth % 8 == 0) {  // rows begin at multiples of 16 bytes
        fetch<true>(product.high, of_x, begin, held[0]);
        fetch<true>(product.low, of_x, begin, held[1]);
        fetch<true>(product.matrix, of_matrix, begin, held[2]);
      } else {
        fetch<false>(product.high, of_x, begin, held[0]);
        fetch<false>(product.low, of_x, begin, held[1]);
        fetch<false>(product.matrix, of_matrix, begin, held[2]);
      }
      simt::sync_block();  // all have read the slice before
      KVS_UNROLL for (std::uint32_t part = 0; part < 3; ++part) put(held[part], of_x.at, shared_part(part));
      simt::sync_block();
      if (rows == 0 || columns == 0) continue;
      const std::uint32_t left = product.depth - begin;
      for (std::uint32_t k = 0; k < kSlice && k < left; k += kStep) {
        add_step(sums, token, component, k, rows, columns);
      }
    }
    store(product, sums, token, component);
  }

  KVS_DEVICE static std::uint32_t parts(std::uint32_t there, std::uint32_t begin, std::uint32_t size,
                                        std::uint32_t most) {
    const std::uint32_t found = begin < there ? (there - begin + size - 1) / size : 0;
    return found < most ? found : most;
  }

  struct alignas(16) Eight {
    std::uint32_t pairs[4];
  };

  static constexpr std::uint32_t kAcross = kSlice / 8;                   // threads to a row
  static constexpr std::uint32_t kOwnRows = kTile * kAcross / kThreads;  // of a thread
  static constexpr std::uint32_t kRowsApart = kThreads / kAcross;

  // What a thread loads of each slice: eight numbers of some rows, from `offset` on.
  struct Share {
    std::uint32_t offset[kOwnRows];
    std::uint32_t at, depth;
    bool there[kOwnRows];

    KVS_DEVICE Share(std::uint32_t pitch, std::uint32_t rows, std::uint32_t of_depth)
        : at(simt::thread() % kAcross * 8), depth(of_depth) {
      KVS_UNROLL for (std::uint32_t i = 0; i < kOwnRows; ++i) {
        const std::uint32_t row = simt::thread() / kAcross + i * kRowsApart;
        offset[i] = row * pitch + at;
        there[i] = row < rows;
      }
    }
  };

  // What is not there is 0.
  template <bool whole>
  KVS_DEVICE static void fetch(const std::uint16_t* from, const Share& share, std::uint32_t begin,
                               Eight* held) {
    const std::uint32_t left = share.depth - begin;
    KVS_UNROLL for (std::uint32_t i = 0; i < kOwnRows; ++i) {
      const std::uint16_t* source = from + begin + share.offset[i];
      held[i] = {};
      if (!share.there[i] || share.at >= left) continue;
      if constexpr (whole) {
        held[i] = *reinterpret_cast<const Eight*>(source);
      } else {
        KVS_UNROLL for (std::uint32_t j = 0; j < 8; ++j) {
          if (share.at + j < left) held[i].pairs[j / 2] |= std::uint32_t{source[j]} << 16 * (j % 2);
        }
      }
    }
  }

  KVS_DEVICE static void put(const Eight* held, std::uint32_t at, std::uint16_t* to) {
    KVS_UNROLL for (std::uint32_t i = 0; i < kOwnRows; ++i) {
      *reinterpret_cast<Eight*>(to + (simt::thread() / kAcross + i * kRowsApart) * kPitch + at) = held[i];
    }
  }

  // Operands as add_tensor_product wants them, A turned: lane 4 g + p has pairs of numbers of row g.
  KVS_DEVICE static std::uint32_t load_pair(std::uint32_t part, std::uint32_t row, std::uint32_t k) {
    const std::uint16_t* from =
        shared_part(part) + (row + simt::lane() / 4) * kPitch + k + simt::lane() % 4 * 2;
    return *reinterpret_cast<const std::uint32_t*>(from);
  }

  KVS_DEVICE static void add_step(float (&sums)[kRows][kColumns][4], std::uint32_t token,
                                  std::uint32_t component, std::uint32_t k, std::uint32_t rows,
                                  std::uint32_t columns) {
    std::uint32_t x[2][kRows][4];
    KVS_UNROLL for (std::uint32_t part = 0; part < 2; ++part) {
      KVS_UNROLL for (std::uint32_t row = 0; row < kRows; ++row) {
        KVS_UNROLL for (std::uint32_t i = 0; i < 4; ++i) {
          x[part][row][i] = load_pair(part, token + row * 16 + i % 2 * 8, k + i / 2 * 8);
        }
      }
    }
    KVS_UNROLL for (std::uint32_t column = 0; column < kColumns; ++column) {
      if (column >= columns) break;
      const std::uint32_t first = load_pair(2, component + column * 8, k);
      const std::uint32_t second = load_pair(2, component + column * 8, k + 8);
      KVS_UNROLL for (std::uint32_t row = 0; row < kRows; ++row) {
        if (row >= rows) break;
        add_tensor_product(sums[row][column], x[0][row], first, second);
        add_tensor_product(sums[row][column], x[1][row], first, second);
      }
    }
  }

  KVS_DEVICE static void store(const Product& product, const float (&sums)[kRows][kColumns][4],
                               std::uint32_t token, std::uint32_t component) {
    KVS_UNROLL for (std::uint32_t row = 0; row < 2 * kRows; ++row) {
      const std::uint32_t t = token + row * 8 + simt::lane() / 4;
      if (t >= product.tokens) continue;
      const float shrink = product.shrink[t];
      KVS_UNROLL for (std::uint32_t i = 0; i < 2 * kColumns; ++i) {
        const std::uint32_t c = component + i / 2 * 8 + simt::lane() % 4 * 2 + i % 2;
        if (c >= product.components) continue;
        const float sum = sums[row / 2][i / 2][row % 2 * 2 + i % 2];
        product.y[std::uint64_t{t} * product.stride + c] = sum * product.scale[c] * shrink;
      }
    }
  }
};

}  // namespace kvs
