// The scalable codec's steps, one value at a time, for host and device. What a level does to a state is in
// rans.h; here is what its symbols mean.
#pragma once

#include <cstdint>

#include "rans.h"

namespace kvs {

inline constexpr std::uint32_t kClasses = 48;
inline constexpr std::uint32_t kLevels = 3;
inline constexpr std::uint32_t kBaseSymbols = 256;
inline constexpr std::uint32_t kBaseEscape = 255;  // the last symbol; the others are q0 + kBaseOffset
inline constexpr std::int32_t kBaseOffset = 127;
inline constexpr std::uint32_t kContexts = 4;
inline constexpr std::int32_t kMostBase = 3600;  // of |q0|: 9 * 3600 + 4 fits 16 bits

// A slot's entry at level 0: frequency in bits 0-11, slot minus the symbol's first slot in 12-23, symbol in
// 24-31, so that pop_symbol takes it.
KVS_HOST_DEVICE std::uint32_t pack_base_entry(std::uint32_t symbol, std::uint32_t frequency,
                                              std::uint32_t offset) {
  return frequency | offset << 12 | symbol << 24;
}

KVS_HOST_DEVICE std::uint32_t base_symbol(std::uint32_t entry) { return entry >> 24; }

// The two thresholds of a class and a context: c1 in bits 0-15, c2 in 16-31.
KVS_HOST_DEVICE std::uint32_t pack_thresholds(std::uint32_t c1, std::uint32_t c2) { return c1 | c2 << 16; }

KVS_HOST_DEVICE std::uint32_t context_of(std::int32_t coarse) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(coarse < 0 ? -coarse : coarse);
  return magnitude < kContexts ? magnitude : kContexts - 1;
}

// What pop_symbol needs to take the ternary symbol at `slot` out: its frequency and slot minus its first
// slot; and `u`, -1 to 1. Comparisons alone: no table is looked up.
struct Ternary {
  std::uint32_t entry;
  std::int32_t u;
};

// All bits where `condition` is 1: choosing with them is no branch, and which symbol comes cannot be
// predicted.
KVS_HOST_DEVICE std::uint32_t mask_of(std::uint32_t condition) { return 0 - condition; }

KVS_HOST_DEVICE Ternary find_ternary(std::uint32_t slot, std::uint32_t thresholds) {
  const std::uint32_t c1 = thresholds & 0xFFFF, c2 = thresholds >> 16;
  const std::uint32_t from_c1 = slot >= c1, from_c2 = slot >= c2;
  const std::uint32_t start = (c1 & mask_of(from_c1)) + ((c2 - c1) & mask_of(from_c2));
  const std::uint32_t end = c1 + ((c2 - c1) & mask_of(from_c1)) + ((kSlots - c2) & mask_of(from_c2));
  return {(end - start) | (slot - start) << 12, static_cast<std::int32_t>(from_c1 + from_c2) - 1};
}

// u says "further from zero" with 1, r "more": they differ in sign where the coarser number is negative.
KVS_HOST_DEVICE std::int32_t refine_number(std::int32_t coarse, std::int32_t u) {
  const std::int32_t sign = coarse >> 31;  // 0 or -1
  return 3 * coarse + ((u ^ sign) - sign);
}

// The nearest integer of number / 3, -32402 to 32404: which has no ties. Unsigned, because division rounds
// down there.
KVS_HOST_DEVICE std::int32_t coarsen_number(std::int32_t number) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(number + 1 + 32766) / 3) - 10922;
}

// The symbol 0 to 2 (u + 1) that makes `fine` of `coarse`.
KVS_HOST_DEVICE std::uint32_t ternary_symbol(std::int32_t coarse, std::int32_t fine) {
  const std::int32_t r = fine - 3 * coarse;
  const std::int32_t sign = coarse >> 31;
  return static_cast<std::uint32_t>(((r ^ sign) - sign) + 1);
}

// Reconstruction: `scale` is 9, 3 or 1. 0 stays 0: there is nothing to choose, so that loops of it are
// vectors.
KVS_HOST_DEVICE float reconstruct(std::int32_t number, float shift, float scale) {
  const std::int32_t sign = (number > 0) - (number < 0);
  return (static_cast<float>(number) - static_cast<float>(sign) * shift) * scale;
}

}  // namespace kvs
