"""The mask follows the logical position: every memory layout gives the same values."""

import math

import pytest
import torch
from helpers import (
    ALL_DTYPES,
    LAYOUTS,
    SHARED_LAYOUTS,
    assert_same_bits,
    broadcast_strides,
    random_tensor,
)

import dropout_ext
from dropout_ext import _reference as reference
from dropout_ext import functional

ops = torch.ops.dropout_ext

SHAPES = [(3, 37, 12, 11), (2, 9, 4, 5, 6), (67, 130), (5, 1, 300), (2, 3, 4, 1, 3, 2)]
SHARED_DIMS = [(), (0,), (-1,), (0, 1)]


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED_LAYOUTS])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_layout(layout, shape, dtype, key):
    x = {**LAYOUTS, **SHARED_LAYOUTS}[layout](random_tensor(shape, dtype))
    before = x.clone()
    for dims in SHARED_DIMS:
        strides = broadcast_strides(shape, dims)
        expected = reference.apply(x.contiguous(), key, 0.5, 2.0, strides, 3)
        y = ops.apply(x, key, 0.5, 2.0, strides, 3)
        assert y.stride() == torch.empty_like(x).stride()
        assert_same_bits(y, expected)
        assert_same_bits(x, before)
        if not dtype.is_complex:
            y = ops.apply(x, key, 0.5, 2.0, strides, 3, 0.5, -1.0)
            contiguous = ops.apply(x.contiguous(), key, 0.5, 2.0, strides, 3, 0.5, -1.0)
            assert y.stride() == torch.empty_like(x).stride()
            assert_same_bits(y, contiguous)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout_in_place(layout, shape, key):
    x = LAYOUTS[layout](random_tensor(shape))
    base = x._base if x._base is not None else x
    untouched = base.clone()
    pointer, strides = x.data_ptr(), x.stride()
    expected = reference.apply(x.contiguous(), key, 0.5, 2.0)
    assert dropout_ext.dropout(x, 0.5, inplace=True, key=key) is x
    assert (x.data_ptr(), x.stride()) == (pointer, strides)
    assert_same_bits(x, expected)
    # Nothing but the view was written.
    untouched.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(expected)
    assert_same_bits(base, untouched)


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED_LAYOUTS])
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, *SHARED_LAYOUTS])
def test_gradient_of_any_layout(layout, grad_layout, key):
    all_layouts = {**LAYOUTS, **SHARED_LAYOUTS}
    x = all_layouts[layout](random_tensor((3, 37, 12, 11))).requires_grad_()
    grad = all_layouts[grad_layout](random_tensor((3, 37, 12, 11), seed=1))
    (actual,) = torch.autograd.grad(dropout_ext.dropout(x, 0.5, key=key), x, grad)
    assert_same_bits(actual, reference.apply(grad.contiguous(), key, 0.5, 2.0))


def test_expanded_gradient(key):
    x = random_tensor((3, 37, 12, 11)).requires_grad_()
    for function in (functional.dropout, functional.dropout2d):
        y = function(x, 0.5, key=key)
        (actual,) = torch.autograd.grad(y.sum(), x)
        assert_same_bits(actual, function(torch.ones_like(x), 0.5, key=key).detach())


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 9, 4, 5), torch.channels_last), ((2, 9, 4, 5, 6), torch.channels_last_3d)],
)
def test_channels_last_stays(shape, memory_format, key):
    x = random_tensor(shape).contiguous(memory_format=memory_format).requires_grad_()
    y = dropout_ext.dropout(x, key=key)
    assert y.is_contiguous(memory_format=memory_format)
    y.backward(torch.ones_like(x))
    assert x.grad.is_contiguous(memory_format=memory_format)


def test_large_transposed(key, threads):
    """Over the tiles of the transposing path, with one thread and two."""
    x = random_tensor((1100, 1030)).t()
    expected = reference.apply(x.contiguous(), key, 0.3, 1 / 0.7)
    for n in (1, 2):
        threads(n)
        assert_same_bits(dropout_ext.dropout(x, 0.3, key=key), expected)


@pytest.mark.parametrize(
    ("shape", "strides", "dtype"),
    [
        ((9_000_003,), [1], torch.float32),
        ((17_000_005,), [1], torch.bfloat16),
        ((9_000_003,), [2], torch.float32),
        ((70, 64, 2048), [64, 1, 0], torch.float32),  # channels
        ((70, 131_073), [1, 0], torch.float32),  # paths
        ((16, 33, 16384), [16384, 0, 1], torch.float32),  # locked
        ((4097, 2080), [1, 4097], torch.float32),  # transposed
        ((2_100_000,), [1], torch.complex128),
        ((3000, 48, 64), [64, 1, 0], torch.float32),
    ],
)
def test_outputs_beyond_the_caches(shape, strides, dtype, key, threads):
    """A large output is written past the caches, which in place never happens."""
    x = random_tensor((1000,), dtype).repeat(-(-math.prod(shape) // 1000))
    x = x[: math.prod(shape)].view(shape)
    assert x.numel() * x.element_size() > 2**25
    for n, offset in ((1, 0), (2, 8), (2, 3)):
        threads(n)
        y = ops.apply(x, key, 0.5, 2.0, strides, offset)
        z = x.clone()
        ops.apply_(z, key, 0.5, 2.0, strides, offset)
        assert_same_bits(y, z)
        last = tuple(n - 1 for n in shape)
        index = sum(i * s for i, s in zip(last, strides, strict=True)) + offset
        assert_same_bits(y[last], reference.apply(x[last], key, 0.5, 2.0, [], index))
        del y, z
    keys = reference.split(key, shape[0]) if shape[0] < 100 else None
    if keys is not None:
        z = x.clone()
        ops.apply_(z, keys, 0.5, 2.0, strides, 0)
        assert_same_bits(ops.apply(x, keys, 0.5, 2.0, strides, 0), z)


def test_many_dimensions(key):
    shape = [2 if d % 6 == 0 else 1 for d in range(60)]
    x = random_tensor(shape).permute(*reversed(range(60)))
    expected = reference.apply(x.contiguous(), key, 0.5, 2.0)
    assert_same_bits(dropout_ext.dropout(x, key=key), expected)
