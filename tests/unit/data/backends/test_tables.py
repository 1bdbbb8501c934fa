"""Parquet and CSV tables as trees of images; paths that a table names stay inside the dataset's folder."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simpletuner.data.backends.base import Backend, UnusableFile
from simpletuner.data.backends.containment import Fence, _blobs_of, is_url, path_inside
from simpletuner.data.backends.csv_table import CsvBackend
from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.backends.parquet import ParquetBackend, ParquetTable
from simpletuner.data.captions import VARIANT_SEPARATOR
from simpletuner.data.index import Index
from simpletuner.errors import DataError, MissingDependency
from tests.unit.data.images import tree_digest, write_image


class Reads:
    """A backend that remembers what was read."""

    def __init__(self, inner: Backend):
        self.inner, self.opened = inner, []

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def read(self, path: bytes) -> bytes:
        self.opened.append(path.decode())
        return self.inner.read(path)


def scan(backend: Backend, tmp_path: Path) -> tuple[dict[str, tuple[str, str | None]], list[str], dict[str, list[str]]]:
    """Path -> digest and caption of the usable images; what was read; what was skipped, by reason."""
    reads = Reads(backend)
    index = Index(tmp_path / "index.sqlite", reads)
    catalog = index.scan()
    rows = index.images(catalog.ids.tolist())
    texts = index.texts(catalog.texts.tolist())
    found = {row.path: (row.digest, text) for row, text in zip(rows, texts, strict=True)}
    return found, reads.opened, dict(index.skipped(with_texts=True).examples)


# ---- Parquet -------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> list[bytes]:
    return [write_image(tmp_path / "drawn" / f"{n}.png", 32, 32, seed=n).read_bytes() for n in range(7)]


def write_table(path: Path, images: list[bytes | None], **columns: list) -> Path:
    """As the `datasets` library writes it: a struct of bytes and path, in small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": data, "path": None} if data else None for data in images]
    pq.write_table(pa.table({"image": image, **columns}), path, row_group_size=3)
    return path


def parquet(path: Path, name: str = "data/train-00000-of-00001.parquet", **changes) -> ParquetBackend:
    keys = {"image_column": "image", "caption_columns": None, "location": str(path), "identity": str(path)} | changes
    return ParquetBackend(ParquetTable({name: path}, **keys), "things", "data.json")


