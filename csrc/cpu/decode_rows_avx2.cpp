// The AVX2 loop: 32 lanes in four vectors of eight. Functions carry their target themselves, so that nothing
// compiled for AVX2 can be linked into the portable path. Lanes that are missing take no words and get their
// states back.

#include "../rans.h"
#include "decode_rows.h"

#if defined(__x86_64__)

#include "look_up_avx2.h"
#include "word_order.h"

#define KVS_AVX2 __attribute__((target("avx2,popcnt")))

namespace kvs {
namespace {

// All bits of the lanes whose bits are set in the low eight of `set`.
KVS_AVX2 inline __m256i spread_set(std::uint32_t set) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(set)), bits), bits);
}

// One vector's step: answers the entries, leaves the renormalised states. Loads 16 bytes from `words` on.
KVS_AVX2 inline __m256i step_lanes(__m256i& state, __m256i table, __m256i present,
                                   const std::uint32_t* entries, const std::uint8_t*& words) {
  const __m256i slot = _mm256_and_si256(state, _mm256_set1_epi32(kSlots - 1));
  const __m256i entry = look_up(entries, _mm256_add_epi32(slot, table));
  const __m256i field = _mm256_set1_epi32(0xFFF);
  const __m256i popped = _mm256_add_epi32(
      _mm256_mullo_epi32(_mm256_and_si256(entry, field), _mm256_srli_epi32(state, kSlotBits)),
      _mm256_and_si256(_mm256_srli_epi32(entry, 12), field));
  const __m256i hungry = _mm256_and_si256(present, _mm256_cmpgt_epi32(_mm256_set1_epi32(kStateMin), popped));
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(hungry)));
  const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.order[mask]));
  const __m256i pulled =
      _mm256_or_si256(_mm256_slli_epi32(popped, 16), _mm256_permutevar8x32_epi32(next, order));
  state = _mm256_blendv_epi8(popped, pulled, hungry);
  words += 2 * _mm_popcnt_u32(mask);
  return entry;
}

// Sixteen 6-bit numbers from 12 bytes: each lane takes the two bytes that hold its bits, a multiplication
// moves them to the top. Loads 16 bytes.
KVS_AVX2 inline __m256i unpack_low(const std::uint8_t* from) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i pairs = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6,  //
                                         6, 7, 6, 7, 7, 8, 8, 9, 9, 10, 9, 10, 10, 11, 11, 12);
  const __m256i lift =
      _mm256_setr_epi16(1024, 16, 64, 256, 1024, 16, 64, 256, 1024, 16, 64, 256, 1024, 16, 64, 256);
  return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, pairs), lift), 10);
}

// assemble_value of sixteen lanes.
KVS_AVX2 inline __m256i assemble(__m256i entry_a, __m256i entry_b, __m256i base, __m256i low) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(entry_a, 24), _mm256_srli_epi32(entry_b, 24));
  const __m256i symbol = _mm256_permute4x64_epi64(packed, 0xD8);
  const __m256i drop = _mm256_slli_epi16(_mm256_and_si256(symbol, _mm256_set1_epi16(31)), 6);
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(symbol, _mm256_set1_epi16(32)), 10);
  const __m256i magnitude = _mm256_and_si256(_mm256_sub_epi16(base, drop), _mm256_set1_epi16(0x7FC0));
  const __m256i flip = _mm256_and_si256(base, _mm256_set1_epi16(static_cast<short>(0x8000)));
  return _mm256_or_si256(_mm256_or_si256(_mm256_xor_si256(sign, flip), magnitude), low);
}

}  // namespace

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

KVS_AVX2 std::uint64_t decode_rows_avx2(StreamReader& from, LaneBlock& block, const BlockRuns& runs,
                                        std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride) {
  constexpr std::ptrdiff_t kWordReach = 4 * 16;  // four loads, each at most eight words after the one before
  constexpr std::ptrdiff_t kRowReach = 28;       // the second load of a row of 24 bytes
  const std::uint32_t* entries = slot_tables()[0];
  auto* states = reinterpret_cast<__m256i*>(block.state);
  const auto* tables = reinterpret_cast<const __m256i*>(block.table);
  const auto* bases = reinterpret_cast<const __m256i*>(block.base);
  __m256i state0 = states[0], state1 = states[1], state2 = states[2], state3 = states[3];
  const __m256i table0 = tables[0], table1 = tables[1], table2 = tables[2], table3 = tables[3];
  const __m256i base0 = bases[0], base1 = bases[1];
  const std::uint8_t* words = from.words;
  const std::uint8_t* low = block.rows;
  const bool whole = runs.count == 1 && block.lanes == kLanes;
  const std::uint32_t present = first_lanes(block.lanes);
  const __m256i lanes0 = spread_set(present), lanes1 = spread_set(present >> 8);
  const __m256i lanes2 = spread_set(present >> 16), lanes3 = spread_set(present >> 24);
  std::uint32_t missing[kLanes];
  std::copy(block.state + block.lanes, block.state + kLanes, missing);
  const std::uint64_t row_size = row_bytes(block.lanes);
  std::uint64_t token = 0;
  for (; token < tokens; ++token, low += row_size) {
    if (from.end - words < kWordReach || from.end - low < kRowReach) break;
    const __m256i entry0 = step_lanes(state0, table0, lanes0, entries, words);
    const __m256i entry1 = step_lanes(state1, table1, lanes1, entries, words);
    const __m256i entry2 = step_lanes(state2, table2, lanes2, entries, words);
    const __m256i entry3 = step_lanes(state3, table3, lanes3, entries, words);
    const __m256i value0 = assemble(entry0, entry1, base0, unpack_low(low));
    const __m256i value1 = assemble(entry2, entry3, base1, unpack_low(low + 12));
    std::uint16_t* to = out + static_cast<std::int64_t>(token) * token_stride;
    const __m256i any = _mm256_or_si256(_mm256_or_si256(entry0, entry1), _mm256_or_si256(entry2, entry3));
    const bool escaped = _mm256_movemask_ps(_mm256_castsi256_ps(any)) != 0;
    if (whole && !escaped) [[likely]] {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + runs.runs[0].offset), value0);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + runs.runs[0].offset + 16), value1);
      continue;
    }
    alignas(32) std::uint16_t row[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(row), value0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + 16), value1);
    const auto mask = [](__m256i entry) KVS_AVX2 {
      return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(entry)));
    };
    const std::uint32_t lanes =
        (mask(entry0) | mask(entry1) << 8 | mask(entry2) << 16 | mask(entry3) << 24) & present;
    from.exhausted = !take_escapes(from, lanes, row);
    if (from.exhausted) break;
    scatter_row(row, runs, to);
  }
  states[0] = state0, states[1] = state1, states[2] = state2, states[3] = state3;
  std::copy(missing, missing + kLanes - block.lanes, block.state + block.lanes);
  from.words = words;
  return token;
}

}  // namespace kvs

#else

namespace kvs {

bool has_avx2() { return false; }

std::uint64_t decode_rows_avx2(StreamReader&, LaneBlock&, const BlockRuns&, std::uint64_t, std::uint16_t*,
                               std::int64_t) {
  return 0;
}

}  // namespace kvs

#endif
