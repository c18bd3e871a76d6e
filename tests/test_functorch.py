"""torch.func: derivatives and vmap of dropout, with and without a key, and compiled."""

import pytest
import torch
import torch.autograd.forward_ad as fwd
from family import ALPHA, MODULES
from helpers import assert_same_bits, random_tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import dropout_ext
from dropout_ext import _reference as reference
from dropout_ext import dropout

N = 2000
SIGMA = 5  # a false alarm in 1.7e6 for a fair coin


def assert_fair(mask):
    n = mask.numel()
    assert abs(mask.sum().item() - n / 2) < SIGMA * n**0.5 / 2


def factor(n, key):
    """What dropout with p = 0.5 multiplies by."""
    return reference.apply(torch.ones(n), key, 0.5, 2.0)


def cube(x, key=None):
    return dropout(x, key=key) ** 3


DERIVATIVES = {
    "grad": (
        lambda f, **kw: grad(lambda x, *k: f(x, *k).sum()),
        lambda m, x: 3 * m**3 * x**2,
    ),
    "vjp": (
        lambda f, **kw: lambda x, *k: vjp(lambda x: f(x, *k), x)[1](torch.ones_like(x))[0],
        lambda m, x: 3 * m**3 * x**2,
    ),
    "jvp": (
        lambda f, **kw: lambda x, *k: jvp(lambda x: f(x, *k), (x,), (x,))[1],
        lambda m, x: 3 * m**3 * x**3,
    ),
    "jacrev": (
        lambda f, **kw: jacrev(f),
        lambda m, x: torch.diag(3 * m**3 * x**2),
    ),
    "jacfwd": (
        lambda f, **kw: jacfwd(f, **kw),
        lambda m, x: torch.diag(3 * m**3 * x**2),
    ),
    # What torch.func.hessian composes, which does not pass `randomness` on.
    "hessian": (
        lambda f, **kw: jacfwd(jacrev(lambda x, *k: f(x, *k).sum()), **kw),
        lambda m, x: torch.diag(6 * m**3 * x),
    ),
    "grad of grad": (
        lambda f, **kw: grad(lambda x, *k: grad(lambda x: f(x, *k).sum())(x).sum()),
        lambda m, x: 6 * m**3 * x,
    ),
}
COMPILE = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def maybe_compile(f, compiled):
    torch.compiler.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True) if compiled else f


@pytest.mark.parametrize("name", DERIVATIVES)
@COMPILE
def test_derivatives(name, compiled, key):
    transform, expected = DERIVATIVES[name]
    x = random_tensor((40,))
    f = maybe_compile(transform(cube), compiled)
    torch.testing.assert_close(f(x, key), expected(factor(40, key), x))
    # Without a key: the mask that plain eager draws from the same seed.
    torch.manual_seed(3)
    m = dropout(torch.ones(40))
    torch.manual_seed(3)
    f = maybe_compile(transform(cube, randomness="same"), compiled)
    torch.testing.assert_close(f(x), expected(m, x))


def test_hessian(key):
    x = random_tensor((40,))
    actual = hessian(lambda x: cube(x, key).sum())(x)
    torch.testing.assert_close(actual, torch.diag(6 * factor(40, key) ** 3 * x))
    with pytest.raises(RuntimeError, match="randomness error mode"):  # it has no `randomness`
        hessian(lambda x: cube(x).sum())(x)


def test_derivatives_with_respect_to_complex(key):
    x = random_tensor((40,), torch.complex64)
    tangent = random_tensor((40,), torch.complex64, seed=1)
    y, derivative = jvp(lambda x: dropout(x, key=key), (x,), (tangent,))
    assert_same_bits(y, reference.apply(x, key, 0.5, 2.0))
    assert_same_bits(derivative, reference.apply(tangent, key, 0.5, 2.0))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("lazy", [torch.clone, torch.conj, torch._neg_view])
def test_complex_infinities(dtype, lazy, key):
    """Each part by itself, in the output and in the derivatives: inf + 0i stays free of NaN."""

    def check(actual, inputs):
        for y, t in zip(actual, inputs, strict=True):
            plain = t.resolve_conj().resolve_neg()
            assert_same_bits(y, reference.apply(plain, key, 0.5, 2.0, [1]))

    def f(x):
        return dropout(x, key=key)

    both = [lazy(random_tensor((60,), dtype, seed, special=True)) for seed in (0, 1)]
    x, tangent = both
    check(jvp(f, (x,), (tangent,)), both)
    y, pullback = vjp(f, x)
    check([y, *pullback(tangent)], both)
    with fwd.dual_level():
        check(fwd.unpack_dual(f(fwd.make_dual(x, tangent))), both)
    rows = vmap(lambda x, t: jvp(f, (x,), (t,)))(*(t.expand(3, 60) for t in both))
    for row in range(3):
        check([y[row] for y in rows], both)


