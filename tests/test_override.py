"""override: functional calls of PyTorch that run ours."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, random_tensor
from test_convert import Operators, who_drops
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import dropout_ext
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
def test_attention_on_cuda():
    x = torch.randn(2, 4, 128, 64, dtype=torch.float16, device="cuda")
    with override(), Operators() as fused:
        F.scaled_dot_product_attention(x, x, x, dropout_p=P)
    assert "dropout_ext::apply" not in fused.names
    with override(), sdpa_kernel(SDPBackend.MATH), Operators() as composed:
        F.scaled_dot_product_attention(x, x, x, dropout_p=P)
    assert "dropout_ext::apply" in composed.names


def test_attention_left_alone():
    x = random_tensor((2, 2, 5, 8))
    calls = [
        lambda: F.scaled_dot_product_attention(x, x, x),
        lambda: F.scaled_dot_product_attention(x[..., :4], x, x, dropout_p=P),
        lambda: F.scaled_dot_product_attention(x, x.double(), x, dropout_p=P),
        lambda: F.scaled_dot_product_attention(x, x, x, x[0, 0, :, :5], P, True),
        lambda: F.scaled_dot_product_attention(x.long(), x.long(), x.long(), dropout_p=P),
        lambda: F.scaled_dot_product_attention(x[0, 0, 0], x[0, 0, 0], x[0, 0, 0], dropout_p=P),
    ]

    def outcome(call):
        torch.manual_seed(0)
        try:
            return call()
        except Exception as error:
            return type(error)

    for n, call in enumerate(calls):
        expected = outcome(call)
        with override():
            actual = outcome(call)
        if isinstance(expected, torch.Tensor):
            assert_same_bits(actual, expected)
        else:
            assert actual is expected, n


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

    for way in (by_method, by_backward) if reentrant else (by_method, by_backward, by_grad):
        grads = []
        for function in (f, recomputed):
            x = random_tensor((6, 40)).requires_grad_()
            torch.manual_seed(2)
            with override():
                grads.append(way(function(x).sum(), x))
        assert_same_bits(*grads)


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
    with override():
        torch.manual_seed(0)
        expected = attention(q)
        torch.manual_seed(0)
        assert torch.allclose(compiled(q), expected, rtol=1e-5, atol=1e-6)
