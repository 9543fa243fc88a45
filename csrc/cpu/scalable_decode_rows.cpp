// The portable loops: one lane at a time, the format as it is written down.

#include "scalable_decode_rows.h"

namespace kvs {

namespace {

// Where there is a word for every lane, it is taken without a branch. The front is kept apart from the
// source, so that no store can be thought to change it.
class Plenty {
 public:
  explicit Plenty(LevelSource& from) : from_(from), next_(from.next) {}
  ~Plenty() { from_.next = next_; }

  std::uint32_t pull(std::uint32_t state) {
    std::uint16_t word;
    std::memcpy(&word, next_, 2);
    const std::uint32_t hungry = needs_word(state);
    next_ += 2 * hungry;
    return pull_word(state, word, hungry);
  }

 private:
  LevelSource& from_;
  const std::uint8_t* next_;
};

// Where words may run out.
class Checked {
 public:
  explicit Checked(LevelSource& from) : from_(from) {}

  std::uint32_t pull(std::uint32_t state) { return pull_checked(from_, state); }

 private:
  LevelSource& from_;
};

template <typename Words>
void decode_base_row(LevelSource& from, LaneStates& states, const BaseBlock& block, std::int16_t* row) {
  const std::uint32_t* const slots = block.slots;
  std::uint32_t escaped = 0;
  {
    Words words(from);
    for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
      const std::uint32_t state = states.state[lane];
      const std::uint32_t entry = slots[block.table[lane] + slot_of(state)];
      states.state[lane] = words.pull(pop_symbol(state, entry));
      const std::uint32_t symbol = base_symbol(entry);
      escaped |= static_cast<std::uint32_t>(symbol == kBaseEscape) << lane;
      row[lane] = static_cast<std::int16_t>(symbol - kBaseOffset);
    }
  }
  std::memset(row + block.lanes, 0, 2 * (kLanes - block.lanes));
  take_row_escapes(from, escaped, row);
}

template <typename Words>
void decode_refine_row(LevelSource& from, LaneStates& states, const RefineBlock& block, std::int16_t* row) {
  Words words(from);
  for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
    const std::uint32_t state = states.state[lane];
    const std::int32_t coarse = row[lane];
    const Ternary found = find_ternary(slot_of(state), block.thresholds[context_of(coarse)][lane]);
    states.state[lane] = words.pull(pop_symbol(state, found.entry));
    row[lane] = static_cast<std::int16_t>(refine_number(coarse, found.u));
  }
}

}  // namespace

std::uint64_t decode_base_portable(LevelSource& from, LaneStates& states, const BaseBlock& block,
                                   std::uint64_t begin, std::uint64_t tokens) {
  for (std::uint64_t token = begin; token < tokens && !from.failed; ++token) {
    const bool plenty = from.end - from.next >= LevelSource::kWideLoad;
    (plenty ? decode_base_row<Plenty> : decode_base_row<Checked>)(from, states, block,
                                                                  block.numbers + token * kLanes);
  }
  return tokens;
}

std::uint64_t decode_refine_portable(LevelSource& from, LaneStates& states, const RefineBlock& block,
                                     std::uint64_t begin, std::uint64_t tokens) {
  for (std::uint64_t token = begin; token < tokens && !from.failed; ++token) {
    const bool plenty = from.end - from.next >= LevelSource::kWideLoad;
    (plenty ? decode_refine_row<Plenty> : decode_refine_row<Checked>)(from, states, block,
                                                                      block.numbers + token * kLanes);
  }
  return tokens;
}

}  // namespace kvs
