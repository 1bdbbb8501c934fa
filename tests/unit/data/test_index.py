"""The index looks at each state of a file once, whatever happens between scans."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.data.backends.base import FileStat, Folder, UnusableFile
from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.captioned import caption_warnings
from simpletuner.data.index import Catalog, Index
from simpletuner.errors import DataError
from tests.unit.data.images import tree_digest, write_image
from tests.unit.data.odd_files import NO_HEIF, png


class Counting(LocalBackend):
    """A local folder that remembers which files were read."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.opened: list[bytes] = []

    def read(self, path: bytes) -> bytes:
        self.opened.append(path)
        return super().read(path)


class Shuffled(LocalBackend):
    """A local folder that is listed backwards."""

    def folders(self) -> Iterator[Folder]:
        return reversed(list(super().folders()))

    def files(self, folder: bytes) -> Iterator[FileStat]:
        return reversed(list(super().files(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(5):
        write_image(root / f"p{number}.png", 64 + number, 48, seed=number)
    write_image(root / "sub" / "p0.png", 32, 32, seed=9)
    return root


def scan(root: Path, tmp_path: Path) -> tuple[Index, Catalog, list[str]]:
    """Scan with one index file; also the names of the files that were read."""
    backend = Counting(root)
    index = Index(tmp_path / "index.sqlite", backend)
    catalog = index.scan()
    return index, catalog, sorted(os.fsdecode(path) for path in backend.opened)


def paths(index: Index, catalog: Catalog) -> list[str]:
    return [row.path for row in index.images(catalog.ids.tolist())]


def test_images_come_in_the_order_of_their_paths_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("Z.png", "ä.png", "a.jpg", "-dash.png", "new\nline.png", "%s 'quote'.png"):
        write_image(folder / name)
    index, catalog, _ = scan(folder, tmp_path)
    found = paths(index, catalog)
    assert len(found) == 12
    assert found == sorted(found, key=os.fsencode)


def test_sizes_and_digests_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    index, catalog, _ = scan(folder, tmp_path)
    row = index.images([int(catalog.ids[2])])[0]
    expected = subprocess.run(["sha256sum", folder / "p2.png"], capture_output=True, text=True, check=True).stdout
    assert (row.path, row.height, row.width, row.digest) == ("p2.png", 48, 66, expected.split()[0])


def test_a_second_scan_reads_nothing(folder: Path, tmp_path: Path) -> None:
    _, first, opened = scan(folder, tmp_path)
    assert len(opened) == 6
    _, second, opened = scan(folder, tmp_path)
    assert opened == []
    assert second.images_digest == first.images_digest
    assert second.ids.tolist() == first.ids.tolist()


def test_the_order_of_listing_does_not_matter(folder: Path, tmp_path: Path) -> None:
    _, straight, _ = scan(folder, tmp_path)
    backwards = Index(tmp_path / "other.sqlite", Shuffled(folder)).scan()
    assert backwards.images_digest == straight.images_digest


def test_only_what_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    _, before, _ = scan(folder, tmp_path)
    write_image(folder / "p1.png", 70, 70, seed=77)
    write_image(folder / "new.png")
    (folder / "p3.png").unlink()
    index, after, opened = scan(folder, tmp_path)
    assert opened == ["new.png", "p1.png"]
    assert paths(index, after) == ["new.png", "p0.png", "p1.png", "p2.png", "p4.png", "sub/p0.png"]
    assert after.images_digest != before.images_digest


def test_other_bytes_of_equal_size_and_time_are_seen(folder: Path, tmp_path: Path) -> None:
    _, before, _ = scan(folder, tmp_path)
    path = folder / "p1.png"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # in the checksum of the last chunk: only a decoder that looks notices
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    _, after, opened = scan(folder, tmp_path)
    assert opened == ["p1.png"]
    assert after.images_digest != before.images_digest


def test_a_removed_folder_leaves_the_order_of_the_rest(folder: Path, tmp_path: Path) -> None:
    scan(folder, tmp_path)
    shutil.rmtree(folder / "sub")
    index, catalog, opened = scan(folder, tmp_path)
    assert opened == []
    assert paths(index, catalog) == ["p0.png", "p1.png", "p2.png", "p3.png", "p4.png"]


def test_a_run_that_began_before_a_change_keeps_its_images(folder: Path, tmp_path: Path) -> None:
    running, catalog, _ = scan(folder, tmp_path)
    before = running.images(catalog.ids.tolist())
    write_image(folder / "p1.png", 70, 70, seed=77)
    (folder / "p2.png").unlink()
    scan(folder, tmp_path)
    assert running.images(catalog.ids.tolist()) == before


def test_same_stem_and_other_extension_are_two_images(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_image(root / "a.png", seed=1)
    write_image(root / "a.jpg", seed=2)
    (root / "a.txt").write_text("one caption for both")
    index, catalog, _ = scan(root, tmp_path)
    assert paths(index, catalog) == ["a.jpg", "a.png"]
    assert index.texts(catalog.texts.tolist()) == ["one caption for both"] * 2


def test_caption_files_are_found_changed_and_removed(folder: Path, tmp_path: Path) -> None:
    (folder / "p0.txt").write_text("first")
    (folder / "p1.TXT").write_text("capitals")
    (folder / "p2.txt").write_text(" \n ")
    index, before, _ = scan(folder, tmp_path)
    assert index.texts(before.texts.tolist()) == ["first", "capitals", None, None, None, None]
    (folder / "p0.txt").write_text("second")
    (folder / "p1.TXT").unlink()
    index, after, opened = scan(folder, tmp_path)
    assert opened == ["p0.txt"]
    assert index.texts(after.texts.tolist()) == ["second", None, None, None, None, None]
    assert after.texts_digest != before.texts_digest
    assert after.images_digest == before.images_digest


def test_files_that_cannot_be_used_are_skipped_and_never_touched(folder: Path, tmp_path: Path) -> None:
    (folder / "text.png").write_text("hello")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "p0.png").read_bytes()[:500])
    (folder / "phone.heic").write_bytes(b"....ftypheic")
    (folder / "nowhere.png").symlink_to("/does/not/exist.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "sub" / "loop").symlink_to("..")
    (folder / "folder.png").mkdir()
    (folder / "notes.md").write_text("not an image, and not named like one")
    (folder / "._p0.png").write_bytes(b"resource fork")
    before = tree_digest(folder)
    index, catalog, _ = scan(folder, tmp_path)
    assert len(catalog) == 6
    assert index.num_images() == 12
    aside = index.skipped()
    assert sum(aside.counts.values()) == 6
    by_path = {path: reason for reason, examples in aside.examples.items() for path in examples}
    assert "not an image" in by_path["text.png"]
    assert "empty" in by_path["zero.jpg"]
    assert "damaged" in by_path["cut.png"]
    assert re.search(NO_HEIF, by_path["phone.heic"])
    assert "link to nothing" in by_path["nowhere.png"]
    assert "not a regular file" in by_path["pipe.png"]
    assert tree_digest(folder) == before
    assert scan(folder, tmp_path)[2] == []


def test_links_that_lead_out_are_counted_and_followed_only_where_the_dataset_says_so(
    folder: Path, tmp_path: Path
) -> None:
    elsewhere = write_image(tmp_path / "elsewhere" / "q.png", seed=5).parent
    (elsewhere / "secret.txt").write_text("a secret")
    (folder / "linked.png").symlink_to(elsewhere / "q.png")
    (folder / "p0.txt").symlink_to(elsewhere / "secret.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "inside.png").symlink_to("sub/p0.png")
    (folder / "up.png").symlink_to("../images/sub/../../elsewhere/q.png")
    backend = Counting(folder)
    index = Index(tmp_path / "index.sqlite", backend)
    catalog = index.scan()
    found = paths(index, catalog)
    assert found == ["inside.png", *(f"p{number}.png" for number in range(5)), "sub/p0.png"]
    assert not [path for path in backend.opened if b"q.png" in path or b".txt" in path]
    aside = index.skipped(with_texts=True)
    reason = "a link that leads out of the dataset's folder (follow_outside_links: true follows it)"
    assert aside.counts == {reason: 2, f"folder: {reason}": 2, f"caption file: {reason}": 1}
    with pytest.raises(UnusableFile, match="leads out"):  # also where it is put there after the scan
        backend.read(b"linked/q.png")
    assert scan(folder, tmp_path)[2] == []

    followed = LocalBackend(folder, follows_outside=True)
    assert followed.identity != backend.identity
    index = Index(tmp_path / "followed.sqlite", followed)
    found = paths(index, index.scan())
    assert {"linked.png", "up.png", "inside.png"} < {*found}
    assert [path for path in found if path.endswith("/q.png")] == ["again/q.png"]


def test_a_snapshot_of_the_hub_links_to_its_own_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets--ann--stars"
    blob = write_image(repository / "blobs" / "abc.png")
    blob.rename(repository / "blobs" / "abc")
    snapshot = repository / "snapshots" / "0123" / "images"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../../blobs/abc")
    (snapshot / "b.png").symlink_to(write_image(tmp_path / "hub" / "other.png"))
    for root in (snapshot, snapshot.parent):
        index = Index(tmp_path / f"{root.name}.sqlite", LocalBackend(root))
        assert [Path(path).name for path in paths(index, index.scan())] == ["a.png"]


def test_files_that_are_too_large_are_not_read(folder: Path, tmp_path: Path) -> None:
    with (folder / "huge.png").open("wb") as file:
        file.write((folder / "p0.png").read_bytes())
        file.truncate(40 << 30)  # sparse: 40 GB in a few blocks
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(40 << 30)
    started = time.process_time()
    index, catalog, _ = scan(folder, tmp_path)
    assert time.process_time() - started < 5  # 40 GB of zeros would take twice as long to read
    assert len(catalog) == 6
    assert index.skipped(with_texts=True).examples == {
        "larger than 512 MiB": ["huge.png"],
        "caption file: larger than 976.6 KiB": ["huge.txt"],
    }


def test_a_name_that_is_not_text_works(tmp_path: Path) -> None:
    root = tmp_path / "images"
    data = write_image(root / "p.png").read_bytes()
    name = os.fsencode(root) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(data)
    index, catalog, _ = scan(root, tmp_path)
    assert [os.fsencode(path) for path in paths(index, catalog)] == [b"caf\xe9.png", b"p.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_tried_again(folder: Path, tmp_path: Path) -> None:
    (folder / "p0.png").chmod(0)
    index, catalog, _ = scan(folder, tmp_path)
    assert len(catalog) == 5
    assert "cannot be read: Permission denied" in index.skipped().counts
    (folder / "p0.png").chmod(0o600)
    assert len(scan(folder, tmp_path)[1]) == 6


def test_a_passing_fault_is_tried_again_at_the_next_scan(folder: Path, tmp_path: Path) -> None:
    class Faulty(LocalBackend):
        def read(self, path: bytes) -> bytes:
            if path == b"p1.png":
                raise PermissionError(13, "Permission denied")
            return super().read(path)

    index = Index(tmp_path / "index.sqlite", Faulty(folder))
    assert len(index.scan()) == 5
    assert index.skipped().counts == {"cannot be read: Permission denied": 1}
    index.close()
    _, catalog, opened = scan(folder, tmp_path)
    assert opened == ["p1.png"]
    assert len(catalog) == 6


def test_another_decoder_looks_again_at_what_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "text.png").write_text("hello")
    scan(folder, tmp_path)
    assert scan(folder, tmp_path)[2] == []
    monkeypatch.setattr("simpletuner.data.scan.decoder_version", lambda: "a newer one")
    assert scan(folder, tmp_path)[2] == ["text.png"]
    assert scan(folder, tmp_path)[2] == []


def test_a_killed_scan_goes_on_where_it_stopped(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for number in range(100):
        write_image(root / f"p{number:03d}.png", 16, 16, seed=number)
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import simpletuner.data.scan as scan
        from simpletuner.data.backends.local import LocalBackend
        from simpletuner.data.index import Index

        scan._COMMIT_FILES = 10
        stop = lambda done: os.kill(os.getpid(), signal.SIGKILL) if done >= 48 else None
        Index(Path(sys.argv[2]), LocalBackend(sys.argv[1])).scan(stop)
        """
    )
    killed = subprocess.run([sys.executable, "-c", program, root, tmp_path / "index.sqlite"], check=False)
    assert killed.returncode == -9
    _, catalog, opened = scan(root, tmp_path)
    assert len(catalog) == 100
    assert 0 < len(opened) < 70
    whole = Index(tmp_path / "whole.sqlite", LocalBackend(root)).scan()
    assert catalog.images_digest == whole.images_digest


def test_a_scan_that_decodes_looks_again_at_what_only_checksums_vouched_for(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(png(64, 64, bytes(1000)))  # its checksums are right, most pixels are missing
    write_image(folder / "photo.jpg")
    backend = Counting(folder)
    index = Index(tmp_path / "index.sqlite", backend)
    before = index.scan(decodes=False)
    assert (len(before), len(backend.opened)) == (8, 8)
    assert index.scan(decodes=False).images_digest == before.images_digest
    assert len(backend.opened) == 8

    catalog = index.scan(is_trusted=True)
    assert len(backend.opened) == 8 + 7  # a JPEG was decoded at once
    assert "broken.png" not in paths(index, catalog)
    [reason] = index.skipped().counts
    assert reason.startswith("damaged")
    assert index.images(before.ids.tolist())[0].path == "broken.png"  # a run that began before finds its rows
    index.scan()
    index.scan(decodes=False)
    assert len(backend.opened) == 15
    assert catalog.images_digest == scan(folder, tmp_path / "other")[1].images_digest


def test_an_index_from_before_holds_decoded_images_only(folder: Path, tmp_path: Path) -> None:
    index, _, _ = scan(folder, tmp_path)
    index.close()
    database = sqlite3.connect(tmp_path / "index.sqlite")
    database.execute("DROP TABLE undecoded")
    database.close()
    assert scan(folder, tmp_path)[2] == []


def test_a_damaged_index_is_made_again(folder: Path, tmp_path: Path) -> None:
    scan(folder, tmp_path)[0].close()
    (tmp_path / "index.sqlite").write_bytes(b"this is no database" * 1000)
    _, catalog, opened = scan(folder, tmp_path)
    assert (len(catalog), len(opened)) == (6, 6)


def test_an_index_of_another_version_is_made_again(folder: Path, tmp_path: Path) -> None:
    scan(folder, tmp_path)[0].close()
    database = sqlite3.connect(tmp_path / "index.sqlite")
    database.execute("PRAGMA user_version = 999")
    database.execute("DROP TABLE catalogue")
    database.commit()
    database.close()
    assert len(scan(folder, tmp_path)[1]) == 6


def test_an_index_that_cannot_be_written_is_a_data_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be used"):
        Index(tmp_path / "file" / "index.sqlite", LocalBackend(folder))


def test_two_scans_at_once_agree(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from simpletuner.data.backends.local import LocalBackend; "
        "from simpletuner.data.index import Index; "
        "print(Index(Path(sys.argv[2]), LocalBackend(sys.argv[1])).scan().images_digest)"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "index.sqlite")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1] == scan(folder, tmp_path)[1].images_digest + "\n"


def test_a_file_that_changes_while_it_is_read_is_not_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend(folder)
    monkeypatch.setattr("simpletuner.data.backends.local._PAUSE_SECONDS", 0.0)
    real_fstat, calls = os.fstat, []

    def fstat(descriptor: int) -> os.stat_result:
        calls.append(descriptor)
        if len(calls) == 2:  # between the two looks of the first attempt
            with (folder / "p0.png").open("ab") as file:
                file.write(b"more")
        return real_fstat(descriptor)

    monkeypatch.setattr("simpletuner.data.backends.local.os.fstat", fstat)
    assert backend.read(b"p0.png").endswith(b"more")
    assert len(calls) == 4


def test_captions_in_other_encodings_are_noted_or_skipped_with_their_place(folder: Path, tmp_path: Path) -> None:
    (folder / "p0.txt").write_bytes("a dog\u2019s nose".encode("cp1252"))
    (folder / "p1.txt").write_bytes("собака на траве".encode("cp1251"))
    (folder / "p2.txt").write_bytes("a dog".encode("utf-16-le"))
    (folder / "p3.txt").write_bytes("a dog".encode("utf-16"))
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "p4.png").read_bytes())
    index, catalog, _ = scan(folder, tmp_path)
    found = [text for text in index.texts(catalog.texts.tolist()) if text]
    assert found == ["a dog\u2019s nose", "a dog"]
    notes = {text: note.examples for text, note in index.notes().items()}
    assert notes == {"a name that is not UTF-8, read as cp1252": (os.fsdecode(b"caf\xe9.png"),)}
    (warning,) = caption_warnings("things", index)
    assert warning.startswith("things: 1 with a caption file that is not UTF-8, read as cp1252 (p0.txt): ")
    reasons = {path: reason for reason, (path,) in index.skipped(with_texts=True).examples.items()}
    assert "is not UTF-8 text: line 1, byte 1 (0xf1)" in reasons["p1.txt"]
    assert "NUL character in line 1" in reasons["p2.txt"]


def test_captions_that_an_earlier_version_read_are_read_again_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    (folder / "p0.txt").write_bytes("caf\xe9".encode("latin-1"))
    scan(folder, tmp_path)
    with sqlite3.connect(tmp_path / "index.sqlite") as database:  # as the version before left it
        database.execute("DELETE FROM facts WHERE name = 'texts'")
        database.execute("UPDATE files SET text = 'caf\ufffd', reason = NULL WHERE is_text")
    index, catalog, opened = scan(folder, tmp_path)
    assert opened == ["p0.txt"]
    assert [text for text in index.texts(catalog.texts.tolist()) if text] == ["café"]
    assert scan(folder, tmp_path)[2] == []


def test_reading_a_small_file_takes_no_buffer_for_the_largest(folder: Path) -> None:
    """A buffer of 512 MiB is mapped and unmapped for each image otherwise, which also slows the thread that encodes."""
    backend = LocalBackend(folder)
    tracemalloc.start()
    try:
        data = backend.read(b"p0.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data == (folder / "p0.png").read_bytes()
    assert peak < 1_000_000
