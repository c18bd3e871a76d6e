"""A call that fails leaves every tensor, version counter, graph and generator as it was."""

import contextlib
import math

import pytest
import torch
from family import ALPHA_MEMBERS, EACH_WAY, MEMBERS
from helpers import bits, make_key, random_tensor
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dropout_ext import functional

KEY = make_key()
SHAPE = (4, 3, 2, 5)
FUNCTIONS = {name: (MEMBERS | ALPHA_MEMBERS)[name][0] for name in EACH_WAY}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


# What stands between the call and the kernel: a context, and what the input becomes in it.
ROUTES = {
    "eager": (contextlib.nullcontext, lambda x: x),
    "dispatch mode": (Passing, lambda x: x),
    "function mode": (BaseTorchFunctionMode, lambda x: x),
    "subclass": (contextlib.nullcontext, lambda x: x.as_subclass(Subclass)),
    "wrapper subclass": (
        contextlib.nullcontext,
        lambda x: TwoTensor(x.detach(), x.detach().clone()).requires_grad_() * 1,
    ),
    "forward AD": (
        forward_ad.dual_level,
        lambda x: forward_ad.make_dual(x, torch.ones_like(x)),
    ),
}
each_route = pytest.mark.parametrize("route", ROUTES)
each_inplace = pytest.mark.parametrize("inplace", [False, True])

# Arguments beside p, training and inplace that fail for every member.
BAD_SOURCES = {
    "key of wrong shape": ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError),
    "key per slice of another": ({"key": torch.zeros((9, 2), dtype=torch.int64)}, ValueError),
    "key of wrong dtype": ({"key": torch.zeros(2)}, TypeError),
    "key on another device": ({"key": KEY.to("meta")}, ValueError),
    "key is no tensor": ({"key": 5}, TypeError),
    "key and generator": ({"key": KEY, "generator": torch.Generator()}, ValueError),
    "no generator": ({"generator": 5}, TypeError),
}
# Of `dropout` alone.
BAD_SHARING = {
    "broadcast_dims out of range": ({"broadcast_dims": (4,)}, IndexError),
    "broadcast_dims are no integers": ({"broadcast_dims": (1.5,)}, TypeError),
    "broadcast_dims is no sequence": ({"broadcast_dims": 1}, TypeError),
    "too few mask_strides": ({"mask_strides": (1,)}, ValueError),
    "mask_strides are no integers": ({"mask_strides": (1.5, 1, 1, 1)}, TypeError),
    "None in mask_strides": ({"mask_strides": (None, 1, 1, 1)}, TypeError),
    "mask_strides and broadcast_dims": (
        {"mask_strides": (1, 1, 1, 1), "broadcast_dims": (1,)},
        ValueError,
    ),
    "mask_offset is no integer": ({"mask_offset": 1.5}, TypeError),
    "mask_offset is None": ({"mask_offset": None}, TypeError),
    "mask_offset is text": ({"mask_offset": "1"}, TypeError),
}
BAD_PROBABILITIES = {
    -0.1: ValueError,
    1.1: ValueError,
    math.inf: ValueError,
    math.nan: ValueError,
    "0.5": TypeError,
    None: TypeError,
}
BAD_INPUTS = {
    "integers": (torch.ones(SHAPE, dtype=torch.int64), TypeError),
    "float8": (torch.ones(SHAPE).to(torch.float8_e4m3fn), TypeError),
    "sparse": (torch.ones(SHAPE).to_sparse(), TypeError),
    "nested": (
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.strided),
        TypeError,
    ),
}


