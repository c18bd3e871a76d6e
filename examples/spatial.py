"""Element-wise against spatial dropout in a convolutional network.

Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional
networks", CVPR 2015: neighbours in a feature map are alike, so dropping single elements hides
little.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import dropout_ext
from examples.common import band, digits, evaluate, fit, report, save, verdict

SEEDS, EPOCHS, EVERY, EARLY, P = 6, 80, 5, 30, 0.3
KINDS = {
    "none": nn.Identity,
    "element-wise": lambda: dropout_ext.Dropout(P),
    "spatial": lambda: dropout_ext.Dropout2d(P),
}


def network(drop):
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        drop(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        drop(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def run(kind, seed):
    """Every EVERY epochs: loss and accuracy on the test data."""
    train, test = digits(train=200, seed=seed)
    torch.manual_seed(seed)
    model = network(KINDS[kind])
    return fit(model, train, EPOCHS, lambda: evaluate(model, test), EVERY)


def main():
    curves = {kind: np.array([run(kind, seed) for seed in range(SEEDS)]) for kind in KINDS}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for kind, curve in curves.items():
        report(f"{kind}: test loss", curve[:, -1, 0])
        report(f"{kind}: test accuracy", curve[:, -1, 1], " %")
        for m, side in enumerate(axes):
            band(side, curve[:, :, m], kind, np.arange(EVERY, EPOCHS + 1, EVERY))
    axes[0].set(xlabel="epoch", ylabel="test loss", yscale="log", title=f"p = {P}, 200 digits")
    axes[1].set(xlabel="epoch", ylabel="test accuracy, %", ylim=(80, 96))
    axes[0].legend(fontsize=8)
    save(figure, "spatial")
    for epoch in (min(EARLY, EPOCHS), EPOCHS):
        loss = {kind: curve[:, epoch // EVERY - 1, 0] for kind, curve in curves.items()}
        when = f"(test loss, epoch {epoch})"
        verdict(f"element-wise beats none {when}", loss["none"] - loss["element-wise"])
        verdict(f"spatial beats none {when}", loss["none"] - loss["spatial"])
        verdict(f"spatial beats element-wise {when}", loss["element-wise"] - loss["spatial"])
