"""The operators against the reference, bit by bit, and their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALL_DTYPES,
    FLOAT_DTYPES,
    assert_same_bits,
    make_key,
    random_tensor,
    scaled_where,
)

import dropout_ext
from dropout_ext import _reference as reference

ops = torch.ops.dropout_ext

SHAPES = [(), (0,), (1,), (8,), (9,), (41,), (341,), (4231,), (40001,)]
SHAPES += [(3, 0, 5), (9, 41), (2, 3, 4, 5)]
PROBABILITIES = [0.1, 0.5, 0.9, 1.0, 1e-12]
SCALE, *AFFINE = 0.8864, 0.1937, -1.5583  # AFFINE: bias and what dropped elements become


def scale_of(p):
    return 1 / (1 - p) if p < 1 else 0.0


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_apply(dtype, shape, key):
    x = random_tensor(shape, dtype, special=True)
    for p in PROBABILITIES:
        expected = reference.apply(x, key, p, scale_of(p))
        assert_same_bits(ops.apply(x, key, p, scale_of(p), [], 0), expected)
        assert_same_bits(dropout_ext.dropout(x, p, key=key), expected)
        y = x.clone()
        assert ops.apply_(y, key, p, scale_of(p), [], 0) is None
        assert_same_bits(y, expected)
        y = x.clone()
        assert dropout_ext.dropout(y, p, inplace=True, key=key) is y
        assert_same_bits(y, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_apply_affine(dtype, shape, key):
    x = random_tensor(shape, dtype)
    expected = reference.apply(x, key, 0.3, SCALE, [], 0, *AFFINE)
    assert_same_bits(ops.apply(x, key, 0.3, SCALE, [], 0, *AFFINE), expected)
    y = x.clone()
    assert ops.apply_(y, key, 0.3, SCALE, [], 0, *AFFINE) is None
    assert_same_bits(y, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, *PROBABILITIES])
def test_keep_mask(shape, p, key):
    expected = reference.keep_mask(key, p, shape)
    assert_same_bits(dropout_ext.keep_mask(shape, p, key), expected)
    assert_same_bits(ops.keep_mask(key, p, shape, [], 0), expected)


def test_a_word_equal_to_the_threshold_is_kept(key):
    x = torch.ones(300)
    for i, word in enumerate(reference.words(key, torch.arange(300)).tolist()):
        for threshold, kept in ((word, True), (word + 1, False)):
            p = threshold / 2**32
            assert dropout_ext.keep_mask((300,), p, key)[i] == kept
            assert (ops.apply(x, key, p, 1.0, [], 0)[i] != 0) == kept


@pytest.mark.parametrize("n", [*range(20), 127, 128, 129, 255, 257, 1000])
@pytest.mark.parametrize("offset", [0, 1, 3, 7])
def test_misaligned_memory(n, offset, key):
    for dtype in (torch.float32, torch.bfloat16):
        base = random_tensor((n + 20,), dtype)
        x = base[offset : offset + n]
        expected = reference.apply(x, key, 0.5, 2.0)
        assert_same_bits(ops.apply(x, key, 0.5, 2.0, [], 0), expected)
        before = base.clone()
        dropout_ext.dropout(x, 0.5, inplace=True, key=key)
        before[offset : offset + n] = expected
        assert_same_bits(base, before)


@pytest.mark.parametrize(
    ("strides", "offset"),
    [
        ((1000, 10), 2**40 + 3),  # a shard of a larger tensor
        ((7, 1), -20),  # indices that cross 2^64
        ((-7, -1), 5),
        ((0, 1), 2**63 - 4),
        ((1, 0), 1),
        ((0, 0), 9),
        ((1, 41), 2**32 - 9),
        ((2, 3), 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_strides_and_offset(strides, offset, dtype, key):
    x = random_tensor((41, 33), dtype)
    expected = reference.apply(x, key, 0.5, 2.0, strides, offset)
    assert_same_bits(ops.apply(x, key, 0.5, 2.0, strides, offset), expected)
    replay = dropout_ext.dropout(x, 0.5, key=key, mask_strides=strides, mask_offset=offset)
    assert_same_bits(replay, expected)
    mask = dropout_ext.keep_mask(x.shape, 0.5, key, mask_strides=strides, mask_offset=offset)
    assert torch.equal(mask, reference.keep_mask(key, 0.5, x.shape, strides, offset))
    bits = ops.keep_bits(key, 0.5, x.shape, strides, offset)
    assert_same_bits(bits, mask.to(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7,), (8,), (9,), (3, 5, 7), (40_000,)])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_keep_bits(shape, p, key):
    """A byte per element on the CPU; elsewhere bits, eight to a byte, the first one lowest."""
    mask = reference.keep_mask(key, p, shape).to(torch.uint8)
    assert_same_bits(ops.keep_bits(key, p, shape, [], 0), mask)
    assert_same_bits(reference.keep_bits(key, p, shape), mask)
    flat = mask.flatten().tolist()
    packed = [
        sum(bit << lane for lane, bit in enumerate(flat[i : i + 8])) for i in range(0, len(flat), 8)
    ]
    packed = torch.tensor(packed, dtype=torch.uint8)
    assert_same_bits(reference.pack(mask), packed)
    meta = ops.keep_bits(key, p, shape, [], 0, device="meta")
    assert (meta.shape, meta.dtype) == (packed.shape, packed.dtype)


def test_keep_bits_of_a_key_per_slice(key):
    keys = torch.stack([key, make_key(7), make_key(8)])
    expected = torch.stack([reference.keep_mask(k, 0.5, (5, 9)) for k in keys.unbind()])
    expected = expected.to(torch.uint8)
    assert_same_bits(ops.keep_bits(keys, 0.5, (3, 5, 9), (0, 9, 1), 0), expected)
    batched = torch.vmap(lambda k: ops.keep_bits(k, 0.5, (5, 9), (), 0))(keys)
    assert_same_bits(batched, expected)


def test_a_shard_has_the_mask_of_the_whole(key):
    whole = dropout_ext.keep_mask((40, 50), 0.5, key)
    shard = dropout_ext.keep_mask((7, 11), 0.5, key, mask_strides=(50, 1), mask_offset=12 * 50 + 30)
    assert torch.equal(shard, whole[12:19, 30:41])


@pytest.mark.parametrize("shape", [(1, 100), (5, 999), (4, 3, 5), (6,)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_key_per_slice(shape, shared, key):
    keys = reference.split(key, shape[0])
    x = random_tensor(shape)
    strides = reference.row_major(shape)
    if shared:
        strides[0] = 0
    expected = reference.apply(x, keys, 0.5, 2.0, strides, 3)
    assert_same_bits(ops.apply(x, keys, 0.5, 2.0, strides, 3), expected)
    for j in range(shape[0]):
        one = reference.apply(x[j : j + 1], keys[j], 0.5, 2.0, strides, 3 + j * strides[0])
        assert_same_bits(expected[j : j + 1], one)
    mask = ops.keep_mask(keys, 0.5, shape, strides, 3)
    assert torch.equal(mask, reference.keep_mask(keys, 0.5, shape, strides, 3))
    affine = ops.apply(x, keys, 0.5, SCALE, strides, 3, *AFFINE)
    assert_same_bits(affine, reference.apply(x, keys, 0.5, SCALE, strides, 3, *AFFINE))
    assert_same_bits(dropout_ext.dropout(x, key=keys), reference.apply(x, keys, 0.5, 2.0))


def test_keys_of_any_layout(key):
    x = random_tensor((3, 100))
    keys = reference.split(key, 3)
    expected = reference.apply(x, keys, 0.5, 2.0)
    for same in (
        keys.view(torch.int64),
        keys.t().contiguous().t(),
        keys.repeat_interleave(2, 1)[:, ::2],
    ):
        assert same.tolist() == keys.tolist() or same.dtype == torch.int64
        assert_same_bits(ops.apply(x, same, 0.5, 2.0, [], 0), expected)


def test_dropped_is_positive_zero(key):
    keep = reference.keep_mask(key, 0.5, (4,)).tolist()
    assert True in keep and False in keep
    values = torch.tensor([math.nan, math.inf, -math.inf, -1.0, -0.0])
    for dtype in ALL_DTYPES:
        for value in values:
            x = torch.full((4,), value, dtype=dtype)
            if dtype.is_complex:
                x = torch.complex(x.real, x.real)
            y = dropout_ext.dropout(x, 0.5, key=key)
            for j in range(4):
                expected = x[j] if keep[j] else torch.zeros((), dtype=dtype)
                if keep[j] and value == -1:
                    expected = 2 * x[j]
                assert_same_bits(y[j], expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_error_against_torch(dtype, key):
    """Relative error of what is kept, against exact scaling, at most twice PyTorch's own."""
    x = random_tensor((100_000,), dtype)
    exact = x.double() / 0.9

    def error(y):
        kept = y != 0
        return ((y.double() - exact)[kept] / exact[kept]).abs().max().item()

    torch.manual_seed(0)
    assert error(dropout_ext.dropout(x, 0.1, key=key)) <= 2 * error(F.dropout(x, 0.1))


