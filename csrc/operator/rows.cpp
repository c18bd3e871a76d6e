#include "rows.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <string>

#include "../cpu/rows.h"
#include "checks.h"
#include "kernels.h"
#include "row_signatures.h"

#ifdef DROPOUT_EXT_WITH_CUDA
#include "../cuda/launcher.h"
#endif

namespace dropout_ext {

using at::ScalarType;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using std::optional;

namespace {

bool is_real(ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

// A copy: torch 2.11 returns strings.
std::string name_of(ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

void check_dtype(const char* function, const char* name, ScalarType dtype, ScalarType input) {
  TORCH_CHECK_TYPE(
      is_real(dtype) && (dtype == at::kDouble) == (input == at::kDouble), function,
      "(): argument '", name, "' has dtype torch.", name_of(dtype), ", but accepted ",
      input == at::kDouble
          ? "is float64 beside a float64 input"
          : "are float32, float16 and bfloat16 beside an input that is none of float64");
}

// `tensor`, if it is defined, has these sizes and lies where the input does.
void check_beside(const char* function, const char* name, const Tensor& tensor, const Tensor& input,
                  SymIntArrayRef sizes) {
  if (!tensor.defined()) return;
  TORCH_CHECK_VALUE(tensor.device() == input.device(), function, "(): argument '", name, "' is on ",
                    tensor.device(), ", but accepted is the device of the input, ", input.device());
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, function, "(): argument '", name,
                   "' has layout ", tensor.layout(), ", but accepted are strided tensors");
  TORCH_CHECK_VALUE(tensor.sym_sizes() == sizes, function, "(): argument '", name, "' has shape ",
                    tensor.sym_sizes(), ", but accepted is ", sizes);
  check_dtype(function, name, tensor.scalar_type(), input.scalar_type());
}

// Of the compute type, one row.
Tensor row_of(const Tensor& tensor, ScalarType compute, at::IntArrayRef sizes) {
  if (!tensor.defined()) return tensor;
  if (tensor.scalar_type() == compute && tensor.sizes() == sizes && tensor.is_contiguous()) {
    return tensor;
  }
  return tensor.to(compute).expand(sizes).contiguous();
}

const void* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* mutable_data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// `dims` dimensions from `first` on of a tensor, in the mask: neighbours that are one run are one.
int add_extents(RowMask& mask, int at, at::IntArrayRef sizes, const std::vector<uint64_t>& strides,
                size_t first, size_t last) {
  const int begin = at;
  for (size_t d = first; d < last; ++d) {
    if (sizes[d] == 1) continue;
    if (at > begin &&
        mask.dims[at - 1].mask_stride == strides[d] * static_cast<uint64_t>(sizes[d])) {
      mask.dims[at - 1] = {mask.dims[at - 1].size * sizes[d], strides[d]};
    } else {
      mask.dims[at++] = {sizes[d], strides[d]};
    }
  }
  if (at == begin) mask.dims[at++] = {1, 1};
  return at - begin;
}

// But for the keys. `drops`: whether there is one.
RowMask row_mask(const RowCall& call, bool drops, at::IntArrayRef sizes, int64_t row_dims) {
  TORCH_CHECK_VALUE(sizes.size() <= kMaxDims, "dropout(): argument 'input' has ", sizes.size(),
                    " dimensions, but at most ", kMaxDims, " are accepted");
  RowMask mask;
  mask.keys = nullptr;
  mask.key = {0, 0};
  mask.rows_per_slice = 1;
  mask.threshold = drops ? static_cast<uint32_t>(threshold(call.p)) : 0;
  mask.mask_offset = bits_of(call.mask_offset);
  std::vector<uint64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 0;) {
    if (!call.mask_strides.empty()) {
      strides[d] = bits_of(call.mask_strides[d]);
    } else if (d + 1 < sizes.size()) {
      strides[d] = strides[d + 1] * static_cast<uint64_t>(sizes[d + 1]);
    }
  }
  mask.row_dims = add_extents(mask, 0, sizes, strides, 0, row_dims);
  mask.column_dims = add_extents(mask, mask.row_dims, sizes, strides, row_dims, sizes.size());
  if (drops && call.key.dim() == 2) {
    for (int64_t d = 1; d < row_dims; ++d) mask.rows_per_slice *= sizes[d];
  }
  return mask;
}

// `words` holds the keys as long as the mask is used.
void set_keys(RowMask& mask, const Tensor& words) {
  if (!words.defined()) return;
  const auto* keys = static_cast<const Key*>(words.const_data_ptr());
  if (words.dim() == 2) {
    mask.keys = keys;
  } else {
    mask.key = keys[0];
  }
}

#ifdef DROPOUT_EXT_WITH_CUDA
// The decisions that the CUDA kernels of rows do not compute; undefined where they compute them
// all.
Tensor store_decisions(RowMask& mask, const RowCall& call, const Tensor& like) {
  if (mask.keeps_all() || mask.is_run()) return {};
  const Tensor stored = at::empty(like.sizes(), like.options().dtype(at::kBool));
  run({}, {}, stored, call.dropout(), Epilogue::kKeepMask, {});
  mask.stored = static_cast<const bool*>(stored.const_data_ptr());
  return stored;
}
#endif

// A key for every slice of dimension 0, but where that one is a part of the row.
bool cuts_rows(const Tensor& key, int64_t row_dims) {
  return key.defined() && key.dim() == 2 && row_dims == 0;
}

struct Sizes {
  int64_t rows, columns, row_dims;

