"""Dropout fused with residual, norm and activation: bits against the reference, errors against
float64, gradients, transforms, layouts, wrong input.
"""

import copy
import os
import subprocess
import sys

import fused_reference
import pytest
import torch
import torch.nn.functional as F
from fused_reference import PAIRS
from helpers import (
    LAYOUTS,
    ROOT,
    SHARED_LAYOUTS,
    assert_same_bits,
    broadcast_strides,
    make_key,
    random_tensor,
)
from torch import nn

import dropout_ext
from dropout_ext import _reference as reference
from dropout_ext.fused import _rows

HIDDEN = [1, 7, 8, 16, 33, 64, 128, 200, 768, 1024, 4099]
KEY = make_key(7, 11)
P, SCALE = 0.3, 1 / 0.7


def keep_of(shape, strides=(), offset=0, key=KEY, p=P):
    return reference.keep_mask(key, p, shape, strides, offset)


def rows(shape, dtype, seed, special=False):
    return random_tensor(shape, dtype, seed, special)


def reference_sum(x, r, dtype, key=KEY, **given):
    return fused_reference.add(x, r, dtype, key, P, **given)


def exact(x, r, weight, bias, dims, *, rms=False, eps=1e-5, keep=None, p=P):
    """(z, s) in float64 of tensors that require grad."""
    t = x.double()
    s = torch.where(keep, t, 0) / (1 - p) if keep is not None else t
    s = s if r is None else s + r.double()
    shape = x.shape[-dims:]
    w = None if weight is None else weight.double()
    b = None if bias is None else bias.double()
    z = F.rms_norm(s, shape, w, eps) if rms else F.layer_norm(s, shape, w, b, eps)
    return z, s


def error(actual, expected):
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


# The sum


@pytest.mark.parametrize(("dtype", "sum_dtype"), PAIRS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_sum_bits(dtype, sum_dtype, hidden):
    x, r = rows((3, hidden), dtype, 1, True), rows((3, hidden), sum_dtype, 2, True)
    out = dropout_ext.dropout_add(x, r, P, key=KEY)
    assert_same_bits(out, reference_sum(x, r, sum_dtype))
    _, s = dropout_ext.dropout_add_layer_norm(x, r, hidden, p=P, key=KEY, return_sum=True)
    assert_same_bits(s, out)
    _, s = dropout_ext.dropout_add_rms_norm(x, r, hidden, p=P, key=KEY, return_sum=True)
    assert_same_bits(s, out)


@pytest.mark.parametrize(("dtype", "sum_dtype"), PAIRS)
@pytest.mark.parametrize("hidden", [33, 256])
def test_sum_bits_with_scales(dtype, sum_dtype, hidden):
    x, r = rows((5, hidden), dtype, 1, True), rows((5, hidden), sum_dtype, 2, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {
        "bias": rows((hidden,), dtype, 3),
        "colscale": rows((hidden,), wide, 4),
        "rowscale": rows((5,), wide, 5),
    }
    for names in (["bias"], ["colscale"], ["rowscale"], list(given)):
        some = {name: given[name] for name in names}
        public = {"input_bias" if n == "bias" else n: v for n, v in some.items()}
        out = dropout_ext.dropout_add(x, r, P, key=KEY, **public)
        assert_same_bits(out, reference_sum(x, r, sum_dtype, **some))
        _, s = dropout_ext.dropout_add_layer_norm(
            x, r, hidden, p=P, key=KEY, return_sum=True, **public
        )
        assert_same_bits(s, out)


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED_LAYOUTS])
@pytest.mark.parametrize("other", ["contiguous", "channels_last", "expanded_first"])
def test_sum_layouts(layout, other):
    layouts = LAYOUTS | SHARED_LAYOUTS
    x = layouts[layout](rows((2, 3, 5, 7), torch.float32, 1, True))
    r = layouts[other](rows((2, 3, 5, 7), torch.float32, 2, True))
    out = dropout_ext.dropout_add(x, r, P, key=KEY)
    assert_same_bits(out, reference_sum(x, r, torch.float32))
    assert out.stride() == torch.empty_like(x).stride()
    half = dropout_ext.dropout_add(x.bfloat16(), r, P, key=KEY)
    assert_same_bits(half, reference_sum(x.bfloat16(), r, torch.float32))
    _, s = dropout_ext.dropout_add_layer_norm(x, r, (5, 7), p=P, key=KEY, return_sum=True)
    assert_same_bits(s, out.contiguous())


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("norm_dims", [1, 2])
def test_shared_masks(dims, norm_dims):
    shape = (6, 9, 40)
    x, r = rows(shape, torch.bfloat16, 1), rows(shape, torch.bfloat16, 2)
    strides = broadcast_strides(shape, dims)
    expected = reference_sum(x, r, torch.bfloat16, strides=strides)
    out = dropout_ext.dropout_add(x, r, P, key=KEY, broadcast_dims=dims)
    assert_same_bits(out, expected)
    _, s = dropout_ext.dropout_add_layer_norm(
        x, r, shape[-norm_dims:], p=P, key=KEY, broadcast_dims=dims, return_sum=True
    )
    assert_same_bits(s, expected)


