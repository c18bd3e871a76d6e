# ruff: noqa: E402  (the imports below need packages that not every environment has)
"""The battery of benchmarks/stats: that its distributions are right, that it sees what is broken,
and that it says so. Simulated p-values come from NumPy's generator, at fixed seeds.
"""

import csv
from dataclasses import replace

import numpy as np
import pytest

for needed in ("cpuinfo", "pandas", "rich", "scipy"):
    pytest.importorskip(needed, reason="the battery needs requirements-dev.txt")

from scipy import stats

from benchmarks.stats import __main__ as battery
from benchmarks.stats import bits, covariance, dieharder, keys, masks, output, result, words
from benchmarks.stats.subjects import MUTATIONS, Contract, Product

LEVEL = 1e-9  # what the full battery asks of one p-value, about
SIZE = replace(
    battery.MUTATION, rate=2**19, mask=2**19, matrix=2**19, runs=2**19, pair=2**14, keys=2,
    flips=2**12, sum=2**16, words=2**20,
)  # fmt: skip
PARTS = {
    "2 Philox rounds": [masks.independence],
    "6 Philox rounds": [],
    "lane repeated": [masks.independence],
    "offset advances by half": [keys.between],
    "p in steps of 1/256": [masks.rates, output.sums],
    "ranks in pairs": [keys.between],
}


@pytest.mark.parametrize("name", [name for name in MUTATIONS if PARTS[name]])
def test_a_broken_generator_is_seen_by_the_tests_that_claim_it(name):
    patches, expected = MUTATIONS[name]
    subject = Contract(name, patches)
    seen = {r.test for part in PARTS[name] for r in part(subject, SIZE) if r.seen(LEVEL)}
    missing = [test for test in expected if not any(found.startswith(test) for found in seen)]
    assert not missing, seen


def test_the_contract_itself_passes_at_the_same_sizes():
    subject = Contract()
    for part in (masks.rates, masks.independence, keys.between, output.sums, words.words):
        for r in part(subject, SIZE):
            assert not r.seen(LEVEL), r


def test_a_patch_that_does_not_apply_is_an_error():
    with pytest.raises(ValueError, match="does not contain"):
        Contract("stale", [("mask.h", "no such line", "")])


def test_the_words_looked_at_are_the_products():
    (agreement,) = words.agreement(Contract(), SIZE)
    assert agreement.value == 0
    (agreement,) = words.agreement(Contract("lane", MUTATIONS["lane repeated"][0]), SIZE)
    assert agreement.value > 0 and agreement.seen(LEVEL)


def test_product_bits_are_the_keep_mask():
    import dropout_ext

    n, key = 3 * 2**20, (7, 2**40)
    kept = dropout_ext.keep_mask((n,), 0.3, dropout_ext.key(*key)).numpy()
    assert np.array_equal(bits.unpack(Product().bits(key, 0.3, n), n) == 0, kept)


@pytest.mark.parametrize("shift", [0, 1, 7, 63, 64, 65, 1000, -1, -64, -130])
def test_joint_counts_pairs_by_shift(shift):
    generator = np.random.default_rng(1)
    a, b = generator.random((2, 2**17)) < 0.3
    pairs, in_a, in_b, both = bits.joint(bits.pack(a), bits.pack(b), shift)
    # Whole 64-bit words only: up to 64 pairs at the end are left out.
    assert 0 <= 2**17 - abs(shift) - pairs < 64
    first, second = (a, b[shift:]) if shift >= 0 else (a[-shift:], b)
    first, second = first[:pairs], second[:pairs]
    assert (in_a, in_b, both) == (first.sum(), second.sum(), (first & second).sum())


def simulate(kind, generator, shift=0.0):
    """One outcome whose deviation, in the unit of its measure, is `shift`."""
    if kind == "binomial":
        n = 20000
        counts = {lane: (generator.binomial(n, 0.3 + shift * (lane == 2)), n) for lane in range(3)}
        return result.binomial("", "", 0.3, counts)
    if kind == "normal":
        z = generator.standard_normal(16)
        z[3] += shift / 0.01
        return result.normal("", "", None, 10**4, z, 0.01, "")
    if kind == "chi-square":
        # The deviation of a sum of squares is the root mean square of the shifts.
        z = generator.standard_normal(200) + shift
        return result.chi_square("", "", None, 200, (z**2).sum(), 200, "")
    n, probability = 20000, np.full(32, 1 / 32)
    # Half of the cells too likely, half too unlikely: a root mean square of `shift`.
    shifted = probability * np.where(np.arange(32) % 2, 1 + shift, 1 - shift)
    return result.cells("", "", None, generator.multinomial(n, shifted), probability)


