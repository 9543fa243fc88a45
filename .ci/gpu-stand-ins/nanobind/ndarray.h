// nanobind's arrays by Python's buffer protocol, which numpy, bytes and memoryview speak.
#pragma once

#include <nanobind/nanobind.h>
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <type_traits>
#include <vector>

namespace nanobind {

struct ro {};
struct c_contig {};
struct numpy {};
template <std::size_t rank>
struct ndim {};
namespace device {
struct cpu {};
}  // namespace device

namespace detail {

template <typename... Traits>
struct ItemOf {
  using type = void;
};
template <typename First, typename... Rest>
struct ItemOf<First, Rest...> {
  using type = std::conditional_t<
      std::is_arithmetic_v<First>, First,
      std::conditional_t<std::is_same_v<First, ro>, const void, typename ItemOf<Rest...>::type>>;
};

template <typename Trait>
inline constexpr int kRank = -1;
template <std::size_t rank>
inline constexpr int kRank<ndim<rank>> = static_cast<int>(rank);

// Whether a buffer's format, of the struct module, is that of a number: its kind, and its size in bytes.
template <typename Number>
bool is_format(const char* format, Py_ssize_t itemsize) {
  const std::string_view kinds = std::is_floating_point_v<Number> ? "efd"
                                 : std::is_signed_v<Number>       ? "bhilqn"
                                                                  : "BHILQN";
  std::string_view found = format ? format : "B";
  if (!found.empty() && (found[0] == '<' || found[0] == '@' || found[0] == '=')) found.remove_prefix(1);
  return found.size() == 1 && kinds.find(found[0]) != kinds.npos && itemsize == sizeof(Number);
}

struct ReleaseBuffer {
  void operator()(Py_buffer* view) const {
    PyBuffer_Release(view);
    delete view;
  }
};

}  // namespace detail

template <typename... Traits>
class ndarray {
 public:
  using Item = typename detail::ItemOf<Traits...>::type;
  static constexpr int kWantedRank = std::max({-1, detail::kRank<Traits>...});
  static constexpr bool kContiguous = (std::is_same_v<Traits, c_contig> || ...);

  ndarray() = default;

  // Memory that `owner` keeps.
  ndarray(Item* data, std::initializer_list<std::size_t> shape, handle owner)
      : made_(data), extents_(shape), owner_(pybind11::reinterpret_borrow<object>(owner)) {}

  // Take what `from` holds; false where it is no such array.
  bool load(handle from) {
    auto* view = new Py_buffer;
    const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (std::is_const_v<Item> ? 0 : PyBUF_WRITABLE);
    if (PyObject_GetBuffer(from.ptr(), view, flags) != 0) {
      delete view;
      PyErr_Clear();
      return false;
    }
    view_ = std::shared_ptr<Py_buffer>(view, detail::ReleaseBuffer{});
    if (kWantedRank >= 0 && view->ndim != kWantedRank) return false;
    if (kContiguous && !PyBuffer_IsContiguous(view, 'C')) return false;
    for (int axis = 0; axis < view->ndim; ++axis) {
      if (view->strides[axis] % view->itemsize != 0) return false;
    }
    if constexpr (!std::is_void_v<Item>) {
      return detail::is_format<std::remove_const_t<Item>>(view->format, view->itemsize);
    }
    return true;
  }

  std::size_t ndim() const { return static_cast<std::size_t>(view_->ndim); }
  std::size_t itemsize() const { return static_cast<std::size_t>(view_->itemsize); }
  std::size_t size() const { return static_cast<std::size_t>(view_->len) / itemsize(); }
  std::size_t shape(std::size_t axis) const { return static_cast<std::size_t>(view_->shape[axis]); }
  std::int64_t stride(std::size_t axis) const { return view_->strides[axis] / view_->itemsize; }
  Item* data() const { return static_cast<Item*>(view_->buf); }

  object as_numpy() const { return pybind11::array_t<Item>(extents_, made_, owner_); }

 private:
  std::shared_ptr<Py_buffer> view_;
  Item* made_ = nullptr;
  std::vector<std::size_t> extents_;
  object owner_;
};

template <typename... Traits>
object cast(const ndarray<Traits...>& array) {
  return array.as_numpy();
}

}  // namespace nanobind

namespace pybind11::detail {

template <typename... Traits>
struct type_caster<nanobind::ndarray<Traits...>> {
  using Array = nanobind::ndarray<Traits...>;
  PYBIND11_TYPE_CASTER(Array, const_name("array"));

  bool load(handle from, bool) { return value.load(from); }
};

}  // namespace pybind11::detail
