"""mergekern demo"""

from __future__ import annotations


def demo(seed: int = 0, epochs: int | None = None) -> None:
    """Train two small encoders on half the digits each, merge them, and print what is kept."""
    from rich.console import Console

    from .demo_encoders import run

    run(seed=seed, epochs=epochs, console=Console())
