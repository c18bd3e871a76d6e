"""The mask contract, version 1, and its operators in plain PyTorch.

The specification to read, the oracle of the tests, and what a device without a kernel runs.
Unsigned words are held in int64 tensors: 32-bit words as their value, 64-bit words as their bits.
Works on any device that has int64, and on meta tensors; float64 is used only where the input is
float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
PHILOX_M0 = 0xD2511F53
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9
PHILOX_W1 = 0xBB67AE85
MASK32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both 32-bit halves of a * b. Halving b keeps each partial product below 2^49."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter words and two key words, broadcast against each other.

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _mulhilo(PHILOX_M0, c0)
        high1, low1 = _mulhilo(PHILOX_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + PHILOX_W0) & MASK32
        k1 = (k1 + PHILOX_W1) & MASK32
    return c0, c1, c2, c3


def _lo32(x: Tensor) -> Tensor:
    return x & MASK32


def _hi32(x: Tensor) -> Tensor:
    return x >> 32 & MASK32


def _wrap(x: int) -> int:
    """x modulo 2^64 as int64 holds it. A symbolic integer is already one."""
    return (x + 2**63) % 2**64 - 2**63 if isinstance(x, int) else x


def _seed_offset(key: Tensor) -> tuple[Tensor, Tensor]:
    """Both words of each key, as int64, of shape key.shape[:-1]."""
    return key.view(torch.int64).unbind(-1)


def words(key: Tensor, index: Tensor) -> Tensor:
    """The 32-bit word of each element index.

    index: int64, any shape. key: (2,), or (n, 2) where n = index.size(0): then key j is for
    index[j].
    """
    seed, offset = _seed_offset(key.to(index.device))
    if key.dim() == 2:
        seed, offset = (w.reshape(-1, *[1] * (index.dim() - 1)) for w in (seed, offset))
    block = index >> 3 & (2**61 - 1)
    w0, w1, w2, w3 = philox4x32_10(
        (_lo32(offset), _hi32(offset), _lo32(block), _hi32(block)), (_lo32(seed), _hi32(seed))
    )
    word = torch.where(
        (index & 2).bool(),
        torch.where((index & 1).bool(), w3, w2),
        torch.where((index & 1).bool(), w1, w0),
    )
    return torch.where((index & 4).bool(), (word << 16 | word >> 16) & MASK32, word)


def threshold(p: float) -> int:
    """T, 0 to 2^32: an element is kept where its word is at least T."""
    return math.floor(p * 2**32 + 0.5)


def row_major(size: Sequence[int]) -> list[int]:
    """The strides of a dense tensor of this size."""
    strides = [1] * len(size)
    for d in range(len(size) - 1, 0, -1):
        strides[d - 1] = strides[d] * size[d]
    return strides


def element_index(
    size: Sequence[int],
    mask_strides: Sequence[int] = (),
    mask_offset: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """mask_offset + sum of idx[d] * mask_strides[d], modulo 2^64, as int64 of shape `size`.

    Empty `mask_strides` means row-major.
    """
    index = torch.zeros((), dtype=torch.int64, device=device) + _wrap(mask_offset)
    for d, stride in enumerate(mask_strides or row_major(size)):
        position = torch.arange(size[d], device=device).view(-1, *[1] * (len(size) - 1 - d))
        index = index + position * _wrap(stride)
    return index.expand(tuple(size))


def keep_mask(
    key: Tensor,
    p: float,
    size: Sequence[int],
    mask_strides: Sequence[int] = (),
    mask_offset: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which elements are kept: bool, of shape `size`, on `device` (default: the key's)."""
    index = element_index(size, mask_strides, mask_offset, device=device or key.device)
    return words(key, index) >= threshold(p)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scalar(value: float, like: Tensor) -> Tensor:
    """`value` rounded once to the dtype of `like`."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def apply(
    input: Tensor,
    key: Tensor,
    p: float,
    scale: float,
    mask_strides: Sequence[int] = (),
    mask_offset: int = 0,
    bias: float | None = None,
    dropped: float = 0.0,
) -> Tensor:
    """keep ? fma(input, scale, bias) : dropped, complex numbers as two reals under one decision.

    None for a bias of -0: keep ? input * scale : dropped, signed zeros and all.
    """
    keep = keep_mask(key, p, input.shape, mask_strides, mask_offset, device=input.device)
    if input.is_complex():
        x, keep = torch.view_as_real(input.resolve_conj()), keep.unsqueeze(-1)
    else:
        x = input.to(_compute_dtype(input.dtype))
    scaled = _scalar(scale, x)
    kept = x * scaled if bias is None else fma(x, scaled, _scalar(bias, x))
    # Selected, not multiplied: NaN and infinity do not survive a drop.
    result = torch.where(keep, kept, _scalar(dropped, x))
    return torch.empty_like(input).copy_(
        torch.view_as_complex(result) if input.is_complex() else result
    )


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and its error. Knuth."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a * b rounded, and its error. Dekker, Veltkamp."""
    factor = 2**27 + 1 if a.dtype == torch.float64 else 2**12 + 1

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        high = factor * x - (factor * x - x)
        return high, x - high

    product = a * b
    a1, a2 = split(a)
    b1, b2 = split(b)
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _add_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """a + b, rounded to the neighbour with an odd significand where it is inexact."""
    total, error = _two_sum(a, b)
    bits = total.view(torch.int64 if total.dtype == torch.float64 else torch.int32)
    toward = torch.where(error > 0, _scalar(math.inf, total), _scalar(-math.inf, total))
    odd = torch.nextafter(total, toward)
    return torch.where((error.abs() > 0) & (bits & 1 == 0), odd, total)


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z in float32 or float64, rounded once.

    Boldo, Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd", IEEE Transactions on Computers 57(4), 2008. Large x are scaled down by a power of two,
    so that nothing overflows early; exact unless |y| is above 2^60, or |z| is below 2^-30 yet not
    zero, or the result is subnormal.
    """
    large = x.abs() >= 2.0**60
    shrink = torch.where(large, _scalar(2.0**-64, x), _scalar(1, x))
    grow = torch.where(large, _scalar(2.0**64, x), _scalar(1, x))
    product, product_error = _two_product(x * shrink, y)
    low, low_error = _two_sum(z * shrink, product_error)
    high, high_error = _two_sum(product, low)
    exact = (high + _add_to_odd(low_error, high_error)) * grow
    # The error terms of an infinity are NaN, and a sum of zeros loses its sign.
    plain = x * y + z
    return torch.where(torch.isfinite(x) & (exact != 0), exact, plain)


def add(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    colscale: Tensor | None,
    rowscale: Tensor | None,
    key: Tensor | None,
    p: float,
    scale: float,
    mask_strides: Sequence[int],
    mask_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """fma(keep ? t : 0, scale, residual), t = (input + input_bias) * colscale * rowscale; no key
    keeps everything, unscaled.
    """
    compute = _compute_dtype(dtype)
    t = input.to(compute)
    if input_bias is not None or colscale is not None or rowscale is not None:
        t = t + (-0.0 if input_bias is None else input_bias.to(compute))
        t = t * (1 if colscale is None else colscale.to(compute))
        t = t * (1 if rowscale is None else _per_row(rowscale, t).to(compute))
    if key is None:
        scale = 1.0
    else:
        keep = keep_mask(key, p, input.shape, mask_strides, mask_offset, device=input.device)
        t = torch.where(keep, t, _scalar(0, t))
    other = _scalar(-0.0, t) if residual is None else residual.to(compute)
    return fma(t, _scalar(scale, t), other.expand_as(t)).to(dtype)


def _per_row(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(*rows.shape, *[1] * (like.dim() - rows.dim()))


def _centered(total: Tensor, norm_dims: int, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sum less its mean, the mean, and the mean square of the first, of every row."""
    x = total.to(_compute_dtype(total.dtype))
    dims = tuple(range(-norm_dims, 0))
    mean = torch.zeros_like(x.mean(dims, keepdim=True)) if rms else x.mean(dims, keepdim=True)
    return x - mean, mean, (x - mean).square().mean(dims, keepdim=True)


