"""override: functional calls of PyTorch that run ours."""

import contextlib
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import TORCH_2_11, assert_same_bits, random_tensor
from test_convert import Operators, who_drops
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import dropout_ext
from benchmarks.zoo import MODELS, SMALL
from dropout_ext import _reference as reference
from dropout_ext import override

P = 0.3


def next_key():
    """The key that the next call will draw, found without drawing it."""
    with torch.random.fork_rng():
        return ~torch.cat([torch.randint(0, 2**63 - 1, (1,)) for _ in range(2)])


# call, and the strides of the mask on (4, 30, 5); None for row-major.
PLAIN = {
    "F.dropout": (lambda x: F.dropout(x, P), None),
    "F.dropout by name": (lambda x: F.dropout(input=x, training=True, p=P), None),
    "F.dropout in place": (lambda x: F.dropout(x, P, inplace=True), None),
    "F.dropout1d": (lambda x: F.dropout1d(x, P), (30, 1, 0)),
    "F.dropout2d": (lambda x: F.dropout2d(x.unsqueeze(-1), P).squeeze(-1), (30, 1, 0)),
    "F.dropout3d": (lambda x: F.dropout3d(x[..., None, None], P)[..., 0, 0], (30, 1, 0)),
    "F.dropout3d in place": (
        lambda x: F.dropout3d(x[..., None, None], P, inplace=True)[..., 0, 0],
        (30, 1, 0),
    ),
    "torch.dropout": (lambda x: torch.dropout(x, P, True), None),
    "torch.dropout by name": (lambda x: torch.dropout(x, p=P, train=True), None),
    "torch.dropout_": (lambda x: torch.dropout_(x, P, True), None),
    "torch.feature_dropout": (lambda x: torch.feature_dropout(x, P, True), (30, 1, 0)),
    "torch.feature_dropout_": (lambda x: torch.feature_dropout_(x, P, train=True), (30, 1, 0)),
    "nn.Dropout": (nn.Dropout(P), None),
    "nn.Dropout1d": (nn.Dropout1d(P), (30, 1, 0)),
}
ALPHA = {
    "F.alpha_dropout": (lambda x: F.alpha_dropout(x, P, True), None),
    "F.feature_alpha_dropout": (lambda x: F.feature_alpha_dropout(x, P, True), (30, 1, 0)),
    "torch.alpha_dropout": (lambda x: torch.alpha_dropout(x, P, True), None),
    "torch.alpha_dropout_": (lambda x: torch.alpha_dropout_(x, P, train=True), None),
    "torch.feature_alpha_dropout": (
        lambda x: torch.feature_alpha_dropout(x, P, True),
        (30, 1, 0),
    ),
    "torch.feature_alpha_dropout_": (
        lambda x: torch.feature_alpha_dropout_(x, P, True),
        (30, 1, 0),
    ),
    "nn.AlphaDropout": (nn.AlphaDropout(P), None),
    "nn.FeatureAlphaDropout": (nn.FeatureAlphaDropout(P), (30, 1, 0)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_dropout(name):
    call, strides = PLAIN[name]
    x = random_tensor((4, 30, 5))
    expected = reference.apply(x, next_key(), P, 1 / (1 - P), strides or ())
    written = x.clone()
    with override():
        assert_same_bits(call(written), expected)
    in_place = name.endswith(("in place", "_"))
    assert_same_bits(written, expected if in_place else x)


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_dropout(name):
    call, strides = ALPHA[name]
    x = random_tensor((4, 30, 5))
    keep = reference.keep_mask(next_key(), P, x.shape, strides or ())
    limit = 1.7580993408473766
    a = ((1 - P) * (1 + P * limit**2)) ** -0.5
    expected = torch.where(keep, x, -limit) * a + a * limit * P
    written = x.clone()
    with override():
        out = call(written)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(written, out if name.endswith("_") else x)


@pytest.mark.parametrize("name", [name for name in PLAIN | ALPHA if name[:3] != "nn."])
def test_eval_and_errors(name):
    if name.startswith("torch."):
        function = getattr(torch, name[6:].split()[0])
    else:
        function = getattr(F, name[2:].split()[0])
    ranks = {"F.dropout2d": 4, "F.dropout3d": 5}
    x = torch.ones([2, 3, 4, 5, 6][: ranks.get(name.split()[0], 3)])
    state = torch.get_rng_state()
    with override():
        assert torch.equal(function(x, 0.5, False), torch.ones_like(x))
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises((ValueError, RuntimeError), match=r"between 0 and 1, but got 1\.5"):
            function(x, 1.5, True)


def composed(q, k, v, mask, keep, p, causal, scale, gqa):
    """Attention with a given keep mask, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    if gqa:
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    weights = scores.softmax(-1).nan_to_num(0)
    return torch.where(keep, weights / (1 - p), 0) @ v


SHAPES = {
    "heads": ((2, 4, 7, 8), (2, 4, 9, 8)),
    "one batch of keys": ((2, 4, 7, 8), (2, 1, 9, 8)),
    "matrices": ((7, 8), (9, 8)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("scale", [None, -0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention(shape, mask, scale, dtype):
    """Against a float64 composition; the gradients too."""
    q, k, v = (
        random_tensor(s, dtype, seed=i).requires_grad_()
        for i, s in enumerate((SHAPES[shape][0], SHAPES[shape][1], SHAPES[shape][1]))
    )
    causal = mask == "causal"
    weights = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), 7, 9)
    if mask == "bool":
        mask = random_tensor(weights[-2:]) > 0
        mask[2] = False  # a row that nothing is left of
    elif mask == "float":
        mask = random_tensor(weights, torch.float64 if dtype == torch.float64 else torch.float32)
        mask = mask.to(dtype).requires_grad_()
    else:
        mask = None
    keep = reference.keep_mask(next_key(), P, weights)
    expected = composed(q, k, v, mask, keep, P, causal, scale, False)
    with override(), Operators() as operators:
        actual = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=P, is_causal=causal, scale=scale
        )
    assert operators.who == "ours"
    assert actual.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(actual.double(), expected, rtol=tolerance, atol=tolerance)
    inputs = [q, k, v] + ([mask] if mask is not None and mask.requires_grad else [])
    grad = random_tensor(actual.shape, torch.float64, seed=9)
    ours = torch.autograd.grad(actual, inputs, grad.to(dtype))
    theirs = torch.autograd.grad(expected, inputs, grad.to(dtype).double())
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=5 * tolerance)


def test_attention_is_pytorchs_where_nothing_is_dropped():
    """p = 1e-12 keeps all, in PyTorch too: its math path is the oracle, autocast included. In
    bfloat16 over 97% of the elements agree to the bit, both being rounded once.
    """
    q, kv = random_tensor((2, 4, 7, 8)), random_tensor((2, 2, 9, 8), seed=1)
    mask = random_tensor((7, 9), seed=2)
    calls = [
        lambda p: F.scaled_dot_product_attention(q, kv, kv, dropout_p=p, enable_gqa=True),
        lambda p: F.scaled_dot_product_attention(q, kv, kv, mask, p, enable_gqa=True, scale=0.3),
        lambda p: F.scaled_dot_product_attention(
            q.bfloat16(), q.bfloat16(), q.bfloat16(), mask[:, :7], p
        ),
        lambda p: F.scaled_dot_product_attention(q.double(), q.double(), q.double(), dropout_p=p),
    ]
    for autocast, (n, call) in itertools.product((False, True), enumerate(calls)):
        with torch.autocast("cpu", enabled=autocast):
            expected = call(1e-12)
            with override(), Operators() as operators:
                actual = call(1e-12)
        assert operators.who == "ours", n
        assert actual.dtype == expected.dtype
        loose = 1e-5 if expected.dtype != torch.bfloat16 else 1e-2
        assert torch.allclose(actual, expected, rtol=loose, atol=loose), n
        if expected.dtype == torch.bfloat16:
            assert (actual == expected).float().mean() > 0.97, n


def test_pytorch_takes_its_math_path_on_the_cpu():
    """What override takes for granted there; the call is that of CUDA tensors."""
    x = random_tensor((2, 2, 5, 8))
    choices = [
        torch._fused_sdp_choice(x, x, x, None, p, False, scale=None, enable_gqa=False)
        for p in (0.0, P)
    ]
    assert choices == [SDPBackend.FLASH_ATTENTION.value, SDPBackend.MATH.value]


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [True, False])
def test_attention_on_cuda(fused):
    """PyTorch's fused attention stays where it takes the call, as it does this one by default."""
    x = torch.randn(2, 4, 128, 64, dtype=torch.float16, device="cuda")
    backends = contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
    with override(), backends, Operators() as operators:
        F.scaled_dot_product_attention(x, x, x, dropout_p=P)
    assert ("dropout_ext::apply" in operators.names) != fused


def r(*shape, dtype=torch.float32):
    return random_tensor(shape, dtype)


Q = r(2, 8, 5, 8)
sdpa = F.scaled_dot_product_attention

# Arguments at the edges, and whether the mode takes the call. p drops nothing where it is accepted.
ARGUMENTS = {
    "two key heads, four value heads": (
        lambda p: sdpa(Q, r(2, 2, 5, 8), r(2, 4, 5, 8), dropout_p=p, enable_gqa=True),
        True,
    ),
    "groups of matrices": (
        lambda p: sdpa(r(4, 5, 8), r(2, 7, 8), r(2, 7, 8), dropout_p=p, enable_gqa=True),
        True,
    ),
    "more key heads than heads": (
        lambda p: sdpa(r(2, 1, 5, 8), r(2, 4, 5, 8), r(2, 4, 5, 8), dropout_p=p, enable_gqa=True),
        False,
    ),
    "the same without groups": (
        lambda p: sdpa(r(2, 1, 5, 8), r(2, 4, 5, 8), r(2, 4, 5, 8), dropout_p=p),
        True,
    ),
    "heads that do not divide": (
        lambda p: sdpa(Q, r(2, 3, 5, 8), r(2, 4, 5, 8), dropout_p=p, enable_gqa=True),
        False,
    ),
    "groups of no heads": (
        lambda p: sdpa(r(1, 0, 5, 8), r(1, 0, 7, 8), r(1, 0, 7, 8), dropout_p=p, enable_gqa=True),
        False,
    ),
    "no key heads": (
        lambda p: sdpa(r(1, 4, 5, 8), r(1, 0, 7, 8), r(1, 0, 7, 8), dropout_p=p, enable_gqa=True),
        False,
    ),
    "groups without heads": (
        lambda p: sdpa(r(5, 8), r(7, 8), r(7, 8), dropout_p=p, enable_gqa=True),
        False,
    ),
    "no heads": (lambda p: sdpa(r(1, 0, 5, 8), r(1, 0, 7, 8), r(1, 0, 7, 8), dropout_p=p), None),
    "E of 0": (lambda p: sdpa(r(1, 4, 5, 0), r(1, 4, 7, 0), r(1, 4, 7, 8), dropout_p=p), True),
    "E and Ev of 0": (
        lambda p: sdpa(r(1, 4, 5, 0), r(1, 4, 7, 0), r(1, 4, 7, 0), dropout_p=p),
        None,
    ),
    "S of 0": (lambda p: sdpa(r(1, 4, 5, 8), r(1, 4, 0, 8), r(1, 4, 0, 8), dropout_p=p), None),
    "L of 0": (lambda p: sdpa(r(1, 4, 0, 8), r(1, 4, 7, 8), r(1, 4, 7, 8), dropout_p=p), None),
    "a mask of more batches": (lambda p: sdpa(Q[:1], Q[:1], Q[:1], r(3, 8, 5, 5), p), False),
    "a mask of more dimensions": (lambda p: sdpa(Q, Q, Q, r(1, 2, 8, 5, 5) > 0, p), False),
    "a mask that does not broadcast": (lambda p: sdpa(Q, Q, Q, r(5, 6), p), False),
    "a mask of one dimension": (lambda p: sdpa(Q, Q, Q, r(5), p), True),
    "a mask of none": (lambda p: sdpa(Q, Q, Q, r(), p), True),
    "a mask of float64": (lambda p: sdpa(Q, Q, Q, r(5, 5).double(), p), False),
    "a mask of integers": (lambda p: sdpa(Q, Q, Q, torch.ones(5, 5).int(), p), False),
    "a float mask beside float64": (
        lambda p: sdpa(Q.double(), Q.double(), Q.double(), r(5, 5), p),
        True,
    ),
    "a mask and is_causal": (lambda p: sdpa(Q, Q, Q, r(5, 5), p, True), False),
    "more batches of values": (lambda p: sdpa(Q[:1], Q[:1], r(3, 8, 5, 8), dropout_p=p), True),
    "other batches": (lambda p: sdpa(Q, r(3, 8, 5, 8), r(3, 8, 5, 8), dropout_p=p), False),
    "fewer dimensions of keys": (lambda p: sdpa(Q, Q[0], Q[0], dropout_p=p), True),
    "other sizes of keys": (lambda p: sdpa(Q[..., :4], Q, Q, dropout_p=p), False),
    "other lengths of values": (lambda p: sdpa(Q, Q, r(2, 8, 6, 8), dropout_p=p), False),
    "vectors": (lambda p: sdpa(r(8), r(8), r(8), dropout_p=p), False),
    "mixed dtypes": (lambda p: sdpa(Q, Q.double(), Q, dropout_p=p), False),
    "integers": (lambda p: sdpa(Q.long(), Q.long(), Q.long(), dropout_p=p), False),
    "complex": (lambda p: sdpa(Q + 0j, Q + 0j, Q + 0j, dropout_p=p), False),
    "sparse": (lambda p: sdpa(Q.to_sparse(), Q, Q, dropout_p=p), False),
    "no tensor": (lambda p: sdpa([1.0], Q, Q, dropout_p=p), False),
    "nothing dropped": (lambda p: sdpa(Q, Q, Q), False),
    "p = 1": (lambda p: sdpa(Q, Q, Q, dropout_p=1), True),
    "p > 1": (lambda p: sdpa(Q, Q, Q, dropout_p=1.5), False),
    "p < 0": (lambda p: sdpa(Q, Q, Q, dropout_p=-0.5), False),
    "p = NaN": (lambda p: sdpa(Q, Q, Q, dropout_p=float("nan")), False),
    "p of text": (lambda p: sdpa(Q, Q, Q, dropout_p="a"), False),
    "p of None": (lambda p: sdpa(Q, Q, Q, dropout_p=None), False),
    "p in a tensor": (lambda p: sdpa(Q, Q, Q, dropout_p=torch.tensor(p)), True),
    "p in two": (lambda p: sdpa(Q, Q, Q, dropout_p=torch.tensor([p, p])), False),
    "scale by place": (lambda p: sdpa(Q, Q, Q, None, p, False, 0.5), False),
    "scale of text": (lambda p: sdpa(Q, Q, Q, dropout_p=p, scale="a"), False),
    "scale of 0": (lambda p: sdpa(Q, Q, Q, dropout_p=p, scale=0), True),
    "is_causal of 1": (lambda p: sdpa(Q, Q, Q, dropout_p=p, is_causal=1), False),
    "enable_gqa of 1": (lambda p: sdpa(Q, Q, Q, dropout_p=p, enable_gqa=1), False),
    "another argument": (lambda p: sdpa(Q, Q, Q, dropout_p=p, mask=None), False),
    "autocast, mixed": (lambda p: autocast(Q, Q.bfloat16(), Q.half(), dropout_p=p), True),
    "autocast, float64": (lambda p: autocast(Q.double(), Q.double(), Q.double(), None, p), True),
    "autocast, float64 beside": (lambda p: autocast(Q, Q.double(), Q, dropout_p=p), False),
    "autocast, a mask": (lambda p: autocast(Q, Q, Q, r(5, 5), p), True),
    "autocast, a mask of float64": (lambda p: autocast(Q, Q, Q, r(5, 5).double(), p), False),
    "16 bits, a mask of 32": (
        lambda p: sdpa(Q.bfloat16(), Q.bfloat16(), Q.bfloat16(), r(5, 5), p),
        True,
    ),
    "16 bits throughout": (lambda p: reduced(Q.bfloat16(), None, p), True),
    "16 bits throughout, a mask of 32": (lambda p: reduced(Q.bfloat16(), r(5, 5), p), True),
    "16 bits throughout, a bool mask": (lambda p: reduced(Q.half(), r(5, 5) > -1, p), True),
    "no math path": (lambda p: flash(Q, dropout_p=p), False),
}


def autocast(*args, **kwargs):
    with torch.autocast("cpu"):
        return sdpa(*args, **kwargs)


def reduced(x, mask, p):
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        return sdpa(x, x, x, mask, p)
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def flash(x, **kwargs):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(x, x, x, **kwargs)


@pytest.mark.filterwarnings("ignore:.*ernels?:UserWarning")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_attention_arguments(name):
    """PyTorch's result or PyTorch's error. p keeps everything; masks are other tests' matter."""
    if name in ("groups of no heads", "no key heads") and TORCH_2_11:
        pytest.skip("torch 2.11 divides by the number of heads, which ends the process")
    call, ours = ARGUMENTS[name]

    def outcome():
        try:
            return call(1e-12)
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    if name == "E of 0":  # all weights are equal; torch 2.12 says 0
        expected = r(1, 4, 7, 8).mean(-2, keepdim=True).expand(1, 4, 5, 8)
    with override():
        actual = outcome()
        with Operators() as operators:  # under which PyTorch takes more masks than without
            outcome()
    if not isinstance(expected, torch.Tensor):
        assert actual == expected
        assert not ours
        return
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    if ours is not None and name != "p = 1":
        assert (operators.who == "ours") == ours


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(need_weights, masked):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dropout=P, batch_first=True)
    x = random_tensor((3, 5, 8))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked else None

    def call():
        return module(x, x, x, need_weights=need_weights, attn_mask=mask)

    with override(), Operators() as operators:
        out, weights = call()
    assert operators.who == "ours"
    if need_weights:
        assert (weights == 0).any()
    module.dropout = 0.0
    expected, _ = call()
    assert not torch.allclose(out, expected)
    module.dropout = 1e-12
    with override():
        assert torch.allclose(call()[0], expected, rtol=1e-5, atol=1e-6)
    module.dropout = P
    state = torch.get_rng_state()
    with override():
        assert torch.allclose(module.eval()(x, x, x, attn_mask=mask)[0], expected, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=P, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_transformer_encoder():
    model, x = encoder(), random_tensor((3, 5, 8))
    assert who_drops(lambda: model(x)) == "torch"
    with override():
        assert who_drops(lambda: model(x)) == "ours"
    with override():
        dropout_ext.convert(model)
        assert who_drops(lambda: model(x)) == "ours"
    assert who_drops(lambda: model(x)) == "both"  # the attention weights


def test_lstm_is_not_reached():
    lstm, x = nn.LSTM(4, 4, 2, dropout=0.5), random_tensor((5, 3, 4))
    with override():
        assert who_drops(lambda: lstm(x)) == "torch"


def test_nesting_and_exceptions():
    x = torch.ones(100)
    one = override()
    with pytest.raises(ZeroDivisionError), one:
        with one, override():
            assert who_drops(lambda: F.dropout(x)) == "ours"
        assert who_drops(lambda: F.dropout(x)) == "ours"
        raise ZeroDivisionError
    assert who_drops(lambda: F.dropout(x)) == "torch"


def plain(x):
    """Drops."""
    return F.dropout(x)


@pytest.mark.parametrize("decorate", [override, override()], ids=["@override", "@override()"])
def test_decorator(decorate):
    x = torch.ones(100)
    routed = decorate(plain)
    assert (routed.__name__, routed.__doc__) == ("plain", "Drops.")
    for _ in range(2):
        assert who_drops(lambda: routed(x)) == "ours"
        assert who_drops(lambda: plain(x)) == "torch"
    torch.compiler.reset()
    compiled = torch.compile(lambda x: routed(x * 1), backend="aot_eager", fullgraph=True)
    torch.manual_seed(2)
    y = compiled(x)
    torch.manual_seed(2)
    assert_same_bits(y, dropout_ext.dropout(x))


def test_a_decorated_generator_drops_by_ours_only_while_it_runs():
    @override
    def steps(x):
        yield F.dropout(x)
        yield F.dropout(x)

    running = steps(torch.ones(100))
    for _ in range(2):
        assert who_drops(lambda: next(running)) == "ours"
        assert who_drops(lambda: F.dropout(torch.ones(100))) == "torch"


async def asynchronous(x):
    return F.dropout(x)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (0.5, "float"),
        (torch.ones(2), "Tensor"),
        (nn.Dropout, "the class Dropout: decorate its methods"),
        (nn.Dropout(), "Dropout: use `with override"),
        (asynchronous, "the async function asynchronous: use `with"),
    ],
)
@pytest.mark.parametrize("decorate", [override, override()], ids=["@override", "@override()"])
def test_what_cannot_be_decorated(decorate, what, reason):
    with pytest.raises(TypeError, match=rf"'orig_func' must be a function, not {reason}"):
        decorate(what)


