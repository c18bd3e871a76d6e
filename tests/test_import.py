"""Importing the package where its compiled part is missing, of another build, or in order."""

import shutil
import subprocess
import sys
import sysconfig

import pytest
from helpers import CXX, ROOT, run


@pytest.fixture
def package(tmp_path):
    """The Python files alone."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "dropout_ext", tmp_path / "dropout_ext", ignore=ignored)
    return tmp_path / "dropout_ext"


def failure(package) -> str:
    """The last line of what importing it prints."""
    command = [sys.executable, "-c", "import dropout_ext"]
    result = subprocess.run(
        command, cwd=package.parent, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def compiled(package, source, *flags):
    path = package.parent / "source.cpp"
    path.write_text(source)
    run(
        CXX,
        "-shared",
        "-fPIC",
        path,
        "-o",
        package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
        *flags,
    )


def test_sources_without_the_compiled_part(package):
    message = failure(package)
    assert message.startswith("ImportError: dropout_ext was imported from its sources")
    assert str(package) in message
    assert "make build" in message
    assert "circular" not in message


@pytest.mark.skipif(sys.platform != "linux", reason="makes a shared object of Linux")
@pytest.mark.parametrize("lacks", ["symbol", "library"])
def test_built_for_another_torch(package, lacks):
    call = 'extern "C" int of_another_torch(); extern "C" int call() { return of_another_torch(); }'
    if lacks == "library":
        library = package.parent / "libanother_torch.so"
        source = package.parent / "another.cpp"
        source.write_text('extern "C" int of_another_torch() { return 1; }')
        run(CXX, "-shared", "-fPIC", source, "-o", library)
        compiled(package, call, f"-L{library.parent}", "-lanother_torch")
        library.unlink()
    else:
        compiled(package, call, "-Wl,-z,now")
    message = failure(package)
    assert message.startswith("ImportError: dropout_ext._C in ")
    assert "another_torch" in message
    assert "pip install --no-build-isolation" in message


@pytest.mark.skipif(sys.platform != "linux", reason="makes a shared object of Linux")
def test_an_error_of_its_own_stays(package):
    """Such as that of an environment variable that names no variant of the CPU kernel."""
    compiled(
        package,
        "#include <Python.h>\n"
        'PyMODINIT_FUNC PyInit__C() { PyErr_SetString(PyExc_ImportError, "its own"); return 0; }',
        f"-I{sysconfig.get_path('include')}",
    )
    assert failure(package) == "ImportError: its own"


def test_console_script():
    from importlib.metadata import EntryPoint

    from dropout_ext.__main__ import main

    text = (ROOT / "pyproject.toml").read_text()
    assert 'dropout-ext = "dropout_ext.__main__:main"' in text
    entry = EntryPoint("dropout-ext", "dropout_ext.__main__:main", "console_scripts")
    assert entry.load() is main
