"""What a small file expands to is bounded by what it announces."""

import io
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.bank_sources import GREY, LABELS, idx

pytestmark = pytest.mark.slow

_MEASURED = """
import os, sys
from els_service.denoisers.bank_sources import read_source
from els_service.errors import LoadError

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

def read(path):
    before = peak()
    try:
        told = f"{len(read_source(path).images)} images"
    except LoadError as error:
        told = error.reason
    print((peak() - before) // 1024, told, flush=True)

for line in sys.stdin:
    # A peak does not go down: each file is read by a process of its own.
    if (child := os.fork()) == 0:
        read(line.strip())
        os._exit(0)
    os.waitpid(child, 0)
"""
ZEROS = 256 << 20
BLOCK = bytes(1 << 24)


def gzipped(head: bytes) -> bytes:
    """A head and many zeros, in a thousandth of their size."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    blocks = (packer.compress(BLOCK) for _ in range(ZEROS // len(BLOCK)))
    return b"".join((packer.compress(head), *blocks, packer.flush()))


def zip_arrays(path: Path, members: dict[str, bytes], zeros_behind: str) -> Path:
    """An npz file of these members, one of them with many zeros behind it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            with archive.open(f"{name}.npy", "w") as file:
                file.write(content)
                for _ in range(ZEROS // len(BLOCK) if name == zeros_behind else 0):
                    file.write(BLOCK)
    return path


def npy(array: NDArray[Any]) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def npy_header(dtype: str, *shape: int) -> bytes:
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), header)
    return file.getvalue()


@pytest.fixture(scope="module")
def reader() -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-c", _MEASURED]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def measured(reader: subprocess.Popen[str]) -> Callable[[Path], tuple[int, str]]:
    """Returns the MiB that reading a file takes at its peak, and what comes of it."""

    def measure(path: Path) -> tuple[int, str]:
        assert reader.stdin is not None
        assert reader.stdout is not None
        print(path, file=reader.stdin, flush=True)
        peak, _, told = reader.stdout.readline().strip().partition(" ")
        return int(peak), told

    return measure


def test_of_a_gzipped_idx_file_that_goes_on_no_more_than_announced_is_expanded(
    tmp_path: Path, measured: Callable[[Path], tuple[int, str]]
) -> None:
    (path := tmp_path / "images.gz").write_bytes(gzipped(idx(GREY)))
    peak, told = measured(path)
    assert "expected 120 bytes of shape (6, 4, 5), got 121 bytes or more" in told
    assert peak < 40


def test_an_idx_file_that_announces_more_than_there_is_takes_no_memory_for_it(
    tmp_path: Path, measured: Callable[[Path], tuple[int, str]]
) -> None:
    head = struct.pack(">BBBB3I", 0, 0, 8, 3, 60_000, 60_000, 3)
    (path := tmp_path / "images").write_bytes(head + bytes(1000))
    peak, told = measured(path)
    assert "got 1000 bytes" in told
    assert peak < 40


@pytest.mark.parametrize("behind", ["images", "labels"])
def test_of_an_array_that_goes_on_behind_its_header_nothing_is_expanded(
    tmp_path: Path, measured: Callable[[Path], tuple[int, str]], behind: str
) -> None:
    members = {"images": npy(GREY), "labels": npy(LABELS)}
    peak, told = measured(zip_arrays(tmp_path / "images.npz", members, behind))
    assert f"{behind}: expected " in told
    assert "bytes for shape" in told
    assert peak < 40


def test_an_array_of_the_wrong_type_is_refused_before_it_is_expanded(
    tmp_path: Path, measured: Callable[[Path], tuple[int, str]]
) -> None:
    members = {"images": npy_header("<i8", ZEROS // 8 >> 20, 1024, 1024)}
    peak, told = measured(zip_arrays(tmp_path / "images.npz", members, "images"))
    assert told == "images: expected uint8 or floats, got int64"
    assert peak < 40


def test_a_header_longer_than_any_array_needs_is_refused_before_it_is_expanded(
    tmp_path: Path, measured: Callable[[Path], tuple[int, str]]
) -> None:
    members = {"images": b"\x93NUMPY\x02\x00" + struct.pack("<I", ZEROS)}
    peak, told = measured(zip_arrays(tmp_path / "images.npz", members, "images"))
    assert told == (
        f"cannot be read: images: expected a header of at most 65536 bytes, got {ZEROS}"
    )
    assert peak < 40


def test_an_array_that_announces_more_than_any_machine_has_is_refused(
    tmp_path: Path, measured: Callable[[Path], tuple[int, str]]
) -> None:
    members = {"images": npy_header("|u1", 1 << 20, 1 << 12, 1 << 12)}
    peak, told = measured(zip_arrays(tmp_path / "images.npz", members, ""))
    assert "images: expected 17592186044" in told
    assert peak < 40


def test_an_honest_file_takes_its_images_twice(
    tmp_path: Path, measured: Callable[[Path], tuple[int, str]]
) -> None:
    count = ZEROS >> 20
    head = struct.pack(">BBBB3I", 0, 0, 8, 3, count, 1024, 1024)
    (path := tmp_path / "images.gz").write_bytes(gzipped(head))
    peak, told = measured(path)
    assert told == f"{count} images"
    assert peak < 2.2 * count + 20
