// The body of the CPU kernel, included once per instruction set, inside that set's namespace and
// under its target attribute, behind a simd_*.h that defines
//   Keep        keep decisions of 16 elements; keep_from_bits, keep_to_bits, store_bytes
//   F32, F64    16 elements in the compute type; load, store, splat, mul, fma, select,
//   keep_or_zero;
//               stream, a store past the caches to an address aligned to the vector
//   kHasPair    of an element type: whether scale_pair, store_pair and stream_pair take 32 of it
//   keep_group  the decisions of 16 consecutive blocks, 128 elements
// No include guard on purpose.

inline constexpr int kVector = 16;
inline constexpr int kGroup = 128;
inline constexpr int kVectors = kGroup / kVector;
inline constexpr uintptr_t kPrefetchBytes = 2048;

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

template <class Elem, bool streaming = false>
struct Scale {
  using V = typename ComputeOf<Elem>::type;
  V scale;
  explicit Scale(const EpilogueParams& p) : scale(splat<V>(p.scale)) {}
  void operator()(const Elem* in, Elem* out, Keep keep) const {
    const V result = keep_or_zero(keep, mul(load(in), scale));
    if constexpr (streaming) {
      stream(out, result);
    } else {
      store(out, result);
    }
  }
};

// Two vectors at a time, where the instruction set has a faster way for that.
template <class Elem, bool streaming>
void apply_pair(const Scale<Elem, streaming>& op, const Elem* in, Elem* out, Keep first,
                Keep second) {
  if constexpr (kHasPair<Elem> && streaming) {
    stream_pair(out, scale_pair(in, first, second, op.scale));
  } else if constexpr (kHasPair<Elem>) {
    store_pair(out, scale_pair(in, first, second, op.scale));
  } else {
    op(in, out, first);
    op(in + kVector, out + kVector, second);
  }
}
template <class Elem, class Op>
void apply_pair(const Op& op, const Elem* in, Elem* out, Keep first, Keep second) {
  op(in, out, first);
  op(in + kVector, out + kVector, second);
}

template <class Elem>
struct Affine {
  using V = typename ComputeOf<Elem>::type;
  V scale, bias, dropped;
  explicit Affine(const EpilogueParams& p)
      : scale(splat<V>(p.scale)), bias(splat<V>(p.bias)), dropped(splat<V>(p.dropped)) {}
  void operator()(const Elem* in, Elem* out, Keep keep) const {
    store(out, select(keep, fma(load(in), scale, bias), dropped));
  }
};

struct StoreBool {
  explicit StoreBool(const EpilogueParams&) {}
  void operator()(const BoolElem*, BoolElem* out, Keep keep) const {
    store_bytes(&out->byte, keep);
  }
};

// Where the decisions of the next group come from: computed, or read from stored bits.
class PhiloxSource {
 public:
  explicit PhiloxSource(const MaskRun& mask)
      : schedule_(mask.key), block_(mask.index >> 3), threshold_(mask.threshold) {}
  void seek(uint64_t index) { block_ = index >> 3; }
  void next(Keep (&keep)[kVectors]) {
    keep_group(schedule_, block_, threshold_, keep);
    block_ += kVector;
  }

 private:
  PhiloxSchedule schedule_;
  uint64_t block_;
  uint32_t threshold_;
};

class BitsSource {
 public:
  BitsSource(const uint64_t* bits, int64_t n) : bits_(bits), words_((n + 63) / 64) {}
  void next(Keep (&keep)[kVectors]) {
    for (int w = 0; w < 2; ++w) {
      const uint64_t word = words_ > 0 ? *bits_ : 0;
      ++bits_, --words_;
      for (int v = 0; v < 4; ++v) {
        keep[4 * w + v] = keep_from_bits(static_cast<uint16_t>(word >> 16 * v));
      }
    }
  }

 private:
  const uint64_t* bits_;
  int64_t words_;
};

