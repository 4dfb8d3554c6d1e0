"""safetensors files and configurations of which something is wrong, or nothing."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from typing import Any

# ---- safetensors -------------------------------------------------------------------------------

_WEIRD: list[Any] = [0, 1, -1, 7, 8, *(1 << i for i in (31, 32, 53, 63, 64)), (1 << 63) - 1]
_WEIRD += [10**400, 1.5, -0.0, 1e308, math.nan, math.inf, "8", "", None, True, [], {}, [[]]]
_WEIRD += [[0, 8], [8, 0], [0], [0, 8, 16], [1 << 62] * 2, [0, 1 << 62, 1 << 62], [1] * 100]
_WEIRD += ["F8_E8M0", "F4", "F6_E2M3", "F8_E4M3", "C64", "BOOL", "f32", "F32\0", "../x", "\ud800"]
_NAMES = ["", ".", "..", "../x", "/x", "a\0", "a\n", "__metadata__", "ü", "a" * 3000]
_KINDS = [("F32", 4), ("BF16", 2), ("I64", 8), ("U8", 1), ("F8_E5M2", 1)]
_BYTES = [b'"', b"{", b"]", b",", b":", b"\\u", b"\0", b"1", b"*", b"&"]


def safetensors(rng: random.Random) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    offset = 0
    for i in range(rng.randrange(5)):
        dtype, size = rng.choice(_KINDS)
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        offsets = [offset, offset + size * math.prod(shape)]
        header[f"layer.{i}.w"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        offset = offsets[1]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        _mutate(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.2:
        text = _garble(rng, text)
    if rng.random() < 0.03:
        text = b"[" * rng.choice([100, 100_000]) + text
    length = rng.choice([0, 1, 1 << 20, 1 << 63]) if rng.random() < 0.1 else len(text)
    data = rng.randbytes(8 if rng.random() < 0.1 else offset)
    whole = length.to_bytes(8, "little") + text + data
    return whole[:20] if rng.random() < 0.05 else whole


def _mutate(rng: random.Random, header: dict[str, Any]) -> None:
    """One value, key or entry of the header."""
    if not header or rng.random() < 0.2:
        header[rng.choice(_NAMES)] = _weird(rng, {"a": 1}, {"format": 5})
        return
    name = rng.choice(list(header))
    entry = header[name]
    if not isinstance(entry, dict) or not entry or rng.random() < 0.2:
        header[rng.choice([name, *_NAMES])] = _weird(rng, entry)
        return
    key = rng.choice(list(entry))
    if isinstance(entry[key], list) and entry[key] and rng.random() < 0.5:
        entry[key][rng.randrange(len(entry[key]))] = _weird(rng)
    elif rng.random() < 0.2:
        del entry[key]
    else:
        entry[rng.choice([key, "more", "dtype", "shape"])] = _weird(rng)


def _weird(rng: random.Random, *others: Any) -> Any:
    """A value of its own, which later mutations may change."""
    return copy.deepcopy(rng.choice([*_WEIRD, *others]))


def _garble(rng: random.Random, text: bytes) -> bytes:
    """Some bytes replaced, inserted, removed."""
    out = bytearray(text)
    for _ in range(rng.randrange(1, 8)):
        place, do = rng.randrange(len(out) + 1), rng.randrange(3)
        if do == 0:
            out[place : place + 1] = rng.randbytes(1)
        elif do == 1:
            out[place:place] = rng.choice(_BYTES)
        else:
            del out[place : place + rng.randrange(1, 6)]
    return bytes(out)


# ---- configurations ----------------------------------------------------------------------------

_LINEAR = """
merge_method: linear
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
    parameters:
      weight: [0.1, 0.9]
