// Between a section's values and rows of floats: prepare_scalable before the transform, finish_scalable after
// it.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "scalable_kernels.h"

namespace kvs {
namespace {

template <typename Bits>
bool widen(const ScalableKernels& kernels, Dtype dtype, const Bits* bits, std::uint32_t count, float* to) {
  if constexpr (std::is_same_v<Bits, std::uint32_t>) {
    return kernels.widen_float32(bits, count, to);
  } else {
    return (dtype == Dtype::kBfloat16 ? kernels.widen_bfloat16 : kernels.widen_float16)(bits, count, to);
  }
}

template <typename Bits>
void narrow(const ScalableKernels& kernels, Dtype dtype, const float* from, std::uint32_t count, Bits* bits) {
  if constexpr (std::is_same_v<Bits, std::uint32_t>) {
    kernels.narrow_float32(from, count, bits);
  } else {
    (dtype == Dtype::kBfloat16 ? kernels.narrow_bfloat16 : kernels.narrow_float16)(from, count, bits);
  }
}

RotaryRow rotary_row(const RotaryTables& rotary, std::uint32_t token) {
  const std::uint64_t begin = static_cast<std::uint64_t>(token) * rotary.pairs;
  return {rotary.style, rotary.cosines + begin, rotary.sines + begin, rotary.pairs};
}

bool is_rotated(const RotaryTables& rotary, std::uint32_t layer, std::uint32_t kind) {
  return rotary.style != RotaryStyle::kNone && kind == 0 && rotary.rotated[layer] != 0;
}

// Where a value's row begins, in elements from the section's start.
template <typename Bits>
std::int64_t row_offset(const SectionView<Bits>& view, std::uint32_t head, std::uint64_t plane,
                        std::uint32_t token) {
  return view.plane_offset(plane) + token * view.token_stride + head * view.head_stride;
}

}  // namespace

template <typename Bits>
void prepare_scalable(const SectionView<const Bits>& values, Dtype dtype, const float* mean,
                      const RotaryTables& rotary, float* x, std::uint8_t* unfit, Implementation how) {
  const ScalableKernels& kernels = scalable_kernels(how);
  const std::uint64_t length = static_cast<std::uint64_t>(values.heads) * values.planes() * values.dim;
  for (std::uint32_t token = 0; token < values.tokens; ++token, x += length) {
    const RotaryRow turned = rotary.style == RotaryStyle::kNone ? RotaryRow{} : rotary_row(rotary, token);
    float* to = x;
    unfit[token] = 0;
    for (std::uint32_t head = 0; head < values.heads; ++head) {
      for (std::uint32_t plane = 0; plane < values.planes(); ++plane, to += values.dim) {
        const Bits* from = values.data + row_offset(values, head, plane, token);
        unfit[token] |= widen(kernels, dtype, from, values.dim, to);
        if (is_rotated(rotary, plane / values.kinds, plane % values.kinds)) kernels.unrotate(to, turned);
      }
    }
    if (unfit[token]) {
      std::fill_n(x, length, 0.0f);
    } else if (mean != nullptr) {
      kernels.subtract(x, mean, length);
    }
  }
}

template <typename Bits>
void finish_scalable(const float* x, const float* scale, const float* mean, const RotaryTables& rotary,
                     Dtype dtype, const SectionView<Bits>& out, Implementation how) {
  const ScalableKernels& kernels = scalable_kernels(how);
  std::vector<float> row(out.dim);
  for (std::uint32_t token = 0; token < out.tokens; ++token) {
    const RotaryRow turned = rotary.style == RotaryStyle::kNone ? RotaryRow{} : rotary_row(rotary, token);
    const float* factor = scale;
    const float* middle = mean;
    for (std::uint32_t head = 0; head < out.heads; ++head) {
      for (std::uint32_t plane = 0; plane < out.planes(); ++plane, x += out.dim) {
        kernels.restore(x, factor, middle, out.dim, row.data());
        if (is_rotated(rotary, plane / out.kinds, plane % out.kinds)) kernels.rotate(row.data(), turned);
        narrow(kernels, dtype, row.data(), out.dim, out.data + row_offset(out, head, plane, token));
        if (factor != nullptr) factor += out.dim;
        if (middle != nullptr) middle += out.dim;
      }
    }
  }
}

template void prepare_scalable(const SectionView<const std::uint16_t>&, Dtype, const float*,
                               const RotaryTables&, float*, std::uint8_t*, Implementation);
template void prepare_scalable(const SectionView<const std::uint32_t>&, Dtype, const float*,
                               const RotaryTables&, float*, std::uint8_t*, Implementation);
template void finish_scalable(const float*, const float*, const float*, const RotaryTables&, Dtype,
                              const SectionView<std::uint16_t>&, Implementation);
template void finish_scalable(const float*, const float*, const float*, const RotaryTables&, Dtype,
                              const SectionView<std::uint32_t>&, Implementation);

}  // namespace kvs
