"""Files are written whole or not at all, whoever else writes and whoever was killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from els_service.denoisers.banks import load_bank, make_bank, save_bank
from els_service.denoisers.files import REMAINS_S, remove_remains, write_atomically

OLD = time.time() - 2 * REMAINS_S
BANK = make_bank(np.zeros((2, 1, 3, 3), np.uint8))


def remain(folder: Path, name: str, when: float = OLD) -> Path:
    """Return a temporary file as a writer leaves it that is killed at that time."""
    path = folder / name
    path.write_bytes(b"half a ba")
    os.utime(path, (when, when))
    return path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_what_a_killed_process_of_the_same_id_left_does_not_keep_a_bank_from_being_saved(
    tmp_path: Path,
) -> None:
    remain(tmp_path, f".bank.safetensors.{os.getpid()}.tmp", time.time())
    save_bank(BANK, path := tmp_path / "bank.safetensors")
    assert load_bank(path).fingerprint == BANK.fingerprint


def test_writers_of_one_process_id_leave_each_other_s_files_alone(tmp_path: Path) -> None:
    path, writers, rounds = tmp_path / "bank.safetensors", 8, 20
    together = Barrier(writers)

    def write(number: int) -> None:
        for _ in range(rounds):
            together.wait(30)
            write_atomically(path, bytes([number]) * 100_000)
            content = path.read_bytes()
            assert content == content[:1] * 100_000

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    assert names(tmp_path) == ["bank.safetensors"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from els_service.denoisers import files
point = sys.argv[2]
real = getattr(os, point)
def die(*arguments):
    if point == "replace":
        real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, point, die)
files.write_atomically(Path(sys.argv[1]), b"new" * 100_000)
"""


@pytest.mark.parametrize(("point", "left"), [("fsync", 1), ("replace", 0)])
def test_a_writer_killed_at_any_point_leaves_the_old_file_or_the_new_and_its_remains_go(
    tmp_path: Path, point: str, left: int
) -> None:
    (path := tmp_path / "weights.safetensors").write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", _KILLED, path, point], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == (b"old" if left else b"new" * 100_000)
    remains = [name for name in names(tmp_path) if name != path.name]
    assert len(remains) == left
    write_atomically(tmp_path / "other.json", b"{}")
    assert set(remains) < set(names(tmp_path)), "it is young: its writer might live"
    for name in remains:
        os.utime(tmp_path / name, (OLD, OLD))
    write_atomically(tmp_path / "other.json", b"{}")
    assert names(tmp_path) == ["other.json", path.name]


def test_only_old_files_that_nobody_holds_and_that_are_named_so_are_removed(
    tmp_path: Path,
) -> None:
    ours = ".els-0123456789abcdef.tmp"
    gone = [ours, ".bank.safetensors.123.tmp", ".model.yaml.9.tmp"]
    kept = [".els-0123.tmp", ".bank.safetensors.tmp", "bank.safetensors.1.tmp", ".notes.txt.7.tmp"]
    for name in (*gone, *kept):
        remain(tmp_path, name)
    young = remain(tmp_path, ".els-00000000000000aa.tmp", time.time()).name
    (tmp_path / (linked := ".els-00000000000000bb.tmp")).symlink_to(tmp_path / kept[0])
    os.mkfifo(tmp_path / (pipe := ".els-00000000000000cc.tmp"))
    held = remain(tmp_path, ".els-00000000000000dd.tmp")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_remains(tmp_path)
        assert names(tmp_path) == sorted([*kept, young, linked, pipe, held.name])
    remove_remains(tmp_path)
    assert held.name not in names(tmp_path)


def test_a_live_writer_holds_its_file_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = os.fsync

    def another_writes(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", synced)
        (ours,) = tmp_path.glob(".els-*")
        os.utime(ours, (OLD, OLD))
        write_atomically(tmp_path / "other", b"other")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", another_writes)
    write_atomically(tmp_path / "mine", b"mine")
    assert names(tmp_path) == ["mine", "other"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(path := tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_cannot_be_written_is_named_by_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "none" / "bank.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, b"content")
    assert caught.value.filename == str(path)
