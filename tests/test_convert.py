"""convert, revert and dropout_summary."""

import copy
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers import TORCH_2_11, assert_same_bits, random_tensor
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import dropout_ext

PAIRS = [
    (nn.Dropout, dropout_ext.Dropout, (4, 30)),
    (nn.Dropout1d, dropout_ext.Dropout1d, (4, 30, 2)),
    (nn.Dropout2d, dropout_ext.Dropout2d, (4, 30, 2, 2)),
    (nn.Dropout3d, dropout_ext.Dropout3d, (4, 30, 2, 2, 2)),
    (nn.AlphaDropout, dropout_ext.AlphaDropout, (4, 30)),
    (nn.FeatureAlphaDropout, dropout_ext.FeatureAlphaDropout, (4, 30, 2)),
]


class Operators(TorchDispatchMode):
    """The names of the operators that run inside of it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def who(self):
        ours = ("dropout_ext::apply", "dropout_ext::attention")
        ours = any(name.startswith(ours) for name in self.names)
        theirs = "aten::bernoulli_.float" in self.names
        return {(True, False): "ours", (False, True): "torch", (False, False): "nobody"}.get(
            (ours, theirs), "both"
        )


def who_drops(call):
    with Operators() as operators:
        call()
    return operators.who


class Odd(nn.Dropout):
    pass


def network():
    torch.manual_seed(0)
    shared = nn.Dropout(0.3)
    return nn.Sequential(
        nn.Linear(8, 30), shared, nn.Linear(30, 30), shared, nn.Dropout(0.4, inplace=True), Odd(0.2)
    )


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
def test_every_class(theirs, ours, shape):
    x = random_tensor(shape)
    module = theirs(0.5, inplace=True).eval()
    state = dict(vars(module))
    assert dropout_ext.convert(module) is module
    assert type(module) is ours
    assert vars(module) == state
    module.train()
    assert who_drops(lambda: module(x.clone())) == "ours"
    torch.manual_seed(3)
    expected = ours(0.5, inplace=True)(x.clone())
    torch.manual_seed(3)
    assert_same_bits(module(x.clone()), expected)
    assert dropout_ext.revert(module) is module
    assert type(module) is theirs
    assert vars(module) == state | {"training": True}
    assert who_drops(lambda: module(x.clone())) == "torch"


def test_keeps_identity_sharing_hooks_and_state():
    model = network()
    seen = []
    hook = model[1].register_forward_hook(lambda module, args, out: seen.append(module))
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    model[4].eval()
    assert dropout_ext.convert(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model[1] is model[3]
    assert [type(model[i]) for i in (1, 4, 5)] == [dropout_ext.Dropout] * 2 + [Odd]
    assert (model[4].inplace, model[4].training, model[1].training) == (True, False, True)
    assert model.state_dict().keys() == state.keys()
    model(torch.randn(3, 8))
    assert seen == [model[1]] * 2
    hook.remove()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)[1:2]))
    assert type(again[0]) is dropout_ext.Dropout
    assert dropout_ext.convert(model) is model  # twice changes nothing


def test_eval_is_the_identity_of_the_original():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = random_tensor((2, 5, 16))
    for context in (torch.no_grad(), torch.enable_grad()):  # with and without the fast path
        with context:
            before = model(x)
            assert_same_bits(dropout_ext.convert(model)(x), before)
            assert_same_bits(dropout_ext.revert(model)(x), before)


def test_left_alone():
    own = nn.Dropout(0.5)
    own.forward = lambda x: x + 1
    scripted = torch.jit.script(nn.Dropout(0.5))
    locked, shared = dropout_ext.LockedDropout(0.5), dropout_ext.Dropout(0.5, broadcast_dims=(1,))
    drawing = dropout_ext.Dropout(0.5, generator=torch.Generator())
    model = nn.ModuleList([Odd(0.5), own, scripted, locked, shared, drawing, nn.Linear(2, 2)])
    classes = [type(module) for module in model]
    for change in (dropout_ext.convert, dropout_ext.revert):
        assert [type(module) for module in change(model)] == classes
    assert own(torch.ones(1)) == 2


def test_summary():
    class StochasticDepth(nn.Module):
        p = 0.25

    model = nn.ModuleDict(
        {
            "plain": nn.Dropout(0.1),
            "ours": dropout_ext.Dropout2d(0.2),
            "path": dropout_ext.DropPath(0.3),
            "odd": Odd(0.4),
            "depth": StochasticDepth(),
            "lstm": nn.LSTM(2, 2, 2, dropout=0.5),
            "dry": nn.LSTM(2, 2, 2),
            "attention": nn.MultiheadAttention(2, 1, dropout=0.6),
            "linear": nn.Linear(2, 2),
            "scripted": torch.jit.script(nn.Dropout(0.7)),
            "own": nn.Dropout(0.8),
        }
    )
    model["own"].forward = lambda x: x
    summary = dropout_ext.dropout_summary(model)
    assert [(row.name, row.p, row.state) for row in summary] == [
        ("plain", 0.1, "to convert"),
        ("ours", 0.2, "converted"),
        ("path", 0.3, "converted"),
        ("odd", 0.4, "left"),
        ("depth", 0.25, "left"),
        ("lstm", 0.5, "left"),
        ("attention", 0.6, "left"),
        ("scripted", 0.7, "left"),
        ("own", 0.8, "left"),
    ]
    reasons = {row.name: row.reason for row in summary}
    for name, word in {
        "plain": "",
        "odd": "subclass of nn.Dropout",
        "depth": "dropout_ext.DropPath",
        "lstm": "C++",
        "attention": "override()",
        "scripted": "scripted",
        "own": "forward",
    }.items():
        assert word in reasons[name]
        assert bool(reasons[name]) == bool(word)
    dropout_ext.convert(model)
    states = {row.name: row.state for row in dropout_ext.dropout_summary(model)}
    assert states["plain"] == "converted"
    assert "out of reach" in str(summary)
    assert str(dropout_ext.dropout_summary(nn.Linear(2, 2))) == "no dropout modules"
    assert "(model)" in str(dropout_ext.dropout_summary(nn.Dropout()))


class SwinDropPath(nn.Module):
    drop_prob = 0.1


class DropBlock2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.2


class LayerDropModuleList(nn.ModuleList):
    p = 0.3


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Decoder(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.layerdrop = p


class Configured(nn.Module):
    """Reads the probability in its forward, which a decorator hides."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    @decorated
    def forward(self, x):
        return x if torch.rand([]) < self.config.layerdrop else x + 1