@pytest.mark.parametrize(
    ("strides", "offset"),
    [((1000, 40, 1), 3), ((1, 6, 54), 0), ((2**33, 80, 2), 2**63), ((-360, -40, -1), -77)],
)
def test_mask_strides(strides, offset):
    shape = (6, 9, 40)
    x, r = rows(shape, torch.float32, 1), rows(shape, torch.float32, 2)
    expected = reference_sum(x, r, torch.float32, strides=strides, offset=offset)
    given = {"p": P, "key": KEY, "mask_strides": strides, "mask_offset": offset}
    assert_same_bits(dropout_ext.dropout_add(x, r, **given), expected)
    for shape_of_row in ((40,), (9, 40), (6, 9, 40)):
        _, s = dropout_ext.dropout_add_layer_norm(x, r, shape_of_row, return_sum=True, **given)
        assert_same_bits(s, expected)


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_rows_of_many_megabytes(offset):
    """Written past the caches where their vectors are aligned: as the same rows in small parts."""
    x, r = (rows((4100, 1024), torch.float32, i) for i in (1, 2))
    scale, weight = (rows((1024,), torch.float32, i) for i in (3, 4))

    def results(x, r, offset):
        x, r = x.clone().requires_grad_(), r.clone().requires_grad_()
        given = {"p": P, "key": KEY, "mask_offset": offset}
        z, s = dropout_ext.dropout_add_layer_norm(x, r, 1024, weight, return_sum=True, **given)
        grads = torch.autograd.grad(z, (x, r), z)
        with torch.no_grad():
            alone = dropout_ext.dropout_add_layer_norm(x, r, 1024, weight, **given)
            scaled = dropout_ext.dropout_add(x, r, colscale=scale, **given)
        return z, s, *grads, alone, scaled

    parts = [
        results(x[i : i + 410], r[i : i + 410], offset + i * 1024) for i in range(0, 4100, 410)
    ]
    for whole, *expected in zip(results(x, r, offset), *parts, strict=True):
        assert_same_bits(whole, torch.cat(expected))


@pytest.mark.parametrize(("dtype", "sum_dtype"), PAIRS)
@pytest.mark.parametrize("hidden", [1, 33, 128, 4099])
def test_norm_without_its_sum(dtype, sum_dtype, hidden):
    """Where nobody wants it, it is not stored: the same norm."""
    shape = (5, hidden)
    x, r = rows(shape, dtype, 1, True), rows(shape, sum_dtype, 2, True)
    arguments = (x, r, None, None, None, KEY.view(torch.int64), P, SCALE, [hidden, 1], 0, 1)
    arguments += (None, None, 1e-5, False, sum_dtype, dtype)
    op = torch.ops.dropout_ext.add_norm
    (z, s, *moments), (alone, none, *same) = (op(*arguments, stored) for stored in (True, False))
    assert s.shape == shape
    assert none.shape == (0,) and none.dtype == sum_dtype
    for a, b in zip((z, *moments), (alone, *same), strict=True):
        assert_same_bits(a, b)


def test_a_key_per_slice():
    x, r = rows((5, 4, 24), torch.float32, 1), rows((5, 4, 24), torch.float32, 2)
    keys = torch.stack([make_key(i, 3) for i in range(5)])
    _, s = dropout_ext.dropout_add_rms_norm(x, r, 24, p=P, key=keys, return_sum=True)
    assert_same_bits(s, reference_sum(x, r, torch.float32, key=keys))
    with pytest.raises(ValueError, match=r"'key' has shape \[5, 2\], but accepted is \(2,\)"):
        dropout_ext.dropout_add_layer_norm(x, r, (5, 4, 24), p=P, key=keys)


def test_zeros_keep_their_sign_as_in_pytorch():
    x, r = torch.zeros(64), torch.full((64,), -0.0)
    keep = keep_of((64,))
    expected = torch.where(keep, x, 0) * SCALE + r
    assert_same_bits(dropout_ext.dropout_add(x, r, P, key=KEY), expected)
    assert_same_bits(dropout_ext.dropout_add(-x, r, P, key=KEY), torch.where(keep, -x, 0) + r)


