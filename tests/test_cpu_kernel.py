"""The native test of the CPU kernel, under sanitizers and on another architecture."""

import shutil

import pytest
from helpers import CXX, HOST_FLAGS, KNOWN_ANSWERS, SANITIZED, compile_native, run

CPU = ["csrc/cpu/dispatch.cpp", "csrc/cpu/kernel_portable.cpp", "csrc/cpu/plan.cpp"]
X86 = ["csrc/cpu/kernel_avx2.cpp", "csrc/cpu/kernel_avx512.cpp"]
TEST = "tests/native/test_cpu_kernel.cpp"
AARCH64 = "aarch64-linux-gnu-g++"


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    target = tmp_path_factory.mktemp("native") / "cpu_kernel"
    return compile_native(target, [TEST, *CPU, *X86], SANITIZED)


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"{CXX} was not found")
@pytest.mark.parametrize("variant", ["avx512", "avx2", "portable"])
def test_variant(binary, variant):
    if variant not in run(binary, "list").split():
        pytest.skip(f"{variant} is not available on this CPU")
    assert run(binary, DROPOUT_EXT_CPU_VARIANT=variant) == f"{variant} ok\n"


@pytest.mark.skipif(
    not (shutil.which(AARCH64) and shutil.which("qemu-aarch64")),
    reason=f"{AARCH64} or qemu-aarch64 was not found",
)
def test_aarch64(tmp_path):
    flags = [*HOST_FLAGS, "-static"]
    contract = compile_native(
        tmp_path / "contract", ["tests/native/test_contract.cpp"], flags, compiler=AARCH64
    )
    assert run("qemu-aarch64", contract, KNOWN_ANSWERS) == "ok\n"
    kernel = compile_native(tmp_path / "kernel", [TEST, *CPU], flags, compiler=AARCH64)
    output = run("qemu-aarch64", kernel, DROPOUT_EXT_CPU_VARIANT="portable")
    assert output == "portable ok\n"
