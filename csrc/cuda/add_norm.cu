// Dropout, residual and norm of a row in one pass over memory; row_args.h says what is computed.

#include "eights.cuh"

namespace dropout_ext::cuda {

namespace {

template <typename T, typename S>
struct AddNormParams {
  using C = typename Traits<S>::Real;

  RowThreads row;
  int64_t rows;
  RowDecisions decisions;
  C scale;
  const T* input;
  const S* residual;
  const C *input_bias, *colscale, *rowscale;
  S* sum;
  Norm norm;
  C eps;
  const C *weight, *bias;
  T* out;
  C *mean, *rstd;
};

// Eight elements of the sum, as they are rounded.
template <typename T, typename S, typename C>
__device__ __forceinline__ Eight<C> sum_of(const AddNormParams<T, S>& p, const RowKeep& keep,
                                           int64_t row, int64_t column) {
  const int count = p.row.count(column);
  const bool vector = p.row.vector;
  const int64_t at = row * p.row.columns + column;
  S* const to = p.sum + at;
  if (p.input == nullptr) return load_eight<C>(to, count, vector);
  Eight<C> t = load_eight<C>(p.input + at, count, vector);
  Eight<C> s;
  if (p.residual != nullptr) {
    s = load_eight<C>(p.residual + at, count, vector);
  } else {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) s.x[j] = {C(-0.0)};
  }
  const uint32_t bits = keep.bits(column, count);
  if (p.input_bias != nullptr) {
    const Eight<C> bias = load_eight<C>(p.input_bias + column, count, vector);
#pragma unroll
    for (int j = 0; j < kBlock; ++j) t.x[j] = t.x[j] + bias.x[j];
  }
  if (p.colscale != nullptr) {
    const Eight<C> scale = load_eight<C>(p.colscale + column, count, vector);
#pragma unroll
    for (int j = 0; j < kBlock; ++j) t.x[j] = t.x[j] * scale.x[j];
  }
  if (p.rowscale != nullptr) {
    const Lane<C> scale{p.rowscale[row]};
#pragma unroll
    for (int j = 0; j < kBlock; ++j) t.x[j] = t.x[j] * scale;
  }
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    const Lane<C> kept = select(bits >> j & 1, t.x[j], Lane<C>{C(0)});
    s.x[j] = fma(kept, Lane<C>{p.scale}, s.x[j]);
  }
  store_eight(to, s, count, vector);
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    S rounded;
    from_lane(rounded, s.x[j]);
    s.x[j] = {static_cast<C>(to_lane(rounded).x)};
  }
  return s;
}

