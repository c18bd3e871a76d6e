"""Builds dropout_ext._C against the installed torch, with CUDA where torch and nvcc have it.

Environment:
  DROPOUT_EXT_CUDA      1 demands CUDA, 0 forbids it; unset: where torch has it and nvcc is found
  TORCH_CUDA_ARCH_LIST  for example "8.0;9.0+PTX"; unset: the GPUs at hand, or else ARCHS below
  DROPOUT_EXT_WERROR    1 makes warnings in our sources errors
  DROPOUT_EXT_DEBUG     1 compiles the host code for a debugger: not optimised, with symbols
  DROPOUT_EXT_WHEEL     1 puts torch and CUDA into the version, for a wheel that is handed on
                        (make wheel): 0.1.0+torch2.13.cu130
  DROPOUT_EXT_SANITIZE  for example "address,undefined": checks the extension while it runs; for
                        Python to load it, preload the runtime of the sanitizer (make sanitize)
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
# The oldest that works; the newest that the tests pass with, beyond which it may.
TORCH_MIN, TORCH_TESTED = (2, 11), (2, 14)
TORCH_RANGE = "torch>={}.{}".format(*TORCH_MIN)
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
NEEDS_TORCH = (
    f"dropout_ext is compiled against the torch that it will run with: install {TORCH_RANGE} "
    "first, then run `pip install --no-build-isolation .` in the same environment"
)


def find_cuda_home() -> Path | None:
    """The toolkit of CUDA_HOME, of the nvcc on PATH, or the default one; None without nvcc."""
    named = os.environ.get("CUDA_HOME")
    if named:
        return Path(named) if Path(named, "bin", "nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        default = Path("/usr/local/cuda")
        return default if (default / "bin" / "nvcc").exists() else None
    # nvcc may be a link or a script outside its toolkit, so ask it instead of looking at its path.
    dryrun = run_text(nvcc, "--dryrun", "-x", "cu", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def run_text(*command: str) -> str:
    return subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def resolve_archs(nvcc: str, capabilities: list[tuple[int, int]]) -> str:
    """TORCH_CUDA_ARCH_LIST if set, else the GPUs at hand, else ARCHS as far as nvcc knows them."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if given and given != "native":
        return given.replace(" ", ";")
    codes = re.findall(r"sm_(\d+)(\d)\b", run_text(nvcc, "--list-gpu-code"))
    supported = {(int(major), int(minor)) for major, minor in codes}
    if capabilities:
        # A GPU newer than nvcc runs the PTX of the newest architecture that nvcc knows.
        chosen = {min(capability, max(supported)) for capability in capabilities}
    else:
        chosen = {tuple(map(int, arch.split("."))) for arch in ARCHS} & supported
    return ";".join(f"{major}.{minor}" for major, minor in sorted(chosen)) + "+PTX"


