// The portable loop, and the encoder's tables.

#include "encode_rows.h"

#include "../lossless_tables.h"

namespace kvs {
namespace {

struct PushTables {
  alignas(64) PushTable pushes[kTables];

  PushTables() {
    for (std::uint32_t table = 0; table < kTables; ++table) {
      std::uint32_t start = 0;
      for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        pushes[table][symbol] = make_push(kFrequencies[table][symbol], start);
        start += kFrequencies[table][symbol];
      }
    }
  }
};

}  // namespace

const PushTable* push_tables() {
  static const PushTables tables;
  return tables.pushes;
}

void encode_rows_portable(StreamWriter& to, LaneValues& block, std::uint64_t tokens) {
  for (std::uint64_t token = tokens; token-- > 0;) encode_row(to, block, block.values + token * kLanes);
}

}  // namespace kvs
