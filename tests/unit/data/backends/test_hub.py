"""Which files make up a split; datasets in folders, and on a hub that is served here."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import errors

from simpletuner.data.backends import hub as hub_module
from simpletuner.data.backends.hub import HubDataset, find_tables
from simpletuner.data.backends.hub_layout import NoSuchPart, card_configs, choose_files
from simpletuner.data.backends.records import RecordFiles
from simpletuner.data.records import Record
from simpletuner.errors import ConfigError, DataError, Problem
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
        "import json, sys, time\n"
        "from simpletuner.data.backends.hub import HubDataset, find_tables\n"
        "from simpletuner.errors import SimpleTunerError\n"
        "waited = []\n"
        "time.sleep = waited.append\n"
        "keys = {'name': 'me/set', 'config': None, 'split': 'train', 'revision': None} | json.loads(sys.argv[1])\n"
        "try:\n"
        "    tables = find_tables(HubDataset(**keys, dataset_id='a'))\n"
        "    print(json.dumps({name: path.read_bytes().decode() for name, path in tables.items()}))\n"
        "except SimpleTunerError as error:\n"
        "    print(f'REFUSED {type(error).__name__} {error}', file=sys.stderr)\n"
        "print(f'WAITED {sum(waited)}', file=sys.stderr)\n"
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
    again, messages = ask(hub, tmp_path)
    assert again == tables
    _, errors = ask(hub, tmp_path, name="me/other")
    assert "127.0.0.1 cannot be reached (Connection refused)" in errors
    waited = [float(seconds) for seconds in re.findall(r"WAITED (.*)", messages + errors)]
    assert len(waited) == 2
    assert sum(waited) < 5  # the hub's library alone would wait for 24 s each time


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


@pytest.fixture(params=[1000, 10_000])
def recursion_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """A compiler raises the limit of the process."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(request.param)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("recursion_limit")
def test_a_card_that_blows_up_is_refused() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    with pytest.raises(ValueError, match="refers back to itself"):
        card_configs("---\n" + "\n".join(lines) + "\n---\n")
    assert card_configs("---\na: " + "[" * 98 + "]" * 98 + "\n---\n") == {}
    for levels in (100, 5000):
        with pytest.raises(ValueError, match="100 levels of nesting"):
            card_configs("---\na: " + "[" * levels + "]" * levels + "\n---\n")


@pytest.mark.parametrize(
    ("error", "revision", "kind", "key", "reason", "fix"),
    [
        (
            "GatedRepoError",
            None,
            DataError,
            "dataset_name",
            "its owner must grant you access",
            "request access on its page, then log in: hf auth login",
        ),
        ("RevisionNotFoundError", "v2", ConfigError, "revision", "it has no revision v2", "correct the revision"),
        (
            "RevisionNotFoundError",
            None,
            ConfigError,
            "revision",
            "it has no revision refs/convert/parquet",
            "name a branch that holds Parquet files",
        ),
        (
            "RepositoryNotFoundError",
            None,
            ConfigError,
            "dataset_name",
            "there is no such dataset, or it is private",
            "correct the name, or log in: hf auth login",
        ),
        (
            "HFValidationError",
            None,
            ConfigError,
            "dataset_name",
            "it is neither a path that exists nor an id such as owner/name",
            "correct it",
        ),
        (
            "LocalEntryNotFoundError",
            None,
            DataError,
            "dataset_name",
            "no network",
            "fetch it once with the network (without HF_HUB_OFFLINE), or give a folder",
        ),
        (
            "HfHubHTTPError",
            None,
            DataError,
            "dataset_name",
            "no network",
            "check the network, then start again: what was fetched is kept",
        ),
    ],
)
def test_why_a_dataset_cannot_be_fetched_decides_what_to_do(error, revision, kind, key, reason, fix) -> None:
    made = getattr(errors, error)
    answer = httpx.Response(404, request=httpx.Request("GET", "http://x"))
    takes_answer = issubclass(made, errors.HfHubHTTPError) and made is not errors.LocalEntryNotFoundError
    raised = made("no\n  network", **({"response": answer} if takes_answer else {}))
    with pytest.raises(kind) as caught:
        hub_module._refuse(raised, wanted("me/set", revision=revision, file="data.json"))
    message = f"the dataset me/set cannot be fetched: {reason}"
    assert caught.value.problems == [Problem(message, f"a.{key}", "data.json", fix=fix)]
    assert type(caught.value) is kind


