// Saved for the backward of a norm are the sum, its moments and the key; for an activation its
// input, of relu what it returned, and the key; for the add the key alone. Gradients of the scales,
// and everything that is differentiated again, are composed of differentiable operators.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../epilogue/epilogue.h"
#include "autograd.h"
#include "checks.h"
#include "row_signatures.h"

namespace dropout_ext {

using at::ScalarType;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

template <class... Tensors>
bool any_needs_graph(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && ((tensors.defined() && tensors.requires_grad()) || ...);
}

template <class... Tensors>
bool any_needs_composition(const Tensors&... tensors) {
  return ((tensors.defined() && needs_composition(tensors)) || ...);
}

// keep ? x * scale : 0 where there is a key.
Tensor dropped(const Tensor& x, const Call& call) {
  if (!call.key.defined()) return x;
  return needs_composition(x) ? compose(x, call) : call.apply(x);
}

Tensor scaled(const Tensor& input, const RowCall& call, ScalarType compute) {
  Tensor t = input.to(compute);
  if (call.input_bias.defined()) t = t + call.input_bias;
  if (call.colscale.defined()) t = t * call.colscale;
  if (call.rowscale.defined()) {
    Tensor rows = call.rowscale.detach().to(compute);  // takes no gradient
    while (rows.dim() < t.dim()) rows = rows.unsqueeze(-1);
    t = t * rows;
  }
  return t;
}

Tensor composed_sum(const RowCall& call, ScalarType dtype) {
  const ScalarType compute = compute_type(dtype);
  Tensor sum = dropped(scaled(call.input, call, compute), call.dropout());
  if (call.residual.defined()) sum = sum + call.residual;
  return sum.is_same(call.input) ? sum.to(dtype, /*non_blocking=*/false, /*copy=*/true)
                                 : sum.to(dtype);
}

Tensor composed_norm(const Tensor& sum, const RowCall& call, ScalarType dtype) {
  const ScalarType compute = compute_type(sum.scalar_type());
  const auto sizes = sum.sym_sizes().slice(sum.dim() - call.norm_dims);
  const auto converted = [&](const Tensor& tensor) {
    return tensor.defined() ? optional<Tensor>(tensor.to(compute)) : std::nullopt;
  };
  const Tensor x = sum.to(compute);
  if (!call.rms) {
    return at::layer_norm_symint(x, sizes, converted(call.weight), converted(call.bias), call.eps)
        .to(dtype);
  }
  std::vector<int64_t> dims(call.norm_dims);
  for (int64_t d = 0; d < call.norm_dims; ++d) dims[d] = d - call.norm_dims;
  Tensor z = x * (x.square().mean(dims, /*keepdim=*/true) + call.eps).rsqrt();
  if (call.weight.defined()) z = z * call.weight.to(compute);
  if (call.bias.defined()) z = z + call.bias.to(compute);
  return z.to(dtype);
}

// What a Function needs again in its backward, besides tensors.
void save(AutogradContext* ctx, const RowCall& call) {
  ctx->saved_data["numbers"] = std::vector<double>{call.p, call.scale, call.eps};
  const auto dtype_of = [](const Tensor& tensor) {
    return tensor.defined() ? static_cast<int64_t>(tensor.scalar_type()) : -1;
  };
  ctx->saved_data["layout"] = std::vector<int64_t>{call.norm_dims, call.rms, dtype_of(call.input),
                                                   dtype_of(call.residual), dtype_of(call.bias)};
  if (!call.mask_strides.empty()) {
    ctx->saved_data["mask_strides"] = call.mask_strides;
  }
  if (call.mask_offset != 0) ctx->saved_data["mask_offset"] = call.mask_offset;
}

struct Saved {
  std::vector<double> numbers;
  std::vector<int64_t> layout;
  std::vector<SymInt> mask_strides;
  SymInt mask_offset = 0;

