"""The native test of the attention kernel, under sanitizers."""

import shutil

import pytest
from helpers import CXX, SANITIZED, compile_native, run

VARIANTS = ["avx512", "avx2", "portable"]


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    sources = ["tests/native/test_attention.cpp"]
    names = ["dispatch", *(f"kernel_{variant}" for variant in VARIANTS)]
    sources += [f"csrc/{part}/{name}.cpp" for part in ("cpu", "attention") for name in names]
    return compile_native(tmp_path_factory.mktemp("native") / "attention", sources, SANITIZED)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"{CXX} was not found")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(binary, variant):
    if variant not in run(binary, "list").split():
        pytest.skip(f"{variant} is not available on this CPU")
    assert run(binary, DROPOUT_EXT_CPU_VARIANT=variant) == f"{variant} ok\n"
