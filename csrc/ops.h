// The operators of the library `dropout_ext`, called through the dispatcher. Their schemas stand in
// ops.cpp; the contract in docs/numerics.md.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

namespace dropout_ext {

at::Tensor apply(const at::Tensor& input, const at::Tensor& key, double p, double scale,
                 c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset);
void apply_(at::Tensor& input, const at::Tensor& key, double p, double scale,
            c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset);
at::Tensor apply_affine(const at::Tensor& input, const at::Tensor& key, double p, double scale,
                        double bias, double dropped, c10::SymIntArrayRef mask_strides,
                        c10::SymInt mask_offset);
void apply_affine_(at::Tensor& input, const at::Tensor& key, double p, double scale, double bias,
                   double dropped, c10::SymIntArrayRef mask_strides, c10::SymInt mask_offset);

// Errors name the argument, its value and what is accepted.
void check_probability(double p);
// A tensor that dropout can act on; `affine` operators take no complex ones.
void check_input(const at::Tensor& input, bool affine);
// `input` as for apply: what the key's device and, for keys of shape (n, 2), its n must match.
void check_key(const at::Tensor& key, const at::Tensor& input);
// In place: neither overlapping itself nor a leaf that requires grad.
void check_writable(const at::Tensor& input);
void check_mask_strides(const at::Tensor& input, int64_t n_strides);

}  // namespace dropout_ext
