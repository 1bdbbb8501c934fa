"""Which files make up a split; datasets in folders, and on a hub that is served here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.data.backends.hub import HubDataset, find_tables
from simpletuner.data.backends.hub_layout import NoSuchPart, card_configs, choose_files
from simpletuner.errors import ConfigError, DataError
from tests.hub import FakeHub, fake_hub

SHARDS = ["data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
CONVERTED = ["default/train/0000.parquet", "default/test/0000.parquet", "small/train/0000.parquet"]
CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/a-*
  - split: held
    path: [data/b.parquet, data/c.parquet]
- config_name: other
  data_files: "other/*.parquet"
---
# A dataset
"""


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "expected"),
    [
        (SHARDS, None, None, "train", SHARDS[1:]),
        (SHARDS, "---\nlicense: mit\n---\n", None, "test", SHARDS[:1]),
        (["x.parquet", "y.parquet", "README.md", "z.json"], None, None, "train", ["x.parquet", "y.parquet"]),
        (["images/dev/0.parquet", "images/0.parquet"], None, None, "validation", ["images/dev/0.parquet"]),
        (["data/night-00000-of-00001.parquet"], None, None, "night", ["data/night-00000-of-00001.parquet"]),
        (CONVERTED, None, None, "train", CONVERTED[:1]),
        (CONVERTED, None, "small", "train", CONVERTED[2:]),
        (["data/a-0.parquet", "data/b.parquet", "data/c.parquet"], CARD, None, "train", ["data/a-0.parquet"]),
        (["data/c.parquet", "data/b.parquet"], CARD, None, "held", ["data/b.parquet", "data/c.parquet"]),
        (["data/a-0.parquet", "other/x.parquet"], CARD, "other", "train", ["other/x.parquet"]),
    ],
)
def test_the_files_of_a_split(names: list[str], card: str | None, config: str | None, split: str, expected: list[str]):
    assert choose_files(names, card, config, split) == expected


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "key", "known"),
    [
        (SHARDS, None, None, "validation", "split", ["test", "train"]),
        (CONVERTED, None, "big", "train", "dataset_config", ["default", "small"]),
        (["a/train/0.parquet", "b/train/0.parquet"], None, None, "train", "dataset_config", ["a", "b"]),
        (SHARDS, CARD, "none", "train", "dataset_config", ["default", "other"]),
        (["a.csv"], None, None, "train", "split", []),
    ],
)
def test_a_part_that_is_not_there_is_named_with_what_is(
    names: list[str], card: str | None, config: str | None, split: str, key: str, known: list[str]
) -> None:
    with pytest.raises(NoSuchPart) as caught:
        choose_files(names, card, config, split)
    assert (caught.value.key, caught.value.known) == (key, known)


def wanted(name: Path | str, **changes) -> HubDataset:
    return HubDataset(
        **{"name": str(name), "config": None, "split": "train", "revision": None} | changes, dataset_id="a"
    )


def write(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"table " + name.encode())
    return folder


