"""The CUDA kernels, compiled as plain C++ behind tests/native/cuda_shim.h and run on the CPU."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    ALL_DTYPES,
    FLOAT_DTYPES,
    HOST_FLAGS,
    LAYOUTS,
    ROOT,
    SANITIZED,
    SHARED_LAYOUTS,
    assert_same_bits,
    broadcast_strides,
    compile_native,
    make_key,
    random_tensor,
    run,
)

from dropout_ext import _reference as reference

KERNEL = ROOT / "csrc" / "cuda" / "dropout_kernel.cu"
TEST = "tests/native/cuda_kernel_test.cpp"
# Vectors read memory as other types than it was written as, which nvcc allows.
FLAGS = ["-Wno-unknown-pragmas", "-fno-strict-aliasing", f"-I{KERNEL.parent}"]


def test_every_path_under_sanitizers(tmp_path):
    exe = compile_native(tmp_path / "test", [TEST], [*SANITIZED, *FLAGS])
    groups = [
        ["sizes", "alignments"],
        ["offsets", "geometry", "family", "random_maps", "many_dims", "slices"],
        ["far_apart", "divisions", "keys", "launches"],
    ]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda names: run(exe, *names), groups))
    ran = [line.split(":")[0] for output in outputs for line in output.splitlines()]
    assert ran == [name for names in groups for name in names]


# Class of fault: what to break in the kernel, and the groups that must notice.
FAULTS = {
    "tail overrun: vector store": (
        "if (kWhole || (i >= low && i + V <= high)) {\n          x[u][q].store",
        "if (kWhole || (i >= low && i < high)) {\n          x[u][q].store",
        "alignments",
    ),
    "tail overrun: rows": (
        "if (kVector && exist[q] == (1u << V) - 1) {",
        "if (kVector && exist[q] != 0) {",
        "family",
    ),
    "misaligned vector: flat": (
        "const bool vector = aligned(args.out, args.slice_out_stride) &&",
        "const bool vector = aligned(args.out, args.slice_out_stride) || !",
        "alignments",
    ),
    "misaligned vector: rows": (
        "if (!same_phase(phase(of_in, d), anchor(d), V)) return false;",
        "",
        "family",
    ),
    "wrong counter: lane": ("(u * kWarp + lane) * kBlocks + b;", "lane * kBlocks + b;", "offsets"),
    "wrong counter: upper half": (
        "hi32(first_block), lo32(key.seed)",
        "0u, lo32(key.seed)",
        "offsets",
    ),
    "wrong lane in a shuffle": (
        "bits, owner) >> (lane % kChunks * V)",
        "bits, owner) >> (lane / kChunks * V % kBlock)",
        "alignments",
    ),
    "wrong stride: rows": ("+ part * p.out_stride;", "+ part;", "family"),
    "wrong stride: walked": ("at.add(p.walked, begin);", "", "random_maps"),
    "window without its second block": (
        "before + count > kBlock",
        "before > kBlock",
        "random_maps",
    ),
    "one key for all slices": ("source.device[2 * slice]", "source.device[0]", "random_maps"),
    "32-bit positions": (
        "in += static_cast<int64_t>(at) * dim.in_stride;",
        "in += static_cast<int32_t>(static_cast<int64_t>(at) * dim.in_stride);",
        "far_apart",
    ),
    "loop that skips": ("begin += step)", "begin += 2 * step)", "geometry"),
    "dimensions left out": ("d < count; ++d", "d < count && d < kFewDims; ++d", "many_dims"),
    "division off by one": (
        "quotient = (__umul64hi(n, magic) + n) >> divisor.shift;",
        "quotient = __umul64hi(n, magic) >> divisor.shift;",
        "divisions",
    ),
}


@pytest.fixture(scope="module")
def broken_kernels(tmp_path_factory):
    """What the test says of each broken kernel, two at a time."""

    def build_and_run(fault):
        right, wrong, group = FAULTS[fault]
        source = KERNEL.read_text()
        assert source.count(right) == 1, "the fault no longer applies"
        folder = tmp_path_factory.mktemp("broken")
        broken = folder / "broken.cu"
        broken.write_text(source.replace(right, wrong))
        # Without sanitizers, for the time it takes: the test's own checks must do.
        flags = ["-w", "-O0", *FLAGS, f'-DDROPOUT_EXT_KERNEL="{broken}"']
        exe = compile_native(folder / "test", [TEST], flags)
        return subprocess.run([exe, group], capture_output=True, text=True, timeout=60, check=False)

    with ThreadPoolExecutor(2) as pool:
        yield {fault: pool.submit(build_and_run, fault) for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_fails(broken_kernels, fault):
    result = broken_kernels[fault].result()
    assert result.returncode != 0
    assert result.stderr


DTYPES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.complex128: 4,
    torch.complex64: 5,
    torch.bool: 6,
}
AFFINE, KEEP_MASK = range(2)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    target = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    flags = [*HOST_FLAGS, *FLAGS, "-fPIC", "-shared", "-fvisibility=hidden"]
    library = ctypes.CDLL(str(compile_native(target, ["tests/native/cuda_host.cpp"], flags)))

    def apply(input, out, epilogue, params, key, p, mask_strides, mask_offset=0):
        mask_strides = mask_strides or reference.row_major(out.shape)
        in_strides = out.stride() if input is None else input.stride()
        dims = [
            list(d) for d in zip(out.shape, in_strides, out.stride(), mask_strides, strict=True)
        ]
        slice_dim = dims.pop(0) if key.dim() == 2 else None
        flat = [number for dim in dims for number in dim]
        library.cuda_host_apply(
            ctypes.c_void_p(input.data_ptr() if input is not None else None),
            ctypes.c_void_p(out.data_ptr()),
            DTYPES[out.dtype],
            epilogue,
            (ctypes.c_double * 3)(*params),
            ctypes.c_uint32(reference.threshold(p)),
            len(dims),
            (ctypes.c_int64 * len(flat))(*flat),
            (ctypes.c_int64 * 4)(*slice_dim) if slice_dim else None,
            ctypes.c_uint64(mask_offset % 2**64),
            ctypes.c_void_p(key.data_ptr()),
        )
        return out

    return apply


SHAPE = (5, 6, 7, 16)
MASKS = {
    "row_major": [],
    "feature": broadcast_strides(SHAPE, (2, 3)),
    "drop_path": broadcast_strides(SHAPE, (1, 2, 3)),
    "locked": broadcast_strides(SHAPE, (1,)),
    "shard": [50000, 1200, 100, 1],
    "odd": [3, 2**40 + 1, 11, 5],
}


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED_LAYOUTS])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_against_the_reference(kernels, dtype, layout, key):
    x = {**LAYOUTS, **SHARED_LAYOUTS}[layout](random_tensor(SHAPE, dtype, special=True))
    for mask_offset, strides in enumerate(MASKS.values()):
        args = (strides, mask_offset)
        expected = reference.apply(x, key, 0.3, 1 / 0.7, *args)
        out = torch.full_like(expected, torch.nan)
        assert_same_bits(kernels(x, out, AFFINE, (1 / 0.7, -0.0, 0), key, 0.3, *args), expected)
        if dtype in FLOAT_DTYPES:
            params = (0.88, 0.19, -0.77)
            expected = reference.apply(x, key, 0.6, params[0], *args, *params[1:])
            assert_same_bits(kernels(x, out, AFFINE, params, key, 0.6, *args), expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_keys_per_slice(kernels, dtype, key):
    keys = reference.split(key, SHAPE[0])
    x = random_tensor(SHAPE, dtype, special=True)
    for strides in MASKS.values():
        expected = reference.apply(x, keys, 0.5, 2.0, strides)
        out = kernels(x, torch.empty_like(x), AFFINE, (2.0, -0.0, 0), keys, 0.5, strides)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 1 - 1e-9])
def test_keep_mask(kernels, p):
    key = make_key(2**63 + 5, 2**40 + 3)
    for mask_offset in (0, 3, 2**35 + 5, -9):
        for strides in MASKS.values():
            out = torch.zeros(SHAPE, dtype=torch.bool)
            kernels(None, out, KEEP_MASK, (1, 0, 0), key, p, strides, mask_offset)
            assert torch.equal(out, reference.keep_mask(key, p, SHAPE, strides, mask_offset))
