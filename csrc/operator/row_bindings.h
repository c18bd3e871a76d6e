// The eager entries of the operators of rows.cpp.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace dropout_ext {

void bind_rows(pybind11::module_& m);

}  // namespace dropout_ext
