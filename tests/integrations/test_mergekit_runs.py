"""mergekit's own commands with the drop-in: commands, the start-up hook, and the older line.

Every run is a process of its own. MERGEKERN_MERGEKIT_014 names a folder that holds mergekit 0.1.4
(pip install --no-deps --target FOLDER mergekit==0.1.4 pydantic==2.10.6 pydantic_core==2.27.2);
without it the tests of the older line are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekern.check import name_of
from mergekern.integrations.mergekit import hook
from mergekern.methods import REGISTRY

from accuracy import assert_bits_equal, assert_bytes_equal, assert_within
from required import REQUIRED, peer

peer("mergekit", "mergekit")

OLDER = os.environ.get("MERGEKERN_MERGEKIT_014", "")
UNIT = 2.0**-24
HOST = "from mergekit.scripts.merge_raw_pytorch import main; main()"
OURS = "from mergekern.integrations.mergekit import pytorch_main; pytorch_main()"

if importlib.metadata.version("mergekit") != "0.1.5":
    pytest.skip("these tests are for mergekit 0.1.5", allow_module_level=True)


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def models(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """A base and what it was tuned to: a matrix, a bias, a scalar, an integer buffer."""
    g = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (24, 32), "layer.bias": (32,), "logit_scale": ()}
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    made = [base, *({k: x + 0.1 * torch.randn(x.shape, generator=g) for k, x in base.items()}
                    for _ in range(2))]  # fmt: skip
    ids = {"position_ids": torch.arange(16)[None]}
    return [{k: x.to(dtype) for k, x in m.items()} | ids for m in made]


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(request, "param", torch.float32)


@pytest.fixture
def files(dtype: torch.dtype, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"model{i}.safetensors" for i in range(3)]
    for path, state in zip(paths, models(dtype), strict=True):
        save_file(state, path)
    return paths


def config(files: list[Path], method: str, *, base: bool, **parameters: Any) -> Path:
    models = [{"model": str(p), "parameters": {"weight": 1.0}} for p in files]
    given: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    if base:
        given |= {"base_model": str(files[0]), "models": models[1:]}
    path = files[0].parent / f"{method}{len(files)}.yml"
    path.write_text(yaml.safe_dump(given))
    return path


# Commands one after the other in one process, each as if typed. Importing mergekit takes longest.
SEVERAL = """
import json, sys
for code, *arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        exec(code)
    except SystemExit as end:
        assert not end.code, end.code
