// The body of the CPU kernel, included once per instruction set, inside that set's namespace and
// under its target attribute, behind a simd_*.h that defines
//   Keep        keep decisions of 16 elements; keep_from_bits, keep_to_bits, store_bytes
//   F32, F64    16 elements in the compute type; load, store, splat, fma, select, mul_or_zero;
//               stream, a store past the caches to an address aligned to the vector
//   kHasPair    of an element type: whether scale_pair, store_pair and stream_pair take 32 of it
//   keep_groups<n>  the decisions of n * 16 consecutive blocks with one upper half of their number,
//               n * 128 elements; kGroupsAtATime is the n that is fastest
// No include guard on purpose.

template <class Elem>
struct ComputeOf {
  using type = F32;
};
template <>
struct ComputeOf<double> {
  using type = F64;
};

// Bit j of a bool run is byte j.
struct BoolElem {
  uint8_t byte;
};

// An epilogue between a load and a store, past the caches if `streaming`.
template <template <class> class Epilogue, class Elem, bool streaming>
struct Op {
  Epilogue<typename ComputeOf<Elem>::type> f;
  static constexpr bool kHasIn2 =
      requires(decltype(f) e, Keep keep, const Elem* in) { e(keep, load(in), load(in)); };
  explicit Op(const EpilogueParams& p) : f(p) {}
  void operator()(const Elem* in, const Elem* in2, Elem* out, Keep keep) const {
    const auto result = [&] {
      if constexpr (kHasIn2) {
        return f(keep, load(in), load(in2));
      } else {
        return f(keep, load(in));
      }
    }();
    if constexpr (streaming) {
      stream(out, result);
    } else {
      store(out, result);
    }
  }
};

// Two vectors at a time, where the instruction set has a faster way for that.
template <class Elem, bool streaming>
void apply_pair(const Op<Scale, Elem, streaming>& op, const Elem* in, const Elem* in2, Elem* out,
                Keep first, Keep second) {
  if constexpr (kHasPair<Elem> && streaming) {
    stream_pair(out, scale_pair(in, first, second, op.f.scale));
  } else if constexpr (kHasPair<Elem>) {
    store_pair(out, scale_pair(in, first, second, op.f.scale));
  } else {
    op(in, in2, out, first);
    op(in + kVector, in2, out + kVector, second);
  }
}
template <class Elem, class Op>
void apply_pair(const Op& op, const Elem* in, const Elem* in2, Elem* out, Keep first, Keep second) {
  op(in, in2, out, first);
  op(in + kVector, Op::kHasIn2 ? in2 + kVector : in2, out + kVector, second);
}

struct StoreBool {
  static constexpr bool kHasIn2 = false;
  explicit StoreBool(const EpilogueParams&) {}
  void operator()(const BoolElem*, const BoolElem*, BoolElem* out, Keep keep) const {
    store_bytes(&out->byte, keep);
  }
};

// Elements [begin, end) of a group, of which in[0] and out[0] are element `begin`. Vectors that the
// range covers only in part go through a buffer, so that nothing outside the range is touched.
template <class Elem, class Op>
void part_of_group(const Keep (&keep)[kVectors], int begin, int end, const Elem* in,
                   const Elem* in2, Elem* out, const Op& op) {
  for (int v = begin / kVector; v * kVector < end; ++v) {
    const int first = v * kVector < begin ? begin : v * kVector;
    const int last = (v + 1) * kVector < end ? (v + 1) * kVector : end;
    const int at = first - begin;
    if (last - first == kVector) {
      op(in + at, Op::kHasIn2 ? in2 + at : in2, out + at, keep[v]);
      continue;
    }
    alignas(64) Elem buffer[kVector] = {}, buffer2[kVector] = {};
    const int shift = first - v * kVector;
    const size_t bytes = (last - first) * sizeof(Elem);
    if constexpr (!std::is_same_v<Elem, BoolElem>) std::memcpy(buffer + shift, in + at, bytes);
    if constexpr (Op::kHasIn2) std::memcpy(buffer2 + shift, in2 + at, bytes);
    op(buffer, buffer2, buffer, keep[v]);
    std::memcpy(out + at, buffer + shift, bytes);
  }
}

// As many whole groups as there are in n elements, `groups` at a time. Returns how many elements
// that was.
template <int groups, class Elem, class Op, class Source>
int64_t whole_groups(Source& source, const Elem* in, const Elem* in2, Elem* out, int64_t n,
                     const Op& op) {
  constexpr int kStep = groups * kGroup;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    // The hardware's own prefetch stops at every page. Past the end it is harmless.
    const auto ahead = reinterpret_cast<uintptr_t>(in + j) + kPrefetchBytes;
    for (size_t line = 0; line < kStep * sizeof(Elem); line += 64) prefetch(ahead + line);
    if constexpr (Op::kHasIn2) {
      const auto ahead2 = reinterpret_cast<uintptr_t>(in2 + j) + kPrefetchBytes;
      for (size_t line = 0; line < kStep * sizeof(Elem); line += 64) prefetch(ahead2 + line);
    }
    Keep keep[groups * kVectors];
    source.template next<groups>(keep);
    for (int v = 0; v < groups * kVectors; v += 2) {
      const int64_t at = j + v * kVector;
      apply_pair(op, in + at, Op::kHasIn2 ? in2 + at : in2, out + at, keep[v], keep[v + 1]);
    }
  }
  return j;
}