def add_norm(
    input, residual, input_bias, colscale, rowscale, key, p, scale, mask_strides, mask_offset,
    norm_dims, weight, bias, eps, rms, sum_dtype, dtype,
):  # fmt: skip
    """`add`, and its norm over the last dimensions: (norm, sum, mean, 1 / deviation)."""
    total = add(
        input, residual, input_bias, colscale, rowscale, key, p, scale, mask_strides, mask_offset,
        sum_dtype,
    )  # fmt: skip
    x, mean, square = _centered(total, norm_dims, rms)
    rstd = (square + eps).rsqrt()
    out = x * rstd
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    rows = input.shape[: input.dim() - norm_dims]
    mean = mean.new_empty(0) if rms else mean.reshape(rows)
    return out.to(dtype), total, mean, rstd.reshape(rows)


def add_norm_backward(
    grad_out, grad_sum, total, mean, rstd, weight, key, p, scale, mask_strides, mask_offset,
    norm_dims, rms, wanted,
):  # fmt: skip
    """Gradients of sum, input, weight and bias; without elements where not wanted."""
    x = total.to(rstd.dtype)
    if not rms:
        x = x - _per_row(mean, x)
    x = x * _per_row(rstd, x)
    grad = grad_out.to(x.dtype)
    g = grad if weight is None else grad * weight
    columns = tuple(range(-norm_dims, 0))
    rows = tuple(range(total.dim() - norm_dims))
    to_sum = g - x * (g * x).mean(columns, keepdim=True)
    if not rms:
        to_sum = to_sum - g.mean(columns, keepdim=True)
    to_sum = to_sum * _per_row(rstd, x)
    if grad_sum is not None:
        to_sum = to_sum + grad_sum
    to_input = to_sum
    if key is not None:
        to_input = apply(to_sum, key, p, scale, mask_strides, mask_offset)
    results = (
        to_sum.to(total.dtype),
        to_input.to(grad_out.dtype),
        (grad * x).sum(rows) if rows else grad * x,
        grad.sum(rows) if rows else grad.clone(),
    )
    return tuple(
        result if want else result.new_empty(0)
        for result, want in zip(results, wanted, strict=True)
    )


