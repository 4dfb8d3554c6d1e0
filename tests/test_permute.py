"""permute: every bit at its new place, whatever the element is."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekern as mk
from mergekern import reference
from mergekern.check import name_of

import cases
from accuracy import assert_bytes_equal
from cases import CHUNK
from refusal import refused
from serving import affordable_shape

OP = "permute"
DTYPES = (
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
LAYOUTS = tuple(k for k in cases.LAYOUTS if k != "odd")


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, so every NaN payload occurs; bool holds 0 and 1."""
    numel = math.prod(shape)
    if dtype == torch.bool:
        g = torch.Generator().manual_seed(seed)
        return torch.randint(0, 2, shape, generator=g).bool()
    data = bytearray(random.Random(seed).randbytes(max(1, numel) * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype)[:numel].reshape(shape).clone()


def order(n: int, seed: int = 1) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def expected_of(x: Tensor, index: dict[int, Any]) -> Tensor:
    """numpy.ix_ over all axes, on the raw bytes of the elements."""
    x = x.cpu().clone(memory_format=torch.contiguous_format)
    data = x.reshape(-1).view(torch.uint8).numpy().tobytes()
    raw = np.frombuffer(data, np.dtype((np.void, x.element_size())))
    grid = [np.asarray(index.get(d, range(n)), np.int64) for d, n in enumerate(x.shape)]
    moved = raw.reshape(x.shape)[np.ix_(*grid)] if grid else raw.reshape(())
    moved_data = bytearray(moved.tobytes()) or bytearray(x.element_size())
    flat = torch.frombuffer(moved_data, dtype=x.dtype)[: moved.size]
    return flat.reshape(moved.shape)


# ---- elements, axes, layouts -----------------------------------------------------------------


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_element_and_axis(
    dtype: torch.dtype, axes: tuple[int, ...], backend: str, device: str
) -> None:
    x = filled((7, 5, 13), dtype).to(device)
    index = {d: order(x.shape[d], d) for d in axes}
    got = mk.permute(x, index, backend=backend)
    assert got.is_contiguous()
    assert_bytes_equal(got, expected_of(x, index))


@pytest.mark.parametrize("axes", [(), (0,), (1,), (3,), (0, 3), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_layouts(
    dtype: torch.dtype, layout: str, axes: tuple[int, ...], backend: str, device: str
) -> None:
    x = cases.LAYOUTS[layout](filled((5, 3, 4, 9), dtype).to(device))
    index = {d: order(x.shape[d], d) for d in axes}
    assert_bytes_equal(mk.permute(x, index, backend=backend), expected_of(x, index))


def test_elements_at_odd_addresses(backend: str, device: str) -> None:
    x = cases.LAYOUTS["odd"](filled((6, 7), torch.float32).to(device))
    index = {0: order(6), 1: order(7)}
    assert_bytes_equal(mk.permute(x, index, backend=backend), expected_of(x, index))


@pytest.mark.parametrize("stream", [False, True], ids=["cached", "streamed"])
@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65, 128, 1024])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 17])
def test_rows_and_widths(
    rows: int,
    width: int,
    stream: bool,
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows are done several at a time, in lines of a cache; the rest is done as well."""
    if backend == "cpu":
        monkeypatch.setattr("mergekern.backends.cpu.runtime.STREAM", 0 if stream else 1 << 40)
    for dtype in (torch.int8, torch.int16, torch.float32, torch.float64, torch.complex128):
        x = filled((rows, width), dtype).to(device)
        for index in ({1: order(width)}, {0: order(rows)}, {0: order(rows), 1: order(width)}):
            assert_bytes_equal(mk.permute(x, index, backend=backend), expected_of(x, index))


@pytest.mark.parametrize("nbytes", [(1 << 15) - 8, 1 << 15, (1 << 15) + 8])
def test_rows_long_enough_to_be_streamed(
    nbytes: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows around 32 KiB, each at another place in its first cache line."""
    if backend == "cpu":
        monkeypatch.setattr("mergekern.backends.cpu.runtime.STREAM", 0)
    for dtype in (torch.int8, torch.int16, torch.float32, torch.float64):
        x = filled((5, nbytes // dtype.itemsize), dtype).to(device)
        got = mk.permute(x, {0: order(5)}, backend=backend)
        assert_bytes_equal(got, expected_of(x, {0: order(5)}))


@pytest.mark.parametrize("width", [1, 40, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64], ids=name_of)
def test_results_narrower_and_wider_than_the_source(
    dtype: torch.dtype, width: int, backend: str, device: str
) -> None:
    x = filled((17, 2, 128), dtype).to(device)
    positions = torch.arange(width) * 37 % 128
    for source in (x, x[:, :, :127], x[1::2], x.transpose(0, 1)):
        index = {2: positions % source.shape[2]}
        got = mk.permute(source, index, backend=backend)
        assert_bytes_equal(got, expected_of(source, index))


@pytest.mark.parametrize("shape", cases.SHAPES, ids=cases.shape_id)
def test_shapes(shape: tuple[int, ...], backend: str, device: str) -> None:
    x = filled(shape, torch.float32).to(device)
    every = {d: order(n) for d, n in enumerate(shape)}
    for index in ({}, every, dict(list(every.items())[:1]), dict(list(every.items())[-1:])):
        got = mk.permute(x, index, backend=backend)
        assert_bytes_equal(got, expected_of(x, index))
        assert got.data_ptr() != x.data_ptr() or not x.numel()


@pytest.mark.parametrize("size", [1, 2, 255, 1023, 1024, 1025, CHUNK - 1, CHUNK + 1])
def test_vectors(size: int, backend: str, device: str) -> None:
    x = filled((size,), torch.bfloat16).to(device)
    index = {0: order(size)}
    assert_bytes_equal(mk.permute(x, index, backend=backend), expected_of(x, index))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    for whole in ((1031, 769), (3, CHUNK + 5), (CHUNK // 2, 3)):
        shape = affordable_shape(backend, whole)
        x = filled(shape, torch.int16).to(device)
        for index in ({0: order(shape[0]), 1: order(shape[1])}, {1: order(shape[1])}):
            assert_bytes_equal(mk.permute(x, index, backend=backend), expected_of(x, index))


def test_the_reference_is_the_oracle_too() -> None:
    x = filled((7, 5, 13), torch.float32)
    index = {0: order(7), 2: order(13)}
    out = torch.empty_like(x)
    reference.permute([out], [x], [index])
    assert_bytes_equal(out, expected_of(x, index))


# ---- positions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions",
    [[3], [0, 0, 0], [4, 0], [0, 1, 2, 3, 4, 4, 3, 2, 1, 0], []],
    ids=["one", "repeated", "shorter", "longer", "none"],
)
def test_selection_and_repetition(positions: list[int], backend: str, device: str) -> None:
    x = filled((5, 5), torch.float32).to(device)
    for index in ({0: positions}, {1: positions}, {0: positions, 1: order(5)}):
        got = mk.permute(x, index, backend=backend)
        assert got.shape[0] == len(index.get(0, range(5)))
        assert_bytes_equal(got, expected_of(x, index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.int8], ids=name_of)
def test_the_inverse_returns_the_input(dtype: torch.dtype, backend: str, device: str) -> None:
    x = filled((31, 33, 3), dtype).to(device)
    index = {0: order(31), 1: order(33), 2: order(3)}
    inverse = {d: torch.argsort(i) for d, i in index.items()}
    there = mk.permute(x, index, backend=backend)
    assert_bytes_equal(mk.permute(there, inverse, backend=backend), x)


def test_nan_payloads_are_kept(backend: str, device: str) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1, -0x80000000], dtype=torch.int32)
    x = bits.view(torch.float32).to(device)
    got = mk.permute(x, {0: [3, 2, 1, 0]}, backend=backend)
    assert torch.equal(got.cpu().view(torch.int32), bits.flip(0))


def test_negative_axes_count_from_the_end(backend: str, device: str) -> None:
    x = filled((4, 6), torch.float32).to(device)
    got = mk.permute(x, {-1: order(6), -2: order(4)}, backend=backend)
    assert_bytes_equal(got, expected_of(x, {1: order(6), 0: order(4)}))


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        torch.tensor,
        lambda i: torch.tensor(i, dtype=torch.int32),
        lambda i: torch.tensor(i, dtype=torch.uint8),
        lambda i: torch.tensor([i, i]).T[:, 0],
        np.array,
        lambda i: np.array(i, np.int32),
        lambda i: np.array(i[::-1])[::-1],
    ],
    ids=["list", "tuple", "int64", "int32", "uint8", "strided", "numpy", "numpy32", "reversed"],
)
def test_forms_of_an_index(form: Any, backend: str, device: str) -> None:
    x = filled((4, 3), torch.float32).to(device)
    got = mk.permute(x, {0: form([2, 0, 3, 1])}, backend=backend)
    assert_bytes_equal(got, expected_of(x, {0: [2, 0, 3, 1]}))


