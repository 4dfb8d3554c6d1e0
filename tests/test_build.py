"""Builds from a bare tree: without a compiler, with a bad request, with another compiler.

Each build runs in a process of its own, in a copy of the tree without built files, under the
Python and the packages that run these tests. MERGEKERN_REQUIRE may name `build` and `clang`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from required import REQUIRED

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "mergekern", "setup.py", "pyproject.toml", "README.md", "LICENSE")
VARIABLES = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "MERGEKERN_BUILD", "PYTHONPATH")


@functools.cache
def missing() -> str | None:
    """What this environment lacks for a build, as one sentence."""
    for package in ("pip", "setuptools", "pybind11"):
        if importlib.util.find_spec(package) is None:
            return f"build: {package} is not installed beside the tests"
    return None


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds."""
    reason = missing()
    if reason and "build" in REQUIRED:
        pytest.fail(f"MERGEKERN_REQUIRE: {reason}")
    if reason:
        pytest.skip(reason)
    copy = tmp_path / "tree"
    copy.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(
                source, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(source, copy / part)
    return copy


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """No compiler: PATH is an empty folder, and nothing names one."""
    nothing = tmp_path / "empty"
    nothing.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "PIP_QUIET")}
    return {**kept, "PATH": str(nothing), **more}


def install(
    tree: Path, tmp_path: Path, **more: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-v", "--disable-pip-version-check"]
    alone = ["--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip, *alone, "--target", str(target), str(tree)],
        env=environment(tmp_path, **more),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # pip -v sends what the build says there
        text=True,
    )
    return done, target


def run_in(target: Path, tmp_path: Path, code: str) -> str:
    """Runs code that sees `target` first; -S keeps out an editable install of this tree."""
    paths = [str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment(tmp_path, PYTHONPATH=os.pathsep.join(paths), TRITON_INTERPRET="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch, mergekern as mk
from mergekern import dispatch
print(mk.__file__)
print(dispatch.why_not("cpu", "weighted_sum", "cpu"))
x = torch.tensor([3.0, -1.0, 2.0])
print(mk.weighted_sum([x, x], [1, 1]).tolist())
t = mk.kth_magnitude(x, 1)
print(mk.merge_deltas(None, [x], [1], keep=[t], elect="sum").tolist())
print(mk.permute(x, {0: [2, 1, 0]}).tolist(), mk.gram([x]).tolist())
try:
    mk.weighted_sum([x], [1], backend="cpu")
except mk.BackendError as error:
    print(error)
"""


def test_auto_without_a_compiler_installs_the_torch_backend(tree: Path, tmp_path: Path) -> None:
    done, target = install(tree, tmp_path, MERGEKERN_BUILD="auto")
    assert done.returncode == 0, done.stdout
    _, _, build = done.stdout.partition("Running command Building wheel")  # setup.py runs twice
    for module in ("_cpu", "_cuda"):
        said = [s for s in build.splitlines() if f"mergekern.{module} not built" in s]
        assert len(said) == 1, f"{module}: expected one line, got {said}"
        assert "Traceback" not in build
    assert not list(target.rglob("*.so"))

    out = run_in(target, tmp_path, USE).splitlines()
    assert out[0].startswith(str(target))
    assert out[1].startswith("cpu: built without a C++ compiler")
    assert out[2:5] == ["[6.0, -2.0, 4.0]", "[3.0, 0.0, 0.0]", "[2.0, -1.0, 3.0] [[14.0]]"]
    assert out[5] == f"weighted_sum: {out[1]}"


def test_python_builds_nothing_and_says_nothing(tree: Path, tmp_path: Path) -> None:
    done, target = install(tree, tmp_path, MERGEKERN_BUILD="python")
    assert done.returncode == 0, done.stdout
    assert "not built" not in done.stdout
    assert not list(target.rglob("*.so"))
    assert (target / "mergekern" / "py.typed").is_file()


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_named_target_must_build(mode: str, tree: Path, tmp_path: Path) -> None:
    done, target = install(tree, tmp_path, MERGEKERN_BUILD=mode)
    assert done.returncode != 0
    assert not target.exists()
    if mode == "cuda":
        assert "MERGEKERN_BUILD=cuda: nvcc was not found" in done.stdout


def test_an_unknown_request_names_the_variable(tree: Path, tmp_path: Path) -> None:
    done, target = install(tree, tmp_path, MERGEKERN_BUILD="bogus")
    assert done.returncode != 0
    assert not target.exists()
    said = done.stdout
    assert "MERGEKERN_BUILD: unknown value; got 'bogus'; expected one of auto" in said


def test_the_tree_is_packaged_whole(tree: Path, tmp_path: Path) -> None:
    """Every Python file of the package arrives."""
    done, target = install(tree, tmp_path, MERGEKERN_BUILD="python")
    assert done.returncode == 0, done.stdout
    expected = {p.relative_to(tree) for p in (tree / "mergekern").rglob("*.py")}
    arrived = {p.relative_to(target) for p in (target / "mergekern").rglob("*.py")}
    assert arrived == expected


def test_the_kernels_are_clean_under_clang() -> None:
    names = ("clang++", *(f"clang++-{v}" for v in range(22, 13, -1)))
    clang = next(filter(None, map(shutil.which, names)), None)
    if clang is None and "clang" in REQUIRED:
        pytest.fail("MERGEKERN_REQUIRE: clang is not on PATH")
    if clang is None:
        pytest.skip("clang: neither clang++ nor clang++-14 ... clang++-22 is on PATH")
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        if source.name.startswith("bind_"):
            continue
        done = subprocess.run(
            [clang, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", str(source)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
