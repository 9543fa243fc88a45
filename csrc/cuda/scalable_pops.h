// What codec 3's levels do to a state on a GPU: the steps of rans.h and scalable_steps.h, put so that they
// take few instructions where tables lie in shared memory.
#pragma once

#include "scalable_tables_packed.h"
#include "shared_memory.h"

namespace kvs {

// A symbol's entry here: frequency - 4096 in bits 0-15, its first slot in 16-31.
KVS_DEVICE std::uint32_t turn_entry(std::uint32_t packed) {
  return (((packed & 0xFFF) - kSlots) & 0xFFFF) | (packed >> 12 & 0xFFF) << 16;
}

// What a row of level 0 looks up for a lane's class: tables in shared memory, at addresses, or far away.
struct NearTables {
  std::uint32_t slots, entries;

  KVS_DEVICE std::uint32_t symbol(std::uint32_t state) const { return load_shared_8(slots | slot_of(state)); }
  KVS_DEVICE std::uint32_t entry(std::uint32_t symbol) const { return load_shared_32(entries + 4 * symbol); }
};

struct FarTables {
  const std::uint8_t* slots;
  const std::uint32_t* entries;

  KVS_DEVICE std::uint32_t symbol(std::uint32_t state) const { return slots[slot_of(state)]; }
  KVS_DEVICE std::uint32_t entry(std::uint32_t symbol) const { return turn_entry(entries[symbol]); }
};

// Takes a symbol out of a state, frequency * (state / 4096) + slot - first slot, without a look at the slot.
KVS_DEVICE std::uint32_t pop_turned(std::uint32_t state, std::uint32_t entry) {
  const std::int32_t less = static_cast<std::int16_t>(entry);
  return state - (entry >> 16) + static_cast<std::uint32_t>(less) * (state >> kSlotBits);
}

// The row of a class's thresholds: the coarse number from -3 to 3, from 0 on.
KVS_DEVICE std::uint32_t side_of(std::int32_t coarse) {
#if defined(__CUDA_ARCH__)
  return static_cast<std::uint32_t>(__viaddmin_s32_relu(coarse, 3, 6));
#else
  return static_cast<std::uint32_t>(coarse < -3 ? 0 : coarse > 3 ? 6 : coarse + 3);
#endif
}

// Takes a ternary symbol out of `state`: frequency * high + slot - start of the one of the three that the
// slot is in, put together from what they share; `fine` is the finer number.
KVS_DEVICE std::uint32_t pop_refinement(std::uint32_t state, std::uint32_t c1, std::uint32_t c2,
                                        std::int32_t coarse, std::int32_t& fine) {
  const std::uint32_t slot = slot_of(state), high = state >> kSlotBits;
  const bool from_c1 = slot >= c1, from_c2 = slot >= c2;
  std::uint32_t popped = (from_c1 ? c2 : c1) * high + slot;
  if (from_c1) popped += c1 * ~high;         // - c1 * high - c1
  if (from_c2) popped = c2 * ~high + state;  // (4096 - c2) * high + slot - c2
  const std::int32_t outwards = coarse >> 31 | 1;
  fine = 3 * coarse - outwards;
  if (from_c1) fine += outwards;
  if (from_c2) fine += outwards;
  return popped;
}

}  // namespace kvs
