"""DropPath and StochasticDepth of other libraries as ours, for `convert`.

They are known by what their code does, wherever it stands: many libraries carry copies.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _source, functional, modules
from ._torch_function import overridable


class Converted(modules.DropPath):
    """A class of ours in place of another, with its attributes and its repr."""

    _dropout_ext_original: Any  # a class of modules

    def forward(self, *input: Tensor, key: Tensor | None = None, **named: Tensor) -> Tensor:
        given = (*input, *named.values())
        if len(given) != 1:
            raise TypeError(f"{type(self).__name__}.forward() takes 1 input, but got {len(given)}")
        return self._drop(given[0], key=self._key(key), generator=self.generator)

    def _drop(self, input: Tensor, **source: Any) -> Tensor:
        if not self.training or not self.drop_prob:
            return input  # whatever it is, as the original
        return functional.drop_path(input, self.drop_prob, True, **source)

    def _is_scaled_rows(self) -> bool:
        return True

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(2)
        if type(self) is not self._itself:  # a subclass that somebody made
            return cast(tuple[Any, ...], reduced)
        _, _, *state = reduced
        return _rebuild, (type(self)._dropout_ext_original,), *state


class _WithScale(Converted):
    """DropPath of timm."""

    def _drop(self, input: Tensor, **source: Any) -> Tensor:
        return super()._drop(input, scale_by_keep=self.scale_by_keep, **source)

    def _is_scaled_rows(self) -> bool:
        return self.scale_by_keep


class _WithMode(Converted):
    """StochasticDepth of torchvision: one decision per sample, or one for the whole batch."""

    p: float
    mode: str

    @property
    def drop_prob(self) -> float:  # type: ignore[override]
        return self.p

    def _drop(self, input: Tensor, **source: Any) -> Tensor:
        if self.mode == "row":
            return functional.drop_path(input, self.p, self.training, **source)
        if self.mode != "batch":
            raise ValueError(
                f"StochasticDepth: mode is {self.mode!r}, but accepted are 'batch' and 'row'"
            )
        return _drop_batch(input, self.p, self.training, **source)

    def _is_scaled_rows(self) -> bool:
        return self.mode == "row"


@overridable
def _drop_batch(
    input: Tensor,
    p: float,
    training: bool,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    dims = range(input.dim())
    return functional.dropout(input, p, training, key=key, generator=generator, broadcast_dims=dims)


# Fingerprint of a forward: the function that it calls, fingerprint of that, and the class.
_KNOWN: dict[str | None, tuple[str | None, str | None, type[Converted] | None]] = {
    # timm 0.6 to 1.0
    "b7bc2f65a83433aee6ebd45a50f8c116": (
        "drop_path",
        "925f18199479880f9d1126ef542b6fc9",
        _WithScale,
    ),
    # transformers 4
    "a5e3c55a2da59973d4d501dcdd382e0f": (
        "drop_path",
        "0403357bd974090f60bf332325a47c6b",
        Converted,
    ),
    # transformers 5
    "019f67552d57700044cfec9e77563fb6": (None, None, Converted),
    # torchvision 0.29
    "8b0b2d6aca0112dc6100da18fc11848e": (
        "stochastic_depth",
        "4fb7278b60084d32bea968b945578a95",
        _WithMode,
    ),
}


def converted_class(original: Any) -> type[Converted] | None:
    """The class of ours that does the same, None where it is not known what the original does."""
    if issubclass(original, modules.DropPath) or original.__call__ is not nn.Module.__call__:
        return None
    return _with_forward(original, getattr(original, "forward", None))


# What a converted class has besides.
_OWN = ("generator", "_drop", "_is_scaled_rows", "_itself", "_key")


@functools.cache
def _with_forward(original: Any, forward: Any) -> type[Converted] | None:
    # Reading source takes its time.
    code = getattr(forward, "__code__", None)
    if code is None or code.co_freevars or any(hasattr(original, name) for name in _OWN):
        return None
    if not {"drop_prob", "mode"} & set(code.co_names):
        return None
    callee, code, kind = _KNOWN.get(_source.fingerprint(forward), (None, None, None))
    outside = getattr(forward, "__globals__", {})
    if callee is not None:
        called: Any = outside.get(callee)
        outside = getattr(called, "__globals__", {})
        if _source.fingerprint(called) != code or called.__code__.co_freevars:
            return None
    if kind is None or outside.get("torch", torch) is not torch:
        return None
    namespace = {
        "__doc__": original.__doc__,
        "__module__": modules.__name__,  # a leaf of torch.fx.symbolic_trace, as those are
        "__repr__": original.__repr__,
        "extra_repr": original.extra_repr,
        "_dropout_ext_original": original,
    }
    converted: type[Converted] = type(original.__name__, (kind, original), namespace)
    converted._itself = converted
    return converted


def obstacle(module: nn.Module) -> str | None:
    """Why one of a known class is left, None where it is not."""
    p = getattr(module, "drop_prob", getattr(module, "p", None))
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        return f"its probability is {p!r}, no number from 0 to 1"
    own = (*_OWN, "drop_prob") if hasattr(module, "mode") else _OWN
    for name in own:
        if hasattr(module, name):
            return f"its {name} would be taken for ours"
    return None


def _rebuild(original: Any) -> Any:
    kind = converted_class(original) or original
    return kind.__new__(kind)
