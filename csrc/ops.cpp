#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "apply_args.h"
#include "cpu/plan.h"

#ifdef DROPOUT_EXT_WITH_CUDA
#include "cuda/launcher.h"
#endif

namespace dropout_ext {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

void check_probability(double p) {
  // Worded as torch.nn does; NaN fails the comparison too.
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
}

void check_input(const Tensor& input, bool affine) {
  const auto dtype = input.scalar_type();
  const bool real =
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
  const bool complex = dtype == at::kComplexDouble || dtype == at::kComplexFloat;
  TORCH_CHECK_TYPE(real || (complex && !affine), "dropout(): argument 'input' has dtype torch.",
                   c10::getDtypeNames(dtype).first, ", but accepted are float64, float32, float16",
                   affine ? " and bfloat16" : ", bfloat16, complex128 and complex64");
  TORCH_CHECK_TYPE(input.layout() == at::kStrided, "dropout(): argument 'input' has layout ",
                   input.layout(), ", but accepted are strided tensors");
}

void check_key(const Tensor& key, const Tensor& input) {
  const auto dtype = key.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kUInt64 || dtype == at::kLong,
                   "dropout(): argument 'key' has dtype torch.", c10::getDtypeNames(dtype).first,
                   ", but accepted are uint64 and int64 (dropout_ext.key makes one)");
  const auto sizes = key.sym_sizes();
  const bool single = sizes.size() == 1 && sizes[0] == 2;
  const bool batched =
      sizes.size() == 2 && sizes[1] == 2 && input.dim() > 0 && sizes[0] == input.sym_size(0);
  TORCH_CHECK_VALUE(single || batched, "dropout(): argument 'key' has shape ", sizes,
                    ", but accepted are (2,) and, for one key per slice of dimension 0, (",
                    input.dim() > 0 ? input.sym_size(0) : SymInt(0), ", 2)");
  TORCH_CHECK_VALUE(key.device().is_cpu() || key.device() == input.device(),
                    "dropout(): argument 'key' is on ", key.device(),
                    ", but accepted are the CPU and the device of the input, ", input.device());
}

void check_mask_strides(const Tensor& input, int64_t n_strides) {
  TORCH_CHECK_VALUE(n_strides == 0 || n_strides == input.dim(),
                    "dropout(): argument 'mask_strides' has ", n_strides,
                    " entries, but accepted are one per dimension of the input, ", input.dim(),
                    ", or none for row-major");
}

void check_writable(const Tensor& input) {
  at::assert_no_internal_overlap(input);
  if (at::GradMode::is_enabled()) torch::autograd::check_inplace(input, input.requires_grad());
}

namespace {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kComplexDouble: return Dtype::kComplex128;
    case at::kComplexFloat: return Dtype::kComplex64;
    case at::kBool: return Dtype::kBool;
    default: TORCH_INTERNAL_ASSERT(false);
  }
}

// `in` is undefined for the keep mask.
void set_map(ApplyArgs& args, const Tensor& in, const Tensor& out, bool batched,
             at::IntArrayRef mask_strides, uint64_t mask_offset) {
  IndexMap& map = args.map;
  map.mask_offset = mask_offset;
  if (!batched && mask_strides.empty() && out.is_contiguous() &&
      (!in.defined() || in.is_contiguous())) {
    map.ndim = 1;
    map.dims[0] = {out.numel(), 1, 1, 1};
    return;
  }
  const int64_t ndim = out.dim();
  TORCH_CHECK_VALUE(ndim <= kMaxDims, "dropout(): argument 'input' has ", ndim,
                    " dimensions, but at most ", kMaxDims, " are accepted");
  uint64_t row_major = 1;
  map.ndim = static_cast<int>(ndim);
  for (int64_t d = ndim - 1; d >= 0; --d) {
    map.dims[d] = {out.size(d), in.defined() ? in.stride(d) : out.stride(d), out.stride(d),
                   mask_strides.empty() ? row_major : static_cast<uint64_t>(mask_strides[d])};
    row_major *= static_cast<uint64_t>(out.size(d));
  }
  if (batched) {
    const Dim slice = map.dims[0];
    args.slices = slice.size;
    args.slice_in_stride = slice.in_stride;
    args.slice_out_stride = slice.out_stride;
    args.slice_mask_stride = slice.mask_stride;
    std::copy(map.dims + 1, map.dims + ndim, map.dims);
    --map.ndim;
  }
  normalize(map);
}

