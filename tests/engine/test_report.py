"""Reports: numbers that add up over slices, pages that can be read, the model card."""

from __future__ import annotations

import base64
import functools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from mergekern import merge_checkpoints
from mergekern.engine import computing
from mergekern.engine.manifest import MANIFEST
from mergekern.engine.report.card import card, library_of
from mergekern.engine.report.numbers import Row, added, numbers, numbers_of_slices
from mergekern.engine.report.page import check_report, page
from mergekern.engine.report.summary import summarise
from mergekern.methods import REGISTRY, slices
from mergekern.methods.registry import Inputs, Method

from accuracy import assert_bits_equal, assert_within
from cases import values
from drawn import check_texts
from engine.models import write_folder
from refusal import refused

# ---- numbers ---------------------------------------------------------------------------------


@pytest.fixture
def drawing() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib: not installed")


def inputs_of(
    n: int = 3, shape: tuple[int, ...] = (37, 41), dtype: Any = torch.bfloat16, **more: Any
) -> Inputs:
    base = values(shape, dtype, seed=1)
    noise = [values(shape, torch.float32, seed=9 + i) for i in range(n)]
    return Inputs(
        xs=[(base.float() + 0.1 * e).to(dtype) for e in noise],
        base=base,
        name="encoder.layers.0.weight",
        seed=4,
        out_dtype=dtype,
        backend="auto",
        **more,
    )


