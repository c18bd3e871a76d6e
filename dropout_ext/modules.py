"""The modules of the dropout family. Each is a subclass of its torch.nn counterpart where there is
one, with the same arguments, and takes a `key` at the call.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from . import functional
from ._call import check_probability, check_source
from ._geometry import ints
from ._keys import Keyed

__all__ = [
    "AlphaDropout",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "LockedDropout",
]


def _no_script(module: nn.Module) -> NoReturn:
    raise NotImplementedError(
        f"torch.jit.script cannot compile dropout_ext.{type(module).__name__}: use torch.export or "
        "torch.jit.trace, or put its torch.nn counterpart in its place"
    )


class _WithGenerator(Keyed):
    """A generator to draw keys from. Its default stands on the class, because a module of torch.nn
    that `convert` turned into ours was constructed without one.
    """

    generator: torch.Generator | None = None

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        check_probability(p)  # torch.nn lets NaN pass
        check_source(None, generator)
        super().__init__(p, inplace)
        if generator is not None:
            self.generator = generator

    __prepare_scriptable__ = _no_script


class Dropout(_WithGenerator, nn.Dropout):
    """Drops elements with probability `p` while training and scales the others by 1 / (1 - p). A
    :class:`torch.nn.Dropout`; see :func:`dropout_ext.dropout` for what it computes.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        inplace (bool): write to the input and return it. Default: False
        broadcast_dims (sequence of int, optional): dimensions along which all elements share one
            decision; negative ones count from the last. Default: None
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: any shape; output: as the input

    Raises:
        ValueError: `p` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> drop = dropout_ext.Dropout(p=0.5)
        >>> drop
        Dropout(p=0.5, inplace=False)
        >>> drop(torch.ones(8), key=dropout_ext.key(seed=42))
        tensor([2., 0., 0., 0., 2., 0., 0., 2.])
        >>> drop.eval()(torch.ones(3))
        tensor([1., 1., 1.])
    """

    broadcast_dims: Sequence[int] | None = None

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        broadcast_dims: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, inplace, generator=generator)
        if broadcast_dims is not None:
            self.broadcast_dims = tuple(ints(broadcast_dims, "broadcast_dims"))

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout(
            input,
            self.p,
            self.training,
            self.inplace,
            key=self._key(key),
            generator=self.generator,
            broadcast_dims=self.broadcast_dims,
        )

    def extra_repr(self) -> str:
        shared = "" if self.broadcast_dims is None else f", broadcast_dims={self.broadcast_dims}"
        return super().extra_repr() + shared


class Dropout1d(_WithGenerator, nn.Dropout1d):
    """Drops whole channels with probability `p` while training, and scales the others by
    1 / (1 - p). A :class:`torch.nn.Dropout1d`; see :func:`dropout_ext.functional.dropout1d`.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        inplace (bool): write to the input and return it. Default: False
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: (N, C, L) or (C, L); output: as the input

    Raises:
        ValueError: `p` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> x = torch.ones(2, 3, 4)
        >>> y = dropout_ext.Dropout1d()(x, key=dropout_ext.key(seed=42))
        >>> y.flatten(2).unique(dim=2).squeeze(2)  # each channel is one value
        tensor([[2., 0., 0.],
                [0., 2., 0.]])
    """

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout1d(
            input, self.p, self.training, self.inplace, key=self._key(key), generator=self.generator
        )


class Dropout2d(_WithGenerator, nn.Dropout2d):
    """Drops whole channels with probability `p` while training, and scales the others by
    1 / (1 - p). A :class:`torch.nn.Dropout2d`; see :func:`dropout_ext.functional.dropout2d`.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        inplace (bool): write to the input and return it. Default: False
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: (N, C, H, W) or, with a warning, (N, C, L); output: as the input

    Raises:
        ValueError: `p` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> x = torch.ones(2, 3, 4, 4)
        >>> y = dropout_ext.Dropout2d()(x, key=dropout_ext.key(seed=42))
        >>> y.flatten(2).unique(dim=2).squeeze(2)  # each channel is one value
        tensor([[2., 0., 0.],
                [0., 2., 0.]])
    """

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout2d(
            input, self.p, self.training, self.inplace, key=self._key(key), generator=self.generator
        )


class Dropout3d(_WithGenerator, nn.Dropout3d):
    """Drops whole channels with probability `p` while training, and scales the others by
    1 / (1 - p). A :class:`torch.nn.Dropout3d`; see :func:`dropout_ext.functional.dropout3d`.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        inplace (bool): write to the input and return it. Default: False
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: (N, C, D, H, W) or (C, D, H, W); output: as the input

    Raises:
        ValueError: `p` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> x = torch.ones(2, 3, 4, 4, 4)
        >>> y = dropout_ext.Dropout3d()(x, key=dropout_ext.key(seed=42))
        >>> y.flatten(2).unique(dim=2).squeeze(2)  # each channel is one value
        tensor([[2., 0., 0.],
                [0., 2., 0.]])
    """

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout3d(
            input, self.p, self.training, self.inplace, key=self._key(key), generator=self.generator
        )


class AlphaDropout(_WithGenerator, nn.AlphaDropout):
    """Alpha dropout for networks of SELU units: keeps zero mean and unit variance. A
    :class:`torch.nn.AlphaDropout`; see :func:`dropout_ext.functional.alpha_dropout`.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        inplace (bool): ignored, as there. Default: False
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: any shape; output: as the input

    Raises:
        ValueError: `p` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> y = dropout_ext.AlphaDropout(0.2)(torch.randn(1000, 1000), key=dropout_ext.key(1))
        >>> round(y.std().item(), 2)
        1.0
    """

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.alpha_dropout(
            input, self.p, self.training, key=self._key(key), generator=self.generator
        )


class FeatureAlphaDropout(_WithGenerator, nn.FeatureAlphaDropout):
    """Alpha dropout of whole channels. A :class:`torch.nn.FeatureAlphaDropout`; see
    :func:`dropout_ext.functional.feature_alpha_dropout`.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        inplace (bool): ignored, as there. Default: False
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: (N, C, ...); output: as the input

    Raises:
        ValueError: `p` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> drop = dropout_ext.FeatureAlphaDropout()
        >>> y = drop(torch.zeros(2, 3, 4), key=dropout_ext.key(seed=42))
        >>> (y[..., 0] > 0).tolist()  # kept
        [[True, False, False], [False, True, False]]
    """

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.feature_alpha_dropout(
            input, self.p, self.training, key=self._key(key), generator=self.generator
        )


class DropPath(Keyed, nn.Module):
    """Stochastic depth per sample: drops whole slices of dimension 0 while training, as
    `timm.layers.DropPath` does; see :func:`dropout_ext.functional.drop_path`.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        drop_prob (float): probability of a drop, 0 to 1. Default: 0.0
        scale_by_keep (bool): scale what is kept by 1 / (1 - drop_prob). Default: True
        inplace (bool): write to the input and return it. Default: False
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: (N, ...); output: as the input

    Raises:
        ValueError: `drop_prob` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> dropout_ext.DropPath(0.5)(torch.ones(4, 2), key=dropout_ext.key(seed=42))
        tensor([[2., 2.],
                [0., 0.],
                [0., 0.],
                [0., 0.]])
    """

    generator: torch.Generator | None = None
    _itself: type
    __prepare_scriptable__ = _no_script

    def __init__(
        self,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_probability(drop_prob)
        check_source(None, generator)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep
        self.inplace = inplace
        if generator is not None:
            self.generator = generator

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.drop_path(
            input,
            self.drop_prob,
            self.training,
            self.scale_by_keep,
            self.inplace,
            key=self._key(key),
            generator=self.generator,
        )

    def _is_scaled_rows(self) -> bool:
        """Whether a fused call does the same."""
        return self.scale_by_keep and not self.inplace

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}"


DropPath._itself = DropPath  # a subclass is another class


class LockedDropout(_WithGenerator, nn.modules.dropout._DropoutNd):
    """Variational dropout: one mask for all positions of `dim`, the time of a sequence; see
    :func:`dropout_ext.functional.locked_dropout`.

    Called with ``key=`` (see :func:`dropout_ext.key`) it draws nothing, and that key decides the
    mask. In eval mode it returns its input.

    Args:
        p (float): probability of a drop, 0 to 1. Default: 0.5
        dim (int): the dimension that shares decisions, from the last if negative. Default: 1
        inplace (bool): write to the input and return it. Default: False
        generator (torch.Generator, optional): what to draw keys from, on the CPU or the device of
            the input. Default: None, the device's default generator

    Shape:
        - input: any shape with dimension `dim`, such as (N, T, C); output: as the input

    Raises:
        ValueError: `p` outside [0, 1] or NaN, when constructed too.
        TypeError: an argument of another type or dtype.

    Example:
        >>> dropout_ext.LockedDropout(dim=0)(torch.ones(3, 4), key=dropout_ext.key(seed=42))
        tensor([[2., 0., 0., 0.],
                [2., 0., 0., 0.],
                [2., 0., 0., 0.]])
    """

    def __init__(
        self,
        p: float = 0.5,
        dim: int = 1,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, inplace, generator=generator)
        self.dim = dim

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.locked_dropout(
            input,
            self.p,
            self.dim,
            self.training,
            self.inplace,
            key=self._key(key),
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}, inplace={self.inplace}"
