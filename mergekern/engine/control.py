"""Where an output is made: locked by one run, kept if that dies, renamed when it is complete.

Beside OUT stands `.OUT.mergekern`: a lock, the journals, and `out`, which takes the name OUT at the
end by one rename. Whatever happens before leaves nothing under that name; whatever happens after
leaves all of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError


def control_folder(target: Path) -> Path:
    absolute = target.absolute()
    return absolute.parent / f".{absolute.name}.mergekern"


def check_target(target: Path) -> None:
    """Whether a folder may be made there; CheckpointError if anything but an empty one is."""
    if target.is_symlink() or target.name in ("", ".", ".."):
        raise CheckpointError(f"{target}: output must be a new folder, by its own name")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: output exists already; remove it or choose another name")


def check_space(target: Path, size: int) -> None:
    """Whether the disk has room for so many bytes more."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if size > free:
        raise CheckpointError(
            f"{target}: the result needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB"
        )


class Control:
    """The control folder of an output, held by this process."""

    def __init__(self, target: Path, folder: Path, lock: int) -> None:
        self.target, self.folder, self._lock = target, folder, lock
        self.out = folder / "out"

    def share(self) -> str:
        """Lets in those who know the word it returns (`shared`). Another job gets the lock when
        the last of them has ended, so that none writes into what it makes."""
        word = uuid.uuid4().hex
        os.pwrite(self._lock, word.encode(), 0)
        os.fsync(self._lock)  # other machines shall read it
        if not _flock(self._lock, fcntl.LOCK_SH):
            raise _busy(self.target)
        return word

    def clear(self) -> None:
        """Forgets whatever an earlier run left."""
        for path in self.folder.iterdir():
            if path.name == "out":
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def commit(self) -> None:
        """Gives `out` its name. Everything is on the disk before it has it, and after."""
        self.out.chmod(0o777 & ~_umask())
        _sync_tree(self.out)
        self.out.rename(self.target)
        _sync(self.folder.parent)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def held(target: Path) -> Iterator[Control]:
    """The control folder, locked against other processes until the end."""
    folder = control_folder(target)
    try:
        fd = _lock(folder, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield Control(target, folder, fd)
    finally:
        os.close(fd)


def forget(target: Path) -> None:
    """Removes what a run left that was killed after its output had the name."""
    if control_folder(target).exists():
        with held(target) as control:
            control.remove()


@contextlib.contextmanager
def shared(target: Path, word: str) -> Iterator[Control]:
    """The control folder that rank 0 holds and has shared with those who know the word."""
    folder = control_folder(target)
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(folder / "lock", os.O_RDWR)
            stack.callback(os.close, fd)
            known = os.read(fd, len(word)) == word.encode()
        except FileNotFoundError:
            known = False
        if not known:
            raise CheckpointError(
                f"{target}: what rank 0 has made there is not seen here; the output must lie on a "
                "file system that all machines share"
            )
        if not _flock(fd, fcntl.LOCK_SH):
            raise _busy(target)
        yield Control(target, folder, fd)


@contextlib.contextmanager
def staged(target: Path, size: int) -> Iterator[Path]:
    """A folder that takes the name `target` at the end, or vanishes on any error."""
    check_target(target)
    check_space(target, size)
    with held(target) as control:
        try:
            control.clear()
            control.out.mkdir()
            yield control.out
            control.commit()
        except OSError as error:
            raise writing_failed(target, error) from error
        finally:
            control.remove()


def writing_failed(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{target}: writing failed ({error.strerror or error})")


def _lock(folder: Path, target: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder went with the run that ended just now
            continue
        try:
            free = _flock(fd, fcntl.LOCK_EX)
        except OSError:
            os.close(fd)
            raise
        if not free:
            os.close(fd)
            raise _busy(target)
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
        os.close(fd)  # the lock of a folder that has been removed


def _flock(fd: int, mode: int) -> bool:
    """Takes the lock, or says that it is not free."""
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(target: Path) -> CheckpointError:
    return CheckpointError(f"{target}: another process is writing it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
