"""What convert(fuse=True) makes of a forward: the same, whatever the statements are."""

import contextlib
import copy
import functools
import pickle
import traceback

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, random_tensor
from test_fuse import ATTACHED, ours
from torch import nn
from torch.distributed.fsdp import fully_shard

import dropout_ext
from dropout_ext import _fuse

H = 16
P = 0.4


class Layer(nn.Module):
    def __init__(self, **given):
        super().__init__()
        self.p = P
        self.fc1, self.fc2 = nn.Linear(H, H), nn.Linear(H, H)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(H)
        self.norm2 = nn.LayerNorm(H)
        self.drop = nn.Dropout(P)
        for name, value in given.items():
            setattr(self, name, value)


class ReturnedSum(Layer):
    def forward(self, x):
        y = self.drop(self.fc1(x))
        return x + y


class OneStatement(Layer):
    def forward(self, x):
        return self.drop(self.fc1(x)) + x


class PartOfAnother(Layer):
    def forward(self, x):
        residual = x
        x = F.dropout(self.fc1(x), p=self.p, training=self.training)
        return self.fc2(x + residual)


class NormOfSum(Layer):
    def forward(self, x):
        x = self.norm(x + self.drop(self.fc1(x)))
        x = self.norm2(self.drop(self.fc2(x)) + x)
        return x


class ReturnedNorm(Layer):
    def forward(self, x):
        y = self.fc1(x)
        y = F.dropout(y, self.p, self.training)
        return self.norm(y + x)


class ReturnedNormOfSum(Layer):
    def forward(self, x):
        residual = x
        x = self.drop(self.fc1(x))
        x = residual + x
        kept = x  # noqa: F841
        return self.norm(x)


class ReturnedSumOfDrop(Layer):
    def forward(self, x):
        y = x + self.drop(self.fc1(x))
        return y


class PreNorm(Layer):
    def forward(self, x):
        residual = x
        x = self.fc1(self.norm(x))
        x = nn.functional.dropout(x, p=self.p, training=self.training)
        x = residual + x
        residual = x
        x = self.norm2(x)
        return residual + self.fc2(x)


class OtherTarget(Layer):
    def forward(self, x):
        y = x + self.drop(self.fc1(x))
        z = self.norm(y)
        return y + self.fc2(z)


class RenamedAndOther(Layer):
    def forward(self, x):
        y = x + self.drop(self.fc1(x))
        kept = y
        z = self.norm(y)
        return y + kept * self.fc2(z)


class RenamedToTheTarget(Layer):
    def forward(self, x):
        y = x + self.drop(self.fc1(x))
        z = y
        z = self.norm(y)
        return y + self.fc2(z)


class InPlaceOfTheSum(Layer):
    def forward(self, x):
        h = self.fc1(x)
        h = self.drop(h)
        h = x + h
        h = self.norm(h)
        return h


class TwoStatements(Layer):
    def forward(self, x):
        x = self.act(self.fc1(x))
        x = self.drop(x)
        return self.fc2(x)


class Nested(Layer):
    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class FunctionalActivation(Layer):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.dropout(x, self.p, training=self.training)
        return x + self.fc2(F.dropout(F.silu(x), p=0.2, training=self.training))


class Branches(Layer):
    def forward(self, x, *, how="both", **kwargs):
        for layer in (self.fc1, self.fc2):
            if how == "none":
                continue
            x = x + self.drop(layer(x))
            try:
                with torch.enable_grad():
                    y = x + self.drop(x)
            finally:
                x = self.norm(y)
        while how == "both":
            x = F.dropout(F.gelu(x), p=P, training=self.training)
            how = "once"
        return x


class Path(Layer):
    def __init__(self):
        super().__init__(drop_path=dropout_ext.DropPath(P))

    def forward(self, x):
        x = x + self.drop_path(self.fc1(x))
        return self.drop_path(self.fc2(x)) + x


def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        # As GradientCheckpointingLayer of transformers tells that it is the outermost one.
        self.outermost.append(type(self).forward is wrapper)
        return function(self, *args, **kwargs)

    return wrapper


