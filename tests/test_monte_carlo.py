"""monte_carlo and predict."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, make_key, random_tensor
from torch import nn

import dropout_ext
from dropout_ext import monte_carlo, predict


class DropPath(nn.Module):  # another library's, known by its name
    def forward(self, x):
        return torch.zeros_like(x) if self.training else x


def flags(model):
    return {name: module.training for name, module in model.named_modules()}


def test_dropout_trains_and_the_rest_does_not():
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        nn.Sequential(dropout_ext.DropPath(0.5), DropPath()),
        nn.AlphaDropout(0.5),
    )
    model[1].eval()
    model[4].eval()
    before, statistics = flags(model), model[1].running_mean.clone()
    with pytest.raises(ZeroDivisionError), monte_carlo(model) as same:
        assert same is model
        assert [name for name, on in flags(model).items() if on] == ["2", "3.0", "3.1", "4"]
        model(torch.randn(5, 4))
        raise ZeroDivisionError
    assert flags(model) == before
    assert torch.equal(model[1].running_mean, statistics)


def test_also():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    with monte_carlo(model, also=(nn.ReLU, model[1][1])):
        assert [name for name, on in flags(model).items() if on] == ["1.0", "1.1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), 2
        ),
        nn.Sequential(nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)),
        dropout_ext.convert(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)),
    ],
    ids=["encoder", "lstm", "converted layer"],
)
def test_modules_that_drop_inside(model):
    """PyTorch's fused encoder layer runs under no_grad and drops nothing."""

    def output():
        y = model(x)
        return y[0] if isinstance(y, tuple) else y

    x = random_tensor((2, 5, 8))
    model.eval()
    with torch.no_grad():
        still = output()
        with monte_carlo(model):
            assert not torch.equal(output(), output())
        assert_same_bits(output(), still)


class Drops(nn.Module):
    """Each call of it and its rows are remembered."""

    def __init__(self, limit=10**6):
        super().__init__()
        self.drop = dropout_ext.Dropout(0.25)
        self.rows, self.limit = [], limit

    def forward(self, x):
        self.rows.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not torch.is_grad_enabled()
        return self.drop(x)


def test_predict_is_the_mean_and_deviation_of_the_draws():
    """4000 draws of 16 values 1/0.75 or 0: mean within 5 standard errors, deviation within 5%."""
    model = Drops().eval()
    mean, std = predict(model, torch.ones(2, 8), 4000, make_key(), batch=4000)
    assert model.rows == [8000]
    assert mean.shape == std.shape == (2, 8)
    true = (0.25 * 0.75) ** 0.5 / 0.75
    assert (mean - 1).abs().max() < 5 * true / 4000**0.5
    assert (std / true - 1).abs().max() < 0.05
    # The unbiased deviation follows from the mean: both are functions of the count of kept draws.
    n = (mean * 0.75 * 4000).round()
    expected = ((n * (4000 - n) / 4000 / 3999) ** 0.5) / 0.75
    assert torch.allclose(std, expected, rtol=1e-4)


