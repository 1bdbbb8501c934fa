"""A bucket of S3, or of a store that speaks its protocol.

Objects are compared by size and ETag, which changes with their content, so nothing is fetched twice unless it changed.
Listings are paged and never kept: a bucket may hold millions of objects. All retries are made here; those of the
libraries below are off, since three layers of them turn a wrong address into minutes of silence.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from simpletuner.data.backends.base import MAX_FILE_BYTES, TOO_LARGE, FileStat, Folder, content_number, join
from simpletuner.data.backends.local import is_wanted
from simpletuner.errors import ConfigError, DataError, MissingDependency, Problem
from simpletuner.text import without_login

if TYPE_CHECKING:
    from pydantic import SecretStr
    from s3fs import S3FileSystem

Result = TypeVar("Result")

# Waiting for the network, not for a core.
_READERS = 32
_ATTEMPTS = 5
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_LONGEST_PAUSE_SECONDS = 8
_LOGIN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or both keys in the entry"


@dataclass(frozen=True)
class Bucket:
    """Which objects, and how to get at them; what is None is left to the AWS libraries (environment, ~/.aws, role).

    Args:
        prefix: `/`-separated, without one at either end.
    """

    name: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None

    @property
    def url(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")


class S3Backend:
    """See `Backend`.

    Args:
        dataset_id: named in errors, with the key.
        file: data file that errors name.

    Raises:
        MissingDependency: s3fs is not installed.
        ConfigError: the endpoint is no address.
    """

    def __init__(self, bucket: Bucket, dataset_id: str, file: str | None = None):
        self.bucket = bucket
        self.location = bucket.url
        self.identity = f"{bucket.endpoint_url or ''} {bucket.url}"
        self.num_readers = _READERS
        self._dataset_id, self._file = dataset_id, file
        self._start = f"{bucket.prefix}/" if bucket.prefix else ""
        if "@" in (bucket.endpoint_url or ""):
            message = "holds a login, which would be shown wherever the address is"
            raise ConfigError(self._problem("aws_endpoint_url", message, fix=_LOGIN))
        if bucket.endpoint_url is not None and not bucket.endpoint_url.startswith(("http://", "https://")):
            message = f'"{bucket.endpoint_url}" is not an address'
            raise ConfigError(self._problem("aws_endpoint_url", message, allowed="https://..., or http://..."))
        self._store = _open_store(bucket)

    def folders(self) -> Iterator[Folder]:
        """As in `Backend`.

        Raises:
            DataError: the store does not answer. A part of a listing would look as if the rest had been deleted.
        """
        pending = [b""]
        while pending:
            path = pending.pop()
            digest = hashlib.blake2b(digest_size=16)
            for page in self._pages(path):
                for file in _page_files(page, self._prefix(path)):
                    digest.update(b"%d %b %d %d " % (len(file.name), file.name, file.size, file.inode))
                pending += _page_folders(page, self._prefix(path), path)
            yield Folder(path, digest.digest())

    def files(self, folder: bytes) -> Iterator[FileStat]:
        for page in self._pages(folder):
            yield from _page_files(page, self._prefix(folder))

    def read(self, path: bytes) -> bytes:
        name = f"{self.bucket.name}/{self._start}{path.decode()}"
        # One request in one piece: parts of an object that is being replaced could come from two versions.
        return self._ask(functools.partial(self._store.cat_file, name, max_concurrency=1))

    def _prefix(self, folder: bytes) -> str:
        return f"{self._start}{folder.decode()}/" if folder else self._start

    def _pages(self, folder: bytes) -> Iterator[dict[str, Any]]:
        request = {"Bucket": self.bucket.name, "Prefix": self._prefix(folder), "Delimiter": "/"}
        while True:
            try:
                page = self._ask(functools.partial(self._store.call_s3, "list_objects_v2", **request))
            except OSError as error:
                self._refuse(error, folder)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _ask(self, question: Callable[[], Result]) -> Result:
        """Ask the store, again where the fault may pass.

        Raises:
            OSError: it refused, or did not answer in time.
        """
        import tenacity
        from aiohttp import ClientError as TransferError
        from botocore.exceptions import BotoCoreError

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_random_exponential(0.2, _LONGEST_PAUSE_SECONDS),
            reraise=True,
        )
        try:
            return retrying(question)
        except (BotoCoreError, TransferError) as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _refuse(self, error: OSError, folder: bytes) -> NoReturn:
        place = f"{self.location}/{folder.decode()}".rstrip("/")
        address = self.bucket.endpoint_url or "the store"
        reason = without_login(str(error))
        key, message = "aws_endpoint_url", f"{place} cannot be listed: {reason}"
        fix = "check the address, the network and the login"
        if isinstance(error, FileNotFoundError):
            key, message = "aws_bucket_name", f"there is no bucket {self.bucket.name} at {address}"
            fix = "correct the name"
        elif isinstance(error, PermissionError) or "CredentialsError" in str(error):
            key, message, fix = "aws_access_key_id", f"{place} may not be listed: {reason}", _LOGIN
        raise DataError(self._problem(key, message, fix=fix)) from error

    def _problem(self, key: str, message: str, allowed: str | None = None, fix: str | None = None) -> Problem:
        return Problem(message, key=f"{self._dataset_id}.{key}", file=self._file, allowed=allowed, fix=fix)


def _open_store(bucket: Bucket) -> S3FileSystem:
    try:
        import s3fs
    except ImportError:
        message = "type aws needs s3fs, which is not installed"
        raise MissingDependency(Problem(message, fix="pip install s3fs")) from None
    secrets = [
        value.get_secret_value() if value else None for value in (bucket.access_key_id, bucket.secret_access_key)
    ]
    store = s3fs.S3FileSystem(
        key=secrets[0],
        secret=secrets[1],
        endpoint_url=bucket.endpoint_url,
        client_kwargs={"region_name": bucket.region} if bucket.region else {},
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "max_pool_connections": _READERS,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    store.retries = 1
    return store


def _page_files(page: dict[str, Any], prefix: str) -> Iterator[FileStat]:
    for entry in page.get("Contents", ()):
        name = entry["Key"][len(prefix) :]
        if name and is_wanted(name):
            size = entry["Size"] if entry["Size"] <= MAX_FILE_BYTES else TOO_LARGE
            yield FileStat(name.encode(), size, 0, 0, content_number(entry["ETag"].encode()))


def _page_folders(page: dict[str, Any], prefix: str, folder: bytes) -> Iterator[bytes]:
    for entry in page.get("CommonPrefixes", ()):
        name = entry["Prefix"][len(prefix) : -1]
        if not name.startswith("."):
            yield join(folder, name.encode())


def _may_pass(error: BaseException) -> bool:
    """Whether the same question may be answered in a moment: no connection, an overload, a fault of the server."""
    from aiohttp import ClientError as TransferError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError

    if isinstance(error, (NoConnection, HTTPClientError, TransferError, TimeoutError)):
        return True
    response = getattr(error.__cause__, "response", None)  # of botocore's ClientError
    if not isinstance(error, OSError) or not isinstance(response, dict):
        return False
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = response.get("Error", {}).get("Code")
    return status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed")
