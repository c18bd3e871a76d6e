#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

namespace dropout_ext::cpu {

namespace {

// Elements per unit: two pages of float32 from input and output each stay in the first-level cache,
// while the cost of starting a unit (some 30 ns) is lost in it.
constexpr int64_t kUnit = 16384;
constexpr int64_t kBits = 4096;  // of a stored run
constexpr int64_t kStage = 512;  // elements of a strided run that are gathered at a time
// A transposed tile: the mask is computed in runs of kTileSecond, the memory walked in runs of
// kTileInner. A thread joins up to kTiles neighbours, whose bits are 128 KiB: runs of 16 KiB of
// float32 came from memory a quarter faster than those of one tile.
constexpr int64_t kTileInner = 512;
constexpr int64_t kTileSecond = 256;
constexpr int64_t kTiles = 8;

constexpr Dtype compute_dtype(Dtype dtype) {
  if (dtype == Dtype::kComplex128) return Dtype::kFloat64;
  if (dtype == Dtype::kComplex64) return Dtype::kFloat32;
  return dtype;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One step of a transpose: in each square of 2 * width bits, what is above the diagonal changes
// places with what is below. A template, so that compilers make SIMD code of it.
template <int width>
void swap_squares(uint64_t (&m)[64], uint64_t mask) {
  for (int first = 0; first < 64; first += 2 * width) {
    for (int i = first; i < first + width; ++i) {
      const uint64_t t = (m[i] >> width ^ m[i + width]) & mask;
      m[i] ^= t << width;
      m[i + width] ^= t;
    }
  }
}

// Rows of a 64 x 64 bit matrix become its columns. Hacker's Delight, 7-3.
void transpose(uint64_t (&m)[64]) {
  swap_squares<32>(m, 0x00000000FFFFFFFF);
  swap_squares<16>(m, 0x0000FFFF0000FFFF);
  swap_squares<8>(m, 0x00FF00FF00FF00FF);
  swap_squares<4>(m, 0x0F0F0F0F0F0F0F0F);
  swap_squares<2>(m, 0x3333333333333333);
  swap_squares<1>(m, 0x5555555555555555);
}

// `word` into the bits from `first` on.
void or_bits(uint64_t* bits, int64_t first, uint64_t word) {
  bits[first / 64] |= word << first % 64;
  if (first % 64 != 0) bits[first / 64 + 1] |= word >> (64 - first % 64);
}

struct alignas(16) Bytes16 {
  uint64_t half[2];
};

template <class F>
void with_element(int64_t size, F&& f) {
  switch (size) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    case 8: return f(uint64_t{});
    default: return f(Bytes16{});
  }
}

void copy_strided(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n,
                  int64_t element_size) {
  with_element(element_size, [&](auto element) {
    for (int64_t j = 0; j < n; ++j) {
      std::memcpy(&element, from + j * from_stride * sizeof(element), sizeof(element));
      std::memcpy(to + j * to_stride * sizeof(element), &element, sizeof(element));
    }
  });
}

// Each of the low 32 bits twice.
uint64_t double_bits(uint64_t x) {
  x &= 0xFFFFFFFF;
  x = (x | x << 16) & 0x0000FFFF0000FFFF;
  x = (x | x << 8) & 0x00FF00FF00FF00FF;
  x = (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
  x = (x | x << 2) & 0x3333333333333333;
  x = (x | x << 1) & 0x5555555555555555;
  return x | x << 1;
}

}  // namespace

Plan::Plan(const ApplyArgs& args, const Key* keys)
    : args_(args),
      keys_(keys),
      kernels_(kernels()),
      of_(kernels_.of(compute_dtype(args.dtype), args.epilogue, args.params)),
      element_size_(element_size(args.dtype)),
      complex_(compute_dtype(args.dtype) != args.dtype),
      inner_(args.map.dims[args.map.ndim - 1]) {
  const int last = args.map.ndim - 1;
  int second = -1;
  const auto find_second = [&](uint64_t mask_stride) {
    for (second = last - 1; second >= 0; --second) {
      if (args.map.dims[second].mask_stride == mask_stride) break;
    }
    return second >= 0;
  };
  const bool contiguous = inner_.out_stride == 1 && (inner_.in_stride == 1 || args.in == nullptr) &&
                          (inner_.in2_stride == 1 || args.in2 == nullptr);
  if (inner_.mask_stride == 1) {
    const bool shared = find_second(0);
    const bool fused = !shared && contiguous && !complex_;
    mode_ = fused ? Mode::kFused : Mode::kRow;
    inner_step_ = fused ? kUnit : kBits;
  } else if (inner_.mask_stride == 0) {
    mode_ = Mode::kConstant;
    find_second(1);
    inner_step_ = kUnit;
  } else if (find_second(1)) {
    mode_ = Mode::kTransposed;
    inner_step_ = kTileInner;
  } else {
    mode_ = Mode::kElement;
    inner_step_ = kBits;
  }
  inner_step_ = std::min(inner_step_, inner_.size);
  if (second >= 0) {
    second_ = args.map.dims[second];
    const int64_t room = std::clamp<int64_t>(kUnit / inner_step_, 1, kBits);
    second_step_ = std::min(mode_ == Mode::kTransposed ? kTileSecond : room, second_.size);
  }

  const auto add_loop = [&](const Loop& loop) {
    loops_[n_loops_++] = loop;
    units_ *= loop.count;
  };
  add_loop({args.slices, args.slice_in_stride, args.slice_out_stride, args.slice_mask_stride,
            args.slice_in2_stride});
  for (int d = 0; d < last; ++d) {
    const Dim& dim = args.map.dims[d];
    if (d != second) {
      add_loop({dim.size, dim.in_stride, dim.out_stride, dim.mask_stride, dim.in2_stride});
    }
  }
  const auto add_steps = [&](const Dim& dim, int64_t step) {
    add_loop({ceil_div(dim.size, step), dim.in_stride * step, dim.out_stride * step,
              dim.mask_stride * static_cast<uint64_t>(step), dim.in2_stride * step});
  };
  add_steps(second_, second_step_);
  add_steps(inner_, inner_step_);
  streaming_ = of_.run_streaming != nullptr && args.in != args.out && inner_.out_stride == 1 &&
               units_ * inner_step_ * second_step_ * element_size_ >= kStreamBytes &&
               (mode_ != Mode::kFused || (args.map.mask_offset & 7) == 0) &&
               reinterpret_cast<uintptr_t>(args.out) % kStreamAlignment == 0 &&
               second_.out_stride * element_size_ % kStreamAlignment == 0;
  for (int d = 0; d < n_loops_; ++d) {
    if (loops_[d].count == 1) continue;
    streaming_ &= loops_[d].out_step * element_size_ % kStreamAlignment == 0;
    if (mode_ == Mode::kFused) streaming_ &= (loops_[d].mask_step & 7) == 0;
  }
  unit_elements_ = inner_step_ * second_step_;
}

void Plan::run(int64_t begin, int64_t end) const {
  int64_t at[kMaxDims + 2];
  int64_t in = 0, in2 = 0, out = 0;
  uint64_t index = args_.map.mask_offset;
  int64_t rest = begin;
  for (int d = n_loops_ - 1; d >= 0; --d) {
    const Loop& loop = loops_[d];
    at[d] = rest % loop.count;
    rest /= loop.count;
    in += at[d] * loop.in_step;
    in2 += at[d] * loop.in2_step;
    out += at[d] * loop.out_step;
    index += static_cast<uint64_t>(at[d]) * loop.mask_step;
  }
  // A keep mask reads no input; its pointer stays a valid one all the same.
  const char* base = static_cast<const char*>(args_.in != nullptr ? args_.in : args_.out);
  const char* base2 = static_cast<const char*>(args_.in2);
  const int64_t& inner_at = at[n_loops_ - 1];
  const int64_t& second_at = at[n_loops_ - 2];
  // On the heap: up to 128 KiB, which a thread's stack need not have.
  std::unique_ptr<uint64_t[]> tile_bits;
  if (mode_ == Mode::kTransposed) {
    const int64_t inner = std::min(kTiles, loops_[n_loops_ - 1].count) * inner_step_;
    tile_bits.reset(new uint64_t[ceil_div(inner, 64) * second_step_ + 2]);
  }
  for (int64_t unit = begin; unit < end;) {
    int64_t joined = 1;
    if (mode_ == Mode::kTransposed) {
      joined = std::min({kTiles, end - unit, loops_[n_loops_ - 1].count - inner_at});
    }
    run_unit({base + in * element_size_, static_cast<char*>(args_.out) + out * element_size_, index,
              std::min(joined * inner_step_, inner_.size - inner_at * inner_step_),
              std::min(second_step_, second_.size - second_at * second_step_), keys_[at[0]],
              tile_bits.get(), base2 == nullptr ? nullptr : base2 + in2 * element_size_});
    unit += joined;
    int64_t steps = joined;
    for (int d = n_loops_ - 1; d >= 0; --d, steps = 1) {
      const Loop& loop = loops_[d];
      in += steps * loop.in_step, in2 += steps * loop.in2_step, out += steps * loop.out_step;
      index += static_cast<uint64_t>(steps) * loop.mask_step;
      at[d] += steps;
      if (at[d] < loop.count) break;
      in -= loop.in_step * loop.count, in2 -= loop.in2_step * loop.count;
      out -= loop.out_step * loop.count;
      index -= loop.mask_step * static_cast<uint64_t>(loop.count);
      at[d] = 0;
    }
  }
  if (streaming_) kernels_.fence();
}

void Plan::run_unit(const Unit& unit) const {
  switch (mode_) {
    case Mode::kFused:
      (streaming_ ? of_.run_streaming : of_.run)(unit.in, unit.in2, unit.out, unit.inner,
                                                 {unit.key, unit.index, args_.threshold},
                                                 args_.params);
      return;
    case Mode::kRow:
    case Mode::kElement: return run_rows(unit);
    case Mode::kConstant: return run_constant(unit);
    case Mode::kTransposed: return run_transposed(unit);
  }
}

void Plan::run_rows(const Unit& unit) const {
  uint64_t bits[kBits / 64];
  keep_bits(bits, unit.inner, unit.key, unit.index);
  for (int64_t j = 0; j < unit.second; ++j) apply_inner(unit, j, unit.inner, bits);
}

void Plan::run_constant(const Unit& unit) const {
  uint64_t decisions[kBits / 64];
  keep_bits(decisions, unit.second, unit.key, unit.index);
  if (is_dense() && unit.inner == inner_.size && inner_.size < 64) {
    // Runs too short for a call each: their decisions repeated, applied as one run.
    uint64_t bits[kUnit / 64 + 1] = {};
    const uint64_t ones = (uint64_t{1} << inner_.size) - 1;
    for (int64_t j = 0; j < unit.second; ++j) {
      if ((decisions[j / 64] >> j % 64 & 1) == 0) continue;
      or_bits(bits, j * inner_.size, ones);
    }
    apply_run(unit.in, unit.in2, unit.out, unit.second * inner_.size, bits);
    return;
  }
  static constexpr auto kOnes = [] {
    struct {
      uint64_t bits[kBits / 64];
    } ones{};
    for (uint64_t& word : ones.bits) word = ~uint64_t{0};
    return ones;
  }();
  static constexpr uint64_t kZeros[kBits / 64] = {};
  const bool drops_to_zeros = args_.epilogue != Epilogue::kAdd && args_.params.dropped == 0 &&
                              !std::signbit(args_.params.dropped);
  for (int64_t j = 0; j < unit.second; ++j) {
    const bool kept = decisions[j / 64] >> j % 64 & 1;
    if (!kept && drops_to_zeros && inner_.out_stride == 1) {
      std::memset(unit.out + j * second_.out_stride * element_size_, 0, unit.inner * element_size_);
      continue;
    }
    for (int64_t i = 0; i < unit.inner; i += kBits) {
      Unit part = unit;
      part.in += i * inner_.in_stride * element_size_;
      part.in2 = in2_at(unit, i * inner_.in2_stride);
      part.out += i * inner_.out_stride * element_size_;
      apply_inner(part, j, std::min(kBits, unit.inner - i), kept ? kOnes.bits : kZeros);
    }
  }
}

void Plan::run_transposed(const Unit& unit) const {
  constexpr int64_t kSecondWords = kTileSecond / 64;
  // Where the runs follow each other in memory, so do their bits, and all are applied as one.
  const bool dense = is_dense() && unit.inner == inner_.size;
  const int64_t run_bits = dense ? unit.inner : ceil_div(unit.inner, 64) * 64;
  uint64_t* const bits = unit.tile_bits;
  std::memset(bits, 0, (run_bits * unit.second / 64 + 2) * sizeof(uint64_t));
  for (int64_t i = 0; i < unit.inner; i += 64) {
    uint64_t rows[64][kSecondWords];
    const int64_t n_rows = std::min<int64_t>(64, unit.inner - i);
    keep_bits(rows[0], unit.second, unit.key,
              unit.index + static_cast<uint64_t>(i) * inner_.mask_stride, n_rows,
              inner_.mask_stride, kSecondWords);
    for (int64_t word = 0; word * 64 < unit.second; ++word) {
      uint64_t square[64] = {};
      for (int64_t r = 0; r < n_rows; ++r) square[r] = rows[r][word];
      transpose(square);
      const int64_t n = std::min<int64_t>(64, unit.second - word * 64);
      for (int64_t j = 0; j < n; ++j) or_bits(bits, (word * 64 + j) * run_bits + i, square[j]);
    }
  }
  if (dense) return apply_run(unit.in, unit.in2, unit.out, unit.second * unit.inner, bits);
  for (int64_t j = 0; j < unit.second; ++j) {
    apply_inner(unit, j, unit.inner, bits + j * run_bits / 64);
  }
}

void Plan::keep_bits(uint64_t* bits, int64_t n, Key key, uint64_t index, int64_t rows,
                     uint64_t row_stride, int64_t row_words) const {
  if (mode_ == Mode::kElement) {
    keep_bits_one_by_one(bits, n, key, index, inner_.mask_stride, args_.threshold);
  } else {
    kernels_.keep_bits(bits, n, {key, index, args_.threshold}, rows, row_stride, row_words);
  }
}

// `n` elements of the inner dimension at position `second` of the other.
void Plan::apply_inner(const Unit& unit, int64_t second, int64_t n, const uint64_t* bits) const {
  const char* in = unit.in + second * second_.in_stride * element_size_;
  const char* in2 = in2_at(unit, second * second_.in2_stride);
  char* out = unit.out + second * second_.out_stride * element_size_;
  const bool gather = args_.in != nullptr && inner_.in_stride != 1;
  const bool gather2 = in2 != nullptr && inner_.in2_stride != 1;
  const bool scatter = inner_.out_stride != 1;
  if (!gather && !gather2 && !scatter) return apply_run(in, in2, out, n, bits);
  alignas(64) char in_stage[kStage * sizeof(Bytes16)];
  alignas(64) char in2_stage[kStage * sizeof(uint64_t)];  // no complex type has two inputs
  alignas(64) char out_stage[kStage * sizeof(Bytes16)];
  for (int64_t i = 0; i < n; i += kStage) {
    const int64_t count = std::min(kStage, n - i);
    const char* from = in + i * inner_.in_stride * element_size_;
    char* to = out + i * inner_.out_stride * element_size_;
    const char* from2 = in2 == nullptr ? nullptr : in2 + i * inner_.in2_stride * element_size_;
    if (gather) copy_strided(in_stage, 1, from, inner_.in_stride, count, element_size_);
    if (gather2) copy_strided(in2_stage, 1, from2, inner_.in2_stride, count, element_size_);
    apply_run(gather ? in_stage : from, gather2 ? in2_stage : from2, scatter ? out_stage : to,
              count, bits + i / 64);
    if (scatter) copy_strided(to, inner_.out_stride, out_stage, 1, count, element_size_);
  }
}

void Plan::apply_run(const char* in, const char* in2, char* out, int64_t n,
                     const uint64_t* bits) const {
  const Kernels::ApplyBits apply_bits = streaming_ ? of_.apply_bits_streaming : of_.apply_bits;
  if (!complex_) return apply_bits(in, in2, out, n, bits, args_.params);
  for (int64_t i = 0; i < n; i += kStage) {
    uint64_t doubled[2 * kStage / 64];
    const int64_t count = std::min(kStage, n - i);
    for (int64_t w = 0; w * 64 < count; ++w) {
      doubled[2 * w] = double_bits(bits[i / 64 + w]);
      doubled[2 * w + 1] = double_bits(bits[i / 64 + w] >> 32);
    }
    apply_bits(in + i * element_size_, nullptr, out + i * element_size_, 2 * count, doubled,
               args_.params);
  }
}

}  // namespace dropout_ext::cpu
