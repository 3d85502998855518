"""Archives and tables of pictures are read as a folder of the same pictures is."""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from els_service.denoisers.bank_sources import open_source, read_pictures, read_source
from els_service.denoisers.banks import Bank
from els_service.denoisers.parquet_sources import Columns
from els_service.errors import InvalidArgumentError, LoadError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)
LABELS = [1, 0, 1, 2, 0, 1, 1]
BY_LABEL = [1, 4, 0, 2, 5, 6, 3]
NAMES = ("bag", "coat", "dress")


def png(pixels: NDArray[np.uint8]) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PICTURES = [png(pixels) for pixels in PIXELS]


def write_tar(
    path: Path, members: list[tuple[str, bytes]], mode: Literal["w", "w:gz"] = "w"
) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            (member := tarfile.TarInfo(name)).size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(indices: Any) -> list[tuple[str, bytes]]:
    """Samples as WebDataset has them, the label before or after its picture."""
    members = []
    for index in indices:
        sample = [(f"./{index:06}.png", PICTURES[index]), (f"./{index:06}.json", b"{}")]
        label = (f"./{index:06}.cls", str(LABELS[index]).encode())
        members += [label, *sample] if index % 2 else [*sample, label]
    return members


def write_table(path: Path, rows: Any = range(7), **columns: Any) -> Path:
    images = [{"bytes": PICTURES[row], "path": f"{row}.png"} for row in rows]
    labels = pyarrow.array([LABELS[row] for row in rows])
    table = pyarrow.table({"img": images, "label": labels, **columns})
    features = {"img": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)
    return path


def assert_is_of_pictures(bank: Bank, names: tuple[str, ...] = NAMES) -> None:
    np.testing.assert_array_equal(bank.images.transpose(0, 2, 3, 1), PIXELS[BY_LABEL])
    np.testing.assert_array_equal(bank.labels, np.array(LABELS)[BY_LABEL])
    assert bank.label_names == names


