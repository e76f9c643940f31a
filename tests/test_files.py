"""files.py: whole or not at all, whatever call to the system fails."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import examples

from mlx_tuner.errors import RunError, UsageError
from mlx_tuner.system import files

SYSTEM_CALLS = ("write", "fsync", "replace", "open", "mkdir")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Failing:
    """Lets call number `at` to a function of `os` fail; counts the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, at: int, code: int) -> None:
        self.calls = 0
        real = getattr(os, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == at:
                if name == "write":  # a disk fills up in the middle of a write
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def fail_everywhere(monkeypatch, prepare, operation, check) -> int:
    """`prepare` and run `operation`, for each system call that it makes, which then fails."""
    tried = 0
    for name in SYSTEM_CALLS:
        for at in range(1, 100):
            code = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)[at % 4]
            prepare()
            with monkeypatch.context() as patch:
                failing = Failing(patch, name, at, code)
                try:
                    operation()
                    error = None
                except RunError as raised:
                    error = raised
            if failing.calls < at:
                break
            tried += 1
            check(name, at, code, error)
    return tried


def test_a_replaced_file_keeps_its_old_content_whichever_call_fails(tmp_path, monkeypatch):
    path = tmp_path / "adapters.safetensors"
    new = b"new" * 1000

    def prepare():
        path.write_bytes(b"old")

    def save():
        files.write_bytes(path, new)

    def check(name, at, code, error):
        assert error is not None, f"{name} {at} went unnoticed"
        assert str(path) in str(error)
        assert os.strerror(code) in str(error)
        assert tree(tmp_path) in ({path.name: b"old"}, {path.name: new})
        if (name, at) != ("fsync", 2) and (name, at) != ("open", 3):
            assert path.read_bytes() == b"old"

    tried = fail_everywhere(monkeypatch, prepare, save, check)
    # One write, two flushes (file, folder), a rename, an open for each of the first two.
    assert tried == 1 + 2 + 1 + 3


