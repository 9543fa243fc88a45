// The AVX-512 encoder. Rows of level 0 with an escape go through encode_base_row instead.

#include "scalable_encode_rows.h"

#if defined(__x86_64__)

#include "scalable_avx512.h"

namespace kvs {
namespace {

// coarsen_number of 32 lanes.
KVS_AVX512 inline __m512i coarsen(__m512i numbers) {
  const __m512i lifted = _mm512_add_epi16(numbers, _mm512_set1_epi16(32767));
  const __m512i thirds =
      _mm512_srli_epi16(_mm512_mulhi_epu16(lifted, _mm512_set1_epi16(static_cast<short>(0xAAAB))), 1);
  return _mm512_sub_epi16(thirds, _mm512_set1_epi16(10922));
}

// must_emit and push_symbol of sixteen lanes but for the words: answers which lanes emit one, `state` is the
// new one. After the words are out, a quotient is below 2^19: a float holds it, less an eighth at most, so
// that it is right or one too small.
KVS_AVX512 inline __mmask16 push(__m512i& state, __m512i start, __m512i frequency) {
  const __mmask16 full = _mm512_cmpge_epu32_mask(state, _mm512_slli_epi32(frequency, 19));
  const __m512i kept = _mm512_mask_srli_epi32(state, full, state, 16);
  const __m512 ratio = _mm512_div_ps(_mm512_cvtepi32_ps(kept), _mm512_cvtepi32_ps(frequency));
  const __m512i quotient = _mm512_cvttps_epi32(_mm512_sub_ps(ratio, _mm512_set1_ps(0.0625f)));
  const __m512i rest = _mm512_sub_epi32(kept, _mm512_mullo_epi32(quotient, frequency));
  const __mmask16 short_by_one = _mm512_cmpge_epu32_mask(rest, frequency);
  const __m512i whole =
      _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(quotient, kSlotBits), rest), start);
  const __m512i more = _mm512_sub_epi32(_mm512_set1_epi32(kSlots), frequency);
  state = _mm512_mask_add_epi32(whole, short_by_one, whole, more);
  return full;
}

struct Lanes {
  __m512i low, high;
  __mmask32 present;

  KVS_AVX512 inline Lanes(const PushStates& states, std::uint32_t lanes)
      : low(_mm512_load_si512(states.state)),
        high(_mm512_load_si512(states.state + kHalf)),
        present(lanes_mask(lanes)) {}

  KVS_AVX512 inline void store(PushStates& states) const {
    _mm512_mask_storeu_epi32(states.state, static_cast<__mmask16>(present), low);
    _mm512_mask_storeu_epi32(states.state + kHalf, static_cast<__mmask16>(present >> kHalf), high);
  }

  // Pushes a symbol for each lane; words of lanes that are missing are left out.
  KVS_AVX512 inline void push_row(LevelSink& to, __m512i start0, __m512i frequency0, __m512i start1,
                                  __m512i frequency1) {
    const __m512i words = narrow_lanes(low, high);
    const __mmask16 full0 = push(low, start0, frequency0), full1 = push(high, start1, frequency1);
    const __mmask32 full = _mm512_kunpackw(full1, full0) & present;
    const unsigned count = static_cast<unsigned>(_mm_popcnt_u32(full));
    to.words -= 2 * count;
    _mm512_mask_storeu_epi16(to.words, _bzhi_u32(0xFFFFFFFF, count),
                             _mm512_maskz_compress_epi16(full, words));
  }
};

