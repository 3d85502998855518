"""A bank built in parts is the bank built at once, in bounded memory, whatever kills its build."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.denoisers.test_picture_sources import samples, write_table, write_tar
from tests.support.processes import run_script

from els_service.denoisers.bank_build_records import RECORD, Request, locked
from els_service.denoisers.bank_builds import Built, build_parts
from els_service.denoisers.bank_parts import MANIFEST, BankReader, load_parts
from els_service.denoisers.bank_sources import open_source, read_source
from els_service.errors import InvalidArgumentError, LoadError

PIXELS = np.random.default_rng(1).integers(0, 256, (12, 3, 4), np.uint8)
LABELS = [2, 0, 1, 0, 2, 1, 1, 0, 2, 2, 1, 0]


def write_folder(folder: Path, labels: list[int] | None = None) -> Path:
    for index, pixels in enumerate(PIXELS):
        (where := folder / (f"{labels[index]}" if labels else "")).mkdir(
            parents=True, exist_ok=True
        )
        Image.fromarray(pixels).save(where / f"{index:02}.png")
    return folder


def npz(folder: Path) -> Path:
    folder.mkdir()
    np.savez(path := folder / "a.npz", images=PIXELS.astype(np.float32) / 255, labels=LABELS)
    return path


def tar(folder: Path) -> Path:
    folder.mkdir()
    return write_tar(folder / "a.tar", samples(range(7)))


def table(folder: Path) -> Path:
    folder.mkdir()
    return write_table(folder / "a.parquet")


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda folder: write_folder(folder, LABELS),
    "unlabelled": write_folder,
    "npz": npz,
    "tar": tar,
    "parquet": table,
}


def build(source: Path, out: Path, shard_size: int = 3, **options: Any) -> Built:
    return build_parts(*open_source(source), out, Request(shard_size, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("shard_size", [3, 100])
@pytest.mark.parametrize("kind", SOURCES)
def test_parts_are_the_bank_that_is_built_at_once(
    tmp_path: Path, kind: str, shard_size: int
) -> None:
    source = SOURCES[kind](tmp_path / "source")
    built = build(source, out := tmp_path / "bank", shard_size)
    whole = read_source(source)
    assert built.manifest.fingerprint == load_parts(out).fingerprint == whole.fingerprint
    assert len(built.manifest.parts) == -(-len(whole) // shard_size)
    assert list(load_parts(out).file_names or ()) == list(whole.file_names or ())


@pytest.mark.parametrize("options", [{"limit": 5}, {"per_label": 2}, {"per_label": 3, "limit": 7}])
@pytest.mark.parametrize("kind", ["folder", "npz", "tar", "parquet"])
def test_limits_choose_the_images_that_they_choose_at_once(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    source = SOURCES[kind](tmp_path / "source")
    built = build(source, tmp_path / "bank", 2, **options)
    assert built.manifest.fingerprint == read_source(source, **options).fingerprint


@pytest.mark.parametrize("options", [{}, {"per_label": 2}, {"per_label": 1}, {"limit": 6}])
@pytest.mark.parametrize("shard_size", [1, 4])
def test_skipped_pictures_are_replaced_and_counted_as_at_once(
    tmp_path: Path, options: dict[str, Any], shard_size: int
) -> None:
    source = write_folder(tmp_path / "source", LABELS)
    for name in ("0/01.png", "0/03.png", "1/10.png", "2/00.png"):
        (source / name).write_bytes(b"damaged")
    errors: list[LoadError] = []
    whole = read_source(source, skipped=errors.append, **options)
    built = build(source, tmp_path / "bank", shard_size, skip_unreadable=True, **options)
    assert built.manifest.fingerprint == whole.fingerprint
    assert (built.manifest.skipped, len(built.first_skipped)) == (len(errors), len(errors))
    with pytest.raises(LoadError, match=r"01\.png"):
        build(source, tmp_path / "other", shard_size)


@pytest.mark.parametrize("options", [{}, {"per_label": 2}, {"limit": 5}])
@pytest.mark.parametrize("kind", ["folder", "npz", "tar", "parquet"])
def test_mirror_images_follow_their_images_in_parts_as_at_once(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    source = SOURCES[kind](tmp_path / "source")
    plain, both = read_source(source, **options), read_source(source, mirror=True, **options)
    np.testing.assert_array_equal(both.images[::2], plain.images)
    np.testing.assert_array_equal(both.images[1::2], plain.images[..., ::-1])
    np.testing.assert_array_equal(both.labels, np.repeat(plain.labels, 2))
    assert list(both.file_names or ())[1::2] == list(plain.file_names or ())
    # Parts of an odd number of images have an image and its mirror image apart.
    built = build(source, out := tmp_path / "bank", 3, mirror=True, **options)
    assert built.manifest.fingerprint == both.fingerprint
    assert json.loads((out / MANIFEST).read_text())["built_from"]["mirror"] is True


def test_a_skipped_picture_is_counted_once_and_has_no_mirror_image(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", LABELS)
    for name in ("0/03.png", "2/00.png"):
        (source / name).write_bytes(b"damaged")
    errors: list[LoadError] = []
    whole = read_source(source, skipped=errors.append, mirror=True, per_label=1)
    options: dict[str, Any] = {"skip_unreadable": True, "mirror": True, "per_label": 1}
    built = build(source, tmp_path / "bank", 1, **options)
    assert built.manifest.fingerprint == whole.fingerprint
    assert len(whole) == 2 * len(set(LABELS))
    assert built.manifest.skipped == len(errors) == len({str(error) for error in errors})


def test_a_limit_of_readable_pictures_needs_labels_in_order(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="limit: expected none with skip_unreadable"):
        build(tar(tmp_path / "source"), tmp_path / "bank", limit=3, skip_unreadable=True)


_KILLED_AT_EVERY_WRITE = """
import os, signal, sys
from pathlib import Path
from PIL import Image
from els_service.denoisers import bank_builds
from els_service.denoisers.bank_build_records import Request
from els_service.denoisers.bank_sources import open_source
Image.init()

