"""What the operators of csrc/operator/rows.cpp need from Python, as _ops.py has it for the others.

Where there is no kernel of whole rows, they are dropout's own operator and PyTorch's functions
around it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from ._geometry import row_major
from ._ops import InDims, batch_first, ops, register

if TYPE_CHECKING:
    from torch._functorch.autograd_function import VmapInfo

__all__ = ["ops"]  # with those that are registered here


def _add(
    input: Tensor, residual: Tensor | None, input_bias: Tensor | None, colscale: Tensor | None,
    rowscale: Tensor | None, key: Tensor | None, p: float, scale: float,
    mask_strides: Sequence[int], mask_offset: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    others = (residual, input_bias, colscale, rowscale, key, None, None)
    _check_rows(input, others, p, mask_strides, None, False, dtype, input.dtype)
    total = input.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if input_bias is not None:
        total = total + input_bias
    if colscale is not None:
        total = total * colscale
    if rowscale is not None:
        total = total * _per_row(rowscale, total)
    if key is not None:
        total = ops.apply(total, key, p, scale, mask_strides, mask_offset)
    if residual is not None:
        total = total + residual
    return total.to(dtype, copy=True) if total is input else total.to(dtype)


def _add_norm(
    input: Tensor, residual: Tensor | None, input_bias: Tensor | None, colscale: Tensor | None,
    rowscale: Tensor | None, key: Tensor | None, p: float, scale: float,
    mask_strides: Sequence[int], mask_offset: int, norm_dims: int, weight: Tensor | None,
    bias: Tensor | None, eps: float, rms: bool, sum_dtype: torch.dtype, dtype: torch.dtype,
    return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    others = (residual, input_bias, colscale, rowscale, key, weight, bias)
    _check_rows(input, others, p, mask_strides, norm_dims, rms, sum_dtype, dtype)
    total = _add(
        input, residual, input_bias, colscale, rowscale, key, p, scale, mask_strides, mask_offset,
        sum_dtype,
    )  # fmt: skip
    rows, row = input.shape[: input.dim() - norm_dims], input.shape[input.dim() - norm_dims :]
    x = total.to(torch.float64 if sum_dtype == torch.float64 else torch.float32)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    kept = total.contiguous() if return_sum else total.new_empty(0)
    if not rms:
        out, mean, rstd = torch.native_layer_norm(x, row, weight, bias, eps)
        return out.to(dtype), kept, mean.reshape(rows), rstd.reshape(rows)
    rstd = (x.square().mean(tuple(range(-norm_dims, 0)), keepdim=True) + eps).rsqrt()
    out = x * rstd if weight is None else x * rstd * weight
    out = out if bias is None else out + bias
    return out.to(dtype), kept, rstd.new_empty(0), rstd.reshape(rows)


def _per_row(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(*rows.shape, *[1] * (like.dim() - rows.dim()))


def _add_norm_backward(
    grad_out: Tensor, grad_sum: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, key: Tensor | None, p: float, scale: float, mask_strides: Sequence[int],
    mask_offset: int, norm_dims: int, rms: bool, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    x = total.to(rstd.dtype)
    if not rms:
        x = x - _per_row(mean, x)
    x = x * _per_row(rstd, x)
    grad = grad_out.to(x.dtype)
    g = grad if weight is None else grad * weight
    columns = tuple(range(-norm_dims, 0))
    rows = tuple(range(total.dim() - norm_dims))
    to_sum = g - x * (g * x).mean(columns, keepdim=True)
    if not rms:
        to_sum = to_sum - g.mean(columns, keepdim=True)
    to_sum = to_sum * _per_row(rstd, x)
    if grad_sum is not None:
        to_sum = to_sum + grad_sum
    to_input = to_sum
    if key is not None and wanted[1]:
        to_input = ops.apply(to_sum, key, p, scale, mask_strides, mask_offset)
    results = (
        to_sum.to(total.dtype),
        to_input.to(grad_out.dtype, copy=True),
        (grad * x).sum(rows) if rows else grad * x,
        grad.sum(rows) if rows else grad.clone(),
    )
    return tuple(
        result if want else result.new_empty(0)
        for result, want in zip(results, wanted, strict=True)
    )


def _activation(
    input: Tensor, function: int, key: Tensor, p: float, scale: float, mask_strides: Sequence[int],
    mask_offset: int,
) -> Tensor:  # fmt: skip
    _C.check_call(input, key, p, None, 0.0, len(mask_strides))
    activated = (F.gelu, functools.partial(F.gelu, approximate="tanh"), F.silu, F.relu)
    out: Tensor = ops.apply(activated[function](input), key, p, scale, mask_strides, mask_offset)
    return out


def _activation_backward(
    grad: Tensor, input: Tensor, function: int, key: Tensor, p: float, scale: float,
    mask_strides: Sequence[int], mask_offset: int,
) -> Tensor:  # fmt: skip
    _C.check_call(input, key, p, None, 0.0, len(mask_strides))
    grad = ops.apply(grad, key, p, scale, mask_strides, mask_offset)
    aten = torch.ops.aten
    backward = (
        aten.gelu_backward,
        functools.partial(aten.gelu_backward, approximate="tanh"),
        aten.silu_backward,
        lambda grad, input: aten.threshold_backward(grad, input, 0),
    )
    out: Tensor = backward[function](grad, input)
    return out


def _check_devices(function: str, input: Tensor, **others: Tensor | None) -> None:
    """A tensor of the meta device beside others would make the shape the result."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{function}(): argument '{name}' is on {tensor.device}, but accepted is the "
                f"device of the others, {input.device}"
            )


