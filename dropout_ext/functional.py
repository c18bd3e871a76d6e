"""The functions of the dropout family, by the names, signatures and defaults of
torch.nn.functional, and what they add to them.
"""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
)

from . import _C, _attention, _geometry, _ops
from ._call import Call, check_probability, check_source, check_tensor, run
from ._torch_function import overridable, overridden

__all__ = [
    "alpha_dropout",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "keep_mask",
    "locked_dropout",
    "scaled_dot_product_attention",
]

# The limit of SELU at minus infinity, negated: scale * alpha of Klambauer, Unterthiner, Mayr and
# Hochreiter, "Self-normalizing neural networks", NeurIPS 2017.
SELU_LIMIT = 1.7580993408473766


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    broadcast_dims: Sequence[int] | None = None,
    mask_strides: Sequence[int] | None = None,
    mask_offset: int = 0,
) -> Tensor:
    """Drops each element with probability `p` and scales what is kept by 1 / (1 - p):
    keep ? input / (1 - p) : 0, as :func:`torch.nn.functional.dropout`.

    Dropped elements are +0, also where the input is NaN or infinite. The backward pass computes the
    mask again from the key: 16 bytes are saved.

    Hinton, Srivastava, Krizhevsky, Sutskever, Salakhutdinov, "Improving neural networks by
    preventing co-adaptation of feature detectors", 2012.

    Args:
        input (Tensor): any shape, any strides; float64, float32, float16,
            bfloat16, complex128 or complex64.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False returns the input itself. Default: True
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator
        broadcast_dims (sequence of int, optional): dimensions along which all elements share one
            decision; negative ones count from the last. Default: None
        mask_strides (sequence of int, optional): where this tensor lies in the mask of a larger
            one: the element at idx takes the decision of index
            mask_offset + sum_d idx[d] * mask_strides[d], modulo 2**64. One per dimension; a shard
            takes the strides of the whole. Default: None, row-major
        mask_offset (int): the index of this tensor's first element. Default: 0

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `p` = 0, or no elements.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.
        IndexError: a dimension of `broadcast_dims` that `input` has not.

    Example:
        >>> k = dropout_ext.key(seed=42)
        >>> x = torch.ones(2, 4)
        >>> dropout_ext.dropout(x, p=0.5, key=k)
        tensor([[2., 0., 0., 0.],
                [2., 0., 0., 2.]])
        >>> dropout_ext.dropout(x, p=0.5, key=k, broadcast_dims=(0,))  # one mask for both rows
        tensor([[2., 0., 0., 0.],
                [2., 0., 0., 0.]])
        >>> dropout_ext.dropout(x[1:], p=0.5, key=k, mask_strides=(4, 1), mask_offset=4)  # a shard
        tensor([[2., 0., 0., 2.]])
    """
    if (
        broadcast_dims is None
        and mask_strides is None
        and mask_offset == 0
        and not is_dynamo_compiling()
    ):
        out = _C.eager(input, p, training, inplace, key, generator)
        if out is not NotImplemented:
            return out
    if has_torch_function_unary(input):
        arguments = {
            "p": p, "training": training, "inplace": inplace, "key": key, "generator": generator,
            "broadcast_dims": broadcast_dims, "mask_strides": mask_strides,
            "mask_offset": mask_offset,
        }  # fmt: skip
        result: Tensor = overridden(dropout, input, arguments)
        return result
    check_tensor(input)
    call = Call(p, training, inplace, key, generator, mask_offset=mask_offset)
    if broadcast_dims is not None or mask_strides is not None:
        strides = _geometry.mask_strides(input.shape, broadcast_dims, mask_strides)
        call = call._replace(mask_strides=strides)
    return run(input, call)


