"""The one module that writes files: whole or not at all, and on the disk once a call returns.

A file or folder gets a temporary name beside its own (`.tmp-…`), is flushed to the disk, and is
then renamed. Whatever stops a write half-way leaves the old content; what a killed process left
behind is removed by `sweep`, under the lock of the folder's owner.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_tuner.errors import Fault, RunError, UsageError

MANIFEST = "MANIFEST.json"

_TEMPORARY = ".tmp-"
_TRASH = ".trash-"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_CANNOT_SYNC = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}


# ---- a file ------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path with the suffix and folder of `path`; what is written there becomes `path`.

    The folder is made if need be. The rename happens only if the block ends without an exception;
    otherwise the temporary file is removed and an earlier `path` is as it was. In a folder that is
    itself temporary the file gets its own name at once: the folder's block flushes all of it.
    """
    if _is_staged(path):
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        yield path
        return
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}{path.suffix}")
    with faults_named(path):
        make_folder(path.parent)
        try:
            yield temporary
            _sync(temporary)
            _rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Make `path` hold `data`."""
    with replacing(path) as temporary, faults_named(path, len(data)):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _write(descriptor, data)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Make `path` hold `text` in UTF-8, its newlines as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Make `path` hold `value` as indented JSON; not-a-number and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, text: str) -> None:
    """Add one line to `path`, in one write: the whole line or nothing. Not flushed (see `sync`)."""
    line = text.encode("utf-8") + b"\n"
    with faults_named(path, len(line)):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write(descriptor, line)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Put what was appended to `path` on the disk."""
    with faults_named(path):
        _sync(path)
        _sync(path.parent)


# ---- a folder ----------------------------------------------------------------------------------