def cuda_toolkit(torch) -> Path | None:
    """The CUDA toolkit to build with, None for a build without CUDA."""
    wanted = os.environ.get("DROPOUT_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"DROPOUT_EXT_CUDA is {wanted!r}; accepted are 1, 0 and unset")
    if wanted == "0":
        return None
    home = find_cuda_home()
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a torch with CUDA (the installed one is {torch.__version__})")
    if home is None:
        missing.append("nvcc (put it on PATH or set CUDA_HOME)")
    if missing:
        if wanted == "1":
            sys.exit(
                f"DROPOUT_EXT_CUDA=1 demands a CUDA build, which needs {' and '.join(missing)}"
            )
        return None
    release = re.search(r"release (\d+)\.", run_text(str(home / "bin" / "nvcc"), "--version"))
    if release and release.group(1) != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"nvcc in {home} is of CUDA {release.group(1)}, torch {torch.__version__} of CUDA "
            f"{torch.version.cuda}: set CUDA_HOME to a toolkit of the same major version, "
            "or DROPOUT_EXT_CUDA=0 to build without CUDA"
        )
    return home


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def with_torch(torch) -> dict:
    """What setup() needs besides pyproject.toml to build the extension."""
    if sys.platform != "linux":
        sys.exit(f"dropout_ext is built on Linux, not on {sys.platform}")
    release = tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups()))
    if release < TORCH_MIN:
        sys.exit(f"{NEEDS_TORCH} (installed: torch {torch.__version__})")
    tested = "{}.{} to {}.{}".format(*TORCH_MIN, *TORCH_TESTED)
    if release > TORCH_TESTED:
        print(
            f"warning: dropout_ext is tested with torch {tested}; this is {torch.__version__}. "
            "Run `python -m dropout_ext` when it is installed",
            file=sys.stderr,
        )

    cuda_home = cuda_toolkit(torch)
    if cuda_home:
        os.environ["CUDA_HOME"] = str(cuda_home)  # read when cpp_extension is imported
    from torch.utils import cpp_extension as cpp

    # The torch version is on the command line so that another torch recompiles everything: ninja
    # does not track system headers.
    macros = [
        ("DROPOUT_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
        ("DROPOUT_EXT_TORCH_TESTED", f'"{tested}"'),
    ]
    files = sources("csrc/operators.cpp", "csrc/cpu/*.cpp", "csrc/attention/*.cpp")
    if cuda_home:
        gpus = range(torch.cuda.device_count())
        capabilities = [torch.cuda.get_device_capability(gpu) for gpu in gpus]
        archs = resolve_archs(str(cuda_home / "bin" / "nvcc"), capabilities)
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        macros += [
            ("DROPOUT_EXT_WITH_CUDA", None),
            ("DROPOUT_EXT_CUDA_ARCHS", f'"{archs}"'),
        ]
        files += sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")

    # A multiply and an add are fused where the source says fma and nowhere else, so that all
    # backends agree to the bit. -g0: Python's own -g doubles compile time and size.
    cxx_flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
    cxx_flags += ["-Wall", "-Wextra"]
    # A directory that is also given by -I counts as a system one: torch's headers do not warn.
    for path in cpp.include_paths("cuda" if cuda_home else "cpu"):
        cxx_flags += ["-isystem", path]
    nvcc_flags = ["-std=c++20", "-O3", "--fmad=false", "--threads=0"]
    nvcc_flags += ["-Xcompiler", "-Wall,-Wextra,-ffp-contract=off,-fvisibility=hidden"]
    if os.environ.get("DROPOUT_EXT_WERROR") == "1":
        cxx_flags += ["-Werror"]
        nvcc_flags += ["-Werror", "all-warnings"]
    if os.environ.get("DROPOUT_EXT_DEBUG") == "1":
        cxx_flags += ["-O0", "-g"]
    link_flags = []
    if sanitizers := os.environ.get("DROPOUT_EXT_SANITIZE"):
        link_flags = [f"-fsanitize={sanitizers}"]
        cxx_flags += [*link_flags, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        cxx_flags += ["-O1", "-g", "-fno-var-tracking"]

    class BuildExt(cpp.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Whether anything is to be compiled is for ninja to say, which also sees another torch.
            self.force = True

        def build_extensions(self):
            compiler = self.compiler.compiler_cxx[0]
            if shutil.which(compiler) is None:
                sys.exit(
                    f"dropout_ext is compiled by a C++20 compiler (GCC 11 or newer, or clang 14 or "
                    f"newer), and {compiler} was not found: install it, or set CXX to another one"
                )
            (extension,) = self.extensions
            version = f'"{self.distribution.get_version()}"'
            extension.define_macros.append(("DROPOUT_EXT_VERSION", version))
            # at::parallel_for is a template around an OpenMP pragma, serial without this.
            extension.extra_compile_args["cxx"].append("-fopenmp")
            if "clang" in run_text(*self.compiler.compiler_cxx, "--version"):
                # Only with clang, whose calls the OpenMP runtime that torch has loaded does not
                # know. It knows those of GCC, and a second runtime would ignore
                # torch.set_num_threads.
                extension.extra_link_args.append("-fopenmp")
            else:
                # GCC 12 sees an uninitialised value in any std::optional<at::Generator>.
                extension.extra_compile_args["cxx"].append("-Wno-maybe-uninitialized")
            super().build_extensions()

    extension = (cpp.CUDAExtension if cuda_home else cpp.CppExtension)(
        "dropout_ext._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh", "csrc/operator/*.cpp"),
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
    )

    class EggInfo(egg_info):
        def finalize_options(self):
            if os.environ.get("DROPOUT_EXT_WHEEL") == "1":
                cuda = f"cu{torch.version.cuda.replace('.', '')}" if cuda_home else "cpu"
                self.tag_build = "+torch{}.{}.{}".format(*release, cuda)
            super().finalize_options()

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExt, "egg_info": EggInfo},
        # torch's C++ interface changes with every minor version, so a wheel belongs to one.
        "install_requires": ["torch=={}.{}.*".format(*release)],
    }


def without_torch() -> dict:
    """Enough for an sdist; anything that builds or installs says what is missing."""

    class NeedsTorch:
        def run(self):
            sys.exit(NEEDS_TORCH)

    return {
        "cmdclass": {
            "build_ext": type("BuildExt", (NeedsTorch, build_ext), {}),
            "dist_info": type("DistInfo", (NeedsTorch, dist_info), {}),
        },
        "has_ext_modules": lambda: True,
        "install_requires": [TORCH_RANGE],
    }


try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    setup(license="BSD-3-Clause", **without_torch())
else:
    setup(license="BSD-3-Clause", **with_torch(torch))
