"""Attention with dropout: the mask, values and gradients, and what else a PyTorch function does.

The oracle is the formula in float64 with the mask of the reference; the yardstick for rounding is
PyTorch's own math path in the dtype of the call, given that mask.
"""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_same_bits, make_key, random_tensor, run_python
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import dropout_ext
from dropout_ext import _reference as reference

attention = dropout_ext.functional.scaled_dot_product_attention
P = 0.3
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def inputs(batch=(2, 3), length=9, keys=13, size=8, value_size=5, dtype=torch.float32, **options):
    shapes = [(*batch, length, size), (*batch, keys, size), (*batch, keys, value_size)]
    requires_grad = options.get("requires_grad", True)
    return [
        random_tensor(shape, dtype, seed).requires_grad_(requires_grad)
        for seed, shape in enumerate(shapes)
    ]


def additive(mask, is_causal, length, keys):
    """Both kinds of masks as numbers to add, in float64."""
    if is_causal:
        mask = torch.ones(length, keys, dtype=torch.bool).tril()
    if mask is None:
        return torch.zeros(())
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return mask.double()


def with_all_heads(query, tensor):
    if tensor.dim() < 3 or tensor.size(-3) in (1, query.size(-3)):
        return tensor
    return tensor.repeat_interleave(query.size(-3) // tensor.size(-3), -3)


def formula(query, key, value, mask, p, is_causal, scale, dropout_key):
    """In the dtype of the arguments, differentiable."""
    key, value = with_all_heads(query, key), with_all_heads(query, value)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    scores = scores + additive(mask, is_causal, *scores.shape[-2:]).to(scores.dtype)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, 0).softmax(-1) * seen
    keep = reference.keep_mask(dropout_key, p, weights.shape)
    return torch.where(keep, weights / (1 - p), 0) @ value


