"""dropout_add_layer_norm and dropout_add_rms_norm as `flash_attn.ops.layer_norm` and
`flash_attn.ops.rms_norm` have them, for any device, hidden size and layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .. import _C, _draw, functional, fused

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
]


def _dropout_add_norm(
    function: Callable[..., Any], x0: Tensor, residual: Tensor | None, norm: tuple[Any, ...],
    dropout_p: float, rowscale: Tensor | None, layerscale: Tensor | None, prenorm: bool,
    residual_in_fp32: bool, return_dropout_mask: bool,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    if residual is not None:
        sum_dtype = residual.dtype
    else:
        sum_dtype = torch.float32 if residual_in_fp32 else x0.dtype
    key = None
    if return_dropout_mask and dropout_p > 0:
        if not is_dynamo_compiling():
            _C.check_call(x0, None, dropout_p, None, 0.0, 0)  # before the draw
        key = _draw.draw_key(x0, None)
    z, total = function(
        x0, residual, x0.shape[-1:], *norm, dropout_p, dropout_p > 0, return_sum=True,
        sum_dtype=sum_dtype, rowscale=rowscale, colscale=layerscale, key=key,
    )  # fmt: skip
    out: tuple[Tensor, ...] = (z, total) if prenorm else (z,)
    if return_dropout_mask:
        if key is None:
            mask = torch.ones(x0.shape, dtype=torch.uint8, device=x0.device)
        else:
            mask = functional.keep_mask(x0.shape, dropout_p, key, device=x0.device)
            mask = mask.to(torch.uint8)
        out = (*out, mask)
    return out if len(out) > 1 else out[0]


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm(dropout(x0 * layerscale * rowscale) + residual) over the last dimension, with the
    signature of `flash_attn.ops.layer_norm.dropout_add_layer_norm`.

    Args:
        x0 (Tensor): (..., hidden); float64, float32, float16 or bfloat16.
        residual (Tensor, optional): of the shape of `x0`, of its dtype or float32.
        weight (Tensor): (hidden,).
        bias (Tensor, optional): (hidden,).
        dropout_p (float): probability of a drop; 0 drops nothing, in evaluation for instance.
        epsilon (float): added to the variance.
        rowscale (Tensor, optional): of shape x0.shape[:-1]. Default: None
        layerscale (Tensor, optional): (hidden,). Default: None
        prenorm (bool): return the sum too. Default: False
        residual_in_fp32 (bool): the sum is float32 where there is no residual; with one it has the
            residual's dtype. Default: False
        return_dropout_mask (bool): return the keep mask too, as uint8. Default: False

    Returns:
        Tensor or tuple: the norm, of the dtype of `x0`; then the sum, then the mask, as asked for.

    Raises:
        ValueError: `dropout_p` outside [0, 1]; a tensor of another shape or device.
        TypeError: a tensor of another dtype.

    Example:
        >>> from dropout_ext.compat.flash_attn import dropout_add_layer_norm
        >>> x, w, b = torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2)
        >>> dropout_add_layer_norm(x, None, w, b, dropout_p=0.0, epsilon=0.0)
        tensor([[-1.,  1.]])
    """
    return _dropout_add_norm(
        fused.dropout_add_layer_norm, x0, residual, (weight, bias, epsilon), dropout_p, rowscale,
        layerscale, prenorm, residual_in_fp32, return_dropout_mask,
    )  # fmt: skip


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """rms_norm(dropout(x0 * layerscale * rowscale) + residual) over the last dimension, with the
    signature of `flash_attn.ops.rms_norm.dropout_add_rms_norm`.

    Args:
        x0 (Tensor): (..., hidden); float64, float32, float16 or bfloat16.
        residual (Tensor, optional): of the shape of `x0`, of its dtype or float32.
        weight (Tensor): (hidden,).
        bias (None): there is none; anything else is an error.
        dropout_p (float): probability of a drop; 0 drops nothing, in evaluation for instance.
        epsilon (float): added to the mean square.
        rowscale (Tensor, optional): of shape x0.shape[:-1]. Default: None
        layerscale (Tensor, optional): (hidden,). Default: None
        prenorm (bool): return the sum too. Default: False
        residual_in_fp32 (bool): the sum is float32 where there is no residual; with one it has the
            residual's dtype. Default: False
        return_dropout_mask (bool): return the keep mask too, as uint8. Default: False

    Returns:
        Tensor or tuple: the norm, of the dtype of `x0`; then the sum, then the mask, as asked for.

    Raises:
        ValueError: a bias; `dropout_p` outside [0, 1]; a tensor of another shape or device.
        TypeError: a tensor of another dtype.

    Example:
        >>> from dropout_ext.compat.flash_attn import dropout_add_rms_norm
        >>> x, w = torch.tensor([[3.0, 3.0]]), torch.ones(2)
        >>> dropout_add_rms_norm(x, None, w, None, dropout_p=0.0, epsilon=0.0)
        tensor([[1., 1.]])
    """
    if bias is not None:
        raise ValueError(
            "dropout_add_rms_norm(): argument 'bias' is a tensor, but accepted is None: an RMS "
            "norm has no bias"
        )
    return _dropout_add_norm(
        fused.dropout_add_rms_norm, x0, residual, (weight, epsilon), dropout_p, rowscale,
        layerscale, prenorm, residual_in_fp32, return_dropout_mask,
    )  # fmt: skip


