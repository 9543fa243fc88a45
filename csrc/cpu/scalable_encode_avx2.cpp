// The AVX2 encoder. Rows of level 0 with an escape go through encode_base_row instead.

#include "scalable_encode_rows.h"

#if defined(__x86_64__)

#include "scalable_avx2.h"
#include "word_order.h"

namespace kvs {
namespace {

// coarsen_number of eight lanes.
KVS_AVX2 inline __m256i coarsen(__m256i numbers) {
  // The high half of a product of 16-bit numbers, in lanes of 32 bits whose upper halves are 0.
  const __m256i lifted = _mm256_add_epi32(numbers, _mm256_set1_epi32(32767));
  const __m256i thirds = _mm256_srli_epi32(_mm256_mulhi_epu16(lifted, _mm256_set1_epi32(0xAAAB)), 1);
  return _mm256_sub_epi32(thirds, _mm256_set1_epi32(10922));
}

struct Symbols {
  __m256i start[kVectors], frequency[kVectors];
};

// must_emit, the words, and push_symbol of eight lanes. Stores 16 bytes before the first word, the last of
// them count. After the word is out, a quotient is below 2^19: a float holds it, less an eighth at most, so
// that it is right or one too small.
KVS_AVX2 inline void push_lanes(LevelSink& to, __m256i& state, __m256i start, __m256i frequency,
                                __m256i present) {
  const __m256i most = _mm256_sub_epi32(_mm256_slli_epi32(frequency, 19), _mm256_set1_epi32(1));
  const __m256i full = _mm256_and_si256(present, _mm256_cmpgt_epi32(state, most));
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(full)));
  const __m256i order = load_vector(kGather.order[mask]);
  const __m256i low = _mm256_and_si256(_mm256_permutevar8x32_epi32(state, order), _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to.words - 16), _mm256_castsi256_si128(packed));
  to.words -= 2 * _mm_popcnt_u32(mask);

  const __m256i kept = _mm256_blendv_epi8(state, _mm256_srli_epi32(state, 16), full);
  const __m256 ratio = _mm256_div_ps(_mm256_cvtepi32_ps(kept), _mm256_cvtepi32_ps(frequency));
  const __m256i quotient = _mm256_cvttps_epi32(_mm256_sub_ps(ratio, _mm256_set1_ps(0.0625f)));
  const __m256i rest = _mm256_sub_epi32(kept, _mm256_mullo_epi32(quotient, frequency));
  const __m256i exact = _mm256_cmpgt_epi32(frequency, rest);
  const __m256i whole =
      _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(quotient, kSlotBits), rest), start);
  const __m256i more = _mm256_sub_epi32(_mm256_set1_epi32(kSlots), frequency);
  state = _mm256_add_epi32(whole, _mm256_andnot_si256(exact, more));
}

struct Lanes {
  __m256i state[kVectors], present[kVectors];

  KVS_AVX2 inline Lanes(const PushStates& states, std::uint32_t lanes) {
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int i = 0; i < kVectors; ++i) {
      state[i] = load_vector(states.state + 8 * i);
      present[i] = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes) - 8 * i), number);
    }
  }

  KVS_AVX2 inline void store(PushStates& states) const {
    for (int i = 0; i < kVectors; ++i) {
      _mm256_maskstore_epi32(reinterpret_cast<int*>(states.state + 8 * i), present[i], state[i]);
    }
  }

  KVS_AVX2 inline void push_row(LevelSink& to, const Symbols& symbols) {
    for (int i = kVectors; i-- > 0;)
      push_lanes(to, state[i], symbols.start[i], symbols.frequency[i], present[i]);
  }
};

