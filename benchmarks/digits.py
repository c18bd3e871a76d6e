"""Train a small network on scikit-learn's handwritten digits with both modules.

Same initial weights and same batches per seed; only the masks differ. The epochs of the two
trainings alternate, so that both are timed on the same machine in the same state.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import quantiles, threads


def data(device):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.3, stratify=y, random_state=0)
    x, x_test, y, y_test = (torch.as_tensor(part, device=device) for part in parts)
    return x.float(), x_test.float(), y, y_test


def network(dropout, seed, device):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 512),
        torch.nn.ReLU(),
        dropout(0.5),
        torch.nn.Linear(512, 512),
        torch.nn.ReLU(),
        dropout(0.5),
        torch.nn.Linear(512, 10),
    ).to(device)


def epoch(model, optimizer, x, y, order):
    for batch in order.split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def run(emit, quick, device):
    # The batches are too small for a second thread to help.
    with threads(1):
        train(emit, quick, device)


def train(emit, quick, device):
    import dropout_ext

    seeds, epochs = (3, 6) if quick else (10, 20)
    modules = {
        "nn.Dropout": ("torch", torch.nn.Dropout),
        "dropout_ext.Dropout": ("ours", dropout_ext.Dropout),
    }
    x, x_test, y, y_test = data(device)
    emit({"total": seeds * epochs})
    accuracy = {name: [] for name in modules}
    seconds = {name: [] for name in modules}
    for seed in range(seeds):
        models = {name: network(module, seed, device) for name, (_, module) in modules.items()}
        optimizers = {name: torch.optim.Adam(m.parameters()) for name, m in models.items()}
        batches = torch.Generator().manual_seed(seed)
        for e in range(epochs):
            order = torch.randperm(len(x), generator=batches).to(device)
            for name in sorted(models, reverse=e % 2 == 1):
                began = time.perf_counter()
                epoch(models[name], optimizers[name], x, y, order)
                if device == "cuda":
                    torch.cuda.synchronize()
                if e:  # the first epoch warms up
                    seconds[name].append(time.perf_counter() - began)
            emit({"step": f"seed {seed}"})
        for name, model in models.items():
            model.eval()
            with torch.no_grad():
                hits = (model(x_test).argmax(1) == y_test).double().mean()
            accuracy[name].append(100 * hits.item())
    case = f"digits, {seeds} seeds, {epochs} epochs"
    for name, (role, _) in modules.items():
        row = {
            "section": "training",
            "case": case,
            "dtype": "float32",
            "p": 0.5,
            "threads": torch.get_num_threads(),
            "side": name,
            "role": role,
        }
        mean, spread = np.mean(accuracy[name]), np.std(accuracy[name], ddof=1)
        emit({"row": row | {"metric": "accuracy", "unit": "%", **quantiles(accuracy[name])}})
        emit({"row": row | {"metric": "accuracy, mean", "unit": "%", "p50": mean}})
        emit({"row": row | {"metric": "accuracy, deviation", "unit": "%", "p50": spread}})
        milliseconds = quantiles(np.array(seconds[name]) * 1e3)
        emit({"row": row | {"metric": "time per epoch", "unit": "ms", **milliseconds}})
    both = [np.array(accuracy[name]) for name in ("dropout_ext.Dropout", "nn.Dropout")]
    difference = both[0] - both[1]
    error = np.std(difference, ddof=1) / seeds**0.5
    for metric, value in (("difference", difference.mean()), ("standard error", error)):
        row = {"section": "training", "case": case, "side": "ours - nn.Dropout", "role": "bar"}
        emit({"row": row | {"metric": f"accuracy, {metric}", "unit": "%", "p50": value}})
