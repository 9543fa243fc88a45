// Steps that the AVX2 loops of the scalable codec share: 32 lanes in four vectors of eight.
#pragma once

#include <immintrin.h>

#include "../scalable_steps.h"

#define KVS_AVX2 __attribute__((target("avx2,popcnt")))

namespace kvs {
namespace {

constexpr int kVectors = kLanes / 8;

KVS_AVX2 inline __m256i load_vector(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

KVS_AVX2 inline void store_vector(void* to, __m256i vector) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), vector);
}

// Eight 16-bit numbers, widened; and sixteen, narrowed.
KVS_AVX2 inline __m256i load_numbers(const std::int16_t* from) {
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

KVS_AVX2 inline __m256i narrow_lanes(__m256i low, __m256i high) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
}

// Thresholds of a vector's lanes in each context.
struct Contexts {
  __m256i thresholds[kContexts];

  KVS_AVX2 inline Contexts(const std::uint32_t (&of)[kContexts][kLanes], std::uint32_t lane) {
    for (std::uint32_t context = 0; context < kContexts; ++context)
      thresholds[context] = load_vector(of[context] + lane);
  }

  KVS_AVX2 inline __m256i choose(__m256i coarse) const {
    const __m256i magnitude = _mm256_abs_epi32(coarse);
    __m256i found = thresholds[0];
    for (int context = 1; context < static_cast<int>(kContexts); ++context) {
      const __m256i above = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(context - 1));
      found = _mm256_blendv_epi8(found, thresholds[context], above);
    }
    return found;
  }
};

}  // namespace
}  // namespace kvs