@pytest.mark.parametrize("shape", [(100_003,), (70, 3001), (37, 50, 60)])
def test_threads_do_not_change_bits(shape, key, threads):
    x = random_tensor(shape)
    strided = x.transpose(0, -1)
    strides = [0, *reference.row_major(shape)[1:]]
    results = []
    for n in (1, 2):
        threads(n)
        calls = [
            ops.apply(x, key, 0.5, 2.0, [], 0),
            ops.apply(strided, key, 0.5, 2.0, [], 5),
            ops.apply(x, key, 0.5, SCALE, strides, 0, *AFFINE),
            ops.keep_mask(key, 0.5, shape, [], 0),
        ]
        results.append(calls)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)
    assert_same_bits(results[0][0], reference.apply(x, key, 0.5, 2.0))


def test_conjugate_and_negative_views(key):
    z = random_tensor((50,), torch.complex64, special=True)
    for view in (z.conj(), z.conj().imag, z.view(5, 10).mH, torch._neg_view(z)):
        expected = reference.apply(view.clone(), key, 0.5, 2.0)
        assert_same_bits(dropout_ext.dropout(view, 0.5, key=key), expected)
    view = z.clone().conj()
    expected = reference.apply(view.clone(), key, 0.5, 2.0)
    dropout_ext.dropout(view, 0.5, inplace=True, key=key)
    assert_same_bits(view, expected)


