"""The examples run; how long is cut, and what they find is not judged here."""

import importlib

import pytest
import torch

from examples.__main__ import NAMES, main

for package in ("matplotlib", "scipy", "sklearn"):
    pytest.importorskip(package)


@pytest.mark.parametrize("name", NAMES)
def test_example(name, monkeypatch, tmp_path, capsys):
    common = importlib.import_module("examples.common")
    module = importlib.import_module(f"examples.{name}")
    for setting in ("EPOCHS", "SEEDS"):
        if hasattr(module, setting):
            monkeypatch.setattr(module, setting, 2)
    for setting in ("STEPS", "EVERY"):
        if hasattr(module, setting):
            monkeypatch.setattr(module, setting, 1)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        main([name])
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert name in capsys.readouterr().out
    assert (common.Path(common.__file__).parent / "results" / f"{name}.png").exists()


def test_unknown_name():
    with pytest.raises(SystemExit, match="no such example: nothing; there are overfitting"):
        main(["nothing"])
