// Floats and the bits of narrower ones, one at a time, for host and device: the loops of csrc/cpu are made of
// these as the kernels are, so that both round alike.
#pragma once

#include <bit>
#include <cstdint>

#include "rans.h"

namespace kvs {

// To the nearest, ties to even.
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

// Of a float16 that is finite.
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

}  // namespace kvs
