"""Statistics of masks at fixed keys, of 2^20 elements unless said. A deviation of 4.5 standard
errors fails, which a fair mask exceeds with probability 7e-6 per comparison."""

import math

import pytest
import torch
from helpers import make_key, random_tensor

import dropout_ext

LIMIT = 4.5
SAMPLES = 2**20
KEYS = [make_key(0, 0), make_key(42, 7), make_key(2**64 - 1, 2**63)]


def mask(key, p, n=SAMPLES):
    return dropout_ext.keep_mask((n,), p, key)


def deviation(successes, trials, probability):
    """In standard errors of the binomial distribution."""
    variance = trials * probability * (1 - probability)
    return abs(successes - trials * probability) / math.sqrt(variance)


def agreement(a, b, p):
    """Of two masks: how far the share of equal decisions is from that of independent ones."""
    return deviation((a == b).sum().item(), a.numel(), p * p + (1 - p) * (1 - p))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("p", [1e-4, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_drop_rate(key, p):
    dropped = ~mask(key, p)
    assert deviation(dropped.sum().item(), SAMPLES, p) < LIMIT
    for lane in range(8):
        assert deviation(dropped[lane::8].sum().item(), SAMPLES // 8, p) < LIMIT


@pytest.mark.parametrize("p", [2**-20, 2**-24])
def test_small_probabilities_drop(p):
    """Resolution is 2^-32: TransformerEngine's 8 bits would never drop at these. 2^28 elements."""
    dropped = sum((~mask(make_key(s), p, 2**26)).sum().item() for s in range(4))
    assert deviation(dropped, 2**28, p) < LIMIT
    assert dropped > 0


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(key, p):
    keep = mask(key, p)
    for lag in (*range(1, 17), 64, 128, 1024):
        assert agreement(keep[:-lag], keep[lag:], p) < LIMIT


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_lanes_are_independent(key, p):
    lanes = mask(key, p).view(-1, 8)
    for a in range(8):
        for b in range(a):
            assert agreement(lanes[:, a], lanes[:, b], p) < LIMIT


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_related_keys_are_independent(p):
    keys = [make_key(s, o) for s in (0, 1, 2, 2**32, 2**63) for o in (0, 1, 2**32)]
    keys += list(dropout_ext.split(make_key(5), 5))
    masks = [mask(key, p) for key in keys]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert agreement(a, b, p) < LIMIT


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_consecutive_calls_are_independent(p):
    """Halves of vectors too: the second of a call against the first of the next."""
    torch.manual_seed(0)
    ones = torch.ones(SAMPLES, dtype=torch.bfloat16)
    a, b = ((dropout_ext.dropout(ones, p) != 0).view(-1, 8) for _ in range(2))
    assert agreement(a, b, p) < LIMIT
    assert agreement(a[:, 4:], b[:, :4], p) < LIMIT
    assert agreement(a[:, :4], b[:, 4:], p) < LIMIT


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_variance(p):
    """E y = x and Var y = p / (1 - p) for x = 1."""
    y = dropout_ext.dropout(torch.ones(SAMPLES, dtype=torch.float64), p, key=make_key(3))
    variance = p / (1 - p)
    assert abs(y.mean().item() - 1) < LIMIT * math.sqrt(variance / SAMPLES)
    kept = 1 / (1 - p)
    fourth = (1 - p) * (kept - 1) ** 4 + p
    spread = math.sqrt((fourth - variance**2) / SAMPLES)
    assert abs(y.var().item() - variance) < LIMIT * spread + 1e-5


def test_mask_does_not_depend_on_the_input():
    key = make_key(11)
    for seed in range(3):
        x = random_tensor((1000,), seed=seed)
        assert torch.equal(dropout_ext.dropout(x, 0.5, key=key) != 0, mask(key, 0.5, 1000))
