// The passes of row_kernel.h over one row. Included like kernel_body.h.
// No include guard on purpose.

// Inlined, so that what the passes have in common stays in registers: in memory, every store might
// have changed it.
#define DROPOUT_EXT_INLINE inline __attribute__((always_inline))
#define DROPOUT_EXT_INLINE_LAMBDA __attribute__((always_inline))

inline constexpr uintptr_t kRowPrefetchBytes = 4096;
// Sums of that many elements are made in the compute type, sums of those in double.
inline constexpr int64_t kSegment = 4096;

template <class S>
using Vector = std::conditional_t<std::is_same_v<S, double>, F64, F32>;
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Lanes [begin, end) of 16 elements, the first of which is `row[at]`; zeros in the others.
template <class Elem>
auto load_part(const Elem* row, int64_t at, int begin, int end) {
  alignas(64) Elem buffer[kVector] = {};
  std::memcpy(buffer + begin, row + (at + begin), (end - begin) * sizeof(Elem));
  return load(buffer);
}

template <class Elem, class V>
void store_part(Elem* row, int64_t at, int begin, int end, const V& x) {
  alignas(64) Elem buffer[kVector];
  store_any(buffer, x);
  std::memcpy(row + (at + begin), buffer + begin, (end - begin) * sizeof(Elem));
}

// Sixteen elements of a row, or some of them.
struct Whole {
  int64_t at;
  template <class Elem>
  DROPOUT_EXT_INLINE auto load_from(const Elem* row) const {
    return load(row + at);
  }
  template <class Elem, class V>
  DROPOUT_EXT_INLINE void store_to(Elem* row, const V& x) const {
    store_any(row + at, x);
  }
  template <class Elem, class V>
  DROPOUT_EXT_INLINE void stream_to(Elem* row, const V& x) const {
    stream_any(row + at, x);
  }
  template <class Elem>
  DROPOUT_EXT_INLINE void prefetch_from(const Elem* row) const {
    prefetch(reinterpret_cast<uintptr_t>(row + at) + kRowPrefetchBytes);
  }
};
struct Part {
  int64_t at;
  int begin, end;
  template <class Elem>
  auto load_from(const Elem* row) const {
    return load_part(row, at, begin, end);
  }
  template <class Elem, class V>
  void store_to(Elem* row, const V& x) const {
    store_part(row, at, begin, end, x);
  }
  template <class Elem, class V>
  void stream_to(Elem* row, const V& x) const {
    store_to(row, x);
  }
  template <class Elem>
  void prefetch_from(const Elem*) const {}
};

// `at`, hidden from the compiler's analysis of loops. Of a loop's counter GCC makes a register for
// each address to prefetch, even for those that differ by a constant, and runs out of registers.
DROPOUT_EXT_INLINE int64_t opaque(int64_t at) {
  asm("" : "+r"(at));
  return at;
}

// f(where, keep) for all vectors of a row; `skip` elements of the first group come before it.
template <class Source, class F>
DROPOUT_EXT_INLINE void for_each_kept(Source source, int skip, int64_t n, const F& f) {
  Keep keep[kGroupsAtATime * kVectors];
  int64_t at = -skip;
  const auto part_of_group = [&](int64_t first, int64_t last) {
    source.template next<1>(reinterpret_cast<Keep(&)[kVectors]>(keep));
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lane0 = v * kVector;
      const int begin = static_cast<int>(std::max<int64_t>(first - lane0, 0));
      const int end = static_cast<int>(std::min<int64_t>(last - lane0, kVector));
      if (begin >= end) continue;
      if (end - begin == kVector) {
        f(Whole{at + lane0}, keep[v]);
      } else {
        f(Part{at + lane0, begin, end}, keep[v]);
      }
    }
    at += kGroup;
  };
  if (skip != 0) part_of_group(skip, skip + n);
  const F whole = f;  // whose address nobody has
  for (constexpr int kStep = kGroupsAtATime * kGroup; at + kStep <= n; at += kStep) {
    source.template next<kGroupsAtATime>(keep);
    const int64_t here = opaque(at);
    for (int v = 0; v < kGroupsAtATime * kVectors; ++v) whole(Whole{here + v * kVector}, keep[v]);
  }
  while (at < n) part_of_group(0, n - at);  // NOLINT(bugprone-infinite-loop): it advances
}

template <class F>
DROPOUT_EXT_INLINE void for_each_kept(const RowKernels::Mask& mask, int64_t n, const F& f) {
  if (mask.bits != nullptr) {
    for_each_kept(BitsSource(mask.bits, n), 0, n, f);
  } else {
    for_each_kept(PhiloxSource(mask.run), static_cast<int>(mask.run.index & 7), n, f);
  }
}

template <class F>
DROPOUT_EXT_INLINE void for_each(int64_t n, const F& f) {
  int64_t at = 0;
  for (; at + kVector <= n; at += kVector) f(Whole{at});
  if (at < n) f(Part{at, 0, static_cast<int>(n - at)});
}

