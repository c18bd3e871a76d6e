#include "rows.h"

#include <algorithm>
#include <cmath>

#include "half.h"

namespace dropout_ext::cpu {

namespace {

// Column sums belong to chunks of rows: few enough that adding them up costs nothing, enough of
// them for the threads of a large machine, and all of them an eighth of the rows at most.
constexpr int64_t kChunks = 64;
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kChunkRows = 16;
// Rows up to this size go through kReduceRows at a time: together they are in the cache that they
// are read from again.
constexpr int64_t kSideBytes = int64_t{32} << 10;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr Dtype compute_dtype(Dtype sum) {
  return sum == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

size_t lines(int64_t elements, Dtype dtype) {
  return static_cast<size_t>(ceil_div(elements * element_size(dtype), sizeof(Line)));
}

// Whether a whole of that many rows is written past the caches.
bool streams(const void* base, int64_t rows, int64_t columns, Dtype dtype) {
  const int64_t row_bytes = columns * element_size(dtype);
  return rows * row_bytes >= kStreamBytes && row_bytes % kStreamAlignment == 0 &&
         columns % kStreamColumns == 0 && reinterpret_cast<uintptr_t>(base) % kStreamAlignment == 0;
}

const void* at(const void* base, int64_t elements, Dtype dtype) {
  return base == nullptr ? nullptr
                         : static_cast<const char*>(base) + elements * element_size(dtype);
}
void* at(void* base, int64_t elements, Dtype dtype) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + elements * element_size(dtype);
}

double value_at(const void* base, int64_t i, Dtype dtype) {
  return dtype == Dtype::kFloat64 ? static_cast<const double*>(base)[i]
                                  : static_cast<const float*>(base)[i];
}
void set_value(void* base, int64_t i, Dtype dtype, double value) {
  if (base == nullptr) return;
  if (dtype == Dtype::kFloat64) {
    static_cast<double*>(base)[i] = value;
  } else {
    static_cast<float*>(base)[i] = static_cast<float>(value);
  }
}

// Bit `j` of `from` is bit `first + j` of `to`, which is zero from there on.
void append_bits(std::vector<uint64_t>& to, int64_t first, const uint64_t* from, int64_t n) {
  for (int64_t j = 0; j < n; j += 64) {
    uint64_t word = from[j / 64];
    if (n - j < 64) word &= (uint64_t{1} << (n - j)) - 1;
    const int64_t bit = first + j;
    to[bit / 64] |= word << bit % 64;
    if (bit % 64 != 0) to[bit / 64 + 1] |= word >> (64 - bit % 64);
  }
}

}  // namespace

const void* Defaults::row(std::vector<Line>& memory, Dtype dtype, double value) {
  if (!memory.empty()) return memory.data();
  memory.resize(lines(columns_, dtype));
  void* const to = memory.data();
  switch (dtype) {
    case Dtype::kFloat64: std::fill_n(static_cast<double*>(to), columns_, value); break;
    case Dtype::kFloat32:
      std::fill_n(static_cast<float*>(to), columns_, static_cast<float>(value));
      break;
    case Dtype::kFloat16:
      std::fill_n(static_cast<Float16*>(to), columns_, to_float16(static_cast<float>(value)));
      break;
    default:
      std::fill_n(static_cast<BFloat16*>(to), columns_, to_bfloat16(static_cast<float>(value)));
  }
  return to;
}

const void* Defaults::minus_zeros(Dtype dtype) {
  return row(minus_zeros_[element_size(dtype) == 2], dtype, -0.0);
}
const void* Defaults::ones(Dtype dtype) { return row(ones_, dtype, 1); }
const uint64_t* Defaults::all_kept() {
  all_kept_.resize(ceil_div(columns_, 64), ~uint64_t{0});
  return all_kept_.data();
}

RowMasks::RowMasks(const RowMask& mask, const uint64_t* all_kept)
    : mask_(mask), all_kept_(all_kept) {
  const auto* columns = mask.dims + mask.row_dims;
  computed_ = mask.column_dims == 1 && columns[0].mask_stride == 1;
  if (all_kept_ != nullptr || computed_) return;
  int64_t n = 1;
  for (int d = 0; d < mask.column_dims; ++d) n *= columns[d].size;
  bits_.resize(ceil_div(n, 64) + 1);
  run_.resize(ceil_div(columns[mask.column_dims - 1].size, 64));
}

uint64_t RowMasks::index_of(int64_t row) const {
  uint64_t index = mask_.mask_offset;
  for (int d = mask_.row_dims - 1; d >= 0; --d) {
    index += static_cast<uint64_t>(row % mask_.dims[d].size) * mask_.dims[d].mask_stride;
    row /= mask_.dims[d].size;
  }
  return index;
}

RowKernels::Mask RowMasks::of(int64_t row) {
  if (all_kept_ != nullptr) return {all_kept_, {}};
  const Key key = mask_.keys == nullptr ? mask_.key : mask_.keys[row / mask_.rows_per_slice];
  const uint64_t index = index_of(row);
  if (computed_) return {nullptr, {key, index, mask_.threshold}};
  store_bits(key, index);
  return {bits_.data(), {}};
}

// Runs of the innermost dimension, one after the other.
void RowMasks::store_bits(Key key, uint64_t index) {
  const auto* columns = mask_.dims + mask_.row_dims;
  const int last = mask_.column_dims - 1;
  const int64_t n = columns[last].size;
  const uint64_t stride = columns[last].mask_stride;
  int64_t runs = 1;
  for (int d = 0; d < last; ++d) runs *= columns[d].size;
  std::fill(bits_.begin(), bits_.end(), 0);
  for (int64_t run = 0; run < runs; ++run) {
    uint64_t from = index;
    int64_t rest = run;
    for (int d = last - 1; d >= 0; --d) {
      from += static_cast<uint64_t>(rest % columns[d].size) * columns[d].mask_stride;
      rest /= columns[d].size;
    }
    if (stride == 1) {
      kernels().keep_bits(run_.data(), n, {key, from, mask_.threshold}, 1, 0, 0);
    } else if (stride == 0) {
      const bool kept = keep(key, from, mask_.threshold);
      std::fill(run_.begin(), run_.end(), kept ? ~uint64_t{0} : 0);
    } else {
      keep_bits_one_by_one(run_.data(), n, key, from, stride, mask_.threshold);
    }
    append_bits(bits_, run * n, run_.data(), n);
  }
}

Rows::Rows(const RowArgs& args)
    : args_(args),
      of_(kernels().rows->of[row_pair(args.input_dtype, args.sum_dtype)]),
      moments_(kernels().rows->moments[static_cast<int>(args.sum_dtype)]),
      defaults_(args.columns) {
  const Dtype compute = compute_dtype(args.sum_dtype);
  if (args_.mask.keeps_all()) all_kept_ = defaults_.all_kept();
  if (args_.residual == nullptr) args_.residual = defaults_.minus_zeros(args.sum_dtype);
  if (args_.colscale != nullptr || args_.input_bias != nullptr || args_.rowscale != nullptr) {
    if (args_.input_bias == nullptr) args_.input_bias = defaults_.minus_zeros(compute);
    if (args_.colscale == nullptr) args_.colscale = defaults_.ones(compute);
  }
  sum_streams_ = args.sum != nullptr && streams(args.sum, args.rows, args.columns, args.sum_dtype);
  if (args_.norm == Norm::kNone) return;
  out_streams_ = streams(args.out, args.rows, args.columns, args.out_dtype);
  if (args_.weight == nullptr) args_.weight = defaults_.ones(compute);
  if (args_.bias == nullptr) args_.bias = defaults_.minus_zeros(compute);
}

void Rows::run(int64_t begin, int64_t end) const {
  RowMasks masks(args_.mask, all_kept_);
  const Dtype compute = compute_dtype(args_.sum_dtype);
  const auto& normalize = kernels().rows->normalize[static_cast<int>(args_.out_dtype)];
  const int64_t n = args_.columns;
  // The norm reads its row there: nearby, and without conversions.
  const bool norm = args_.norm != Norm::kNone;
  const bool direct = args_.sum != nullptr && args_.sum_dtype == compute && !sum_streams_;
  std::vector<Line> scratch(norm && !direct ? lines(n, compute) : 0);
  for (int64_t row = begin; row < end; ++row) {
    const RowKernels::Mask mask = masks.of(row);
    void* const sum = at(args_.sum, row * n, args_.sum_dtype);
    void* const values = scratch.empty() ? nullptr : scratch.data();
    const RowKernels::Sum to = {sum, sum_streams_ && mask.is_aligned(), values};
    const void* input = at(args_.input, row * args_.input_stride, args_.input_dtype);
    const void* residual = at(args_.residual, row * args_.residual_stride, args_.sum_dtype);
    if (args_.colscale == nullptr) {
      of_.add(input, residual, to, n, mask, args_.scale);
    } else {
      const double rowscale =
          args_.rowscale == nullptr ? 1 : value_at(args_.rowscale, row, compute);
      of_.scaled_add(input, residual, to, n, mask, args_.scale, args_.input_bias, args_.colscale,
                     rowscale);
    }
    if (!norm) continue;
    const void* const from = direct ? sum : values;
    const RowKernels::Moments moments = moments_(from, n, args_.norm == Norm::kLayer);
    const double rstd = 1 / std::sqrt(moments.square + args_.eps);
    set_value(args_.mean, row, compute, moments.mean);
    set_value(args_.rstd, row, compute, rstd);
    normalize(from, at(args_.out, row * n, args_.out_dtype), n, moments.mean, rstd, args_.weight,
              args_.bias, out_streams_);
  }
  if (sum_streams_ || out_streams_) kernels().fence();
}

RowsBackward::RowsBackward(const RowBackwardArgs& args)
    : args_(args),
      of_(kernels().rows->of[row_pair(args.dtype, args.sum_dtype)]),
      defaults_(args.columns) {
  if (args_.mask.keeps_all()) all_kept_ = defaults_.all_kept();
  const Dtype compute = compute_dtype(args.sum_dtype);
  if (args_.weight == nullptr) args_.weight = defaults_.ones(compute);
  const auto streams_or_none = [&](const void* base, Dtype dtype) {
    return base == nullptr || streams(base, args.rows, args.columns, dtype);
  };
  streaming_ = streams_or_none(args.grad_sum, args.sum_dtype) &&
               streams_or_none(args.grad_input, args.dtype);
  chunk_rows_ = std::max({kChunkRows, ceil_div(args.rows, kChunks), kChunkElements / args.columns});
  chunks_ = ceil_div(args.rows, chunk_rows_);
  row_lines_ = lines(args.columns, compute);
  const size_t all = static_cast<size_t>(chunks_) * row_lines_;
  if (args.grad_weight != nullptr) weight_sums_.resize(all);
  if (args.grad_bias != nullptr) bias_sums_.resize(all);
}

void RowsBackward::run(int64_t begin, int64_t end) {
  RowMasks masks(args_.mask, all_kept_);
  const Dtype compute = compute_dtype(args_.sum_dtype);
  const int64_t n = args_.columns;
  const bool side_by_side = n * element_size(compute) <= kSideBytes;
  // What nobody wants goes to one row, over and over.
  std::vector<Line> unwanted;
  if (weight_sums_.empty() || bias_sums_.empty()) unwanted.resize(row_lines_);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    void* const weight_sums = sums_of(weight_sums_, chunk, unwanted);
    void* const bias_sums = sums_of(bias_sums_, chunk, unwanted);
    const int64_t last = std::min((chunk + 1) * chunk_rows_, args_.rows);
    const auto columns = static_cast<double>(n);
    for (int64_t row = chunk * chunk_rows_, rows; row < last; row += rows) {
      rows = side_by_side && last - row >= kReduceRows ? kReduceRows : 1;
      double mean[kReduceRows], rstd[kReduceRows];
      RowKernels::Sums sums[kReduceRows];
      for (int64_t r = 0; r < rows; ++r) {
        mean[r] = args_.mean == nullptr ? 0 : value_at(args_.mean, row + r, compute);
        rstd[r] = value_at(args_.rstd, row + r, compute);
      }
      (rows == 1 ? of_.reduce : of_.reduce_rows)(at(args_.grad_out, row * n, args_.dtype),
                                                 at(args_.sum, row * n, args_.sum_dtype), n, mean,
                                                 rstd, args_.weight, weight_sums, bias_sums, sums);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = row + r, first = i * n;
        const RowKernels::Mask mask = masks.of(i);
        of_.backward(at(args_.grad_out, first, args_.dtype), at(args_.sum, first, args_.sum_dtype),
                     at(args_.grad_sum_in, first, args_.sum_dtype), n, mean[r], rstd[r],
                     args_.weight, args_.norm == Norm::kRms ? 0 : sums[r].g / columns,
                     sums[r].gx / columns, at(args_.grad_sum, first, args_.sum_dtype),
                     at(args_.grad_input, first, args_.dtype), mask, args_.scale,
                     streaming_ && mask.is_aligned());
      }
    }
  }
  if (streaming_) kernels().fence();
}

void* RowsBackward::sums_of(std::vector<Line>& sums, int64_t chunk,
                            std::vector<Line>& unwanted) const {
  return sums.empty() ? unwanted.data() : sums.data() + chunk * row_lines_;
}

template <class C>
void RowsBackward::add_up(const std::vector<Line>& partial, void* out) const {
  if (out == nullptr) return;
  auto* const to = static_cast<C*>(out);
  std::fill_n(to, args_.columns, C{0});
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
    const auto* from = reinterpret_cast<const C*>(partial.data() + chunk * row_lines_);
    for (int64_t j = 0; j < args_.columns; ++j) to[j] += from[j];
  }
}

void RowsBackward::finish() {
  if (args_.sum_dtype == Dtype::kFloat64) {
    add_up<double>(weight_sums_, args_.grad_weight);
    add_up<double>(bias_sums_, args_.grad_bias);
  } else {
    add_up<float>(weight_sums_, args_.grad_weight);
    add_up<float>(bias_sums_, args_.grad_bias);
  }
}

}  // namespace dropout_ext::cpu
