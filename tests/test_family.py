"""Every member of the family, element by element, against what keep_mask says, and against its
PyTorch counterpart for shapes, errors and warnings."""

import math
import warnings

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from family import ALPHA_MEMBERS, MEMBERS, expected_output, silently
from helpers import (
    ALL_DTYPES,
    FLOAT_DTYPES,
    LAYOUTS,
    SHARED_LAYOUTS,
    assert_same_bits,
    make_key,
    random_tensor,
    reference_mask,
    scaled_where,
)
from hypothesis import given, settings

import dropout_ext
from dropout_ext import functional

profile = settings(deadline=None, derandomize=True, max_examples=40)
shapes = st.lists(st.integers(0, 7), min_size=5, max_size=5)
probabilities = st.sampled_from([0.1, 0.5, 0.9, 1.0])
layouts = st.sampled_from([*LAYOUTS, *SHARED_LAYOUTS])


def arrange(layout, x):
    if layout in SHARED_LAYOUTS and x.dim() and x.numel():
        return SHARED_LAYOUTS[layout](x)
    return LAYOUTS.get(layout, LAYOUTS["contiguous"])(x)


def check_member(name, function, module, shared, x, p, inplace, key, grad):
    """Forward and gradient of function and module."""
    keep = reference_mask(x.shape, p, key, shared)
    leaf = x.detach().clone().requires_grad_()
    want = expected_output(name, keep, leaf, p) if x.numel() else leaf * 1
    (want_grad,) = torch.autograd.grad(want, leaf, grad)

    for call in (
        lambda x: silently(function, x, p, True, inplace, key=key),
        lambda x: silently(module, x, key=key),
    ):
        ours = x.detach().requires_grad_()
        # Writable memory for in place; otherwise the layout itself.
        source = ours.clone() if inplace else ours
        y = call(source)
        if inplace and x.numel() and call.__code__.co_freevars[0] == "function":
            assert y is source
        yield y, want
        (actual_grad,) = torch.autograd.grad(y, ours, grad) if y is not ours else (want_grad,)
        yield actual_grad, want_grad
        if not inplace and x.numel():
            assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("name", MEMBERS)