# Gradients.


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("strides", [[], [0, 1]])
def test_gradcheck(dtype, strides, key):
    x = random_tensor((3, 7), dtype).requires_grad_()

    def function(x):
        return ops.apply(x, key, 0.5, 2.0, strides, 3)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_gradcheck_of_affine(key):
    x = random_tensor((3, 7), torch.float64).requires_grad_()

    def function(x):
        return ops.apply(x, key, 0.5, SCALE, [], 0, *AFFINE)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck_in_place(dtype, key):
    x = random_tensor((3, 7), dtype).requires_grad_()

    def function(x):
        return dropout_ext.dropout(x * 1, 0.5, inplace=True, key=key)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_is_the_operator(dtype, inplace, key):
    x = random_tensor((9, 41), dtype).requires_grad_()
    grad = random_tensor((9, 41), dtype, seed=1, special=True)
    y = dropout_ext.dropout(x.clone(), 0.1, inplace=inplace, key=key)
    y.backward(grad)
    assert_same_bits(x.grad, reference.apply(grad, key, 0.1, 1 / (1 - 0.1)))


def test_gradients_of_any_stride(key):
    x = random_tensor((9, 41)).requires_grad_()
    grads = [
        torch.ones(()).expand(9, 41),
        random_tensor((41, 9)).t(),
        random_tensor((9, 82))[:, ::2],
        random_tensor((1, 41)).expand(9, 41),
    ]
    for grad in grads:
        (actual,) = torch.autograd.grad(dropout_ext.dropout(x, 0.5, key=key), x, grad)
        assert_same_bits(actual, reference.apply(grad.contiguous(), key, 0.5, 2.0))


def test_reference_gradient_is_the_operators(key):
    x = random_tensor((50,), special=True).requires_grad_()
    keep = reference.keep_mask(key, 0.5, (50,))
    (expected,) = torch.autograd.grad(scaled_where(keep, x, 2.0).sum(), x)
    (actual,) = torch.autograd.grad(dropout_ext.dropout(x, 0.5, key=key).sum(), x)
    assert_same_bits(actual, expected)


