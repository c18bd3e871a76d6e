"""Masks as packed bits, 1 where dropped, element 0 in the lowest bit of the first byte.

A count over pairs of elements is then a shift, an AND and a population count on 64-bit words.
"""

import numpy as np

CHUNK = 2**15  # words at a time, so that the intermediate results stay in cache
LANES = (np.arange(256)[:, None] >> np.arange(8)) & 1  # (256, 8): the bits of every byte


def pack(dropped) -> np.ndarray:
    """Of a bool array or CPU tensor; its size a multiple of 64."""
    return np.packbits(np.asarray(dropped).reshape(-1), bitorder="little")


def unpack(bits, n: int) -> np.ndarray:
    return np.unpackbits(bits[: n // 8], bitorder="little")


def patterns(bits) -> np.ndarray:
    """How often each of the 256 patterns of a block of eight elements occurs."""
    return sum(
        np.bincount(bits[at : at + 2**22], minlength=256) for at in range(0, len(bits), 2**22)
    )


def joint(a, b, shift: int):
    """(pairs, drops in a, drops in b, both) over pairs of element i of a and i + shift of b."""
    if shift < 0:
        pairs, in_b, in_a, both = joint(b, a, -shift)
        return pairs, in_a, in_b, both
    a, b = a.view(np.uint64), b.view(np.uint64)
    word, bit = divmod(shift, 64)
    n = len(b) - word - (bit > 0)
    totals = np.zeros(3, np.int64)
    for at in range(0, n, CHUNK):
        end = min(at + CHUNK, n)
        first, second = a[at:end], b[at + word : end + word]
        if bit:
            second = second >> np.uint64(bit)
            second |= b[at + word + 1 : end + word + 1] << np.uint64(64 - bit)
        for i, bits in enumerate((first, second, first & second)):
            totals[i] += np.bitwise_count(bits).sum(dtype=np.int64)
    return 64 * n, *totals.tolist()


def correlation_z(pairs, in_a, in_b, both, p) -> float:
    """Of the mean of (a - p)(b - p), which has mean 0 and variance (p q)^2 / pairs."""
    return (both - p * (in_a + in_b) + pairs * p * p) / (p * (1 - p) * pairs**0.5)


def lagged(bits, lags, p):
    """z of the correlation of elements i and i + lag of one mask, for each lag."""
    return [correlation_z(*joint(bits, bits, lag), p) for lag in lags]


def crossed(pairs_of_masks, shifts, p):
    """z of the correlation of element i and i + shift of two masks, over all pairs of masks."""
    totals = np.zeros((len(shifts), 4))
    for a, b in pairs_of_masks:
        totals += [joint(a, b, shift) for shift in shifts]
    return [correlation_z(*row, p) for row in totals.tolist()]