def test_range_is_an_index(backend: str, device: str) -> None:
    x = filled((4, 3), torch.float32).to(device)
    got = mk.permute(x, {0: range(3, -1, -1)}, backend=backend)
    assert_bytes_equal(got, x.flip(0))


@st.composite
def gathers(draw: st.DrawFn) -> tuple[Tensor, dict[int, list[int]]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    x = filled(tuple(shape), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    x = x.permute(draw(st.permutations(range(x.ndim))))
    if draw(st.booleans()):
        x = x[..., ::2]
    axes = draw(st.sets(st.integers(0, x.ndim - 1)))
    return x, {d: draw(st.lists(st.integers(0, x.shape[d] - 1), max_size=9)) for d in axes}


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(gather=gathers())
def test_property_gather(
    gather: tuple[Tensor, dict[int, list[int]]], backend: str, device: str
) -> None:
    x, index = gather
    got = mk.permute(x.to(device), index, backend=backend)
    assert_bytes_equal(got, expected_of(x, index))


@pytest.mark.parametrize("axes", [16, 17, 20])
def test_many_separate_axes(axes: int, backend: str, device: str) -> None:
    """More than the 16 that a C++ view walks."""
    x = filled((2,) * axes, torch.int8).to(device)
    got = mk.permute(x, {d: [1, 0] for d in range(axes)}, backend=backend)
    assert_bytes_equal(got, x.flip(list(range(axes))))


# ---- out -------------------------------------------------------------------------------------


def test_out(backend: str, device: str) -> None:
    x = filled((7, 5, 13), torch.float32).to(device)
    index = {0: order(7)[:4], 2: order(13)}
    expected = expected_of(x, index)
    for step in (1, 3):
        buffer, out = cases.guarded((4, 5, 13), torch.float32, device, step)
        assert mk.permute(x, index, out=out, backend=backend).data_ptr() == out.data_ptr()
        assert_bytes_equal(out, expected)
        assert cases.untouched(buffer, out)
    turned = torch.empty(13, 5, 4, device=device).permute(2, 1, 0)
    assert_bytes_equal(mk.permute(x, index, out=turned, backend=backend), expected)


def test_bad_out_is_refused() -> None:
    x = torch.arange(12.0).view(3, 4)
    with refused(OP, "overlaps an input"):
        mk.permute(x, {0: [2, 1, 0]}, out=x)
    buffer = torch.zeros(20)
    with refused(OP, "overlaps an input"):
        mk.permute(buffer[:10], {0: order(10)}, out=buffer[5:15])
    with refused(OP, "out", "[3, 4]", "[2, 4]"):
        mk.permute(x, {0: [0, 1]}, out=torch.zeros(3, 4))
    with refused(OP, "out", "float64"):
        mk.permute(x, {0: [0, 1, 2]}, out=torch.zeros(3, 4).double())
    with refused(OP, "out overlaps itself"):
        mk.permute(x, {0: [0, 1, 2]}, out=torch.zeros(4).expand(3, 4))


# ---- the door --------------------------------------------------------------------------------


def test_numpy_inputs(backend: str, device: str) -> None:
    x = filled((4, 3), torch.int32)
    given_ = x.numpy() if device == "cpu" else x.to(device)
    got = mk.permute(given_, {0: [2, 0, 3, 1]}, backend=backend)
    assert_bytes_equal(got, expected_of(x, {0: [2, 0, 3, 1]}))


def test_lazy_conjugates_are_resolved(backend: str, device: str) -> None:
    x = filled((4, 3), torch.int32).to(torch.complex64).to(device) * (1 + 2j)
    got = mk.permute(x.conj(), {0: [3, 2, 1, 0]}, backend=backend)
    assert torch.equal(got, x.conj_physical().flip(0))


# ---- permutations only -----------------------------------------------------------------------


def test_permutations_pass_where_they_are_required(backend: str, device: str) -> None:
    x = filled((5, 4), torch.float32).to(device)
    index = {0: order(5), 1: order(4)}
    got = mk.permute(x, index, require="permutation", backend=backend)
    assert_bytes_equal(got, expected_of(x, index))
    empty = mk.permute(x[:0], {0: []}, require="permutation", backend=backend)
    assert empty.shape == (0, 4)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([0, 1, 1], "got 3 positions, 2 of them distinct; expected each of 0 to 2 once"),
        ([0, 1], "got 2 positions, 2 of them distinct; expected each of 0 to 2 once"),
        ([0, 1, 2, 0], "got 4 positions, 3 of them distinct; expected each of 0 to 2 once"),
        ([], "got 0 positions, 0 of them distinct"),
        ([0, 1, 3], "is out of range"),
    ],
    ids=["repeated", "shorter", "longer", "none", "beyond"],
)
def test_no_permutation_is_refused(positions: list[int], words: str) -> None:
    with refused(OP, "index of axis 0 is", words):
        mk.permute(X, {0: positions}, require="permutation")
    with refused("permute_all", "index of axis 0 of w is", words):
        mk.permute_all({"w": X}, {"w": {0: positions}}, require="permutation")