class Decorated(Layer):
    def __init__(self):
        super().__init__(outermost=[])

    @decorated
    @decorated
    def forward(self, x, scale=2.0, *, shift=1.0):
        """A forward with defaults."""
        x = scale * x + shift
        return x + self.drop(self.fc1(x))


class Super(OneStatement):
    def forward(self, x):
        x = x + self.drop(self.fc2(x))
        return super().forward(x)


def closed(offset):
    class Closure(Layer):
        def forward(self, x):
            x = x + offset
            return x + self.drop(self.fc1(x))

    return Closure()


made = []


class Registered(OneStatement):
    def __init_subclass__(cls, **kwargs):
        made.append(cls)
        super().__init_subclass__(**kwargs)


# What to build, and the fused operators in it.
CASES = {
    "returned sum": (ReturnedSum, {"add"}),
    "one statement": (OneStatement, {"add"}),
    "part of another": (PartOfAnother, {"apply"}),
    "norm of a sum": (NormOfSum, {"add_norm"}),
    "returned norm": (ReturnedNorm, {"add_norm"}),
    "returned norm of a sum": (ReturnedNormOfSum, {"add_norm"}),
    "sum, returned": (ReturnedSumOfDrop, {"add"}),
    "pre-norm": (PreNorm, {"add_norm"}),
    "other target": (OtherTarget, {"add_norm"}),
    "renamed": (RenamedAndOther, {"add_norm"}),
    "renamed to the target": (RenamedToTheTarget, {"add_norm"}),
    "three statements": (InPlaceOfTheSum, {"add_norm"}),
    "two statements": (TwoStatements, {"activation"}),
    "nested": (Nested, {"activation"}),
    "functional activation": (FunctionalActivation, {"activation"}),
    "branches": (Branches, {"add", "activation", "apply"}),
    "path": (Path, {"add"}),
    "decorated": (Decorated, {"add"}),
    "super": (Super, {"add", "apply"}),
    "closure": (lambda: closed(3.0), {"add"}),
    "__init_subclass__": (Registered, {"add"}),
}
each_case = pytest.mark.parametrize("name", CASES)


def operators(model, x):
    with dropout_ext.override():
        return ours(lambda: model(x))


