"""Dropout fused with its neighbours, residual, norm, bias and activation: one pass over memory, in
training and in evaluation, with the mask that :func:`dropout_ext.dropout` has for the same key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import _C, _geometry, _rows
from ._call import Call, check_probability, check_source, check_tensor
from ._keys import Keyed

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ActivationDropout",
    "DropoutAdd",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "activation_dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
]


def _strides(
    input: Tensor, broadcast_dims: Sequence[int] | None, mask_strides: Sequence[int] | None
) -> list[int] | None:
    if broadcast_dims is None and mask_strides is None:
        return None
    check_tensor(input)
    return _geometry.mask_strides(input.shape, broadcast_dims, mask_strides)


def dropout_add(
    input: Tensor,
    residual: Tensor | None,
    p: float = 0.5,
    training: bool = True,
    *,
    dtype: torch.dtype | None = None,
    input_bias: Tensor | None = None,
    colscale: Tensor | None = None,
    rowscale: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    broadcast_dims: Sequence[int] | None = None,
    mask_strides: Sequence[int] | None = None,
    mask_offset: int = 0,
) -> Tensor:
    """Dropout of `input`, added to `residual`, in one pass: residual + (keep ? t / (1 - p) : 0),
    t = (input + input_bias) * colscale * rowscale.

    Computed in float32 (float64 for float64) and rounded once. Saved for the backward pass: the
    key, 16 bytes, and with one of the three scales the input. With broadcast_dims=range(1, n) it is
    stochastic depth and its residual, with `colscale` LayerScale before that.

    Args:
        input (Tensor): any shape, any strides; float64, float32, float16 or bfloat16.
        residual (Tensor, optional): of the shape of `input`; None for none. float64 with a float64
            input, else float32 or, beside float32 or that same type, float16 or bfloat16.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False drops nothing. Default: True
        dtype (torch.dtype, optional): of the result, that of `residual` or float32. Default: None,
            that of `residual`, or of `input` without one
        input_bias (Tensor, optional): of shape (input.shape[-1],), added before. Default: None
        colscale (Tensor, optional): of shape (input.shape[-1],). Default: None
        rowscale (Tensor, optional): of shape input.shape[:-1]; takes no gradient. Default: None
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0]. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator
        broadcast_dims (sequence of int, optional): dimensions along which all elements share one
            decision. Default: None
        mask_strides (sequence of int, optional): where this tensor lies in the mask of a larger
            one, as for :func:`dropout_ext.dropout`. Default: None, row-major
        mask_offset (int): the mask's index of the first element. Default: 0

    Returns:
        Tensor: of the shape and device of `input`, never `residual` itself.

    Raises:
        ValueError: `p` outside [0, 1]; a tensor of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.

    Example:
        >>> k = dropout_ext.key(seed=42)
        >>> dropout_ext.dropout_add(torch.ones(2, 4), torch.full((2, 4), 10.0), 0.5, key=k)
        tensor([[12., 10., 10., 10.],
                [12., 10., 10., 12.]])
    """
    if broadcast_dims is None and mask_strides is None and not is_dynamo_compiling():
        out = _C.eager_rows(
            input, residual, p, training, key, generator, input_bias, colscale, rowscale, None,
            mask_offset, dtype,
        )  # fmt: skip
        if out is not NotImplemented:
            return out
    tensors = (input, residual, input_bias, colscale, rowscale)
    if has_torch_function(tensors):
        return handle_torch_function(
            dropout_add, tensors, input, residual, p, training, dtype=dtype, input_bias=input_bias,
            colscale=colscale, rowscale=rowscale, key=key, generator=generator,
            broadcast_dims=broadcast_dims, mask_strides=mask_strides, mask_offset=mask_offset,
        )  # fmt: skip
    strides = _strides(input, broadcast_dims, mask_strides)
    if not is_dynamo_compiling():
        out = _C.eager_rows(
            input, residual, p, training, key, generator, input_bias, colscale, rowscale, strides,
            mask_offset, dtype,
        )  # fmt: skip
        if out is not NotImplemented:
            return out
    call = Call(p, training, False, key, generator, None, None, 0.0, strides, mask_offset)
    total: Tensor = _rows.run(input, residual, call, (input_bias, colscale, rowscale), dtype, None)
    return total


def _normed(
    function: Callable[..., Any], input: Tensor, residual: Tensor | None, p: float, training: bool,
    norm: _rows.Norm, sum_dtype: torch.dtype | None, input_bias: Tensor | None,
    colscale: Tensor | None, rowscale: Tensor | None, key: Tensor | None,
    generator: torch.Generator | None, broadcast_dims: Sequence[int] | None,
    mask_strides: Sequence[int] | None, mask_offset: int,
) -> Any:  # fmt: skip
    tensors = (input, residual, norm.weight, norm.bias, input_bias, colscale, rowscale)
    if has_torch_function(tensors):
        given = {} if norm.rms else {"bias": norm.bias}
        return handle_torch_function(
            function, tensors, input, residual, norm.normalized_shape, weight=norm.weight, **given,
            eps=norm.eps, p=p, training=training, return_sum=norm.return_sum, dtype=norm.dtype,
            sum_dtype=sum_dtype, input_bias=input_bias, colscale=colscale, rowscale=rowscale,
            key=key, generator=generator, broadcast_dims=broadcast_dims, mask_strides=mask_strides,
            mask_offset=mask_offset,
        )  # fmt: skip
    strides = _strides(input, broadcast_dims, mask_strides)
    if norm.dtype is None and torch.is_autocast_enabled("cuda") and input.is_cuda:
        # As layer_norm under CUDA autocast.
        norm = norm._replace(dtype=torch.float32)
    if not is_dynamo_compiling():
        out = _C.eager_rows(
            input, residual, p, training, key, generator, input_bias, colscale, rowscale, strides,
            mask_offset, sum_dtype, norm.normalized_shape, norm.weight, norm.bias, norm.eps,
            norm.rms, norm.dtype, norm.return_sum,
        )  # fmt: skip
        if out is not NotImplemented:
            return out
    call = Call(p, training, False, key, generator, None, None, 0.0, strides, mask_offset)
    return _rows.run(input, residual, call, (input_bias, colscale, rowscale), sum_dtype, norm)


class _Options(TypedDict, total=False):
    """The keywords of both norms but `return_sum`."""

    dtype: torch.dtype | None
    sum_dtype: torch.dtype | None
    input_bias: Tensor | None
    colscale: Tensor | None
    rowscale: Tensor | None
    key: Tensor | None
    generator: torch.Generator | None
    broadcast_dims: Sequence[int] | None
    mask_strides: Sequence[int] | None
    mask_offset: int


@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor | None, normalized_shape: int | Sequence[int],
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, p: float = 0.5,
    training: bool = True, *, return_sum: Literal[False] = False, **options: Unpack[_Options],
) -> Tensor: ...  # fmt: skip
@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor | None, normalized_shape: int | Sequence[int],
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, p: float = 0.5,
    training: bool = True, *, return_sum: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor | None, normalized_shape: int | Sequence[int],
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, p: float = 0.5,
    training: bool = True, *, return_sum: bool, **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    p: float = 0.5,
    training: bool = True,
    *,
    return_sum: bool = False,
    dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
    input_bias: Tensor | None = None,
    colscale: Tensor | None = None,
    rowscale: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    broadcast_dims: Sequence[int] | None = None,
    mask_strides: Sequence[int] | None = None,
    mask_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of dropout of `input` added to `residual`, in one pass:
    z = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, where
    s = residual + (keep ? t / (1 - p) : 0), t = (input + input_bias) * colscale * rowscale.

    s is what :func:`dropout_ext.dropout_add` returns, rounded to `sum_dtype` before it is
    normalized. Saved for the backward pass: s, its mean and 1 / sqrt(var + eps), the weight and the
    key; with one of the three scales the input too.

    Ba, Kiros, Hinton, "Layer normalization", 2016. Known as dropout_add_layer_norm from
    flash-attention; see :mod:`dropout_ext.compat.flash_attn` for its signature.

    Args:
        input (Tensor): any strides; float64, float32, float16 or bfloat16.
        residual (Tensor, optional): of the shape of `input`; None for none.
        normalized_shape (int or sequence of int): the last dimensions, a row.
        weight (Tensor, optional): of shape `normalized_shape`. Default: None, ones
        bias (Tensor, optional): of shape `normalized_shape`. Default: None, zeros
        eps (float): added to the variance. Default: 1e-5
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False drops nothing. Default: True
        return_sum (bool): return (z, s), for layers that normalize before them. Default: False
        dtype (torch.dtype, optional): of z. Default: None, that of `input`; float32 under CUDA
            autocast, as layer_norm
        sum_dtype (torch.dtype, optional): of s, that of `residual` or float32. Default: None, that
            of `residual`, or of `input` without one
        input_bias (Tensor, optional): of shape (input.shape[-1],), added before. Default: None
        colscale (Tensor, optional): of shape (input.shape[-1],). Default: None
        rowscale (Tensor, optional): of the shape of `input` without `normalized_shape`; takes no
            gradient. Default: None
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0]. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator
        broadcast_dims (sequence of int, optional): dimensions along which all elements share one
            decision. Default: None
        mask_strides (sequence of int, optional): where this tensor lies in the mask of a larger
            one, as for :func:`dropout_ext.dropout`. Default: None, row-major
        mask_offset (int): the mask's index of the first element. Default: 0

    Returns:
        Tensor or (Tensor, Tensor): z, or (z, s); of the shape and device of `input`, contiguous.

    Raises:
        ValueError: `p` outside [0, 1]; a `normalized_shape` that is not the end of the input's; a
            tensor of another shape or device; both a key and a generator.
        TypeError: an argument of another type or dtype.

    Example:
        >>> x, r, k = torch.ones(1, 4), torch.arange(4.0).view(1, 4), dropout_ext.key(seed=42)
        >>> z, s = dropout_ext.dropout_add_layer_norm(x, r, 4, return_sum=True, key=k)
        >>> s
        tensor([[2., 1., 2., 3.]])
        >>> z
        tensor([[ 0.0000, -1.4142,  0.0000,  1.4142]])
    """
    if broadcast_dims is None and mask_strides is None and not is_dynamo_compiling():
        out = _C.eager_rows(
            input, residual, p, training, key, generator, input_bias, colscale, rowscale, None,
            mask_offset, sum_dtype, normalized_shape, weight, bias, eps, False, dtype, return_sum,
        )  # fmt: skip
        if out is not NotImplemented:
            return out
    norm = _rows.Norm(normalized_shape, weight, bias, eps, False, dtype, return_sum)
    result: Tensor | tuple[Tensor, Tensor] = _normed(
        dropout_add_layer_norm, input, residual, p, training, norm, sum_dtype, input_bias, colscale,
        rowscale, key, generator, broadcast_dims, mask_strides, mask_offset,
    )  # fmt: skip
    return result