# ---- many tensors ----------------------------------------------------------------------------


def model(device: str) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Tensors of all kinds that a network has, one without indices, some sharing an index."""
    hidden, heads = order(48), order(6).tolist()
    xs = {
        "conv": filled((48, 12, 3, 3), torch.float32),
        "depthwise": filled((48, 1, 3, 3), torch.float16),
        "wide": filled((300, 1031), torch.bfloat16).T,
        "bias": filled((48,), torch.float32),
        "count": torch.tensor(7),
        "next": filled((5, 48), torch.float64),
        "heads": filled((6, 8, 3), torch.int8),
        "none": filled((0, 48), torch.float32),
        "scalar": filled((), torch.float32),
        "untouched": filled((7, 3), torch.float32),
    }
    indices: dict[str, dict[int, Any]] = {
        "conv": {0: hidden, 1: order(12)},
        "depthwise": {0: hidden},
        "wide": {0: order(1031), 1: order(300)},
        "bias": {-1: hidden},
        "next": {1: hidden},
        "heads": {0: heads, 2: [2, 0]},
        "none": {1: hidden},
        "scalar": {},
    }
    return {name: x.to(device) for name, x in xs.items()}, indices


def normal(x: Tensor, index: dict[int, Any]) -> dict[int, Any]:
    return {d % x.ndim: i for d, i in index.items()}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 500, 5000, CHUNK])
def test_all_tensors_of_a_model(
    chunk: int, threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks hold parts of a tensor and several tensors: the same as one after another."""
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    if backend == "cpu":
        monkeypatch.setattr("mergekern.backends.cpu.runtime.CHUNK", chunk)
    xs, indices = model(device)
    for stream in (0, 1 << 40):
        if backend == "cpu":
            monkeypatch.setattr("mergekern.backends.cpu.runtime.STREAM", stream)
        got = mk.permute_all(xs, indices, backend=backend)
        assert list(got) == list(xs)
        for name, x in xs.items():
            assert_bytes_equal(got[name], expected_of(x, normal(x, indices.get(name, {}))))
            assert got[name].data_ptr() != x.data_ptr() or not x.numel()


