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

std::uint32_t low_bits(const std::uint8_t* row, std::uint32_t lane) {
  const std::uint32_t bit = lane * kLowBits;
  const std::uint32_t first = row[bit / 8];
  const std::uint32_t second = bit % 8 > 8 - kLowBits ? row[bit / 8 + 1] : 0;
  return (first | second << 8) >> bit % 8 & 63;
}

}  // namespace

const SlotTable* slot_tables() {
  static const auto tables = std::make_unique<const SlotTables>();
  return tables->entries;
}

Fault decode_rows_portable(StreamReader& from, LaneBlock& block, const BlockRuns& runs, std::uint64_t begin,
                           std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride) {
  const std::uint32_t* entries = slot_tables()[0];
  const std::uint64_t row_size = row_bytes(block.lanes);
  std::uint16_t row[kLanes];
  for (std::uint64_t token = begin; token < tokens; ++token) {
    const std::uint8_t* low = block.rows + token * row_size;
    for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
      std::uint32_t state = block.state[lane];
      const std::uint32_t entry = entries[block.table[lane] + slot_of(state)];
      state = pop_symbol(state, entry);
      if (needs_word(state)) {
        if (from.words >= from.words_end) return Fault::kBadPayload;
        state = pull_word(state, load<std::uint16_t>(from.words));
        from.words += 2;
      }
      block.state[lane] = state;
      std::uint32_t value = assemble_value(block.base[lane], entry, low_bits(low, lane));
      if (is_escape(entry)) {
        if (from.escapes >= from.escapes_end) return Fault::kBadPayload;
        value = replace_exponent(value, *from.escapes++);
      }
      row[lane] = static_cast<std::uint16_t>(value);
    }
    scatter_row(row, runs, out + static_cast<std::int64_t>(token) * token_stride);
  }
  return Fault::kNone;
}

}  // namespace kvs
