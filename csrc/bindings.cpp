// The Python face of the native code: arrays cross as nb::ndarray, the work is done without the GIL.

#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "Native codec kernels of kvstore_s3.";
}
