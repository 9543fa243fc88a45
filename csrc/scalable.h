// The scalable codec: components in, up to three levels of words out, and back. docs/format-scalable.md is
// the format; `Stream` here is one of its streams without the fields around states, words and escapes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "lossless.h"
#include "scalable_tables.h"

namespace kvs {

using Bytes = std::span<const std::uint8_t>;

// T x n' components in finest steps, rows without gaps.
template <typename Value>
struct Components {
  Value* values;
  std::uint64_t tokens, count;
};

struct ScalableStream {
  std::vector<std::uint8_t> states;
  std::vector<std::vector<std::uint8_t>> words;  // of each level
  std::vector<std::uint8_t> escapes;
};

// Codes the levels 0 to `levels` - 1. Components that a level does not code are cut to what the others can
// say, so that decoding gives the nearest value that there is; NaN is coded as the lowest one.
ScalableStream encode_scalable(const ScalableTables& tables, std::span<const std::uint8_t> classes,
                               const Components<const float>& y, unsigned levels, Implementation how);

// Decodes the first `words.size()` (1 to 3) levels of an object of `object_levels` into all of `y`. Reads
// within the given bytes and writes within `y` alone, whatever the bytes. On a fault `y` is undefined.
Fault decode_scalable(const ScalableTables& tables, std::span<const std::uint8_t> classes, Bytes states,
                      std::span<const Bytes> words, Bytes escapes, const Components<float>& y,
                      unsigned object_levels, Implementation how);

enum class Dtype : int { kBfloat16 = 1, kFloat16 = 2, kFloat32 = 3 };
enum class RotaryStyle : int { kNone = 0, kHalves = 1, kPairs = 2 };

// cos and sin [token][pair], and which layers' K they turn.
struct RotaryTables {
  RotaryStyle style;
  const float* cosines;
  const float* sines;
  std::uint32_t pairs;
  const std::uint8_t* rotated;
};

// x is [token][head][layer][kind][dim]: the values as float with the rotation of K undone, minus the mean (of
// one token; may be null). A token with a NaN, an infinity or a value of half the dtype's range or more,
// which could come back as an infinity, gets a row of zeros and a 1 in `unfit`. `Bits` is std::uint16_t or
// std::uint32_t, as the dtype wants it.
template <typename Bits>
void prepare_scalable(const SectionView<const Bits>& values, Dtype dtype, const float* mean,
                      const RotaryTables& rotary, float* x, std::uint8_t* unfit, Implementation how);

// The way back: rotate(mean + scale * x), to the nearest, ties to even. `scale` and `mean` may be null.
template <typename Bits>
void finish_scalable(const float* x, const float* scale, const float* mean, const RotaryTables& rotary,
                     Dtype dtype, const SectionView<Bits>& out, Implementation how);

}  // namespace kvs
