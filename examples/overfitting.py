"""Dropout against overfitting: a large network on 300 digits, with p = 0 and p = 0.5.

Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural
networks from overfitting", JMLR 15, 2014.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from examples.common import band, digits, evaluate, fit, mlp, report, save, verdict

SEEDS, EPOCHS = 8, 100


def run(p, seed):
    """Per epoch: loss and accuracy on the training data, then on the test data."""
    train, test = digits(seed=seed)
    torch.manual_seed(seed)
    model = mlp(p)
    return fit(model, train, EPOCHS, lambda: evaluate(model, train) + evaluate(model, test))


def main():
    curves = {p: np.array([run(p, seed) for seed in range(SEEDS)]) for p in (0.0, 0.5)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for color, (p, curve) in zip(("C0", "C1"), curves.items(), strict=True):
        band(left, curve[:, :, 0], f"training, p = {p}", color=color, ls="--")
        band(left, curve[:, :, 2], f"test, p = {p}", color=color)
        band(right, curve[:, :, 3], f"test, p = {p}", color=color)
        report(f"p = {p}: test accuracy", curve[:, -1, 3], " %")
        report(f"p = {p}: test loss", curve[:, -1, 2])
        report(f"p = {p}: gap, test loss minus training loss", curve[:, -1, 2] - curve[:, -1, 0])
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="loss")
    right.set(xlabel="epoch", ylabel="accuracy, %", ylim=(85, 98), title="accuracy")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    save(figure, "overfitting")
    without, with_ = curves[0.0][:, -1], curves[0.5][:, -1]
    verdict("dropout lowers the test loss", without[:, 2] - with_[:, 2])
    verdict("dropout raises the test accuracy", with_[:, 3] - without[:, 3])
    gap = (without[:, 2] - without[:, 0]) - (with_[:, 2] - with_[:, 0])
    verdict("dropout narrows the gap", gap)