@overridable
def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels with probability `p` and scales the others by 1 / (1 - p), as
    :func:`torch.nn.functional.dropout1d`: one decision per sample and channel.

    Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional
    networks", CVPR 2015.

    Args:
        input (Tensor): (N, C, L) or (C, L), any strides; float64, float32, float16,
            bfloat16, complex128 or complex64.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False returns the input itself. Default: True
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator

    Shape:
        - input: (N, C, L) or (C, L)
        - output: as the input

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `p` = 0, or no elements.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.
        RuntimeError: `input` of another number of dimensions.

    Example:
        >>> x = torch.ones(2, 3, 4)
        >>> y = dropout_ext.functional.dropout1d(x, key=dropout_ext.key(42))
        >>> y[..., 0]  # each of the 2 x 3 channels as a whole
        tensor([[2., 0., 0.],
                [0., 2., 0.]])
    """
    check_probability(p)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. "
            "Note that dropout1d exists to provide channel-wise dropout on inputs with 1 "
            "spatial dimension, a channel dimension, and an optional batch dimension "
            "(i.e. 2D or 3D inputs)."
        )
    return _features(input, Call(p, training, inplace, key, generator), input.dim() == 3)


@overridable
def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels with probability `p` and scales the others by 1 / (1 - p), as
    :func:`torch.nn.functional.dropout2d`: one decision per sample and channel. As there,
    a 3-D input is taken as (N, C, L), with a warning, and other numbers of dimensions with another.

    Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional
    networks", CVPR 2015.

    Args:
        input (Tensor): (N, C, H, W), any strides; float64, float32, float16,
            bfloat16, complex128 or complex64.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False returns the input itself. Default: True
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator

    Shape:
        - input: (N, C, H, W); (N, C, L), with a warning
        - output: as the input

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `p` = 0, or no elements.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.

    Example:
        >>> x = torch.ones(2, 3, 4, 4)
        >>> y = dropout_ext.functional.dropout2d(x, key=dropout_ext.key(42))
        >>> y[..., 0, 0]  # each of the 2 x 3 channels as a whole
        tensor([[2., 0., 0.],
                [0., 2., 0.]])
    """
    check_probability(p)
    if input.dim() not in (3, 4):
        warnings.warn(_deprecated("dropout2d", input.dim(), 2, "3D or 4D"), stacklevel=3)
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise "
            "1D dropout behavior is desired - input is interpreted as shape (N, C, L), where C "
            "is the channel dim. This behavior will change in a future release to interpret the "
            "input as one without a batch dimension, i.e. shape (C, H, W). To maintain the 1D "
            "channel-wise dropout behavior, please switch to using dropout1d instead.",
            stacklevel=3,
        )
    return _features(input, Call(p, training, inplace, key, generator))


@overridable
def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels with probability `p` and scales the others by 1 / (1 - p), as
    :func:`torch.nn.functional.dropout3d`: one decision per sample and channel.

    Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional
    networks", CVPR 2015.

    Args:
        input (Tensor): (N, C, D, H, W) or (C, D, H, W), any strides; float64, float32, float16,
            bfloat16, complex128 or complex64.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False returns the input itself. Default: True
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator

    Shape:
        - input: (N, C, D, H, W) or (C, D, H, W)
        - output: as the input

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `p` = 0, or no elements.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.

    Example:
        >>> x = torch.ones(2, 3, 2, 2, 2)
        >>> y = dropout_ext.functional.dropout3d(x, key=dropout_ext.key(42))
        >>> y[..., 0, 0, 0]  # each of the 2 x 3 channels as a whole
        tensor([[2., 0., 0.],
                [0., 2., 0.]])
    """
    check_probability(p)
    if input.dim() not in (4, 5):
        warnings.warn(_deprecated("dropout3d", input.dim(), 3, "4D or 5D"), stacklevel=3)
    return _features(input, Call(p, training, inplace, key, generator), input.dim() == 5)


@overridable
def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sets each element to the negative saturation value of SELU with probability `p`, and maps all
    of them so that zero mean and unit variance stay: keep ? a * input + b : a * alpha' + b, as
    :func:`torch.nn.functional.alpha_dropout`.

    With alpha' = -1.7581, a = ((1 - p) * (1 + p * alpha'**2)) ** -0.5 and b = -a * p * alpha'.
    Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks", NeurIPS 2017,
    section 3.

    Args:
        input (Tensor): any shape, any strides; float64, float32, float16 or
            bfloat16.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False returns the input itself. Default: False
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `p` = 0, or no elements.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.

    Example:
        >>> x = torch.randn(1000, 1000)
        >>> y = dropout_ext.functional.alpha_dropout(x, 0.2, training=True, key=dropout_ext.key(1))
        >>> round(y.mean().item(), 2) + 0, round(y.std().item(), 2)
        (0.0, 1.0)
    """
    check_probability(p)
    return run(input, Call(p, training, inplace, key, generator, *_alpha(p)))