def test_a_dataset_on_the_hub_is_asked_for_its_files_its_card_and_those_of_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the calls of huggingface_hub in place of a network: a dataset without tables has them on another branch."""
    import huggingface_hub

    asked: list[tuple] = []
    branches = {None: ["images.tar"], "refs/convert/parquet": [*CONVERTED, "README.md", "d[1]/train/0.parquet"]}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")

    class Api:
        def list_repo_files(self, name: str, repo_type: str, revision: str | None) -> list[str]:
            asked.append(("list", name, repo_type, revision))
            return branches[revision]

    def fetch(name: str, file: str, repo_type: str, revision: str | None) -> str:
        asked.append(("card", name, file, repo_type, revision))
        return str(tmp_path / "README.md")

    def snapshot(name: str, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(("fetch", name, repo_type, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub_module, "why_unreachable", lambda: None)
    for name, instead in (("HfApi", Api), ("hf_hub_download", fetch), ("snapshot_download", snapshot)):
        monkeypatch.setattr(huggingface_hub, name, instead)
    branch = "refs/convert/parquet"
    assert find_tables(wanted("me/set", config="d[1]")) == {"d[1]/train/0.parquet": tmp_path / "d[1]/train/0.parquet"}
    assert asked == [
        ("list", "me/set", "dataset", None),
        ("list", "me/set", "dataset", branch),
        ("card", "me/set", "README.md", "dataset", branch),
        ("fetch", "me/set", "dataset", branch, ["d[[]1]/train/0.parquet"]),
    ]
    asked.clear()
    branches["v1"] = SHARDS
    assert list(find_tables(wanted("me/set", revision="v1"))) == SHARDS[1:]
    assert asked == [
        ("list", "me/set", "dataset", "v1"),
        ("fetch", "me/set", "dataset", "v1", SHARDS[1:]),
    ]


def test_every_word_for_a_split_is_known_and_the_last_of_a_path_counts() -> None:
    words = {
        **dict.fromkeys(("train", "training"), "train"),
        **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
        **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    }
    for word, split in words.items():
        assert choose_files([f"a/{word.upper()}.parquet"], None, None, split) == [f"a/{word.upper()}.parquet"]
    assert choose_files(["train/x-test-1.parquet"], None, None, "test") == ["train/x-test-1.parquet"]
    assert choose_files([".hidden/train.parquet", "trained.parquet"], None, None, "train") == ["trained.parquet"]
    assert choose_files(["data/big/a.parquet", "small/a.parquet"], None, "big", "train") == ["data/big/a.parquet"]
    one = ["only/train/0.parquet", "only/test/0.parquet"]
    assert choose_files(one, None, None, "train") == one[:1]


def test_a_card_names_files_of_several_forms() -> None:
    def card(text: str) -> str:
        return f"---\n{text}\n---\n"

    found = card_configs(card("configs:\n- data_files: [a/*, {split: held, path: b}]\n- config_name: none"))
    assert found == {"default": {"train": ["a/*"], "held": ["b"]}}
    assert card_configs(card("configs:\n- {config_name: 3, data_files: x}\n- text")) == {"3": {"train": ["x"]}}
    assert [card_configs(text) for text in (card("[a]"), "no matter", "---\nconfigs: 3", card("configs:"))] == [{}] * 4
    with pytest.raises(ValueError, match=r"^data_files of c are not split and path$"):
        card_configs(card("configs:\n- {config_name: c, data_files: [{split: train}]}"))
    with pytest.raises(ValueError, match="refers back to itself"):
        card_configs(card("a: &a [x]\nb: *a"))


def test_the_files_of_embeddings_that_rows_name_are_found_by_the_target(tmp_path: Path) -> None:
    def record(name: str, *files: str, dropped: str | None = None) -> Record:
        made = [Path(file) for file in files]
        target = tmp_path / f"{name}.png"
        return Record(name, target, (), ("a",), tmp_path / "sub/rows.jsonl", 1, tuple(made), dropped and Path(dropped))

    records = [record("1-a", "x", "y", dropped="d"), record("2-b", "z"), record("3-c")]
    for location, folder in ((tmp_path, "sub/rows.jsonl/"), (tmp_path / "sub/rows.jsonl", "")):
        (tmp_path / "sub").mkdir(exist_ok=True)
        named = RecordFiles(records, location, is_dropped=False)
        paths = [f"{folder}{name}.png" for name in ("2-b", "1-a", "3-c", "4-d")]
        assert named.take(paths) == ["z", "x\x1ey", None, None]
        assert RecordFiles(records, location, is_dropped=True).take(paths) == [None, "d", None, None]
        assert named.table == location
        digest = hashlib.sha256(repr([(f"{folder}1-a.png", "x\x1ey"), (f"{folder}2-b.png", "z")]).encode()).hexdigest()
        assert named.digest == digest
