"""torch.compile: fresh masks, the eager bits, no recompilation."""

import pytest
import torch
from family import MODULES
from helpers import assert_same_bits, make_key, random_tensor

import dropout_ext
from dropout_ext import _inductor
from dropout_ext import _reference as reference

# With dropout as an operator of its own, and in Inductor's own loops.
BACKENDS = ["aot_eager", "inductor", "inductor, fused"]
SIGMA = 5  # a false alarm in 1.7e6 for a fair coin


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, request):
    fused = "inductor, fused" in request.node.name
    monkeypatch.setenv(_inductor.SWITCH, "always" if fused else "never")
    torch.compiler.reset()


def compiled(function, backend="aot_eager", dynamic=False):
    backend = backend.removesuffix(", fused")
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def assert_fair(mask, p=0.5):
    """Kept at rate 1 - p, within five standard deviations."""
    n = mask.numel()
    assert abs(mask.sum().item() - n * (1 - p)) < SIGMA * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_two_calls_on_one_input_differ(backend, dynamic):
    def difference(x):
        return dropout_ext.dropout(x) - dropout_ext.dropout(x)

    f = compiled(difference, backend, dynamic)
    for n in (2000, 3000) if dynamic else (2000,):
        x = torch.ones(n, requires_grad=True)
        y = f(x)
        assert_fair(y != 0)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert_same_bits(gradient, y.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_each_call_is_fresh_and_backward_agrees(backend, dynamic):
    f = compiled(lambda x: dropout_ext.dropout(x * 3), backend, dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        masks = []
        for n in (2000, 2000, 3000) if dynamic else (2000, 2000, 2000):
            x = torch.ones(n, requires_grad=True)
            y = f(x)
            y.sum().backward()
            assert set(y.unique().tolist()) == {0.0, 6.0}
            assert_same_bits(x.grad, y.detach())
            assert_fair(y != 0)
            masks.append(y[:2000] != 0)
    for i in range(3):
        for j in range(i):
            assert_fair(masks[i] ^ masks[j])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_gives_the_eager_bits_without_recompiling(backend, dynamic, dtype):
    def twice(x, key):
        y = dropout_ext.dropout(x, 0.1, key=key)
        return dropout_ext.dropout(y, 0.3, key=dropout_ext.fold_in(key, 1))

    def same(actual, expected):
        if backend == "inductor, fused" and dtype == torch.bfloat16:  # rounded once
            torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
        else:
            assert_same_bits(actual, expected)

    f = compiled(twice, backend, dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, n in enumerate((41, 57, 101) if dynamic else (41, 41, 41)):
            x = random_tensor((9, n), dtype, seed).requires_grad_()
            keys = make_key(seed), reference.fold_in(make_key(seed), 1)
            y = f(x, make_key(seed))
            expected = reference.apply(x.detach(), keys[0], 0.1, 1 / (1 - 0.1))
            expected = reference.apply(expected, keys[1], 0.3, 1 / (1 - 0.3))
            same(y, expected)
            grad = random_tensor(y.shape, dtype, seed + 10)
            y.backward(grad)
            expected = reference.apply(grad, keys[1], 0.3, 1 / (1 - 0.3))
            expected = reference.apply(expected, keys[0], 0.1, 1 / (1 - 0.1))
            same(x.grad, expected)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, key):
    make, shape = MODULES[name]
    module = make(0.5)
    x = random_tensor(shape).requires_grad_()
    grad = random_tensor(shape, seed=1)
    for keys in ((key, make_key(7)), (None, None)):
        torch.compiler.reset()
        f = compiled(module)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for k in keys:
                torch.manual_seed(5)
                y = f(x, key=k)
                torch.manual_seed(5)
                expected = module(x, key=k)
                assert_same_bits(y, expected)
                gradients = [torch.autograd.grad(out, x, grad)[0] for out in (y, expected)]
                assert_same_bits(*gradients)
    assert not torch.equal(f(x), f(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place(backend, key):
    def intermediate(x, key):
        y = x * 3
        assert dropout_ext.dropout(y, inplace=True, key=key) is y
        return y

    x = random_tensor((9, 41)).requires_grad_()
    y = compiled(intermediate, backend)(x, key)
    assert_same_bits(y, reference.apply(x.detach() * 3, key, 0.5, 2.0))
    y.backward(torch.ones_like(y))
    assert_same_bits(x.grad, 3 * reference.apply(torch.ones(9, 41), key, 0.5, 2.0))

    x = random_tensor((9, 41))
    before = x.clone()
    y = compiled(lambda x: dropout_ext.dropout(x, inplace=True), backend)(x)
    assert y is x or y.data_ptr() == x.data_ptr()
    assert_fair(x != 0)
    assert_same_bits(x, torch.where(x != 0, 2 * before, 0.0))


def test_keys_are_derived_inside(key):
    def f(key):
        return dropout_ext.fold_in(key, 3), dropout_ext.split(key, 4)

    one, many = compiled(f)(key)
    assert_same_bits(one, reference.fold_in(key, 3))
    assert_same_bits(many, reference.split(key, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_are_made_inside(backend):
    """Constants, derived ones, one per slice, and of a seed that changes."""

    def keys(seed):
        key = dropout_ext.key(2**63 + 9, 4)
        return (
            key,
            dropout_ext.key(seed, device="cpu"),
            dropout_ext.fold_in(key, seed),
            dropout_ext.split(key, 3)[1],
            torch.stack([dropout_ext.fold_in(key, i) for i in range(5)]),
        )

    f = compiled(
        lambda x, seed: (
            [k.clone() for k in keys(seed)] + [dropout_ext.dropout(x, key=k) for k in keys(seed)]
        ),
        backend,
        dynamic=True,
    )
    x = torch.ones(5, 200)
    for seed in (3, 2**40):
        key = make_key(2**63 + 9, 4)
        expected = (
            key,
            make_key(seed),
            reference.fold_in(key, seed),
            reference.fold_in(key, 1),
            reference.split(key, 5),
        )
        made, masked = f(x, seed)[:5], f(x, seed)[5:]
        for k, actual, y in zip(expected, made, masked, strict=True):
            assert_same_bits(actual, k)
            assert_same_bits(y, reference.apply(x, k, 0.5, 2.0))


def graph_calls(function, *inputs):
    """The operators of the graph, and what the function returns."""
    calls = []

    def backend(graph, example_inputs):
        calls.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    out = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return calls, out


def test_what_does_nothing_leaves_no_trace():
    x = random_tensor((50,))
    for module in (dropout_ext.Dropout(0.5).eval(), dropout_ext.Dropout(0.0)):
        calls, y = graph_calls(lambda x, m=module: m(x) + 1, x)
        assert len(calls) == 1  # the addition
        assert_same_bits(y, x + 1)
    state = torch.get_rng_state()
    y = compiled(dropout_ext.Dropout(1.0))(x)
    assert_same_bits(y, torch.zeros(50))
    assert torch.equal(torch.get_rng_state(), state)
    assert compiled(dropout_ext.Dropout(0.5))(x[:0]).shape == (0,)


def test_the_graph_holds_one_operator(key):
    calls, _ = graph_calls(lambda x, k: dropout_ext.dropout(x, key=k), random_tensor((50,)), key)
    assert len(calls) == 1 and "dropout_ext" in calls[0] and "apply" in calls[0]


@pytest.mark.parametrize("where", ["function", "module"])
def test_a_generator_errs_and_names_the_way(where):
    generator = torch.Generator().manual_seed(1)
    if where == "module":
        f = compiled(dropout_ext.Dropout(generator=generator))
    else:
        f = compiled(lambda x: dropout_ext.dropout(x, generator=generator))
    with pytest.raises(Exception, match=r"draw a key outside.*pass it as 'key'"):
        f(torch.ones(10))


def test_train_and_eval_are_seen():
    module = dropout_ext.Dropout(0.5)
    f = compiled(module)
    x = torch.ones(2000)
    assert_fair(f(x) != 0)
    module.eval()
    assert torch.equal(f(x), x)
    module.train()
    assert_fair(f(x) != 0)


@pytest.mark.parametrize("offset", [2**63 + 1, 2**64 + 5, -3])
def test_indices_count_modulo_2_to_64(key, offset):
    def f(x, k):
        return dropout_ext.dropout(x, key=k, mask_strides=(10, 1), mask_offset=offset)

    x = random_tensor((6, 10))
    assert_same_bits(compiled(f, "aot_eager")(x, key), f(x, key))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_those_of_eager(backend, key):
    x = random_tensor((2, 3, 4, 5)).to(memory_format=torch.channels_last)
    y = compiled(lambda x, k: dropout_ext.dropout(x, key=k), backend)(x, key)
    assert y.stride() == x.stride()
    assert_same_bits(y, dropout_ext.dropout(x, key=key))


@pytest.mark.cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda(backend, key):
    x = random_tensor((9, 4100)).cuda().requires_grad_()
    f = compiled(lambda x: dropout_ext.dropout(x) - dropout_ext.dropout(x), backend)
    assert_fair(f(x) != 0)
    assert not torch.equal(f(x), f(x))
    g = compiled(lambda x, k: dropout_ext.dropout(x, key=k), backend)
    for k in (key, key.cuda()):
        y = g(x, k)
        assert_same_bits(y, dropout_ext.dropout(x.cpu(), key=key))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert_same_bits(gradient, reference.apply(torch.ones(9, 4100), key, 0.5, 2.0))


@pytest.mark.cuda
def test_cuda_graph_trees(key):
    """mode="reduce-overhead" replays CUDA graphs; every replay needs a fresh mask."""
    f = torch.compile(lambda x: dropout_ext.dropout(x * 1), mode="reduce-overhead", fullgraph=True)
    x = torch.ones(100_000, device="cuda")
    masks = [f(x).clone() != 0 for _ in range(5)]
    for i in range(5):
        assert_fair(masks[i])
        for j in range(i):
            assert_fair(masks[i] ^ masks[j])