@overload
def dropout_add_rms_norm(
    input: Tensor, residual: Tensor | None, normalized_shape: int | Sequence[int],
    weight: Tensor | None = None, eps: float | None = None, p: float = 0.5, training: bool = True,
    *, return_sum: Literal[False] = False, **options: Unpack[_Options],
) -> Tensor: ...  # fmt: skip
@overload
def dropout_add_rms_norm(
    input: Tensor, residual: Tensor | None, normalized_shape: int | Sequence[int],
    weight: Tensor | None = None, eps: float | None = None, p: float = 0.5, training: bool = True,
    *, return_sum: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def dropout_add_rms_norm(
    input: Tensor, residual: Tensor | None, normalized_shape: int | Sequence[int],
    weight: Tensor | None = None, eps: float | None = None, p: float = 0.5, training: bool = True,
    *, return_sum: bool, **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    return_sum: bool = False,
    dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
    input_bias: Tensor | None = None,
    colscale: Tensor | None = None,
    rowscale: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    broadcast_dims: Sequence[int] | None = None,
    mask_strides: Sequence[int] | None = None,
    mask_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm of dropout of `input` added to `residual`, in one pass:
    z = s / sqrt(mean(s^2) + eps) * weight, where
    s = residual + (keep ? t / (1 - p) : 0), t = (input + input_bias) * colscale * rowscale.

    s is what :func:`dropout_ext.dropout_add` returns, rounded to `sum_dtype` before it is
    normalized. Saved for the backward pass: s, 1 / sqrt(mean(s^2) + eps), the weight and the key;
    with one of the three scales the input too.

    Zhang, Sennrich, "Root mean square layer normalization", NeurIPS 2019.

    Args:
        input (Tensor): any strides; float64, float32, float16 or bfloat16.
        residual (Tensor, optional): of the shape of `input`; None for none.
        normalized_shape (int or sequence of int): the last dimensions, a row.
        weight (Tensor, optional): of shape `normalized_shape`. Default: None, ones
        eps (float, optional): added to the mean square. Default: None, the resolution of the type
            that is computed in, as :func:`torch.nn.functional.rms_norm`
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False drops nothing. Default: True
        return_sum (bool): return (z, s), for layers that normalize before them. Default: False
        dtype (torch.dtype, optional): of z. Default: None, that of `input`; float32 under CUDA
            autocast, as rms_norm
        sum_dtype (torch.dtype, optional): of s, that of `residual` or float32. Default: None, that
            of `residual`, or of `input` without one
        input_bias (Tensor, optional): of shape (input.shape[-1],), added before. Default: None
        colscale (Tensor, optional): of shape (input.shape[-1],). Default: None
        rowscale (Tensor, optional): of the shape of `input` without `normalized_shape`; takes no
            gradient. Default: None
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0]. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator
        broadcast_dims (sequence of int, optional): dimensions along which all elements share one
            decision. Default: None
        mask_strides (sequence of int, optional): where this tensor lies in the mask of a larger
            one, as for :func:`dropout_ext.dropout`. Default: None, row-major
        mask_offset (int): the mask's index of the first element. Default: 0

    Returns:
        Tensor or (Tensor, Tensor): z, or (z, s); of the shape and device of `input`, contiguous.

    Raises:
        ValueError: `p` outside [0, 1]; a `normalized_shape` that is not the end of the input's; a
            tensor of another shape or device; both a key and a generator.
        TypeError: an argument of another type or dtype.

    Example:
        >>> x, r, k = torch.ones(1, 4), torch.zeros(1, 4), dropout_ext.key(seed=42)
        >>> dropout_ext.dropout_add_rms_norm(x, r, 4, eps=0.0, key=k)
        tensor([[2., 0., 0., 0.]])
    """
    if broadcast_dims is None and mask_strides is None and not is_dynamo_compiling():
        out = _C.eager_rows(
            input, residual, p, training, key, generator, input_bias, colscale, rowscale, None,
            mask_offset, sum_dtype, normalized_shape, weight, None, eps, True, dtype, return_sum,
        )  # fmt: skip
        if out is not NotImplemented:
            return out
    norm = _rows.Norm(normalized_shape, weight, None, eps, True, dtype, return_sum)
    result: Tensor | tuple[Tensor, Tensor] = _normed(
        dropout_add_rms_norm, input, residual, p, training, norm, sum_dtype, input_bias, colscale,
        rowscale, key, generator, broadcast_dims, mask_strides, mask_offset,
    )  # fmt: skip
    return result


def activation_dropout(
    input: Tensor,
    activation: str,
    p: float = 0.5,
    training: bool = True,
    *,
    approximate: str = "none",
    input_bias: Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    broadcast_dims: Sequence[int] | None = None,
    mask_strides: Sequence[int] | None = None,
    mask_offset: int = 0,
) -> Tensor:
    """Dropout of an activation of `input`, in one pass:
    keep ? f(input + input_bias) / (1 - p) : 0.

    The activation is computed in float32 and rounded once; float64 by PyTorch's own. Saved for the
    backward pass: `input`, for "relu" the result, and the key, where PyTorch saves the mask
    besides. In eval mode and at p = 0 it is PyTorch's activation.

    Args:
        input (Tensor): any shape, any strides; float64, float32, float16 or bfloat16.
        activation (str): "gelu", "silu" or "relu".
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False drops nothing. Default: True
        approximate (str): of "gelu": "none" or "tanh". Default: "none"
        input_bias (Tensor, optional): of shape (input.shape[-1],), added before in the dtype of
            `input`, in a pass of its own. Default: None
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0]. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator
        broadcast_dims (sequence of int, optional): dimensions along which all elements share one
            decision. Default: None
        mask_strides (sequence of int, optional): where this tensor lies in the mask of a larger
            one, as for :func:`dropout_ext.dropout`. Default: None, row-major
        mask_offset (int): the mask's index of the first element. Default: 0

    Returns:
        Tensor: of the shape, dtype and device of `input`.

    Raises:
        ValueError: another `activation` or `approximate`; `p` outside [0, 1]; a key of another
            shape or device; both a key and a generator.
        TypeError: an argument of another type or dtype.

    Example:
        >>> k = dropout_ext.key(seed=42)
        >>> x = torch.tensor([[1.0, -1.0, 2.0, -2.0], [3.0, 1.0, -1.0, 0.5]])
        >>> dropout_ext.activation_dropout(x, "relu", 0.5, key=k)
        tensor([[2., 0., 0., 0.],
                [6., 0., 0., 1.]])
    """
    if has_torch_function((input, input_bias)):
        return handle_torch_function(
            activation_dropout, (input, input_bias), input, activation, p, training,
            approximate=approximate, input_bias=input_bias, key=key, generator=generator,
            broadcast_dims=broadcast_dims, mask_strides=mask_strides, mask_offset=mask_offset,
        )  # fmt: skip
    function = _function_of(activation, approximate)
    if input_bias is not None:
        check_tensor(input)
        _check_bias(input, input_bias)
        input = input + input_bias.to(input.dtype)
    strides = _strides(input, broadcast_dims, mask_strides)
    if not is_dynamo_compiling():
        out = _C.eager_activation(
            input, function, p, training, key, generator, strides, mask_offset
        )
        if out is not NotImplemented:
            return out
    call = Call(p, training, False, key, generator, None, None, 0.0, strides, mask_offset)
    return _rows.run_activation(input, activation, approximate, call)


def _check_bias(input: Tensor, bias: Tensor) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"activation_dropout(): argument 'input_bias' must be Tensor, not {type(bias).__name__}"
        )
    if bias.shape != input.shape[-1:]:
        raise ValueError(
            f"activation_dropout(): argument 'input_bias' has shape {tuple(bias.shape)}, but "
            f"accepted is {tuple(input.shape[-1:])}"
        )


def _function_of(activation: str, approximate: str) -> int:
    named = isinstance(activation, str) and isinstance(approximate, str)
    function = _rows.ACTIVATIONS.get((activation, approximate)) if named else None
    if function is None:
        name, value, accepted = "activation", activation, "'gelu', 'silu' and 'relu'"
        if isinstance(activation, str) and (activation, "none") in _rows.ACTIVATIONS:
            name, value = "approximate", approximate
            accepted = "'none' and 'tanh'" if activation == "gelu" else f"'none' for {activation!r}"
        raise ValueError(
            f"activation_dropout(): argument {name!r} is {value!r}, but accepted are {accepted}"
        )
    return function


class DropoutAdd(Keyed, nn.Module):
    """residual + dropout(input) in one pass: :func:`dropout_ext.dropout_add` as a module.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        generator (torch.Generator, optional): what to draw keys from. Default: None, the device's
            default generator

    Shape:
        - Input: (*), residual: (*)
        - Output: (*)

    Example:
        >>> m = dropout_ext.DropoutAdd(0.1).eval()
        >>> m(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, p: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        check_probability(p)
        check_source(None, generator)
        super().__init__()
        self.p = p
        self.generator = generator

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, key: Tensor | None = None
    ) -> Tensor:
        """Args:
        input (Tensor): what is dropped.
        residual (Tensor, optional): of its shape. Default: None, nothing is added
        key (Tensor, optional): what decides the mask. Default: None, a key is drawn

        Returns:
            Tensor: of the shape of `input`.
        """
        key = self._key(key)
        generator = self.generator if key is None else None
        return dropout_add(input, residual, self.p, self.training, key=key, generator=generator)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ActivationDropout(Keyed, nn.Module):
    """Dropout of an activation in one pass: :func:`dropout_ext.activation_dropout` as a module.

    Args:
        activation (str): "gelu", "silu" or "relu".
        p (float): probability of a drop, 0 to 1. Default: 0.5
        approximate (str): of "gelu": "none" or "tanh". Default: "none"
        generator (torch.Generator, optional): what to draw keys from. Default: None, the device's
            default generator

    Shape:
        - Input: (*)
        - Output: (*)

    Example:
        >>> dropout_ext.ActivationDropout("relu", 0.1).eval()(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """

    def __init__(
        self,
        activation: str,
        p: float = 0.5,
        *,
        approximate: str = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        _function_of(activation, approximate)
        check_probability(p)
        check_source(None, generator)
        super().__init__()
        self.activation = activation
        self.p = p
        self.approximate = approximate
        self.generator = generator

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        """Args:
        input (Tensor): what is activated, then dropped.
        key (Tensor, optional): what decides the mask. Default: None, a key is drawn

        Returns:
            Tensor: of the shape of `input`.
        """
        key = self._key(key)
        generator = self.generator if key is None else None
        return activation_dropout(
            input, self.activation, self.p, self.training, approximate=self.approximate, key=key,
            generator=generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        approximate = f", approximate={self.approximate!r}" if self.activation == "gelu" else ""
        return f"{self.activation!r}, p={self.p}{approximate}"


class _DropoutAddNorm(Keyed):
    """What the modules have beside their norm."""

    generator: torch.Generator | None = None

    def _set_dropout(self, p: float, prenorm: bool, generator: torch.Generator | None) -> None:
        check_probability(p)
        check_source(None, generator)
        self.p = p
        self.prenorm = prenorm
        if generator is not None:
            self.generator = generator

    def extra_repr(self) -> str:
        prenorm = ", prenorm=True" if self.prenorm else ""
        return f"{super().extra_repr()}, p={self.p}{prenorm}"


class DropoutAddLayerNorm(_DropoutAddNorm, nn.LayerNorm):
    """layer_norm(residual + dropout(input)) in one pass:
    :func:`dropout_ext.dropout_add_layer_norm` as a module. A :class:`torch.nn.LayerNorm`: its
    arguments, parameters and state dict.

    Args:
        normalized_shape (int or sequence of int): the last dimensions of the input.
        eps (float): added to the variance. Default: 1e-5
        elementwise_affine (bool): whether there is a weight. Default: True
        bias (bool): whether there is a bias. Default: True
        device (torch.device, optional): of the parameters. Default: None
        dtype (torch.dtype, optional): of the parameters. Default: None
        p (float): probability of a drop, 0 to 1; by keyword. Default: 0.5
        prenorm (bool): return the sum beside the norm; by keyword. Default: False
        generator (torch.Generator, optional): what to draw keys from; by keyword. Default: None,
            the device's default generator

    Shape:
        - Input: (*, normalized_shape), residual: the same
        - Output: the same, or two of it

    Example:
        >>> m = dropout_ext.DropoutAddLayerNorm(4, p=0.1).eval()
        >>> m(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1, 4)).detach()
        tensor([[-1.3416, -0.4472,  0.4472,  1.3416]])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float = 0.5,
        prenorm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        shape: Any = normalized_shape  # nn.LayerNorm names fewer types than it takes
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self._set_dropout(p, prenorm, generator)

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None, *, key: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args:
        input (Tensor): what is dropped.
        residual (Tensor, optional): of its shape. Default: None, nothing is added
        key (Tensor, optional): what decides the mask. Default: None, a key is drawn

        Returns:
            Tensor or (Tensor, Tensor): the norm, or with `prenorm` the norm and the sum.
        """
        key = self._key(key)
        return dropout_add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps, self.p,
            self.training, return_sum=self.prenorm, key=key,
            generator=self.generator if key is None else None,
        )  # fmt: skip


class DropoutAddRMSNorm(_DropoutAddNorm, nn.RMSNorm):
    """rms_norm(residual + dropout(input)) in one pass:
    :func:`dropout_ext.dropout_add_rms_norm` as a module. A :class:`torch.nn.RMSNorm`: its
    arguments, parameters and state dict.

    Args:
        normalized_shape (int or sequence of int): the last dimensions of the input.
        eps (float, optional): added to the mean square. Default: None, the resolution of the type
            that is computed in
        elementwise_affine (bool): whether there is a weight. Default: True
        device (torch.device, optional): of the parameters. Default: None
        dtype (torch.dtype, optional): of the parameters. Default: None
        p (float): probability of a drop, 0 to 1; by keyword. Default: 0.5
        prenorm (bool): return the sum beside the norm; by keyword. Default: False
        generator (torch.Generator, optional): what to draw keys from; by keyword. Default: None,
            the device's default generator

    Shape:
        - Input: (*, normalized_shape), residual: the same
        - Output: the same, or two of it

    Example:
        >>> m = dropout_ext.DropoutAddRMSNorm(2, eps=0.0, p=0.1).eval()
        >>> m(torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2)).detach()
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float = 0.5,
        prenorm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self._set_dropout(p, prenorm, generator)

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None, *, key: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args:
        input (Tensor): what is dropped.
        residual (Tensor, optional): of its shape. Default: None, nothing is added
        key (Tensor, optional): what decides the mask. Default: None, a key is drawn

        Returns:
            Tensor or (Tensor, Tensor): the norm, or with `prenorm` the norm and the sum.
        """
        key = self._key(key)
        return dropout_add_rms_norm(
            input, residual, self.normalized_shape, self.weight, self.eps, self.p, self.training,
            return_sum=self.prenorm, key=key, generator=self.generator if key is None else None,
        )  # fmt: skip
