"""Samples on disk as the inputs of a network: arrays by name, or folders of images."""

from __future__ import annotations

import bisect
import itertools
import json
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .. import check
from ..errors import ArgumentError
from .files import SafetensorsFile

_OP = "data"
_ARRAYS = (".npz", ".npy", ".safetensors")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_PLAIN = ("x", "images")  # names of an array that is the input, whatever the network calls it


@dataclass(frozen=True)
class Pixels:
    """How images become numbers: ((0..255) / 255 - mean) / std, of a square of `size`.

    None stands for what was not said: the size as it is, mean 0 and std 1.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def numbers(self, x: Tensor) -> Tensor:
        """uint8 [channels, height, width] as float32."""
        scaled = x.float() / 255
        if self.mean is not None:
            scaled = scaled - self._each("mean", self.mean, len(x))
        return scaled if self.std is None else scaled / self._each("std", self.std, len(x))

    @staticmethod
    def _each(name: str, values: tuple[float, ...], channels: int) -> Tensor:
        if len(values) not in (1, channels):
            expected = f"1 or {channels}, one for each channel"
            raise ArgumentError.of(_OP, f"{name} has the wrong length", len(values), expected)
        return torch.tensor(values).view(-1, 1, 1)

    def filled(self, folder: Path | None) -> Pixels:
        """What is left open by a folder's preprocessor_config.json, where there is one."""
        path = folder / "preprocessor_config.json" if folder else None
        if path is None or not path.is_file():
            return self
        given = json.loads(path.read_text(encoding="utf-8"))
        normalized = given.get("do_normalize", True) and "image_mean" in given
        size = given.get("crop_size" if given.get("do_center_crop") else "size")
        known = {
            "size": None if size is None else _side(size),
            "mean": tuple(given["image_mean"]) if normalized else None,
            "std": tuple(given["image_std"]) if normalized else None,
        }
        said = {k: v for k, v in asdict(self).items() if v is not None}
        return Pixels(**(known | said))


def _side(size: Any) -> int:
    """Of a square: a number, {"height", "width"} or {"shortest_edge"}."""
    return int(min(size.values()) if isinstance(size, dict) else size)


class Samples(Dataset[Any]):
    """What a network takes, one sample at a time: a tensor, or a mapping of named ones.

    left_out: arrays that are no input of the network.
    """

    left_out: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Any: ...

    @abstractmethod
    def file(self, i: int) -> Path:
        """Where sample i is read from."""