def test_dropped_nan_and_infinity_are_gone():
    x = torch.full((4, 32), torch.nan)
    out = dropout_ext.dropout_add(x, torch.ones(4, 32), P, key=KEY)
    assert torch.equal(out.isnan(), keep_of((4, 32)))
    assert (out[~keep_of((4, 32))] == 1).all()
    payload = torch.full((16,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    out = dropout_ext.dropout_add(payload, torch.ones(16).bfloat16(), 0.0, dtype=torch.bfloat16)
    assert out.isnan().all()


# Norms


@pytest.mark.parametrize(("dtype", "sum_dtype"), PAIRS)
@pytest.mark.parametrize("hidden", [1, 7, 64, 300, 1024, 4099])
@pytest.mark.parametrize("rms", [False, True])
def test_norm_and_gradients(dtype, sum_dtype, hidden, rms):
    """Error against float64 at most twice that of PyTorch's functions of the same dtypes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [rows((6, hidden), dtype, 1), rows((6, hidden), sum_dtype, 2),
              rows((hidden,), wide, 3), rows((hidden,), wide, 4)]  # fmt: skip
    if rms:
        leaves = leaves[:3]
    keep = keep_of((6, hidden))
    grads = rows((6, hidden), dtype, 5), rows((6, hidden), sum_dtype, 6)

    def ours(x, r, w, b=None):
        arguments = (x, r, hidden, w) if rms else (x, r, hidden, w, b)
        function = dropout_ext.dropout_add_rms_norm if rms else dropout_ext.dropout_add_layer_norm
        return function(*arguments, eps=1e-5, p=P, key=KEY, return_sum=True)

    def theirs(x, r, w, b=None):
        s = (torch.where(keep, x, 0) * SCALE).to(x.dtype) + r
        s = s.to(sum_dtype)
        y = s.to(wide)
        z = F.rms_norm(y, (hidden,), w, 1e-5) if rms else F.layer_norm(y, (hidden,), w, b)
        return z.to(dtype), s

    def float64(x, r, w, b=None):
        return exact(x, r, w, b, 1, rms=rms, keep=keep)

    results = []
    for function in (ours, theirs, float64):
        inputs = [leaf.double() if function is float64 else leaf for leaf in leaves]
        inputs = [leaf.clone().requires_grad_() for leaf in inputs]
        out = function(*inputs)
        given = [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]
        results.append([*out, *torch.autograd.grad(out, inputs, given)])
    for name, a, b, c in zip(["z", "s", "dx", "dr", "dw", "db"], *results, strict=False):
        assert a.dtype == b.dtype, name
        if dtype == torch.float64:  # what it is compared with has the same precision
            assert error(a, c) <= 1e-12 * (1 + c.abs().max()), name
            continue
        # Rounded once, each of the two may be off by half a place.
        floor = torch.finfo(b.dtype).eps * c.abs().max().item() if c.numel() else 0
        assert error(a, c) <= 2 * error(b, c) + floor, name


@pytest.mark.parametrize("rms", [False, True])
def test_a_mean_far_from_zero(rms):
    x = rows((8, 512), torch.float32, 1) + 1e4
    r = torch.zeros(8, 512)
    function = dropout_ext.dropout_add_rms_norm if rms else dropout_ext.dropout_add_layer_norm
    out = function(x, r, 512, training=False, eps=1e-5)
    expected, _ = exact(x, r, None, None, 1, rms=rms)
    plain = F.rms_norm(x, (512,), None, 1e-5) if rms else F.layer_norm(x, (512,))
    assert error(out, expected) <= 2 * error(plain, expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
def test_no_rows(shape):
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(shape[-1:], requires_grad=True)
    out = dropout_ext.dropout_add_layer_norm(x, torch.zeros(shape), shape[-1], weight)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape
    assert (weight.grad == 0).all()
    assert dropout_ext.dropout_add(x, torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_dropped_or_nothing_kept(p, training):
    x, r = rows((6, 40), torch.float32, 1), rows((6, 40), torch.float32, 2)
    x.requires_grad_()
    state = torch.get_rng_state()
    z, s = dropout_ext.dropout_add_layer_norm(x, r, 40, p=p, training=training, return_sum=True)
    out = dropout_ext.dropout_add(x, r, p, training)
    assert torch.equal(state, torch.get_rng_state())
    expected = r if training and p == 1 else x + r
    assert torch.equal(s, expected)
    assert torch.equal(out, expected)
    torch.testing.assert_close(z, F.layer_norm(expected, (40,)))
    (grad,) = torch.autograd.grad(out.sum() + s.sum(), x)
    assert (grad == (0 if training and p == 1 else 2)).all()


def test_without_a_residual():
    x = rows((6, 40), torch.float32, 1).requires_grad_()
    z, s = dropout_ext.dropout_add_layer_norm(x, None, 40, p=P, key=KEY, return_sum=True)
    assert_same_bits(s, dropout_ext.dropout(x, P, key=KEY))
    assert_same_bits(dropout_ext.dropout_add(x, None, P, key=KEY), s)
    torch.testing.assert_close(z, F.layer_norm(s, (40,)))
    (grad,) = torch.autograd.grad(s, x, torch.ones_like(s))
    assert_same_bits(grad, torch.where(keep_of((6, 40)), torch.tensor(SCALE), 0.0))


def test_draws_like_dropout():
    x, r = rows((6, 40), torch.float32, 1), torch.zeros(6, 40)
    torch.manual_seed(3)
    expected = dropout_ext.dropout(x, P)
    after = torch.get_rng_state()
    for call in (
        lambda: dropout_ext.dropout_add(x, r, P),
        lambda: dropout_ext.dropout_add_layer_norm(x, r, 40, p=P, return_sum=True)[1],
        lambda: dropout_ext.activation_dropout(x.abs(), "relu", P) * x.sign(),
    ):
        torch.manual_seed(3)
        assert torch.equal(call(), expected)
        assert torch.equal(torch.get_rng_state(), after)
    g = torch.Generator().manual_seed(5)
    h = torch.Generator().manual_seed(5)
    assert torch.equal(
        dropout_ext.dropout_add(x, r, P, generator=g), dropout_ext.dropout(x, P, generator=h)
    )


def test_every_cpu_variant_and_thread_count_agree(tmp_path):
    script = tmp_path / "digest.py"
    script.write_text(
        """
import hashlib, sys, torch, dropout_ext
torch.set_num_threads(int(sys.argv[1]))
key = torch.tensor([7, 11], dtype=torch.uint64)
digest = hashlib.sha256()
generator = torch.Generator().manual_seed(1)
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for shape in ((300, 40), (130, 1000)):
        make = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        leaves = [make(*shape), make(*shape), make(shape[1]), make(shape[1])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        x, r, w, b = leaves
        out = dropout_ext.dropout_add_layer_norm(x, r, shape[1], w, b, p=0.3, key=key)
        act = dropout_ext.activation_dropout(x, "gelu", 0.3, key=key)
        if dtype == torch.float64:
            act = dropout_ext.dropout_add(x, r, 0.3, key=key)
        grads = torch.autograd.grad([out, act], leaves, [make(*shape), make(*shape)])
        for tensor in (out, act, *grads):
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""
    )
    digests = set()
    for variant in dropout_ext.build_info()["cpu_variants"]:
        for threads in ("1", "2"):
            env = os.environ | {"DROPOUT_EXT_CPU_VARIANT": variant, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, str(script), threads]
            digests.add(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert len(digests) == 1


# Activations


def everything(dtype):
    """Every value of a 16-bit type; float32 over the exponents."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)
    return torch.cat([bits.view(torch.float32), torch.linspace(-12, 12, 50001)])


FUNCTIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
ACTIVATIONS = [("gelu", "none"), ("gelu", "tanh"), ("silu", "none"), ("relu", "none")]


@pytest.mark.parametrize(("name", "approximate"), ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activation_bits(name, approximate, dtype):
    x = everything(dtype).requires_grad_()
    grad = rows(x.shape, dtype, 3)
    function = _rows.ACTIVATIONS[name, approximate]
    arguments = (function, KEY, P, SCALE, [], 0)
    out = dropout_ext.activation_dropout(x, name, P, approximate=approximate, key=KEY)
    assert_same_bits(out, fused_reference.activation(x.detach(), *arguments))
    (dx,) = torch.autograd.grad(out, x, grad)
    assert_same_bits(dx, fused_reference.activation_backward(grad, x.detach(), *arguments))


@pytest.mark.parametrize(("name", "approximate"), ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_activation_error(name, approximate, dtype):
    """Against float64, at most twice that of PyTorch's activation in the same dtype."""
    call = F.gelu if name == "gelu" else FUNCTIONS[name]
    extra = {"approximate": approximate} if name == "gelu" else {}
    x = torch.linspace(-20, 20, 40001, dtype=torch.float64).to(dtype)
    grad = rows(x.shape, dtype, 3)
    keep = keep_of(x.shape)
    results = []
    for function, inner in (
        (lambda x: dropout_ext.activation_dropout(x, name, P, key=KEY, **extra), x),
        (lambda x: torch.where(keep, call(x, **extra) * SCALE, 0), x),
        (lambda x: torch.where(keep, call(x, **extra) * SCALE, 0), x.double()),
    ):
        leaf = inner.clone().requires_grad_()
        y = function(leaf)
        results.append([y, *torch.autograd.grad(y, leaf, grad.to(y.dtype))])
    for a, b, c in zip(*results, strict=True):
        assert error(a, c) <= 2 * error(b, c) + torch.finfo(dtype).tiny


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "strided", "expanded_last"])
def test_activation_layouts(layout):
    x = (LAYOUTS | SHARED_LAYOUTS)[layout](rows((2, 3, 5, 7), torch.float32, 1))
    arguments = (0, KEY, P, SCALE, broadcast_strides(x.shape, (1,)), 5)
    out = dropout_ext.activation_dropout(x, "gelu", P, key=KEY, broadcast_dims=(1,), mask_offset=5)
    assert_same_bits(out, fused_reference.activation(x, *arguments))
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    grad = LAYOUTS["reversed"](rows(x.shape, torch.float32, 2))
    out = dropout_ext.activation_dropout(
        leaf, "gelu", P, key=KEY, broadcast_dims=(1,), mask_offset=5
    )
    (dx,) = torch.autograd.grad(out, leaf, grad)
    assert_same_bits(dx, fused_reference.activation_backward(grad, x, *arguments))


def test_activation_at_the_edges():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1e30, -1e30])
    for name, approximate in ACTIVATIONS:
        out = dropout_ext.activation_dropout(x, name, 1e-12, approximate=approximate, key=KEY)
        assert out[0] == torch.inf
        assert out[2].isnan()
        assert (out[3:5] == 0).all()
        assert out[5] == x[5]
        assert out[6].abs() < 1e-5
    same = dropout_ext.activation_dropout(x, "gelu", P, training=False)
    assert_same_bits(same, F.gelu(x))
    assert (dropout_ext.activation_dropout(x, "gelu", 1.0) == 0).all()