def merged(inputs: Inputs, name: str, **given: Any) -> tuple[Row, Method, dict[str, Any], Tensor]:
    method = REGISTRY[name]
    arguments = method.arguments(given, len(inputs.xs))
    result = method.merge(inputs, **arguments)
    return numbers(inputs, arguments, method, result), method, arguments, result


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def products(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact dot products, one rounding, and a bound on the error of any order of summation."""
    flat = [t.double().reshape(-1).tolist() for t in tensors]
    dots = torch.tensor(
        [[math.fsum(x * y for x, y in zip(a, b)) for b in flat] for a in flat], dtype=torch.float64
    )
    sizes = [[sum(abs(x * y) for x, y in zip(a, b)) for b in flat] for a in flat]
    bound = (len(flat[0]) + 3) * 2.0**-53 * torch.tensor(sizes, dtype=torch.float64)
    return dots, bound


def test_numbers_of_ties() -> None:
    inputs = inputs_of()
    row, _, _, result = merged(inputs, "ties", weight=1.0, density=0.2)
    total, n = inputs.xs[0].numel(), 3
    base = inputs.base
    assert base is not None
    taus = [x.double() - base.double() for x in inputs.xs]
    dots, bound = products(taus)
    assert_within(f64(row["task_vectors"]).view(n, n), dots, bound)
    square, its_bound = products([result.double() - base.double()])
    assert_within(f64([row["merged"]]), square, its_bound)
    assert row["elements"] == [total] * n
    assert row["kept"] == [int(0.2 * total)] * n
    kept = [
        torch.zeros(total).scatter(0, t.float().abs().view(-1).argsort()[-int(0.2 * total) :], 1.0)
        for t in taus
    ]
    signs = torch.stack([k * t.sign().view(-1) for k, t in zip(kept, taus, strict=True)])
    # Equal magnitudes may be chosen otherwise there: at most as many places as there are ties.
    ties = sum(int((t.abs() == t.abs().view(-1).sort()[0][-int(0.2 * total)]).sum()) for t in taus)
    exact = int(((signs > 0).any(0) & (signs < 0).any(0)).sum())
    assert abs(row["conflicts"][0] - exact) <= ties
    assert row["conflicts"][0] > 0


@pytest.mark.parametrize(
    ("name", "models", "given"),
    [
        ("task_arithmetic", 1, {"weight": 1.0}),
        ("ties", 1, {"weight": 1.0, "density": 0.3}),
        ("magnitude_prune", 1, {"weight": 1.0, "density": 0.3}),
        ("breadcrumbs", 1, {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
        ("dare_linear", 1, {"weight": 1.0, "density": 0.3, "rescale": False}),
        ("della", 1, {"weight": 1.0, "density": 0.3, "epsilon": 0.1}),
        ("della_linear", 1, {"weight": 1.0, "density": 0.3, "epsilon": 0.1}),
        ("ram", 1, {"epsilon": 0.05}),
        ("sce", 2, {"select_topk": 0.3}),  # one mask for all, by their variance
    ],
)
def test_what_is_kept_is_what_the_merge_keeps(
    name: str, models: int, given: dict[str, Any]
) -> None:
    """result - base is nonzero exactly where something is kept."""
    inputs = inputs_of(models, dtype=torch.float64)
    row, _, _, result = merged(inputs, name, **given)
    assert inputs.base is not None
    assert bool((inputs.xs[0] != inputs.base).all())
    assert row["kept"] == [int((result != inputs.base).sum())] * models
    assert (row["conflicts"] == [0.0]) == (models == 1)
    share = row["kept"][0] / inputs.base.numel()
    assert share == 1 if name == "task_arithmetic" else 0 < share < 1


def test_a_host_that_rounds_differences_keeps_by_the_rounded_ones() -> None:
    inputs = inputs_of(dtype=torch.bfloat16, host="mergekit")
    row, *_ = merged(inputs, "ties", weight=1.0, density=0.2)
    assert row["kept"] == [int(0.2 * 37 * 41)] * 3


def test_ties_global_keeps_by_its_survey() -> None:
    inputs = inputs_of()
    method = REGISTRY["ties_global"]
    arguments = method.arguments({"density": 0.25}, 3)
    assert method.survey is not None
    found = method.survey(lambda visitor: visitor(inputs, **arguments))
    inputs = replace(inputs, survey=found)
    row = numbers(inputs, arguments, method, method.merge(inputs, **arguments))
    assert row["kept"] == [int(0.25 * inputs.xs[0].numel())] * 3


def test_draws_of_a_host_are_not_drawn_again() -> None:
    inputs = inputs_of(host="mergekit")
    torch.manual_seed(0)
    row, *_ = merged(inputs, "dare_ties", weight=1.0, density=0.5)
    after = torch.rand(())
    torch.manual_seed(0)
    REGISTRY["dare_ties"].merge(
        inputs, **REGISTRY["dare_ties"].arguments({"weight": 1.0, "density": 0.5}, 3)
    )
    assert_bits_equal(after, torch.rand(()))
    assert "kept" not in row
    everything = numbers(inputs, {"scale": 1.0}, REGISTRY["magmax"], inputs.xs[0])
    assert row["conflicts"] == everything["conflicts"]


@pytest.mark.parametrize("name", ["linear", "karcher"])
def test_without_a_base_the_models_are_compared(name: str) -> None:
    inputs = replace(inputs_of(), base=None)
    row, _, _, result = merged(inputs, name, **({"weight": 1.0} if name == "linear" else {}))
    assert set(row) == {"elements", "models", "merged"}
    dots, bound = products([*inputs.xs, result])
    assert_within(f64(row["models"]).view(3, 3), dots[:3, :3], bound[:3, :3])
    assert_within(f64(row["merged"]), dots[3, 3:], bound[3, 3:])


def test_absent_models_count_nothing() -> None:
    row, *_ = merged(inputs_of(2, models=[0, 2]), "ties", weight=1.0, density=0.5)
    alone, *_ = merged(inputs_of(2), "ties", weight=1.0, density=0.5)
    total = 37 * 41
    assert row["elements"] == [total, 0, total]
    assert row["kept"] == [alone["kept"][0], 0, alone["kept"][1]]
    assert row["conflicts"] == alone["conflicts"]
    whole = f64(row["task_vectors"]).view(3, 3)
    assert_bits_equal(whole[::2, ::2], f64(alone["task_vectors"]).view(2, 2))
    assert not whole[1].any()
    assert not whole[:, 1].any()


def cut(inputs: Inputs, first: int, last: int) -> Inputs:
    flat = [x.reshape(-1)[first:last] for x in inputs.xs]
    base = None if inputs.base is None else inputs.base.reshape(-1)[first:last]
    return replace(inputs, xs=flat, base=base, offset=first, shape=tuple(inputs.xs[0].shape))


@pytest.mark.parametrize("name", ["task_arithmetic", "ram", "linear"])
def test_slices_that_are_together_have_the_bits_of_slices_alone(name: str) -> None:
    inputs = inputs_of()
    inputs = replace(inputs, base=None) if name == "linear" else inputs
    _, method, arguments, result = merged(
        inputs, name, **({} if name == "ram" else {"weight": 1.0})
    )
    ranges = [(0, 500), (500, 501), (501, 1500), (1500, 1517)]
    together = numbers_of_slices(inputs, arguments, method, result, ranges)
    alone = [numbers(cut(inputs, a, b), arguments, method, result.view(-1)[a:b]) for a, b in ranges]
    assert together == alone
    total = functools.reduce(added, together)
    whole = numbers(inputs, arguments, method, result)
    assert total.keys() == whole.keys()
    for key in ("elements", "kept", "conflicts"):
        assert total.get(key) == whole.get(key)


def test_slices_share_the_rules_of_the_whole() -> None:
    """Thresholds, draws and ties of the tensor, though slices are counted one by one."""
    inputs = inputs_of(dtype=torch.float32)
    inputs = replace(inputs, xs=[(4 * x).round() / 4 for x in inputs.xs])
    for name in ("ties", "dare_ties", "breadcrumbs", "della", "sce"):
        given = {"select_topk": 0.4} if name == "sce" else {"weight": 1.0, "density": 0.4}
        whole, method, arguments, result = merged(inputs, name, **given)
        rows = numbers_of_slices(inputs, arguments, method, result, [(0, 700), (700, 1517)])
        for key in ("elements", "kept", "conflicts"):
            assert added(rows[0], rows[1])[key] == whole[key]


def test_numbers_of_nothing_and_of_nan() -> None:
    row, *_ = merged(inputs_of(shape=(0, 3)), "ties", weight=1.0, density=0.5)
    assert row["elements"] == row["kept"] == [0.0] * 3
    assert row["conflicts"] == row["merged"] == [0.0]
    inputs = inputs_of(shape=())
    inputs.xs[1].fill_(math.nan)
    row, *_ = merged(inputs, "task_arithmetic", weight=1.0)
    assert math.isnan(row["task_vectors"][4])
    assert not math.isnan(row["task_vectors"][0])
    assert math.isnan(row["merged"][0])


def test_results_of_another_dtype() -> None:
    """result - base is exact in float64, however each is stored."""
    for out in (torch.float16, torch.float32, torch.float64):
        inputs = replace(inputs_of(2), out_dtype=out)
        row, _, _, result = merged(inputs, "task_arithmetic", weight=0.37)
        assert inputs.base is not None
        square, bound = products([result.double() - inputs.base.double()])
        assert_within(f64([row["merged"]]), square, bound)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "ties_global", "sce", "karcher"])
def test_a_report_does_not_depend_on_the_memory(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawing: None
) -> None:
    """Tensors whole or slice by slice; and the report changes no other file but the card."""
    monkeypatch.setattr(slices, "SLICE", 1 << 14)
    g = torch.Generator().manual_seed(3)
    base = {f"layers.{i}.w": torch.randn(300, 200, generator=g) for i in range(2)}
    paths = [write_folder(tmp_path / "base", base)]
    for i in range(2):
        model = {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()}
        paths.append(write_folder(tmp_path / f"model{i}", model))
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(p)} for p in paths[1:]],
    }
    if method != "karcher":
        known = {p.name for p in REGISTRY[method].parameters}
        given = {"weight": 1.0, "density": 0.3, "select_topk": 0.3}
        config["parameters"] = {k: v for k, v in given.items() if k in known}
        config["base_model"] = str(paths[0])
    together: list[int] = []

    def counted(*arguments: Any) -> list[Row]:
        together.append(len(arguments[-1]))
        return numbers_of_slices(*arguments)

    monkeypatch.setattr(computing, "numbers_of_slices", counted)
    outs, most = [], []
    for memory, report in (("1GiB", "html"), ("1500KiB", "html"), ("1GiB", None)):
        outs.append(tmp_path / f"out{len(outs)}")
        merge_checkpoints(config, outs[-1], memory=memory, report=report, progress=False)
        most.append(max(together, default=0))
        together.clear()
    assert most == [4 if REGISTRY[method].measure else 1, 1, 0]
    a, b, without = ({p.name: p.read_bytes() for p in out.iterdir()} for out in outs)
    assert a == b
    assert a.keys() - without.keys() == {"report.html"}
    assert {k for k in without if without[k] != a[k]} == {"README.md", MANIFEST}
    assert b"[Report](report.html)" in a["README.md"]


# ---- summary ---------------------------------------------------------------------------------


def test_norms_and_cosines_of_known_vectors() -> None:
    def row(*vectors: list[float], elements: int = 4) -> Row:
        v = np.array(vectors)
        return {
            "elements": [float(elements)] * len(v),
            "task_vectors": (v @ v.T).ravel().tolist(),
            "merged": [float((v.mean(0) ** 2).sum())],
            "conflicts": [1.0],
        }

    rows = {
        "stem.weight": row([3.0, 4.0], [0.0, 0.0]),
        "layers.10.b": row([1.0, 0.0], [0.0, 2.0]),
        "layers.9.a": row([1.0, 0.0], [1.0, 0.0]),
        "layers.9.b": row([2.0, 0.0], [-2.0, 0.0]),
    }
    rows["layers.10.c"] = row([2.0, 2.0])  # of model 0 alone
    s = summarise(rows, ["a", "b"])
    assert [layer.name for layer in s.layers] == ["layers.9", "layers.10"]
    assert s.outside == [0]
    assert {k: [t for _, t in v] for k, v in s.kinds().items()} == {
        "a": [2],
        "b": [3, 1],
        "c": [4],
    }
    assert s.norms[0].tolist() == [5.0, 0.0]
    assert math.isnan(s.norms[4, 1])
    assert s.means[2] == 1.0
    assert s.means[3] == 0.0
    assert s.means[4] == math.sqrt(8.0)
    assert s.cosines([2])[0, 1] == 1.0
    assert s.cosines([3])[0, 1] == -1.0
    assert s.cosines([1, 4])[0, 1] == 0.0
    assert math.isnan(s.cosines([0])[0, 1])  # one of them did not move
    assert math.isnan(s.cosines([4])[0, 1])
    assert abs(s.cosines([2, 3])[0, 1] - (1 - 4) / 5) <= 4 * 2.0**-53
    assert s.joint_norms([2, 3]).tolist() == [math.sqrt(5), math.sqrt(5)]
    assert s.conflict_shares is not None
    assert s.conflict_shares.tolist() == [0.25] * 5
    assert s.kept_shares is None


# ---- the page --------------------------------------------------------------------------------

LABELS = ["/models/expert-a", "/models/expert-b <script>", "org/with_$x$_and_$y$"]


def rows_of(n: int, kind: str = "task_vectors") -> dict[str, Row]:
    """Three layers and a stem, of random vectors in the plane."""
    g = np.random.default_rng(n)
    rows = {}
    keys = [f"layers.{i}.{k}.weight" for i in range(3) for k in ("attn", "mlp")]
    for i, key in enumerate(["stem", *keys, "head.<b>&amp;"]):
        v = g.normal(size=(n, 2))
        row: Row = {
            "elements": [1000.0] * n,
            kind: (v @ v.T).ravel().tolist(),
            "merged": [float((v.mean(0) ** 2).sum()) * 2],
        }
        if kind == "task_vectors":
            row |= {"conflicts": [10.0 * (i * 5 % 8)], "kept": [200.0] * n}
        rows[key] = row
    return rows


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["task_vectors", "models"])
def test_a_page_is_whole_and_needs_nothing_else(n: int, kind: str, tmp_path: Path) -> None:
    rows, labels = rows_of(n, kind), LABELS[:n]
    page(rows, tmp_path / "r.html", models=labels, title="Merge of $a$ & b")
    text = (tmp_path / "r.html").read_text()
    page(rows, tmp_path / "again.html", models=labels, title="Merge of $a$ & b")
    assert text == (tmp_path / "again.html").read_text()
    assert not re.search(r"https?://|<script|@import|<link", text)
    assert "<h1>Merge of $a$ &amp; b</h1>" in text
    figures = re.findall(r'<img alt="[^"<>]+" src="data:image/png;base64,([^"]+)">', text)
    assert len(figures) == 2 + (n > 1) + (kind == "task_vectors")
    for data in figures:
        assert min(png_size(base64.b64decode(data))) > 200
    head = re.findall(r"<th>([^<]+)</th>", text)
    assert ("conflicting" in head) == (f"kept of {n - 1}" in head) == (kind == "task_vectors")
    lines = re.findall(r"<tr><td>(.+?)</td>(.*)</tr>", text)
    assert sorted(key for key, _ in lines) == sorted(
        k.replace("<b>&amp;", "&lt;b&gt;&amp;amp;") for k in rows
    )
    cells = [re.findall(r"<td>([^<]*)</td>", rest) for _, rest in lines]
    assert {len(c) for c in cells} == {len(head) - 1}
    if kind == "task_vectors":
        shares = [float(c[1].removesuffix(" %")) for c in cells]
        assert shares == sorted(shares, reverse=True) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.usefixtures("drawing")
def test_a_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG"):
        page(rows_of(3), tmp_path / name, models=LABELS, title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    width, height = png_size((tmp_path / "a.png").read_bytes())
    assert width == 1210
    assert height > width


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("n", [2, 8])
def test_names_do_not_overlap(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts as they are drawn of 300 tensors: none lies on another, none leaves the picture."""
    check_texts(monkeypatch)
    keys = [f"encoder.layers.{i}.{k}" for i in range(24) for k in "abcdefghijkl"]
    keys += [f"outside_with_a_very_long_name_that_is_cut_{c}.weight" for c in "abcdefghijkl"]
    rows = dict.fromkeys(keys, rows_of(n)["stem"])
    labels = [f"/a/rather/long/path/of/a/fine-tuned/model-{i}" for i in range(n)]
    for name in ("r.html", "r.png"):
        page(rows, tmp_path / name, models=labels, title="A merge")


@pytest.mark.usefixtures("drawing")
def test_pages_of_what_is_missing_or_not_finite(tmp_path: Path) -> None:
    """A model that lacks a tensor, a NaN, a tensor without elements, a row without `kept`."""
    rows = rows_of(3)
    rows["layers.0.attn.weight"] = {**rows_of(1)["stem"]}  # of model 0 alone
    rows["layers.1.attn.weight"]["task_vectors"] = [math.nan] * 9
    rows["layers.1.attn.weight"]["merged"] = [math.inf]
    rows["layers.1.mlp.weight"]["task_vectors"][:5] = [math.inf, math.nan, 0.0, math.nan, 0.0]
    rows["layers.2.attn.weight"] = {
        "elements": [0.0] * 3,
        "task_vectors": [0.0] * 9,
        "merged": [0.0],
        "conflicts": [0.0],
    }
    for name in ("r.html", "r.png"):
        page(rows, tmp_path / name, models=LABELS, title="")
    lines = dict(re.findall(r"<tr><td>(.+?)</td>(.*)</tr>", (tmp_path / "r.html").read_text()))
    empty = re.findall(r"<td>([^<]*)</td>", lines["layers.2.attn.weight"])
    assert empty[:5] == ["0", "", "", "", ""]
    one = re.findall(r"<td>([^<]*)</td>", lines["layers.0.attn.weight"])
    assert one[2:5] == ["20.0 %", "", ""]
    assert "nan" not in "".join(lines.values())


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("r.pdf", "report", ".html"):
        with refused("report", "unknown kind of file", repr(Path(name).suffix), ".html or .png"):
            check_report(tmp_path / name)
    with refused("report", "nothing was merged"):
        page({}, tmp_path / "r.html", models=[], title="")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused("report", "matplotlib is not installed", "pip install 'mergekern[picture]'"):
        check_report(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_the_core_loads_no_matplotlib() -> None:
    code = "import sys, mergekern.engine.report.numbers; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- the model card --------------------------------------------------------------------------


def manifest(**more: Any) -> dict[str, Any]:
    tensor = {"dtype": "bfloat16", "arguments": {"weight": [1.0]}, "inputs": {"0": "aa", "1": "bb"}}
    copied = {"arguments": None, "inputs": {"0": "cc"}}
    return {
        "mergekern": "1.2.3",
        "plan": "0123abcd",
        "method": "ties",
        "host": None,
        "seed": 7,
        "config": "merge_method: ties\nbase_model: org/base@main\nmodels:\n- model: ./a`b|c\n",
        "swept": {},
        "models": [
            {"path": "org/base@main", "commit": "f" * 40, "files": [{"size": 5}, {"size": 6}]},
            {"path": "./a`b|c", "commit": None, "files": [{"size": 7}]},
        ],
        "tensors": {
            "w": tensor,
            "position_ids": {"dtype": "int64", **copied},
            "head": {"dtype": "float32", **copied},
        },
        "dropped": ["old.head"],
        "left_out": ["onnx/"],
        **more,
    }


def front_of(text: str) -> dict[str, Any]:
    opened, front, _ = text.split("---\n", 2)
    assert opened == ""
    return yaml.safe_load(front)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    about = front_of(card(manifest(), library="transformers"))
    assert about == {
        "base_model": ["org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergekern"],
    }
    local = manifest()
    for model in local["models"]:
        model["commit"] = None
    assert front_of(card(local)) == {"tags": ["merge", "mergekern"]}


def test_a_card_says_all_there_is_to_know() -> None:
    text = card(manifest(), report="report.html")
    assert text == card(manifest(), report="report.html")
    for part in (
        "mergekern 1.2.3 with the method `ties`: Trim each task vector",
        "[2306.01708](https://arxiv.org/abs/2306.01708)",
        "[Report](report.html)",
        f"| base | `org/base@main` | `{'f' * 40}` | 11 | `",
        r"| model | `` ./a`b\|c `` |  | 7 | `bb` |",
        "3 tensors, of dtype bfloat16 (1), float32 (1), int64 (1):\n\n- 1 merged\n",
        "are the same in all models: `position_ids`",
        "as the configuration says or no other has them: `head`",
        "- 1 dropped, as the configuration says: `old.head`",
        "left behind: `onnx/`",
        "```yaml\nmerge_method: ties\n",
        "Seed of random masks: 7.",
        "mergekern verify .",
        "`0123abcd`",
    ):
        assert part in text, part
    assert "![" in card(manifest(), report="report.png")
    assert "eport](" not in card(manifest())


def test_a_card_of_a_host_and_of_a_sweep() -> None:
    text = card(manifest(host="peft", swept={"density": 0.2}))
    assert "As peft computes it: bits of the merged task vector" in text
    assert "One point of a sweep, with `density: 0.2`" in text


def test_a_card_is_not_broken_by_its_content() -> None:
    """A fence in the configuration, hundreds of names."""
    config = "merge_method: ties  # ```\nbase_model: x\n"
    many = {f"t{i}": {"dtype": "int64", "arguments": None, "inputs": {}} for i in range(500)}
    text = card(manifest(config=config, tensors=many))
    assert f"````yaml\n{config.strip()}\n````" in text
    assert "`t7` and 492 more" in text
    assert "| `org/base@main` |" in text


@pytest.mark.parametrize(
    ("files", "library"),
    [
        ({"config.json": '{"model_type": "vit"}'}, "transformers"),
        ({"config.json": '{"model_type": "bert"}', "modules.json": "[]"}, "sentence-transformers"),
        ({"config.json": '{"architecture": "vit", "pretrained_cfg": {}}'}, "timm"),
        ({"open_clip_config.json": "{}"}, "open_clip"),
        ({"config.json": "[]"}, None),
        ({}, None),
    ],
)
def test_library_of(files: dict[str, str], library: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert library_of(tmp_path) == library
