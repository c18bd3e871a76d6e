"""One seed gives the same masks on every path, and generators work everywhere."""

import pytest
import torch
from helpers import assert_same_bits, random_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dropout_ext
from dropout_ext import _reference as reference

N = 1000


class Passive(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def layer(x):
    """Two draws, so that a path that draws too much or too little shows in the second."""
    return dropout_ext.dropout(dropout_ext.dropout(x, 0.1), 0.5)


def under_mode(x):
    with Passive():
        return layer(x)


def recomputed(use_reentrant, f=layer):
    """What the backward sees of the masks: the gradient of a checkpointed region."""

    def run(x):
        x = x.detach().requires_grad_()
        y = checkpoint(f, x, use_reentrant=use_reentrant)
        torch.rand(3)
        y.backward(x)  # reentrant checkpoints take no torch.autograd.grad
        assert_same_bits(x.grad, y.detach())
        return x.grad

    return run


def compiled(**kwargs):
    def run(x):
        return torch.compile(layer, fullgraph=True, **kwargs)(x)

    return run


def traced(x):
    return torch.fx.experimental.proxy_tensor.make_fx(layer)(x)(x)


PATHS = {
    "requires_grad": lambda x: layer(x.clone().requires_grad_()).detach(),
    "no_grad": torch.no_grad()(layer),
    "inference_mode": torch.inference_mode()(layer),
    "in place": lambda x: dropout_ext.dropout(
        dropout_ext.dropout(x.clone(), 0.1, inplace=True), 0.5, inplace=True
    ),
    "autocast": torch.autocast("cpu", torch.bfloat16)(layer),
    "aot_eager": compiled(backend="aot_eager"),
    "aot_eager dynamic": compiled(backend="aot_eager", dynamic=True),
    "inductor": compiled(),
    "inductor with fallback_random": compiled(options={"fallback_random": True}),
    "grad": lambda x: torch.func.grad(lambda y: (layer(y) * x).sum())(x),
    "vjp": lambda x: torch.func.vjp(layer, x)[0],
    "jvp": lambda x: torch.func.jvp(layer, (x,), (x,))[1],
    "vmap": lambda x: torch.func.vmap(layer, randomness="same")(x.expand(2, -1))[1],
    "compiled vmap": lambda x: torch.compile(
        torch.func.vmap(layer, randomness="same"), backend="aot_eager", fullgraph=True
    )(x.expand(2, -1))[1],
    "dispatch mode": under_mode,
    "subclass": lambda x: layer(x.as_subclass(Subclass)).as_subclass(torch.Tensor),
    "checkpoint": recomputed(False),
    "reentrant checkpoint": recomputed(True),
    "compiled checkpoint": recomputed(False, compiled(backend="aot_eager")),
    "module": lambda x: torch.nn.Sequential(dropout_ext.Dropout(0.1), dropout_ext.Dropout(0.5))(x),
    "channels": lambda x: dropout_ext.functional.locked_dropout(
        dropout_ext.functional.locked_dropout(x[None], 0.1, dim=0), 0.5, dim=0
    )[0],
}


@pytest.mark.parametrize("path", PATHS)
def test_one_seed_one_mask(path):
    torch.compiler.reset()
    x = random_tensor((N,))
    torch.manual_seed(17)
    keys = [~torch.cat([torch.randint(0, 2**63 - 1, (1,)) for _ in "ab"]) for _ in "ab"]
    expected = reference.apply(x, keys[0], 0.1, 1 / (1 - 0.1))
    expected = reference.apply(expected, keys[1], 0.5, 2.0)
    torch.manual_seed(17)
    # Derivatives multiply by x after the factors, not before: one rounding more.
    close = torch.testing.assert_close if path in ("grad",) else assert_same_bits
    close(PATHS[path](x).detach().clone(), expected)


def test_seed_reproduces():
    x = torch.ones(N)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout_ext.dropout(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_rng_state_replays():
    x = torch.ones(N)
    state = torch.get_rng_state()
    first, second = dropout_ext.dropout(x), dropout_ext.dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(dropout_ext.dropout(x), first)
    assert torch.equal(dropout_ext.dropout(x), second)
    assert not torch.equal(first, second)


def test_fork_rng():
    x = torch.ones(N)
    with torch.random.fork_rng():
        first = dropout_ext.dropout(x)
    assert torch.equal(dropout_ext.dropout(x), first)


def test_a_replayed_mask():
    """The recipe of docs/composability.md: draw the key oneself, keep 16 bytes."""
    generator = torch.Generator().manual_seed(5)
    key = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator)
    x = random_tensor((N,))
    y = dropout_ext.dropout(x, 0.5, key=key)
    assert_same_bits(y, torch.where(dropout_ext.keep_mask(x.shape, 0.5, key), 2 * x, 0.0))


@pytest.mark.parametrize("where", ["function", "module"])
def test_generator(where):
    x = random_tensor((N,))
    torch.manual_seed(3)
    expected = [dropout_ext.dropout(x) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    module = dropout_ext.Dropout(generator=generator)
    call = module if where == "module" else lambda x: dropout_ext.dropout(x, generator=generator)
    state = torch.get_rng_state()
    for y in expected:
        assert_same_bits(call(x), y)
    assert torch.equal(torch.get_rng_state(), state)
    saved = generator.get_state()
    again = call(x)
    generator.set_state(saved)
    assert_same_bits(call(x), again)


def test_generator_of_another_device():
    if torch.cuda.is_available():
        pytest.skip("a CUDA generator would be made")
    x = torch.ones(4, device="meta")
    assert dropout_ext.dropout(x, generator=torch.Generator()).shape == (4,)


@pytest.mark.cuda
def test_cuda_generators():
    x = torch.ones(N, device="cuda")
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    y = dropout_ext.dropout(x, generator=ours)
    assert_same_bits(y, dropout_ext.dropout(x.cpu(), generator=theirs))
    a, b = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    first = dropout_ext.dropout(x, generator=a)
    assert_same_bits(first, dropout_ext.dropout(x, generator=b))
    assert not torch.equal(dropout_ext.dropout(x, generator=a), first)
    torch.manual_seed(8)
    first = dropout_ext.dropout(x)
    torch.manual_seed(8)
    state = torch.cuda.get_rng_state()
    assert_same_bits(dropout_ext.dropout(x), first)
    torch.cuda.set_rng_state(state)
    assert_same_bits(dropout_ext.dropout(x), first)
    with torch.random.fork_rng():
        second = dropout_ext.dropout(x)
    assert_same_bits(dropout_ext.dropout(x), second)
    with pytest.raises(ValueError, match="generator"):
        dropout_ext.dropout(x.cpu(), generator=a)