def step(model, x, **options):
    """Output, gradients and what is left of the generator, after a seed, all dropout ours."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    model.zero_grad()
    with dropout_ext.override():
        y = model(x, **options)
        y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads], torch.get_rng_state()


def assert_close(actual, expected):
    for a, b in zip(actual[0], expected[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(actual[1], expected[1])


def pair(model):
    unfused = dropout_ext.convert(copy.deepcopy(model))
    return unfused, dropout_ext.convert(model, fuse=True)


@each_case
def test_computes_what_it_did(name):
    """In float64 nothing but another mask makes a difference as large as 1e-9."""
    x = random_tensor((3, 5, H), torch.float64)
    unfused, fused = pair(CASES[name][0]().double())
    assert_close(step(fused, x), step(unfused, x))
    assert_same_bits(fused.eval()(x), unfused.eval()(x))


@each_case
def test_fused_operators_run(name):
    x = random_tensor((3, 5, H))
    unfused, fused = pair(CASES[name][0]())
    assert operators(fused, x) == CASES[name][1]
    assert isinstance(fused, type(unfused))
    assert type(fused).__name__ == type(unfused).__name__
    fused_to = CASES[name][1] - {"apply"}
    assert (type(fused) is type(unfused)) == (not fused_to)
    assert type(dropout_ext.revert(fused)) is type(unfused)


@each_case
def test_copied_and_compiled(name):
    x = random_tensor((3, 5, H), torch.float64)
    _, fused = pair(CASES[name][0]().double())
    expected = step(fused, x)
    twins = [copy.deepcopy(fused)]
    if name != "closure":  # a local class
        twins.append(pickle.loads(pickle.dumps(fused)))
    for twin in twins:
        assert type(twin) is type(fused)
        assert_close(step(twin, x), expected)
    if name == "branches":  # torch breaks the graph at `while` and `try`
        return
    torch.compiler.reset()
    twins[0].compile(backend="aot_eager", fullgraph=True)
    assert_close(step(twins[0], x), expected)


def test_arguments_and_branches():
    x = random_tensor((3, 5, H), torch.float64)
    unfused, fused = pair(Branches().double())
    for how in ("none", "once", "both"):
        assert_close(step(fused, x, how=how), step(unfused, x, how=how))
    unfused, fused = pair(Decorated().double())
    for options in ({}, {"scale": 3.0}, {"shift": 2.0}):
        assert_close(step(fused, x, **options), step(unfused, x, **options))
    assert fused.forward.__doc__ == "A forward with defaults."


def test_decorators_see_their_own_function():
    _, fused = pair(Decorated())
    fused(torch.ones(1, H))
    assert fused.outermost == [True, False]


def test_subclassing_is_no_event():
    """A registry of subclasses learns of none."""
    pair(Registered())
    assert not made


class LeftBehind(Layer):
    """The variable keeps what was dropped."""

    def forward(self, x):
        y = self.drop(x)
        z = x + y
        return z * y


class Twice(Layer):
    def forward(self, x):
        x = self.drop(x)
        x = x + x
        return x


class Minus(Layer):
    def forward(self, x):
        x = x - self.drop(self.fc1(x))
        return x


class Augmented(Layer):
    def forward(self, x):
        y = self.fc1(x)
        y += self.drop(x)
        return y


class InPlace(Layer):
    def forward(self, x):
        x = self.fc1(x)
        y = F.dropout(x, self.p, self.training, True)
        return x + F.dropout(y, p=self.p, training=self.training, inplace=True)


class SideEffect(Layer):
    """Evaluating p twice would draw twice."""

    def forward(self, x):
        x = x + F.dropout(self.fc1(x), p=torch.rand(1).item(), training=self.training)
        return x


class Between(Layer):
    def forward(self, x):
        y = self.drop(x)
        x = 2 * x
        y = x + y
        return y


class Walrus(Layer):
    def forward(self, x):
        x = x + self.drop(x := 2 * x)
        return x


class OtherSelf(Layer):
    def forward(self, x):
        self = self.other
        return x + self.drop(x)


seen = torch.ones(2, H)


class Global(Layer):
    def forward(self, x):
        y = seen + self.drop(self.fc1(x))
        return y


class GlobalInTwo(Layer):
    def forward(self, x):
        y = self.drop(self.fc1(x))
        return seen + y


class Comprehension(Layer):
    def forward(self, x):
        return sum([self.drop(self.act(each)) for each in x])


class NotTorch(Layer):
    def forward(self, x):
        F = Other
        x = x + F.dropout(self.fc1(x), p=self.p, training=self.training)
        return x


class Other:
    @staticmethod
    def dropout(x, p, training):
        return 3 * x


@pytest.mark.parametrize(
    "kind",
    [
        LeftBehind, Twice, Minus, Augmented, InPlace, SideEffect, Between, Comprehension, NotTorch,
        Walrus, OtherSelf, Global, GlobalInTwo,
    ],
)  # fmt: skip
def test_what_has_another_meaning_stays(kind):
    model = kind()
    dropout_ext.convert(model, fuse=True)
    assert type(model) is kind


# What can be seen from outside of the statements: `seen` is to be the same, and so is the rest.


class Seen(Layer):
    seen = None


class GradientOfTheSum(Seen):
    def forward(self, x):
        y = x + self.drop(self.fc1(x))
        z = self.norm(y)
        y.retain_grad()
        self.seen = y
        return y + self.fc2(z)


class HookOnTheSum(Seen):
    def forward(self, x):
        y = x + self.drop(self.fc1(x))
        z = self.norm(y)
        y.register_hook(lambda g: 0.1 * g)
        return y + self.fc2(z)


class GradientAtTheSum(Seen):
    def forward(self, x):
        y = x + self.drop(self.fc1(x))
        z = self.norm(y)
        (self.seen,) = torch.autograd.grad(z.sum(), y, retain_graph=True)
        return z


class Finally(Seen):
    def forward(self, x):
        try:
            x = x + self.drop(self.fc1(x))
            return self.norm(x)
        finally:
            self.seen = x.detach()


class Closure(Seen):
    def forward(self, x):
        self.seen = lambda: y
        y = x
        h = self.fc1(x)
        y = self.drop(h)
        return x + y


class GlobalSum(Seen):
    def forward(self, x):
        global LAST
        LAST = x + self.drop(self.fc1(x))
        return self.norm(LAST)

    @property
    def seen(self):
        return LAST


class Scheduled(Seen):
    def schedule(self, x):
        self.p = 0.8
        return x

    def forward(self, x):
        self.p = 0.1
        x = F.relu(self.schedule(self.fc1(x)))
        x = F.dropout(x, self.p, self.training)
        return x


class Counted(Seen):
    reads = 0

    @property
    def rate(self):
        self.reads += 1
        return 0.1 * self.reads

    @property
    def drop_now(self):
        self.reads += 1
        return self.drop

    def forward(self, x):
        x = x + F.dropout(self.fc1(x), self.rate, self.training)
        x = x + self.drop_now(self.fc2(x))
        self.seen = self.reads
        return x


class AsksForItsClass(Seen):
    def forward(self, x):
        x = x + self.drop(self.fc1(x))
        self.seen = type(self).__name__, type(self).__module__
        return x


class OwnNames(Seen):
    def __init__(self):
        super().__init__()
        self._original, self._places = nn.Linear(H, H), nn.ModuleList([nn.Linear(H, H)])
        self.why_unfused = nn.Linear(H, H)

    def forward(self, x):
        x = x + self.drop(self._original(x))
        for place in self._places:
            x = x + self.drop(place(x))
        return self.why_unfused(x)


class NoInstance(Seen):
    @staticmethod
    def forward(x):
        return x + F.dropout(F.relu(x), P, True)


class WrongNorm(Seen):
    def __init__(self):
        super().__init__(norm=nn.LayerNorm(H + 1))

    def forward(self, x):
        y = x
        with contextlib.suppress(RuntimeError):
            y = x + self.drop(self.fc1(x))
            y = self.norm(y)
        return y


class Empty(Seen):
    def forward(self, x):
        none = self.drop(self.act(x[:0]))
        return self.drop(self.act(x)) + none.sum()


@pytest.mark.parametrize("kind", Seen.__subclasses__())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_seen_from_outside_stays(kind, dtype):
    x = random_tensor((3, 5, H), dtype)
    unfused, fused = pair(kind().to(dtype))
    results = []
    for model in (unfused, fused):
        gradients, state = step(model, x)
        seen = model.seen() if callable(model.seen) else model.seen
        seen = seen.grad if kind is GradientOfTheSum else seen
        results.append((gradients, state, seen))
    (actual, state, seen), (expected, expected_state, expected_seen) = reversed(results)
    assert torch.equal(state, expected_state)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    if isinstance(seen, torch.Tensor):
        torch.testing.assert_close(seen, expected_seen, rtol=tolerance, atol=tolerance)
    else:
        assert seen == expected_seen


def test_a_subclass_that_somebody_made_is_copied_as_it_is():
    _, fused = pair(OneStatement())
    kind = type(fused)
    fused.__class__ = type("Mine", (kind,), {"forward": lambda self, x: x})
    assert type(copy.deepcopy(fused)) is type(fused)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.GELU, nn.Module])
def test_a_class_that_is_called_otherwise(kind, monkeypatch):
    called = []
    original = kind.__call__

    def call(self, *args, **kwargs):
        called.append(type(self).__name__)
        return original(self, *args, **kwargs)

    x = random_tensor((3, 5, H))
    counts = []
    for model in pair(CASES["pre-norm"][0]()):
        monkeypatch.setattr(kind, "__call__", call)
        called.clear()
        step(model, x)
        counts.append([name for name in called if name != type(model).__name__])
        monkeypatch.undo()
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
def test_another_function_in_the_place_of_what_a_module_calls(name, monkeypatch):
    class Both(Layer):
        def forward(self, x):
            x = self.drop(self.act(self.fc1(x)))
            return self.norm(x + self.drop(self.fc2(x)))

    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **kwargs: 2 * original(*args, **kwargs))
    x = random_tensor((3, 5, H))
    unfused, fused = pair(Both())
    torch.testing.assert_close(step(fused, x)[0][0], step(unfused, x)[0][0], rtol=1e-3, atol=1e-3)


def test_source_that_is_not_what_runs():
    namespace = {"nn": nn, "Layer": Layer}
    exec(
        "class Made(Layer):\n    def forward(self, x):\n        return x + self.drop(x)", namespace
    )
    model = dropout_ext.convert(namespace["Made"](), fuse=True)
    assert type(model) is namespace["Made"]


def test_source_in_another_text(tmp_path):
    """A page of documentation, say: what surrounds the code is no Python."""
    page = tmp_path / "page.md"
    code = "class Made(Layer):\n    def forward(self, x):\n        return x + self.drop(x)\n"
    page.write_text(f"It's a page.\n{code}It's a page.\n")
    namespace = {"Layer": Layer, "__name__": __name__}
    exec(compile(f"\n{code}", page, "exec"), namespace)
    model = dropout_ext.convert(namespace["Made"](), fuse=True)
    assert type(model) is not namespace["Made"]


class Foreign(nn.Module):
    def forward(self, x):
        return 2 * x


# (what is changed in a fused module, the operators that run then)
FALLBACKS = {
    "p = 0": (OneStatement, lambda m: setattr(m.drop, "p", 0.0), set()),
    "p = 1": (OneStatement, lambda m: setattr(m.drop, "p", 1.0), {"add"}),
    "drops in place": (OneStatement, lambda m: setattr(m.drop, "inplace", True), {"apply"}),
    "drop in eval mode": (OneStatement, lambda m: m.drop.eval(), set()),
    "another drop": (OneStatement, lambda m: setattr(m, "drop", Foreign()), set()),
    "path without scale": (
        Path,
        lambda m: setattr(m.drop_path, "scale_by_keep", False),
        {"apply"},
    ),
    "path in place": (Path, lambda m: setattr(m.drop_path, "inplace", True), {"apply"}),
    "another activation": (Nested, lambda m: setattr(m, "act", nn.ELU()), {"apply"}),
    "activation in place": (
        Nested,
        lambda m: setattr(m, "act", nn.ReLU(inplace=True)),
        {"apply"},
    ),
    "another norm": (PreNorm, lambda m: setattr(m, "norm2", nn.RMSNorm(H)), {"add"}),
    "another norm of a sum": (NormOfSum, lambda m: setattr(m, "norm", Foreign()), None),
    "p of a function": (ReturnedNorm, lambda m: setattr(m, "p", 0.0), set()),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_changed_later(name):
    kind, change, names = FALLBACKS[name]
    x = random_tensor((3, 5, H), torch.float64)
    unfused, fused = pair(kind().double())
    for model in (unfused, fused):
        change(model)
        model.double()
    assert_close(step(fused, x), step(unfused, x))
    if names is not None:
        fused.float()
        assert operators(fused, x.float()) == names


@pytest.mark.parametrize("how", ATTACHED)
@pytest.mark.parametrize(
    ("kind", "child"),
    [
        (OneStatement, "drop"),
        (Path, "drop_path"),
        (Nested, "act"),
        (Nested, "drop"),
        (PreNorm, "norm2"),
    ],
)
def test_what_is_attached_to_a_child_is_called(kind, child, how):
    x = random_tensor((3, 5, H), torch.float64)
    unfused, fused = pair(kind().double())
    calls = []
    for model in (unfused, fused):
        ATTACHED[how](getattr(model, child), lambda model=model: calls.append(model))
    assert_close(step(fused, x), step(unfused, x))
    assert calls.count(fused) == calls.count(unfused) > 0
    (row,) = (row for row in dropout_ext.dropout_summary(fused) if row.state == "fused")
    assert child in row.reason


def test_another_function_in_the_place_of_dropout(monkeypatch):
    _, fused = pair(ReturnedNorm())
    calls = []

    def counting(input, p=0.5, training=True):
        calls.append(p)
        return input

    monkeypatch.setattr(F, "dropout", counting)
    fused(torch.ones(2, H))
    assert calls == [P]


@pytest.mark.parametrize(
    ("kind", "child"), [(PreNorm, nn.LayerNorm), (Nested, nn.GELU), (Nested, dropout_ext.Dropout)]
)
def test_a_class_with_another_forward(kind, child, monkeypatch):
    """As libraries do that put their own kernels into nn.LayerNorm."""
    x = random_tensor((3, 5, H), torch.float64)
    unfused, fused = pair(kind().double())
    calls = []
    forward = child.forward

    def counting(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(child, "forward", counting)
    expected = step(unfused, x)
    once = len(calls)
    assert_close(step(fused, x), expected)
    assert len(calls) == 2 * once > 0


def test_another_function_in_the_place_of_an_activation(monkeypatch):
    unfused, fused = pair(FunctionalActivation())
    monkeypatch.setattr(F, "relu", torch.neg)
    x = random_tensor((3, H))
    assert_same_bits(step(fused, x)[0][0], step(unfused, x)[0][0])


def test_modes_see_a_function():
    """A mode that takes F.dropout over does so in a fused module."""
    _, fused = pair(ReturnedNorm())
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        fused(torch.ones(2, H))
    assert dropout_ext.dropout_add_layer_norm in seen


def test_a_forward_that_is_replaced(monkeypatch):
    """Not the one that was rewritten before."""

    def forward(self, x):
        return 3 * x + self.drop(self.fc1(x))

    before = pair(OneStatement())[1]
    monkeypatch.setattr(OneStatement, "forward", forward)
    model = dropout_ext.convert(OneStatement(), fuse=True)
    assert type(model) is OneStatement
    assert type(dropout_ext.revert(before)) is OneStatement


@pytest.mark.parametrize("kind", [OneStatement, ReturnedSum, PreNorm, NormOfSum, InPlaceOfTheSum])
def test_results_lie_in_memory_as_they_did(kind):
    """`view` of a sum works where it did."""

    class Permuted(nn.Linear):
        def forward(self, x):
            return super().forward(x).permute(2, 1, 0).contiguous().permute(2, 1, 0)

    x = random_tensor((3, 5, H), torch.float64)
    model = kind().double()
    model.fc1 = Permuted(H, H).double()
    unfused, fused = pair(model)
    assert_close(step(fused, x), step(unfused, x))
    for given in (x, x.transpose(0, 1), x.transpose(0, 1).contiguous().transpose(0, 1)):
        with dropout_ext.override():
            assert fused(given).stride() == unfused(given).stride()


def test_layouts_that_are_not_strided():
    drop = dropout_ext.Dropout(P)
    x = torch.ones(2, 3)
    assert _fuse.adds(drop, x, x)
    assert not _fuse.adds(drop, x.to_sparse(), x.to_sparse())


def test_an_attribute_that_is_missing():
    """As where a configuration decides whether a module is there."""

    class Optional(Layer):
        def forward(self, x):
            if self.p == 0:
                return x + self.drop2(x)
            return x + self.drop(x)

    model = dropout_ext.convert(Optional(), fuse=True)
    assert ours(lambda: model(torch.ones(2, H))) == {"add"}
    assert dropout_ext.dropout_summary(model)[0].state == "fused"


def test_sharded_is_another_class(process_group):
    """Which revert would take from FSDP."""
    model = fully_shard(dropout_ext.convert(OneStatement(), fuse=True))
    kind = type(model)
    assert type(dropout_ext.revert(model)) is kind


def test_nothing_to_fuse_in_an_instance():
    """A class that is known, whose dropout is another one here."""
    for model in (OneStatement(drop=nn.Identity()), OneStatement(drop=Foreign())):
        assert type(dropout_ext.convert(model, fuse=True)) is OneStatement
    model = dropout_ext.convert(PreNorm(norm2=nn.RMSNorm(H)), fuse=True)
    row = dropout_ext.dropout_summary(model)[0]
    assert (row.state, row.reason) == ("fused", "partly as it was: its norm2 is of RMSNorm")


def test_line_numbers_are_those_of_the_source():
    _, fused = pair(ReturnedNorm())
    with pytest.raises(RuntimeError) as error:
        fused(torch.ones(2, H + 1))
    lines = [frame.line for frame in traceback.extract_tb(error.value.__traceback__)]
    assert "y = self.fc1(x)" in lines


def test_source_is_read_once(monkeypatch):
    pair(OneStatement())
    monkeypatch.setattr(_fuse._rewrite, "rewritten", None)  # an error when it is called
    pair(OneStatement())
