"""How a refusal reads: `op: what is wrong; got X; expected Y` (design, section 9)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mergekern import ArgumentError, MergekernError

_SENTENCE = re.compile(r"[^\s;][^;]*; got [^;]+; expected [^;]+")


@contextmanager
def refused(
    op: str, *words: str, error: type[MergekernError] = ArgumentError, sentence: bool = True
) -> Iterator[None]:
    """The block raises `error`, whose text names `op`, follows the form and holds `words`.

    `sentence=False` is for BackendError, whose text is the sentence of `dispatch.why_not`.
    """
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert text.startswith(f"{op}: "), f"does not begin with the op: {text!r}"
    assert "\n" not in text, f"more than one line: {text!r}"
    for word in words:
        assert word in text, f"does not say {word!r}: {text!r}"
    if sentence:
        body = text.removeprefix(f"{op}: ")
        assert _SENTENCE.fullmatch(body), f"not `op: what; got X; expected Y`: {text!r}"
