"""What the operators of csrc/operator/ops.cpp need from Python: shapes for tracing, vmap rules, and
the reference for devices without a kernel.
"""

import functools

import torch
from torch import Tensor

from . import _C, _reference
from ._geometry import row_major

ops = torch.ops.dropout_ext
_library = torch.library.Library("dropout_ext", "FRAGMENT")


def _apply(input, key, p, scale, mask_strides, mask_offset, bias=None, dropped=0.0):
    _C.check_call(input, key, p, bias, dropped, len(mask_strides))
    return _reference.apply(input, key, p, scale, mask_strides, mask_offset, bias, dropped)


def _apply_shape(input, key, p, scale, mask_strides, mask_offset, bias=None, dropped=0.0):
    _C.check_call(input, key, p, bias, dropped, len(mask_strides))
    return torch.empty_like(input)


def _check_rows(name, input, others, p, mask_strides, norm_dims, sum_dtype, dtype):
    _C.check_rows(name, input, list(others), p, len(mask_strides), norm_dims, sum_dtype, dtype)


def _add_shape(
    input, residual, input_bias, colscale, rowscale, key, p, scale, mask_strides, mask_offset, dtype
):
    others = (residual, input_bias, colscale, rowscale, key, None, None)
    _check_rows("dropout_add", input, others, p, mask_strides, 0, dtype, input.dtype)
    scaled = input_bias is not None or colscale is not None or rowscale is not None
    same = residual is not None and input.dtype == residual.dtype == dtype
    if same and not scaled and key is not None and p < 1:
        return torch.empty_like(input)  # by the pass over any layout
    return torch.empty(input.shape, dtype=dtype, device=input.device)


def _add_norm_shape(
    input, residual, input_bias, colscale, rowscale, key, p, scale, mask_strides, mask_offset,
    norm_dims, weight, bias, eps, rms, sum_dtype, dtype,
):  # fmt: skip
    others = (residual, input_bias, colscale, rowscale, key, weight, bias)
    _check_rows("dropout_add_norm", input, others, p, mask_strides, norm_dims, sum_dtype, dtype)
    compute = torch.float64 if sum_dtype == torch.float64 else torch.float32
    rows = input.shape[: input.dim() - norm_dims]
    new = functools.partial(torch.empty, device=input.device)
    return (
        new(input.shape, dtype=dtype),
        new(input.shape, dtype=sum_dtype),
        new((0,) if rms else rows, dtype=compute),
        new(rows, dtype=compute),
    )


def _add_norm_backward_shape(
    grad_out, grad_sum, total, mean, rstd, weight, key, p, scale, mask_strides, mask_offset,
    norm_dims, rms, wanted,
):  # fmt: skip
    row = total.shape[total.dim() - norm_dims :]
    shapes = (total.shape, total.shape, row, row)
    dtypes = (total.dtype, grad_out.dtype, rstd.dtype, rstd.dtype)
    return tuple(
        torch.empty(shape if want else (0,), dtype=dtype, device=total.device)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )


def _activation_shape(input, function, key, p, scale, mask_strides, mask_offset):
    _C.check_call(input, key, p, None, 0.0, len(mask_strides))
    return torch.empty_like(input)


def _activation_backward_shape(grad, input, *rest):
    return _activation_shape(input, *rest)


def _keep_mask_shape(key, p, size, mask_strides, mask_offset, *, device=None):
    return torch.empty(size, dtype=torch.bool, device=device or key.device)


def _fold_in(key, n):
    _C.check_fold_in(key, n)
    return _reference.fold_in(key, n)


def _fold_in_shape(key, n):
    _C.check_fold_in(key, n)
    return torch.empty_like(key)


def _split(key, n):
    _C.check_split(key, n)
    return _reference.split(key, n)


def _split_shape(key, n):
    _C.check_split(key, n)
    return key.new_empty(n, 2)


# vmap. One key is one mask: stride 0 along the batch. A key per example is a key per slice.


