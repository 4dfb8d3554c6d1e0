"""Progress: the time left is right, on any display; lines are neither silent nor spam."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import threading
from collections.abc import Iterable, Iterator

import pytest

from mergekern.engine.progress import Bar, JsonLines, _Lines, _Terminal, bar

MB = 1_000_000


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def run(shown: Bar, clock: Clock, steps: Iterable[tuple[int, float]]) -> Iterator[float]:
    """Advances by (bytes, seconds they take); yields the seconds that have passed."""
    start = clock.now
    for size, seconds in steps:
        clock.now += seconds
        shown.advance(size)
        yield clock.now - start


def of_size(total: int, largest: int, seed: int) -> Iterator[int]:
    """Random sizes up to `largest` that are `total` together."""
    draw = random.Random(seed)
    while total:
        size = min(total, draw.randint(1, largest))
        total -= size
        yield size


# ---- the estimate ----------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.5, 30, 3 * 3600])
@pytest.mark.parametrize(("steps", "uneven"), [(60, 0.0), (2000, 0.25), (20_000, 0.75)])
@pytest.mark.parametrize("seed", range(3))
def test_at_a_steady_rate_the_time_left_is_right(
    seconds: float, steps: int, uneven: float, seed: int
) -> None:
    """Within 10 % from a fifth of the work on; the rates of single parts vary by `uneven`."""
    clock, draw = Clock(), random.Random(seed)
    total = 10_000 * MB
    sizes = list(of_size(total, 2 * total // steps, seed))
    taken = [size * draw.uniform(1 - uneven, 1 + uneven) for size in sizes]
    scale = seconds / sum(taken)
    shown = Bar(clock)
    shown.expect(total)
    for passed in run(shown, clock, zip(sizes, (t * scale for t in taken), strict=True)):
        if 0.2 * total <= shown.done < 0.9 * total:
            assert shown.left == pytest.approx(seconds - passed, rel=0.1)
    assert shown.left == 0
    assert shown.done == shown.total == total


def test_a_pass_that_only_reads_is_forgotten() -> None:
    """Two fifths at four times the rate: the time left is right once half of the rest is done."""
    clock = Clock()
    shown = Bar(clock)
    shown.expect(1000 * MB)
    steps = [(MB, 0.025)] * 400 + [(MB, 0.1)] * 600
    whole = sum(seconds for _, seconds in steps)
    for passed in run(shown, clock, steps):
        if 700 * MB <= shown.done < 1000 * MB:
            assert shown.left == pytest.approx(whole - passed, rel=0.1)


def test_a_pause_is_no_new_rate() -> None:
    """A disk that stops for a second each minute."""
    clock = Clock()
    shown = Bar(clock)
    shown.expect(6000 * MB)
    steps = [(MB, 1.1 if i % 600 == 300 else 0.1) for i in range(6000)]
    whole = sum(seconds for _, seconds in steps)
    for passed in run(shown, clock, steps):
        if 1200 * MB <= shown.done < 5700 * MB:
            assert shown.left == pytest.approx(whole - passed, rel=0.1)


def test_the_clock_starts_with_the_work() -> None:
    clock = Clock()
    shown = Bar(clock)
    clock.now += 100
    shown.expect(10 * MB)
    list(run(shown, clock, [(MB, 1.0)] * 2))
    assert shown.rate == MB
    assert shown.left == 8


def test_nothing_is_known_at_first() -> None:
    clock = Clock()
    shown = Bar(clock)
    assert (shown.rate, shown.left, shown.share) == (0, None, "0.00 of 0.00 MB")
    shown.expect(5 * MB)
    shown.advance(MB)  # at the same instant
    assert (shown.rate, shown.left) == (0, None)


def test_what_is_kept_is_bounded() -> None:
    clock = Clock()
    shown = Bar(clock)
    shown.expect(200_000)
    for _ in run(shown, clock, [(1, 0.05)] * 200_000):
        assert len(shown._marks) <= 150


def test_threads_count_every_byte() -> None:
    shown = Bar()
    shown.expect(8 * 5000)
    threads = [
        threading.Thread(target=lambda: [shown.advance(1) for _ in range(5000)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown.done == shown.total


# ---- plain lines -----------------------------------------------------------------------------


def lines(
    capsys: pytest.CaptureFixture[str], seconds: float, steps: int
) -> list[tuple[float, int, str]]:
    """(when, bytes done, text) of each line of a merge at a steady rate."""
    clock, found = Clock(), []
    shown = _Lines(clock)
    shown.expect(steps * MB)
    for passed in run(shown, clock, [(MB, seconds / steps)] * steps):
        if text := capsys.readouterr().err:
            found.append((passed, shown.done, text))
    return found


@pytest.mark.parametrize("seconds", [1.5, 8, 60, 2000])
def test_lines_are_neither_silent_nor_spam(
    capsys: pytest.CaptureFixture[str], seconds: float
) -> None:
    step = seconds / 4000
    found = lines(capsys, seconds, 4000)
    assert found
    moments = [0.0, *(passed for passed, _, _ in found), seconds]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert max(gaps) <= 10 + 1.001 * step
    assert min(gaps[:-1]) >= 0.999
    assert all(text.count("\n") == 1 for _, _, text in found)
    if seconds <= 60:
        assert len(found) <= 10


def test_a_short_merge_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, 0.9, 100) == []


def test_a_line_about_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors without elements, and a disk that takes its time."""
    clock = Clock()
    shown = _Lines(clock)
    shown.expect(0)
    list(run(shown, clock, [(0, 2.0)]))
    assert capsys.readouterr().err == "merging: 0 %, 0.00 of 0.00 MB, 0.00 GB/s\n"


