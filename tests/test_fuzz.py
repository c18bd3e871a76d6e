"""Random calls of the whole family against the reference: values, gradient, memory, generators.

DROPOUT_EXT_FUZZ is a number of calls for a longer run, with others every time (make fuzz).
"""

import os
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from family import ALPHA_MEMBERS, MEMBERS, SELU_LIMIT, expected_output, silently
from helpers import (
    ALL_DTYPES,
    FLOAT_DTYPES,
    LAYOUTS,
    SHARED_LAYOUTS,
    assert_same_bits,
    bits,
    broadcast_strides,
    make_key,
    random_tensor,
    scaled_where,
)
from hypothesis import given, settings

from dropout_ext import _reference as reference
from dropout_ext import functional

CALLS = int(os.environ.get("DROPOUT_EXT_FUZZ", "0"))

ALL_LAYOUTS = LAYOUTS | SHARED_LAYOUTS
LAZY = {
    "plain": lambda x: x,
    "negative": torch._neg_view,
    "conjugate": torch.conj,
    "negative of conjugate": lambda x: torch._neg_view(x.conj()),
}
# About the thresholds 0, 1, 2^31 and 2^32 of the mask, and of its scale.
EDGES = [0.0, 2.0**-34, 2.0**-33, 2.0**-32, 0.5 - 2.0**-33, 0.5, 0.5 + 2.0**-33]
EDGES += [1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-34, 1 - 2.0**-53, 1.0]
probabilities = st.sampled_from(EDGES) | st.floats(0, 1)

words = st.integers(0, 2**64 - 1)
BORDERS = [0, 2**32, 2**62, 2**63, 2**64]
indices = (
    st.integers(-100, 100)
    | st.integers(-(2**64), 2**64)
    | st.builds(lambda a, b, sign: sign * (a + b), st.sampled_from(BORDERS), st.integers(-9, 9),
                st.sampled_from([-1, 1]))
)  # fmt: skip

SINGLE_KEYS = ["uint64", "int64", "strided"]
BATCHED_KEYS = ["batched", "batched int64", "batched transposed"]
DRAWN_KEYS = ["drawn", "generator"]


@dataclass
class Call:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    lazy: str
    grad_layout: str
    grad_lazy: str
    p: float
    training: bool
    inplace: bool
    requires_grad: bool
    key: str
    seed: int
    offset: int
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def calls(draw) -> Call:
    name = draw(st.sampled_from([*MEMBERS, *ALPHA_MEMBERS]))
    ranks = (MEMBERS | ALPHA_MEMBERS)[name][4]
    rank = draw(st.sampled_from(ranks))
    sizes = st.integers(1, 5) if rank > 3 else st.integers(1, 9) | st.sampled_from([16, 41, 130])
    if draw(st.integers(0, 9)) == 0:
        sizes = st.integers(0, 2)
    dtype = draw(st.sampled_from(FLOAT_DTYPES if name in ALPHA_MEMBERS else ALL_DTYPES))
    lazy = st.sampled_from([*LAZY] if dtype.is_complex else ["plain", "negative"])
    inplace = draw(st.booleans())
    options = {}
    if name == "dropout":
        kind = draw(st.sampled_from(["plain", "shared", "strided"]))
        if kind == "shared":
            dims = st.integers(-rank, rank - 1) if rank else st.nothing()
            options["broadcast_dims"] = draw(st.lists(dims, max_size=rank))
        elif kind == "strided":
            options["mask_strides"] = draw(st.lists(indices, min_size=rank, max_size=rank))
        if draw(st.booleans()):
            options["mask_offset"] = draw(indices)
    elif name == "locked_dropout":
        options["dim"] = draw(st.integers(-rank, rank - 1))
    elif name == "drop_path":
        options["scale_by_keep"] = draw(st.booleans())
    return Call(
        name=name,
        shape=tuple(draw(st.lists(sizes, min_size=rank, max_size=rank))),
        dtype=dtype,
        layout=draw(st.sampled_from([*LAYOUTS] if inplace else [*ALL_LAYOUTS])),
        lazy=draw(lazy),
        grad_layout=draw(st.sampled_from([*ALL_LAYOUTS])),
        grad_lazy=draw(lazy),
        p=draw(probabilities),
        training=draw(st.integers(0, 9)) > 0,
        inplace=inplace,
        requires_grad=draw(st.booleans()),
        key=draw(st.sampled_from(SINGLE_KEYS + DRAWN_KEYS + (BATCHED_KEYS if rank else []))),
        seed=draw(words),
        offset=draw(words),
        options=options,
    )


def arrange(layout: str, lazy: str, x: torch.Tensor) -> torch.Tensor:
    if layout in SHARED_LAYOUTS and (x.dim() == 0 or x.numel() == 0):
        layout = "contiguous"
    return LAZY[lazy](ALL_LAYOUTS[layout](x))


