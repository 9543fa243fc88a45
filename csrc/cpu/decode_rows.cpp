// The portable loop: one lane at a time, the format as it is written down.

#include "decode_rows.h"

#include <memory>

#include "../lossless_tables.h"
#include "../rans.h"

namespace kvs {
namespace {

struct SlotTables {
  alignas(64) SlotTable entries[kTables];

  SlotTables() {
    for (std::uint32_t table = 0; table < kTables; ++table) {
      std::uint32_t slot = 0;
      for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        const std::uint32_t frequency = kFrequencies[table][symbol];
        for (std::uint32_t i = 0; i < frequency; ++i)
          entries[table][slot++] = pack_entry(symbol, frequency, i);
      }
    }
  }
};

constexpr bool tables_are_sound() {
  for (const auto& table : kFrequencies) {
    std::uint32_t sum = 0;
    for (const std::uint16_t frequency : table) sum += frequency;
    if (sum != kSlots) return false;
    for (const std::uint32_t escape : {30, 31, 62, 63}) {
      if (table[escape] == 0) return false;
    }
  }
  return true;
}
static_assert(tables_are_sound(), "every table sums to 4096 and has all four escapes");

// The 6-bit numbers of a row.
void unpack_row(const std::uint8_t* from, std::uint32_t lanes, std::uint16_t* low) {
  std::uint32_t window = 0;
  unsigned held = 0;
  for (std::uint32_t lane = 0; lane < lanes; ++lane) {
    if (held < kLowBits) {
      window |= static_cast<std::uint32_t>(*from++) << held;
      held += 8;
    }
    low[lane] = window & 63;
    window >>= kLowBits;
    held -= kLowBits;
  }
}

// The same of a whole row, eight numbers from six bytes at a time.
void unpack_whole_row(const std::uint8_t* from, std::uint16_t* low) {
  for (std::uint32_t lane = 0; lane < kLanes; lane += 8, from += 6) {
    const std::uint64_t packed =
        load<std::uint32_t>(from) | static_cast<std::uint64_t>(load<std::uint16_t>(from + 4)) << 32;
    for (unsigned i = 0; i < 8; ++i) low[lane + i] = packed >> i * kLowBits & 63;
  }
}

// Both take the symbols of a row; `row` has the low bits before and the values after, with a wrong exponent
// in lanes that have an escape. This one, where there is a word for every lane, without a branch for each;
// answers those lanes.
std::uint32_t pop_whole_row(StreamReader& from, LaneBlock& block, const std::uint32_t* entries,
                            std::uint16_t* row) {
  const std::uint8_t* words = from.words;
  std::uint32_t escaped = 0;
  for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
    const std::uint32_t entry = entries[block.table[lane] + slot_of(block.state[lane])];
    const std::uint32_t popped = pop_symbol(block.state[lane], entry);
    const std::uint32_t hungry = needs_word(popped);
    block.state[lane] = pull_word(popped, load<std::uint16_t>(words), hungry);
    words += 2 * hungry;
    escaped |= static_cast<std::uint32_t>(is_escape(entry)) << lane;
    row[lane] = static_cast<std::uint16_t>(assemble_value(block.base[lane], entry, row[lane]));
  }
  from.words = words;
  return escaped;
}

// This one where words may run out in the middle, or lanes are missing.
Fault pop_row(StreamReader& from, LaneBlock& block, const std::uint32_t* entries, std::uint16_t* row,
              std::uint32_t& escaped) {
  for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
    const std::uint32_t entry = entries[block.table[lane] + slot_of(block.state[lane])];
    std::uint32_t state = pop_symbol(block.state[lane], entry);
    if (needs_word(state)) {
      if (from.words >= from.words_end) return Fault::kBadPayload;
      state = pull_word(state, load<std::uint16_t>(from.words), 1);
      from.words += 2;
    }
    block.state[lane] = state;
    escaped |= static_cast<std::uint32_t>(is_escape(entry)) << lane;
    row[lane] = static_cast<std::uint16_t>(assemble_value(block.base[lane], entry, row[lane]));
  }
  return Fault::kNone;
}

}  // namespace

const SlotTable* slot_tables() {
  static const auto tables = std::make_unique<const SlotTables>();
  return tables->entries;
}

bool take_escapes(StreamReader& from, std::uint32_t lanes, std::uint16_t* row) {
  for (; lanes != 0; lanes &= lanes - 1) {
    if (from.escapes >= from.escapes_end) return false;
    std::uint16_t& value = row[std::countr_zero(lanes)];
    value = static_cast<std::uint16_t>(replace_exponent(value, *from.escapes++));
  }
  return true;
}

Fault decode_rows_portable(StreamReader& from, LaneBlock& block, const BlockRuns& runs, std::uint64_t begin,
                           std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride) {
  const std::uint32_t* entries = slot_tables()[0];
  const std::uint64_t row_size = row_bytes(block.lanes);
  std::uint16_t row[kLanes];
  for (std::uint64_t token = begin; token < tokens; ++token) {
    const std::uint8_t* low = block.rows + token * row_size;
    std::uint32_t escaped = 0;
    if (block.lanes == kLanes && from.words_end - from.words >= static_cast<std::ptrdiff_t>(2 * kLanes)) {
      unpack_whole_row(low, row);
      escaped = pop_whole_row(from, block, entries, row);
    } else {
      unpack_row(low, block.lanes, row);
      if (pop_row(from, block, entries, row, escaped) != Fault::kNone) return Fault::kBadPayload;
    }
    if (escaped != 0 && !take_escapes(from, escaped, row)) return Fault::kBadPayload;
    scatter_row(row, runs, out + static_cast<std::int64_t>(token) * token_stride);
  }
  return Fault::kNone;
}

}  // namespace kvs
