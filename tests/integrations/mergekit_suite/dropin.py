"""pytest plugin: mergekit's suite with the drop-in installed, and who merged what at its end."""

from __future__ import annotations

from typing import Any

from mergekern.integrations import mergekit

METHODS: list[str] = []


def pytest_configure() -> None:
    METHODS.extend(mergekit.install())


def idle() -> list[str]:
    """Methods in the drop-in that no test has run through mergekern."""
    merged = mergekit.counts().methods()
    return [m for m in METHODS if not merged[m]]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    served = mergekit.counts()
    terminalreporter.section("mergekern")
    for method in METHODS:
        terminalreporter.line(f"{method:17} {served.methods()[method]:6} tensors by mergekern")
    for (method, reason), n in sorted(served.fallbacks.items()):
        terminalreporter.line(f"{method:17} {n:6} by mergekit: {reason}")
    if idle():
        terminalreporter.line(f"never ran through mergekern: {', '.join(idle())}")


def pytest_sessionfinish(session: Any) -> None:
    # Only a whole run proves anything about all methods.
    whole = not session.config.option.keyword and not session.config.option.file_or_dir
    if whole and idle() and session.exitstatus == 0:
        session.exitstatus = 1