def test_linearize(key):
    """With a key one mask, of the value and of every derivative."""
    x, ones = random_tensor((N,)), torch.ones(N)
    value, derivative = linearize(lambda x: dropout(x, key=key), x)
    assert_same_bits(value, reference.apply(x, key, 0.5, 2.0))
    for _ in range(2):
        assert_same_bits(derivative(ones), factor(N, key))


def test_linearize_draws_again_at_every_call():
    """The documented limit: what it records draws, and so does what it records of torch's own."""
    for f in (dropout, torch.nn.functional.dropout):
        value, derivative = linearize(f, torch.ones(N))
        masks = [value, *(derivative(torch.ones(N)) for _ in range(2))]
        for i in range(3):
            assert set(masks[i].unique().tolist()) == {0.0, 2.0}
            for j in range(i):
                assert_fair(masks[i] != masks[j])


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, key):
    """Under functorch each module is what it is outside, and so are both of its derivatives."""
    make, shape = MODULES[name]
    module = make(0.5)
    x, tangent, cotangent = (random_tensor(shape, seed=s) for s in range(3))
    plain = module(x, key=key)
    # keep ? scale : 0. Alpha's composition rounds twice where its kernel rounds once.
    exact = (lambda a, b: torch.testing.assert_close(a, b)) if name in ALPHA else assert_same_bits
    slope = module(torch.ones(shape), key=key) - module(torch.zeros(shape), key=key)
    y, derivative = jvp(lambda x: module(x, key=key), (x,), (tangent,))
    exact(y, plain)
    torch.testing.assert_close(derivative, tangent * slope)
    y, pullback = vjp(lambda x: module(x, key=key), x)
    exact(y, plain)
    torch.testing.assert_close(pullback(cotangent)[0], cotangent * slope)
    torch.manual_seed(1)
    drawn = module(x)
    torch.manual_seed(1)
    exact(vjp(module, x)[0], drawn)


@COMPILE
def test_randomness_different(compiled):
    f = maybe_compile(vmap(lambda x: dropout(x * 3), randomness="different"), compiled)
    first, second = (f(torch.ones(4, N)) for _ in range(2))
    rows = [*first, *second]
    for i, row in enumerate(rows):
        assert set(row.unique().tolist()) == {0.0, 6.0}
        for other in rows[:i]:
            assert_fair(row != other)


@COMPILE
def test_randomness_same(compiled):
    f = maybe_compile(vmap(lambda x: dropout(x), randomness="same"), compiled)
    x = random_tensor((4, N))
    first, second = f(x), f(x)
    assert_fair((first != 0) ^ (second != 0))
    for y in (first, second):
        assert_fair(y[0] != 0)
        assert_same_bits(y, torch.where(y[0] != 0, 2 * x, 0.0))


def test_randomness_same_is_the_seeds_mask():
    torch.manual_seed(9)
    expected = dropout(torch.ones(N))
    torch.manual_seed(9)
    y = vmap(lambda x: dropout(x), randomness="same")(torch.ones(4, N))
    assert_same_bits(y, expected.expand(4, N))


def test_randomness_error():
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(lambda x: dropout(x))(torch.ones(4, 5))
    for quiet in ({"p": 0.0}, {"training": False}, {"p": 1.0}):
        y = vmap(lambda x, kw=quiet: dropout(x, **kw))(torch.ones(4, 5))
        assert_same_bits(y, torch.full((4, 5), 0.0 if quiet.get("p") == 1 else 1.0))


@pytest.mark.parametrize("randomness", ["error", "different", "same"])
def test_one_key_is_one_mask(randomness, key):
    x = random_tensor((4, N))
    y = vmap(lambda x: dropout(x, key=key), randomness=randomness)(x)
    assert_same_bits(y, reference.apply(x, key, 0.5, 2.0, [0, 1]))


