"""Some hundreds of mutated headers and configurations; `python -m bench.fuzz` runs thousands."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import fuzzing
import mutants


@pytest.mark.parametrize("kind", ["safetensors", "configuration"])
def test_mutants_end_in_one_line_or_in_a_result(tmp_path: Path, kind: str) -> None:
    report = fuzzing.run(kind, 1_000_000, 500, tmp_path)
    assert report.findings == {}
    assert report.outcomes.total() == 500
    assert min(report.outcomes.values()) > 50  # mutated neither too much nor too little
    assert report.memory < 2 << 30


def test_a_case_is_known_by_its_number() -> None:
    for make in (mutants.safetensors, mutants.configuration):
        made = [make(random.Random(f"kind {i}")) for i in (5, 5, 6)]
        assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import os; os.abort()", "exit -6"),
        ("while True: pass", "exit -27"),  # the signal of the timer
        ("bytearray(2 << 30)", "MemoryError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise ConfigError('two\\nlines')", "no line of at most"),
        ("raise ConfigError('a' * 20_000)", "no line of at most"),
    ],
)
def test_what_goes_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, what: str
) -> None:
    """In the second of three cases, of which the last is still taken."""
    wrong = "from mergekern import ConfigError\ndef safetensors(rng):\n    if rng.random() == "
    wrong += f"{random.Random('safetensors 1').random()}:\n        {code}\n    return b''\n"
    (tmp_path / "mutants.py").write_text(wrong)
    monkeypatch.setattr(mutants, "__file__", str(tmp_path / "mutants.py"))
    copy = tmp_path / "fuzzing.py"
    copy.write_text(Path(fuzzing.__file__).read_text().replace("SECONDS = 5.0", "SECONDS = 2.0"))
    monkeypatch.setattr(fuzzing, "__file__", str(copy))
    report = fuzzing.run("safetensors", 0, 3, tmp_path)
    assert report.outcomes == {"refused": 2}
    assert list(report.findings) == [1]
    assert what in report.findings[1]