// The symbols of a row of level 0; false where one of them must be escaped.
KVS_AVX2 inline bool find_base(const BasePushes& block, const std::int16_t* row, const Lanes& lanes,
                               Symbols& found) {
  const auto* pushes = reinterpret_cast<const int*>(block.pushes);
  const __m256i field = _mm256_set1_epi32(0xFFF), zero = _mm256_setzero_si256();
  __m256i escaped = zero;
  for (int i = 0; i < kVectors; ++i) {
    const __m256i number = coarsen(coarsen(load_numbers(row + 8 * i)));
    const __m256i symbol = _mm256_add_epi32(number, _mm256_set1_epi32(kBaseOffset));
    const __m256i fits = _mm256_and_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(kBaseEscape), symbol),
                                          _mm256_cmpgt_epi32(symbol, _mm256_set1_epi32(-1)));
    const __m256i index = _mm256_add_epi32(load_vector(block.table + 8 * i), _mm256_and_si256(symbol, fits));
    const __m256i meta = _mm256_i32gather_epi32(pushes, index, sizeof(Push));
    found.frequency[i] = _mm256_and_si256(meta, field);
    found.start[i] = _mm256_and_si256(_mm256_srli_epi32(meta, kSlotBits), field);
    // A meta of 0 is a symbol that the table lacks.
    const __m256i absent = _mm256_or_si256(_mm256_cmpeq_epi32(meta, zero), _mm256_cmpeq_epi32(fits, zero));
    escaped = _mm256_or_si256(escaped, _mm256_and_si256(absent, lanes.present[i]));
  }
  return _mm256_movemask_ps(_mm256_castsi256_ps(escaped)) == 0;
}

// The ternary symbols of eight lanes.
KVS_AVX2 inline void find_ternary_lanes(__m256i coarse, __m256i fine, const Contexts& contexts,
                                        __m256i& start, __m256i& frequency) {
  const __m256i thresholds = contexts.choose(coarse);
  const __m256i c1 = _mm256_and_si256(thresholds, _mm256_set1_epi32(0xFFFF));
  const __m256i c2 = _mm256_srli_epi32(thresholds, 16);
  const __m256i r = _mm256_sub_epi32(fine, _mm256_add_epi32(_mm256_add_epi32(coarse, coarse), coarse));
  const __m256i sign = _mm256_srai_epi32(coarse, 31);
  const __m256i u = _mm256_sub_epi32(_mm256_xor_si256(r, sign), sign);
  const __m256i zero = _mm256_setzero_si256();
  const __m256i outer = _mm256_cmpgt_epi32(u, zero), inner = _mm256_cmpgt_epi32(zero, u);
  start = _mm256_andnot_si256(inner, _mm256_blendv_epi8(c1, c2, outer));
  const __m256i upper = _mm256_blendv_epi8(c2, _mm256_set1_epi32(kSlots), outer);
  frequency = _mm256_sub_epi32(_mm256_blendv_epi8(upper, c1, inner), start);
}

}  // namespace

KVS_AVX2 void encode_base_avx2(LevelSink& to, PushStates& states, const BasePushes& block,
                               std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  for (std::uint64_t token = tokens; token-- > 0;) {
    const std::int16_t* row = block.numbers + token * kLanes;
    Symbols found;
    if (find_base(block, row, lanes, found)) [[likely]] {
      lanes.push_row(to, found);
    } else {
      lanes.store(states);
      encode_base_row(to, states, block, row);
      lanes = Lanes(states, block.lanes);
    }
  }
  lanes.store(states);
}

KVS_AVX2 void encode_refine_avx2(LevelSink& to, PushStates& states, const RefinePushes& block,
                                 std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  for (std::uint64_t token = tokens; token-- > 0;) {
    Symbols found;
    for (int i = 0; i < kVectors; ++i) {
      const __m256i numbers = load_numbers(block.numbers + token * kLanes + 8 * i);
      const __m256i fine = block.level == 2 ? numbers : coarsen(numbers);
      const Contexts contexts(block.thresholds, 8 * i);
      find_ternary_lanes(coarsen(fine), fine, contexts, found.start[i], found.frequency[i]);
    }
    lanes.push_row(to, found);
  }
  lanes.store(states);
}

}  // namespace kvs

#else

namespace kvs {

void encode_base_avx2(LevelSink& to, PushStates& states, const BasePushes& block, std::uint64_t tokens) {
  encode_base_portable(to, states, block, tokens);
}

void encode_refine_avx2(LevelSink& to, PushStates& states, const RefinePushes& block, std::uint64_t tokens) {
  encode_refine_portable(to, states, block, tokens);
}

}  // namespace kvs

#endif
