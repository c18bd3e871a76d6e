"""Bad input: the exception's type, and that its message names the argument, the value and what is
accepted."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family import FUNCTIONS
from helpers import assert_same_bits, broadcast_strides, make_key, random_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dropout_ext
from dropout_ext import _reference as reference
from dropout_ext import dropout, functional

X = torch.ones(4, 6)
KEY = make_key()
ops = torch.ops.dropout_ext

each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def check(exception, parts, call):
    """Raises exactly that, says all of `parts`, and leaves the generator alone."""
    state = torch.get_rng_state()
    with pytest.raises(exception) as info:
        call()
    assert info.type is exception
    for part in parts:
        assert part in str(info.value)
    assert torch.equal(torch.get_rng_state(), state)


@each_function
@pytest.mark.parametrize("p", [-0.1, 1.1, -math.inf, math.inf, math.nan, 2])
def test_probability_outside(function, p):
    check(
        ValueError,
        ["dropout probability has to be between 0 and 1, but got"],
        lambda: function(X, p),
    )
    with pytest.raises(ValueError):
        function(X, p, False)


def test_probability_is_worded_as_in_torch():
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError) as expected:
            F.dropout(X, p)
        check(ValueError, [str(expected.value)], lambda p=p: dropout_ext.dropout(X, p))


@each_function
@pytest.mark.parametrize("p", ["0.5", None, [0.5], 1j])
def test_probability_of_wrong_type(function, p):
    check(TypeError, ["'p'", type(p).__name__], lambda: function(X, p))


@each_function
@pytest.mark.parametrize("x", [[1.0, 2.0], 3.0, None, "x"])
def test_input_is_no_tensor(function, x):
    check(TypeError, ["input", type(x).__name__, "Tensor"], lambda: function(x))


DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@each_function
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_input_of_wrong_dtype(function, dtype, inplace):
    x = torch.ones(4, 6).to(dtype)
    parts = ["'input'", str(dtype), "float32", "bfloat16"]
    check(TypeError, parts, lambda: function(x, inplace=inplace))


@each_function
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_passes_where_nothing_is_dropped(function, dtype):
    x = torch.ones(4, 6).to(dtype)
    assert function(x, 0.0) is x
    assert function(x, 0.5, False) is x


def test_alpha_takes_no_complex():
    for function in (functional.alpha_dropout, functional.feature_alpha_dropout):
        check(
            TypeError,
            ["'input'", "complex64", "float32"],
            lambda f=function: f(X.cfloat(), 0.5, True),
        )


def test_quantized_and_sparse_input():
    quantized = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    check(TypeError, ["'input'", "quint8", "float32"], lambda: dropout_ext.dropout(quantized))
    check(TypeError, ["'input'", "strided"], lambda: dropout_ext.dropout(X.to_sparse()))


@each_function
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2), (4, 3), (1, 4, 2), (0,)])
def test_key_of_wrong_shape(function, shape):
    key = torch.zeros(shape, dtype=torch.int64)
    check(ValueError, ["'key'", str(list(shape)), "(2,)", "(4, 2)"], lambda: function(X, key=key))


def test_key_per_slice_of_a_scalar():
    key = torch.zeros((1, 2), dtype=torch.int64)
    check(ValueError, ["'key'", "(2,)"], lambda: dropout_ext.dropout(torch.ones(()), key=key))


@each_function
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool, torch.uint32])
def test_key_of_wrong_dtype(function, dtype):
    key = torch.zeros(2).to(dtype)
    check(TypeError, ["'key'", str(dtype), "uint64"], lambda: function(X, key=key))


@each_function
@pytest.mark.parametrize("key", [5, (1, 2), "key"])
def test_key_is_no_tensor(function, key):
    check(TypeError, ["'key'", type(key).__name__, "ensor"], lambda: function(X, key=key))


@each_function
def test_key_on_another_device(function):
    check(ValueError, ["'key'", "meta", "cpu"], lambda: function(X, key=KEY.to("meta")))


@each_function
def test_key_and_generator(function):
    generator = torch.Generator()
    state = generator.get_state()
    check(ValueError, ["'key'", "'generator'"], lambda: function(X, key=KEY, generator=generator))
    assert torch.equal(generator.get_state(), state)


@each_function
@pytest.mark.parametrize("generator", [5, "cpu"])
def test_generator_of_wrong_type(function, generator):
    check(
        TypeError,
        ["'generator'", type(generator).__name__],
        lambda: function(X, generator=generator),
    )


@pytest.mark.parametrize("dims", [(2,), (-3,), (0, 5)])
def test_broadcast_dims_out_of_range(dims):
    def calls():
        yield lambda: dropout_ext.dropout(X, broadcast_dims=dims)
        yield lambda: dropout_ext.keep_mask((4, 6), 0.5, KEY, broadcast_dims=dims)
        yield lambda: dropout_ext.Dropout(broadcast_dims=dims)(X)

    for call in calls():
        check(IndexError, ["'broadcast_dims'", str(dims[-1]), "-2", "1"], call)


def test_locked_dim_out_of_range():
    check(IndexError, ["'dim'", "2", "-2", "1"], lambda: functional.locked_dropout(X, 0.5, 2))


@pytest.mark.parametrize("dims", [(1.5,), (1.0,), ("1",), (True,), (None,), ((0, 1),), 1, X, 1.5])
def test_broadcast_dims_of_wrong_type(dims):
    parts = ["'broadcast_dims' must be a sequence of ints", str(dims)[:3]]
    check(TypeError, parts, lambda: dropout_ext.dropout(X, broadcast_dims=dims))
    check(TypeError, parts, lambda: dropout_ext.keep_mask((4, 6), 0.5, KEY, broadcast_dims=dims))


@pytest.mark.parametrize("dim", [1.5, 1.0, "1", True, None, (0, 1), torch.tensor([0, 1]), X])
def test_locked_dim_of_wrong_type(dim):
    parts = ["'dim' must be int", str(dim)[:6]]
    check(TypeError, parts, lambda: functional.locked_dropout(X, 0.5, dim))
    check(TypeError, parts, lambda: dropout_ext.LockedDropout(dim=dim)(X))


@pytest.mark.parametrize("one", [np.int64(1), torch.tensor(1), torch.tensor([1]), -1])
def test_dims_are_what_is_an_index(one):
    """All of it shares, as the integer does."""
    x = random_tensor((50, 7, 3))
    expected = reference.apply(x, KEY, 0.5, 2.0, broadcast_strides(x.shape, [int(one)]))
    assert_same_bits(functional.locked_dropout(x, dim=one, key=KEY), expected)
    assert_same_bits(dropout_ext.dropout(x, broadcast_dims=(one,), key=KEY), expected)
    mask = dropout_ext.keep_mask(x.shape, 0.5, KEY, broadcast_dims=[one])
    assert_same_bits(torch.where(mask, 2 * x, 0), expected)


def test_dims_in_a_tensor_or_an_array():
    x = random_tensor((50, 7, 3))
    expected = reference.apply(x, KEY, 0.5, 2.0, broadcast_strides(x.shape, [0, 2]))
    for dims in (torch.tensor([0, 2]), np.array([2, -3]), range(0, 3, 2), iter((0, 2))):
        assert_same_bits(dropout_ext.dropout(x, broadcast_dims=dims, key=KEY), expected)


def test_mask_strides_of_wrong_length():
    parts = ["'mask_strides'", "1", "2"]
    check(ValueError, parts, lambda: dropout_ext.dropout(X, mask_strides=(1,)))
    check(ValueError, parts, lambda: dropout_ext.keep_mask((4, 6), 0.5, KEY, mask_strides=(1,)))
    check(ValueError, parts, lambda: ops.apply(X, KEY, 0.5, 2.0, [1], 0))
    check(ValueError, parts, lambda: ops.keep_mask(KEY, 0.5, [4, 6], [1], 0))
    check(ValueError, parts, lambda: ops.keep_bits(KEY, 0.5, [4, 6], [1], 0))


def test_mask_strides_and_broadcast_dims():
    parts = ["'mask_strides'", "'broadcast_dims'"]
    check(
        ValueError, parts, lambda: dropout_ext.dropout(X, mask_strides=(6, 1), broadcast_dims=(0,))
    )


@pytest.mark.parametrize(
    ("arguments", "exception", "parts"),
    [
        (((3,), 1.5, KEY), ValueError, ["between 0 and 1, but got 1.5"]),
        (((3,), math.nan, KEY), ValueError, ["between 0 and 1, but got nan"]),
        (((3,), "0.5", KEY), TypeError, ["'p'", "str"]),
        (((3,), 0.5, 7), TypeError, ["'key'", "int"]),
        (((3,), 0.5, KEY.float()), TypeError, ["'key'", "float32", "uint64"]),
        (((3,), 0.5, torch.zeros(3, dtype=torch.int64)), ValueError, ["'key'", "3", "(2,)"]),
        (((3,), 0.5, torch.zeros((2, 2), dtype=torch.int64)), ValueError, ["'key'", "(3, 2)"]),
    ],
)
def test_keep_mask(arguments, exception, parts):
    check(exception, parts, lambda: dropout_ext.keep_mask(*arguments))


@pytest.mark.parametrize(
    ("call", "exception", "parts"),
    [
        (lambda: dropout_ext.key(-1), ValueError, ["'seed'", "-1", "2**64"]),
        (lambda: dropout_ext.key(2**64), ValueError, ["'seed'", str(2**64)]),
        (lambda: dropout_ext.key(0, -1), ValueError, ["'offset'", "-1"]),
        (lambda: dropout_ext.key(0.5), TypeError, ["'seed'", "float", "int"]),
        (lambda: dropout_ext.key(0, "1"), TypeError, ["'offset'", "str"]),
        (lambda: dropout_ext.fold_in(5, 0), TypeError, ["'key'", "int"]),
        (lambda: dropout_ext.fold_in(KEY.float(), 0), TypeError, ["'key'", "float32", "uint64"]),
        (lambda: dropout_ext.fold_in(KEY[:1], 0), ValueError, ["'key'", "1", "(2,)"]),
        (lambda: dropout_ext.fold_in(KEY, 0.5), TypeError, ["'n'", "float"]),
        (lambda: dropout_ext.fold_in(KEY, -1), ValueError, ["'n'", "-1"]),
        (lambda: dropout_ext.split(KEY, -1), ValueError, ["'n'", "-1"]),
        (lambda: dropout_ext.split(KEY, 1.5), TypeError, ["'n'", "float"]),
        (lambda: dropout_ext.split(KEY[:1], 2), ValueError, ["'key'", "1", "(2,)"]),
    ],
)
def test_keys(call, exception, parts):
    check(exception, parts, call)


@pytest.mark.parametrize(
    ("call", "exception", "parts"),
    [
        (lambda: ops.fold_in(torch.zeros(2), 1), TypeError, ["'key'", "float32", "uint64"]),
        (lambda: ops.fold_in(KEY.to(torch.uint8), 1), TypeError, ["'key'", "uint8", "uint64"]),
        (lambda: ops.fold_in(KEY.new_zeros(3), 1), ValueError, ["'key'", "[3]", "(2,)"]),
        (lambda: ops.fold_in(KEY[0], 1), ValueError, ["'key'", "[]", "(2,)"]),
        (lambda: ops.fold_in(KEY, -1), ValueError, ["'n'", "-1"]),
        (lambda: ops.split(torch.zeros(2), 3), TypeError, ["'key'", "float32", "uint64"]),
        (lambda: ops.split(KEY[:0], 3), ValueError, ["'key'", "[0]", "(2,)"]),
        (lambda: ops.split(KEY[None], 3), ValueError, ["'key'", "[1, 2]", "(2,)"]),
        (lambda: ops.split(KEY, -1), ValueError, ["'n'", "-1"]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_of_keys_check_too(call, exception, parts, device, monkeypatch):
    if device == "meta":  # the reference, which devices without a kernel of ours run, and shapes
        monkeypatch.setitem(globals(), "KEY", KEY.to("meta"))
    check(exception, parts, call)


class Raises:
    """A value whose conversion to a bool or a number fails."""

    def __init__(self, error):
        self.error = error

    def fail(self):
        raise self.error

    __bool__ = __float__ = __index__ = fail


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("argument", ["p", "training", "inplace", "mask_offset", "mask_strides"])
def test_an_argument_that_raises(argument, error):
    """Its error comes out at the call, and the input stays as it was. A failed conversion to a
    number is one more way to be of the wrong type.
    """
    value = (Raises(error),) if argument == "mask_strides" else Raises(error)
    x = torch.ones(3)
    bool_or_interrupt = argument in ("training", "inplace") or isinstance(error, KeyboardInterrupt)
    expected = type(error) if bool_or_interrupt else TypeError
    call = {"inplace": True} | {argument: value}
    check(expected, [] if bool_or_interrupt else [f"'{argument}'"], lambda: dropout(x, **call))
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("argument", ["training", "inplace"])
def test_an_ambiguous_bool(argument):
    x = torch.ones(3)
    check(RuntimeError, ["ambiguous"], lambda: dropout(x, **{argument: torch.ones(2)}))
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("value", [1.5, None, "1", torch.ones(1)])
@pytest.mark.parametrize("argument", ["mask_offset", "mask_strides"])
def test_indices_that_are_no_integers(argument, value):
    given = (value,) if argument == "mask_strides" else value
    check(
        TypeError,
        [
            f"'{argument}'",
            "int",
            repr(value) if argument == "mask_strides" else type(value).__name__,
        ],
        lambda: dropout(torch.ones(3), **{argument: given}),
    )


@pytest.mark.parametrize("index", [np.uint64(2**64 - 1), np.int8(-1), torch.tensor(-1), -1])
def test_indices_of_other_integer_types(index):
    expected = reference.apply(torch.ones(3, 5), KEY, 0.5, 2.0, [-1, 1], -1)
    actual = dropout(torch.ones(3, 5), key=KEY, mask_strides=(index, 1), mask_offset=index)
    assert torch.equal(actual, expected)


class Subclass(torch.Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["subclass", "mode"])
def test_failing_calls_that_are_not_plain_draw_nothing(kind):
    leaf = torch.ones(2, 3, requires_grad=True)
    wide = torch.ones(1, 3).expand(2, 3)
    if kind == "subclass":
        leaf, wide = leaf.as_subclass(Subclass), wide.as_subclass(Subclass)
    with Mode() if kind == "mode" else contextlib.nullcontext():
        check(RuntimeError, ["leaf"], lambda: dropout(leaf, inplace=True))
        check(RuntimeError, ["memory location"], lambda: dropout(wide, inplace=True))
        check(ValueError, ["'mask_strides'"], lambda: dropout(wide, mask_strides=(1,)))
        check(TypeError, ["'input'", "int64"], lambda: dropout(wide.long()))
    inference = torch.inference_mode()(torch.ones)(3)
    check(RuntimeError, ["inference tensor"], lambda: dropout(inference, inplace=True))
    assert torch.equal(inference, torch.ones(3))


@pytest.mark.parametrize("p", [-0.1, math.nan])
def test_operators_check_too(p):
    check(ValueError, ["between 0 and 1"], lambda: ops.apply(X, KEY, p, 2.0, [], 0))
    check(ValueError, ["between 0 and 1"], lambda: ops.keep_mask(KEY, p, [4], [], 0))
    check(ValueError, ["between 0 and 1"], lambda: ops.keep_bits(KEY, p, [4], [], 0))
    check(TypeError, ["'input'", "int64"], lambda: ops.apply(X.long(), KEY, 0.5, 2.0, [], 0))
    check(TypeError, ["'key'"], lambda: ops.apply_(X.clone(), X[0, :2], 0.5, 2.0, [], 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the build, not the device")
def test_cuda_tensor_without_cuda_build():
    if dropout_ext.build_info()["cuda"]:
        pytest.skip("built with CUDA")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, device="cuda")
    with pytest.raises((RuntimeError, ValueError), match="DROPOUT_EXT_CUDA"):
        torch.ops.dropout_ext.apply.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), x, KEY, 0.5, 2.0, [1], 0
        )


@pytest.mark.parametrize(
    ("call", "exception", "parts"),
    [
        (lambda: dropout_ext.Dropout("0.1"), TypeError, ["'p'", "str"]),
        (lambda: dropout_ext.Dropout2d(p=None), TypeError, ["'p'", "NoneType"]),
        (lambda: dropout_ext.DropPath("0.1"), TypeError, ["'p'", "str"]),
        (lambda: dropout_ext.Dropout(generator=42), TypeError, ["'generator'", "int"]),
        (lambda: dropout_ext.DropPath(generator=42), TypeError, ["'generator'", "int"]),
        (lambda: dropout_ext.Dropout(broadcast_dims=1), TypeError, ["'broadcast_dims'", "1"]),
        (lambda: dropout_ext.keep_mask(4, 0.5, KEY), TypeError, ["'shape'", "4"]),
        (lambda: dropout_ext.keep_mask((4, 1.5), 0.5, KEY), TypeError, ["'shape'", "1.5"]),
        (lambda: functional.drop_path(X, 0.5, True, "x", key=5), TypeError, ["'key'", "int"]),
    ],
)
def test_errors_at_construction(call, exception, parts):
    check(exception, parts, call)
