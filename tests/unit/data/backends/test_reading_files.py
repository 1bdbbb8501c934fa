"""What a read of one file follows: links that stay in the dataset's folder, whatever stood there at the last read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner.data.backends.base import UnusableFile
from simpletuner.data.backends.local import LocalBackend


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset's folder, with a folder of secrets beside it."""
    for folder in ("set/sub", "set/other", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "set" / "sub" / "a.png").write_bytes(b"sub")
    (tmp_path / "set" / "other" / "a.png").write_bytes(b"other")
    (tmp_path / "secret" / "a.png").write_bytes(b"secret")
    return tmp_path / "set"


@pytest.mark.parametrize(("target", "content"), [("../other", b"other"), ("../../secret", None)])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_became_a_link_since_the_last_read_is_judged_again(
    root: Path, target: str, content: bytes | None, kind: str
) -> None:
    backend = LocalBackend(root)
    assert backend.read(b"sub/a.png") == b"sub"
    if kind == "file":
        (root / "sub" / "a.png").unlink()
        (root / "sub" / "a.png").symlink_to(f"{target}/a.png")
    else:
        (root / "sub").rename(root / "former")
        (root / "sub").symlink_to(target[3:])
    if content is None:
        with pytest.raises(UnusableFile, match="outside"):
            backend.read(b"sub/a.png")
        assert LocalBackend(root, follows_outside=True).read(b"sub/a.png") == b"secret"
    else:
        assert backend.read(b"sub/a.png") == content


def test_a_link_that_leads_out_is_not_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "b.png").symlink_to("../secret/a.png")
    (root / "out").symlink_to("../secret")
    opened: list[int] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(found := real(*arguments)) or found)
    for path in (b"b.png", b"out/a.png"):
        with pytest.raises(UnusableFile, match="outside"):
            LocalBackend(root).read(path)
    assert opened == []


def test_a_system_that_cannot_refuse_links_judges_each_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_NOFOLLOW")
    (root / "b.png").symlink_to("../secret/a.png")
    assert LocalBackend(root).read(b"sub/a.png") == b"sub"
    with pytest.raises(UnusableFile, match="outside"):
        LocalBackend(root).read(b"b.png")


def test_a_file_that_comes_in_pieces_is_read_to_its_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: real(descriptor, min(size, 2)))
    assert LocalBackend(root).read(b"other/a.png") == b"other"


def open_files(root: Path) -> list[Path]:
    return [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link).startswith(str(root))]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not say which files are open")
def test_each_file_is_closed(root: Path) -> None:
    (root / "folder.png").mkdir()
    backend = LocalBackend(root)
    backend.read(b"sub/a.png")
    with pytest.raises(UnusableFile):
        backend.read(b"folder.png")
    assert open_files(root) == []
