"""Every variant of the CPU kernel, forced in a process of its own, gives the same bits."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, run_python

import dropout_ext

VARIABLE = "DROPOUT_EXT_CPU_VARIANT"

# Hashes the results over dtypes, sizes, layouts and threads.
HASHES = """
import hashlib, sys
sys.path.insert(0, "tests")
import torch
from helpers import ALL_DTYPES, FLOAT_DTYPES, LAYOUTS, bits, make_key, random_tensor
import dropout_ext
ops = torch.ops.dropout_ext
print(dropout_ext.build_info()["cpu_variant"])
total = hashlib.sha256()
def add(*tensors):
    for t in tensors:
        total.update(bits(t).numpy().tobytes())
for threads in (1, 2):
    torch.set_num_threads(threads)
    for dtype in ALL_DTYPES:
        for n in (*range(40), 127, 128, 129, 1000, 100003):
            x = random_tensor((n,), dtype, special=True)
            add(ops.apply(x, make_key(), 0.3, 1 / 0.7, [1], 2**35 - 50))
            if dtype in FLOAT_DTYPES:
                add(ops.apply(x, make_key(), 0.3, 0.9, [1], 3, 0.2, -1.5))
        for layout in LAYOUTS.values():
            x = layout(random_tensor((5, 37, 13, 11), dtype))
            for strides in ([], [37, 1, 0, 0], [1, 0, 0, 0], [143, 0, 11, 1]):
                add(ops.apply(x, make_key(), 0.3, 1 / 0.7, strides, 0))
    add(ops.keep_mask(make_key(), 0.3, [317, 211], [], 5))
print(total.hexdigest())
"""


@pytest.fixture(scope="module")
def expected():
    return run_python(HASHES, **{VARIABLE: "portable"}).split()[1]


@pytest.mark.parametrize("variant", ["avx512", "avx2"])
def test_same_bits_as_portable(variant, expected):
    if variant not in dropout_ext.build_info()["cpu_variants"]:
        pytest.skip(f"{variant} is not available on this CPU")
    assert run_python(HASHES, **{VARIABLE: variant}).split() == [variant, expected]


def test_the_best_is_chosen():
    info = dropout_ext.build_info()
    if not os.environ.get(VARIABLE):
        assert info["cpu_variant"] == info["cpu_variants"][0]


def test_unknown_variant():
    result = subprocess.run(
        [sys.executable, "-c", "import dropout_ext"],
        cwd=ROOT,
        env={**os.environ, VARIABLE: "avx1024"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    for part in (VARIABLE, "avx1024", "portable"):
        assert part in result.stderr
