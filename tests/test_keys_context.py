"""`with keys(key):` gives a whole model's dropout its keys."""

import copy
import functools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, make_key
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend
from torch._higher_order_ops import map as hop_map
from torch._higher_order_ops import scan, while_loop
from torch.utils.checkpoint import checkpoint

import dropout_ext
from dropout_ext import dropout, fold_in, keys
from dropout_ext.compat import flash_attn

N = 64
A = dropout_ext.functional

# Each draws one key: what it computes without one, and with.
CALLS = {
    "dropout": (dropout, dropout),
    "in place": (lambda x: dropout(x.clone(), inplace=True), dropout),
    "dropout1d": (A.dropout1d, A.dropout1d),
    "alpha": (
        lambda x: A.alpha_dropout(x, training=True),
        lambda x, key: A.alpha_dropout(x, training=True, key=key),
    ),
    "drop_path": (
        lambda x: A.drop_path(x, 0.5, True),
        lambda x, key: A.drop_path(x, 0.5, True, key=key),
    ),
    "shared": (
        lambda x: dropout(x, broadcast_dims=(1,)),
        lambda x, key: dropout(x, broadcast_dims=(1,), key=key),
    ),
    "module": (dropout_ext.Dropout(), dropout),
    "converted": (dropout_ext.convert(nn.Dropout()), dropout),
    "add": (
        lambda x: dropout_ext.dropout_add(x, x),
        lambda x, key: dropout_ext.dropout_add(x, x, key=key),
    ),
    "add norm": (
        lambda x: dropout_ext.dropout_add_layer_norm(x, x, x.shape[-1]),
        lambda x, key: dropout_ext.dropout_add_layer_norm(x, x, x.shape[-1], key=key),
    ),
    "activation": (
        lambda x: dropout_ext.activation_dropout(x, "gelu"),
        lambda x, key: dropout_ext.activation_dropout(x, "gelu", key=key),
    ),
    "attention": (
        lambda x: A.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x, key: A.scaled_dot_product_attention(x, x, x, dropout_p=0.5, dropout_key=key),
    ),
    "fused module": (
        dropout_ext.DropoutAdd(),
        lambda x, key: dropout_ext.dropout_add(x, None, key=key),
    ),
    "mask of flash_attn": (
        lambda x: flash_attn.dropout_add_layer_norm(
            x, None, torch.ones(x.shape[-1]), None, 0.5, 1e-5, return_dropout_mask=True
        )[1].float(),
        lambda x, key: dropout_ext.keep_mask(x.shape, 0.5, key).float(),
    ),
}
each_call = pytest.mark.parametrize("name", CALLS)


def overridden(x):
    with dropout_ext.override():
        return F.dropout(x)


def ones():
    return torch.rand(2, 4, 8) + 1


@each_call
def test_the_call_of_number_n_takes_fold_in_n(name, key):
    x, (drawn, keyed) = ones(), CALLS[name]
    state = torch.get_rng_state()
    with keys(key):
        results = [drawn(x) for _ in range(3)]
    for n, result in enumerate(results):
        assert_same_bits(result, keyed(x, key=fold_in(key, n)))
    assert torch.equal(torch.get_rng_state(), state)
    drawn(x)
    assert not torch.equal(torch.get_rng_state(), state)


def test_overridden_calls(key):
    x = ones()
    with keys(key):
        inner = overridden(x)
    with dropout_ext.override(), keys(key):
        outer = F.dropout(x)
    with keys(key), dropout_ext.override():
        q = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    assert_same_bits(inner, dropout(x, key=fold_in(key, 0)))
    assert_same_bits(outer, inner)
    expected = A.scaled_dot_product_attention(x, x, x, dropout_p=0.5, dropout_key=fold_in(key, 0))
    assert_same_bits(q, expected)