void run_cpu(const ApplyArgs& args, const Tensor& key) {
  static_assert(sizeof(Key) == 2 * sizeof(uint64_t));
  const Tensor words = key.contiguous();
  const cpu::Plan plan(args, static_cast<const Key*>(words.const_data_ptr()));
  // Below 32 Ki elements (some 10 us) a second thread costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 32768 / plan.unit_elements());
  if (plan.units() <= grain) return plan.run(0, plan.units());
  at::parallel_for(0, plan.units(), grain,
                   [&plan](int64_t begin, int64_t end) { plan.run(begin, end); });
}

#ifndef DROPOUT_EXT_WITH_CUDA
[[noreturn]] void fail_without_cuda() {
  TORCH_CHECK_VALUE(false,
                    "dropout(): got a CUDA tensor, but dropout_ext was built without CUDA: install "
                    "a torch with CUDA and the CUDA toolkit, then build again with "
                    "DROPOUT_EXT_CUDA=1 pip install --no-build-isolation --force-reinstall .");
}
void cuda_kernel_missing(const c10::OperatorHandle&, torch::jit::Stack*) { fail_without_cuda(); }
#endif

void run(const Tensor& in, const Tensor& out, const Tensor& key, double p, Epilogue epilogue,
         const EpilogueParams& params, at::IntArrayRef mask_strides, int64_t mask_offset) {
  if (out.numel() == 0) return;
  ApplyArgs args;
  args.in = in.defined() ? in.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.dtype = dtype_of(out);
  args.epilogue = epilogue;
  args.params = params;
  args.threshold = threshold(p);
  set_map(args, in, out, key.dim() == 2, mask_strides, static_cast<uint64_t>(mask_offset));
#ifdef DROPOUT_EXT_WITH_CUDA
  if (out.is_cuda()) return cuda::apply(args, key.contiguous(), out.device());
#else
  if (out.is_cuda()) fail_without_cuda();
#endif
  run_cpu(args, key);
}

// at::empty_like, without its two passes through the dispatcher (0.5 us) where that is easy.
Tensor new_output(const Tensor& input) {
  if (input.is_cpu() && input.is_non_overlapping_and_dense()) {
    return at::detail::empty_strided_cpu(input.sizes(), input.strides(), input.scalar_type());
  }
  return at::empty_like(input);
}

void check(const Tensor& input, const Tensor& key, double p, at::IntArrayRef mask_strides,
           bool affine) {
  check_probability(p);
  check_input(input, affine);
  check_key(key, input);
  check_mask_strides(input, static_cast<int64_t>(mask_strides.size()));
}

// Kernels, for the CPU and for CUDA alike.

Tensor apply_kernel(const Tensor& input, const Tensor& key, double p, double scale,
                    at::IntArrayRef mask_strides, int64_t mask_offset) {
  check(input, key, p, mask_strides, false);
  const Tensor out = new_output(input);
  run(input, out, key, p, Epilogue::kScale, {.scale = scale}, mask_strides, mask_offset);
  return out;
}

void apply_kernel_(Tensor& input, const Tensor& key, double p, double scale,
                   at::IntArrayRef mask_strides, int64_t mask_offset) {
  check(input, key, p, mask_strides, false);
  at::assert_no_internal_overlap(input);
  run(input, input, key, p, Epilogue::kScale, {.scale = scale}, mask_strides, mask_offset);
}

Tensor apply_affine_kernel(const Tensor& input, const Tensor& key, double p, double scale,
                           double bias, double dropped, at::IntArrayRef mask_strides,
                           int64_t mask_offset) {
  check(input, key, p, mask_strides, true);
  const Tensor out = new_output(input);
  run(input, out, key, p, Epilogue::kAffine, {scale, bias, dropped}, mask_strides, mask_offset);
  return out;
}

void apply_affine_kernel_(Tensor& input, const Tensor& key, double p, double scale, double bias,
                          double dropped, at::IntArrayRef mask_strides, int64_t mask_offset) {
  check(input, key, p, mask_strides, true);
  at::assert_no_internal_overlap(input);
  run(input, input, key, p, Epilogue::kAffine, {scale, bias, dropped}, mask_strides, mask_offset);
}

Tensor keep_mask_kernel(const Tensor& key, double p, at::IntArrayRef size,
                        at::IntArrayRef mask_strides, int64_t mask_offset,
                        std::optional<at::Device> device) {
  const at::Device to = device.value_or(key.device());
  const auto bools = at::TensorOptions().dtype(at::kBool);
  const bool ours = to.is_cpu() || to.is_cuda();
  // A device without a kernel gets the CPU's mask.
  Tensor out = at::empty(size, bools.device(ours ? to : at::Device(at::kCPU)));
  check_probability(p);
  check_key(key, out);
  check_mask_strides(out, static_cast<int64_t>(mask_strides.size()));
  run({}, out, key, p, Epilogue::kKeepMask, {}, mask_strides, mask_offset);
  return ours ? out : out.to(to);
}

