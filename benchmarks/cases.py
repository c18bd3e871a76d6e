"""What is timed: cases, their sides as Python statements, and the bars they are held to.

Sides are strings so that one definition serves the timing loop, the check before it and the
comparison of two commits, and so that no wrapper adds to a call of one microsecond.
"""

from dataclasses import dataclass, replace

# nn.Dropout's CPU kernel takes twice as long at p = 0.5, where its branch is hard to predict; the
# less flattering p is the default here.
P = 0.1

Ki, Mi = 2**10, 2**20

# The page faults of a fresh output cost 2 ns per element on either side and hide the kernel; with
# this setting freed memory stays in the process.
RESIDENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592"}

ENVIRONMENTS = {
    "default": {},
    "resident": RESIDENT,
    # PyTorch asks for huge pages for what it allocates on the CPU: a page fault per 2 MiB.
    "hugepages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "avx2": RESIDENT | {"DROPOUT_EXT_CPU_VARIANT": "avx2"},
    "portable": RESIDENT | {"DROPOUT_EXT_CPU_VARIANT": "portable"},
}


@dataclass(frozen=True)
class Side:
    """One contestant: `expr` is evaluated once per call over x, g, p and c = 1 / (1 - p)."""

    name: str
    role: str  # ours, torch, floor or peer
    expr: str
    setup: str = ""
    shape: tuple[int, ...] | None = None  # where it differs from the case's
    threads: int | None = None
    shared: tuple[int, ...] = ()  # dimensions along which the keep mask is the same
    formula: str = "scale"
    reference: str = ""  # in place of the formula: float64, over `keep` and the set-up's names
    optional: bool = False  # left out, with a note, when its set-up fails


@dataclass(frozen=True)
class Bar:
    """A bound on the time per element of side `of` over that of side `over`."""

    of: str
    over: str
    sense: str
    limit: float

    def met(self, figure):
        return figure <= self.limit if self.sense == "<=" else figure >= self.limit

    def __str__(self):
        return f"{self.sense} {self.limit:g}"


@dataclass(frozen=True)
class Case:
    section: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    sides: tuple[Side, ...]
    label: str = ""
    threads: int = 1
    environment: str = "default"
    p: float = P
    bars: tuple[Bar, ...] = ()

    def __str__(self):
        what = self.label or f"{self.op}, {self.dtype}, {size(self.elements)}"
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        p = f", p = {self.p:g}" if self.p != P else ""
        environment = f", {self.environment}" if self.environment != "default" else ""
        return what + threads + p + environment

    @property
    def elements(self):
        return count(self.shape)

    def statement(self, side):
        if self.op == "forward and backward":
            return f"torch.autograd.grad({side.expr}, x, g)"
        return side.expr

    @property
    def needs_grad(self):
        return self.op in ("forward with grad", "forward and backward")

    @property
    def passes(self):
        """How often each element must be read and written."""
        return 2 if self.op == "forward and backward" else 1


def count(shape):
    n = 1
    for extent in shape:
        n *= extent
    return n


def size(n):
    for unit, name in ((2**30, " Gi"), (Mi, " Mi"), (Ki, " Ki")):
        if n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


MODULE = Side("dropout_ext.Dropout", "ours", "m(x)", "m = dropout_ext.Dropout(p)")
FUNCTION = Side("dropout_ext.dropout", "ours", "dropout(x, p)", "from dropout_ext import dropout")
IN_PLACE = Side(
    "dropout_ext.dropout in place",
    "ours",
    "dropout(x, p, True, True)",
    "from dropout_ext import dropout",
)
NN_MODULE = Side("nn.Dropout", "torch", "m(x)", "m = torch.nn.Dropout(p)")
NN_FUNCTION = Side("F.dropout", "torch", "F.dropout(x, p)")
MUL = Side("torch.mul(x, c)", "floor", "torch.mul(x, c)")
MUL_ = Side("x.mul_(c)", "floor", "x.mul_(c)")


def micro(quick):
    sizes = (16, 4 * Ki, Mi, 16 * Mi) if quick else (16, 256, 4 * Ki, 64 * Ki, Mi, 16 * Mi, 64 * Mi)
    for n in sizes:
        # The largest take seconds per call; what a second thread does shows before.
        for threads in (1, 2) if Mi <= n <= (Mi if quick else 16 * Mi) else (1,):
            for dtype in ("float32",) if quick and n > Mi else ("float32", "bfloat16"):
                for op in ("forward", "forward and backward"):
                    yield Case("micro", op, dtype, (n,), (NN_MODULE, MODULE, MUL), threads=threads)


