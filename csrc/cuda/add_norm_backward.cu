// The gradients of a norm and of the dropout before it, in one pass over memory; row_args.h says
// what is computed.

#include "eights.cuh"

namespace dropout_ext::cuda {

namespace {

template <typename T, typename S>
struct BackwardParams {
  using C = typename Traits<S>::Real;

  RowThreads row;
  int64_t rows, chunk_rows, chunks;
  RowDecisions decisions;
  C scale;
  bool centered;
  const T* grad_out;
  const S* grad_sum_in;
  const S* sum;
  const C *mean, *rstd, *weight;
  S* grad_sum;
  T* grad_input;
  C *weight_sums, *bias_sums;  // a row for each chunk
};

// Of eight elements: the gradient of the output, and the normalized sum.
template <typename C>
struct Loaded {
  Eight<C> grad, x;
};

// A unit of work is a chunk of rows, whose column sums a thread has in registers; those of the
// eights that it does not hold are added up in memory.
template <typename T, typename S>
__global__ void __launch_bounds__(kMaxWarps<typename Traits<S>::Real>* kWarp)
    add_norm_backward_kernel(const __grid_constant__ BackwardParams<T, S> p) {
  using C = typename BackwardParams<T, S>::C;
  constexpr int kHeld = kBackwardEights<C>;
  __shared__ C shared[2][2][kMaxWarps<C>];
  RowSum<C, 2> sum_up(shared);
  const RowThreads threads = p.row;
  const bool vector = threads.vector;
  const bool sums_columns = p.weight_sums != nullptr || p.bias_sums != nullptr;
  for (int64_t chunk = threads.first_row(); chunk < p.chunks; chunk += threads.row_step()) {
    Eight<C> to_weight[kHeld] = {}, to_bias[kHeld] = {};
    C* const weight_sums =
        p.weight_sums == nullptr ? nullptr : p.weight_sums + chunk * threads.columns;
    C* const bias_sums = p.bias_sums == nullptr ? nullptr : p.bias_sums + chunk * threads.columns;
    const int64_t first = chunk * p.chunk_rows;
    const int64_t last = first + p.chunk_rows < p.rows ? first + p.chunk_rows : p.rows;
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * threads.columns;
      const C mean = p.centered ? p.mean[row] : C{0}, rstd = p.rstd[row];
      const auto load = [&](int64_t column) {
        const int count = threads.count(column);
        Loaded<C> eight{load_eight<C>(p.grad_out + at + column, count, vector),
                        load_eight<C>(p.sum + at + column, count, vector)};
#pragma unroll
        for (int j = 0; j < kBlock; ++j) eight.x.x[j] = {(eight.x.x[j].x - mean) * rstd};
        return eight;
      };
      const auto weighted = [&](Eight<C> grad, int64_t column) {
        if (p.weight == nullptr) return grad;
        const Eight<C> weight = load_eight<C>(p.weight + column, threads.count(column), vector);
#pragma unroll
        for (int j = 0; j < kBlock; ++j) grad.x[j] = grad.x[j] * weight.x[j];
        return grad;
      };
      C total[2] = {0, 0};
      // Elements beyond the row have a gradient of 0.
      const auto add = [&](const Loaded<C>& eight, int64_t column) {
        const Eight<C> g = weighted(eight.grad, column);
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          total[0] += g.x[j].x;
          total[1] = fma(g.x[j], eight.x.x[j], Lane<C>{total[1]}).x;
        }
      };
      const auto add_columns = [&](const Loaded<C>& eight, Eight<C>& weight, Eight<C>& bias) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          weight.x[j] = fma(eight.grad.x[j], eight.x.x[j], weight.x[j]);
          bias.x[j] = bias.x[j] + eight.grad.x[j];
        }
      };
      Loaded<C> loaded[kHeld];
      for_each_eight<kHeld>(
          threads,
          [&](int u, int64_t column) {
            loaded[u] = load(column);
            add(loaded[u], column);
            if (sums_columns) add_columns(loaded[u], to_weight[u], to_bias[u]);
          },
          [&](int64_t column) {
            const Loaded<C> eight = load(column);
            add(eight, column);
            if (!sums_columns) return;
            const int count = threads.count(column);
            Eight<C> weight = {}, bias = {};
            if (row != first && weight_sums != nullptr) {
              weight = load_eight<C>(weight_sums + column, count, vector);
            }
            if (row != first && bias_sums != nullptr) {
              bias = load_eight<C>(bias_sums + column, count, vector);
            }
            add_columns(eight, weight, bias);
            if (weight_sums != nullptr) store_eight(weight_sums + column, weight, count, vector);
            if (bias_sums != nullptr) store_eight(bias_sums + column, bias, count, vector);
          });
      if (p.grad_sum == nullptr && p.grad_input == nullptr) continue;
      sum_up(threads, total);
      const C columns = static_cast<C>(threads.columns);
      const C mean_g = p.centered ? total[0] / columns : C{0}, mean_gx = total[1] / columns;
      const RowKeep keep(p.decisions, row, threads.columns);
      const auto write = [&](const Loaded<C>& eight, int64_t column) {
        const int count = threads.count(column);
        const Eight<C> g = weighted(eight.grad, column);
        Eight<C> to_sum;
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          to_sum.x[j] = fma(eight.x.x[j], Lane<C>{-mean_gx}, g.x[j] - Lane<C>{mean_g});
          to_sum.x[j] = to_sum.x[j] * Lane<C>{rstd};
        }
        if (p.grad_sum_in != nullptr) {
          const Eight<C> more = load_eight<C>(p.grad_sum_in + at + column, count, vector);
#pragma unroll
          for (int j = 0; j < kBlock; ++j) to_sum.x[j] = to_sum.x[j] + more.x[j];
        }
        if (p.grad_sum != nullptr) store_eight(p.grad_sum + at + column, to_sum, count, vector);
        if (p.grad_input == nullptr) return;
        const uint32_t bits = keep.bits(column, count);
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          to_sum.x[j] = mul_or_zero(bits >> j & 1, to_sum.x[j], Lane<C>{p.scale});
        }
        store_eight(p.grad_input + at + column, to_sum, count, vector);
      };
      for_each_eight<kHeld>(
          threads, [&](int u, int64_t column) { write(loaded[u], column); },
          [&](int64_t column) { write(load(column), column); });
    }
    for_each_eight<kHeld>(
        threads,
        [&](int u, int64_t column) {
          const int count = threads.count(column);
          if (weight_sums != nullptr)
            store_eight(weight_sums + column, to_weight[u], count, vector);
          if (bias_sums != nullptr) store_eight(bias_sums + column, to_bias[u], count, vector);
        },
        [](int64_t) {});
  }
}

