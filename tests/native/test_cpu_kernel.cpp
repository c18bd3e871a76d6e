// The CPU kernel, bit by bit against a scalar loop over csrc/contract/mask.h.
// DROPOUT_EXT_CPU_VARIANT names the variant; with the argument `list` it prints those that this
// machine runs. Sizes, element indices and alignments are all those that the kernel tells apart:
// blocks of 8, vectors of 16 elements, words of 64 keep bits, groups of 128, and the steps of
// plan.cpp.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/kernel.h"
#include "../../csrc/cpu/plan.h"
#include "../../csrc/cpu/row_kernel.h"
#include "half.h"

namespace {

using namespace dropout_ext;
using cpu::Kernels;
using cpu::MaskRun;

constexpr int64_t kMaxRun = 1100;
constexpr int64_t kLongRun = 70001;
constexpr int kCanary = 64;

int failures = 0;

[[gnu::format(printf, 1, 2)]] void fail(const char* format, ...) {
  if (++failures > 20) return;
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  std::fputc('\n', stderr);
  va_end(args);
}

// The conversions of bfloat16 are told otherwise than in csrc/cpu/half.h: by choosing the nearer
// neighbour.
struct Half {
  uint16_t bits;
  using Compute = float;
  static constexpr Dtype kDtype = Dtype::kFloat16;
  static float load(Half h) { return half_to_float(h.bits); }
  static Half store(float f) { return {float_to_half(f)}; }
};

struct Brain {
  uint16_t bits;
  using Compute = float;
  static constexpr Dtype kDtype = Dtype::kBFloat16;
  static float load(Brain h) {
    const uint32_t u = static_cast<uint32_t>(h.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  static Brain store(float f) {
    if (std::isnan(f)) return {0x7fc0};
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const Brain toward_zero{static_cast<uint16_t>(u >> 16)};
    if (std::isinf(f)) return toward_zero;
    const Brain away{static_cast<uint16_t>(toward_zero.bits + 1)};
    const double below = load(toward_zero);
    // The neighbour of the largest finite number stands for 2^128.
    const double above = std::isinf(load(away)) ? std::copysign(0x1p128, f) : load(away);
    const double to_below = std::fabs(f - below), to_above = std::fabs(above - f);
    if (to_below != to_above) return to_below < to_above ? toward_zero : away;
    return toward_zero.bits % 2 == 0 ? toward_zero : away;
  }
};

struct Single {
  float value;
  using Compute = float;
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static float load(Single x) { return x.value; }
  static Single store(float f) { return {f}; }
};

struct Double {
  double value;
  using Compute = double;
  static constexpr Dtype kDtype = Dtype::kFloat64;
  static double load(Double x) { return x.value; }
  static Double store(double f) { return {f}; }
};

struct Bool {
  uint8_t value;
  static constexpr Dtype kDtype = Dtype::kBool;
};

template <class Part>
struct Complex {
  Part real, imag;
  static constexpr Dtype kDtype =
      std::is_same_v<Part, Double> ? Dtype::kComplex128 : Dtype::kComplex64;
};

template <class Elem>
inline constexpr bool is_complex =
    Elem::kDtype == Dtype::kComplex128 || Elem::kDtype == Dtype::kComplex64;

template <class Elem>
bool same(Elem a, Elem b) {
  if (std::memcmp(&a, &b, sizeof(Elem)) == 0) return true;
  if constexpr (std::is_same_v<Elem, Bool>) {
    return false;
  } else if constexpr (is_complex<Elem>) {
    return same(a.real, b.real) && same(a.imag, b.imag);
  } else {
    return std::isnan(Elem::load(a)) && std::isnan(Elem::load(b));
  }
}

template <class Elem>
Elem expected(Elem in, bool keep, const EpilogueParams& params) {
  if constexpr (std::is_same_v<Elem, Bool>) {
    return {keep};
  } else if constexpr (is_complex<Elem>) {
    return {expected(in.real, keep, params), expected(in.imag, keep, params)};
  } else {
    using Compute = typename Elem::Compute;
    const Compute x = Elem::load(in), scale = static_cast<Compute>(params.scale);
    const Compute bias = static_cast<Compute>(params.bias);
    const Compute kept = bias == 0 && std::signbit(bias) ? x * scale : std::fma(x, scale, bias);
    return Elem::store(keep ? kept : static_cast<Compute>(params.dropped));
  }
}

// Of Epilogue::kAdd.
template <class Elem>
Elem expected_sum(Elem in, Elem residual, bool keep, const EpilogueParams& params) {
  using Compute = typename Elem::Compute;
  return Elem::store(std::fma(keep ? Elem::load(in) : Compute{0},
                              static_cast<Compute>(params.scale), Elem::load(residual)));
}

template <class Elem>
Elem random_value(std::mt19937_64& random) {
  if constexpr (is_complex<Elem>) {
    using Part = decltype(Elem::real);
    return {random_value<Part>(random), random_value<Part>(random)};
  } else {
    const uint64_t bits = random();
    if constexpr (!std::is_same_v<Elem, Bool>) {
      const double x = static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-62;
      if (random() % 3 != 0) return Elem::store(static_cast<typename Elem::Compute>(x));
    }
    Elem any;  // NaN, infinity, subnormals
    std::memcpy(&any, &bits, sizeof(Elem));
    return any;
  }
}

template <class Elem>
std::vector<Elem> random_values(int64_t n) {
  std::mt19937_64 random(11);
  std::vector<Elem> values(n);
  for (Elem& value : values) value = random_value<Elem>(random);
  return values;
}

// n elements between canaries, `misalign` elements past an address aligned for streaming.
template <class Elem>
class Guarded {
 public:
  Guarded(int64_t n, int misalign)
      : n_(n), bytes_((misalign + n) * sizeof(Elem) + cpu::kStreamAlignment + 2 * kCanary, 0xa5) {
    const auto first = reinterpret_cast<uintptr_t>(bytes_.data()) + kCanary;
    const uintptr_t to_aligned = (0 - first) % cpu::kStreamAlignment;
    start_ = bytes_.data() + kCanary + to_aligned + misalign * sizeof(Elem);
  }
  Elem* data() { return reinterpret_cast<Elem*>(start_); }
  bool intact() const {
    for (const uint8_t* b = bytes_.data(); b < start_; ++b) {
      if (*b != 0xa5) return false;
    }
    for (const uint8_t* b = start_ + n_ * sizeof(Elem); b < bytes_.data() + bytes_.size(); ++b) {
      if (*b != 0xa5) return false;
    }
    return true;
  }

 private:
  int64_t n_;
  std::vector<uint8_t> bytes_;
  uint8_t* start_;
};

struct Case {
  const char* variant;
  Epilogue epilogue;
  EpilogueParams params;
};

// A key and a threshold with the scalar decisions of a long run from `index` on.
struct Mask {
  Mask(Key key, uint64_t index, double p, int64_t n) : run{key, index, 0}, keep(n) {
    run.threshold = static_cast<uint32_t>(threshold(p));
    for (int64_t j = 0; j < n; ++j) keep[j] = dropout_ext::keep(key, index + j, threshold(p));
  }
  MaskRun from(int64_t skip) const { return {run.key, run.index + skip, run.threshold}; }

  MaskRun run;
  std::vector<uint8_t> keep;
};

// Keep bits packed as Kernels::keep_bits packs them, with garbage behind the last.
std::vector<uint64_t> pack(const uint8_t* keep, int64_t n) {
  std::vector<uint64_t> bits((n + 63) / 64, 0xa5a5a5a5a5a5a5a5);
  for (int64_t j = 0; j < n; ++j) {
    const uint64_t bit = uint64_t{1} << (j & 63);
    bits[j >> 6] = keep[j] ? bits[j >> 6] | bit : bits[j >> 6] & ~bit;
  }
  return bits;
}

template <class Elem>
void check_output(const Case& c, const char* what, const Elem* in, const uint8_t* keep, int64_t n,
                  int64_t skip, Guarded<Elem>& out) {
  for (int64_t j = 0; j < n; ++j) {
    const Elem want = expected(in[j], keep[j], c.params);
    if (!same(out.data()[j], want)) {
      fail("%s, dtype %d, epilogue %d, %s: element %lld of %lld from %lld", c.variant,
           static_cast<int>(Elem::kDtype), static_cast<int>(c.epilogue), what,
           static_cast<long long>(j), static_cast<long long>(n), static_cast<long long>(skip));
      break;
    }
  }
  if (!out.intact()) {
    fail("%s, dtype %d, epilogue %d, %s: wrote outside %lld elements from %lld", c.variant,
         static_cast<int>(Elem::kDtype), static_cast<int>(c.epilogue), what,
         static_cast<long long>(n), static_cast<long long>(skip));
  }
}

template <class Elem>
void check_run(const Case& c, const Kernels::Of& of, const Mask& mask, int64_t skip, int64_t n,
               const std::vector<Elem>& values) {
  const uint8_t* keep = mask.keep.data() + skip;
  const int in_misalign = static_cast<int>((skip + n) % 17);
  const int out_misalign = static_cast<int>((skip * 3 + n * 5) % 17);
  // Exactly as long as it needs to be, so that AddressSanitizer sees what is read past the end.
  std::vector<Elem> in(values.begin(), values.begin() + n + in_misalign);
  const bool reads = c.epilogue != Epilogue::kKeepMask;
  const Elem* source = in.data() + in_misalign;
  {
    Guarded<Elem> out(n, out_misalign);
    of.run(reads ? source : out.data(), nullptr, out.data(), n, mask.from(skip), c.params);
    check_output(c, "run", source, keep, n, skip, out);
  }
  {
    Guarded<Elem> out(n, out_misalign);
    if (n > 0) std::memcpy(static_cast<void*>(out.data()), source, n * sizeof(Elem));
    of.run(out.data(), nullptr, out.data(), n, mask.from(skip), c.params);
    check_output(c, "run in place", source, keep, n, skip, out);
  }
  {
    Guarded<Elem> out(n, out_misalign);
    const std::vector<uint64_t> bits = pack(keep, n);
    of.apply_bits(reads ? source : out.data(), nullptr, out.data(), n, bits.data(), c.params);
    check_output(c, "apply_bits", source, keep, n, skip, out);
  }
  if (of.run_streaming != nullptr && mask.from(skip).index % kBlock == 0) {
    Guarded<Elem> out(n, 0);
    of.run_streaming(source, nullptr, out.data(), n, mask.from(skip), c.params);
    check_output(c, "run_streaming", source, keep, n, skip, out);
  }
  if (of.apply_bits_streaming != nullptr) {
    Guarded<Elem> out(n, 0);
    const std::vector<uint64_t> bits = pack(keep, n);
    of.apply_bits_streaming(source, nullptr, out.data(), n, bits.data(), c.params);
    check_output(c, "apply_bits_streaming", source, keep, n, skip, out);
  }
}

template <class Elem>
void check_dtype(const Kernels& kernels, const std::vector<Mask>& masks, const Mask& long_mask) {
  const std::vector<Elem> values = random_values<Elem>(kLongRun + 32);
  std::vector<Case> cases;
  if constexpr (std::is_same_v<Elem, Bool>) {
    cases.push_back({kernels.name, Epilogue::kKeepMask, {}});
  } else {
    cases.push_back({kernels.name, Epilogue::kAffine, {1 / 0.9}});
    cases.push_back({kernels.name, Epilogue::kAffine, {0.886, 0.1937, -1.558}});
  }
  for (const Case& c : cases) {
    const Kernels::Of& of = kernels.of(Elem::kDtype, c.epilogue, c.params);
    int64_t round = 0;
    for (int64_t n = 0; n <= kMaxRun; n += n < 300 ? 1 : 37, ++round) {
      check_run(c, of, masks[round % masks.size()], round * 7 % 131, n, values);
      check_run(c, of, masks[0], round % 16 * 8, n, values);
    }
    for (int64_t skip = 0; skip < 8; ++skip) {
      for (const int64_t n : {1, 8, 15, 17, 120, 127, 129, 137, 256}) {
        for (const Mask& mask : masks) check_run(c, of, mask, skip, n, values);
      }
    }
    check_run(c, of, long_mask, 3, kLongRun - 4, values);
  }
}

// Each of the 65536 inputs of a 16-bit format, all kept.
template <class Elem>
void check_every_value(const Kernels& kernels) {
  std::vector<Elem> in(65536);
  for (int i = 0; i < 65536; ++i) in[i].bits = static_cast<uint16_t>(i);
  for (const double scale : {1.0, 1 / 0.9, 0x1.002p-3, 3e-6, 7e4, 0x1p-110}) {
    for (const double bias : {-0.0, 0.37 * scale}) {
      const Case c{kernels.name, Epilogue::kAffine, {scale, bias, 0}};
      Guarded<Elem> out(in.size(), 1);
      kernels.of(Elem::kDtype, c.epilogue, c.params)
          .run(in.data(), nullptr, out.data(), in.size(), {{1, 2}, 3, 0}, c.params);
      const std::vector<uint8_t> keep(in.size(), 1);
      check_output(c, "every value", in.data(), keep.data(), in.size(), 0, out);
    }
  }
}

void check_keep_bits(const Kernels& kernels, const Mask& mask) {
  for (int64_t skip = 0; skip < 20; ++skip) {
    for (int64_t n = 0; n <= 520; n += n < 140 ? 1 : 19) {
      const size_t words = (n + 63) / 64;
      // Exact: AddressSanitizer sees a word too many.
      std::vector<uint64_t> bits(words, 0xa5a5a5a5a5a5a5a5);
      kernels.keep_bits(bits.data(), n, mask.from(skip), 1, 0, 0);
      for (int64_t j = 0; j < n; ++j) {
        if ((bits[j >> 6] >> (j & 63) & 1) == mask.keep[skip + j]) continue;
        fail("%s, keep_bits: bit %lld of %lld from %lld", kernels.name, static_cast<long long>(j),
             static_cast<long long>(n), static_cast<long long>(skip));
        break;
      }
    }
  }
}

// How a dimension of a drawn map moves through memory and mask.
struct Shape {
  const char* name;
  std::vector<int64_t> sizes;  // logical, outermost first
  std::vector<int> memory;     // logical dimensions from the outermost in the output's memory
  std::vector<uint64_t> mask_strides;
  std::vector<int64_t> in_strides = {};  // the output's if empty
  int64_t out_gap = 1;                   // of the output's innermost dimension
  int64_t slices = 1;
  uint64_t slice_mask_stride = 0;
};

std::vector<int64_t> memory_strides(const Shape& shape, int64_t gap) {
  std::vector<int64_t> strides(shape.sizes.size());
  for (size_t k = shape.memory.size(); k-- > 0; gap *= shape.sizes[shape.memory[k]]) {
    strides[shape.memory[k]] = gap;
  }
  return strides;
}

int64_t extent(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return last + 1;
}

template <class Elem>
void check_plan(const Shape& shape, const EpilogueParams& params, double p, uint64_t mask_offset,
                bool in_place, std::mt19937& random, Epilogue epilogue = Epilogue::kAffine) {
  const std::vector<int64_t> out_strides = memory_strides(shape, shape.out_gap);
  const bool reads = Elem::kDtype != Dtype::kBool;
  const bool same_strides = in_place || !reads || shape.in_strides.empty();
  const std::vector<int64_t> in_strides = same_strides ? out_strides : shape.in_strides;
  const int64_t out_extent = extent(shape.sizes, out_strides);
  const int64_t in_extent = extent(shape.sizes, in_strides);

  ApplyArgs args;
  args.dtype = Elem::kDtype;
  args.epilogue = reads ? epilogue : Epilogue::kKeepMask;
  args.params = params;
  args.threshold = static_cast<uint32_t>(threshold(p));
  args.slices = shape.slices;
  args.slice_in_stride = in_extent;
  args.slice_out_stride = out_extent;
  args.slice_mask_stride = shape.slice_mask_stride;
  args.map.ndim = static_cast<int>(shape.sizes.size());
  args.map.mask_offset = mask_offset;
  for (int d = 0; d < args.map.ndim; ++d) {
    args.map.dims[d] = {shape.sizes[d], in_strides[d], out_strides[d], shape.mask_strides[d]};
  }
  // A second input like the first, like the output, or expanded here and there.
  const bool adds = epilogue == Epilogue::kAdd;
  const int like = static_cast<int>(random() % 3);
  for (int d = 0; adds && d < args.map.ndim; ++d) {
    const int64_t stride = like == 0 ? in_strides[d] : out_strides[d];
    args.map.dims[d].in2_stride = like == 2 && random() % 2 == 0 ? 0 : stride;
  }
  args.slice_in2_stride = adds ? std::max(in_extent, out_extent) : 0;
  const IndexMap drawn = args.map;
  normalize(args.map);

  std::vector<Key> keys;
  for (int64_t j = 0; j < shape.slices; ++j) keys.push_back({random(), random()});

  const int misalign = static_cast<int>(random() % 17);
  std::vector<Elem> in = random_values<Elem>(misalign + in_extent * shape.slices);
  const std::vector<Elem> in2 = random_values<Elem>(1 + args.slice_in2_stride * shape.slices);
  Guarded<Elem> out(out_extent * shape.slices, misalign);
  if (in_place) std::copy(in.begin() + misalign, in.end(), out.data());
  // What is between the elements of the map stays as it is.
  std::vector<Elem> want(out.data(), out.data() + out_extent * shape.slices);
  for (int64_t slice = 0; slice < shape.slices; ++slice) {
    for (int64_t n = 0; n < drawn.numel(); ++n) {
      int64_t from = misalign + slice * in_extent, to = slice * out_extent, rest = n;
      int64_t from2 = 1 + slice * args.slice_in2_stride;
      uint64_t index = mask_offset + static_cast<uint64_t>(slice) * shape.slice_mask_stride;
      for (int d = drawn.ndim - 1; d >= 0; --d) {
        const int64_t position = rest % drawn.dims[d].size;
        rest /= drawn.dims[d].size;
        from += position * in_strides[d];
        from2 += position * drawn.dims[d].in2_stride;
        to += position * drawn.dims[d].out_stride;
        index += static_cast<uint64_t>(position) * drawn.dims[d].mask_stride;
      }
      const bool kept = keep(keys[slice], index, args.threshold);
      want[to] = expected(in[from], kept, args.params);
      if constexpr (!is_complex<Elem> && Elem::kDtype != Dtype::kBool) {
        if (adds) want[to] = expected_sum(in[from], in2[from2], kept, args.params);
      }
    }
  }

  args.in = !reads ? nullptr : in_place ? out.data() : in.data() + misalign;
  args.in2 = adds ? in2.data() + 1 : nullptr;
  args.out = out.data();
  const cpu::Plan plan(args, keys.data());
  // Any split of the units, in any order.
  std::vector<int64_t> cuts = {0, plan.units()};
  for (int k = 0; k < 3; ++k) cuts.push_back(random() % (plan.units() + 1));
  std::sort(cuts.begin(), cuts.end());
  for (size_t k = cuts.size() - 1; k > 0; --k) plan.run(cuts[k - 1], cuts[k]);

  for (size_t j = 0; j < want.size(); ++j) {
    if (same(out.data()[j], want[j])) continue;
    fail("%s, dtype %d, bias %g, p %g, %s%s: output address %zu", cpu::kernels().name,
         static_cast<int>(Elem::kDtype), params.bias, p, shape.name, in_place ? ", in place" : "",
         j);
    break;
  }
  if (!out.intact()) fail("%s: wrote outside the output of %s", cpu::kernels().name, shape.name);
}

std::vector<int> row_major_memory(int n) {
  std::vector<int> memory(n);
  for (int d = 0; d < n; ++d) memory[d] = d;
  return memory;
}

// The members of the family and the memory formats, at sizes around the steps of the plan.
std::vector<Shape> named_shapes() {
  const uint64_t wide = uint64_t{1} << 33;
  return {
      {"one element", {}, {}, {}},
      {"flat", {50001}, {0}, {1}},
      {"flat with a key per slice", {3001}, {0}, {1}, {}, 1, 7, 3001},
      {"one mask under several keys", {130}, {0}, {1}, {}, 1, 9, 0},
      {"shard", {9, 700}, {0, 1}, {wide, 1}},
      {"shard whose rows leave the blocks", {40, 33}, {0, 1}, {333, 1}},
      {"locked over time", {3, 50, 130}, {0, 1, 2}, {130, 0, 1}},
      {"locked over time, long rows", {2, 3, 9001}, {0, 1, 2}, {9001, 0, 1}},
      {"feature, short runs", {5, 40, 49}, {0, 1, 2}, {40, 1, 0}},
      {"feature, runs of 63", {3, 300, 63}, {0, 1, 2}, {300, 1, 0}},
      {"feature, runs of 64", {3, 300, 64}, {0, 1, 2}, {300, 1, 0}},
      {"feature, runs of 1", {3, 300, 1}, {0, 1, 2}, {300, 1, 0}},
      {"feature, long runs", {2, 3, 20011}, {0, 1, 2}, {3, 1, 0}},
      {"feature, strided output", {5, 40, 49}, {0, 1, 2}, {40, 1, 0}, {}, 3},
      {"feature, channels last", {3, 70, 90}, {0, 2, 1}, {70, 1, 0}},
      {"path", {30, 333}, {0, 1}, {1, 0}},
      {"one decision", {4099}, {0}, {0}},
      {"channels last", {2, 67, 190}, {0, 2, 1}, {67 * 190, 190, 1}},
      {"transposed", {270, 1100}, {1, 0}, {1100, 1}},
      {"transposed, over the tile", {1030, 259}, {1, 0}, {259, 1}},
      {"transposed, over the joined tiles", {4700, 19}, {1, 0}, {19, 1}},
      {"transposed shard", {70, 130}, {1, 0}, {wide, 1}},
      {"transposed input", {130, 300}, {0, 1}, {300, 1}, {1, 130}},
      {"expanded input", {300, 21}, {0, 1}, {21, 1}, {0, 1}},
      {"wholly expanded input", {70, 201}, {0, 1}, {201, 1}, {0, 0}},
      {"overlapping input", {700, 30}, {0, 1}, {30, 1}, {1, 1}},
      {"strided input", {1300}, {0}, {1}, {3}},
      {"strided input and output", {2, 1300}, {0, 1}, {1300, 1}, {5 * 1300, 5}, 2},
      {"every third index", {1300}, {0}, {3}},
      {"descending index", {60, 1300}, {0, 1}, {uint64_t{0} - 1300, uint64_t{0} - 1}},
      {"descending rows", {60, 130}, {0, 1}, {uint64_t{0} - 130, 1}},
      {"no unit stride in the mask", {20, 700}, {1, 0}, {1400, 2}},
  };
}

Shape draw_shape(std::mt19937& random) {
  const auto draw = [&](int bound) { return static_cast<int>(random() % bound); };
  const int n = 1 + draw(5);
  Shape shape{"a drawn map", std::vector<int64_t>(n), row_major_memory(n),
              std::vector<uint64_t>(n)};
  if (draw(2)) std::shuffle(shape.memory.begin(), shape.memory.end(), random);
  const int bound = n == 1 ? 3000 : n == 2 ? 150 : n == 3 ? 24 : 7;
  for (int64_t& size : shape.sizes) size = 1 + draw(bound);
  uint64_t index = draw(8) == 0 ? 2 : 1;
  const bool shares = draw(2), shard = draw(2);
  for (int d = n - 1; d >= 0; --d) {
    const bool shared = shares && draw(2);
    shape.mask_strides[d] = shared ? 0 : index;
    if (!shared) index *= shape.sizes[d] + (shard ? draw(9) : 0);
  }
  if (draw(2)) {
    Shape other = shape;
    std::shuffle(other.memory.begin(), other.memory.end(), random);
    shape.in_strides = memory_strides(other, 1 + draw(2));
    for (int64_t& stride : shape.in_strides) {
      if (draw(4) == 0) stride = 0;
    }
  }
  shape.out_gap = draw(5) == 0 ? 2 : 1;
  if (draw(4) == 0) {
    shape.slices = 1 + draw(4);
    shape.slice_mask_stride = draw(2) ? 0 : index;
  }
  return shape;
}

template <class Elem>
void check_plans(const Shape& shape, std::mt19937& random) {
  const double probabilities[] = {0.5, 0.1, 0.9, 1 - 1e-9, 1e-12};
  const uint64_t offsets[] = {0, 5, (uint64_t{1} << 35) - 77, uint64_t{0} - 77, random()};
  constexpr bool kReads = Elem::kDtype != Dtype::kBool;
  std::vector<EpilogueParams> epilogues = {{}};
  if (kReads) epilogues = {{1 / 0.9}, {1 / 0.9, 0.1937, -1.558}};
  if constexpr (kReads && !is_complex<Elem>) {
    check_plan<Elem>(shape, {1 / 0.7}, 0.3, offsets[random() % 5], false, random, Epilogue::kAdd);
  }
  for (const EpilogueParams& params : epilogues) {
    for (const bool in_place : {false, true}) {
      const double p = random() % 3 != 0 ? 0.5 : probabilities[random() % 5];
      if (in_place && !kReads) continue;
      check_plan<Elem>(shape, params, p, offsets[random() % 5], in_place, random);
    }
  }
}

void check_all_plans() {
  std::mt19937 random(5);
  for (const Shape& shape : named_shapes()) {
    check_plans<Double>(shape, random);
    check_plans<Single>(shape, random);
    check_plans<Half>(shape, random);
    check_plans<Brain>(shape, random);
    check_plans<Complex<Double>>(shape, random);
    check_plans<Complex<Single>>(shape, random);
    check_plans<Bool>(shape, random);
  }
  for (int round = 0; round < 400; ++round) {
    const Shape shape = draw_shape(random);
    if (round % 4 == 0) check_plans<Single>(shape, random);
    if (round % 4 == 1) check_plans<Half>(shape, random);
    if (round % 4 == 2) check_plans<Complex<Single>>(shape, random);
    if (round % 4 == 3) check_plans<Bool>(shape, random);
  }
}

// Memory that may be written past the caches.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{cpu::kStreamAlignment};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const Aligned&) const { return true; }
};
template <class T>
using AlignedVector = std::vector<T, Aligned<T>>;

// The passes over a row, on memory of exactly its length, so that sanitizers see every access
// outside it; the sum against plain arithmetic, the others against the portable variant.
template <class T, class S>
void check_row(const Kernels& kernels, int64_t n, int skip, bool stored, std::mt19937_64& random) {
  using C = std::conditional_t<std::is_same_v<S, Double>, Double, Single>;
  using Compute = typename C::Compute;
  constexpr int kRows = cpu::kReduceRows;
  const auto values = [&](auto elem, int rows = 1) {
    std::vector<decltype(elem)> all(rows * n);
    for (auto& value : all) value = random_value<decltype(elem)>(random);
    return all;
  };
  const auto x = values(T{}), grad = values(T{}, kRows);
  const auto residual = values(S{}, kRows), grad_sum = values(S{});
  const auto weight = values(C{}), bias = values(C{});
  const Key key{random(), random()};
  const MaskRun run{key, 8 * (random() >> 8) + skip, static_cast<uint32_t>(threshold(0.3))};
  std::vector<uint64_t> bits((n + 63) / 64);
  cpu::keep_bits_one_by_one(bits.data(), n, key, run.index, 1, run.threshold);
  const cpu::RowKernels::Mask mask{stored ? bits.data() : nullptr, run};
  const int pair = row_pair(T::kDtype, S::kDtype);
  const double scale = 1 / 0.7;
  const bool streaming = n % cpu::kStreamColumns == 0 && mask.is_aligned();

  struct Results {
    AlignedVector<S> sum, grad_sum;
    AlignedVector<T> out, grad_input;
    std::vector<C> scaled_values, values, grad_weight, grad_bias;
    cpu::RowKernels::Moments moments;
    cpu::RowKernels::Sums sums[kRows];
  } results[2];
  const Kernels* const both[] = {&kernels, &cpu::kernels_portable};
  for (int i = 0; i < 2; ++i) {
    const cpu::RowKernels::Of& of = both[i]->rows->of[pair];
    Results& r = results[i];
    r = {AlignedVector<S>(n),
         AlignedVector<S>(n),
         AlignedVector<T>(n),
         AlignedVector<T>(n),
         std::vector<C>(n),
         std::vector<C>(n),
         std::vector<C>(n),
         std::vector<C>(n),
         {},
         {}};
    of.scaled_add(x.data(), residual.data(), {nullptr, false, r.scaled_values.data()}, n, mask,
                  scale, bias.data(), weight.data(), 0.7);
    of.add(x.data(), residual.data(), {r.sum.data(), streaming, r.values.data()}, n, mask, scale);
    const cpu::RowKernels& rows = *both[i]->rows;
    rows.normalize[static_cast<int>(T::kDtype)](r.scaled_values.data(), r.out.data(), n, 0.1, 1.3,
                                                weight.data(), bias.data(), streaming);
    r.moments = rows.moments[static_cast<int>(S::kDtype)](r.values.data(), n, skip % 2 == 0);
    const double mean[kRows] = {0.1, -0.2, 3, 0}, rstd[kRows] = {1.3, 0.7, 1e-3, 11};
    // Side by side, or one after the other by the portable variant.
    const int side = i == 0 ? kRows : 1;
    for (int row = 0; row < kRows; row += side) {
      (side == 1 ? of.reduce : of.reduce_rows)(
          grad.data() + row * n, residual.data() + row * n, n, mean + row, rstd + row,
          weight.data(), r.grad_weight.data(), r.grad_bias.data(), r.sums + row);
    }
    of.backward(grad.data(), residual.data(), skip % 3 == 0 ? nullptr : grad_sum.data(), n, 0.1,
                1.3, weight.data(), 0.01, 0.02, r.grad_sum.data(), r.grad_input.data(), mask, scale,
                streaming);
  }
  cpu::kernels().fence();
  const auto equal = [](const auto& a, const auto& b) {
    for (size_t j = 0; j < a.size(); ++j) {
      if (!same(a[j], b[j])) return false;
    }
    return true;
  };
  const auto alike = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  const auto& [a, b] = results;
  for (int64_t j = 0; j < n; ++j) {
    const bool kept = bits[j / 64] >> j % 64 & 1;
    const Compute t = kept ? static_cast<Compute>(T::load(x[j])) : 0;
    const Compute sum =
        std::fma(t, static_cast<Compute>(scale), static_cast<Compute>(S::load(residual[j])));
    const S rounded = S::store(sum);
    if (same(a.sum[j], rounded) && same(a.values[j], C::store(S::load(rounded)))) continue;
    fail("%s, rows, pair %d: sum %d of %d", kernels.name, pair, static_cast<int>(j),
         static_cast<int>(n));
    break;
  }
  if (!equal(a.out, b.out) || !equal(a.grad_sum, b.grad_sum) ||
      !equal(a.grad_input, b.grad_input) || !equal(a.grad_weight, b.grad_weight) ||
      !equal(a.grad_bias, b.grad_bias) || !alike(a.moments.mean, b.moments.mean) ||
      !alike(a.moments.square, b.moments.square) || !equal(a.scaled_values, b.scaled_values) ||
      !std::equal(a.sums, a.sums + kRows, b.sums, [&](const auto& left, const auto& right) {
        return alike(left.g, right.g) && alike(left.gx, right.gx);
      })) {
    fail("%s, rows, pair %d: %d elements differ from portable", kernels.name, pair,
         static_cast<int>(n));
  }
}

template <class T, class S>
void check_rows_of(const Kernels& kernels) {
  std::mt19937_64 random(3);
  for (int round = 0; round < 60; ++round) {
    int64_t n = round < 20 ? round + 1 : 1 + static_cast<int64_t>(random() % 700);
    if (round % 3 == 2) n *= cpu::kStreamColumns;
    check_row<T, S>(kernels, round == 59 ? 9001 : n, static_cast<int>(random() % 8), round % 2 == 0,
                    random);
  }
}

void check_rows(const Kernels& kernels) {
  check_rows_of<Double, Double>(kernels);
  check_rows_of<Single, Single>(kernels);
  check_rows_of<Half, Half>(kernels);
  check_rows_of<Brain, Brain>(kernels);
  check_rows_of<Half, Single>(kernels);
  check_rows_of<Brain, Single>(kernels);
  check_rows_of<Single, Half>(kernels);
  check_rows_of<Single, Brain>(kernels);
}

void check_runs(const Kernels& kernels) {
  const int64_t n = kMaxRun + 140;
  std::vector<Mask> masks;
  masks.emplace_back(Key{42, 0}, 0, 0.5, n);
  masks.emplace_back(Key{0xdeadbeefcafef00d, (uint64_t{1} << 40) + 3}, 5, 0.1, n);
  // Element indices that cross 2^32 blocks, 2^63 and 2^64.
  masks.emplace_back(Key{~uint64_t{0}, ~uint64_t{0}}, (uint64_t{1} << 35) - 100, 0.5, n);
  masks.emplace_back(Key{7, uint64_t{1} << 63}, (uint64_t{1} << 63) - 100, 0.9, n);
  masks.emplace_back(Key{0x123456789abcdef0, 9}, uint64_t{0} - 100, 0.5, n);
  // The smallest and the largest threshold that a kernel sees.
  masks.emplace_back(Key{42, 0}, 0, 0.0, n);
  masks.emplace_back(Key{42, 0}, 0, 1 - 0x1p-32, n);
  // Thresholds that a word equals, in a lower and an upper lane: kept.
  for (const uint64_t index : {17, 21}) {
    const double p = element_word(Key{42, 0}, index) * 0x1p-32;
    masks.emplace_back(Key{42, 0}, 0, p, n);
  }
  const Mask long_mask(Key{3, 4}, (uint64_t{1} << 32) - 1000, 0.3, kLongRun);

  check_dtype<Double>(kernels, masks, long_mask);
  check_dtype<Single>(kernels, masks, long_mask);
  check_dtype<Half>(kernels, masks, long_mask);
  check_dtype<Brain>(kernels, masks, long_mask);
  check_dtype<Bool>(kernels, masks, long_mask);
  check_every_value<Half>(kernels);
  check_every_value<Brain>(kernels);
  for (const Mask& mask : masks) check_keep_bits(kernels, mask);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "list") {
    for (const Kernels* kernels : cpu::available_kernels()) std::puts(kernels->name);
    return 0;
  }
  const Kernels& kernels = cpu::kernels();
  check_runs(kernels);
  check_all_plans();
  check_rows(kernels);
  if (failures != 0) return 1;
  std::printf("%s ok\n", kernels.name);
  return 0;
}