def hugepages(quick):
    for dtype in ("float32", "bfloat16"):
        for op in ("forward", "forward and backward"):
            sides = (NN_MODULE, MODULE, MUL)
            yield Case("hugepages", op, dtype, (16 * Mi,), sides, environment="hugepages")


def against_torch(quick, environment, limit, p=P):
    """Forward in cache against F.dropout, for one CPU variant."""
    sizes = (Mi,) if quick else (64 * Ki, Mi)
    for dtype in ("float32", "bfloat16", "float16"):
        for n in sizes:
            bars = (Bar("F.dropout", FUNCTION.name, ">=", limit),)
            sides = (NN_FUNCTION, FUNCTION, MUL)
            case = Case("bars", "forward", dtype, (n,), sides, environment=environment, bars=bars)
            yield replace(case, p=p)


def from_memory(quick, environment):
    """Forward at sizes beyond the cache, against the multiply, which moves the same bytes."""
    for n in (16 * Mi,) if quick else (16 * Mi, 64 * Mi):
        for threads in (1, 2):
            bars = (Bar(FUNCTION.name, MUL.name, "<=", 1.10),)
            yield Case(
                "bars",
                "forward",
                "float32",
                (n,),
                (FUNCTION, MUL),
                threads=threads,
                environment=environment,
                bars=bars,
            )
            in_place = Case(
                "bars",
                "forward in place",
                "float32",
                (n,),
                (IN_PLACE, MUL_),
                threads=threads,
                environment=environment,
            )
            if threads == 2:
                yield replace(in_place, bars=(Bar(IN_PLACE.name, MUL_.name, "<=", 1.25),))
            else:
                small = replace(IN_PLACE, name="itself in place at 64 Ki", shape=(64 * Ki,))
                bars = (Bar(IN_PLACE.name, small.name, "<=", 1.2),)
                yield replace(in_place, sides=(IN_PLACE, small, MUL_), bars=bars)


def call_path(quick):
    """Small tensors, where the way from Python to the kernel is all there is."""
    for op, limit in (
        ("forward", 0.6),
        ("forward with grad", 0.7),
        ("forward and backward", 1.0),
    ):
        for n in (16, 1024) if quick else (16, 128, 1024):
            bars = (Bar(FUNCTION.name, "F.dropout", "<=", limit),)
            sides = (NN_FUNCTION, FUNCTION, MUL)
            yield Case("bars", op, "float32", (n,), sides, bars=bars)


def bars(quick):
    # A fresh output of 4 MiB may come with page faults, too: hence both allocator settings.
    for environment in ("resident",) if quick else ("default", "resident"):
        for p in (P, 0.5):
            yield from against_torch(quick, environment, 20, p)
        yield Case(
            "bars",
            "forward and backward",
            "float32",
            (Mi,),
            (NN_FUNCTION, FUNCTION, MUL),
            environment=environment,
            bars=(Bar("F.dropout", FUNCTION.name, ">=", 8),),
        )
    one = replace(FUNCTION, name="one thread", threads=1)
    two = replace(FUNCTION, name="two threads", threads=2)
    yield Case(
        "bars",
        "forward",
        "float32",
        (Mi,),
        (one, two),
        label="forward, float32, 1 Mi, two threads against one",
        bars=(Bar(one.name, two.name, ">=", 1.6),),
    )
    yield from call_path(quick)
    for environment in ("resident",) if quick else ("default", "resident"):
        yield from from_memory(quick, environment)
    yield from against_torch(quick, "avx2", 12)
    yield from against_torch(quick, "portable", 3)


