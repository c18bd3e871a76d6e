// The operator is linear in its input, so its backward is itself applied to the gradient: only the
// key is saved, and double backward needs nothing more.
#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "autograd.h"
#include "checks.h"
#include "ops.h"

namespace dropout_ext {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

std::vector<SymInt> row_major(SymIntArrayRef sizes) {
  std::vector<SymInt> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

Tensor whole_mask(const Tensor& input, const Call& call) {
  const auto sizes = input.sym_sizes();
  std::vector<SymInt> row_major_strides;
  SymIntArrayRef strides = call.mask_strides;
  if (strides.empty()) strides = row_major_strides = row_major(sizes);
  return keep_mask(call.key, call.p, sizes, strides, call.mask_offset, input.device());
}

// 16 bytes of key and the numbers of the call: the backward scales by the same factor and adds
// nothing.
void save(AutogradContext* ctx, const Call& call) {
  ctx->save_for_backward({call.key});
  ctx->saved_data["p"] = call.p;
  ctx->saved_data["scale"] = call.scale;
  if (!call.mask_strides.empty()) ctx->saved_data["mask_strides"] = call.mask_strides;
  if (call.mask_offset != 0) ctx->saved_data["mask_offset"] = call.mask_offset;
}

// Complex numbers in parts: scale + 0i times an infinity would have a NaN in it.
Tensor scaled(const Tensor& input, double scale) {
  if (!input.is_complex()) return input * scale;
  const Tensor parts = at::view_as_real(input.resolve_conj()) * scale;
  return at::view_as_complex(parts.contiguous());  // those of an expanded input may lie apart
}

// A sparse gradient, that of an embedding with sparse=True say, stays one: the mask of the whole
// tensor is read where the gradient has values.
Tensor apply_to_sparse(const Tensor& grad, const Call& call) {
  const Tensor entries = grad.coalesce();
  const Tensor indices = entries.indices();
  torch::List<std::optional<Tensor>> at_indices;
  for (const Tensor& index : indices.unbind()) at_indices.push_back(index);
  const Tensor mask = whole_mask(grad, call).index(at_indices);
  const Tensor values = at::where(mask, scaled(entries.values(), call.scale), 0);
  return at::sparse_coo_tensor(indices, values, grad.sizes(), grad.options(),
                               /*is_coalesced=*/true);
}

variable_list apply_to_gradient(AutogradContext* ctx, const variable_list& grads) {
  if (!grads[0].defined()) return {Tensor(), Tensor()};
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
  const Call call{key, find("p")->toDouble(), find("scale")->toDouble(), strides,
                  offset ? offset->toSymInt() : SymInt(0)};
  if (grads[0].layout() == at::kSparse) return {apply_to_sparse(grads[0], call), Tensor()};
  return {call.apply(grads[0]), Tensor()};
}

struct ApplyFunction : torch::autograd::Function<ApplyFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, call);
    return call.apply(input);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return apply_to_gradient(ctx, grads);
  }
};

struct ApplyInplaceFunction : torch::autograd::Function<ApplyInplaceFunction> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, Tensor input, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, call);
    ctx->mark_dirty({input});
    call.apply_(input);
    return input;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return apply_to_gradient(ctx, grads);
  }
};

}  // namespace

bool needs_composition(const Tensor& input) {
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         input._fw_grad(/*level=*/0).defined();
}

Tensor compose(const Tensor& input, const Call& call) {
  const Tensor mask = whole_mask(input, call);
  if (call.is_linear()) return at::where(mask, scaled(input, call.scale), 0);
  // A multiply and an add, where the kernels have one fused operation: the last bit may differ.
  const auto dtype = input.scalar_type();
  const Tensor x = dtype == at::kHalf || dtype == at::kBFloat16 ? input.to(at::kFloat) : input;
  return at::where(mask, x * call.scale + call.bias.value_or(-0.0), call.dropped).to(dtype);
}

namespace {

bool needs_graph(const Tensor& input) {
  return at::GradMode::is_enabled() && input.requires_grad();
}

Tensor run(const Tensor& input, const Call& call) {
  if (needs_composition(input)) return compose(input, call);
  if (needs_graph(input)) return ApplyFunction::apply(input, call);
  const at::AutoDispatchBelowAutograd guard;
  return call.apply(input);
}

// Whether the write must be one of PyTorch's own: a mode may keep the result of one operator and
// run the next again, as selective checkpointing does, and knows copy_ as one that writes; and a
// Function saves its key after the tensor is written and its graph changed, which must stay as they
// were where saving fails, by a hook that raises or a key of inference mode.
bool needs_copy(const Tensor& input, const Call& call) {
  return needs_composition(input) || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         (needs_graph(input) &&
          (at::SavedTensorDefaultHooks::get_hooks().has_value() || call.key.is_inference()));
}

void run_(Tensor& input, const Call& call) {
  if (needs_copy(input, call)) {
    check_writable(input);
    input.copy_(run(input, call));
  } else if (needs_graph(input)) {
    check_writable(input);
    ApplyInplaceFunction::apply(input, call);
  } else {
    const at::AutoDispatchBelowAutograd guard;
    call.apply_(input);
  }
}

// Without a graph nothing else bumps the version of what was written.
void bump_(Tensor& input, const Call& call) {
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    call.apply_(input);
  }
  torch::autograd::increment_version(input);
}

// Of a view that is conjugate or negative by a bit, which PyTorch's fallbacks resolve only where an
// operator returns what it wrote. One that does cannot be functionalized.
void write_lazy_(Tensor& input, const Call& call) {
  input.copy_(call.apply(input.resolve_conj().resolve_neg()));
}

// An operator's signature around a function of an input and a call.
template <auto function, class Input>
auto op(Input input, const Tensor& key, double p, double scale, SymIntArrayRef mask_strides,
        SymInt mask_offset, std::optional<double> bias, double dropped) {
  return function(input, {key, p, scale, mask_strides, std::move(mask_offset), bias, dropped});
}

}  // namespace

TORCH_LIBRARY_IMPL(dropout_ext, Autograd, m) {
  m.impl("apply", op<run, const Tensor&>);
  m.impl("apply_", op<run_, Tensor&>);
}

TORCH_LIBRARY_IMPL(dropout_ext, Conjugate, m) { m.impl("apply_", op<write_lazy_, Tensor&>); }

TORCH_LIBRARY_IMPL(dropout_ext, Negative, m) { m.impl("apply_", op<write_lazy_, Tensor&>); }

TORCH_LIBRARY_IMPL(dropout_ext, ADInplaceOrView, m) { m.impl("apply_", op<bump_, Tensor&>); }

}  // namespace dropout_ext
