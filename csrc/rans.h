// rANS, one step at a time, for host and device: the same functions run in the portable loop, in its AVX2
// twin's slow path and in a kernel. Algorithm: J. Duda, "Asymmetric numeral systems", arXiv:1311.2540;
// interleaving as in F. Giesen, "Interleaved entropy coders", arXiv:1402.3392.
//
// The surprises first:
// - The encoder runs backwards: last symbol first, and its words are written from the end of the buffer down.
//   The decoder then reads everything forwards.
// - A state is a 32-bit integer in [2^15, 2^31). 2^15 instead of 2^16 keeps it positive as a signed number
//   (AVX2 has no unsigned compare) and lets a 32-bit reciprocal divide it exactly.
// - Renormalisation moves 16 bits, never more than once a step: the smallest frequency leaves a state of at
//   least 8.
#pragma once

#include <cstdint>

#include "format.h"

#ifdef __CUDACC__
#define KVS_HOST_DEVICE __host__ __device__ inline
#else
#define KVS_HOST_DEVICE inline
#endif

namespace kvs {

// A decoder's table entry, one for each slot: frequency in bits 0-11, slot minus the symbol's first slot in
// bits 12-23, half octaves below the top in bits 24-28, sign in bit 29, escape in bit 31.
KVS_HOST_DEVICE std::uint32_t pack_entry(std::uint32_t symbol, std::uint32_t frequency,
                                         std::uint32_t offset) {
  const std::uint32_t escape = (symbol & 31) >= kEscapeStep;
  return frequency | offset << 12 | symbol << 24 | escape << 31;
}

KVS_HOST_DEVICE bool is_escape(std::uint32_t entry) { return entry >> 31; }

KVS_HOST_DEVICE std::uint32_t slot_of(std::uint32_t state) { return state & (kSlots - 1); }

// Takes the symbol of `entry` out of `state`. The result is below 2^31 for every state below 2^31.
KVS_HOST_DEVICE std::uint32_t pop_symbol(std::uint32_t state, std::uint32_t entry) {
  return (entry & 0xFFF) * (state >> kSlotBits) + (entry >> 12 & 0xFFF);
}

// 1 or 0: a number, because whether a lane needs a word cannot be predicted and must not become a branch.
KVS_HOST_DEVICE std::uint32_t needs_word(std::uint32_t state) { return state < kStateMin; }

// Takes `word` in where `hungry` is 1.
KVS_HOST_DEVICE std::uint32_t pull_word(std::uint32_t state, std::uint32_t word, std::uint32_t hungry) {
  return state << 16 * hungry | (word & (0 - hungry));
}

// An encoder's symbol. Its reciprocal is ceil(2^(31+shift) / frequency) with shift = ceil(log2(frequency)):
// the error of reciprocal * frequency is below 2^shift, so dividing a state below 2^31 by it is exact (R.
// Alverson, "Integer division using reciprocals", 1991).
struct Push {
  std::uint32_t
      meta;  // frequency in bits 0-11 (0: not in this table, code an escape), start in 12-23, shift in 24-28
  std::uint32_t reciprocal;
};

KVS_HOST_DEVICE Push make_push(std::uint32_t frequency, std::uint32_t start) {
  if (frequency == 0) return {0, 0};
  std::uint32_t shift = 0;
  while ((1u << shift) < frequency) ++shift;
  const std::uint64_t numerator = 1ull << (31 + shift);
  return {frequency | start << 12 | shift << 24,
          static_cast<std::uint32_t>((numerator + frequency - 1) / frequency)};
}

KVS_HOST_DEVICE std::uint32_t frequency_of(const Push& push) { return push.meta & 0xFFF; }

KVS_HOST_DEVICE std::uint32_t must_emit(std::uint32_t state, const Push& push) {
  return state >= frequency_of(push) << 19;
}

KVS_HOST_DEVICE std::uint32_t push_symbol(std::uint32_t state, const Push& push) {
  const std::uint32_t shift = 31 + (push.meta >> 24);
  const auto quotient =
      static_cast<std::uint32_t>(static_cast<std::uint64_t>(state) * push.reciprocal >> shift);
  return state + quotient * (kSlots - frequency_of(push)) + (push.meta >> 12 & 0xFFF);
}

// The base of a component's class: top octave and sign, where a bf16 has them, with mantissa bit 6 set.
KVS_HOST_DEVICE std::uint32_t class_base(std::uint32_t top, std::uint32_t flip) {
  return flip << 15 | top << 7 | 64;
}

// A bf16 from the class's base, the symbol in `entry` and the six stored mantissa bits. The exponent is taken
// modulo 256.
KVS_HOST_DEVICE std::uint32_t assemble_value(std::uint32_t base, std::uint32_t entry, std::uint32_t low) {
  const std::uint32_t magnitude = (base - (entry >> 24 & 31) * 64) & 0x7FC0;
  const std::uint32_t sign = (base ^ entry >> 14) & 0x8000;
  return sign | magnitude | low;
}

KVS_HOST_DEVICE std::uint32_t replace_exponent(std::uint32_t value, std::uint32_t exponent) {
  return (value & 0x807F) | exponent << 7;
}

}  // namespace kvs