def test_activation_with_bias():
    x, b = rows((4, 33), torch.float32, 1), rows((33,), torch.float32, 2).requires_grad_()
    out = dropout_ext.activation_dropout(x, "silu", P, input_bias=b, key=KEY)
    assert_same_bits(out, dropout_ext.activation_dropout(x + b, "silu", P, key=KEY))
    out.sum().backward()
    assert b.grad.shape == (33,)


# Differentiation and transforms


def float64_call(kind):
    w = rows((12,), torch.float64, 3)
    b, c = rows((12,), torch.float64, 4), rows((12,), torch.float64, 5)
    row = rows((5,), torch.float64, 6)
    calls = {
        "add": lambda x, r: dropout_ext.dropout_add(x, r, P, key=KEY),
        "add with scales": lambda x, r: dropout_ext.dropout_add(
            x, r, P, key=KEY, input_bias=b, colscale=c, rowscale=row
        ),
        "layer_norm": lambda x, r: dropout_ext.dropout_add_layer_norm(
            x, r, 12, w, b, p=P, key=KEY, return_sum=True
        ),
        "layer_norm with scales": lambda x, r: dropout_ext.dropout_add_layer_norm(
            x, r, 12, w, b, p=P, key=KEY, return_sum=True, input_bias=b, colscale=c, rowscale=row
        ),
        "rms_norm": lambda x, r: dropout_ext.dropout_add_rms_norm(
            x, r, 12, w, p=P, key=KEY, return_sum=True
        ),
        "gelu": lambda x, r: dropout_ext.activation_dropout(x + r, "gelu", P, key=KEY),
    }
    return calls[kind]


