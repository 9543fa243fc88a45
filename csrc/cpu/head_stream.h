// One head's coded stream: where its parts lie, and which components a block of lanes holds.
#pragma once

#include <algorithm>
#include <cstring>

#include "../format.h"
#include "../lossless.h"

namespace kvs {

template <typename Number>
Number load(const std::uint8_t* from) {
  Number number;
  std::memcpy(&number, from, sizeof number);
  return number;
}

template <typename Number>
void store(std::uint8_t* to, Number number) {
  std::memcpy(to, &number, sizeof number);
}

// Component c of a head is [layer][K or V][dim] in C order; block b holds components 32 b to 32 b + 31.
struct HeadShape {
  std::uint64_t components, tokens;

  std::uint64_t values() const { return components * tokens; }
  std::uint64_t blocks() const { return (components + kLanes - 1) / kLanes; }
  std::uint32_t lanes(std::uint64_t block) const {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(kLanes, components - block * kLanes));
  }
  std::uint32_t states() const { return lanes(0); }
};

// Blocks with fewer lanes are not worth the fast loops, which take as long for one lane as for all.
inline constexpr std::uint32_t kFewLanes = 6;

// The set of the first `lanes` lanes.
constexpr std::uint32_t first_lanes(std::uint32_t lanes) {
  return static_cast<std::uint32_t>((1ull << lanes) - 1);
}

constexpr std::uint64_t row_bytes(std::uint64_t lanes) { return (lanes * kLowBits + 7) / 8; }

// Offsets of the parts of a coded stream of `words` words and `escapes` escape bytes, in bytes from its
// start.
struct StreamParts {
  std::uint64_t states, words, rows, classes, escapes, end;
};

inline StreamParts lay_out(const HeadShape& shape, std::uint64_t words, std::uint64_t escapes,
                           unsigned top_bits) {
  const std::uint64_t last = shape.blocks() - 1;
  StreamParts parts{};
  parts.states = kCodedHeader;
  parts.words = parts.states + 4 * shape.states();
  parts.rows = parts.words + 2 * words;
  parts.classes = parts.rows + shape.tokens * (last * row_bytes(kLanes) + row_bytes(shape.lanes(last)));
  parts.escapes = parts.classes + (shape.components * (kClassBits + top_bits) + 7) / 8;
  parts.end = (parts.escapes + escapes + 3) / 4 * 4;
  return parts;
}

// How a component is coded: which table, whether its signs are flipped, and the exponent of its top octave.
struct Class {
  std::uint8_t table, flip, top;
};

// Lanes whose values are neighbours in memory: `lanes` from `lane` on lie at `offset` elements from the
// token's start.
struct Run {
  std::uint32_t lane, lanes;
  std::int64_t offset;
};

// Most runs are a whole row or 8 values: copies of a constant length need no call.
inline void copy_run(std::uint16_t* to, const std::uint16_t* from, std::uint32_t lanes) {
  if (lanes == kLanes) {
    std::memcpy(to, from, 2 * kLanes);
  } else if (lanes == 8) {
    std::memcpy(to, from, 16);
  } else {
    std::memcpy(to, from, 2ull * lanes);
  }
}

struct BlockRuns {
  Run runs[kLanes];
  std::uint32_t count = 0;
};

template <typename Value>
BlockRuns find_runs(const SectionView<Value>& view, std::uint64_t block, std::uint32_t lanes) {
  BlockRuns found;
  for (std::uint32_t lane = 0; lane < lanes;) {
    const std::uint64_t component = block * kLanes + lane;
    const std::uint64_t plane = component / view.dim;
    const auto first = static_cast<std::uint32_t>(component % view.dim);
    const std::uint32_t length = std::min(lanes - lane, view.dim - first);
    const std::int64_t offset = view.plane_offset(plane) + first;
    found.runs[found.count++] = {lane, length, offset};
    lane += length;
  }
  return found;
}

}  // namespace kvs
