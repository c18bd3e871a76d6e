"""The members of the library: functions and modules, what they share, and what they must give."""

import warnings

import torch
from helpers import scaled_where
from torch import Tensor, nn

import dropout_ext
from dropout_ext import functional

# Each module with the shape of an input that it takes.
MODULES = {
    "dropout": (dropout_ext.Dropout, (6, 50)),
    "shared": (lambda p, **kw: dropout_ext.Dropout(p, broadcast_dims=(0,), **kw), (6, 50)),
    "dropout1d": (dropout_ext.Dropout1d, (6, 20, 3)),
    "dropout2d": (dropout_ext.Dropout2d, (6, 20, 3, 2)),
    "dropout3d": (dropout_ext.Dropout3d, (6, 20, 3, 2, 2)),
    "alpha": (dropout_ext.AlphaDropout, (6, 50)),
    "feature_alpha": (dropout_ext.FeatureAlphaDropout, (6, 20, 3)),
    "path": (lambda p, **kw: dropout_ext.DropPath(p, **kw), (40, 5)),
    "locked": (dropout_ext.LockedDropout, (6, 5, 20)),
}
ALPHA = ("alpha", "feature_alpha")


def features(batched_dims, rank):
    """Shared dimensions where one decision is for a channel."""
    return range(2 if rank in batched_dims else 1, rank)


# name: (function, module of p, counterpart of p, shared dimensions by rank, ranks)
MEMBERS = {
    "dropout": (functional.dropout, dropout_ext.Dropout, nn.Dropout, lambda r: (), range(6)),
    "dropout1d": (
        functional.dropout1d,
        dropout_ext.Dropout1d,
        nn.Dropout1d,
        lambda r: features((3,), r),
        (2, 3),
    ),
    "dropout2d": (
        functional.dropout2d,
        dropout_ext.Dropout2d,
        nn.Dropout2d,
        lambda r: features((3, 4), r),
        (3, 4),
    ),
    "dropout3d": (
        functional.dropout3d,
        dropout_ext.Dropout3d,
        nn.Dropout3d,
        lambda r: features((5,), r),
        (4, 5),
    ),
    "drop_path": (
        lambda x, p, training, inplace, **kw: functional.drop_path(
            x, p, training, inplace=inplace, **kw
        ),
        dropout_ext.DropPath,
        None,
        lambda r: range(1, r),
        (1, 2, 3, 4),
    ),
    "locked_dropout": (
        lambda x, p, training, inplace, **kw: functional.locked_dropout(
            x, p, 1, training, inplace, **kw
        ),
        lambda p: dropout_ext.LockedDropout(p, dim=1),
        None,
        lambda r: (1,),
        (2, 3, 4),
    ),
}

ALPHA_MEMBERS = {
    "alpha_dropout": (
        functional.alpha_dropout,
        dropout_ext.AlphaDropout,
        nn.AlphaDropout,
        lambda r: (),
        range(6),
    ),
    "feature_alpha_dropout": (
        functional.feature_alpha_dropout,
        dropout_ext.FeatureAlphaDropout,
        nn.FeatureAlphaDropout,
        lambda r: range(2, r),
        (2, 3, 4, 5),
    ),
}

# One for each way to the kernels: straight, with strides, with another epilogue.
EACH_WAY = ("dropout", "dropout2d", "alpha_dropout")

# Each kind of sharing, by one signature, for inputs of two dimensions.
FUNCTIONS = {
    "dropout": functional.dropout,
    "dropout, shared": lambda x, p=0.5, training=True, **kw: functional.dropout(
        x, p, training, broadcast_dims=(0,), **kw
    ),
    "dropout1d": functional.dropout1d,
    "alpha_dropout": lambda x, p=0.5, training=True, **kw: functional.alpha_dropout(
        x, p, training, **kw
    ),
    "feature_alpha_dropout": lambda x, p=0.5, training=True, **kw: functional.feature_alpha_dropout(
        x, p, training, **kw
    ),
    "drop_path": lambda x, p=0.5, training=True, **kw: functional.drop_path(x, p, training, **kw),
    "locked_dropout": lambda x, p=0.5, training=True, **kw: functional.locked_dropout(
        x, p, 1, training, **kw
    ),
}

# -scale * alpha of SELU (Klambauer et al. 2017), the value that dropped units get.
SELU_LIMIT = -1.0507009873554805 * 1.6732632423543772


def expected_output(name: str, keep: Tensor, x: Tensor, p: float) -> Tensor:
    """What a member makes of `x` under this mask: by its formula, differentiable."""
    if name not in ALPHA_MEMBERS or p == 1:
        return scaled_where(keep, x, 1 / (1 - p) if p < 1 else 0.0)
    a = ((1 - p) * (1 + p * SELU_LIMIT**2)) ** -0.5
    y = torch.where(keep, x.double(), SELU_LIMIT) * a - a * p * SELU_LIMIT
    return y.to(x.dtype)


def silently(function, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)
