// Runs the CUDA kernels behind cuda_shim.h and compares every byte that they leave with a scalar
// loop over the mask contract (csrc/contract/mask.h). Arguments name the groups to run; none runs
// all.

#include "cuda_kernels.h"
//
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dropout_ext {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat64,  Dtype::kFloat32,   Dtype::kFloat16,
                             Dtype::kBFloat16, Dtype::kComplex64, Dtype::kComplex128,
                             Dtype::kBool};
constexpr uint64_t kHalf = uint64_t{1} << 31;  // p = 0.5
std::mt19937_64 rng(20240229);

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}
template <typename T>
T one_of(std::initializer_list<T> choices) {
  return choices.begin()[pick(0, static_cast<int64_t>(choices.size()) - 1)];
}

int parts(Dtype dtype) { return dtype == Dtype::kComplex64 || dtype == Dtype::kComplex128 ? 2 : 1; }

// Values of the formats, in double, by their definition: sign, exponent, fraction.
double decode(uint64_t bits, int exponent_bits, int fraction_bits) {
  const uint64_t fraction = bits & ((uint64_t{1} << fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? NAN : sign * INFINITY;
  const double significand =
      static_cast<double>(fraction) + (exponent != 0 ? std::ldexp(1.0, fraction_bits) : 0.0);
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias - fraction_bits);
}

// To nearest even, in double.
double round_to(double x, int exponent_bits, int fraction_bits) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int quantum = std::max(std::ilogb(x), 1 - bias) - fraction_bits;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -quantum)), quantum);
  return std::abs(y) >= std::ldexp(1.0, bias + 1) ? std::copysign(INFINITY, x) : y;
}

double read(Dtype dtype, const char* at, int part) {
  uint16_t half = 0;
  float single = 0;
  double twice = 0;
  switch (dtype) {
    case Dtype::kFloat16: std::memcpy(&half, at, 2); return decode(half, 5, 10);
    case Dtype::kBFloat16: std::memcpy(&half, at, 2); return decode(half, 8, 7);
    case Dtype::kFloat32:
    case Dtype::kComplex64: std::memcpy(&single, at + 4 * part, 4); return single;
    case Dtype::kFloat64:
    case Dtype::kComplex128: std::memcpy(&twice, at + 8 * part, 8); return twice;
    case Dtype::kBool: return *reinterpret_cast<const unsigned char*>(at);
  }
  return 0;
}

constexpr EpilogueParams kAlpha{.scale = 2.0 / 0.9, .bias = 0.3, .dropped = -1.7};

struct Call {
  Dtype dtype = Dtype::kFloat32;
  bool adds_second = false;  // Epilogue::kAdd, for the real dtypes
  EpilogueParams params{.scale = 2.0 / 0.9};
  uint32_t threshold = kHalf;
  std::vector<Dim> dims;
  uint64_t mask_offset = 0;
  std::vector<Key> keys{{42, 7}};
  bool key_on_device = false;
  int64_t slice_in_stride = 0, slice_out_stride = 0;
  uint64_t slice_mask_stride = 0;
  int64_t slice_in2_stride = 0;
  bool in_place = false;
  // Elements (complex: parts) past a multiple of 16 bytes.
  int in_shift = 0, out_shift = 0, in2_shift = 0;
  cuda::Geometry geometry;
};

bool is_canary(char byte) { return static_cast<unsigned char>(byte) == 0xa5; }

// Memory whose ends are watched: by canaries, and to the byte by AddressSanitizer.
struct Buffer {
  static constexpr size_t kPad = 32;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kEnd = 0;
#else
  static constexpr size_t kEnd = 32;
#endif
  char* raw;
  size_t begin, size;

  Buffer(size_t bytes, size_t shift) : begin(kPad + shift), size(begin + bytes + kEnd) {
    if (posix_memalign(reinterpret_cast<void**>(&raw), 16, size) != 0) std::abort();
    std::memset(raw, 0xa5, size);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(raw, begin / 8 * 8);
#endif
  }
  ~Buffer() {
    open();
    std::free(raw);
  }
  Buffer(const Buffer&) = delete;
  void operator=(const Buffer&) = delete;
  void open() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(raw, begin);
#endif
  }
  char* data() { return raw + begin; }
  bool is_intact() {
    open();
    return std::all_of(raw, data(), is_canary) &&
           std::all_of(raw + size - kEnd, raw + size, is_canary);
  }
};

