// Decoding the rows (one token, 32 lanes) of a block: what the portable, the AVX2 and the AVX-512 loop share.
#pragma once

#include "head_stream.h"

namespace kvs {

using SlotTable = std::uint32_t[kSlots];

// Sixteen tables of packed entries (rans.h), one entry for each slot.
const SlotTable* slot_tables();

// What is read from a stream, front to back.
struct StreamReader {
  const std::uint8_t* words;
  const std::uint8_t* words_end;
  const std::uint8_t* escapes;
  const std::uint8_t* escapes_end;
  const std::uint8_t* end;  // of the stream: the fast loop may load what lies between words_end and here
  bool exhausted = false;   // set by the fast loop where there are more escapes than escape bytes
};

// A block of lanes: states carry on from block to block, the rest is the block's own.
struct LaneBlock {
  alignas(64) std::uint32_t state[kLanes];
  alignas(64) std::uint32_t table[kLanes];  // offset of the lane's table in slot_tables(), in entries
  alignas(64) std::uint16_t base[kLanes];   // class_base
  std::uint32_t lanes;
  const std::uint8_t* rows;
};

// All decode token rows [begin, tokens) into `out` (the head's first value), scattered by `runs`. The
// portable loop decodes all of them or answers a fault. The fast ones start at 0 and answer the token where
// they stopped: their wide loads might have left the stream there, so that the portable loop must do the
// rest. They may run past words_end; the caller checks.
Fault decode_rows_portable(StreamReader& from, LaneBlock& block, const BlockRuns& runs, std::uint64_t begin,
                           std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride);
std::uint64_t decode_rows_avx2(StreamReader& from, LaneBlock& block, const BlockRuns& runs,
                               std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride);
std::uint64_t decode_rows_avx512(StreamReader& from, LaneBlock& block, const BlockRuns& runs,
                                 std::uint64_t tokens, std::uint16_t* out, std::int64_t token_stride);

// Puts the exponents of the escaped `lanes` into `row`. False where there are no escape bytes left.
bool take_escapes(StreamReader& from, std::uint32_t lanes, std::uint16_t* row);

inline void scatter_row(const std::uint16_t* row, const BlockRuns& runs, std::uint16_t* out) {
  for (std::uint32_t i = 0; i < runs.count; ++i) {
    copy_run(out + runs.runs[i].offset, row + runs.runs[i].lane, runs.runs[i].lanes);
  }
}

}  // namespace kvs