class Parent(nn.Module):
    """Has the configuration, and leaves it to others."""

    config = SimpleNamespace(layerdrop=0.5)


def test_summary_of_draws_out_of_reach():
    model = nn.ModuleDict(
        {
            "path": SwinDropPath(),
            "block": DropBlock2d(),
            "list": LayerDropModuleList(),
            "decoder": Decoder(0.4),
            "dry decoder": Decoder(0.0),
            "encoder": Configured(SimpleNamespace(layerdrop=0.5)),
            "dry encoder": Configured(SimpleNamespace(layerdrop=0.0)),
            "unknown": Configured(None),
            "parent": Parent(),
        }
    )
    summary = dropout_ext.dropout_summary(model)
    assert [(row.name, row.p, row.state) for row in summary] == [
        ("path", 0.1, "left"),
        ("block", 0.2, "left"),
        ("list", 0.3, "left"),
        ("decoder", 0.4, "left"),
        ("encoder", 0.5, "left"),
    ]
    words = ("dropout_ext.DropPath", "blocks", "whole layers", "whole layers", "whole layers")
    assert all(word in row.reason for word, row in zip(words, summary, strict=True))


def test_summary_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 8, "vocab_size": 8, "num_hidden_layers": 1}
    model = transformers.WhisperModel(
        transformers.WhisperConfig(
            **sizes,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            encoder_layerdrop=0.2,
            pad_token_id=0,
        )
    )
    (row,) = dropout_ext.dropout_summary(model)
    assert (row.name, row.p, row.state) == ("encoder", 0.2, "left")


