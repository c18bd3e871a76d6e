"""Keys: made, derived, drawn from generators."""

import numpy as np
import pytest
import torch
from family import FUNCTIONS
from helpers import assert_same_bits, make_key, random_tensor

import dropout_ext
from dropout_ext import _reference as reference

CALLS = FUNCTIONS | {"in place": lambda x, **kw: dropout_ext.dropout(x.clone(), inplace=True, **kw)}
each_function = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def drawn_key(generator=None):
    """The rule of the contract: two draws of torch.randint, complemented."""
    words = [torch.randint(0, 2**63 - 1, (1,), generator=generator) for _ in range(2)]
    return ~torch.cat(words)


@each_function
@pytest.mark.parametrize("requires_grad", [False, True])
def test_default_generator(call, requires_grad):
    x = random_tensor((40, 60)).requires_grad_(requires_grad)
    for seed in (0, 1, 2**63 + 5):
        torch.manual_seed(seed)
        keys = [drawn_key(), drawn_key()]
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        for key in keys:
            assert_same_bits(call(x), call(x, key=key))
        assert torch.equal(torch.get_rng_state(), state)


@each_function
def test_given_generator(call):
    x = random_tensor((40, 60))
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    default = torch.get_rng_state()
    for _ in range(2):
        assert_same_bits(call(x, generator=ours), call(x, key=drawn_key(theirs)))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(torch.get_rng_state(), default)


@each_function
def test_given_key_draws_nothing(call, key):
    x = random_tensor((40, 60))
    state = torch.get_rng_state()
    assert_same_bits(call(x, key=key), call(x, key=key))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_draws_no_key():
    x = random_tensor((5, 3))
    generator = torch.Generator().manual_seed(0)
    states = torch.get_rng_state(), generator.get_state()
    dropout_ext.dropout(x, 0.5, training=False)
    dropout_ext.dropout(x, 0.0)
    dropout_ext.dropout(x, 0.0, generator=generator)
    dropout_ext.dropout(x[:0])
    dropout_ext.dropout(x, 1.0)
    dropout_ext.dropout(x, 1.0, generator=generator)
    dropout_ext.functional.drop_path(x, 1.0, True)
    dropout_ext.functional.alpha_dropout(x, 1.0, True)
    dropout_ext.Dropout().eval()(x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])


def test_a_failing_call_draws_no_key():
    leaf = torch.ones(4, requires_grad=True)
    state = torch.get_rng_state()
    for x in (leaf, leaf[:2], torch.ones(1).expand(4)):
        with pytest.raises(RuntimeError):
            dropout_ext.dropout(x, 0.5, inplace=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_size_does_not_change_what_is_drawn():
    states = []
    for n in (1, 100_000):
        torch.manual_seed(0)
        dropout_ext.dropout(torch.ones(n))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_consecutive_calls_differ():
    x = torch.ones(1000)
    masks = [dropout_ext.dropout(x) for _ in range(2)]
    assert not torch.equal(*masks)


def test_key():
    key = dropout_ext.key(2**64 - 1, 3)
    assert key.dtype == torch.uint64 and key.shape == (2,) and key.device.type == "cpu"
    assert key.tolist() == [2**64 - 1, 3]
    assert dropout_ext.key(5).tolist() == [5, 0]
    assert dropout_ext.key(5, device="meta").device.type == "meta"


@pytest.mark.parametrize("n", [0, 1, 12345, 2**40, 2**63 - 1])
@pytest.mark.parametrize("words", [(42, 0), (2**64 - 1, 2**64 - 1), (7, 2**63)])
def test_fold_in(words, n):
    key = make_key(*words)
    expected = reference.fold_in(key, n)
    assert_same_bits(dropout_ext.fold_in(key, n), expected)
    signed = key.view(torch.int64)
    assert_same_bits(dropout_ext.fold_in(signed, n), expected.view(torch.int64))
    keys = torch.stack([key, make_key(1, 2)])
    both = dropout_ext.fold_in(keys, n)
    assert_same_bits(both, torch.stack([expected, reference.fold_in(keys[1], n)]))


def test_fold_in_counts_in_the_offset():
    assert_same_bits(dropout_ext.fold_in(make_key(9, 5), 3), dropout_ext.fold_in(make_key(9, 4), 4))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_split(n, key):
    keys = dropout_ext.split(key, n)
    assert keys.shape == (n, 2) and keys.dtype == key.dtype
    for j in range(n):
        assert_same_bits(keys[j], dropout_ext.fold_in(key, j))


def test_keys_are_plain_tensors(key, tmp_path):
    torch.save({"key": key}, tmp_path / "key.pt")
    assert torch.equal(torch.load(tmp_path / "key.pt")["key"], key)
    assert np.array_equal(key.numpy(), np.array([42, 0], dtype=np.uint64))