def test_out_of_all_tensors(backend: str, device: str) -> None:
    xs, indices = model(device)
    expected = mk.permute_all(xs, indices, backend=backend)
    guarded = {
        name: cases.guarded(tuple(x.shape), x.dtype, device, 1 + i % 3)
        for i, (name, x) in enumerate(expected.items())
    }
    out = {name: view for name, (_, view) in guarded.items()}
    got = mk.permute_all(xs, indices, out=out, backend=backend)
    for name, (buffer, view) in guarded.items():
        assert got[name].data_ptr() == view.data_ptr()
        assert_bytes_equal(view, expected[name])
        assert cases.untouched(buffer, view)


def test_nothing_to_permute() -> None:
    assert mk.permute_all({}, {}) == {}


def test_one_index_for_axes_of_two_sizes(backend: str, device: str) -> None:
    """A selection that several tensors share is checked against each of their sizes."""
    index = {0: [1, 0]}
    xs = {"a": filled((2, 3), torch.float32).to(device), "b": filled((5,), torch.int16).to(device)}
    got = mk.permute_all(xs, {"a": index, "b": index}, backend=backend)
    for name, x in xs.items():
        assert_bytes_equal(got[name], expected_of(x, index))
    with refused(
        "permute_all", "index of axis 0 of c is out of range; got 0 to 1; expected 0 to 0"
    ):
        mk.permute_all({**xs, "c": xs["b"][:1]}, {"a": index, "b": index, "c": index})


