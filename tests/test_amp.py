"""Autocast leaves dtypes as nn.Dropout does."""

import pytest
import torch
from family import MODULES
from helpers import assert_same_bits, random_tensor
from torch import nn

import dropout_ext
from dropout_ext import _reference as reference

TORCH = {
    "dropout": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha": nn.AlphaDropout,
    "feature_alpha": nn.FeatureAlphaDropout,
}
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TORCH)
def test_dtypes_are_those_of_torch_nn(name, low, device, key):
    make, shape = MODULES[name]
    with torch.autocast(device, low):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = random_tensor(shape, dtype).to(device).requires_grad_()
            y = make(0.5)(x, key=key)
            assert y.dtype == TORCH[name](0.5)(x).dtype == dtype
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert gradient.dtype == dtype


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("compiled", [False, True])
def test_between_layers(device, compiled, key):
    """The linear layers run in bfloat16, dropout in what reaches it, gradients in float32."""
    torch.manual_seed(0)
    first, last = (nn.Linear(64, 64, device=device) for _ in range(2))
    x = random_tensor((32, 64)).to(device)
    seen = []

    def forward(x, dropout):
        h = first(x)
        y = dropout(h)
        seen.append((h.dtype, y.dtype))
        return last(y)

    def expected(h):
        keep = reference.keep_mask(key, 0.5, h.shape).to(device)
        return torch.where(keep, h * 2, torch.zeros((), dtype=h.dtype, device=device))

    f = forward
    if compiled:
        torch.compiler.reset()
        f = torch.compile(forward, backend="aot_eager", fullgraph=True)
    results = []
    with torch.autocast(device, torch.bfloat16):
        for call, dropout in (
            (f, lambda h: dropout_ext.dropout(h, key=key)),
            (forward, expected),
        ):
            y = call(x, dropout)
            loss = y.float().square().sum()
            results.append([y, *torch.autograd.grad(loss, list(first.parameters()))])
    for actual, wanted in zip(*results, strict=True):
        assert_same_bits(actual, wanted)
    assert all(pair == (torch.bfloat16, torch.bfloat16) for pair in seen)


def test_grad_scaler_and_no_autocast_copy(key):
    """The eager call stays the plain one under autocast: the input comes back in eval mode."""
    x = random_tensor((5,))
    with torch.autocast("cpu", torch.bfloat16):
        assert dropout_ext.Dropout().eval()(x) is x
        assert_same_bits(dropout_ext.dropout(x, key=key), reference.apply(x, key, 0.5, 2.0))