// Sums of `sums` things over a row: f(where, sums so far) adds to them. `sides` accumulators each,
// because an addition waits for the one before.
template <class V, int sides, int sums, class F>
DROPOUT_EXT_INLINE void accumulate(int64_t n, double (&total)[sums], const F& f) {
  for (double& t : total) t = 0;
  for (int64_t first = 0; first < n; first += kSegment) {
    const int64_t last = std::min(first + kSegment, n);
    V partial[sides][sums];
    for (auto& side : partial) {
      for (V& p : side) p = splat(0.0, V{});
    }
    int64_t at = first;
    for (; at + sides * kVector <= last; at += sides * kVector) {
      for (int i = 0; i < sides; ++i) f(Whole{at + i * kVector}, partial[i]);
    }
    for (; at + kVector <= last; at += kVector) f(Whole{at}, partial[0]);
    if (at < last) f(Part{at, 0, static_cast<int>(last - at)}, partial[1]);
    for (int s = 0; s < sums; ++s) {
      V all = partial[0][s] + partial[1][s];
      if constexpr (sides == 4) all = all + (partial[2][s] + partial[3][s]);
      total[s] += sum_lanes(all);
    }
  }
}

// Past the caches if `streaming`.
template <class Where, class Elem, class V>
DROPOUT_EXT_INLINE void put(const Where& where, Elem* row, const V& x, bool streaming) {
  if (streaming) {
    where.stream_to(row, x);
  } else {
    where.store_to(row, x);
  }
}

template <class S, class V, class Where>
DROPOUT_EXT_INLINE void put_sum(const Where& where, const RowKernels::Sum& out, const V& s) {
  if (out.values != nullptr) where.store_to(static_cast<Compute<S>*>(out.values), rounded<S>(s));
  if (out.sum != nullptr) put(where, static_cast<S*>(out.sum), s, out.streaming);
}

template <class T, class S>
void add(const void* input, const void* residual, const RowKernels::Sum& out, int64_t n,
         const RowKernels::Mask& mask, double scale) {
  using V = Vector<S>;
  const V factor = splat(scale, V{}), zero = splat(0.0, V{});
  for_each_kept(mask, n, [=](const auto& where, const Keep& keep) DROPOUT_EXT_INLINE_LAMBDA {
    where.prefetch_from(static_cast<const T*>(input));
    where.prefetch_from(static_cast<const S*>(residual));
    const V t = where.load_from(static_cast<const T*>(input));
    const V r = where.load_from(static_cast<const S*>(residual));
    put_sum<S>(where, out, fma(select(keep, t, zero), factor, r));
  });
}

template <class T, class S>
void scaled_add(const void* input, const void* residual, const RowKernels::Sum& out, int64_t n,
                const RowKernels::Mask& mask, double scale, const void* bias, const void* colscale,
                double rowscale) {
  using V = Vector<S>;
  using C = Compute<S>;
  const V factor = splat(scale, V{}), zero = splat(0.0, V{}), row = splat(rowscale, V{});
  for_each_kept(mask, n, [=](const auto& where, const Keep& keep) DROPOUT_EXT_INLINE_LAMBDA {
    const V x = where.load_from(static_cast<const T*>(input));
    const V biased = x + where.load_from(static_cast<const C*>(bias));
    const V t = biased * where.load_from(static_cast<const C*>(colscale)) * row;
    const V r = where.load_from(static_cast<const S*>(residual));
    put_sum<S>(where, out, fma(select(keep, t, zero), factor, r));
  });
}

template <class C>
RowKernels::Moments moments(const void* values, int64_t n, bool centered) {
  using V = Vector<C>;
  double mean[1] = {0}, square[1];
  if (centered) {
    accumulate<V, 4>(n, mean, [=](const auto& where, V(&partial)[1]) DROPOUT_EXT_INLINE_LAMBDA {
      partial[0] = partial[0] + where.load_from(static_cast<const C*>(values));
    });
    mean[0] = static_cast<C>(mean[0] / static_cast<double>(n));
  }
  const V middle = splat(mean[0], V{});
  accumulate<V, 4>(n, square, [=](const auto& where, V(&partial)[1]) DROPOUT_EXT_INLINE_LAMBDA {
    V x = where.load_from(static_cast<const C*>(values)) - middle;
    if constexpr (std::is_same_v<std::decay_t<decltype(where)>, Part>) {
      x = select(keep_from_bits(static_cast<uint16_t>((1 << where.end) - 1)), x, splat(0.0, V{}));
    }
    partial[0] = fma(x, x, partial[0]);
  });
  return {mean[0], square[0] / static_cast<double>(n)};
}

template <class T>
void normalize(const void* values, void* out, int64_t n, double mean, double rstd,
               const void* weight, const void* bias, bool streaming) {
  using V = Vector<T>;
  using C = Compute<T>;
  const V middle = splat(mean, V{}), factor = splat(rstd, V{});
  for_each(n, [=](const auto& where) DROPOUT_EXT_INLINE_LAMBDA {
    const V x = (where.load_from(static_cast<const C*>(values)) - middle) * factor;
    const V z = fma(x, where.load_from(static_cast<const C*>(weight)),
                    where.load_from(static_cast<const C*>(bias)));
    put(where, static_cast<T*>(out), z, streaming);
  });
}

