// The AVX2 decoder: 32 lanes in four vectors of eight. Lanes that are missing take no words and get their
// states back.

#include "scalable_decode_rows.h"

#if defined(__x86_64__)

#include "look_up_avx2.h"
#include "scalable_avx2.h"
#include "word_order.h"

namespace kvs {
namespace {

KVS_AVX2 inline __m256i slots_of(__m256i state) {
  return _mm256_and_si256(state, _mm256_set1_epi32(kSlots - 1));
}

KVS_AVX2 inline __m256i pop(__m256i state, __m256i frequency, __m256i offset) {
  return _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(state, kSlotBits)), offset);
}

// pop_symbol of eight lanes: answers the entries.
KVS_AVX2 inline __m256i pop_base(__m256i& state, __m256i table, const std::uint32_t* slots) {
  const __m256i entry = look_up(slots, _mm256_add_epi32(slots_of(state), table));
  const __m256i field = _mm256_set1_epi32(0xFFF);
  state = pop(state, _mm256_and_si256(entry, field),
              _mm256_and_si256(_mm256_srli_epi32(entry, kSlotBits), field));
  return entry;
}

// find_ternary, pop_symbol and refine_number of eight lanes: answers the finer numbers.
KVS_AVX2 inline __m256i pop_ternary(__m256i& state, __m256i coarse, const Contexts& contexts) {
  const __m256i thresholds = contexts.choose(coarse);
  const __m256i c1 = _mm256_and_si256(thresholds, _mm256_set1_epi32(0xFFFF));
  const __m256i c2 = _mm256_srli_epi32(thresholds, 16);
  const __m256i slot = slots_of(state);
  const __m256i below_c1 = _mm256_cmpgt_epi32(c1, slot), below_c2 = _mm256_cmpgt_epi32(c2, slot);
  const __m256i start = _mm256_andnot_si256(below_c1, _mm256_blendv_epi8(c2, c1, below_c2));
  const __m256i upper = _mm256_blendv_epi8(_mm256_set1_epi32(kSlots), c2, below_c2);
  const __m256i end = _mm256_blendv_epi8(upper, c1, below_c1);
  state = pop(state, _mm256_sub_epi32(end, start), _mm256_sub_epi32(slot, start));
  // What is below is all ones, -1: u = 1 + below_c1 + below_c2.
  const __m256i u = _mm256_add_epi32(_mm256_add_epi32(below_c1, below_c2), _mm256_set1_epi32(1));
  const __m256i sign = _mm256_srai_epi32(coarse, 31);
  const __m256i r = _mm256_sub_epi32(_mm256_xor_si256(u, sign), sign);
  return _mm256_add_epi32(_mm256_add_epi32(_mm256_add_epi32(coarse, coarse), coarse), r);
}

// The states of a block's lanes while it is decoded.
struct Lanes {
  __m256i state[kVectors], present[kVectors];

  KVS_AVX2 inline Lanes(const LaneStates& states, std::uint32_t lanes) {
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int i = 0; i < kVectors; ++i) {
      state[i] = load_vector(states.state + 8 * i);
      present[i] = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes) - 8 * i), number);
    }
  }

  KVS_AVX2 inline void store(LaneStates& states) const {
    for (int i = 0; i < kVectors; ++i) {
      _mm256_maskstore_epi32(reinterpret_cast<int*>(states.state + 8 * i), present[i], state[i]);
    }
  }

  // Renormalises one vector. Loads 16 bytes from `words` on.
  KVS_AVX2 inline void pull_words(int i, const std::uint8_t*& words) {
    const __m256i popped = state[i];
    const __m256i hungry =
        _mm256_and_si256(present[i], _mm256_cmpgt_epi32(_mm256_set1_epi32(kStateMin), popped));
    const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(hungry)));
    const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.order[mask]));
    const __m256i pulled =
        _mm256_or_si256(_mm256_slli_epi32(popped, 16), _mm256_permutevar8x32_epi32(next, order));
    state[i] = _mm256_blendv_epi8(popped, pulled, hungry);
    words += 2 * _mm_popcnt_u32(mask);
  }

  KVS_AVX2 inline __m256i present_words(int pair) const {
    return narrow_lanes(present[2 * pair], present[2 * pair + 1]);
  }
};

}  // namespace

KVS_AVX2 std::uint64_t decode_base_avx2(LevelSource& from, LaneStates& states, const BaseBlock& block,
                                        std::uint64_t begin, std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  const __m256i kept[2] = {lanes.present_words(0), lanes.present_words(1)};
  const std::uint32_t* slots = block.slots;
  const std::uint8_t* words = from.next;
  const std::uint8_t* const wide = from.wide;
  std::uint64_t token = begin;
  for (; token < tokens && words <= wide; ++token) {
    __m256i symbol[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      symbol[i] = _mm256_srli_epi32(pop_base(lanes.state[i], load_vector(block.table + 8 * i), slots), 24);
      lanes.pull_words(i, words);
    }
    std::int16_t* row = block.numbers + token * kLanes;
    std::uint32_t escaped[2];
    for (int pair = 0; pair < 2; ++pair) {
      const __m256i symbols = narrow_lanes(symbol[2 * pair], symbol[2 * pair + 1]);
      const __m256i numbers = _mm256_sub_epi16(symbols, _mm256_set1_epi16(kBaseOffset));
      store_vector(row + 16 * pair, _mm256_and_si256(numbers, kept[pair]));
      const __m256i escapes =
          _mm256_and_si256(_mm256_cmpeq_epi16(symbols, _mm256_set1_epi16(kBaseEscape)), kept[pair]);
      const __m128i bytes =
          _mm_packs_epi16(_mm256_castsi256_si128(escapes), _mm256_extracti128_si256(escapes, 1));
      escaped[pair] = static_cast<std::uint32_t>(_mm_movemask_epi8(bytes));
    }
    if ((escaped[0] | escaped[1]) != 0) [[unlikely]] {
      take_row_escapes(from, escaped[0] | escaped[1] << 16, row);
      if (from.failed) break;
    }
  }
  lanes.store(states);
  from.next = words;
  return token;
}

KVS_AVX2 std::uint64_t decode_refine_avx2(LevelSource& from, LaneStates& states, const RefineBlock& block,
                                          std::uint64_t begin, std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  const __m256i kept[2] = {lanes.present_words(0), lanes.present_words(1)};
  const std::uint8_t* words = from.next;
  const std::uint8_t* const wide = from.wide;
  std::uint64_t token = begin;
  for (; token < tokens && words <= wide; ++token) {
    std::int16_t* row = block.numbers + token * kLanes;
    __m256i fine[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const Contexts contexts(block.thresholds, 8 * i);
      fine[i] = pop_ternary(lanes.state[i], load_numbers(row + 8 * i), contexts);
      lanes.pull_words(i, words);
    }
    // Lanes that this level does not code stay 0 for the next.
    for (int pair = 0; pair < 2; ++pair) {
      const __m256i numbers = narrow_lanes(fine[2 * pair], fine[2 * pair + 1]);
      store_vector(row + 16 * pair, _mm256_and_si256(numbers, kept[pair]));
    }
  }
  lanes.store(states);
  from.next = words;
  return token;
}

}  // namespace kvs

#else

namespace kvs {

std::uint64_t decode_base_avx2(LevelSource&, LaneStates&, const BaseBlock&, std::uint64_t begin,
                               std::uint64_t) {
  return begin;
}

std::uint64_t decode_refine_avx2(LevelSource&, LaneStates&, const RefineBlock&, std::uint64_t begin,
                                 std::uint64_t) {
  return begin;
}

}  // namespace kvs

#endif
