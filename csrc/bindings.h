// What the files of bindings share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string_view>

#include "lossless.h"

namespace kvs {

// "auto" or a name in implementations(). Throws std::invalid_argument.
Implementation find_implementation(std::string_view name);

// Adds the scalable codec to the module.
void register_scalable(nanobind::module_& m);

// Adds the copies between blocks and rows.
void register_blocks(nanobind::module_& m);

// Throws std::invalid_argument where `array` [layers, kinds, tokens, heads, dim] is no section.
template <typename Value, typename Array>
SectionView<Value> view_section(const Array& array) {
  for (std::size_t axis = 0; axis < 5; ++axis) {
    if (array.shape(axis) == 0 || array.shape(axis) > kMaxExtent) {
      throw std::invalid_argument("a section has no empty axis, and none beyond 2^20");
    }
  }
  if (array.shape(1) > 2) {
    throw std::invalid_argument("axis 1 of a section is K and V: its length must be 1 or 2");
  }
  const auto dim = static_cast<std::int64_t>(array.shape(4));
  if ((dim > 1 && array.stride(4) != 1) || (array.shape(3) > 1 && array.stride(3) != dim)) {
    throw std::invalid_argument("the last two axes (head, dim) of a section must be contiguous");
  }
  const auto extent = [&](std::size_t axis) { return static_cast<std::uint32_t>(array.shape(axis)); };
  return {array.data(), extent(0),       extent(1),       extent(2),       extent(3),
          extent(4),    array.stride(0), array.stride(1), array.stride(2), dim};
}

}  // namespace kvs