# Activations: csrc/epilogue/activation.h, operation by operation.


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


def _one_plus_exp2(u: Tensor) -> Tensor:
    bounded = torch.where(u < -126, _scalar(-126, u), torch.where(u > 128, _scalar(128, u), u))
    return 1 + _exp2(bounded)


def _magnitude(x: Tensor) -> Tensor:
    return torch.where(x.abs() > 9, _scalar(9, x), x.abs())


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
    return x / _one_plus_exp2(_sigmoid_exponent(x, function))


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
    sigmoid = 1 / _one_plus_exp2(_sigmoid_exponent(x, function))
    slope = torch.ones_like(x)
    if function == 1:
        one = _hex("0x1.988454p+0", x).expand_as(x)
        slope = fma(t * t, _hex("0x1.b6676cp-3", x), one)
    return grad * fma(x * sigmoid * (1 - sigmoid), slope, sigmoid)


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
    return apply(y, key, p, scale, mask_strides, mask_offset).to(input.dtype)


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
    return apply(y, key, p, scale, mask_strides, mask_offset).to(input.dtype)


def fold_in(key: Tensor, n: int | Tensor) -> Tensor:
    """The key for step, rank or slice n: like `key`, or (*n.shape, 2) for a tensor n."""
    seed, offset = _seed_offset(key)
    counter = offset + (n if isinstance(n, Tensor) else _wrap(n))
    zero = torch.zeros_like(counter)
    w0, w1, w2, w3 = philox4x32_10(
        (_lo32(counter), _hi32(counter), zero, zero), (_lo32(seed), _hi32(seed))
    )
    return torch.stack((w0 | w1 << 32, w2 | w3 << 32), -1).view(key.dtype)


def split(key: Tensor, n: int) -> Tensor:
    """n keys, fold_in(key, 0) to fold_in(key, n - 1): (n, 2)."""
    return fold_in(key, torch.arange(n, device=key.device))
