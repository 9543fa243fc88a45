// The AVX2 encoder: a row of 32 lanes in four vectors. Lanes that are missing emit nothing and get their
// states back.

#include "encode_rows.h"
#include "word_order.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define KVS_AVX2 __attribute__((target("avx2,popcnt")))

namespace kvs {
namespace {

constexpr int kVectors = kLanes / 8;

// Where the symbols of sixteen lanes lie in push_tables(); answers which lanes are far, two bits for each.
KVS_AVX2 inline std::uint32_t find_symbols(const std::uint16_t* row, __m256i base, __m256i table,
                                           std::uint16_t* index) {
  const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  const __m256i sign = _mm256_srli_epi16(_mm256_xor_si256(value, base), 15);
  const __m256i magnitude = _mm256_set1_epi16(0x7FC0);
  const __m256i step = _mm256_srai_epi16(
      _mm256_sub_epi16(_mm256_and_si256(base, magnitude), _mm256_and_si256(value, magnitude)), kLowBits);
  const __m256i symbol =
      _mm256_or_si256(_mm256_slli_epi16(sign, 5), _mm256_and_si256(step, _mm256_set1_epi16(31)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(index), _mm256_add_epi16(table, symbol));
  const __m256i near = _mm256_and_si256(_mm256_cmpgt_epi16(step, _mm256_set1_epi16(-1)),
                                        _mm256_cmpgt_epi16(_mm256_set1_epi16(kEscapeStep), step));
  return ~static_cast<std::uint32_t>(_mm256_movemask_epi8(near));
}

// One of the two bits that _mm256_movemask_epi8 answers for each of sixteen lanes.
inline std::uint32_t one_bit_each(std::uint32_t pairs) {
  pairs &= 0x55555555;
  pairs = (pairs | pairs >> 1) & 0x33333333;
  pairs = (pairs | pairs >> 2) & 0x0F0F0F0F;
  pairs = (pairs | pairs >> 4) & 0x00FF00FF;
  return (pairs | pairs >> 8) & 0xFFFF;
}

KVS_AVX2 inline void find_row(const std::uint16_t* row, const __m256i* base, const __m256i* table,
                              RowBatch& batch, std::uint32_t i) {
  const std::uint32_t low = find_symbols(row, base[0], table[0], batch.index[i]);
  const std::uint32_t high = find_symbols(row + 16, base[1], table[1], batch.index[i] + 16);
  batch.far[i] = (low | high) == 0 ? 0 : one_bit_each(low) | one_bit_each(high) << 16;
}

// All bits of the lanes whose bits are set in the low eight of `set`.
KVS_AVX2 inline __m256i spread_set(std::uint32_t set) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(set)), bits), bits);
}

struct Symbols {
  __m256i meta, reciprocal;
};

// The symbols of eight lanes, from where they lie side by side.
KVS_AVX2 inline Symbols split(const Push* pushes) {
  const auto* from = reinterpret_cast<const float*>(pushes);
  const __m256 a = _mm256_castps128_ps256(_mm_loadu_ps(from)),
               b = _mm256_castps128_ps256(_mm_loadu_ps(from + 4));
  const __m256 low = _mm256_insertf128_ps(a, _mm_loadu_ps(from + 8), 1);
  const __m256 high = _mm256_insertf128_ps(b, _mm_loadu_ps(from + 12), 1);
  return {_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)),
          _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xDD))};
}

// A meta of 0 is a symbol that the table lacks.
KVS_AVX2 inline std::uint32_t find_absent(const Push* found) {
  std::uint32_t absent = 0;
  for (int i = 0; i < kVectors; ++i) {
    const __m256i none = _mm256_cmpeq_epi32(split(found + 8 * i).meta, _mm256_setzero_si256());
    absent |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(none))) << 8 * i;
  }
  return absent;
}

KVS_AVX2 inline __m256i divide(__m256i state, const Symbols& by) {
  const __m256i reciprocal = by.reciprocal;
  const __m256i shift = _mm256_add_epi32(_mm256_srli_epi32(by.meta, 24), _mm256_set1_epi32(31));
  const __m256i even = _mm256_srlv_epi64(_mm256_mul_epu32(state, reciprocal),
                                         _mm256_and_si256(shift, _mm256_set1_epi64x(0xFFFFFFFF)));
  const __m256i odd =
      _mm256_srlv_epi64(_mm256_mul_epu32(_mm256_srli_epi64(state, 32), _mm256_srli_epi64(reciprocal, 32)),
                        _mm256_srli_epi64(shift, 32));
  return _mm256_or_si256(even, _mm256_slli_epi64(odd, 32));
}

