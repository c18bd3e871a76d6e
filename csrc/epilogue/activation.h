// Activations and their derivatives over a vector V of floats. They use +, -, *, /, fma, selects
// and arithmetic on exponents only, each of which rounds alike everywhere, so that all devices
// agree on every bit; tests/fused_reference.py computes the same. See affine.h for V, which has
// here also
//   absolute(a)
//   if_greater(a, b, x, y)     a > b ? x : y, so y where a or b is NaN
//   shift_exponent(a, r)       the bits of a plus those of r shifted left by 23
#pragma once

#include "epilogue.h"

namespace dropout_ext {

// c[0] + c[1] x + ... by Horner's rule.
template <class V, int n>
DROPOUT_EXT_HD V polynomial(const V& x, const double (&c)[n]) {
  V sum = splat(c[n - 1], V{});
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, x, splat(c[i], V{}));
  return sum;
}

// 2^u for -126 <= u <= 128, within 2^-23 of it; infinity at 128. Fitted to minimax error of 2^u on
// [-1/2, 1/2], 2e-9.
template <class V>
DROPOUT_EXT_HD V exp2(const V& u) {
  constexpr double kCoefficients[] = {
      1, 0x1.62e43p-1, 0x1.ebfbdcp-3, 0x1.c6aee8p-5, 0x1.3b2d4cp-7, 0x1.5f3e52p-10, 0x1.41fbbcp-13};
  // Adding this leaves u, rounded to an integer, in the lowest bits, and zeros in the 22 above.
  const V to_integer = splat(0x1.8p23, V{});
  const V integer = u + to_integer;
  return shift_exponent(polynomial(u - (integer - to_integer), kCoefficients), integer);
}

// Phi(-t), the normal distribution's lower tail, for 0 <= t <= 9, as 2^P(t). P is fitted to minimax
// error of t * Phi(-t), 5e-10.
template <class V>
DROPOUT_EXT_HD V normal_tail(const V& t) {
  constexpr double kCoefficients[] = {-1,
                                      -0x1.26aedep+0,
                                      -0x1.d63c16p-2,
                                      -0x1.adb0a4p-5,
                                      0x1.c7623ap-8,
                                      0x1.7672fp-17,
                                      -0x1.319e6cp-12,
                                      0x1.56fc26p-14,
                                      -0x1.98abb2p-17,
                                      0x1.0a863ep-20,
                                      -0x1.26ed5ap-25};
  return exp2(polynomial(t, kCoefficients));
}

// 2^u, at least 2^-126 and at most 2^bound.
template <class V>
DROPOUT_EXT_HD V bounded_exp2(const V& u, double bound) {
  const V most = splat(bound, V{}), least = splat(-126.0, V{});
  return exp2(if_greater(least, u, least, if_greater(u, most, most, u)));
}

// |x|, at most `bound`.
template <class V>
DROPOUT_EXT_HD V magnitude(const V& x, double bound) {
  const V most = splat(bound, V{}), t = absolute(x);
  return if_greater(t, most, most, t);
}

// Beyond, Phi(-|x|), phi(x) and the tanh form's 1 - sigmoid(|x|) are lost beside 1e-17.
inline constexpr double kGeluBound = 9;
// Likewise 1 - sigmoid(|x|) of silu.
inline constexpr double kSiluBound = 64;

// max(x, 0)
template <class V>
DROPOUT_EXT_HD V rectified(const V& x) {
  const V zero = splat(0.0, V{});
  return if_greater(zero, x, zero, x);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|): Hendrycks, Gimpel, "Gaussian error linear units", 2016.
struct Gelu {
  template <class V>
  static DROPOUT_EXT_HD V value(const V& x) {
    const V t = magnitude(x, kGeluBound);
    return fma(splat(-1.0, V{}) * t, normal_tail(t), rectified(x));
  }
  // Phi(x) + x phi(x)
  template <class V>
  static DROPOUT_EXT_HD V gradient(const V& grad, const V& x) {
    const V t = magnitude(x, kGeluBound), zero = splat(0.0, V{});
    const V tail = normal_tail(t);
    const V cdf = if_greater(zero, x, tail, splat(1.0, V{}) - tail);
    // 2^(-t^2 / 2 * log2(e)) / sqrt(2 pi)
    const V density = splat(0x1.988454p-2, V{}) * exp2(t * t * splat(-0x1.715476p-1, V{}));
    return grad * fma(if_greater(zero, x, zero - t, t), density, cdf);
  }
};