def run(source, out, last):
    count = 0
    def killing(module, name):
        real = getattr(module, name)
        def wrapped(*arguments, **named):
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        setattr(module, name, wrapped)
    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        killing(module, name)
    request = Request(2, per_label=2, skip_unreadable=True)
    bank_builds.build_parts(*open_source(Path(source)), Path(out), request)
    os._exit(0)

# Killed at its 1st, 2nd, 3rd … write, and continued each time, until one ends.
source, out = sys.argv[1:]
for last in range(1, 100):
    if (child := os.fork()) == 0:
        run(source, out, last)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        break
print(os.waitstatus_to_exitcode(status), last)
"""


@pytest.mark.slow
def test_a_build_killed_at_any_write_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", LABELS)
    (source / "1/05.png").write_bytes(b"damaged")
    whole, out = tmp_path / "whole", tmp_path / "bank"
    build(source, whole, 2, per_label=2, skip_unreadable=True)
    (script := tmp_path / "script.py").write_text(_KILLED_AT_EVERY_WRITE)
    ended = run_script(script, source, out)
    code, runs = map(int, ended.stdout.split())
    assert (code, runs > 6) == (0, True), ended
    assert contents(out) == contents(whole)


def test_what_was_built_is_not_read_again(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    opened, names = open_source(source)
    seen: list[int] = []

    def interrupted(done: int, total: int) -> None:
        seen.append(done)
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_parts(opened, names, tmp_path / "bank", Request(3), interrupted)
    seen.clear()
    build_parts(opened, names, tmp_path / "bank", Request(3), lambda done, _: seen.append(done))
    assert seen == [6, *range(7, 13)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: None, r"shard_size: expected 3, as the build was begun with, got 4"),
        (lambda source: (source / "new.png").write_bytes(b""), "files: expected"),
        (lambda source: os.utime(source / "00.png", (1, 1)), "files: expected"),
    ],
)
def test_a_build_of_another_source_or_with_other_options_is_not_continued(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    source = write_folder(tmp_path / "source")

    def interrupted(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_parts(*open_source(source), tmp_path / "bank", Request(3), interrupted)
    change(source)
    with pytest.raises(LoadError, match=message):
        build(source, tmp_path / "bank", 4 if "shard" in message else 3)


def test_a_part_that_changed_before_the_end_is_named(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "source"), tmp_path / "bank"

    def damage(done: int, total: int) -> None:
        if done == 5:
            path = out / "part-00000.safetensors"
            path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(LoadError, match=r"part-00000\.safetensors: not a bank"):
        build_parts(*open_source(source), out, Request(3), damage)
    assert not (out / MANIFEST).exists()


def test_a_finished_bank_other_files_and_a_running_build_are_left_alone(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "source"), tmp_path / "bank"
    build(source, out)
    before = contents(out)
    assert RECORD not in before
    for folder in (out, source):
        with pytest.raises(LoadError, match="expected an empty folder or an unfinished build"):
            build(source, folder)
    assert contents(out) == before
    with locked(out), pytest.raises(LoadError, match="expected no other build of this bank"):
        build(source, out)
    (source / RECORD).write_text("{}")
    with pytest.raises(LoadError, match=r"build\.json: expected the record of a build"):
        build(source, source)


def test_the_manifest_says_what_it_was_built_from(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", LABELS)
    request = Request(8, None, 2, None, False, "there", "MIT", {"format": "auto"})
    build_parts(*open_source(source), out := tmp_path / "bank", request)
    content = json.loads((out / MANIFEST).read_text())
    assert content["built_from"] == {
        "format": "auto",
        "shard_size": 8,
        "limit": None,
        "per_label": 2,
        "size": None,
        "skip_unreadable": False,
        "mirror": False,
    }
    assert (content["source"], content["licence"]) == ("there", "MIT")
    assert (content["images"], content["shape"]) == (6, [1, 3, 4])
    assert content["labels"] == [[0, 2], [1, 2], [2, 2]]
    assert [part["images"] for part in content["parts"]] == [6]
    assert BankReader(out).label_names == ("0", "1", "2")


_MEASURED = """
import sys
from pathlib import Path
from els_service.denoisers.bank_build_records import Request
from els_service.denoisers.bank_builds import build_parts
from els_service.denoisers.bank_sources import open_source

