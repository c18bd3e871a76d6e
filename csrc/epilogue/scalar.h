// What an epilogue is made of. It is a template over V, a scalar (these) or a vector of them (those
// of csrc/cpu/simd_*.h, found by argument-dependent lookup). Under a target attribute only
// templates may be compiled that no other file instantiates: include this header before, the
// epilogues within.
#pragma once

#include <cmath>

#include "epilogue.h"

namespace dropout_ext {

DROPOUT_EXT_HD float splat(double x, float) { return static_cast<float>(x); }
DROPOUT_EXT_HD double splat(double x, double) { return x; }
DROPOUT_EXT_HD float fma(float x, float y, float z) { return ::fmaf(x, y, z); }
DROPOUT_EXT_HD double fma(double x, double y, double z) { return ::fma(x, y, z); }
DROPOUT_EXT_HD float select(bool keep, float kept, float dropped) { return keep ? kept : dropped; }
DROPOUT_EXT_HD double select(bool keep, double kept, double dropped) {
  return keep ? kept : dropped;
}
DROPOUT_EXT_HD float mul_or_zero(bool keep, float x, float y) { return keep ? x * y : 0; }
DROPOUT_EXT_HD double mul_or_zero(bool keep, double x, double y) { return keep ? x * y : 0; }

}  // namespace dropout_ext
