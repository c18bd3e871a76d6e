"""Subclasses and modes see the call; the flop counter and the profiler name it."""

import pytest
import torch
from family import MODULES
from helpers import assert_same_bits, random_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dropout_ext
from dropout_ext import _reference as reference
from dropout_ext import functional

ops = torch.ops.dropout_ext
N = 1000
FUNCTIONS = {
    "shared": dropout_ext.dropout,
    "alpha": dropout_ext.functional.alpha_dropout,
    "feature_alpha": dropout_ext.functional.feature_alpha_dropout,
    "path": dropout_ext.functional.drop_path,
    "locked": dropout_ext.functional.locked_dropout,
}


def function_of(name):
    return FUNCTIONS.get(name) or getattr(dropout_ext.functional, name)


class Logged(torch.Tensor):
    """Sees the call and stays of its type."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper:
    """No tensor at all, but with a say in the call."""

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [a.tensor if isinstance(a, cls) else a for a in args]
        return cls(func(*args, **(kwargs or {})))


@pytest.mark.parametrize("name", MODULES)
def test_torch_function_subclass(name, key):
    make, shape = MODULES[name]
    module = make(0.5)
    x = random_tensor(shape)
    Logged.seen.clear()
    y = module(x.as_subclass(Logged), key=key)
    assert function_of(name) in Logged.seen
    assert type(y) is Logged
    assert_same_bits(y.as_subclass(torch.Tensor), module(x, key=key))


@pytest.mark.parametrize("name", MODULES)
def test_torch_function_of_what_is_no_tensor(name, key):
    make, shape = MODULES[name]
    module = make(0.5)
    x = random_tensor(shape)
    y = module(Wrapper(x), key=key)
    assert type(y) is Wrapper
    assert_same_bits(y.tensor, module(x, key=key))


class Arguments:
    """Tells how it was called."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return args[1:], kwargs


def test_torch_function_gets_all_arguments_by_keyword():
    """As torch.nn.functional hands them on, whatever the caller wrote."""
    more = {"key": None, "generator": None}
    given = {"p": 0.3, "training": True, "inplace": False}
    for function in (functional.dropout1d, functional.alpha_dropout):
        for arguments, named in (((0.3, True), {}), ((), {"p": 0.3, "training": True})):
            assert function(Arguments(), *arguments, **named) == ((), given | more)
    args, kwargs = functional.dropout(Arguments(), 0.3, True)
    assert args == () and kwargs.items() >= (given | more).items()
    with pytest.raises(TypeError):
        functional.dropout1d(Arguments(), 0.3, True, False, None)


def test_what_is_no_tensor_errs():
    for wrong in ([1.0], 1.0, None, "x"):
        with pytest.raises(TypeError, match="'input' must be Tensor"):
            dropout_ext.dropout(wrong)


class FunctionMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODULES)
def test_torch_function_mode(name, key):
    make, shape = MODULES[name]
    module = make(0.5)
    x = random_tensor(shape)
    with FunctionMode() as mode:
        y = module(x, key=key)
    assert function_of(name) in mode.seen
    assert_same_bits(y, module(x, key=key))


class DispatchMode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drawn", [False, True])
def test_torch_dispatch_mode(drawn, key):
    x = random_tensor((N,)).requires_grad_()
    given = None if drawn else key
    torch.manual_seed(4)
    expected = dropout_ext.dropout(x, key=given)
    torch.manual_seed(4)
    with DispatchMode() as mode:
        y = dropout_ext.dropout(x, key=given)
        assert mode.seen == [ops.apply.default]  # the draw is no operator: as plain eager
        y.sum().backward()
    assert mode.seen.count(ops.apply.default) == 2
    assert_same_bits(y, expected)
    assert_same_bits(x.grad, torch.where(expected != 0, 2.0, 0.0))
    z = x.detach().clone()
    with DispatchMode() as mode:
        dropout_ext.dropout(z, inplace=True, key=key)
        dropout_ext.functional.alpha_dropout(z, training=True, key=key)
    # In place by PyTorch's own operator, which every mode knows to write.
    assert mode.seen == [ops.apply.default, torch.ops.aten.copy_.default, ops.apply.default]


