// A table set of the scalable codec as it lies on the device: one piece, the same places for all sets.
#pragma once

#include "../scalable_steps.h"

// Before a loop over registers, which cannot be indexed by a number known at run time only; and before one
// whose copies would take too many of them.
#ifdef __CUDACC__
#define KVS_UNROLL _Pragma("unroll")
#define KVS_UNROLL_NO _Pragma("unroll 1")
#else
#define KVS_UNROLL
#define KVS_UNROLL_NO
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

// find_ternary, pop_symbol and refine_number in one, without taking apart again what they put together:
// `fine` is the finer number.
KVS_HOST_DEVICE std::uint32_t pop_ternary(std::uint32_t state, std::uint32_t thresholds, std::int32_t coarse,
                                          std::int32_t& fine) {
  const std::uint32_t c1 = thresholds & 0xFFFF, c2 = thresholds >> 16, slot = slot_of(state);
  const bool from_c1 = slot >= c1, from_c2 = slot >= c2;
  const std::uint32_t start = from_c2 ? c2 : from_c1 ? c1 : 0;
  const std::uint32_t end = from_c2 ? kSlots : from_c1 ? c2 : c1;
  const std::int32_t outwards = coarse < 0 ? -1 : 1;
  fine = 3 * coarse - outwards;
  if (from_c1) fine += outwards;
  if (from_c2) fine += outwards;
  return (end - start) * (state >> kSlotBits) + slot - start;
}

}  // namespace kvs