constexpr int kSummers = 16;  // threads that share a column

template <typename C>
struct ColumnSums {
  int64_t chunks, columns;
  const C* from[2];
  C* to[2];
};

// Threads side by side have columns side by side. The order is that of the chunks, whatever the
// grid.
template <typename C>
__global__ void __launch_bounds__(kSummers* kWarp)
    column_sums_kernel(const __grid_constant__ ColumnSums<C> p) {
  __shared__ C shared[kSummers][kWarp];
  const C* const from = p.from[blockIdx.y];
  const int lane = threadIdx.x % kWarp, summer = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  C sum = 0;
  if (from != nullptr && column < p.columns) {
    for (int64_t chunk = summer; chunk < p.chunks; chunk += kSummers) {
      sum += from[chunk * p.columns + column];
    }
  }
  shared[summer][lane] = sum;
  __syncthreads();
  if (summer != 0 || from == nullptr || column >= p.columns) return;
  for (int i = 1; i < kSummers; ++i) sum += shared[i][lane];
  p.to[blockIdx.y][column] = sum;
}

}  // namespace

void launch_add_norm_backward(const RowBackwardArgs& args, void* weight_sums, void* bias_sums,
                              const Geometry& geometry, CUstream_st* stream) {
  with_row_pair(args.dtype, args.sum_dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    using C = typename Traits<S>::Real;
    const BackwardParams<T, S> params{
        {args.columns, warps_for<C>(args.columns, kBackwardEights<C>),
         in_vectors(args.columns, static_cast<const char*>(args.grad_out),
                    static_cast<const char*>(args.grad_sum_in), static_cast<const char*>(args.sum),
                    static_cast<const char*>(args.weight), static_cast<const char*>(args.grad_sum),
                    static_cast<const char*>(args.grad_input),
                    static_cast<const char*>(weight_sums), static_cast<const char*>(bias_sums))},
        args.rows,
        rows_of_chunk(args.rows),
        row_chunks(args.rows),
        RowDecisions(args.mask),
        static_cast<C>(args.scale),
        args.norm == Norm::kLayer,
        static_cast<const T*>(args.grad_out),
        static_cast<const S*>(args.grad_sum_in),
        static_cast<const S*>(args.sum),
        static_cast<const C*>(args.mean),
        static_cast<const C*>(args.rstd),
        static_cast<const C*>(args.weight),
        static_cast<S*>(args.grad_sum),
        static_cast<T*>(args.grad_input),
        static_cast<C*>(weight_sums),
        static_cast<C*>(bias_sums)};
    const RowLaunch shape(params.row, params.chunks, geometry);
    auto* kernel = add_norm_backward_kernel<T, S>;
    DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
    if (weight_sums == nullptr && bias_sums == nullptr) return;
    const ColumnSums<C> sums{params.chunks,
                             args.columns,
                             {static_cast<const C*>(weight_sums), static_cast<const C*>(bias_sums)},
                             {static_cast<C*>(args.grad_weight), static_cast<C*>(args.grad_bias)}};
    const dim3 grid(static_cast<unsigned>(ceil_div(args.columns, kWarp)), 2, 1);
    auto* sum_kernel = column_sums_kernel<C>;
    DROPOUT_EXT_LAUNCH(sum_kernel, grid, kSummers * kWarp, stream, sums);
  });
}

}  // namespace dropout_ext::cuda