"""


def run(*commands: tuple[object, ...], **environment: str) -> str:
    """Run (code, arguments...); what they printed on stderr."""
    text = json.dumps([[str(part) for part in command] for command in commands])
    return python(SEVERAL, text, **environment).stderr


def assert_alike(mine: dict[str, Tensor], theirs: dict[str, Tensor], files: list[Path]) -> None:
    """Each side within the roundings of its own arithmetic; buffers copied.

    At most eight roundings of values no greater than 6 max |x|: differences, weights, products,
    sums, a division, the base. mergekit rounds each to the tensors' dtype.
    """
    assert mine.keys() == theirs.keys()
    inputs = [load_file(f) for f in files]
    for key, x in mine.items():
        assert x.dtype == theirs[key].dtype
        if not x.is_floating_point():
            assert_bytes_equal(x, theirs[key])
            continue
        u = UNIT if x.dtype == torch.float32 else 2.0**-8
        size = torch.stack([state[key].double().abs() for state in inputs]).sum(0)
        assert_within(x, theirs[key].double(), 2 * 8 * u / (1 - 8 * u) * 6 * size)


# ---- commands --------------------------------------------------------------------------------

CASES = [
    ("linear", 3, False, {}),
    ("linear", 2, False, {}),
    ("task_arithmetic", 3, True, {"lambda": 0.5}),
    ("ties", 3, True, {"density": 1.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], indirect=True, ids=name_of)
def test_the_command_merges_as_mergekit_does(files: list[Path]) -> None:
    given = [config(files[:n], method, base=base, **more) for method, n, base, more in CASES]
    said = run(
        *((OURS, c, c.with_suffix(".mine"), "-v") for c in given),
        ("from mergekern.integrations.mergekit import uninstall; uninstall()",),
        *((HOST, c, c.with_suffix(".theirs"), "-v") for c in given),
    )
    lines = [line for line in said.splitlines() if "mergekern:" in line]
    assert len(lines) == len(CASES)
    for (method, n, *_), c, line in zip(CASES, given, lines, strict=True):
        assert f"3 tensors merged by mergekern ({method} 3; backends for cpu: " in line
        assert "by mergekit" not in line
        mine, theirs = (
            load_file(c.with_suffix(s) / "model.safetensors") for s in (".mine", ".theirs")
        )
        assert_alike(mine, theirs, files)
        if (method, n) == ("linear", 2):  # one sum and one halving: nothing is left to choose
            for key, x in mine.items():
                assert_bits_equal(x, theirs[key])


def test_the_seed_decides_masks_in_any_order(files: list[Path]) -> None:
    """mergekit-pytorch walks a set of names, whose order PYTHONHASHSEED decides."""
    given = config(files, "dare_linear", base=True, density=0.5)
    results = []
    for i in "12":
        out = files[0].parent / i
        said = run((OURS, given, out, "--random-seed", "3"), PYTHONHASHSEED=i)
        assert "mergekern" not in said  # silent unless asked with -v
        results.append(load_file(out / "model.safetensors"))
    one, two = results
    for key, x in one.items():
        assert_bytes_equal(x, two[key])
    assert not torch.equal(one["layer.weight"], load_file(files[0])["layer.weight"])


def test_mergekit_yaml(tmp_path: Path) -> None:
    """A language model with its architecture, through mergekern-yaml and mergekit-yaml."""
    transformers = peer("transformers", "transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    for i in range(3):
        torch.manual_seed(i)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"m{i}")
    given = tmp_path / "config.yml"
    files = [tmp_path / f"m{i}" / "model.safetensors" for i in range(3)]
    models = [{"model": str(f.parent), "parameters": {"weight": 0.7}} for f in files[1:]]
    method = {"merge_method": "ties", "base_model": str(files[0].parent), "dtype": "float32"}
    given.write_text(yaml.safe_dump(method | {"models": models}))
    said = run(
        ("from mergekit.scripts.run_yaml import main; main()", given, tmp_path / "theirs"),
        ("import logging; logging.getLogger().setLevel(logging.INFO)",),
        (
            "from mergekern.integrations.mergekit import yaml_main; yaml_main()",
            given,
            tmp_path / "mine",
        ),
    )
    theirs, mine = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "mine"))
    assert f"{len(mine)} tensors merged by mergekern (ties {len(mine)}; " in said
    assert_alike(mine, theirs, files)


# ---- the hook --------------------------------------------------------------------------------

# Start-up lines are read from site folders; this adds one as site does at start.
SITE = "import site, sys; site.addsitedir(sys.argv.pop(1)); "


def test_the_hook_writes_one_file_and_takes_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook.sysconfig, "get_path", lambda _: str(tmp_path))
    hook.remove()
    assert hook.write() == tmp_path / "mergekern_mergekit.pth"
    assert [p.read_text() for p in tmp_path.iterdir()] == [hook.LINE]
    assert hook.LINE.count("\n") == 1
    hook.remove()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(hook.sysconfig, "get_path", lambda _: str(folder))
    hook.write()
    monkeypatch.undo()
    return folder


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_variable_turns_it_on(value: str, site: Path, files: list[Path]) -> None:
    """mergekit's own main, in a Python that started with the line."""
    given = config(files, "linear", base=False)
    out = files[0].parent / "out"
    done = python(SITE + HOST, site, given, out, "-v", MERGEKERN=value)
    assert ("3 tensors merged by mergekern (linear 3; " in done.stderr) is (value == "1")
    assert "Traceback" not in done.stderr
    assert load_file(out / "model.safetensors").keys() == models(torch.float32)[0].keys()


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_nothing_heavy_is_imported_at_the_start(value: str, site: Path) -> None:
    code = (
        SITE + "print([m for m in ('torch', 'mergekern', 'mergekit', 'runpy') if m in sys.modules])"
    )
    found = python(code, site, MERGEKERN=value).stdout.strip()
    assert found == ("['runpy']" if value == "1" else "[]")


