"""What the examples share: data, a training loop, confidence intervals, pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits

import dropout_ext

RESULTS = Path(__file__).parent / "results"


def digits(train=300, seed=0):
    """(images, labels) to train with and to test with; images are 8 x 8, from 0 to 1."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [(images[part], labels[part]) for part in (order[:train], order[train:])]


def mlp(p, hidden=256):
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, hidden),
        torch.nn.ReLU(),
        dropout_ext.Dropout(p),
        torch.nn.Linear(hidden, hidden),
        torch.nn.ReLU(),
        dropout_ext.Dropout(p),
        torch.nn.Linear(hidden, 10),
    )


def evaluate(model, data):
    """(loss, accuracy in percent), with dropout off."""
    model.eval()
    with torch.no_grad():
        logits = model(data[0])
    model.train()
    accuracy = (logits.argmax(1) == data[1]).float().mean().item() * 100
    return F.cross_entropy(logits, data[1]).item(), accuracy


def fit(model, data, epochs, watch=None, every=1, batch=50, lr=1e-3):
    """Trains with Adam. `watch` is called after every so many epochs; its values are returned."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    seen = []
    for epoch in range(1, epochs + 1):
        for part in torch.randperm(len(data[1])).split(batch):
            loss = F.cross_entropy(model(data[0][part]), data[1][part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if watch is not None and epoch % every == 0:
            seen.append(watch())
    return np.array(seen)


def interval(values):
    """Mean and half width of its 95% confidence interval, by Student's t."""
    values = np.asarray(values, dtype=float)
    error = stats.sem(values)
    return values.mean(), error * stats.t.ppf(0.975, len(values) - 1)


def report(label, values, unit=""):
    mean, half = interval(values)
    print(f"  {label}: {mean:.4g} ± {half:.2g}{unit}")


def verdict(claim, differences):
    """Whether the claim, that the paired differences are positive, is borne out."""
    mean, half = interval(differences)
    if mean - half > 0:
        outcome = "borne out"
    elif mean + half < 0:
        outcome = "NOT borne out: the opposite holds"
    else:
        outcome = "NOT borne out: no difference can be told"
    print(f"  {claim}: {outcome} ({mean:+.3g} ± {half:.2g}, {len(differences)} seeds)")


def band(axes, curves, label, x=None, **style):
    """The mean over seeds (rows) and its 95% confidence interval."""
    mean, half = np.array([interval(column) for column in np.asarray(curves).T]).T
    x = np.arange(1, len(mean) + 1) if x is None else x
    (line,) = axes.plot(x, mean, label=label, **style)
    axes.fill_between(x, mean - half, mean + half, alpha=0.25, color=line.get_color())


def save(figure, name):
    RESULTS.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    plt.close(figure)
    print(f"  examples/results/{name}.png")
