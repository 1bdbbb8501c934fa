"""JSON that is nested too deeply or has a number of too many digits, wherever a file brings it: a message, no crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner import storage
from simpletuner.adapters.peft_settings import config_beside, settings_in
from simpletuner.adapters.reading import lycoris_config_in
from simpletuner.cache.shards import DamagedShard, read_entries
from simpletuner.errors import DataError
from simpletuner.training.checkpoint import read_state

NESTED = "[" * 100_000
LONG_NUMBER = "1" * 5_000


def safetensors_file(path: Path, header: str) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b" ")
    return path


def state_of(folder: Path, text: str) -> object:
    (folder / "training_state.json").write_text(text)
    return read_state(folder)


def peft_config_of(folder: Path, text: str) -> object:
    (folder / "adapter_config.json").write_text(text)
    return config_beside(folder / "adapter_model.safetensors")


def json_file(folder: Path, text: str) -> object:
    (folder / "some.json").write_text(text)
    return storage.read_json(folder / "some.json")


READERS: dict[str, Callable[[Path, str], object]] = {
    "a JSON file": json_file,
    "the state of a checkpoint": state_of,
    "the header of weights": lambda folder, text: storage.read_tensor_metadata(safetensors_file(folder / "w", text)),
    "LyCORIS metadata": lambda _, text: lycoris_config_in({"lycoris_config": text}, "a.safetensors"),
    "PEFT metadata": lambda _, text: settings_in({"adapter_config": text}, "transformer", "a.safetensors"),
    "PEFT's file": peft_config_of,
}


@pytest.mark.parametrize("text", [NESTED, LONG_NUMBER, "null"], ids=["nested", "long number", "null"])
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_reports_it(tmp_path: Path, reader: str, text: str):
    if reader == "a JSON file" and text == "null":
        assert json_file(tmp_path, text) is None
        return
    with pytest.raises(DataError):
        READERS[reader](tmp_path, text)


@pytest.mark.parametrize("text", [NESTED, LONG_NUMBER, "null"], ids=["nested", "long number", "null"])
def test_a_shard_with_it_is_damaged(tmp_path: Path, text: str):
    with pytest.raises(DamagedShard):
        read_entries(safetensors_file(tmp_path / "shard", text))
    metadata = {"format": "simpletuner-cache", "version": "1", "digests": text}
    save_file({"a/b": torch.zeros(1)}, tmp_path / "other", metadata)
    with pytest.raises(DamagedShard):
        read_entries(tmp_path / "other")
