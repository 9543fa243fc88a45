// Coding the rows of a block, last token first: what the portable and the AVX2 loop share.
#pragma once

#include "../rans.h"
#include "head_stream.h"

namespace kvs {

using PushTable = Push[kSymbols];

// Sixteen tables of encoder symbols.
const PushTable* push_tables();

// Written from the back to the front. There are 16 bytes of room before the first word, for wide stores.
struct StreamWriter {
  std::uint8_t* words;
  std::uint8_t* escapes;
};

// A block's values, [token][32 lanes], unused lanes 0, and the class of each lane.
struct LaneValues {
  alignas(32) std::uint32_t state[kLanes];
  alignas(32) std::uint32_t table[kLanes];  // offset of the lane's table in push_tables(), in symbols
  alignas(32) std::uint32_t base[kLanes];   // class_base
  std::uint32_t lanes;
  const std::uint16_t* values;
};

// Both code one block's token rows [0, tokens), from the last to the first.
void encode_rows_portable(StreamWriter& to, LaneValues& block, std::uint64_t tokens);
void encode_rows_avx2(StreamWriter& to, LaneValues& block, std::uint64_t tokens);

// One row, one lane at a time, from the last to the first: the whole of the portable loop, and the fast
// loop's way through rows with escapes.
inline void encode_row(StreamWriter& to, LaneValues& block, const std::uint16_t* row) {
  const Push* pushes = push_tables()[0];
  for (std::uint32_t lane = block.lanes; lane-- > 0;) {
    const std::uint32_t value = row[lane];
    const std::uint32_t sign = (value ^ block.base[lane]) >> 15;
    std::uint32_t step = ((block.base[lane] & 0x7FC0) >> kLowBits) - ((value & 0x7FFF) >> kLowBits);
    const Push* push = &pushes[block.table[lane] + sign * 32 + (step & 31)];
    if (step >= kEscapeStep || frequency_of(*push) == 0) {
      step = kEscapeStep + (~value >> kLowBits & 1);
      push = &pushes[block.table[lane] + sign * 32 + step];
      *--to.escapes = static_cast<std::uint8_t>(value >> 7);
    }
    // The word is stored in any case, and kept by moving the front: no branch on what cannot be predicted.
    const std::uint32_t emit = must_emit(block.state[lane], *push);
    store(to.words - 2, static_cast<std::uint16_t>(block.state[lane]));
    to.words -= 2 * emit;
    block.state[lane] = push_symbol(block.state[lane] >> 16 * emit, *push);
  }
}

}  // namespace kvs
