"""The modules of the dropout family. Each is a subclass of its torch.nn counterpart where there is
one, with the same arguments, and takes a `key` at the call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from ._call import check_probability

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


def _no_script(module: nn.Module):
    raise NotImplementedError(
        f"torch.jit.script cannot compile dropout_ext.{type(module).__name__}: use torch.export or "
        "torch.jit.trace, or put its torch.nn counterpart in its place"
    )


class _Drawing:
    """A generator to draw keys from. On the class: an nn module whose __class__ is set to ours has
    no such attribute of its own.
    """

    generator: torch.Generator | None = None

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(p, inplace)
        check_probability(p)  # torch.nn lets NaN pass
        if generator is not None:
            self.generator = generator

    __prepare_scriptable__ = _no_script


class Dropout(_Drawing, nn.Dropout):
    """`torch.nn.Dropout`. See `dropout_ext.dropout` for `key`, `generator` and `broadcast_dims`."""

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
            self.broadcast_dims = tuple(broadcast_dims)

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout(
            input,
            self.p,
            self.training,
            self.inplace,
            key=key,
            generator=self.generator,
            broadcast_dims=self.broadcast_dims,
        )

    def extra_repr(self) -> str:
        shared = "" if self.broadcast_dims is None else f", broadcast_dims={self.broadcast_dims}"
        return super().extra_repr() + shared


class Dropout1d(_Drawing, nn.Dropout1d):
    """`torch.nn.Dropout1d`."""

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout1d(
            input, self.p, self.training, self.inplace, key=key, generator=self.generator
        )


class Dropout2d(_Drawing, nn.Dropout2d):
    """`torch.nn.Dropout2d`."""

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout2d(
            input, self.p, self.training, self.inplace, key=key, generator=self.generator
        )


class Dropout3d(_Drawing, nn.Dropout3d):
    """`torch.nn.Dropout3d`."""

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.dropout3d(
            input, self.p, self.training, self.inplace, key=key, generator=self.generator
        )


class AlphaDropout(_Drawing, nn.AlphaDropout):
    """`torch.nn.AlphaDropout`, which takes `inplace` and ignores it."""

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.alpha_dropout(
            input, self.p, self.training, key=key, generator=self.generator
        )


class FeatureAlphaDropout(_Drawing, nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout`, which takes `inplace` and ignores it."""

    def forward(self, input: Tensor, *, key: Tensor | None = None) -> Tensor:
        return functional.feature_alpha_dropout(
            input, self.p, self.training, key=key, generator=self.generator
        )


class DropPath(nn.Module):
    """`timm.layers.DropPath`. See `dropout_ext.functional.drop_path`."""

    generator: torch.Generator | None = None
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
            key=key,
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}"


class LockedDropout(_Drawing, nn.modules.dropout._DropoutNd):
    """Variational dropout. See `dropout_ext.functional.locked_dropout`."""

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
            input, self.p, self.dim, self.training, self.inplace, key=key, generator=self.generator
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}, inplace={self.inplace}"