KINDS = ["add", "add with scales", "layer_norm", "layer_norm with scales", "rms_norm", "gelu"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    inputs = [rows((5, 12), torch.float64, i).requires_grad_() for i in (1, 2)]
    torch.autograd.gradcheck(float64_call(kind), inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(float64_call(kind), inputs)


def test_gradcheck_of_parameters():
    x, r = rows((5, 12), torch.float64, 1), rows((5, 12), torch.float64, 2)
    parameters = [rows((12,), torch.float64, i).requires_grad_() for i in (3, 4, 5, 6)]

    def call(w, b, bias, colscale):
        return dropout_ext.dropout_add_layer_norm(
            x, r, 12, w, b, p=P, key=KEY, input_bias=bias, colscale=colscale
        )

    torch.autograd.gradcheck(call, parameters)
    torch.autograd.gradgradcheck(call, parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind):
    call = float64_call(kind)
    x, r = rows((3, 5, 12), torch.float64, 1), rows((3, 5, 12), torch.float64, 2)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    batched = torch.func.vmap(call)(x, r)
    each = [call(a, b) for a, b in zip(x, r, strict=True)]
    expected = [torch.stack([first(e) for e in each])]
    if isinstance(batched, tuple):
        expected.append(torch.stack([e[1] for e in each]))
    for a, b in zip(batched if isinstance(batched, tuple) else [batched], expected, strict=True):
        torch.testing.assert_close(a, b)

    def loss(a, b):
        return first(call(a, b)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, r)
    leaves = [x.clone().requires_grad_(), r.clone().requires_grad_()]
    total = sum(loss(a, b) for a, b in zip(*leaves, strict=True))
    for a, b in zip(grads, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b)


OPERATORS = {
    "add": (torch.ops.dropout_ext.add, torch.float32, ()),
    "layer_norm": (torch.ops.dropout_ext.add_norm, torch.float32, (1, True, 1e-5, False)),
    "rms_norm": (torch.ops.dropout_ext.add_norm, torch.float32, (1, True, 1e-5, True)),
}


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, keyed):
    op, dtype, norm = OPERATORS[name]
    x, r = (rows((4, 24), dtype, i).requires_grad_() for i in (1, 2))
    key = KEY.view(torch.int64) if keyed else None
    arguments = [x, r, None, None, None, key, P, SCALE, [24, 1], 0]
    if norm:
        weight = rows((24,), dtype, 3).requires_grad_()
        bias = None if norm[3] else rows((24,), dtype, 4).requires_grad_()
        arguments += [1, weight, bias, *norm[2:], dtype]
    for return_sum in ((True,), (False,)) if norm else ((),):
        torch.library.opcheck(op, (*arguments, dtype, *return_sum))


def test_opcheck_activation():
    x = rows((4, 24), torch.float32, 1).requires_grad_()
    key = KEY.view(torch.int64)
    torch.library.opcheck(torch.ops.dropout_ext.activation, (x, 0, key, P, SCALE, [24, 1], 0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    norm = dropout_ext.DropoutAddLayerNorm(32, p=P)

    def step(x, r, key):
        hidden = dropout_ext.activation_dropout(x, "gelu", P, key=key)
        return norm(hidden, dropout_ext.dropout_add(x, r, P, key=key), key=key)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (8, 12):
        leaves = [rows((n, 32), torch.float32, i).requires_grad_() for i in (1, 2)]
        expected = step(*leaves, KEY)
        out = compiled(*leaves, KEY)
        assert_same_bits(out, expected)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_draws_are_fresh():
    @torch.compile(fullgraph=True)
    def step(x):
        zeros = torch.zeros_like(x)
        return dropout_ext.dropout_add(x, zeros, P), dropout_ext.dropout_add(x, zeros, P)

    x = torch.ones(64, 64)
    a, b = step(x)
    assert not torch.equal(a, b)
    assert not torch.equal(a, step(x)[0])


def test_autocast_and_fake_tensors():
    norm = dropout_ext.DropoutAddLayerNorm(32, p=P)
    linear = nn.Linear(32, 32)
    x = rows((4, 32), torch.float32, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(linear(x), x)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        out, s = dropout_ext.dropout_add_layer_norm(
            fake.bfloat16(), fake, 32, p=P, return_sum=True, dtype=torch.float32
        )
        assert (out.dtype, s.dtype, out.shape) == (torch.float32, torch.float32, (4, 32))
        assert dropout_ext.activation_dropout(fake, "gelu", P).shape == (4, 32)
    meta = dropout_ext.dropout_add(x.to("meta"), x.to("meta"), P)
    assert meta.device.type == "meta"


def test_checkpoint():
    norm = dropout_ext.DropoutAddLayerNorm(32, p=P)
    x = rows((4, 32), torch.float32, 1).requires_grad_()
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(norm(x, x).square().sum(), x)
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(norm, x, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert_same_bits(grad, expected)


def test_what_is_saved():
    """The sum, its moments, the weight and the key; for the add the key alone."""
    x, r = (rows((64, 128), torch.float32, i).requires_grad_() for i in (1, 2))
    weight = nn.Parameter(torch.ones(128))
    saved = []

    def pack(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dropout_ext.dropout_add(x, r, P)
        assert saved == [16]
        saved.clear()
        dropout_ext.dropout_add_layer_norm(x, r, 128, weight, p=P)
    assert sorted(saved) == sorted([16, 64 * 128 * 4, 64 * 4, 64 * 4, 128 * 4])


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_what_an_activation_saves(activation):
    """Its input; relu what it returned, which the product that follows saves anyway."""
    x = rows((64, 128), torch.float32, 1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = dropout_ext.activation_dropout(x, activation, P)
    wanted = y if activation == "relu" else x
    assert {t.data_ptr() for t in saved if t.numel() > 2} == {wanted.data_ptr()}


def test_gradient_of_relu_from_its_output():
    """Values at which what is positive is a question."""
    tiny = torch.finfo(torch.float32).smallest_normal * 2**-23
    values = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0, torch.inf, -torch.inf])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = values.to(dtype).repeat(64).requires_grad_()
        y = dropout_ext.activation_dropout(x, "relu", P, key=KEY)
        (grad,) = torch.autograd.grad(y.sum(), x)
        keep = reference.keep_mask(KEY, P, x.shape)
        expected = torch.where(keep & (x > 0), torch.tensor(1 / (1 - P)), torch.tensor(0.0))
        assert torch.equal(grad, expected.to(dtype))


def test_nested_and_dtensor_are_composed(tmp_path):
    values = [rows((n, 16), torch.float32, n) for n in (3, 5)]
    nested = torch.nested.nested_tensor(values, layout=torch.jagged)
    out = dropout_ext.dropout_add_layer_norm(nested, nested, 16, p=P, key=KEY)
    flat = torch.cat(values)
    expected = dropout_ext.dropout_add_layer_norm(flat, flat, 16, p=P, key=KEY)
    torch.testing.assert_close(out.values(), expected)
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        cube, scale = rows((4, 4, 8), torch.bfloat16, 1), rows((4,), torch.float32, 2)
        whole = dropout_ext.dropout_add_layer_norm(cube, None, (4, 8), key=KEY, rowscale=scale)
        part = distribute_tensor(cube, mesh, [Shard(0)])
        out = dropout_ext.dropout_add_layer_norm(
            part, None, (4, 8), key=KEY, rowscale=distribute_tensor(scale, mesh, [Shard(0)])
        )
        torch.testing.assert_close(out.full_tensor(), whole)
        with pytest.raises(ValueError, match="cuts its rows"):
            dropout_ext.dropout_add_rms_norm(distribute_tensor(cube, mesh, [Shard(2)]), None, 8)
        with pytest.raises(ValueError, match="'residual' has shape"):
            dropout_ext.dropout_add(part, distribute_tensor(cube[0], mesh, [Shard(0)]))
        part = distribute_tensor(flat, mesh, [Shard(0)])
        out = dropout_ext.dropout_add(part, part, P, key=KEY)
        expected = dropout_ext.dropout_add(flat, flat, P, key=KEY)
        torch.testing.assert_close(out.full_tensor(), expected)
    finally:
        dist.destroy_process_group()


# Modules


def test_modules():
    norm = dropout_ext.DropoutAddLayerNorm(16, p=P, prenorm=True)
    assert isinstance(norm, nn.LayerNorm)
    plain = nn.LayerNorm(16)
    nn.init.normal_(plain.weight)
    norm.load_state_dict(plain.state_dict())
    x, r = rows((4, 16), torch.float32, 1), rows((4, 16), torch.float32, 2)
    z, s = norm.eval()(x, r)
    assert torch.equal(s, x + r)
    torch.testing.assert_close(z, plain(x + r))
    rms = dropout_ext.DropoutAddRMSNorm(16, p=P)
    assert set(rms.state_dict()) == set(nn.RMSNorm(16).state_dict())
    torch.testing.assert_close(rms.eval()(x, r), nn.RMSNorm(16)(x + r))
    for module in (norm, rms, dropout_ext.DropoutAdd(P), dropout_ext.ActivationDropout("gelu", P)):
        module.train()
        twin = copy.deepcopy(module)
        arguments = (x,) if isinstance(module, dropout_ext.ActivationDropout) else (x, r)
        a, b = module(*arguments, key=KEY), twin(*arguments, key=KEY)
        first = (lambda v: v[0]) if isinstance(a, tuple) else (lambda v: v)
        assert_same_bits(first(a), first(b))
        assert f"p={P}" in repr(module)
        module.generator = torch.Generator().manual_seed(0)
        assert not torch.equal(first(module(*arguments)), first(module(*arguments)))


def test_other_functions_know_the_modules():
    made = (
        dropout_ext.DropoutAdd(P),
        dropout_ext.ActivationDropout("relu", P),
        dropout_ext.DropoutAddLayerNorm(8, p=P),
        dropout_ext.DropoutAddRMSNorm(8, p=P),
    )
    model = nn.Sequential(*made).eval()
    assert [(row.p, row.state) for row in dropout_ext.dropout_summary(model)] == [
        (P, "converted")
    ] * len(made)
    assert dropout_ext.convert(model) is model
    assert tuple(model) == made
    with dropout_ext.monte_carlo(model):
        assert all(module.training for module in model)
    assert not any(module.training for module in model)


# Wrong input


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"residual": torch.zeros(4, 9)}, ValueError, r"'residual' has shape \[4, 9\]"),
        ({"residual": torch.zeros(1, 8)}, ValueError, "'residual' has shape"),
        ({"residual": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "float64"),
        ({"residual": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "int64"),
        ({"residual": torch.zeros(4, 8, device="meta")}, ValueError, "'residual' is on meta"),
        ({"residual": 3.0}, TypeError, "'residual' must be Tensor, not float"),
        ({"normalized_shape": 4}, ValueError, "'normalized_shape' is"),
        ({"normalized_shape": (8, 4)}, ValueError, "'normalized_shape' is"),
        ({"normalized_shape": (2, 4, 8)}, ValueError, "'normalized_shape' is"),
        ({"normalized_shape": ()}, ValueError, "'normalized_shape' is"),
        ({"weight": torch.ones(4)}, ValueError, r"'weight' has shape \[4\]"),
        ({"bias": torch.ones(8, dtype=torch.float64)}, TypeError, "'bias' has dtype"),
        ({"input_bias": torch.ones(4)}, ValueError, "'input_bias' has shape"),
        ({"colscale": torch.ones(1)}, ValueError, "'colscale' has shape"),
        ({"rowscale": torch.ones(8)}, ValueError, "'rowscale' has shape"),
        ({"dtype": torch.int32}, TypeError, "'dtype' has dtype torch.int32"),
        ({"dtype": "float"}, TypeError, "'dtype' must be torch.dtype, not str"),
        ({"sum_dtype": torch.bfloat16}, TypeError, "'sum_dtype' is torch.bfloat16"),
        ({"p": 1.5}, ValueError, "between 0 and 1, but got 1.5"),
        ({"p": "a"}, TypeError, "'p' must be float"),
        ({"eps": "a"}, TypeError, "'eps' must be float"),
        ({"eps": None}, TypeError, "'eps' must be float"),
        ({"normalized_shape": 8.0}, TypeError, "'normalized_shape' must be int"),
        ({"normalized_shape": [2**70]}, TypeError, "'normalized_shape' must be int"),
        ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "'key' has shape"),
        ({"key": 3}, TypeError, "'key' must be a Tensor"),
        ({"key": KEY, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"generator": 3}, TypeError, "'generator' must be torch.Generator"),
        ({"mask_strides": (1,)}, ValueError, "'mask_strides' has 1 entries"),
        ({"broadcast_dims": (5,)}, IndexError, "'broadcast_dims'"),
        ({"input": torch.zeros(4, 8, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"input": 3.0}, TypeError, "'input' must be Tensor, not float"),
    ],
)
def test_wrong_input(change, kind, text):
    arguments = {"input": torch.zeros(4, 8), "residual": torch.zeros(4, 8), "normalized_shape": 8}
    state = torch.get_rng_state()
    with pytest.raises(kind, match=text):
        dropout_ext.dropout_add_layer_norm(**arguments | change)
    assert torch.equal(state, torch.get_rng_state())
    norm = {"normalized_shape", "weight", "bias", "eps", "sum_dtype", "dtype"}
    if not norm & set(change):
        del arguments["normalized_shape"]
        with pytest.raises(kind, match=text):
            dropout_ext.dropout_add(**arguments | change)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("tanh",), "'activation' is 'tanh', but accepted are 'gelu', 'silu' and 'relu'"),
        ((None,), "'activation' is None"),
    ],
)
def test_wrong_activation(arguments, text):
    with pytest.raises(ValueError, match=text):
        dropout_ext.activation_dropout(torch.zeros(3), *arguments)
    with pytest.raises(ValueError, match="'approximate' is 'erf'"):
        dropout_ext.activation_dropout(torch.zeros(3), "gelu", approximate="erf")
    with pytest.raises(ValueError, match="'approximate' is 'tanh', but accepted are 'none'"):
        dropout_ext.ActivationDropout("relu", approximate="tanh")
    with pytest.raises(TypeError, match="'input'"):
        dropout_ext.activation_dropout(torch.zeros(3, dtype=torch.int64), "relu")


