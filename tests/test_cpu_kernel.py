"""The native tests of the CPU kernels, under sanitizers and on another architecture."""

import shutil

import pytest
from helpers import CXX, HOST_FLAGS, KNOWN_ANSWERS, SANITIZED, compile_native, compile_objects, run

VARIANTS = ["avx512", "avx2", "portable"]
PORTABLE = ["csrc/cpu/dispatch.cpp", "csrc/cpu/kernel_portable.cpp"]
X86 = ["csrc/cpu/kernel_avx2.cpp", "csrc/cpu/kernel_avx512.cpp"]
APPLY = ["tests/native/test_cpu_kernel.cpp", "csrc/cpu/plan.cpp"]
ATTENTION = ["dispatch", *(f"kernel_{variant}" for variant in VARIANTS)]
SOURCES = {
    "apply": APPLY,
    "attention": [
        "tests/native/test_attention.cpp",
        *(f"csrc/attention/{name}.cpp" for name in ATTENTION),
    ],
}
AARCH64 = "aarch64-linux-gnu-g++"

needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"{CXX} was not found")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The objects that both programs share, which take most of the time to compile."""
    folder = tmp_path_factory.mktemp("kernels")
    return compile_objects(f"{folder}/", [*PORTABLE, *X86], SANITIZED)


@pytest.fixture(scope="module", params=SOURCES)
def binary(request, kernels, tmp_path_factory):
    target = tmp_path_factory.mktemp("native") / request.param
    return compile_native(target, SOURCES[request.param], SANITIZED, objects=kernels)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
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
    kernel = compile_native(tmp_path / "kernel", [*APPLY, *PORTABLE], flags, compiler=AARCH64)
    output = run("qemu-aarch64", kernel, DROPOUT_EXT_CPU_VARIANT="portable")
    assert output == "portable ok\n"
