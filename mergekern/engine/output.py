"""The weight files of a result, one set for every point of a sweep, and their indices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .files import SafetensorsWriter, nbytes
from .files.formats import Piece
from .plan import Plan, Shard


class Output:
    """Files of final size below `root`; slices go where they belong as they are finished."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self._plan, self._root = plan, root
        self._written: set[SafetensorsWriter] = set()
        self._where: list[dict[str, tuple[SafetensorsWriter, str]]] = []
        signatures = {t.key: t.signature for t in plan.tasks}
        for point in plan.points:
            where: dict[str, tuple[SafetensorsWriter, str]] = {}
            for shard in plan.shards:
                path = root / point / shard.path
                path.parent.mkdir(parents=True, exist_ok=True)
                inside = {name: signatures[key] for key, name in shard.names.items()}
                writer = SafetensorsWriter(path, inside, plan.metadata, keep=True)
                where.update({key: (writer, name) for key, name in shard.names.items()})
            self._where.append(where)

    def write(self, point: int, results: Sequence[tuple[int, int, memoryview]]) -> None:
        """The bytes of slices: (task, index of the slice, bytes)."""
        by_file: dict[SafetensorsWriter, list[Piece]] = {}
        for task, index, data in results:
            t = self._plan.tasks[task]
            writer, name = self._where[point][t.key]
            begin = t.slices[index][0] * t.result.itemsize
            by_file.setdefault(writer, []).append((name, begin, data))
        for writer, pieces in by_file.items():
            writer.write_many(pieces)
        self._written.update(by_file)

    def read(self, point: int, task: int, index: int) -> bytes:
        """What is there now of a slice."""
        t = self._plan.tasks[task]
        begin, end = (i * t.result.itemsize for i in t.slices[index])
        writer, name = self._where[point][t.key]
        return writer.read_bytes(name, begin, end - begin)

    def sync(self) -> None:
        """What this process wrote is on the disk, where other machines find it."""
        for writer in self._written:
            writer.sync()

    def clear_rest(self) -> None:
        """Removes all but the weights: what another run left there may be outdated since."""
        weights = {self._root / p / s.path for p in self._plan.points for s in self._plan.shards}
        for path in sorted(self._root.rglob("*"), reverse=True):  # what a folder holds before it
            if not path.is_dir() or path.is_symlink():
                if path not in weights:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()

    def write_indices(self) -> None:
        folders: dict[Path, list[Shard]] = {}
        for shard in self._plan.shards:
            folders.setdefault(Path(shard.path).parent, []).append(shard)
        sizes = {t.key: nbytes(t.signature) for t in self._plan.tasks}
        for folder, shards in folders.items():
            if len(shards) == 1:
                continue
            weight_map = {n: Path(s.path).name for s in shards for n in s.names.values()}
            total = sum(sizes[key] for s in shards for key in s.names)
            stem = Path(shards[0].path).name.partition("-0")[0]
            about = {"metadata": {"total_size": total}, "weight_map": weight_map}
            for point in self._plan.points:
                path = self._root / point / folder / f"{stem}.safetensors.index.json"
                path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
