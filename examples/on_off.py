"""On in training, off at inference: what eval() does, and what forgetting it costs."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from examples.common import digits, evaluate, fit, mlp, report, save, verdict

SEEDS, EPOCHS, CALLS = 8, 60, 200


def run(seed):
    """Accuracy off and on, and one image's logit of its class over many calls, off and on."""
    train, test = digits(seed=seed)
    torch.manual_seed(seed)
    model = mlp(0.5)
    fit(model, train, EPOCHS)
    image, label = test[0][:1].expand(CALLS, -1, -1, -1), test[1][0]
    with torch.no_grad():
        on = (model(test[0]).argmax(1) == test[1]).float().mean().item() * 100
        logits_on = model(image)[:, label]
        model.eval()
        logits_off = torch.cat([model(image[:1])[:, label] for _ in range(CALLS)])
        assert model[3](image) is image  # the very tensor: nothing is computed
    return evaluate(model, test)[1], on, logits_off.numpy(), logits_on.numpy()


def main():
    off, on, logits_off, logits_on = zip(*(run(seed) for seed in range(SEEDS)), strict=True)
    off, on = np.array(off), np.array(on)
    report("test accuracy with dropout off", off, " %")
    report("test accuracy with dropout on", on, " %")
    different = max(len(np.unique(logits)) for logits in logits_off)
    print(f"  different outputs of {CALLS} calls with dropout off: {different}")
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.hist(logits_on[0], 30, alpha=0.6, label="dropout on, one call each")
    axes.axvline(logits_off[0][0], color="C1", label=f"dropout off, all {CALLS} calls")
    axes.axvline(logits_on[0].mean(), color="C0", ls="--", label="mean of the calls with it on")
    axes.set(xlabel="logit of the right class, one image", ylabel="calls")
    axes.legend(fontsize=8)
    save(figure, "on_off")
    verdict("turning it off at inference raises the accuracy", off - on)
