// Dropout fused with a residual and a norm. The operators' schemas stand in rows.cpp; what they
// compute in epilogue/row_args.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops.h"

namespace dropout_ext {

// All arguments of add and add_norm but the dtypes of what they return. Tensors may be undefined,
// `input` excepted; an undefined key keeps everything.
struct RowCall {
  at::Tensor input = {}, residual = {}, input_bias = {}, colscale = {}, rowscale = {}, key = {};
  double p = 0, scale = 1;
  c10::SymIntArrayRef mask_strides = {};
  c10::SymInt mask_offset = 0;

  // The norm, over the last `norm_dims` dimensions; 0 for none.
  int64_t norm_dims = 0;
  at::Tensor weight = {}, bias = {};
  double eps = 0;
  bool rms = false;
  // Else the sum that add_norm returns is empty, but for calls that need a graph or are batched:
  // nobody reads it then.
  bool return_sum = true;

  Call dropout() const { return {key, p, scale, mask_strides, mask_offset}; }
  bool has_scales() const {
    return input_bias.defined() || colscale.defined() || rowscale.defined();
  }
  bool keeps_nothing() const;
};

// float64 beside a sum of float64, else float32.
inline at::ScalarType compute_type(at::ScalarType sum) {
  return sum == at::kDouble ? at::kDouble : at::kFloat;
}

// Of add, or with `norm` of add_norm.
void check_rows(const RowCall& call, bool norm, at::ScalarType sum_dtype, at::ScalarType dtype);

at::Tensor add(const RowCall& call, at::ScalarType dtype);

// (normalized sum, sum, mean, rstd); the mean of an RMS norm has no elements.
using AddNorm = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
AddNorm add_norm(const RowCall& call, at::ScalarType sum_dtype, at::ScalarType dtype);

// Gradients of sum, input, weight and bias, those that are `wanted`; the others have no elements.
// Of the call only what drops and the norm count, and the input has the dtype of `grad_out`.
AddNorm add_norm_backward(const at::Tensor& grad_out, const at::Tensor& grad_sum,
                          const at::Tensor& sum, const at::Tensor& mean, const at::Tensor& rstd,
                          const RowCall& call, std::array<bool, 4> wanted);

// `function` is an Activation.
at::Tensor activation(const at::Tensor& input, int64_t function, const Call& call);
at::Tensor activation_backward(const at::Tensor& grad, const at::Tensor& input, int64_t function,
                               const Call& call);

}  // namespace dropout_ext