@COMPILE
def test_a_key_per_example(compiled, key):
    keys = reference.split(key, 4)
    x = random_tensor((4, 30, 7))
    expected = torch.stack([reference.apply(x[i], keys[i], 0.5, 2.0) for i in range(4)])
    f = maybe_compile(vmap(lambda x, k: dropout(x, key=k)), compiled)
    assert_same_bits(f(x, keys), expected)
    f = maybe_compile(vmap(lambda x, k: dropout(x, key=k), in_dims=(2, 1), out_dims=1), compiled)
    actual = f(x.permute(1, 2, 0).contiguous(), keys.t().contiguous())
    assert_same_bits(actual, expected.transpose(0, 1))
    one = vmap(lambda k: dropout(x[0], key=k))(keys)  # an unbatched input
    assert_same_bits(one, torch.stack([reference.apply(x[0], k, 0.5, 2.0) for k in keys]))


def test_keys_per_slice_of_every_example(key):
    """Keys of shape (n, 2) inside vmap: one for each slice, batched or not."""
    x = random_tensor((3, 4, 50))
    keys = reference.split(key, 12).view(3, 4, 2)
    y = vmap(lambda x, k: dropout(x, key=k))(x, keys)
    assert_same_bits(y, torch.stack([reference.apply(x[i], keys[i], 0.5, 2.0) for i in range(3)]))
    y = vmap(lambda x: dropout(x, key=keys[0]))(x)
    assert_same_bits(y, torch.stack([reference.apply(x[i], keys[0], 0.5, 2.0) for i in range(3)]))


def test_keys_are_derived_under_vmap(key):
    keys = reference.split(key, 3)
    actual = vmap(lambda k: dropout_ext.fold_in(k, 5))(keys)
    assert_same_bits(actual, reference.fold_in(keys, 5))
    actual = vmap(lambda k: dropout_ext.split(k, 4))(keys)
    assert_same_bits(actual, torch.stack([reference.split(k, 4) for k in keys]))
    actual = vmap(lambda k: dropout_ext.keep_mask((5, 6), 0.5, k))(keys)
    assert_same_bits(actual, torch.stack([reference.keep_mask(k, 0.5, (5, 6)) for k in keys]))
    keys = reference.split(key, 12).view(3, 4, 2)  # one for each slice of every example
    actual = vmap(lambda k: dropout_ext.keep_mask((4, 6), 0.5, k))(keys)
    assert_same_bits(actual, torch.stack([reference.keep_mask(k, 0.5, (4, 6)) for k in keys]))


@pytest.mark.parametrize("name", MODULES)
def test_modules_under_vmap(name, key):
    make, shape = MODULES[name]
    module = make(0.5)
    x = random_tensor((3, *shape))
    keys = reference.split(key, 3)
    expected = torch.stack([module(x[i], key=keys[i]) for i in range(3)])
    actual = vmap(lambda x, k: module(x, key=k))(x, keys)
    assert_same_bits(actual, expected)
    expected = torch.stack([module(x[i], key=key) for i in range(3)])
    assert_same_bits(vmap(lambda x: module(x, key=key))(x), expected)
    y = vmap(module, randomness="different")(x)
    assert len(torch.unique(y.flatten(1), dim=0)) == 3


@COMPILE
def test_nested_vmap(compiled, key):
    x = torch.ones(2, 3, N)
    f = maybe_compile(
        vmap(vmap(lambda x: dropout(x), randomness="different"), randomness="different"), compiled
    )
    rows = f(x).reshape(6, N)
    for i in range(6):
        for j in range(i):
            assert_fair(rows[i] != rows[j])
    f = maybe_compile(
        vmap(vmap(lambda x: dropout(x), randomness="same"), randomness="different"), compiled
    )
    y = f(x)
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])
    assert_fair(y[0, 0] != y[1, 0])
    keys = reference.split(key, 6).view(2, 3, 2)
    y = maybe_compile(vmap(vmap(lambda x, k: dropout(x, key=k))), compiled)(x, keys)
    for i in range(2):
        for j in range(3):
            assert_same_bits(y[i, j], factor(N, keys[i, j]))