@overridable
def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Alpha dropout of whole channels, as :func:`torch.nn.functional.feature_alpha_dropout`: one
    decision per sample and channel. See :func:`alpha_dropout` for the formula.

    Args:
        input (Tensor): (N, C, ...), any strides; float64, float32, float16 or
            bfloat16.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        training (bool): False returns the input itself. Default: False
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator

    Shape:
        - input: (N, C, ...)
        - output: as the input

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `p` = 0, or no elements.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.
        RuntimeError: `input` of fewer than 2 dimensions.

    Example:
        >>> x = torch.zeros(2, 3, 4)
        >>> k = dropout_ext.key(42)
        >>> y = dropout_ext.functional.feature_alpha_dropout(x, 0.5, training=True, key=k)
        >>> (y[..., 0] > 0).tolist()  # kept
        [[True, False, False], [False, True, False]]
    """
    check_probability(p)
    return _features(input, Call(p, training, inplace, key, generator, *_alpha(p)))


@overridable
def drop_path(
    input: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Stochastic depth per sample: drops whole slices of dimension 0 with probability `drop_prob`,
    as `timm.layers.drop_path` does.

    Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", ECCV 2016.

    Args:
        input (Tensor): (N, ...), any strides; float64, float32, float16,
            bfloat16, complex128 or complex64.
        drop_prob (float): probability of a drop, 0 to 1. Default: 0.0
        training (bool): False returns the input itself. Default: False
        scale_by_keep (bool): scale what is kept by 1 / (1 - drop_prob). Default: True
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator

    Shape:
        - input: (N, ...)
        - output: as the input

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `drop_prob` = 0, or no elements.

    Raises:
        ValueError: `drop_prob` outside [0, 1] or NaN; a key of another shape or device; both a key
            and a generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.
        ValueError: `input` of 0 dimensions.

    Example:
        >>> x = torch.ones(4, 2)
        >>> dropout_ext.functional.drop_path(x, 0.5, training=True, key=dropout_ext.key(42))
        tensor([[2., 2.],
                [0., 0.],
                [0., 0.],
                [0., 0.]])
    """
    check_probability(drop_prob)
    if input.dim() == 0:
        raise ValueError("drop_path(): argument 'input' has 0 dimensions, but at least 1 is needed")
    strides = _geometry.mask_strides(input.shape, range(1, input.dim()))
    scale = None if scale_by_keep else 1.0
    call = Call(drop_prob, training, inplace, key, generator, scale)
    return run(input, call._replace(mask_strides=strides))


