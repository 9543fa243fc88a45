// The tensor core's product of small matrices, and its emulation: a warp holds a [16][16] and b [16][8] in
// float16 and adds their product to sums [16][8] of floats. Which lane holds what is that of PTX's
// mma.m16n8k16: lane 4 g + p has, as pairs of neighbours,
//   a: rows g, g + 8, g, g + 8 at columns 2 p, 2 p, 2 p + 8, 2 p + 8;
//   b: rows 2 p and 2 p + 8 of column g;
//   sums: row g at columns 2 p and 2 p + 1, then row g + 8.
#pragma once

#include "scalable_values.h"
#include "simt.h"

namespace kvs {

// The bits of the nearest float16.
KVS_HOST_DEVICE std::uint32_t round_to_float16(float from) {
#ifdef __CUDA_ARCH__
  std::uint16_t found;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(from));
  return found;
#else
  return narrow_to_float16(from);
#endif
}

#ifdef __CUDACC__

KVS_DEVICE void add_tensor_product(float (&sums)[4], const std::uint32_t (&a)[4],
                                   const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

struct TensorOperands {
  std::uint32_t a[simt::kWarp][4], b[simt::kWarp][2];

  float left(std::uint32_t row, std::uint32_t k) const {
    const std::uint32_t pair = a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
    return widen_float16_bits(pair >> k % 2 * 16 & 0xFFFF);
  }
  float right(std::uint32_t k, std::uint32_t column) const {
    return widen_float16_bits(b[column * 4 + k % 8 / 2][k / 8] >> k % 2 * 16 & 0xFFFF);
  }
};

inline void add_tensor_product(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static thread_local TensorOperands of_warps[32];
  TensorOperands& given = of_warps[simt::warp()];
  const std::uint32_t lane = simt::lane();
  for (std::uint32_t i = 0; i < 4; ++i) given.a[lane][i] = a[i];
  for (std::uint32_t i = 0; i < 2; ++i) given.b[lane][i] = b[i];
  emulator::meet_warp(
      emulator::Meeting::kMatrix, 0, [&sums, &given](const std::uint32_t*, std::uint32_t own) {
        for (std::uint32_t i = 0; i < 4; ++i) {
          for (std::uint32_t k = 0; k < 16; ++k) {
            sums[i] += given.left(own / 4 + i / 2 * 8, k) * given.right(k, own % 4 * 2 + i % 2);
          }
        }
        return 0u;
      });
}

#endif

}  // namespace kvs
