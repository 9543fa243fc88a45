// The AVX-512 decoder.

#include "scalable_decode_rows.h"

#if defined(__x86_64__)

#include "look_up_avx2.h"
#include "scalable_avx512.h"

namespace kvs {
namespace {

// As look_up of eight, for sixteen.
KVS_AVX512 inline __m512i look_up(const std::uint32_t* entries, __m512i index) {
  alignas(64) std::uint32_t at[kHalf];
  _mm512_store_si512(at, index);
  return join(load_eight(entries, at), load_eight(entries, at + kHalf / 2));
}

KVS_AVX512 inline __m512i slots_of(__m512i state) {
  return _mm512_and_si512(state, _mm512_set1_epi32(kSlots - 1));
}

KVS_AVX512 inline __m512i pop(__m512i state, __m512i frequency, __m512i offset) {
  return _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(state, kSlotBits)), offset);
}

// pop_symbol of sixteen lanes: answers the entries.
KVS_AVX512 inline __m512i pop_base(__m512i& state, __m512i table, const std::uint32_t* slots) {
  const __m512i entry = look_up(slots, _mm512_add_epi32(slots_of(state), table));
  const __m512i field = _mm512_set1_epi32(0xFFF);
  state = pop(state, _mm512_and_si512(entry, field),
              _mm512_and_si512(_mm512_srli_epi32(entry, kSlotBits), field));
  return entry;
}

// find_ternary, pop_symbol and refine_number of sixteen lanes: answers the finer numbers.
KVS_AVX512 inline __m512i pop_ternary(__m512i& state, __m512i coarse, const Contexts& contexts) {
  const __m512i thresholds = contexts.choose(coarse);
  const __m512i c1 = _mm512_and_si512(thresholds, _mm512_set1_epi32(0xFFFF));
  const __m512i c2 = _mm512_srli_epi32(thresholds, 16);
  const __m512i slot = slots_of(state);
  const __mmask16 from_c1 = _mm512_cmpge_epu32_mask(slot, c1), from_c2 = _mm512_cmpge_epu32_mask(slot, c2);
  const __m512i start = _mm512_mask_mov_epi32(_mm512_maskz_mov_epi32(from_c1, c1), from_c2, c2);
  const __m512i end =
      _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(c1, from_c1, c2), from_c2, _mm512_set1_epi32(kSlots));
  state = pop(state, _mm512_sub_epi32(end, start), _mm512_sub_epi32(slot, start));
  // u is 1 from c2 on, -1 below c1; r is -u where the coarser number is negative.
  const auto negative = static_cast<__mmask16>(_mm512_movepi32_mask(coarse));
  const __mmask16 outer = from_c2, inner = static_cast<__mmask16>(~from_c1);
  const auto more = static_cast<__mmask16>((outer & ~negative) | (inner & negative));
  const auto less = static_cast<__mmask16>((outer & negative) | (inner & ~negative));
  const __m512i one = _mm512_set1_epi32(1);
  __m512i fine = _mm512_add_epi32(_mm512_add_epi32(coarse, coarse), coarse);
  fine = _mm512_mask_add_epi32(fine, more, fine, one);
  return _mm512_mask_sub_epi32(fine, less, fine, one);
}

KVS_AVX512 inline __mmask16 find_hungry(__m512i popped) {
  return _mm512_cmplt_epu32_mask(popped, _mm512_set1_epi32(kStateMin));
}

// pull_word of the `hungry` lanes. Loads 32 bytes from `words` on.
KVS_AVX512 inline __m512i pull_words(__m512i popped, __mmask16 hungry, const std::uint8_t* words) {
  const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
  return _mm512_or_si512(_mm512_mask_slli_epi32(popped, hungry, popped, 16),
                         _mm512_maskz_expand_epi32(hungry, next));
}

// The states of a block's lanes while it is decoded.
struct Lanes {
  __m512i low, high;
  __mmask32 present;

  KVS_AVX512 inline Lanes(const LaneStates& states, std::uint32_t lanes)
      : low(_mm512_load_si512(states.state)),
        high(_mm512_load_si512(states.state + kHalf)),
        present(lanes_mask(lanes)) {}

  KVS_AVX512 inline void store(LaneStates& states) const {
    _mm512_mask_storeu_epi32(states.state, static_cast<__mmask16>(present), low);
    _mm512_mask_storeu_epi32(states.state + kHalf, static_cast<__mmask16>(present >> kHalf), high);
  }

  KVS_AVX512 inline void renormalise(const std::uint8_t*& words) {
    const auto hungry0 = static_cast<__mmask16>(find_hungry(low) & present);
    const auto hungry1 = static_cast<__mmask16>(find_hungry(high) & present >> kHalf);
    low = pull_words(low, hungry0, words);
    words += 2 * _mm_popcnt_u32(hungry0);
    high = pull_words(high, hungry1, words);
    words += 2 * _mm_popcnt_u32(hungry1);
  }
};

// Symbols looked up, slot by slot.
struct SlotLookup {
  const std::uint32_t* slots;
  __m512i table[2];