void fill(Buffer& buffer, Dtype dtype) {
  static const auto random = [] {
    std::vector<uint64_t> words(1 << 12);
    for (auto& word : words) word = rng();
    return words;
  }();
  static size_t next = 0;
  const size_t width = static_cast<size_t>(element_size(dtype) / parts(dtype));
  for (char* at = buffer.data(); at + width <= buffer.raw + buffer.size - Buffer::kEnd;
       at += width) {
    const uint64_t bits = random[++next % random.size()];
    // Mostly numbers of moderate size; else any bits at all: infinities, NaN, subnormals, -0.
    const bool any = bits % 16 == 0;
    const float x = static_cast<float>(static_cast<int64_t>(bits >> 20 & 0xffffff) - 0x800000) /
                    static_cast<float>(1 << 21);
    const double wide = x;
    uint32_t word;
    std::memcpy(&word, &x, 4);
    uint16_t half = static_cast<uint16_t>(word >> 16);
    if (dtype == Dtype::kFloat16) half = static_cast<uint16_t>((bits >> 8 & 0x83ff) | 0x3c00);
    const uint64_t special = one_of<uint64_t>({0, 0x8000800080008000, 0x7f807c007f807c00, bits});
    if (any) {
      std::memcpy(at, &special, width);
    } else if (width == 8) {
      std::memcpy(at, &wide, 8);
    } else if (width == 4) {
      std::memcpy(at, &x, 4);
    } else {
      std::memcpy(at, &half, width);
    }
  }
}

size_t extent(const Call& call, int64_t Dim::* stride, int64_t Call::* slice_stride) {
  int64_t last = 0;
  for (const Dim& dim : call.dims) last += (dim.size - 1) * dim.*stride;
  last += (static_cast<int64_t>(call.keys.size()) - 1) * call.*slice_stride;
  return static_cast<size_t>(last + 1) * static_cast<size_t>(element_size(call.dtype));
}

size_t in_extent(const Call& call) { return extent(call, &Dim::in_stride, &Call::slice_in_stride); }
size_t in2_extent(const Call& call) {
  return extent(call, &Dim::in2_stride, &Call::slice_in2_stride);
}
size_t out_extent(const Call& call) {
  return extent(call, &Dim::out_stride, &Call::slice_out_stride);
}

[[noreturn]] void mismatch(const Call& call, const char* what, int64_t in, int64_t out,
                           uint64_t index, double want, double got) {
  std::fprintf(stderr, "%s: dtype %d, bias %g, in %lld (+%d), out %lld (+%d), index %llu: ", what,
               static_cast<int>(call.dtype), call.params.bias, static_cast<long long>(in),
               call.in_shift, static_cast<long long>(out), call.out_shift,
               static_cast<unsigned long long>(index));
  std::fprintf(stderr, "want %a, got %a; threads %lld, blocks %lld, mask_offset %llu, dims", want,
               got, static_cast<long long>(call.geometry.threads),
               static_cast<long long>(call.geometry.blocks),
               static_cast<unsigned long long>(call.mask_offset));
  for (const Dim& d : call.dims) {
    std::fprintf(stderr, " (%lld: %lld, %lld, %llu)", static_cast<long long>(d.size),
                 static_cast<long long>(d.in_stride), static_cast<long long>(d.out_stride),
                 static_cast<unsigned long long>(d.mask_stride));
  }
  std::fprintf(stderr, "\n");
  std::exit(1);
}

double rounded(Dtype dtype, float y) {
  if (dtype == Dtype::kFloat16) return round_to(y, 5, 10);
  if (dtype == Dtype::kBFloat16) return round_to(y, 8, 7);
  return y;
}

// What one real part must become.
double expected(const Call& call, double x, double x2, bool keep) {
  if (call.adds_second) {
    const double kept = keep ? x : 0;
    if (call.dtype == Dtype::kFloat64) return std::fma(kept, call.params.scale, x2);
    return rounded(call.dtype,
                   std::fma(static_cast<float>(kept), static_cast<float>(call.params.scale),
                            static_cast<float>(x2)));
  }
  const double scale = call.params.scale, bias = call.params.bias, dropped = call.params.dropped;
  const bool adds = bias != 0 || !std::signbit(bias);
  if (call.dtype == Dtype::kFloat64 || call.dtype == Dtype::kComplex128) {
    if (!keep) return dropped;
    return adds ? std::fma(x, scale, bias) : x * scale;
  }
  const auto fx = static_cast<float>(x), fs = static_cast<float>(scale);
  auto y = static_cast<float>(dropped);
  if (keep) y = adds ? std::fma(fx, fs, static_cast<float>(bias)) : fx * fs;
  return rounded(call.dtype, y);
}