def require_new(directory: Path) -> None:
    """Refuse a folder for results that exists and is not empty, before any work is done."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(
            Fault(str(directory), "", "is there already; choose another folder or remove this one")
        )


@contextmanager
def staging(directory: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary folder beside `directory`; once filled and flushed, it becomes `directory`.

    `MANIFEST.json`, with the size and SHA-256 of every file, is written last. `directory` must not
    exist, or be empty. After an exception in the block nothing is left, and what a killed process
    left of the same `directory` is removed by the next one.

    Args:
        size: bytes that it takes, for the message of a full disk.
    """
    from concurrent.futures import ThreadPoolExecutor  # a start that is refused needs none

    require_new(directory)
    target = directory.resolve()  # which has a name and a parent, unlike "."
    prefix = f"{_TEMPORARY}{target.name[:64]}-"
    temporary = target.with_name(f"{prefix}{uuid.uuid4().hex}")
    with faults_named(directory, size), ExitStack() as stack:
        _discard_abandoned(target.parent, prefix)
        try:
            make_folder(temporary)
            if (held := _hold(temporary)) is not None:
                stack.callback(os.close, held)
            yield temporary
            files = _files_below(temporary)
            with ThreadPoolExecutor() as pool:  # one part of the machine hashes, another flushes
                entries = pool.map(_entry, files.values())
                for path in files.values():
                    _sync(path)
                listed = dict(zip(files, entries, strict=True))
            write_text(temporary / MANIFEST, _manifest(listed))
            _sync(temporary / MANIFEST)
            for folder in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
                _sync(folder)
            _rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def filling(directory: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary folder in `directory`; each file put there then replaces its namesake.

    Every file is whole at any time, though a crash may leave the first of them new and the last
    old. They come in the order of their names.
    """
    temporary = directory / f"{_TEMPORARY}{uuid.uuid4().hex}"
    with faults_named(directory, size):
        try:
            make_folder(temporary)
            yield temporary
            files = _files_below(temporary)
            for path in files.values():
                _sync(path)
            for name, path in files.items():
                _rename(path, directory / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def verify(directory: Path) -> list[str]:
    """What in `directory` does not match its manifest, a sentence each; empty if all of it does.

    Hidden files that the manifest does not name (Finder leaves some) are not looked at.
    """
    try:
        manifest = (directory / MANIFEST).read_bytes()
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    try:
        listed = dict(json.loads(manifest)["files"])
        intact = _manifest(listed).encode("utf-8") == manifest
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        return [f"{MANIFEST}: damaged"]
    found = _files_below(directory)
    del found[MANIFEST]
    wrong = [f"{name}: missing" for name in listed if name not in found]
    for name, path in found.items():
        hidden = any(part.startswith(".") for part in Path(name).parts)
        try:
            if name not in listed:
                wrong += [] if hidden else [f"{name}: not in the manifest"]
            elif _entry(path) != listed[name]:
                wrong.append(f"{name}: not the content that was written")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
    return wrong


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Make `path` and the folders above it that are not there yet, for good."""
    with faults_named(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            _sync(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds: its name goes at once, then the content."""
    trash = path.with_name(f"{_TRASH}{uuid.uuid4().hex}")
    with faults_named(path):
        _rename(path, trash)
    discard(trash)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name on the same volume, for good."""
    with faults_named(target):
        _rename(source, target)
        _sync(source.parent)


def sweep(directory: Path) -> None:
    """Remove what killed writers left in `directory`. Only for the holder of the folder's lock."""
    for path in directory.iterdir():
        if path.name.startswith((_TEMPORARY, _TRASH)):
            discard(path)


def discard(path: Path) -> None:
    """Delete what already counts as gone; what cannot be deleted is left to the next `sweep`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def discard_empty(folder: Path) -> None:
    """Delete a folder if it is empty."""
    with suppress(OSError):
        folder.rmdir()


# ---- the primitives: every byte, flush and rename goes through these ---------------------------


def _write(descriptor: int, data: bytes) -> None:
    """Write all of `data`: a second call to the system only if the first took less."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(path: Path) -> None:
    """Flush a file or folder to the medium; on macOS `fsync` alone stops at the drive's cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (full_sync := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
            try:
                fcntl.fcntl(descriptor, full_sync)
                return
            except OSError as error:
                if error.errno not in _CANNOT_SYNC:
                    raise
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Network file systems may not flush folders; nothing better can be done there.
            if error.errno not in _CANNOT_SYNC or not path.is_dir():
                raise
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    """Give `source` its final name, for good. Both are on the same volume."""
    os.replace(source, target)  # noqa: PTH105 - beside os.write and os.fsync, in one style
    _sync(target.parent)


# ---- helpers -----------------------------------------------------------------------------------


def _hold(folder: Path) -> int | None:
    """Show other processes that a folder is in use, until the descriptor is closed.

    None where another process does, or where there are no locks: then nobody takes it away.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _discard_abandoned(directory: Path, prefix: str) -> None:
    """Delete the folders in `directory` with that prefix which no live process holds."""
    for path in directory.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):
            if (held := _hold(path)) is not None:
                discard(path)
                os.close(held)


def _files_below(directory: Path) -> dict[str, Path]:
    """Files in `directory`, at any depth, by their relative POSIX names, sorted."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path for path in sorted(files)}


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _manifest(files: dict[str, Any]) -> str:
    """The one text a manifest of `files` can have: it carries the hash of its own list."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=2, sort_keys=True) + "\n"


@contextmanager
def faults_named(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an `OSError` into a `RunError` that names `path` and what can be done.

    An error that names a file elsewhere is one of reading what is to be written. One in a folder
    that is staged is left to the block around it, which knows the folder's own name and size.

    Args:
        size: bytes that were to be written.
    """
    if _is_staged(path):
        yield
        return
    amount = "" if size is None else f" {size:,} bytes"
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        if (source := _source(error, path)) is not None:
            what = f"cannot be read: {cause}; check the file and its permissions"
            raise RunError(Fault(str(source), "", what)) from error
        if error.errno in _NO_SPACE:
            todo = "free some disk space"
        elif error.errno in _NOT_ALLOWED:
            todo = "check the permissions, or choose another folder"
        else:
            todo = "check the disk and the path"
        raise RunError(Fault(str(path), "", f"cannot write{amount}: {cause}; {todo}")) from error
    except RuntimeError as error:
        # A write that fails inside MLX has no errno: "[write] Unable to write 3088 bytes to file."
        if not str(error).startswith(("[write]", "[save")):
            raise
        what = f"cannot write{amount}: {error} Free some disk space, or check the permissions"
        raise RunError(Fault(str(path), "", what)) from error


def _source(error: OSError, target: Path) -> Path | None:
    """The file that an error is about, if it is neither `target` nor on the way to it."""
    if not isinstance(error.filename, str | bytes):
        return None
    source, target = Path(os.fsdecode(error.filename)).absolute(), target.absolute()
    ours = source == target or source in target.parents or target in source.parents
    return None if ours or _is_staged(source) else source


def _is_staged(path: Path) -> bool:
    return any(part.startswith((_TEMPORARY, _TRASH)) for part in path.parts)
