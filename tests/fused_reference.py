"""What the fused functions compute, operation by operation (csrc/epilogue), in plain PyTorch, with
an fma that is exact for all values.
"""

import ctypes
import ctypes.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dropout_ext import _reference as reference

# Of input, output and their gradients, and of sum and residual.
PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.argtypes = [ctypes.c_double] * 3
_libm.fma.restype = ctypes.c_double


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z, rounded once. float32: the product is exact in float64, and a sum that is rounded
    to odd there rounds to float32 as the exact one does. float64: by the C library.
    """
    x, y, z = torch.broadcast_tensors(x, y, z)
    if x.dtype == torch.float64:
        values = zip(*(t.flatten().tolist() for t in (x, y, z)), strict=True)
        results = [_libm.fma(*v) for v in values]
        return torch.tensor(results, dtype=x.dtype).view(x.shape)
    product, z = x.double() * y.double(), z.double()
    total = product + z
    from_z = total - product
    error = (product - (total - from_z)) + (z - from_z)  # Knuth
    toward = torch.where(error > 0, math.inf, -math.inf).double()
    inexact = (error != 0) & torch.isfinite(total) & (total.view(torch.int64) & 1 == 0)
    return torch.where(inexact, torch.nextafter(total, toward), total).float()


def add(
    input: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    key: Tensor,
    p: float,
    *,
    bias: Tensor | None = None,
    colscale: Tensor | None = None,
    rowscale: Tensor | None = None,
    strides: Sequence[int] = (),
    offset: int = 0,
) -> Tensor:
    """fma(keep ? t : 0, 1 / (1 - p), residual), t = (input + bias) * colscale * rowscale."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    t = input.to(compute)
    if bias is not None or colscale is not None or rowscale is not None:
        t = t + (-0.0 if bias is None else bias.to(compute))
        t = t * (1 if colscale is None else colscale.to(compute))
        t = t * (1 if rowscale is None else rowscale.to(compute).unsqueeze(-1))
    keep = reference.keep_mask(key, p, input.shape, strides, offset)
    scale = torch.tensor(1 / (1 - p), dtype=compute)
    other = torch.tensor(-0.0, dtype=compute) if residual is None else residual.to(compute)
    return fma(torch.where(keep, t, 0), scale, other).to(dtype)


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype)


def _polynomial(x: Tensor, *coefficients: str) -> Tensor:
    """By Horner's rule; the coefficients in hexadecimal."""
    *rest, last = (_scalar(float.fromhex(c), x) for c in coefficients)
    total = last.expand_as(x)
    for c in reversed(rest):
        total = fma(total, x, c.expand_as(x))
    return total


def _exp2(u: Tensor) -> Tensor:
    integer = u + _scalar(1.5 * 2**23, u)
    fraction = u - (integer - _scalar(1.5 * 2**23, u))
    mantissa = _polynomial(
        fraction, "0x1p+0", "0x1.62e43p-1", "0x1.ebfbdcp-3", "0x1.c6aee8p-5", "0x1.3b2d4cp-7",
        "0x1.5f3e52p-10", "0x1.41fbbcp-13",
    )  # fmt: skip
    return (mantissa.view(torch.int32) + (integer.view(torch.int32) << 23)).view(torch.float32)


def _normal_tail(t: Tensor) -> Tensor:
    return _exp2(
        _polynomial(
            t,
            "-0x1p+0",
            "-0x1.26aedep+0",
            "-0x1.d63c16p-2",
            "-0x1.adb0a4p-5",
            "0x1.c7623ap-8",
            "0x1.7672fp-17",
            "-0x1.319e6cp-12",
            "0x1.56fc26p-14",
            "-0x1.98abb2p-17",
            "0x1.0a863ep-20",
            "-0x1.26ed5ap-25",
        )
    )


def _bounded_exp2(u: Tensor, bound: int) -> Tensor:
    most = torch.where(u > bound, _scalar(bound, u), u)
    return _exp2(torch.where(u < -126, _scalar(-126, u), most))


def _magnitude(x: Tensor, bound: int = 9) -> Tensor:
    return torch.where(x.abs() > bound, _scalar(bound, x), x.abs())


def _rectified(x: Tensor) -> Tensor:
    return torch.where(x < 0, _scalar(0, x), x)


def _hex(value: str, like: Tensor) -> Tensor:
    return _scalar(float.fromhex(value), like)


def _sigmoid_exponent(x: Tensor, function: int) -> Tensor:
    """u, where the activation is x / (1 + 2^u)."""
    if function == 2:
        return x * _hex("-0x1.715476p+0", x)
    inner = fma(x * x, _hex("-0x1.a5a7dp-4", x), _hex("-0x1.26aec2p+1", x).expand_as(x))
    return x * inner


def _activated(x: Tensor, function: int) -> Tensor:
    if function == 0:
        t = _magnitude(x)
        return fma(-t, _normal_tail(t), _rectified(x))
    if function == 3:
        return _rectified(x)
    return x / (1 + _bounded_exp2(_sigmoid_exponent(x, function), 128))


def _activation_gradient(grad: Tensor, x: Tensor, function: int) -> Tensor:
    t = _magnitude(x)
    if function == 0:
        tail = _normal_tail(t)
        cdf = torch.where(x < 0, tail, 1 - tail)
        density = _hex("0x1.988454p-2", x) * _exp2(t * t * _hex("-0x1.715476p-1", x))
        return grad * fma(torch.where(x < 0, -t, t), density, cdf)
    if function == 3:
        y = _rectified(x)
        return torch.where(y > 0, grad, y)
    power = _bounded_exp2(_sigmoid_exponent(x, function), 63)
    sigmoid = 1 / (1 + power)
    slope = torch.ones_like(x)
    if function == 1:
        one = _hex("0x1.988454p+0", x).expand_as(x)
        slope = fma(t * t, _hex("0x1.b6676cp-3", x), one)
    t = _magnitude(x, 64) if function == 2 else t
    bounded = torch.where(x < 0, -t, t)
    return grad * fma(bounded * (power * sigmoid * sigmoid), slope, sigmoid)


def activation(
    input: Tensor,
    function: int,
    key: Tensor,
    p: float,
    scale: float,
    mask_strides: Sequence[int] = (),
    mask_offset: int = 0,
) -> Tensor:
    """keep ? f(input) * scale : 0 in float32, rounded once."""
    y = _activated(input.float(), function)
    return reference.apply(y, key, p, scale, mask_strides, mask_offset).to(input.dtype)


def activation_backward(
    grad: Tensor,
    input: Tensor,
    function: int,
    key: Tensor,
    p: float,
    scale: float,
    mask_strides: Sequence[int] = (),
    mask_offset: int = 0,
) -> Tensor:
    y = _activation_gradient(grad.float(), input.float(), function)
    return reference.apply(y, key, p, scale, mask_strides, mask_offset).to(input.dtype)