def test_16_bit_types_do_not_mix():
    x, r = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="float16 and bfloat16 together"):
        dropout_ext.dropout_add(x, r)


# One step beside the cases above


@pytest.mark.parametrize(
    ("dtype", "columns"),
    [(torch.float64, 24), (torch.float64, 32), (torch.float32, 48), (torch.bfloat16, 96)],
)
def test_outputs_beyond_the_cache(dtype, columns):
    """Written past the caches, in whole vectors, which rows may not be made of."""
    count = (2**24 + 4096) // (columns * dtype.itemsize) + 1
    x = random_tensor((4096, columns), dtype, 1).repeat(-(-count // 4096), 1)[:count]
    out = dropout_ext.dropout_add_layer_norm(x, None, columns, training=False)
    few = dropout_ext.dropout_add_layer_norm(x[-4097:], None, columns, training=False)
    assert_same_bits(out[-4097:], few)
    torch.testing.assert_close(out, F.layer_norm(x, (columns,)), rtol=0.02, atol=0.02)


def test_wrong_calls_of_the_operators():
    ops, x, ones = torch.ops.dropout_ext, torch.zeros(4, 8), torch.ones(4)

    def backward(key=KEY, p=0.5, strides=(), weight=None, dims=1, grad=x, total=x):
        wanted = [True] * 4
        return ops.add_norm_backward(
            grad, None, total, ones, ones, weight, key, p, 2.0, strides, 0, dims, False, wanted
        )

    assert [t.shape for t in backward()] == [(4, 8), (4, 8), (8,), (8,)]
    for arguments, kind in (
        ({"key": torch.zeros(0, dtype=torch.int64)}, ValueError),
        ({"key": torch.zeros(1, 2, dtype=torch.int64)}, ValueError),
        ({"key": torch.zeros(2)}, TypeError),
        ({"key": torch.zeros(2, dtype=torch.int64).to_sparse()}, TypeError),
        ({"strides": [1]}, ValueError),
        ({"p": -1.0}, ValueError),
        ({"p": float("nan")}, ValueError),
        ({"weight": torch.ones(8, dtype=torch.int32)}, TypeError),
        ({"weight": torch.ones(8, device="meta")}, ValueError),
        ({"weight": torch.ones(4)}, ValueError),
        ({"dims": 0}, ValueError),
        ({"dims": 3}, ValueError),
        ({"grad": torch.zeros(4, 9)}, ValueError),
        ({"grad": torch.zeros(4, 8, dtype=torch.int64)}, TypeError),
        ({"total": torch.zeros(4, 8, dtype=torch.int64)}, TypeError),
    ):
        with pytest.raises(kind):
            backward(**arguments)
    rest = (0, KEY, 0.5, 2.0, [], 0)
    with pytest.raises(ValueError, match="'grad' is on meta"):
        ops.activation_backward(x.to("meta"), x, *rest)
    with pytest.raises(TypeError, match="'grad' has dtype"):
        ops.activation_backward(x.double(), x, *rest)
    with pytest.raises(ValueError, match="'function' is 4"):
        ops.activation(x, 4, *rest[1:])
    with pytest.raises(ValueError, match="'norm_dims' is 0"):
        ops.add_norm(
            x, None, None, None, None, None, 0.5, 2.0, [], 0, 0, None, None, 1e-5, False,
            torch.float32, torch.float32, True,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_gradients_far_from_zero(name, dtype):
    magnitudes = torch.tensor([1e2, 1e5, 1e10, 1e20, 1e30, 3e38])
    x = torch.cat([magnitudes, -magnitudes]).to(dtype).requires_grad_()
    for extra in ({}, {"approximate": "tanh"}) if name == "gelu" else ({},):
        out = dropout_ext.activation_dropout(x, name, 1e-12, key=KEY, **extra)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert (grad[:6] == 1).all()
        assert (grad[6:].abs() < 1e-15).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_memory_format_is_that_of_the_sum(training, p):
    x = random_tensor((2, 8, 5, 5)).to(memory_format=torch.channels_last)
    out = dropout_ext.dropout_add(x, x, p, training)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_results_are_new_memory():
    import torch.autograd.forward_ad as forward_ad

    x = torch.zeros(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(3))
        dropout_ext.dropout_add(dual, None, training=False).add_(1)
    nested = torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.jagged)
    dropout_ext.dropout_add(nested, None, training=False).add_(1)
    for change in ({}, {"p": 0.0}, {"training": False}):
        dropout_ext.dropout_add(x, None, **change).add_(1)
        dropout_ext.dropout_add(torch.zeros(3), x, **change).add_(1)
    assert (x == 0).all()
    assert (nested.values() == 0).all()


def test_rowscale_takes_no_gradient():
    x = rows((4, 8), torch.float64, 1).requires_grad_()
    scale = rows((4,), torch.float64, 2).requires_grad_()
    out = dropout_ext.dropout_add(x, None, P, rowscale=scale, key=KEY)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), scale, allow_unused=True) == (None,)

    def loss(scale):
        return dropout_ext.dropout_add(x.detach(), None, P, rowscale=scale, key=KEY).sum()

    assert (torch.func.grad(loss)(scale.detach()) == 0).all()