@pytest.mark.parametrize("kind", ["binomial", "normal", "chi-square", "cells"])
def test_p_values_are_uniform(kind):
    generator = np.random.default_rng(2)
    p_values = [simulate(kind, generator).p_value for _ in range(1000)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("kind", ["binomial", "normal", "chi-square", "cells"])
def test_the_smallest_deviation_is_seen_with_the_stated_power(kind):
    generator, level, runs = np.random.default_rng(3), 1e-4, 600
    shift = simulate(kind, generator).smallest(level)
    seen = sum(simulate(kind, generator, shift).seen(level) for _ in range(runs))
    assert stats.binomtest(seen, runs, result.POWER).pvalue > 1e-4, seen
    seen = sum(simulate(kind, generator, shift / 2).seen(level) for _ in range(runs))
    assert seen < runs * 0.5


def test_rare_drops_are_held_to_the_exact_binomial():
    r = result.binomial("", "", 1e-7, {"all": (14, 2**24)})
    assert r.p_value == stats.binomtest(14, 2**24, 1e-7).pvalue < 1e-7
    assert result.binomial("", "", 1 - 1e-7, {"all": (2**24 - 14, 2**24)}).seen(1e-7)


def test_cells_that_are_too_small_are_pooled():
    r = result.cells("", "", None, [500, 480, 12, 8, 0], [0.5, 0.48, 0.012, 0.007, 0.001])
    assert r.expected == "chi2(2)"  # 0.5, 0.48, and 0.012 with the two that 8 elements share


def test_too_few_samples_for_cells_are_an_error():
    with pytest.raises(ValueError, match="7 samples"):
        result.cells("", "a test", None, [3, 4], [0.5, 0.5])


def test_covariance_formula():
    side, half = 16, 4
    word = np.arange(side**2)
    rotated = word % side * side + word // side
    for t in range(side**2 + 1):
        both = int(((word < t) & (rotated < t)).sum())
        assert covariance.both_below(t, half) == covariance.enumerated(t, half) == both
    for t in (0, 1, 429, 429496730, covariance.WORST, 2**32):
        assert covariance.both_below(t) == covariance.enumerated(t)
    assert covariance.covariance(covariance.WORST) == 2.0**-17 - 2.0**-34
    assert covariance.covariance(2**31) == 0
    assert covariance.covariance(429496730) == pytest.approx(1.2e-6, rel=0.02)
    value, at, lowest = covariance.largest(2**10)
    assert (value, at) == (2.0**-17 - 2.0**-34, covariance.WORST) and lowest >= 0


def test_pairs_of_lanes_are_counted_right():
    pairs, p = 2**20, 0.2
    dropped = bits.unpack(Product().bits((5, 9), p, 2 * pairs), 2 * pairs).reshape(-1, 8)
    expected = int(dropped.sum()), int((dropped[:, :4] & dropped[:, 4:]).sum())
    assert tuple(covariance.count(p, pairs, seed=5)) == expected


@pytest.mark.skipif(not dieharder.available(), reason="dieharder is not installed")
def test_dieharder_tells_a_broken_stream():
    stream = "upper halves of words"
    (whole,) = dieharder.run(Contract(), stream, [(8, None)], asserted=True)
    patches, _ = MUTATIONS["2 Philox rounds"]
    (broken,) = dieharder.run(Contract("broken", patches), stream, [(8, None)], asserted=True)
    assert not whole.seen(1e-6) and broken.seen(1e-6)


def test_exit_status_and_files(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--only", "words", "--out", str(tmp_path)]
    monkeypatch.setattr(battery, "QUICK", replace(battery.QUICK, words=2**20))
    assert battery.main(arguments) == 0
    with open(tmp_path / "stats-words.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 6 and {row["verdict"] for row in rows} == {"ok"}
    for row in rows:
        assert row["samples"] and row["statistic"] and row["expected"] and row["smallest_deviation"]
    assert "Family-wise significance 1e-06" in (tmp_path / "stats-words.md").read_text()

    patches, _ = MUTATIONS["lane repeated"]
    monkeypatch.setattr("benchmarks.stats.subjects.Contract", lambda: Contract("broken", patches))
    assert battery.main(arguments) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_mutation_that_nothing_sees_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(battery, "mutations", lambda size: iter(()))
    assert battery.main(["--quick", "--only", "mutations", "--out", str(tmp_path)]) == 1
