"""convert of the DropPath and StochasticDepth that other libraries carry."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch
from helpers import assert_same_bits, make_key, random_tensor
from torch import nn
from torch.distributed.fsdp import fully_shard

import dropout_ext
from dropout_ext import _paths


class Own(nn.Module):
    """The steps of transformers' classes by other names."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        """Drops samples."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = 1 - self.drop_prob
        sizes = (x.shape[0],) + (1,) * (x.ndim - 1)
        draw = torch.rand(sizes, dtype=x.dtype, device=x.device)
        draw = torch.floor(draw + kept)
        return x.div(kept) * draw

    def extra_repr(self):
        return f"own {self.drop_prob}"


class Derived(Own):
    pass


class Unscaled(Own):
    """Another one: what is kept stays as it is."""

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = 1 - self.drop_prob
        sizes = (x.shape[0],) + (1,) * (x.ndim - 1)
        draw = torch.rand(sizes, dtype=x.dtype, device=x.device)
        draw = torch.floor(draw + kept)
        return x * draw


class StochasticDepth(nn.Module):
    """The attributes of torchvision's."""

    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode


def with_mode(p, mode):
    """As convert makes it of torchvision's."""
    module = StochasticDepth(p, mode)
    names = {"__module__": dropout_ext.modules.__name__}
    kind = type("StochasticDepth", (_paths._WithMode, StochasticDepth), names)
    kind._dropout_ext_original, kind._itself = StochasticDepth, kind
    module.__class__ = kind
    return module


def of_transformers(name, kind):
    def build(p):
        pytest.importorskip("transformers")
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        return getattr(module, kind)(p)

    return build


def timm(p, scale_by_keep=True):
    return pytest.importorskip("timm.layers").DropPath(p, scale_by_keep)


def torchvision(p, mode="row"):
    return pytest.importorskip("torchvision.ops").StochasticDepth(p, mode)


KNOWN = {
    "own": Own,
    "derived": Derived,
    "timm": timm,
    "torchvision": torchvision,
    "beit": of_transformers("beit", "BeitDropPath"),
    "convnext": of_transformers("convnext", "ConvNextDropPath"),
    "dinov2": of_transformers("dinov2", "Dinov2DropPath"),
    "segformer": of_transformers("segformer", "SegformerDropPath"),
    "swin": of_transformers("swin", "SwinDropPath"),
}
each_known = pytest.mark.parametrize("name", KNOWN)


def seeded_call(module, *args, **kwargs):
    torch.manual_seed(3)
    return module(*args, **kwargs)


@each_known
def test_becomes_ours_and_comes_back(name):
    x = random_tensor((40, 3, 2))
    module = KNOWN[name](0.4)
    kind, text, state = type(module), repr(module), dict(vars(module))
    (row,) = dropout_ext.dropout_summary(module)
    assert (row.p, row.state, row.reason) == (0.4, "to convert", "")
    assert dropout_ext.convert(module) is module
    (row,) = dropout_ext.dropout_summary(module)
    assert (row.type, row.p, row.state) == (kind.__name__, 0.4, "converted")
    assert isinstance(module, (kind, dropout_ext.DropPath))
    assert (repr(module), vars(module)) == (text, state)
    assert_same_bits(seeded_call(module, x), seeded_call(dropout_ext.DropPath(0.4), x))
    assert module.eval()(x) is x
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert_same_bits(seeded_call(twin.train(), x), seeded_call(dropout_ext.DropPath(0.4), x))
    kept = type(module)
    assert type(dropout_ext.convert(module)) is kept
    assert type(dropout_ext.revert(module)) is kind
    assert vars(module) == state | {"training": False}


@each_known
def test_at_the_ends(name):
    x = random_tensor((40, 3, 2))
    assert dropout_ext.convert(KNOWN[name](0.0))(x) is x
    assert not dropout_ext.convert(KNOWN[name](1.0))(x).any()
    module = dropout_ext.convert(KNOWN[name](0.0))
    setattr(module, "p" if hasattr(module, "p") else "drop_prob", 0.5)  # read at the call
    assert_same_bits(seeded_call(module, x), seeded_call(dropout_ext.DropPath(0.5), x))