// x / (1 + 2^u(x)), u(x) = -log2(e) x (a + b x^2): silu, and gelu by tanh.
template <class V>
struct Sigmoid {
  V x, u;

  // -0 from u = 128 on, NaN for minus infinity, as PyTorch.
  DROPOUT_EXT_HD V value() const { return x / (splat(1.0, V{}) + bounded_exp2(u, 128)); }
  // sigmoid + x sigmoid (1 - sigmoid) slope, slope = -u'(x) / log2(e), where 1 - sigmoid is
  // 2^u sigmoid: without cancellation. `t` is |x| with a bound from which on that product is lost.
  DROPOUT_EXT_HD V derivative(const V& t, const V& slope) const {
    const V one = splat(1.0, V{}), zero = splat(0.0, V{});
    const V power = bounded_exp2(u, 63);
    const V sigmoid = one / (one + power);
    const V bounded = if_greater(zero, x, zero - t, t);
    return fma(bounded * (power * sigmoid * sigmoid), slope, sigmoid);
  }
};

// Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", 2017.
struct Silu {
  template <class V>
  static DROPOUT_EXT_HD Sigmoid<V> sigmoid(const V& x) {
    return {x, x * splat(-0x1.715476p+0, V{})};
  }
  template <class V>
  static DROPOUT_EXT_HD V value(const V& x) {
    return sigmoid(x).value();
  }
  template <class V>
  static DROPOUT_EXT_HD V gradient(const V& grad, const V& x) {
    return grad * sigmoid(x).derivative(magnitude(x, kSiluBound), splat(1.0, V{}));
  }
};

// x / 2 (1 + tanh(y)) = x sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  template <class V>
  static DROPOUT_EXT_HD Sigmoid<V> sigmoid(const V& x) {
    // -2 log2(e) sqrt(2 / pi) and that times 0.044715
    const V inner = fma(x * x, splat(-0x1.a5a7dp-4, V{}), splat(-0x1.26aec2p+1, V{}));
    return {x, x * inner};
  }
  template <class V>
  static DROPOUT_EXT_HD V value(const V& x) {
    return sigmoid(x).value();
  }
  template <class V>
  static DROPOUT_EXT_HD V gradient(const V& grad, const V& x) {
    // 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
    const V t = magnitude(x, kGeluBound);
    const V slope = fma(t * t, splat(0x1.b6676cp-3, V{}), splat(0x1.988454p+0, V{}));
    return grad * sigmoid(x).derivative(t, slope);
  }
};

struct Relu {
  template <class V>
  static DROPOUT_EXT_HD V value(const V& x) {
    return rectified(x);
  }
  // Selected, so that no infinity times 0 comes about; NaN where x is.
  template <class V>
  static DROPOUT_EXT_HD V gradient(const V& grad, const V& x) {
    const V y = rectified(x);
    return if_greater(y, splat(0.0, V{}), grad, y);
  }
};

template <class Function, class V>
struct Activated {
  V scale;
  DROPOUT_EXT_HD explicit Activated(const V& scale) : scale(scale) {}
  DROPOUT_EXT_HD explicit Activated(const EpilogueParams& p) : scale(splat(p.scale, V{})) {}
  template <class Keep>
  DROPOUT_EXT_HD V operator()(const Keep& keep, const V& x) const {
    return mul_or_zero(keep, Function::value(x), scale);
  }
};

template <class Function, class V>
struct ActivatedBackward {
  V scale;
  DROPOUT_EXT_HD explicit ActivatedBackward(const V& scale) : scale(scale) {}
  DROPOUT_EXT_HD explicit ActivatedBackward(const EpilogueParams& p) : scale(splat(p.scale, V{})) {}
  template <class Keep>
  DROPOUT_EXT_HD V operator()(const Keep& keep, const V& grad, const V& x) const {
    return mul_or_zero(keep, Function::gradient(grad, x), scale);
  }
};

}  // namespace dropout_ext