  KVS_AVX512 inline explicit SlotLookup(const BaseBlock& block)
      : slots(block.slots), table{_mm512_load_si512(block.table), _mm512_load_si512(block.table + kHalf)} {}

  template <int half>
  KVS_AVX512 inline __m512i pop_symbols(__m512i& state) const {
    return _mm512_srli_epi32(pop_base(state, table[half], slots), 24);
  }
};

// Symbols found by comparing with `kBounds` bounds and the escape's.
template <std::uint32_t kBounds>
struct SlotComparison {
  const BaseBlock& block;

  KVS_AVX512 inline explicit SlotComparison(const BaseBlock& of) : block(of) {}

  template <int half>
  KVS_AVX512 inline __m512i pop_symbols(__m512i& state) const {
    const __m512i slot = slots_of(state);
    __m512i entry = _mm512_load_si512(block.first + half * kHalf);
#pragma GCC unroll 16
    for (std::uint32_t i = 0; i <= kBounds; ++i) {
      const std::uint32_t from = i < kBounds ? i : kMostBounds;
      const __m512i bound = _mm512_load_si512(block.bounds[from] + half * kHalf);
      entry = _mm512_mask_mov_epi32(entry, _mm512_cmpge_epu32_mask(slot, bound),
                                    _mm512_load_si512(block.entries[from] + half * kHalf));
    }
    const __m512i field = _mm512_set1_epi32(0xFFF);
    const __m512i start = _mm512_and_si512(_mm512_srli_epi32(entry, kSlotBits), field);
    state = pop(state, _mm512_and_si512(entry, field), _mm512_sub_epi32(slot, start));
    return _mm512_srli_epi32(entry, 24);
  }
};

template <typename Symbols>
KVS_AVX512 std::uint64_t decode_base(LevelSource& from, LaneStates& states, const BaseBlock& block,
                                     std::uint64_t begin, std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  const Symbols symbols(block);
  const std::uint8_t* words = from.next;
  const std::uint8_t* const wide = from.wide;
  std::uint64_t token = begin;
  for (; token < tokens && words <= wide; ++token) {
    const __m512i low = symbols.template pop_symbols<0>(lanes.low);
    const __m512i high = symbols.template pop_symbols<1>(lanes.high);
    lanes.renormalise(words);
    const __m512i found = narrow_lanes(low, high);
    const __m512i numbers = _mm512_sub_epi16(found, _mm512_set1_epi16(kBaseOffset));
    std::int16_t* row = block.numbers + token * kLanes;
    _mm512_storeu_si512(row, _mm512_maskz_mov_epi16(lanes.present, numbers));
    const __mmask32 escaped =
        _mm512_mask_cmpeq_epi16_mask(lanes.present, found, _mm512_set1_epi16(kBaseEscape));
    if (escaped != 0) [[unlikely]] {
      take_row_escapes(from, escaped, row);
      if (from.failed) break;
    }
  }
  lanes.store(states);
  from.next = words;
  return token;
}

}  // namespace

std::uint64_t decode_base_avx512(LevelSource& from, LaneStates& states, const BaseBlock& block,
                                 std::uint64_t begin, std::uint64_t tokens) {
  const auto rows = block.bound_count <= 2             ? decode_base<SlotComparison<2>>
                    : block.bound_count <= 4           ? decode_base<SlotComparison<4>>
                    : block.bound_count <= 8           ? decode_base<SlotComparison<8>>
                    : block.bound_count <= kMostBounds ? decode_base<SlotComparison<kMostBounds>>
                                                       : decode_base<SlotLookup>;
  return rows(from, states, block, begin, tokens);
}

KVS_AVX512 std::uint64_t decode_refine_avx512(LevelSource& from, LaneStates& states, const RefineBlock& block,
                                              std::uint64_t begin, std::uint64_t tokens) {
  Lanes lanes(states, block.lanes);
  const Contexts contexts0(block.thresholds, 0), contexts1(block.thresholds, kHalf);
  const std::uint8_t* words = from.next;
  const std::uint8_t* const wide = from.wide;
  std::uint64_t token = begin;
  for (; token < tokens && words <= wide; ++token) {
    std::int16_t* row = block.numbers + token * kLanes;
    const __m512i coarse = _mm512_loadu_si512(row);
    const __m512i fine0 = pop_ternary(lanes.low, widen_lanes<0>(coarse), contexts0);
    const __m512i fine1 = pop_ternary(lanes.high, widen_lanes<1>(coarse), contexts1);
    lanes.renormalise(words);
    // Lanes that this level does not code stay 0 for the next.
    _mm512_storeu_si512(row, _mm512_maskz_mov_epi16(lanes.present, narrow_lanes(fine0, fine1)));
  }
  lanes.store(states);
  from.next = words;
  return token;
}

}  // namespace kvs

#else

namespace kvs {

std::uint64_t decode_base_avx512(LevelSource&, LaneStates&, const BaseBlock&, std::uint64_t begin,
                                 std::uint64_t) {
  return begin;
}

std::uint64_t decode_refine_avx512(LevelSource&, LaneStates&, const RefineBlock&, std::uint64_t begin,
                                   std::uint64_t) {
  return begin;
}

}  // namespace kvs

#endif
