"""Dropout and the speed of convergence: epochs until a training loss and a test accuracy."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from examples.common import band, digits, evaluate, fit, mlp, report, save, verdict

SEEDS, EPOCHS = 8, 60
LOSS, ACCURACY = 0.1, 92.0
CHANCES = (0.0, 0.2, 0.5)


def run(p, seed):
    """Per epoch: loss on the training data and accuracy on the test data."""
    train, test = digits(seed=seed)
    torch.manual_seed(seed)
    model = mlp(p)

    def watch():
        return evaluate(model, train)[0], evaluate(model, test)[1]

    return fit(model, train, EPOCHS, watch)


def first(reached):
    """The first epoch of each run at which it is so; one past the last if never."""
    return np.where(reached.any(1), reached.argmax(1) + 1, EPOCHS + 1)


def main():
    curves = {p: np.array([run(p, seed) for seed in range(SEEDS)]) for p in CHANCES}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    epochs = {}
    for p, curve in curves.items():
        for n, side in enumerate(axes):
            band(side, curve[:, :, n], f"p = {p}")
        epochs[p] = first(curve[:, :, 0] < LOSS), first(curve[:, :, 1] >= ACCURACY)
        report(f"p = {p}: epochs to training loss {LOSS}", epochs[p][0])
        report(f"p = {p}: epochs to test accuracy {ACCURACY:.0f} %", epochs[p][1])
    axes[0].axhline(LOSS, color="grey", lw=0.8, ls=":")
    axes[1].axhline(ACCURACY, color="grey", lw=0.8, ls=":")
    axes[0].set(xlabel="epoch", ylabel="cross-entropy, dropout off", yscale="log", title="training")
    axes[1].set(xlabel="epoch", ylabel="accuracy, %", ylim=(70, 98), title="test")
    for side in axes:
        side.legend(fontsize=8)
    save(figure, "convergence")
    verdict("p = 0.5 fits the training data slower", epochs[0.5][0] - epochs[0.0][0])
    verdict(
        f"p = 0.5 reaches {ACCURACY:.0f} % on test data sooner", epochs[0.0][1] - epochs[0.5][1]
    )