// Deriving keys, on the CPU. Other devices run the reference.

// keys: shape (..., 2).
Tensor fold_in_kernel(const Tensor& key, int64_t n) {
  Tensor out = at::empty_like(key, at::MemoryFormat::Contiguous);
  auto* to = static_cast<Key*>(out.mutable_data_ptr());
  const Tensor words = key.contiguous();
  const auto* from = static_cast<const Key*>(words.const_data_ptr());
  for (int64_t j = 0; j < words.numel() / 2; ++j)
    to[j] = fold_in(from[j], static_cast<uint64_t>(n));
  return out;
}

Tensor split_kernel(const Tensor& key, int64_t n) {
  Tensor out = at::empty({n, 2}, key.options());
  auto* to = static_cast<Key*>(out.mutable_data_ptr());
  const Tensor words = key.contiguous();
  const Key from = *static_cast<const Key*>(words.const_data_ptr());
  for (int64_t j = 0; j < n; ++j) to[j] = fold_in(from, static_cast<uint64_t>(j));
  return out;
}

// Autograd. The operator is linear in its input, so its backward is itself applied to the gradient:
// only the key is saved, and double backward needs nothing more.

// functorch rejects a C++ Function, and forward mode would silently lose the tangent in one: where
// either is at work, differentiable operators are composed instead.
bool needs_composition(const Tensor& input) {
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         input._fw_grad(/*level=*/0).defined();
}

std::vector<SymInt> row_major(SymIntArrayRef sizes) {
  std::vector<SymInt> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

Tensor composed_mask(const Tensor& input, const Tensor& key, double p, SymIntArrayRef mask_strides,
                     SymInt mask_offset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dropout_ext::keep_mask", "")
                             .typed<Tensor(const Tensor&, double, SymIntArrayRef, SymIntArrayRef,
                                           SymInt, std::optional<at::Device>)>();
  const auto sizes = input.sym_sizes();
  if (!mask_strides.empty()) {
    return op.call(key, p, sizes, mask_strides, std::move(mask_offset), input.device());
  }
  const auto strides = row_major(sizes);
  return op.call(key, p, sizes, strides, std::move(mask_offset), input.device());
}

struct Arguments {
  Tensor key;
  double p;
  double scale;
  SymIntArrayRef mask_strides;
  SymInt mask_offset;
};

// What every backward of the family needs: 16 bytes of key and the numbers of the call.
void save(torch::autograd::AutogradContext* ctx, const Arguments& args) {
  ctx->save_for_backward({args.key});
  ctx->saved_data["p"] = args.p;
  ctx->saved_data["scale"] = args.scale;
  if (!args.mask_strides.empty()) ctx->saved_data["mask_strides"] = args.mask_strides;
  if (args.mask_offset != 0) ctx->saved_data["mask_offset"] = args.mask_offset;
}

Tensor apply_to_gradient(torch::autograd::AutogradContext* ctx, const Tensor& grad) {
  if (!grad.defined()) return {};
  const Tensor key = ctx->get_saved_variables()[0];
  const auto find = [ctx](const char* name) -> const c10::IValue* {
    const auto it = ctx->saved_data.find(name);
    return it == ctx->saved_data.end() ? nullptr : &it->second;
  };
  std::vector<SymInt> strides;
  if (const auto* saved = find("mask_strides")) {
    for (const c10::IValue& stride : saved->toListRef()) strides.push_back(stride.toSymInt());
  }
  const auto* offset = find("mask_offset");
  return apply(grad, key, find("p")->toDouble(), find("scale")->toDouble(), strides,
               offset ? offset->toSymInt() : SymInt(0));
}

struct ApplyFunction : torch::autograd::Function<ApplyFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input,
                        const Arguments& args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, args);
    return dropout_ext::apply(input, args.key, args.p, args.scale, args.mask_strides,
                              args.mask_offset);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return {apply_to_gradient(ctx, grads[0]), {}};
  }
};

struct ApplyInplaceFunction : torch::autograd::Function<ApplyInplaceFunction> {
  static constexpr bool is_traceable = true;
  static Tensor forward(torch::autograd::AutogradContext* ctx, Tensor input,
                        const Arguments& args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, args);
    ctx->mark_dirty({input});
    apply_(input, args.key, args.p, args.scale, args.mask_strides, args.mask_offset);
    return input;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return {apply_to_gradient(ctx, grads[0]), {}};
  }
};

