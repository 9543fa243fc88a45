// The Python face of the scalable codec. Shapes are checked here, bytes below.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <optional>
#include <string>

#include "bindings.h"
#include "scalable.h"

namespace nb = nanobind;

namespace {

template <typename Number, std::size_t rank>
using Array = nb::ndarray<Number, nb::ndim<rank>, nb::device::cpu, nb::c_contig>;
using Octets = Array<const std::uint8_t, 1>;
using Row = Array<const float, 1>;
using Table = Array<const float, 2>;
template <typename Bits>
using Section = nb::ndarray<Bits, nb::ndim<5>, nb::device::cpu>;

void expect(bool sound, const char* what) {
  if (!sound) throw std::invalid_argument(what);
}

kvs::Bytes span_of(const Octets& octets) { return {octets.data(), octets.size()}; }

nb::bytes bytes_of(const std::vector<std::uint8_t>& from) { return nb::bytes(from.data(), from.size()); }

void create_tables(kvs::ScalableTables* self, const Octets& first, const Array<const std::uint16_t, 2>& base,
                   const Array<const std::uint16_t, 4>& refine, const Table& shift) {
  expect(first.size() == kvs::kLevels, "first is uint8 [3]");
  expect(base.shape(0) == kvs::kClasses && base.shape(1) == kvs::kBaseSymbols, "base is uint16 [48, 256]");
  expect(refine.shape(0) == 2 && refine.shape(1) == kvs::kClasses && refine.shape(2) == kvs::kContexts &&
             refine.shape(3) == 2,
         "refine is uint16 [2, 48, 4, 2]");
  expect(shift.shape(0) == kvs::kLevels && shift.shape(1) == kvs::kClasses, "shift is float32 [3, 48]");
  new (self) kvs::ScalableTables({first.data(), base.data(), refine.data(), shift.data()});
}

template <typename Value>
kvs::Components<Value> components_of(const Array<Value, 2>& y, const Octets& classes) {
  expect(y.shape(0) > 0 && y.shape(1) > 0, "y has at least one token and one component");
  expect(y.shape(0) <= kvs::kMaxExtent, "y has no more than 2^20 tokens");
  // Layers, K and V, and head dims up to their limits: 2 * 2^12 * 2^12 numbers of one head.
  expect(y.shape(1) <= 32 * std::size_t{kvs::kMaxExtent}, "y has no more than 2^25 components");
  expect(classes.size() == y.shape(1), "there is one class for each component of y");
  return {y.data(), y.shape(0), y.shape(1)};
}

nb::tuple encode(const kvs::ScalableTables& tables, const Octets& classes, const Array<const float, 2>& y,
                 unsigned levels, std::string_view implementation) {
  const auto how = kvs::find_implementation(implementation);
  expect(levels >= 1 && levels <= kvs::kLevels, "levels is 1 to 3");
  const auto components = components_of(y, classes);
  kvs::ScalableStream stream;
  {
    nb::gil_scoped_release unlocked;
    stream = kvs::encode_scalable(tables, span_of(classes), components, levels, how);
  }
  nb::list words;
  for (const auto& level : stream.words) words.append(bytes_of(level));
  return nb::make_tuple(bytes_of(stream.states), words, bytes_of(stream.escapes));
}

int decode(const kvs::ScalableTables& tables, const Octets& classes, const Octets& states, nb::list words,
           const Octets& escapes, const Array<float, 2>& y, unsigned object_levels,
           std::string_view implementation) {
  const auto how = kvs::find_implementation(implementation);
  expect(object_levels >= 1 && object_levels <= kvs::kLevels, "object_levels is 1 to 3");
  expect(words.size() >= 1 && words.size() <= object_levels, "words has 1 to object_levels levels");
  const auto components = components_of(y, classes);
  std::vector<Octets> held;  // keeps the buffers while they are read
  std::vector<kvs::Bytes> levels;
  for (const nb::handle level : words) {
    held.push_back(nb::cast<Octets>(level, false));
    levels.push_back(span_of(held.back()));
  }
  nb::gil_scoped_release unlocked;
  return static_cast<int>(kvs::decode_scalable(tables, span_of(classes), span_of(states), levels,
                                               span_of(escapes), components, object_levels, how));
}

kvs::RotaryTables rotary_of(const std::optional<Table>& cosines, const std::optional<Table>& sines, int style,
                            const std::optional<Octets>& rotated, std::size_t tokens, std::size_t layers,
                            std::size_t dim) {
  expect(style >= 0 && style <= 2, "style is 0 (none), 1 (halves) or 2 (pairs)");
  if (style == 0) return {};
  expect(cosines && sines && rotated, "a rotation needs cos, sin and rotated");
  expect(cosines->shape(0) == tokens && sines->shape(0) == tokens && cosines->shape(1) == sines->shape(1),
         "cos and sin are float32 [tokens, pairs]");
  expect(2 * cosines->shape(1) <= dim, "there are at most dim / 2 pairs");
  expect(rotated->size() == layers, "rotated is uint8 [layers]");
  return {static_cast<kvs::RotaryStyle>(style), cosines->data(), sines->data(),
          static_cast<std::uint32_t>(cosines->shape(1)), rotated->data()};
}

template <typename Bits>
kvs::Dtype dtype_of(int id) {
  expect(id >= 1 && id <= 3, "dtype is 1 (bfloat16), 2 (float16) or 3 (float32)");
  expect((id == 3) == (sizeof(Bits) == 4), "bfloat16 and float16 are uint16 arrays, float32 is uint32");
  return static_cast<kvs::Dtype>(id);
}

const float* row_of(const std::optional<Row>& row, std::size_t length, const char* what) {
  expect(!row || row->size() == length, what);
  return row ? row->data() : nullptr;
}

template <typename Bits>
nb::object prepare(const Section<const Bits>& values, int dtype_id, const Array<float, 2>& x,
                   const std::optional<Row>& mean, const std::optional<Table>& cosines,
                   const std::optional<Table>& sines, int style, const std::optional<Octets>& rotated,
                   std::string_view implementation) {
  const auto how = kvs::find_implementation(implementation);
  const auto view = kvs::view_section<const Bits>(values);
  const auto dtype = dtype_of<Bits>(dtype_id);
  const std::size_t length = std::size_t{view.heads} * view.planes() * view.dim;
  expect(x.shape(0) == view.tokens && x.shape(1) == length,
         "x is float32 [tokens, heads * layers * kinds * dim]");
  const float* means = row_of(mean, length, "mean has a number for each of x's columns");
  const auto rotary = rotary_of(cosines, sines, style, rotated, view.tokens, view.layers, view.dim);
  auto* unfit = new std::uint8_t[view.tokens];
  nb::capsule owner(unfit, [](void* array) noexcept { delete[] static_cast<std::uint8_t*>(array); });
  {
    nb::gil_scoped_release unlocked;
    kvs::prepare_scalable<Bits>(view, dtype, means, rotary, x.data(), unfit, how);
  }
  return nb::cast(nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(unfit, {view.tokens}, owner));
}

template <typename Bits>
void finish(const Array<const float, 2>& x, const std::optional<Row>& scale, const std::optional<Row>& mean,
            const std::optional<Table>& cosines, const std::optional<Table>& sines, int style,
            const std::optional<Octets>& rotated, int dtype_id, const Section<Bits>& out,
            std::string_view implementation) {
  const auto how = kvs::find_implementation(implementation);
  const auto view = kvs::view_section<Bits>(out);
  const auto dtype = dtype_of<Bits>(dtype_id);
  const std::size_t length = std::size_t{view.heads} * view.planes() * view.dim;
  expect(x.shape(0) == view.tokens && x.shape(1) == length,
         "x is float32 [tokens, heads * layers * kinds * dim]");
  const float* scales = row_of(scale, length, "scale has a number for each of x's columns");
  const float* means = row_of(mean, length, "mean has a number for each of x's columns");
  const auto rotary = rotary_of(cosines, sines, style, rotated, view.tokens, view.layers, view.dim);
  nb::gil_scoped_release unlocked;
  kvs::finish_scalable<Bits>(x.data(), scales, means, rotary, dtype, view, how);
}

template <typename Bits>
void define_values(nb::module_& m) {
  m.def("scalable_prepare", &prepare<Bits>, nb::arg("values").noconvert(), nb::arg("dtype_id"),
        nb::arg("x").noconvert(), nb::arg("mean").noconvert().none(), nb::arg("cos").noconvert().none(),
        nb::arg("sin").noconvert().none(), nb::arg("style"), nb::arg("rotated").noconvert().none(),
        nb::kw_only(), nb::arg("implementation") = "auto");
  m.def("scalable_finish", &finish<Bits>, nb::arg("x").noconvert(), nb::arg("scale").noconvert().none(),
        nb::arg("mean").noconvert().none(), nb::arg("cos").noconvert().none(),
        nb::arg("sin").noconvert().none(), nb::arg("style"), nb::arg("rotated").noconvert().none(),
        nb::arg("dtype_id"), nb::arg("out").noconvert(), nb::kw_only(), nb::arg("implementation") = "auto");
}

}  // namespace

void kvs::register_scalable(nb::module_& m) {
  // Tables are kept until the interpreter ends, on purpose: nothing to warn of on a user's terminal.
  nb::set_leak_warnings(false);
  nb::class_<ScalableTables>(m, "ScalableTables")
      .def("__init__", &create_tables, nb::arg("first").noconvert(), nb::arg("base").noconvert(),
           nb::arg("refine").noconvert(), nb::arg("shift").noconvert());
  m.def("scalable_encode", &encode, nb::arg("tables"), nb::arg("classes").noconvert(),
        nb::arg("y").noconvert(), nb::kw_only(), nb::arg("levels") = 3, nb::arg("implementation") = "auto");
  m.def("scalable_decode", &decode, nb::arg("tables"), nb::arg("classes").noconvert(),
        nb::arg("states").noconvert(), nb::arg("words"), nb::arg("escapes").noconvert(),
        nb::arg("y").noconvert(), nb::kw_only(), nb::arg("object_levels"),
        nb::arg("implementation") = "auto");
  define_values<std::uint16_t>(m);
  define_values<std::uint32_t>(m);
}