@profile
@given(
    shape=shapes,
    rank=st.integers(0, 5),
    p=probabilities,
    layout=layouts,
    grad_layout=layouts,
    dtype=st.sampled_from(ALL_DTYPES),
    inplace=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_member(name, shape, rank, p, layout, grad_layout, dtype, inplace, seed):
    function, module, _, shared, ranks = MEMBERS[name]
    rank = ranks[rank % len(ranks)]
    x = arrange(layout, random_tensor(shape[:rank], dtype, seed=seed % 100))
    grad = arrange(grad_layout, random_tensor(shape[:rank], dtype, seed=seed % 99 + 1))
    module = module(p)
    module.inplace = inplace
    for actual, want in check_member(
        name, function, module, shared(rank), x, p, inplace, make_key(seed, 3), grad
    ):
        assert_same_bits(actual, want)


@pytest.mark.parametrize("name", ALPHA_MEMBERS)
@profile
@given(
    shape=shapes,
    rank=st.integers(0, 5),
    p=probabilities,
    layout=layouts,
    grad_layout=layouts,
    dtype=st.sampled_from(FLOAT_DTYPES),
    inplace=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_alpha_member(name, shape, rank, p, layout, grad_layout, dtype, inplace, seed):
    function, module, _, shared, ranks = ALPHA_MEMBERS[name]
    rank = ranks[rank % len(ranks)]
    x = arrange(layout, random_tensor(shape[:rank], dtype, seed=seed % 100))
    grad = arrange(grad_layout, random_tensor(shape[:rank], dtype, seed=seed % 99 + 1))

    module = module(p)
    eps = 4 * torch.finfo(dtype).eps
    for actual, want in check_member(
        name, function, module, shared(rank), x, p, inplace, make_key(seed, 3), grad
    ):
        torch.testing.assert_close(actual, want, rtol=eps, atol=eps)


@profile
@given(
    shape=shapes,
    rank=st.integers(1, 5),
    dims=st.lists(st.integers(-5, 4), max_size=4),
    p=probabilities,
    layout=layouts,
    dtype=st.sampled_from(ALL_DTYPES),
    seed=st.integers(0, 2**64 - 1),
)
def test_broadcast_dims(shape, rank, dims, p, layout, dtype, seed):
    shape = shape[:rank]
    dims = tuple(d for d in dims if -rank <= d < rank)
    key = make_key(seed, 1)
    keep = reference_mask(shape, p, key, dims)
    assert torch.equal(dropout_ext.keep_mask(shape, p, key, broadcast_dims=dims), keep)
    x = arrange(layout, random_tensor(shape, dtype))
    want = scaled_where(keep, x, 1 / (1 - p) if p < 1 else 0.0)
    assert_same_bits(dropout_ext.dropout(x, p, key=key, broadcast_dims=dims), want)
    assert_same_bits(dropout_ext.Dropout(p, broadcast_dims=dims)(x, key=key), want)
    y = x.clone()
    assert dropout_ext.dropout(y, p, inplace=True, key=key, broadcast_dims=dims) is y
    assert_same_bits(y, want)


def outcome(call, *arguments):
    """The shape or the exception, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(*arguments).shape
        except Exception as error:
            result = type(error), str(error)
    return result, [(w.category, str(w.message)) for w in caught]


WITH_COUNTERPART = {k: v for k, v in {**MEMBERS, **ALPHA_MEMBERS}.items() if v[2]}


@pytest.mark.parametrize("name", WITH_COUNTERPART)
@pytest.mark.parametrize("rank", range(7))
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [0, 3])
def test_outcome_is_pytorchs(name, rank, p, training, size):
    function, module, counterpart, _, _ = WITH_COUNTERPART[name]
    x = torch.ones([size] * rank)
    theirs = outcome(counterpart(p).train(training), x)
    assert outcome(module(p).train(training), x) == theirs
    for inplace in (False, True):
        arguments = (p, training, inplace)
        theirs = outcome(getattr(F, name), x.clone(), *arguments)
        assert outcome(function, x.clone(), *arguments) == theirs


@pytest.mark.parametrize("name", WITH_COUNTERPART)
def test_signature_is_pytorchs(name):
    import inspect

    theirs = inspect.signature(getattr(F, name)).parameters
    ours = inspect.signature(getattr(functional, name)).parameters
    for ours_p, theirs_p in zip(ours.values(), theirs.values(), strict=False):
        assert (ours_p.name, ours_p.default) == (theirs_p.name, theirs_p.default)
    extra = list(ours.values())[len(theirs) :]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in extra)


@pytest.mark.parametrize("module", [dropout_ext.AlphaDropout, dropout_ext.FeatureAlphaDropout])
def test_alpha_modules_ignore_inplace(module, key):
    x = random_tensor((4, 5))
    before = x.clone()
    y = module(0.5, inplace=True)(x, key=key)
    assert_same_bits(x, before)
    assert not torch.equal(y, x)


def timm_drop_path(x, drop_prob, training, scale_by_keep, keep):
    """timm.layers.drop_path, with the mask given."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    mask = keep.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    if keep_prob > 0.0 and scale_by_keep:
        mask = mask / keep_prob
    return x * mask


@pytest.mark.parametrize("scale_by_keep", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_drop_path_is_timms(scale_by_keep, p, training, key):
    x = random_tensor((12, 7, 5))
    expected = timm_drop_path(x, p, training, scale_by_keep, reference_mask((12,), p, key))
    actual = functional.drop_path(x, p, training, scale_by_keep, key=key)
    torch.testing.assert_close(actual, expected)
    module = dropout_ext.DropPath(p, scale_by_keep).train(training)
    assert_same_bits(module(x, key=key), actual)
    if p == 0 or not training:
        assert actual is x


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_locked_dropout_shares_over_time(dim, key):
    x = torch.ones(6, 7, 8)
    y = dropout_ext.LockedDropout(0.5, dim)(x, key=key)
    assert torch.equal(y, y.narrow(dim, 0, 1).expand_as(y))
    assert y.unique().tolist() == [0, 2]
    want = scaled_where(reference_mask(x.shape, 0.5, key, (dim,)), x, 2.0)
    assert_same_bits(y, want)


def test_strides_of_the_contract(key):
    """The table of mask strides: the same masks, told by strides."""
    x = torch.ones(4, 5, 6, 7)
    explicit = {
        (5, 1, 0, 0): functional.dropout2d(x, key=key),
        (1, 0, 0, 0): functional.drop_path(x, 0.5, True, key=key),
        (42, 0, 7, 1): functional.locked_dropout(x, 0.5, 1, key=key),
        (210, 42, 7, 1): functional.dropout(x, key=key),
    }
    for strides, actual in explicit.items():
        want = 2.0 * dropout_ext.keep_mask(x.shape, 0.5, key, mask_strides=strides)
        assert torch.equal(actual, want)


def test_saved_for_backward(key):
    x = random_tensor((4, 5, 6, 7)).requires_grad_()
    for function, _, _, _, _ in (*MEMBERS.values(), *ALPHA_MEMBERS.values()):
        saved = []
        y = x[..., 0] if function is functional.dropout1d else x.clone()
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None)
        with hooks:
            silently(function, y, 0.5, True, False, key=key)
        assert sum(t.numel() * t.element_size() for t in saved) == 16


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_alpha_dropout_keeps_mean_and_variance(p, key):
    """Of standard normal input, 2^20 samples; both within 5 standard errors (significance 6e-7)."""
    n = 2**20
    x = random_tensor((n,), torch.float64)
    y = functional.alpha_dropout(x, p, True, key=key)
    assert abs(y.mean().item()) < 5 / math.sqrt(n)
    fourth = ((y - y.mean()) ** 4).mean().item()
    assert abs(y.var().item() - 1) < 5 * math.sqrt((fourth - 1) / n)


def test_alpha_dropout_of_selu(key):
    """Activations of SELU keep the mean and the variance they had."""
    x = F.selu(random_tensor((2**20,), torch.float64))
    y = functional.alpha_dropout(x, 0.1, True, key=key)
    assert abs(y.mean() - x.mean()).item() < 0.005
    assert abs(y.var() - x.var()).item() < 0.01
