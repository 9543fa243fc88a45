// pybind11 knows std::string_view by itself.
#pragma once
#include <nanobind/nanobind.h>
