// The passes over one row of which rows.cpp makes dropout with residual and norm, compiled once per
// instruction set from row_kernel_body.h. `C` below is the compute type: double where the sum is,
// else float.
#pragma once

#include "../epilogue/row_args.h"
#include "kernel.h"

namespace dropout_ext::cpu {

inline constexpr int kReduceRows = 4;

// What passes take as `streaming`: whether they store past the caches. If so, the rows that they
// write begin at multiples of kStreamAlignment and have a multiple of kStreamColumns elements, and
// the mask is aligned.
inline constexpr int kStreamColumns = 16;

struct RowKernels {
  // Keep decisions: stored, or computed where `bits` is null.
  struct Mask {
    const uint64_t* bits;
    MaskRun run;
    // Whether the row begins where a vector of decisions does.
    bool is_aligned() const { return bits != nullptr || run.index % kBlock == 0; }
  };
  // Where a sum goes, each null where it does not.
  struct Sum {
    void* sum;
    bool streaming;  // past the caches
    void* values;    // as it is rounded, in the compute type
  };
  struct Moments {
    double mean;
    double square;  // mean of (sum - mean)^2, or of sum^2
  };
  struct Sums {
    double g, gx;
  };
  // Of input, output and their gradients (T), and of sum and residual (S); see row_pair.
  struct Of {
    // sum = fma(keep ? t : +0, scale, residual)
    void (*add)(const void* input, const void* residual, const Sum& out, int64_t n,
                const Mask& mask, double scale);
    // The same with t = (input + bias) * colscale * rowscale.
    void (*scaled_add)(const void* input, const void* residual, const Sum& out, int64_t n,
                       const Mask& mask, double scale, const void* bias, const void* colscale,
                       double rowscale);
    // Sums of g and of g * x; adds grad_out * x to grad_weight and grad_out to grad_bias. Of one
    // row, or of kReduceRows side by side.
    using Reduce = void(const void* grad_out, const void* sum, int64_t n, const double* mean,
                        const double* rstd, const void* weight, void* grad_weight, void* grad_bias,
                        Sums* sums);
    Reduce *reduce, *reduce_rows;
    // grad_sum = rstd * (g - mean_g - x * mean_gx) + grad_sum_in
    // grad_input = keep ? that * scale : +0
    void (*backward)(const void* grad_out, const void* sum, const void* grad_sum_in, int64_t n,
                     double mean, double rstd, const void* weight, double mean_g, double mean_gx,
                     void* grad_sum, void* grad_input, const Mask& mask, double scale,
                     bool streaming);
  };
  Of of[kRowPairs];
  // By the dtype of the sum.
  Moments (*moments[4])(const void* values, int64_t n, bool centered);
  // out = (values - mean) * rstd * weight + bias, by the dtype of out.
  void (*normalize[4])(const void* values, void* out, int64_t n, double mean, double rstd,
                       const void* weight, const void* bias, bool streaming);
};

}  // namespace dropout_ext::cpu