@pytest.mark.parametrize("run", [1, 2, 9, 64, 65])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=name_of)
def test_short_runs_move_with_their_axis(
    dtype: torch.dtype, run: int, backend: str, device: str
) -> None:
    """The kernel of a convolution lies together; it is moved element by element where short."""
    x = filled((17, 12, run), dtype).to(device)
    for index in ({1: order(12)}, {0: order(17), 1: [3, 3, 0]}, {1: [5] * 40}):
        for source in (x, x[:, :, : max(1, run - 1)], x.transpose(0, 1)):
            if any(max(i) >= source.shape[d] for d, i in index.items()):
                continue
            got = mk.permute(source, index, backend=backend)
            assert_bytes_equal(got, expected_of(source, index))


X = torch.zeros(3, 4)
REFUSALS: dict[str, tuple[tuple, str]] = {
    "no such axis": ((X, {2: [0]}), "no such axis; got 2"),
    "no such negative axis": ((X, {-3: [0]}), "no such axis; got -3"),
    "axis of a scalar": ((torch.tensor(1.0), {0: [0]}), "no such axis; got 0"),
    "axis twice": ((X, {1: [0, 1, 2, 3], -1: [0, 1, 2, 3]}), "an axis is given twice; got 1"),
    "position too large": ((X, {0: [0, 3]}), "out of range; got 0 to 3; expected 0 to 2"),
    "position negative": ((X, {0: [-1, 0]}), "out of range; got -1 to 0; expected 0 to 2"),
    "position on nothing": ((torch.zeros(0), {0: [0]}), "out of range"),
    "floats": ((X, {0: [0.0, 1.0]}), "index of axis 0 is no"),
    "booleans": ((X, {0: [True, False, True]}), "index of axis 0 is no"),
    "matrix": ((X, {0: [[0, 1]]}), "index of axis 0 is no"),
    "number": ((X, {0: 1}), "index of axis 0 is no"),
    "text": ((X, {0: "ab"}), "index of axis 0 is no"),
    "axis of text": ((X, {"rows": [0]}), "axis"),
    "fraction of an axis": ((X, {0.5: [0]}), "axis"),
    "list of lists": ((X, [[0, 1, 2]]), "index"),
    "meta": ((X.to("meta"), {0: [0]}), "meta"),
    "no tensor": (([1.0], {0: [0]}), "x is no tensor"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, words = REFUSALS[what]
    with refused(OP, words):
        mk.permute(*args)


REFUSALS_OF_ALL: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "no mapping": (([X], {}), {}, "xs is no mapping; got list"),
    "no mapping of indices": (({"w": X}, [{}]), {}, "indices is no mapping; got list"),
    "no mapping of axes": (({"w": X}, {"w": [0]}), {}, "index of w is no mapping; got list"),
    "unknown name": (({"w": X}, {"v": {}}), {}, "indices of no tensor; got 'v'"),
    "axis": (({"w": X}, {"w": {2: [0]}}), {}, "no such axis; got 2 of w; expected one of the 2"),
    "axis twice": (({"w": X}, {"w": {0: [0], -2: [0]}}), {}, "given twice; got 0 of w"),
    "range": (({"w": X}, {"w": {0: [3]}}), {}, "index of axis 0 of w is out of range; got 3 to 3"),
    "no tensor": (({"w": [1.0]}, {}), {}, "w is no tensor"),
    "names of out": (({"w": X}, {}), {"out": {"v": X}}, "out and xs differ in names; got 'v'"),
    "out": (({"w": X}, {}), {"out": X}, "out is no mapping; got Tensor"),
    "shape of out": (({"w": X}, {"w": {0: [0]}}), {"out": {"w": X.clone()}}, "out does not fit"),
    "out is xs": (({"w": X}, {}), {"out": {"w": X}}, "out overlaps an input"),
    "out is another of xs": (
        ({"v": X, "w": X + 1}, {}),
        {"out": {"v": X.clone(), "w": X}},
        "overlaps another tensor",
    ),
    "require": (({"w": X}, {}), {"require": "order"}, "require is unknown; got 'order'"),
}


@pytest.mark.parametrize("what", REFUSALS_OF_ALL)
def test_refusals_of_all(what: str) -> None:
    args, kwargs, words = REFUSALS_OF_ALL[what]
    with refused("permute_all", words):
        mk.permute_all(*args, **kwargs)


def test_results_that_overlap_are_refused() -> None:
    buffer = torch.zeros(20)
    out = {"v": buffer[:12].view(3, 4), "w": buffer[8:].view(3, 4)}
    with refused("permute_all", "out['w'] overlaps another tensor"):
        mk.permute_all({"v": X, "w": X}, {}, out=out)


def test_the_kernel_is_the_compiled_one(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, OP, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.permute(X, {0: [1, 0, 2]}, backend="cpu")
