// fma(keep ? x : +0, scale, x2): dropout of x, added to a residual and rounded once. See affine.h.
#pragma once

#include "epilogue.h"

namespace dropout_ext {

template <class V>
struct Add {
  V scale, zero;

  DROPOUT_EXT_HD explicit Add(const EpilogueParams& p)
      : scale(splat(p.scale, V{})), zero(splat(0.0, V{})) {}

  template <class Keep>
  DROPOUT_EXT_HD V operator()(const Keep& keep, const V& x, const V& residual) const {
    return fma(select(keep, x, zero), scale, residual);
  }
};

}  // namespace dropout_ext
