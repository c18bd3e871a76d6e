// The attention kernel against its formula in float64, on memory of exactly the size it needs:
// built with AddressSanitizer, reading or writing past it is an error.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/attention/kernel.h"
#include "../../csrc/cpu/half.h"

using namespace dropout_ext;
using namespace dropout_ext::cpu;
using namespace dropout_ext::cpu::attention;

namespace {

constexpr double kP = 0.3;
// Of weight (0, 0): where the counter's second word changes within the larger matrices.
constexpr uint64_t kFirstIndex = (uint64_t{1} << 35) - 1003;
constexpr double kInf = std::numeric_limits<double>::infinity();

template <class Elem>
struct Type;
template <>
struct Type<double> {
  using Sum = double;
  static constexpr Dtype dtype = Dtype::kFloat64;
  static constexpr double epsilon = 1e-12;
};
template <>
struct Type<float> {
  using Sum = float;
  static constexpr Dtype dtype = Dtype::kFloat32;
  static constexpr double epsilon = 1e-4;
};
template <>
struct Type<Float16> {
  using Sum = float;
  static constexpr Dtype dtype = Dtype::kFloat16;
  static constexpr double epsilon = 4e-3;
};
template <>
struct Type<BFloat16> {
  using Sum = float;
  static constexpr Dtype dtype = Dtype::kBFloat16;
  static constexpr double epsilon = 3e-2;
};

double read(double x) { return x; }
double read(float x) { return x; }
double read(Float16 x) { return to_float(x); }
double read(BFloat16 x) { return to_float(x); }
void write(double& to, double x) { to = x; }
void write(float& to, double x) { to = static_cast<float>(x); }
void write(Float16& to, double x) { to = to_float16(static_cast<float>(x)); }
void write(BFloat16& to, double x) { to = to_bfloat16(static_cast<float>(x)); }

std::mt19937 generator(1);

// rows x columns numbers with strides, the last of which is the last of its memory.
template <class Elem>
struct Array {
  std::vector<Elem> memory;
  int64_t row_stride, col_stride;

