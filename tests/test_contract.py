"""The mask contract: the reference and the C++ headers against known answers and randomgen."""

import math
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import (
    KNOWN_ANSWERS,
    SANITIZED,
    compile_native,
    make_key,
    random_tensor,
    run,
)

from dropout_ext import _reference as reference


def known_answers(kind):
    lines = [line.split() for line in KNOWN_ANSWERS.read_text().splitlines()]
    return [line[1:] for line in lines if line and line[0] == kind]


def from_hex(*numbers):
    return [int(n, 16) for n in numbers]


@pytest.mark.parametrize("numbers", known_answers("philox"))
def test_philox(numbers):
    words = [torch.tensor(n) for n in from_hex(*numbers)]
    assert list(reference.philox4x32_10(words[:4], words[4:6])) == words[6:]


@pytest.mark.parametrize("numbers", known_answers("words"))
def test_words(numbers):
    seed, offset, first, *expected = from_hex(*numbers)
    index = first + torch.arange(len(expected))
    assert reference.words(make_key(seed, offset), index).tolist() == expected


@pytest.mark.parametrize("numbers", known_answers("fold_in"))
def test_fold_in(numbers):
    seed, offset, n, *expected = from_hex(*numbers)
    assert reference.fold_in(make_key(seed, offset), n).tolist() == expected


@pytest.mark.parametrize("numbers", known_answers("threshold"))
def test_threshold(numbers):
    assert reference.threshold(float(numbers[0])) == int(numbers[1], 16)


@pytest.mark.parametrize("numbers", known_answers("keep"))
def test_keep(numbers):
    seed, offset, expected = from_hex(numbers[0], numbers[1], numbers[3])
    keep = reference.keep_mask(make_key(seed, offset), float(numbers[2]), (64,))
    assert sum(bit << i for i, bit in enumerate(keep.tolist())) == expected


def test_known_answers_are_all_read():
    kinds = ("philox", "words", "fold_in", "threshold", "keep")
    lines = [line for line in KNOWN_ANSWERS.read_text().splitlines() if line]
    assert sum(len(known_answers(k)) for k in kinds) == sum(line[0] != "#" for line in lines)


def randomgen_words(seed, offset, block):
    """One Philox block by another implementation, which counts up before it draws."""
    randomgen = pytest.importorskip("randomgen")
    counter = ((offset | block << 64) - 1) % 2**128
    philox = randomgen.Philox(key=seed, counter=counter, number=4, width=32)
    return [int(w) for w in philox.random_raw(4)]


@pytest.mark.parametrize(
    ("seed", "offset", "first_block"),
    [
        (42, 0, 0),
        (0, 0, 2**32 - 2),
        (2**64 - 1, 2**64 - 1, 2**61 - 4),
        (0x0123456789ABCDEF, 1, 12345),
        (7, 2**32, 2**33),
    ],
)
def test_words_of_randomgen(seed, offset, first_block):
    blocks = range(first_block, first_block + 4)
    expected = []
    for block in blocks:
        words = randomgen_words(seed, offset, block)
        expected += words + [(w << 16 | w >> 16) & 0xFFFFFFFF for w in words]
    index = reference.element_index((32,), (1,), 8 * first_block)
    assert reference.words(make_key(seed, offset), index).tolist() == expected


def test_fold_in_of_randomgen():
    for n in (0, 1, 2**40, -1):
        w = randomgen_words(5, (9 + n) % 2**64, 0)
        expected = [w[0] | w[1] << 32, w[2] | w[3] << 32]
        assert reference.fold_in(make_key(5, 9), n).tolist() == expected


def test_split_is_fold_in(key):
    keys = reference.split(key, 5)
    assert keys.shape == (5, 2) and keys.dtype == torch.uint64
    for j in range(5):
        assert torch.equal(keys[j], reference.fold_in(key, j))