class _DropoutAddNorm(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, prenorm={self.prenorm}, p={self.p}, eps={self.eps}"


class DropoutAddLayerNorm(_DropoutAddNorm):
    """:func:`dropout_add_layer_norm` as a module, with the signature and the parameters of
    `flash_attn.ops.layer_norm.DropoutAddLayerNorm`.

    Args:
        hidden_size (int): size of the last dimension.
        prenorm (bool): return the sum beside the norm. Default: False
        p (float): probability of a drop while training. Default: 0.0
        eps (float): added to the variance. Default: 1e-5
        residual_in_fp32 (bool): the sum is float32 where there is no residual. Default: False
        device (torch.device, optional): of the parameters. Default: None
        dtype (torch.dtype, optional): of the parameters. Default: None

    Shape:
        - Input: (..., hidden_size), residual: the same
        - Output: the same, or two of it

    Example:
        >>> from dropout_ext.compat.flash_attn import DropoutAddLayerNorm
        >>> DropoutAddLayerNorm(2, p=0.1, eps=0.0).eval()(torch.tensor([[1.0, 3.0]])).detach()
        tensor([[-1.,  1.]])
    """

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, prenorm, p, eps, residual_in_fp32, device, dtype)
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Args:
        x0 (Tensor): what is dropped.
        residual (Tensor, optional): of its shape. Default: None

        Returns:
            Tensor or (Tensor, Tensor): the norm, or with `prenorm` the norm and the sum.
        """
        return dropout_add_layer_norm(
            x0, residual, self.weight, self.bias, self.p if self.training else 0.0, self.eps,
            prenorm=self.prenorm, residual_in_fp32=self.residual_in_fp32,
        )  # fmt: skip


class DropoutAddRMSNorm(_DropoutAddNorm):
    """:func:`dropout_add_rms_norm` as a module, with the signature and the parameters of
    `flash_attn.ops.rms_norm.DropoutAddRMSNorm`.

    Args:
        hidden_size (int): size of the last dimension.
        prenorm (bool): return the sum beside the norm. Default: False
        p (float): probability of a drop while training. Default: 0.0
        eps (float): added to the mean square. Default: 1e-5
        residual_in_fp32 (bool): the sum is float32 where there is no residual. Default: False
        device (torch.device, optional): of the parameters. Default: None
        dtype (torch.dtype, optional): of the parameters. Default: None

    Shape:
        - Input: (..., hidden_size), residual: the same
        - Output: the same, or two of it

    Example:
        >>> from dropout_ext.compat.flash_attn import DropoutAddRMSNorm
        >>> DropoutAddRMSNorm(2, p=0.1, eps=0.0).eval()(torch.tensor([[3.0, 3.0]])).detach()
        tensor([[1., 1.]])
    """

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Args:
        x0 (Tensor): what is dropped.
        residual (Tensor, optional): of its shape. Default: None

        Returns:
            Tensor or (Tensor, Tensor): the norm, or with `prenorm` the norm and the sum.
        """
        return dropout_add_rms_norm(
            x0, residual, self.weight, None, self.p if self.training else 0.0, self.eps,
            prenorm=self.prenorm, residual_in_fp32=self.residual_in_fp32,
        )  # fmt: skip