def test_a_write_that_fails_says_how_many_bytes_it_was_about(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Failing(patch, "write", 1, errno.ENOSPC)
        with pytest.raises(RunError, match=r"1,234 bytes: No space left .*; free some disk space"):
            files.write_bytes(tmp_path / "x", bytes(1234))
    assert tree(tmp_path) == {}


def test_an_appended_line_is_whole_or_absent_whichever_call_fails(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"

    def prepare():
        path.write_bytes(b"first\n")

    def append():
        files.append_line(path, "second")

    def check(name, at, code, error):
        assert error is not None
        assert path.read_bytes() == b"first\n"

    assert fail_everywhere(monkeypatch, prepare, append, check) == 2


def test_lines_are_appended_each_in_one_write(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writes = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(bytes(data)) or real(fd, data))
    files.append_line(path, "α")
    files.append_line(path, "b")
    assert writes == ["α\n".encode(), b"b\n"]
    assert path.read_bytes() == "α\nb\n".encode()


def test_a_write_taken_in_parts_by_the_system_is_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    files.write_bytes(tmp_path / "x", bytes(range(100)))
    assert (tmp_path / "x").read_bytes() == bytes(range(100))


def test_a_staged_folder_appears_whole_or_not_at_all_whichever_call_fails(tmp_path, monkeypatch):
    target = tmp_path / "step-00000010"

    def prepare():
        if target.exists():
            shutil.rmtree(target)

    def save():
        with files.staging(target) as folder:
            (folder / "a.bin").write_bytes(b"a" * 100)
            (folder / "sub").mkdir()
            (folder / "sub" / "b.bin").write_bytes(b"b")

    def check(name, at, code, error):
        assert error is not None, f"{name} {at} went unnoticed"
        left = [path.name for path in tmp_path.iterdir()]
        if left:  # only the flush after the rename may fail with the folder in place
            assert left == [target.name]
            assert files.verify(target) == []

    assert fail_everywhere(monkeypatch, prepare, save, check) >= 15
    assert files.verify(target) == []
    assert (target / "sub" / "b.bin").read_bytes() == b"b"


def test_an_exception_in_the_block_leaves_nothing_new(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), files.staging(tmp_path / "new") as folder:  # noqa: PT012
        (folder / "half").write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), files.filling(tmp_path) as folder:  # noqa: PT012
        (folder / "x.json").write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == {"x.json": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_write_inside_mlx_is_an_error_of_the_run(tmp_path):
    with (  # noqa: PT012
        pytest.raises(RunError, match="Unable to write 3088 bytes"),
        files.replacing(tmp_path / "a.safetensors") as temporary,
    ):
        temporary.write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 3088 bytes to file.")
    with (
        pytest.raises(RuntimeError, match="a bug of ours"),
        files.replacing(tmp_path / "a.safetensors"),
    ):
        raise RuntimeError("a bug of ours")
    assert tree(tmp_path) == {}


def test_a_source_that_cannot_be_read_is_not_said_to_be_unwritable(tmp_path):
    (tmp_path / "model").mkdir()
    for block in (files.staging, files.replacing):
        target = tmp_path / "out"
        with (
            pytest.raises(RunError, match=r"model/gone: cannot be read: No such file"),
            block(target),
        ):
            (tmp_path / "model" / "gone").read_bytes()
        with pytest.raises(RunError, match="cannot write"), block(target) as temporary:
            (temporary / "no" / "such").write_bytes(b"")
    with (
        pytest.raises(RunError, match=r"out: cannot write 5,000 bytes: No space left"),
        files.staging(tmp_path / "out", 5000),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_temporary_name_is_a_sibling_with_the_same_suffix(tmp_path):
    with files.replacing(tmp_path / "new" / "adapters.safetensors") as temporary:
        assert temporary.parent == tmp_path / "new"
        assert temporary.suffix == ".safetensors"
        temporary.write_bytes(b"x")
    assert tree(tmp_path) == {"new/adapters.safetensors": b"x"}


def test_files_get_the_permissions_that_the_user_asks_for(tmp_path):
    mask = os.umask(0o027)
    try:
        files.write_text(tmp_path / "x", "x")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_text_keeps_its_newlines_and_json_refuses_what_is_no_number(tmp_path):
    files.write_text(tmp_path / "x", "a\r\nb\n")
    assert (tmp_path / "x").read_bytes() == b"a\r\nb\n"
    files.write_json(tmp_path / "y", {"loss": 0.1, "name": "ä"})
    assert json.loads((tmp_path / "y").read_bytes()) == {"loss": 0.1, "name": "ä"}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "y", {"loss": float("nan")})
    assert json.loads((tmp_path / "y").read_bytes()) == {"loss": 0.1, "name": "ä"}


def test_a_folder_that_has_something_in_it_is_never_replaced(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(UsageError, match="is there already"), files.staging(tmp_path / name):
            pytest.fail("the block must not run")
    assert tree(tmp_path) == before
    with files.staging(tmp_path / "empty") as folder:
        (folder / "x").write_text("new")
    assert files.verify(tmp_path / "empty") == []


def test_an_empty_current_folder_and_a_link_to_an_empty_one_can_be_filled(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with files.staging(Path()) as folder:
        (folder / "x").write_text("new")
    assert files.verify(tmp_path / "here") == []
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with files.staging(tmp_path / "link") as folder:
        (folder / "x").write_text("new")
    assert files.verify(tmp_path / "there") == []


def stage_and_fail(directory):
    with suppress(ZeroDivisionError), files.staging(directory):
        raise ZeroDivisionError


def test_what_a_killed_process_staged_is_removed_and_what_a_live_one_stages_is_not(tmp_path):
    for name in (".tmp-out-0123", ".tmp-other-0123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with files.staging(tmp_path / "out") as live:
        assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-other-0123", live.name]
        stage_and_fail(tmp_path / "out")
        assert live.exists()
        assert len(list(tmp_path.iterdir())) == 2


def test_what_fills_up_while_it_is_staged_is_not_replaced_either(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(RunError), files.staging(target) as folder:  # noqa: PT012
        (folder / "x").write_text("new")
        target.mkdir()
        (target / "precious").write_text("precious")
    assert tree(tmp_path) == {"target/precious": b"precious"}


def test_filling_replaces_namesakes_and_leaves_the_rest(tmp_path):
    (tmp_path / "adapters.safetensors").write_bytes(b"old")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with files.filling(tmp_path) as folder:
        (folder / "adapters.safetensors").write_bytes(b"new")
        (folder / "adapter_config.json").write_bytes(b"{}")
    assert tree(tmp_path) == {
        "adapter_config.json": b"{}",
        "adapters.safetensors": b"new",
        "notes.txt": b"mine",
    }


def test_the_manifest_has_size_and_sha256_of_every_file(tmp_path):
    with files.staging(tmp_path / "x") as folder:
        (folder / "a").write_bytes(b"hello")
    manifest = json.loads((tmp_path / "x" / files.MANIFEST).read_bytes())
    assert manifest["files"] == {
        "a": {"size": 5, "sha256": hashlib.sha256(b"hello").hexdigest()},
    }


@pytest.fixture
def staged(tmp_path) -> Path:
    with files.staging(tmp_path / "step") as folder:
        (folder / "adapters.safetensors").write_bytes(random.Random(0).randbytes(500))
        (folder / "state.json").write_text('{"step": 10}')
    return tmp_path / "step"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(300))
@given(data=st.data())
def test_every_flip_truncation_and_deletion_is_found(staged, data):
    path = data.draw(st.sampled_from(sorted(staged.iterdir())))
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "delete"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    try:
        if kind == "flip":
            flipped = whole[at] ^ (1 << data.draw(st.integers(0, 7)))
            path.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        elif kind == "cut":
            path.write_bytes(whole[:at])
        elif kind == "grow":
            path.write_bytes(whole + b"\n")
        else:
            path.unlink()
        assert files.verify(staged) != []
    finally:
        path.write_bytes(whole)
    assert files.verify(staged) == []


def test_a_foreign_file_is_reported_unless_it_is_hidden(staged):
    (staged / ".DS_Store").write_bytes(b"Finder")
    assert files.verify(staged) == []
    (staged / "model.safetensors").write_bytes(b"")
    assert files.verify(staged) == ["model.safetensors: not in the manifest"]


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b"3", b'{"files": 3}', b'{"files": {"a": 1}}', b"[" * 100_000]
)
def test_a_manifest_of_any_content_is_damaged_not_an_exception(staged, manifest):
    (staged / files.MANIFEST).write_bytes(manifest)
    assert files.verify(staged) == [f"{files.MANIFEST}: damaged"]


def test_a_folder_without_manifest_does_not_verify(tmp_path):
    assert files.verify(tmp_path) == [f"{files.MANIFEST}: No such file or directory"]
    assert files.verify(tmp_path / "absent") != []


def test_sweeping_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    (tmp_path / ".tmp-1").mkdir()
    (tmp_path / ".tmp-1" / "x").write_text("half")
    (tmp_path / ".tmp-2.json").write_text("half")
    (tmp_path / ".trash-3").mkdir()
    (tmp_path / ".hidden").write_text("mine")
    (tmp_path / "x.json").write_text("mine")
    files.sweep(tmp_path)
    assert tree(tmp_path) == {".hidden": b"mine", "x.json": b"mine"}


def test_a_removed_folder_is_gone_by_name_first(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("a")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *a, **k: None)  # killed before deleting
    files.remove(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert [p.name.startswith(".trash-") for p in tmp_path.iterdir()] == [True]


def test_macos_flushes_the_drive_too_and_falls_back_where_it_cannot(tmp_path, monkeypatch):
    calls = []
    full_sync = 51
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", full_sync, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: calls.append(command))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    files.write_bytes(tmp_path / "x", b"x")
    assert calls == [full_sync, full_sync]

    def unsupported(fd, command):
        raise OSError(errno.ENOTSUP, "not supported")

    calls.clear()
    monkeypatch.setattr(fcntl, "fcntl", unsupported)
    files.write_bytes(tmp_path / "x", b"x")
    assert calls == ["fsync", "fsync"]
