"""Output statistics of both modules: drop rate, mean and variance against their expected values.

For a given input x and independent masks, with q = 1 - p and y = mask * x / q:

    E[dropped] = p n                         Var = p q n
    E[mean y] = mean x                       Var = (p / q) sum x^2 / n^2
    E[mean y^2] = mean x^2 / q               Var = (p / q^3) sum x^4 / n^2

Each figure comes with z, its distance from the expectation in standard deviations. The variance
of y is mean y^2 - (mean y)^2; its z is that of mean y^2.
"""

import torch

SEED = 2024


def figures(x, y, p):
    n, q = x.numel(), 1 - p
    x, y = x.double(), y.double()
    rate = (y == 0).double().mean().item()
    mean, square = y.mean().item(), y.square().mean().item()
    mean_x, square_x = x.mean().item(), x.square().mean().item()
    fourth_x = x.square().square().mean().item()
    yield "drop rate", rate, p, (p * q / n) ** 0.5, rate
    yield "mean", mean, mean_x, (p / q * square_x / n) ** 0.5, mean
    deviation = (p / q**3 * fourth_x / n) ** 0.5
    expected = square_x / q - mean_x**2
    yield "variance", square - mean**2, expected, deviation, square - mean_x**2


def run(emit, quick, device):
    import dropout_ext

    n = 2**20 if quick else 2**23
    modules = {
        "nn.Dropout": ("torch", torch.nn.Dropout),
        "dropout_ext.Dropout": ("ours", dropout_ext.Dropout),
    }
    settings = [(dtype, p) for dtype in (torch.float32, torch.bfloat16) for p in (0.1, 0.5, 0.9)]
    emit({"total": len(settings) * len(modules)})
    for dtype, p in settings:
        generator = torch.Generator(device).manual_seed(SEED)
        x = (1 + torch.randn(n, generator=generator, device=device)).to(dtype)
        x = torch.where(x == 0, torch.ones((), dtype=dtype, device=device), x)
        for name, (role, module) in modules.items():
            torch.manual_seed(SEED)
            for metric, value, expected, deviation, compared in figures(x, module(p)(x), p):
                row = {
                    "section": "statistics",
                    "case": f"{metric}, {str(dtype)[6:]}, p = {p:g}",
                    "dtype": str(dtype)[6:],
                    "elements": n,
                    "p": p,
                    "side": name,
                    "role": role,
                }
                emit({"row": row | {"metric": metric, "p50": value, "expected": expected}})
                z = (compared - expected) / deviation
                emit({"row": row | {"metric": f"z of {metric}", "unit": "sigma", "p50": z}})
            emit({"step": name})