ApplyArgs arguments(const Call& call, const void* in, const void* in2, void* out) {
  ApplyArgs args;
  args.in = call.dtype == Dtype::kBool ? nullptr : in;
  args.out = out;
  args.dtype = call.dtype;
  args.epilogue = call.dtype == Dtype::kBool ? Epilogue::kKeepMask
                  : call.adds_second         ? Epilogue::kAdd
                                             : Epilogue::kAffine;
  args.in2 = call.adds_second ? in2 : nullptr;
  args.params = call.params;
  args.threshold = call.threshold;
  args.map.mask_offset = call.mask_offset;
  args.map.ndim = static_cast<int>(call.dims.size());
  for (int d = 0; d < args.map.ndim; ++d) args.map.dims[d] = call.dims[static_cast<size_t>(d)];
  normalize(args.map);
  args.slices = static_cast<int64_t>(call.keys.size());
  args.slice_in_stride = call.slice_in_stride;
  args.slice_out_stride = call.slice_out_stride;
  args.slice_mask_stride = call.slice_mask_stride;
  args.slice_in2_stride = call.slice_in2_stride;
  return args;
}

int64_t checked = 0;

void check(Call call) {
  // Where nothing is said of the second input, it lies like the first.
  if (std::all_of(call.dims.begin(), call.dims.end(),
                  [](const Dim& dim) { return dim.in2_stride == 0; })) {
    for (Dim& dim : call.dims) dim.in2_stride = dim.in_stride;
    call.slice_in2_stride = call.slice_in_stride;
  }
  const auto bytes = static_cast<size_t>(element_size(call.dtype));
  const size_t width = bytes / static_cast<size_t>(parts(call.dtype));
  Buffer in(in_extent(call), static_cast<size_t>(call.in_shift) * width);
  Buffer in2(in2_extent(call), static_cast<size_t>(call.in2_shift) * width);
  Buffer out(out_extent(call), static_cast<size_t>(call.out_shift) * width);
  fill(in, call.dtype);
  fill(in2, call.dtype);
  Buffer& to = call.in_place ? in : out;
  const std::vector<char> before(in.data(), in.data() + in_extent(call));

  cuda::KeySource keys{call.keys[0], nullptr};
  const size_t n = call.keys.size();
  const auto device_keys = std::make_unique<uint64_t[]>(2 * n);
  if (n > 1 || call.key_on_device) {
    for (size_t j = 0; j < n; ++j) {
      device_keys[2 * j] = call.keys[j].seed;
      device_keys[2 * j + 1] = call.keys[j].offset;
    }
    keys = {{0, 0}, device_keys.get()};
  }
  launch_apply(arguments(call, in.data(), in2.data(), to.data()), keys, call.geometry, nullptr);

  std::vector<bool> written(out_extent(call) / bytes);
  std::vector<int64_t> at(call.dims.size());
  for (size_t j = 0; j < n; ++j) {
    PhiloxWords words{};
    uint64_t block = ~uint64_t{0};
    for (bool more = true; more;) {
      int64_t from = static_cast<int64_t>(j) * call.slice_in_stride;
      int64_t from2 = static_cast<int64_t>(j) * call.slice_in2_stride;
      int64_t into = static_cast<int64_t>(j) * call.slice_out_stride;
      uint64_t index = call.mask_offset + j * call.slice_mask_stride;
      for (size_t d = 0; d < at.size(); ++d) {
        from += at[d] * call.dims[d].in_stride;
        from2 += at[d] * call.dims[d].in2_stride;
        into += at[d] * call.dims[d].out_stride;
        index += static_cast<uint64_t>(at[d]) * call.dims[d].mask_stride;
      }
      if (index >> 3 != block) words = block_words(call.keys[j], block = index >> 3);
      const bool keep = lane_word(words, static_cast<int>(index & 7)) >= call.threshold;
      for (int part = 0; part < parts(call.dtype); ++part) {
        const double x = read(call.dtype, before.data() + from * static_cast<int64_t>(bytes), part);
        const double x2 = read(call.dtype, in2.data() + from2 * static_cast<int64_t>(bytes), part);
        const double got = read(call.dtype, to.data() + into * static_cast<int64_t>(bytes), part);
        const double want = call.dtype == Dtype::kBool ? keep : expected(call, x, x2, keep);
        const bool same = std::isnan(want) ? std::isnan(got)
                                           : want == got && std::signbit(want) == std::signbit(got);
        if (!same) mismatch(call, "value", from, into, index, want, got);
      }
      written[static_cast<size_t>(into)] = true;
      ++checked;
      more = false;
      for (size_t d = at.size(); d-- > 0;) {
        if (++at[d] < call.dims[d].size) {
          more = true;
          break;
        }
        at[d] = 0;
      }
    }
  }
  for (Buffer* buffer : {&in, &in2, &out}) {
    if (!buffer->is_intact()) mismatch(call, "write outside", 0, 0, 0, 0, 0);
  }
  for (size_t i = 0; i < written.size(); ++i) {
    const char* element = to.data() + i * bytes;
    const bool kept = call.in_place ? std::memcmp(element, before.data() + i * bytes, bytes) == 0
                                    : std::all_of(element, element + bytes, is_canary);
    if (!written[i] && !kept) {
      mismatch(call, "write between", 0, static_cast<int64_t>(i), 0, 0, 0);
    }
  }
}

