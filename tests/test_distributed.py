"""Two processes over gloo: DDP, FSDP2, and keys per rank."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_same_bits, make_key, random_tensor
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import dropout_ext
from dropout_ext import _reference as reference

WORLD = 2
BATCH, WIDTH = 6, 40


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, WIDTH)
        self.dropout = dropout_ext.Dropout(0.5)
        self.last = nn.Linear(WIDTH, 3)
        self.mask = None

    def forward(self, x, key=None):
        h = self.first(x)
        y = self.dropout(h, key=key)
        self.mask = y.detach() != 0
        return self.last(y)


def data(rank):
    return random_tensor((BATCH, 5), seed=10 + rank)


def train(model, x, key=None):
    """Gradients of one step, and the mask that it used."""
    model.zero_grad()
    model(x, key).square().mean().backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = [p.grad for p in inner.parameters()]
    gradients = [getattr(g, "full_tensor", lambda g=g: g)().clone() for g in gradients]
    return gradients, inner.mask.clone()


def wrap(kind):
    if kind == "ddp":
        return DistributedDataParallel(Model())
    mesh = init_device_mesh("cpu", (WORLD,))
    model = Model()
    fully_shard(model.last, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = {}
    for kind in ("ddp", "fsdp2"):
        model = wrap(kind)
        torch.manual_seed(1)
        results[kind, "seeded alike"] = train(model, data(rank))
        key = dropout_ext.fold_in(make_key(), rank)
        results[kind, "a key per rank"] = train(model, data(rank), key)
        results[kind, "one key"] = train(model, data(rank), make_key())
        inner = model.module if kind == "ddp" else model
        inner.eval()
        results[kind, "eval"] = model(data(rank)).detach()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def by_hand(masks):
    """The mean over the ranks of each one's gradients, in plain PyTorch."""
    model = Model()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rank, mask in enumerate(masks):
        y = model.last(torch.where(mask, 2 * model.first(data(rank)), 0.0))
        gradients = torch.autograd.grad(y.square().mean(), list(model.parameters()))
        total = [t + g / WORLD for t, g in zip(total, gradients, strict=True)]
    return total


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("how", ["seeded alike", "a key per rank", "one key"])
def test_gradients_synchronise(results, kind, how):
    gradients, masks = zip(*(r[kind, how] for r in results), strict=True)
    for ours, theirs, expected in zip(*gradients, by_hand(masks), strict=True):
        assert_same_bits(ours, theirs)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_masks_of_the_ranks(results, kind):
    def masks(how):
        return [r[kind, how][1] for r in results]

    assert torch.equal(*masks("seeded alike"))
    shape = (BATCH, WIDTH)
    for rank, mask in enumerate(masks("a key per rank")):
        key = reference.fold_in(make_key(), rank)
        assert torch.equal(mask, reference.keep_mask(key, 0.5, shape))
    assert not torch.equal(*masks("a key per rank"))
    for mask in masks("one key"):
        assert torch.equal(mask, reference.keep_mask(make_key(), 0.5, shape))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_eval(results, kind):
    for rank in range(WORLD):
        model = Model()
        expected = model.last(model.first(data(rank))).detach()
        torch.testing.assert_close(results[rank][kind, "eval"], expected)
