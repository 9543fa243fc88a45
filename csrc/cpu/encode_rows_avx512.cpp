// The AVX-512 encoder: a row of 32 lanes in two vectors of sixteen; masks leave lanes that are missing as
// they are.

#include "encode_rows.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define KVS_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,popcnt")))

namespace kvs {
namespace {

constexpr std::uint32_t kHalf = kLanes / 2;

KVS_AVX512 inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// 32-bit numbers of all lanes as 16-bit ones.
KVS_AVX512 inline __m512i narrow(const std::uint32_t* numbers) {
  return join(_mm512_cvtepi32_epi16(_mm512_loadu_si512(numbers)),
              _mm512_cvtepi32_epi16(_mm512_loadu_si512(numbers + kHalf)));
}

struct Lanes {
  __m512i base, table;
};

// Where the symbols of a row lie in push_tables(). Lanes whose step is an escape's or beyond are `far`.
KVS_AVX512 inline __m512i find_symbols(const Lanes& lanes, __m512i value, __mmask32& far) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FC0);
  const __m512i sign = _mm512_srli_epi16(_mm512_xor_si512(value, lanes.base), 15);
  const __m512i step = _mm512_srai_epi16(
      _mm512_sub_epi16(_mm512_and_si512(lanes.base, magnitude), _mm512_and_si512(value, magnitude)),
      kLowBits);
  far = _mm512_cmpge_epu16_mask(step, _mm512_set1_epi16(kEscapeStep));
  const __m512i symbol =
      _mm512_or_si512(_mm512_slli_epi16(sign, 5), _mm512_and_si512(step, _mm512_set1_epi16(31)));
  return _mm512_add_epi16(lanes.table, symbol);
}

struct Symbols {
  __m512i meta, reciprocal;
};

// The symbols of sixteen lanes, from where they lie side by side.
KVS_AVX512 inline Symbols split(const Push* pushes) {
  const __m512i low = _mm512_loadu_si512(pushes), high = _mm512_loadu_si512(pushes + kHalf / 2);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_epi32(low, even, high),
          _mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high)};
}

// A meta of 0 is a symbol that the table lacks.
KVS_AVX512 inline __mmask16 find_absent(const Symbols& symbols) {
  return _mm512_testn_epi32_mask(symbols.meta, symbols.meta);
}

// must_emit. The shift leaves the frequency's twelve bits and one of the start's, which is cut off.
KVS_AVX512 inline __mmask16 find_full(__m512i state, __m512i meta, __mmask16 lanes) {
  const __m512i limit = _mm512_and_si512(_mm512_slli_epi32(meta, 19), _mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_mask_cmpge_epu32_mask(lanes, state, limit);
}

KVS_AVX512 inline __m512i divide(__m512i state, const Symbols& by) {
  const __m512i shift = _mm512_add_epi32(_mm512_srli_epi32(by.meta, 24), _mm512_set1_epi32(31));
  const __m512i even = _mm512_srlv_epi64(_mm512_mul_epu32(state, by.reciprocal),
                                         _mm512_and_si512(shift, _mm512_set1_epi64(0xFFFFFFFF)));
  const __m512i odd =
      _mm512_srlv_epi64(_mm512_mul_epu32(_mm512_srli_epi64(state, 32), _mm512_srli_epi64(by.reciprocal, 32)),
                        _mm512_srli_epi64(shift, 32));
  return _mm512_or_si512(even, _mm512_slli_epi64(odd, 32));
}

// push_symbol of the `lanes`, after the `full` ones have emitted.
KVS_AVX512 inline __m512i push_lanes(__m512i state, const Symbols& symbols, __mmask16 full, __mmask16 lanes) {
  const __m512i field = _mm512_set1_epi32(0xFFF);
  const __m512i rest = _mm512_sub_epi32(_mm512_set1_epi32(kSlots), _mm512_and_si512(symbols.meta, field));
  const __m512i start = _mm512_and_si512(_mm512_srli_epi32(symbols.meta, 12), field);
  const __m512i low = _mm512_mask_srli_epi32(state, full, state, 16);
  return _mm512_mask_add_epi32(state, lanes, _mm512_add_epi32(low, start),
                               _mm512_mullo_epi32(divide(low, symbols), rest));
}

// Writes the low halves of the `full` states before `words`, in lane order. Stores 64 bytes before `words`.
KVS_AVX512 inline void emit(std::uint8_t*& words, __mmask32 full, __m512i low_halves) {
  const auto count = static_cast<std::uint32_t>(_mm_popcnt_u32(full));
  const __m512i front = _mm512_maskz_compress_epi16(full, low_halves);
  const __m512i lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15,
                                        14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  // The first `count` numbers move to the end: index modulo 32.
  const __m512i turned =
      _mm512_permutexvar_epi16(_mm512_add_epi16(lane, _mm512_set1_epi16(static_cast<short>(count))), front);
  _mm512_storeu_si512(words - 64, turned);
  words -= 2 * count;
}

}  // namespace

KVS_AVX512 void encode_rows_avx512(StreamWriter& to, LaneValues& block, std::uint64_t tokens) {
  const Lanes lanes{narrow(block.base), narrow(block.table)};
  __m512i state0 = _mm512_loadu_si512(block.state), state1 = _mm512_loadu_si512(block.state + kHalf);
  const std::uint32_t present = first_lanes(block.lanes);
  const auto lanes0 = static_cast<__mmask16>(present), lanes1 = static_cast<__mmask16>(present >> kHalf);
  std::uint8_t* words = to.words;
  RowBatch batch;
  for (std::uint64_t last = tokens; last > 0;) {
    const std::uint64_t first = last > RowBatch::kRows ? last - RowBatch::kRows : 0;
    const std::uint16_t* rows = block.values + first * kLanes;
    const auto count = static_cast<std::uint32_t>(last - first);
    for (std::uint32_t i = 0; i < count; ++i) {
      const __m512i row = _mm512_loadu_si512(rows + i * kLanes);
      _mm512_store_si512(batch.index[i], find_symbols(lanes, row, batch.far[i]));
    }
    batch.look_up(count);
    for (std::uint32_t i = count; i-- > 0;) {
      Push* found = batch.found[i];
      Symbols symbols0 = split(found), symbols1 = split(found + kHalf);
      const __mmask32 absent = _mm512_kunpackw(find_absent(symbols1), find_absent(symbols0));
      const __mmask32 escaped = (batch.far[i] | absent) & present;
      if (escaped != 0) [[unlikely]] {
        escape_lanes(to, block, rows + i * kLanes, escaped, found);
        symbols0 = split(found), symbols1 = split(found + kHalf);
      }
      const __mmask16 full0 = find_full(state0, symbols0.meta, lanes0);
      const __mmask16 full1 = find_full(state1, symbols1.meta, lanes1);
      emit(words, _mm512_kunpackw(full1, full0),
           join(_mm512_cvtepi32_epi16(state0), _mm512_cvtepi32_epi16(state1)));
      state0 = push_lanes(state0, symbols0, full0, lanes0);
      state1 = push_lanes(state1, symbols1, full1, lanes1);
    }
    last = first;
  }
  to.words = words;
  _mm512_storeu_si512(block.state, state0);
  _mm512_storeu_si512(block.state + kHalf, state1);
}

}  // namespace kvs

#else

namespace kvs {

void encode_rows_avx512(StreamWriter& to, LaneValues& block, std::uint64_t tokens) {
  encode_rows_portable(to, block, tokens);
}

}  // namespace kvs

#endif
