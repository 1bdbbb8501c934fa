"""Finding the Parquet files of a dataset: in a folder, or on the Hugging Face hub, from where they are fetched.

Only tables are fetched, never code: datasets that come as scripts, images or tar files are read from the branch on
which the hub keeps them as Parquet. What was fetched stays in the cache of huggingface_hub, which also resumes.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from simpletuner.data.backends.hub_layout import CONVERTED_BRANCH, SUFFIX, NoSuchPart, choose_files
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.models.hub_connectivity import hub_failures, why_unreachable
from simpletuner.text import decode_lenient, read_file, without_login

_CARD = "README.md"
MAX_CARD_BYTES = 2_000_000


@dataclass(frozen=True)
class HubDataset:
    """What a dataset entry asks for.

    Args:
        name: id on the hub, or a path that exists.
        dataset_id: named in errors, with the key.
        file: data file that errors name.
    """

    name: str
    config: str | None
    split: str
    revision: str | None
    dataset_id: str
    file: str | None = None

    def problem(self, key: str, message: str, allowed: str | None = None, fix: str | None = None) -> Problem:
        return Problem(message, key=f"{self.dataset_id}.{key}", file=self.file, allowed=allowed, fix=fix)


def find_tables(wanted: HubDataset) -> dict[str, Path]:
    """Name -> place of every Parquet file of the split; fetches what is not here yet.

    Raises:
        ConfigError: there is no such dataset, configuration or split.
        DataError: it cannot be fetched.
    """
    path = Path(wanted.name)
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        return _tables_in(path, wanted)
    return _tables_on_hub(wanted)


def _tables_in(folder: Path, wanted: HubDataset) -> dict[str, Path]:
    # Links are followed: the hub's cache is made of them.
    names = [
        os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")  # noqa: PTH118 - a walk of texts
        for place, _, files in os.walk(folder, followlinks=True)
        for name in files
    ]
    card = folder / _CARD
    return {name: folder / name for name in _choose(names, card if card.is_file() else None, wanted)}


def _tables_on_hub(wanted: HubDataset) -> dict[str, Path]:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    revision = wanted.revision
    failures: tuple[type[Exception], ...] = (*hub_failures(), HFValidationError)
    try:
        if (reason := why_unreachable()) is not None:
            return _tables_in_cache(wanted, reason)
        names = HfApi().list_repo_files(wanted.name, repo_type="dataset", revision=revision)
        if revision is None and not any(name.endswith(SUFFIX) for name in names):
            revision = CONVERTED_BRANCH
            names = HfApi().list_repo_files(wanted.name, repo_type="dataset", revision=revision)
        card = hf_hub_download(wanted.name, _CARD, repo_type="dataset", revision=revision) if _CARD in names else None
        chosen = _choose(names, Path(card) if card else None, wanted)
        patterns = [glob.escape(name) for name in chosen]
        fetched = snapshot_download(wanted.name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except failures as error:
        _refuse(error, wanted)
    return {name: Path(fetched) / name for name in chosen}


def _tables_in_cache(wanted: HubDataset, reason: str) -> dict[str, Path]:
    """What was fetched before, where the hub cannot be asked for `reason`; all of the split or nothing.

    Raises:
        LocalEntryNotFoundError: it was not fetched, or only in part.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    fetch = partial(snapshot_download, wanted.name, repo_type="dataset", local_files_only=True)
    for revision in [wanted.revision] if wanted.revision else ["main", CONVERTED_BRANCH]:
        try:
            names = [entry.path for entry in get_cached_repo_tree(wanted.name, repo_type="dataset", revision=revision)]
        except CachedRepoTreeNotFoundError:
            continue
        if not any(name.endswith(SUFFIX) for name in names):
            continue
        card = Path(fetch(revision=revision, allow_patterns=[_CARD])) / _CARD if _CARD in names else None
        chosen = _choose(names, card, wanted)
        patterns = [glob.escape(name) for name in chosen]
        folder = Path(fetch(revision=revision, allow_patterns=patterns))
        return {name: folder / name for name in chosen}
    raise LocalEntryNotFoundError(reason)


def _choose(names: list[str], card: Path | None, wanted: HubDataset) -> list[str]:
    """The files of the split that is wanted, by the dataset's card where it has one."""
    try:
        text = decode_lenient(read_file(card, MAX_CARD_BYTES))[0] if card else None
        chosen = choose_files(names, text, wanted.config, wanted.split)
    except NoSuchPart as error:
        if any(name.endswith(SUFFIX) for name in names):
            message = f'{wanted.name} has no {error.key.removeprefix("dataset_")} "{error.wanted}"'
            raise ConfigError(wanted.problem(error.key, message, ", ".join(error.known) or None)) from error
        message = f"{wanted.name} holds no {SUFFIX} files"
        fix = "write it with Dataset.to_parquet; for a folder of images use type local"
        raise ConfigError(wanted.problem("dataset_name", message, fix=fix)) from error
    except ValueError as error:
        message = f"the front matter of {_CARD} in {wanted.name} cannot be read: {error}"
        raise DataError(wanted.problem("dataset_name", message, fix="fix or remove it")) from error
    return chosen


def _refuse(error: Exception, wanted: HubDataset) -> NoReturn:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    kind: type[DataError | ConfigError] = DataError
    key, reason = "dataset_name", " ".join(without_login(str(error)).split())[:200]
    fix = "check the network, then start again: what was fetched is kept"
    if isinstance(error, GatedRepoError):
        reason, fix = "its owner must grant you access", "request access on its page, then log in: hf auth login"
    elif isinstance(error, RevisionNotFoundError):
        kind, key, reason = ConfigError, "revision", f"it has no revision {wanted.revision or CONVERTED_BRANCH}"
        fix = "correct the revision" if wanted.revision else "name a branch that holds Parquet files"
    elif isinstance(error, RepositoryNotFoundError):
        kind, reason = ConfigError, "there is no such dataset, or it is private"
        fix = "correct the name, or log in: hf auth login"
    elif isinstance(error, HFValidationError):
        kind, reason, fix = ConfigError, "it is neither a path that exists nor an id such as owner/name", "correct it"
    elif isinstance(error, LocalEntryNotFoundError):
        fix = "fetch it once with the network (without HF_HUB_OFFLINE), or give a folder"
    raise kind(wanted.problem(key, f"the dataset {wanted.name} cannot be fetched: {reason}", fix=fix)) from error