// Start and frequency of the ternary symbols of sixteen lanes.
KVS_AVX512 inline void find_symbols(__m512i coarse, __m512i fine, const Contexts& contexts, __m512i& start,
                                    __m512i& frequency) {
  const __m512i thresholds = contexts.choose(coarse);
  const __m512i c1 = _mm512_and_si512(thresholds, _mm512_set1_epi32(0xFFFF));
  const __m512i c2 = _mm512_srli_epi32(thresholds, 16);
  const __m512i third = _mm512_add_epi32(_mm512_add_epi32(coarse, coarse), coarse);
  const __mmask16 more = _mm512_cmpgt_epi32_mask(fine, third), less = _mm512_cmplt_epi32_mask(fine, third);
  const auto negative = static_cast<__mmask16>(_mm512_movepi32_mask(coarse));
  const auto outer = static_cast<__mmask16>((more & ~negative) | (less & negative));
  const auto inner = static_cast<__mmask16>((less & ~negative) | (more & negative));
  start = _mm512_maskz_mov_epi32(static_cast<__mmask16>(~inner), _mm512_mask_mov_epi32(c1, outer, c2));
  const __m512i end =
      _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(c2, inner, c1), outer, _mm512_set1_epi32(kSlots));
  frequency = _mm512_sub_epi32(end, start);
}

}  // namespace

KVS_AVX512 void encode_base_avx512(LevelSink& to, PushStates& states, const BasePushes& block,
                                   std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  const __m512i table0 = _mm512_load_si512(block.table), table1 = _mm512_load_si512(block.table + kHalf);
  const auto* pushes = reinterpret_cast<const int*>(block.pushes);
  const __m512i field = _mm512_set1_epi32(0xFFF);
  for (std::uint64_t token = tokens; token-- > 0;) {
    const std::int16_t* row = block.numbers + token * kLanes;
    const __m512i numbers = coarsen(coarsen(_mm512_loadu_si512(row)));
    const __m512i symbols = _mm512_add_epi16(numbers, _mm512_set1_epi16(kBaseOffset));
    const __mmask32 beyond = _mm512_cmpge_epu16_mask(symbols, _mm512_set1_epi16(kBaseEscape));
    const __m512i safe = _mm512_maskz_mov_epi16(static_cast<__mmask32>(~beyond), symbols);
    const __m512i meta0 =
        _mm512_i32gather_epi32(_mm512_add_epi32(table0, widen_lanes<0>(safe)), pushes, sizeof(Push));
    const __m512i meta1 =
        _mm512_i32gather_epi32(_mm512_add_epi32(table1, widen_lanes<1>(safe)), pushes, sizeof(Push));
    const __mmask32 absent =
        _mm512_kunpackw(_mm512_testn_epi32_mask(meta1, meta1), _mm512_testn_epi32_mask(meta0, meta0));
    if (((beyond | absent) & lanes.present) != 0) [[unlikely]] {
      lanes.store(states);
      encode_base_row(to, states, block, row);
      lanes = Lanes(states, block.lanes);
      continue;
    }
    lanes.push_row(to, _mm512_and_si512(_mm512_srli_epi32(meta0, 12), field), _mm512_and_si512(meta0, field),
                   _mm512_and_si512(_mm512_srli_epi32(meta1, 12), field), _mm512_and_si512(meta1, field));
  }
  lanes.store(states);
}

KVS_AVX512 void encode_refine_avx512(LevelSink& to, PushStates& states, const RefinePushes& block,
                                     std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  const Contexts contexts0(block.thresholds, 0), contexts1(block.thresholds, kHalf);
  for (std::uint64_t token = tokens; token-- > 0;) {
    const __m512i numbers = _mm512_loadu_si512(block.numbers + token * kLanes);
    const __m512i fine = block.level == 2 ? numbers : coarsen(numbers);
    const __m512i coarse = coarsen(fine);
    __m512i start0, frequency0, start1, frequency1;
    find_symbols(widen_lanes<0>(coarse), widen_lanes<0>(fine), contexts0, start0, frequency0);
    find_symbols(widen_lanes<1>(coarse), widen_lanes<1>(fine), contexts1, start1, frequency1);
    lanes.push_row(to, start0, frequency0, start1, frequency1);
  }
  lanes.store(states);
}

}  // namespace kvs

#else

namespace kvs {

void encode_base_avx512(LevelSink& to, PushStates& states, const BasePushes& block, std::uint64_t tokens) {
  encode_base_portable(to, states, block, tokens);
}

void encode_refine_avx512(LevelSink& to, PushStates& states, const RefinePushes& block,
                          std::uint64_t tokens) {
  encode_refine_portable(to, states, block, tokens);
}

}  // namespace kvs

#endif
