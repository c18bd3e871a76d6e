// Attention with dropout as operators, on the CPU: how tensors become heads and work becomes tasks.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../operator/checks.h"
#include "kernel.h"

namespace dropout_ext {

using at::Tensor;
namespace attention = cpu::attention;
using attention::Head;
using attention::Matrix;
using attention::Problem;
using attention::Range;

namespace {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    default: return Dtype::kBool;
  }
}

at::ScalarType sum_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The arguments of a call. Of key and value, the last batch dimension (the heads) divides that of
// query: consecutive heads share theirs.
class AttentionCall {
 public:
  AttentionCall(const Tensor& query, const Tensor& key, const Tensor& value,
                const std::optional<Tensor>& mask, const Tensor& dropout_key, double p,
                bool is_causal, std::optional<double> scale)
      : query_(query), key_(key), value_(value), n_batch_(query.dim() - 2) {
    check(mask, dropout_key, p, is_causal);
    problem.dtype = dtype_of(query);
    problem.queries = query.size(-2);
    problem.keys = key.size(-2);
    problem.head_size = query.size(-1);
    problem.value_size = value.size(-1);
    problem.scale =
        scale.value_or(1 / std::sqrt(static_cast<double>(std::max<int64_t>(query.size(-1), 1))));
    problem.keep_scale = p < 1 ? 1 / (1 - p) : 0;
    problem.threshold = static_cast<uint32_t>(threshold(p));
    problem.causal = is_causal;
    n_heads = 1;
    for (int64_t d = 0; d < n_batch_; ++d) n_heads *= query.size(d);
    group = n_batch_ > 0 && key.size(-3) > 0 ? query.size(-3) / key.size(-3) : 1;
    if (mask) set_mask(*mask);
    set_keys(dropout_key);
    const auto query_at = offsets(query), key_at = offsets(key, group),
               value_at = offsets(value, group), mask_at = offsets(mask_);
    const uint64_t weights = static_cast<uint64_t>(problem.queries * problem.keys);
    for (int64_t n = 0; n < n_heads; ++n) {
      heads.push_back({matrix(query, query_at[n]), matrix(key, key_at[n]),
                       matrix(value, value_at[n]),
                       mask_.defined() ? matrix(mask_, mask_at[n]) : Matrix{},
                       keys_.size() == 1 ? keys_[0] : keys_[n / (n_heads / query.size(0))],
                       static_cast<uint64_t>(n) * weights});
    }
  }

  // Where each head of `tensor` begins, in elements: it has the batch dimensions of query, but for
  // the last one, of which `group` times fewer.
  std::vector<int64_t> offsets(const Tensor& tensor, int64_t group = 1) const {
    std::vector<int64_t> all;
    if (!tensor.defined()) return all;
    for (int64_t n = 0; n < n_heads; ++n) {
      int64_t offset = 0, rest = n;
      for (int64_t d = n_batch_ - 1; d >= 0; --d) {
        const int64_t index = rest % query_.size(d);
        offset += (d == n_batch_ - 1 ? index / group : index) * tensor.stride(d);
        rest /= query_.size(d);
      }
      all.push_back(offset);
    }
    return all;
  }

  static Matrix matrix(const Tensor& tensor, int64_t offset) {
    const auto* data = static_cast<const char*>(tensor.const_data_ptr());
    return {data + offset * static_cast<int64_t>(tensor.element_size()), tensor.stride(-2),
            tensor.stride(-1)};
  }

  Problem problem{};
  std::vector<Head> heads;
  int64_t n_heads, group;