class Dispatched(torch.Tensor):
    """A wrapper subclass: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [a.inner if isinstance(a, cls) else a for a in args]
        out = func(*args, **(kwargs or {}))
        return cls(out) if isinstance(out, torch.Tensor) else out


@pytest.mark.parametrize("drawn", [False, True])
def test_torch_dispatch_subclass(drawn, key):
    inner = random_tensor((N,))
    x = Dispatched(inner.clone().requires_grad_())
    torch.manual_seed(4)
    expected = dropout_ext.dropout(inner, key=None if drawn else key)
    torch.manual_seed(4)
    y = dropout_ext.dropout(x, key=None if drawn else key)
    assert type(y) is Dispatched
    assert_same_bits(y.inner, expected)
    y.backward(Dispatched(torch.ones(N)))
    assert_same_bits(x.grad.inner, torch.where(expected != 0, 2.0, 0.0))
    z = Dispatched(inner.clone())
    assert dropout_ext.dropout(z, inplace=True, key=key) is z
    assert_same_bits(z.inner, reference.apply(inner, key, 0.5, 2.0))


def test_parameters_are_plain(key):
    parameter = torch.nn.Parameter(random_tensor((N,)))
    y = dropout_ext.dropout(parameter, key=key)
    assert type(y) is torch.Tensor
    assert_same_bits(y.detach(), reference.apply(parameter.detach(), key, 0.5, 2.0))
    buffer = torch.nn.Buffer(random_tensor((N,)))
    assert_same_bits(dropout_ext.dropout(buffer, key=key), reference.apply(buffer, key, 0.5, 2.0))


def test_default_device_mode(key):
    """torch.set_default_device is a mode: draws and keys stay where the contract puts them."""
    x = torch.ones(N)
    torch.manual_seed(4)
    expected = dropout_ext.dropout(x)
    torch.manual_seed(4)
    with torch.device("meta"):
        assert_same_bits(dropout_ext.dropout(x), expected)
        y = dropout_ext.dropout(x, key=key)
        mask = dropout_ext.keep_mask((N,), 0.5, key)
    assert_same_bits(y, reference.apply(x, key, 0.5, 2.0))
    assert torch.equal(mask, y != 0)


def test_deterministic_algorithms(key):
    torch.use_deterministic_algorithms(True)
    try:
        y = dropout_ext.dropout(torch.ones(N), key=key)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(y, reference.apply(torch.ones(N), key, 0.5, 2.0))


def test_flop_counter(key):
    """It counts what it is told: no multiply-accumulates of ours, and a formula can be given."""
    x = random_tensor((N,)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = dropout_ext.dropout(x, key=key)
        y.sum().backward()
    assert counter.get_total_flops() == 0
    assert_same_bits(y.detach(), reference.apply(x.detach(), key, 0.5, 2.0))

    def flops(input_shape, *args, out_shape=None, **kwargs):
        return torch.Size(input_shape).numel()

    with FlopCounterMode(display=False, custom_mapping={ops.apply: flops}) as counter:
        dropout_ext.dropout(x, key=key).sum().backward()
    assert counter.get_flop_counts()["Global"] == {ops.apply: 2 * N}


def test_profiler(key):
    x = random_tensor((N,)).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = dropout_ext.dropout(x, key=key)
        y.sum().backward()
        with torch.no_grad():
            dropout_ext.dropout(y, inplace=True, key=key)
        dropout_ext.keep_mask((5,), 0.5, key)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["dropout_ext::apply"] >= 2
    assert counts["dropout_ext::apply_"] >= 1
    assert counts["dropout_ext::keep_mask"] == 1


@pytest.mark.cuda
def test_profiler_on_cuda(key):
    x = random_tensor((N,)).cuda()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        dropout_ext.dropout(x, key=key)
        torch.cuda.synchronize()
    kernels = [e.key for e in profile.key_averages() if e.device_type.name == "CUDA"]
    assert any("dropout" in kernel for kernel in kernels)
