from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from els_service.denoisers.files import REMAINS_S, remove_remains, write_atomically

WRITER = """
import sys
from pathlib import Path
from els_service.denoisers.files import _temporary
with _temporary(Path(sys.argv[1])) as (name, file):
    file.write(b"half")
    file.flush()
    print(name, flush=True)
    sys.stdin.read()
"""


def grown_old(path: Path) -> Path:
    then = time.time() - 2 * REMAINS_S
    os.utime(path, (then, then))
    return path


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bank.safetensors"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_remains_of_a_process_of_the_same_id_are_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    (tmp_path / f".{path.name}.{os.getpid()}.tmp").write_bytes(b"half")
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_a_killed_writer_s_remains_are_removed_and_a_living_one_s_are_kept(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        half = grown_old(Path(writer.stdout.readline().decode().strip()))
        write_atomically(tmp_path / "other", b"")
        assert half.read_bytes() == b"half"
        writer.kill()
        writer.wait()
    write_atomically(tmp_path / "other", b"")
    assert not half.exists()


def test_only_old_temporary_files_are_removed(tmp_path: Path) -> None:
    young = tmp_path / f".els-{'0' * 16}.tmp"
    young.write_bytes(b"")
    foreign = [tmp_path / name for name in (".hidden.tmp", "notes.7.tmp", ".els-short.tmp")]
    for path in foreign:
        path.write_bytes(b"")
        grown_old(path)
    target = grown_old(tmp_path / "notes.7.tmp")
    (tmp_path / f".els-{'1' * 16}.tmp").symlink_to(target)
    os.mkfifo(tmp_path / f".els-{'2' * 16}.tmp")
    remove_remains(tmp_path)
    assert young.exists()
    assert all(path.exists() for path in foreign)
    assert (tmp_path / f".els-{'1' * 16}.tmp").is_symlink()