bool is_real(Dtype dtype) { return parts(dtype) == 1 && dtype != Dtype::kBool; }

// With a second input, of other strides, at every other call.
Call flat(Dtype dtype, int64_t size) {
  static int calls = 0;
  Call call;
  call.dtype = dtype;
  call.adds_second = is_real(dtype) && ++calls % 2 == 0;
  call.dims = {{size, 1, 1, 1, 1}};
  return call;
}

uint64_t some_offset() {
  return one_of<uint64_t>({0, 0, 8, 1, 5, 1024, 4100, (uint64_t{1} << 32) - 3,
                           (uint64_t{1} << 35) - 40, (uint64_t{1} << 35) + 5,
                           (uint64_t{1} << 62) + 16, ~uint64_t{0} - 100,
                           static_cast<uint64_t>(pick(0, 1 << 20))});
}

void sizes() {
  for (const Dtype dtype : kDtypes) {
    // Every size up to a tile of each dtype, then some.
    for (int64_t size = 1; size < 4100; size += size < 1100 ? 1 : 37) {
      Call call = flat(dtype, size);
      call.mask_offset = size % 3 == 0 ? 0 : some_offset();
      call.in_place = size % 2 == 0;
      call.key_on_device = size % 5 == 0;
      if (size % 7 == 0) call.params = kAlpha;
      check(call);
    }
  }
  for (const Dtype dtype : kDtypes) {
    for (const int64_t size : {100003, 262144, 300007}) check(flat(dtype, size));
  }
}

void alignments() {
  for (const Dtype dtype : kDtypes) {
    const int shifts = 16 / static_cast<int>(element_size(dtype) / parts(dtype));
    for (const int64_t size : {1, 7, 8, 9, 255, 1024, 1300}) {
      for (int in = 0; in < shifts; ++in) {
        for (int out = 0; out < shifts; ++out) {
          if (dtype == Dtype::kBool && in != 0) continue;
          if (size > 9 && in != out && in != 0 && out != 0 && pick(0, 3) != 0) continue;
          Call call = flat(dtype, size);
          call.in_shift = in;
          call.out_shift = out;
          call.in2_shift = pick(0, 1) == 0 ? in : static_cast<int>(pick(0, shifts - 1));
          // At times the offset that makes up for the shift: vectors from a misaligned start.
          call.mask_offset = one_of<uint64_t>({0, 8, static_cast<uint64_t>(in / parts(dtype))});
          check(call);
        }
      }
    }
  }
}

// Where in a tile and a block the first element lies, around the wrap of 32 and 64 bits.
void offsets() {
  for (const Dtype dtype : kDtypes) {
    for (const uint64_t around : {uint64_t{1} << 32, uint64_t{1} << 35, uint64_t{0}}) {
      for (uint64_t past = 0; past < 1100; past += 1 + past / 16) {
        Call call = flat(dtype, 600);
        call.mask_offset = around - past;
        call.keys = {{rng(), rng()}};
        check(call);
      }
    }
  }
}

void geometry() {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t blocks : {0, 1, 2, 7}) {
      for (const int64_t threads : {32, 64, 96, 256}) {
        Call call = flat(dtype, 5003);
        call.mask_offset = some_offset();
        call.geometry = {blocks, threads, false};
        check(call);
        for (const bool wide : {false, true}) {
          call.geometry.wide = wide;
          call.dims = {{37, 100, 100, 100}, {91, 1, 1, 1}};
          check(call);
          call.dims = {{70, 1, 45, 1}, {45, 70, 1, 70}};
          check(call);
        }
      }
    }
  }
}

