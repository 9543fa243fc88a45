// A table set of the scalable codec as it lies on the device: one piece, the same places for all sets.
#pragma once

#include "../scalable_steps.h"

// Before a loop over registers, which cannot be indexed by a number known at run time only.
#ifdef __CUDACC__
#define KVS_UNROLL _Pragma("unroll")
#else
#define KVS_UNROLL
#endif

namespace kvs {

struct PackedTables {
  std::uint32_t thresholds[2][kClasses][kContexts];  // pack_thresholds, of levels 1 and 2
  float shift[kLevels][kClasses];
  std::uint32_t first[4];
  std::uint32_t symbols[kClasses][kBaseSymbols];  // pack_base_entry with the symbol's first slot
  std::uint8_t slots[kClasses][kSlots];           // the symbol at each slot
};

static_assert(sizeof(PackedTables) == 247888);

// Takes the symbol of `entry`, which knows its first slot, out of `state`.
KVS_HOST_DEVICE std::uint32_t pop_packed(std::uint32_t state, std::uint32_t entry) {
  return (entry & 0xFFF) * (state >> kSlotBits) + slot_of(state) - (entry >> 12 & 0xFFF);
}

}  // namespace kvs
