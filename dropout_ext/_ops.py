"""What the operators of csrc/ops.cpp need from Python: shapes for tracing, vmap rules, the
reference for devices without a kernel, and how keys are drawn where code is traced.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from . import _C, _reference

ops = torch.ops.dropout_ext
_library = torch.library.Library("dropout_ext", "FRAGMENT")

row_major = _reference.row_major


# Shapes. In Python, because a C++ Meta kernel would reject a CPU key beside a fake CUDA input.


@torch.library.register_fake("dropout_ext::apply")
def _(input, key, p, scale, mask_strides, mask_offset):
    _C.check_call(input, p, key, False, len(mask_strides))
    return torch.empty_like(input)


@torch.library.register_fake("dropout_ext::apply_")
def _(input, key, p, scale, mask_strides, mask_offset):
    _C.check_call(input, p, key, False, len(mask_strides))


@torch.library.register_fake("dropout_ext::apply_affine")
def _(input, key, p, scale, bias, dropped, mask_strides, mask_offset):
    _C.check_call(input, p, key, True, len(mask_strides))
    return torch.empty_like(input)


@torch.library.register_fake("dropout_ext::apply_affine_")
def _(input, key, p, scale, bias, dropped, mask_strides, mask_offset):
    _C.check_call(input, p, key, True, len(mask_strides))


@torch.library.register_fake("dropout_ext::keep_mask")
def _(key, p, size, mask_strides, mask_offset, *, device=None):
    return torch.empty(size, dtype=torch.bool, device=device or key.device)


@torch.library.register_fake("dropout_ext::fold_in")
def _(key, n):
    _C.check_fold_in(key, n)
    return torch.empty_like(key)


@torch.library.register_fake("dropout_ext::split")
def _(key, n):
    _C.check_split(key, n)
    return key.new_empty(n, 2)


# Devices without a kernel of ours: the same masks from plain PyTorch.


def _apply(input, key, p, scale, mask_strides, mask_offset):
    _C.check_call(input, p, key, False, len(mask_strides))
    return _reference.apply(input, key, p, scale, mask_strides, mask_offset)


def _apply_affine(input, key, p, scale, bias, dropped, mask_strides, mask_offset):
    _C.check_call(input, p, key, True, len(mask_strides))
    return _reference.apply_affine(input, key, p, scale, bias, dropped, mask_strides, mask_offset)


def _apply_(input, *arguments):
    input.copy_(_apply(input, *arguments))


def _apply_affine_(input, *arguments):
    input.copy_(_apply_affine(input, *arguments))


def _fold_in(key, n):
    _C.check_fold_in(key, n)
    return _reference.fold_in(key, n)


def _split(key, n):
    _C.check_split(key, n)
    return _reference.split(key, n)


_library.impl("apply", _apply, "CompositeExplicitAutograd")
_library.impl("apply_", _apply_, "CompositeExplicitAutograd")
_library.impl("apply_affine", _apply_affine, "CompositeExplicitAutograd")
_library.impl("apply_affine_", _apply_affine_, "CompositeExplicitAutograd")
_library.impl("keep_mask", _reference.keep_mask, "CompositeExplicitAutograd")
_library.impl("fold_in", _fold_in, "CompositeExplicitAutograd")
_library.impl("split", _split, "CompositeExplicitAutograd")


# vmap. One key is one mask: stride 0 along the batch. A key per example is a key per slice.


def _batch_first(info, tensor: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _batched(op, info, in_dims, input, key, numbers, mask_strides, mask_offset):
    input = _batch_first(info, input, in_dims[0])
    strides = [0, *(mask_strides or row_major(input.shape[1:]))]
    if in_dims[1] is not None:
        key = key.movedim(in_dims[1], 0)
    if key.dim() == (1 if in_dims[1] is None else 2):
        return op(input, key, *numbers, strides, mask_offset)
    # Keys for the slices of every example: one call per example.
    keys = key if in_dims[1] is not None else key.expand(info.batch_size, *key.shape)
    results = [
        op(example, k, *numbers, strides[1:], mask_offset)
        for example, k in zip(input.unbind(), keys.unbind(), strict=True)
    ]
    return None if results[0] is None else torch.stack(results)


@torch.library.register_vmap("dropout_ext::apply")
def _(info, in_dims, input, key, p, scale, mask_strides, mask_offset):
    return _batched(ops.apply, info, in_dims, input, key, (p, scale), mask_strides, mask_offset), 0


@torch.library.register_vmap("dropout_ext::apply_affine")
def _(info, in_dims, input, key, p, scale, bias, dropped, mask_strides, mask_offset):
    numbers = (p, scale, bias, dropped)
    out = _batched(ops.apply_affine, info, in_dims, input, key, numbers, mask_strides, mask_offset)
    return out, 0


def _check_writable(in_dims):
    if in_dims[0] is None:
        raise ValueError(
            "dropout(): vmap: an unbatched argument 'input' cannot take the masks of all examples "
            "in place; pass inplace=False"
        )


@torch.library.register_vmap("dropout_ext::apply_")
def _(info, in_dims, input, key, p, scale, mask_strides, mask_offset):
    _check_writable(in_dims)
    _batched(ops.apply_, info, in_dims, input, key, (p, scale), mask_strides, mask_offset)
    return None, None


@torch.library.register_vmap("dropout_ext::apply_affine_")
def _(info, in_dims, input, key, p, scale, bias, dropped, mask_strides, mask_offset):
    _check_writable(in_dims)
    numbers = (p, scale, bias, dropped)
    _batched(ops.apply_affine_, info, in_dims, input, key, numbers, mask_strides, mask_offset)
    return None, None


@torch.library.register_vmap("dropout_ext::keep_mask")
def _(info, in_dims, key, p, size, mask_strides, mask_offset, *, device=None):
    key = key.movedim(in_dims[0], 0)
    strides = list(mask_strides) or row_major(size)
    if key.dim() == 2:
        size, strides = [info.batch_size, *size], [0, *strides]
        return ops.keep_mask(key, p, size, strides, mask_offset, device=device), 0
    masks = [ops.keep_mask(k, p, size, strides, mask_offset, device=device) for k in key.unbind()]
    return torch.stack(masks), 0


@torch.library.register_vmap("dropout_ext::fold_in")
def _(info, in_dims, key, n):
    return ops.fold_in(key.movedim(in_dims[0], 0), n), 0


@torch.library.register_vmap("dropout_ext::split")
def _(info, in_dims, key, n):
    return torch.stack([ops.split(k, n) for k in key.unbind(in_dims[0])]), 0


# Keys.


def _seal_key(words: Tensor) -> Tensor:
    """The complement of drawn words, marked so that the backward of a compiled function reads the
    key that its forward drew: under an activation memory budget the partitioner would draw again.
    """
    meta = torch.fx.traceback.current_meta
    # Not torch.compiler.is_compiling(), which is False inside of AOTAutograd before torch 2.13.
    if not torch.fx.traceback.has_preserved_node_meta() or "recompute" in meta:
        return words.bitwise_not()
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        return words.bitwise_not()
    finally:
        del meta["recompute"]


_library.define("seal_key(Tensor words) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
_library.impl("seal_key", _seal_key, "CompositeImplicitAutograd")


@torch.library.register_vmap("dropout_ext::seal_key")
def _(info, in_dims, words):
    return ops.seal_key(words), in_dims[0]


def is_traced(input: Tensor) -> bool:
    """Whether a key must come from operators that a compiler or a transform can see.

    Anything else, any dispatch mode and any subclass, draws as plain eager does, so that a
    recomputation outside the mode agrees with its forward.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    mode = torch._C._TorchDispatchModeKey
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(
            torch._C._get_dispatch_mode(key) is not None
            for key in (mode.FAKE, mode.PROXY, mode.FUNCTIONAL)
        )
        or hasattr(input, "fake_mode")
    )


def draw_key(input: Tensor, generator: torch.Generator | None) -> Tensor:
    """A fresh key for `input`, on its device or on the CPU."""
    if input.device.type == "meta":
        return torch.empty(2, dtype=torch.int64, device="meta")
    if not is_traced(input):
        return _C.draw_key(generator, input.device)
    if generator is not None and torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "dropout(): argument 'generator' cannot be compiled: draw a key outside of the "
            "compiled function and pass it as 'key'"
        )
    if generator is not None:
        _C.check_replay(generator)
    device = input.device if generator is None else generator.device
    mode = contextlib.nullcontext()
    if not torch.compiler.is_dynamo_compiling():
        mode = getattr(input, "fake_mode", mode)
    with mode:
        # One draw per word: inductor's CPU code keeps 32 bits of seed per call. int64, because
        # randint has no uint64.
        words = [
            torch.randint(0, 2**63 - 1, (1,), device=device, generator=generator) for _ in range(2)
        ]
        return ops.seal_key(torch.cat(words))
