// The Python face of the native code: arrays cross as nb::ndarray, the work is done without the GIL.

#include "bindings.h"

#include <nanobind/stl/string_view.h>

#include <vector>

namespace nb = nanobind;

namespace kvs {

Implementation find_implementation(std::string_view name) {
  const bool any = name == "auto";
  if ((any || name == "avx512") && has_avx512()) return Implementation::kAvx512;
  if ((any || name == "avx2") && has_avx2()) return Implementation::kAvx2;
  if (any || name == "portable") return Implementation::kPortable;
  throw std::invalid_argument("implementation must be 'auto' or one of implementations()");
}

}  // namespace kvs

namespace {

using Values = nb::ndarray<const std::uint16_t, nb::ndim<5>, nb::device::cpu>;
using Out = nb::ndarray<std::uint16_t, nb::ndim<5>, nb::device::cpu>;
using Payload = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

nb::bytes encode(const Values& values, std::string_view implementation) {
  const auto how = kvs::find_implementation(implementation);
  const auto view = kvs::view_section<const std::uint16_t>(values);
  std::vector<std::uint8_t> payload;
  {
    nb::gil_scoped_release unlocked;
    payload = kvs::encode_lossless(view, how);
  }
  return nb::bytes(payload.data(), payload.size());
}

int decode(const Payload& payload, const Out& out, std::uint32_t head_begin, std::uint32_t section_heads,
           std::string_view implementation) {
  const auto how = kvs::find_implementation(implementation);
  const auto view = kvs::view_section<std::uint16_t>(out);
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
  if (kvs::has_avx512()) names.append("avx512");
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
  kvs::register_blocks(m);
  kvs::register_scalable(m);
}