def family(quick):
    """The other modules, each against torch.mul on the same tensor and its torch counterpart."""

    def case(name, shape, sides, *bars):
        label = f"{name}, {shape}"
        return Case(
            "family", "forward", "float32", shape, sides, label, environment="resident", bars=bars
        )

    def ours(module, **more):
        return Side(f"dropout_ext.{module}", "ours", "m(x)", f"m = dropout_ext.{module}", **more)

    def torchs(module):
        return Side(f"nn.{module}", "torch", "m(x)", f"m = torch.nn.{module}")

    image = (32, 64, 56, 56)
    for module, shape in (
        ("Dropout2d(p)", image),
        ("Dropout3d(p)", (32, 64, 14, 14, 16)),
    ):
        side = ours(module, shared=tuple(range(2, len(shape))))
        yield case(
            module,
            shape,
            (side, torchs(module), MUL),
            Bar(side.name, MUL.name, "<=", 1.15),
            Bar(side.name, f"nn.{module}", "<=", 1.0),
        )
    path = ours("DropPath(p)", shared=(1, 2))
    yield case("DropPath(p)", (64, 197, 768), (path, MUL), Bar(path.name, MUL.name, "<=", 1.15))
    locked = ours("LockedDropout(p, 1)", shared=(1,))
    yield case(
        "LockedDropout(p, 1)",
        (64, 256, 512),
        (locked, MUL),
        Bar(locked.name, MUL.name, "<=", 1.3),
    )
    alpha = ours("AlphaDropout(p)", formula="alpha")
    yield case(
        "AlphaDropout(p)",
        (Mi,),
        (alpha, torchs("AlphaDropout(p)"), MUL),
        Bar("nn.AlphaDropout(p)", alpha.name, ">=", 15),
    )
    for name, shape, layout, limit in (
        ("channels_last", image, "x = x.contiguous(memory_format=torch.channels_last)", 2),
        ("transposed", (4096, 4096), "x = x.t().contiguous().t()", 2.5),
    ):
        contiguous = replace(MODULE, name="contiguous")
        strided = replace(MODULE, name=name, setup=f"{MODULE.setup}; {layout}")
        yield case(
            f"Dropout(p), {name}",
            shape,
            (strided, contiguous, MUL),
            Bar(name, "contiguous", "<=", limit),
        )


def peers(quick):
    """Other people's dropout on the CPU, where it is installed."""
    compiled = Side(
        "torch.compile(nn.Dropout)", "peer", "m(x)", "m = torch.compile(torch.nn.Dropout(p))",
        optional=True,
    )  # fmt: skip
    numpy = Side(
        "NumPy",
        "peer",
        "np.where(rng.random(a.shape, np.float32) >= p, a * scale, np.float32(0))",
        "import numpy as np; rng = np.random.default_rng(0); a = x.numpy(); scale = np.float32(c)",
        optional=True,
    )
    # The key is folded with a counter, as a training loop would.
    jax = Side(
        "JAX",
        "peer",
        "f(a, next(steps)).block_until_ready()",
        "import itertools, jax, jax.numpy as jnp\n"
        "assert jax.default_backend() == 'cpu'\n"
        "a = jnp.asarray(x.numpy()); steps = itertools.count()\n"
        "@jax.jit\n"
        "def f(a, n):\n"
        "    key = jax.random.fold_in(jax.random.key(0), n)\n"
        "    keep = jax.random.bernoulli(key, 1 - p, a.shape)\n"
        "    return jnp.where(keep, a * c, 0)\n",
        optional=True,
    )
    sides = (NN_MODULE, MODULE, MUL, numpy, jax)
    if quick:
        return
    yield Case("peers", "forward", "float32", (Mi,), (*sides, compiled))
    yield Case("peers", "forward", "float32", (16 * Mi,), sides)
    sides = (NN_MODULE, MODULE, MUL, compiled)
    yield Case("peers", "forward and backward", "float32", (Mi,), sides)


TENSORS = """
r = torch.randn(x.shape, generator=generator).to(x.dtype)
w, b = (torch.randn(x.shape[-1], generator=generator).to(x.dtype) for _ in range(2))
n = x.shape[-1:]
g = torch.ones_like(x)
"""
LEAVES = TENSORS + "leaves = [t.requires_grad_() for t in (x, r, w, b)]\n"
RMS_LEAVES = LEAVES + "del leaves[3]\n"
SUM = "(torch.where(keep, x.double(), 0) * c + r.double())"


