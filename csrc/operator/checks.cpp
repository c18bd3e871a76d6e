#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

namespace dropout_ext {

using at::Tensor;
using c10::SymInt;

void check_probability(double p) {
  // Worded as torch.nn does; NaN fails the comparison too.
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
}

void check_input(const Tensor& input, bool linear) {
  const auto dtype = input.scalar_type();
  const bool real =
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
  const bool complex = dtype == at::kComplexDouble || dtype == at::kComplexFloat;
  TORCH_CHECK_TYPE(real || (complex && linear), "dropout(): argument 'input' has dtype torch.",
                   c10::getDtypeNames(dtype).first, ", but accepted are float64, float32, float16",
                   linear ? ", bfloat16, complex128 and complex64" : " and bfloat16");
  TORCH_CHECK_TYPE(input.layout() == at::kStrided, "dropout(): argument 'input' has layout ",
                   input.layout(), ", but accepted are strided tensors");
}

namespace {

void check_words(const char* function, const Tensor& key) {
  TORCH_CHECK_TYPE(key.layout() == at::kStrided, function, "(): argument 'key' has layout ",
                   key.layout(), ", but accepted are strided tensors");
  const auto dtype = key.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kUInt64 || dtype == at::kLong, function,
                   "(): argument 'key' has dtype torch.", c10::getDtypeNames(dtype).first,
                   ", but accepted are uint64 and int64 (dropout_ext.key makes one)");
}

}  // namespace

void check_key(const Tensor& key, const Tensor& input) {
  check_key(key, input.sym_sizes(), input.device());
}

void check_key(const Tensor& key, c10::SymIntArrayRef sizes, c10::Device device) {
  check_words("dropout", key);
  const auto shape = key.sym_sizes();
  const bool single = shape.size() == 1 && shape[0] == 2;
  const bool batched = shape.size() == 2 && shape[1] == 2 && !sizes.empty() && shape[0] == sizes[0];
  TORCH_CHECK_VALUE(single || batched, "dropout(): argument 'key' has shape ", shape,
                    ", but accepted are (2,) and, for one key per slice of dimension 0, (",
                    sizes.empty() ? SymInt(0) : sizes[0], ", 2)");
  TORCH_CHECK_VALUE(key.device().is_cpu() || key.device() == device,
                    "dropout(): argument 'key' is on ", key.device(),
                    ", but accepted are the CPU and the device of the input, ", device);
}

void check_mask_strides(const Tensor& input, int64_t n_strides) {
  TORCH_CHECK_VALUE(n_strides == 0 || n_strides == input.dim(),
                    "dropout(): argument 'mask_strides' has ", n_strides,
                    " entries, but accepted are one per dimension of the input, ", input.dim(),
                    ", or none for row-major");
}

void check(const Tensor& input, const Call& call) {
  check_probability(call.p);
  check_input(input, call.is_linear());
  if (call.key.defined()) check_key(call.key, input);
  check_mask_strides(input, static_cast<int64_t>(call.mask_strides.size()));
}

void check_writable(const Tensor& input) {
  at::assert_no_internal_overlap(input);
  // As c10::VariableVersion words it, but before anything is written.
  TORCH_CHECK(!input.is_inference() || c10::InferenceMode::is_enabled(),
              "Inplace update to inference tensor outside InferenceMode is not allowed. You can "
              "make a clone to get a normal tensor before doing inplace update.");
  if (at::GradMode::is_enabled()) torch::autograd::check_inplace(input, input.requires_grad());
}

void check_fold_in(const Tensor& key, const SymInt& n) {
  check_words("fold_in", key);
  TORCH_CHECK_VALUE(key.dim() > 0 && key.sym_size(-1) == 2, "fold_in(): argument 'key' has shape ",
                    key.sym_sizes(), ", but accepted are (2,) and, for many keys, (..., 2)");
  TORCH_CHECK_VALUE(n >= 0, "fold_in(): argument 'n' is ", n,
                    ", but accepted are integers from 0 to 2**63 - 1");
}

void check_split(const Tensor& key, const SymInt& n) {
  check_words("split", key);
  TORCH_CHECK_VALUE(key.dim() == 1 && key.sym_size(0) == 2, "split(): argument 'key' has shape ",
                    key.sym_sizes(), ", but accepted is (2,)");
  TORCH_CHECK_VALUE(n >= 0, "split(): argument 'n' is ", n, ", but accepted are integers from 0");
}

}  // namespace dropout_ext