// Members of the dropout family by name, in sizes that hit heads and tails.
void family() {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t n : {1, 3, 8, 49, 64, 196, 1000, 3136}) {
      Call call = flat(dtype, 1);
      call.mask_offset = some_offset();
      call.geometry.wide = n % 2 == 1;
      const auto un = static_cast<uint64_t>(n);
      call.dims = {{6, n, n, 1}, {n, 1, 1, 0}};  // Dropout2d, DropPath
      check(call);
      call.dims = {{2, 3 * n, 3 * n, un}, {3, n, n, 0}, {n, 1, 1, 1}};  // locked
      check(call);
      call.dims = {{5, n, n, 8 * un}, {n, 1, 1, 1}};  // a shard's columns
      check(call);
      call.dims = {{5, n + 3, n, 7 * un + 3}, {n, 1, 1, 1}};  // a shard, sliced input
      check(call);
      call.dims = {{n, 2, 1, 1}};  // every second element
      check(call);
      call.dims = {{n, 1, 2, 1}};
      check(call);
      call.dims = {{n, 0, 1, 1}};  // an expanded gradient
      check(call);
      call.dims = {{4, 0, n, un}, {n, 1, 1, 1}};
      check(call);
      call.dims = {{2, 3 * n, 3 * n, 3 * un}, {n, 3, 3, 1}, {3, 1, 1, un}};  // channels_last
      check(call);
      call.dims = {{9, 1, n, 1}, {n, 9, 1, 9}};  // transposed, and input in another order
      check(call);
      call.dims = {{n, 17, 17, 1}, {17, 1, 1, un}};
      check(call);
      call.dims = {{3, 5 * n, 5 * n, 3}, {n, 5, 5, 11}, {5, 1, 1, 7 * un}};  // no dense index
      check(call);
    }
  }
}

// As many dimensions as 32-bit positions have room for, and more. None merges with its neighbour.
void many_dims() {
  for (const Dtype dtype : kDtypes) {
    for (const int outer : {7, 8, 9, 10}) {
      const auto around = [&](std::vector<Dim> inner, int64_t stride) {
        Call call = flat(dtype, 1);
        call.mask_offset = some_offset();
        std::vector<Dim> dims;
        for (int d = 0; d < outer; ++d) {
          dims.insert(dims.begin(), {2, stride, stride, rng() | 1});
          stride = 2 * stride + 8;
        }
        dims.insert(dims.end(), inner.begin(), inner.end());
        call.dims = dims;
        check(call);
      };
      around({{19, 1, 1, 1}}, 24);                     // rows
      around({{3, 1, 1, 1000}}, 4);                    // columns
      around({{9, 5, 5, 1}, {5, 1, 1, 1000003}}, 45);  // columns with a dimension to walk
    }
  }
}

