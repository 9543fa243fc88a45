// The floating-point steps of decoding codec 3, one value at a time: what csrc/cpu/scalable_loops.h does to
// rows. The same operations in the same order, none fused, so that spans without a matrix give the CPU's
// bits.
#pragma once

#include <bit>

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

KVS_HOST_DEVICE std::uint16_t narrow_to_bfloat16(float from) {
  const auto value = std::bit_cast<std::uint32_t>(from);
  const std::uint32_t rounded = (value + 0x7FFF + (value >> 16 & 1)) >> 16;
  const bool is_nan = (value & 0x7FFFFFFF) > 0x7F800000;
  return static_cast<std::uint16_t>(is_nan ? value >> 16 | 0x40 : rounded);
}

KVS_HOST_DEVICE std::uint16_t narrow_to_float16(float from) {
  const auto value = std::bit_cast<std::uint32_t>(from);
  const std::uint32_t magnitude = value & 0x7FFFFFFF;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  // Half has the spacing of subnormals: adding it rounds there, and the low bits count in units of 2^-24.
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const std::uint32_t beyond = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
  std::uint32_t found = magnitude < 0x38800000 ? subnormal : normal;
  found = magnitude >= 0x477FF000 ? beyond : found;
  return static_cast<std::uint16_t>(found | (value >> 16 & 0x8000));
}

// A float16 that is finite, as calibrations hold.
KVS_HOST_DEVICE float widen_float16_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(static_cast<std::uint16_t>(bits)));
  return found;
#else
  const std::uint32_t magnitude = bits & 0x7FFF;
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const std::uint32_t normal = (magnitude << 13) + (112u << 23);
  const std::uint32_t found = magnitude < 0x400 ? std::bit_cast<std::uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(found | (bits & 0x8000) << 16);
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
