// pybind11 knows std::optional by <pybind11/stl.h>.
#pragma once
#include <nanobind/nanobind.h>