def on_both_devices(function, *tensors, **given):
    """Of the tensors, as leaves, on the CPU and on a GPU."""
    results = []
    for device in ("cpu", "cuda"):
        leaves = [None if t is None else t.to(device).requires_grad_() for t in tensors]
        some = {
            name: value.to(device) if isinstance(value, torch.Tensor) and name != "key" else value
            for name, value in given.items()
        }
        results.append(function(*leaves, **some))
    return results


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "sum_dtype"), PAIRS)
@pytest.mark.parametrize("hidden", [7, 200, 1024, 2056, 4099])
def test_bits_on_a_gpu(dtype, sum_dtype, hidden):
    x, r = rows((3, hidden), dtype, 1, True), rows((3, hidden), sum_dtype, 2, True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scales = {
        "input_bias": rows((hidden,), dtype, 3),
        "colscale": rows((hidden,), wide, 4),
        "rowscale": rows((3,), wide, 5),
    }
    for some in ({}, scales):
        for residual in (r, None):
            given = {"p": P, "key": KEY, **some}
            cpu, gpu = on_both_devices(dropout_ext.dropout_add, x, residual, **given)
            assert gpu.is_cuda
            assert_same_bits(gpu, cpu)
            given |= {"normalized_shape": hidden, "return_sum": True}
            for norm in (dropout_ext.dropout_add_layer_norm, dropout_ext.dropout_add_rms_norm):
                (_, cpu), (_, gpu) = on_both_devices(norm, x, residual, **given)
                assert_same_bits(gpu, cpu)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED_LAYOUTS])
