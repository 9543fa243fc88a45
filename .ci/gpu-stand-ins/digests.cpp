// BLAKE3 and XXH3-128 for the stand-ins blake3.py and xxhash.py: written from the papers, held to the real
// packages' digests by tests/test_gpu_stand_ins.py. A hash under way is a bytearray that Python keeps.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "blake3.h"
#include "xxh3.h"

namespace {

using namespace digests;

constexpr Py_ssize_t kSlow = 4096;  // bytes for which other threads are let run

// A buffer that is given back.
struct Buffer {
  Py_buffer view{};
  ~Buffer() {
    if (view.obj) PyBuffer_Release(&view);
  }
  const Octet* data() const { return static_cast<const Octet*>(view.buf); }
};

template <typename State>
PyObject* keep(const State& state) {
  return PyByteArray_FromStringAndSize(reinterpret_cast<const char*>(&state), sizeof state);
}

// The state in a bytearray, which may lie at any address; null and an exception where it is none.
template <typename State>
bool take(const Buffer& from, State& state) {
  if (from.view.len != sizeof state) {
    PyErr_SetString(PyExc_ValueError, "this is no hash under way");
    return false;
  }
  std::memcpy(&state, from.view.buf, sizeof state);
  return true;
}

template <typename State>
PyObject* update(PyObject*, PyObject* arguments) {
  Buffer kept, data;
  State state;
  if (!PyArg_ParseTuple(arguments, "w*y*", &kept.view, &data.view) || !take(kept, state)) return nullptr;
  const auto size = static_cast<std::size_t>(data.view.len);
  if (data.view.len < kSlow) {
    state.update(data.data(), size);
  } else {
    Py_BEGIN_ALLOW_THREADS;
    state.update(data.data(), size);
    Py_END_ALLOW_THREADS;
  }
  std::memcpy(kept.view.buf, &state, sizeof state);
  Py_RETURN_NONE;
}

PyObject* blake3_begin(PyObject*, PyObject* arguments) {
  Buffer key, context;
  if (!PyArg_ParseTuple(arguments, "z*z*", &key.view, &context.view)) return nullptr;
  Blake3 state{};
  Chain chain;
  std::copy_n(kInitial, 8, chain.begin());
  state.begin(chain, context.view.buf ? kContext : 0);
  if (context.view.buf) {
    state.update(context.data(), static_cast<std::size_t>(context.view.len));
    state.digest(reinterpret_cast<Octet*>(chain.data()), 32);
    state.begin(chain, kMaterial);
  } else if (key.view.buf) {
    if (key.view.len != 32) {
      PyErr_SetString(PyExc_ValueError, "a key has 32 bytes");
      return nullptr;
    }
    std::memcpy(chain.data(), key.view.buf, 32);
    state.begin(chain, kKeyed);
  }
  return keep(state);
}

PyObject* blake3_digest(PyObject*, PyObject* arguments) {
  Buffer kept;
  Py_ssize_t length;
  Blake3 state;
  if (!PyArg_ParseTuple(arguments, "y*n", &kept.view, &length) || !take(kept, state)) return nullptr;
  std::vector<Octet> out(static_cast<std::size_t>(std::max<Py_ssize_t>(length, 0)));
  state.digest(out.data(), out.size());
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(out.data()),
                                   static_cast<Py_ssize_t>(out.size()));
}

PyObject* xxh3_begin(PyObject*, PyObject*) {
  Xxh3 state{};
  state.begin();
  return keep(state);
}

PyObject* xxh3_digest(PyObject*, PyObject* arguments) {
  Buffer kept;
  Xxh3 state;
  if (!PyArg_ParseTuple(arguments, "y*", &kept.view) || !take(kept, state)) return nullptr;
  const Pair hash = state.digest();
  const Long big[2] = {__builtin_bswap64(hash.high), __builtin_bswap64(hash.low)};
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(big), sizeof big);
}

PyMethodDef kMethods[] = {{"blake3_begin", blake3_begin, METH_VARARGS, nullptr},
                          {"blake3_update", update<Blake3>, METH_VARARGS, nullptr},
                          {"blake3_digest", blake3_digest, METH_VARARGS, nullptr},
                          {"xxh3_begin", xxh3_begin, METH_NOARGS, nullptr},
                          {"xxh3_update", update<Xxh3>, METH_VARARGS, nullptr},
                          {"xxh3_digest", xxh3_digest, METH_VARARGS, nullptr},
                          {nullptr, nullptr, 0, nullptr}};
PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_digests", nullptr, 0, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__digests() { return PyModule_Create(&kModule); }
