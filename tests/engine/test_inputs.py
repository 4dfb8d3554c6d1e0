"""Samples on disk: which arrays are inputs, what images become, how they are drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekern.engine.inputs import Batches, Pixels, Samples, open_samples

from accuracy import assert_bytes_equal
from refusal import refused

RNG = np.random.default_rng(0)
NUMBERS = RNG.normal(size=(5, 3, 2)).astype(np.float32)
TOKENS = RNG.integers(0, 9, (5, 4))
MARKS = TOKENS > 3


def opened(path: Path, *inputs: str, folder: Path | None = None, **pixels: Any) -> Samples:
    return open_samples(path, inputs or ("x",), torch.float32, Pixels(**pixels), folder)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: torch.from_numpy(x.copy()) for name, x in arrays.items()}, path)
    elif path.suffix == ".npy":
        np.save(path, next(iter(arrays.values())))
    else:
        np.savez(path, **arrays)
    return path


# ---- arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "arrays", "inputs", "left_out"),
    [
        ("a.npy", {"": NUMBERS}, ["pixels"], ()),
        ("a.npz", {"anything": NUMBERS}, ["pixels"], ()),
        ("a.npz", {"y": TOKENS, "x": NUMBERS}, ["pixels"], ("y",)),
        ("a.npz", {"images": NUMBERS, "label": TOKENS}, ["pixels"], ("label",)),
        ("a.npz", {"x": NUMBERS, "label": TOKENS}, ["x"], ("label",)),
        ("a.safetensors", {"x": NUMBERS}, ["pixels"], ()),
    ],
)
def test_one_array_goes_in_without_a_name(
    tmp_path: Path, file: str, arrays: dict, inputs: list[str], left_out: tuple[str, ...]
) -> None:
    samples = opened(saved(tmp_path / file, **arrays), *inputs)
    assert (len(samples), samples.left_out) == (5, left_out)
    for i in range(5):
        assert_bytes_equal(samples[i], torch.from_numpy(NUMBERS[i]))
        assert samples.file(i) == tmp_path / file


@pytest.mark.parametrize("file", ["a.npz", "a.safetensors"])
def test_arrays_by_the_names_of_the_inputs(tmp_path: Path, file: str) -> None:
    path = saved(tmp_path / file, tokens=TOKENS, mask=MARKS, label=TOKENS)
    samples = opened(path, "tokens", "mask", "more")
    assert samples.left_out == ("label",)
    for i in range(5):
        assert list(samples[i]) == ["tokens", "mask"]
        assert_bytes_equal(samples[i]["tokens"], torch.from_numpy(TOKENS[i]))
        assert_bytes_equal(samples[i]["mask"], torch.from_numpy(MARKS[i]))


def test_x_beside_another_input_has_its_name(tmp_path: Path) -> None:
    samples = opened(saved(tmp_path / "a.npz", x=NUMBERS, mask=MARKS), "x", "mask")
    assert list(samples[0]) == ["x", "mask"]


def test_files_of_a_folder_follow_each_other(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "2.npz", x=NUMBERS[3:4], other=TOKENS[3:4])
    saved(tmp_path / "a" / "3.npy", x=NUMBERS[4:])
    saved(tmp_path / "a" / "1.safetensors", x=NUMBERS[:3])
    (tmp_path / "a" / "readme.txt").touch()
    samples = opened(tmp_path / "a")
    assert_bytes_equal(torch.stack(list(samples)), torch.from_numpy(NUMBERS))
    assert [samples.file(i).name[0] for i in range(5)] == list("11123")


def test_floats_are_cast_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", x=NUMBERS.astype(np.float64))
    assert_bytes_equal(opened(path)[2], torch.from_numpy(NUMBERS[2]))
    half = open_samples(path, ["x"], torch.bfloat16, Pixels(), None)
    assert_bytes_equal(half[2], torch.from_numpy(NUMBERS[2]).bfloat16())


@pytest.mark.parametrize("last", [False, True])
def test_bytes_are_pixels(tmp_path: Path, last: bool) -> None:
    pixels = RNG.integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    path = saved(tmp_path / "a.npz", x=pixels.transpose(0, 2, 3, 1) if last else pixels)
    expected = torch.from_numpy(pixels).float() / 255
    for x, y in zip(opened(path), expected, strict=True):
        assert_bytes_equal(x, y)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0])
    normalized = opened(path, mean=tuple(mean.tolist()), std=(2.0,))[1]
    assert_bytes_equal(normalized, (expected[1] - mean.view(3, 1, 1)) / std)


# ---- images ----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, np.ndarray]:
    image = pytest.importorskip("PIL.Image", reason="pillow: not installed")
    pixels = RNG.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    for i, name in enumerate(("cat/0.png", "cat/1.PNG", "dog/0.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels[i]).save(tmp_path / "images" / name)
    (tmp_path / "images" / "labels.csv").touch()
    return tmp_path / "images", pixels


def scaled(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def test_images_of_all_folders_below(pictures: tuple[Path, np.ndarray]) -> None:
    folder, pixels = pictures
    samples = opened(folder)
    assert len(samples) == 3
    for x, y in zip(samples, pixels, strict=True):
        assert_bytes_equal(x, scaled(y))
    assert samples.file(2) == folder / "dog" / "0.png"


def test_images_are_cut_square(pictures: tuple[Path, np.ndarray]) -> None:
    folder, pixels = pictures
    for x, y in zip(opened(folder, size=4), pixels, strict=True):
        assert_bytes_equal(x, scaled(y[:, 1:5]))  # as high as it was, so nothing is resampled
    assert opened(folder, size=9)[0].shape == (3, 9, 9)


def test_images_as_the_preprocessor_says(pictures: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, pixels = pictures
    config = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [2, 4, 8],
        "size": {"height": 4, "width": 4},
    }
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    expected = (scaled(pixels[0][:, 1:5]) - mean) / std
    assert_bytes_equal(opened(folder, folder=tmp_path)[0], expected)
    said = opened(folder, folder=tmp_path, mean=(0.0,))[0]
    assert_bytes_equal(said, scaled(pixels[0][:, 1:5]) / std)
    crop = {"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": 4}
    path.write_text(json.dumps(config | crop | {"do_normalize": False}))
    assert_bytes_equal(opened(folder, folder=tmp_path)[0], scaled(pixels[0][:, 1:5]))
    path.write_text("{}")
    assert_bytes_equal(opened(folder, folder=tmp_path)[0], scaled(pixels[0]))


def test_images_go_in_as_pixel_values_where_that_is_an_input(
    pictures: tuple[Path, np.ndarray],
) -> None:
    folder, pixels = pictures
    sample = opened(folder, "input_ids", "pixel_values")[0]
    assert list(sample) == ["pixel_values"]
    assert_bytes_equal(sample["pixel_values"], scaled(pixels[0]))


# ---- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "size", "limit", "sizes"),
    [(10, 4, None, [3, 3, 4]), (9, 8, None, [4, 5]), (10, 99, None, [10]), (10, 2, 5, [1, 2, 2])],
)
def test_batches_are_even(
    tmp_path: Path, n: int, size: int, limit: int | None, sizes: list[int]
) -> None:
    path = saved(tmp_path / "a.npz", x=np.arange(n, dtype=np.float32))
    batches = Batches(opened(path), size, limit, 0, "cpu")
    found = list(batches)
    assert [len(x) for x in found] == sizes
    assert len(batches) == len(sizes)
    seen = torch.cat(found).tolist()
    assert len({*seen}) == (limit or n)
    assert seen != sorted(seen)
    assert torch.cat(list(batches)).tolist() == seen
    assert torch.cat(list(Batches(opened(path), size, limit, 1, "cpu"))).tolist() != seen
    assert batches.files() == [path]


def test_batches_of_named_inputs(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", tokens=TOKENS, mask=MARKS)
    batches = Batches(opened(path, "tokens", "mask"), 5, None, 0, "cpu")
    (batch,) = batches
    assert_bytes_equal(batch["tokens"], torch.from_numpy(TOKENS[batches.rows]))
    assert_bytes_equal(batch["mask"], torch.from_numpy(MARKS[batches.rows]))


# ---- refusals --------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    def npz(name: str, **arrays: np.ndarray) -> Path:
        return saved(tmp_path / name, **arrays)

    two = saved(tmp_path / "two" / "1.npz", x=NUMBERS).parent
    saved(two / "2.npz", x=NUMBERS[:, :1])
    lacks = saved(tmp_path / "lacks" / "1.npz", tokens=TOKENS, mask=MARKS).parent
    saved(lacks / "2.npz", tokens=TOKENS)
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK nothing")
    objects = npz("objects.npz", x=np.array([{}], dtype=object))
    for path, inputs, words in (
        (tmp_path / "none", ["x"], ["no such file or folder"]),
        (empty, ["x"], ["arrays or images", "got 0 and 0"]),
        (npz("a.npz", a=NUMBERS, b=NUMBERS), ["q"], ["no array is an input", "a, b", "q"]),
        (npz("d.npz", a=NUMBERS, b=MARKS[:2]), ["a", "b"], ["differ in length", "2"]),
        (npz("s.npz", x=np.float32(1)), ["x"], ["a scalar"]),
        (npz("e.npz", x=NUMBERS[:0]), ["x"], ["no samples"]),
        (two, ["x"], ["2.npz differs", "[1, 2]", "[3, 2], as"]),
        (lacks, ["tokens", "mask"], ["2.npz lacks an array", "tokens, mask"]),
        (broken, ["x"], ["cannot be read"]),
        (objects, ["x"], ["cannot be read"]),
    ):
        with refused("data", *words):
            opened(path, *inputs)
    with refused("data", "size, mean and std are for images"):
        opened(npz("f.npz", x=NUMBERS), size=3)
    bytes_ = npz("b.npz", x=np.zeros((2, 3, 4, 4), np.uint8))
    with refused("data", "mean has the wrong length", "got 2", "1 or 3"):
        opened(bytes_, mean=(0.1, 0.2))[0]


def test_refusals_of_images(
    pictures: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = pictures
    from PIL import Image

    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "dog" / "1.png")
    with refused("data", "1.png differs in size", "5x5", "6x4, or --size"):
        opened(folder)[3]
    (folder / "dog" / "1.png").write_bytes(b"no image")
    with refused("data", "1.png is no image"):
        opened(folder, size=4)[3]
    saved(folder / "a.npz", x=NUMBERS)
    with refused("data", "arrays or images", "1 and 4"):
        opened(folder)
    (folder / "a.npz").unlink()
    for name in ("PIL", "PIL.Image", "PIL.ImageOps"):
        monkeypatch.setitem(sys.modules, name, None)
    with refused("data", "Pillow is not installed", "pip install pillow"):
        opened(folder)