def _check_rows(
    input: Tensor, others: Sequence[Tensor | None], p: float, mask_strides: Sequence[int],
    norm_dims: int | None, rms: bool, sum_dtype: torch.dtype, dtype: torch.dtype,
) -> None:  # fmt: skip
    _C.check_rows(input, list(others), p, len(mask_strides), norm_dims, rms, sum_dtype, dtype)


def _add_shape(
    input: Tensor, residual: Tensor | None, input_bias: Tensor | None, colscale: Tensor | None,
    rowscale: Tensor | None, key: Tensor | None, p: float, scale: float,
    mask_strides: Sequence[int], mask_offset: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    others = (residual, input_bias, colscale, rowscale, key, None, None)
    _check_rows(input, others, p, mask_strides, None, False, dtype, input.dtype)
    scaled = input_bias is not None or colscale is not None or rowscale is not None
    if (key is not None and p == 1) or (key is None and not scaled):  # PyTorch's own addition
        return (torch.empty_like(input) if residual is None else input + residual).to(dtype)
    if residual is not None and input.dtype == residual.dtype == dtype and not scaled:
        return torch.empty_like(input)  # by the pass over any layout
    return torch.empty(input.shape, dtype=dtype, device=input.device)


def _add_norm_shape(
    input: Tensor, residual: Tensor | None, input_bias: Tensor | None, colscale: Tensor | None,
    rowscale: Tensor | None, key: Tensor | None, p: float, scale: float,
    mask_strides: Sequence[int], mask_offset: int, norm_dims: int, weight: Tensor | None,
    bias: Tensor | None, eps: float, rms: bool, sum_dtype: torch.dtype, dtype: torch.dtype,
    return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    others = (residual, input_bias, colscale, rowscale, key, weight, bias)
    _check_rows(input, others, p, mask_strides, norm_dims, rms, sum_dtype, dtype)
    compute = torch.float64 if sum_dtype == torch.float64 else torch.float32
    rows = input.shape[: input.dim() - norm_dims]
    new = functools.partial(torch.empty, device=input.device)
    return (
        new(input.shape, dtype=dtype),
        new(input.shape if return_sum else (0,), dtype=sum_dtype),
        new((0,) if rms else rows, dtype=compute),
        new(rows, dtype=compute),
    )


def _add_norm_backward_shape(
    grad_out: Tensor, grad_sum: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, key: Tensor | None, p: float, scale: float, mask_strides: Sequence[int],
    mask_offset: int, norm_dims: int, rms: bool, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_devices("add_norm_backward", total, grad_out=grad_out, rstd=rstd, weight=weight)
    row = total.shape[total.dim() - norm_dims :]
    shapes = (total.shape, total.shape, row, row)
    dtypes = (total.dtype, grad_out.dtype, rstd.dtype, rstd.dtype)
    return tuple(
        torch.empty(shape if want else (0,), dtype=dtype, device=total.device)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )


def _activation_shape(
    input: Tensor, function: int, key: Tensor, p: float, scale: float, mask_strides: Sequence[int],
    mask_offset: int,
) -> Tensor:  # fmt: skip
    _C.check_call(input, key, p, None, 0.0, len(mask_strides))
    return torch.empty_like(input)


def _activation_backward_shape(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    _check_devices("activation_backward", input, grad=grad)
    return _activation_shape(input, *rest)


# vmap. What several examples share must be one tensor for them to be one call.


def _each_example(
    name: str, info: VmapInfo, in_dims: InDims, *args: Any
) -> tuple[Tensor | tuple[Tensor, ...], int | tuple[int, ...]]:
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


def _rows_batched(
    name: str, info: VmapInfo, in_dims: InDims, input: Tensor, residual: Tensor | None,
    input_bias: Tensor | None, colscale: Tensor | None, rowscale: Tensor | None,
    key: Tensor | None, *rest: Any,
) -> tuple[Tensor | tuple[Tensor, ...], int | tuple[int, ...]]:  # fmt: skip
    alone = any(dim is not None for dim in (in_dims[2], in_dims[3], *in_dims[5:])) or (
        key is not None and key.dim() == 2
    )
    if alone:
        args = (input, residual, input_bias, colscale, rowscale, key, *rest)
        return _each_example(name, info, in_dims, *args)
    shape = input.shape if in_dims[0] is None else input.movedim(in_dims[0], 0).shape[1:]
    p, scale, mask_strides, *others = rest
    strides = [0, *(mask_strides or row_major(shape))]
    input = batch_first(info, input, in_dims[0])
    residual, rowscale = (
        None if tensor is None else batch_first(info, tensor, dim)
        for tensor, dim in ((residual, in_dims[1]), (rowscale, in_dims[4]))
    )
    results = getattr(ops, name)(
        input, residual, input_bias, colscale, rowscale, key, p, scale, strides, *others
    )
    return results, 0 if isinstance(results, Tensor) else (0,) * len(results)


def _add_norm_batched(
    info: VmapInfo, in_dims: InDims, *args: Any
) -> tuple[Tensor | tuple[Tensor, ...], int | tuple[int, ...]]:
    # An empty sum has no dimension of examples.
    return _rows_batched("add_norm", info, in_dims, *args[:-1], True)


def _activation_batched(
    info: VmapInfo, in_dims: InDims, input: Tensor, function: int, key: Tensor, *rest: Any
) -> tuple[Tensor | tuple[Tensor, ...], int | tuple[int, ...]]:
    if in_dims[2] is not None or key.dim() == 2:
        return _each_example("activation", info, in_dims, input, function, key, *rest)
    p, scale, mask_strides, mask_offset = rest
    input = batch_first(info, input, in_dims[0])
    strides = [0, *(mask_strides or row_major(input.shape[1:]))]
    return ops.activation(input, function, key, p, scale, strides, mask_offset), 0


register("add", _add, _add_shape, functools.partial(_rows_batched, "add"))
register("add_norm", _add_norm, _add_norm_shape, _add_norm_batched)
register(
    "add_norm_backward",
    _add_norm_backward,
    _add_norm_backward_shape,
    functools.partial(_each_example, "add_norm_backward"),
)
register("activation", _activation, _activation_shape, _activation_batched)
register(
    "activation_backward",
    _activation_backward,
    _activation_backward_shape,
    functools.partial(_each_example, "activation_backward"),
)
