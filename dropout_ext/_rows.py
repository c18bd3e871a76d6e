"""Dropout fused with a residual and a norm, or with an activation, where the call is not a plain
eager one: of operators that can be traced, or, for tensors that stand for several (DTensor, nested
tensors), of dropout and PyTorch's own functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import _C, _call, _geometry
from ._call import Call
from ._row_ops import ops

Scales = tuple[Tensor | None, Tensor | None, Tensor | None]  # input_bias, colscale, rowscale
ACTIVATIONS = {("gelu", "none"): 0, ("gelu", "tanh"): 1, ("silu", "none"): 2, ("relu", "none"): 3}


class Norm(NamedTuple):
    """What comes after the sum."""

    normalized_shape: int | Sequence[int]
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    rms: bool
    dtype: torch.dtype | None
    return_sum: bool


def run(
    input: Tensor,
    residual: Tensor | None,
    call: Call,
    scales: Scales,
    sum_dtype: torch.dtype | None,
    norm: Norm | None,
) -> Any:
    """A tensor, or with `norm.return_sum` two."""
    _call.check_tensor(input)
    _call.check_probability(call.p)
    _call.check_source(call.key, call.generator)
    call = call._replace(mask_offset=_geometry.wrap_offset(call.mask_offset))
    if sum_dtype is None:
        sum_dtype = (input if residual is None else residual).dtype
    drops = call.training and call.p != 0 and not _call.is_empty(input)
    dims = 0 if norm is None else _norm_dims(input, norm.normalized_shape)
    dtype = input.dtype if norm is None or norm.dtype is None else norm.dtype
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    if input.is_nested:
        return _composed(input, residual, call, scales, sum_dtype, norm, dims)
    strides = list(call.mask_strides or ())
    if not is_dynamo_compiling():
        others = [residual, *scales, call.key, weight, bias]
        rms, norm_dims = (False, None) if norm is None else (norm.rms, dims)
        _C.check_rows(input, others, call.p, len(strides), norm_dims, rms, sum_dtype, dtype)
    if _call.is_dtensor(input):
        _check_whole_rows(input, dims)
        return _composed(input, residual, call, scales, sum_dtype, norm, dims)
    key = _call.key_of(input, call) if drops else None
    scale = _call.scale_of(call.p)
    arguments = (input, residual, *scales, key, call.p, scale, strides, call.mask_offset)
    if norm is None:
        return ops.add(*arguments, sum_dtype)
    eps = torch.finfo(_compute_dtype(input.dtype)).eps if norm.eps is None else norm.eps
    out, total, _, _ = ops.add_norm(
        *arguments, dims, weight, bias, eps, norm.rms, sum_dtype, dtype, norm.return_sum
    )
    return (out, total) if norm.return_sum else out


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norm_dims(input: Tensor, normalized_shape: int | Sequence[int]) -> int:
    if isinstance(normalized_shape, (int, torch.SymInt)):
        normalized_shape = [normalized_shape]
    dims = len(normalized_shape)
    if not 0 < dims <= input.dim() or tuple(input.shape[-dims:]) != tuple(normalized_shape):
        raise ValueError(
            f"dropout_add_norm(): argument 'normalized_shape' is {list(normalized_shape)}, but "
            f"accepted are the last dimensions of the input, of shape {tuple(input.shape)}"
        )
    return dims


def _check_whole_rows(input: Any, dims: int) -> None:
    cut = [p for p in input.placements if p.is_shard() and p.dim >= input.dim() - dims]
    if cut:
        raise ValueError(
            f"dropout_add_norm(): argument 'input' has placement {cut[0]!r}, which cuts its rows, "
            "but accepted are those that leave 'normalized_shape' whole: redistribute it first"
        )


def _composed(
    input: Tensor, residual: Tensor | None, call: Call, scales: Scales, sum_dtype: torch.dtype,
    norm: Norm | None, dims: int,
) -> Any:  # fmt: skip
    """In the compute type, rounded where the operators round."""
    compute = _compute_dtype(sum_dtype)
    input_bias, colscale, rowscale = scales
    total = input.to(compute)
    if input_bias is not None:
        total = total + input_bias
    if colscale is not None:
        total = total * colscale
    if rowscale is not None:
        rows = rowscale.detach()
        while rows.dim() < input.dim():
            rows = rows.unsqueeze(-1)
        total = total * rows
    total = _call.run(total, call)
    if residual is not None:
        total = total + residual
    total = total.to(sum_dtype)
    total = total.clone() if total is input else total
    if norm is None:
        return total
    shape = list(input.shape[input.dim() - dims :])
    weight, bias = (None if t is None else t.to(compute) for t in (norm.weight, norm.bias))
    if norm.rms:
        out = F.rms_norm(total.to(compute), shape, weight, norm.eps)
    else:
        eps: Any = norm.eps  # None for an RMS norm alone
        out = F.layer_norm(total.to(compute), shape, weight, bias, eps)
    out = out.to(norm.dtype or input.dtype)
    return (out, total) if norm.return_sum else out


def run_activation(input: Tensor, activation: str, approximate: str, call: Call) -> Tensor:
    _call.check_tensor(input)
    _call.check_probability(call.p)
    _call.check_source(call.key, call.generator)
    if not call.training or call.p == 0 or _call.is_empty(input):
        return apply_activation(input, activation, approximate)
    composed = _call.is_dtensor(input) or input.is_nested or input.dtype == torch.float64
    if composed or not input.is_floating_point():
        return _call.run(apply_activation(input, activation, approximate), call)
    call = call._replace(mask_offset=_geometry.wrap_offset(call.mask_offset))
    _call.check(input, call)
    key = _call.key_of(input, call)
    scale = _call.scale_of(call.p)
    function = ACTIVATIONS[activation, approximate]
    strides = list(call.mask_strides or ())
    out: Tensor = ops.activation(input, function, key, call.p, scale, strides, call.mask_offset)
    return out


def apply_activation(input: Tensor, activation: str, approximate: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(input, approximate=approximate)
    return F.silu(input) if activation == "silu" else F.relu(input)