dtype: float32
out_dtype: bfloat16
"""
_TIES = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1, density: 0.5}
  - model: b
    parameters:
      weight:
        - {filter: norm, value: [0, 1]}
        - value: 1e-3
parameters: {normalize: true, lambda: 0.7}
exceptions:
  - {filter: head, action: copy, from: a}
only: ["*layer*", head*]
tokenizer_source: base
"""
_DARE = """
merge_method: dare_linear
base_model: base
models:
  - {model: b, parameters: &own {weight: 2}, prefix: {from: layer, to: block}}
  - model: a
    renames: [[layer.0, block.0], [layer.1, block.1]]
    parameters: {<<: *own}
  - {model: base, prefix: {from: layer, to: block}}
parameters: {density: 0.5, weight: 1.0}
skip: ["*.b"]
"""
_SLERP = "{merge_method: slerp, base_model: base, models: [{model: a}], parameters: {t: [0, 0.5]}}"
_SEEDS = [_LINEAR, _TIES, _DARE, _SLERP]
_WORDS = r"""
1e999 .nan .inf -.inf -1 1_0 _ 0x_ 0b1 = ~ null true 1:1:1:1 2001-99-99 2001-02-30
/ .. ../.. /etc/passwd a+b org/model org/model@v1 copy present drop '*' '[!' ties karcher linear
base a b {} [] *own "\0" "\n" "\uD800" "\x85" '
"""
_SCALARS = [*_WORDS.split(), "{<<: *own}"]
_SCALARS += ["!!int x", "!!float x", "!!bool x", "!!null x", "!!timestamp x", "!!binary x", ""]
_SCALARS += ["!!set {a}", "!!omap [a: 1]", "!!python/object/apply:os.system [ls]", "'a\n\n  b'"]
_SCALARS += ["&x [*x]", "&x {a: *x}", "{? [a] : b}", "{filter: '*', value: 1}"]
_SCALARS += ["9" * 5000, "0x" + "f" * 400, "1:" * 3000 + "1", "'" + "a" * 5000 + "'"]
_SCALARS += ["[" * 40 + "]" * 40, "[" * 3000, "[" + "1," * 3000 + "1]"]


def doubled(first: str, each: str, times: int = 40) -> str:
    """Lines of which each has the one before twice."""
    lines = [f"d0: &d0 {first}\n"]
    for i in range(1, times):
        lines.append(f"d{i}: &d{i} " + each.format(f"*d{i - 1}, *d{i - 1}") + "\n")
    return "".join(lines)


_SNIPPETS = ["%YAML 9.9\n---\n", "---\n", "...\n", "\ufeff", "\u2028", "? [a, b]\n: c\n"]
_SNIPPETS += ["? {a: b}\n: c\n", ".nan: 1\n.nan: 2\n", "2001-01-01: 1\n", "null: 1\n", "only: []\n"]
_SNIPPETS += [
    "merge_method: linear\n",
    "skip: ['*']\n",
    "exceptions: [{filter: a, action: drop}]\n",
]
_SNIPPETS += [doubled("[1]", "[{}]"), doubled("{a: 1}", "{{<<: [{}]}}"), "- " * 500 + "a\n"]
_SNIPPETS += [
    "".join(f"{' ' * i}k:\n" for i in range(200)),
    "".join(f"k{i}: 1\n" for i in range(3000)),
]
_RAW = "surrogateescape"


def configuration(rng: random.Random) -> bytes:
    """A merge of the models a, b and base."""
    text = rng.choice(_SEEDS)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        do = rng.randrange(5)
        lines = text.splitlines(keepends=True) or [""]
        place = rng.randrange(len(lines))
        words = list(re.finditer(r"[\w.*-]+", text))
        if do <= 1 and words:
            word = rng.choice(words)
            text = text[: word.start()] + rng.choice(_SCALARS) + text[word.end() :]
        elif do == 2:
            lines[place] = rng.choice(["", lines[place] * 2, " " + lines[place], lines[place][1:]])
            text = "".join(lines)
        elif do == 3:
            lines.insert(place, rng.choice(_SNIPPETS))
            text = "".join(lines)
        else:
            text = _garble(rng, text.encode(errors=_RAW)).decode(errors=_RAW)
    return text.encode(errors=_RAW)
