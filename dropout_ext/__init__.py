"""Dropout for PyTorch as one fused kernel: the mask is computed from a key, never stored."""

import torch  # noqa: F401  (the libraries that _C links to)

from ._loading import explain

try:
    from . import _C
except ImportError as error:
    raise explain(error) from None

from . import functional
from ._convert import convert, dropout_summary, revert
from ._keys import fold_in, key, keys, split
from ._monte_carlo import monte_carlo, predict
from ._override import override
from .functional import dropout, keep_mask
from .fused import (
    ActivationDropout,
    DropoutAdd,
    DropoutAddLayerNorm,
    DropoutAddRMSNorm,
    activation_dropout,
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
)
from .modules import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
    LockedDropout,
)

build_info = _C.build_info
__version__ = build_info()["version"]

__all__ = [
    "ActivationDropout",
    "AlphaDropout",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "FeatureAlphaDropout",
    "LockedDropout",
    "activation_dropout",
    "build_info",
    "convert",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_summary",
    "fold_in",
    "functional",
    "keep_mask",
    "key",
    "keys",
    "monte_carlo",
    "override",
    "predict",
    "revert",
    "split",
]