struct ApplyAffineFunction : torch::autograd::Function<ApplyAffineFunction> {
  static constexpr bool is_traceable = true;
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input,
                        const Arguments& args, double bias, double dropped) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, args);
    return apply_affine(input, args.key, args.p, args.scale, bias, dropped, args.mask_strides,
                        args.mask_offset);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return {apply_to_gradient(ctx, grads[0]), {}, {}, {}};
  }
};

struct ApplyAffineInplaceFunction : torch::autograd::Function<ApplyAffineInplaceFunction> {
  static constexpr bool is_traceable = true;
  static Tensor forward(torch::autograd::AutogradContext* ctx, Tensor input, const Arguments& args,
                        double bias, double dropped) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, args);
    ctx->mark_dirty({input});
    apply_affine_(input, args.key, args.p, args.scale, bias, dropped, args.mask_strides,
                  args.mask_offset);
    return input;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return {apply_to_gradient(ctx, grads[0]), {}, {}, {}};
  }
};

bool needs_graph(const Tensor& input) {
  return at::GradMode::is_enabled() && input.requires_grad();
}

Tensor apply_autograd(const Tensor& input, const Tensor& key, double p, double scale,
                      SymIntArrayRef mask_strides, SymInt mask_offset) {
  if (needs_composition(input)) {
    const Tensor mask = composed_mask(input, key, p, mask_strides, std::move(mask_offset));
    return at::where(mask, input * scale, 0);
  }
  if (needs_graph(input)) {
    return ApplyFunction::apply(input, Arguments{key, p, scale, mask_strides, mask_offset});
  }
  const at::AutoDispatchBelowAutograd guard;
  return apply(input, key, p, scale, mask_strides, std::move(mask_offset));
}

void apply_autograd_(Tensor& input, const Tensor& key, double p, double scale,
                     SymIntArrayRef mask_strides, SymInt mask_offset) {
  if (needs_composition(input)) {
    input.copy_(apply(input, key, p, scale, mask_strides, std::move(mask_offset)));
    return;
  }
  if (needs_graph(input)) {
    torch::autograd::check_inplace(input, true);
    ApplyInplaceFunction::apply(input, Arguments{key, p, scale, mask_strides, mask_offset});
    return;
  }
  const at::AutoDispatchBelowAutograd guard;
  apply_(input, key, p, scale, mask_strides, std::move(mask_offset));
}

Tensor apply_affine_autograd(const Tensor& input, const Tensor& key, double p, double scale,
                             double bias, double dropped, SymIntArrayRef mask_strides,
                             SymInt mask_offset) {
  if (needs_composition(input)) {
    // A multiply and an add, where the kernels have one fused operation: the last bit may differ.
    const Tensor mask = composed_mask(input, key, p, mask_strides, std::move(mask_offset));
    const auto dtype = input.scalar_type();
    const Tensor x = dtype == at::kHalf || dtype == at::kBFloat16 ? input.to(at::kFloat) : input;
    return at::where(mask, x * scale + bias, dropped).to(dtype);
  }
  if (needs_graph(input)) {
    return ApplyAffineFunction::apply(input, Arguments{key, p, scale, mask_strides, mask_offset},
                                      bias, dropped);
  }
  const at::AutoDispatchBelowAutograd guard;
  return apply_affine(input, key, p, scale, bias, dropped, mask_strides, std::move(mask_offset));
}

void apply_affine_autograd_(Tensor& input, const Tensor& key, double p, double scale, double bias,
                            double dropped, SymIntArrayRef mask_strides, SymInt mask_offset) {
  if (needs_composition(input)) {
    input.copy_(
        apply_affine(input, key, p, scale, bias, dropped, mask_strides, std::move(mask_offset)));
    return;
  }
  if (needs_graph(input)) {
    torch::autograd::check_inplace(input, true);
    ApplyAffineInplaceFunction::apply(input, Arguments{key, p, scale, mask_strides, mask_offset},
                                      bias, dropped);
    return;
  }
  const at::AutoDispatchBelowAutograd guard;
  apply_affine_(input, key, p, scale, bias, dropped, mask_strides, std::move(mask_offset));
}

// Without a graph nothing else bumps the version of what was written.

void apply_bump_(Tensor& input, const Tensor& key, double p, double scale,
                 SymIntArrayRef mask_strides, SymInt mask_offset) {
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    apply_(input, key, p, scale, mask_strides, std::move(mask_offset));
  }
  torch::autograd::increment_version(input);
}