def norms(name, ours, theirs, reference, shape, dtype, environment, avx2):
    """The fused norm against PyTorch's add and norm without dropout, and with it."""
    large, single = shape == (4096, 1024), dtype == "float32"
    leaves = RMS_LEAVES if "rms" in name else LEAVES
    dropped = theirs.replace("x + r", "F.dropout(x, p) + r")

    def case(op, statement, setup, threads, *bars):
        sides = (
            Side("p = 0", "torch", statement(theirs), setup),
            Side("fused", "ours", statement(ours), setup, reference=reference),
            Side("nn.Dropout", "peer", statement(dropped), setup),
            Side("torch.add(x, r)", "floor", "torch.add(x, r)", setup),
        )
        label = f"{name} {op}, {dtype}, {shape[0]} x {shape[1]}"
        return Case(
            "fused", op, dtype, shape, sides, label, threads, environment,
            bars=tuple(Bar(of, over, sense, limit) for of, over, sense, limit in bars),
        )  # fmt: skip

    def gradient(expression):
        return f"torch.autograd.grad({expression}, leaves, g)"

    p0, least = ("fused", "p = 0", "<="), ("nn.Dropout", "fused", ">=")
    if avx2:
        yield case("forward", str, TENSORS, 1, (*p0, 1.0))
        return
    faster = 8 if single and large else 10
    yield case("forward", str, TENSORS, 1, (*p0, 0.65), (*least, faster))
    yield case("forward", str, TENSORS, 2, (*p0, 0.75))
    both = (*p0, 1.15 if single and large else 1.0)
    yield case("forward, backward", gradient, leaves, 1, both)

    def kept(expression):
        return leaves + f"z = {expression}"

    sides = [
        Side(side, role, "torch.autograd.grad(z, leaves, g, retain_graph=True)", kept(expression))
        for side, role, expression in (
            ("p = 0", "torch", theirs),
            ("fused", "ours", ours),
            ("nn.Dropout", "peer", dropped),
        )
    ]
    limit = 2 if not single else 1.15 if large else 1.5
    yield Case(
        "fused", "backward", dtype, shape, tuple(sides),
        f"{name} backward, {dtype}, {shape[0]} x {shape[1]}", 1, environment,
        bars=(Bar(*least, limit),),
    )  # fmt: skip


def fused_with(quick, environment):
    """Dropout fused with its neighbours."""
    shapes = ((512, 768),) if quick else ((4096, 1024), (512, 768))
    avx2 = environment == "avx2"
    module = "dropout_ext"
    layer = (
        f"{module}.dropout_add_layer_norm(x, r, n, w, b, p=p)",
        "F.layer_norm(x + r, n, w, b)",
        f"F.layer_norm({SUM}, n, w.double(), b.double())",
    )
    rms = (
        f"{module}.dropout_add_rms_norm(x, r, n, w, p=p)",
        "F.rms_norm(x + r, n, w)",
        f"F.rms_norm({SUM}, n, w.double(), torch.finfo(torch.float32).eps)",
    )
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            yield from norms("layer_norm", *layer, shape, dtype, environment, avx2)
            yield from norms("rms_norm", *rms, shape, dtype, environment, avx2)
            if avx2:
                continue
            for name, ours, theirs, reference, limit in (
                ("dropout_add", "dropout_add(x, r, p)", "torch.add(x, r)", SUM, 1.4),
                ("gelu", "activation_dropout(x, 'gelu', p)", "F.gelu(x)",
                 "torch.where(keep, F.gelu(x.double()), 0) * c", 1.25),
                ("gelu (tanh)", "activation_dropout(x, 'gelu', p, approximate='tanh')",
                 "F.gelu(x, approximate='tanh')",
                 "torch.where(keep, F.gelu(x.double(), approximate='tanh'), 0) * c", 0.5),
                ("silu", "activation_dropout(x, 'silu', p)", "F.silu(x)",
                 "torch.where(keep, F.silu(x.double()), 0) * c", 1.0),
                ("relu", "activation_dropout(x, 'relu', p)", "F.relu(x)",
                 "torch.where(keep, F.relu(x.double()), 0) * c", 1.4),
            ):  # fmt: skip
                sides = (
                    Side("p = 0", "torch", theirs, TENSORS),
                    Side("fused", "ours", f"{module}.{ours}", TENSORS, reference=reference),
                )
                label = f"{name}, {dtype}, {shape[0]} x {shape[1]}"
                yield Case(
                    "fused", "forward", dtype, shape, sides, label, 1, environment,
                    bars=(Bar("fused", "p = 0", "<=", limit),),
                )  # fmt: skip
    if not avx2:
        sides = (
            Side("p = 0", "torch", layer[1], LEAVES),
            Side("fused", "ours", layer[0], LEAVES, reference=layer[2]),
        )
        yield Case(
            "fused", "forward, graph", "float32", (8, 64), sides,
            "layer_norm forward with grad, float32, 8 x 64", 1, environment,
            bars=(Bar("fused", "p = 0", "<=", 1.0),),
        )  # fmt: skip


def fused(quick):
    for environment in ("hugepages",) if quick else ("hugepages", "avx2"):
        yield from fused_with(quick, environment)


SECTIONS = {
    "micro": micro,
    "fused": fused,
    "bars": bars,
    "family": family,
    "hugepages": hugepages,
    "peers": peers,
}


def select(sections, environment, quick):
    """The cases of these sections that run in a process with this environment."""
    return [
        case
        for section in sections
        for case in SECTIONS[section](quick)
        if case.environment == environment
    ]
