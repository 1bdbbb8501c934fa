"""Which Parquet files make up one split of a dataset, by the conventions of the Hugging Face hub.

A dataset card may say it (`configs` in the front matter of README.md). Else names do: a file belongs to the split whose
word stands in its path between separators (`data/train-00000-of-00002.parquet`, `default/test/0000.parquet`), and
files without any such word are the split `train`.
See https://huggingface.co/docs/hub/datasets-file-names-and-splits and .../datasets-manual-configuration.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SUFFIX = ".parquet"
# Branch on which the hub keeps every public dataset as Parquet: CONFIG/SPLIT/0000.parquet.
CONVERTED_BRANCH = "refs/convert/parquet"

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# A split of any name, as `datasets` itself writes it.
_SHARD = re.compile(r"(?:^|/)([A-Za-z0-9_.]+)-\d{5}-of-\d{5}\.parquet$")


class NoSuchPart(Exception):
    """A configuration or split that the dataset does not have.

    Args:
        key: `dataset_config` or `split`.
        known: what it has.
    """

    def __init__(self, key: str, wanted: str | None, known: Iterable[str]):
        self.key, self.wanted, self.known = key, wanted, sorted(known)
        super().__init__(f"{key} {wanted}: not among {', '.join(self.known)}")


def choose_files(names: Sequence[str], card: str | None, config: str | None, split: str) -> list[str]:
    """The Parquet files of a split, sorted.

    Args:
        names: every file of the dataset, relative, `/`-separated.
        card: text of README.md.

    Raises:
        NoSuchPart: the dataset has no such configuration or split, or has several configurations and none is chosen.
    """
    tables = sorted(name for name in names if name.endswith(SUFFIX) and not name.startswith("."))
    configs = card_configs(card) if card else {}
    if configs:
        by_split = _files_by_card(tables, _pick(configs, config, "dataset_config"))
    else:
        by_split = _files_by_name(_in_config(tables, config))
    if split not in by_split:
        raise NoSuchPart("split", split, by_split)
    return by_split[split]


def card_configs(card: str) -> dict[str, dict[str, list[str]]]:
    """Configuration -> split -> patterns, from a dataset card; empty where it names no files.

    Raises:
        ValueError: the front matter is not YAML, or names files in another form.
    """
    import yaml

    from simpletuner.config.yaml_reader import SafeLoader

    parts = card.split("---", 2)
    if not card.startswith("---") or len(parts) < 3:
        return {}
    try:
        if any(isinstance(event, yaml.events.AliasEvent) for event in yaml.parse(parts[1], yaml.SafeLoader)):
            raise ValueError("it refers back to itself with *, which a few lines can blow up to gigabytes")
        front = SafeLoader(parts[1]).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    configs = {}
    for entry in (front.get("configs") or ()) if isinstance(front, Mapping) else ():
        if isinstance(entry, Mapping) and entry.get("data_files"):
            name = str(entry.get("config_name", "default"))
            try:
                configs[name] = _patterns(entry["data_files"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"data_files of {name} are not split and path") from error
    return configs


def _patterns(data_files: Any) -> dict[str, list[str]]:
    if isinstance(data_files, str):
        return {"train": [data_files]}
    patterns: dict[str, list[str]] = defaultdict(list)
    for part in data_files:
        split, path = (part["split"], part["path"]) if isinstance(part, Mapping) else ("train", part)
        patterns[str(split)] += [path] if isinstance(path, str) else list(path)
    return dict(patterns)


def _files_by_card(tables: Sequence[str], patterns: Mapping[str, list[str]]) -> dict[str, list[str]]:
    found = {
        split: [name for name in tables if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
        for split, wanted in patterns.items()
    }
    return {split: names for split, names in found.items() if names}


def _in_config(tables: Sequence[str], config: str | None) -> list[str]:
    """The files of a configuration: those in a folder of its name, at the top or in `data`."""
    if config is not None:
        chosen = [name for name in tables if name.removeprefix("data/").startswith(f"{config}/")]
        if not chosen:
            raise NoSuchPart("dataset_config", config, {name.split("/")[0] for name in tables if "/" in name})
        return chosen
    # On the converted branch every file lies in CONFIG/SPLIT.
    folders = {name.split("/")[0] for name in tables if name.count("/") == 2}
    if len(folders) > 1 and all(name.count("/") == 2 for name in tables):
        folder = _pick({name: name for name in folders}, None, "dataset_config")
        return [name for name in tables if name.startswith(f"{folder}/")]
    return list(tables)


def _files_by_name(tables: Sequence[str]) -> dict[str, list[str]]:
    by_split: dict[str, list[str]] = defaultdict(list)
    for name in tables:
        words = re.split(r"[^A-Za-z0-9]+", name.removesuffix(SUFFIX).lower())
        known = next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)
        shard = _SHARD.search(name)
        by_split[known or (shard.group(1) if shard else "train")].append(name)
    return dict(by_split)


def _pick(choices: Mapping[str, Any], wanted: str | None, key: str) -> Any:
    """The wanted one; without a wish the only one, or the one called default."""
    if wanted is None:
        if len(choices) == 1:
            return next(iter(choices.values()))
        wanted = "default"
    if wanted not in choices:
        raise NoSuchPart(key, wanted, choices)
    return choices[wanted]
