"""Two processes over gloo: DDP, FSDP2, keys per rank, and DTensor."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_same_bits, make_key, random_tensor
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.nn.parallel import DistributedDataParallel

import dropout_ext
from dropout_ext import _dtensor
from dropout_ext import _reference as reference
from dropout_ext import functional as F

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


WHOLE = (7, 5, 9)  # no dimension is a multiple of WORLD
PLACEMENTS = {
    "rows": Shard(0),
    "columns": Shard(2),
    "replicated": Replicate(),
    "partial": Partial(),
}


def like(x, tensor):
    """`tensor`, split along dimension 0 where x is a DTensor."""
    if not isinstance(x, DTensor):
        return tensor
    return DTensor.from_local(
        tensor.chunk(WORLD)[dist.get_rank()], x.device_mesh, [Shard(0)],
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


FUNCTIONS = {
    "dropout": lambda x: dropout_ext.dropout(x, 0.3, key=make_key()),
    "module": lambda x: dropout_ext.Dropout(0.3)(x, key=make_key()),
    "in place": lambda x: dropout_ext.dropout(x + 0, 0.3, inplace=True, key=make_key()),
    "a key per slice": lambda x: dropout_ext.dropout(
        x, 0.3, key=dropout_ext.split(make_key(), WHOLE[0])
    ),
    "broadcast_dims": lambda x: dropout_ext.dropout(x, 0.3, key=make_key(), broadcast_dims=(1,)),
    "part of a larger one": lambda x: dropout_ext.dropout(
        x, 0.3, key=make_key(), mask_strides=(100, 10, 1), mask_offset=3
    ),
    "dropout1d": lambda x: F.dropout1d(x, 0.3, key=make_key()),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, True, key=make_key()),
    "drop_path": lambda x: F.drop_path(x, 0.3, True, key=make_key()),
    "locked_dropout": lambda x: F.locked_dropout(x, 0.3, key=make_key()),
    "all dropped": lambda x: dropout_ext.dropout(x, 1.0),
    "sharded keys": lambda x: dropout_ext.dropout(
        x, 0.3, key=like(x, dropout_ext.split(make_key(), WHOLE[0]))
    ),
    "of a slice": lambda x: dropout_ext.dropout(x[:, :, :4], 0.3, key=make_key()),
    "drawn": lambda x: dropout_ext.dropout(x, 0.3),
    "drawn from a generator": lambda x: dropout_ext.dropout(
        x, 0.3, generator=torch.Generator().manual_seed(9)
    ),
}


COMPILED = ("dropout", "drawn", "in place", "a key per slice", "of a slice")
OF_SHARDS = [
    (placement, what)
    for placement in PLACEMENTS
    for what in FUNCTIONS
    if (placement, what) != ("partial", "in place")  # an error
]


def of_whole(function, x):
    """Output and gradient."""
    x = x.detach().requires_grad_()
    y = function(x)
    (y * y).sum().backward()
    return y.detach(), x.grad


def of_shards(mesh, rank):
    results = {}
    for name, placement in PLACEMENTS.items():
        if name == "partial":
            x = DTensor.from_local(random_tensor(WHOLE) / WORLD, mesh, [placement])
        else:
            x = distribute_tensor(random_tensor(WHOLE), mesh, [placement])
        for what, function in FUNCTIONS.items():
            if (name, what) not in OF_SHARDS:
                continue
            torch.manual_seed(20 + rank)  # the first rank's counts
            y, grad = of_whole(function, x)
            same = name == "partial" or y.shape != x.shape or y.placements == x.placements
            results[name, what] = same, y.full_tensor(), grad.full_tensor()
    x = distribute_tensor(random_tensor(WHOLE), mesh, [Shard(0)])
    for what in COMPILED:
        torch.manual_seed(20 + rank)
        compiled = torch.compile(FUNCTIONS[what], fullgraph=True, backend="aot_eager")
        results["compiled", what] = compiled(x).full_tensor()
    return results


def worker(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = of_shards(init_device_mesh("cpu", (WORLD,)), rank)
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


@pytest.mark.parametrize(("placement", "what"), OF_SHARDS)
def test_shards_have_the_mask_of_the_whole(results, placement, what):
    x = random_tensor(WHOLE)
    if placement == "partial":
        x = x / WORLD * WORLD
    torch.manual_seed(20)
    expected, grad = of_whole(FUNCTIONS[what], x)
    for rank in range(WORLD):
        same, y, y_grad = results[rank][placement, what]
        assert same, "placements"
        assert_same_bits(y, expected)
        assert_same_bits(y_grad, grad)


@pytest.mark.parametrize("what", COMPILED)
def test_compiled_shards(results, what):
    torch.manual_seed(20)
    expected = FUNCTIONS[what](random_tensor(WHOLE))
    for rank in range(WORLD):
        assert_same_bits(results[rank]["compiled", what], expected)


@pytest.fixture
def fake_mesh():
    """Makes a (2, 3) mesh as one of its ranks sees it, without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
        return init_device_mesh("cpu", (2, 3))

    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", range(6))
