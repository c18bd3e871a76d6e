// From tensors to the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "../epilogue/epilogue.h"
#include "ops.h"

namespace dropout_ext {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Dtype dtype_of(const at::Tensor& tensor);

// Of an index modulo 2^64. A SymInt holds integers below -2^62 on the heap, so nothing takes arrays
// of plain ones.
inline uint64_t bits_of(const c10::SymInt& index) {
  return static_cast<uint64_t>(index.expect_int());
}

// at::empty_like, without its two passes through the dispatcher (0.5 us) where that is easy.
at::Tensor new_output(const at::Tensor& input);

// Writes epilogue(in, in2) to `out`. Undefined are `in` for the keep mask, and `in2` for the
// epilogues that have no second input.
void run(const at::Tensor& in, const at::Tensor& in2, const at::Tensor& out, const Call& call,
         Epilogue epilogue, const EpilogueParams& params);

}  // namespace dropout_ext
