// Coding the rows of a block, last token first: what the portable, the AVX2 and the AVX-512 loop share.
#pragma once

#include <bit>

#include "../rans.h"
#include "head_stream.h"

namespace kvs {

using PushTable = Push[kSymbols];

// Sixteen tables of encoder symbols.
const PushTable* push_tables();

inline constexpr std::size_t kWriteRoom = 64;

// Written from the back to the front. There are kWriteRoom bytes of room before the first word, for wide
// stores.
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

// All code one block's token rows [0, tokens), from the last to the first.
void encode_rows_portable(StreamWriter& to, LaneValues& block, std::uint64_t tokens);
void encode_rows_avx2(StreamWriter& to, LaneValues& block, std::uint64_t tokens);
void encode_rows_avx512(StreamWriter& to, LaneValues& block, std::uint64_t tokens);

// Writes the low bits of token rows [0, tokens) of a block of 32 lanes.
void write_rows_avx2(std::uint8_t* to, const std::uint16_t* values, std::uint64_t tokens);

// Rows whose symbols are looked up before the first of them is pushed, so that no load waits for a store. The
// look-up is one load for each lane: no slower than gather instructions where those are fast, and much faster
// where they are not.
struct RowBatch {
  static constexpr std::uint32_t kRows = 8;
  alignas(64) std::uint16_t index[kRows][kLanes];  // in push_tables()
  alignas(64) Push found[kRows][kLanes];
  std::uint32_t far[kRows];  // lanes whose step is an escape's or beyond

  void look_up(std::uint32_t rows) {
    const Push* pushes = push_tables()[0];
    for (std::uint32_t i = 0; i < rows; ++i) {
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) found[i][lane] = pushes[index[i][lane]];
    }
  }
};

// Makes the symbols of the set `lanes` of a row escapes.
inline void escape_lanes(StreamWriter& to, const LaneValues& block, const std::uint16_t* row,
                         std::uint32_t lanes, Push* symbols) {
  while (lanes != 0) {
    const auto lane = static_cast<std::uint32_t>(std::bit_width(lanes) - 1);
    const std::uint32_t value = row[lane];
    const std::uint32_t sign = (value ^ block.base[lane]) >> 15;
    const std::uint32_t step = kEscapeStep + (~value >> kLowBits & 1);
    symbols[lane] = push_tables()[0][block.table[lane] + sign * 32 + step];
    *--to.escapes = static_cast<std::uint8_t>(value >> 7);
    lanes ^= 1u << lane;
  }
}

// One row, one lane at a time, from the last to the first: the whole of the portable loop.
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
