"""Runs on the CPU what Inductor writes for CUDA, and compares it with eager code: the same masks.

Triton's interpreter runs the kernels, one thread block after the other; the bits that they read are
those of the contract in plain PyTorch. Besides torch on the CPU, Triton is needed.

    TRITON_INTERPRET=1 python -m tools.triton_bits
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import dropout_ext
from dropout_ext import _reference, functional
from tools import triton_static

P = 0.3
KEY = dropout_ext.key(2**63 + 12345)

# name: (shape, function of a tensor of numbers above 0 and a key). What is dropped becomes 1.
MASKS = {
    "contiguous": ((9, 44), lambda x, key: functional.dropout(x, P, key=key) + 1),
    "transposed": ((9, 44), lambda x, key: functional.dropout(x.t(), P, key=key) + 1),
    "channels_last": (
        (2, 3, 5, 7),
        lambda x, key: functional.dropout(x.to(memory_format=torch.channels_last), P, key=key) + 1,
    ),
    "of channels": ((5, 6, 7, 3), lambda x, key: functional.dropout2d(x, P, key=key) + 1),
    "shared": (
        (5, 6, 7),
        lambda x, key: functional.dropout(x, P, broadcast_dims=(1,), key=key) + 1,
    ),
    "shard": (
        (5, 7),
        lambda x, key: functional.dropout(x, P, mask_strides=(90, 1), mask_offset=13, key=key) + 1,
    ),
    "reversed": (
        (5, 7),
        lambda x, key: functional.dropout(x, P, mask_strides=(-7, -1), mask_offset=3, key=key) + 1,
    ),
    "key per slice": (
        (5, 3, 11),
        lambda x, key: functional.dropout(x, P, key=dropout_ext.split(key, 5)) + 1,
    ),
    "p = 0": ((5, 7), lambda x, key: torch.ops.dropout_ext.apply(x, key, 0.0, 1.0, [7, 1], 0) + 1),
    "p = 1": ((5, 7), lambda x, key: torch.ops.dropout_ext.apply(x, key, 1.0, 1.0, [7, 1], 0) + 1),
    "one element": ((1,), lambda x, key: functional.dropout(x, P, key=key) + 1),
}


class Interpreted:
    """A kernel of Inductor's; blocks smaller than it would choose, so that there are several."""

    BLOCKS = {"YBLOCK": 16, "R0_BLOCK": 64, "NUM_STAGES": 1}  # noqa: RUF012

    def __init__(self, name: str, source: str, folder: Path) -> None:
        # The interpreter has what is in the language, and of what tunes and launches nothing.
        plain = re.sub(r"@triton_heuristics\..*?\n\)\n", "", source, flags=re.DOTALL)
        plain = re.sub(r"libdevice\.(rsqrt|erf|exp)\(", r"tl.\1(", plain)
        path = folder / f"{name}.py"
        path.write_text(plain)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.kernel = getattr(module, name)
        self.sizes = triton_static.sizes(source)
        reduces = "r0_numel" in self.sizes
        known = {**self.BLOCKS, "XBLOCK": 1 if reduces else 32, **triton_static.constexprs(source)}
        signature = re.search(rf"def {name}\((.*?)\):", source)[1]
        self.constants = {
            word: known[word] for word in re.findall(r"(\w+) : tl\.constexpr", signature)
        }

    def run(self, *args, stream) -> None:
        def blocks(axis):
            block = self.constants.get("RSPLIT_SIZE") or self.constants.get(f"{axis.upper()}BLOCK")
            return math.ceil(self.sizes.get(f"{axis}numel", 1) / (block or 1))

        self.kernel[tuple(map(blocks, "xyz"))](*args, **self.constants)


def packed_bits(key, *args, device):
    return _reference.pack(_reference.keep_mask(key, *args).to(torch.uint8))


def on_cpu(code: str, folder: Path):
    """The function that Inductor's code defines, and how many masks it asks for."""
    import torch._inductor.runtime.triton_helpers as helpers
    from torch._inductor.async_compile import AsyncCompile

    helpers.set_driver_to_gpu = triton_static.says(None)
    torch._C._cuda_getCurrentRawStream = triton_static.says(0)
    names = {"__name__": "code", "packed_bits": packed_bits}
    masks = triton_static.calls(code, "keep_bits")
    code = code.replace("= torch.ops.dropout_ext.keep_bits.default(", "= packed_bits(")

    def interpreted(self, name, source, **kwargs):
        return Interpreted(name, source, folder)

    with mock.patch.object(AsyncCompile, "triton", interpreted):
        exec(compile(code, "code", "exec"), names)
    names["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype
    )

    def call(args):
        guard = {"_DeviceGuard": contextlib.nullcontext, "set_device": triton_static.says(None)}
        with mock.patch.multiple(torch.cuda, **guard):
            return names["call"](list(args))

    return call, masks


def check_mask(name: str, folder: Path) -> None:
    shape, function = MASKS[name]
    x = torch.rand(shape) + 1
    ((code, _),) = triton_static.written_code(function, [x, KEY.view(torch.int64)], "always")
    call, masks = on_cpu(code, folder)
    assert masks == 1, f"{name}: {masks} masks"
    (out,) = call([x, KEY.view(torch.int64)])
    expected = function(x, KEY)
    assert torch.equal(out != 1, expected != 1), f"{name}: another mask"
    assert torch.equal(out, expected), name


def check_layer_norm(shape: tuple[int, int], folder: Path) -> None:
    """With its gradients."""

    def function(x, residual, weight, bias, key):
        y = functional.dropout(F.gelu(x), P, key=key)
        return F.layer_norm(residual + y, shape[1:], weight, bias), y

    inputs = [torch.randn(size).requires_grad_() for size in (shape, shape, *[shape[1:]] * 2)]
    key = KEY.view(torch.int64)
    codes = triton_static.written_code(function, [*inputs, key], "always")
    (forward, masks), (backward, of_backward) = (on_cpu(code, folder) for code, _ in codes)
    assert (masks, of_backward) == (1, 1), f"layer_norm: {masks} and {of_backward} masks"
    with torch.no_grad():
        out, y, *saved = forward([*inputs, key])
        keep = _reference.keep_mask(KEY, P, shape)
        assert torch.equal(y != 0, keep), "layer_norm: another mask"
        grads = torch.randn(shape), torch.zeros(shape)
        actual = backward([*saved, *grads])
    expected = function(*inputs, KEY)
    torch.testing.assert_close((out, y), expected, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(expected, inputs, grads)
    torch.testing.assert_close(tuple(actual[:4]), expected, atol=1e-4, rtol=1e-4)


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("TRITON_INTERPRET is not 1", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = name
        for mask in MASKS:
            check_mask(mask, Path(name))
            print(f"{mask}: as in eager code", flush=True)
        for shape in ((6, 40), (9, 133), (7, 3000)):
            check_layer_norm(shape, Path(name))
            print(f"layer_norm of {shape}, with its gradients: as in eager code", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