  Sizes(const Tensor& tensor, int64_t norm_dims) {
    // Without a norm, the last dimension is a row.
    row_dims = tensor.dim() - (norm_dims > 0 ? norm_dims : std::min<int64_t>(tensor.dim(), 1));
    columns = c10::multiply_integers(tensor.sizes().slice(row_dims));
    rows = c10::multiply_integers(tensor.sizes().slice(0, row_dims));
  }
};

int64_t grain_of(int64_t columns) { return std::max<int64_t>(1, 32768 / columns); }

// t and the sum of row_args.h, and the norm if there are `out`, `rstd` and perhaps `mean`.
void run_rows(const RowCall& call, const Tensor& sum, const Tensor& out, const Tensor& mean,
              const Tensor& rstd) {
  const Sizes sizes(call.input, call.norm_dims);
  const ScalarType compute = compute_type(sum.scalar_type());
  const at::IntArrayRef row = call.input.sizes().slice(sizes.row_dims);
  const Tensor input = call.input.contiguous();
  const Tensor residual =
      call.residual.defined() ? call.residual.to(sum.scalar_type()).contiguous() : Tensor();
  const Tensor input_bias = row_of(call.input_bias, compute, row);
  const Tensor colscale = row_of(call.colscale, compute, row);
  const Tensor rowscale =
      call.rowscale.defined() ? call.rowscale.to(compute).contiguous() : Tensor();
  const Tensor weight = row_of(call.weight, compute, row);
  const Tensor bias = row_of(call.bias, compute, row);
  const Tensor words = call.key.defined() ? call.key.contiguous() : Tensor();
  RowArgs args{};
  args.rows = sizes.rows;
  args.columns = sizes.columns;
  args.mask = row_mask(call, words.defined(), call.input.sizes(), sizes.row_dims);
  args.scale = call.key.defined() ? call.scale : 1;
  args.input = data(input);
  args.input_dtype = dtype_of(input);
  args.input_stride = sizes.columns;
  args.residual = data(residual);
  args.residual_stride = residual.defined() ? sizes.columns : 0;
  args.input_bias = data(input_bias);
  args.colscale = data(colscale);
  args.rowscale = data(rowscale);
  args.sum = sum.numel() == 0 ? nullptr : sum.mutable_data_ptr();
  args.sum_dtype = dtype_of(sum);
  args.norm = !out.defined() ? Norm::kNone : call.rms ? Norm::kRms : Norm::kLayer;
  args.eps = call.eps;
  args.weight = data(weight);
  args.bias = data(bias);
  args.out = mutable_data(out);
  args.out_dtype = out.defined() ? dtype_of(out) : args.input_dtype;
  args.mean = mutable_data(mean);
  args.rstd = mutable_data(rstd);
#ifdef DROPOUT_EXT_WITH_CUDA
  if (sum.is_cuda()) {
    const Tensor stored = store_decisions(args.mask, call, sum);
    return cuda::add_norm(args, words, sum.device());
  }
#endif
  set_keys(args.mask, words);
  const cpu::Rows rows(args);
  at::parallel_for(0, args.rows, grain_of(args.columns),
                   [&](int64_t begin, int64_t end) { rows.run(begin, end); });
}

// Whether the epilogue of one pass over any layout will do, which needs one dtype and no scales.
bool is_plain_add(const RowCall& call, ScalarType dtype) {
  return call.residual.defined() && !call.has_scales() && dtype == call.input.scalar_type() &&
         dtype == call.residual.scalar_type();
}

// The thresholds of the kernels have 32 bits: where nothing is kept, they see zeros.
RowCall of_zeros(RowCall call) {
  call.input = at::zeros_like(call.input);
  call.input_bias = call.colscale = call.rowscale = call.key = Tensor();
  return call;
}

Tensor add_kernel(const RowCall& call, ScalarType dtype) {
  check_rows(call, /*norm=*/false, dtype, call.input.scalar_type());
  if (call.keeps_nothing()) return add_kernel(of_zeros(call), dtype);
  if (!call.key.defined() && !call.has_scales()) {
    // As the kernels: in the compute type, rounded once.
    if (!call.residual.defined()) return call.input.to(dtype, false, /*copy=*/true);
    return at::add(call.input, call.residual).to(dtype);
  }
  if (is_plain_add(call, dtype)) {
    Tensor out = new_output(call.input);
    run(call.input, call.residual, out, call.dropout(), Epilogue::kAdd, {call.scale});
    return out;
  }
  Tensor out = at::empty(call.input.sizes(), call.input.options().dtype(dtype));
  if (out.numel() > 0) run_rows(call, out, {}, {}, {});
  return out;
}

AddNorm add_norm_kernel(const RowCall& call, ScalarType sum_dtype, ScalarType dtype) {
  check_rows(call, /*norm=*/true, sum_dtype, dtype);
  if (call.keeps_nothing()) return add_norm_kernel(of_zeros(call), sum_dtype, dtype);
  const Tensor& input = call.input;
  const auto sizes = input.sizes();
  const auto row_sizes = sizes.slice(0, input.dim() - call.norm_dims);
  const ScalarType compute = compute_type(sum_dtype);
  // On the CPU past the dispatcher, which takes 0.4 us each time.
  const auto empty = [&input](at::IntArrayRef shape, ScalarType type) {
    return input.is_cpu() ? at::detail::empty_cpu(shape, type)
                          : at::empty(shape, input.options().dtype(type));
  };
  // The CUDA kernels read it again where a row is too long to be held, and where input and output
  // have different dtypes.
  const bool stored = call.return_sum || input.is_cuda();
  const Tensor sum = empty(stored ? sizes : at::IntArrayRef{0}, sum_dtype);
  Tensor out = empty(sizes, dtype);
  Tensor mean = empty(call.rms ? at::IntArrayRef{0} : row_sizes, compute);
  Tensor rstd = empty(row_sizes, compute);
  if (out.numel() > 0) {
    run_rows(call, sum, out, call.rms ? Tensor() : mean, rstd);
  } else {
    mean.zero_();
    rstd.fill_(1 / std::sqrt(call.eps));
  }
  return {out, stored == call.return_sum ? sum : sum.new_empty({0}), mean, rstd};
}

void check_backward(const Tensor& grad_out, const Tensor& grad_sum, const Tensor& sum,
                    const Tensor& mean, const Tensor& rstd, const RowCall& call) {
  constexpr char kName[] = "add_norm_backward";
  check_probability(call.p);
  check_input(sum, /*linear=*/false);
  if (call.key.defined()) check_key(call.key, sum);
  check_mask_strides(sum, static_cast<int64_t>(call.mask_strides.size()));
  const auto sizes = sum.sym_sizes();
  TORCH_CHECK_VALUE(call.norm_dims > 0 && call.norm_dims <= sum.dim(), kName,
                    "(): argument 'norm_dims' is ", call.norm_dims, ", but accepted are 1 to ",
                    sum.dim());
  const int64_t row_dims = sum.dim() - call.norm_dims;
  check_beside(kName, "grad_out", grad_out, sum, sizes);
  check_beside(kName, "grad_sum", grad_sum, sum, sizes);
  check_beside(kName, "weight", call.weight, sum, sizes.slice(row_dims));
  check_beside(kName, "rstd", rstd, sum, sizes.slice(0, row_dims));
  if (!call.rms) check_beside(kName, "mean", mean, sum, sizes.slice(0, row_dims));
  TORCH_CHECK_VALUE(!cuts_rows(call.key, row_dims), kName, "(): argument 'key' has shape ",
                    call.key.sym_sizes(),
                    ", but accepted is (2,) where dimension 0 is part of a row");
}

AddNorm add_norm_backward_kernel(const Tensor& grad_out, const Tensor& grad_sum_in,
                                 const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                                 const RowCall& call, std::array<bool, 4> wanted) {
  const ScalarType compute = compute_type(sum.scalar_type());
  check_backward(grad_out, grad_sum_in, sum, mean, rstd, call);
  TORCH_CHECK_TYPE(row_pair(dtype_of(grad_out), dtype_of(sum)) >= 0 &&
                       rstd.scalar_type() == compute && mean.scalar_type() == compute &&
                       (!grad_sum_in.defined() || grad_sum_in.scalar_type() == sum.scalar_type()),
                   "add_norm_backward(): arguments have dtypes that do not fit each other");
  const auto options = sum.options();
  const auto row = sum.sizes().slice(sum.dim() - call.norm_dims);
  const auto output = [&](bool is_wanted, at::IntArrayRef sizes, ScalarType dtype) {
    return at::empty(is_wanted ? sizes : at::IntArrayRef{0}, options.dtype(dtype));
  };
  Tensor grad_sum = output(wanted[0], sum.sizes(), sum.scalar_type());
  Tensor grad_input = output(wanted[1], sum.sizes(), grad_out.scalar_type());
  Tensor grad_weight = output(wanted[2], row, compute);
  Tensor grad_bias = output(wanted[3], row, compute);
  if (sum.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
    return {grad_sum, grad_input, grad_weight, grad_bias};
  }
  const bool nothing_kept = call.keeps_nothing();
  if (nothing_kept) grad_input.zero_();
  const Sizes sizes(sum, call.norm_dims);
  const Tensor dense_out = grad_out.contiguous(), dense_sum = sum.contiguous();
  const Tensor dense_in = grad_sum_in.defined() ? grad_sum_in.contiguous() : Tensor();
  const Tensor dense_mean = mean.contiguous(), dense_rstd = rstd.contiguous();
  const Tensor row_weight = row_of(call.weight, compute, row);
  const Tensor words = call.key.defined() && !nothing_kept ? call.key.contiguous() : Tensor();
  RowBackwardArgs args{};
  args.rows = sizes.rows;
  args.columns = sizes.columns;
  args.mask = row_mask(call, words.defined(), sum.sizes(), sizes.row_dims);
  args.scale = call.key.defined() ? call.scale : 1;
  args.norm = call.rms ? Norm::kRms : Norm::kLayer;
  args.dtype = dtype_of(grad_out);
  args.grad_out = data(dense_out);
  args.grad_sum_in = data(dense_in);
  args.sum = data(dense_sum);
  args.sum_dtype = dtype_of(sum);
  args.mean = call.rms ? nullptr : data(dense_mean);
  args.rstd = data(dense_rstd);
  args.weight = data(row_weight);
  args.grad_sum = wanted[0] ? mutable_data(grad_sum) : nullptr;
  args.grad_input = wanted[1] && !nothing_kept ? mutable_data(grad_input) : nullptr;
  args.grad_weight = wanted[2] ? mutable_data(grad_weight) : nullptr;
  args.grad_bias = wanted[3] ? mutable_data(grad_bias) : nullptr;
#ifdef DROPOUT_EXT_WITH_CUDA
  if (sum.is_cuda()) {
    const Tensor stored = store_decisions(args.mask, call, sum);
    cuda::add_norm_backward(args, words, sum.device());
    return {grad_sum, grad_input, grad_weight, grad_bias};
  }
#endif
  set_keys(args.mask, words);
  cpu::RowsBackward rows(args);
  at::parallel_for(0, rows.chunks(), 1, [&](int64_t begin, int64_t end) { rows.run(begin, end); });
  rows.finish();
  return {grad_sum, grad_input, grad_weight, grad_bias};
}

EpilogueParams activation_params(int64_t function, const Call& call) {
  TORCH_CHECK_VALUE(function >= 0 && function < kActivations,
                    "activation_dropout(): argument 'function' is ", function,
                    ", but accepted are 0 to ", kActivations - 1);
  EpilogueParams params;
  params.scale = call.scale;
  params.activation = static_cast<Activation>(function);
  return params;
}

void check_activation_input(const Tensor& input) {
  TORCH_CHECK_TYPE(is_real(input.scalar_type()) && input.scalar_type() != at::kDouble,
                   "activation_dropout(): argument 'input' has dtype torch.",
                   name_of(input.scalar_type()),
                   ", but accepted are float32, float16 and bfloat16");
}

Tensor activation_kernel(const Tensor& input, int64_t function, const Call& call) {
  check(input, call);
  check_activation_input(input);
  Tensor out = new_output(input);
  run(input, {}, out, call, Epilogue::kActivation, activation_params(function, call));
  return out;
}

Tensor activation_backward_kernel(const Tensor& grad, const Tensor& input, int64_t function,
                                  const Call& call) {
  check(input, call);
  check_activation_input(input);
  check_beside("activation_backward", "grad", grad, input, input.sym_sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == input.scalar_type(),
                   "activation_backward(): argument 'grad' has dtype torch.",
                   name_of(grad.scalar_type()), ", but accepted is torch.",
                   name_of(input.scalar_type()));
  Tensor out = new_output(input);
  run(grad, input, out, call, Epilogue::kActivationBackward, activation_params(function, call));
  return out;
}

}  // namespace

void check_rows(const RowCall& call, bool norm, ScalarType sum_dtype, ScalarType dtype) {
  const char* function = !norm      ? "dropout_add"
                         : call.rms ? "dropout_add_rms_norm"
                                    : "dropout_add_layer_norm";
  const char* sum_name = norm ? "sum_dtype" : "dtype";
  const Tensor& input = call.input;
  check_probability(call.p);
  check_input(input, /*linear=*/false);
  if (call.key.defined()) check_key(call.key, input);
  check_mask_strides(input, static_cast<int64_t>(call.mask_strides.size()));
  const ScalarType from = input.scalar_type();
  check_dtype(function, sum_name, sum_dtype, from);
  check_dtype(function, "dtype", dtype, from);
  const auto sizes = input.sym_sizes();
  check_beside(function, "residual", call.residual, input, sizes);
  // Rounded once: a residual is never narrowed before it is added.
  TORCH_CHECK_TYPE(!call.residual.defined() || sum_dtype == call.residual.scalar_type() ||
                       sum_dtype == at::kFloat,
                   function, "(): argument '", sum_name, "' is torch.", name_of(sum_dtype),
                   ", but accepted beside a residual of torch.",
                   name_of(call.residual.scalar_type()), " are that and float32");
  const auto last = sizes.slice(std::max<int64_t>(input.dim(), 1) - 1);
  check_beside(function, "input_bias", call.input_bias, input, last);
  check_beside(function, "colscale", call.colscale, input, last);
  TORCH_CHECK_VALUE(call.norm_dims >= norm && call.norm_dims <= input.dim(), function,
                    "(): argument 'norm_dims' is ", call.norm_dims, ", but accepted are 1 to ",
                    input.dim());
  const int64_t row_dims = input.dim() - call.norm_dims;
  const int64_t scale_dims = call.norm_dims > 0 ? row_dims : std::max<int64_t>(input.dim(), 1) - 1;
  check_beside(function, "rowscale", call.rowscale, input, sizes.slice(0, scale_dims));
  check_beside(function, "weight", call.weight, input, sizes.slice(row_dims));
  check_beside(function, "bias", call.bias, input, sizes.slice(row_dims));
  TORCH_CHECK_VALUE(!cuts_rows(call.key, call.norm_dims > 0 ? row_dims : scale_dims), function,
                    "(): argument 'key' has shape ", call.key.sym_sizes(),
                    ", but accepted is (2,) where dimension 0 is part of a row");
  const auto pair = [&](ScalarType type) {
    return type == sum_dtype || type == at::kFloat || sum_dtype == at::kFloat;
  };
  TORCH_CHECK_TYPE(pair(from) && pair(dtype), function, "(): argument '",
                   pair(from) ? "dtype" : sum_name, "' is torch.",
                   name_of(pair(from) ? dtype : sum_dtype),
                   ", but float16 and bfloat16 together "
                   "are not accepted");
}

bool RowCall::keeps_nothing() const {
  return key.defined() && dropout_ext::keeps_nothing(threshold(p));
}

Tensor add(const RowCall& call, ScalarType dtype) {
  static const auto op = find<AddSignature>("dropout_ext::add");
  return op.call(call.input, maybe(call.residual), maybe(call.input_bias), maybe(call.colscale),
                 maybe(call.rowscale), maybe(call.key), call.p, call.scale, call.mask_strides,
                 call.mask_offset, dtype);
}

AddNorm add_norm(const RowCall& call, ScalarType sum_dtype, ScalarType dtype) {
  static const auto op = find<AddNormSignature>("dropout_ext::add_norm");
  return op.call(call.input, maybe(call.residual), maybe(call.input_bias), maybe(call.colscale),
                 maybe(call.rowscale), maybe(call.key), call.p, call.scale, call.mask_strides,
                 call.mask_offset, call.norm_dims, maybe(call.weight), maybe(call.bias), call.eps,
                 call.rms, sum_dtype, dtype, call.return_sum);
}

AddNorm add_norm_backward(const Tensor& grad_out, const Tensor& grad_sum, const Tensor& sum,
                          const Tensor& mean, const Tensor& rstd, const RowCall& call,
                          std::array<bool, 4> wanted) {
  static const auto op = find<AddNormBackwardSignature>("dropout_ext::add_norm_backward");
  return op.call(grad_out, maybe(grad_sum), sum, mean, rstd, maybe(call.weight), maybe(call.key),
                 call.p, call.scale, call.mask_strides, call.mask_offset, call.norm_dims, call.rms,
                 wanted);
}

Tensor activation(const Tensor& input, int64_t function, const Call& call) {
  static const auto op = find<ActivationSignature>("dropout_ext::activation");
  return op.call(input, function, call.key, call.p, call.scale, call.mask_strides,
                 call.mask_offset);
}

Tensor activation_backward(const Tensor& grad, const Tensor& input, int64_t function,
                           const Call& call) {
  static const auto op = find<ActivationBackwardSignature>("dropout_ext::activation_backward");
  return op.call(grad, input, function, call.key, call.p, call.scale, call.mask_strides,
                 call.mask_offset);
}

TORCH_LIBRARY_FRAGMENT(dropout_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define DROPOUT_EXT_ROWS                                                                     \
  "Tensor input, Tensor? residual, Tensor? input_bias, Tensor? colscale, Tensor? rowscale, " \
  "Tensor? key, float p, float scale, SymInt[] mask_strides, SymInt mask_offset, "
  m.def("add(" DROPOUT_EXT_ROWS "ScalarType dtype) -> Tensor", tags);
  m.def("add_norm(" DROPOUT_EXT_ROWS
        "int norm_dims, Tensor? weight, Tensor? bias, float eps, bool rms, ScalarType sum_dtype, "
        "ScalarType dtype, bool return_sum) -> "
        "(Tensor out, Tensor sum, Tensor mean, Tensor rstd)",
        tags);
#undef DROPOUT_EXT_ROWS
  m.def(
      "add_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, "
      "Tensor? weight, Tensor? key, float p, float scale, SymInt[] mask_strides, "
      "SymInt mask_offset, int norm_dims, bool rms, bool[4] wanted) -> "
      "(Tensor grad_sum, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
  m.def(
      "activation(Tensor input, int function, Tensor key, float p, float scale, "
      "SymInt[] mask_strides, SymInt mask_offset) -> Tensor",
      tags);
  m.def(
      "activation_backward(Tensor grad, Tensor input, int function, Tensor key, float p, "
      "float scale, SymInt[] mask_strides, SymInt mask_offset) -> Tensor",
      tags);
}

static void register_kernels(torch::Library& m) {
  m.impl("add", AddOf<add_kernel>::call);
  m.impl("add_norm", AddNormOf<add_norm_kernel>::call);
  m.impl("add_norm_backward", AddNormBackwardOf<add_norm_backward_kernel>::call);
  m.impl("activation", ActivationOf<activation_kernel>::call);
  m.impl("activation_backward", ActivationBackwardOf<activation_backward_kernel>::call);
}

TORCH_LIBRARY_IMPL(dropout_ext, CPU, m) { register_kernels(m); }
#ifdef DROPOUT_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(dropout_ext, CUDA, m) { register_kernels(m); }
#endif

}  // namespace dropout_ext