// Dimensions, strides and keys at random.
void random_maps() {
  for (int round = 0; round < 2500; ++round) {
    Call call = flat(kDtypes[round % 7], 1);
    const int ndim = static_cast<int>(pick(1, 4));
    std::vector<Dim> dims(static_cast<size_t>(ndim));
    int64_t numel = 1;
    for (Dim& dim : dims) {
      dim.size = std::min<int64_t>(one_of<int64_t>({1, 2, 3, 5, 8, 16, 31, 64, 97, 300}),
                                   std::max<int64_t>(1, 2500 / numel));
      numel *= dim.size;
    }
    const auto strides = [&](auto member, bool gaps) {
      std::vector<size_t> order(dims.size());
      for (size_t d = 0; d < order.size(); ++d) order[d] = d;
      if (pick(0, 1) == 0) std::shuffle(order.begin(), order.end(), rng);
      int64_t stride = gaps && pick(0, 7) == 0 ? 2 : 1;
      for (size_t d = order.size(); d-- > 0;) {
        dims[order[d]].*member = static_cast<std::decay_t<decltype(dims[0].*member)>>(stride);
        stride *= dims[order[d]].size;
        if (gaps && pick(0, 3) == 0) stride += one_of<int64_t>({1, 8, 16});
      }
    };
    strides(&Dim::out_stride, true);
    strides(&Dim::in_stride, true);
    strides(&Dim::in2_stride, true);
    strides(&Dim::mask_stride, true);
    if (pick(0, 1) == 0) {
      for (Dim& dim : dims) dim.in_stride = dim.out_stride;
      call.in_place = pick(0, 1) == 0;
    }
    for (Dim& dim : dims) {
      if (pick(0, 5) == 0) dim.mask_stride = 0;
      if (pick(0, 30) == 0) dim.mask_stride = rng();
      if (pick(0, 5) == 0 && !call.in_place) dim.in_stride = 0;
      if (pick(0, 5) == 0) dim.in2_stride = 0;
    }
    call.dims = dims;
    const int units = 16 / static_cast<int>(element_size(call.dtype) / parts(call.dtype));
    if (pick(0, 1) == 0) {
      call.in_shift = static_cast<int>(pick(0, units - 1));
      call.out_shift = pick(0, 1) == 0 ? call.in_shift : static_cast<int>(pick(0, units - 1));
      call.in2_shift = pick(0, 1) == 0 ? call.in_shift : static_cast<int>(pick(0, units - 1));
    }
    call.mask_offset = some_offset();
    call.threshold = one_of<uint32_t>({0, 1, kHalf, 429496730, 0xffffffff});
    if (pick(0, 2) == 0) call.params = kAlpha;
    if (pick(0, 2) == 0) {
      call.keys.resize(static_cast<size_t>(pick(1, 5)));
      for (Key& key : call.keys) key = {rng(), rng()};
      // Slices must not overlap in the output.
      Call one = call;
      one.keys.resize(1);
      call.slice_in_stride = call.slice_out_stride =
          static_cast<int64_t>(std::max(in_extent(one), out_extent(one)) /
                               static_cast<size_t>(element_size(call.dtype)));
      call.slice_in2_stride = one_of<int64_t>({0, call.slice_in_stride, 5});
      call.slice_mask_stride = one_of<uint64_t>({0, static_cast<uint64_t>(numel), 13});
    }
    call.geometry = {one_of<int64_t>({0, 1, 3}), one_of<int64_t>({0, 32, 256}), pick(0, 1) == 0};
    check(call);
  }
}

// The mask of a dense row-major tensor as bits: sizes and mask strides of `mask`, whose first
// dimension chooses the key where there are several.
void check_bits(std::vector<std::pair<int64_t, uint64_t>> mask, uint64_t mask_offset,
                size_t n_keys = 1, cuda::Geometry geometry = {}, uint32_t threshold = kHalf) {
  Call call;
  call.dtype = Dtype::kBool;
  call.mask_offset = mask_offset;
  call.threshold = threshold;
  call.geometry = geometry;
  call.keys.resize(n_keys);
  for (Key& key : call.keys) key = {rng(), rng()};
  int64_t positions = 1;
  for (size_t d = mask.size(); d-- > 0;) {
    const auto [size, stride] = mask[d];
    if (d == 0 && n_keys > 1) {
      call.slice_in_stride = call.slice_out_stride = positions;
      call.slice_mask_stride = stride;
    } else {
      call.dims.insert(call.dims.begin(), {size, positions, positions, stride});
    }
    positions *= size;
  }
  Buffer bits(static_cast<size_t>(cuda::ceil_div(positions, 8)), 0);
  const ApplyArgs args = arguments(call, nullptr, nullptr, bits.data());
  std::unique_ptr<Buffer> bytes;
  if (cuda::needs_bytes(args)) bytes = std::make_unique<Buffer>(positions, 0);
  std::vector<uint64_t> words;
  for (const Key& key : call.keys) words.insert(words.end(), {key.seed, key.offset});
  const bool on_device = n_keys > 1 || pick(0, 1) == 0;
  cuda::launch_keep_bits(args, bytes ? bytes->data() : nullptr,
                         {call.keys[0], on_device ? words.data() : nullptr}, geometry, nullptr);
  for (int64_t i = 0; i < cuda::ceil_div(positions, 8) * 8; ++i) {
    uint64_t index = mask_offset;
    int64_t rest = i, slice = 0;
    for (size_t d = mask.size(); d-- > 0;) {
      slice = rest % mask[d].first;
      index += static_cast<uint64_t>(slice) * mask[d].second;
      rest /= mask[d].first;
    }
    const Key key = call.keys[n_keys > 1 ? static_cast<size_t>(slice) : 0];
    const bool want = i < positions && keep(key, index, threshold);
    const bool got = bits.data()[i / 8] >> (i % 8) & 1;
    if (want != got) mismatch(call, "bit", 0, i, index, want, got);
    ++checked;
  }
  if (!bits.is_intact() || (bytes && !bytes->is_intact())) {
    mismatch(call, "write outside", 0, 0, 0, 0, 0);
  }
}