def test_layouts_on_a_gpu(layout):
    x, r = rows((2, 3, 5, 7), torch.bfloat16, 1, True), rows((2, 3, 5, 7), torch.bfloat16, 2, True)
    layouts = LAYOUTS | SHARED_LAYOUTS
    cpu = dropout_ext.dropout_add(x, layouts[layout](r), P, key=KEY)
    with torch.device("cuda"):
        gpu = dropout_ext.dropout_add(x.cuda(), layouts[layout](r.cuda()), P, key=KEY)
    assert_same_bits(gpu, cpu)
    cpu = dropout_ext.activation_dropout(layouts[layout](x), "silu", P, key=KEY)
    with torch.device("cuda"):
        gpu = dropout_ext.activation_dropout(layouts[layout](x.cuda()), "silu", P, key=KEY)
    assert_same_bits(gpu, cpu)


@pytest.mark.cuda
def test_masks_on_a_gpu():
    shape = (6, 9, 40)
    x, r = rows(shape, torch.float32, 1), rows(shape, torch.float32, 2)
    masks = [{"broadcast_dims": dims} for dims in ((0,), (1,), (2,), (1, 2), (0, 1, 2))]
    masks += [{"mask_strides": (2**33, 80, 2), "mask_offset": 2**63}]
    masks += [{"mask_strides": (-360, -40, -1), "mask_offset": -77}]
    keys = torch.stack([make_key(i, 3) for i in range(6)])
    for mask in masks:
        for key in (KEY, KEY.cuda(), keys, keys.cuda()):
            for row in ((40,), (9, 40)):
                (_, cpu), (_, gpu) = (
                    dropout_ext.dropout_add_layer_norm(
                        x.to(device), r.to(device), row, p=P, return_sum=True,
                        key=key.to("cpu" if device == "cpu" else key.device), **mask,
                    )
                    for device in ("cpu", "cuda")
                )  # fmt: skip
                assert_same_bits(gpu, cpu)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "approximate"),
    [("gelu", "none"), ("gelu", "tanh"), ("silu", "none"), ("relu", "none")],
)
def test_activations_on_a_gpu(name, approximate, dtype):
    x = rows((5, 1031), dtype, 1, True) * 3

    def both(leaf):
        out = dropout_ext.activation_dropout(leaf, name, P, key=KEY, approximate=approximate)
        return out.detach(), *torch.autograd.grad(out, leaf, leaf.detach().roll(1))

    for cpu, gpu in zip(*on_both_devices(both, x), strict=True):
        assert_same_bits(gpu, cpu)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "sum_dtype"), PAIRS)
@pytest.mark.parametrize("hidden", [7, 768, 2056, 17_003])  # the last: more than threads hold
@pytest.mark.parametrize("rms", [False, True])
def test_norms_on_a_gpu(dtype, sum_dtype, hidden, rms):
    """Error against float64 at most twice the CPU's, where that is no luck."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [rows((9, hidden), dtype, 1), rows((9, hidden), sum_dtype, 2),
               rows((hidden,), wide, 3), rows((hidden,), wide, 4)]  # fmt: skip
    grads = rows((9, hidden), dtype, 5), rows((9, hidden), sum_dtype, 6)

    def ours(x, r, w, b):
        arguments = (x, r, hidden, w) if rms else (x, r, hidden, w, b)
        function = dropout_ext.dropout_add_rms_norm if rms else dropout_ext.dropout_add_layer_norm
        z, s = function(*arguments, eps=1e-5, p=P, key=KEY, return_sum=True)
        leaves = [x, r, w] if rms else [x, r, w, b]
        given = [g.to(x.device) for g in grads]
        return [z, s, *torch.autograd.grad([z, s], leaves, given)]

    leaves = [t.double().requires_grad_() for t in tensors]
    keep = keep_of((9, hidden))
    z, s = exact(*leaves, 1, rms=rms, keep=keep)
    wanted = torch.autograd.grad([z, s], leaves[:3] if rms else leaves, [g.double() for g in grads])
    for cpu, gpu, right in zip(*on_both_devices(ours, *tensors), (z, s, *wanted), strict=True):
        least = 1e-11 if wide == torch.float64 else 8 * torch.finfo(gpu.dtype).eps
        least *= max(1, right.abs().max().item())
        assert error(gpu.cpu(), right) <= max(2 * error(cpu, right), least)
