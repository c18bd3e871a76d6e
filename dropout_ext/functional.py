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

import functools
import inspect
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _C, _ops

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


def _overridden(function, input, arguments):
    """The call as the `__torch_function__` of `input` has it, all arguments by keyword."""
    if isinstance(input, torch.fx.Proxy) and input.tracer.module_stack:
        # A module of ours is a leaf of torch.fx.symbolic_trace, as those of torch.nn are, so that
        # train() and eval() still reach it.
        path, kind = next(reversed(input.tracer.module_stack.values()))
        if getattr(kind, "__module__", None) == f"{__package__}.modules":
            key = {} if arguments["key"] is None else {"key": arguments["key"]}
            return input.tracer.create_proxy("call_module", path, (input,), key)
    return handle_torch_function(function, (input,), input, **arguments)


def _overridable(function):
    """A function of tensors that first asks what stands for one, as those of torch.nn do."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def public(input, *args, **kwargs):
        if has_torch_function_unary(input) and len(args) <= len(positional):
            given = dict(zip(positional, args, strict=False))
            return _overridden(public, input, defaults | given | kwargs)
        _check_tensor(input)
        return function(input, *args, **kwargs)

    return public


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
        return _overridden(dropout, input, arguments)
    _check_tensor(input)
    strides = None
    if broadcast_dims is not None or mask_strides is not None:
        strides = _mask_strides(input.shape, broadcast_dims, mask_strides)
    return _run(input, p, training, inplace, key, generator, None, None, strides, mask_offset)


@_overridable
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
    _check_probability(p)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. "
            "Note that dropout1d exists to provide channel-wise dropout on inputs with 1 "
            "spatial dimension, a channel dimension, and an optional batch dimension "
            "(i.e. 2D or 3D inputs)."
        )
    return _features(input, input.dim() == 3, p, training, inplace, key, generator)


@_overridable
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
    _check_probability(p)
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
    return _features(input, True, p, training, inplace, key, generator)


@_overridable
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
    _check_probability(p)
    if input.dim() not in (4, 5):
        warnings.warn(_deprecated("dropout3d", input.dim(), 3, "4D or 5D"), stacklevel=3)
    return _features(input, input.dim() == 5, p, training, inplace, key, generator)


@_overridable
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
    _check_probability(p)
    scale, affine = _alpha(p)
    return _run(input, p, training, inplace, key, generator, scale, affine, None, 0)


@_overridable
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
    _check_probability(p)
    scale, affine = _alpha(p)
    return _features(input, True, p, training, inplace, key, generator, scale, affine)


@_overridable
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
    _check_probability(drop_prob)
    if input.dim() == 0:
        raise ValueError("drop_path(): argument 'input' has 0 dimensions, but at least 1 is needed")
    strides = _mask_strides(input.shape, range(1, input.dim()))
    scale = None if scale_by_keep else 1.0
    return _run(input, drop_prob, training, inplace, key, generator, scale, None, strides, 0)


@_overridable
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
    _check_probability(p)
    strides = _mask_strides(input.shape, (dim,), name="dim")
    return _run(input, p, training, inplace, key, generator, None, None, strides, 0)


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
    _check_probability(p)
    strides = _mask_strides(shape, broadcast_dims, mask_strides)
    if strides is None:
        strides = _ops.row_major(shape)
    if device is not None:
        device = torch.device(device)
    return _ops.ops.keep_mask(key, p, shape, strides, _wrap(mask_offset), device=device)


def _check_tensor(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"dropout(): argument 'input' must be Tensor, not {type(input).__name__}")


def _check_probability(p: float) -> None:
    try:
        # float() would take text. math.isnan() would not, but is not traced for a symbolic p.
        value = None if isinstance(p, (str, bytes)) else float(p)
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"dropout(): argument 'p' must be float, not {type(p).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {value}")


def _check_source(key, generator) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            "dropout(): argument 'generator' must be torch.Generator, not "
            f"{type(generator).__name__}"
        )
    if key is not None and generator is not None:
        raise ValueError(
            "dropout(): arguments 'key' and 'generator' exclude each other: a key is drawn from a "
            "generator only where none is given"
        )
    if key is not None and not isinstance(key, Tensor):
        raise TypeError(
            "dropout(): argument 'key' must be a Tensor (dropout_ext.key makes one), not "
            f"{type(key).__name__}"
        )


def _deprecated(name: str, dim: int, spatial: int, accepted: str) -> str:
    return (
        f"{name}: Received a {dim}-D input to {name}, which is deprecated "
        "and will result in an error in a future release. To retain the behavior "
        f"and silence this warning, please use dropout instead. Note that {name} "
        f"exists to provide channel-wise dropout on inputs with {spatial} spatial dimensions, "
        f"a channel dimension, and an optional batch dimension (i.e. {accepted} inputs)."
    )


def _wrap(index: int) -> int:
    """An index modulo 2**64 as the int64 of the same bits."""
    return (index + 2**63) % 2**64 - 2**63 if type(index) is int else index


def _mask_strides(
    shape: Sequence[int],
    broadcast_dims: Sequence[int] | None,
    mask_strides: Sequence[int] | None = None,
    *,
    name: str = "broadcast_dims",
) -> list[int] | None:
    """Strides of the mask over `shape`: those given, or row-major over the shape with the shared
    dimensions set to 1, which get stride 0; None for plain row-major.
    """
    if mask_strides is not None:
        if broadcast_dims is not None:
            raise ValueError(
                "dropout(): arguments 'broadcast_dims' and 'mask_strides' exclude each other: "
                "shared dimensions have mask stride 0"
            )
        if len(mask_strides) != len(shape):
            raise ValueError(
                f"dropout(): argument 'mask_strides' has {len(mask_strides)} entries, but accepted "
                f"are one per dimension of the input, {len(shape)}"
            )
        return [_wrap(stride) for stride in mask_strides]
    if broadcast_dims is None:
        return None
    ndim = len(shape)
    shared = set()
    for dim in broadcast_dims:
        if not -ndim <= dim < ndim:
            raise IndexError(
                f"dropout(): argument '{name}': Dimension out of range (expected to be in range of "
                f"[{-max(ndim, 1)}, {max(ndim, 1) - 1}], but got {dim})"
            )
        shared.add(dim % ndim)
    strides = _ops.row_major([1 if d in shared else size for d, size in enumerate(shape)])
    return [0 if d in shared else stride for d, stride in enumerate(strides)]


def _alpha(p: float) -> tuple[float, tuple[float, float] | None]:
    """scale and (bias, dropped): a, a * alpha * p and -a * alpha * (1 - p), with the a and the b of
    the paper. p = 1 drops everything to 0, as in PyTorch.
    """
    if p == 1:
        return 0.0, None
    a = 1 / math.sqrt((SELU_LIMIT * SELU_LIMIT * p + 1) * (1 - p))
    return a, (a * SELU_LIMIT * p, -a * SELU_LIMIT * (1 - p))


def _features(input, batched, p, training, inplace, key, generator, scale=None, affine=None):
    """One decision per channel: of (N, C, ...) if batched, of (C, ...) if not."""
    if training and 0 < p < 1 and input.dim() < (2 if batched else 1) and input.numel() != 0:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    strides = _mask_strides(input.shape, range(2 if batched else 1, input.dim()))
    return _run(input, p, training, inplace, key, generator, scale, affine, strides, 0)


def _run(
    input, p, training, inplace, key, generator, scale, affine, mask_strides, mask_offset
) -> Tensor:
    """What `_C.eager` does, composed of operators where the call is not a plain eager one."""
    mask_offset = _wrap(mask_offset)
    if not is_dynamo_compiling():
        out = _C.eager(
            input, p, training, inplace, key, generator, scale, affine, mask_strides, mask_offset
        )
        if out is not NotImplemented:
            return out
    _check_probability(p)
    if not training or p == 0:
        return input
    if input.is_nested:
        return _nested(input, p, inplace, key, generator, scale, affine, mask_strides, mask_offset)
    if _is_empty(input):
        return input
    _check_source(key, generator)
    if _is_dtensor(input):
        return _sharded(input, p, inplace, key, generator, scale, affine, mask_strides, mask_offset)
    if not is_dynamo_compiling():
        # Before a key is drawn, so that a call that fails leaves the generator alone.
        _C.check_call(input, p, key, affine is not None, len(mask_strides or ()))
        if inplace and not _ops.is_traced(input):
            _C.check_writable(input)
    if key is None:
        key = (
            torch.zeros(2, dtype=torch.int64, device=input.device)
            if p == 1
            else _ops.draw_key(input, generator)
        )
    if scale is None:
        scale = 1 / (1 - p) if p < 1 else 0.0
    if not is_dynamo_compiling() and torch.jit.is_tracing():
        # Sizes are tensors there, which no list of integers takes.
        strides = [int(stride) for stride in mask_strides or ()]
    else:
        # Row-major ones spelled out: AOTInductor does not take an empty list.
        strides = mask_strides or _ops.row_major(input.shape)
    numbers = (p, scale) if affine is None else (p, scale, *affine)
    op, op_ = (
        (_ops.ops.apply, _ops.ops.apply_)
        if affine is None
        else (_ops.ops.apply_affine, _ops.ops.apply_affine_)
    )
    if not inplace:
        return op(input, key, *numbers, strides, mask_offset)
    if _ops.is_traced(input):
        return input.copy_(op(input, key, *numbers, strides, mask_offset))
    op_(input, key, *numbers, strides, mask_offset)
    return input


def _is_empty(input: Tensor) -> bool:
    numel = input.numel()
    if not is_dynamo_compiling() and type(numel) is int:
        return numel == 0
    if isinstance(numel, Tensor):
        return False  # torch.jit.trace; the operators take empty tensors as well
    # Here, because it loads sympy, half a second.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(numel == 0)


def _is_dtensor(tensor) -> bool:
    # By name: the class would load torch.distributed.tensor, a second.
    return any(
        base.__name__ == "DTensor" and base.__module__.startswith("torch.distributed.")
        for base in type(tensor).__mro__
    )


def _sharded(input, p, inplace, key, generator, scale, affine, mask_strides, mask_offset) -> Tensor:
    """A DTensor: the mask of the whole tensor, each shard of it computed where it lies."""
    from . import _dtensor

    strides = mask_strides or _ops.row_major(input.shape)
    if _is_dtensor(key):
        # Not every backend sends uint64.
        key = (key.view(torch.int64) if key.dtype == torch.uint64 else key).full_tensor()
    # Of the whole: every rank errs or none, before anything is drawn or sent.
    _dtensor.check(input, inplace)
    if not is_dynamo_compiling():
        _C.check_call(input, p, key, affine is not None, len(strides))
        if inplace:
            _C.check_writable(input)
    elif key is not None and key.dim() == 2 and key.size(0) != input.size(0):
        raise ValueError(
            f"dropout(): argument 'key' has shape {tuple(key.shape)}, but accepted are (2,) and, "
            f"for one key per slice of dimension 0, ({input.size(0)}, 2)"
        )
    if input.device_mesh.get_coordinate() is None:
        return input  # a rank that has no part in the tensor
    whole, begin, size = _dtensor.localize(input)
    if key is None and p < 1:
        key = _dtensor.agree(_ops.draw_key(input, generator), input)
    elif key is not None and key.dim() == 2:
        key = key.narrow(0, begin[0], size[0])
    mask_offset += sum(at * stride for at, stride in zip(begin, strides, strict=True))
    local = _run(whole.to_local(), p, True, False, key, None, scale, affine, strides, mask_offset)
    out = _dtensor.wrap(local, whole)
    return input.copy_(out) if inplace else out


def _nested(input, p, inplace, key, generator, scale, affine, mask_strides, mask_offset) -> Tensor:
    """A jagged tensor: the mask runs over its values, (sum of lengths, ...)."""
    if input.layout != torch.jagged:
        raise TypeError(
            f"dropout(): argument 'input' is a nested tensor of layout {input.layout}, but "
            "accepted are those of layout torch.jagged"
        )
    if mask_strides is not None:
        raise ValueError(
            "dropout(): argument 'input' is a nested tensor: no dimension can share decisions and "
            "no mask_strides apply; apply the function to input.values(), or to "
            "input.to_padded_tensor(0)"
        )
    values = _run(
        input.values(), p, True, inplace, key, generator, scale, affine, None, mask_offset
    )
    if inplace:
        return input
    return torch.nested.nested_tensor_from_jagged(
        values,
        input.offsets(),
        input.lengths(),
        input._ragged_idx,
        input._maybe_min_seqlen,
        input._maybe_max_seqlen,
    )
