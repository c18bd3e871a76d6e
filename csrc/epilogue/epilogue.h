// What a kernel writes once it has decided: keep ? f(x) : g. Dropped elements are selected, never
// multiplied, so NaN and infinity do not survive a drop.
#pragma once

#include <cmath>
#include <cstdint>

#include "../contract/philox.h"

namespace dropout_ext {

enum class Dtype : int { kFloat64, kFloat32, kFloat16, kBFloat16, kComplex128, kComplex64, kBool };

enum class Epilogue : int {
  kAffine,    // keep ? fma(x, scale, bias) : dropped
  kKeepMask,  // keep, as a bool; reads no input
  kAdd,       // fma(keep ? x : +0, scale, x2)
  // keep ? f(x) * scale : +0, and the gradient of that: keep ? x * f'(x2) * scale : +0
  kActivation,
  kActivationBackward,
};

// Of float32 and the 16-bit types; activation.h.
enum class Activation : int { kGelu, kGeluTanh, kSilu, kRelu };
inline constexpr int kActivations = 4;

inline constexpr bool has_second_input(Epilogue epilogue) {
  return epilogue == Epilogue::kAdd || epilogue == Epilogue::kActivationBackward;
}

// Rounded once to the compute type: float64 for float64 and complex128, float32 for all others.
struct EpilogueParams {
  double scale = 1;
  double bias = -0.0;
  double dropped = 0;
  Activation activation = Activation::kGelu;

  // keep ? x * scale : +0
  bool is_scale() const {
    return bias == 0 && std::signbit(bias) && dropped == 0 && !std::signbit(dropped);
  }
};

inline constexpr int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kComplex128: return 16;
    case Dtype::kComplex64:
    case Dtype::kFloat64: return 8;
    case Dtype::kFloat32: return 4;
    case Dtype::kFloat16:
    case Dtype::kBFloat16: return 2;
    case Dtype::kBool: return 1;
  }
  return 0;
}

}  // namespace dropout_ext
