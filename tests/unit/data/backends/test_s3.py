"""Buckets, on a real server on loopback."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from pydantic import SecretStr

from simpletuner.data.backends import s3 as module
from simpletuner.data.backends.s3 import Bucket, S3Backend
from simpletuner.data.index import Index
from simpletuner.errors import ConfigError, DataError, MissingDependency
from tests.runs import write_images
from tests.s3 import LOGIN, S3, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server("images") as server:
        yield server


@pytest.fixture
def folder(server: S3, tmp_path: Path) -> Path:
    """Three images at the top and two in a folder of odd names; also in the bucket, below `some/where/`."""
    folder = write_images(tmp_path / "drawn", 3, seed=1)
    write_images(folder / "ä 100% + #1", 2, seed=2)
    server.upload(folder, "images", "some/where/")
    server.requests.clear()
    return folder


def backend(server: S3, name: str = "images", **changes: object) -> S3Backend:
    login = (SecretStr(LOGIN["aws_access_key_id"]), SecretStr(LOGIN["aws_secret_access_key"]))
    keys = {"prefix": "some/where", "endpoint_url": server.url, "region": "us-east-1"} | changes
    return S3Backend(Bucket(name, access_key_id=login[0], secret_access_key=login[1], **keys), "things", "data.json")


def scan(server: S3, tmp_path: Path) -> dict[str, str]:
    index = Index(tmp_path / "index.sqlite", backend(server))
    catalog = index.scan()
    rows = index.images(catalog.ids.tolist())
    return {row.path: row.digest for row in rows}


def test_what_is_read_is_what_was_put_there(server: S3, folder: Path) -> None:
    store = backend(server)
    for path in folder.rglob("*.*"):
        assert store.read(str(path.relative_to(folder)).encode()) == path.read_bytes()


def test_a_second_scan_reads_no_object(server: S3, folder: Path, tmp_path: Path) -> None:
    first = scan(server, tmp_path)
    assert len(first) == 5
    assert len(server.fetched()) == 10  # images and captions
    assert scan(server, tmp_path) == first
    assert all("list-type" in path for _, path in server.requests)
    assert len(server.requests) == 2  # one listing for each folder


@pytest.mark.slow
def test_only_changed_objects_are_read_again(server: S3, folder: Path, tmp_path: Path) -> None:
    first = scan(server, tmp_path)
    other = (folder / "000.png").read_bytes()
    server.client.put_object(Bucket="images", Key="some/where/001.png", Body=other)
    same = (folder / "002.png").read_bytes()
    server.client.put_object(Bucket="images", Key="some/where/002.png", Body=same)
    server.client.delete_object(Bucket="images", Key="some/where/ä 100% + #1/000.png")
    server.requests.clear()
    second = scan(server, tmp_path)
    assert server.fetched() == ["/images/some/where/001.png"]
    assert second["001.png"] == first["000.png"]
    assert set(first) - set(second) == {"ä 100% + #1/000.png"}


def test_listings_of_several_pages_are_whole(server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        server.client.put_object(Bucket="images", Key=f"many/{number}.txt", Body=b"x")
    store = backend(server, prefix="many")
    ask = store._store.call_s3
    monkeypatch.setattr(store._store, "call_s3", lambda method, **request: ask(method, MaxKeys=3, **request))
    assert [file.name for file in store.files(b"")] == [b"%d.txt" % number for number in range(7)]


def test_objects_are_fetched_side_by_side(
    server: S3, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the larger folder: three images and three captions wait for each other."""
    all_six, came = threading.Barrier(6, timeout=300), []
    read = S3Backend.read

    def read_with_the_others(self: S3Backend, path: bytes) -> bytes:
        if b"/" not in path:
            came.append(all_six.wait())
        return read(self, path)

    monkeypatch.setattr(S3Backend, "read", read_with_the_others)
    assert len(scan(server, tmp_path)) == 5
    assert sorted(came) == list(range(6))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "nowhere"}, ["things.aws_bucket_name", "no bucket nowhere at http://127.0.0.1"]),
        ({"endpoint_url": "http://127.0.0.1:9"}, ["things.aws_endpoint_url", "s3://images/some/where"]),
    ],
)
def test_what_cannot_be_listed_is_named(
    server: S3, changes: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_PAUSE_SECONDS", 0.01)
    with pytest.raises(DataError) as caught:
        list(backend(server, **changes).folders())
    text = str(caught.value)
    assert all(word in text for word in ["data.json", *words])
    assert LOGIN["aws_secret_access_key"] not in text


def test_buckets_of_one_name_at_two_stores_are_not_one_tree(server: S3) -> None:
    places = ["http://one.example.org", "http://two.example.org"]
    trees = [backend(server, endpoint_url=place, prefix=prefix) for place in places for prefix in ("a", "b")]
    assert len({tree.identity for tree in trees}) == 4


def test_an_endpoint_without_a_scheme_is_refused(server: S3) -> None:
    with pytest.raises(ConfigError, match=r"things\.aws_endpoint_url"):
        backend(server, endpoint_url="store.example.org")
    for address in ("https://store.example.org", "http://store.example.org:9000"):
        assert backend(server, endpoint_url=address).identity == f"{address} s3://images/some/where"


@pytest.mark.parametrize("address", ["http://me:secret@store.example.org", "me:secret@store.example.org"])
def test_an_endpoint_with_a_login_is_refused_and_not_shown(server: S3, address: str) -> None:
    with pytest.raises(ConfigError, match=r"things\.aws_endpoint_url: holds a login") as caught:
        backend(server, endpoint_url=address)
    assert "secret" not in str(caught.value)


def test_no_login_is_an_error_that_says_how_to_log_in(
    server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    store = S3Backend(Bucket("images", endpoint_url=server.url), "things")
    with pytest.raises(DataError, match="AWS_ACCESS_KEY_ID"):
        list(store.folders())


def test_the_login_is_taken_from_the_environment(server: S3, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LOGIN.items():
        monkeypatch.setenv(name.upper(), value)
    store = S3Backend(Bucket("images", "some/where", server.url), "things")
    assert store.read(b"000.png") == (folder / "000.png").read_bytes()


def refusal(status: int, code: str) -> OSError:
    """As s3fs hands on an answer of a server."""
    error = OSError(5, code)
    error.__cause__ = ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )
    return error


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        (refusal(503, "SlowDown"), 3),
        (refusal(500, "InternalError"), 3),
        (EndpointConnectionError(endpoint_url="http://x"), 3),
        (refusal(403, "InvalidObjectState"), 1),
    ],
)
def test_only_what_may_pass_is_asked_again(
    server: S3, fault: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_PAUSE_SECONDS", 0.01)
    asked: list[int] = []

    def question() -> bytes:
        asked.append(1)
        if len(asked) < 3:
            raise fault
        return b"answer"

    store = backend(server)
    if attempts == 3:
        assert store._ask(question) == b"answer"
    else:
        with pytest.raises(OSError, match="InvalidObjectState"):
            store._ask(question)
    assert len(asked) == attempts


def test_the_login_is_in_no_representation(server: S3) -> None:
    store = backend(server)
    shown = f"{store.bucket} {store.identity} {store.location} {vars(store)}"
    assert LOGIN["aws_secret_access_key"] not in shown


def test_without_s3fs_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependency, match="pip install s3fs"):
        S3Backend(Bucket("images"), "things")


