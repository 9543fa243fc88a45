// Sums of floats in the order in which the host's encoder adds them: it adds a column from its first row to
// its last, and what lies side by side pairwise: eight sums next to each other over at most 128 values, and
// halves of what is longer. N. J. Higham, "The accuracy of floating point summation", SIAM J. Sci. Comput. 14
// (1993); where exactly it is cut is numpy's habit, and part of the same bytes.
#pragma once

#include <bit>

#include "launch.h"
#include "simt.h"

namespace kvs {

inline constexpr std::uint32_t kLeaf = 128;  // values that are not halved any more

KVS_DEVICE double shuffle_xor(double value, std::uint32_t mask) {
  const auto bits = std::bit_cast<std::uint64_t>(value);
  const std::uint64_t low = simt::shuffle_xor(static_cast<std::uint32_t>(bits), mask);
  const std::uint64_t high = simt::shuffle_xor(static_cast<std::uint32_t>(bits >> 32), mask);
  return std::bit_cast<double>(high << 32 | low);
}

// Fused, for a float's square is a double without rounding: the same sum.
KVS_DEVICE double add_square(double sum, float value) {
  const auto wide = static_cast<double>(value);
#ifdef __CUDA_ARCH__
  return __fma_rn(wide, wide, sum);
#else
  return sum + wide * wide;
#endif
}

// see(token, load(token)) for all tokens but those whose byte in `exact`, which lies at a multiple of 4, is
// 1: from the first to the last, four loads at once. Few tokens are exact.
template <typename Load, typename See>
KVS_DEVICE void each_coded(const std::uint8_t* exact, std::uint32_t tokens, Load load, See see) {
  std::uint32_t token = 0;
  for (; token + 4 <= tokens; token += 4) {
    const std::uint32_t four = *reinterpret_cast<const std::uint32_t*>(exact + token);
    if (four == 0) {
      decltype(load(token)) loaded[4];
      KVS_UNROLL for (std::uint32_t i = 0; i < 4; ++i) loaded[i] = load(token + i);
      KVS_UNROLL for (std::uint32_t i = 0; i < 4; ++i) see(token + i, loaded[i]);
    } else {
      for (std::uint32_t i = 0; i < 4; ++i) {
        if ((four >> 8 * i & 0xFF) != 1) see(token + i, load(token + i));
      }
    }
  }
  for (; token < tokens; ++token) {
    if (exact[token] != 1) see(token, load(token));
  }
}

// The sum of `count` values, of which leaf(n) adds the next n, at most kLeaf, in the order of sum_leaf.
template <typename Value, typename Leaf>
KVS_DEVICE Value sum_pairwise(std::uint32_t count, Leaf leaf) {
  constexpr std::uint32_t kDepth = 12;  // 2^16 values
  std::uint32_t right[kDepth];          // values of the half that is still to come
  Value left[kDepth];                   // the sum of the half that was added; of halves whose bit is set
  std::uint32_t depth = 0, added = 0;
  for (;;) {
    for (; count > kLeaf; ++depth) {
      const std::uint32_t half = count / 2 - count / 2 % 8;
      right[depth] = count - half;
      added &= ~(1u << depth);
      count = half;
    }
    Value sum = leaf(count);
    for (; depth != 0 && (added >> (depth - 1) & 1) != 0; --depth) sum = left[depth - 1] + sum;
    if (depth == 0) return sum;
    left[depth - 1] = sum;
    added |= 1u << (depth - 1);
    count = right[depth - 1];
  }
}

// One lane alone: next() gives one value after the other.
template <typename Value, typename Next>
KVS_DEVICE Value sum_leaf(std::uint32_t count, Next& next) {
  if (count < 8) {
    Value sum = 0;
    for (std::uint32_t i = 0; i < count; ++i) sum += next();
    return sum;
  }
  Value part[8];
  KVS_UNROLL for (std::uint32_t i = 0; i < 8; ++i) part[i] = next();
  std::uint32_t done = 8;
  for (; done + 8 <= count; done += 8) {
    KVS_UNROLL for (std::uint32_t i = 0; i < 8; ++i) part[i] += next();
  }
  Value sum = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  for (; done < count; ++done) sum += next();
  return sum;
}

// Eight neighbouring lanes together, each group of a warp for itself: value(i) is the i-th, and every lane
// gets the sum. All lanes of the warp take part.
template <typename At>
KVS_DEVICE double sum_leaf_by_eight(std::uint32_t count, At value) {
  double sum = 0;
  std::uint32_t done = 0;
  if (count >= 8) {
    sum = value(simt::lane() % 8);
    for (done = 8; done + 8 <= count; done += 8) sum += value(done + simt::lane() % 8);
    KVS_UNROLL for (std::uint32_t mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
  }
  for (; done < count; ++done) sum += value(done);
  return sum;
}

}  // namespace kvs
