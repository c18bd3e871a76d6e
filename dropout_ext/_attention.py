"""Attention with dropout: which calls are taken, in what form the operator of csrc/attention gets
them, and the same composed of differentiable operators.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

from . import _draw, _geometry, _ops
from ._call import is_dtensor
from ._ops import InDims, ops

if TYPE_CHECKING:
    from torch._functorch.autograd_function import VmapInfo

_library = torch.library.Library("dropout_ext", "FRAGMENT")

Sizes = tuple[int, ...]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None]


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool, dropout_key: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """softmax(query @ key^T * scale + attn_mask), dropped from by 0 < dropout_p <= 1, @ value."""
    arguments = (query, key, value, attn_mask)
    device = query.device.type
    query, key, value, attn_mask = cast(device, arguments)
    if not accepts(query, key, value, attn_mask, is_causal, scale, enable_gqa):
        _raise(*arguments, is_causal, scale, enable_gqa)
    weights = _weights_batch(query, key, enable_gqa)
    if dropout_key is None:
        dropout_key = (
            torch.zeros(2, dtype=torch.int64, device=query.device)
            if dropout_p == 1
            else _draw.draw_key(query, generator)
        )
    else:
        _check_key(dropout_key, query, weights)
    heads = None
    if device == "cpu" and (dropout_key.dim() == 1 or weights):
        heads = _as_heads(query, key, value, weights)
    rest = (attn_mask, dropout_key, dropout_p, is_causal, scale)
    with torch.autocast(device, enabled=False) if _casts(device) else contextlib.nullcontext():
        out: Tensor = (
            ops.attention(*heads, *rest)[0] if heads else compose(query, key, value, *rest)
        )
        return out


def _casts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def cast(device: str, tensors: Tensors) -> Tensors:
    """The tensors as autocast, where it is on, gives them to PyTorch's operator: all floats but
    float64 in its dtype.
    """
    if not _casts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    given: tuple[Any, ...] = tensors
    query, key, value, attn_mask = [
        t.to(dtype)
        if isinstance(t, Tensor)
        and t.is_floating_point()
        and t.dtype != torch.float64
        and t.device.type == device
        else t
        for t in given
    ]
    return query, key, value, attn_mask


def accepts(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Whether PyTorch's math path would take the arguments, tensors that are strided and real."""
    tensors = (query, key, value)
    dtype, device = query.dtype, query.device
    if not dtype.is_floating_point or not all(
        t.dim() >= 2
        and not t.is_nested
        and t.layout == torch.strided
        and not is_dtensor(t)
        and t.dtype == dtype
        and t.device == device
        for t in tensors
    ):
        return False
    if not (isinstance(is_causal, bool) and isinstance(enable_gqa, bool)):
        return False
    if not (scale is None or isinstance(scale, (int, float))):
        return False
    batches = [tuple(t.shape[:-2]) for t in tensors]
    if enable_gqa:
        if any(len(batch) == 0 for batch in batches):
            return False
        heads = batches[0][-1]
        if any(batch[-1] == 0 or heads % batch[-1] != 0 for batch in batches):
            return False
        batches = [(*batch[:-1], heads) for batch in batches]
    if key.size(-1) != query.size(-1) or key.size(-2) != value.size(-2):
        return False
    batch = _broadcast(batches[0], batches[1])
    if batch is None or _broadcast(batch, batches[2]) is None:
        return False
    if attn_mask is None:
        return True
    if not (
        isinstance(attn_mask, Tensor)
        and not is_causal
        and attn_mask.layout == torch.strided
        and attn_mask.device == device
        and attn_mask.dtype in (torch.bool, torch.float32, dtype)
    ):
        return False
    weights = (*batch, query.size(-2), key.size(-2))
    return _broadcast(weights, tuple(attn_mask.shape)) == weights  # it may not enlarge them


