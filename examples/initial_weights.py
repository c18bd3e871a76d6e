"""Sensitivity to initial weights: one data set, many networks, from small to large weights."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

from examples.common import digits, evaluate, fit, mlp, save, verdict

SEEDS, EPOCHS = 10, 40
SCALES = (0.3, 1.0, 3.0)


def run(p, scale, seed):
    """Test accuracy. Only the initial weights and the masks depend on the seed."""
    train, test = digits()
    torch.manual_seed(seed)
    model = mlp(p)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    fit(model, train, EPOCHS)
    return evaluate(model, test)[1]


def main():
    accuracy = {
        (p, scale): np.array([run(p, scale, seed) for seed in range(SEEDS)])
        for scale in SCALES
        for p in (0.0, 0.5)
    }
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for n, scale in enumerate(SCALES):
        for p, shift in ((0.0, -0.17), (0.5, 0.17)):
            values = accuracy[p, scale]
            axes.boxplot(
                values,
                positions=[n + shift],
                widths=0.28,
                patch_artist=True,
                medianprops={"color": "black"},
                boxprops={"facecolor": "C0" if p == 0 else "C1", "alpha": 0.6},
            )
        without, with_ = accuracy[0.0, scale], accuracy[0.5, scale]
        # The ratio of two variances of normal samples, by F; 95% on both sides.
        ratio = without.var(ddof=1) / with_.var(ddof=1)
        low, high = ratio / stats.f.ppf([0.975, 0.025], SEEDS - 1, SEEDS - 1)
        outcome = "borne out" if low > 1 else "NOT borne out"
        print(
            f"  weights x {scale}: standard deviation of the accuracy {without.std(ddof=1):.2f} "
            f"with p = 0, {with_.std(ddof=1):.2f} with p = 0.5\n"
            f"  weights x {scale}: dropout makes less sensitive: {outcome} (ratio of deviations "
            f"{ratio**0.5:.2f}, 95% interval {low**0.5:.2f} to {high**0.5:.2f}, {SEEDS} seeds)"
        )
    axes.set_xticks(range(len(SCALES)), [f"weights x {scale}" for scale in SCALES])
    axes.set(ylabel="test accuracy, %", title="over initial weights; blue: p = 0, orange: p = 0.5")
    save(figure, "initial_weights")
    large = SCALES[-1]
    verdict(
        f"dropout costs less between weights x 1 and x {large}",
        (accuracy[0.0, 1.0] - accuracy[0.0, large]) - (accuracy[0.5, 1.0] - accuracy[0.5, large]),
    )
