"""covariance of maps of images, and of several tensors side by side."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of

import cases
from accuracy import assert_bits_equal, assert_within
from cases import values
from moments import DTYPES, FEW, assert_same, bound, exact, rows, snapshot
from refusal import refused
from serving import in_turn, on_host

OP = "covariance"
pytestmark = FEW


# ---- maps of images ----------------------------------------------------------------------------


def every_other(axis: int) -> Any:
    """Of larger maps that are NaN elsewhere."""

    def view(x: Tensor) -> Tensor:
        sizes = list(x.shape)
        sizes[axis] *= 2
        larger = torch.full(sizes, math.nan, dtype=x.dtype, device=x.device)
        chosen = larger[(slice(None),) * axis + (slice(None, None, 2),)]
        return chosen.copy_(x)

    return view


MAP_LAYOUTS = cases.LAYOUTS | {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    **{f"every other of axis {axis}": every_other(axis) for axis in range(4)},
}
# Channels as features lie H W apart. Their rows, of which 8 are read together, are next to each
# other as far as an image goes.
MAPS = [
    *((3, 20, h, w) for h, w in ((1, 1), (1, 7), (2, 4), (3, 3), (7, 7), (9, 11), (4, 16))),
    *((2, c, 5, 7) for c in (1, 7, 8, 9, 47, 49, 65)),
    (23, 5, 7, 7),
]


@pytest.mark.parametrize("layout", MAP_LAYOUTS)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps(shape: tuple[int, ...], layout: str, backend: str, device: str) -> None:
    turn = MAPS.index(shape) + list(MAP_LAYOUTS).index(layout)
    for dtype in in_turn(backend, DTYPES, turn):
        x = MAP_LAYOUTS[layout](values(shape, dtype).to(device)).movedim(1, -1)
        y = values((x.shape[:-1].numel(), 3), dtype, seed=1).to(device)
        found = []
        for v in (x, x.contiguous()) if backend == "cpu" else (x,):
            found.append(mk.Covariance(x.shape[-1], 3, device=device, backend=backend))
            found[-1].update(v, y)
            assert_same(snapshot(found[-1]), snapshot(found[0]))
        assert_within(found[0].covariance(), exact(x, y), bound(x, y, backend))


@pytest.mark.parametrize("shape", [(5, 20, 7, 7), (3, 65, 9, 11), (20, 3, 2, 2)], ids=str)
def test_maps_with_a_mask(shape: tuple[int, ...], backend: str, device: str) -> None:
    """Short and long runs of rows count; what lies between them is NaN, and is not looked at."""
    g = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9, 0.99):
        x = values(shape, torch.float32)
        mask = torch.rand(shape[0], *shape[2:], generator=g) < share
        x = torch.where(mask[:, None], x, math.nan).to(device).movedim(1, -1)
        got = mk.covariance(x, mask=mask.to(device), backend=backend)
        assert_bits_equal(got, mk.covariance(x[mask], backend=backend))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_maps_that_are_not_finite(
    dtype: torch.dtype, bad: float, backend: str, device: str
) -> None:
    x = values((3, 20, 7, 7), dtype).to(device)
    x[1, 19, 6, 6] = x[2, 0, 0, 0] = bad
    with refused(OP, "x has rows with NaN or infinity; got rows 97, 98; expected"):
        mk.covariance(x.movedim(1, -1), backend=backend)
    got = mk.covariance(x.movedim(1, -1), nan="zero", backend=backend)
    zeros = x.nan_to_num(0.0, 0.0, 0.0).movedim(1, -1).contiguous()
    if backend == "cpu":
        assert_bits_equal(got, mk.covariance(zeros, backend=backend))
    assert_within(got, exact(zeros), bound(zeros, backend=backend))


GUARDED = """
import ctypes, mmap, torch, mergekern as mk
page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
area = mmap.mmap(-1, 3 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
x = torch.frombuffer(area, dtype=torch.float32, count=page // 4, offset=page).normal_()
for guard in (start, start + 2 * page):
    assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
for channels in (1, 3, 8, 20):
    for pixels in (2, 4, 5, 7, 12):
        n = channels * pixels
        for part in (x[:n], x[-n:]):
            rows = part.view(channels, pixels).T.expand(3, pixels, channels)
            got = mk.covariance(rows, backend="cpu")
            assert torch.equal(got, mk.covariance(rows.contiguous(), backend="cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_nothing_outside_of_maps_is_read(cpu_backend: Any) -> None:
    """The pages around them are out of bounds; one image is seen three times."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", GUARDED], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()


# ---- several tensors side by side --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("widths", [(1, 1), (64, 64), (47, 1, 50), (5, 100, 3)], ids=str)
def test_tensors_side_by_side_are_one(
    widths: tuple[int, ...], dtype: torch.dtype, backend: str, device: str
) -> None:
    """Of different layouts and shapes, on one side or on both, in panels that they share."""
    size = (5, 7) if on_host(backend) else (23, 29)
    maps = [values((2, w, *size), dtype, seed=i).to(device) for i, w in enumerate(widths)]
    xs = [x.movedim(1, -1) for x in maps]
    xs[1] = xs[1].reshape(-1, widths[1])
    whole = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs], -1)
    y = values((len(whole), 9), dtype, seed=9).to(device)
    mask = torch.arange(len(whole), device=device) % 5 > 0
    for chosen in (None, mask):
        for given_, expected in (
            ((xs,), (whole,)),
            ((tuple(xs), y), (whole, y)),
            (([y], xs), (y, whole)),
            ((xs, xs[1:]), (whole, whole[:, widths[0] :])),
        ):
            found = []
            for sides, plain in ((given_, expected), (expected, expected)):
                dims = [v.shape[-1] for v in plain]
                found.append(mk.Covariance(*dims, device=device, backend=backend))
                found[-1].update(*sides, mask=chosen)
            assert_same(snapshot(found[0]), snapshot(found[1]))


def test_parts_in_a_panel_that_begins_within_a_tensor(backend: str, device: str) -> None:
    """One row of the features from 128 on is far from their mean, and takes more than 8 bits."""
    x, y = values((600, 100), torch.bfloat16), values((600, 60), torch.bfloat16, seed=1)
    y[:, 28:] = (300 + 8 * y[:, 28:].double()).to(torch.bfloat16)
    y[17, 28:] = 129 / 2**14
    moments = mk.Covariance(160, device=device, backend=backend)
    moments.update([x.to(device), y.to(device)])
    whole = torch.cat([x, y], 1)
    assert_within(moments.covariance(), exact(whole), bound(whole, backend=backend))


def test_nan_in_one_of_several_tensors(backend: str, device: str) -> None:
    xs = [rows(300, 5).to(device), rows(300, 50, seed=1).to(device)]
    moments = mk.Covariance(55, device=device, backend=backend)
    moments.update(xs)
    before = snapshot(moments)
    xs[0][[3, 7], 1] = math.nan
    xs[1][[5, 7], 49] = math.inf
    with refused(OP, "x has rows with NaN or infinity; got rows 3, 5, 7; expected"):
        moments.update(xs)
    assert_same(snapshot(moments), before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_of_tensors_side_by_side_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = [values((3, w, 23, 29), torch.float32).to(device).movedim(1, -1) for w in (64, 101)]
    found = []
    for count in (1, threads):
        monkeypatch.setenv("MERGEKERN_THREADS", str(count))
        found.append(mk.Covariance(165, 101, device=device, backend=backend))
        found[-1].update(xs, xs[1])
    assert_same(snapshot(found[1]), snapshot(found[0]))