@overridable
def locked_dropout(
    input: Tensor,
    p: float = 0.5,
    dim: int = 1,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Variational dropout: one mask for all positions of `dim`, the time of a sequence, so that a
    unit that is dropped is so at every step.

    Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016.

    Args:
        input (Tensor): such as (N, T, C), any strides; float64, float32, float16,
            bfloat16, complex128 or complex64.
        p (float): probability of a drop, 0 to 1. Default: 0.5
        dim (int): the dimension that shares decisions, from the last if negative. Default: 1
        training (bool): False returns the input itself. Default: True
        inplace (bool): write to `input` and return it. Default: False
        key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64 or int64
            of shape (2,), or (n, 2) with n = input.shape[0] for a key per slice of dimension 0, on
            the CPU or the device of `input`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `input`; not together with `key`. Default: None, the device's default generator

    Returns:
        Tensor: of the shape, dtype and device of `input`, with the strides of
        `torch.empty_like(input)`; `input` itself, and no key drawn, where nothing can drop: not
        `training`, `p` = 0, or no elements.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape or device; both a key and a
            generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: in place on a leaf that requires grad, or on memory that elements share.
        IndexError: a `dim` that `input` has not.

    Example:
        >>> x = torch.ones(1, 3, 4)  # (N, T, C)
        >>> dropout_ext.functional.locked_dropout(x, dim=1, key=dropout_ext.key(42))
        tensor([[[2., 0., 0., 0.],
                 [2., 0., 0., 0.],
                 [2., 0., 0., 0.]]])
    """
    check_probability(p)
    strides = _geometry.mask_strides(input.shape, (dim,), name="dim")
    return run(input, Call(p, training, inplace, key, generator)._replace(mask_strides=strides))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    dropout_key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attention with dropout on the weights, as
    :func:`torch.nn.functional.scaled_dot_product_attention`:
    dropout(softmax(scale * query @ key^T + attn_mask), dropout_p, key=dropout_key) @ value.

    On the CPU one kernel computes it over blocks of queries and keys, backward too, and no (L, S)
    matrix is stored. It is composed of PyTorch's operators on other devices, and on the CPU where
    `attn_mask` requires a gradient, in forward mode, under functorch, and for the gradient of a
    gradient. With `dropout_p` = 0 it is PyTorch's function itself.

    Dao, Fu, Ermon, Rudra, Re, "FlashAttention: fast and memory-efficient exact attention with
    IO-awareness", NeurIPS 2022.

    Args:
        query (Tensor): (..., H, L, E), any strides; float64, float32, float16 or bfloat16. 16-bit
            types are computed in float32 and rounded at the end.
        key (Tensor): (..., H, S, E), of the dtype of `query`.
        value (Tensor): (..., H, S, Ev), of the dtype of `query`.
        attn_mask (Tensor, optional): broadcastable to (..., H, L, S): bool, True where a query sees
            a key, or float32 or of the dtype of `query`, added to the scores. The output of a query
            that sees no key is 0, and so are its gradients. Default: None
        dropout_p (float): probability that a weight is dropped, 0 to 1. There is no `training`:
            pass 0.0 in evaluation. Default: 0.0
        is_causal (bool): query i sees keys 0 to i; not together with `attn_mask`. Default: False
        scale (float, optional): of the scores. Default: None, 1 / sqrt(E)
        enable_gqa (bool): heads of `key` and `value` are shared by consecutive heads of `query`,
            whose number theirs divides. Default: False
        dropout_key (Tensor, optional): what decides the mask, see :func:`dropout_ext.key`: uint64
            or int64 of shape (2,), or (n, 2) with n the size of dimension 0 of the weights for a
            key per slice, on the CPU or the device of `query`. Default: None, a key is drawn
        generator (torch.Generator, optional): what to draw the key from, on the CPU or the device
            of `query`; not together with `dropout_key`. Default: None, the device's default
            generator

    Shape:
        - query, key, value: as above; their batch dimensions (..., H), any number of them,
          broadcast as in a matrix product
        - weights, whose mask is that of :func:`keep_mask`: (..., H, L, S)
        - output: (..., H, L, Ev)

    Returns:
        Tensor: of the dtype and device of `query`.

    Raises:
        ValueError: `dropout_p` outside [0, 1] or NaN; a key of another shape or device; both a key
            and a generator.
        TypeError: an argument of another type or dtype.
        RuntimeError: what PyTorch's function raises for shapes, dtypes and masks that do not match.

    Example:
        >>> k = dropout_ext.key(seed=42)
        >>> query = torch.zeros(2, 4)  # that sees all keys alike
        >>> key, value = torch.zeros(4, 4), torch.eye(4)
        >>> dropout_ext.functional.scaled_dot_product_attention(
        ...     query, key, value, dropout_p=0.5, dropout_key=k
        ... )
        tensor([[0.5000, 0.0000, 0.0000, 0.0000],
                [0.5000, 0.0000, 0.0000, 0.5000]])
    """
    tensors = (query, key, value, attn_mask)
    if has_torch_function(tensors):
        out: Tensor = handle_torch_function(
            scaled_dot_product_attention, tensors, *tensors, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, dropout_key=dropout_key,
            generator=generator,
        )  # fmt: skip
        return out
    function = "scaled_dot_product_attention()"
    check_tensor(query, function, "query")
    check_tensor(key, function, "key")
    check_tensor(value, function, "value")
    check_probability(dropout_p, function, "dropout_p")
    check_source(dropout_key, generator, function, "dropout_key")
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            *tensors, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _attention.attention(
        *tensors, dropout_p, is_causal, scale, enable_gqa, dropout_key, generator
    )


def keep_mask(
    shape: Sequence[int],
    p: float,
    key: Tensor,
    *,
    device: torch.device | str | None = None,
    broadcast_dims: Sequence[int] | None = None,
    mask_strides: Sequence[int] | None = None,
    mask_offset: int = 0,
) -> Tensor:
    """The mask that :func:`dropout` with this key applies to a tensor of this shape.

    Args:
        shape (sequence of int): of the mask.
        p (float): probability of a drop, 0 to 1.
        key (Tensor): see :func:`dropout_ext.key`: uint64 or int64 of shape (2,), or (n, 2) with
            n = shape[0] for a key per slice of dimension 0.
        device (torch.device or str, optional): of the result. Default: None, the key's
        broadcast_dims (sequence of int, optional): dimensions along which all elements share one
            decision; negative ones count from the last. Default: None
        mask_strides (sequence of int, optional): where the shape lies in the mask of a larger one:
            the element at idx takes the decision of index
            mask_offset + sum_d idx[d] * mask_strides[d], modulo 2**64. Default: None, row-major
        mask_offset (int): the index of the first element. Default: 0

    Returns:
        Tensor: bool, of shape `shape`, True where an element is kept.

    Raises:
        ValueError: `p` outside [0, 1] or NaN; a key of another shape.
        TypeError: an argument of another type or dtype.
        IndexError: a dimension of `broadcast_dims` that `shape` has not.

    Example:
        >>> k = dropout_ext.key(seed=42)
        >>> dropout_ext.keep_mask((8,), 0.5, k).tolist()
        [True, False, False, False, True, False, False, True]
    """
    if not isinstance(key, Tensor):
        raise TypeError(
            "keep_mask(): argument 'key' must be a Tensor (dropout_ext.key makes one), "
            f"not {type(key).__name__}"
        )
    check_probability(p)
    shape = _geometry.ints(shape, "shape")
    strides = _geometry.mask_strides(shape, broadcast_dims, mask_strides)
    if strides is None:
        strides = _geometry.row_major(shape)
    if device is not None:
        device = torch.device(device)
    mask: Tensor = _ops.ops.keep_mask(
        key, p, shape, strides, _geometry.wrap_offset(mask_offset), device=device
    )
    return mask


def _deprecated(name: str, dim: int, spatial: int, accepted: str) -> str:
    return (
        f"{name}: Received a {dim}-D input to {name}, which is deprecated "
        "and will result in an error in a future release. To retain the behavior "
        f"and silence this warning, please use dropout instead. Note that {name} "
        f"exists to provide channel-wise dropout on inputs with {spatial} spatial dimensions, "
        f"a channel dimension, and an optional batch dimension (i.e. {accepted} inputs)."
    )


def _alpha(p: float) -> tuple[float, float | None, float]:
    """scale, bias and dropped: a, a * alpha * p and -a * alpha * (1 - p), with the a and the b of
    the paper. p = 1 drops everything to 0, as in PyTorch.
    """
    if p == 1:
        return 0.0, None, 0.0
    a = 1 / math.sqrt((SELU_LIMIT * SELU_LIMIT * p + 1) * (1 - p))
    return a, a * SELU_LIMIT * p, -a * SELU_LIMIT * (1 - p)


def _features(input: Tensor, call: Call, batched: bool = True) -> Tensor:
    """One decision per channel: of (N, C, ...) if batched, of (C, ...) if not."""
    channel = 1 if batched else 0
    if call.training and 0 < call.p < 1 and input.dim() <= channel and input.numel() != 0:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    strides = _geometry.mask_strides(input.shape, range(channel + 1, input.dim()))
    return run(input, call._replace(mask_strides=strides))
