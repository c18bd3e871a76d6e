"""bias_dropout_add as `megatron.core.fusions.fused_bias_dropout` has it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import fused

__all__ = ["bias_dropout_add_fused_inference", "bias_dropout_add_fused_train",
           "get_bias_dropout_add"]  # fmt: skip


def _bias_dropout_add(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float, training: bool
) -> Tensor:
    x, bias = x_with_bias
    # As there: what follows, pipeline communication above all, relies on the dtype of x.
    residual = residual.to(x.dtype)
    if bias is not None and bias.shape != x.shape[-1:]:  # expanded by the caller, as it once was
        x, bias = x + bias, None
    return fused.dropout_add(x, residual, prob, training, input_bias=bias)


def bias_dropout_add_fused_train(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    """residual + dropout(x + bias, prob), with the signature of
    `megatron.core.fusions.fused_bias_dropout.bias_dropout_add_fused_train`.

    Args:
        x_with_bias (tuple): x, and its bias of shape (x.shape[-1],), or expanded, or None.
        residual (Tensor): of the shape of x.
        prob (float): probability of a drop, 0 to 1.

    Returns:
        Tensor: of the shape and dtype of x.

    Raises:
        ValueError: `prob` outside [0, 1]; a tensor of another shape or device.
        TypeError: a tensor of another dtype.

    Example:
        >>> from dropout_ext.compat.megatron import bias_dropout_add_fused_train
        >>> x, residual = torch.ones(2, 4), torch.zeros(2, 4)
        >>> bias_dropout_add_fused_train((x, torch.ones(4)), residual, prob=0.0)
        tensor([[2., 2., 2., 2.],
                [2., 2., 2., 2.]])
    """
    return _bias_dropout_add(x_with_bias, residual, prob, True)


def bias_dropout_add_fused_inference(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    """residual + x + bias, with the signature of
    `megatron.core.fusions.fused_bias_dropout.bias_dropout_add_fused_inference`.

    Args:
        x_with_bias (tuple): x, and its bias of shape (x.shape[-1],), or expanded, or None.
        residual (Tensor): of the shape of x.
        prob (float): not used.

    Returns:
        Tensor: of the shape and dtype of x.

    Raises:
        ValueError: a tensor of another shape or device.
        TypeError: a tensor of another dtype.

    Example:
        >>> from dropout_ext.compat.megatron import bias_dropout_add_fused_inference
        >>> bias_dropout_add_fused_inference((torch.ones(2), None), torch.ones(2), prob=0.1)
        tensor([2., 2.])
    """
    return _bias_dropout_add(x_with_bias, residual, prob, False)


def get_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """The one of the two functions for training or inference, with the signature of
    `megatron.core.fusions.fused_bias_dropout.get_bias_dropout_add`.

    Args:
        training (bool): whether anything drops.
        fused (bool): not used: all are fused.

    Returns:
        Callable: of (x_with_bias, residual, prob).

    Example:
        >>> from dropout_ext.compat.megatron import get_bias_dropout_add
        >>> get_bias_dropout_add(False, True)((torch.ones(2), None), torch.ones(2), 0.1)
        tensor([2., 2.])
    """
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference
