// The body of the CPU kernel, included once per instruction set, inside that set's namespace and
// under its target attribute, behind a simd_*.h that defines
//   Keep        keep decisions of 16 elements; keep_from_bits, keep_to_bits, store_bytes
//   F32, F64    16 elements in the compute type; load, store, splat, fma, select, mul_or_zero;
//               stream, a store past the caches to an address aligned to the vector
//   kHasPair    of an element type: whether scale_pair, store_pair and stream_pair take 32 of it
//   keep_groups<n>  the decisions of n * 16 consecutive blocks with one upper half of their number,
//               n * 128 elements; kGroupsAtATime is the n that is fastest
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

// An epilogue between a load and a store, past the caches if `streaming`.
template <template <class> class Epilogue, class Elem, bool streaming>
struct Op {
  Epilogue<typename ComputeOf<Elem>::type> f;
  explicit Op(const EpilogueParams& p) : f(p) {}
  void operator()(const Elem* in, Elem* out, Keep keep) const {
    const auto result = f(keep, load(in));
    if constexpr (streaming) {
      stream(out, result);
    } else {
      store(out, result);
    }
  }
};

// Two vectors at a time, where the instruction set has a faster way for that.
template <class Elem, bool streaming>
void apply_pair(const Op<Scale, Elem, streaming>& op, const Elem* in, Elem* out, Keep first,
                Keep second) {
  if constexpr (kHasPair<Elem> && streaming) {
    stream_pair(out, scale_pair(in, first, second, op.f.scale));
  } else if constexpr (kHasPair<Elem>) {
    store_pair(out, scale_pair(in, first, second, op.f.scale));
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

struct StoreBool {
  explicit StoreBool(const EpilogueParams&) {}
  void operator()(const BoolElem*, BoolElem* out, Keep keep) const {
    store_bytes(&out->byte, keep);
  }
};

// Where the decisions of the next groups come from: read from stored bits, or computed.
class BitsSource {
 public:
  BitsSource(const uint64_t* bits, int64_t n) : bits_(bits), words_((n + 63) / 64) {}
  template <int groups>
  void next(Keep (&keep)[groups * kVectors]) {
    for (int w = 0; w < 2 * groups; ++w) {
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

class PhiloxSource {
 public:
  explicit PhiloxSource(const MaskRun& mask)
      : key_(mask.key),
        threshold_(mask.threshold),
        block_(mask.index >> 3),
        block_high_(block_high(block_)),
        schedule_(mask.key, block_high_) {}
  void seek(uint64_t index) { block_ = index >> 3; }
  template <int groups>
  void next(Keep (&keep)[groups * kVectors]) {
    constexpr int kBlocks = groups * kGroup / kBlock;
    const uint32_t high = block_high(block_);
    if (high == block_high(block_ + kBlocks - 1)) {
      if (high != block_high_) schedule_.set_block_high(block_high_ = high);
      keep_groups<groups>(schedule_, block_, threshold_, keep);
    } else {
      // Once in 2^35 elements of a run. Out of line: inlined, it costs the loops registers.
      uint64_t bits[groups * kGroup / 64];
      keep_bits_one_by_one(bits, groups * kGroup, key_, block_ * kBlock, 1, threshold_);
      BitsSource(bits, groups * kGroup).next<groups>(keep);
    }
    block_ += kBlocks;
  }

 private:
  Key key_;
  uint32_t threshold_;
  uint64_t block_;
  uint32_t block_high_;
  PhiloxSchedule schedule_;
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

// As many whole groups as there are in n elements, `groups` at a time. Returns how many elements
// that was.
template <int groups, class Elem, class Op, class Source>
int64_t whole_groups(Source& source, const Elem* in, Elem* out, int64_t n, const Op& op) {
  constexpr int kStep = groups * kGroup;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    // The hardware's own prefetch stops at every page. Past the end it is harmless.
    const auto ahead = reinterpret_cast<uintptr_t>(in + j) + kPrefetchBytes;
    for (size_t line = 0; line < kStep * sizeof(Elem); line += 64) prefetch(ahead + line);
    Keep keep[groups * kVectors];
    source.template next<groups>(keep);
    for (int v = 0; v < groups * kVectors; v += 2) {
      const int64_t at = j + v * kVector;
      apply_pair(op, in + at, out + at, keep[v], keep[v + 1]);
    }
  }
  return j;
}

// `skip` elements of the first group come before the run.
template <class Elem, class Op, class Source>
void for_each_group(Source source, int skip, const Elem* in, Elem* out, int64_t n, const Op& op) {
  Keep keep[kVectors];
  int64_t j = 0;
  if (skip != 0) {
    source.template next<1>(keep);
    const int end = skip + n < kGroup ? static_cast<int>(skip + n) : kGroup;
    part_of_group(keep, skip, end, in, out, op);
    j = end - skip;
  }
  if constexpr (kGroupsAtATime > 1) {
    j += whole_groups<kGroupsAtATime>(source, in + j, out + j, n - j, op);
  }
  j += whole_groups<1>(source, in + j, out + j, n - j, op);
  if (j < n) {
    source.template next<1>(keep);
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

inline constexpr Kernels make_kernels(const char* name) {
  return {
      name,
      {of<Scale, double>(), of<Scale, float>(), of<Scale, Float16>(), of<Scale, BFloat16>()},
      {of<Affine, double>(), of<Affine, float>(), of<Affine, Float16>(), of<Affine, BFloat16>()},
      {run<BoolElem, StoreBool>, apply_bits<BoolElem, StoreBool>, nullptr, nullptr},
      keep_bits,
      fence};
}