  Array(int64_t rows, int64_t columns, bool transposed = false)
      : memory(rows * columns),
        row_stride(transposed ? 1 : columns),
        col_stride(transposed ? rows : 1) {
    std::normal_distribution<double> normal;
    for (Elem& x : memory) write(x, normal(generator));
  }
  double operator()(int64_t r, int64_t c) const {
    return read(memory[r * row_stride + c * col_stride]);
  }
  Matrix matrix() const { return {memory.data(), row_stride, col_stride}; }
};

struct Scratch64 {
  explicit Scratch64(int64_t bytes) : memory(std::aligned_alloc(64, bytes)) {
    std::memset(memory, 0xFF, bytes);  // NaN
  }
  ~Scratch64() { std::free(memory); }
  void* memory;
};

struct Shape {
  int64_t queries, keys, size, value_size;
};

enum class Masked { kNone, kCausal, kBool, kFloat, kShared };

template <class Elem>
bool check(const Shape& shape, Masked masked, bool transposed, int64_t queries_at_a_time,
           int64_t keys_at_a_time) {
  using Sum = typename Type<Elem>::Sum;
  constexpr int64_t kGroup = 2;
  const auto [L, S, E, V] = shape;
  Problem p{};
  p.dtype = Type<Elem>::dtype;
  p.queries = L, p.keys = S, p.head_size = E, p.value_size = V;
  p.scale = 0.3;
  p.keep_scale = 1 / (1 - kP);
  p.threshold = static_cast<uint32_t>(threshold(kP));
  p.causal = masked == Masked::kCausal;
  if (masked == Masked::kBool) p.mask = Dtype::kBool;
  if (masked == Masked::kFloat || masked == Masked::kShared) p.mask = p.dtype;

  const Array<Elem> key(S, E, transposed), value(S, V, transposed);
  const int64_t mask_rows = masked == Masked::kShared ? 1 : L;
  const Array<Elem> float_mask(mask_rows, S, transposed);
  std::vector<uint8_t> bool_mask(L * S);
  for (int64_t i = 0; i < L * S; ++i) bool_mask[i] = generator() % 4 != 0 && i / S != 1;

  const int64_t padded = round_up(E), value_padded = round_up(V);
  std::vector<Sum> grad_key(S * padded), grad_value(S * value_padded);
  std::vector<std::vector<Sum>> grad_queries(kGroup, std::vector<Sum>(L * padded));
  std::vector<Array<Elem>> queries, outs, remainders, grad_outs;
  std::vector<std::vector<Sum>> statistics;
  std::vector<Head> heads;
  for (int64_t h = 0; h < kGroup; ++h) {
    queries.emplace_back(L, E, transposed);
    outs.emplace_back(L, V);
    remainders.emplace_back(L, V);
    grad_outs.emplace_back(L, V, transposed);
    statistics.emplace_back(2 * L);
    Matrix mask{};
    if (masked == Masked::kBool) mask = {bool_mask.data(), S, 1};
    if (masked == Masked::kFloat) mask = float_mask.matrix();
    if (masked == Masked::kShared) mask = {float_mask.memory.data(), 0, float_mask.col_stride};
    heads.push_back({queries[h].matrix(),
                     key.matrix(),
                     value.matrix(),
                     mask,
                     {42, 7},
                     static_cast<uint64_t>(h * L * S) + kFirstIndex});
  }

  const auto& kernel = attention::kernels().of[static_cast<int>(p.dtype)];
  std::vector<attention::Backward> backward;
  for (int64_t h = 0; h < kGroup; ++h) {
    const Forward to{outs[h].memory.data(), remainders[h].memory.data(), V, statistics[h].data()};
    for (int64_t q = 0; q < L; q += queries_at_a_time) {
      const Range range{q, std::min(q + queries_at_a_time, L)};
      const Scratch64 scratch(forward_scratch(p, range.size()));
      kernel.forward(p, heads[h], to, range, scratch.memory);
    }
    backward.push_back({heads[h], outs[h].matrix(), remainders[h].matrix(), grad_outs[h].matrix(),
                        statistics[h].data(), grad_queries[h].data(), padded});
  }
  const KeyGradients to{grad_key.data(), grad_value.data(), padded, value_padded};
  for (int64_t q = 0; q < L; q += queries_at_a_time) {
    for (int64_t k = 0; k < S; k += keys_at_a_time) {
      const Range range{q, std::min(q + queries_at_a_time, L)};
      const Scratch64 scratch(backward_scratch(p, kGroup, range.size()));
      kernel.backward(p, backward.data(), kGroup, to, range, {k, std::min(k + keys_at_a_time, S)},
                      scratch.memory);
    }
  }

  // The formula.
  double worst = 0;
  const auto compare = [&](double actual, double expected) {
    const double error = std::abs(actual - expected) / (1 + std::abs(expected));
    worst = error > worst || std::isnan(error) ? (std::isnan(error) ? kInf : error) : worst;
  };
  std::vector<double> expected_key(S * E), expected_value(S * V);
  for (int64_t h = 0; h < kGroup; ++h) {
    for (int64_t i = 0; i < L; ++i) {
      std::vector<double> weight(S), grad(S);
      double largest = -kInf, sum = 0, dot = 0;
      for (int64_t j = 0; j < S; ++j) {
        double score = 0;
        for (int64_t e = 0; e < E; ++e) score += queries[h](i, e) * key(j, e);
        score *= p.scale;
        if (masked == Masked::kCausal && j > i) score = -kInf;
        if (masked == Masked::kBool && !bool_mask[i * S + j]) score = -kInf;
        if (masked == Masked::kFloat) score += float_mask(i, j);
        if (masked == Masked::kShared) score += float_mask(0, j);
        weight[j] = score;
        largest = std::max(largest, score);
      }
      for (double& w : weight) sum += w = largest == -kInf ? 0 : std::exp(w - largest);
      for (double& w : weight) w = sum == 0 ? 0 : w / sum;
      std::vector<bool> kept(S);
      for (int64_t j = 0; j < S; ++j)
        kept[j] = keep({42, 7}, heads[h].index + i * S + j, p.threshold);
      for (int64_t v = 0; v < V; ++v) {
        double out = 0;
        for (int64_t j = 0; j < S; ++j) {
          if (!kept[j]) continue;
          out += weight[j] * p.keep_scale * value(j, v);
          grad[j] += p.keep_scale * value(j, v) * grad_outs[h](i, v);
          expected_value[j * V + v] += weight[j] * p.keep_scale * grad_outs[h](i, v);
        }
        compare(outs[h](i, v), out);
      }
      for (int64_t j = 0; j < S; ++j) dot += weight[j] * grad[j];
      for (int64_t e = 0; e < E; ++e) {
        double grad_query = 0;
        for (int64_t j = 0; j < S; ++j) {
          const double grad_score = weight[j] * (grad[j] - dot) * p.scale;
          grad_query += grad_score * key(j, e);
          expected_key[j * E + e] += grad_score * queries[h](i, e);
        }
        compare(grad_queries[h][i * padded + e], grad_query);
      }
    }
  }
  for (int64_t j = 0; j < S; ++j) {
    for (int64_t e = 0; e < E; ++e) compare(grad_key[j * padded + e], expected_key[j * E + e]);
    for (int64_t v = 0; v < V; ++v) {
      compare(grad_value[j * value_padded + v], expected_value[j * V + v]);
    }
  }
  if (worst <= Type<Elem>::epsilon) return true;
  std::printf("dtype %d, L %ld, S %ld, E %ld, Ev %ld, mask %d, transposed %d: error %g\n",
              static_cast<int>(p.dtype), static_cast<long>(L), static_cast<long>(S),
              static_cast<long>(E), static_cast<long>(V), static_cast<int>(masked), transposed,
              worst);
  return false;
}

template <class Elem>
bool check_all() {
  const Shape shapes[] = {{1, 1, 1, 1},    {2, 3, 5, 4},      {7, 17, 16, 33},
                          {50, 40, 24, 8}, {100, 70, 17, 16}, {35, 600, 20, 7}};
  bool good = true;
  for (const Shape& shape : shapes) {
    for (const Masked masked :
         {Masked::kNone, Masked::kCausal, Masked::kBool, Masked::kFloat, Masked::kShared}) {
      for (const bool transposed : {false, true}) {
        good &= check<Elem>(shape, masked, transposed, shape.queries, shape.keys);
        good &= check<Elem>(shape, masked, transposed, 23, 48);
      }
    }
  }
  return good;
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    for (const auto* k : available_kernels()) std::printf("%s\n", k->name);
    return 0;
  }
  bool good = check_all<double>();
  good &= check_all<float>();
  good &= check_all<Float16>();
  good &= check_all<BFloat16>();
  if (good) std::printf("%s ok\n", cpu::kernels().name);
  return good ? 0 : 1;
}
