// Coding the rows of a block, last token first: what the portable loops and their fast twins share.
#pragma once

#include <cstring>

#include "../scalable_steps.h"

namespace kvs {

// Written from the back to the front. There is room for kWideStore bytes before the first word.
struct LevelSink {
  static constexpr std::size_t kWideStore = 2 * kLanes;

  std::uint8_t* words;
  std::uint8_t* escapes;

  // The word is stored in any case, and kept by moving the front: no branch on what cannot be predicted.
  void put_word(std::uint32_t state, std::uint32_t keep) {
    const auto word = static_cast<std::uint16_t>(state);
    std::memcpy(words - 2, &word, 2);
    words -= 2 * keep;
  }

  void put_escape(std::int16_t number) {
    escapes -= 2;
    std::memcpy(escapes, &number, 2);
  }
};

struct alignas(64) PushStates {
  std::uint32_t state[kLanes];
};

// A block's numbers at the finest step, [token][32 lanes], unused lanes 0; and for level 0 where each lane's
// symbols begin in `pushes`.
struct BasePushes {
  alignas(64) std::uint32_t table[kLanes];
  const Push* pushes;
  std::uint32_t lanes;
  const std::int16_t* numbers;
};

// For levels 1 and 2: each lane's symbols, [context][u + 1], and its thresholds.
struct RefinePushes {
  alignas(64) std::uint32_t thresholds[kContexts][kLanes];
  const Push* pushes[kLanes];
  std::uint32_t lanes;
  unsigned level;
  const std::int16_t* numbers;
};

// All code one block's token rows [0, tokens), from the last to the first, any number of lanes.

using PushBase = void(LevelSink&, PushStates&, const BasePushes&, std::uint64_t tokens);
using PushRefine = void(LevelSink&, PushStates&, const RefinePushes&, std::uint64_t tokens);

PushBase encode_base_portable, encode_base_avx2, encode_base_avx512;
PushRefine encode_refine_portable, encode_refine_avx2, encode_refine_avx512;

inline void push_lane(LevelSink& to, std::uint32_t& state, const Push& push) {
  const std::uint32_t emit = must_emit(state, push);
  to.put_word(state, emit);
  state = push_symbol(state >> 16 * emit, push);
}

// One row of level 0, from the last lane to the first: the whole of the portable loop, and the fast loops'
// way through rows with escapes.
inline void encode_base_row(LevelSink& to, PushStates& states, const BasePushes& block,
                            const std::int16_t* row) {
  for (std::uint32_t lane = block.lanes; lane-- > 0;) {
    const std::int32_t number = coarsen_number(coarsen_number(row[lane]));
    const Push* pushes = block.pushes + block.table[lane];
    const std::uint32_t symbol = static_cast<std::uint32_t>(number + kBaseOffset);
    const Push* push = &pushes[symbol < kBaseEscape ? symbol : kBaseEscape];
    if (symbol >= kBaseEscape || frequency_of(*push) == 0) {
      push = &pushes[kBaseEscape];
      to.put_escape(static_cast<std::int16_t>(number));
    }
    push_lane(to, states.state[lane], *push);
  }
}

}  // namespace kvs