def saved_bytes(function):
    """Bytes that the graph of function() keeps for its backward."""
    saved = []

    def pack(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved)


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_keeps_sixteen_bytes(inplace, key):
    x = random_tensor((1000,)).requires_grad_()
    assert saved_bytes(lambda: F.dropout(x)) >= 1000  # the count sees what PyTorch keeps
    y, z = x.clone(), x.clone()
    assert saved_bytes(lambda: dropout_ext.dropout(y, inplace=inplace)) == 16
    assert saved_bytes(lambda: dropout_ext.dropout(z, inplace=inplace, key=key)) == 16


def test_no_graph_without_grad(key):
    x = random_tensor((5,)).requires_grad_()
    with torch.no_grad():
        assert not dropout_ext.dropout(x, key=key).requires_grad
    with torch.inference_mode():
        y = dropout_ext.dropout(torch.ones(50), key=key)
        assert y.is_inference()
        assert dropout_ext.dropout(y, inplace=True, key=key) is y


@pytest.mark.parametrize("affine", [(), AFFINE])
@pytest.mark.parametrize("op", [ops.apply, ops.apply_])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(op, affine, requires_grad, key):
    x = random_tensor((3, 7))
    if requires_grad:
        x = x.requires_grad_() if not op._qualified_op_name.endswith("_") else x
    torch.library.opcheck(op, (x, key, 0.5, SCALE, [7, 1], 0, *affine))
    keys = reference.split(key, 3)
    torch.library.opcheck(op, (x, keys, 0.5, SCALE, [7, 1], 2**40, *affine))


def test_opcheck_of_masks(key):
    torch.library.opcheck(ops.keep_mask, (key, 0.5, [3, 7], [7, 1], 0))
    torch.library.opcheck(ops.keep_mask, (key, 0.5, [3, 7], [0, 1], 5), {"device": "cpu"})
    torch.library.opcheck(ops.keep_bits, (key, 0.5, [3, 7], [7, 1], 0))


# In place.


def error_of(function):
    try:
        function()
    except Exception as e:
        return type(e), str(e)
    return None


def test_in_place_on_a_leaf_errs_as_pytorch(key):
    x = torch.ones(4, requires_grad=True)
    expected = error_of(lambda: F.dropout(x, 0.5, inplace=True))
    assert expected is not None
    assert error_of(lambda: dropout_ext.dropout(x, 0.5, inplace=True, key=key)) == expected
    expected = error_of(lambda: F.dropout(x[:2], 0.5, inplace=True))
    assert expected is not None
    assert error_of(lambda: dropout_ext.dropout(x[:2], 0.5, inplace=True, key=key)) == expected


@pytest.mark.parametrize("requires_grad", [False, True])
def test_in_place_on_overlapping_memory_errs_as_pytorch(requires_grad, key):
    x = torch.ones(1, requires_grad=requires_grad) * 1
    y = x.expand(4)
    expected = error_of(lambda: y.mul_(2))
    assert expected is not None
    for call in (
        lambda: dropout_ext.dropout(y, 0.5, inplace=True, key=key),
        lambda: ops.apply_(y, key, 0.5, 2.0, [], 0),
        lambda: ops.apply_(y, key, 0.5, SCALE, [], 0, *AFFINE),
    ):
        actual = error_of(call)
        assert actual is not None and actual[0] is expected[0]
        assert "single memory location" in actual[1]
    assert x.item() == 1


@pytest.mark.parametrize("requires_grad", [False, True])
def test_in_place_bumps_the_version_once(requires_grad, key):
    x = torch.ones(100, requires_grad=requires_grad) * 1
    version = x._version
    dropout_ext.dropout(x, 0.5, inplace=True, key=key)
    assert x._version == version + 1
    dropout_ext.dropout(x, 0.5, key=key)
    assert x._version == version + 1