// `skip` elements of the first group come before the run.
template <class Elem, class Op, class Source>
void for_each_group(Source source, int skip, const Elem* in, const Elem* in2, Elem* out, int64_t n,
                    const Op& op) {
  Keep keep[kVectors];
  int64_t j = 0;
  const auto second = [&] { return Op::kHasIn2 ? in2 + j : in2; };
  if (skip != 0) {
    source.template next<1>(keep);
    const int end = skip + n < kGroup ? static_cast<int>(skip + n) : kGroup;
    part_of_group(keep, skip, end, in, in2, out, op);
    j = end - skip;
  }
  if constexpr (kGroupsAtATime > 1) {
    j += whole_groups<kGroupsAtATime>(source, in + j, second(), out + j, n - j, op);
  }
  j += whole_groups<1>(source, in + j, second(), out + j, n - j, op);
  if (j < n) {
    source.template next<1>(keep);
    part_of_group(keep, 0, static_cast<int>(n - j), in + j, second(), out + j, op);
  }
}

template <class Elem, class Op>
void run(const void* in, const void* in2, void* out, int64_t n, const MaskRun& mask,
         const EpilogueParams& params) {
  for_each_group(PhiloxSource(mask), static_cast<int>(mask.index & 7), static_cast<const Elem*>(in),
                 static_cast<const Elem*>(in2), static_cast<Elem*>(out), n, Op(params));
}

template <class Elem, class Op>
void apply_bits(const void* in, const void* in2, void* out, int64_t n, const uint64_t* bits,
                const EpilogueParams& params) {
  for_each_group(BitsSource(bits, n), 0, static_cast<const Elem*>(in),
                 static_cast<const Elem*>(in2), static_cast<Elem*>(out), n, Op(params));
}

inline void keep_bits_row(PhiloxSource& source, uint64_t index, uint64_t* bits, int64_t n) {
  const int skip = static_cast<int>(index & 7);
  source.seek(index);
  int64_t at = 0;
  const auto put = [&](const Keep* keep, int words) {
    for (int w = 0; w < words; ++w, ++at) {
      uint64_t word = 0;
      for (int v = 0; v < 4; ++v) {
        word |= static_cast<uint64_t>(keep_to_bits(keep[4 * w + v])) << 16 * v;
      }
      // Bit `skip` of the first word is the row's first, so each word ends in the next one.
      if (skip != 0 && at > 0 && (at - 1) * 64 < n) bits[at - 1] |= word << (64 - skip);
      if (at * 64 < n) bits[at] = word >> skip;
    }
  };
  constexpr int kStep = kGroupsAtATime * kGroup;
  int64_t left = n + skip;
  for (; left > kStep - kGroup; left -= kStep) {
    Keep keep[kGroupsAtATime * kVectors];
    source.next<kGroupsAtATime>(keep);
    put(keep, kStep / 64);
  }
  for (; left > 0; left -= kGroup) {
    Keep keep[kVectors];
    source.next<1>(keep);
    put(keep, kGroup / 64);
  }
}

inline void keep_bits(uint64_t* bits, int64_t n, const MaskRun& mask, int64_t rows,
                      uint64_t row_stride, int64_t row_words) {
  PhiloxSource source(mask);
  for (int64_t r = 0; r < rows; ++r) {
    keep_bits_row(source, mask.index + static_cast<uint64_t>(r) * row_stride, bits + r * row_words,
                  n);
  }
}

template <template <class> class Epilogue, class Elem>
constexpr Kernels::Of of() {
  return {run<Elem, Op<Epilogue, Elem, false>>, apply_bits<Elem, Op<Epilogue, Elem, false>>,
          run<Elem, Op<Epilogue, Elem, true>>, apply_bits<Elem, Op<Epilogue, Elem, true>>};
}

template <template <class> class Epilogue, bool float64 = true>
constexpr void set(Kernels::Of (&all)[4]) {
  if constexpr (float64) all[static_cast<int>(Dtype::kFloat64)] = of<Epilogue, double>();
  all[static_cast<int>(Dtype::kFloat32)] = of<Epilogue, float>();
  all[static_cast<int>(Dtype::kFloat16)] = of<Epilogue, Float16>();
  all[static_cast<int>(Dtype::kBFloat16)] = of<Epilogue, BFloat16>();
}

template <class Function>
struct Of {
  template <class V>
  using Value = Activated<Function, V>;
  template <class V>
  using Gradient = ActivatedBackward<Function, V>;
};

template <class Function>
constexpr void set(Kernels& kernels, Activation activation) {
  const int i = static_cast<int>(activation);
  set<Of<Function>::template Value, /*float64=*/false>(kernels.activation[i]);
  set<Of<Function>::template Gradient, /*float64=*/false>(kernels.activation_backward[i]);
}

constexpr Kernels make_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  set<Scale>(kernels.scale);
  set<Affine>(kernels.affine);
  set<Add>(kernels.add);
  set<Gelu>(kernels, Activation::kGelu);
  set<GeluTanh>(kernels, Activation::kGeluTanh);
  set<Silu>(kernels, Activation::kSilu);
  set<Relu>(kernels, Activation::kRelu);
  kernels.keep_mask = {run<BoolElem, StoreBool>, apply_bits<BoolElem, StoreBool>, nullptr, nullptr};
  kernels.keep_bits = keep_bits;
  kernels.fence = fence;
  kernels.rows = &kRowKernels;
  return kernels;
}