@each_known
def test_drops_as_often_as_the_original(name):
    """Means of 4000 decisions each, within 5 deviations of their difference; one value per sample,
    and the same two values.
    """
    p, n = 0.3, 4000
    x = torch.ones(n, 2, 3)
    module = KNOWN[name](p)
    theirs = module(x)
    ours = dropout_ext.convert(module)(x)
    for y in (theirs, ours):
        assert (y == y[:, :1, :1]).all()
    kept = [(y[:, 0, 0] != 0).double().mean() for y in (theirs, ours)]
    assert abs(kept[0] - kept[1]) < 5 * (2 * p * (1 - p) / n) ** 0.5
    assert torch.allclose(theirs.unique(), ours.unique())


def test_without_scaling():
    x = random_tensor((40, 3))
    module = dropout_ext.convert(timm(0.4, scale_by_keep=False))
    expected = seeded_call(dropout_ext.DropPath(0.4, scale_by_keep=False), x)
    assert_same_bits(seeded_call(module, x), expected)


def one_decision(module):
    """Whether the whole batch is kept or dropped, 200 times."""
    x = torch.ones(3, 2)
    results = [module(x) for _ in range(200)]
    assert all((y == y[0, 0]).all() for y in results)
    kept = [y[0, 0].item() for y in results]
    assert set(kept) == {0.0, 2.0}
    assert 60 < sum(value > 0 for value in kept) < 140
    assert module.eval()(x) is x


def test_one_decision_for_the_batch():
    one_decision(with_mode(0.5, "batch"))
    x = random_tensor((40, 3))
    expected = seeded_call(dropout_ext.DropPath(0.4), x)
    assert_same_bits(seeded_call(with_mode(0.4, "row"), x), expected)
    with pytest.raises(ValueError, match="'column'"):
        with_mode(0.4, "column")(x)
    traced = torch.fx.symbolic_trace(nn.Sequential(with_mode(0.5, "batch")))
    one_decision(traced)


def test_one_decision_for_the_batch_of_torchvision():
    one_decision(dropout_ext.convert(torchvision(0.5, "batch")))