template <typename T, typename S>
__global__ void __launch_bounds__(kMaxWarps<typename Traits<S>::Real>* kWarp)
    add_norm_kernel(const __grid_constant__ AddNormParams<T, S> p) {
  using C = typename AddNormParams<T, S>::C;
  constexpr int kHeld = kForwardEights<C>;
  __shared__ C shared[2][1][kMaxWarps<C>];
  RowSum<C, 1> sum_up(shared);
  const RowThreads threads = p.row;
  const C columns = static_cast<C>(threads.columns);
  for (int64_t row = threads.first_row(); row < p.rows; row += threads.row_step()) {
    const RowKeep keep(p.decisions, row, threads.columns);
    const S* const sum = p.sum + row * threads.columns;
    const auto again = [&](int64_t column) {
      return load_eight<C>(sum + column, threads.count(column), threads.vector);
    };
    Eight<C> s[kHeld];
    C mean[1] = {0}, square[1] = {0};
    const auto add = [&](const Eight<C>& eight, int count) {
#pragma unroll
      for (int j = 0; j < kBlock; ++j) mean[0] += j < count ? eight.x[j].x : C{0};
    };
    for_each_eight<kHeld>(
        threads,
        [&](int u, int64_t column) {
          s[u] = sum_of<T, S, C>(p, keep, row, column);
          add(s[u], threads.count(column));
        },
        [&](int64_t column) { add(sum_of<T, S, C>(p, keep, row, column), threads.count(column)); });
    if (p.norm == Norm::kNone) continue;
    if (p.norm == Norm::kLayer) {
      sum_up(threads, mean);
      mean[0] /= columns;
    } else {
      mean[0] = 0;
    }
    const auto add_square = [&](const Eight<C>& eight, int count) {
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        const Lane<C> x{j < count ? eight.x[j].x - mean[0] : C{0}};
        square[0] = fma(x, x, Lane<C>{square[0]}).x;
      }
    };
    for_each_eight<kHeld>(
        threads, [&](int u, int64_t column) { add_square(s[u], threads.count(column)); },
        [&](int64_t column) { add_square(again(column), threads.count(column)); });
    sum_up(threads, square);
    const C rstd = C{1} / std::sqrt(square[0] / columns + p.eps);
    if (threads.thread() == 0) {
      if (p.mean != nullptr) p.mean[row] = mean[0];
      p.rstd[row] = rstd;
    }
    const auto normalize = [&](const Eight<C>& eight, int64_t column) {
      const int count = threads.count(column);
      Eight<C> z = eight;
#pragma unroll
      for (int j = 0; j < kBlock; ++j) z.x[j] = {(eight.x[j].x - mean[0]) * rstd};
      if (p.weight != nullptr) {
        const Eight<C> weight = load_eight<C>(p.weight + column, count, threads.vector);
        if (p.bias != nullptr) {
          const Eight<C> bias = load_eight<C>(p.bias + column, count, threads.vector);
#pragma unroll
          for (int j = 0; j < kBlock; ++j) z.x[j] = fma(z.x[j], weight.x[j], bias.x[j]);
        } else {
#pragma unroll
          for (int j = 0; j < kBlock; ++j) z.x[j] = z.x[j] * weight.x[j];
        }
      } else if (p.bias != nullptr) {
        const Eight<C> bias = load_eight<C>(p.bias + column, count, threads.vector);
#pragma unroll
        for (int j = 0; j < kBlock; ++j) z.x[j] = z.x[j] + bias.x[j];
      }
      store_eight(p.out + row * threads.columns + column, z, count, threads.vector);
    };
    for_each_eight<kHeld>(
        threads, [&](int u, int64_t column) { normalize(s[u], column); },
        [&](int64_t column) { normalize(again(column), column); });
  }
}

}  // namespace

void launch_add_norm(const RowArgs& args, const Geometry& geometry, CUstream_st* stream) {
  const bool from_input = args.norm == Norm::kNone || args.input != nullptr;
  with_row_pair(
      from_input ? args.input_dtype : args.out_dtype, args.sum_dtype, [&](auto t, auto s) {
        using T = decltype(t);
        using S = decltype(s);
        using C = typename Traits<S>::Real;
        const AddNormParams<T, S> params{
            {args.columns, warps_for<C>(args.columns, kForwardEights<C>),
             in_vectors(args.columns, static_cast<const char*>(args.input),
                        static_cast<const char*>(args.residual),
                        static_cast<const char*>(args.input_bias),
                        static_cast<const char*>(args.colscale), static_cast<const char*>(args.sum),
                        static_cast<const char*>(args.weight), static_cast<const char*>(args.bias),
                        static_cast<const char*>(args.out))},
            args.rows,
            RowDecisions(args.mask),
            static_cast<C>(args.scale),
            static_cast<const T*>(args.input),
            static_cast<const S*>(args.residual),
            static_cast<const C*>(args.input_bias),
            static_cast<const C*>(args.colscale),
            static_cast<const C*>(args.rowscale),
            static_cast<S*>(args.sum),
            args.norm,
            static_cast<C>(args.eps),
            static_cast<const C*>(args.weight),
            static_cast<const C*>(args.bias),
            static_cast<T*>(args.out),
            static_cast<C*>(args.mean),
            static_cast<C*>(args.rstd)};
        const RowLaunch shape(params.row, args.rows, geometry);
        auto* kernel = add_norm_kernel<T, S>;
        DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
      });
}

}  // namespace dropout_ext::cuda