def test_predict_follows_its_key_and_leaves_the_generator():
    model, x = Drops(), torch.ones(2, 50)
    model.drop.p = 0.5
    state = torch.get_rng_state()
    first = predict(model, x, 3, make_key(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = predict(model, x, 3, make_key(1).view(torch.int64))
    assert_same_bits(first[0], second[0])
    assert_same_bits(first[1], second[1])
    for other in (make_key(2), make_key(1, 1)):
        assert not torch.equal(predict(model, x, 3, other)[0], first[0])
    torch.manual_seed(1)
    drawn = predict(model, x, 3)
    assert not torch.equal(predict(model, x, 3)[0], drawn[0])
    torch.manual_seed(1)
    assert_same_bits(predict(model, x, 3)[0], drawn[0])
    assert model.training


def test_predict_seeds_the_generators_of_modules():
    """Each by itself, and puts them back, shared and default ones too."""

    class Masks(nn.Module):
        def __init__(self, *generators):
            super().__init__()
            self.drops = nn.ModuleList(dropout_ext.Dropout(generator=g) for g in generators)

        def forward(self, x):
            return torch.stack([drop(x) for drop in self.drops], -1)

    shared, default = torch.Generator().manual_seed(1), torch.default_generator
    generators = [shared, torch.Generator().manual_seed(1), shared, default, None]
    model, x = Masks(*generators), torch.ones(1, 400)
    states = [g.get_state() for g in (*generators[:2], default)]
    mean, std = predict(model, x, 2, make_key(1))
    masks = mean.view(400, 5).T  # of two samples: 0, 1 or 2
    assert set(mean.unique().tolist()) == {0.0, 1.0, 2.0}
    for i in range(5):
        for j in range(i):
            assert not torch.equal(masks[i], masks[j])
    for g, state in zip((*generators[:2], default), states, strict=True):
        assert torch.equal(g.get_state(), state)
    for g in generators[:4]:
        g.manual_seed(99)  # what they were at does not matter
    again = predict(model, x, 2, make_key(1))
    assert_same_bits(again[0], mean)
    assert_same_bits(again[1], std)
    assert not torch.equal(predict(model, x, 2, make_key(2))[0], mean)


def test_predict_puts_generators_back_where_the_model_raises():
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(dropout_ext.Dropout(generator=generator), nn.Linear(3, 3))
    states = generator.get_state(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mat1"):
        predict(model, torch.ones(1, 8), 2, make_key())
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_predict_of_complex_outputs():
    x = random_tensor((1, 50), torch.complex64)
    mean, std = predict(nn.Sequential(dropout_ext.Dropout()), x, 500, make_key())
    assert mean.dtype == torch.complex64 and std.dtype == torch.float32
    kept = (mean / x).real / 2  # the share of draws that kept it
    expected = (kept * (1 - kept) * 500 / 499).sqrt() * 2 * x.abs()
    torch.testing.assert_close(std, expected, rtol=1e-3, atol=1e-4)


def test_predict_in_parts():
    model, x = Drops(), torch.ones(3, 8)
    predict(model, x, 5, make_key(), batch=2)
    assert model.rows == [6, 6, 3]
    whole = predict(Drops(), x, 8, make_key())
    model = Drops(limit=7)  # 24 and 12 rows fail
    halved = predict(model, x, 8, make_key())
    assert model.rows == [24, 12, 6, 6, 6, 6]
    assert_same_bits(halved[0], predict(Drops(), x, 8, make_key(), batch=2)[0])
    assert not torch.equal(halved[0], whole[0])
    with pytest.raises(torch.OutOfMemoryError):
        predict(Drops(limit=7), x, 8, batch=4)
    with pytest.raises(torch.OutOfMemoryError):
        predict(Drops(limit=2), x, 8)


def test_predict_with_functional_dropout():
    class Functional(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    x = torch.ones(2, 30)
    assert predict(Functional(), x, 4)[1].max() == 0
    assert predict(Functional(), x, 4, also=(Functional,))[1].max() > 0


def test_predict_computes_16_bit_types_in_float32():
    x = torch.full((1, 4), 256.0, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Dropout(0.5))
    mean, std = predict(model, x, 1001, make_key())
    expected = predict(model, x.float(), 1001, make_key())
    assert mean.dtype == std.dtype == torch.bfloat16
    assert torch.allclose(mean.float(), expected[0], rtol=2**-8)
    assert torch.allclose(std.float(), expected[1], rtol=2**-8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], 2), TypeError, "'x' must be Tensor, not list"),
        ((torch.ones(()), 2), ValueError, "'x' has 0 dimensions"),
        ((torch.ones(2), 2.0), TypeError, "'samples' must be int, not float"),
        ((torch.ones(2), 1), ValueError, "'samples' is 1, but accepted are integers from 2"),
        ((torch.ones(2), 2, [1, 2]), TypeError, "'key' must be a Tensor .* not list"),
        (
            (torch.ones(2), 2, torch.ones(2)),
            TypeError,
            "'key' has dtype torch.float32",
        ),
        (
            (torch.ones(2), 2, torch.ones(2, 2, dtype=torch.int64)),
            ValueError,
            r"'key' has shape \(2, 2\), but accepted is \(2,\)",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=r"^predict\(\): argument " + message):
        predict(nn.Dropout(), *arguments)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"monte_carlo\(\): argument 'model' .* not function"):
        predict(lambda x: x, torch.ones(2), 2)
    with pytest.raises(TypeError, match="must return a Tensor, not tuple"):
        predict(nn.LSTM(2, 2), torch.ones(3, 2), 2)
    with pytest.raises(ValueError, match=r"returned shape \(16,\) for 2 rows"):
        predict(nn.Sequential(nn.Dropout(), nn.Flatten(0)), torch.ones(1, 8), 2)
    for dtype in (torch.int64, torch.bool):
        model = nn.Dropout()
        model.register_forward_hook(lambda module, args, y, dtype=dtype: y.to(dtype))
        with pytest.raises(TypeError, match=f"'model' returned dtype {dtype}, but accepted are"):
            predict(model, torch.ones(2), 2)
    with pytest.raises(ValueError, match="'batch' is 0, but accepted are integers from 1"):
        predict(nn.Dropout(), torch.ones(2), 2, batch=0)