def _broadcast(a: Sizes, b: Sizes) -> Sizes | None:
    """The shape that `a` and `b` broadcast to, None if they do not."""
    n = max(len(a), len(b))
    shape = []
    for x, y in zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True):
        if x != y and x != 1 and y != 1:
            return None
        shape.append(y if x == 1 else x)
    return tuple(shape)


def _raise(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> NoReturn:  # fmt: skip
    """The error that PyTorch has for the arguments."""
    # Without dropout: with it, shapes are looked at after the draw.
    F.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    raise TypeError(
        "scaled_dot_product_attention(): arguments 'query', 'key' and 'value' are of "
        f"{query.dtype}, layout {query.layout} and type {type(query).__name__}, but accepted are "
        "plain strided tensors of float64, float32, float16 and bfloat16"
    )


def _check_key(dropout_key: Tensor, query: Tensor, weights: Sizes) -> None:
    shape, first = tuple(dropout_key.shape), (*weights, query.size(-2))[0]
    if dropout_key.dtype not in (torch.uint64, torch.int64):
        raise TypeError(
            "scaled_dot_product_attention(): argument 'dropout_key' has dtype "
            f"{dropout_key.dtype}, but accepted are uint64 and int64 (dropout_ext.key makes one)"
        )
    if shape != (2,) and shape != (first, 2):
        raise ValueError(
            f"scaled_dot_product_attention(): argument 'dropout_key' has shape {shape}, but "
            f"accepted are (2,) and, for one key per slice of dimension 0, ({first}, 2)"
        )
    if dropout_key.device.type != "cpu" and dropout_key.device != query.device:
        raise ValueError(
            "scaled_dot_product_attention(): argument 'dropout_key' is on "
            f"{dropout_key.device}, but accepted are the CPU and the device of the query, "
            f"{query.device}"
        )


def _weights_batch(query: Tensor, key: Tensor, enable_gqa: bool) -> Sizes:
    """The batch dimensions of the weights, heads among them."""
    batch = tuple(key.shape[:-2])
    if enable_gqa:
        batch = (*batch[:-1], query.size(-3))
    return _broadcast(tuple(query.shape[:-2]), batch) or ()


def _as_heads(
    query: Tensor, key: Tensor, value: Tensor, weights: Sizes
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The three with as many dimensions and all batch dimensions but the heads spelled out, None
    where the operator does not take them.
    """
    heads = [t.size(-3) if t.dim() > 2 else 1 for t in (key, value)]
    shared = len(weights) > 0 and heads[0] == heads[1] != 0 and weights[-1] % heads[0] == 0
    batch = (*weights[:-1], heads[0]) if shared else weights
    for t in (key, value):
        if _broadcast(tuple(t.shape[:-2]), batch) != batch:
            return None
    return _expand(query, weights), _expand(key, batch), _expand(value, batch)


def _expand(tensor: Tensor, batch: Sizes) -> Tensor:
    # Without a node in the graph where that changes nothing.
    if tuple(tensor.shape[:-2]) == batch:
        return tensor
    return tensor.expand(*batch, *tensor.shape[-2:])


def math_path_flags() -> tuple[bool, bool]:
    """Whether PyTorch's math path is enabled; whether it keeps to 16 bits for types of 16."""
    flags = torch.backends.cuda
    return flags.math_sdp_enabled(), flags.fp16_bf16_reduction_math_sdp_allowed()


# Dynamo cannot trace the flags. torch.compiler.assume_constant_result does this, and loads Dynamo.
math_path_flags._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compose(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_key: Tensor,
    dropout_p: float, is_causal: bool, scale: float | None = None, *, batched: bool = False,
) -> Tensor:  # fmt: skip
    """As aten::_scaled_dot_product_attention_math: 16-bit types in float32, rounded at the end.

    batched: dimension 0 of the weights is that of the examples of vmap, which share a mask, or have
        a key each.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16) and not math_path_flags()[1]:
        query, key, value = query.float(), key.float(), value.float()
    key, value = (_repeat_heads(t, query) for t in (key, value))
    # Over no dimension all scores are 0, whatever the factor.
    factor: float = max(query.size(-1), 1) ** -0.5 if scale is None else scale
    if is_causal:
        attn_mask = query.new_ones(query.size(-2), key.size(-2), dtype=torch.bool).tril()
    # Scaling the product would be a pass over a larger tensor.
    scores = (query * factor) @ key.transpose(-2, -1)
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                ~attn_mask, -torch.inf
            )
        # Rows that the mask leaves nothing of become 0, not NaN.
        weights = torch.ops.aten._safe_softmax((scores + attn_mask).to(scores.dtype), -1)
    keep_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    # Sizes are tensors under torch.jit.trace, which no list of integers takes.
    traced = not is_dynamo_compiling() and is_tracing()
    strides = [] if traced else _geometry.row_major(weights.shape)
    if batched:
        strides[0] = 0
    dropped = ops.apply(weights, dropout_key, dropout_p, keep_scale, strides, 0)
    out: Tensor = (dropped @ value).to(dtype)
    return out


def _repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    if tensor.dim() < 3 or query.dim() < 3 or tensor.size(-3) in (1, query.size(-3)):
        return tensor
    groups = query.size(-3) // tensor.size(-3)
    return tensor.repeat_interleave(groups, -3) if groups > 1 else tensor


_library.impl("attention_composed", compose, "CompositeImplicitAutograd")


def _attention_shape(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_key: Tensor,
    dropout_p: float, is_causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def new_output() -> Tensor:
        shape = [*query.shape[:-1], value.size(-1)]
        if len(shape) != 4 or query.stride(1) >= query.stride(2):
            return query.new_empty(shape)
        return query.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)

    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    remainder = new_output() if query.element_size() == 2 else query.new_empty(0)
    return new_output(), remainder, query.new_empty((*query.shape[:-1], 2), dtype=sums)


def _backward_shape(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


torch.library.register_fake("dropout_ext::attention", _attention_shape)
torch.library.register_fake("dropout_ext::attention_backward", _backward_shape)


# vmap: of what it is composed of, one key being one mask for all examples.


def _batched(
    info: VmapInfo, in_dims: InDims, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, dropout_key: Tensor, *rest: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    given: tuple[Any, ...] = (query, key, value, attn_mask, dropout_key)
    tensors = [
        t if dim is None else t.movedim(dim, 0) for t, dim in zip(given, in_dims, strict=False)
    ]
    if dropout_key.dim() == (2 if in_dims[4] is None else 3):
        # Keys for the slices of every example: one call per example.
        columns = [
            [t] * info.batch_size if dim is None else t.unbind()
            for t, dim in zip(tensors, in_dims, strict=False)
        ]
        return torch.stack([compose(*each, *rest) for each in zip(*columns, strict=True)]), 0
    batched_mask = attn_mask is not None and in_dims[3] is not None
    if batched_mask:  # as many dimensions as the scores, the examples in front
        mask, n = tensors[3], query.dim() - (in_dims[0] is not None)
        tensors[3] = mask.reshape(len(mask), *[1] * (n + 1 - mask.dim()), *mask.shape[1:])
    if in_dims[4] is not None or in_dims[0] is not None or in_dims[1] is not None or batched_mask:
        tensors[0] = _ops.batch_first(info, query, in_dims[0])
        return compose(*tensors, *rest, batched=True), 0
    return compose(*tensors, *rest), 0


def _batched_attention(
    info: VmapInfo, in_dims: InDims, query: Tensor, *arguments: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, None, None]]:
    out, dim = _batched(info, in_dims, query, *arguments)
    return (out, query.new_empty(0), query.new_empty(0)), (dim, None, None)


torch.library.register_vmap("dropout_ext::attention_composed", _batched)
torch.library.register_vmap("dropout_ext::attention", _batched_attention)
