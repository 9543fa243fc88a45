// Steps that the AVX-512 loops of the scalable codec share: 32 lanes in two vectors of sixteen, or the first
// of them alone; masks leave lanes that are missing as they are.
#pragma once

#include <immintrin.h>

#include "../scalable_steps.h"

#define KVS_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,popcnt")))

namespace kvs {
namespace {

constexpr std::uint32_t kHalf = kLanes / 2;

KVS_AVX512 inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// The 32 words of two vectors of sixteen numbers, and back, with their signs.
KVS_AVX512 inline __m512i narrow_lanes(__m512i low, __m512i high) {
  return join(_mm512_cvtepi32_epi16(low), _mm512_cvtepi32_epi16(high));
}

template <int half>
KVS_AVX512 inline __m512i widen_lanes(__m512i words) {
  return _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, half));
}

KVS_AVX512 inline __mmask32 lanes_mask(std::uint32_t lanes) { return 0xFFFFFFFFu >> (kLanes - lanes); }

// Thresholds of a vector's lanes in each context.
struct Contexts {
  __m512i thresholds[kContexts];

  KVS_AVX512 inline Contexts(const std::uint32_t (&of)[kContexts][kLanes], std::uint32_t lane) {
    for (std::uint32_t context = 0; context < kContexts; ++context) {
      thresholds[context] = _mm512_loadu_si512(of[context] + lane);
    }
  }

  KVS_AVX512 inline __m512i choose(__m512i coarse) const {
    const __m512i magnitude = _mm512_abs_epi32(coarse);
    const auto above = [&](int number) KVS_AVX512 {
      return _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(number));
    };
    __m512i found = _mm512_mask_mov_epi32(thresholds[0], above(0), thresholds[1]);
    found = _mm512_mask_mov_epi32(found, above(1), thresholds[2]);
    return _mm512_mask_mov_epi32(found, above(2), thresholds[3]);
  }
};

}  // namespace
}  // namespace kvs
