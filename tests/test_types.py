"""What a type checker makes of the package, and that the stub of its compiled part is true."""

import ast
import inspect
import re

import pytest
from helpers import ROOT

import dropout_ext
from dropout_ext import _C, functional

STUB = ast.parse((ROOT / "dropout_ext" / "_C.pyi").read_text())
FUNCTIONS = [node for node in STUB.body if isinstance(node, ast.FunctionDef)]
# Of an overloaded function the last stands for all.
DECLARED = {node.name: node for node in FUNCTIONS}


def parameters(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]


def documented(function) -> list[str]:
    """The parameters in the first line of a docstring, the optional ones too."""
    line = re.sub(r"\[, (.*)\]\)", r", \1)", function.__doc__.splitlines()[0])
    (node,) = ast.parse(f"def {line}: ...").body
    return parameters(node)


def test_stub_has_the_names():
    names = {name for name in dir(_C) if not name.startswith("__")}
    if not dropout_ext.build_info()["cuda"]:
        names.add("_force_cuda_geometry")
    assert names == set(DECLARED)


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_stub_has_the_parameters(name):
    if not hasattr(_C, name):
        pytest.skip("needs a build with CUDA")
    found = documented(getattr(_C, name))
    if found and found[0] == "arg0":  # of a function that names none
        assert len(DECLARED[name].args.posonlyargs) == len(found)
    else:
        assert parameters(DECLARED[name]) == found


@pytest.mark.parametrize("name", ["eager", "eager_rows", "eager_activation"])
def test_stub_has_the_numbers_of_arguments(name):
    """Those that the function itself says it takes."""
    with pytest.raises(TypeError, match="arguments, but got 0") as error:
        getattr(_C, name)()
    accepted = re.search(r"takes ([\d or]+) arguments", str(error.value)).group(1)
    declared = [len(node.args.posonlyargs) for node in FUNCTIONS if node.name == name]
    assert declared == [int(number) for number in accepted.split(" or ")]


def test_stub_has_the_keys_of_build_info():
    (declared,) = [node for node in STUB.body if isinstance(node, ast.ClassDef)]
    assert [field.target.id for field in declared.body] == list(dropout_ext.build_info())


def test_the_marker_is_in_wheel_and_sdist():
    setuptools = pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        of_setup_py = {"license": "", "install_requires": []}
        distribution = setuptools.Distribution(of_setup_py)
        distribution.parse_config_files(["pyproject.toml"])
        distribution.include_package_data = False  # by the list alone, whatever git knows
        build = distribution.get_command_obj("build_py")
        build.ensure_finalized()
        build.analyze_manifest()
        files = build.find_data_files("dropout_ext", "dropout_ext")
    assert {"dropout_ext/py.typed", "dropout_ext/_C.pyi"} <= set(files)


TENSOR = "torch._tensor.Tensor"
PAIR = f"tuple[{TENSOR}, {TENSOR}]"
# An expression, and what mypy says of it.
REVEALED = {
    "functional.dropout2d": (
        f"def (input: {TENSOR}, p: float =, training: bool =, inplace: bool =, *, "
        f"key: {TENSOR} | None =, generator: torch._C.Generator | None =) -> {TENSOR}"
    ),
    "functional.drop_path(x)": TENSOR,
    "dropout_ext.dropout(x, 0.1)": TENSOR,
    "dropout_ext.dropout_add(x, None)": TENSOR,
    "dropout_ext.dropout_add_layer_norm(x, None, 2)": TENSOR,
    "dropout_ext.dropout_add_layer_norm(x, None, 2, return_sum=True)": PAIR,
    "dropout_ext.dropout_add_rms_norm(x, None, 2, p=0.1)": TENSOR,
    "dropout_ext.dropout_add_rms_norm(x, None, 2, return_sum=flag)": f"{TENSOR} | {PAIR}",
    "dropout_ext.Dropout(0.1).generator": "torch._C.Generator | None",
    "dropout_ext.convert(dropout_ext.Dropout())": "torch.nn.modules.module.Module",
    "dropout_ext.build_info()['cuda_archs']": "list[str]",
    "decorated": f"def (x: {TENSOR}) -> {TENSOR}",
}
# A wrong call, and the code of mypy's error.
WRONG = {
    "functional.dropout2d(x, p='0.5')": "arg-type",
    "functional.dropout2d(x, colour=1)": "call-arg",
    "functional.alpha_dropout()": "call-arg",
    "dropout_ext.dropout(x, key=42)": "arg-type",
    "dropout_ext.dropout_add_layer_norm(x, None, 2, colour=1)": "call-overload",
    "dropout_ext.Dropout2d('0.5')": "arg-type",
    "dropout_ext.build_info()['colour']": "typeddict-item",
}
BEFORE = """\
import torch

import dropout_ext
from dropout_ext import functional

x = torch.ones(2, 2)
flag = bool(x.any())


@dropout_ext.override()
def decorated(x: torch.Tensor) -> torch.Tensor:
    return x


"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Of each expression what mypy says, and whether that is an error or a note."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    revealed = [*REVEALED, *(f"functional.{name}" for name in functional.__all__)]
    lines = [*(f"reveal_type({expression})" for expression in revealed), *WRONG]
    program = tmp_path_factory.mktemp("types") / "program.py"
    program.write_text(BEFORE + "\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        # What is wrong in the package itself is for `make lint` to say.
        output, errors, _ = api.run(["--strict", "--follow-imports=silent", str(program)])
    assert not errors
    expressions = [*revealed, *WRONG]
    found = {}
    for line, kind, message in re.findall(r"program\.py:(\d+): (\w+): (.*)", output):
        expression = expressions[int(line) - 1 - BEFORE.count("\n")]
        found.setdefault(expression, (kind, message))  # notes on an error come after it
    return found


@pytest.mark.parametrize("expression", REVEALED)
def test_revealed(said, expression):
    assert said[expression] == ("note", f'Revealed type is "{REVEALED[expression]}"')


@pytest.mark.parametrize("expression", WRONG)
def test_a_wrong_call_is_reported(said, expression):
    kind, message = said[expression]
    assert kind == "error"
    assert message.endswith(f"[{WRONG[expression]}]")


@pytest.mark.parametrize("name", functional.__all__)
def test_decorators_keep_signatures(said, name):
    """A checker sees the parameters that Python does."""
    _, message = said[f"functional.{name}"]
    names = list(inspect.signature(getattr(functional, name)).parameters)
    assert re.findall(r"[(,] ?(\w+): ", message) == names
    assert message.endswith(f') -> {TENSOR}"')
