"""Names of spaces, after the modules that produce them."""

from __future__ import annotations

from collections.abc import Hashable

from ..spaces import Place


def titles(
    places: list[list[Place]], fixed: list[bool], heads: list[Hashable]
) -> tuple[list[str], dict[Hashable, str]]:
    """A name for each space, plain ones for what may move, and for each group of heads."""
    names, group_names = _Names(), _Names()
    found = [""] * len(places)
    groups: dict[Hashable, str] = {}
    for i in sorted(range(len(places)), key=lambda i: fixed[i]):
        found[i] = names.of(places[i])
        if heads[i] is not None and heads[i] not in groups:
            groups[heads[i]] = group_names.unlike(_parent(found[i]))
    return found, groups


class _Names:
    """Names of spaces, after the modules that produce them."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, places: list[Place]) -> str:
        sources = [p for p in places if p.role in ("produces", "both")]
        if not sources:
            read = places[0].role == "consumes"
            return self.unlike(f"input of {_module(places[0].name)}" if read else places[0].name)
        modules = [*dict.fromkeys(_module(p.name) for p in sources)]
        parents = {m.rpartition(".")[0] for m in modules}
        if 1 < len(modules) <= 3 and len(parents) == 1 and parents != {""}:
            name = f"{parents.pop()}.{'+'.join(m.rpartition('.')[2] for m in modules)}"
        else:
            name = modules[0]
        first = sources[0]
        if name in self._taken:
            low, high = int(first.positions.min()), int(first.positions.max())
            name = f"{name}[{low}:{high + 1}]"
        return self.unlike(name)

    def unlike(self, name: str) -> str:
        """The name, or one with a number that nothing has yet."""
        title, number = name, 2
        while title in self._taken:
            title, number = f"{name}#{number}", number + 1
        self._taken.add(title)
        return title


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _parent(name: str) -> str:
    return name.rpartition(".")[0] or name