def test_rows_are_images_with_content_digests_and_captions(images: list[bytes], tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.parquet", images, text=[f"caption\n{n}" for n in range(7)])
    found, _, _ = scan(parquet(table), tmp_path)
    assert list(found) == [f"data/train-00000-of-00001.parquet/{n:09d}" for n in range(7)]
    assert [digest for digest, _ in found.values()] == [hashlib.sha256(data).hexdigest() for data in images]
    assert [caption for _, caption in found.values()] == [f"caption\n{n}" for n in range(7)]


def test_binary_columns_and_lists_of_captions_are_read(images: list[bytes], tmp_path: Path) -> None:
    columns = {"jpg": images, "captions": [["one", " two ", "", "one"]] * 7, "long": ["all"] + [None] * 6}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    backend = parquet(tmp_path / "a.parquet", image_column="jpg", caption_columns=("long", "captions"))
    found, _, _ = scan(backend, tmp_path)
    captions = [caption for _, caption in found.values()]
    assert captions == ["all"] + [f"one{VARIANT_SEPARATOR}two"] * 6


def test_a_second_scan_opens_no_row_and_a_changed_file_is_noticed(images: list[bytes], tmp_path: Path) -> None:
    captions = [f"caption {n}" for n in range(7)]
    table = write_table(tmp_path / "a.parquet", images, text=captions)
    first, opened, _ = scan(parquet(table), tmp_path)
    assert len(opened) == 14
    again, opened, _ = scan(parquet(table), tmp_path)
    assert (again, opened) == (first, [])
    write_table(table, [*images[:6], images[0]], text=[*captions[:6], "another"])
    changed, opened, _ = scan(parquet(table), tmp_path)
    assert sum(path.endswith(".txt") for path in opened) == 1  # captions are compared one by one
    assert list(changed.items())[:6] == list(first.items())[:6]
    assert list(changed.values())[6] == (hashlib.sha256(images[0]).hexdigest(), "another")


def test_rows_without_an_image_are_skipped_with_the_reason(images: list[bytes], tmp_path: Path) -> None:
    image = [{"bytes": images[0], "path": "a.png"}, {"bytes": None, "path": "../../etc/passwd"}, None]
    pq.write_table(pa.table({"image": image, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    found, _, aside = scan(parquet(tmp_path / "a.parquet", name="a"), tmp_path)
    assert list(found) == ["a/000000000"]
    assert sorted(aside.values()) == [["a/000000001"], ["a/000000002"]]
    assert any("contains a path and no image" in reason for reason in aside)


def test_without_a_wish_for_captions_no_caption_column_is_needed(images: list[bytes], tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.parquet", images, text=["x"] * 7)
    _, opened, _ = scan(parquet(table, has_captions=False), tmp_path)
    assert len(opened) == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_column": "photo"}, "things.image_column: photo is not a column"),
        ({"image_column": "text"}, "things.image_column: text holds no images"),
        ({"caption_columns": ("label",)}, "things.caption_column: label is not a text column"),
        ({"caption_columns": ("number",)}, "things.caption_column: number is not a text column"),
    ],
)
def test_a_wrong_column_is_an_error_that_lists_the_columns(
    images: list[bytes], tmp_path: Path, changes: dict, words: str
) -> None:
    table = write_table(tmp_path / "a.parquet", images, text=["x"] * 7, number=[1] * 7)
    with pytest.raises(DataError) as caught:
        parquet(table, **changes)
    assert words in str(caught.value)
    assert "image (struct<" in str(caught.value)
    assert "text (string), number (int64)" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_an_error_that_names_it(images: list[bytes], tmp_path: Path, damage: str) -> None:
    table = write_table(tmp_path / "a.parquet", images, text=["x"] * 7)
    data = table.read_bytes()
    middle = bytearray(data)
    middle[-60] ^= 0xFF  # in the metadata at the end
    table.write_bytes({"cut": data[:-100], "flip": bytes(middle), "empty": b""}[damage])
    with pytest.raises(DataError, match=r"a\.parquet"):
        scan(parquet(table), tmp_path)


def test_few_row_groups_stay_in_memory(images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.data.backends.parquet._KEPT_BYTES", 1)
    backend = parquet(write_table(tmp_path / "a.parquet", images, text=["x"] * 7), name="a")
    for row in (0, 6, 3, 1, 6, 4):
        assert backend.read(b"a/%09d" % row) == images[row]
    assert len(backend._groups) == 2


def test_without_pyarrow_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="pip install pyarrow"):
        parquet(tmp_path / "a.parquet")


# ---- CSV -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    write_image(root / "a.png", seed=1)
    write_image(root / "a.webp", seed=2)
    write_image(root / "sub" / "b.png", seed=3)
    write_image(root / "unlisted.png", seed=4)
    write_image(tmp_path / "outside.png", seed=5)
    return root


def csv(root: Path, text: str, **changes) -> CsvBackend:
    table = root / "table.csv"
    table.write_text(text, encoding="utf-8")
    keys = {"root": root, "path_column": "file_name", "caption_column": "caption"} | changes
    return CsvBackend(table, dataset_id="things", file="data.json", **keys)


def test_a_table_chooses_images_and_gives_captions(folder: Path, tmp_path: Path) -> None:
    text = '\ufefffile_name,caption\na.png,"one, with\na break"\na.png,two\nsub\\b.png,three\na.webp,four\n'
    found, _, aside = scan(csv(folder, text), tmp_path)
    assert {path: caption for path, (_, caption) in found.items()} == {
        "a.png": f"one, with\na break{VARIANT_SEPARATOR}two",
        "a.webp": "four",
        "sub/b.png": "three",
    }
    assert aside == {}


def test_a_changed_caption_or_image_is_all_that_is_read_again(folder: Path, tmp_path: Path) -> None:
    first, opened, _ = scan(csv(folder, "file_name,caption\na.png,one\nsub/b.png,two\n"), tmp_path)
    assert sorted(opened) == ["a.png", "a.png.txt", "sub/b.png", "sub/b.png.txt"]
    again, opened, _ = scan(csv(folder, "caption,file_name\none,a.png\ntwo,sub/b.png\n"), tmp_path)
    assert (again, opened) == (first, [])
    write_image(folder / "sub" / "b.png", 70, 70, seed=9)
    changed, opened, _ = scan(csv(folder, "file_name,caption\na.png,other\nsub/b.png,two\n"), tmp_path)
    assert sorted(opened) == ["a.png.txt", "sub/b.png"]
    assert changed["a.png"][1] == "other"


@pytest.mark.parametrize(
    "name", ["../outside.png", "sub/../../outside.png", "/etc/passwd", "C:\\x.png", "..\\outside.png"]
)
def test_paths_that_lead_out_are_skipped_and_not_opened(folder: Path, tmp_path: Path, name: str) -> None:
    backend = csv(folder, f"file_name,caption\na.png,one\n{name},two\n")
    before = tree_digest(tmp_path / "set")
    found, _, aside = scan(backend, tmp_path)
    assert list(found) == ["a.png"]
    (reason,) = aside
    assert "refused for safety" in reason
    assert aside[reason] == [name]
    assert scan(backend, tmp_path)[1] == []
    assert tree_digest(tmp_path / "set") == before
    with pytest.raises(UnusableFile):
        backend.read(name.encode())


def test_links_that_lead_out_are_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "way").symlink_to(tmp_path)
    text = "file_name,caption\na.png,one\nlink.png,two\nway/outside.png,three\n"
    found, _, aside = scan(csv(folder, text), tmp_path)
    assert list(found) == ["a.png"]
    assert sorted(path for paths in aside.values() for path in paths) == ["link.png", "way/outside.png"]
    assert all("leads out" in reason for reason in aside)
    found, _, _ = scan(csv(folder, text, follows_outside=True), tmp_path / "followed")
    assert sorted(found) == ["a.png", "link.png", "way/outside.png"]


def test_a_row_group_of_many_gigabytes_and_an_image_of_one_are_not_read(
    images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "a.parquet", images, text=["x"] * 7)
    monkeypatch.setattr("simpletuner.data.backends.parquet.MAX_FILE_BYTES", 100)
    with pytest.raises(UnusableFile, match="larger than"):
        parquet(table, name="a").read(b"a/000000000")
    monkeypatch.setattr("simpletuner.data.backends.parquet.MAX_GROUP_BYTES", 100)
    with pytest.raises(DataError, match="in one row group"):
        scan(parquet(table), tmp_path)


def test_missing_and_odd_files_are_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "c.txt").write_text("a secret")
    backend = csv(folder, "file_name,caption\na.png,one\nnone.png,two\nc.txt,three\n,four\n")
    found, _, aside = scan(backend, tmp_path)
    assert list(found) == ["a.png"]
    assert sorted(path for paths in aside.values() for path in paths if not path.endswith(".txt.txt")) == [
        "(empty)",
        "c.txt",
        "none.png",
    ]
    with pytest.raises(UnusableFile):
        backend.read(b"c.txt")


def test_without_a_wish_for_captions_their_column_is_not_needed(folder: Path, tmp_path: Path) -> None:
    found, opened, _ = scan(csv(folder, "file_name\na.png\n", caption_column=None), tmp_path)
    assert (list(found), opened) == (["a.png"], ["a.png"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,caption\nhttps://example.org/a.png,one\n", "line 2 names a URL"),
        ("file_name,caption\nfile:///etc/passwd,one\n", "line 2 names a URL"),
        ("path,caption\na.png,one\n", "things.filename_column"),
        ("file_name,text\na.png,one\n", "things.csv_caption_column"),
        ("", "things.filename_column"),
        ('file_name,caption\na.png,"one\n', "things.csv_file"),
    ],
)
def test_a_table_that_cannot_serve_is_an_error_with_its_key(folder: Path, text: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        csv(folder, text)
    assert words in str(caught.value)
    assert "data.json: things." in str(caught.value)


def test_what_is_read_of_a_table_is_part_of_its_identity(folder: Path) -> None:
    text = "file_name,other,caption,long\na.png,b.png,one,two\n"
    changes = [{}, {"caption_column": "long"}, {"caption_column": None}, {"path_column": "other"}]
    assert len({csv(folder, text, **each).identity for each in changes}) == 4


def test_a_table_in_another_encoding_is_an_error(folder: Path) -> None:
    (folder / "table.csv").write_bytes("file_name,caption\na.png,é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"things\.csv_file"):
        CsvBackend(folder / "table.csv", folder, "file_name", "caption", "things")
    with pytest.raises(DataError, match=r"^data\.json: things\.csv_file: .*/gone\.csv: cannot be read: .*No such file"):
        CsvBackend(folder / "gone.csv", folder, "file_name", "caption", "things", "data.json")


# ---- paths ---------------------------------------------------------------------------------------------------------


def test_paths_inside_are_taken_however_they_are_written(tmp_path: Path) -> None:
    for name in ("a/b.png", "./a/b.png", "a\\b.png", "a/x/../b.png", str(tmp_path / "a" / "b.png")):
        assert path_inside(tmp_path, name) == b"a/b.png"


@pytest.mark.parametrize(
    "name", ["..", ".", "", " ", "a/../..", "../x", "/x", "\\\\host\\x", "C:/x", "c:x", "a\0b", "a/../../sibling/x"]
)
def test_paths_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnusableFile):
        path_inside(tmp_path, name)


def test_a_folder_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile):
        path_inside(tmp_path / "set", str(tmp_path / "set-secret" / "x.png"))


def test_addresses_are_distinguished_from_paths() -> None:
    assert all(map(is_url, ("http://x/a.png", "HTTPS://x", "file:///etc/passwd", "s3://b/k", " ftp://x")))
    assert not any(map(is_url, ("a.png", "a/b.png", "http.png", "C:\\a.png", "a:b.png")))


def test_of_a_snapshot_only_the_blobs_beside_it_are_its_own() -> None:
    hub = b"/home/me/hub/datasets--owner--name"
    assert _blobs_of(hub + b"/snapshots/abc/images") == [hub + b"/blobs"]
    assert _blobs_of(hub + b"/snapshots") == [hub + b"/blobs"]
    assert [_blobs_of(path) for path in (hub + b"/refs/abc", b"/data/snapshots/abc", b"snapshots/models--a")] == [
        []
    ] * 3
    assert _blobs_of(b"/models--a/snapshots/x/datasets--b/snapshots/y") == [b"/models--a/snapshots/x/datasets--b/blobs"]


def test_a_fence_lets_in_the_folder_itself_and_what_lies_in_it(tmp_path: Path) -> None:
    for name in ("root", "root-2"):
        (tmp_path / name).mkdir()
    root = os.fsencode(tmp_path / "root")
    (tmp_path / "root" / "again").symlink_to(".")
    (tmp_path / "root" / "out").symlink_to("../root-2")
    fence = Fence(root, follows_outside=False)
    assert [fence.keeps_out(root + name) for name in (b"", b"/again", b"/a", b"/out", b"/..", b"-2")] == [
        *(False, False, False, True, True, True)
    ]
    assert not Fence(root, follows_outside=True).keeps_out(b"/etc")


def test_a_folder_that_is_reached_in_several_ways_is_entered_once_by_the_first_of_its_names(tmp_path: Path) -> None:
    for name in ("b", "c"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "a").symlink_to("b")
    (tmp_path / "root" / "b" / "up").symlink_to("..")
    (tmp_path / "root" / ".hidden").mkdir()
    folders = [folder.path for folder in LocalBackend(tmp_path / "root").folders()]
    assert folders == [b"", b"a", b"c"]
