// Blocks of an engine's cache to and from rows: arrays of any strides, copied without the GIL.

#include <cstddef>
#include <vector>

#include "bindings.h"
#include "cpu/copy_blocks.h"

namespace nb = nanobind;

namespace {

using Array = nb::ndarray<nb::device::cpu>;
using ReadOnly = nb::ndarray<nb::ro, nb::device::cpu>;
using Numbers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

// The axes behind the first, which counts blocks.
template <typename To, typename From>
kvs::BlockCopy plan(const To& to, const From& from) {
  if (to.ndim() != from.ndim() || to.ndim() < 1 || to.itemsize() != from.itemsize()) {
    throw std::invalid_argument(
        "both arrays must have the same axes, the first of them blocks, and the same item size");
  }
  const auto item = static_cast<std::int64_t>(to.itemsize());
  std::vector<kvs::CopyAxis> axes;
  for (std::size_t axis = 1; axis < to.ndim(); ++axis) {
    if (to.shape(axis) != from.shape(axis)) {
      throw std::invalid_argument("blocks of both arrays must have the same shape");
    }
    axes.push_back(
        {static_cast<std::int64_t>(to.shape(axis)), to.stride(axis) * item, from.stride(axis) * item});
  }
  return {std::move(axes), to.itemsize()};
}

template <typename Blocks, typename Rows>
void check_numbers(const Numbers& numbers, const Blocks& blocks, const Rows& rows) {
  if (numbers.shape(0) != rows.shape(0)) {
    throw std::invalid_argument("there must be one block number for each block of the rows");
  }
  for (std::size_t at = 0; at < numbers.shape(0); ++at) {
    const std::int64_t number = numbers.data()[at];
    if (number < 0 || number >= static_cast<std::int64_t>(blocks.shape(0))) {
      throw std::invalid_argument("there is no block of that number");
    }
  }
}

template <typename View>
std::int64_t block_bytes(const View& view) {
  return view.stride(0) * static_cast<std::int64_t>(view.itemsize());
}

void scatter(const Array& blocks, const Numbers& numbers, const ReadOnly& rows) {
  const kvs::BlockCopy copy = plan(blocks, rows);
  check_numbers(numbers, blocks, rows);
  auto* to = static_cast<std::byte*>(blocks.data());
  const auto* from = static_cast<const std::byte*>(rows.data());
  const std::int64_t to_step = block_bytes(blocks), from_step = block_bytes(rows);
  const std::size_t count = numbers.shape(0);
  const std::int64_t* at = numbers.data();
  nb::gil_scoped_release unlocked;
  for (std::size_t row = 0; row < count; ++row) {
    copy.run(to + at[row] * to_step, from + static_cast<std::int64_t>(row) * from_step);
  }
}

void gather(const ReadOnly& blocks, const Numbers& numbers, const Array& rows) {
  const kvs::BlockCopy copy = plan(rows, blocks);
  check_numbers(numbers, blocks, rows);
  auto* to = static_cast<std::byte*>(rows.data());
  const auto* from = static_cast<const std::byte*>(blocks.data());
  const std::int64_t to_step = block_bytes(rows), from_step = block_bytes(blocks);
  const std::size_t count = numbers.shape(0);
  const std::int64_t* at = numbers.data();
  nb::gil_scoped_release unlocked;
  for (std::size_t row = 0; row < count; ++row) {
    copy.run(to + static_cast<std::int64_t>(row) * to_step, from + at[row] * from_step);
  }
}

}  // namespace

namespace kvs {

void register_blocks(nb::module_& m) {
  m.def("scatter_blocks", &scatter, nb::arg("blocks").noconvert(), nb::arg("numbers").noconvert(),
        nb::arg("rows").noconvert());
  m.def("gather_blocks", &gather, nb::arg("blocks").noconvert(), nb::arg("numbers").noconvert(),
        nb::arg("rows").noconvert());
}

}  // namespace kvs
