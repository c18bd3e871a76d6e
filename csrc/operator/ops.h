// The operators of the library `dropout_ext`, called through the dispatcher. Their schemas stand in
// ops.cpp; the contract in docs/numerics.md.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>

namespace dropout_ext {

// One call of the family, keep ? fma(input, scale, bias) : dropped: all its arguments but the
// input. A view of what the caller owns.
struct Call {
  const at::Tensor& key;
  double p;
  double scale;
  c10::SymIntArrayRef mask_strides;
  c10::SymInt mask_offset;
  std::optional<double> bias = std::nullopt;  // none is -0: keep ? input * scale : dropped
  double dropped = 0;

  bool is_linear() const { return !bias && dropped == 0; }

  at::Tensor apply(const at::Tensor& input) const;
  void apply_(at::Tensor& input) const;
};

at::Tensor keep_mask(const at::Tensor& key, double p, c10::SymIntArrayRef size,
                     c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset, at::Device device);

}  // namespace dropout_ext
