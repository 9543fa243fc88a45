// The loops of ScalableKernels, without intrinsics. Included once by each scalable_kernels_*.cpp, which says
// with KVS_TARGET for which instructions, and which must be compiled without fusing (-ffp-contract=off).

#include <bit>

#include "../float_bits.h"
#include "scalable_kernels.h"

namespace kvs {
namespace {

KVS_TARGET void quantise(const float* row, const std::uint32_t* __restrict order,
                         const float* __restrict limit, std::uint64_t count, float* __restrict stage,
                         std::int16_t* __restrict numbers, std::uint64_t block_stride) {
  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even, and stands in the low bits.
  constexpr float kRounder = 12582912.0f;
  for (std::uint64_t c = 0; c < count; ++c) stage[c] = row[order[c]];
  for (std::uint64_t begin = 0; begin < count; begin += kLanes, numbers += block_stride) {
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      const float most = limit[begin + lane];
      float value = stage[begin + lane];
      value = value > -most ? value : -most;
      value = value < most ? value : most;
      numbers[lane] = static_cast<std::int16_t>(std::bit_cast<std::uint32_t>(value + kRounder));
    }
  }
}

KVS_TARGET void reconstruct_row(const std::int16_t* __restrict numbers, std::uint64_t block_stride,
                                const float* __restrict shift, float scale, std::uint64_t count,
                                float* __restrict stage) {
  for (std::uint64_t begin = 0; begin < count; begin += kLanes, numbers += block_stride) {
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      stage[begin + lane] = reconstruct(numbers[lane], shift[begin + lane], scale);
    }
  }
}

KVS_TARGET void spread(const float* __restrict stage, const std::uint32_t* __restrict place,
                       std::uint64_t count, float* __restrict row) {
  // A gather would be slower than loads one by one.
#if defined(__clang__)
#pragma clang loop vectorize(disable) unroll_count(8)
#endif
  for (std::uint64_t i = 0; i < count; ++i) row[i] = stage[place[i]];
}

KVS_TARGET bool widen_bfloat16(const std::uint16_t* __restrict bits, std::uint32_t count,
                               float* __restrict to) {
  std::uint32_t unfit = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    to[i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits[i]) << 16);
    unfit |= (bits[i] & 0x7F80) >= 0x7F00;
  }
  return unfit;
}

KVS_TARGET bool widen_float16(const std::uint16_t* __restrict bits, std::uint32_t count,
                              float* __restrict to) {
  std::uint32_t unfit = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    to[i] = widen_float16_bits(bits[i]);
    unfit |= (bits[i] & 0x7FFF) >= 0x7800;
  }
  return unfit;
}

KVS_TARGET bool widen_float32(const std::uint32_t* __restrict bits, std::uint32_t count,
                              float* __restrict to) {
  std::uint32_t unfit = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    to[i] = std::bit_cast<float>(bits[i]);
    unfit |= (bits[i] & 0x7F800000) >= 0x7F000000;
  }
  return unfit;
}

KVS_TARGET void narrow_bfloat16(const float* __restrict from, std::uint32_t count,
                                std::uint16_t* __restrict bits) {
  for (std::uint32_t i = 0; i < count; ++i) bits[i] = narrow_to_bfloat16(from[i]);
}

KVS_TARGET void narrow_float16(const float* __restrict from, std::uint32_t count,
                               std::uint16_t* __restrict bits) {
  for (std::uint32_t i = 0; i < count; ++i) bits[i] = narrow_to_float16(from[i]);
}

KVS_TARGET void narrow_float32(const float* __restrict from, std::uint32_t count,
                               std::uint32_t* __restrict bits) {
  for (std::uint32_t i = 0; i < count; ++i) bits[i] = std::bit_cast<std::uint32_t>(from[i]);
}

// Turns the pairs (a[0], b[0]), (a[stride], b[stride]) ... by the angles, or against them where `sign` is -1.
template <std::uint32_t stride>
KVS_TARGET inline void turn(float* a, float* b, const RotaryRow& rotary, float sign) {
  const float* __restrict cosines = rotary.cosines;
  const float* __restrict sines = rotary.sines;
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#elif defined(__GNUC__)
#pragma GCC ivdep
#endif
  for (std::uint32_t j = 0; j < rotary.pairs; ++j) {
    const float first = a[stride * j], second = b[stride * j], sine = sign * sines[j];
    a[stride * j] = first * cosines[j] - second * sine;
    b[stride * j] = second * cosines[j] + first * sine;
  }
}

KVS_TARGET void turn_row(float* row, const RotaryRow& rotary, float sign) {
  if (rotary.style == RotaryStyle::kHalves) turn<1>(row, row + rotary.pairs, rotary, sign);
  if (rotary.style == RotaryStyle::kPairs) turn<2>(row, row + 1, rotary, sign);
}

KVS_TARGET void rotate(float* row, const RotaryRow& rotary) { turn_row(row, rotary, 1.0f); }
KVS_TARGET void unrotate(float* row, const RotaryRow& rotary) { turn_row(row, rotary, -1.0f); }

KVS_TARGET void subtract(float* __restrict row, const float* __restrict mean, std::uint64_t count) {
  for (std::uint64_t i = 0; i < count; ++i) row[i] -= mean[i];
}

KVS_TARGET void restore(const float* __restrict from, const float* __restrict scale,
                        const float* __restrict mean, std::uint32_t count, float* __restrict to) {
  if (scale != nullptr && mean != nullptr) {
    for (std::uint32_t i = 0; i < count; ++i) to[i] = mean[i] + scale[i] * from[i];
  } else if (scale != nullptr) {
    for (std::uint32_t i = 0; i < count; ++i) to[i] = scale[i] * from[i];
  } else if (mean != nullptr) {
    for (std::uint32_t i = 0; i < count; ++i) to[i] = mean[i] + from[i];
  } else {
    for (std::uint32_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

constexpr ScalableKernels kKernels = {
    quantise,       reconstruct_row, spread,   widen_bfloat16, widen_float16, widen_float32, narrow_bfloat16,
    narrow_float16, narrow_float32,  unrotate, rotate,         subtract,      restore,
};

}  // namespace
}  // namespace kvs
