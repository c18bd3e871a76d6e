// What the operators and the eager entry demand of their arguments. Errors name the argument, its
// value and what is accepted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include "ops.h"

namespace dropout_ext {

void check_probability(double p);
// A tensor that dropout can act on; complex ones only where the call is linear.
void check_input(const at::Tensor& input, bool linear);
// `input` as for apply: what the key's device and, for keys of shape (n, 2), its n must match.
void check_key(const at::Tensor& key, const at::Tensor& input);
// For an input of these sizes that is not there.
void check_key(const at::Tensor& key, c10::SymIntArrayRef sizes, c10::Device device);
// In place: no memory that several elements share, no leaf that requires grad, and no inference
// tensor outside of inference mode.
void check_writable(const at::Tensor& input);
void check_mask_strides(const at::Tensor& input, int64_t n_strides);
// All of these but check_writable. An undefined key is one that is still to be drawn.
void check(const at::Tensor& input, const Call& call);

// Deriving keys: `n` for step, rank or slice; `n` keys.
void check_fold_in(const at::Tensor& key, const c10::SymInt& n);
void check_split(const at::Tensor& key, const c10::SymInt& n);

}  // namespace dropout_ext