class Batches:
    """Samples in random order, in batches whose sizes differ by one at most.

    In order, classes would come one after another; and a short last batch would count as much as
    the others in the statistics of BatchNorm.
    """

    def __init__(
        self, samples: Samples, size: int, limit: int | None, seed: int, device: str
    ) -> None:
        self.samples, self.device = samples, device
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        self.rows = order[:limit].tolist()
        self._count = -(-len(self.rows) // size)

    def __len__(self) -> int:
        return self._count

    def files(self) -> list[Path]:
        """Those that the samples are read from."""
        return sorted({self.samples.file(row) for row in self.rows})

    def __iter__(self) -> Iterator[Any]:
        n = len(self.rows)
        for i in range(self._count):
            rows = self.rows[n * i // self._count : n * (i + 1) // self._count]
            batch = default_collate([self.samples[row] for row in rows])
            if isinstance(batch, Tensor):
                yield batch.to(self.device)
            else:
                yield {name: x.to(self.device) for name, x in batch.items()}


def open_samples(
    path: Path, inputs: Sequence[str], dtype: torch.dtype, pixels: Pixels, folder: Path | None
) -> Samples:
    """inputs: names of the arguments of the network; floating arrays are cast to `dtype`.

    pixels: what the user says of images; `folder` may hold a preprocessor_config.json with more.
    """
    if not path.exists():
        raise ArgumentError.of(_OP, "no such file or folder", str(path), "samples to run over")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    arrays = [p for p in files if p.suffix in _ARRAYS]
    images = [p for p in files if p.suffix.lower() in _IMAGES]
    if bool(arrays) == bool(images):
        got = f"{len(arrays)} and {len(images)} in {path}"
        expected = f"either {', '.join(_ARRAYS)} or {', '.join(_IMAGES)}"
        raise ArgumentError.of(_OP, "it must be arrays or images", got, expected)
    if images:
        named = "pixel_values" if "pixel_values" in inputs else None
        return _Images(images, pixels.filled(folder), named, dtype)
    return _Arrays(arrays, inputs, pixels, folder, dtype)


# ---- arrays ----------------------------------------------------------------------------------


class _Arrays(Samples):
    """Files of arrays, one after another; the first axis is that of the samples."""

    def __init__(
        self,
        files: list[Path],
        inputs: Sequence[str],
        pixels: Pixels,
        folder: Path | None,
        dtype: torch.dtype,
    ) -> None:
        self._files, self.dtype = files, dtype
        self._parts = [_read(path) for path in files]
        chosen, self._alone = _chosen(list(self._parts[0]), inputs)
        self.left_out = tuple(name for name in self._parts[0] if name not in chosen)
        self._parts = [_checked(p, part, chosen) for p, part in zip(files, self._parts)]
        _require_alike(files, self._parts)
        sizes = [len(next(iter(part.values()))) for part in self._parts]
        self._ends = list(itertools.accumulate(sizes))
        if not self._ends[-1]:
            raise ArgumentError.of(_OP, "there are no samples", "none", "at least one")
        self._pixels = pixels.filled(folder)
        bytes_alone = all(x.dtype == torch.uint8 for x in self._parts[0].values())
        if not bytes_alone and pixels != Pixels():
            expected = "uint8 arrays or a folder of images"
            raise ArgumentError.of(
                _OP, "size, mean and std are for images", "arrays of numbers", expected
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def file(self, i: int) -> Path:
        return self._files[bisect.bisect_right(self._ends, i)]

    def __getitem__(self, i: int) -> Any:
        at = bisect.bisect_right(self._ends, i)
        row = i - (self._ends[at - 1] if at else 0)
        sample = {name: self._input(x[row]) for name, x in self._parts[at].items()}
        return next(iter(sample.values())) if self._alone else sample

    def _input(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8 and x.ndim == 3:
            channels_last = x.shape[2] in (1, 3) and x.shape[0] not in (1, 3)
            return self._pixels.numbers(x.permute(2, 0, 1) if channels_last else x).to(self.dtype)
        return x.to(self.dtype) if x.is_floating_point() else x


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        tensors = SafetensorsFile(path)
        return {name: tensors.read(name) for name in tensors.signatures}
    try:
        if path.suffix == ".npy":
            found = {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        expected = "an array or an archive of them, as numpy.save and numpy.savez write it"
        raise ArgumentError.of(_OP, f"{path} cannot be read", error, expected) from None
    return {name: check.tensor(_OP, x, name, floating=False) for name, x in found.items()}


def _chosen(names: list[str], inputs: Sequence[str]) -> tuple[list[str], bool]:
    """Which arrays are inputs, and whether the one there is goes in without a name."""
    named = [name for name in inputs if name in names]
    plain = [name for name in _PLAIN if name in names] or (names if len(names) == 1 else [])
    if named and named != plain[:1]:
        return named, False
    if plain:
        return plain[:1], True
    expected = f"x, images or the model's inputs: {', '.join(inputs)}"
    raise ArgumentError.of(_OP, "no array is an input", ", ".join(names) or "none", expected)


def _checked(path: Path, part: dict[str, Tensor], chosen: list[str]) -> dict[str, Tensor]:
    missing = [name for name in chosen if name not in part]
    if missing:
        got = ", ".join(part) or "none"
        raise ArgumentError.of(_OP, f"{path} lacks an array", got, ", ".join(chosen))
    sizes = {name: len(part[name]) if part[name].ndim else "a scalar" for name in chosen}
    if len({*sizes.values()}) > 1 or "a scalar" in sizes.values():
        expected = "as many samples in each"
        raise ArgumentError.of(_OP, f"arrays of {path} differ in length", sizes, expected)
    return {name: part[name] for name in chosen}


def _require_alike(files: list[Path], parts: list[dict[str, Tensor]]) -> None:
    for path, part in zip(files, parts):
        for name, x in part.items():
            first = parts[0][name]
            if (x.dtype, x.shape[1:]) != (first.dtype, first.shape[1:]):
                got = f"{check.name_of(x.dtype)} {list(x.shape[1:])}"
                expected = f"{check.name_of(first.dtype)} {list(first.shape[1:])}, as {files[0]}"
                what = f"{name} of {path} differs from that of the first file"
                raise ArgumentError.of(_OP, what, got, expected)


# ---- images ----------------------------------------------------------------------------------


class _Images(Samples):
    """Image files, read when they are needed; all of one size."""

    def __init__(
        self, files: list[Path], pixels: Pixels, name: str | None, dtype: torch.dtype
    ) -> None:
        try:
            import PIL.Image
            import PIL.ImageOps
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "PIL":
                raise  # Pillow is there but broken: its own message says more than ours
            expected = "pip install pillow, or arrays"
            raise ArgumentError.of(
                _OP, "Pillow is not installed", "a folder of images", expected
            ) from None
        self._pillow = PIL
        self._files, self.name, self.dtype = files, name, dtype
        if pixels.size is None:
            with self._opened(files[0]) as first:
                self._size = first.size
        else:
            self._size = pixels.size, pixels.size
        self._pixels, self._fit = pixels, pixels.size is not None

    def __len__(self) -> int:
        return len(self._files)

    def file(self, i: int) -> Path:
        return self._files[i]

    def __getitem__(self, i: int) -> Any:
        path = self._files[i]
        with self._opened(path) as file:
            image = file.convert("RGB")
        if self._fit:
            bicubic = self._pillow.Image.Resampling.BICUBIC
            image = self._pillow.ImageOps.fit(image, self._size, bicubic)
        elif image.size != self._size:
            what = f"{path} differs in size from {self._files[0]}"
            expected = "x".join(map(str, self._size)) + ", or --size"
            raise ArgumentError.of(_OP, what, "x".join(map(str, image.size)), expected)
        x = self._pixels.numbers(torch.from_numpy(np.array(image)).permute(2, 0, 1)).to(self.dtype)
        return x if self.name is None else {self.name: x}

    def _opened(self, path: Path) -> Any:
        try:
            return self._pillow.Image.open(path)
        except OSError as error:
            raise ArgumentError.of(_OP, f"{path} is no image", error, "an image") from None
