"""Drop rates, and independence within one mask."""

import numpy as np

from benchmarks.stats import bits, result
from benchmarks.stats.subjects import CHUNK, drops, make

RATES = (1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-5, 1 - 1e-7)
# Where a count over pairs is close enough to normal at a significance of 1e-9.
MIDDLE = (0.1, 0.5, 0.9)


def rates(subject, size):
    """Exact binomials against p itself, not against its nearest multiple of 2^-32."""
    for i, p in enumerate(RATES):
        seen = bits.patterns(subject.bits((i, 1), p, size.rate))
        lanes = seen @ bits.LANES
        each = size.rate // 8
        yield result.binomial("drop rate", "drop rate", p, {"all": (lanes.sum(), size.rate)})
        of_lane = {f"lane {lane}": (count, each) for lane, count in enumerate(lanes)}
        yield result.binomial("drop rate", "drop rate by lane", p, of_lane)
        if not subject.family:
            continue
        yield result.binomial(
            "drop rate", "drop rate by dtype", p, _by_dtype(subject, 1000 * (i + 1), p, size.dtype)
        )
        yield result.binomial(
            "drop rate", "drop rate by path", p, _by_path(subject, 1000 * (i + 1) + 500, p, size)
        )


def _by_dtype(subject, seed, p, n):
    counts, part = {}, min(n, CHUNK)
    for d, dtype in enumerate(subject.dtypes):
        x = make("contiguous", part, dtype, value=1)
        count = sum(drops(subject.apply(x, p, (seed + d, 2), at)) for at in range(0, n, part))
        counts[str(dtype)[6:]] = (count, n)
    return counts


def _by_path(subject, seed, p, size):
    part = min(size.path, CHUNK)
    counts = {}
    for at, layout in enumerate(subject.layouts):
        x = make(layout, part, dtype=subject.dtypes[1], value=1)
        count = sum(
            drops(subject.apply(x, p, (seed + at, 3 + chunk))) for chunk in range(size.path // part)
        )
        counts[layout] = (count, size.path)
    for chunk in range(size.path // part):
        for name, count, decisions in subject.family(p, (seed + 100, 3 + chunk), part):
            before = counts.get(name, (0, 0))
            counts[name] = (before[0] + count, before[1] + decisions)
    return counts


def independence(subject, size):
    n = size.mask
    for i, p in enumerate(MIDDLE):
        mask = subject.bits((20 + i, 1), p, n)
        unit = 1 / n**0.5
        lags = range(1, 65)
        yield result.normal(
            "independence", "lags 1 to 64", p, n, bits.lagged(mask, lags, p), unit, "correlation",
            labels=[f"lag {lag}" for lag in lags],
        )  # fmt: skip
        lags = [2**k for k in range(7, n.bit_length() - 1)]
        yield result.normal(
            "independence", "lag 2^k", p, n, bits.lagged(mask, lags, p), (2 / n) ** 0.5,
            "correlation", labels=[f"lag 2^{lag.bit_length() - 1}" for lag in lags],
        )  # fmt: skip
        yield from _block(bits.patterns(mask), p)
        yield from _runs(bits.unpack(mask, size.runs), p)
    for rows, columns in _shapes(size.matrix):
        p = 0.5
        mask = subject.bits((30, columns), p, -(-rows * columns // 64) * 64)
        yield from _matrix(bits.unpack(mask, 8 * len(mask))[: rows * columns], rows, columns, p)


def _block(seen, p):
    """The joint distribution of the eight lanes of a block, and that of each pair."""
    blocks, dropped = seen.sum(), bits.LANES.sum(1)
    yield result.cells(
        "independence", "patterns of a block", p, seen, p**dropped * (1 - p) ** (8 - dropped)
    )
    pairs = [(a, b) for a in range(8) for b in range(a + 1, 8)]
    z = []
    for a, b in pairs:
        in_a, in_b = bits.LANES[:, a], bits.LANES[:, b]
        z.append(bits.correlation_z(blocks, seen @ in_a, seen @ in_b, seen @ (in_a & in_b), p))
    yield result.normal(
        "independence", "pairs of lanes", p, blocks, z, 1 / blocks**0.5, "correlation",
        labels=[f"lanes {a}, {b}" for a, b in pairs],
    )  # fmt: skip


def _runs(mask, p):
    """Lengths of complete runs are geometric, and independent."""
    starts = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    lengths, kind = np.diff(starts), mask[starts[:-1]]
    for value, name, stay in ((1, "dropped", p), (0, "kept", 1 - p)):
        of_kind = lengths[kind == value]
        seen = np.bincount(np.minimum(of_kind, 10000))[1:]
        length = np.arange(1, len(seen) + 1)
        probability = stay ** (length - 1.0) * (1 - stay)
        probability[-1] = stay ** (len(seen) - 1.0)  # this long or longer
        yield result.cells("independence", f"runs of {name} elements", p, seen, probability)


def _shapes(n):
    """A power of two wide, a transformer's width, a prime."""
    return [(n // width, width) for width in (4096, 768, 1021)]


def _matrix(mask, rows, columns, p):
    mask = mask.reshape(rows, columns)
    for name, sums, length in (
        ("rows", mask.sum(1, dtype=np.int64), columns),
        ("columns", mask.sum(0, dtype=np.int64), rows),
    ):
        statistic = ((sums - length * p) ** 2).sum() / (length * p * (1 - p))
        yield result.chi_square(
            "independence", f"sums of {name}, {columns} wide", p, len(sums), statistic, len(sums),
            "standard deviations, root mean square",
        )  # fmt: skip
    labels = [f"{k} on, {d:+d}" for k in (1, 2) for d in (-1, 0, 1)]
    packed = [bits.pack(m) for m in (mask[: rows // 64 * 64], mask[:, : columns // 64 * 64].T)]
    for name, m, lag in (("rows", packed[0], columns), ("columns", packed[1], rows)):
        n = 8 * len(m)
        lags = [k * lag + d for k in (1, 2) for d in (-1, 0, 1)]
        yield result.normal(
            "independence", f"neighbouring {name}, {columns} wide", p, n, bits.lagged(m, lags, p),
            1 / n**0.5, "correlation", labels=labels,
        )  # fmt: skip
