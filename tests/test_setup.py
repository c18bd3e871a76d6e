"""setup.py: what it installs, refuses and warns of, and the versions that it gives a wheel."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import CXX, ROOT, run

# setup.py in a process whose torch is what `torch` makes of it.
SCRIPT = """
import runpy, sys
{torch}
sys.argv = ["setup.py", *{arguments}]
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(*arguments: str, torch: str = "", **env: str) -> subprocess.CompletedProcess:
    code = SCRIPT.format(torch=torch, arguments=arguments)
    env = {**os.environ, "DROPOUT_EXT_CUDA": "0", **env}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def of_version(version: str) -> str:
    return f"import torch; torch.__version__ = {version!r}"


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
def test_without_torch(command):
    result = setup(command, torch="sys.modules['torch'] = None")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    for part in ("install torch>=2.11", "--no-build-isolation"):
        assert part in message


def test_old_torch():
    result = setup("--version", torch=of_version("2.10.1+cpu"))
    assert result.returncode != 0
    for part in ("torch>=2.11", "2.10.1+cpu"):
        assert part in result.stderr


def test_new_torch_is_warned_of():
    result = setup("--version", torch=of_version("2.99.0"))
    assert result.returncode == 0
    assert "warning: dropout_ext is tested with torch 2.11 to" in result.stderr
    assert "2.99.0" in result.stderr
    assert "warning: dropout_ext" not in setup("--version").stderr


def test_without_a_compiler(tmp_path):
    result = setup("build_ext", "--build-temp", str(tmp_path), CXX="no-such-compiler")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    for part in ("C++20", "no-such-compiler", "CXX"):
        assert part in message


def test_wheel_is_named_for_its_torch(tmp_path):
    version = ".".join(torch.__version__.split(".")[:2])
    assert setup("--version").stdout.split()[-1] == "0.1.0"
    named = setup("egg_info", "--egg-base", str(tmp_path), DROPOUT_EXT_WHEEL="1")
    assert named.returncode == 0, named.stderr
    info = (tmp_path / "dropout_ext.egg-info" / "PKG-INFO").read_text()
    assert f"\nVersion: 0.1.0+torch{version}.cpu\n" in info
    assert f"\nRequires-Dist: torch=={version}.*\n" in info


# Compiles nothing in place of each source, which must exist, and links as the compiler does.
COMPILER = f"""#!/bin/sh
case "$*" in *" -c "*) ;; *) exec {CXX} "$@" ;; esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out=$2 ;;
    *.cpp) [ -f "$1" ] || exit 1 ;;
  esac
  shift
done
exec {CXX} -x c++ -fPIC -c /dev/null -o "$out"
"""


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"{CXX} was not found")
@pytest.mark.parametrize("editable", [False, True])
def test_install_from_a_path_with_spaces(tmp_path, editable):
    folder, prefix = tmp_path / "with spaces", tmp_path / "prefix"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "dropout_ext"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    wanted = {file.relative_to(folder) for file in (folder / "dropout_ext").rglob("*.*")}
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-I"]
    run(*pip, "--prefix", prefix, *["-e"] * editable, folder,
        CXX=str(compiler), DROPOUT_EXT_CUDA="0", CCACHE_DISABLE="1")  # fmt: skip
    if editable:
        packages = folder
    else:
        (packages,) = (path.parent for path in prefix.rglob("dropout_ext") if path.is_dir())
    files = {path.relative_to(packages) for path in (packages / "dropout_ext").rglob("*.*")}
    (compiled,) = files - wanted - {path for path in files if "__pycache__" in path.parts}
    assert wanted <= files
    assert compiled.match("dropout_ext/_C.*.so")
