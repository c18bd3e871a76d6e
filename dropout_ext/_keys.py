"""Keys: two 64-bit words (seed, offset) that decide a whole mask. Ordinary tensors, uint64 of shape
(2,), in the layout of PyTorch's own stateless keys.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import _C, _ops

__all__ = ["fold_in", "key", "keys", "split"]


def _check_word(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"key(): argument '{name}' must be int, not {type(value).__name__}")
    if not 0 <= value < 2**64:
        raise ValueError(
            f"key(): argument '{name}' is {value}, but accepted are integers from 0 to 2**64 - 1"
        )
    return value


def key(seed: int, offset: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The key (seed, offset), which decides a whole mask: the same on every device.

    Args:
        seed (int): from 0 to 2**64 - 1.
        offset (int): from 0 to 2**64 - 1. Default: 0
        device (torch.device or str, optional): of the result; a key on the CPU serves tensors on
            every device. Default: None, torch's default device

    Returns:
        Tensor: uint64 of shape (2,).

    Raises:
        ValueError: a seed or an offset out of range.
        TypeError: one that is no int.

    Example:
        >>> dropout_ext.key(seed=42)
        tensor([42,  0], dtype=torch.uint64)
    """
    words = [_check_word("seed", seed), _check_word("offset", offset)]
    # By way of int64: inductor has no constants of type uint64.
    signed = [word - 2**64 if word >= 2**63 else word for word in words]
    return torch.tensor(signed, dtype=torch.int64, device=device).view(torch.uint64)


def _check_types(function: str, key: Tensor, n: int) -> None:
    if not isinstance(key, Tensor):
        raise TypeError(
            f"{function}(): argument 'key' must be a Tensor (dropout_ext.key makes one), "
            f"not {type(key).__name__}"
        )
    if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool):
        raise TypeError(f"{function}(): argument 'n' must be int, not {type(n).__name__}")


def fold_in(key: Tensor, n: int) -> Tensor:
    """An independent key for step, rank or slice `n`, as jax.random.fold_in derives one.

    Do not count steps in a key's offset and ranks by `fold_in`: the counter is offset + n, so the
    two would meet. `fold_in(fold_in(key, step), rank)` is right.

    Args:
        key (Tensor): uint64 or int64 of shape (2,), or (..., 2) for many keys at once.
        n (int): from 0 to 2**63 - 1.

    Returns:
        Tensor: of the shape, dtype and device of `key`.

    Raises:
        ValueError: a key of another shape, `n` out of range.
        TypeError: an argument of another type or dtype.

    Example:
        >>> k = dropout_ext.key(seed=42)
        >>> dropout_ext.fold_in(dropout_ext.fold_in(k, 7), 3).shape  # for rank 3 in step 7
        torch.Size([2])
    """
    _check_types("fold_in", key, n)
    if isinstance(n, int) and n >= 2**63:
        raise ValueError(
            f"fold_in(): argument 'n' is {n}, but accepted are integers from 0 to 2**63 - 1"
        )
    folded: Tensor = _ops.ops.fold_in(key, n)
    return folded


def split(key: Tensor, n: int) -> Tensor:
    """`n` independent keys: row j is `fold_in(key, j)`.

    Args:
        key (Tensor): uint64 or int64 of shape (2,).
        n (int): how many, from 0.

    Returns:
        Tensor: of shape (n, 2), of the dtype and device of `key`.

    Raises:
        ValueError: a key of another shape, a negative `n`.
        TypeError: an argument of another type or dtype.

    Example:
        >>> dropout_ext.split(dropout_ext.key(seed=42), 3).shape
        torch.Size([3, 2])
    """
    _check_types("split", key, n)
    rows: Tensor = _ops.ops.split(key, n)
    return rows


class keys:
    """`with keys(key):` takes the keys of all dropout calls inside from `key`, instead of drawing
    them: modules, converted ones too, functional, overridden and fused calls, and attention. What
    one key was to a call, it is to a whole model: the same masks on every device, in eager mode
    and under `torch.compile`, entered outside of the compiled function or inside of it.

    Call number n, from 0, of those that would draw takes `fold_in(key, n)`. With `model`, a module
    of ours in it does not count with the others: its own call number n takes
    `fold_in(fold_in(key, name), n)`, where name stands for 63 bits of a hash of its name in
    `named_modules()`. So its mask does not change where another module is added, skipped, or
    computed by another rank. A call with `key=` or `generator=`, and a module with a generator,
    keeps to these.

    A new `key` per step needs no recompilation. Each `with` counts from 0; the same `key` again is
    the same masks again. It nests, the innermost one decides, and holds for the thread that
    entered it. Under `torch.func.vmap` it is as `key=` is: one mask for all examples.

    Regions of `torch.utils.checkpoint` find their keys again, wherever the backward pass runs;
    compiled, such a region breaks the graph, and raises under `fullgraph`. Of checkpoints of other
    libraries a call that is run again in the backward pass raises, if that runs inside of the
    context.

    Args:
        key (Tensor): uint64 or int64 of shape (2,), see :func:`dropout_ext.key`, on the CPU or the
            device of the inputs.
        model (torch.nn.Module, optional): whose modules take keys by name. Default: None

    Raises:
        ValueError: a key of another shape.
        TypeError: an argument of another type or dtype.

    Example:
        >>> model = torch.nn.Sequential(dropout_ext.Dropout(0.5), dropout_ext.Dropout(0.5))
        >>> x = torch.ones(4, 4)
        >>> with dropout_ext.keys(dropout_ext.key(42), model):
        ...     y = model(x)
        >>> with dropout_ext.keys(dropout_ext.key(42), model):
        ...     torch.equal(model(x), y)
        True
        >>> with dropout_ext.keys(dropout_ext.key(42)):
        ...     y = dropout_ext.dropout(x)
        >>> torch.equal(y, dropout_ext.dropout(x, key=dropout_ext.fold_in(dropout_ext.key(42), 0)))
        True
    """

    def __init__(self, key: Tensor, model: nn.Module | None = None) -> None:
        if not isinstance(key, Tensor):
            raise TypeError(
                "keys(): argument 'key' must be a Tensor (dropout_ext.key makes one), not "
                f"{type(key).__name__}"
            )
        if key.dtype not in (torch.uint64, torch.int64):
            raise TypeError(
                f"keys(): argument 'key' has dtype {key.dtype}, but accepted are uint64 and int64"
            )
        if key.shape != (2,):
            raise ValueError(
                f"keys(): argument 'key' has shape {tuple(key.shape)}, but accepted is (2,)"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"keys(): argument 'model' must be torch.nn.Module, not {type(model).__name__}"
            )
        self._key = key
        self._model = model

    def __enter__(self) -> keys:
        entered = _Keys(self._key, self._model, _local.keys)
        entered.before = entered.hang()
        _set(entered)
        return self

    def __exit__(self, *exception: object) -> None:
        entered = _local.keys
        entered.take_down(entered.before)
        _set(entered.outer)