def seen(tensor):
    if isinstance(tensor, TwoTensor):
        return seen(tensor.a), seen(tensor.b)
    return (
        bits(tensor).flatten().tolist(),
        None if tensor.is_inference() else tensor._version,
        tensor.grad_fn,
        tensor.output_nr,
        tensor.requires_grad,
        tensor.data_ptr(),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


@contextlib.contextmanager
def nothing_changes(exception, *tensors, generator=None):
    """The body raises exactly that and changes neither the tensors nor a generator."""
    generators = [torch.default_generator, *([generator] if generator is not None else [])]
    before = [seen(tensor) for tensor in tensors]
    states = [each.get_state() for each in generators]
    with pytest.raises(exception) as info:
        yield
    assert info.type is exception
    for each, state in zip(generators, states, strict=True):
        assert torch.equal(each.get_state(), state)
    assert [seen(tensor) for tensor in tensors] == before


@each_route
@each_inplace
@pytest.mark.parametrize("bad", BAD_SOURCES)
@each_function
def test_bad_source(function, bad, inplace, route):
    source, exception = BAD_SOURCES[bad]
    generator = source.get("generator")
    generator = generator if isinstance(generator, torch.Generator) else None
    leaf = random_tensor(SHAPE).requires_grad_()
    context, transform = ROUTES[route]
    with context():
        x = transform(leaf * 1)
        with nothing_changes(exception, x, leaf, generator=generator):
            function(x, 0.5, True, inplace, **source)


@each_route
@each_inplace
@pytest.mark.parametrize("p", BAD_PROBABILITIES)
@each_function
def test_bad_probability(function, p, inplace, route):
    leaf = random_tensor(SHAPE).requires_grad_()
    context, transform = ROUTES[route]
    with context():
        x = transform(leaf * 1)
        with nothing_changes(BAD_PROBABILITIES[p], x, leaf):
            function(x, p, True, inplace)


@each_route
@each_inplace
@pytest.mark.parametrize("bad", BAD_SHARING)
def test_bad_sharing(bad, inplace, route):
    arguments, exception = BAD_SHARING[bad]
    leaf = random_tensor(SHAPE).requires_grad_()
    context, transform = ROUTES[route]
    with context():
        x = transform(leaf * 1)
        with nothing_changes(exception, x, leaf):
            functional.dropout(x, 0.5, True, inplace, **arguments)


@each_inplace
@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("route", ["eager", "dispatch mode", "function mode"])
def test_bad_input(bad, inplace, route):
    x, exception = BAD_INPUTS[bad]
    with ROUTES[route][0](), nothing_changes(exception):
        functional.dropout(x, 0.5, True, inplace)


# In place where it may not be.


class ViewOfMine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def view_under_no_grad(x):
    with torch.no_grad():
        return x.view_as(x)


def inference(shape):
    with torch.inference_mode():
        return torch.ones(shape)


# What cannot be written, of a leaf.
UNWRITABLE = {
    "leaf": lambda leaf: leaf,
    "view of a leaf": lambda leaf: leaf.view_as(leaf),
    "expanded": lambda leaf: (leaf[:1] * 1).expand_as(leaf),
    "one of several views": lambda leaf: torch.cat([leaf, leaf]).chunk(2)[1],
    "view of a custom function": lambda leaf: ViewOfMine.apply(leaf * 1),
    "view made under no_grad": lambda leaf: view_under_no_grad(leaf * 1),
    "inference tensor": lambda leaf: inference(leaf.shape),
    "view of an inference tensor": lambda leaf: inference(leaf.shape)[:],
    "expanded inference tensor": lambda leaf: inference((1,)).expand(leaf.shape),
    "expanded, no gradient": lambda leaf: leaf.detach()[:1].expand_as(leaf),
}

SOURCES = {
    "key": lambda: {"key": KEY},
    "drawn": lambda: {},
    "generator": lambda: {"generator": torch.Generator()},
}
each_source = pytest.mark.parametrize("source", SOURCES)


@each_source
@pytest.mark.parametrize("route", ["eager", "dispatch mode", "function mode"])
@pytest.mark.parametrize("what", UNWRITABLE)
@each_function
def test_unwritable(function, what, route, source):
    leaf = random_tensor(SHAPE).requires_grad_()
    x = UNWRITABLE[what](leaf)
    arguments = SOURCES[source]()
    with ROUTES[route][0]():
        with pytest.raises(RuntimeError):
            x.mul_(2)
        with nothing_changes(RuntimeError, x, leaf, generator=arguments.get("generator")):
            function(x, 0.5, True, True, **arguments)


# Where the key cannot be saved for the backward.


class Refused(Exception):
    pass


def refuse(_):
    raise Refused


def cannot_save_an_inference_key(call):
    with torch.inference_mode():
        key = KEY.clone()
    return lambda: call(key=key)


def cannot_save_through_hooks(call):
    def wrapped():
        with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
            call(key=KEY)

    return wrapped


UNSAVABLE = {
    "key of inference mode": (cannot_save_an_inference_key, RuntimeError),
    "hooks that raise": (cannot_save_through_hooks, Refused),
}


@each_inplace
@pytest.mark.parametrize("what", UNSAVABLE)
@pytest.mark.parametrize("view", [False, True])
@each_function
def test_unsavable(function, what, inplace, view):
    make, exception = UNSAVABLE[what]
    leaf = random_tensor((SHAPE[0] + 2, *SHAPE[1:])).requires_grad_()
    base = leaf * 3
    x = base[1:-1] if view else base
    call = make(lambda **kw: function(x, 0.5, True, inplace, **kw))
    with nothing_changes(exception, x, base, leaf):
        call()
    (grad,) = torch.autograd.grad(base, leaf, torch.ones_like(base))
    assert torch.equal(grad, torch.full_like(leaf, 3))


# Under functorch.


@each_inplace
@each_function
def test_vmap_without_randomness(function, inplace):
    x = random_tensor((2, *SHAPE))
    with nothing_changes(RuntimeError, x):
        torch.vmap(lambda x: function(x, 0.5, True, inplace))(x)


@each_function
def test_vmap_in_place_on_what_is_not_batched(function):
    """With a drawn key the error is PyTorch's, of the copy that follows the draw."""
    x, keys = random_tensor(SHAPE), torch.stack([KEY, KEY])
    with nothing_changes(RuntimeError, x):
        torch.vmap(lambda key: function(x, 0.5, True, True, key=key))(keys)


# Nested tensors.


@each_inplace
def test_jagged_that_cannot_share(inplace):
    values = random_tensor((7, 3)).requires_grad_()
    x = torch.nested.nested_tensor_from_jagged(values * 1, torch.tensor([0, 3, 7]))
    with nothing_changes(ValueError, x.values(), values):
        functional.dropout(x, 0.5, True, inplace, broadcast_dims=(0,))
    with nothing_changes(ValueError, x.values(), values):
        functional.locked_dropout(x, 0.5, 1, True, inplace)
