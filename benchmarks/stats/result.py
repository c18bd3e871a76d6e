"""One test's outcome, and the SciPy distributions that outcomes are held against.

Every p-value is two-sided. A test that looks at m statistics and keeps the worst has the p-value of
the worst of m independent ones, 1 - (1 - p)^m (Sidak).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 1e-6  # the chance that a perfect generator fails the whole battery, at most
POWER = 0.9  # the chance that the smallest deviation in a row would have been seen


@dataclass
class Result:
    section: str
    test: str
    p: float | None  # drop probability
    samples: int
    statistic: str
    value: float
    expected: str
    p_value: float | None = (
        None  # None: the row is exact, and `holds` says whether it is as expected
    )
    holds: bool = True
    deviation: Callable[[float], float] | None = None  # smallest one seen at a significance
    measure: str = ""  # what the deviation is of
    where: str = ""  # the worst of several
    asserted: bool = True
    subject: str = ""

    def seen(self, significance: float) -> bool:
        return not self.holds if self.p_value is None else not self.p_value >= significance

    def smallest(self, significance: float) -> float | None:
        return None if self.deviation is None else self.deviation(significance)


def of_worst(p_value: float, looks: int) -> float:
    """The p-value of the smallest of `looks` independent p-values."""
    return float(-np.expm1(looks * np.log1p(-p_value))) if p_value < 1 else 1.0


def per_look(significance: float, looks: int) -> float:
    """The significance of each look that gives all of them together this one."""
    return float(-np.expm1(np.log1p(-significance) / looks))


def binomial(section, test, p, counts, **other) -> Result:
    """Exact: each of counts, {label: (drops, draws)}, is Binomial(draws, p); the worst counts."""
    p_values = {
        label: stats.binomtest(int(k), int(n), p).pvalue for label, (k, n) in counts.items()
    }
    worst = min(p_values, key=p_values.get)
    drops, draws = counts[worst]
    looks, fewest = len(counts), min(n for _, n in counts.values())

    def deviation(significance):
        rare = min(p, 1 - p)
        limit = stats.binom.isf(per_look(significance, looks) / 2, fewest, rare)
        return stats.beta.ppf(POWER, limit + 1, fewest - limit) - rare

    return Result(
        section,
        test,
        p,
        sum(int(n) for _, n in counts.values()),
        "drops of draws, worst" if looks > 1 else "drops",
        int(drops),
        f"Binomial({draws}, {p:.10g})" + (f", worst of {looks}" if looks > 1 else ""),
        of_worst(p_values[worst], looks),
        deviation=deviation,
        measure="drop rate",
        where=str(worst) if looks > 1 else "",
        **other,
    )


def normal(section, test, p, samples, z, unit, measure, labels=None, where="", **other) -> Result:
    """Each of z is standard normal; the one farthest out counts. unit: its standard deviation."""
    z = np.atleast_1d(np.asarray(z, float))
    at = int(np.argmax(np.where(np.isnan(z), np.inf, np.abs(z))))

    def deviation(significance):
        return (stats.norm.isf(per_look(significance, len(z)) / 2) + stats.norm.ppf(POWER)) * unit

    return Result(
        section,
        test,
        p,
        int(samples),
        "z, farthest" if len(z) > 1 else "z",
        float(z[at]),
        "N(0, 1)" + (f", farthest of {len(z)}" if len(z) > 1 else ""),
        of_worst(float(2 * stats.norm.sf(abs(z[at]))), len(z)) if not math.isnan(z[at]) else 0.0,
        deviation=deviation,
        measure=measure,
        where=str(labels[at]) if labels is not None and len(z) > 1 else where,
        **other,
    )


def _chi2_noncentrality(dof, significance):
    """The noncentrality that is seen with the given power. Two-sided tests look at either tail."""
    limit = stats.chi2.isf(significance / 2, dof)
    low, high = 0.0, 10.0
    while stats.ncx2.sf(limit, dof, high) < POWER:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if stats.ncx2.sf(limit, dof, middle) < POWER else (low, middle)
    return high


def chi_square(section, test, p, samples, statistic, dof, measure, **other) -> Result:
    """statistic is chi-square distributed; too small is as suspect as too large."""
    tail = min(stats.chi2.sf(statistic, dof), stats.chi2.cdf(statistic, dof))

    def deviation(significance):
        return math.sqrt(_chi2_noncentrality(dof, significance) / samples)

    return Result(
        section,
        test,
        p,
        int(samples),
        "chi-square",
        float(statistic),
        f"chi2({dof})",
        float(min(1.0, 2 * tail)),
        deviation=deviation,
        measure=measure,
        **other,
    )


def cells(section, test, p, observed, probability, **other) -> Result:
    """Observed counts against cell probabilities; cells expected below 10 are pooled."""
    observed, probability = np.asarray(observed, float), np.asarray(probability, float)
    samples = observed.sum()
    expected = probability / probability.sum() * samples
    small = expected < 10
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
        if (
            expected[-1] < 10 and len(expected) > 1
        ):  # still too few: into the smallest of the others
            at = int(np.argmin(expected[:-1]))
            observed[at] += observed[-1]
            expected[at] += expected[-1]
            observed, expected = observed[:-1], expected[:-1]
    if len(observed) < 2:
        raise ValueError(f"{test}: {samples:g} samples leave no two cells")
    outcome = stats.chisquare(observed, expected, sum_check=False)
    return chi_square(
        section,
        test,
        p,
        samples,
        outcome.statistic,
        len(observed) - 1,
        "cell probabilities, relative, root mean square",
        **other,
    )


def exact(section, test, p, samples, mismatches, **other) -> Result:
    """Nothing random: how many of the samples differ."""
    return Result(
        section,
        test,
        p,
        int(samples),
        "differences",
        int(mismatches),
        "0",
        holds=mismatches == 0,
        deviation=lambda _: 1,
        measure="elements",
        **other,
    )
