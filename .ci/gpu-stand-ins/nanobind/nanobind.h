// What csrc/bindings*.cpp use of nanobind, upon the pybind11 whose headers torch's wheel brings.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <new>

#define NB_MODULE(name, variable) PYBIND11_MODULE(name, variable)

namespace nanobind {

using pybind11::arg;
using pybind11::capsule;
using pybind11::gil_scoped_release;
using pybind11::handle;
using pybind11::kw_only;
using pybind11::list;
using pybind11::make_tuple;
using pybind11::module_;
using pybind11::object;
using pybind11::tuple;

struct bytes : pybind11::bytes {
  bytes(const void* data, std::size_t size) : pybind11::bytes(static_cast<const char*>(data), size) {}
};

inline void set_leak_warnings(bool) {}

// Of classes whose only member is __init__, a function that constructs in place.
template <typename Made>
class class_ {
 public:
  class_(module_& m, const char* name) : class_in_python_(m, name) {}

  template <typename... Given, typename... Extra>
  class_& def(const char*, void (*construct)(Made*, Given...), const Extra&... extra) {
    static_assert(alignof(Made) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__,
                  "Python's side deletes with plain delete");
    struct Free {
      void operator()(void* space) const { ::operator delete(space); }
    };
    const auto make = [construct](Given... given) {
      std::unique_ptr<void, Free> space(::operator new(sizeof(Made)));
      construct(static_cast<Made*>(space.get()), given...);
      return static_cast<Made*>(space.release());
    };
    class_in_python_.def(pybind11::init(make), extra...);
    return *this;
  }

 private:
  pybind11::class_<Made> class_in_python_;
};

template <typename To>
To cast(handle from, bool convert) {
  pybind11::detail::make_caster<To> caster;
  if (!caster.load(from, convert)) throw pybind11::type_error("this is no such array");
  return pybind11::detail::cast_op<To>(caster);
}

}  // namespace nanobind
