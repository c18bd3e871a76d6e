"""What several test files share: inputs, layouts, bit comparison, subprocesses, native builds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from dropout_ext import _reference as reference

ROOT = Path(__file__).resolve().parent.parent
KNOWN_ANSWERS = ROOT / "tests" / "data" / "known_answers.txt"

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX_DTYPES = (torch.complex128, torch.complex64)
ALL_DTYPES = FLOAT_DTYPES + COMPLEX_DTYPES

TORCH_2_11 = torch.__version__.startswith("2.11.")

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def make_key(seed: int = 42, offset: int = 0) -> Tensor:
    """A key, not made by the product."""
    return torch.tensor([seed, offset], dtype=torch.uint64)


def bits(tensor: Tensor) -> Tensor:
    """The bits of each real number, all NaN made equal."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.contiguous().view(BITS[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits, -0 told from +0, any NaN equal to any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def random_tensor(shape, dtype=torch.float32, seed: int = 0, special: bool = False) -> Tensor:
    """Normal numbers; with `special`, every seventh is one of NaN, infinities, zeros, extremes."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    if dtype.is_complex:
        parts = [random_tensor(shape, real, seed + i, special) for i in (1000, 2000)]
        return torch.complex(*parts)
    x = torch.randn(shape, dtype=real, generator=generator).to(dtype)
    if special:
        info = torch.finfo(dtype)
        extremes = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.max, -info.max]
        extremes += [info.tiny, info.smallest_normal / 2, -info.smallest_normal / 4]
        flat = x.view(-1)
        places = torch.arange(0, flat.numel(), 7)
        flat[places] = torch.tensor(extremes, dtype=dtype)[torch.arange(len(places)) % 10]
    return x


def _channels_last(x: Tensor) -> Tensor:
    if x.dim() not in (4, 5):
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()])


def _sliced(x: Tensor) -> Tensor:
    base = torch.zeros([n + 3 for n in x.shape], dtype=x.dtype)
    view = base[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def _strided(x: Tensor) -> Tensor:
    base = torch.zeros([2 * n for n in x.shape], dtype=x.dtype)
    return base[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)


def _misaligned(x: Tensor) -> Tensor:
    base = torch.zeros(x.numel() + 3, dtype=x.dtype)
    return base[3:].view(x.shape).copy_(x)


def _reversed(x: Tensor) -> Tensor:
    dims = tuple(reversed(range(x.dim())))
    return x.permute(dims).contiguous().permute(dims)


# Each gives a tensor of the same shape and values in other memory; all can be written in place.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: _channels_last(x).clone(memory_format=torch.preserve_format),
    "reversed": _reversed,
    "sliced": _sliced,
    "strided": _strided,
    "misaligned": _misaligned,
}

# Each ignores most of the values: several positions share memory. To be read only.
SHARED_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_first": lambda x: x[:1].expand_as(x),
    "expanded_last": lambda x: x[..., :1].expand_as(x),
    "expanded": lambda x: x.reshape(-1)[:1].view([1] * x.dim()).expand_as(x),
    "overlapping": lambda x: x.contiguous().as_strided(x.shape, [1] * x.dim()),
}


def broadcast_strides(shape, dims) -> list[int]:
    """Mask strides when the mask is shared along `dims`."""
    dims = {d % len(shape) for d in dims}
    reduced = [1 if d in dims else n for d, n in enumerate(shape)]
    strides = reference.row_major(reduced)
    return [0 if d in dims else strides[d] for d in range(len(shape))]


def reference_mask(shape, p: float, key: Tensor, broadcast_dims=()) -> Tensor:
    """Drawn over the shape with the shared dimensions set to 1, then broadcast."""
    dims = {d % len(shape) for d in broadcast_dims}
    reduced = [1 if d in dims else n for d, n in enumerate(shape)]
    return reference.keep_mask(key, p, reduced).expand(tuple(shape))


def scaled_where(keep: Tensor, x: Tensor, scale: float) -> Tensor:
    """keep ? x * scale : +0 by the rules of the contract, differentiable once, row-major."""
    if x.is_complex():
        parts = torch.view_as_real(x)
        return torch.view_as_complex(scaled_where(keep.unsqueeze(-1), parts, scale).contiguous())
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scaled = x.to(compute) * torch.tensor(scale, dtype=compute)
    return torch.where(keep, scaled, torch.zeros((), dtype=compute)).to(x.dtype).contiguous()


def run(*command: str | Path, **env: str) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def run_python(code: str, **env: str) -> str:
    return run(sys.executable, "-c", code, **env)


CXX = os.environ.get("CXX", "g++")
HOST_FLAGS = ["-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
# As setup.py takes it: DROPOUT_EXT_SANITIZE= is without sanitizers, which take most of the time.
SANITIZERS = os.environ.get("DROPOUT_EXT_SANITIZE", "address,undefined")
# Where variables are, for a debugger, would take a third of the time to compile.
SANITIZED = [*HOST_FLAGS, "-g", "-fno-var-tracking", f"-fsanitize={SANITIZERS}",
             "-fno-sanitize-recover=all"] if SANITIZERS else HOST_FLAGS  # fmt: skip


def compile_native(
    target: Path, sources, flags, *, compiler: str = CXX, language=(), link=(), objects=()
) -> Path:
    """Builds `sources`, paths from the root, at `target`, and links `objects` to them."""
    compiled = compile_objects(f"{target}-", sources, [*flags, *language], compiler=compiler)
    objects = [*objects, *compiled]
    run(compiler, *flags, *link, *objects, "-o", target)
    return target


def compile_objects(prefix: str, sources, flags, *, compiler: str = CXX) -> list[str]:
    def build(source: str) -> str:
        object_file = f"{prefix}{str(source).replace('/', '-')}.o"
        run(compiler, "-std=c++20", *flags, "-c", source, "-o", object_file)
        return object_file

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, sources))
