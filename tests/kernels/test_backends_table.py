"""README's table of ops and backends is what dispatch and the results say."""

from __future__ import annotations

import backends


def test_is_up_to_date() -> None:
    text = backends.README.read_text()
    assert backends.written(text, backends.measured()) == text, "run python -m bench.backends"


def test_the_fastest_of_each_case_is_shown() -> None:
    rows = [
        {"op": "gram", "name": "a", "backend": "torch", "ms": 2.0, "share": 0.4},
        {"op": "gram", "name": "a", "backend": "triton", "ms": 1.0, "share": 0.8},
        {"op": "gram", "name": "b", "backend": "cuda", "failed": "error is 3 times its bound"},
    ]
    shown = backends.table([{"machine": {"device": "NVIDIA H200"}, "rows": rows}]).splitlines()
    assert shown[0] == "| op | `cpu` | `torch` | `triton` | `cuda` | NVIDIA H200 |"
    (gram,) = [line for line in shown if line.startswith("| `gram`")]
    assert gram.endswith("| a: 0.80 (triton) |")