def test_in_place_after_a_save_is_seen(key):
    y = torch.ones(100, requires_grad=True).exp()
    dropout_ext.dropout(y, 0.5, inplace=True, key=key)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_a_view_reaches_its_base(key):
    x = random_tensor((6, 10)).requires_grad_()
    base = x * 3
    view = base[2:4]
    dropout_ext.dropout(view, 0.5, inplace=True, key=key)
    expected = 3 * x.detach()
    expected[2:4] = reference.apply(expected[2:4], key, 0.5, 2.0)
    assert_same_bits(base, expected)
    base.sum().backward()
    gradient = torch.full((6, 10), 3.0)
    gradient[2:4] = 3 * reference.apply(torch.ones(2, 10), key, 0.5, 2.0)
    assert_same_bits(x.grad, gradient)


# Devices without a kernel.


def test_meta(key):
    x = torch.empty(4, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    for y in (dropout_ext.dropout(x), dropout_ext.dropout(x, key=key)):
        assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
        assert y.requires_grad
    y = dropout_ext.dropout(x, key=key)
    assert torch.autograd.grad(y, x, torch.empty_like(y))[0].shape == x.shape
    channels_last = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    assert dropout_ext.dropout(channels_last).stride() == channels_last.stride()
    assert dropout_ext.keep_mask((3, 4), 0.5, key, device="meta").device.type == "meta"


def test_a_device_without_a_kernel_runs_the_reference(key):
    """What PrivateUse1, the key of out-of-tree devices, dispatches to, run on CPU tensors."""
    other = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    x = random_tensor((9, 41), torch.bfloat16)
    strides = [41, 1]
    expected = ops.apply(x, key, 0.5, 2.0, strides, 7)
    assert_same_bits(ops.apply.default.redispatch(other, x, key, 0.5, 2.0, strides, 7), expected)
    y = x.clone()
    ops.apply_.default.redispatch(other, y, key, 0.5, 2.0, strides, 7)
    assert_same_bits(y, expected)
    expected = ops.apply(x, key, 0.5, SCALE, strides, 7, *AFFINE)
    y = ops.apply.default.redispatch(other, x, key, 0.5, SCALE, strides, 7, *AFFINE)
    assert_same_bits(y, expected)
    y = x.clone()
    ops.apply_.default.redispatch(other, y, key, 0.5, SCALE, strides, 7, *AFFINE)
    assert_same_bits(y, expected)
    mask = ops.keep_mask.default.redispatch(other, key, 0.5, [9, 41], strides, 7)
    assert torch.equal(mask, ops.keep_mask(key, 0.5, [9, 41], strides, 7))


def test_fake_device(key):
    """A CUDA tensor that is only pretended, with the key on the CPU."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 5, device="cuda")
        for k in (make_key(), torch.empty(2, dtype=torch.uint64, device="cuda")):
            y = ops.apply(x, k, 0.5, 2.0, [5, 1], 0)
            assert y.device.type == "cuda" and y.shape == x.shape


# Large.


@pytest.fixture(scope="module")
def large():
    return torch.ones(2**31 + 4321, dtype=torch.bfloat16)


def windows(n):
    """Where 32-bit arithmetic would go wrong, and the ends."""
    return [slice(a, a + 1000) for a in (0, 2**30 - 500, 2**31 - 500, n - 1000)]


@pytest.mark.slow
def test_more_than_2_to_31_elements(large, key):
    large.fill_(1)
    offset = 2**33 + 5
    dropout_ext.dropout(large, 0.5, inplace=True, key=key, mask_offset=offset)
    for window in windows(large.numel()):
        expected = reference.apply(
            torch.ones(1000, dtype=large.dtype), key, 0.5, 2.0, [1], offset + window.start
        )
        assert_same_bits(large[window], expected)
    kept = torch.count_nonzero(large).item()
    assert abs(kept - large.numel() / 2) < 5 * math.sqrt(large.numel()) / 2


@pytest.mark.slow
def test_more_than_2_to_31_elements_strided(large, key):
    large.fill_(1)
    n = large.numel() // 4
    x = large[: 4 * n].view(4, n)
    strides = (2**62, 1)
    dropout_ext.dropout(x, 0.5, inplace=True, key=key, mask_strides=strides)
    for row in range(4):
        for first in (0, n - 1000):
            expected = reference.apply(
                torch.ones(1000, dtype=x.dtype), key, 0.5, 2.0, [1], row * 2**62 + first
            )
            assert_same_bits(x[row, first : first + 1000], expected)