// `rows` at a time, so that the column sums are read and written once for all of them. A row's own
// sums have two accumulators each, whatever `rows` is, and columns add row after row: no bit
// depends on it.
template <class T, class S, int rows>
void reduce(const void* grad_out, const void* sum, int64_t n, const double* mean,
            const double* rstd, const void* weight, void* grad_weight, void* grad_bias,
            RowKernels::Sums* sums) {
  using V = Vector<S>;
  using C = Compute<S>;
  V middle[rows], factor[rows];
  for (int r = 0; r < rows; ++r) middle[r] = splat(mean[r], V{}), factor[r] = splat(rstd[r], V{});
  double total[2 * rows];
  accumulate<V, 2>(n, total,
                   [&](const auto& where, V(&partial)[2 * rows]) DROPOUT_EXT_INLINE_LAMBDA {
                     C* const to_weight = static_cast<C*>(grad_weight);
                     C* const to_bias = static_cast<C*>(grad_bias);
                     const V w = where.load_from(static_cast<const C*>(weight));
                     V of_weight = where.load_from(to_weight), of_bias = where.load_from(to_bias);
                     for (int r = 0; r < rows; ++r) {
                       const T* const grads = static_cast<const T*>(grad_out) + r * n;
                       const S* const row = static_cast<const S*>(sum) + r * n;
                       where.prefetch_from(grads);
                       where.prefetch_from(row);
                       const V grad = where.load_from(grads);
                       const V x = (where.load_from(row) - middle[r]) * factor[r];
                       const V g = grad * w;
                       partial[2 * r] = partial[2 * r] + g;
                       partial[2 * r + 1] = fma(g, x, partial[2 * r + 1]);
                       of_weight = fma(grad, x, of_weight);
                       of_bias = of_bias + grad;
                     }
                     where.store_to(to_weight, of_weight);
                     where.store_to(to_bias, of_bias);
                   });
  for (int r = 0; r < rows; ++r) sums[r] = {total[2 * r], total[2 * r + 1]};
}

template <class T, class S>
void backward(const void* grad_out, const void* sum, const void* grad_sum_in, int64_t n,
              double mean, double rstd, const void* weight, double mean_g, double mean_gx,
              void* grad_sum, void* grad_input, const RowKernels::Mask& mask, double scale,
              bool streaming) {
  using V = Vector<S>;
  using C = Compute<S>;
  const V middle = splat(mean, V{}), factor = splat(rstd, V{}), kept = splat(scale, V{});
  const V minus_g = splat(-mean_g, V{}), minus_gx = splat(-mean_gx, V{});
  for_each_kept(mask, n, [=](const auto& where, const Keep& keep) DROPOUT_EXT_INLINE_LAMBDA {
    const V grad = where.load_from(static_cast<const T*>(grad_out));
    const V x = (where.load_from(static_cast<const S*>(sum)) - middle) * factor;
    const V g = grad * where.load_from(static_cast<const C*>(weight)) + minus_g;
    V to_sum = fma(x, minus_gx, g) * factor;
    if (grad_sum_in != nullptr) {
      to_sum = to_sum + where.load_from(static_cast<const S*>(grad_sum_in));
    }
    if (grad_sum != nullptr) put(where, static_cast<S*>(grad_sum), to_sum, streaming);
    if (grad_input != nullptr) {
      put(where, static_cast<T*>(grad_input), mul_or_zero(keep, to_sum, kept), streaming);
    }
  });
}

template <class T, class S>
constexpr void set(RowKernels& kernels, Dtype dtype, Dtype sum) {
  kernels.of[row_pair(dtype, sum)] = {add<T, S>, scaled_add<T, S>, reduce<T, S, 1>,
                                      reduce<T, S, kReduceRows>, backward<T, S>};
  kernels.normalize[static_cast<int>(dtype)] = normalize<T>;
  kernels.moments[static_cast<int>(sum)] = moments<Compute<S>>;
}

constexpr RowKernels make_row_kernels() {
  RowKernels kernels{};
  set<double, double>(kernels, Dtype::kFloat64, Dtype::kFloat64);
  set<float, float>(kernels, Dtype::kFloat32, Dtype::kFloat32);
  set<Float16, Float16>(kernels, Dtype::kFloat16, Dtype::kFloat16);
  set<BFloat16, BFloat16>(kernels, Dtype::kBFloat16, Dtype::kBFloat16);
  set<Float16, float>(kernels, Dtype::kFloat16, Dtype::kFloat32);
  set<BFloat16, float>(kernels, Dtype::kBFloat16, Dtype::kFloat32);
  set<float, Float16>(kernels, Dtype::kFloat32, Dtype::kFloat16);
  set<float, BFloat16>(kernels, Dtype::kFloat32, Dtype::kBFloat16);
  return kernels;
}

inline constexpr RowKernels kRowKernels = make_row_kernels();