def test_threads_do_not_see_each_other():
    x = random_tensor((64, 50))
    barrier = threading.Barrier(4)
    seen = [None] * 4

    def work(n):
        for _ in range(20):
            barrier.wait()
            if n % 2:
                with override():
                    barrier.wait()
                    ours = who_drops(lambda: F.dropout(x))
            else:
                barrier.wait()
                ours = who_drops(lambda: F.dropout(x))
            if seen[n] not in (None, ours):
                seen[n] = "changed"
                return
            seen[n] = ours

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["torch", "ours"] * 2


def test_under_other_modes():
    """torch.set_default_device is a mode of its own at the bottom of the stack."""
    model, x = encoder(), random_tensor((3, 5, 8))
    with torch.device("cpu"), override():
        assert who_drops(lambda: model(x)) == "ours"
        assert who_drops(lambda: F.dropout(x)) == "ours"
    with override(), torch.device("cpu"):
        assert who_drops(lambda: F.dropout(x)) == "ours"


def test_subclasses_decide_for_themselves():
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(50).as_subclass(Tagged)
    with override():
        assert isinstance(F.dropout(x), Tagged)
    assert F.dropout in seen


def test_functorch():
    x = random_tensor((6, 40))
    with override():
        torch.manual_seed(0)
        grad = torch.func.grad(lambda t: F.dropout(t, P).sum())(x)
        rows = torch.func.vmap(lambda t: F.dropout(t, P), randomness="different")(torch.ones(6, 40))
    assert set(grad.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    weight = random_tensor((40, 40))

    def f(x):
        return F.dropout(x @ weight, P).sin()

    def recomputed(x):
        return checkpoint(f, x, use_reentrant=reentrant)

    def by_method(y, x):
        y.backward()
        return x.grad

    def by_backward(y, x):
        torch.autograd.backward(y, inputs=None)
        return x.grad

    def by_grad(y, x):
        return torch.autograd.grad(y, x)[0]

    def mode(on):
        return override() if on else contextlib.nullcontext()

    ways = (by_method, by_backward) if reentrant else (by_method, by_backward, by_grad)
    for way, forward, backward in itertools.product(ways, (False, True), (False, True)):
        grads = []
        for function in (f, recomputed):
            x = random_tensor((6, 40)).requires_grad_()
            torch.manual_seed(2)
            with mode(forward):
                y = function(x).sum()
            torch.rand(3)
            with mode(backward):
                grads.append(way(y, x))
        assert_same_bits(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_without_its_checks(reentrant):
    """determinism_check="none", early_stop and a mode of one's own change nothing."""
    weight = random_tensor((40, 40))

    def f(x):
        with torch.device("cpu"):
            return F.dropout(F.dropout(x @ weight, P).sin(), P)

    kwargs = {} if reentrant else {"determinism_check": "none", "early_stop": False}
    grads = []
    for function in (f, lambda x: checkpoint(f, x, use_reentrant=reentrant, **kwargs)):
        x = random_tensor((6, 40)).requires_grad_()
        torch.manual_seed(2)
        with torch.device("cpu"), override():
            y = function(x).sum()
        with torch.device("cpu"):
            y.backward()
            assert torch.overrides._len_torch_function_stack() == 1
        grads.append(x.grad)
    assert_same_bits(*grads)


def test_backward_inside_reaches_what_it_runs():
    """Hooks, and checkpoints of other libraries."""
    x = random_tensor((6, 40)).requires_grad_()
    x.register_hook(lambda grad: F.dropout(torch.ones_like(grad), P))
    with override(), Operators() as operators:
        x.sin().sum().backward()
    assert operators.who == "ours"


def eval_outcome(call):
    try:
        return call()
    except AssertionError as error:
        return str(error).split("fast path")[0]


@pytest.mark.parametrize("case", ["plain", "padded", "nested", "fully masked", "attention"])
def test_eval_is_that_without_the_fast_path(case):
    """Which PyTorch leaves under any mode. With gradients it is left anyway, and equal."""
    model = nn.TransformerEncoder(encoder().layers[0], 2).eval()
    x = random_tensor((3, 5, 8))
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]) > 0
    if case == "fully masked":
        padding[0] = True
    calls = {
        "plain": lambda: model(x),
        "nested": lambda: model.layers[0](torch.nested.nested_tensor([x[0], x[1, :3]])),
        "attention": lambda: model.layers[0].self_attn(x, x, x, key_padding_mask=padding)[0],
    }
    call = calls.get(case, lambda: model(x, src_key_padding_mask=padding))
    enabled = torch.backends.mha.get_fastpath_enabled()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                expected = eval_outcome(call)
            finally:
                torch.backends.mha.set_fastpath_enabled(enabled)
            with override():
                actual = eval_outcome(call)
        if isinstance(expected, str):
            assert case == "nested"
            assert actual == expected
        else:
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", ["BERT, sdpa", "GPT-2, sdpa"])
def test_eval_of_transformers(name):
    pytest.importorskip("transformers")
    model, inputs = MODELS[name].build(P, SMALL).eval(), MODELS[name].batch(SMALL, 0)[0]
    with torch.no_grad():
        expected = model(inputs)
        with override():
            assert_same_bits(model(inputs), expected)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(where, backend):
    """No graph break; equal to eager in the same state of the generator, forward and gradient."""
    torch._dynamo.reset()
    model, x = encoder(), random_tensor((3, 5, 8))

    def f(x):
        y = F.dropout2d(model(x).unsqueeze(1), P)
        return F.dropout(y, P, inplace=True) + torch.feature_dropout(y, P, True)

    def inside(x):
        with override():
            return f(x)

    def run(f, x):
        x = x.clone().requires_grad_()
        torch.manual_seed(4)
        y = f(x)
        y.sin().sum().backward()
        return y.detach(), x.grad

    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(
            f if where == "outside" else inside, backend=backend, fullgraph=True
        )
        with override():
            expected = run(f, x)
        if where == "outside":
            theirs = run(compiled, x)
            assert not torch.allclose(theirs[0], expected[0])
            with override():
                actual = run(compiled, x)
            for a, b in zip(run(compiled, x), theirs, strict=True):
                assert_same_bits(a, b)
        else:
            actual = run(compiled, x)
        for a, b in zip(actual, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_calls_draw_anew():
    torch._dynamo.reset()
    with override():
        compiled = torch.compile(lambda x: F.dropout(x) - F.dropout(x), fullgraph=True)
        first, second = compiled(torch.ones(1000)), compiled(torch.ones(1000))
    assert 0.4 < (first != 0).float().mean() < 0.6
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_compiled_attention_is_one_graph(mask):
    torch._dynamo.reset()
    q = random_tensor((2, 4, 8, 16))
    arguments = {"dropout_p": P, "is_causal": mask == "causal"}
    if mask == "bool":
        arguments["attn_mask"] = torch.ones(8, 8, dtype=torch.bool).tril()
    elif mask == "float":
        arguments["attn_mask"] = random_tensor((8, 8))

    def attention(q):
        return F.scaled_dot_product_attention(q, q, q, **arguments)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = q.to(dtype)
        with override():
            torch.manual_seed(0)
            expected = attention(x)
            torch.manual_seed(0)
            assert torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-6)