def make_source(call: Call) -> tuple[dict[str, Any], torch.Tensor]:
    """What decides the mask, as the call has it, and the key that this is."""
    if call.key in DRAWN_KEYS:
        torch.manual_seed(call.seed)
        generator = torch.Generator().manual_seed(call.seed)
        same = torch.Generator().manual_seed(call.seed)
        drawn = [torch.randint(0, 2**63 - 1, (1,), generator=same) for _ in range(2)]
        source = {"generator": generator} if call.key == "generator" else {}
        return source, torch.cat(drawn).bitwise_not()
    key = make_key(call.seed, call.offset)
    if call.key in BATCHED_KEYS:
        key = reference.split(key, call.shape[0])
    forms = {
        "int64": lambda k: k.view(torch.int64),
        "batched int64": lambda k: k.view(torch.int64),
        "strided": lambda k: torch.stack([k, k], 1)[:, 1],
        "batched transposed": lambda k: k.view(torch.int64).t().contiguous().view(k.dtype).t(),
    }
    return {"key": forms.get(call.key, lambda k: k)(key)}, key


def mask_strides(call: Call) -> list[int]:
    rank = len(call.shape)
    if "mask_strides" in call.options:
        return call.options["mask_strides"]
    if call.name == "dropout":
        shared = call.options.get("broadcast_dims", ())
    elif call.name == "locked_dropout":
        shared = (call.options["dim"],)
    else:
        shared = (MEMBERS | ALPHA_MEMBERS)[call.name][3](rank)
    return broadcast_strides(call.shape, shared)


def expected(call: Call, keep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().resolve_conj().resolve_neg()
    if not call.options.get("scale_by_keep", True):
        return scaled_where(keep, x, 1.0)
    return expected_output(call.name, keep, x, call.p)


def assert_expected(call: Call, actual: torch.Tensor, want: torch.Tensor, size) -> None:
    """Bit by bit; the alpha functions to four roundings of numbers of this size times their a."""
    if call.dtype.is_complex and "negative" in call.lazy + call.grad_lazy:
        # PyTorch's negation of a complex zero has either sign.
        actual, want = actual + 0, want + 0
    if call.name not in ALPHA_MEMBERS or call.p == 1:
        assert_same_bits(actual, want)
        return
    assert actual.dtype == want.dtype and actual.shape == want.shape
    a = ((1 - call.p) * (1 + call.p * SELU_LIMIT**2)) ** -0.5
    info = torch.finfo(call.dtype)
    allowed = 4 * info.eps * (a * size.double() + info.smallest_normal)
    actual, want = actual.detach().double(), want.detach().double()
    equal = (actual == want) | (actual.isnan() & want.isnan())
    assert bool((equal | ((actual - want).abs() <= allowed)).all())


@settings(
    max_examples=CALLS or 400, derandomize=not CALLS, deadline=None, print_blob=True, database=None
)
@given(calls())
def test_call(call):
    name, p = call.name, call.p
    values = random_tensor(call.shape, call.dtype, call.seed % 1000, name not in ALPHA_MEMBERS)
    source, key = make_source(call)
    if call.inplace:
        leaf = values.clone().requires_grad_(call.requires_grad)
        x = arrange(call.layout, call.lazy, leaf.clone())
    else:
        leaf = x = arrange(call.layout, call.lazy, values).requires_grad_(call.requires_grad)
    before, version = bits(x).clone(), x._version
    generators = [
        torch.default_generator,
        *([source["generator"]] if "generator" in source else []),
    ]
    states = [generator.get_state() for generator in generators]

    arguments = {"drop_prob" if name == "drop_path" else "p": p, "training": call.training}
    function = getattr(functional, name)
    y = silently(function, x, inplace=call.inplace, **arguments, **source, **call.options)

    identity = not call.training or p == 0 or x.numel() == 0
    draws = "key" not in source and p < 1 and not identity
    for generator, state in zip(generators, states, strict=True):
        same = torch.Generator().set_state(state)
        if draws and generator is generators[-1]:
            for _ in range(2):
                torch.randint(0, 2**63 - 1, (1,), generator=same)
        assert torch.equal(generator.get_state(), same.get_state())

    assert (y is x) == (identity or call.inplace)
    if identity or not call.inplace:
        assert torch.equal(bits(x), before) and x._version == version
    if identity:
        return
    if not call.inplace:
        assert y.stride() == torch.empty_like(x).stride()
        assert not (y.is_conj() or y.is_neg())

    offset = call.options.get("mask_offset", 0)
    keep = reference.keep_mask(key, p, call.shape, mask_strides(call), offset)
    theirs = arrange(call.layout, call.lazy, values).requires_grad_(call.requires_grad)
    want = expected(call, keep, theirs)
    assert_expected(call, y, want, values.abs() - SELU_LIMIT)

    assert y.requires_grad == call.requires_grad
    if call.requires_grad:
        special = random_tensor(call.shape, call.dtype, call.seed % 999 + 1, special=True)
        grad = arrange(call.grad_layout, call.grad_lazy, special)
        (actual,) = torch.autograd.grad(y, leaf, grad)
        (want,) = torch.autograd.grad(want, theirs, grad)
        if call.inplace:
            want = LAZY[call.lazy](want)
        assert_expected(call, actual, want, grad.abs())
