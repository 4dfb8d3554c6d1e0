"""Eight-bit floats: read exactly, merged as float32, written only as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekern import CheckpointError, merge_checkpoints, merge_tensors
from mergekern.check import FLOATS8
from mergekern.methods import slices

from accuracy import assert_bits_equal, assert_bytes_equal
from engine.models import linear, nothing_left, read_folder, write_file, write_folder

CODES = torch.arange(256, dtype=torch.uint8)
# Bits of the exponent and of the mantissa, bias; "fnuz" has one NaN in the place of -0.
FORMATS = {
    torch.float8_e4m3fn: (4, 3, 7),
    torch.float8_e5m2: (5, 2, 15),
    torch.float8_e4m3fnuz: (4, 3, 8),
    torch.float8_e5m2fnuz: (5, 2, 16),
}


def value(code: int, dtype: torch.dtype) -> float:
    """What the eight bits mean (OCP 8-bit floating point specification; for fnuz, AMD's)."""
    exponents, mantissas, bias = FORMATS[dtype]
    sign = -1.0 if code >> 7 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissas, code & ((1 << mantissas) - 1)
    if dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        if code == 0x80:
            return math.nan
    elif dtype == torch.float8_e4m3fn:
        if code & 0x7F == 0x7F:
            return math.nan
    elif exponent == (1 << exponents) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissas)
    return sign * math.ldexp((1 << mantissas) + mantissa, exponent - bias - mantissas)


def test_every_type_is_known() -> None:
    assert set(FORMATS) == set(FLOATS8)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("result", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_code_is_read_exactly(
    tmp_path: Path, dtype: torch.dtype, result: str, suffix: str
) -> None:
    """Merged with itself a model is itself; every value is one of all four wider types."""
    path = write_file(tmp_path / f"m{suffix}", {"w": CODES.view(dtype)})
    merge_checkpoints(linear(path, path, out_dtype=result), tmp_path / "out", progress=False)
    expected = [value(code, dtype) for code in range(256)]
    got = read_folder(tmp_path / "out")["w"]
    assert_bits_equal(got, torch.tensor(expected, dtype=torch.float64).to(getattr(torch, result)))


def encoders(tmp_path: Path, dtype: torch.dtype) -> tuple[list[Path], list[torch.Tensor]]:
    """A base of bfloat16, an expert of eight bits, one of float32; and their values."""
    g = torch.Generator().manual_seed(3)
    xs = [torch.randn(37, 53, generator=g) for _ in range(3)]
    xs = [xs[0].bfloat16(), xs[1].to(dtype), xs[2]]
    paths = [write_folder(tmp_path / f"m{i}", {"w": x}) for i, x in enumerate(xs)]
    return paths, [x.float() for x in xs]


@pytest.mark.parametrize("dtype", FLOATS8, ids=str)
@pytest.mark.parametrize("size", [1 << 22, 53, 100])
def test_it_is_a_merge_of_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int
) -> None:
    monkeypatch.setattr(slices, "SLICE", size)
    paths, values = encoders(tmp_path, dtype)
    models = [{"model": p, "parameters": {"weight": w}} for p, w in zip(paths[1:], (0.3, 0.6))]
    data = {"merge_method": "ties", "base_model": paths[0], "models": models}
    data |= {"parameters": {"density": 0.5}, "out_dtype": "bfloat16"}
    merge_checkpoints(data, tmp_path / "out", progress=False)
    expected = merge_tensors(
        values[1:], "ties", base=values[0], weight=[0.3, 0.6], density=0.5, out_dtype=torch.bfloat16
    )
    assert_bits_equal(read_folder(tmp_path / "out")["w"], expected)


@pytest.mark.parametrize("place", [0, 1])
def test_what_the_result_is_must_be_said(tmp_path: Path, place: int) -> None:
    """A mean of eight-bit numbers needs more bits; nothing is rounded to them unasked."""
    paths, _ = encoders(tmp_path, torch.float8_e4m3fn)
    both = [paths[1], paths[0]] if place else [paths[0], paths[1]]
    with pytest.raises(CheckpointError, match=r"w: eight-bit floats in .*m1; .*dtype or out_dtype"):
        merge_checkpoints(linear(*both), tmp_path / "out", progress=False)
    assert nothing_left(tmp_path, "out")
    merge_checkpoints(linear(*both, dtype="float16"), tmp_path / "out", progress=False)
    assert read_folder(tmp_path / "out")["w"].dtype == torch.float16


@pytest.mark.parametrize("dtype", FLOATS8, ids=str)
@pytest.mark.parametrize("how", ["only", "copy"])
def test_what_is_copied_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, how: str) -> None:
    """Many codes are NaN, and -0 is one of them for fnuz."""
    content = {"q": CODES.view(dtype), "w": torch.ones(3)}
    paths = [write_file(tmp_path / f"{i}.safetensors", content) for i in range(2)]
    more: dict[str, Any] = {"only": ["w"]}
    if how == "copy":
        more = {"exceptions": [{"filter": "q", "action": "copy", "from": str(paths[1])}]}
    merge_checkpoints(linear(*paths, **more), tmp_path / "out", progress=False)
    assert_bytes_equal(read_folder(tmp_path / "out")["q"], content["q"])


SCALES = [
    ("mlp.weight", "mlp.weight_scale_inv"),
    ("mlp.weight", "mlp.weight_scale"),
    ("mlp.weight", "mlp.scale_weight"),
    ("mlp.w", "mlp.w_scale"),
    ("mlp.weight", "mlp.scale"),
]


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_quantised_weights_are_no_numbers_to_average(tmp_path: Path, name: str, scale: str) -> None:
    """Means of weights and of scales would not be those of their products."""
    quantised = {name: CODES[:4].view(torch.float8_e4m3fn), scale: torch.ones(1)}
    plain = {name: torch.ones(4), scale: torch.ones(1)}
    paths = [
        write_file(tmp_path / f"{i}.safetensors", content)
        for i, content in enumerate((plain, quantised))
    ]
    with pytest.raises(CheckpointError, match=f"to be multiplied by {scale}; dequantise"):
        merge_checkpoints(linear(*paths, dtype="float32"), tmp_path / "out", progress=False)
    only = linear(*paths, dtype="float32", only=[scale])
    merge_checkpoints(only, tmp_path / "out", progress=False)


def test_a_tensor_called_scale_is_none_of_another_part(tmp_path: Path) -> None:
    eight = torch.ones(4).to(torch.float8_e5m2)
    content = {"mlp.weight": eight, "norm.scale": eight.clone(), "mlp.scales": torch.ones(1)}
    paths = [write_file(tmp_path / f"{i}.safetensors", content) for i in range(2)]
    merge_checkpoints(linear(*paths, dtype="float32"), tmp_path / "out", progress=False)
    assert_bits_equal(read_folder(tmp_path / "out")["norm.scale"], torch.ones(4))