 private:
  void check(const std::optional<Tensor>& mask, const Tensor& dropout_key, double p,
             bool is_causal) const {
    check_probability(p);
    for (const Tensor* t : {&query_, &key_, &value_}) {
      TORCH_CHECK_VALUE(
          t->is_cpu() && t->layout() == at::kStrided && t->dim() >= 2 && t->dim() == query_.dim() &&
              t->scalar_type() == query_.scalar_type() && dtype_of(*t) != Dtype::kBool,
          "attention(): arguments 'query', 'key' and 'value' are ", query_.toString(),
          query_.sizes(), ", ", key_.toString(), key_.sizes(), " and ", value_.toString(),
          value_.sizes(),
          ", but accepted are strided CPU tensors of one dtype, float64, float32, float16 or "
          "bfloat16, with the same number of dimensions, at least 2");
    }
    bool match = key_.size(-1) == query_.size(-1) && key_.size(-2) == value_.size(-2);
    for (int64_t d = 0; d < n_batch_; ++d) {
      const int64_t heads = query_.size(d), shared = key_.size(d);
      match &= shared == value_.size(d);
      match &= heads == shared || (d == n_batch_ - 1 && shared != 0 && heads % shared == 0);
    }
    TORCH_CHECK_VALUE(match, "attention(): arguments 'query', 'key' and 'value' have shapes ",
                      query_.sizes(), ", ", key_.sizes(), " and ", value_.sizes(),
                      ", but accepted are (..., H, L, E), (..., G, S, E) and (..., G, S, Ev), "
                      "where G divides H");
    check_key(dropout_key, query_);
    TORCH_CHECK_VALUE(dropout_key.dim() == 1 || n_batch_ > 0,
                      "attention(): argument 'dropout_key' has shape ", dropout_key.sizes(),
                      ", but one matrix of weights takes one key, of shape (2,)");
    TORCH_CHECK_VALUE(!mask || !is_causal,
                      "attention(): arguments 'attn_mask' and 'is_causal' exclude each other");
    TORCH_CHECK_VALUE(!mask || (mask->is_cpu() && (mask->scalar_type() == at::kBool ||
                                                   mask->scalar_type() == at::kFloat ||
                                                   mask->scalar_type() == query_.scalar_type())),
                      "attention(): argument 'attn_mask' is ", mask ? mask->toString() : "",
                      ", but accepted are bool, float32 and the dtype of the query");
  }

  void set_mask(const Tensor& mask) {
    std::vector<int64_t> shape(query_.sizes().begin(), query_.sizes().end());
    shape.back() = problem.keys;
    mask_ = mask.expand(shape);
    problem.mask = dtype_of(mask);
  }

  void set_keys(const Tensor& dropout_key) {
    static_assert(sizeof(Key) == 2 * sizeof(uint64_t));
    const Tensor words = dropout_key.contiguous();
    const Key* keys = static_cast<const Key*>(words.const_data_ptr());
    keys_.assign(keys, keys + words.numel() / 2);
  }

  const Tensor& query_;
  const Tensor& key_;
  const Tensor& value_;
  Tensor mask_;
  int64_t n_batch_;
  std::vector<Key> keys_;
};

// Multiplications that are worth a second thread.
constexpr int64_t kGrainWork = int64_t{1} << 20;

// Runs task(n, scratch) for n < n_tasks, on all threads.
template <class Task>
void run_tasks(int64_t n_tasks, int64_t work, int64_t scratch_bytes, const Task& task) {
  const int64_t grain = std::max<int64_t>(1, kGrainWork / std::max<int64_t>(work, 1));
  at::parallel_for(0, n_tasks, grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    for (int64_t n = begin; n < end; ++n) task(n, scratch.get());
  });
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of queries that a task of the forward pass takes: enough to pay for packing the keys and
// values, which every task does for itself, unless threads would be idle. Of no consequence for the
// result.
int64_t forward_rows(const Problem& problem, int64_t n_heads) {
  constexpr int64_t kMost = 384, kFewest = 96;
  const int64_t wanted = divide_up(problem.queries * n_heads, at::get_num_threads());
  const int64_t tasks = divide_up(problem.queries, std::clamp(wanted, kFewest, kMost));
  return attention::round_up(divide_up(problem.queries, tasks));
}

// Rows contiguous, and the heads of a position side by side where those of the query are, as
// PyTorch's flash kernel has it: the projection that follows wants to read it so.
Tensor new_output(const Tensor& query, const Tensor& value) {
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = value.size(-1);
  if (query.dim() != 4 || query.stride(1) >= query.stride(2)) {
    return at::empty(shape, query.options());
  }
  std::swap(shape[1], shape[2]);
  return at::empty(shape, query.options()).transpose(1, 2);
}

Tensor new_statistics(const Tensor& query) {
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = 2;
  return at::empty(shape, query.options().dtype(sum_type(query)));
}

