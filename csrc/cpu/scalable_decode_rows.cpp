// The portable loops: one lane at a time, the format as it is written down.

#include "scalable_decode_rows.h"

namespace kvs {

std::uint64_t decode_base_portable(LevelSource& from, LaneStates& states, const BaseBlock& block,
                                   std::uint64_t begin, std::uint64_t tokens) {
  for (std::uint64_t token = begin; token < tokens; ++token) {
    std::int16_t* row = block.numbers + token * kLanes;
    for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
      std::uint32_t& state = states.state[lane];
      const std::uint32_t entry = block.slots[block.table[lane] + slot_of(state)];
      state = pull_checked(from, pop_symbol(state, entry));
      const std::uint32_t symbol = base_symbol(entry);
      row[lane] =
          symbol == kBaseEscape ? from.take_escape() : static_cast<std::int16_t>(symbol - kBaseOffset);
    }
    std::memset(row + block.lanes, 0, 2 * (kLanes - block.lanes));
    if (from.failed) return token;
  }
  return tokens;
}

std::uint64_t decode_refine_portable(LevelSource& from, LaneStates& states, const RefineBlock& block,
                                     std::uint64_t begin, std::uint64_t tokens) {
  for (std::uint64_t token = begin; token < tokens; ++token) {
    std::int16_t* row = block.numbers + token * kLanes;
    for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
      std::uint32_t& state = states.state[lane];
      const std::int32_t coarse = row[lane];
      const Ternary found = find_ternary(slot_of(state), block.thresholds[context_of(coarse)][lane]);
      state = pull_checked(from, pop_symbol(state, found.entry));
      row[lane] = static_cast<std::int16_t>(refine_number(coarse, found.u));
    }
    if (from.failed) return token;
  }
  return tokens;
}

}  // namespace kvs
