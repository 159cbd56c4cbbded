"""A folder that is replaced as a whole: after a crash, a full disk or a kill there is the new one or the old one.

The new folder is written beside the old one under a name that nobody reads, flushed to the disk, and the two change places
in one step; a single file likewise. The working directory, a mount point, a folder in a read-only one or of a lower overlay layer cannot change
places: there each file is replaced as a whole. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError


try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None


@contextlib.contextmanager
def replaced_folder(folder: str | Path, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yields an empty folder; when the block ends well it takes the place of `folder`, else it is gone and nothing changed.

    Args:
        folder: need not exist.
        is_stale: says of the name of an entry of the old folder whether it goes with it; the others move along.

    Raises:
        OSError: no room or no right to write beside `folder`; it is as it was.
    """
    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    inside = target.exists() and (
        Path.cwd().is_relative_to(target) or os.path.ismount(target) or not os.access(target.parent, os.W_OK)
    )
    place = target if inside else target.parent
    _sweep(place, target.name)
    fresh = place / f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        with written(folder):
            yield fresh
        _flush(fresh)  # takes long; what somebody else writes into `target` meanwhile has to be seen
        old = [entry for entry in target.iterdir() if entry != fresh] if target.exists() else []
        made = sorted(entry.name for entry in fresh.iterdir())
        if not inside:
            for entry in old:
                if not is_stale(entry.name) and not (fresh / entry.name).exists():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.copytree(entry, fresh / entry.name, symlinks=True, copy_function=_take_along)
                    else:
                        _take_along(entry, fresh / entry.name)
            if target.exists():
                shutil.copymode(target, fresh)
            _flush_entry(fresh)
            try:
                _exchange(fresh, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                inside = True
        if inside:
            for entry in map(fresh.joinpath, made):
                if entry.is_dir():
                    shutil.rmtree(target / entry.name, ignore_errors=True)
                entry.replace(target / entry.name)
            for entry in old:
                if is_stale(entry.name) and entry.name not in made:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _flush_entry(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def move_whole(fresh: Path, target: Path) -> None:
    """Gives the complete folder `fresh` the name `target`, beside it, once it is on the disk."""
    _flush(fresh)
    fresh.rename(target)
    _flush_entry(target.parent)


def check_writable(folder: str | Path) -> None:
    """Finds out before long work whether `folder` can be written after it; leaves nothing behind.

    Raises:
        OSError: it cannot.
    """
    place = Path(folder).resolve()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is not a folder, so nothing can be written to {folder}.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=place))
    except OSError as error:
        raise type(error)(f"{folder} cannot be written: {error}.") from error


@contextlib.contextmanager
def readable(path: str | Path, what: str, way_out: str = "") -> Iterator[None]:
    """What a damaged file raises within, whatever it is, is one ValueError that names the file and says that it is no `what`."""
    try:
        yield
    except (
        SafetensorError, OSError, RuntimeError, LookupError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} is damaged, it cannot be read as {what}: {error!r}.{way_out}") from error


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[None]:
    """What safetensors says of a full disk, while `path` is written within, is an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}. What is finished is kept.") from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, no other process works in `folder`, where the system has such locks; made if it is not there.

    Raises:
        ValueError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {folder}: wait for it, or give another folder.") from error
        except OSError:  # nor has every file system
            pass
        yield


def write_whole(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """`write`s a file that appears under its name only when it is complete and on the disk.

    `shared`: several processes may write the same file at once.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    with written(path):
        write(temporary)
    _flush_entry(temporary)
    temporary.replace(path)


def _sweep(place: Path, name: str) -> None:
    """Removes what killed processes left."""
    for left in place.glob(f".{glob.escape(name)}.*.tmp"):
        pid = left.name.removeprefix(f".{name}.").split("-")[0].removesuffix(".tmp")
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _take_along(source: str | Path, target: str | Path) -> None:
    """A second name for the same file where the file system has that, else a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _flush(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _flush_entry(Path(root, name))
        _flush_entry(Path(root))


def _flush_entry(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a system that cannot open a folder, or a dangling link
        return
    try:
        os.fsync(handle)  # a disk that is full may say so only now
    finally:
        os.close(handle)


def _exchange(fresh: Path, target: Path) -> None:
    if not target.exists():
        try:
            fresh.rename(target)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # else another process was there first
                raise
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        at, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(at, os.fsencode(fresh), at, os.fsencode(target), swap) == 0:
            return
    old = fresh.with_suffix(".old")
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
