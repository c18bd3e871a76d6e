"""The modules as nn.Module, and what the package says about itself."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from family import ALPHA_MEMBERS, MEMBERS
from helpers import ROOT, assert_same_bits, random_tensor, run_python
from torch import nn

import dropout_ext
from dropout_ext import _reference as reference

COUNTERPARTS = [
    (ours, theirs) for _, ours, theirs, *_ in (MEMBERS | ALPHA_MEMBERS).values() if theirs
]

MODULES = [
    dropout_ext.Dropout(0.25, inplace=True),
    dropout_ext.Dropout(0.25, broadcast_dims=(1, -1)),
    dropout_ext.Dropout1d(0.25),
    dropout_ext.Dropout2d(0.25),
    dropout_ext.Dropout3d(0.25),
    dropout_ext.AlphaDropout(0.25),
    dropout_ext.FeatureAlphaDropout(0.25),
    dropout_ext.DropPath(0.25, scale_by_keep=False),
    dropout_ext.LockedDropout(0.25, dim=2),
]


def input_for(module):
    """Of a rank that the module takes without a warning."""
    ranks = {dropout_ext.Dropout1d: 3, dropout_ext.Dropout3d: 5}
    return random_tensor((6, 7, 8, 5, 3)[: ranks.get(type(module), 4)])


@pytest.mark.parametrize(("ours", "theirs"), COUNTERPARTS)
def test_counterpart(ours, theirs):
    assert issubclass(ours, theirs)
    for arguments in ((), (0.25,), (0.25, True), (1,), (0,)):
        assert repr(ours(*arguments)) == repr(theirs(*arguments))
        module, counterpart = ours(*arguments), theirs(*arguments)
        assert (module.p, module.inplace) == (counterpart.p, counterpart.inplace)
    assert repr(ours(p=0.25, inplace=True)) == repr(theirs(p=0.25, inplace=True))
    for p in (-0.1, 1.1, math.inf):
        with pytest.raises(ValueError) as expected:
            theirs(p)
        with pytest.raises(ValueError) as actual:
            ours(p)
        assert str(actual.value) == str(expected.value)
    with pytest.raises(ValueError, match="between 0 and 1, but got nan"):
        ours(math.nan)


def test_the_other_modules():
    path = dropout_ext.DropPath()
    assert path.drop_prob == 0 and path.scale_by_keep
    assert repr(dropout_ext.DropPath(0.1)) == "DropPath(drop_prob=0.100)"
    locked = dropout_ext.LockedDropout(0.25, 1)
    assert locked.p == 0.25 and locked.dim == 1
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1, but got"):
            dropout_ext.DropPath(p)
        with pytest.raises(ValueError, match="between 0 and 1, but got"):
            dropout_ext.LockedDropout(p, 1)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_copies(module, key, tmp_path):
    x = input_for(module)
    expected = copy.deepcopy(module)(x.clone(), key=key)
    assert not torch.equal(expected, x)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for copied in (pickle.loads(pickle.dumps(module)), copy.copy(module), loaded):
        assert type(copied) is type(module) and repr(copied) == repr(module)
        assert_same_bits(copied(x.clone(), key=key), expected)
    assert not list(module.parameters()) and not list(module.buffers())
    state = nn.Sequential(module).state_dict()
    assert len(state) == 0
    nn.Sequential(module).load_state_dict(state)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_train_and_eval(module, key):
    module = copy.deepcopy(module)
    x = input_for(module)
    before = x.clone()
    state = torch.get_rng_state()
    module.eval()
    assert module(x) is x and module(x, key=key) is x
    assert_same_bits(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    module.train()
    assert not torch.equal(module(x.clone()), before)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_generator_of_a_module(module, key):
    module = copy.deepcopy(module)
    x = input_for(module)
    module.generator = torch.Generator().manual_seed(5)
    with_own = module(x.clone())
    generator = torch.Generator().manual_seed(5)
    words = [torch.randint(0, 2**63 - 1, (1,), generator=generator) for _ in range(2)]
    module.generator = None
    assert_same_bits(with_own, module(x.clone(), key=~torch.cat(words)))


def test_dropout_module(key):
    x = random_tensor((50, 60))
    y = dropout_ext.Dropout(0.25)(x, key=key)
    assert_same_bits(y, reference.apply(x, key, 0.25, 1 / 0.75))
    z = x.clone()
    assert dropout_ext.Dropout(0.25, inplace=True)(z, key=key) is z
    assert_same_bits(z, y)


def test_in_a_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30), dropout_ext.Dropout(0.5), nn.Linear(30, 2))
    assert sum(isinstance(m, nn.Dropout) for m in network.modules()) == 1
    x = random_tensor((8, 20))
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_build_info():
    info = dropout_ext.build_info()
    assert set(info) == {
        "version",
        "mask_contract",
        "torch",
        "torch_tested",
        "cuda",
        "cuda_version",
        "cuda_archs",
        "cpu_variant",
        "cpu_variants",
        "compiler",
    }
    assert info["version"] == dropout_ext.__version__
    assert info["mask_contract"] == 1
    assert info["cpu_variant"] in info["cpu_variants"]
    assert info["cpu_variants"][-1] == "portable"
    assert torch.__version__.startswith(info["torch"].split("+")[0])
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_archs"]) == info["cuda"] == (info["cuda_version"] is not None)
    info["cpu_variants"].clear()
    assert dropout_ext.build_info()["cpu_variants"]


def test_self_check():
    command = [sys.executable, "-m", "dropout_ext"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    variants = dropout_ext.build_info()["cpu_variants"]
    for fact in (dropout_ext.__version__, torch.__version__, *variants):
        assert fact in result.stdout
    assert "FAILED" not in result.stdout and "ok" in result.stdout


def test_self_check_fails_where_a_mask_is_wrong():
    output = run_python(
        "import dropout_ext.__main__ as m\n"
        "right = m.functional.keep_mask\n"
        "m.functional.keep_mask = lambda *a, **k: right(*a, **k) ^ True\n"
        "print('status', m.main())"
    )
    assert "FAILED" in output and output.endswith("status 1\n")


def test_public_names():
    for name in dropout_ext.__all__:
        assert getattr(dropout_ext, name) is not None
    for name in dropout_ext.functional.__all__:
        assert getattr(dropout_ext.functional, name).__doc__
