// The AVX-512 loop: 32 lanes in two vectors of sixteen, or the first of them alone; masks leave lanes that
// are missing as they are.

#include "../rans.h"
#include "decode_rows.h"

#if defined(__x86_64__)

#include "look_up_avx2.h"

#define KVS_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,popcnt")))

namespace kvs {
namespace {

constexpr std::uint32_t kHalf = kLanes / 2;

// As look_up of eight, for sixteen.
KVS_AVX512 inline __m512i look_up(const std::uint32_t* entries, __m512i index) {
  alignas(64) std::uint32_t at[kHalf];
  _mm512_store_si512(at, index);
  return _mm512_inserti64x4(_mm512_castsi256_si512(load_eight(entries, at)), load_eight(entries, at + 8), 1);
}

// pop_symbol of sixteen lanes: answers the entries.
KVS_AVX512 inline __m512i pop_lanes(__m512i& state, __m512i table, const std::uint32_t* entries) {
  const __m512i slot = _mm512_and_si512(state, _mm512_set1_epi32(kSlots - 1));
  const __m512i entry = look_up(entries, _mm512_add_epi32(slot, table));
  const __m512i field = _mm512_set1_epi32(0xFFF);
  state = _mm512_add_epi32(
      _mm512_mullo_epi32(_mm512_and_si512(entry, field), _mm512_srli_epi32(state, kSlotBits)),
      _mm512_and_si512(_mm512_srli_epi32(entry, 12), field));
  return entry;
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

// The 32 6-bit numbers of a row. Loads 32 bytes.
KVS_AVX512 inline __m512i unpack_low(const std::uint8_t* from) {
  const __m256i sixes = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 0, 0, 6, 7, 8, 9, 10, 11, 0, 0,  //
                                         12, 13, 14, 15, 16, 17, 0, 0, 18, 19, 20, 21, 22, 23, 0, 0);
  const __m256i shifts = _mm256_set1_epi64x(0x2A241E18120C0600);  // bits 0, 6, 12 and so on
  const __m256i bytes =
      _mm256_permutexvar_epi8(sixes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_cvtepu8_epi16(
      _mm256_and_si256(_mm256_multishift_epi64_epi8(shifts, bytes), _mm256_set1_epi8(63)));
}

KVS_AVX512 inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// assemble_value of all lanes.
KVS_AVX512 inline __m512i assemble(__m512i symbol, __m512i base, __m512i low) {
  const __m512i drop = _mm512_slli_epi16(_mm512_and_si512(symbol, _mm512_set1_epi16(31)), 6);
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(symbol, _mm512_set1_epi16(32)), 10);
  const __m512i magnitude = _mm512_and_si512(_mm512_sub_epi16(base, drop), _mm512_set1_epi16(0x7FC0));
  const __m512i flip = _mm512_and_si512(base, _mm512_set1_epi16(static_cast<short>(0x8000)));
  return _mm512_or_si512(_mm512_or_si512(_mm512_xor_si512(sign, flip), magnitude), low);
}

// Where the values of a row go: each run is one store of the lanes that it has, at its place less those
// before.
struct Scatter {
  __mmask32 lanes[kLanes];
  std::int64_t offset[kLanes];
  std::uint32_t count;

  explicit Scatter(const BlockRuns& runs) : count(runs.count) {
    for (std::uint32_t i = 0; i < count; ++i) {
      const Run& run = runs.runs[i];
      lanes[i] = first_lanes(run.lanes) << run.lane;
      offset[i] = run.offset - run.lane;
    }
  }
};

KVS_AVX512 inline void store_row(const Scatter& scatter, __m512i row, std::uint16_t* to) {
  for (std::uint32_t i = 0; i < scatter.count; ++i) {
    _mm512_mask_storeu_epi16(to + scatter.offset[i], scatter.lanes[i], row);
  }
}

// `kBoth`: the block has more than sixteen lanes.
template <bool kBoth>
KVS_AVX512 std::uint64_t decode_rows(StreamReader& from, LaneBlock& block, const BlockRuns& runs,
                                     std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride) {
  constexpr std::ptrdiff_t kWordReach =
      2 * 32;  // two loads, the second at most sixteen words after the first
  constexpr std::ptrdiff_t kRowReach = 32;
  const std::uint32_t* entries = slot_tables()[0];
  const auto present = first_lanes(block.lanes);
  const auto lanes0 = static_cast<__mmask16>(present), lanes1 = static_cast<__mmask16>(present >> kHalf);
  const __m512i table0 = _mm512_loadu_si512(block.table), table1 = _mm512_loadu_si512(block.table + kHalf);
  const __m512i base = _mm512_loadu_si512(block.base);
  __m512i state0 = _mm512_loadu_si512(block.state), state1 = _mm512_loadu_si512(block.state + kHalf);
  const Scatter scatter(runs);
  const std::uint64_t row_size = row_bytes(block.lanes);
  const std::uint8_t* words = from.words;
  const std::uint8_t* low = block.rows;
  std::uint64_t token = 0;
  for (; token < tokens; ++token, low += row_size) {
    if (from.end - words < kWordReach || from.end - low < kRowReach) break;
    __m512i popped0 = state0, popped1 = state1;
    const __m512i entry0 = pop_lanes(popped0, table0, entries);
    const __m512i entry1 = kBoth ? pop_lanes(popped1, table1, entries) : entry0;
    const auto hungry0 = static_cast<__mmask16>(find_hungry(popped0) & lanes0);
    const auto hungry1 = static_cast<__mmask16>(kBoth ? find_hungry(popped1) & lanes1 : 0);
    popped0 = pull_words(popped0, hungry0, words);
    words += 2 * _mm_popcnt_u32(hungry0);
    state0 = _mm512_mask_mov_epi32(state0, lanes0, popped0);
    if constexpr (kBoth) {
      popped1 = pull_words(popped1, hungry1, words);
      words += 2 * _mm_popcnt_u32(hungry1);
      state1 = _mm512_mask_mov_epi32(state1, lanes1, popped1);
    }
    const __m512i symbol = join(_mm512_cvtepi32_epi16(_mm512_srli_epi32(entry0, 24)),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(entry1, 24)));
    __m512i row = assemble(symbol, base, unpack_low(low));
    const std::uint32_t escaped = _mm512_test_epi16_mask(symbol, _mm512_set1_epi16(128)) & present;
    if (escaped != 0) [[unlikely]] {
      alignas(64) std::uint16_t values[kLanes];
      _mm512_store_si512(values, row);
      from.exhausted = !take_escapes(from, escaped, values);
      if (from.exhausted) break;
      row = _mm512_load_si512(values);
    }
    store_row(scatter, row, out + static_cast<std::int64_t>(token) * token_stride);
  }
  _mm512_storeu_si512(block.state, state0);
  _mm512_storeu_si512(block.state + kHalf, state1);
  from.words = words;
  return token;
}

}  // namespace

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

std::uint64_t decode_rows_avx512(StreamReader& from, LaneBlock& block, const BlockRuns& runs,
                                 std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride) {
  const auto decode = block.lanes > kHalf ? decode_rows<true> : decode_rows<false>;
  return decode(from, block, runs, tokens, out, token_stride);
}

}  // namespace kvs

#else

namespace kvs {

bool has_avx512() { return false; }

std::uint64_t decode_rows_avx512(StreamReader&, LaneBlock&, const BlockRuns&, std::uint64_t, std::uint16_t*,
                                 std::int64_t) {
  return 0;
}

}  // namespace kvs

#endif
