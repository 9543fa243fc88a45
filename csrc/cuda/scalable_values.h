// The floating-point steps of decoding codec 3, one value at a time: what csrc/cpu/scalable_loops.h does to
// rows. The same operations in the same order, none fused, so that spans without a matrix give the CPU's
// bits.
#pragma once

#include <bit>

#include "../float_bits.h"
#include "scalable_tables_packed.h"

namespace kvs {

enum class DeviceDtype : int { kBfloat16 = 1, kFloat16 = 2, kFloat32 = 3 };

template <DeviceDtype dtype>
struct DtypeBits {
  using Bits = std::uint16_t;
};
template <>
struct DtypeBits<DeviceDtype::kFloat32> {
  using Bits = std::uint32_t;
};

// 9, 3, 1: finest steps of a level.
KVS_HOST_DEVICE float level_scale(std::uint32_t level) {
  return level == 0 ? 9.0f : level == 1 ? 3.0f : 1.0f;
}

// The bits of the nearest float16: on a GPU by its conversion, whose NaN is another.
KVS_HOST_DEVICE std::uint32_t round_to_float16(float from) {
#ifdef __CUDA_ARCH__
  std::uint16_t found;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(from));
  return found;
#else
  return narrow_to_float16(from);
#endif
}

// Of two, `first` in the lower half.
KVS_HOST_DEVICE std::uint32_t round_to_float16s(float first, float second) {
#ifdef __CUDA_ARCH__
  std::uint32_t found;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(second), "f"(first));
  return found;
#else
  return round_to_float16(first) | round_to_float16(second) << 16;
#endif
}

// Of a matrix product, whose last bits nobody promises: fused on a GPU.
KVS_HOST_DEVICE float multiply_add(float a, float b, float sum) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, sum);
#else
  return a * b + sum;
#endif
}

// -1, 0 or 1, of a whole number.
KVS_HOST_DEVICE float clamp_to_sign(float number) {
#ifdef __CUDA_ARCH__
  return fminf(fmaxf(number, -1.0f), 1.0f);
#else
  return number < 0 ? -1.0f : number > 0 ? 1.0f : 0.0f;
#endif
}

template <DeviceDtype dtype>
KVS_HOST_DEVICE typename DtypeBits<dtype>::Bits narrow_value(float from) {
  if constexpr (dtype == DeviceDtype::kBfloat16) return narrow_to_bfloat16(from);
  if constexpr (dtype == DeviceDtype::kFloat16) return narrow_to_float16(from);
  if constexpr (dtype == DeviceDtype::kFloat32) return std::bit_cast<std::uint32_t>(from);
}

// Four values at once: on a GPU by its conversions, which round alike but have a NaN of their own.
template <DeviceDtype dtype>
KVS_HOST_DEVICE void narrow_four(const float (&from)[4], typename DtypeBits<dtype>::Bits (&to)[4]) {
#ifdef __CUDA_ARCH__
  if constexpr (dtype != DeviceDtype::kFloat32) {
    const float sum = (from[0] + from[1]) + (from[2] + from[3]);
    if (sum == sum) {
      KVS_UNROLL
      for (int i = 0; i < 4; i += 2) {
        std::uint32_t both;
        if constexpr (dtype == DeviceDtype::kBfloat16)
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(from[i + 1]), "f"(from[i]));
        if constexpr (dtype == DeviceDtype::kFloat16)
          asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(from[i + 1]), "f"(from[i]));
        to[i] = static_cast<std::uint16_t>(both);
        to[i + 1] = static_cast<std::uint16_t>(both >> 16);
      }
      return;
    }
  }
#endif
  for (int i = 0; i < 4; ++i) to[i] = narrow_value<dtype>(from[i]);
}

}  // namespace kvs
