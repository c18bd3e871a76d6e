"""Functional dropout calls of PyTorch routed to ours, without a change to the model."""

from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import Buffer, Parameter
from torch.overrides import TorchFunctionMode

from . import functional
from ._call import Call

__all__ = ["override"]


class override(TorchFunctionMode):
    """`with override():` sends functional dropout to `dropout_ext.functional`, in the thread that
    entered it, in eager mode and under `torch.compile`, entered outside of the compiled function or
    inside of it. It nests.

    Routed: `dropout`, `dropout1d`, `dropout2d`, `dropout3d`, `alpha_dropout` and
    `feature_alpha_dropout` of `torch.nn.functional`; `dropout`, `feature_dropout`, `alpha_dropout`
    and `feature_alpha_dropout` of `torch`, with their in-place forms; the attention weights of
    `torch.nn.functional.multi_head_attention_forward`; and
    `torch.nn.functional.scaled_dot_product_attention` with `dropout_p` > 0 where PyTorch would take
    its math path, which materialises the attention matrix: on the CPU always, on CUDA where no
    fused kernel accepts the call. Compiled calls on CUDA and calls on other devices keep PyTorch's
    attention.

    Not reached: `nn.LSTM`, `nn.GRU` and `nn.RNN` with `dropout` > 0, and fused attention kernels,
    which drop inside C++; calls of `torch.ops.aten`; calls in code that was traced, scripted or
    exported before.

    Take the backward pass inside too where activation checkpointing runs the forward again, or that
    drops by PyTorch's masks. Inference runs better outside: under
    any torch-function mode `nn.TransformerEncoderLayer` leaves its fast path.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        route = _ROUTES.get(func)
        if route is None or not all(t in _PLAIN_TYPES for t in types):
            return func(*args, **kwargs)
        if func not in _BACKWARDS:
            return route(*args, **kwargs)
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        with self:
            return route(*args, **kwargs)


# Subclasses with a __torch_function__ of their own decide for themselves.
_PLAIN_TYPES = frozenset({Tensor, Parameter, Buffer})


def _dropout(input, p, train):
    return functional.dropout(input, p, train)


def _dropout_(input, p, train):
    return functional.dropout(input, p, train, True)


def _alpha_dropout(input, p, train):
    return functional.alpha_dropout(input, p, train)


def _alpha_dropout_(input, p, train):
    return functional.alpha_dropout(input, p, train, True)


def _feature_dropout(input, p, train):
    return functional._features(input, Call(p, train))


def _feature_dropout_(input, p, train):
    return functional._features(input, Call(p, train, True))


def _feature_alpha_dropout(input, p, train):
    return functional.feature_alpha_dropout(input, p, train)


def _feature_alpha_dropout_(input, p, train):
    return functional.feature_alpha_dropout(input, p, train, True)


def _takes_math_path(query, *arguments) -> bool:
    """Whether PyTorch would materialise the attention matrix and drop from it."""
    if query.device.type == "cpu":
        return True
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    *arguments, scale, enable_gqa = arguments
    choice = torch._fused_sdp_choice(query, *arguments, scale=scale, enable_gqa=enable_gqa)
    return choice == torch.nn.attention.SDPBackend.MATH.value


def _is_valid(query, key, value, attn_mask, is_causal) -> bool:
    """Whether `_compose` takes the arguments. Others, errors among them, are left to PyTorch."""
    tensors = (query, key, value)
    if not all(isinstance(t, Tensor) and t.dim() >= 2 and not t.is_nested for t in tensors):
        return False
    dtype, device = query.dtype, query.device
    if not dtype.is_floating_point or any(t.dtype != dtype or t.device != device for t in tensors):
        return False
    return attn_mask is None or (
        isinstance(attn_mask, Tensor)
        and not is_causal
        and attn_mask.device == device
        and attn_mask.dtype in (torch.bool, torch.float32, dtype)
    )


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with our dropout where it is composed."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if (
        not dropout_p > 0
        or not _is_valid(query, key, value, attn_mask, is_causal)
        or not _takes_math_path(*arguments, scale, enable_gqa)
    ):
        return F.scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return _compose(*arguments, scale, enable_gqa)
    dtype = torch.get_autocast_dtype(device)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    with torch.autocast(device, enabled=False):
        return _compose(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _compose(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Tensor:
    """aten::_scaled_dot_product_attention_math: 16-bit types in float32, rounded at the end."""
    dtype = query.dtype
    if (
        dtype in (torch.float16, torch.bfloat16)
        and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    ):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    if scale is None:
        scale = query.size(-1) ** -0.5
    if is_causal:
        attn_mask = query.new_ones(query.size(-2), key.size(-2), dtype=torch.bool).tril()
    # Scaling the product would be a pass over a larger tensor.
    scores = (query * scale) @ key.transpose(-2, -1)
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                ~attn_mask, -torch.inf
            )
        # Rows that the mask leaves nothing of become 0, not NaN.
        weights = torch.ops.aten._safe_softmax(scores + attn_mask, -1)
    return (functional.dropout(weights, dropout_p) @ value).to(dtype)


def _never(tensors) -> bool:
    return False


def _copy(function, **replaced):
    """`function` with other globals: it does not go to a mode again, and calls what is replaced."""
    # By a __name__ among them Dynamo would find PyTorch's globals.
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    names |= {"has_torch_function": _never, "has_torch_function_unary": _never} | replaced
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# While a mode handles a call, the calls inside of it pass the mode by. This is the only function of
# PyTorch that drops inside and is written in Python.
_multi_head_attention = _copy(
    F.multi_head_attention_forward,
    dropout=functional.dropout,
    scaled_dot_product_attention=_attention,
)

# In these, checkpointed regions run again: by the same functions as the first time.
_BACKWARDS = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)

_ROUTES = {
    F.dropout: functional.dropout,
    F.dropout1d: functional.dropout1d,
    F.dropout2d: functional.dropout2d,
    F.dropout3d: functional.dropout3d,
    F.alpha_dropout: functional.alpha_dropout,
    F.feature_alpha_dropout: functional.feature_alpha_dropout,
    torch.dropout: _dropout,
    torch.dropout_: _dropout_,
    torch.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout_: _alpha_dropout_,
    torch.feature_dropout: _feature_dropout,
    torch.feature_dropout_: _feature_dropout_,
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout_: _feature_alpha_dropout_,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    **{function: _copy(function) for function in _BACKWARDS},
}