def memory(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) // 1024

source, out, shard_size = sys.argv[1:]
build_parts(*open_source(Path(source)), Path(out + "/warm"), Request(int(shard_size), limit=10))
before = memory("VmRSS")
build_parts(*open_source(Path(source)), Path(out + "/bank"), Request(int(shard_size)))
print(memory("VmHWM") - before)
"""


def write_large(path: Path, mib: int) -> Path:
    """Write an archive of pictures of three labels in turn."""
    header = b"P6 128 128 255\n"
    picture = header + np.random.default_rng(0).integers(0, 256, 3 << 14, np.uint8).tobytes()
    count = (mib << 20) // len(picture)
    return write_tar(path, [(f"{index % 3}/{index}.ppm", picture) for index in range(count)])


def peak_mib(folder: Path, source: Path, shard_size: int) -> int:
    """Return the peak memory of a build beside that of its process before, in MiB."""
    (script := folder / "script.py").write_text(_MEASURED)
    return int(run_script(script, source, folder, shard_size, timeout_s=400).stdout)


@pytest.mark.slow
def test_a_build_takes_memory_for_a_few_parts_not_for_its_source(tmp_path: Path) -> None:
    source = write_large(tmp_path / "a.tar", 24)
    # Parts of 1 MiB: one decoded, one mapped.
    assert peak_mib(tmp_path, source, 21) < 8
