"""The CUDA kernels on a GPU: the bits are the CPU's, whatever the layout, stream or graph."""

import gc

import pytest
import torch
from family import ALPHA, MODULES
from helpers import (
    ALL_DTYPES,
    LAYOUTS,
    SHARED_LAYOUTS,
    assert_same_bits,
    bits,
    broadcast_strides,
    make_key,
    random_tensor,
    run,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dropout_ext
from dropout_ext import _C
from dropout_ext import _reference as reference
from tools import gpu_check

pytestmark = pytest.mark.cuda

SIZES = (1, 7, 8, 9, 255, 256, 1023, 1024, 1025, 4099, 100003, 1 << 20)
N = 10_000


@pytest.fixture
def generator():
    """The default generator of the current device, at seed 123, offset 0."""
    torch.cuda.init()  # until then, default_generators is empty
    torch.cuda.manual_seed(123)
    yield torch.cuda.default_generators[torch.cuda.current_device()]
    torch.cuda.manual_seed(0)


@pytest.fixture
def geometry():
    yield _C._force_cuda_geometry
    _C._force_cuda_geometry(0, 0, False)


def forward_backward(x, key, p=0.3, **kwargs):
    """Output, and gradient for a gradient of the same values and layout as x."""
    leaf = x.detach().requires_grad_()
    y = dropout_ext.dropout(leaf, p, key=key, **kwargs)
    (gradient,) = torch.autograd.grad(y, leaf, x)
    return y.detach(), gradient


def assert_as_on_cpu(x, key, on_cuda=None, **kwargs):
    on_cuda = x.cuda() if on_cuda is None else on_cuda
    results = forward_backward(on_cuda, key, **kwargs)
    for actual, expected in zip(results, forward_backward(x, key, **kwargs), strict=True):
        assert actual.is_cuda
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sizes(dtype, key):
    for size in SIZES:
        assert_as_on_cpu(random_tensor((size,), dtype, special=True), key)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_alignments(dtype, key):
    for size in (1, 8, 1025, 20001):
        base = random_tensor((size + 17,), dtype, special=True)
        on_cuda = base.cuda()
        for begin in range(1, 17):
            x = base[begin : begin + size]
            assert_as_on_cpu(x, key, on_cuda[begin : begin + size])


def lay_out(layout, x):
    with torch.device("cuda"):
        return {**LAYOUTS, **SHARED_LAYOUTS}[layout](x.cuda())


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED_LAYOUTS])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_layouts(dtype, layout, key):
    shape = (6, 5, 33, 20)
    x = random_tensor(shape, dtype, special=True)
    host, device = {**LAYOUTS, **SHARED_LAYOUTS}[layout](x), lay_out(layout, x)
    assert device.is_cuda
    masks = [(), *(broadcast_strides(shape, dims) for dims in ((2, 3), (1, 2, 3), (1,), (0, 3)))]
    masks.append((50000, 1200, 100, 1))  # a shard
    for mask_offset, strides in enumerate(masks):
        args = (0.4, 1 / 0.6, strides, mask_offset)
        out = torch.ops.dropout_ext.apply(device, key, *args)
        assert_same_bits(out, torch.ops.dropout_ext.apply(host, key, *args))
        assert out.stride() == torch.empty_like(device).stride()
        if layout in LAYOUTS:
            written = lay_out(layout, x)
            torch.ops.dropout_ext.apply_(written, key, *args)
            assert_same_bits(written, out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_gradient(layout, key):
    x = lay_out(layout, random_tensor((6, 5, 33, 20))).requires_grad_()
    y = dropout_ext.dropout(x, 0.4, key=key)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    keep = dropout_ext.keep_mask(x.shape, 0.4, key)
    assert_same_bits(gradient, keep * torch.tensor(1 / 0.6))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, layout, key):
    make, shape = MODULES[name]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = random_tensor(shape, dtype, special=True)
        results = []
        for leaf in (LAYOUTS[layout](x), lay_out(layout, x)):
            leaf.requires_grad_()
            y = make(0.4)(leaf, key=key)
            (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            written = make(0.4, inplace=True) if name not in ALPHA else make(0.4)
            results.append((y, gradient, written(leaf.detach().clone(), key=key)))
        for host, device in zip(*results, strict=True):
            assert device.is_cuda
            assert_same_bits(device, host)


def test_keys_of_either_device(key):
    x = random_tensor((N,)).cuda()
    expected = dropout_ext.dropout(x.cpu(), 0.5, key=key)
    for k in (key, key.cuda(), key.view(torch.int64), dropout_ext.key(42, device="cuda")):
        assert_same_bits(dropout_ext.dropout(x, 0.5, key=k), expected)


# 240 keys travel in one launch's arguments.
@pytest.mark.parametrize("n", [1, 3, 240, 1000])
def test_keys_per_slice(n, key):
    keys = dropout_ext.split(key, n)
    x = random_tensor((n, 7, 37))
    expected = dropout_ext.dropout(x, 0.5, key=keys)
    for k in (keys, keys.cuda()):
        assert_same_bits(dropout_ext.dropout(x.cuda(), 0.5, key=k), expected)
    assert torch.equal(dropout_ext.split(key.cuda(), n).cpu(), keys)


def test_vmap(key):
    keys = dropout_ext.split(key, 5)
    x = random_tensor((5, 300))

    def f(x, key):
        return dropout_ext.dropout(x, 0.5, key=key)

    expected = torch.stack([f(row, k) for row, k in zip(x, keys, strict=True)])
    assert_same_bits(torch.func.vmap(f)(x.cuda(), keys.cuda()), expected)


@pytest.mark.parametrize("p", [0.0, 1e-7, 0.1, 0.5, 1.0])
def test_keep_mask(p):
    key = make_key(2**63 + 5, 2**40 + 3)
    for mask_offset in (0, 3, 2**35 + 5, 2**63 - 5):
        kwargs = {"mask_strides": (200, 1), "mask_offset": mask_offset}
        for k in (key, key.cuda()):
            mask = dropout_ext.keep_mask((50, 133), p, k, device="cuda", **kwargs)
            expected = reference.keep_mask(key, p, (50, 133), (200, 1), mask_offset)
            assert torch.equal(mask.cpu(), expected)


@pytest.mark.parametrize("p", [0.0, 1e-7, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (9,), (128,), (5003,), (7, 256), (7, 24), (5, 9)])
def test_keep_bits(shape, p):
    """In one kernel or two, as bytes have their positions in one run of the mask."""
    key = make_key(2**63 + 5, 2**40 + 3)
    per_slice = reference.split(key, shape[0])
    pitch = (*shape[1:], 1) if len(shape) == 1 else (shape[1] + 8, 1)
    for keys in (key, per_slice) if shape[0] else (key,):
        for strides in ((), pitch, tuple(reversed(pitch))):
            for mask_offset in (0, 8, 3, 2**35 - 40, -9):
                args = (p, shape, strides, mask_offset)
                expected = reference.pack(reference.keep_mask(keys, *args).to(torch.uint8))
                for k in (keys, keys.cuda()):
                    bits = torch.ops.dropout_ext.keep_bits(k, *args, device="cuda")
                    assert_same_bits(bits, expected)


def test_geometry_changes_no_bits(geometry, key):
    tensors = [
        lay_out(layout, random_tensor((4, 6, 50, 21), dtype))
        for layout in ("contiguous", "channels_last", "sliced", "misaligned")
        for dtype in (torch.float32, torch.bfloat16, torch.complex128)
    ]
    strides = broadcast_strides((4, 6, 50, 21), (2, 3))

    def outputs():
        return [
            torch.ops.dropout_ext.apply(x, key, 0.5, 2.0, s, 5)
            for x in tensors
            for s in ((), strides)
        ]

    expected = outputs()
    for blocks in (1, 3, 0):
        for threads in (32, 96, 256):
            for wide in (False, True):
                geometry(blocks, threads, wide)
                for actual, first in zip(outputs(), expected, strict=True):
                    assert_same_bits(actual, first)


def test_every_kernel(geometry):
    """What compute-sanitizer is shown: every path, epilogue, dtype, alignment and width of the
    positions."""
    results = zip(gpu_check.every_kernel("cuda"), gpu_check.every_kernel("cpu"), strict=True)
    for (what, actual), (_, expected) in results:
        assert torch.equal(bits(actual), bits(expected)), what
    assert_same_bits(*gpu_check.captured_draw())


@pytest.mark.parametrize("name", gpu_check.WORKLOADS)
def test_workloads_end_well(name):
    """In a process of its own, as compute-sanitizer runs it."""
    output = run(*gpu_check.workload_command(name), **gpu_check.WORKLOADS[name])
    assert output.endswith(f"{gpu_check.WORKLOAD_DONE}\n")


def test_drawn_keys_count_up(generator):
    x = torch.ones(N, device="cuda")
    for call in range(3):
        y = dropout_ext.dropout(x, 0.5)
        assert generator.get_offset() == 4 * (call + 1)
        expected = dropout_ext.dropout(x, 0.5, key=dropout_ext.key(123, call))
        assert_same_bits(y, expected)
    torch.cuda.manual_seed(123)
    assert_same_bits(
        dropout_ext.dropout(x, 0.5), dropout_ext.dropout(x, 0.5, key=dropout_ext.key(123))
    )


def test_size_and_dtype_draw_alike(generator):
    for x in (torch.ones(3, dtype=torch.bfloat16), torch.ones(1 << 20, dtype=torch.float64)):
        generator.manual_seed(5)
        y = dropout_ext.dropout(x.cuda(), 0.5)
        assert generator.get_offset() == 4
        assert_same_bits(y, dropout_ext.dropout(x, 0.5, key=dropout_ext.key(5)))


def test_what_draws_nothing(generator):
    x = torch.ones(10, device="cuda")
    dropout_ext.dropout(x, 0.0)
    dropout_ext.dropout(x, 1.0)
    dropout_ext.dropout(x, 0.5, training=False)
    dropout_ext.dropout(x[:0], 0.5)
    dropout_ext.dropout(x, 0.5, key=dropout_ext.key(1))
    assert generator.get_offset() == 0


def test_native_operators_beside(generator):
    before = torch.rand(100, device="cuda")
    offset = generator.get_offset()
    dropout_ext.dropout(torch.ones(N, device="cuda"), 0.5)
    after = torch.rand(100, device="cuda")
    generator.manual_seed(123)
    assert torch.equal(torch.rand(100, device="cuda"), before)
    generator.set_offset(offset + 4)
    assert torch.equal(torch.rand(100, device="cuda"), after)


def test_own_generator():
    x = torch.ones(N, device="cuda")
    generator = torch.Generator("cuda").manual_seed(9)
    default = torch.cuda.default_generators[0].get_offset()
    y = dropout_ext.Dropout(0.5, generator=generator)(x)
    assert_same_bits(y, dropout_ext.dropout(x, 0.5, key=dropout_ext.key(9)))
    assert (generator.get_offset(), torch.cuda.default_generators[0].get_offset()) == (4, default)


def test_cpu_generator_for_a_cuda_tensor():
    x = random_tensor((N,))
    generator = torch.Generator().manual_seed(9)
    expected = dropout_ext.dropout(x, 0.5, generator=generator)
    actual = dropout_ext.dropout(x.cuda(), 0.5, generator=generator.manual_seed(9))
    assert_same_bits(actual, expected)


def test_rng_state_replays():
    x = torch.ones(N, device="cuda")
    state = torch.cuda.get_rng_state()
    first = dropout_ext.dropout(x, 0.5)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        dropout_ext.dropout(x, 0.5)
    second = dropout_ext.dropout(x, 0.5)
    torch.cuda.set_rng_state(state)
    assert torch.equal(dropout_ext.dropout(x, 0.5), first)
    assert torch.equal(dropout_ext.dropout(x, 0.5), second)
    assert not torch.equal(first, second)


def warm_up(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def capture(run):
    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def test_graph_draws_a_fresh_key_for_every_replay(generator):
    x = random_tensor((N,)).cuda().requires_grad_()

    def run():
        first, second = dropout_ext.dropout(x, 0.5), dropout_ext.dropout(x, 0.5)
        gradients = torch.autograd.grad([first, second], [x], [x.detach(), torch.zeros_like(x)])
        return first, second, gradients[0]

    graph, (first, second, gradient) = capture(run)
    generator.manual_seed(77)
    for replay in range(3):
        graph.replay()
        assert generator.get_offset() == 8 * (replay + 1)
        for j, y in enumerate((first, second)):
            key = dropout_ext.key(77, 2 * replay + j)
            assert_same_bits(y, dropout_ext.dropout(x, 0.5, key=key))
        # The captured backward reads the key of this replay's forward.
        assert_same_bits(gradient + 0, first.detach() + 0)


def test_graph_with_explicit_keys():
    x = random_tensor((6, 2000)).cuda()
    on_host, on_device = make_key(1), make_key(1).cuda()
    per_slice = reference.split(make_key(3), 6)

    def run():
        return [dropout_ext.dropout(x, 0.5, key=k) for k in (on_host, on_device, per_slice)]

    graph, (constant, fresh, slices) = capture(run)
    on_host.copy_(make_key(8))  # too late: a key on the CPU is a constant of the graph
    for seed in (5, 6):
        on_device.copy_(make_key(seed))
        graph.replay()
        assert_same_bits(constant, dropout_ext.dropout(x, 0.5, key=make_key(1)))
        assert_same_bits(fresh, dropout_ext.dropout(x, 0.5, key=make_key(seed)))
        assert_same_bits(slices, dropout_ext.dropout(x, 0.5, key=per_slice))


def test_graphed_callables():
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64, bias=False, device="cuda"), dropout_ext.Dropout(0.5)
    )
    weight = model[0].weight
    sample = torch.randn(32, 64, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(model, (sample,))
    masks = []
    for _ in range(3):
        x = torch.randn(32, 64, device="cuda", requires_grad=True)
        y = graphed(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        mask = y.detach() != 0
        torch.testing.assert_close(y.detach(), 2 * mask * (x @ weight.T).detach())
        torch.testing.assert_close(gradient, (2.0 * mask) @ weight.detach())
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_runs_on_the_current_stream(key):
    x = torch.zeros(1 << 20, device="cuda")
    per_slice = dropout_ext.split(key, 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: on another stream, ones would come too late
        x.fill_(1)
        y = dropout_ext.dropout(x, 0.5, key=key)
        z = dropout_ext.dropout(x.view(4, -1), 0.5, key=per_slice)
    stream.synchronize()
    ones = torch.ones(1 << 20)
    assert_same_bits(y, dropout_ext.dropout(ones, 0.5, key=key))
    assert_same_bits(z, dropout_ext.dropout(ones.view(4, -1), 0.5, key=per_slice))


def test_no_synchronisation(key):
    x = random_tensor((20, 1000)).cuda().requires_grad_()
    gradient = torch.ones_like(x)
    keys = [None, key, key.cuda(), dropout_ext.split(key, 20)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in keys:
            y = dropout_ext.dropout(x, 0.5, key=k)
            torch.autograd.grad(y, x, gradient)
            dropout_ext.functional.alpha_dropout(x.detach(), 0.5, True, True, key=k)
        dropout_ext.keep_mask((100,), 0.5, key, device="cuda")
        torch.ops.dropout_ext.keep_bits(key, 0.5, (100,), (), 0, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak(run):
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    del results
    return most


@pytest.mark.parametrize("inplace", [False, True])
def test_memory_is_that_of_a_multiplication(inplace):
    x = torch.randn(1 << 22, device="cuda", requires_grad=True)
    gradient = torch.ones_like(x)

    def ours():
        y = dropout_ext.dropout(x * 1.0 if inplace else x, 0.5, inplace=inplace)
        return y, torch.autograd.grad(y, x, gradient)

    def floor():
        y = (x * 1.0).mul_(2.0) if inplace else x * 2.0
        return y, torch.autograd.grad(y, x, gradient)

    ours(), floor()
    assert peak(ours) <= peak(floor) + 1024


def needs_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"{free / 1e9:.0f} GB of device memory free, {gigabytes} needed")


def test_more_than_2_to_the_31_elements(key):
    needs_memory(5)
    n = 2**31 + 5003  # more than a window beyond 2^31
    x = torch.ones(n, dtype=torch.float16, device="cuda")
    torch.ops.dropout_ext.apply_(x, key, 0.5, 2.0, (), 3)
    for begin in (0, 2**30, 2**31 - 4096, n - 8192):
        ones = torch.ones(8192, dtype=torch.float16)
        expected = torch.ops.dropout_ext.apply(ones, key, 0.5, 2.0, (), begin + 3)
        assert_same_bits(x[begin : begin + 8192], expected)


def test_masks_of_more_than_2_to_the_32_elements(key):
    needs_memory(6)
    n = 2**32 + 5000
    mask = dropout_ext.keep_mask((n,), 0.5, key, device="cuda")
    for begin in (0, 2**31 - 4096, 2**32 - 4096, n - 8192):
        expected = reference.keep_mask(key, 0.5, (8192,), (1,), begin)
        assert torch.equal(mask[begin : begin + 8192].cpu(), expected)
    del mask
    bits = torch.ops.dropout_ext.keep_bits(key, 0.5, (n,), (), 0, device="cuda")
    for begin in (0, 2**31 - 4096, 2**32 - 4096, n // 8 * 8 - 8192):
        expected = reference.keep_mask(key, 0.5, (8192,), (1,), begin)
        packed = reference.pack(expected.to(torch.uint8))
        assert torch.equal(bits[begin // 8 : begin // 8 + 1024].cpu(), packed)
    # Rows and columns: an odd pitch, so that nothing merges, and positions past 2^32.
    shape = (65_600, 65_601)
    mask = dropout_ext.keep_mask(shape, 0.5, key, device="cuda", mask_strides=(70_000, 1))
    for row in (0, 30_000, 65_599):
        expected = reference.keep_mask(key, 0.5, (65_601,), (1,), 70_000 * row)
        assert torch.equal(mask[row].cpu(), expected)


def test_nothing_is_kept():
    x = torch.full((1000,), torch.inf, device="cuda")
    for dtype in ALL_DTYPES:
        y = torch.ops.dropout_ext.apply(x.to(dtype), make_key(), 1.0, torch.inf, (), 0)
        assert_same_bits(y, torch.zeros(1000, dtype=dtype))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current(key):
    x = random_tensor((N,))
    expected = dropout_ext.dropout(x, 0.5, key=key)
    with torch.cuda.device(0):
        other = x.to("cuda:1")
        assert_same_bits(dropout_ext.dropout(other, 0.5, key=key), expected)
        generator = torch.cuda.default_generators[1]
        generator.manual_seed(3)
        y = dropout_ext.dropout(other, 0.5)
        assert y.device == other.device and generator.get_offset() == 4
        assert_same_bits(y, dropout_ext.dropout(x, 0.5, key=dropout_ext.key(3)))
        with pytest.raises(ValueError, match="key"):
            dropout_ext.dropout(other, 0.5, key=key.to("cuda:0"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_generator_of_another_gpu():
    x = torch.ones(3, 4, device="cuda:0", requires_grad=True)
    generator = torch.Generator("cuda:1")

    def f(x):
        return dropout_ext.dropout(x, 0.5, generator=generator)

    vmapped = torch.func.vmap(f, randomness="different")
    modules = [module(0.5, generator=generator) for module in (
        dropout_ext.Dropout, dropout_ext.DropPath, dropout_ext.AlphaDropout
    )]  # fmt: skip
    for call in (f, vmapped, *modules):
        with pytest.raises(ValueError, match=r"'generator' is on cuda:1, .*cuda:0"):
            call(x)
    with pytest.raises(ValueError, match=r"'generator' is on cuda:1, .*cuda:0"):
        dropout_ext.dropout(x.detach(), 0.5, inplace=True, generator=generator)
    assert generator.get_offset() == 0
    # One of the very device, whichever is the current one.
    y = f(x.detach().to("cuda:1"))
    assert y.device == generator.device and generator.get_offset() == 4


def test_devices_that_do_not_go_together(key):
    x = torch.ones(4)
    with pytest.raises(ValueError, match="key"):
        dropout_ext.dropout(x, 0.5, key=key.cuda())
    with pytest.raises(ValueError, match="generator"):
        dropout_ext.dropout(x, 0.5, generator=torch.Generator("cuda"))


def test_float8():
    x = torch.ones(16, device="cuda").to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="float8"):
        dropout_ext.dropout(x, 0.5)


def test_in_place_checks(key):
    leaf = torch.ones(4, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        dropout_ext.dropout(leaf, 0.5, inplace=True, key=key)
    with pytest.raises(RuntimeError):
        dropout_ext.dropout(torch.ones(1, device="cuda").expand(4), 0.5, inplace=True, key=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, key):
    layer = torch.nn.Linear(64, 64, device="cuda")
    x = torch.randn(8, 64, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        assert dropout_ext.dropout(x, 0.5, key=key).dtype == torch.float32
        hidden = layer(x)
        y = dropout_ext.Dropout(0.5)(hidden, key=key)
    assert hidden.dtype == y.dtype == dtype
    assert_same_bits(y, dropout_ext.dropout(hidden.detach().cpu(), 0.5, key=key))


def test_fake_tensors(key):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, 4, device="cuda", dtype=torch.bfloat16)
        for k in (None, key):
            y = dropout_ext.dropout(x, 0.5, key=k)
            assert isinstance(y, FakeTensor)
            assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")


def test_gradcheck(key):
    x = torch.randn(40, dtype=torch.float64, device="cuda", requires_grad=True)

    def f(x):
        return dropout_ext.dropout(x, 0.5, key=key)

    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x,))