class _Local(threading.local):
    keys: Any  # _Keys in a context, else None

    def __init__(self) -> None:
        # Not a default in the class: Dynamo of torch 2.11 would read that in a context too.
        self.keys = None


_local = _Local()


def _set(keys: _Keys | None) -> None:
    _local.keys = keys
    if not is_dynamo_compiling():
        _C.set_keyed(keys is not None)


class _Place:
    """Where calls come from. Each takes the next key of its place.

    Calls are counted in the offset of `key`, because fold_in((s, o + n), 0) is fold_in((s, o), n):
    on a number of calls Dynamo would compile anew.
    """

    def __init__(self, keys: _Keys, key: Tensor) -> None:
        self.keys = keys
        self.key = key

    def next(self) -> Tensor:
        key = self.key
        self.key = key + self.keys.one_call
        folded: Tensor = _ops.ops.fold_in(key, 0)
        return folded

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of a module is not in the context


class _Keys:
    """What lasts from the beginning to the end of one `with`."""

    before: list[_Place | None]  # the places of its modules outside

    def __init__(self, key: Tensor, model: nn.Module | None, outer: _Keys | None) -> None:
        self.outer = outer
        self.resumed = False
        key = key.view(torch.int64)  # uint64 has no addition
        self.one_call = torch.tensor([0, 1], device=key.device)
        self.others = _Place(self, key)
        # Found by way of the module, so that layers with one code, each compiled by itself, need
        # not be told apart.
        self.modules = []
        self.named = []
        for name, module in () if model is None else model.named_modules():
            if isinstance(module, Keyed):
                self.modules.append(module)
                self.named.append(_Place(self, _ops.ops.fold_in(key, _number_of(name))))

    def hang(self) -> list[_Place | None]:
        before = [module._keys_place for module in self.modules]
        self.take_down(self.named)
        return before

    def take_down(self, before: Sequence[_Place | None]) -> None:
        for module, place in zip(self.modules, before, strict=True):
            module._keys_place = place

    def next(self, place: _Place) -> Tensor:
        if (
            not is_dynamo_compiling()
            and not self.resumed
            and torch._C._current_graph_task_id() != -1
        ):
            raise RuntimeError(
                "dropout(): a call inside of dropout_ext.keys cannot take a key in a backward "
                "pass: were it run again there by an activation checkpoint, the gradients would be "
                "those of another mask. Use torch.utils.checkpoint, or pass 'key'"
            )
        return place.next()


def _number_of(name: str) -> int:
    """Of 63 bits, the first of them set: no number of a call."""
    return 2**62 + (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 2)


# Dynamo cannot trace it. torch.compiler.assume_constant_result does this, and loads Dynamo.
_number_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def next_key() -> Tensor | None:
    """The key of a call without one, None where it is to be drawn."""
    keys: _Keys | None = _local.keys
    return None if keys is None else keys.next(keys.others)


# The base of what is only ever a base beside a module.
if TYPE_CHECKING:
    ModuleMixin = nn.Module
else:
    ModuleMixin = object


class Keyed(ModuleMixin):
    """A module that takes keys by its name."""

    generator: torch.Generator | None
    _keys_place: _Place | None = None

    def _key(self, key: Tensor | None) -> Tensor | None:
        """The key of a call, None where it is to be drawn or goes by the order of calls."""
        place = self._keys_place
        if place is None or key is not None or self.generator is not None or not self.training:
            return key
        return place.keys.next(place) if _local.keys is place.keys else None


class Resumed:
    """`with resumed:` has calls take the keys that they would have taken when it was made."""

    def __init__(self) -> None:
        self.keys = _local.keys
        if self.keys is not None:
            self.at = [place.key for place in self._places()]

    def _places(self) -> list[_Place]:
        return [self.keys.others, *self.keys.named]

    def _go_to(self, keys: list[Tensor]) -> None:
        for place, key in zip(self._places(), keys, strict=True):
            place.key = key

    def __enter__(self) -> None:
        self.current = _local.keys
        _set(self.keys)
        if self.keys is not None:
            self.live = [place.key for place in self._places()]
            self._go_to(self.at)
            self.before = self.keys.hang()
            self.was_resumed, self.keys.resumed = self.keys.resumed, True

    def __exit__(self, *exception: object) -> None:
        if self.keys is not None:
            self.keys.resumed = self.was_resumed
            self.keys.take_down(self.before)
            self._go_to(self.live)
        _set(self.current)