def test_signed_and_unsigned_keys_are_the_same_bits():
    unsigned = make_key(2**64 - 3, 2**63 + 1)
    signed = unsigned.view(torch.int64)
    assert torch.equal(
        reference.keep_mask(unsigned, 0.5, (100,)), reference.keep_mask(signed, 0.5, (100,))
    )
    assert torch.equal(
        reference.fold_in(unsigned, 3).view(torch.int64), reference.fold_in(signed, 3)
    )


def test_element_index_wraps():
    index = reference.element_index((3, 2), (2**63, 1), -1)
    expected = [(-1 + i * 2**63 + j) % 2**64 for i in range(3) for j in range(2)]
    assert [i % 2**64 for i in index.flatten().tolist()] == expected
    assert torch.equal(index, reference.element_index((3, 2), (2**63, 1), 2**64 - 1))


def test_keys_per_slice(key):
    keys = reference.split(key, 4)
    mask = reference.keep_mask(keys, 0.5, (4, 50), (50, 1), 7)
    for j in range(4):
        assert torch.equal(mask[j], reference.keep_mask(keys[j], 0.5, (50,), (1,), 7 + 50 * j))


def test_nothing_is_kept_at_one(key):
    assert not reference.keep_mask(key, 1.0, (1000,)).any()
    assert reference.keep_mask(key, 0.0, (1000,)).all()


def test_a_word_equal_to_the_threshold_is_kept(key):
    for i, word in enumerate(reference.words(key, torch.arange(16)).tolist()):
        assert reference.keep_mask(key, word / 2**32, (16,))[i]
        assert not reference.keep_mask(key, (word + 1) / 2**32, (16,))[i]


def rounded_fma(x, y, z, dtype):
    """x * y + z in exact arithmetic, rounded once to nearest even."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if dtype == torch.float64:
        return float(exact)
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(
        (float(c) for c in around),
        key=lambda c: (abs(Fraction(c) - exact), int(np.float32(c).view(np.uint32)) & 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [0, 12, -30, 70, 120])
@pytest.mark.parametrize(("scale", "bias"), [(0.8864, 0.1937), (-1.7, 1e-3), (3.0, 0.0)])
def test_fma_is_rounded_once(dtype, exponent, scale, bias):
    scale, bias = (torch.tensor(v, dtype=dtype) for v in (scale, bias))
    x = random_tensor((700,), dtype) * 2.0**exponent
    # Sums that cancel, and short significands, whose products land on ties.
    steps = torch.arange(-100, 100) * torch.finfo(dtype).eps
    x = torch.cat([x, -bias / scale * (1 + steps), torch.arange(-300, 300) * 2.0**exponent / 64])
    x = x.to(dtype)
    x = x[x.abs() < torch.finfo(dtype).max / 8]
    expected = [rounded_fma(v, scale.item(), bias.item(), dtype) for v in x.tolist()]
    assert reference.fma(x, scale, bias).tolist() == expected


def test_fma_of_infinity():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    result = reference.fma(x, torch.tensor(2.0), torch.tensor(1.0)).tolist()
    assert result[:2] == [math.inf, -math.inf] and math.isnan(result[2])


def test_reference_on_meta(key):
    x = torch.empty(3, 5, device="meta", dtype=torch.bfloat16)
    out = reference.apply(x, key.to("meta"), 0.5, 2.0)
    assert out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    affine = reference.apply(x, key.to("meta"), 0.5, 2.0, bias=1.0, dropped=0.0)
    assert affine.shape == x.shape and affine.dtype == x.dtype


def test_headers_on_the_host(tmp_path):
    binary = compile_native(tmp_path / "contract", ["tests/native/test_contract.cpp"], SANITIZED)
    assert run(binary, KNOWN_ANSWERS) == "ok\n"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_headers_under_nvcc(tmp_path):
    binary = compile_native(
        tmp_path / "contract",
        ["tests/native/test_contract.cpp"],
        ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"],
        compiler="nvcc",
        language=["-x", "cu"],
    )
    assert run(binary, KNOWN_ANSWERS) == "ok\n"
