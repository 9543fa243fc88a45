// How the words of a vector of eight lanes lie in the shared sequence: what the AVX2 loops of both codecs
// permute by.
#pragma once

#include <cstdint>

namespace kvs {

// For each set of lanes that need a word: which of the next words each of the eight takes.
struct WordSpread {
  alignas(64) std::uint32_t order[256][8];

  constexpr WordSpread() : order() {
    for (std::uint32_t mask = 0; mask < 256; ++mask) {
      std::uint32_t next = 0;
      for (std::uint32_t lane = 0; lane < 8; ++lane) order[mask][lane] = mask >> lane & 1 ? next++ : 0;
    }
  }
};
inline constexpr WordSpread kSpread;

// For each set of lanes that emit a word: their states last, in lane order.
struct WordGather {
  alignas(64) std::uint32_t order[256][8];

  constexpr WordGather() : order() {
    for (std::uint32_t mask = 0; mask < 256; ++mask) {
      std::uint32_t at = 8;
      for (std::uint32_t lane = 8; lane-- > 0;) {
        if (mask >> lane & 1) order[mask][--at] = lane;
      }
    }
  }
};
inline constexpr WordGather kGather;

}  // namespace kvs