def test_a_page_of_a_listing_names_images_texts_and_folders_and_what_is_too_large() -> None:
    """An ETag stands for the content, as a number of 63 bits; hidden names and other files are left out."""

    def number(tag: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(tag, digest_size=8).digest(), "big") // 2

    sizes = {"p/a.png": 5, "p/b.TXT": 1 << 29, "p/c.png": (1 << 29) + 1, "p/": 0, "p/.d.png": 5, "p/e.zip": 5}
    contents = [{"Key": key, "Size": size, "ETag": f'"{key}"'} for key, size in sizes.items()]
    page = {"Contents": contents, "CommonPrefixes": [{"Prefix": "p/sub/"}, {"Prefix": "p/.git/"}]}
    assert list(module._page_files(page, "p/")) == [
        (b"a.png", 5, 0, 0, number(b'"p/a.png"')),
        (b"b.TXT", 1 << 29, 0, 0, number(b'"p/b.TXT"')),
        (b"c.png", -3, 0, 0, number(b'"p/c.png"')),
    ]
    assert list(module._page_folders(page, "p/", b"x")) == [b"x/sub"]
    assert list(module._page_folders(page, "p/", b"")) == [b"sub"]
    assert (list(module._page_files({}, "p/")), list(module._page_folders({}, "p/", b""))) == ([], [])
    assert [Bucket("b", prefix).url for prefix in ("", "a/b")] == ["s3://b", "s3://b/a/b"]
