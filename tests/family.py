"""The modules of the library, each with the shape of an input that it takes."""

import dropout_ext

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
