"""What the operators of csrc/operator/ops.cpp need from Python: shapes for tracing, vmap rules, and
the reference for devices without a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C, _inductor, _reference
from ._geometry import row_major

if TYPE_CHECKING:
    from torch._functorch.autograd_function import VmapInfo

Function = Callable[..., Any]
InDims = tuple[Any, ...]  # of each argument the dimension that vmap maps, or None

ops = torch.ops.dropout_ext
_library = torch.library.Library("dropout_ext", "FRAGMENT")


def _apply(
    input: Tensor, key: Tensor, p: float, scale: float, mask_strides: Sequence[int],
    mask_offset: int, bias: float | None = None, dropped: float = 0.0,
) -> Tensor:  # fmt: skip
    _C.check_call(input, key, p, bias, dropped, len(mask_strides))
    return _reference.apply(input, key, p, scale, mask_strides, mask_offset, bias, dropped)


def _apply_shape(
    input: Tensor, key: Tensor, p: float, scale: float, mask_strides: Sequence[int],
    mask_offset: int, bias: float | None = None, dropped: float = 0.0,
) -> Tensor:  # fmt: skip
    _inductor.prepare()
    _C.check_call(input, key, p, bias, dropped, len(mask_strides))
    return torch.empty_like(input)


def _keep_mask_shape(
    key: Tensor, p: float, size: Sequence[int], mask_strides: Sequence[int], mask_offset: int,
    *, device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    return torch.empty(size, dtype=torch.bool, device=device or key.device)


def _keep_bits_shape(
    key: Tensor, p: float, size: Sequence[int], mask_strides: Sequence[int], mask_offset: int,
    *, device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    device = torch.device(device or key.device)
    shape = size if device.type == "cpu" else [(math.prod(size) + 7) // 8]
    return torch.empty(shape, dtype=torch.uint8, device=device)


def _fold_in(key: Tensor, n: int) -> Tensor:
    _C.check_fold_in(key, n)
    return _reference.fold_in(key, n)


def _fold_in_shape(key: Tensor, n: int) -> Tensor:
    _C.check_fold_in(key, n)
    return torch.empty_like(key)


def _split(key: Tensor, n: int) -> Tensor:
    _C.check_split(key, n)
    return _reference.split(key, n)


def _split_shape(key: Tensor, n: int) -> Tensor:
    _C.check_split(key, n)
    return key.new_empty(n, 2)


# vmap. One key is one mask: stride 0 along the batch. A key per example is a key per slice.


def batch_first(info: VmapInfo, tensor: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _apply_batched(
    info: VmapInfo, in_dims: InDims, input: Tensor, key: Tensor, p: float, scale: float,
    mask_strides: Sequence[int], *rest: Any, op: Function = ops.apply,
) -> tuple[Any, int]:  # fmt: skip
    input = batch_first(info, input, in_dims[0])
    strides = [0, *(mask_strides or row_major(input.shape[1:]))]
    if in_dims[1] is not None:
        key = key.movedim(in_dims[1], 0)
    if key.dim() == (1 if in_dims[1] is None else 2):
        return op(input, key, p, scale, strides, *rest), 0
    # Keys for the slices of every example: one call per example.
    keys = key if in_dims[1] is not None else key.expand(info.batch_size, *key.shape)
    results = [
        op(example, k, p, scale, strides[1:], *rest)
        for example, k in zip(input.unbind(), keys.unbind(), strict=True)
    ]
    return None if results[0] is None else torch.stack(results), 0


def _keep_mask_batched(
    info: VmapInfo, in_dims: InDims, key: Tensor, p: float, size: Sequence[int],
    mask_strides: Sequence[int], mask_offset: int, *, device: torch.device | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    key = key.movedim(in_dims[0], 0)
    strides = list(mask_strides) or row_major(size)
    if key.dim() == 2:
        size, strides = [info.batch_size, *size], [0, *strides]
        return ops.keep_mask(key, p, size, strides, mask_offset, device=device), 0
    masks = [ops.keep_mask(k, p, size, strides, mask_offset, device=device) for k in key.unbind()]
    return torch.stack(masks), 0


def _keep_bits_batched(
    info: VmapInfo, in_dims: InDims, key: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, int]:
    bits = [ops.keep_bits(k, *args, **kwargs) for k in key.unbind(in_dims[0])]
    return torch.stack(bits), 0


def _fold_in_batched(info: VmapInfo, in_dims: InDims, key: Tensor, n: int) -> tuple[Tensor, int]:
    return ops.fold_in(key.movedim(in_dims[0], 0), n), 0


def _split_batched(info: VmapInfo, in_dims: InDims, key: Tensor, n: int) -> tuple[Tensor, int]:
    return torch.stack([ops.split(k, n) for k in key.unbind(in_dims[0])]), 0


# Of each operator what a device without a kernel of ours runs, the same masks in plain PyTorch; the
# shape of its result, in Python because a C++ Meta kernel would reject a CPU key beside a fake CUDA
# input; and its rule for vmap.
_OPERATORS: dict[str, tuple[Function, Function, Function]] = {
    "apply": (_apply, _apply_shape, _apply_batched),
    "keep_mask": (_reference.keep_mask, _keep_mask_shape, _keep_mask_batched),
    "keep_bits": (_reference.keep_bits, _keep_bits_shape, _keep_bits_batched),
    "fold_in": (_fold_in, _fold_in_shape, _fold_in_batched),
    "split": (_split, _split_shape, _split_batched),
}
_WRITTEN_IN_PLACE = ("apply",)


def register(name: str, fallback: Function, shape: Function, batched: Function) -> None:
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dropout_ext::{name}", shape)
    torch.library.register_vmap(f"dropout_ext::{name}", batched)


def _register_in_place(name: str, fallback: Function, shape: Function, batched: Function) -> None:
    """`name` with an underscore, which writes to its first argument and returns nothing."""

    def write(input: Tensor, *args: Any) -> None:
        input.copy_(fallback(input, *args))

    def check(input: Tensor, *args: Any) -> None:
        shape(input, *args)

    def write_batched(info: VmapInfo, in_dims: InDims, *args: Any) -> tuple[None, None]:
        if in_dims[0] is None:
            raise ValueError(
                "dropout(): vmap: an unbatched argument 'input' cannot take the masks of all "
                "examples in place; pass inplace=False"
            )
        batched(info, in_dims, *args, op=getattr(ops, f"{name}_"))
        return None, None

    register(f"{name}_", write, check, write_batched)


for _name, _parts in _OPERATORS.items():
    register(_name, *_parts)
for _name in _WRITTEN_IN_PLACE:
    _register_in_place(_name, *_OPERATORS[_name])
