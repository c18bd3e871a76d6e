"""One call of the dropout family, from its arguments to an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

from . import _C, _draw, _geometry, _ops

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Call(NamedTuple):
    """keep ? fma(input, scale, bias) : dropped. All arguments but the input, as `_C.eager` takes
    them.
    """

    p: float
    training: bool = True
    inplace: bool = False
    key: Tensor | None = None
    generator: torch.Generator | None = None
    scale: float | None = None  # 1 / (1 - p)
    bias: float | None = None  # -0: keep ? input * scale : dropped
    dropped: float = 0.0
    mask_strides: list[int] | None = None  # row-major
    mask_offset: int = 0


def run(input: Tensor, call: Call) -> Tensor:
    """The call in C++ where it is plain, else composed of operators that can be traced."""
    if not is_dynamo_compiling():
        out = _C.eager(input, *call)
        if out is not NotImplemented:
            return out
    check_probability(call.p)
    if not call.training or call.p == 0:
        return input
    call = call._replace(mask_offset=_geometry.wrap_offset(call.mask_offset))
    if input.is_nested:
        from . import _nested

        return _nested.run(input, call)
    if is_empty(input):
        return input
    check_source(call.key, call.generator)
    if is_dtensor(input):
        from . import _dtensor

        return _dtensor.run(input, call)
    check(input, call)
    return apply(input, key_of(input, call), call)


def key_of(input: Tensor, call: Call) -> Tensor:
    """The key that was given, or one that is drawn."""
    if call.key is not None:
        return call.key
    if call.p == 1:  # nothing is kept under any key
        return torch.zeros(2, dtype=torch.int64, device=input.device)
    return _draw.draw_key(input, call.generator)


def scale_of(p: float) -> float:
    """What is kept is multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def apply(input: Tensor, key: Tensor, call: Call) -> Tensor:
    """The operator under this key."""
    scale = scale_of(call.p) if call.scale is None else call.scale
    if not is_dynamo_compiling() and is_tracing():
        # Sizes are tensors there, which no list of integers takes.
        strides = [int(stride) for stride in call.mask_strides or ()]
    else:
        # Row-major ones spelled out: AOTInductor does not take an empty list.
        strides = call.mask_strides or _geometry.row_major(input.shape)
    rest = (key, call.p, scale, strides, call.mask_offset, call.bias, call.dropped)
    if not call.inplace:
        out: Tensor = _ops.ops.apply(input, *rest)
        return out
    if _draw.is_traced(input):
        return input.copy_(_ops.ops.apply(input, *rest))
    _ops.ops.apply_(input, *rest)
    return input


def check(input: Tensor, call: Call) -> None:
    """What `_C.eager` checks before it draws a key, so that a call that fails leaves the generator
    alone. The compiler cannot trace it: there the operator's shape function does it.
    """
    if is_dynamo_compiling():
        return
    n_strides = len(call.mask_strides or ())
    _C.check_call(input, call.key, call.p, call.bias, call.dropped, n_strides)
    if call.inplace and not _draw.is_traced(input):
        _C.check_writable(input)


# The checks of csrc/operator/bindings.cpp that a compiler must trace.


def check_tensor(input: Tensor, function: str = "dropout()", name: str = "input") -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{function}: argument '{name}' must be Tensor, not {type(input).__name__}")


def check_probability(p: float, function: str = "dropout()", name: str = "p") -> None:
    try:
        # float() would take text. math.isnan() would not, but is not traced for a symbolic p.
        value = None if isinstance(p, (str, bytes)) else float(p)
    except OverflowError:
        value = float("inf")
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"{function}: argument '{name}' must be float, not {type(p).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {value}")


def check_source(
    key: Tensor | None,
    generator: torch.Generator | None,
    function: str = "dropout()",
    name: str = "key",
) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{function}: argument 'generator' must be torch.Generator, not "
            f"{type(generator).__name__}"
        )
    if key is not None and generator is not None:
        raise ValueError(
            f"{function}: arguments '{name}' and 'generator' exclude each other: a key is drawn "
            "from a generator only where none is given"
        )
    if key is not None and not isinstance(key, Tensor):
        raise TypeError(
            f"{function}: argument '{name}' must be a Tensor (dropout_ext.key makes one), not "
            f"{type(key).__name__}"
        )


def is_empty(input: Tensor) -> bool:
    numel = input.numel()
    if not is_dynamo_compiling() and type(numel) is int:
        return numel == 0
    if isinstance(numel, Tensor):
        return False  # torch.jit.trace; the operators take empty tensors as well
    # Here, because it loads sympy, half a second.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(numel == 0)


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    # By name: the class would load torch.distributed.tensor, a second.
    return any(
        base.__name__ == "DTensor" and base.__module__.startswith("torch.distributed.")
        for base in type(tensor).__mro__
    )
