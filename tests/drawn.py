"""Texts of a figure, as they are drawn."""

from __future__ import annotations

from typing import Any

import pytest


def check_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no text of a figure that is saved lies on another or leaves the picture."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    boxes: dict[Text, Any] = {}
    draw, save = Text.draw, Figure.savefig

    def recording(self: Text, renderer: Any) -> None:
        boxes[self] = self.get_window_extent(renderer)
        draw(self, renderer)

    def checked(self: Figure, *arguments: Any, **options: Any) -> None:
        boxes.clear()
        save(self, *arguments, **options)
        right, top = options["dpi"] * self.get_size_inches()
        shown = [(t.get_text(), b) for t, b in boxes.items() if t.get_text().strip()]
        assert len(shown) > 10
        for i, (text, a) in enumerate(shown):
            assert min(a.x0, a.y0) >= -1, text
            assert a.x1 <= right + 1, text
            assert a.y1 <= top + 1, text
            for other, b in shown[:i]:
                beside = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1
                assert beside or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1, (text, other)

    monkeypatch.setattr(Text, "draw", recording)
    monkeypatch.setattr(Figure, "savefig", checked)
