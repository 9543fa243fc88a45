// The lossless codec of bf16 sections: raw pointers and sizes in, faults out. docs/format-lossless.md is the
// format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "format.h"

namespace kvs {

// Which code runs. All give the same bytes.
enum class Implementation { kPortable, kAvx2, kAvx512 };

bool has_avx2();
bool has_avx512();  // with the instructions that move bytes and words between lanes (VBMI, VBMI2)

// A section's values as bf16 bit patterns, [layer][K or V][token][head][dim]; `kinds` is 2, or 1 where K and
// V lie in sections of their own. Strides in elements; dim is contiguous. No size is above kMaxExtent.
inline constexpr std::uint32_t kMaxExtent = 1u << 20;

template <typename Value>
struct SectionView {
  Value* data;
  std::uint32_t layers, kinds, tokens, heads, dim;
  std::int64_t layer_stride, kind_stride, token_stride, head_stride;

  // A plane is one layer's K or V.
  std::uint32_t planes() const { return layers * kinds; }
  std::int64_t plane_offset(std::uint64_t plane) const {
    return static_cast<std::int64_t>(plane / kinds) * layer_stride +
           static_cast<std::int64_t>(plane % kinds) * kind_stride;
  }
};

// The payload of all heads. Throws std::length_error where a head has kMaxHeadBytes or more.
std::vector<std::uint8_t> encode_lossless(const SectionView<const std::uint16_t>& values, Implementation how);

// Decodes heads `head_begin` on of a payload of `section_heads` heads into `out`, which has the layout's
// shape. Allocates nothing; reads within `payload` and writes within `out` alone, whatever the bytes. On a
// fault `out` is undefined.
Fault decode_lossless(std::span<const std::uint8_t> payload, const SectionView<std::uint16_t>& out,
                      std::uint32_t head_begin, std::uint32_t section_heads, Implementation how);

}  // namespace kvs