class TestTar:
    def test_folders_in_an_archive_are_labels(self, tmp_path: Path) -> None:
        members = [(f"all/{NAMES[LABELS[i]]}/{i}.png", PICTURES[i]) for i in range(7)]
        bank = read_source(write_tar(tmp_path / "a.tar", members))
        assert_is_of_pictures(bank)
        assert next(iter(bank.file_names or ())) == "all/bag/1.png"

    def test_samples_of_webdataset_have_their_labels(self, tmp_path: Path) -> None:
        assert_is_of_pictures(read_source(write_tar(tmp_path / "a.tar", samples(range(7)))), ())

    def test_archives_of_a_folder_follow_one_another(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "00000.tar", samples(range(3)))
        write_tar(tmp_path / "00001.tar", samples(range(3, 7)))
        bank = read_source(tmp_path, label_names=NAMES)
        assert_is_of_pictures(bank)

    def test_pictures_of_one_folder_have_no_labels(self, tmp_path: Path) -> None:
        members = [(f"all/{i}.png", PICTURES[i]) for i in range(7)]
        bank = read_source(write_tar(tmp_path / "a.tar", members))
        np.testing.assert_array_equal(bank.images.transpose(0, 2, 3, 1), PIXELS)
        assert bank.label_count == 0

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ([("a.png", b""), ("a.cls", b"x")], r"a\.tar: a\.cls: expected a whole number from 0"),
            ([("a.png", b""), ("a.cls", b"1" * 21)], r"a\.cls: expected a whole number"),
            (
                [("a.png", b""), ("a.cls", b"1"), ("b.png", b"")],
                r"a\.tar: b\.png: expected a \.cls",
            ),
            ([("a.1.png", b""), ("a.2.png", b""), ("a.cls", b"1")], "a.tar: a: expected one pic"),
            ([("a/b.png", b""), ("c.png", b"")], r"a\.tar: c\.png: expected only sub-folders"),
            ([("a.png", b"\x89PNG")], r"a\.tar: a\.png: cannot be read"),
            ([("a.txt", b"")], r"a\.tar: holds no images"),
        ],
    )
    def test_a_member_that_cannot_be_used_is_named(
        self, tmp_path: Path, members: list[tuple[str, bytes]], message: str
    ) -> None:
        with pytest.raises(LoadError, match=message):
            read_source(write_tar(tmp_path / "a.tar", members))

    def test_a_compressed_archive_is_rejected(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar.gz", samples(range(7)), "w:gz")
        with pytest.raises(LoadError, match="expected an archive that is not compressed"):
            read_source(path)

    @pytest.mark.parametrize("kept", [600, 2000, 5000])
    def test_a_truncated_archive_is_rejected(self, tmp_path: Path, kept: int) -> None:
        path = write_tar(tmp_path / "a.tar", samples(range(7)))
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(LoadError, match=r"a\.tar"):
            read_source(path)

    def test_links_hidden_and_special_members_are_ignored(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", [(f"{i}.png", PICTURES[i]) for i in range(7)])
        with tarfile.open(path, "a") as archive:
            for name, kind in (("x.png", tarfile.SYMTYPE), ("y.png", tarfile.FIFOTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
            archive.addfile(tarfile.TarInfo("._0.png"))
        assert len(read_source(path)) == 7

    def test_sizes_may_be_kept(self, tmp_path: Path) -> None:
        members = [("a.png", PICTURES[0]), ("b.png", png(PIXELS[1, :2]))]
        bank = read_pictures(write_tar(tmp_path / "a.tar", members))
        assert sorted(map(tuple, bank.extents.tolist())) == [(2, 5), (4, 5)]


class TestParquet:
    def test_a_table_of_hugging_face_has_pictures_labels_and_names(self, tmp_path: Path) -> None:
        bank = read_source(write_table(tmp_path / "a.parquet"))
        assert_is_of_pictures(bank)
        assert list(bank.file_names or ())[:2] == ["a.parquet: row 1", "a.parquet: row 4"]

    def test_tables_of_a_folder_follow_one_another(self, tmp_path: Path) -> None:
        write_table(tmp_path / "0.parquet", range(3))
        write_table(tmp_path / "1.parquet", range(3, 7))
        assert_is_of_pictures(read_source(tmp_path))

    @pytest.mark.parametrize("order", [range(7), range(6, -1, -1), [3, 3, 1, 6, 0, 2]])
    def test_rows_are_read_in_any_order(self, tmp_path: Path, order: Any) -> None:
        source, _ = open_source(write_table(tmp_path / "a.parquet"))
        for index in order:
            np.testing.assert_array_equal(source.image(index), PIXELS[index])

    def test_columns_may_be_named(self, tmp_path: Path) -> None:
        others = {"other": [png(255 - pixels) for pixels in PIXELS], "kind": [0] * 7}
        path = write_table(tmp_path / "a.parquet", **others)
        with pytest.raises(LoadError, match=r"image_column: expected the name .* got img, other"):
            read_source(path)
        bank = read_source(path, columns=Columns("other", "kind"))
        np.testing.assert_array_equal(bank.images.transpose(0, 2, 3, 1), 255 - PIXELS)
        assert bank.label_count == 1

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (Columns("none"), "image_column: expected a column of img, label, got none"),
            (Columns("label"), "image_column: expected bytes, or structures with a field bytes"),
            (Columns("img", "none"), "label_column: expected a column of img, label, got none"),
            (Columns("img", "img"), "column img: expected integers from 0, got struct"),
        ],
    )
    def test_a_column_that_is_not_there_is_named(
        self, tmp_path: Path, columns: Columns, message: str
    ) -> None:
        with pytest.raises(LoadError, match=message):
            read_source(write_table(tmp_path / "a.parquet"), columns=columns)

    def test_a_row_without_a_picture_is_named_and_may_be_skipped(self, tmp_path: Path) -> None:
        table = pyarrow.table({"image": [PICTURES[0], None, b"GIF89a", PICTURES[3]]})
        parquet.write_table(table, path := tmp_path / "a.parquet")
        with pytest.raises(LoadError, match=r"a\.parquet: row 1: .* expected the bytes"):
            read_source(path)
        errors: list[LoadError] = []
        bank = read_source(path, skipped=errors.append)
        assert len(bank) == 2
        assert [error.path.rpartition(" ")[2] for error in errors] == ["1", "2"]

    @pytest.mark.parametrize("cut", [1, 9, 500, 1500])
    def test_a_truncated_table_is_rejected(self, tmp_path: Path, cut: int) -> None:
        path = write_table(tmp_path / "a.parquet")
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(LoadError, match=r"a\.parquet"):
            read_source(path)

    def test_without_pyarrow_the_extra_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_table(tmp_path / "a.parquet")
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(LoadError, match="with the extra parquet, got no module pyarrow"):
            read_source(path)

    def test_columns_of_another_format_are_rejected(self, tmp_path: Path) -> None:
        np.savez(path := tmp_path / "a.npz", images=PIXELS)
        with pytest.raises(InvalidArgumentError, match="image_column, label_column: expected none"):
            read_source(path, columns=Columns("x"))