std::tuple<Tensor, Tensor, Tensor> attention_kernel(const Tensor& query, const Tensor& key,
                                                    const Tensor& value,
                                                    const std::optional<Tensor>& mask,
                                                    const Tensor& dropout_key, double p,
                                                    bool is_causal, std::optional<double> scale) {
  const AttentionCall call(query, key, value, mask, dropout_key, p, is_causal, scale);
  const Tensor out = new_output(query, value);
  const Tensor remainder =
      query.element_size() == 2 ? new_output(query, value) : at::empty({0}, query.options());
  const Tensor statistics = new_statistics(query);
  const Problem& problem = call.problem;
  if (keeps_nothing(threshold(p))) {
    out.zero_();
    remainder.zero_();
    statistics.zero_();
    return {out, remainder, statistics};
  }
  if (statistics.numel() == 0) return {out, remainder, statistics};
  const auto out_at = call.offsets(out);
  const auto& kernel = attention::kernels().of[static_cast<int>(problem.dtype)];
  const int64_t rows = forward_rows(problem, call.n_heads);
  const int64_t tasks = divide_up(problem.queries, rows);
  const int64_t work = rows * problem.keys * (problem.head_size + problem.value_size);
  auto* const out_data = static_cast<char*>(out.mutable_data_ptr());
  auto* const remainder_data = static_cast<char*>(remainder.mutable_data_ptr());
  auto* const statistics_data = static_cast<char*>(statistics.mutable_data_ptr());
  run_tasks(call.n_heads * tasks, work, attention::forward_scratch(problem, rows),
            [&](int64_t task, void* scratch) {
              const int64_t n = task / tasks, begin = task % tasks * rows;
              const Range queries{begin, std::min(begin + rows, problem.queries)};
              const int64_t at = out_at[n] * out.element_size();
              const attention::Forward to{
                  out_data + at, remainder_data != nullptr ? remainder_data + at : nullptr,
                  out.stride(-2),
                  statistics_data + n * problem.queries * 2 * statistics.element_size()};
              kernel.forward(problem, call.heads[n], to, queries, scratch);
            });
  return {out, remainder, statistics};
}

// A gradient while it is summed up, in float64 or float32, with rows padded to what the kernels
// write: the gradient itself where that is so.
class Gradient {
 public:
  explicit Gradient(const Tensor& of) : grad(at::empty_like(of)) {
    const int64_t size = of.size(-1), padded = attention::round_up(size);
    if (of.scalar_type() == sum_type(of) && padded == size && grad.stride(-1) == 1) {
      sums = grad.zero_();
      return;
    }
    std::vector<int64_t> shape(of.sizes().begin(), of.sizes().end());
    shape.back() = padded;
    sums = at::zeros(shape, of.options().dtype(sum_type(of)));
  }
  char* at(int64_t offset) const {
    return static_cast<char*>(sums.mutable_data_ptr()) + offset * sums.element_size();
  }
  Tensor finish() const {
    if (!grad.is_same(sums)) grad.copy_(sums.narrow(-1, 0, grad.size(-1)));
    return grad;
  }

  Tensor grad, sums;
};

// Into how many ranges both the queries and the keys of a head are split. In round r, task t adds
// what queries t + r (modulo the number of ranges) contribute through keys t: no two tasks of a
// round add to the same gradients, and every gradient's order of sums is that of the rounds. It
// depends on the shape alone: enough tasks for 32 threads, if ranges of at least 512 allow it.
int64_t n_ranges(const Problem& problem, int64_t n_key_heads) {
  const int64_t wanted = divide_up(32, n_key_heads);
  const int64_t possible = std::min(problem.queries, problem.keys) / 512;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(possible, 1));
}

Range range_of(int64_t n, int64_t n_ranges, int64_t size) {
  const int64_t length = attention::round_up(divide_up(size, n_ranges));
  return {std::min(n * length, size), std::min((n + 1) * length, size)};
}

