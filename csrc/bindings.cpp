// The Python face of the native code: arrays cross as nb::ndarray, the work is done without the GIL.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string_view.h>

#include <stdexcept>
#include <string_view>
#include <vector>

#include "lossless.h"

namespace nb = nanobind;

namespace {

using Values = nb::ndarray<const std::uint16_t, nb::ndim<5>, nb::device::cpu>;
using Out = nb::ndarray<std::uint16_t, nb::ndim<5>, nb::device::cpu>;
using Payload = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

kvs::Implementation find_implementation(std::string_view name) {
  if (name == "auto") return kvs::has_avx2() ? kvs::Implementation::kAvx2 : kvs::Implementation::kPortable;
  if (name == "portable") return kvs::Implementation::kPortable;
  if (name == "avx2" && kvs::has_avx2()) return kvs::Implementation::kAvx2;
  throw std::invalid_argument("implementation must be 'auto' or one of implementations()");
}

template <typename Value, typename Array>
kvs::SectionView<Value> view_section(const Array& array) {
  for (std::size_t axis = 0; axis < 5; ++axis) {
    if (array.shape(axis) == 0 || array.shape(axis) > kvs::kMaxExtent) {
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

nb::bytes encode(const Values& values, std::string_view implementation) {
  const auto how = find_implementation(implementation);
  const auto view = view_section<const std::uint16_t>(values);
  std::vector<std::uint8_t> payload;
  {
    nb::gil_scoped_release unlocked;
    payload = kvs::encode_lossless(view, how);
  }
  return nb::bytes(payload.data(), payload.size());
}

int decode(const Payload& payload, const Out& out, std::uint32_t head_begin, std::uint32_t section_heads,
           std::string_view implementation) {
  const auto how = find_implementation(implementation);
  const auto view = view_section<std::uint16_t>(out);
  if (head_begin > section_heads || view.heads > section_heads - head_begin) {
    throw std::invalid_argument("the head range does not lie within the section");
  }
  nb::gil_scoped_release unlocked;
  return static_cast<int>(
      kvs::decode_lossless({payload.data(), payload.size()}, view, head_begin, section_heads, how));
}

nb::list implementations() {
  nb::list names;
  names.append("portable");
  if (kvs::has_avx2()) names.append("avx2");
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native codec kernels of kvstore_s3.";
  m.def("lossless_encode", &encode, nb::arg("values").noconvert(), nb::kw_only(),
        nb::arg("implementation") = "auto");
  m.def("lossless_decode", &decode, nb::arg("payload").noconvert(), nb::arg("out").noconvert(), nb::kw_only(),
        nb::arg("head_begin"), nb::arg("section_heads"), nb::arg("implementation") = "auto");
  m.def("implementations", &implementations);
}