void apply_affine_bump_(Tensor& input, const Tensor& key, double p, double scale, double bias,
                        double dropped, SymIntArrayRef mask_strides, SymInt mask_offset) {
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    apply_affine_(input, key, p, scale, bias, dropped, mask_strides, std::move(mask_offset));
  }
  torch::autograd::increment_version(input);
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

Tensor apply(const Tensor& input, const Tensor& key, double p, double scale,
             SymIntArrayRef mask_strides, SymInt mask_offset) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, double, double, SymIntArrayRef, SymInt)>(
          "dropout_ext::apply");
  return op.call(input, key, p, scale, mask_strides, std::move(mask_offset));
}

void apply_(Tensor& input, const Tensor& key, double p, double scale, SymIntArrayRef mask_strides,
            SymInt mask_offset) {
  static const auto op = find<void(Tensor&, const Tensor&, double, double, SymIntArrayRef, SymInt)>(
      "dropout_ext::apply_");
  op.call(input, key, p, scale, mask_strides, std::move(mask_offset));
}

Tensor apply_affine(const Tensor& input, const Tensor& key, double p, double scale, double bias,
                    double dropped, SymIntArrayRef mask_strides, SymInt mask_offset) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, double, double, double, double,
                                     SymIntArrayRef, SymInt)>("dropout_ext::apply_affine");
  return op.call(input, key, p, scale, bias, dropped, mask_strides, std::move(mask_offset));
}

void apply_affine_(Tensor& input, const Tensor& key, double p, double scale, double bias,
                   double dropped, SymIntArrayRef mask_strides, SymInt mask_offset) {
  static const auto op =
      find<void(Tensor&, const Tensor&, double, double, double, double, SymIntArrayRef, SymInt)>(
          "dropout_ext::apply_affine_");
  op.call(input, key, p, scale, bias, dropped, mask_strides, std::move(mask_offset));
}

TORCH_LIBRARY(dropout_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "apply(Tensor input, Tensor key, float p, float scale, SymInt[] mask_strides, "
      "SymInt mask_offset) -> Tensor",
      tags);
  m.def(
      "apply_(Tensor(a!) input, Tensor key, float p, float scale, SymInt[] mask_strides, "
      "SymInt mask_offset) -> ()",
      tags);
  m.def(
      "apply_affine(Tensor input, Tensor key, float p, float scale, float bias, float dropped, "
      "SymInt[] mask_strides, SymInt mask_offset) -> Tensor",
      tags);
  m.def(
      "apply_affine_(Tensor(a!) input, Tensor key, float p, float scale, float bias, "
      "float dropped, SymInt[] mask_strides, SymInt mask_offset) -> ()",
      tags);
  m.def(
      "keep_mask(Tensor key, float p, SymInt[] size, SymInt[] mask_strides, SymInt mask_offset, *, "
      "Device? device=None) -> Tensor",
      tags);
  m.def("fold_in(Tensor key, SymInt n) -> Tensor", tags);
  m.def("split(Tensor key, SymInt n) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(dropout_ext, CPU, m) {
  m.impl("apply", apply_kernel);
  m.impl("apply_", apply_kernel_);
  m.impl("apply_affine", apply_affine_kernel);
  m.impl("apply_affine_", apply_affine_kernel_);
  m.impl("keep_mask", keep_mask_kernel);
  m.impl("fold_in", fold_in_kernel);
  m.impl("split", split_kernel);
}

TORCH_LIBRARY_IMPL(dropout_ext, CUDA, m) {
#ifdef DROPOUT_EXT_WITH_CUDA
  m.impl("apply", apply_kernel);
  m.impl("apply_", apply_kernel_);
  m.impl("apply_affine", apply_affine_kernel);
  m.impl("apply_affine_", apply_affine_kernel_);
  m.impl("keep_mask", keep_mask_kernel);
#else
  for (const char* op : {"apply", "apply_", "apply_affine", "apply_affine_", "keep_mask"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&cuda_kernel_missing>());
  }
#endif
}

TORCH_LIBRARY_IMPL(dropout_ext, Autograd, m) {
  m.impl("apply", apply_autograd);
  m.impl("apply_", apply_autograd_);
  m.impl("apply_affine", apply_affine_autograd);
  m.impl("apply_affine_", apply_affine_autograd_);
}

TORCH_LIBRARY_IMPL(dropout_ext, ADInplaceOrView, m) {
  m.impl("apply_", apply_bump_);
  m.impl("apply_affine_", apply_affine_bump_);
}

}  // namespace dropout_ext