  explicit Saved(AutogradContext* ctx)
      : numbers(ctx->saved_data.at("numbers").toDoubleVector()),
        layout(ctx->saved_data.at("layout").toIntVector()) {
    const auto& data = ctx->saved_data;
    if (const auto it = data.find("mask_offset"); it != data.end()) {
      mask_offset = it->second.toSymInt();
    }
    if (const auto it = data.find("mask_strides"); it != data.end()) {
      for (const c10::IValue& stride : it->second.toListRef()) {
        mask_strides.push_back(stride.toSymInt());
      }
    }
  }
  ScalarType input_dtype() const { return static_cast<ScalarType>(layout[2]); }
  ScalarType residual_dtype() const { return static_cast<ScalarType>(layout[3]); }
  ScalarType bias_dtype() const { return static_cast<ScalarType>(layout[4]); }
  bool has_residual() const { return layout[3] >= 0; }
  bool has_bias() const { return layout[4] >= 0; }
  RowCall call(const Tensor& key) const {
    return {.key = key,
            .p = numbers[0],
            .scale = numbers[1],
            .mask_strides = mask_strides,
            .mask_offset = mask_offset,
            .norm_dims = layout[0],
            .eps = numbers[2],
            .rms = layout[1] != 0};
  }
  // With what the scales need, if there are some.
  RowCall call(const variable_list& saved) const {
    RowCall result = call(saved[0]);
    result.input = saved[1];
    result.input_bias = saved[2];
    result.colscale = saved[3];
    result.rowscale = saved[4];
    return result;
  }
};

// Gradients of input, input_bias and colscale from that of the sum.
struct ScaleGradients {
  Tensor input, input_bias, colscale;
};
ScaleGradients through_scales(const Tensor& grad_sum, const RowCall& call) {
  const ScalarType compute = compute_type(grad_sum.scalar_type());
  const Tensor grad_t = dropped(grad_sum.to(compute), call.dropout());
  std::vector<int64_t> rows(std::max<int64_t>(grad_t.dim(), 1) - 1);
  for (size_t d = 0; d < rows.size(); ++d) rows[d] = static_cast<int64_t>(d);
  const auto over_rows = [&](const Tensor& x, const Tensor& like) {
    return (rows.empty() ? x : x.sum(rows)).to(like.scalar_type());
  };
  const Tensor by_row = scaled(grad_t, {.rowscale = call.rowscale}, compute);
  ScaleGradients grads;
  if (call.colscale.defined()) {
    Tensor biased = call.input.to(compute);
    if (call.input_bias.defined()) biased = biased + call.input_bias;
    grads.colscale = over_rows(by_row * biased, call.colscale);
  }
  const Tensor grad_x = call.colscale.defined() ? by_row * call.colscale : by_row;
  if (call.input_bias.defined()) grads.input_bias = over_rows(grad_x, call.input_bias);
  grads.input = grad_x.to(call.input.scalar_type());
  return grads;
}

// The first gradients of a Function of (input, residual, input_bias, colscale, ...).
void set_input_gradients(variable_list& out, const Tensor& grad_sum, const RowCall& call,
                         ScalarType input_dtype) {
  if (!call.has_scales()) {
    out[0] = dropped(grad_sum, call.dropout()).to(input_dtype);
    return;
  }
  const ScaleGradients scales = through_scales(grad_sum, call);
  out[0] = scales.input;
  out[2] = scales.input_bias;
  out[3] = scales.colscale;
}

struct AddFunction : torch::autograd::Function<AddFunction> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& input,
                        const optional<Tensor>& /*residual*/,
                        const optional<Tensor>& /*input_bias*/,
                        const optional<Tensor>& /*colscale*/, const RowCall& call,
                        ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({call.key, call.has_scales() ? input : Tensor(), call.input_bias,
                            call.colscale, call.rowscale});
    save(ctx, call);
    return add(call, dtype);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(6);
    if (!grads[0].defined()) return out;
    const variable_list saved = ctx->get_saved_variables();
    const Saved data(ctx);
    if (data.has_residual()) out[1] = grads[0].to(data.residual_dtype());
    set_input_gradients(out, grads[0], data.call(saved), data.input_dtype());
    return out;
  }
};

