"""The functions of the dropout family, by the names, signatures and defaults of
torch.nn.functional, and what they add to them.

Arguments that all functions share:
    input: float64, float32, float16, bfloat16, complex128 or complex64 (the alpha functions: real),
        any shape and strides. The output has its shape, its dtype and the strides of
        `torch.empty_like(input)`.
    p: drop probability, 0 to 1.
    key: what decides the mask, from `dropout_ext.key`: shape (2,), or (n, 2) with n =
        input.shape[0] for a key per slice of dimension 0. None draws one.
    generator: a torch.Generator to draw the key from, of the input's device or of the CPU.
Eval mode, p = 0 and empty tensors return the input itself and draw no key. Errors: ValueError for p
outside [0, 1], for a key of the wrong shape or device, for both key and generator; TypeError for a
wrong type or dtype.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_unary

from . import _C, _geometry, _ops
from ._call import Call, check_probability, check_tensor, run
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
    """`torch.nn.functional.dropout`: keep ? input / (1 - p) : 0.

    broadcast_dims: dimensions along which all elements share one decision, negative ones too.
    mask_strides, mask_offset: where this tensor lies in a larger one. Element idx has index
        mask_offset + sum_d idx[d] * mask_strides[d] (modulo 2**64) of the mask; one stride per
        dimension, None for row-major. A shard takes the whole tensor's strides and the index of its
        first element, and gets the whole tensor's mask there.
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
        return overridden(dropout, input, arguments)
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
    """`torch.nn.functional.dropout1d`: drops whole channels of (N, C, L) or (C, L)."""
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
    """`torch.nn.functional.dropout2d`: drops whole channels of (N, C, H, W).

    As there, a 3-D input is taken as (N, C, L), with a warning.
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
    """`torch.nn.functional.dropout3d`: drops whole channels of (N, C, D, H, W) or (C, D, H, W)."""
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
    """`torch.nn.functional.alpha_dropout`: keep ? a * input + b : a * alpha' + b, which keeps zero
    mean and unit variance (Klambauer et al., "Self-normalizing neural networks", section 3).
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
    """`torch.nn.functional.feature_alpha_dropout`: `alpha_dropout` of whole channels."""
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
    """Stochastic depth per sample, `timm.layers.drop_path`: drops whole slices of dimension 0.

    scale_by_keep: divide what is kept by 1 - drop_prob.

    Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", ECCV 2016.
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
    """Variational dropout: one mask for all positions of `dim`, the time of a sequence.

    Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016.
    """
    check_probability(p)
    strides = _geometry.mask_strides(input.shape, (dim,), name="dim")
    return run(input, Call(p, training, inplace, key, generator)._replace(mask_strides=strides))


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
    """The mask that `dropout` with this key applies to a tensor of this shape: bool, True = kept.

    device: of the result, None for the key's. The other arguments as in `dropout`.
    """
    if not isinstance(key, Tensor):
        raise TypeError(
            "keep_mask(): argument 'key' must be a Tensor (dropout_ext.key makes one), "
            f"not {type(key).__name__}"
        )
    check_probability(p)
    strides = _geometry.mask_strides(shape, broadcast_dims, mask_strides)
    if strides is None:
        strides = _geometry.row_major(shape)
    if device is not None:
        device = torch.device(device)
    return _ops.ops.keep_mask(key, p, shape, strides, _geometry.wrap(mask_offset), device=device)


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
