"""Many threads at once: right masks, no crash, also under ThreadSanitizer."""

import threading

import pytest
import torch
from helpers import HOST_FLAGS, assert_same_bits, compile_native, make_key, random_tensor, run

import dropout_ext
from dropout_ext import _reference as reference

THREADS = 8


def in_threads(work):
    """work(i) in THREADS threads that start together; the first exception is raised here."""
    start = threading.Barrier(THREADS)
    errors = []

    def body(i):
        try:
            start.wait()
            work(i)
        except BaseException as e:
            errors.append(e)

    workers = [threading.Thread(target=body, args=(i,)) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def test_masks_and_gradients():
    module = dropout_ext.Dropout(0.5)
    sizes = [1, 9, 341, 40001]
    keys = [[make_key(i, n) for n in sizes] for i in range(THREADS)]
    inputs = [random_tensor((n,), seed=n) for n in sizes]
    expected = [
        [reference.apply(x, k, 0.5, 2.0) for x, k in zip(inputs, row, strict=True)] for row in keys
    ]

    def work(i):
        for _ in range(20):
            for x, k, y in zip(inputs, keys[i], expected[i], strict=True):
                leaf = x.clone().requires_grad_()
                out = module(leaf, key=k)
                assert_same_bits(out.detach(), y)
                out.backward(x)
                assert_same_bits(leaf.grad, y)
                z = x.clone()
                dropout_ext.dropout(z, inplace=True, key=k)
                assert_same_bits(z, y)

    in_threads(work)


def test_one_backward_through_many_threads(key):
    """Graphs that share their beginning, run backward from every thread."""
    x = random_tensor((1000,)).requires_grad_()
    keys = [reference.fold_in(key, i) for i in range(THREADS)]
    outputs = [dropout_ext.dropout(x, key=k) for k in keys]
    in_threads(lambda i: outputs[i].sum().backward())
    factors = torch.stack([reference.apply(torch.ones(1000), k, 0.5, 2.0) for k in keys])
    torch.testing.assert_close(x.grad, factors.sum(0))


def test_with_intra_op_threads(threads, key):
    """Callers beside at::parallel_for's own threads."""
    threads(2)
    x = random_tensor((300_000,))
    expected = reference.apply(x, key, 0.5, 2.0)

    def work(i):
        for _ in range(5):
            assert_same_bits(dropout_ext.dropout(x, key=key), expected)

    in_threads(work)


@pytest.mark.parametrize("own_generator", [False, True])
def test_draws_are_those_of_one_thread(own_generator):
    """Each draw is two consecutive words of the generator, never words of two draws; of 64 elements
    each, so that two masks are not equal by chance.
    """
    generator = torch.Generator() if own_generator else None
    source = generator or torch.default_generator
    x = torch.ones(64)

    def draw():
        return tuple(dropout_ext.dropout(x, generator=generator).tolist())

    source.manual_seed(0)
    expected = {draw() for _ in range(500 * THREADS)}
    assert len(expected) == 500 * THREADS
    source.manual_seed(0)
    drawn = [[] for _ in range(THREADS)]

    def work(i):
        for _ in range(500):
            drawn[i].append(draw())

    in_threads(work)
    masks = [mask for row in drawn for mask in row]
    assert len(set(masks)) == len(masks)
    assert set(masks) == expected


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    sources = ["dispatch", "plan", "kernel_portable", "kernel_avx2", "kernel_avx512"]
    return compile_native(
        tmp_path_factory.mktemp("native") / "threads",
        ["tests/native/test_threads.cpp", *(f"csrc/cpu/{name}.cpp" for name in sources)],
        [*HOST_FLAGS, "-g", "-fsanitize=thread", "-pthread"],
    )


@pytest.mark.parametrize("variant", dropout_ext.build_info()["cpu_variants"])
def test_thread_sanitizer(sanitized, variant):
    """The native parts: the choice of the variant, ranges of one call, calls on one input."""
    output = run(sanitized, DROPOUT_EXT_CPU_VARIANT=variant, TSAN_OPTIONS="halt_on_error=1")
    assert output == f"{variant} ok\n"


@pytest.mark.cuda
def test_cuda_threads(key):
    """Threads on streams of their own."""
    x = random_tensor((40001,)).cuda()
    expected = reference.apply(x.cpu(), key, 0.5, 2.0)

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                assert_same_bits(dropout_ext.dropout(x, key=key), expected)

    torch.cuda.synchronize()
    in_threads(work)
