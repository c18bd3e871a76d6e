// Where a Function of C++ will not do.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops.h"

namespace dropout_ext {

// functorch rejects a C++ Function, and forward mode would silently lose the tangent in one: where
// either is at work, differentiable operators are composed instead.
bool needs_composition(const at::Tensor& input);

// The call of differentiable operators.
at::Tensor compose(const at::Tensor& input, const Call& call);

}  // namespace dropout_ext
