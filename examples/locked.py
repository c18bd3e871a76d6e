"""Per-step against locked masks in a recurrent network: an LSTM that predicts characters.

Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
NeurIPS 2016. The text is Python's own help, which comes with the interpreter.
"""

from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dropout_ext
from examples.common import band, interval, report, save, verdict

SEEDS, STEPS, EVERY, P = 5, 500, 25, 0.3
LENGTH, BATCH, HIDDEN, TRAIN, VALID = 48, 16, 64, 6_000, 6_000
KINDS = {
    "none": nn.Identity,
    "per step": lambda: dropout_ext.Dropout(P),
    "locked": lambda: dropout_ext.LockedDropout(P, dim=1),
}


def text():
    """Training and validation characters as numbers, and how many there are."""
    characters = "".join(topics[name] for name in sorted(topics))[: TRAIN + VALID]
    alphabet = {c: n for n, c in enumerate(sorted(set(characters)))}
    ids = torch.tensor([alphabet[c] for c in characters])
    return ids[:TRAIN], ids[TRAIN:], len(alphabet)


class LanguageModel(nn.Module):
    def __init__(self, size, drop):
        super().__init__()
        self.tokens = nn.Embedding(size, HIDDEN)
        self.layers = nn.ModuleList(nn.LSTM(HIDDEN, HIDDEN, batch_first=True) for _ in range(2))
        self.drops = nn.ModuleList(drop() for _ in range(3))
        self.head = nn.Linear(HIDDEN, size)

    def forward(self, ids):
        x = self.drops[0](self.tokens(ids))
        for layer, drop in zip(self.layers, self.drops[1:], strict=True):
            x = drop(layer(x)[0])
        return self.head(x)


def bits(model, ids):
    """Bits per character; each window starts with an empty memory."""
    windows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()) / np.log(
        2
    )


def run(kind, seed):
    """Every EVERY steps: bits per character of the training text and of the validation text."""
    train, valid, size = text()
    torch.manual_seed(seed)
    model = LanguageModel(size, KINDS[kind])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(train) - LENGTH - 1, (BATCH, 1))
        ids = train[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVERY == 0:
            model.eval()
            with torch.no_grad():
                seen.append((bits(model, train).item(), bits(model, valid).item()))
            model.train()
    return seen


def main():
    curves = {kind: np.array([run(kind, seed) for seed in range(SEEDS)]) for kind in KINDS}
    figure, axes = plt.subplots(figsize=(6, 3.6))
    best = {}
    for kind, curve in curves.items():
        band(axes, curve[:, :, 1], kind, np.arange(EVERY, STEPS + 1, EVERY))
        best[kind] = curve[:, :, 1].min(1)
        report(f"{kind}: best validation loss", best[kind], " bits per character")
        report(f"{kind}: validation loss at the end", curve[:, -1, 1], " bits per character")
    low = min(interval(values)[0] for values in best.values())
    axes.set(
        xlabel="step", ylabel="validation loss, bits per character", ylim=(low - 0.1, low + 1.5)
    )
    axes.legend(fontsize=8)
    axes.set_title(f"p = {P}, {TRAIN} characters to train with", fontsize=10)
    save(figure, "locked")
    verdict("per-step dropout beats none (best loss)", best["none"] - best["per step"])
    verdict("locked dropout beats none (best loss)", best["none"] - best["locked"])
    verdict("locked beats per step (best loss)", best["per step"] - best["locked"])
