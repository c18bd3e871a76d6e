"""Real models, initialised at random: converted ones evaluate alike and train alike."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from test_convert import Operators
from torch import nn

import dropout_ext

VOCABULARY, LENGTH, BATCH = 40, 12, 16
SEEDS, STEPS, TAIL = 6, 12, 4


class EncoderModel(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=p, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids):
        return self.head(self.encoder(self.tokens(ids)))


class LockedLstm(nn.Module):
    """An LSTM language model: one mask for all time steps, of its input and of its output."""

    def __init__(self, p):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.drops = nn.ModuleList(nn.Dropout1d(p) for _ in range(2))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids):
        # Dropout1d of (N, C, T) is what LockedDropout is of (N, T, C).
        x = self._drop(0, self.tokens(ids))
        return self.head(self._drop(1, self.lstm(x)[0]))

    def _drop(self, n, x):
        drop = self.drops[n]
        if isinstance(drop, dropout_ext.LockedDropout):
            return drop(x)
        return drop(x.transpose(1, 2)).transpose(1, 2)


class StochasticDepth(nn.Module):
    """DropPath of plain PyTorch."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1)) >= self.p
        return torch.where(keep, x / (1 - self.p), 0)


class ConvNet(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.block = nn.Conv2d(16, 16, 3, padding=1)
        self.path = StochasticDepth(p)
        self.drop = nn.Dropout2d(p)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * VOCABULARY, VOCABULARY)

    def forward(self, ids):
        x = self.stem(F.one_hot(ids, VOCABULARY).float().unsqueeze(1)).relu()
        x = self.drop(self.norm(x + self.path(self.block(x).relu())))
        return self.head(x.transpose(1, 2).flatten(2))


class Lora(nn.Module):
    """A frozen linear layer with a trained update of low rank, its input dropped."""

    def __init__(self, base, p, rank=8):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.drop = nn.Dropout(p)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.drop(x)))


class LoraModel(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(Lora(nn.Linear(32, 32), p) for _ in range(2))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


def bert(p, attention="sdpa"):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
    )
    config._attn_implementation = attention
    return Logits(transformers.BertForMaskedLM(config))


def gpt2(p, attention="sdpa"):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = attention
    return Logits(transformers.GPT2LMHeadModel(config))


MODELS = {
    "encoder": EncoderModel,
    "bert, sdpa": bert,
    "bert, eager": lambda p: bert(p, "eager"),
    "gpt2, sdpa": gpt2,
    "gpt2, eager": lambda p: gpt2(p, "eager"),
    "lstm, locked": LockedLstm,
    "convolutions": ConvNet,
    "lora": LoraModel,
}


def ours(model):
    """Converted, with our modules for those that torch.nn has no counterpart of."""
    model = dropout_ext.convert(copy.deepcopy(model))
    for module in list(model.modules()):
        if isinstance(module, LockedLstm):
            module.drops = nn.ModuleList(dropout_ext.LockedDropout(drop.p) for drop in module.drops)
        if isinstance(module, ConvNet):
            module.path = dropout_ext.DropPath(module.path.p)
    return model


def batch(step):
    """Tokens, and the labels: each token's successor in a fixed permutation."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    return ids, order[ids]


def train(model, seed):
    """The mean loss of the last steps."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        ids, labels = batch(step)
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-TAIL:]) / TAIL


@pytest.mark.parametrize("name", MODELS)
def test_model(name, threads):
    """Eval to the bit; training losses within 4 standard errors of the difference of two means of 6
    seeds; both below the loss of a guess.
    """
    threads(1)
    torch.manual_seed(0)
    theirs = MODELS[name](0.2)
    mine = ours(theirs)
    ids, _ = batch(0)
    with torch.no_grad():
        expected = theirs.eval()(ids)
        assert_same_bits(mine.eval()(ids), expected)
    mine.train()
    theirs.train()
    with dropout_ext.override(), Operators() as operators:
        mine(ids)
    assert operators.who == "ours"
    losses = {}
    for side, model in (("theirs", theirs), ("ours", mine)):
        with dropout_ext.override() if side == "ours" else torch.enable_grad():
            losses[side] = torch.tensor(
                [train(copy.deepcopy(model), seed) for seed in range(SEEDS)], dtype=torch.float64
            )
    variance = sum(loss.var() / SEEDS for loss in losses.values())
    difference = losses["ours"].mean() - losses["theirs"].mean()
    assert abs(difference) < 4 * variance.sqrt(), losses
    assert losses["ours"].max() < 0.95 * math.log(VOCABULARY)


@pytest.mark.parametrize("name", ["bert, sdpa", "gpt2, sdpa"])
def test_monte_carlo_of_transformers(name):
    """Attention drops by the flag of its module, which `also` keeps on."""
    model = MODELS[name](0.2).eval()
    ids, _ = batch(0)
    mean, std = dropout_ext.monte_carlo.predict(model, ids, 4, dropout_ext.key(0))
    assert mean.shape == std.shape == (BATCH, LENGTH, VOCABULARY)
    assert (std > 0).float().mean() > 0.95
    attention = {m.__class__ for m in model.modules() if "Attention" in type(m).__name__}
    with dropout_ext.monte_carlo(model, also=tuple(attention)):
        dropout_ext.convert(model)
        with Operators() as operators:
            model(ids)
    assert operators.who == "both"


@pytest.mark.slow
def test_compiled_gpt2():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = dropout_ext.convert(gpt2(0.2))
    ids, labels = batch(0)

    def loss(model):
        torch.manual_seed(1)
        model.zero_grad()
        value = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        value.backward()
        return value.detach(), model.get_parameter("model.transformer.h.0.mlp.c_fc.weight").grad

    with dropout_ext.override():
        expected = loss(model)
        model.compile(backend="aot_eager")
        for a, b in zip(loss(model), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