def test_tables_in_a_folder_are_named_by_their_relative_path(tmp_path: Path) -> None:
    folder = write(tmp_path, SHARDS)
    assert find_tables(wanted(folder)) == {name: folder / name for name in SHARDS[1:]}
    assert find_tables(wanted(folder / SHARDS[0])) == {"test-00000-of-00001.parquet": folder / SHARDS[0]}


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (SHARDS, {"split": "dev"}, ["a.split", "allowed: test, train"]),
        (["data-00000-of-00001.arrow"], {}, ["a.dataset_name", "to_parquet"]),
        (CONVERTED, {"config": "x"}, ["a.dataset_config", "default, small"]),
    ],
)
def test_a_folder_that_lacks_what_is_wanted_is_an_error(
    tmp_path: Path, names: list[str], changes: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        find_tables(wanted(write(tmp_path, names), **changes))
    assert all(word in str(caught.value) for word in words)


def test_a_card_that_is_not_yaml_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, SHARDS)
    (tmp_path / "README.md").write_text("---\nconfigs: [}\n---\n")
    with pytest.raises(DataError, match=r"README\.md"):
        find_tables(wanted(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing", "a//b", "a/b/c"])
def test_without_the_network_a_dataset_that_was_never_fetched_is_an_error(name: str) -> None:
    with pytest.raises((ConfigError, DataError), match=r"a\.dataset_name"):
        find_tables(wanted(name))


# ---- a hub on loopback ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


def ask(hub: FakeHub, home: Path, offline: bool = False, **changes: str) -> tuple[dict[str, bytes], str]:
    """What `find_tables` gives in a process of its own, since huggingface_hub reads its environment once."""
    program = (
        "import json, sys\n"
        "from simpletuner.data.backends.hub import HubDataset, find_tables\n"
        "from simpletuner.errors import SimpleTunerError\n"
        "keys = {'name': 'me/set', 'config': None, 'split': 'train', 'revision': None} | json.loads(sys.argv[1])\n"
        "try:\n"
        "    tables = find_tables(HubDataset(**keys, dataset_id='a'))\n"
        "    print(json.dumps({name: path.read_bytes().decode() for name, path in tables.items()}))\n"
        "except SimpleTunerError as error:\n"
        "    sys.exit(f'REFUSED {type(error).__name__} {error}')\n"
    )
    environment = hub.environment(home) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    arguments = [sys.executable, "-c", program, json.dumps(changes)]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    tables = {name: text.encode() for name, text in json.loads(result.stdout or "{}").items()}
    return tables, result.stderr


@pytest.mark.slow
def test_only_the_split_is_fetched_and_only_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["me/set", "main"] = {name: b"content of " + name.encode() for name in [*SHARDS, "README.md", "code.py"]}
    tables, errors = ask(hub, tmp_path)
    assert tables == {name: b"content of " + name.encode() for name in SHARDS[1:]}, errors
    assert sorted(hub.fetched) == ["README.md", *SHARDS[1:]]
    hub.fetched.clear()
    assert ask(hub, tmp_path)[0] == tables
    assert hub.fetched == []
    hub.repos.clear()
    offline, errors = ask(hub, tmp_path, offline=True)
    assert offline == tables, errors


@pytest.mark.slow
def test_without_a_network_what_was_fetched_is_read_and_the_rest_refused_within_seconds(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.repos["me/set", "main"] = {name: b"content of " + name.encode() for name in [*SHARDS, "README.md"]}
    tables, _ = ask(hub, tmp_path)
    hub.shutdown()
    hub.server_close()
    started = time.monotonic()
    assert ask(hub, tmp_path)[0] == tables
    _, errors = ask(hub, tmp_path, name="me/other")
    assert "127.0.0.1 cannot be reached (Connection refused)" in errors
    assert time.monotonic() - started < 15  # the hub's library alone would try for 24 s each time


@pytest.mark.slow
def test_a_dataset_without_tables_is_read_from_the_converted_branch(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["me/set", "main"] = {"images.tar": b"x"}
    hub.repos["me/set", "refs/convert/parquet"] = {name: b"x" for name in CONVERTED}
    assert list(ask(hub, tmp_path)[0]) == CONVERTED[:1]
    assert hub.fetched == CONVERTED[:1]
    hub.repos.clear()
    offline, errors = ask(hub, tmp_path, offline=True)
    assert list(offline) == CONVERTED[:1], errors


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["me/set", "main"] = {name: b"x" for name in SHARDS}
    assert "a.dataset_name" in ask(hub, tmp_path, name="me/other")[1]
    assert "a.revision" in ask(hub, tmp_path, revision="v2")[1]
    assert "a.split" in ask(hub, tmp_path, split="night")[1]


@pytest.mark.slow
def test_a_card_that_blows_up_is_refused() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    with pytest.raises(ValueError, match="refers back to itself"):
        card_configs("---\n" + "\n".join(lines) + "\n---\n")
    with pytest.raises(ValueError, match="nested too deeply"):
        card_configs("---\na: " + "[" * 20_000 + "]" * 20_000 + "\n---\n")