// What attention() returned, and a gradient of its output.
void check_saved(const Tensor& grad_out, const Tensor& query, const Tensor& value,
                 const Tensor& out, const Tensor& remainder, const Tensor& statistics) {
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  shape.back() = value.size(-1);
  bool match = out.sizes() == shape && grad_out.sizes() == shape;
  const bool rounded = query.element_size() == 2;
  match &= !rounded || (remainder.sizes() == shape && remainder.is_cpu() &&
                        remainder.scalar_type() == query.scalar_type());
  shape.back() = 2;
  match &= statistics.sizes() == shape && statistics.scalar_type() == sum_type(query);
  match &= out.scalar_type() == query.scalar_type() && out.is_cpu() && grad_out.is_cpu();
  match &= grad_out.scalar_type() == query.scalar_type() && statistics.is_cpu();
  TORCH_CHECK_VALUE(
      match, "attention_backward(): arguments 'grad_out', 'output' and 'statistics' ",
      "have shapes ", grad_out.sizes(), ", ", out.sizes(), " and ", statistics.sizes(),
      ", but expected is what attention() returns for a query of shape ", query.sizes());
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_kernel(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& mask, const Tensor& out, const Tensor& remainder,
    const Tensor& statistics_in, const Tensor& dropout_key, double p, bool is_causal,
    std::optional<double> scale) {
  const AttentionCall call(query, key, value, mask, dropout_key, p, is_causal, scale);
  const Problem& problem = call.problem;
  check_saved(grad_out, query, value, out, remainder, statistics_in);
  const Tensor statistics = statistics_in.contiguous();
  const Gradient grad_query(query), grad_key(key), grad_value(value);
  if (!keeps_nothing(threshold(p)) && problem.keys > 0 && statistics.numel() > 0) {
    const bool rounded = query.element_size() == 2;
    const auto remainder_at = call.offsets(rounded ? remainder : Tensor());
    const auto grad_out_at = call.offsets(grad_out), out_at = call.offsets(out),
               query_at = call.offsets(grad_query.sums),
               key_at = call.offsets(grad_key.sums, call.group),
               value_at = call.offsets(grad_value.sums, call.group);
    std::vector<attention::Backward> heads;
    for (int64_t n = 0; n < call.n_heads; ++n) {
      const auto* sums = static_cast<const char*>(statistics.const_data_ptr());
      heads.push_back({call.heads[n], AttentionCall::matrix(out, out_at[n]),
                       rounded ? AttentionCall::matrix(remainder, remainder_at[n]) : Matrix{},
                       AttentionCall::matrix(grad_out, grad_out_at[n]),
                       sums + n * problem.queries * 2 * statistics.element_size(),
                       grad_query.at(query_at[n]), grad_query.sums.stride(-2)});
    }
    const auto& kernel = attention::kernels().of[static_cast<int>(problem.dtype)];
    const int64_t key_heads = call.n_heads / call.group;
    const int64_t ranges = n_ranges(problem, key_heads);
    const int64_t rows = range_of(0, ranges, problem.queries).size();
    const int64_t work = call.group * rows * range_of(0, ranges, problem.keys).size() *
                         (problem.head_size + problem.value_size) * 5 / 2;
    for (int64_t round = 0; round < ranges; ++round) {
      run_tasks(key_heads * ranges, work, attention::backward_scratch(problem, call.group, rows),
                [&](int64_t task, void* scratch) {
                  const int64_t n = task / ranges * call.group, at = task % ranges;
                  const Range queries = range_of((at + round) % ranges, ranges, problem.queries);
                  const Range keys = range_of(at, ranges, problem.keys);
                  if (queries.size() <= 0 || keys.size() <= 0) return;
                  const attention::KeyGradients to{
                      grad_key.at(key_at[n]), grad_value.at(value_at[n]), grad_key.sums.stride(-2),
                      grad_value.sums.stride(-2)};
                  kernel.backward(problem, &heads[n], call.group, to, queries, keys, scratch);
                });
    }
  }
  return {grad_query.finish(), grad_key.finish(), grad_value.finish()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dropout_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor dropout_key, "
      "float dropout_p, bool is_causal, float? scale) "
      "-> (Tensor output, Tensor remainder, Tensor statistics)",
      tags);
  m.def(
      "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
      "Tensor? attn_mask, Tensor output, Tensor remainder, Tensor statistics, Tensor dropout_key, "
      "float dropout_p, bool is_causal, float? scale) -> (Tensor, Tensor, Tensor)",
      tags);
  // Of differentiable operators; its kernel is in _attention.py.
  m.def(
      "attention_composed(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor dropout_key, float dropout_p, bool is_causal, float? scale) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(dropout_ext, CPU, m) {
  m.impl("attention", attention_kernel);
  m.impl("attention_backward", attention_backward_kernel);
}

}  // namespace dropout_ext
