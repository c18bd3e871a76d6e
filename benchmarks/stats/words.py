"""The words below the masks: SciPy's tests here, dieharder's in dieharder.py.

Lanes 4 to 7 of a block reuse the words of lanes 0 to 3 with their halves exchanged, so that the
32-bit words in element order are no random stream by construction. Their upper halves are: they are
all bits that Philox made, each once. A keep decision reads the lower half only where the upper one
equals that of the threshold.
"""

import math

import numpy as np
from scipy import stats

from benchmarks.stats import result
from benchmarks.stats.subjects import Product


def words(subject, size):
    n = size.words
    halves = subject.upper_halves((70, 1), n)
    ones = np.zeros(128, np.int64)
    for rows in np.array_split(halves.reshape(-1, 8), max(1, n // 2**20)):
        ones += np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little").sum(0, dtype=np.int64)
    z = (ones - n / 16) / math.sqrt(n / 32)
    labels = [f"lane {lane}, bit {16 + bit}" for lane in range(8) for bit in range(16)]
    unit = 0.5 / math.sqrt(n / 8)
    yield result.normal(
        "words", "each bit of each lane", None, 16 * n, z, unit, "probability of a one",
        labels=labels,
    )  # fmt: skip
    even = np.full(2**16, 2.0**-16)
    seen = np.bincount(halves, minlength=2**16)
    yield result.cells("words", "upper halves", None, seen, even)
    tops = (halves >> 10).astype(np.int64)
    even = np.full(2**12, 2.0**-12)
    for step, name in ((1, "neighbours"), (4, "words and their rotation"), (8, "blocks")):
        first, second = tops.reshape(-1, 2, step).swapaxes(0, 1)
        seen = np.bincount((first << 6 | second).reshape(-1), minlength=2**12)
        yield result.cells("words", f"pairs of six bits, {name}", None, seen, even)
    drawn = subject.words((71, 1), min(n, 2**22)).reshape(-1, 8)[:, :4].reshape(-1)
    outcome = stats.kstest((drawn + 0.5) / 2**32, "uniform")

    def deviation(significance):
        # Where the asymptotic tail 2 exp(-2 n d^2) falls to the significance, and its power's half.
        return math.sqrt(math.log(2 / significance) / 2 / len(drawn)) + stats.norm.ppf(
            result.POWER
        ) / (2 * math.sqrt(len(drawn)))

    yield result.Result(
        "words", "uniform", None, len(drawn), "Kolmogorov-Smirnov D", float(outcome.statistic),
        "Kolmogorov", float(outcome.pvalue), deviation=deviation, measure="distribution function",
    )  # fmt: skip


def agreement(contract, size):
    """That the words looked at here decide the product's masks."""
    product, n, differences, compared = Product(), min(size.words, 2**20), 0, 0
    for i, p in enumerate((1e-3, 0.1, 0.5, 0.9, 1 - 1e-3)):
        key = (0xDEADBEEFCAFEF00D + i, 2**40 + i)
        differences += int(
            np.bitwise_count(product.bits(key, p, n) ^ contract.bits(key, p, n)).sum()
        )
        compared += n
    yield result.exact("words", "masks of the kernel against words", None, compared, differences)
