// The operators of the library `dropout_ext`, called through the dispatcher. Their schemas stand in
// ops.cpp; the contract in docs/numerics.md.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>

namespace dropout_ext {

// keep ? fma(x, scale, bias) : dropped, where it would be keep ? x * scale : 0.
struct Affine {
  double bias;
  double dropped;
};

// One call of the family: all its arguments but the input. A view of what the caller owns.
struct Call {
  const at::Tensor& key;
  double p;
  double scale;
  c10::SymIntArrayRef mask_strides;
  c10::SymInt mask_offset;
  std::optional<Affine> affine = std::nullopt;

  at::Tensor apply(const at::Tensor& input) const;  // apply or apply_affine
  void apply_(at::Tensor& input) const;             // apply_ or apply_affine_
};

at::Tensor keep_mask(const at::Tensor& key, double p, c10::SymIntArrayRef size,
                     c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset, at::Device device);

}  // namespace dropout_ext
