"""The implicit ensemble: the mean of Monte Carlo dropout against the network without dropout.

Gal, Ghahramani, "Dropout as a Bayesian approximation", ICML 2016. Calibration is the expected
calibration error of Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML
2017, with 10 bins.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import dropout_ext
from dropout_ext import predict
from examples.common import digits, fit, interval, mlp, report, save, verdict

SEEDS, EPOCHS, SAMPLES, BINS = 8, 60, 100, 10
NOISE = 0.35  # on the test images: clean ones leave too few errors to compare
MEASURES = ("accuracy, %", "negative log-likelihood", "calibration error, %")


def measures(probability, labels):
    """The three measures, and the accuracy within each bin of confidence."""
    confidence, guess = probability.max(1)
    right = (guess == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    error, within = 0.0, np.full(BINS, np.nan)
    for b in range(BINS):
        inside = bins == b
        if inside.any():
            within[b] = right[inside].mean()
            gap = (right[inside].mean() - confidence[inside].mean()).abs()
            error += (inside.float().mean() * gap).item()
    loss = F.nll_loss(probability.clamp_min(1e-12).log(), labels).item()
    return (right.mean().item() * 100, loss, error * 100), within


def mean_of_seen(values):
    """The mean over seeds of the bins that had any image, NaN where none had."""
    seen = ~np.isnan(values)
    count = seen.sum(0)
    return np.where(count > 0, np.where(seen, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def run(seed):
    train, (images, labels) = digits(seed=seed)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(mlp(0.5), torch.nn.Softmax(1))
    fit(model[0], train, EPOCHS)
    images = images + NOISE * torch.randn(images.shape)
    model.eval()
    with torch.no_grad():
        single = model(images)
    mean, _ = predict(model, images, SAMPLES, key=dropout_ext.key(seed))
    return measures(single, labels), measures(mean, labels)


def main():
    runs = [run(seed) for seed in range(SEEDS)]
    values = np.array([[side[0] for side in sides] for sides in runs])  # seed, side, measure
    within = np.array([[side[1] for side in sides] for sides in runs])
    sides = ("dropout off", f"mean of {SAMPLES} draws")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    middle = (np.arange(BINS) + 0.5) / BINS
    axes[0].plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
    for n, side in enumerate(sides):
        axes[0].plot(middle, mean_of_seen(within[:, n]), "o-", label=side)
        for m, measure in enumerate(MEASURES):
            report(f"{side}: {measure}", values[:, n, m])
        mean, half = interval(values[:, n, 2])
        axes[1].bar(n, mean, yerr=half, capsize=5, color=f"C{n}", alpha=0.7)
    axes[0].set(xlabel="confidence", ylabel="accuracy within the bin", title="calibration")
    axes[0].legend(fontsize=8)
    axes[1].set_xticks(range(2), sides)
    axes[1].set(ylabel=MEASURES[2], title="expected calibration error")
    save(figure, "ensemble")
    gain = values[:, 0] - values[:, 1]
    verdict("the ensemble is more accurate", -gain[:, 0])
    verdict("the ensemble has the lower negative log-likelihood", gain[:, 1])
    verdict("the ensemble is better calibrated", gain[:, 2])
