"""JSON that is nested too deeply, or has numbers that are none, wherever a file brings it: a message, no crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner import storage
from simpletuner.adapters.peft_settings import config_beside, settings_in
from simpletuner.adapters.reading import lycoris_config_in
from simpletuner.cache.shards import DamagedShard, read_entries
from simpletuner.config.values import read_arguments
from simpletuner.data.tables import TableFault, read_rows
from simpletuner.errors import DataError, SimpleTunerError
from simpletuner.launch import family_of_export
from simpletuner.models.safe_loading import read_object
from simpletuner.reporting.monitor.reading import BadEvent, read_event
from simpletuner.text import read_json_text
from simpletuner.training.checkpoint import read_state
from simpletuner.training.damage import why_unreadable
from simpletuner.training.earlier_runs import finish_move
from simpletuner.training.lock import LOCK_FILE, changes_since
from simpletuner.training.run_history import HISTORY_FILE

TEXTS = {
    "nested": "[" * 100_000,
    "nested and whole": '{"state": ' * 500 + "1" + "}" * 500,  # what walks through the value later would fail on it
    "long number": "1" * 5_000,
    "null": "null",
}
# As what `int` fails on where a whole number belongs.
INFINITE = '{"state": 1, "version": 1e999, "files": {"a": {"size": Infinity}}, "format_version": 1, "metadata": {}}'


def safetensors_file(path: Path, header: str) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b" ")
    return path


def state_of(folder: Path, text: str) -> object:
    (folder / "training_state.json").write_text(text)
    return read_state(folder)


def manifest_file(folder: Path, text: str) -> Path:
    (folder / storage.MANIFEST).write_text(text)
    return folder


def peft_config_of(folder: Path, text: str) -> object:
    (folder / "adapter_config.json").write_text(text)
    return config_beside(folder / "adapter_model.safetensors")


def json_file(folder: Path, text: str) -> object:
    (folder / "some.json").write_text(text)
    return storage.read_json(folder / "some.json")


def header_of(folder: Path, text: str) -> object:
    return storage.read_tensor_metadata(safetensors_file(folder / "w", text))


def row_of(folder: Path, text: str) -> object:
    (folder / "t.jsonl").write_text(text)
    return list(read_rows(folder / "t.jsonl", ()))


def model_file(folder: Path, text: str) -> object:
    (folder / "config.json").write_text(text)
    return read_object(folder / "config.json")


READERS: dict[str, Callable[[Path, str], object]] = {
    "a JSON file": json_file,
    "a manifest": lambda folder, text: storage.read_manifest(manifest_file(folder, text)),
    "the state of a checkpoint": state_of,
    "the header of weights": header_of,
    "a table": row_of,
    "a model's file": model_file,
    "LyCORIS metadata": lambda _, text: lycoris_config_in({"lycoris_config": text}, "a.safetensors"),
    "PEFT metadata": lambda _, text: settings_in({"adapter_config": text}, "transformer", "a.safetensors"),
    "PEFT's file": peft_config_of,
    "an event": lambda _, text: read_event(text.encode()),
    "arguments": lambda _, text: read_arguments(text if text.startswith("{") else f'{{"a": {text}'),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_reports_it(tmp_path: Path, reader: str, text: str):
    if (reader, text) == ("a JSON file", "null"):
        assert json_file(tmp_path, "null") is None
        return
    with pytest.raises(ValueError if reader == "arguments" else (DataError, TableFault, BadEvent)):
        READERS[reader](tmp_path, TEXTS[text])


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", INFINITE], ids=["NaN", "infinity", "1e999", "members"])
@pytest.mark.parametrize("reader", sorted({*READERS} - {"a table", "a model's file"}))
def test_what_is_no_number_is_reported(tmp_path: Path, reader: str, text: str):
    with pytest.raises(ValueError if reader == "arguments" else (DataError, BadEvent)):
        READERS[reader](tmp_path, text)


def test_a_table_may_have_nan_in_a_column_that_nobody_reads(tmp_path: Path):
    (row,) = row_of(tmp_path, '{"file_name": "a.png", "text": "a cat", "score": NaN}')
    assert row.cells["text"] == "a cat"


def test_json_of_a_hundred_levels_is_read_and_of_one_more_is_not():
    assert read_json_text("[" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="100 levels of nesting"):
        read_json_text('{"a": ' + "[" * 100 + "]" * 100 + "}")


def test_nothing_else_reads_json_that_somebody_else_wrote():
    """Elsewhere a value of this process's own, or of a child that it started, is read."""
    root = Path(storage.__file__).parent
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "json.load" in line or "RecursionError" in line
    }
    own = ("distributed/", "examples/", "families/", "wizard/estimate.py", "text.py")
    made_here = ("json.loads(json.dumps(", "json.loads(_json_bytes(")
    rest = {each for each in found if not each.startswith(own) and not any(words in each for words in made_here)}
    assert not rest


@pytest.mark.parametrize("text", [*TEXTS.values(), '{"a": 1e999}'], ids=[*TEXTS, "infinite"])
def test_a_shard_with_it_is_damaged(tmp_path: Path, text: str):
    with pytest.raises(DamagedShard):
        read_entries(safetensors_file(tmp_path / "shard", text))
    metadata = {"format": "simpletuner-cache", "version": "1", "digests": text}
    save_file({"a/b": torch.zeros(1)}, tmp_path / "other", metadata)
    with pytest.raises(DamagedShard):
        read_entries(tmp_path / "other")


def test_a_header_of_a_hundred_gigabytes_is_refused_before_it_is_read(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        file.write((100 << 30).to_bytes(8, "little"))
        file.truncate(8 + (101 << 30))  # sparse: it takes no room
    with pytest.raises(DataError, match="does not hold the header"):
        storage.read_tensor_metadata(path)
    with pytest.raises(DamagedShard):
        read_entries(path)


@pytest.mark.parametrize("content", ["[1]", "null", '{"base": 1, "config": []}', '{"packages": 3}', "{"])
def test_a_lock_of_another_form_is_reported(tmp_path: Path, content: str):
    (tmp_path / LOCK_FILE).write_text(content)
    (line,) = changes_since(tmp_path / LOCK_FILE, {"packages": {}, "base": {"files": {}}})
    assert "what changed since the last start is not known" in line
    with pytest.raises(SimpleTunerError):
        family_of_export(tmp_path / "a.safetensors", None, None)


@pytest.mark.parametrize("move", ['{"folder": "..", "after_step": null, "history": null}', '{"folder": 1}', "3"])
def test_a_move_that_leads_out_or_is_none_is_not_finished(tmp_path: Path, move: str):
    history = '{"run": "a", "branches": [{"id": "b", "after_step": 0}], "adopts_unmarked": false'
    (tmp_path / HISTORY_FILE).write_text(f'{history}, "moving": {move}}}')
    (tmp_path / "loss.png").touch()
    assert finish_move(tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {HISTORY_FILE, "loss.png"}


def test_a_pipe_in_a_damaged_checkpoint_is_not_waited_for(tmp_path: Path):
    manifest_file(tmp_path, '{"format_version": 1, "files": {"weights": {}}}')
    os.mkfifo(tmp_path / "weights")
    assert why_unreadable(tmp_path) is None
