"""The CUDA kernels, compiled as plain C++ behind tests/native/cuda_shim.h and run on the CPU."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import fused_reference
import pytest
import torch
import torch.nn.functional as F
from fused_reference import PAIRS
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

TEST = "tests/native/cuda_kernel_test.cpp"
# Vectors read memory as other types than it was written as, which nvcc allows. Of the pragmas for
# nvcc, GCC knows none, and clang says of `unroll` where it can't.
FLAGS = ["-Wno-unknown-pragmas", "-Wno-pass-failed", "-fno-strict-aliasing"]


def test_every_path_under_sanitizers(tmp_path):
    exe = compile_native(tmp_path / "test", [TEST], [*SANITIZED, *FLAGS])
    groups = [
        ["sizes", "alignments"],
        ["offsets", "geometry", "family", "random_maps", "many_dims", "slices"],
        ["far_apart", "divisions", "keys", "launches", "bits"],
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
    "misaligned vector: output": (
        "return fits(args.out, args.slice_out_stride, &Dim::out_stride) &&",
        "return",
        "alignments",
    ),
    "misaligned vector: second input": (
        "input_fits(args.in2, args.slice_in2_stride, &Dim::in2_stride);",
        "true;",
        "alignments",
    ),
    "misaligned vector: rows": (
        "all = all && same(static_cast<uint64_t>(dim.*stride), anchor.stride(dim));",
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
    "wrong stride: second input": ("+ part * p.in2_stride;", "+ part;", "family"),
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
    "tail overrun: bits": ("} else if (left >= kPositions) {", "} else if (left > 0) {", "bits"),
    "bits after the last": ("exist < kBlock ? (1u <<", "exist < 0 ? (1u <<", "bits"),
    "wrong counter: upper half of bits": (
        "if (most_before({args, args.map.ndim - 1}, kBitsVector) == 0) {",
        "if (args.map.mask_offset % kBlock == 0) {",
        "bits",
    ),
    "wrong counter: index past its last bit": (
        "keep_bits(block_words(key, index / kBlock), p.threshold);\n          bits",
        "keep_bits(block_words(key, at.index / kBlock + b + (before != 0)), p.threshold);\n"
        "          bits",
        "bits",
    ),
    "a byte across runs": (
        "return inner.mask_stride == 1 && (one_run || inner.size % positions == 0);",
        "return inner.mask_stride == 1;",
        "bits",
    ),
}


@pytest.fixture(scope="module")
def broken_kernels(tmp_path_factory):
    """What the test says of each broken kernel, two at a time."""

    def build_and_run(fault):
        right, wrong, group = FAULTS[fault]
        folder = tmp_path_factory.mktemp("broken")
        for part in ("csrc", "tests/native"):
            shutil.copytree(ROOT / part, folder / part)
        kernels = folder / "csrc" / "cuda"
        (file,) = (file for file in kernels.iterdir() if right in file.read_text())
        source = file.read_text()
        assert source.count(right) == 1, "the fault no longer applies"
        file.write_text(source.replace(right, wrong))
        # Without sanitizers, for the time it takes: the test's own checks must do.
        exe = compile_native(folder / "test", [folder / TEST], ["-w", "-O0", *FLAGS])
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
AFFINE, KEEP_MASK, ADD, ACTIVATION, ACTIVATION_BACKWARD = range(5)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    flags = [*HOST_FLAGS, *FLAGS, "-fPIC", "-fvisibility=hidden"]
    sources = ["tests/native/cuda_host.cpp"]
    return ctypes.CDLL(str(compile_native(target, sources, flags, link=["-shared"])))


@pytest.fixture(scope="module")
def kernels(library):
    def apply(
        input, out, epilogue, params, key, p, mask_strides, mask_offset=0, second=None, activation=0
    ):
        mask_strides = mask_strides or reference.row_major(out.shape)
        in_strides = out.stride() if input is None else input.stride()
        in2_strides = out.stride() if second is None else second.stride()
        columns = (out.shape, in_strides, out.stride(), mask_strides, in2_strides)
        dims = [list(dim) for dim in zip(*columns, strict=True)]
        slice_dim = dims.pop(0) if key.dim() == 2 else None
        flat = [number for dim in dims for number in dim]
        library.cuda_host_apply(
            ctypes.c_void_p(input.data_ptr() if input is not None else None),
            ctypes.c_void_p(second.data_ptr() if second is not None else None),
            ctypes.c_void_p(out.data_ptr()),
            DTYPES[out.dtype],
            epilogue,
            (ctypes.c_double * 3)(*params),
            activation,
            ctypes.c_uint32(reference.threshold(p)),
            len(dims),
            (ctypes.c_int64 * len(flat))(*flat),
            (ctypes.c_int64 * 5)(*slice_dim) if slice_dim else None,
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


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED_LAYOUTS])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_second_input(kernels, dtype, layout, key):
    layouts = {**LAYOUTS, **SHARED_LAYOUTS}
    x = random_tensor(SHAPE, dtype, seed=1, special=True)
    x2 = layouts[layout](random_tensor(SHAPE, dtype, seed=2, special=True))
    for mask_offset, strides in enumerate(MASKS.values()):
        expected = fused_reference.add(x, x2, dtype, key, 0.3, strides=strides, offset=mask_offset)
        out = torch.full_like(expected, torch.nan)
        kernels(x, out, ADD, (1 / 0.7, 0, 0), key, 0.3, strides, mask_offset, x2)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("function", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_activations(kernels, dtype, function, key):
    x = random_tensor(SHAPE, dtype, seed=1, special=True) * 3
    gradient = random_tensor(SHAPE, dtype, seed=2, special=True)
    for mask_offset, strides in enumerate(MASKS.values()):
        args, mask = (function, key, 0.3, 1 / 0.7), (strides, mask_offset)
        out = torch.full_like(x, torch.nan)
        kernels(x, out, ACTIVATION, (1 / 0.7, 0, 0), key, 0.3, *mask, activation=function)
        assert_same_bits(out, fused_reference.activation(x, *args, *mask))
        kernels(gradient, out, ACTIVATION_BACKWARD, (1 / 0.7, 0, 0), key, 0.3, *mask, x, function)
        assert_same_bits(out, fused_reference.activation_backward(gradient, x, *args, *mask))


NORMS = {None: 0, "layer": 1, "rms": 2}


class Rows:
    """The kernels of rows on tensors; tensors that are left out are None."""

    def __init__(self, library, key, p, shape, strides=(), offset=0, stored=None):
        self.library = library
        extents = zip(shape, strides or reference.row_major(shape), strict=True)
        flat = [number for extent in extents for number in extent]
        self.mask = (
            ctypes.c_void_p(key.data_ptr()),
            ctypes.c_void_p(None if stored is None else stored.data_ptr()),
            ctypes.c_uint32(reference.threshold(p)),
            ctypes.c_uint64(offset % 2**64),
            len(shape),
            (ctypes.c_int64 * len(flat))(*flat),
        )
        self.scale = ctypes.c_double(1 / (1 - p))

    @staticmethod
    def pointers(*tensors):
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return (ctypes.c_void_p * len(addresses))(*addresses)

    def add_norm(
        self,
        input,
        residual,
        total,
        out=None,
        norm=None,
        eps=0.0,
        *,
        bias=None,
        colscale=None,
        rowscale=None,
        weight=None,
        shift=None,
        mean=None,
        rstd=None,
    ):
        self.library.cuda_host_add_norm(
            self.pointers(
                input, residual, bias, colscale, rowscale, total, weight, shift, out, mean, rstd
            ),
            DTYPES[total.dtype if input is None else input.dtype],
            DTYPES[total.dtype],
            DTYPES[(input if out is None else out).dtype],
            NORMS[norm],
            ctypes.c_double(eps),
            self.scale,
            *self.mask,
        )  # fmt: skip

    def backward(self, norm, *tensors):
        self.library.cuda_host_add_norm_backward(
            self.pointers(*tensors),
            DTYPES[tensors[0].dtype],
            DTYPES[tensors[2].dtype],
            NORMS[norm],
            self.scale,
            *self.mask,
        )


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# Multiples of eight and not, one warp and several, more than the threads hold (which is half as
# much in float64, whose reference takes long).
ROWS = [
    (*pair, hidden)
    for pair in PAIRS
    for hidden in (1, 7, 8, 100, 1024, 1025, 4099, 20000)
    if hidden < 5000 or pair[0] != torch.float64
]


@pytest.mark.parametrize(("dtype", "sum_dtype", "hidden"), ROWS, ids=str)
def test_sums_of_rows(library, dtype, sum_dtype, hidden, key):
    shape = (3, hidden)
    x = random_tensor(shape, dtype, seed=1, special=True)
    residual = random_tensor(shape, sum_dtype, seed=2, special=True)
    wide = compute_dtype(sum_dtype)
    given = {
        "bias": random_tensor((hidden,), wide, seed=3),
        "colscale": random_tensor((hidden,), wide, seed=4),
        "rowscale": random_tensor((3,), wide, seed=5),
    }
    for offset, some in enumerate([{}, given, {"colscale": given["colscale"]}]):
        total = torch.empty(shape, dtype=sum_dtype)
        Rows(library, key, 0.3, shape, offset=offset).add_norm(x, residual, total, **some)
        expected = fused_reference.add(x, residual, sum_dtype, key, 0.3, offset=offset, **some)
        assert_same_bits(total, expected)


@pytest.mark.parametrize(
    "strides", [(0, 40, 1), (40, 0, 1), (9, 1, 0), (1000, 47, 1), (2**40 + 3, 5, 0)]
)
def test_where_rows_lie_in_the_mask(library, strides, key):
    shape = (4, 9, 40)
    x, residual = random_tensor(shape, seed=1), random_tensor(shape, seed=2)
    for offset in (0, 3, -9):
        total = torch.empty(shape)
        Rows(library, key, 0.3, shape, strides, offset).add_norm(x, residual, total)
        args = (x, residual, torch.float32, key, 0.3)
        assert_same_bits(total, fused_reference.add(*args, strides=strides, offset=offset))


def test_stored_decisions(library, key):
    shape = (5, 100)
    x = random_tensor(shape, seed=1)
    keep = reference.keep_mask(key, 0.3, shape, (7, 1000003))
    total = torch.empty(shape)
    Rows(library, key, 0.3, shape, stored=keep).add_norm(x, None, total)
    assert_same_bits(
        total, fused_reference.add(x, None, torch.float32, key, 0.3, strides=(7, 1000003))
    )


def error(actual, exact):
    return (actual.double() - exact).abs().max().item()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("dtype", "sum_dtype", "hidden"), ROWS, ids=str)
def test_norms(library, dtype, sum_dtype, hidden, norm, key):
    """Errors against float64 at most twice those of PyTorch's operations on the same sum."""
    shape, wide = (13, hidden), compute_dtype(sum_dtype)
    x, residual = random_tensor(shape, dtype, seed=1) + 10, random_tensor(shape, sum_dtype, seed=2)
    weight, shift = random_tensor((hidden,), wide, seed=3), random_tensor((hidden,), wide, seed=4)
    grad_out = random_tensor(shape, dtype, seed=5)
    grad_sum_in = random_tensor(shape, sum_dtype, seed=6)
    total, out = torch.empty(shape, dtype=sum_dtype), torch.empty(shape, dtype=dtype)
    mean, rstd = torch.empty(13, dtype=wide), torch.empty(13, dtype=wide)
    rows = Rows(library, key, 0.3, shape)
    rows.add_norm(
        x, residual, total, out, norm, 1e-5, weight=weight, shift=shift,
        mean=mean if norm == "layer" else None, rstd=rstd,
    )  # fmt: skip
    assert_same_bits(total, fused_reference.add(x, residual, sum_dtype, key, 0.3))
    grads = [
        torch.full_like(total, torch.nan),
        torch.full_like(grad_out, torch.nan),
        torch.full_like(weight, torch.nan),
        torch.full_like(weight, torch.nan),
    ]
    rows.backward(norm, grad_out, grad_sum_in, total, mean, rstd, weight, *grads)

    def by_pytorch(of):
        s, w, b = (t.to(of).requires_grad_() for t in (total, weight, shift))
        if norm == "layer":
            z = F.layer_norm(s, (hidden,), w, b, 1e-5)
        else:
            z = s * (s.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w + b
        to_s, to_w, to_b = torch.autograd.grad(z, (s, w, b), grad_out.to(of))
        to_s = to_s + grad_sum_in
        keep = reference.keep_mask(key, 0.3, shape)
        to_input = torch.where(keep, to_s * torch.tensor(1 / 0.7, dtype=of), 0)
        return [z.detach(), to_s, to_input, to_w, to_b]

    exact = by_pytorch(torch.float64)
    for ours, theirs, right in zip([out, *grads], by_pytorch(wide), exact, strict=True):
        # Theirs is 0 at times: by luck in short rows, in float64 against itself.
        least = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(ours.dtype).eps
        least *= max(1, right.abs().max().item())
        assert error(ours, right) <= max(2 * error(theirs.to(ours.dtype), right), least)


def test_norms_of_a_given_sum_and_without_parameters(library, key):
    shape = (5, 264)
    total = random_tensor(shape, torch.float32, seed=1) + 1e4
    before, out = total.clone(), torch.empty(shape)
    rows, rstd = Rows(library, key, 0.3, shape), torch.empty(5)
    rows.add_norm(None, None, total, out, "layer", 1e-5, rstd=rstd)
    assert torch.equal(total, before)
    exact = F.layer_norm(total.double(), (264,))
    assert error(out, exact) <= 2 * error(F.layer_norm(total, (264,)), exact) + 1e-6
    grad_out, grad_input = random_tensor(shape, seed=2), torch.empty(shape)
    mean = total.mean(-1)
    rows.backward("layer", grad_out, None, total, mean, rstd, None, None, grad_input, None, None)
    leaf = total.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.layer_norm(leaf, (264,)), leaf, grad_out.double())
    exact = torch.where(reference.keep_mask(key, 0.3, shape), exact / 0.7, 0)
    assert error(grad_input, exact) < 1e-3 * exact.abs().max()