// Gradient of the sum as it is in backward, of operators that can be differentiated: the moments
// are computed again from the sum.
struct NormGradients {
  Tensor sum, weight, bias;
};
NormGradients composed_norm_backward(const Tensor& grad_out, const Tensor& sum,
                                     const RowCall& call) {
  const ScalarType compute = compute_type(sum.scalar_type());
  const int64_t row_dims = sum.dim() - call.norm_dims;
  std::vector<int64_t> columns(call.norm_dims), rows(row_dims);
  for (int64_t d = 0; d < call.norm_dims; ++d) columns[d] = row_dims + d;
  for (int64_t d = 0; d < row_dims; ++d) rows[d] = d;
  const auto mean = [&](const Tensor& x) { return x.mean(columns, /*keepdim=*/true); };
  Tensor x = sum.to(compute);
  if (!call.rms) x = x - mean(x);
  const Tensor rstd = (mean(x.square()) + call.eps).rsqrt();
  x = x * rstd;
  const Tensor grad = grad_out.to(compute);
  const Tensor g = call.weight.defined() ? grad * call.weight : grad;
  Tensor to_sum = g - x * mean(g * x);
  if (!call.rms) to_sum = to_sum - mean(g);
  const auto over_rows = [&](const Tensor& y) { return rows.empty() ? y : y.sum(rows); };
  return {to_sum * rstd, over_rows(grad * x), over_rows(grad)};
}

struct AddNormFunction : torch::autograd::Function<AddNormFunction> {
  static constexpr bool is_traceable = true;
  static variable_list forward(AutogradContext* ctx, const Tensor& input,
                               const optional<Tensor>& /*residual*/,
                               const optional<Tensor>& /*input_bias*/,
                               const optional<Tensor>& /*colscale*/,
                               const optional<Tensor>& /*weight*/, const optional<Tensor>& /*bias*/,
                               const RowCall& call, ScalarType sum_dtype, ScalarType dtype,
                               AddNorm* result) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    RowCall with_sum = call;
    with_sum.return_sum = true;
    *result = add_norm(with_sum, sum_dtype, dtype);
    const auto& [out, sum, mean, rstd] = *result;
    ctx->save_for_backward({call.key, call.has_scales() ? input : Tensor(), call.input_bias,
                            call.colscale, call.rowscale, sum, mean, rstd, call.weight});
    ctx->set_materialize_grads(false);
    save(ctx, call);
    return {out, sum};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(10);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_out = grads[0], &grad_sum_in = grads[1], &sum = saved[5], &weight = saved[8];
    if (!grad_out.defined() && !grad_sum_in.defined()) return out;
    const Saved data(ctx);
    RowCall call = data.call(saved);
    call.weight = weight;
    const ScalarType input_dtype = data.input_dtype();
    const bool has_residual = data.has_residual(), has_bias = data.has_bias();
    Tensor grad_sum, grad_input, grad_weight, grad_bias;
    if (!grad_out.defined()) {
      grad_sum = grad_sum_in;
    } else if (at::GradMode::is_enabled() || any_needs_composition(grad_out, grad_sum_in, sum)) {
      const NormGradients norm = composed_norm_backward(grad_out, sum, call);
      grad_sum = (grad_sum_in.defined() ? norm.sum + grad_sum_in : norm.sum).to(sum.scalar_type());
      if (weight.defined()) grad_weight = norm.weight;
      if (has_bias) grad_bias = norm.bias;
    } else {
      // The kernel makes the input's gradient where that has the output's dtype; without a key it
      // is the sum's.
      const bool same = !call.key.defined() && input_dtype == sum.scalar_type();
      const bool input_too = !call.has_scales() && input_dtype == grad_out.scalar_type() && !same &&
                             ctx->needs_input_grad(0);
      const bool sum_too = has_residual || !input_too;
      std::tie(grad_sum, grad_input, grad_weight, grad_bias) =
          add_norm_backward(grad_out, grad_sum_in, sum, saved[6], saved[7], call,
                            {sum_too, input_too, weight.defined(), has_bias});
      if (input_too) out[0] = grad_input;
    }
    if (weight.defined() && grad_weight.defined()) out[4] = grad_weight.to(weight.scalar_type());
    if (has_bias && grad_bias.defined()) out[5] = grad_bias.to(data.bias_dtype());
    if (has_residual) out[1] = grad_sum.to(data.residual_dtype());
    if (!out[0].defined()) set_input_gradients(out, grad_sum, call, input_dtype);
    return out;
  }
};

// Derivative by composition: that of PyTorch's function, in the compute type.
Tensor composed_activation(const Tensor& input, int64_t function, const Call& call) {
  const Tensor x = input.to(compute_type(input.scalar_type()));
  Tensor y;
  switch (static_cast<Activation>(function)) {
    case Activation::kGelu: y = at::gelu(x); break;
    case Activation::kGeluTanh: y = at::gelu(x, "tanh"); break;
    case Activation::kSilu: y = at::silu(x); break;
    default: y = at::relu(x);
  }
  return dropped(y, call).to(input.scalar_type());
}

