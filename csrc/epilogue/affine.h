// keep ? fma(x, scale, bias) : dropped, of a vector V with splat, fma, select and mul_or_zero,
// which are found by argument-dependent lookup (csrc/cpu/simd_*.h). Included under the target
// attribute of an instruction set: outside of it, nothing could be inlined.
#pragma once

#include "epilogue.h"

namespace dropout_ext {

template <class V>
struct Affine {
  V scale, bias, dropped;

  DROPOUT_EXT_HD explicit Affine(const EpilogueParams& p)
      : scale(splat(p.scale, V{})), bias(splat(p.bias, V{})), dropped(splat(p.dropped, V{})) {}

  // Computed outside the choice, so that it is a select and no branch.
  template <class Keep>
  DROPOUT_EXT_HD V operator()(const Keep& keep, const V& x) const {
    return select(keep, fma(x, scale, bias), dropped);
  }
};

// The same where the bias is -0 and dropped elements are +0: a multiply, which is exact, signed
// zeros and all, and faster where there is no instruction for fma.
template <class V>
struct Scale {
  V scale;

  DROPOUT_EXT_HD explicit Scale(const EpilogueParams& p) : scale(splat(p.scale, V{})) {}

  template <class Keep>
  DROPOUT_EXT_HD V operator()(const Keep& keep, const V& x) const {
    return mul_or_zero(keep, x, scale);
  }
};

}  // namespace dropout_ext
