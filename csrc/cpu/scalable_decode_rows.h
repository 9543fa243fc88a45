// Decoding the rows (one token, up to 32 lanes) of a block: what the portable loops and their fast twins
// share.
#pragma once

#include <cstring>

#include "../scalable_tables.h"

namespace kvs {

// A level's words and escapes, front to back. Fast loops load kWideLoad bytes at `next`, which they may do as
// long as it is not behind `wide`; before the end of the words is too near for that, `pad` moves what is left
// into a buffer that has the room.
struct LevelSource {
  static constexpr std::ptrdiff_t kWideLoad = 2 * kLanes;

  const std::uint8_t* next;
  const std::uint8_t* end;
  const std::uint8_t* wide;
  const std::uint8_t* escapes;
  const std::uint8_t* escapes_end;
  bool failed = false;  // ran out of words or escapes, or met an escape that is none
  bool padded = false;
  std::uint8_t tail[2 * kWideLoad];

  LevelSource(const std::uint8_t* words, const std::uint8_t* words_end, const std::uint8_t* first_escape,
              const std::uint8_t* last_escape)
      : next(words), end(words_end), wide(words), escapes(first_escape), escapes_end(last_escape) {
    if (end - next < kWideLoad) {
      pad();
    } else {
      wide = end - kWideLoad;
    }
  }

  void pad() {
    const std::size_t rest = static_cast<std::size_t>(end - next);
    std::memset(tail, 0, sizeof tail);
    if (rest != 0) std::memcpy(tail, next, rest);
    next = tail;
    wide = end = tail + rest;
    padded = true;
  }

  bool read_to_the_end() const { return next == end && escapes == escapes_end; }

  // The next escape as q0; 0 and `failed` where there is none.
  std::int16_t take_escape() {
    if (escapes == escapes_end) {
      failed = true;
      return 0;
    }
    std::int16_t number;
    std::memcpy(&number, escapes, 2);
    escapes += 2;
    failed |= number < -kMostBase || number > kMostBase;
    return number;
  }
};

struct alignas(64) LaneStates {
  std::uint32_t state[kLanes];
};

// A block of level 0: where each lane's table begins in `slots`, and where its numbers go, [token][32 lanes].
// Unused lanes get 0.
//
// Where all of a block's tables have few symbols, `bound_count` says how many bounds the longest has, and the
// lanes' bounds and entries are here (BaseBounds); shorter ones are filled up with the escape's, which is the
// last.
struct BaseBlock {
  alignas(64) std::uint32_t table[kLanes];
  alignas(64) std::uint32_t first[kLanes];
  alignas(64) std::uint32_t bounds[kMostBounds + 1][kLanes];
  alignas(64) std::uint32_t entries[kMostBounds + 1][kLanes];
  std::uint32_t bound_count;
  const std::uint32_t* slots;
  std::uint32_t lanes;
  std::int16_t* numbers;
};

// A block of level 1 or 2: each lane's thresholds in each context, and its numbers, made finer in place.
struct RefineBlock {
  alignas(64) std::uint32_t thresholds[kContexts][kLanes];
  std::uint32_t lanes;
  std::int16_t* numbers;
};

// All decode token rows from `begin` on, at most to `tokens`, and answer the row where they stopped: at
// `tokens`; where `failed` is set; or, the fast ones, where `next` passed `wide`. If that was the padded end,
// words ran out.
using BaseRows = std::uint64_t(LevelSource&, LaneStates&, const BaseBlock&, std::uint64_t begin,
                               std::uint64_t tokens);
using RefineRows = std::uint64_t(LevelSource&, LaneStates&, const RefineBlock&, std::uint64_t begin,
                                 std::uint64_t tokens);

BaseRows decode_base_portable, decode_base_avx2, decode_base_avx512;
RefineRows decode_refine_portable, decode_refine_avx2, decode_refine_avx512;

// Renormalises where a word may be missing.
inline std::uint32_t pull_checked(LevelSource& from, std::uint32_t state) {
  if (!needs_word(state)) return state;
  if (from.next == from.end) {
    from.failed = true;
    return kStateMin;
  }
  std::uint16_t word;
  std::memcpy(&word, from.next, 2);
  from.next += 2;
  return pull_word(state, word, 1);
}

// Puts the escapes of `lanes` (a bit each) into a row.
inline void take_row_escapes(LevelSource& from, std::uint32_t lanes, std::int16_t* row) {
  for (; lanes != 0 && !from.failed; lanes &= lanes - 1) {
    row[__builtin_ctz(lanes)] = from.take_escape();
  }
}

}  // namespace kvs