// must_emit, the words, and push_symbol of eight lanes. Stores 16 bytes before `words`, the last of them
// count.
KVS_AVX2 inline __m256i push_lanes(__m256i state, __m256i present, const Symbols& symbols,
                                   std::uint8_t*& words) {
  const __m256i meta = symbols.meta;
  const __m256i field = _mm256_set1_epi32(0xFFF);
  const __m256i frequency = _mm256_and_si256(meta, field);
  const __m256i most = _mm256_sub_epi32(_mm256_slli_epi32(frequency, 19), _mm256_set1_epi32(1));
  const __m256i full = _mm256_and_si256(present, _mm256_cmpgt_epi32(state, most));
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(full)));
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kGather.order[mask]));
  const __m256i low = _mm256_and_si256(_mm256_permutevar8x32_epi32(state, order), _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 16), _mm256_castsi256_si128(packed));
  words -= 2 * _mm_popcnt_u32(mask);
  state = _mm256_blendv_epi8(state, _mm256_srli_epi32(state, 16), full);
  const __m256i rest = _mm256_sub_epi32(_mm256_set1_epi32(kSlots), frequency);
  const __m256i start = _mm256_and_si256(_mm256_srli_epi32(meta, 12), field);
  return _mm256_add_epi32(_mm256_add_epi32(state, start), _mm256_mullo_epi32(divide(state, symbols), rest));
}

// 32-bit numbers of sixteen lanes as 16-bit ones.
KVS_AVX2 inline __m256i narrow(const std::uint32_t* numbers) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers + 8));
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
}

}  // namespace

KVS_AVX2 void encode_rows_avx2(StreamWriter& to, LaneValues& block, std::uint64_t tokens) {
  auto* states = reinterpret_cast<__m256i*>(block.state);
  const __m256i base[] = {narrow(block.base), narrow(block.base + 16)};
  const __m256i table[] = {narrow(block.table), narrow(block.table + 16)};
  const std::uint32_t present = first_lanes(block.lanes);
  __m256i lanes[kVectors];
  for (int part = 0; part < kVectors; ++part) lanes[part] = spread_set(present >> 8 * part);
  std::uint32_t missing[kLanes];
  std::copy(block.state + block.lanes, block.state + kLanes, missing);
  RowBatch batch;
  for (std::uint64_t last = tokens; last > 0;) {
    const std::uint64_t first = last > RowBatch::kRows ? last - RowBatch::kRows : 0;
    const std::uint16_t* rows = block.values + first * kLanes;
    const auto count = static_cast<std::uint32_t>(last - first);
    for (std::uint32_t i = 0; i < count; ++i) find_row(rows + i * kLanes, base, table, batch, i);
    batch.look_up(count);
    for (std::uint32_t i = count; i-- > 0;) {
      Push* found = batch.found[i];
      const std::uint32_t escaped = (batch.far[i] | find_absent(found)) & present;
      if (escaped != 0) [[unlikely]]
        escape_lanes(to, block, rows + i * kLanes, escaped, found);
      for (int part = kVectors; part-- > 0;) {
        states[part] = push_lanes(states[part], lanes[part], split(found + 8 * part), to.words);
      }
    }
    last = first;
  }
  std::copy(missing, missing + kLanes - block.lanes, block.state + block.lanes);
}

// Two 6-bit numbers become 12 bits, two of those 24; the shuffle drops the empty bytes.
KVS_AVX2 void write_rows_avx2(std::uint8_t* to, const std::uint16_t* values, std::uint64_t tokens) {
  const __m256i dense = _mm256_setr_epi8(0, 1, 2, 8, 9, 10, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 1, 2, 8, 9, 10, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (const std::uint16_t* end = values + tokens * kLanes; values != end; values += 16, to += 12) {
    const __m256i low =
        _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), _mm256_set1_epi16(63));
    const __m256i twos = _mm256_madd_epi16(low, _mm256_set1_epi32(64 << 16 | 1));
    const __m256i fours = _mm256_or_si256(twos, _mm256_srli_epi64(twos, 20));
    const __m256i packed = _mm256_shuffle_epi8(fours, dense);
    const auto first = static_cast<std::uint64_t>(_mm256_extract_epi64(packed, 0));
    const auto second = static_cast<std::uint64_t>(_mm256_extract_epi64(packed, 2));
    store(to, first | second << 48);
    store(to + 8, static_cast<std::uint32_t>(second >> 16));
  }
}

}  // namespace kvs

#else

namespace kvs {

void encode_rows_avx2(StreamWriter& to, LaneValues& block, std::uint64_t tokens) {
  encode_rows_portable(to, block, tokens);
}

void write_rows_avx2(std::uint8_t*, const std::uint16_t*, std::uint64_t) {}

}  // namespace kvs

#endif
