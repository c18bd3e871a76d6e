"""When Inductor learns to write dropout into its own loops, and the switch for it."""

import functools
import hashlib
import os
import re
import sys
import warnings
from pathlib import Path

import torch

SWITCH = "DROPOUT_EXT_INDUCTOR"
# In the keys of the compiler's caches are the switch and what makes code of a graph, by its text.
_LOWERING = Path(__file__).with_name("_inductor_lowering.py")
_TAG = re.compile(r"\|dropout_ext-[^|]*")


def switch() -> str:
    """`auto`: where it pays; `always`: wherever it can be done; `never`."""
    value = os.environ.get(SWITCH, "auto")
    if value not in ("auto", "always", "never"):
        raise ValueError(
            f"environment variable {SWITCH} is {value!r}, but accepted are 'auto', 'always' and "
            "'never'"
        )
    return value


@functools.cache
def _version() -> str:
    return hashlib.sha256(_LOWERING.read_bytes()).hexdigest()[:12]


def prepare() -> None:
    """Called wherever the operator is traced: before the compiler looks into its caches, and,
    unless it finds the graph there, once more after it has loaded Inductor.
    """
    config = torch.compiler.config
    tag = f"{_TAG.sub('', config.cache_key_tag)}|dropout_ext-{_version()}-{switch()}"
    if config.cache_key_tag != tag:
        config.cache_key_tag = tag
    if "torch._inductor.lowering" in sys.modules:
        _register()


@functools.cache
def _register() -> None:
    try:
        from . import _inductor_lowering

        _inductor_lowering.register()
    except Exception as error:
        warn(error)


def warn(error: Exception) -> None:
    """Once, by the default filter of warnings."""
    warnings.warn(
        "dropout_ext: Inductor is not the one that this version knows, so dropout stays an "
        f"operator of its own in compiled code ({type(error).__name__}: {error})",
        stacklevel=2,
    )
