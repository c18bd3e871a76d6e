// The derivative of attention. Saved are its inputs, its output with what rounding took from it,
// and two numbers per row of scores; what the fused backward pass does not cover is composed of
// differentiable operators.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

namespace dropout_ext {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Call {
  Tensor query, key, value;
  std::optional<Tensor> mask;
  Tensor dropout_key;
  double p;
  bool is_causal;
  std::optional<double> scale;

  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                       const std::optional<Tensor>&, const Tensor&,
                                                       double, bool, std::optional<double>);
  using Composed = Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                          const Tensor&, double, bool, std::optional<double>);
  using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                               const Tensor&, const Tensor&,
                                                               const std::optional<Tensor>&,
                                                               const Tensor&, const Tensor&,
                                                               const Tensor&, const Tensor&, double,
                                                               bool, std::optional<double>);

  std::tuple<Tensor, Tensor, Tensor> forward() const {
    static const auto op = find<Signature>("dropout_ext::attention");
    return op.call(query, key, value, mask, dropout_key, p, is_causal, scale);
  }
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& out,
                                              const Tensor& remainder,
                                              const Tensor& statistics) const {
    static const auto op = find<BackwardSignature>("dropout_ext::attention_backward");
    return op.call(grad_out, query, key, value, mask, out, remainder, statistics, dropout_key, p,
                   is_causal, scale);
  }
  Tensor composed() const {
    static const auto op = find<Composed>("dropout_ext::attention_composed");
    return op.call(query, key, value, mask, dropout_key, p, is_causal, scale);
  }

  bool any(bool (*test)(const Tensor&)) const {
    return test(query) || test(key) || test(value) || (mask && test(*mask));
  }
};

// Gradients that can be differentiated again.
variable_list differentiable_gradients(Call call, const Tensor& grad_out) {
  variable_list inputs, grads(3);
  std::vector<size_t> places;
  size_t place = 0;
  for (Tensor* input : {&call.query, &call.key, &call.value}) {
    if (input->requires_grad()) {
      *input = input->view_as(*input);  // apart, where one tensor is several arguments
      inputs.push_back(*input);
      places.push_back(place);
    }
    ++place;
  }
  const variable_list found =
      torch::autograd::grad({call.composed()}, inputs, {grad_out}, std::nullopt,
                            /*create_graph=*/true, /*allow_unused=*/true);
  for (size_t i = 0; i < places.size(); ++i) grads[places[i]] = found[i];
  return grads;
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key,
                               const Tensor& value, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, remainder, statistics] = call.forward();
    ctx->save_for_backward({query, key, value, call.mask.value_or(Tensor()), call.dropout_key, out,
                            remainder, statistics});
    ctx->saved_data["p"] = call.p;
    ctx->saved_data["is_causal"] = call.is_causal;
    ctx->saved_data["scale"] = call.scale;
    ctx->mark_non_differentiable({remainder, statistics});
    return {out, remainder, statistics};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(4);
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<Tensor> mask =
        saved[3].defined() ? std::optional<Tensor>(saved[3]) : std::nullopt;
    const Call call{saved[0],
                    saved[1],
                    saved[2],
                    mask,
                    saved[4],
                    ctx->saved_data["p"].toDouble(),
                    ctx->saved_data["is_causal"].toBool(),
                    ctx->saved_data["scale"].toOptional<double>()};
    variable_list grads;
    if (at::GradMode::is_enabled()) {
      grads = differentiable_gradients(call, grad_outputs[0]);
    } else {
      const auto [query, key, value] = call.backward(grad_outputs[0], saved[5], saved[6], saved[7]);
      grads = {query, key, value};
    }
    grads.emplace_back();  // of the call
    return grads;
  }
};

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& query, const Tensor& key,
                                             const Tensor& value, const std::optional<Tensor>& mask,
                                             const Tensor& dropout_key, double p, bool is_causal,
                                             std::optional<double> scale) {
  const Call call{query, key, value, mask, dropout_key, p, is_causal, scale};
  // functorch rejects a C++ Function, and forward mode would lose the tangent in one. Of a mask's
  // gradient the fused kernel knows nothing.
  const bool differentiates = at::GradMode::is_enabled();
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      call.any([](const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }) ||
      (differentiates && mask && mask->requires_grad())) {
    const auto none = [&] { return at::empty({0}, query.options()); };
    return {call.composed(), none(), none()};
  }
  if (differentiates && call.any([](const Tensor& t) { return t.requires_grad(); })) {
    const variable_list results = AttentionFunction::apply(query, key, value, call);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowAutograd guard;
  return call.forward();
}

}  // namespace

TORCH_LIBRARY_IMPL(dropout_ext, Autograd, m) { m.impl("attention", attention); }

}  // namespace dropout_ext
