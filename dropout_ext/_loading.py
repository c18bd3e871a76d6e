"""What to tell somebody for whom the compiled part does not load."""

import importlib.util
from importlib import metadata
from pathlib import Path

import torch

# Of a missing symbol or library, as the loaders of Linux, macOS and Windows word it.
_MISMATCH = (
    "undefined symbol",
    "cannot open shared object file",
    "symbol not found",
    "library not loaded",
    "dll load failed",
)


def explain(error: ImportError) -> ImportError:
    """The error to raise for one of `import dropout_ext._C`: of one sentence that says why and what
    to do, or `error` itself if it does already.
    """
    package = Path(__file__).parent
    if importlib.util.find_spec(f"{__package__}._C") is None:
        return ImportError(
            f"dropout_ext was imported from its sources in {package}, where its compiled part _C "
            "has not been built: start Python in another folder to use an installed dropout_ext, "
            "or build it here with `make build`"
        )
    if any(sign in str(error).lower() for sign in _MISMATCH):
        return ImportError(
            f"dropout_ext._C in {package} was built for {_built_for()} and does not load with the "
            f"installed torch {torch.__version__} ({error}): build it again with `pip install "
            "--no-build-isolation --no-deps --force-reinstall .` in a clone"
        )
    return error


def _built_for() -> str:
    try:
        requirements = metadata.requires("dropout_ext") or []
    except metadata.PackageNotFoundError:
        requirements = []
    return next((r for r in requirements if r.startswith("torch")), "another torch")
