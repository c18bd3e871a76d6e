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
    seed, offset = key.view(torch.int64).unbind(-1)
    return seed, offset


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


def keep_bits(
    key: Tensor,
    p: float,
    size: Sequence[int],
    mask_strides: Sequence[int] = (),
    mask_offset: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The keep mask as uint8: a byte per element, of shape `size`, on the CPU; a bit elsewhere,
    element i of the row-major order in bit i % 8 of byte i // 8, and zeros after the last.
    """
    mask = keep_mask(key, p, size, mask_strides, mask_offset, device=device).to(torch.uint8)
    if mask.device.type == "cpu":
        return mask
    return pack(mask)


def pack(mask: Tensor) -> Tensor:
    """Zeros and ones, uint8 of any shape, eight to a byte."""
    blocks = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    lanes = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (blocks << lanes).sum(1, dtype=torch.uint8)


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