def math_path(query, key, value, mask, p, is_causal, scale, dropout_key):
    """PyTorch's, which takes a dropout mask but, called directly, no bool mask."""
    mask = None if mask is None else additive(mask, False, 0, 0).to(query.dtype)
    key, value = with_all_heads(query, key), with_all_heads(query, value)
    shape = (*query.shape[:-1], key.size(-2))
    keep = reference.keep_mask(dropout_key, p, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        op = torch.ops.aten._scaled_dot_product_attention_math
        return op(query, key, value, mask, p, is_causal, keep, scale=scale)[0]


def results(function, tensors, grad):
    """The output and the gradients of query, key and value."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def all_results(tensors, mask, p, is_causal, scale, dropout_key):
    """Of the formula in float64, the math path and the operator."""
    rest = (mask, p, is_causal, scale)
    grad = random_tensor((*tensors[0].shape[:-1], tensors[2].size(-1)), tensors[0].dtype, 7)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    gqa = tensors[0].shape[:-2] != tensors[1].shape[:-2]
    return (
        results(lambda *t: formula(*t, *rest, dropout_key), doubles, grad.double()),
        results(lambda *t: math_path(*t, *rest, dropout_key), tensors, grad),
        results(lambda *t: attention(*t, *rest, gqa, dropout_key=dropout_key), tensors, grad),
        grad,
    )


def assert_accurate(tensors, mask, p, is_causal, scale, dropout_key):
    """At most twice the error of the math path, but for a few roundings: of the largest number, or
    of the largest of those that cancel in the gradient of the scores, of which one comes from the
    weights in the math path and from the output in ours. Of a 16-bit output that gradient knows
    twice the digits, rounded to half of the last, which for bfloat16 is less than float32.
    """
    exact, theirs, ours, grad = all_results(tensors, mask, p, is_causal, scale, dropout_key)
    compute = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    digits = max(8 * torch.finfo(compute).eps, torch.finfo(tensors[0].dtype).eps ** 2 / 4)
    value = with_all_heads(tensors[0], tensors[2]).detach().double().abs()
    cancelling = (grad.double().abs() @ value.transpose(-2, -1)).max() / (1 - p)
    cancelling = cancelling * max(t.detach().abs().max() for t in tensors[:2]) * abs(scale or 1)
    for expected, their, our, like in zip(exact, theirs, ours, (theirs[0], *tensors), strict=True):
        assert our.dtype == like.dtype
        assert our.shape == expected.shape
        if our.numel() == 0:
            continue
        floor = digits * max(expected.abs().max(), cancelling, 1)
        error = (our.double() - expected).abs().max()
        assert error <= 2 * (their.double() - expected).abs().max() + floor


# The mask.


@pytest.mark.parametrize(
    ("batch", "length", "keys"),
    [((), 7, 5), ((3,), 40, 33), ((2, 3), 100, 128), ((1, 2), 3, 700), ((2, 1, 2), 130, 70)],
)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_dropped_weights_are_those_of_the_keep_mask(batch, length, keys, p, key):
    """One-hot values show every weight; queries of zero make all of them 1 / S."""
    query = torch.zeros(*batch, length, 4)
    value = torch.eye(keys).expand(*batch, keys, keys)
    out = attention(query, torch.randn(*batch, keys, 4), value, None, p, dropout_key=key)
    keep = reference.keep_mask(key, p, (*batch, length, keys))
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, keep / (1 - p) / keys)


def test_the_mask_of_the_backward_pass(key):
    """The gradient of the values is that of the weights, transposed."""
    batch, length, keys = (2, 2), 70, 300
    value = torch.zeros(*batch, keys, length, requires_grad=True)
    out = attention(
        torch.zeros(*batch, length, 4),
        torch.zeros(*batch, keys, 4),
        value,
        None,
        P,
        dropout_key=key,
    )
    out.backward(torch.eye(length).expand(*batch, length, length))
    keep = reference.keep_mask(key, P, (*batch, length, keys))
    assert torch.equal(value.grad.transpose(-2, -1) != 0, keep)


def test_a_key_per_example():
    keys = torch.stack([make_key(1), make_key(2)])
    query, k, value = inputs()
    out = attention(query, k, value, None, P, dropout_key=keys)
    mask = reference.keep_mask(keys, P, (2, 3, 9, 13))
    weights = (query @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(out, torch.where(mask, weights / (1 - P), 0) @ value)
    single = [t[0, 0] for t in (query, k, value)]  # rows are then the slices of dimension 0
    rows = torch.stack([make_key(n) for n in range(9)])
    out = attention(*single, None, P, dropout_key=rows)
    mask = reference.keep_mask(rows, P, (9, 13))
    torch.testing.assert_close(out, torch.where(mask, weights[0, 0] / (1 - P), 0) @ single[2])


# Values and gradients.


@st.composite
def calls(draw):
    heads, shared = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    length, keys = (draw(st.sampled_from([1, 2, 5, 16, 33, 97, 150])) for _ in range(2))
    size, value_size = (draw(st.sampled_from([1, 3, 16, 24, 64, 80])) for _ in range(2))
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "row", "column", "per head"]))
    return {
        "shapes": [
            (*batch, heads, length, size),
            (*batch, shared, keys, size),
            (*batch, shared, keys, value_size),
        ],
        "kind": kind,
        "scale": draw(st.sampled_from([None, 0.7, -0.1])),
        "p": draw(st.sampled_from([0.1, 0.5, 0.9])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**32)),
    }


def make_mask(kind, shape, dtype):
    length, keys = shape[-2:]
    if kind == "bool":
        mask = random_tensor((length, keys), seed=5) > -0.5
        mask[:: max(length // 2, 1)] = False  # rows that see nothing
        return mask
    shapes = {
        "float": (length, keys),
        "row": (1, keys),
        "column": (length, 1),
        "per head": shape[-3:],
    }
    return random_tensor(shapes[kind], dtype, 5) if kind in shapes else None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(call=calls())
@example(
    call={
        "shapes": [(1, 150, 64), (1, 1, 64), (1, 1, 1)], "kind": "none",
        "scale": 0.7, "p": 0.1, "dtype": torch.bfloat16, "seed": 0,
    }
)  # fmt: skip
@example(
    call={
        "shapes": [(1, 2, 1100, 64), (1, 2, 1050, 64), (1, 2, 1050, 64)], "kind": "causal",
        "scale": None, "p": 0.1, "dtype": torch.float32, "seed": 1,
    }
)  # fmt: skip
@example(
    call={
        "shapes": [(1, 4, 600, 72), (1, 2, 530, 72), (1, 2, 530, 40)], "kind": "bool",
        "scale": None, "p": 0.1, "dtype": torch.bfloat16, "seed": 2,
    }
)  # fmt: skip
def test_error_is_at_most_twice_that_of_the_math_path(call):
    query, key, value = (
        random_tensor(shape, call["dtype"], call["seed"] + n).requires_grad_()
        for n, shape in enumerate(call["shapes"])
    )
    weights = (*query.shape[:-1], key.size(-2))
    mask = make_mask(call["kind"], weights, call["dtype"])
    assert_accurate(
        [query, key, value], mask, call["p"], call["kind"] == "causal", call["scale"],
        make_key(call["seed"]),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("keys", "is_causal"), [(97, True), (300, False)])
@pytest.mark.parametrize("scale", [None, 0.7])  # at 0.7 most weights are next to 0 or 1
def test_root_mean_square_error_is_at_most_twice_that_of_the_math_path(
    dtype, keys, is_causal, scale
):
    """Of 8 calls together, where no single rounding decides, and without a tolerance."""
    errors = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(8):
        shapes = [(1, 2, 64, 64), (1, 2, keys, 64), (1, 2, keys, 64)]
        tensors = [
            random_tensor(shape, dtype, 3 * seed + n).requires_grad_()
            for n, shape in enumerate(shapes)
        ]
        exact, *approximate, _ = all_results(tensors, None, 0.1, is_causal, scale, make_key(seed))
        for side, found in enumerate(approximate):
            for n in range(4):
                errors[side, n] += (found[n].double() - exact[n]).square().sum()
    math_path_error, our_error = errors.sqrt()
    assert (our_error <= 2 * math_path_error).all(), our_error / math_path_error


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_gradcheck(mask, key):
    tensors = inputs((1,), 3, 5, 2, 3, torch.float64)
    attn_mask = make_mask(mask, (1, 3, 5), torch.float64)

    def function(query, k, value):
        return attention(query, k, value, attn_mask, P, mask == "causal", dropout_key=key)

    torch.autograd.gradcheck(function, tensors)
    torch.autograd.gradgradcheck(function, tensors)


def test_double_backward_of_one_tensor_in_all_places(key):
    x = random_tensor((2, 5, 4), torch.float64).requires_grad_()
    torch.autograd.gradgradcheck(lambda x: attention(x, x, x, None, P, dropout_key=key), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_with_a_gradient(dtype, key):
    tensors = [t.to(dtype).detach().requires_grad_() for t in inputs()]
    mask = random_tensor((3, 1, 13), dtype, 9).requires_grad_()
    out = attention(*tensors, mask, P, dropout_key=key)
    scores = tensors[0] @ tensors[1].transpose(-2, -1) * 8**-0.5 + mask
    keep = reference.keep_mask(key, P, scores.shape)
    expected = torch.where(keep, scores.softmax(-1) / (1 - P), 0) @ tensors[2]
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), (*tensors, mask)),
        torch.autograd.grad(expected.sum(), (*tensors, mask)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, key):
    """The strides of the arguments, and of the gradient, change no bit."""
    tensors = inputs((2, 3), 20, 37, 16, 24, dtype)
    mask = random_tensor((2, 1, 20, 37), dtype, 3)
    grad = random_tensor((2, 3, 20, 24), dtype, 4)
    call = functools.partial(attention, dropout_p=P, dropout_key=key)
    expected = results(lambda *t: call(*t, mask), tensors, grad)
    laid_out = [LAYOUTS[layout](t.detach()).requires_grad_() for t in tensors]
    actual = results(lambda *t: call(*t, LAYOUTS[layout](mask)), laid_out, LAYOUTS[layout](grad))
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


def test_expanded_tensors(key):
    """Keys and values of one head for all, a gradient of ones from sum()."""
    query, k, value = inputs()
    k, value = (t[:, :1].detach().expand_as(t).requires_grad_() for t in (k, value))
    expected = results(
        lambda *t: formula(*t, None, P, False, None, key),
        [t.detach().clone().requires_grad_() for t in (query, k, value)],
        torch.ones(2, 3, 9, 5),
    )
    out = attention(query, k, value, None, P, dropout_key=key)
    torch.testing.assert_close(out, expected[0])
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), (query, k, value)), expected[1:], strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("query", "key_", "value", "enable_gqa"),
    [
        ((2, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 4), False),
        ((1, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 4), False),
        ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 4), False),
        ((1, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 4), False),  # more values than weights
        ((2, 3, 5, 8), (7, 8), (7, 4), False),
        ((5, 8), (3, 7, 8), (7, 4), False),
        ((2, 6, 5, 8), (1, 2, 7, 8), (1, 2, 7, 4), True),
        ((1, 6, 5, 8), (1, 2, 7, 8), (1, 3, 7, 4), True),
        ((6, 5, 8), (2, 7, 8), (2, 7, 4), True),
    ],
)
def test_batch_dimensions_broadcast(query, key_, value, enable_gqa, key):
    tensors = [random_tensor(s, seed=n) for n, s in enumerate((query, key_, value))]
    for t in tensors:
        t.requires_grad_()

    def expected(q, k, v):
        if enable_gqa:
            k, v = with_all_heads(q, k), with_all_heads(q, v)
        weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        keep = reference.keep_mask(key, P, weights.shape)
        return torch.where(keep, weights / (1 - P), 0) @ v

    def ours(q, k, v):
        return attention(q, k, v, None, P, enable_gqa=enable_gqa, dropout_key=key)

    shape = F.scaled_dot_product_attention(*tensors, dropout_p=P, enable_gqa=enable_gqa).shape
    grad = random_tensor(shape, seed=9)
    for a, b in zip(results(ours, tensors, grad), results(expected, tensors, grad), strict=True):
        torch.testing.assert_close(a, b)


# Edges.


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 0}, {"keys": 0}, {"size": 0}, {"value_size": 0}, {"batch": (0, 2)},
        {"batch": (2, 0)}, {"batch": (), "length": 0, "keys": 0},
    ],
    ids=str,
)  # fmt: skip
def test_empty(shape, key):
    tensors = inputs(**shape)
    out = attention(*tensors, None, P, dropout_key=key)
    assert out.shape == F.scaled_dot_product_attention(*tensors, dropout_p=P).shape
    out.sum().backward()
    if shape.get("keys", 1) == 0:
        assert (out == 0).all()
    for t in tensors:
        assert t.grad.shape == t.shape
        assert torch.isfinite(t.grad).all()
    if "size" in shape:  # all scores are 0
        keep = reference.keep_mask(key, P, (2, 3, 9, 13))
        torch.testing.assert_close(out, (keep / (1 - P) / 13) @ tensors[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_no_key(dtype, kind, key):
    tensors = inputs((2, 3), 40, 70, dtype=dtype)
    mask = torch.ones(40, 70, dtype=torch.bool)
    mask[3] = mask[39] = False
    mask[:, 20] = False
    if kind == "float":
        mask = torch.zeros(40, 70, dtype=dtype).masked_fill(~mask, -torch.inf)
    out = attention(*tensors, mask, P, dropout_key=key)
    out.sum().backward()
    query, k, value = (t.grad for t in tensors)
    assert (out[..., [3, 39], :] == 0).all()
    assert (query[..., [3, 39], :] == 0).all()
    assert (k[..., 20, :] == 0).all()
    assert (value[..., 20, :] == 0).all()
    assert all(torch.isfinite(t).all() for t in (out, query, k, value))
    assert (out != 0).any()


def test_nan_and_infinity_stay_in_their_rows(key):
    query, k, value = inputs(requires_grad=False)
    query[0, 0, 4, 1] = torch.nan
    query[1, 2, 3, 0] = torch.inf
    out = attention(query, k, value, None, P, dropout_key=key)
    bad = torch.zeros(2, 3, 9, dtype=torch.bool)
    bad[0, 0, 4] = bad[1, 2, 3] = True
    assert torch.equal(out.isnan().all(-1), bad)
    assert torch.equal(out.isnan().any(-1), bad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_size", [5, 32])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF - 2**32, 0x7F800001])
def test_a_nan_of_any_bits_stays_one(dtype, value_size, bits, key):
    """Added to an exponent, or rounded to bfloat16, its bits would make a number."""
    tensors = inputs(value_size=value_size, dtype=dtype)
    mask = torch.zeros(9, 13)
    mask[4] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = attention(*tensors, mask, P, dropout_key=key)
    out.sum().backward()
    bad = torch.arange(9) == 4
    assert torch.equal(out.isnan().any(-1), bad.expand(2, 3, 9))
    assert torch.equal(out.isnan().all(-1), bad.expand(2, 3, 9))
    assert torch.equal(tensors[0].grad.isnan().all(-1), bad.expand(2, 3, 9))
    assert tensors[1].grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores(dtype, key):
    """Scores of thousands, apart by hundreds: neither overflow nor 0 / 0."""
    tensors = [t.detach().to(dtype) * 100 for t in inputs((1,), 30, 600)]
    out = attention(*tensors, None, P, dropout_key=key)
    exact = formula(*(t.double() for t in tensors), None, P, False, None, key)
    torch.testing.assert_close(out, exact.to(dtype), rtol=1e-3, atol=1e-2)


def test_p_of_one_gives_zeros_and_draws_nothing():
    tensors = inputs()
    state = torch.get_rng_state()
    out = attention(*tensors, None, 1.0)
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert (out == 0).all()
    assert all((t.grad == 0).all() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p_of_zero_is_pytorchs(dtype):
    tensors = inputs((2, 4), 64, 64, 32, 32, dtype)
    state = torch.get_rng_state()
    ours, theirs = attention(*tensors), F.scaled_dot_product_attention(*tensors)
    assert ours.grad_fn.name() == theirs.grad_fn.name()
    assert_same_bits(ours.detach(), theirs.detach())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_output_lies_in_memory_as_that_of_the_flash_kernel(transposed):
    tensors = inputs(value_size=8)
    if transposed:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = F.scaled_dot_product_attention(*tensors)
    assert attention(*tensors, None, P).stride() == theirs.stride()


# Errors.


def bad(**changes):
    arguments = dict(zip(("query", "key", "value"), inputs(requires_grad=False), strict=True))
    arguments["dropout_p"] = P
    return arguments | changes


mask_f64 = torch.zeros(9, 13, dtype=torch.float64)


@pytest.mark.parametrize(
    "arguments",
    [
        bad(query=None),
        bad(key=1.0),
        bad(key=torch.zeros(2, 3, 13, 9)),
        bad(value=torch.zeros(2, 3, 12, 5)),
        bad(key=torch.zeros(2, 4, 13, 8)),
        bad(query=torch.zeros(8)),
        bad(value=torch.zeros(2, 3, 13, 5, dtype=torch.float64)),
        bad(key=torch.zeros(2, 3, 13, 8, device="meta")),
        bad(attn_mask=torch.zeros(9, 12)),
        bad(attn_mask=torch.zeros(4, 3, 9, 13)),
        bad(attn_mask=torch.zeros(2, 2, 3, 9, 13)),
        bad(attn_mask=torch.zeros(9, 13, dtype=torch.int32)),
        bad(attn_mask=mask_f64),
        bad(attn_mask=torch.zeros(9, 13), is_causal=True),
        bad(attn_mask=1),
        bad(scale="a"),
        bad(is_causal="a"),
        bad(key=torch.zeros(2, 2, 13, 8), value=torch.zeros(2, 2, 13, 5), enable_gqa=True),
    ],
    ids=lambda a: ", ".join(k for k in a if a[k] is not None),
)
def test_errors_are_pytorchs(arguments):
    with pytest.raises((TypeError, RuntimeError, ValueError)) as theirs:
        F.scaled_dot_product_attention(**arguments)
    state = torch.get_rng_state()
    with pytest.raises(theirs.type):
        attention(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dropout_p": -0.1}, ValueError, "has to be between 0 and 1, but got -0.1"),
        ({"dropout_p": 1.5}, ValueError, "has to be between 0 and 1, but got 1.5"),
        ({"dropout_p": float("nan")}, ValueError, "has to be between 0 and 1, but got nan"),
        ({"dropout_p": "a"}, TypeError, "'dropout_p' must be float, not str"),
        ({"dropout_key": 3}, TypeError, "'dropout_key' must be a Tensor"),
        ({"dropout_key": torch.zeros(2)}, TypeError, "'dropout_key' has dtype torch.float32"),
        ({"dropout_key": make_key()[:1]}, ValueError, r"'dropout_key' has shape \(1,\)"),
        ({"dropout_key": make_key().expand(3, 2)}, ValueError, r"has shape \(3, 2\).*\(2, 2\)"),
        ({"generator": 3}, TypeError, "'generator' must be torch.Generator, not int"),
        (
            {"dropout_key": make_key(), "generator": torch.Generator()},
            ValueError,
            "'dropout_key' and 'generator' exclude each other",
        ),
    ],
)
def test_errors_of_our_own(changes, error, message):
    with pytest.raises(error, match=message):
        attention(**bad(**changes))


@pytest.mark.parametrize(
    "query",
    [
        torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=torch.jagged),
        torch.zeros(2, 4, 4).to_sparse(),
        torch.zeros(2, 4, 4, dtype=torch.int64),
        torch.zeros(2, 4, 4, dtype=torch.complex64),
    ],
    ids=["nested", "sparse", "integer", "complex"],
)
def test_what_no_kernel_takes(query):
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        attention(query, query, query, dropout_p=P)


def test_the_operator_checks_its_arguments(key):
    op = torch.ops.dropout_ext.attention
    query, k, value = inputs(requires_grad=False)
    rest = (None, key, P, False, None)
    for arguments in [
        (query, k[..., :4], value, *rest),
        (query, k, value[:, :, :5], *rest),
        (query, k[:1], value[:1], *rest),
        (query, k[:, :2], value[:, :2], *rest),
        (query, k[0], value, *rest),
        (query, k.double(), value, *rest),
        (query.int(), k.int(), value.int(), *rest),
        (query[0, 0, 0], k[0, 0, 0], value[0, 0, 0], *rest),
        (query, k, value, mask_f64, *rest[1:]),
        (query, k, value, None, key, 2.0, False, None),
        (query[0, 0], k[0, 0], value[0, 0], None, key.expand(9, 2), P, False, None),
    ]:
        with pytest.raises(ValueError, match=r"attention|between 0 and 1"):
            op(*arguments)
    with pytest.raises(RuntimeError, match="expand"):
        op(query, k, value, torch.zeros(8, 13), *rest[1:])
    out, remainder, statistics = op(query, k, value, *rest)
    backward = torch.ops.dropout_ext.attention_backward
    saved = (query, k, value, None, out, remainder, statistics)
    for n, other in [(0, out[:1]), (5, out[..., :2]), (7, statistics[..., :1])]:
        arguments = [out, *saved]
        arguments[n] = other
        with pytest.raises(ValueError, match="attention_backward"):
            backward(*arguments, key, P, False, None)


# Keys.


def test_the_key_is_drawn_as_dropout_draws_its():
    tensors = inputs(requires_grad=False)
    torch.manual_seed(3)
    ours = [attention(*tensors, None, P), torch.rand(1)]
    torch.manual_seed(3)
    weights = (tensors[0] @ tensors[1].transpose(-2, -1) * 8**-0.5).softmax(-1)
    composed = [dropout_ext.dropout(weights, P) @ tensors[2], torch.rand(1)]
    torch.testing.assert_close(ours, composed)
    generator = torch.Generator().manual_seed(3)
    assert_same_bits(attention(*tensors, None, P, generator=generator), ours[0])
    assert not torch.equal(attention(*tensors, None, P, generator=generator), ours[0])


def test_a_key_draws_nothing(key):
    state = torch.get_rng_state()
    tensors = inputs(requires_grad=False)
    first = attention(*tensors, None, P, dropout_key=key)
    assert_same_bits(attention(*tensors, None, P, dropout_key=key.view(torch.int64)), first)
    assert torch.equal(torch.get_rng_state(), state)


# Threads, variants, memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_number_of_threads_changes_no_bit(dtype, is_causal, threads, key):
    """Long enough that heads are split into ranges, which one head of 1,100 is into two."""
    tensors = inputs((1, 1), 1100, 1050, 16, 16, dtype)
    grad = random_tensor((1, 1, 1100, 16), dtype, 5)

    def with_threads(n):
        threads(n)
        return results(lambda *t: attention(*t, None, P, is_causal, dropout_key=key), tensors, grad)

    expected = with_threads(1)
    for n in (2, 3):
        for a, b in zip(with_threads(n), expected, strict=True):
            assert_same_bits(a, b)


VARIANT = """
import sys
sys.path.insert(0, "tests")
import torch
from helpers import make_key, random_tensor
import dropout_ext
results = []
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for length, keys, size, value_size in ((9, 13, 8, 5), (110, 150, 64, 40), (33, 300, 100, 16)):
        shapes = [(2, length, size), (2, keys, size), (2, keys, value_size)]
        tensors = [random_tensor(s, dtype, n).requires_grad_() for n, s in enumerate(shapes)]
        mask = random_tensor((length, keys), seed=3) > -1
        out = dropout_ext.functional.scaled_dot_product_attention(
            *tensors, mask, 0.3, dropout_key=make_key()
        )
        grad = random_tensor(out.shape, dtype, 4)
        results += [out.detach(), *torch.autograd.grad(out, tensors, grad)]
torch.save(results, sys.argv[1] if len(sys.argv) > 1 else {path!r})
"""


def test_variants(tmp_path):
    """Of one instruction set or another: equal but for rounding; to the bit where both have a fused
    multiply-add.
    """
    found = {}
    for variant in dropout_ext.build_info()["cpu_variants"]:
        path = str(tmp_path / variant)
        run_python(VARIANT.replace("{path!r}", repr(path)), DROPOUT_EXT_CPU_VARIANT=variant)
        found[variant] = torch.load(path)
    for variant, tensors in found.items():
        for a, b in zip(tensors, found["portable"], strict=True):
            torch.testing.assert_close(a, b)
        if variant == "avx512":
            for a, b in zip(tensors, found["avx2"], strict=True):
                assert_same_bits(a, b)


def test_no_matrix_is_allocated_or_saved(key):
    length = 4096
    query, k, value = inputs((1,), length, length, 16, 16)
    saved = []
    with (
        torch.profiler.profile(profile_memory=True) as profile,
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.nbytes) or t, lambda t: t
        ),
    ):
        attention(query, k, value, None, P, dropout_key=key).sum().backward()
    matrix = length * length
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < matrix  # a byte per weight
    assert sum(saved) < 6 * query.nbytes


# What PyTorch's function composes with.


def composed(query, k, value, dropout_key):
    weights = (query @ k.transpose(-2, -1) * query.size(-1) ** -0.5).softmax(-1)
    return dropout_ext.dropout(weights, P, key=dropout_key) @ value


def test_functorch(key):
    tensors = [t.double().detach() for t in inputs((2,))]
    tangents = tuple(random_tensor(t.shape, torch.float64, 9) for t in tensors)

    def ours(*t):
        return attention(*t, None, P, dropout_key=key)

    def theirs(*t):
        return composed(*t, key)

    for transform in (
        lambda f: torch.func.grad(lambda *t: f(*t).sum(), (0, 1, 2))(*tensors),
        lambda f: torch.func.jvp(f, tuple(tensors), tangents),
        lambda f: torch.func.jacrev(f, (0, 2))(*tensors),
        lambda f: torch.func.vmap(f, (0, 0, None))(tensors[0], tensors[1], tensors[2][0]),
        lambda f: torch.func.vmap(torch.func.grad(lambda *t: f(*t).sum()))(*tensors),
        lambda f: torch.func.grad(
            lambda q: torch.func.vmap(f, (0, None, None))(q, tensors[1][0], tensors[2][0]).sum()
        )(tensors[0]),
        lambda f: torch.func.hessian(lambda q: f(q, *tensors[1:]).square().sum())(tensors[0]),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


def test_vmap_over_keys():
    query, k, value = inputs((), requires_grad=False)
    keys = torch.stack([make_key(1), make_key(2)])
    out = torch.func.vmap(lambda n: attention(query, k, value, None, P, dropout_key=n))(keys)
    for n in range(2):
        expected = attention(query, k, value, None, P, dropout_key=keys[n])
        torch.testing.assert_close(out[n], expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_by_its_randomness(randomness):
    query, k, value = (t[0].expand_as(t) for t in inputs((4,), requires_grad=False))
    out = torch.func.vmap(lambda *t: attention(*t, None, 0.5), randomness=randomness)(
        query, k, value
    )
    assert torch.equal(out[0], out[1]) == (randomness == "same")


def test_forward_mode(key):
    tensors = [t.double().detach() for t in inputs((2,))]
    tangent = random_tensor(tensors[1].shape, torch.float64, 9)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[1], tangent)
        ours = attention(tensors[0], dual, tensors[2], None, P, dropout_key=key)
        theirs = composed(tensors[0], dual, tensors[2], key)
        torch.testing.assert_close(forward_ad.unpack_dual(ours), forward_ad.unpack_dual(theirs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic, key):
    def function(query, k, value, mask, dropout_key):
        out = attention(query * 2, k, value, mask, P, dropout_key=dropout_key)
        return attention(out, out, out, None, P, True, dropout_key=dropout_key)

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 17, 40) if dynamic else (9, 9):
            tensors = inputs((2, 3), length, length + 4, value_size=8)
            mask = random_tensor((length, length + 4), seed=8) > 0
            grad = random_tensor((2, 3, length, 8), seed=6)
            ours = results(lambda *t: compiled(*t, mask, key), tensors, grad)  # noqa: B023
            theirs = results(lambda *t: function(*t, mask, key), tensors, grad)  # noqa: B023
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


def test_compiled_calls_draw_fresh_masks():
    value = torch.eye(64).expand(2, 64, 64)

    def function(query):
        both = [attention(query, query, value, None, 0.5) for _ in range(2)]
        return torch.stack(both)

    compiled = torch.compile(function, fullgraph=True)
    kept = [compiled(torch.zeros(2, 64, 4)) != 0 for _ in range(2)]
    masks = [*kept[0], *kept[1]]
    n = masks[0].numel()
    for i in range(4):
        for j in range(i):
            assert abs((masks[i] ^ masks[j]).sum().item() - n / 2) < 5 * n**0.5 / 2


def test_compiled_functorch(key):
    def function(query, k, value):
        gradient = torch.func.grad(lambda q: attention(q, k, value, None, P, dropout_key=key).sum())
        return gradient(query)

    tensors = inputs(requires_grad=False)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


class Model(torch.nn.Module):
    def forward(self, query, key, value, dropout_key):
        return attention(query, key, value, None, P, dropout_key=dropout_key)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, key):
    tensors = inputs(requires_grad=False)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    shapes = (batch, batch, batch, None)
    program = torch.export.export(Model(), (*tensors, key), strict=strict, dynamic_shapes=shapes)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "dropout_ext.attention.default" in targets
    other = [t.repeat(3, 1, 1, 1)[:5] for t in tensors]
    assert_same_bits(program.module()(*other, key), Model()(*other, key))
    decomposed = program.run_decompositions().module()
    assert_same_bits(decomposed(*other, key), Model()(*other, key))


def test_jit_trace(key):
    tensors = inputs(requires_grad=False)
    traced = torch.jit.trace(Model(), (*tensors, key), check_trace=False)
    assert_same_bits(traced(*tensors, key), Model()(*tensors, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_fake_tensors(dtype, dim, key):
    """Shapes, strides and dtypes of the output and of the gradients are the real ones."""
    grad = torch.ones(*(2, 3, 2)[: dim - 2], 9, 5)
    tensors = inputs((2, 3, 2)[: dim - 2], dtype=dtype)
    plain = [t.detach() for t in tensors]
    real = results(lambda *t: attention(*t, None, P, dropout_key=key), tensors, grad)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t).requires_grad_() for t in plain]
        fake = results(
            lambda *t: attention(*t, None, P, dropout_key=mode.from_tensor(key)), fakes,
            mode.from_tensor(grad),
        )  # fmt: skip
        drawn = attention(*fakes, None, P)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    assert drawn.shape == real[0].shape


def test_meta_tensors():
    tensors = [t.to("meta") for t in inputs(requires_grad=False)]
    assert attention(*tensors, None, P).shape == (2, 3, 9, 5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    tensors = inputs()
    grad = random_tensor((2, 3, 9, 5), seed=4)

    def function(query, k, value):
        return attention(query * 2, k, value, None, P)

    torch.manual_seed(5)
    expected = results(function, tensors, grad)
    torch.manual_seed(5)
    out = checkpoint(function, *tensors, use_reentrant=use_reentrant)
    out.backward(grad)
    for a, b in zip([out, *(t.grad for t in tensors)], expected, strict=True):
        assert_same_bits(a.detach(), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(dtype, key):
    """As PyTorch's function: in the dtype of autocast, a float mask too, but for float64."""
    tensors = [t.detach().to(dtype).requires_grad_() for t in inputs()]
    mask = random_tensor((9, 13), dtype, 3)
    lower = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*tensors, mask, P, dropout_key=key)
        assert out.dtype == F.scaled_dot_product_attention(*tensors, mask, P).dtype == lower
    cast = [t.to(lower) for t in (*tensors, mask)]
    assert_same_bits(out.detach(), attention(*cast, P, dropout_key=key).detach())
    out.sum().backward()
    assert all(t.grad.dtype == dtype for t in tensors)