@COMPILE
def test_per_sample_gradients(compiled, key):
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 40), dropout_ext.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(40, 1)
    )
    weights = {name: w.detach() for name, w in model.named_parameters()}
    x = random_tensor((4, 5))
    keys = reference.split(key, 4)

    def keyed(weights, x, key):
        h = torch.nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
        h = torch.tanh(model[1](h, key=key))
        return torch.nn.functional.linear(h, weights["3.weight"], weights["3.bias"]).square().sum()

    def drawn(weights, x):
        return functional_call(model, weights, x).square().sum()

    def by_hand(x, keep):
        """The gradient of one example's loss, in plain PyTorch, under this mask."""
        w = {name: t.clone().requires_grad_() for name, t in weights.items()}
        h = torch.nn.functional.linear(x, w["0.weight"], w["0.bias"])
        h = torch.tanh(torch.where(keep, 2 * h, 0.0))
        out = torch.nn.functional.linear(h, w["3.weight"], w["3.bias"]).square().sum()
        return dict(zip(w, torch.autograd.grad(out, list(w.values())), strict=True))

    f = maybe_compile(vmap(grad(keyed), in_dims=(None, 0, 0)), compiled)
    actual = f(weights, x, keys)
    for i in range(4):
        expected = by_hand(x[i], reference.keep_mask(keys[i], 0.5, (40,)))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name][i], value)

    # What was drawn shows in the bias of the first layer: no gradient where dropped.
    f = maybe_compile(vmap(grad(drawn), in_dims=(None, 0), randomness="different"), compiled)
    actual = f(weights, x)
    masks = actual["0.bias"] != 0
    for i in range(4):
        expected = by_hand(x[i], masks[i])
        for name, value in expected.items():
            torch.testing.assert_close(actual[name][i], value)
        assert not any(torch.equal(masks[i], masks[j]) for j in range(i))


@COMPILE
def test_in_place(compiled, key):
    def f(x, key):
        y = x * 3
        dropout(y, inplace=True, key=key)
        return y

    x = random_tensor((4, N))
    keys = reference.split(key, 4)
    one = reference.apply(3 * x, key, 0.5, 2.0, [0, 1])
    many = torch.stack([reference.apply(3 * x[i], keys[i], 0.5, 2.0) for i in range(4)])
    assert_same_bits(maybe_compile(vmap(f, in_dims=(0, None)), compiled)(x, key), one)
    assert_same_bits(maybe_compile(vmap(f), compiled)(x, keys), many)
    gradient = maybe_compile(grad(lambda x, k: f(x, k).sum()), compiled)(x[0], key)
    assert_same_bits(gradient, 3 * factor(N, key))
    gradients = maybe_compile(vmap(grad(lambda x, k: f(x, k).sum())), compiled)(x, keys)
    assert_same_bits(gradients, torch.stack([3 * factor(N, k) for k in keys]))
    y, tangent = maybe_compile(lambda x, k: jvp(lambda x: f(x, k), (x,), (x,)), compiled)(x[0], key)
    assert_same_bits(y, one[0])
    assert_same_bits(tangent, one[0])


def test_the_operator_in_place_under_vmap(key):
    keys = reference.split(key, 4)
    y = random_tensor((4, N))
    expected = torch.stack([reference.apply(y[i], keys[i], 0.5, 2.0) for i in range(4)])

    def f(y, key):
        torch.ops.dropout_ext.apply_(y, key, 0.5, 2.0, [], 0)
        return y

    assert_same_bits(vmap(f)(y, keys), expected)
    assert_same_bits(y, expected)
    with pytest.raises(ValueError, match="inplace=False"):
        vmap(f, in_dims=(None, 0))(y[0], keys)


def test_a_generator(key):
    generator = torch.Generator().manual_seed(4)
    expected = dropout(torch.ones(N), generator=torch.Generator().manual_seed(4))
    y, _ = vjp(lambda x: dropout(x, generator=generator), torch.ones(N))
    assert_same_bits(y, expected)


@pytest.mark.cuda
def test_cuda(key):
    x = random_tensor((4, N)).cuda()
    keys = reference.split(key, 4)
    y = vmap(lambda x, k: dropout(x, key=k))(x, keys)
    assert_same_bits(y, torch.stack([dropout(x[i].cpu(), key=keys[i]) for i in range(4)]))
    y = vmap(lambda x: dropout(x), randomness="different")(torch.ones_like(x))
    for i in range(4):
        for j in range(i):
            assert_fair(y[i] != y[j])
    gradient = grad(lambda x: cube(x, key).sum())(x[0])
    torch.testing.assert_close(gradient.cpu(), 3 * factor(N, key) ** 3 * x[0].cpu() ** 2)