void bits() {
  for (int64_t size = 1; size < 3000; size += size < 300 ? 1 : 37) {
    check_bits({{size, 1}}, size % 3 == 0 ? 0 : some_offset(), 1, {}, size % 5 ? kHalf : 0);
  }
  for (const uint64_t around : {uint64_t{1} << 32, uint64_t{1} << 35, uint64_t{0}}) {
    for (uint64_t past = 0; past < 600; past += past < 20 ? 1 : 4) {
      check_bits({{300, 1}}, around - past);
    }
  }
  for (const int64_t blocks : {0, 1, 3}) {
    for (const int64_t threads : {32, 256}) {
      const cuda::Geometry geometry{blocks, threads, false};
      for (const uint64_t offset : {0, 5}) {
        check_bits({{50003, 1}}, offset, 1, geometry);
        check_bits({{33, 4096}, {1000, 1}}, offset, 1, geometry);
        check_bits({{33, 1}, {1000, 40}}, offset, 1, geometry);
        check_bits({{40, 999}, {256, 1}}, offset, 40, geometry);
      }
    }
  }
  check_bits({{65540, 8}, {8, 1}}, 0, 65540, {0, 32, false});  // more slices than a grid has rows
  check_bits({{2, 0}, {3, 1}, {0x101, 7}}, 3);
  for (int round = 0; round < 1500; ++round) {
    std::vector<std::pair<int64_t, uint64_t>> mask(static_cast<size_t>(pick(1, 5)));
    uint64_t stride = pick(0, 5) == 0 ? rng() : 1;
    int64_t positions = 1;
    for (size_t d = mask.size(); d-- > 0;) {
      const int64_t size = one_of<int64_t>({1, 2, 3, 8, 24, 64, 97, 128, 256, 300});
      mask[d] = {std::min(size, std::max<int64_t>(1, 3000 / positions)), stride};
      positions *= mask[d].first;
      stride *= static_cast<uint64_t>(mask[d].first);
      if (pick(0, 2) == 0) stride += one_of<uint64_t>({1, 8, 128});
      if (pick(0, 6) == 0) mask[d].second = 0;
    }
    if (pick(0, 3) == 0) std::swap(mask.front().second, mask.back().second);
    const bool keys = pick(0, 2) == 0;
    const cuda::Geometry geometry{one_of<int64_t>({0, 1}), one_of<int64_t>({0, 32}), false};
    check_bits(mask, some_offset(), keys ? static_cast<size_t>(mask[0].first) : 1, geometry,
               one_of<uint32_t>({0, 1, kHalf, 429496730, 0xffffffff}));
  }
}

// More slices than a grid has rows: the loop over slices.
void slices() {
  Call call = flat(Dtype::kFloat32, 3);
  call.keys.resize(65540);
  for (Key& key : call.keys) key = {rng(), 0};
  call.slice_in_stride = call.slice_in2_stride = call.slice_out_stride = 3;
  call.slice_mask_stride = 3;
  call.geometry.threads = 32;
  check(call);
}

// Positions above 2^32, on memory that is reserved and hardly ever touched.
void far_apart() {
  constexpr int64_t kFar = (int64_t{1} << 32) + 11;
  constexpr size_t kBytes = size_t{4} * (2 * kFar + 4096);
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("not run: far_apart (no address space)\n");
    return;
  }
  auto* x = static_cast<float*>(memory);
  const auto run = [&](std::vector<Dim> dims, bool wide) {
    Call call;
    call.dims = dims;
    call.mask_offset = 5;
    call.geometry.wide = wide;
    int64_t numel = 1;
    for (const Dim& dim : dims) numel *= dim.size;
    const auto each = [&](auto&& visit) {
      for (int64_t n = 0; n < numel; ++n) {
        int64_t rest = n, at = 0;
        uint64_t index = call.mask_offset;
        for (size_t d = dims.size(); d-- > 0;) {
          at += rest % dims[d].size * dims[d].out_stride;
          index += static_cast<uint64_t>(rest % dims[d].size) * dims[d].mask_stride;
          rest /= dims[d].size;
        }
        visit(x[at], index);
      }
    };
    each([](float& y, uint64_t) { y = 1; });
    launch_apply(arguments(call, x, x, x), {call.keys[0], nullptr}, call.geometry, nullptr);
    each([&](float& y, uint64_t index) {
      const float want =
          keep(call.keys[0], index, call.threshold) ? static_cast<float>(call.params.scale) : 0.0f;
      if (y != want) mismatch(call, "far apart", 0, &y - x, index, want, y);
      ++checked;
    });
  };
  for (const bool wide : {false, true}) {
    run({{3, kFar, kFar, uint64_t{1} << 40}, {100, 1, 1, 1}}, wide);
    run({{3, kFar, kFar, uint64_t{1} << 40}, {20, 50, 50, 1}, {50, 1, 1, 20}}, wide);
    run({{3, kFar, kFar, 1}, {100, 1, 1, uint64_t{1} << 40}}, wide);
  }
  munmap(memory, kBytes);
}

