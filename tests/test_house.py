"""The house stands as designed: arrows go down, every floor has every op, words are kept."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekern
from mergekern import dispatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mergekern"
BACKENDS = ("torch", "cpu", "cuda", "triton")
SOURCES = sorted(p for p in PACKAGE.rglob("*.py"))

# Low to high; a file may import from its own floor and from those below.
FLOORS = (
    ("errors", "keep", "check", "digits", "bits", "version"),
    ("_cpu", "_cuda"),
    ("backends",),
    ("dispatch", "reference"),
    ("ops",),
    ("methods",),
    ("engine", "align", "adapters"),
    ("cli", "integrations", "__main__"),
)
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
PUBLIC = HEIGHT["cli"]  # a name of the package itself, as a user would import it
# The one arrow that looks upward: backend files ask dispatch for their compiled module.
ALLOWED = {("backends", "dispatch", "compiled")}


# ---- arrows ----------------------------------------------------------------------------------


def room(module: str) -> str:
    """The part of the package that a dotted name lies in; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imports(path: Path, package: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of what a file imports from its own package, wherever it does so."""
    inside = path.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package.name:
                    yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            # For a module in a.b, level 1 is the package a.b; for a.b/__init__ as well.
            start = list(inside[: len(inside) - node.level]) if node.level else []
            module = ".".join(start + ([node.module] if node.module else []))
            if module.split(".")[0] == package.name:
                for alias in node.names:
                    whole = f"{module}.{alias.name}" if module == package.name else module
                    yield node.lineno, whole, alias.name


def upward(path: Path, package: Path) -> list[str]:
    """A sentence per import of `path` that goes up."""
    here = room(".".join(path.relative_to(package.parent).with_suffix("").parts))
    if here == "__init__":
        return []  # the names of the package, from anywhere
    found = []
    for line, module, name in imports(path, package):
        there = room(module)
        if (here, there, name) in ALLOWED or there == "":
            continue
        if here not in HEIGHT:
            found.append(f"{path}: {here!r} is on no floor of tests/test_house.py")
        elif HEIGHT.get(there, PUBLIC) > HEIGHT[here]:
            found.append(f"{path}:{line}: {here} imports {there}, which is above it")
        elif there == "reference" and here != "dispatch":
            found.append(f"{path}:{line}: reference is for dispatch and tests")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_down(path: Path) -> None:
    assert not upward(path, PACKAGE)


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("ops/a.py", "from .. import check, dispatch", False),
        ("ops/a.py", "from ..methods import ties", True),
        ("ops/a.py", "from ..methods.ties import x", True),
        ("ops/a.py", "from .. import reference", True),
        ("ops/a.py", "def f():\n    import mergekern.engine.plan", True),
        ("check.py", "from .ops.gram import gram", True),
        ("check.py", "from . import dispatch", True),
        ("backends/a.py", "from ..dispatch import compiled", False),
        ("backends/a.py", "from ..dispatch import select", True),
        ("backends/triton/a.py", "from ...check import FLOATS", False),
        ("backends/triton/a.py", "from ...ops.gram import gram", True),
        ("engine/plan.py", "from ..cli import main", True),
        ("engine/plan.py", "from ..methods import ties", False),
        ("engine/plan.py", "from .. import weighted_sum", True),
        ("cli/main.py", "from .. import __version__", False),
        ("attic/a.py", "from ..check import FLOATS", True),
    ],
)
def test_the_walk_sees_upward_arrows(file: str, text: str, wrong: bool, tmp_path: Path) -> None:
    path = tmp_path / "mergekern" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert bool(upward(path, tmp_path / "mergekern")) is wrong


def test_pybind11_stays_in_the_bindings() -> None:
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if not path.name.startswith("bind_"):
            assert "pybind11" not in path.read_text(), path


def test_no_torch_in_the_kernels() -> None:
    include = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|THC)/")
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        assert not include.search(path.read_text()), path


def test_kernels_own_nothing() -> None:
    """No allocation, thread or printing outside the bindings (design, section 2)."""
    owns = re.compile(
        r"\b(malloc|calloc|new\s+\w+\[|std::(vector|thread|string|cout|cerr)|printf)\b"
    )
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if not path.name.startswith("bind_"):
            assert not owns.search(path.read_text()), path


def loaded(code: str) -> set[str]:
    """The top-level names and the parts of mergekern that a fresh Python holds after `code`."""
    code += "\nimport sys; print('loaded', *sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("module", ["mergekern", "mergekern.cli", "mergekern.errors"])
def test_import_loads_no_torch(module: str) -> None:
    assert not {"torch", "numpy", "scipy", "mergekern.check"} & loaded(f"import {module}")


def test_a_merge_loads_no_alignment() -> None:
    modules = loaded("import mergekern.engine.run")
    assert "mergekern.methods" in modules
    assert not {"scipy", "matplotlib", "mergekern.align"} & modules


def test_a_name_loads_its_own_modules_alone() -> None:
    modules = loaded("import mergekern; mergekern.gram")
    assert "mergekern.ops.gram" in modules
    assert not {"scipy", "mergekern.methods", "mergekern.ops.assign", "mergekern.align"} & modules


def test_type_checkers_see_the_names_that_are_found_at_run_time() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {a.name: f"mergekern.{n.module}" for n in block.body for a in n.names}
    assert sorted(seen) == mergekern.__all__
    for name, module in seen.items():
        assert getattr(mergekern, name) is getattr(importlib.import_module(module), name)


def test_methods_stays_a_function() -> None:
    """The import of the folder of that name, before or after, does not take its place."""
    for first, second in (("", "import mergekern.methods.merge"), ("import mergekern.methods", "")):
        code = f"{first}\nimport mergekern\n{second}\nassert 'ties' in mergekern.methods()"
        code += "\nfrom mergekern import methods\nassert 'ties' in methods()"
        loaded(code)


def test_names_that_are_not_there() -> None:
    assert not hasattr(mergekern, "grams")
    with pytest.raises(AttributeError, match="module 'mergekern' has no attribute 'grams'"):
        mergekern.grams  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'grams'"):
        from mergekern import grams  # noqa: F401
    assert {*mergekern.__all__, "__version__"} <= set(dir(mergekern))


def test_import_loads_no_backend() -> None:
    code = (
        "import sys, mergekern; "
        "heavy = [m for m in sys.modules if m == 'triton' or m.startswith('triton.')"
        " or m.startswith('mergekern._c') or m.startswith('mergekern.backends.')"
        " or m == 'mergekern.reference']; print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- one word, one op, every floor -----------------------------------------------------------


@pytest.mark.parametrize("op", dispatch.OPS)
def test_an_op_is_on_every_floor(op: str) -> None:
    door = importlib.import_module(f"mergekern.ops.{op}")
    assert callable(getattr(door, op))
    assert callable(door.cost)
    assert getattr(mergekern, op) is getattr(door, op)
    for backend in ("reference", "torch"):
        assert callable(dispatch.load(backend, op))
    for backend in BACKENDS:
        if op in dispatch.KERNELS.get(backend, dispatch.OPS):
            assert (PACKAGE / "backends" / backend / f"{op}.py").is_file()
    for file in (f"csrc/{op}.h", f"csrc/{op}.cpp", f"tests/test_{op}.py"):
        assert (ROOT / file).is_file(), file


def test_every_file_of_ops_is_an_op() -> None:
    files = {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")}
    assert files == {*dispatch.OPS, "assign"}  # scipy's solver, which needs no backend


@pytest.mark.parametrize("op", dispatch.OPS)
def test_backends_have_the_same_signatures(op: str) -> None:
    """Destination first, the same names in the same order."""

    def names(path: Path) -> list[str]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == op:
                return [a.arg for a in node.args.args]
        raise AssertionError(f"{path} has no {op}")

    expected = names(PACKAGE / "backends" / "torch" / f"{op}.py")
    reference = names(PACKAGE / "reference.py")
    assert [a for a in reference if a != "acc"] == expected
    for backend in BACKENDS:
        if op in dispatch.KERNELS.get(backend, dispatch.OPS):
            assert names(PACKAGE / "backends" / backend / f"{op}.py") == expected


# ---- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mergekern.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    documented = getattr(mergekern, name)
    assert documented.__doc__
    assert documented.__doc__.strip()


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_docstring_of_an_op_has_its_parts(op: str) -> None:
    text = getattr(mergekern, op).__doc__
    for part in ("Shapes:", "Result:", "Cost:", "Raises:", "Source:", ">>> "):
        assert part in text, part


def test_public_names_are_sorted_and_there() -> None:
    assert mergekern.__all__ == sorted(mergekern.__all__)
    assert all(hasattr(mergekern, name) for name in mergekern.__all__)


def modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(mergekern.__path__, "mergekern.")]
    return ["mergekern", *(m for m in found if not m.rpartition(".")[2].startswith("_c"))]


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    needs = {"cpu": "cpu", "cuda": "cuda", "triton": "triton"}
    parts = name.split(".")
    if parts[1:2] == ["backends"] and len(parts) > 2 and parts[2] in needs:
        device = "cuda" if parts[2] == "cuda" and not dispatch.emulating() else "cpu"
        reason = dispatch.why_not(parts[2], "weighted_sum", device)
        if reason:
            pytest.skip(reason)
    if parts[-1] == "__main__":
        pytest.skip("__main__: importing it runs the command line")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_ops_have_doctests_that_run() -> None:
    for op in dispatch.OPS:
        assert doctest.testmod(importlib.import_module(f"mergekern.ops.{op}")).attempted > 0
