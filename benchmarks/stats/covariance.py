"""Lanes l and l + 4 share a word w = (h, l), read as h 2^16 + l and as l 2^16 + h.

With T = a 2^16 + b, both are below T for a^2 + 2 min(a, b) + [b > a] of the 2^32 words, hence

    Cov = (a^2 + 2 min(a, b) + [b > a]) / 2^32 - (T / 2^32)^2

which is at most 2^-17. Shown here by enumeration, over every T, and by counting pairs.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import dropout_ext
from benchmarks.stats import result

WORST = 0x80008000
BOUND = 2.0**-17


def both_below(t: int, half: int = 16) -> int:
    """How many of the words of 2 * half bits are below t, read either way."""
    a, b = divmod(t, 1 << half)
    return a * a + 2 * min(a, b) + (b > a)


def enumerated(t: int, half: int = 16) -> int:
    """The same by going over all upper halves and counting the lower ones."""
    side = 1 << half
    upper = np.arange(side, dtype=np.int64)
    # lower < t - upper * side, and lower * side + upper < t
    below = np.clip(t - upper * side, 0, side)
    rotated = np.clip(-((upper - t) // side), 0, side)  # ceil((t - upper) / side)
    return int(np.minimum(below, rotated).sum())


def covariance(t: int) -> float:
    return both_below(t) / 2**32 - (t / 2**32) ** 2


def largest(step: int):
    """(covariance, T) where it is largest over all lower halves and every step-th upper half."""
    b = np.arange(2**16, dtype=np.uint64)
    best = (-1, 0)
    lowest = 0
    for a in range(0, 2**16, step):
        t = np.uint64(a << 16) + b
        n = np.uint64(a * a) + 2 * np.minimum(np.uint64(a), b) + (b > a)
        scaled = ((n << np.uint64(32)) - t * t).view(np.int64)  # exact: Cov 2^64
        at = int(scaled.argmax())
        best = max(best, (int(scaled[at]), int(t[at])))
        lowest = min(lowest, int(scaled.min()))
    return best[0] / 2**64, best[1], lowest / 2**64


def _pairs(key, p, first, n):
    """(dropped, dropped in both) over the pairs of n elements, by the product's kernel."""
    kept = dropout_ext.keep_mask((n,), p, key, mask_strides=(1,), mask_offset=first)
    blocks = kept.numpy().view(np.uint64)  # a byte per lane, lane 0 the lowest
    both_kept = (blocks >> np.uint64(32)) & blocks
    both_kept &= np.uint64(0x01010101)
    kept_count = int(np.bitwise_count(blocks).sum(dtype=np.int64))
    both_kept_count = int(np.bitwise_count(both_kept).sum(dtype=np.int64))
    return n - kept_count, n // 2 - kept_count + both_kept_count


def count(p, pairs, seed):
    """Over `pairs` pairs of lanes: how many drop in all, and in both."""
    key, part, n = dropout_ext.key(seed, 9), 2**19, 2 * pairs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:

            def run(begin):
                totals = np.zeros(2, np.int64)
                for first in range(begin, min(begin + 64 * part, n), part):
                    totals += _pairs(key, p, first, part)
                return totals

            return sum(pool.map(run, range(0, n, 64 * part))).tolist()
    finally:
        torch.set_num_threads(threads)


def all_covariances(subject, size):
    section = "covariance"
    byte = [both_below(t, 4) - enumerated(t, 4) for t in range(257)]
    ts = [0, 1, 429, 2**16, 429496730, 2**31, WORST, WORST + 1, 3865470566, 2**32 - 1, 2**32]
    word = [both_below(t) - enumerated(t) for t in ts]
    yield result.exact(
        section, "formula against enumeration", None, len(byte) + len(word),
        sum(map(bool, byte + word)),
    )  # fmt: skip
    step = size.covariance_step
    value, at, lowest = largest(step)
    yield result.Result(
        section, "largest over all T" if step == 1 else f"largest over every {step}th T", None,
        2**32 // step, "Cov", value, f"at most 2^-17 = {BOUND:.6g}, at T = 0x80008000",
        holds=value <= BOUND and at == WORST and lowest >= 0, where=f"T = {at:#x}",
        deviation=lambda _: 2.0**-64, measure="covariance",
    )  # fmt: skip
    for i, t in enumerate((WORST, 2**31, 429496730)):
        pairs = size.covariance_pairs if t == WORST else min(size.covariance_pairs, 2**33)
        p = t / 2**32
        dropped, both = count(p, pairs, seed=80 + i)
        # The mean of (a - p)(b - p): its expectation is Cov, its variance hardly more than (p q)^2.
        mean = (both - p * dropped) / pairs + p * p
        unit = p * (1 - p) / pairs**0.5
        documented = covariance(t)
        yield result.normal(
            section, f"T = {t:#x} against the formula, {documented:.3g}", p, pairs,
            (mean - documented) / unit, unit, "covariance", where=f"Cov {mean:.3g}",
        )  # fmt: skip
        yield result.normal(
            section, f"T = {t:#x} against independence", p, pairs, mean / unit, unit, "covariance",
            where=f"Cov {mean:.3g}", asserted=False,
        )  # fmt: skip
