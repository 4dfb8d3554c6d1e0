"""emr, magmax, consensus and TALL masks against numpy in the promised arithmetic and in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import bits
from mergekern.check import accumulator, name_of
from mergekern.keep import Mask
from mergekern.methods.bits import Packer

import cases
from accuracy import assert_bits_equal, assert_bytes_equal, assert_within
from refusal import refused

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
SHAPES = ((), (0,), (1,), (9,), (31, 33), (40, 1, 3, 3), (3, 0, 5))


def family(
    n: int,
    shape: tuple[int, ...] = (31, 33),
    dtype: torch.dtype = torch.float32,
    values: str = "normal",
) -> tuple[Tensor, list[Tensor]]:
    return cases.values(shape, dtype, values, 99), [
        cases.values(shape, dtype, values, i) for i in range(n)
    ]


def taus(base: Tensor | None, xs: list[Tensor]) -> list[np.ndarray]:
    """Task vectors in the accumulator, as promised."""
    acc = accumulator(xs[0].dtype)
    with np.errstate(all="ignore"):
        b = 0 if base is None else base.to(acc).numpy()
        return [np.asarray(x.to(acc).numpy() - b if base is not None else x.to(acc)) for x in xs]


def booleans(mask: Mask, like: Tensor) -> np.ndarray:
    bits = mask.bits.numpy()
    assert bits.dtype == np.uint8
    flat = np.unpackbits(bits)
    assert not flat[like.numel() :].any()  # the last byte ends in zeros
    assert len(bits) == math.ceil(like.numel() / 8)
    return flat[: like.numel()].astype(bool).reshape(like.shape)


def rounded(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(values.shape).to(dtype)


def sequential(ds: list[np.ndarray]) -> np.ndarray:
    total = ds[0]
    with np.errstate(all="ignore"):
        for d in ds[1:]:
            total = np.asarray(total + d)
    return total


def numbers(dtype: torch.dtype, *values: float) -> list[np.ndarray]:
    return [NUMPY[accumulator(dtype)](v) for v in values]


# ---- the layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 1001])
@pytest.mark.parametrize("piece", [1, 3, 8, 333])
def test_packing_is_that_of_numpy(n: int, piece: int) -> None:
    flags = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    packer = Packer(n, flags.device)
    for part in flags.split(piece):
        packer.add(part)
    mask = packer.mask()
    assert mask.bits.numpy().tobytes() == np.packbits(flags.numpy()).tobytes()
    assert torch.equal(bits._pack_anywhere(flags), mask.bits)  # as on a GPU
    assert torch.equal(bits._unpack_anywhere(mask.bits)[:n], flags)
    for first in (0, 1, 5, 8, 13):
        count = max(0, min(20, n - first))
        if first <= n:
            assert torch.equal(bits.unpack(mask.bits, first, count), flags[first : first + count])


# ---- EMR -------------------------------------------------------------------------------------


def emr_oracle(ds: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    with np.errstate(all="ignore"):
        sign = np.where(sequential(ds) > 0, ds[0].dtype.type(1), ds[0].dtype.type(-1))
        agrees = [d * sign > 0 for d in ds]
        size = np.max([np.where(a, abs(d), 0) for a, d in zip(agrees, ds, strict=True)], axis=0)
        bad = np.any([np.isnan(d) for d in ds], axis=0)
        masks = [a | np.isnan(d) for a, d in zip(agrees, ds, strict=True)]
    return np.where(bad, np.nan, size * sign).astype(ds[0].dtype), masks


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("values", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_emr(dtype: torch.dtype, values: str, n: int) -> None:
    base, xs = family(n, (1031,), dtype, values)
    unified, masks = emr_oracle(taus(base, xs))
    got = mk.emr(base, xs)
    assert_bits_equal(got.unified, rounded(unified, dtype))
    for mask, want in zip(got.masks, masks, strict=True):
        assert np.array_equal(booleans(mask, base), want)
    ds = [d.astype(np.float64) for d in taus(base, xs)]
    stored = got.unified.double().numpy()
    with np.errstate(all="ignore"):
        for i, (d, m) in enumerate(zip(ds, masks, strict=True)):
            before, after = np.abs(d).mean(), np.where(m, np.abs(stored), 0).mean()
            want = torch.tensor(1.0 if after == 0 else before / after, dtype=torch.float64)
            bound = want.abs() * 4 * 1031 * 2.0**-53  # sums of 1031 in float64, of any order
            assert_within(
                torch.tensor(got.rescale[i], dtype=torch.float64), want, bound.nan_to_num(0, 0)
            )
    b, one = numbers(dtype, 1.0, 0.75)
    with np.errstate(all="ignore"):
        origin = base.to(accumulator(dtype)).numpy()
        merged = origin + unified * one * b
    assert_bits_equal(mk.merge_tensors(xs, "emr", base=base, scale=0.75), rounded(merged, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=cases.shape_id)
def test_emr_of_any_shape_and_without_base(shape: tuple[int, ...]) -> None:
    _, xs = family(3, shape)
    unified, masks = emr_oracle(taus(None, xs))
    got = mk.emr(None, xs)
    assert_bits_equal(got.unified, rounded(unified, torch.float32))
    for mask, want in zip(got.masks, masks, strict=True):
        assert np.array_equal(booleans(mask, xs[0]), want)


def test_emr_gives_one_model_back_and_leaves_an_unchanged_one_alone() -> None:
    base, (x,) = family(1)
    e = mk.emr(base, [x])
    assert e.rescale == [1.0]
    assert_bits_equal(e.model(base, 0), base + (x - base))
    still = mk.emr(base, [x, base.clone()])
    assert_bits_equal(still.model(base, 1), base)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_emr_model_is_base_and_its_share_of_the_unified_vector(dtype: torch.dtype) -> None:
    base, xs = family(3, dtype=dtype)
    e = mk.emr(base, xs)
    acc = accumulator(dtype)
    for i, mask in enumerate(e.masks):
        (r,) = numbers(dtype, e.rescale[i])
        b, u = base.to(acc).numpy(), e.unified.to(acc).numpy()
        want = np.where(booleans(mask, base), b + u * r, b)
        assert_bits_equal(e.model(base, i), rounded(want, dtype))


def test_emr_state_dicts_share_one_rescale() -> None:
    shapes = {"w": (31, 33), "b": (7,), "none": (0,)}
    base, *ds = (
        {k: cases.values(s, torch.float32, "normal", 10 * i) for k, s in shapes.items()}
        for i in range(4)
    )
    for d in (base, *ds):
        d["ids"] = torch.arange(3)
    got = mk.emr_state_dicts(base, ds)
    assert list(got) == list(shapes)
    for i, d in enumerate(ds):
        tau = {k: d[k].double() - base[k].double() for k in shapes}
        kept = {
            k: torch.from_numpy(booleans(got[k].masks[i], d[k])) * got[k].unified.double()
            for k in shapes
        }
        before, after = (
            sum(float(v.abs().mean()) for v in t.values() if v.numel()) for t in (tau, kept)
        )
        for key in shapes:
            want = torch.tensor(before / after, dtype=torch.float64)
            # Differences are rounded to float32 before they are summed.
            rescale = torch.tensor(got[key].rescale[i], dtype=torch.float64)
            assert_within(rescale, want, 2.0**-22 * want)
            single = mk.emr(base[key], [m[key] for m in ds])
            assert_bytes_equal(got[key].unified, single.unified)
    with refused("emr_state_dicts", "w: missing from state_dicts[1]", sentence=False):
        mk.emr_state_dicts(None, [{"w": torch.ones(1)}, {}])
    with refused("emr_state_dicts", "no models"):
        mk.emr_state_dicts(base, [])


# ---- MagMax ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("values", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_magmax(dtype: torch.dtype, values: str, n: int) -> None:
    base, xs = family(n, (1031,), dtype, values)
    ds = np.stack(taus(base, xs))
    with np.errstate(all="ignore"):
        rank = np.where(np.isnan(ds), np.inf, np.abs(ds)).astype(np.float64)
        rank[np.isnan(ds)] = np.inf
        first = np.where(np.isnan(ds).any(0), np.isnan(ds).argmax(0), rank.argmax(0))
        best = np.take_along_axis(ds, first[None], 0)[0]
        (scale,) = numbers(dtype, 0.3)
        want = base.to(accumulator(dtype)).numpy() + best * scale
    assert_bits_equal(mk.merge_tensors(xs, "magmax", base=base, scale=0.3), rounded(want, dtype))


def test_magmax_of_equal_magnitudes_takes_the_first_model() -> None:
    base, xs = torch.zeros(1), [torch.tensor([v]) for v in (1.0, -2.0, 2.0)]
    assert mk.merge_tensors(xs, "magmax", base=base).item() == -2
    assert mk.merge_tensors(xs, "magmax", base=base, host="fusion_bench").item() == 2


# ---- TALL masks and Consensus ----------------------------------------------------------------


def tall_oracle(ds: list[np.ndarray], factors: list[float], dtype: torch.dtype) -> list[np.ndarray]:
    total = sequential(ds)
    with np.errstate(all="ignore"):
        return [
            np.abs(d) > np.abs(total - d) * f
            for d, f in zip(ds, numbers(dtype, *factors), strict=True)
        ]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("values", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_tall_masks_and_consensus(dtype: torch.dtype, values: str, n: int) -> None:
    base, xs = family(n, (1031,), dtype, values)
    ds = taus(base, xs)
    factors = [0.2 + 0.1 * i for i in range(n)]
    want = tall_oracle(ds, factors, dtype)
    masks = mk.tall_masks(base, xs, lambda_=factors)
    for mask, w in zip(masks, want, strict=True):
        assert np.array_equal(booleans(mask, base), w)
    count, total = np.sum(want, axis=0), sequential(ds)
    acc = accumulator(dtype)
    (scale,) = numbers(dtype, 0.3)
    for k in range(n + 2):
        union = mk.consensus_mask(masks, k, base.numel())
        assert np.array_equal(booleans(union, base), count >= k)
        with np.errstate(all="ignore"):
            origin = base.to(acc).numpy()
            kept = (count >= k) | ~np.isfinite(total)
            merged = np.where(kept, origin + total * scale, origin)
        got = mk.merge_tensors(xs, "consensus", base=base, scale=0.3, lambda_=factors, k=k)
        assert_bits_equal(got, rounded(merged, dtype))


def test_tall_masks_of_a_given_model() -> None:
    base, xs = family(3)
    merged = cases.values((31, 33), torch.float32, "normal", 7)
    for mask, x in zip(mk.tall_masks(base, xs, merged, 0.4), xs, strict=True):
        want = (x - base).abs() > (merged - x).abs() * 0.4
        assert np.array_equal(booleans(mask, x), want.numpy())
    for mask, x in zip(mk.tall_masks(None, xs, merged, 0.4), xs, strict=True):
        assert np.array_equal(booleans(mask, x), (x.abs() > (merged - x).abs() * 0.4).numpy())


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_any_layout_and_many_chunks(layout: str) -> None:
    base, xs = family(2, (601, 3, 311))
    base, *xs = (cases.LAYOUTS[layout](x) for x in (base, *xs))
    plain = [x.clone(memory_format=torch.contiguous_format) for x in (base, *xs)]
    for got, want in zip(
        mk.tall_masks(base, xs, lambda_=0.4),
        mk.tall_masks(plain[0], plain[1:], lambda_=0.4),
        strict=True,
    ):
        assert_bytes_equal(got.bits, want.bits)
    got, want = mk.emr(base, xs), mk.emr(plain[0], plain[1:])
    assert_bytes_equal(got.unified, want.unified)
    for a, b in zip(got.masks, want.masks, strict=True):
        assert_bytes_equal(a.bits, b.bits)
    mask = want.masks[1]
    assert_bits_equal(mk.masked(base, xs[0], mask, 0.5), mk.masked(*plain[:2], mask, 0.5))


# ---- files -----------------------------------------------------------------------------------


def state_masks() -> tuple[dict[str, Tensor], dict[str, np.ndarray], dict[str, Mask]]:
    shapes = {"z": (5,), "a.w": (3, 7), "s": (), "e": (0, 4), "b": (40, 1, 3, 3), "c": (16,)}
    like = {k: torch.zeros(s) for k, s in shapes.items()}
    rng = np.random.default_rng(0)
    flags = {k: np.asarray(rng.random(s) < 0.5) for k, s in shapes.items()}
    masks = {k: Mask(torch.from_numpy(np.packbits(f))) for k, f in flags.items()}
    return like, flags, masks


def test_files_are_packbits_of_the_vector_in_sorted_order(tmp_path: Path) -> None:
    like, flags, masks = state_masks()
    path = tmp_path / "m.npy"
    mk.save_masks(path, masks, like)
    vector = np.concatenate([flags[k].ravel() for k in sorted(flags)])
    assert np.load(path, allow_pickle=False).tobytes() == np.packbits(vector).tobytes()
    for source in (path, str(path), np.packbits(vector)):
        got = mk.load_masks(source, like)
        assert list(got) == list(like)
        for key, mask in got.items():
            assert_bytes_equal(mask.bits, masks[key].bits)


def test_files_that_are_refused(tmp_path: Path) -> None:
    like, _, masks = state_masks()
    with refused("save_masks", "names differ", "z"):
        mk.save_masks(tmp_path / "m.npy", {k: m for k, m in masks.items() if k != "z"}, like)
    with refused("save_masks", "mask does not fit", "uint8 [2]", "uint8 [1]"):
        mk.save_masks(tmp_path / "m.npy", {**masks, "z": masks["c"]}, like)
    wrong = {
        "pickled": lambda p: np.save(p, {"task": np.zeros(3, np.uint8)}),  # as tall_masks does
        "floats": lambda p: np.save(p, np.zeros(50)),
        "short": lambda p: np.save(p, np.zeros(3, np.uint8)),
        "empty": lambda p: p.write_bytes(b""),
        "noise": lambda p: p.write_bytes(b"\x93NUMPY\x01\x00junk"),
        "archive": lambda p: p.write_bytes(_archive(tmp_path)),
    }
    for name, write in wrong.items():
        path = tmp_path / f"{name}.npy"
        write(path)
        with pytest.raises(mk.CheckpointError, match=r"load_masks: .*; expected"):
            mk.load_masks(path, like)
    with pytest.raises(FileNotFoundError):
        mk.load_masks(tmp_path / "none.npy", like)


def _archive(folder: Path) -> bytes:
    np.savez(folder / "a.npz", a=np.zeros(1))
    return (folder / "a.npz").read_bytes()


# ---- tiny, mixed, refused --------------------------------------------------------------------

GIVEN = {"emr": {}, "magmax": {}, "consensus": {"lambda_": 0.4, "k": 1}}


@pytest.mark.parametrize("method", GIVEN)
def test_empty_scalar_and_equal_models(method: str) -> None:
    for dtype in cases.DTYPES:
        for shape in ((), (0,), (3, 0, 2)):
            x = torch.full(shape, 2.0, dtype=dtype)
            assert_bits_equal(mk.merge_tensors([x, x], method, base=x, **GIVEN[method]), x)
    base, _ = family(1)
    assert_bits_equal(mk.merge_tensors([base] * 3, method, base=base, **GIVEN[method]), base)


@pytest.mark.parametrize("method", GIVEN)
def test_result_is_rounded_once(method: str) -> None:
    base, xs = family(3)
    got = mk.merge_tensors(xs, method, base=base, out_dtype=torch.float16, **GIVEN[method])
    assert_bits_equal(got, mk.merge_tensors(xs, method, base=base, **GIVEN[method]).half())


def test_refusals() -> None:
    base, xs = family(2)
    with refused("consensus", "k is no whole number"):
        mk.merge_tensors(xs, "consensus", base=base, lambda_=0.4, k=1.5)
    with refused("consensus", "k is out of range"):
        mk.merge_tensors(xs, "consensus", base=base, lambda_=0.4, k=-1)
    with refused("tall_masks", "lambda_ has the wrong length"):
        mk.tall_masks(base, xs, lambda_=[1.0])
    with refused("tall_masks", "merged differs", "shape"):
        mk.tall_masks(base, xs, base[0])
    with refused("emr", "xs is empty"):
        mk.emr(base, [])
    with refused("emr", "dtype"):
        mk.emr(base, [xs[0].double()])
    with refused("masked", "mask does not fit", "uint8 [2]"):
        mk.masked(base, base, Mask(torch.zeros(2, dtype=torch.uint8)))
    with refused("consensus_mask", "masks is empty"):
        mk.consensus_mask([], 1, 3)
    with refused("magmax", "no kernel", error=mk.BackendError, sentence=False):
        mk.merge_tensors(xs, "magmax", base=base, backend="cpu")
