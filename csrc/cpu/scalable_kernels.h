// The floating-point half of the scalable codec, a row at a time. The loops are written once
// (scalable_loops.h) and compiled for each set of instructions: the same operations in the same order,
// multiplication and addition never fused, so that all give the same floats.
#pragma once

#include <cstdint>

#include "../scalable.h"

namespace kvs {

// One row of values of one layer and kind of one head.
struct RotaryRow {
  RotaryStyle style;  // kNone: not turned
  const float* cosines;
  const float* sines;
  std::uint32_t pairs;
};

struct ScalableKernels {
  // numbers[c] = the nearest integer of row[order[c]], cut to limit[c]; `count` is a multiple of 32, `stage`
  // has room for as many.
  void (*quantise)(const float* row, const std::uint32_t* order, const float* limit, std::uint64_t count,
                   float* stage, std::int16_t* numbers, std::uint64_t block_stride);
  // stage[c] = the value of numbers[c] of one token.
  void (*reconstruct)(const std::int16_t* numbers, std::uint64_t block_stride, const float* shift,
                      float scale, std::uint64_t count, float* stage);
  // row[i] = stage[place[i]]
  void (*spread)(const float* stage, const std::uint32_t* place, std::uint64_t count, float* row);

  // Bit patterns to floats; answers whether one is NaN, infinite or has the largest exponent that there is:
  // turning or rounding such a number could make it infinite.
  bool (*widen_bfloat16)(const std::uint16_t* bits, std::uint32_t count, float* to);
  bool (*widen_float16)(const std::uint16_t* bits, std::uint32_t count, float* to);
  bool (*widen_float32)(const std::uint32_t* bits, std::uint32_t count, float* to);
  // And back, to the nearest, ties to even.
  void (*narrow_bfloat16)(const float* from, std::uint32_t count, std::uint16_t* bits);
  void (*narrow_float16)(const float* from, std::uint32_t count, std::uint16_t* bits);
  void (*narrow_float32)(const float* from, std::uint32_t count, std::uint32_t* bits);

  void (*unrotate)(float* row, const RotaryRow& rotary);
  void (*rotate)(float* row, const RotaryRow& rotary);
  void (*subtract)(float* row, const float* mean, std::uint64_t count);
  // to = mean + scale * from; either may be null.
  void (*restore)(const float* from, const float* scale, const float* mean, std::uint32_t count, float* to);
};

const ScalableKernels& scalable_kernels(Implementation how);

extern const ScalableKernels kPortableKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace kvs