struct ActivationFunction : torch::autograd::Function<ActivationFunction> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& input, int64_t function,
                        const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor out = activation(input, function, call);
    // The gradient of relu flows where this is positive, and whoever reads it mostly saves it.
    const bool relu = static_cast<Activation>(function) == Activation::kRelu;
    ctx->save_for_backward({call.key, relu ? out : input});
    save(ctx, {.input = input,
               .p = call.p,
               .scale = call.scale,
               .mask_strides = call.mask_strides,
               .mask_offset = call.mask_offset});
    ctx->saved_data["function"] = function;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    const variable_list saved = ctx->get_saved_variables();
    const Saved data(ctx);
    const RowCall saved_call = data.call(saved[0]);
    const Call call = saved_call.dropout();
    const int64_t function = ctx->saved_data.at("function").toInt();
    const Tensor& x = saved[1];
    if (!at::GradMode::is_enabled() && !any_needs_composition(grads[0], x)) {
      return {activation_backward(grads[0], x, function, call), Tensor(), Tensor()};
    }
    const Tensor input = x.to(compute_type(x.scalar_type()));
    const Tensor grad = dropped(grads[0].to(input.scalar_type()), call);
    Tensor result;
    switch (static_cast<Activation>(function)) {
      case Activation::kGelu: result = at::gelu_backward(grad, input); break;
      case Activation::kGeluTanh: result = at::gelu_backward(grad, input, "tanh"); break;
      case Activation::kSilu: result = at::silu_backward(grad, input); break;
      default: result = at::threshold_backward(grad, input, 0);
    }
    return {result.to(x.scalar_type()), Tensor(), Tensor()};
  }
};

Tensor add_autograd(const RowCall& call, ScalarType dtype) {
  const Tensor &input = call.input, &residual = call.residual, &input_bias = call.input_bias,
               &colscale = call.colscale;
  if (any_needs_composition(input, residual, input_bias, colscale)) {
    check_rows(call, /*norm=*/false, dtype, input.scalar_type());
    return composed_sum(call, dtype);
  }
  if (any_needs_graph(input, residual, input_bias, colscale)) {
    return AddFunction::apply(input, maybe(residual), maybe(input_bias), maybe(colscale), call,
                              dtype);
  }
  const at::AutoDispatchBelowAutograd guard;
  return add(call, dtype);
}

AddNorm add_norm_autograd(const RowCall& call, ScalarType sum_dtype, ScalarType dtype) {
  const Tensor &input = call.input, &residual = call.residual, &input_bias = call.input_bias,
               &colscale = call.colscale, &weight = call.weight, &bias = call.bias;
  if (any_needs_composition(input, residual, input_bias, colscale, weight, bias)) {
    check_rows(call, /*norm=*/true, sum_dtype, dtype);
    const Tensor sum = composed_sum(call, sum_dtype);
    const Tensor none = at::empty({0}, sum.options().dtype(compute_type(sum_dtype)));
    return {composed_norm(sum, call, dtype), call.return_sum ? sum : sum.new_empty({0}), none,
            none};
  }
  if (any_needs_graph(input, residual, input_bias, colscale, weight, bias)) {
    // The moments have no gradient and are results of the operator alone.
    AddNorm result;
    const variable_list out =
        AddNormFunction::apply(input, maybe(residual), maybe(input_bias), maybe(colscale),
                               maybe(weight), maybe(bias), call, sum_dtype, dtype, &result);
    return {out[0], out[1], std::get<2>(result), std::get<3>(result)};
  }
  const at::AutoDispatchBelowAutograd guard;
  return add_norm(call, sum_dtype, dtype);
}

Tensor activation_autograd(const Tensor& input, int64_t function, const Call& call) {
  if (needs_composition(input)) return composed_activation(input, function, call);
  if (any_needs_graph(input)) return ActivationFunction::apply(input, function, call);
  const at::AutoDispatchBelowAutograd guard;
  return activation(input, function, call);
}

}  // namespace

TORCH_LIBRARY_IMPL(dropout_ext, Autograd, m) {
  m.impl("add", AddOf<add_autograd>::call);
  m.impl("add_norm", AddNormOf<add_norm_autograd>::call);
  m.impl("activation", ActivationOf<activation_autograd>::call);
}

}  // namespace dropout_ext