def odd_modules():
    class Named(nn.Module):
        original_name = None

    class Raising(nn.Dropout):
        p = property(lambda self: 1 / 0, lambda self, value: None)

    class NotDropping(nn.Module):
        p = property(lambda self: 1 / 0)

    frozen = [
        torch.jit.freeze(torch.jit.script(module.eval()))
        for module in (nn.Dropout(0.7), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.7)))
    ]
    return nn.ModuleList([Named(), Raising(), NotDropping(), *frozen, nn.Dropout(0.1)])


def test_odd_modules():
    model = odd_modules()
    summary = dropout_ext.dropout_summary(model)
    assert [(row.name, row.p, row.state) for row in summary] == [
        ("1", None, "left"),
        ("3", 0.7, "left"),
        ("5", 0.1, "to convert"),
    ]
    assert "subclass of nn.Dropout" in summary[0].reason
    assert "scripted" in summary[1].reason
    with dropout_ext.monte_carlo(model.eval()):
        # What a frozen module has of a mode, if any, decides nothing in it.
        assert [model[i].training for i in (0, 1, 2, 5)] == [False, True, False, True]
    assert not any(model[i].training for i in (0, 1, 2, 5))
    for change in (dropout_ext.convert, dropout_ext.revert):
        assert change(model) is model
    for module in model:
        assert len(dropout_ext.dropout_summary(module)) <= 1
        with dropout_ext.monte_carlo(module):
            pass


@pytest.mark.parametrize("function", ["convert", "revert", "dropout_summary"])
def test_wrong_type(function):
    with pytest.raises(TypeError, match=rf"{function}\(\): argument 'model' .* not list"):
        getattr(dropout_ext, function)([nn.Dropout()])


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "model.compile()"])
def test_compiled_before_and_after(in_place):
    x = random_tensor((4, 8))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()[:4]

        def forward(self, x):
            return self.layers(x)

    def compiled(model):
        if not in_place:
            return torch.compile(model, backend="aot_eager", fullgraph=True)
        model.compile(backend="aot_eager", fullgraph=True)
        return model

    def call(model):
        torch.manual_seed(5)
        return model(x)

    torch._dynamo.reset()
    expected = call(dropout_ext.convert(Model()))
    theirs = call(Model())
    assert not torch.equal(theirs, expected)
    before = compiled(dropout_ext.convert(Model()))
    assert_same_bits(call(before), expected)
    after = compiled(Model())
    assert_same_bits(call(after), theirs)
    for change, result in ((dropout_ext.convert, expected), (dropout_ext.revert, theirs)):
        change(after)
        if TORCH_2_11:  # which has no guard on the class
            torch.compiler.reset()
        assert_same_bits(call(after), result)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard], ids=["ddp", "fsdp"])
def test_wrapped_before_and_after(process_group, wrap):
    x = random_tensor((4, 8))
    for order in ("before", "after"):
        model = network()[:4]
        if order == "before":
            model = wrap(dropout_ext.convert(model))
        else:
            model = dropout_ext.convert(wrap(model))
        with Operators() as operators:
            model(x).sum().backward()
        assert operators.who == "ours", order


def test_sharded_dropout_is_left(process_group):
    module = fully_shard(nn.Dropout(0.5))
    (row,) = dropout_ext.dropout_summary(dropout_ext.convert(module))
    assert row.state == "left"
    assert "subclass of nn.Dropout" in row.reason
    assert type(fully_shard(dropout_ext.convert(nn.Dropout(0.5)))).__mro__[2] is dropout_ext.Dropout