def test_what_a_line_says(capsys: pytest.CaptureFixture[str]) -> None:
    (passed, done, text), *_ = lines(capsys, 40, 4000)
    assert (done, round(passed)) == (400 * MB, 4)
    assert text == "merging: 10 %, 0.40 of 4.00 GB, 0.10 GB/s, 0:00:36 left\n"


# ---- JSON ------------------------------------------------------------------------------------


def test_json_events(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    shown = JsonLines(clock)
    with bar(shown=shown) as same:
        assert same is shown
        shown.plan(tensors=3, bytes_read=5)
        shown.expect(100 * MB)
        list(run(shown, clock, [(MB // 2, 0.0625)] * 200))
    printed, errors = capsys.readouterr()
    assert errors == ""
    plan, *progress = map(json.loads, printed.splitlines())
    assert plan == {"event": "plan", "tensors": 3, "bytes_read": 5}
    assert len(progress) == 25  # in 12.5 seconds
    for event in progress:
        done = event["bytes_done"]
        assert event == {
            "event": "progress",
            "bytes_done": done,
            "bytes_total": 100 * MB,
            "bytes_per_second": 8 * MB,
            "seconds_left": pytest.approx((100 * MB - done) / (8 * MB), abs=0.06),
        }


# ---- which ------------------------------------------------------------------------------------


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [(Screen, "xterm", _Terminal), (Screen, "dumb", _Lines), (io.StringIO, "xterm", _Lines)],
)
def test_the_display_fits_stderr(
    monkeypatch: pytest.MonkeyPatch, stream: type, term: str, kind: type
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr", stream())
    assert type(bar(shown=True)) is kind
    assert type(bar(shown=False)) is Bar


def test_the_bar_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at all of it, and shows the figures of the lines."""
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setitem(os.environ, "COLUMNS", "100")
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    clock = Clock()
    with _Terminal(clock) as shown:
        shown.expect(2000 * MB)
        list(run(shown, clock, [(MB, 0.01)] * 2000))
    last = screen.getvalue().rpartition("merging")[2]
    assert "2.00 of 2.00 GB, 0.10 GB/s, 0:00:00 left" in last