def test_inference_mode(key):
    tensors = inputs(requires_grad=False)
    with torch.inference_mode():
        inside = attention(*tensors, None, P, dropout_key=key)
    assert_same_bits(inside.clone(), attention(*tensors, None, P, dropout_key=key))


def test_opcheck(key):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs((2, 2), 5, 6, 4, 3, dtype)
        torch.library.opcheck(
            torch.ops.dropout_ext.attention, (*tensors, None, key, P, False, None)
        )
    tensors = inputs((), 5, 6, 4, 3)
    mask = torch.ones(5, 6, dtype=torch.bool)
    torch.library.opcheck(torch.ops.dropout_ext.attention, (*tensors, mask, key, P, False, 0.3))


def test_subclasses_are_asked(key):
    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is attention:
                return args, kwargs
            return super().__torch_function__(func, types, args, kwargs)

    query, k, value = inputs(requires_grad=False)
    args, kwargs = attention(query, k, value.as_subclass(Subclass), dropout_p=P, dropout_key=key)
    assert [id(a) for a in args[:2]] == [id(query), id(k)]
    assert kwargs["dropout_p"] == P
    assert kwargs["dropout_key"] is key


def test_saved_tensor_hooks_and_a_freed_graph(key):
    tensors = inputs()
    with torch.autograd.graph.save_on_cpu():
        out = attention(*tensors, None, P, dropout_key=key)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    first = [t.grad for t in tensors]
    again = torch.autograd.grad(attention(*tensors, None, P, dropout_key=key).sum(), tensors)
    for a, b in zip(first, again, strict=True):
        assert_same_bits(a, b)


def test_an_input_changed_in_place_is_noticed(key):
    query, k, value = inputs()
    shifted = k + 1
    out = attention(query, shifted, value, None, P, dropout_key=key)
    shifted.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()