def _batch_first(info, tensor: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _apply_batched(info, in_dims, input, key, p, scale, mask_strides, *rest, op=ops.apply):
    input = _batch_first(info, input, in_dims[0])
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


def _each_example(name, info, in_dims, *args):
    """One call per example, stacked."""
    results = [
        getattr(ops, name)(
            *(
                arg if dim is None or not isinstance(arg, Tensor) else arg.select(dim, i)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(
        results[0]
    )


def _rows_batched(name, info, in_dims, input, residual, input_bias, colscale, rowscale, key, *rest):
    alone = any(dim is not None for dim in (in_dims[2], in_dims[3], *in_dims[5:])) or (
        key is not None and key.dim() == 2
    )
    if alone:
        args = (input, residual, input_bias, colscale, rowscale, key, *rest)
        return _each_example(name, info, in_dims, *args)
    shape = input.shape if in_dims[0] is None else input.movedim(in_dims[0], 0).shape[1:]
    p, scale, mask_strides, *others = rest
    strides = [0, *(mask_strides or row_major(shape))]
    input, residual, rowscale = (
        None if tensor is None else _batch_first(info, tensor, dim)
        for tensor, dim in zip((input, residual, rowscale), (*in_dims[:2], in_dims[4]), strict=True)
    )
    results = getattr(ops, name)(
        input, residual, input_bias, colscale, rowscale, key, p, scale, strides, *others
    )
    return results, 0 if isinstance(results, Tensor) else (0,) * len(results)


def _activation_batched(info, in_dims, input, function, key, *rest):
    if in_dims[2] is not None or key.dim() == 2:
        return _each_example("activation", info, in_dims, input, function, key, *rest)
    p, scale, mask_strides, mask_offset = rest
    input = _batch_first(info, input, in_dims[0])
    strides = [0, *(mask_strides or row_major(input.shape[1:]))]
    return ops.activation(input, function, key, p, scale, strides, mask_offset), 0


def _keep_mask_batched(info, in_dims, key, p, size, mask_strides, mask_offset, *, device=None):
    key = key.movedim(in_dims[0], 0)
    strides = list(mask_strides) or row_major(size)
    if key.dim() == 2:
        size, strides = [info.batch_size, *size], [0, *strides]
        return ops.keep_mask(key, p, size, strides, mask_offset, device=device), 0
    masks = [ops.keep_mask(k, p, size, strides, mask_offset, device=device) for k in key.unbind()]
    return torch.stack(masks), 0


def _fold_in_batched(info, in_dims, key, n):
    return ops.fold_in(key.movedim(in_dims[0], 0), n), 0


def _split_batched(info, in_dims, key, n):
    return torch.stack([ops.split(k, n) for k in key.unbind(in_dims[0])]), 0


# Of each operator what a device without a kernel of ours runs, the same masks in plain PyTorch; the
# shape of its result, in Python because a C++ Meta kernel would reject a CPU key beside a fake CUDA
# input; and its rule for vmap.
_OPERATORS = {
    "apply": (_apply, _apply_shape, _apply_batched),
    "add": (_reference.add, _add_shape, functools.partial(_rows_batched, "add")),
    "add_norm": (
        _reference.add_norm,
        _add_norm_shape,
        functools.partial(_rows_batched, "add_norm"),
    ),
    "add_norm_backward": (
        _reference.add_norm_backward,
        _add_norm_backward_shape,
        functools.partial(_each_example, "add_norm_backward"),
    ),
    "activation": (_reference.activation, _activation_shape, _activation_batched),
    "activation_backward": (
        _reference.activation_backward,
        _activation_backward_shape,
        functools.partial(_each_example, "activation_backward"),
    ),
    "keep_mask": (_reference.keep_mask, _keep_mask_shape, _keep_mask_batched),
    "fold_in": (_fold_in, _fold_in_shape, _fold_in_batched),
    "split": (_split, _split_shape, _split_batched),
}
_WRITTEN_IN_PLACE = ("apply",)


def _register(name, fallback, shape, batched) -> None:
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dropout_ext::{name}", shape)
    torch.library.register_vmap(f"dropout_ext::{name}", batched)


def _register_in_place(name, fallback, shape, batched) -> None:
    """`name` with an underscore, which writes to its first argument and returns nothing."""

    def write(input, *args):
        input.copy_(fallback(input, *args))

    def check(input, *args):
        shape(input, *args)

    def write_batched(info, in_dims, *args):
        if in_dims[0] is None:
            raise ValueError(
                "dropout(): vmap: an unbatched argument 'input' cannot take the masks of all "
                "examples in place; pass inplace=False"
            )
        batched(info, in_dims, *args, op=getattr(ops, f"{name}_"))
        return None, None

    _register(f"{name}_", write, check, write_batched)


for _name, _parts in _OPERATORS.items():
    _register(_name, *_parts)
for _name in _WRITTEN_IN_PLACE:
    _register_in_place(_name, *_OPERATORS[_name])