def test_nothing_breaks_once_mergekern_is_gone(site: Path) -> None:
    hidden = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name: None if name == 'mergekern' else find(name); "
    )
    done = python(hidden + SITE + "print(len(sys.meta_path))", site, MERGEKERN="1")
    assert done.stderr == ""
    without = python(hidden + SITE + "print(len(sys.meta_path))", site, MERGEKERN="0")
    assert done.stdout == without.stdout


def test_an_unknown_version_is_a_warning_and_mergekit_goes_on(site: Path) -> None:
    code = (
        "import importlib.metadata as m; real = m.version; "
        "m.version = lambda name: '9.9' if name == 'mergekit' else real(name); "
        "import mergekit.merge_methods as mm; print(mm.get('linear').implementation.__module__)"
    )
    done = python(SITE + code, site, MERGEKERN="1")
    assert "MERGEKERN=1 has no effect: mergekit: unknown version; got 9.9" in done.stderr
    assert done.stdout.strip() == "mergekit.merge_methods.linear"


# ---- mergekit 0.1.4 --------------------------------------------------------------------------

# Every method of its registry through its own tasks, with and without the drop-in.
OLDER_RUN = """
import sys, torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Executor, Task
from mergekit.merge_methods.base import TensorDictWrapper
from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS as registered
from mergekern.integrations import mergekit as dropin

class Given(Task[torch.Tensor]):
    number: int
    dtype: str = "float32"
    def arguments(self):
        return {}
    def execute(self):
        g = torch.Generator().manual_seed(0)
        base = torch.randn(24, 32, generator=g)
        g.manual_seed(self.number)
        x = base if not self.number else base + 0.1 * torch.randn(24, 32, generator=g)
        return x.to(getattr(torch, self.dtype))

MODELS = [ModelReference.parse(n) for n in ("base", "one", "two")]
VALUES = {"weight": 0.7, "density": 1.0, "t": 0.3, "scale": 3.0, "lambda": 0.5}
PLENTY = {"passthrough": 1, "slerp": 2, "arcee_fusion": 2, "nearswap": 2}

def merged(name, **dtypes):
    method = registered[name]
    models = MODELS[: PLENTY.get(name, 3)]
    def values(defs):
        return ImmutableMap({p.name: VALUES.get(p.name, p.default_value) for p in defs})
    given = {m: Given(number=i, **dtypes) for i, m in enumerate(models)}
    if "dtype" in dtypes:
        given[models[0]] = Given(number=0)
    task = method.make_task(
        output_weight=WeightInfo(name="w"),
        tensors=TensorDictWrapper(tensors=ImmutableMap(given)),
        base_model=None if name in ("linear", "karcher", "passthrough") else models[0],
        parameters=values(method.parameters()),
        tensor_parameters=ImmutableMap({m: values(method.tensor_parameters()) for m in models}),
    )
    ((_, value),) = Executor([task]).run(quiet=True)
    return value

theirs = {name: merged(name) for name in registered}
mixed = merged("linear", dtype="bfloat16")
before = dict(registered)
replaced = dropin.install()
mine = {name: merged(name) for name in registered}
counted = dropin.counts().methods()
assert torch.equal(merged("linear", dtype="bfloat16"), mixed)
assert ("linear", "shapes or dtypes differ") in dropin.counts().fallbacks
assert registered["ties"].sparsification_method.value == "magnitude"
dropin.uninstall()
assert all(registered[k] is before[k] for k in before) and len(registered) == len(before)
torch.save((theirs, mine, list(replaced), dict(counted)), sys.argv[1])
"""


@pytest.mark.skipif(not OLDER and "older" not in REQUIRED, reason="no MERGEKERN_MERGEKIT_014")
def test_the_older_line(tmp_path: Path) -> None:
    older = {"PYTHONPATH": os.pathsep.join([OLDER, os.environ.get("PYTHONPATH", "")])}
    python(OLDER_RUN, tmp_path / "results.pt", **older)
    theirs, mine, replaced, counted = torch.load(tmp_path / "results.pt")
    assert set(replaced) == set(REGISTRY) & set(theirs)
    assert counted == dict.fromkeys(replaced, 1)
    for name, x in mine.items():
        if name not in replaced:
            assert_bytes_equal(x, theirs[name])
            continue
        # At most 24 roundings a step (slerp's norms and angle among them) of values up to 6.
        assert_within(x, theirs[name].double(), torch.full((), 24 * UNIT * 6 * 4).double())