// Elements [begin, end) of a group, of which in[0] and out[0] are element `begin`. Vectors that the
// range covers only in part go through a buffer, so that nothing outside the range is touched.
template <class Elem, class Op>
void part_of_group(const Keep (&keep)[kVectors], int begin, int end, const Elem* in, Elem* out,
                   const Op& op) {
  for (int v = begin / kVector; v * kVector < end; ++v) {
    const int first = v * kVector < begin ? begin : v * kVector;
    const int last = (v + 1) * kVector < end ? (v + 1) * kVector : end;
    const int at = first - begin;
    if (last - first == kVector) {
      op(in + at, out + at, keep[v]);
      continue;
    }
    alignas(64) Elem buffer[kVector] = {};
    const int shift = first - v * kVector;
    const size_t bytes = (last - first) * sizeof(Elem);
    if constexpr (!std::is_same_v<Elem, BoolElem>) std::memcpy(buffer + shift, in + at, bytes);
    op(buffer, buffer, keep[v]);
    std::memcpy(out + at, buffer + shift, bytes);
  }
}

// `skip` elements of the first group come before the run.
template <class Elem, class Op, class Source>
void for_each_group(Source source, int skip, const Elem* in, Elem* out, int64_t n, const Op& op) {
  Keep keep[kVectors];
  int64_t j = 0;
  if (skip != 0) {
    source.next(keep);
    const int end = skip + n < kGroup ? static_cast<int>(skip + n) : kGroup;
    part_of_group(keep, skip, end, in, out, op);
    j = end - skip;
  }
  for (; j + kGroup <= n; j += kGroup) {
    // The hardware's own prefetch stops at every page. Past the end it is harmless.
    const auto ahead = reinterpret_cast<uintptr_t>(in + j) + kPrefetchBytes;
    for (size_t line = 0; line < kGroup * sizeof(Elem); line += 64) prefetch(ahead + line);
    source.next(keep);
    for (int v = 0; v < kVectors; v += 2) {
      apply_pair(op, in + j + v * kVector, out + j + v * kVector, keep[v], keep[v + 1]);
    }
  }
  if (j < n) {
    source.next(keep);
    part_of_group(keep, 0, static_cast<int>(n - j), in + j, out + j, op);
  }
}

template <class Elem, class Op>
void run(const void* in, void* out, int64_t n, const MaskRun& mask, const EpilogueParams& params) {
  for_each_group(PhiloxSource(mask), static_cast<int>(mask.index & 7), static_cast<const Elem*>(in),
                 static_cast<Elem*>(out), n, Op(params));
}

template <class Elem, class Op>
void apply_bits(const void* in, void* out, int64_t n, const uint64_t* bits,
                const EpilogueParams& params) {
  for_each_group(BitsSource(bits, n), 0, static_cast<const Elem*>(in), static_cast<Elem*>(out), n,
                 Op(params));
}

inline void keep_bits_row(PhiloxSource& source, uint64_t index, uint64_t* bits, int64_t n) {
  const int skip = static_cast<int>(index & 7);
  source.seek(index);
  Keep keep[kVectors];
  for (int64_t j = 0, at = 0; j < n + skip; j += kGroup) {
    source.next(keep);
    for (int w = 0; w < 2; ++w, ++at) {
      uint64_t word = 0;
      for (int v = 0; v < 4; ++v) {
        word |= static_cast<uint64_t>(keep_to_bits(keep[4 * w + v])) << 16 * v;
      }
      // Bit `skip` of the first word is the row's first, so each word ends in the next one.
      if (skip != 0 && at > 0 && (at - 1) * 64 < n) bits[at - 1] |= word << (64 - skip);
      if (at * 64 < n) bits[at] = word >> skip;
    }
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

template <class Elem>
constexpr Kernels::Of scale() {
  return {run<Elem, Scale<Elem>>, apply_bits<Elem, Scale<Elem>>, run<Elem, Scale<Elem, true>>,
          apply_bits<Elem, Scale<Elem, true>>};
}

template <class Elem>
constexpr Kernels::Of affine() {
  return {run<Elem, Affine<Elem>>, apply_bits<Elem, Affine<Elem>>, nullptr, nullptr};
}

inline constexpr Kernels make_kernels(const char* name) {
  return {name,
          {scale<double>(), scale<float>(), scale<Float16>(), scale<BFloat16>()},
          {affine<double>(), affine<float>(), affine<Float16>(), affine<BFloat16>()},
          {run<BoolElem, StoreBool>, apply_bits<BoolElem, StoreBool>, nullptr, nullptr},
          keep_bits,
          fence};
}
