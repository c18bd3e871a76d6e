"""Every Python block of README.md and docs/*.md runs, the blocks of a page in one namespace, and so
does every example of a public docstring."""

import doctest
import inspect
import re
import warnings

import pytest
import torch
from helpers import ROOT

import dropout_ext
from dropout_ext import functional, fused, modules
from dropout_ext.compat import flash_attn, megatron

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

# What a page takes as given.
GIVEN = {
    "composability.md": lambda: {
        "dropout_ext": dropout_ext,
        "torch": torch,
        "x": torch.randn(4, 6),
        "x2": torch.randn(4, 6),
        "step": 3,
        "rank": 1,
        "generator": torch.Generator(),
        "compiled": lambda x, key: dropout_ext.dropout(x, 0.1, key=key),
        "sample_ids": [5, 9, 2, 7],
        "row_strides": (1,),
    }
}


def blocks(page):
    return list(re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    namespace = {"__name__": "__docs__"} | GIVEN.get(page.name, dict)()
    text = page.read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks(page):
            if block.group(1) == "python":
                # Padded, so that a traceback names the page's own line.
                lines = "\n" * text.count("\n", 0, block.start(2))
                exec(compile(lines + block.group(2), str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_languages(page):
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
    assert {block.group(1) for block in blocks(page)} <= {"python", "bash", "sh", "text", "cpp", ""}


def test_there_are_pages():
    names = {page.name for page in PAGES}
    assert {"README.md", "from-nn-dropout.md", "family.md", "reproducibility.md"} <= names
    assert all(blocks(page) for page in PAGES if page.name in GIVEN)


PUBLIC = {
    f"{home.__name__}.{name}": getattr(home, name)
    for home, names in (
        (functional, functional.__all__),
        (modules, modules.__all__),
        (fused, fused.__all__),
        (flash_attn, flash_attn.__all__),
        (megatron, megatron.__all__),
        (dropout_ext, ("key", "fold_in", "split", "convert", "revert", "dropout_summary")),
        (dropout_ext, ("override", "monte_carlo", "predict")),
    )
    for name in names
}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    """It names each parameter, and its examples run and print what they say."""
    thing = PUBLIC[name]
    text = inspect.getdoc(thing)
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert re.search(rf"^    {parameter.name} \(", text, re.MULTILINE), parameter
    given = {"torch": torch, "dropout_ext": dropout_ext}
    (examples,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs=given)
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0
