// The signatures of the operators of rows.cpp as the dispatcher calls them, around functions of a
// RowCall or a Call.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

#include "rows.h"

namespace dropout_ext {

using OptionalTensor = std::optional<at::Tensor>;

inline at::Tensor tensor_or_none(const OptionalTensor& tensor) {
  return tensor ? *tensor : at::Tensor();
}

inline OptionalTensor maybe(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

using AddSignature = at::Tensor(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                double, double, c10::SymIntArrayRef, c10::SymInt, at::ScalarType);

template <auto function>
struct AddOf {
  static at::Tensor call(const at::Tensor& input, const OptionalTensor& residual,
                         const OptionalTensor& input_bias, const OptionalTensor& colscale,
                         const OptionalTensor& rowscale, const OptionalTensor& key, double p,
                         double scale, c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset,
                         at::ScalarType dtype) {
    return function({input, tensor_or_none(residual), tensor_or_none(input_bias),
                     tensor_or_none(colscale), tensor_or_none(rowscale), tensor_or_none(key), p,
                     scale, mask_strides, std::move(mask_offset)},
                    dtype);
  }
};

using AddNormSignature = AddNorm(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor&, double, double, c10::SymIntArrayRef,
                                 c10::SymInt, int64_t, const OptionalTensor&, const OptionalTensor&,
                                 double, bool, at::ScalarType, at::ScalarType, bool);

template <auto function>
struct AddNormOf {
  static AddNorm call(const at::Tensor& input, const OptionalTensor& residual,
                      const OptionalTensor& input_bias, const OptionalTensor& colscale,
                      const OptionalTensor& rowscale, const OptionalTensor& key, double p,
                      double scale, c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset,
                      int64_t norm_dims, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps, bool rms, at::ScalarType sum_dtype, at::ScalarType dtype,
                      bool return_sum) {
    return function({input, tensor_or_none(residual), tensor_or_none(input_bias),
                     tensor_or_none(colscale), tensor_or_none(rowscale), tensor_or_none(key), p,
                     scale, mask_strides, std::move(mask_offset), norm_dims, tensor_or_none(weight),
                     tensor_or_none(bias), eps, rms, return_sum},
                    sum_dtype, dtype);
  }
};

using AddNormBackwardSignature = AddNorm(const at::Tensor&, const OptionalTensor&,
                                         const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const OptionalTensor&, const OptionalTensor&, double,
                                         double, c10::SymIntArrayRef, c10::SymInt, int64_t, bool,
                                         std::array<bool, 4>);

template <auto function>
struct AddNormBackwardOf {
  static AddNorm call(const at::Tensor& grad_out, const OptionalTensor& grad_sum,
                      const at::Tensor& sum, const at::Tensor& mean, const at::Tensor& rstd,
                      const OptionalTensor& weight, const OptionalTensor& key, double p,
                      double scale, c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset,
                      int64_t norm_dims, bool rms, std::array<bool, 4> wanted) {
    const RowCall call{.key = tensor_or_none(key),
                       .p = p,
                       .scale = scale,
                       .mask_strides = mask_strides,
                       .mask_offset = std::move(mask_offset),
                       .norm_dims = norm_dims,
                       .weight = tensor_or_none(weight),
                       .rms = rms};
    return function(grad_out, tensor_or_none(grad_sum), sum, mean, rstd, call, wanted);
  }
};

using ActivationSignature = at::Tensor(const at::Tensor&, int64_t, const at::Tensor&, double,
                                       double, c10::SymIntArrayRef, c10::SymInt);

template <auto function>
struct ActivationOf {
  static at::Tensor call(const at::Tensor& input, int64_t activation, const at::Tensor& key,
                         double p, double scale, c10::SymIntArrayRef mask_strides,
                         c10::SymInt mask_offset) {
    return function(input, activation, {key, p, scale, mask_strides, std::move(mask_offset)});
  }
};

using ActivationBackwardSignature = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t,
                                               const at::Tensor&, double, double,
                                               c10::SymIntArrayRef, c10::SymInt);

template <auto function>
struct ActivationBackwardOf {
  static at::Tensor call(const at::Tensor& grad, const at::Tensor& input, int64_t activation,
                         const at::Tensor& key, double p, double scale,
                         c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset) {
    return function(grad, input, activation, {key, p, scale, mask_strides, std::move(mask_offset)});
  }
};

}  // namespace dropout_ext