// The multiplication that stands for a division, at its limits.
void divisions() {
  const auto test = [](uint64_t n, uint64_t size, bool wide) {
    const cuda::Divisor divisor = cuda::divisor(size, wide);
    uint64_t remainder, quotient;
    if (wide) {
      quotient = n;
      remainder = cuda::split(quotient, divisor);
    } else {
      auto narrow = static_cast<uint32_t>(n);
      remainder = cuda::split(narrow, divisor);
      quotient = narrow;
    }
    ++checked;
    if (quotient == n / size && remainder == n % size) return;
    std::fprintf(stderr, "division: %llu by %llu, wide %d\n", static_cast<unsigned long long>(n),
                 static_cast<unsigned long long>(size), wide);
    std::exit(1);
  };
  for (const bool wide : {false, true}) {
    const int bits = wide ? 63 : 31;
    const uint64_t limit = (uint64_t{1} << bits) - 1;
    for (int round = 0; round < 20000; ++round) {
      const uint64_t size = std::max<uint64_t>(1, (rng() & limit) >> pick(0, bits - 1));
      const uint64_t n = (rng() & limit) >> pick(0, bits - 1);
      const uint64_t multiple = limit / size * size;
      for (const uint64_t dividend : {n, limit, multiple, multiple - 1, uint64_t{0}}) {
        test(dividend & limit, size, wide);
      }
    }
    for (int shift = 0; shift < bits; ++shift) {
      for (const uint64_t size : {uint64_t{1} << shift, (uint64_t{1} << shift) + 1}) {
        for (const uint64_t n : {limit, size, size - 1, size + 1}) test(n & limit, size, wide);
      }
    }
  }
}

void keys() {
  for (const int64_t n : {1, 2, 239, 240, 241, 1000}) {
    std::vector<uint64_t> words(static_cast<size_t>(2 * n)), copy(words.size() + 1, 77);
    for (uint64_t& word : words) word = rng();
    cuda::launch_store_keys(words.data(), n, copy.data(), nullptr);
    words.push_back(77);
    if (words != copy) std::exit(1);
  }
  const int64_t seed = -3, offset = (int64_t{1} << 40) + 8;
  uint64_t key[2];
  cuda::launch_unpack_key(&seed, &offset, 12, key, nullptr);
  if (key[0] != static_cast<uint64_t>(seed) || key[1] != ((uint64_t{1} << 38) + 5)) std::exit(1);
}

// One call is one launch.
void launches() {
  const int64_t before = shim::launches;
  check(flat(Dtype::kBFloat16, 100000));
  if (shim::launches != before + 1) std::exit(1);
}

struct Group {
  const char* name;
  void (*run)();
};
constexpr Group kGroups[] = {
    {"sizes", sizes},         {"alignments", alignments},
    {"offsets", offsets},     {"geometry", geometry},
    {"family", family},       {"random_maps", random_maps},
    {"many_dims", many_dims}, {"slices", slices},
    {"far_apart", far_apart}, {"divisions", divisions},
    {"keys", keys},           {"launches", launches},
    {"bits", bits},
};

}  // namespace
}  // namespace dropout_ext

int main(int argc, char** argv) {
  const std::vector<std::string> wanted(argv + 1, argv + argc);
  for (const auto& group : dropout_ext::kGroups) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), group.name) == wanted.end()) {
      continue;
    }
    dropout_ext::checked = 0;
    group.run();
    std::printf("%s: %lld\n", group.name, static_cast<long long>(dropout_ext::checked));
    std::fflush(stdout);
  }
}
