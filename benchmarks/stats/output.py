"""What dropout does to values: mean, variance, sums at 16 bits, and the gradient's mask.

Given x, an element is r = x / (1 - p), rounded once, with probability q = 1 - p and 0 otherwise:

    E[sum y] = q sum r,  Var = p q sum r^2;     E[sum y^2] = q sum r^2,  Var = p q sum r^4
"""

import math

import torch

from benchmarks.stats import result
from benchmarks.stats.subjects import CHUNK, make

PROBABILITIES = (0.1, 0.5, 0.9)
SUMS = (1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


def _real(x):
    return torch.view_as_real(x.resolve_conj())[..., 0] if x.is_complex() else x


def _kept(x, p):
    """x / (1 - p) as float64, rounded once to the dtype of x."""
    x = _real(x)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(compute) * torch.tensor(1 / (1 - p), dtype=compute)).to(x.dtype).double()


def moments(subject, size):
    generator = torch.Generator().manual_seed(5)
    for d, dtype in enumerate(subject.dtypes):
        z = {"mean": [], "mean square": []}
        unit = dict.fromkeys(z, 0.0)
        labels, differences, compared = [], 0, 0
        for at, layout in enumerate(subject.layouts):
            x = make(layout, size.output, dtype, generator=generator)
            for i, p in enumerate(PROBABILITIES):
                y, r = _real(subject.apply(x, p, (50 + d, 10 * at + i))).double(), _kept(x, p)
                for name, power in (("mean", 1), ("mean square", 2)):
                    expected = (1 - p) * r.pow(power).sum().item()
                    deviation = math.sqrt(p * (1 - p) * r.pow(2 * power).sum().item())
                    z[name].append((y.pow(power).sum().item() - expected) / deviation)
                    unit[name] = max(unit[name], deviation / expected)
                labels.append(f"{layout}, p = {p:g}")
            leaf = x.detach().requires_grad_()
            y = subject.apply(leaf, 0.5, (50 + d, 10 * at))
            y.backward(torch.ones_like(y))
            differences += int(((leaf.grad != 0) != (y != 0)).sum())
            compared += y.numel()
        name = str(dtype)[6:]
        for moment, values in z.items():
            yield result.normal(
                "output", f"{moment}, {name}", None, size.output * len(values), values,
                unit[moment], f"{moment}, relative", labels=labels,
            )  # fmt: skip
        yield result.exact(
            "output", f"gradient mask against forward mask, {name}", 0.5, compared, differences
        )


def sums(subject, size):
    """Σ y against its expectation, and the mean shift that one rounding to 16 bits brings."""
    # In float64 a million values of 16 bits add up without a visible error; fsum adds the parts.
    generator, part = torch.Generator().manual_seed(6), min(size.sum, CHUNK)
    for d, dtype in enumerate((torch.float16, torch.bfloat16)):
        x = make("contiguous", part, dtype, generator=generator)
        # Positive, so that a shift of the scale is a shift of the sum.
        x, unit_roundoff = x.abs(), torch.finfo(dtype).eps / 2
        for i, p in enumerate(SUMS):
            totals = []
            for at in range(0, size.sum, part):
                y = subject.apply(x, p, (60 + d, i), at)
                totals.append(y.double().sum().item())
            r, parts = _kept(x, p), len(totals)
            expected = (1 - p) * r.sum().item() * parts
            deviation = math.sqrt(p * (1 - p) * r.square().sum().item() * parts)
            yield result.normal(
                "output", f"sum of the output, {str(dtype)[6:]}", p, size.sum,
                (math.fsum(totals) - expected) / deviation, deviation / expected, "sum, relative",
            )  # fmt: skip
            kept = y != 0
            shift = (1 - p) * y[kept].double().sum() / x[kept].double().sum() - 1
            yield result.Result(
                "output", f"shift by rounding, {str(dtype)[6:]}", p, int(kept.sum()),
                "q Σy / Σx - 1 over the kept", shift.item(), f"at most {unit_roundoff:.3g}, one "
                "rounding", holds=abs(shift.item()) <= unit_roundoff, measure="scale",
                deviation=lambda _, u=unit_roundoff: u,
            )  # fmt: skip


def all_outputs(subject, size):
    yield from moments(subject, size)
    yield from sums(subject, size)