def test_where_a_shard_begins(fake_mesh, rank):
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = fake_mesh(rank)
    for placements in ((Shard(0), Shard(0)), (Shard(1), Shard(0)), (Replicate(), Shard(1))):
        for shape in ((13, 7), (6, 1), (2, 2)):
            x = distribute_tensor(torch.zeros(shape), mesh, placements)
            _, begin, size = _dtensor.localize(x)
            expected, at = compute_local_shape_and_global_offset(shape, mesh, placements)
            assert tuple(size) == expected == x.to_local().shape
            assert 0 in size or tuple(begin) == at


def test_layout_of_a_shard(fake_mesh):
    mesh = fake_mesh(0)
    x = distribute_tensor(random_tensor((12, 8, 5)), mesh, (Shard(0), Replicate()))
    for view in (x, x.transpose(1, 2), x[:, :3], x[:, ::2], x.transpose(0, 2)):
        y = dropout_ext.dropout(view, 0.3, key=make_key())
        assert y.stride() == torch.empty_like(view).stride()
        assert y.to_local().stride() == torch.empty_like(view.to_local()).stride()


def test_a_rank_outside_of_the_mesh(fake_mesh):
    fake_mesh(4)
    x = distribute_tensor(torch.ones(6, 4), DeviceMesh("cpu", [0, 1]), (Shard(0),))
    state = torch.get_rng_state()
    assert dropout_ext.dropout(x, 0.3).shape == x.shape
    assert torch.equal(torch.get_rng_state(), state)


def test_dtensor_errors(fake_mesh):
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = fake_mesh(0)
    x = distribute_tensor(torch.ones(12, 3), mesh, (Shard(0), Replicate()))
    keys = dropout_ext.split(make_key(), 6)  # as many as the local shard has slices
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'key' has shape \[6, 2\], but accepted .* \(12, 2\)"):
        dropout_ext.dropout(x, 0.3, key=keys)
    with pytest.raises(ValueError, match=r"'key' has shape \[12, 3\], but accepted .* \(12, 2\)"):
        dropout_ext.dropout(x, 0.3, key=torch.zeros(12, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"'key' has dtype torch\.float64"):
        dropout_ext.dropout(x, 0.3, key=torch.zeros(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="'key' must be"):
        dropout_ext.dropout(x, 0.3, key=7)
    with pytest.raises(TypeError, match=r"'generator' must be torch\.Generator, not int"):
        dropout_ext.dropout(x, 0.3, generator=7)
    with pytest.raises(TypeError, match=r"'input' has dtype torch\.int64"):
        dropout_ext.dropout(x.long(), 0.3)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        dropout_ext.dropout(x.clone().requires_grad_(), 0.3, inplace=True)
    local = torch.ones(2, 3)
    strided = DTensor.from_local(local, mesh, (_StridedShard(0, split_factor=3), Shard(0)))
    with pytest.raises(NotImplementedError, match=r"placement .*redistribute"):
        dropout_ext.dropout(strided, 0.3)
    partial = DTensor.from_local(local, mesh, (Partial(), Replicate()))
    with pytest.raises(ValueError, match=r"'inplace' is True, but .*Partial.*redistribute"):
        dropout_ext.dropout(partial, 0.3, inplace=True)
    short = DTensor.from_local(local, mesh, (Shard(0), Replicate()), shape=(7, 3), stride=(3, 1))
    with pytest.raises(ValueError, match=r"a shard of shape \(2, 3\), but .* \(4, 3\)"):
        dropout_ext.dropout(short, 0.3, key=make_key())
    assert torch.equal(torch.get_rng_state(), state)
    assert dropout_ext.dropout(strided, 0.3, training=False) is strided


def test_a_subclass_of_dtensor(fake_mesh):
    class Sub(DTensor):
        pass

    mesh = fake_mesh(0)
    x = distribute_tensor(torch.ones(12, 3), mesh, (Shard(0), Replicate()))
    expected = dropout_ext.dropout(x, 0.3, key=make_key()).to_local()
    sub = Sub(x.to_local(), x._spec, requires_grad=False)
    assert_same_bits(dropout_ext.dropout(sub, 0.3, key=make_key()).to_local(), expected)