class Residual(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.stochastic_depth = path

    def forward(self, x):
        return x + self.stochastic_depth(2 * x)


@pytest.mark.parametrize(
    ("path", "fused"),
    [
        (lambda: Own(0.4), True),
        (lambda: timm(0.4), True),
        (lambda: timm(0.4, scale_by_keep=False), False),
        (lambda: torchvision(0.4), True),
        (lambda: torchvision(0.4, "batch"), False),
        (lambda: with_mode(0.4, "row"), True),
        (lambda: with_mode(0.4, "batch"), False),
    ],
)
def test_beside_a_sum(path, fused):
    """Fused where a call of rows does the same."""
    x = random_tensor((40, 3), torch.float64)
    unfused = dropout_ext.convert(Residual(path()))
    model = dropout_ext.convert(Residual(path()), fuse=True)
    assert (type(model) is not Residual) == fused
    assert torch.allclose(seeded_call(model, x), seeded_call(unfused, x), rtol=1e-12, atol=1e-12)


def test_in_a_model():
    """Hooks, arguments by name, keys by name, and a compiled call."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.path, self.drop = Own(0.5), nn.Dropout(0.5)

        def forward(self, x):
            return x + self.path(x=self.drop(x))

    x = random_tensor((16, 3))
    model = dropout_ext.convert(Model())
    seen = []
    hook = model.path.register_forward_hook(lambda *_: seen.append(1))
    with dropout_ext.keys(make_key(), model):
        y = model(x)
    assert seen == [1]
    hook.remove()
    number = dropout_ext._keys._number_of("path")
    key = dropout_ext.fold_in(dropout_ext.fold_in(make_key(), number), 0)
    with dropout_ext.keys(make_key(), model):
        dropped = model.drop(x)
    expected = x + dropout_ext.functional.drop_path(dropped, 0.5, True, key=key)
    assert_same_bits(y, expected)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_bits(seeded_call(compiled, x), seeded_call(model, x))


def test_traced_as_a_leaf():
    model = dropout_ext.convert(nn.Sequential(Own(0.5)))
    traced = torch.fx.symbolic_trace(model)
    x = random_tensor((16, 3))
    assert_same_bits(seeded_call(traced, x), seeded_call(model, x))
    assert traced.eval()(x) is x


def test_sharded_is_another_class(process_group):
    module = fully_shard(dropout_ext.convert(Own(0.5)))
    kind = type(module)
    assert type(dropout_ext.revert(module)) is kind
    x = random_tensor((16, 3))
    assert_same_bits(seeded_call(module, x), seeded_call(dropout_ext.DropPath(0.5), x))


def test_left():
    class WithCall(Own):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class WithDrop(Own):
        _drop = None

    own, with_generator = Own(0.5), Own(0.5)
    own.forward = lambda x: x
    with_generator.generator = nn.Linear(2, 2)
    for module, word in (
        (Unscaled(0.5), "not a module of torch.nn"),
        (WithCall(0.5), "not a module of torch.nn"),
        (WithDrop(0.5), "not a module of torch.nn"),
        (own, "forward of its own"),
        (with_generator, "its generator would be taken for ours"),
        (Own(torch.tensor(0.5)), "tensor(0.5"),
        (Own(1.5), "1.5"),
    ):
        model = nn.ModuleDict({"droppath": module})
        kind = type(module)
        kind.__name__ = "DropPath"  # listed by its name
        dropout_ext.convert(model)
        assert type(module) is kind
        (row,) = dropout_ext.dropout_summary(model)
        assert row.state == "left"
        assert word.replace("not a module of torch.nn", "code that is not known") in row.reason


@pytest.mark.parametrize("given", [None, (1, 2), torch.ones(())])
def test_what_drops_nothing_takes_anything(given):
    converted = dropout_ext.convert(Own(0.5)).eval()
    assert converted(given) is given
    converted.train().drop_prob = 0.0
    assert converted(given) is given
    with pytest.raises(TypeError, match=r"takes 1 input, but got 2"):
        converted(given, given)


def test_a_subclass_that_somebody_made_is_copied_as_it_is():
    converted = dropout_ext.convert(Own(0.5))
    converted.__class__ = type("Mine", (type(converted),), {"forward": lambda self, x: x})
    assert type(copy.deepcopy(converted)) is type(converted)


def test_a_function_in_between_counts(monkeypatch):
    """Another drop_path under the class of timm is other code."""
    kind = type(timm(0.5))
    _paths._with_forward.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(kind.forward.__globals__, "drop_path", lambda x, *_: x)
        assert type(dropout_ext.convert(timm(0.5))) is kind
    _paths._with_forward.cache_clear()


def test_a_forward_that_is_replaced_counts(monkeypatch):
    dropout_ext.convert(Derived(0.5))
    monkeypatch.setattr(Derived, "forward", lambda self, x: x)
    assert type(dropout_ext.convert(Derived(0.5))) is Derived


def test_source_that_is_not_what_runs(tmp_path, monkeypatch):
    """An edited file says nothing of the class that was made of it before."""
    source = "import torch\nfrom torch import nn\n\n\n" + inspect.getsource(Own)
    (tmp_path / "edited.py").write_text(source.replace("x.div(kept) * draw", "x * draw"))
    monkeypatch.syspath_prepend(tmp_path)
    edited = importlib.import_module("edited")
    (tmp_path / "edited.py").write_text(source)
    assert type(dropout_ext.convert(edited.Own(0.5))) is edited.Own
