// The AVX2 encoder: a row of 32 lanes in four vectors. Rows with an escape go through encode_row instead.

#include "encode_rows.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define KVS_AVX2 __attribute__((target("avx2,popcnt")))

namespace kvs {
namespace {

constexpr int kVectors = kLanes / 8;

// For each set of lanes that emit a word: their states last, in lane order.
struct WordGather {
  alignas(64) std::uint32_t order[256][8];

  constexpr WordGather() : order() {
    for (std::uint32_t mask = 0; mask < 256; ++mask) {
      std::uint32_t at = 8;
      for (std::uint32_t lane = 8; lane-- > 0;) {
        if (mask >> lane & 1) order[mask][--at] = lane;
      }
    }
  }
};
constexpr WordGather kGather;

struct Symbols {
  __m256i meta[kVectors], reciprocal[kVectors];
};

// Looks up the symbols of a row; false where one of them must be escaped.
KVS_AVX2 inline bool find_symbols(const std::uint16_t* row, const __m256i* base, const __m256i* table,
                                  Symbols& found) {
  const auto* pushes = reinterpret_cast<const int*>(push_tables()[0]);
  __m256i escaped = _mm256_setzero_si256();
  for (int i = 0; i < kVectors; ++i) {
    const __m256i value = _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(row) + i));
    const __m256i sign = _mm256_srli_epi32(_mm256_xor_si256(value, base[i]), 15);
    const __m256i magnitude = _mm256_set1_epi32(0x7FC0);
    const __m256i step = _mm256_srai_epi32(
        _mm256_sub_epi32(_mm256_and_si256(base[i], magnitude), _mm256_and_si256(value, magnitude)), kLowBits);
    const __m256i symbol =
        _mm256_or_si256(_mm256_slli_epi32(sign, 5), _mm256_and_si256(step, _mm256_set1_epi32(31)));
    const __m256i index = _mm256_add_epi32(table[i], symbol);
    found.meta[i] = _mm256_i32gather_epi32(pushes, index, 8);
    found.reciprocal[i] = _mm256_i32gather_epi32(pushes + 1, index, 8);
    // A meta of 0 is a symbol that the table lacks; a negative step has its sign bit set.
    const __m256i far = _mm256_cmpgt_epi32(step, _mm256_set1_epi32(kEscapeStep - 1));
    const __m256i absent = _mm256_cmpeq_epi32(found.meta[i], _mm256_setzero_si256());
    escaped = _mm256_or_si256(escaped, _mm256_or_si256(step, _mm256_or_si256(far, absent)));
  }
  return _mm256_movemask_ps(_mm256_castsi256_ps(escaped)) == 0;
}

KVS_AVX2 inline __m256i divide(__m256i state, __m256i meta, __m256i reciprocal) {
  const __m256i shift = _mm256_add_epi32(_mm256_srli_epi32(meta, 24), _mm256_set1_epi32(31));
  const __m256i even = _mm256_srlv_epi64(_mm256_mul_epu32(state, reciprocal),
                                         _mm256_and_si256(shift, _mm256_set1_epi64x(0xFFFFFFFF)));
  const __m256i odd =
      _mm256_srlv_epi64(_mm256_mul_epu32(_mm256_srli_epi64(state, 32), _mm256_srli_epi64(reciprocal, 32)),
                        _mm256_srli_epi64(shift, 32));
  return _mm256_or_si256(even, _mm256_slli_epi64(odd, 32));
}

// must_emit, the words, and push_symbol of eight lanes. Stores 16 bytes before `words`, the last of them
// count.
KVS_AVX2 inline __m256i push_lanes(__m256i state, __m256i meta, __m256i reciprocal, std::uint8_t*& words) {
  const __m256i field = _mm256_set1_epi32(0xFFF);
  const __m256i frequency = _mm256_and_si256(meta, field);
  const __m256i most = _mm256_sub_epi32(_mm256_slli_epi32(frequency, 19), _mm256_set1_epi32(1));
  const __m256i full = _mm256_cmpgt_epi32(state, most);
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(full)));
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kGather.order[mask]));
  const __m256i low = _mm256_and_si256(_mm256_permutevar8x32_epi32(state, order), _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 16), _mm256_castsi256_si128(packed));
  words -= 2 * _mm_popcnt_u32(mask);
  state = _mm256_blendv_epi8(state, _mm256_srli_epi32(state, 16), full);
  const __m256i rest = _mm256_sub_epi32(_mm256_set1_epi32(kSlots), frequency);
  const __m256i start = _mm256_and_si256(_mm256_srli_epi32(meta, 12), field);
  return _mm256_add_epi32(_mm256_add_epi32(state, start),
                          _mm256_mullo_epi32(divide(state, meta, reciprocal), rest));
}

}  // namespace

KVS_AVX2 void encode_rows_avx2(StreamWriter& to, LaneValues& block, std::uint64_t tokens) {
  auto* states = reinterpret_cast<__m256i*>(block.state);
  const auto* bases = reinterpret_cast<const __m256i*>(block.base);
  const auto* tables = reinterpret_cast<const __m256i*>(block.table);
  for (std::uint64_t token = tokens; token-- > 0;) {
    const std::uint16_t* row = block.values + token * kLanes;
    Symbols found;
    if (!find_symbols(row, bases, tables, found)) {
      encode_row(to, block, row);
      continue;
    }
    for (int i = kVectors; i-- > 0;) {
      states[i] = push_lanes(states[i], found.meta[i], found.reciprocal[i], to.words);
    }
  }
}

}  // namespace kvs

#else

namespace kvs {

void encode_rows_avx2(StreamWriter& to, LaneValues& block, std::uint64_t tokens) {
  encode_rows_portable(to, block, tokens);
}

}  // namespace kvs

#endif
