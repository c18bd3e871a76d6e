// Dropout, residual and norm of whole rows, as the kernels take them: raw pointers, no torch.
//
//   t = (input + input_bias) * colscale * rowscale
//   sum = fma(keep ? t : +0, scale, residual), rounded to its dtype
//   out = (sum - mean) * rstd * weight + bias, of the rounded sum
//
// All arithmetic is in the compute type: float64 where the sum is, else float32.
#pragma once

#include "../contract/index_map.h"
#include "epilogue.h"

namespace dropout_ext {

// Dimensions around the rows that kernels take, once neighbours in the mask are merged.
inline constexpr int kRowDims = 8;

enum class Norm : int { kNone, kLayer, kRms };

// Where the rows lie in the mask: element (row, column) has index
// mask_offset + sum of its positions times mask strides.
struct RowMask {
  Key key;                       // of the first slice
  const Key* keys;               // null, or one per slice of rows_per_slice rows
  const bool* stored = nullptr;  // null, or all decisions; needed where not is_run(), on CUDA
  int64_t rows_per_slice;
  uint32_t threshold;  // 0 keeps everything and computes no mask
  uint64_t mask_offset;
  int row_dims, column_dims;  // row-major, outermost first, neighbours merged; at least one each
  struct Extent {
    int64_t size;
    uint64_t mask_stride;
  } dims[kMaxDims + 2];

  bool keeps_all() const { return threshold == 0; }
  // Of elements side by side, or of one for a whole row.
  bool is_run() const {
    return column_dims == 1 && dims[row_dims].mask_stride <= 1 && row_dims <= kRowDims;
  }
};

// Rows of `columns` elements. Strides are those between rows, in elements; 0 where all rows read or
// write one. What is null is left out.
struct RowArgs {
  int64_t rows, columns;
  RowMask mask;
  double scale;

  const void* input;  // null, on CUDA alone: the sum is given, nothing is dropped or added
  Dtype input_dtype;
  int64_t input_stride;
  const void* residual;  // of sum_dtype
  int64_t residual_stride;
  const void* input_bias;  // compute type, a row, as colscale, weight and bias
  const void* colscale;
  const void* rowscale;  // compute type, one per row
  void* sum;             // on the CPU null where there is a norm and nobody wants it
  Dtype sum_dtype;

  Norm norm;
  double eps;
  const void* weight;
  const void* bias;
  void* out;  // of out_dtype, dense
  Dtype out_dtype;
  void* mean;  // compute type, one per row; null for Norm::kRms
  void* rstd;
};

// Of the same call without input_bias, colscale and rowscale:
//   g = grad_out * weight, x = (sum - mean) * rstd
//   grad_sum = rstd * (g - mean(g) - x * mean(g * x)) + grad_sum_in, rounded to the sum's dtype
//   grad_input = keep ? grad_sum * scale : 0, of what was not yet rounded
// mean(g) is left out for Norm::kRms.
struct RowBackwardArgs {
  int64_t rows, columns;
  RowMask mask;
  double scale;
  Norm norm;
  Dtype dtype;  // of grad_out and grad_input
  const void* grad_out;
  const void* grad_sum_in;  // of sum_dtype, dense
  const void* sum;
  Dtype sum_dtype;
  const void* mean;
  const void* rstd;
  const void* weight;
  void* grad_sum;
  void* grad_input;
  void* grad_weight;  // compute type, a row
  void* grad_bias;
};

// The pairs of dtypes, of input, output and their gradients, and of sum and residual, that there
// are kernels for; -1 for others.
inline constexpr int kRowPairs = 8;
inline constexpr int row_pair(Dtype dtype, Dtype sum) {
  constexpr Dtype kPairs[kRowPairs][2] = {
      {Dtype::kFloat64, Dtype::kFloat64}, {Dtype::kFloat32, Dtype::kFloat32},
      {Dtype::kFloat16, Dtype::kFloat16}, {Dtype::kBFloat16, Dtype::kBFloat16},
      {Dtype::kFloat16, Dtype::kFloat32}, {Dtype::kBFloat16, Dtype::kFloat32},
      {Dtype::kFloat32, Dtype::kFloat16}, {Dtype::kFloat32, Dtype::kBFloat16},
  };
  for (int i = 0; i < kRowPairs; ++i) {
    if (kPairs[i][0] == dtype && kPairs[i][1] == sum) return i;
  }
  return -1;
}

}  // namespace dropout_ext