def test_only_calls_that_would_draw_count(key):
    x, other = ones(), make_key(7)
    with keys(key):
        assert_same_bits(dropout(x, key=other), dropout(x, key=other))
        seeded = [dropout(x, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        assert torch.equal(*seeded)
        assert dropout(x, training=False) is x
        assert dropout(x, p=0.0) is x
        assert not dropout(x, p=1.0).any()
        dropout(x[:0])
        with pytest.raises(ValueError, match="probability"):
            dropout(x, p=2.0)
        with pytest.raises(ValueError, match="exclude each other"):
            dropout(x, key=other, generator=torch.default_generator)
        first = dropout(x)
    assert_same_bits(first, dropout(x, key=fold_in(key, 0)))
    torch.manual_seed(1)
    expected = dropout(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(seeded[0], expected)


def test_it_nests_and_ends(key):
    x, other = ones(), make_key(7)
    with keys(key):
        first = dropout(x)
        with keys(other):
            inner = dropout(x)
        with pytest.raises(RuntimeError, match="on purpose"), keys(other):
            raise RuntimeError("on purpose")
        second = dropout(x)
    for result, k in ((first, fold_in(key, 0)), (inner, fold_in(other, 0))):
        assert_same_bits(result, dropout(x, key=k))
    assert_same_bits(second, dropout(x, key=fold_in(key, 1)))
    again = keys(key)
    for _ in range(2):  # each `with` counts from 0
        with again:
            assert_same_bits(dropout(x), first)


def test_other_threads_draw(key):
    x, results = ones(), []

    def work():
        torch.manual_seed(3)
        results.append(dropout(x))

    with keys(key):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        mine = dropout(x)
    torch.manual_seed(3)
    assert_same_bits(results[0], dropout(x))
    assert_same_bits(mine, dropout(x, key=fold_in(key, 0)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.second = dropout_ext.DropPath(0.5)
        self.last = dropout_ext.DropoutAddLayerNorm(8)

    def forward(self, x):
        return self.last(self.second(dropout(self.first(x), 0.2)) + dropout(x, 0.2), x)


def test_names_decide_not_the_order(key):
    drops = {name: dropout_ext.Dropout() for name in "abc"}
    x = ones()
    models = [nn.Sequential() for _ in range(3)]
    for model, names in zip(models, ("abc", "cab", "b"), strict=True):
        for name in names:
            model.add_module(name, drops[name])
    kept = []
    for model in models:
        with keys(key, model):
            kept.append({name: drop(x) != 0 for name, drop in model.named_children()})
    whole = kept[0]
    for some in kept:
        for name, mask in some.items():
            assert torch.equal(mask, whole[name])
    assert not torch.equal(whole["a"], whole["b"])


def test_a_module_called_again_has_another_mask(key):
    drop, x = dropout_ext.Dropout(), ones()
    model = nn.Sequential(drop, nn.ReLU(), drop)
    with keys(key, model):
        first, second = drop(x), drop(x)
    assert not torch.equal(first, second)
    with keys(key, model):
        assert_same_bits(drop(x), first)
        assert_same_bits(drop(x, key=key), dropout(x, key=key))
        drop.eval()(x)
        assert_same_bits(drop.train()(x), second)


def test_modules_and_other_calls_count_apart(key):
    model, x = dropout_ext.convert(Model()), ones()
    with keys(key, model):
        a, first, b = dropout(x), model(x), dropout(x)
    assert_same_bits(a, dropout(x, key=fold_in(key, 0)))
    assert_same_bits(b, dropout(x, key=fold_in(key, 3)))
    with keys(key, model):
        assert not torch.equal(model(x), first)  # its functional calls came first
    with keys(key, model):
        dropout(x)
        assert_same_bits(model(x), first)


def test_a_generator_of_a_module_stays(key):
    drop = dropout_ext.Dropout(generator=torch.Generator().manual_seed(1))
    x = ones()
    with keys(key, drop):
        y = drop(x)
    assert_same_bits(y, dropout(x, generator=torch.Generator().manual_seed(1)))


def test_the_innermost_context_decides(key):
    drop, x = dropout_ext.Dropout(), ones()
    with keys(make_key(7), drop):
        outer = drop(x)
        with keys(key):
            assert_same_bits(drop(x), dropout(x, key=fold_in(key, 0)))
        with keys(make_key(7), drop):
            assert_same_bits(drop(x), outer)
        assert not torch.equal(drop(x), outer)


def test_copies_are_not_in_the_context(key):
    drop, x = dropout_ext.Dropout(), ones()
    with keys(key, drop):
        twins = [copy.deepcopy(drop), pickle.loads(pickle.dumps(drop))]
        for n, twin in enumerate(twins):
            assert_same_bits(twin(x), dropout(x, key=fold_in(key, n)))
    torch.manual_seed(1)
    expected = dropout(x)
    torch.manual_seed(1)
    assert_same_bits(pickle.loads(pickle.dumps(drop))(x), expected)


def train(model, x, key, *, by_name=True):
    x = x.clone().requires_grad_()
    with keys(key, *([model] if by_name else [])):
        y = model(x)
    y.sum().backward()
    return y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())


COMPILED = [
    pytest.param(backend, marks=pytest.mark.slow if backend == "inductor" else ())
    for backend in ("aot_eager", "inductor")
]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("by_name", [False, True])
def test_compiled_from_outside(backend, by_name):
    torch.compiler.reset()
    model, x = dropout_ext.convert(Model()), ones()
    compiled = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled.compile(backend=counter, fullgraph=True)
    for step in range(4):
        for m in (model, compiled):
            m.zero_grad()
        expected = train(model, x, make_key(step), by_name=by_name)
        for a, b in zip(train(compiled, x, make_key(step), by_name=by_name), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_several_calls_of_a_compiled_function_in_one_context():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(x):
        return dropout(x) + 10 * dropout(x)

    compiled, x = torch.compile(f, backend=counter, fullgraph=True), ones()
    for step in range(3):
        results = []
        for function in (f, compiled):
            with keys(make_key(step)):
                results.append([function(x) for _ in range(4)])
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
    assert counter.frame_count == 1


def test_layers_compiled_each_by_itself_share_code():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*(nn.Sequential(nn.Dropout(), nn.Tanh()) for _ in range(12)))
    dropout_ext.convert(model)
    twin = copy.deepcopy(model)
    for layer in twin:
        layer.compile(backend=counter, fullgraph=True)
    x = ones()
    for step in range(3):
        results = []
        for m in (model, twin):
            with keys(make_key(step), m):
                results.append(m(x))
        assert_same_bits(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("by_name", [False, True])
def test_compiled_from_inside(backend, by_name):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    model, x = dropout_ext.convert(nn.Sequential(nn.Dropout(), nn.Tanh(), nn.Dropout())), ones()

    def f(x, key):
        with keys(key, *([model] if by_name else [])):
            y = model(x) + dropout(x)
        return y

    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for step in range(3):
        expected = f(x, make_key(step))
        assert torch.allclose(compiled(x, make_key(step)), expected, rtol=1e-5)
    assert counter.frame_count == 1
    torch.manual_seed(1)
    expected = dropout(x)
    torch.manual_seed(1)
    assert_same_bits(dropout(x), expected)  # nothing of it is left


def test_a_broken_graph_inside_keeps_the_keys():
    torch.compiler.reset()

    def f(x, key):
        with keys(key):
            a = dropout(x)
            torch._dynamo.graph_break()
            b = dropout(x)
        return a, b, dropout(x, key=key)

    x, key = ones(), make_key(3)
    for a, b in zip(torch.compile(f, backend="aot_eager")(x, key), f(x, key), strict=True):
        assert_same_bits(a, b)


def nested(region, x):
    def outer(x):
        return checkpoint(region, x, use_reentrant=False).clone()

    return checkpoint(outer, x, use_reentrant=False)


PATHS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "to its end": functools.partial(checkpoint, use_reentrant=False, early_stop=False),
    "nested": nested,
}


@pytest.mark.parametrize("backward", ["inside", "outside", "in another"])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_checkpoints_find_their_keys(path, by_name, backward, compiled):
    """The gradient is the mask, times 2, of each of the calls before, in and after the regions."""
    torch.compiler.reset()
    drops = nn.ModuleList(dropout_ext.Dropout() for _ in range(2))

    def region(x, scale):
        return torch.stack([drops[0](x), dropout(x), drops[1](x)]) * scale

    def f(x, scale):
        x = x * dropout(torch.ones_like(x), 0.1)
        a = PATHS[path](functools.partial(region, scale=scale), x)
        b = PATHS[path](functools.partial(region, scale=scale), x)
        return torch.stack([a, b]), dropout(x)

    def run(f):
        x, scale = torch.ones(N, requires_grad=True), torch.ones(3, N, requires_grad=True)
        with keys(make_key(5), *([drops] if by_name else [])):
            y, last = f(x, scale)
            if backward == "inside":
                dropout(x)
                y.sum().backward()
                after = dropout(x).detach()
        if backward == "outside":
            y.sum().backward()
        if backward == "in another":
            with keys(make_key(6), drops):
                y.sum().backward()
        results = [y.detach(), last.detach(), x.grad, scale.grad]
        return [*results, after] if backward == "inside" else results

    def plain(f):
        """The same without checkpoints."""
        paths, PATHS[path] = PATHS[path], lambda region, x: region(x)
        try:
            return run(f)
        finally:
            PATHS[path] = paths

    expected = plain(f)
    assert not torch.equal(expected[0][0], expected[0][1])
    if compiled:
        f = torch.compile(f, backend="aot_eager")
    for actual, wanted in zip(run(f), expected, strict=True):
        assert_same_bits(actual, wanted)


def test_a_checkpoint_of_another_library_raises(key):
    """One that runs a function again in the backward, of which nothing here knows."""

    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, x):
            ctx.function, ctx.x = function, x
            with torch.no_grad():
                return function(x)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = ctx.x.detach().requires_grad_()
                y = ctx.function(x)
            return None, torch.autograd.grad(y, x, grad)[0]

    x = torch.ones(N, requires_grad=True)
    for drop in (dropout, dropout_ext.Dropout()):
        with keys(key, nn.ModuleList([drop] if isinstance(drop, nn.Module) else [])):
            y = Foreign.apply(drop, x)
            with pytest.raises(RuntimeError, match=r"dropout_ext\.keys.*backward.*pass 'key'"):
                y.sum().backward()


def test_backward_of_drops_needs_no_context(key):
    x = torch.ones(N, requires_grad=True)
    with keys(key):
        y = dropout(x)
    with keys(make_key(9)):
        y.sum().backward()
    assert_same_bits(x.grad, y.detach())


def test_vmap_shares_the_mask(key):
    x = torch.ones(5, N)
    with keys(key):
        y = torch.vmap(dropout)(x)
    assert_same_bits(y, dropout(x[0], key=fold_in(key, 0)).expand(5, N))


REGIONS = {
    "cond": lambda drop, x: torch.cond(x.sum() > 0, drop, drop, (x,)),
    "map": hop_map,
    "scan": lambda drop, x: scan(lambda a, b: (drop(a + b), b * 1), x[0], x)[0],
    "while_loop": lambda drop, x: while_loop(
        lambda n, t: n < 3, lambda n, t: (n + 1, drop(t)), (torch.tensor(0), x)
    )[1],
    "grad": lambda drop, x: torch.func.grad(lambda t: drop(t).sum())(x),
    "vjp": lambda drop, x: torch.func.vjp(drop, x)[1](x)[0],
    "jvp": lambda drop, x: torch.func.jvp(drop, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", REGIONS)
def test_compiled_regions_are_a_limit(name, key):
    """The documented limit: calls in them cannot be counted. `key` from outside is right."""

    def compiled(drop):
        torch.compiler.reset()
        return torch.compile(lambda x: REGIONS[name](drop, x), backend="aot_eager")(x)

    x = torch.ones(4, N)
    with keys(key):
        with pytest.raises(TorchDynamoException):
            compiled(dropout)
        y = compiled(lambda t: dropout(t, key=key))
    each = x[0] if name in ("map", "scan") else x
    assert torch.equal(y != 0, (dropout(each, key=key) != 0).expand_as(y))


BAD = {
    "no tensor": ({"key": 3}, TypeError, r"keys\(\): argument 'key' must be a Tensor.* not int"),
    "dtype": ({"key": torch.zeros(2)}, TypeError, r"'key' has dtype torch.float32"),
    "shape": (
        {"key": torch.zeros(3, 2, dtype=torch.int64)},
        ValueError,
        r"'key' has shape \(3, 2\), but accepted is \(2,\)",
    ),
    "model": (
        {"key": make_key(), "model": 3},
        TypeError,
        "'model' must be torch.nn.Module, not int",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        keys(**arguments)
