// The tensor core's product as the encoder wants it, and its emulation: a warp adds x [16][16] times A
// [8][16], turned, to sums [16][8]; both factors are float16, sums floats. Which lane holds what is that of
// PTX's mma.m16n8k16: lane 4 g + p has pairs of neighbouring numbers, 2 p and 2 p + 8 of each row:
//   x: rows g, g + 8, g, g + 8 at numbers 2 p, 2 p, 2 p + 8, 2 p + 8;
//   A: row g at numbers 2 p and 2 p + 8;
//   sums: row g at columns 2 p and 2 p + 1, then row g + 8.
#pragma once

#include "scalable_values.h"
#include "simt.h"

namespace kvs {

// The bits of the nearest float16.
KVS_HOST_DEVICE std::uint32_t round_to_half(float from) {
#ifdef __CUDA_ARCH__
  std::uint16_t found;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(from));
  return found;
#else
  return narrow_to_float16(from);
#endif
}

#ifdef __CUDACC__

KVS_DEVICE void add_product_of_halves(float (&sums)[4], const std::uint32_t (&x)[4],
                                      const std::uint32_t (&matrix)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(matrix[0]), "r"(matrix[1]));
}

#else

// What the lanes of a warp gave, unpacked: x [16][16], A [8][16].
struct GivenHalves {
  float x[16][16], matrix[8][16];

  static void unpack(std::uint32_t pair, float* to) {
    to[0] = widen_float16_bits(pair & 0xFFFF);
    to[1] = widen_float16_bits(pair >> 16);
  }
};

inline void add_product_of_halves(float (&sums)[4], const std::uint32_t (&x)[4],
                                  const std::uint32_t (&matrix)[2]) {
  static thread_local GivenHalves of_warps[32];
  GivenHalves& given = of_warps[simt::warp()];
  const std::uint32_t row = simt::lane() / 4, pair = simt::lane() % 4 * 2;
  for (std::uint32_t i = 0; i < 4; ++i)
    GivenHalves::unpack(x[i], &given.x[row + i % 2 * 8][pair + i / 2 * 8]);
  for (std::uint32_t i = 0; i < 2; ++i) GivenHalves::unpack(matrix[i], &given.matrix[row][pair + i * 8]);
  emulator::meet_warp(emulator::Meeting::kMatrix, 0,
                      [&sums, &given, row, pair](const std::uint32_t*, std::uint32_t) {
                        for (std::uint32_t i = 0; i < 4; ++i) {
                          const float* left = given.x[row + i / 2 * 8];
                          const float* right = given.matrix[pair + i % 2];
                          for (std::uint32_t k = 0; k < 16; ++k) sums[i] += left[k] * right[k];
                        }
                        return 0u;
                      });
}

#endif

}  // namespace kvs
