"""The lock, fact by fact: what of a run it names, what it calls changed, and the command that starts the run again."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import simpletuner
from simpletuner.models.build import build_family
from simpletuner.reporting.bus import EventBus
from simpletuner.training.lock import (
    LOCK_FILE,
    changes_since,
    component_files,
    config_files,
    installed_versions,
    lock_changes,
    make_lock,
    train_command,
    write_lock,
)
from tests.runs import load_here, write_run

WEBHOOK = '{"webhook_type": "raw", "callback_url": "https://example.com/secret"}'
DATA: Any = [SimpleNamespace(id="images", num_images=7, fingerprint="f" * 8)]


class Notices:
    name = "notices"
    failures: tuple[type[Exception], ...] = ()

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def handle(self, event: Any) -> None:
        if hasattr(event, "severity"):
            self.texts.append((event.severity, event.text))

    def close(self) -> None: ...


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_lock_holds_all_that_a_run_was_made_of(tmp_path: Path, omnigen_folder: Path) -> None:
    (tmp_path / "prompts.json").write_text('{"cat": "a cat"}')
    run = write_run(tmp_path, omnigen_folder, user_prompt_library="prompts.json", revision="v2")
    loaded = load_here(run, "--seed=5")
    lock = make_lock(loaded, build_family(loaded.config), DATA)
    assert lock.keys() == {
        *("simpletuner", "python", "packages", "config", "origins", "command", "config_files", "data", "base"),
    }
    assert (lock["simpletuner"], lock["python"]) == (simpletuner.__version__, platform.python_version())
    assert lock["config"]["seed"] == 5
    assert "command line" in lock["origins"]["seed"]
    assert lock["command"] == f"CONFIG_PATH={tmp_path / 'config.json'} simpletuner train --seed=5"
    names = ("config.json", "multidatabackend.json", "lycoris_config.json", "prompts.json")
    assert lock["config_files"] == {name: sha256(tmp_path / name) for name in names}
    assert lock["data"] == {"images": {"pictures": 7, "fingerprint": "f" * 8}}
    files = {
        path.relative_to(omnigen_folder).as_posix(): sha256(path)
        for path in omnigen_folder.glob("*/*")
        if path.suffix in (".json", ".safetensors")
    }
    assert lock["base"] == {"model": str(omnigen_folder), "revision": "v2", "files": files}
    assert (tmp_path / "cache" / "digests.sqlite").is_file()


def test_packages_are_those_that_decide_results() -> None:
    versions = dict(installed_versions())
    for name in ("torch", "diffusers", "transformers", "tokenizers", "lycoris-lora", "safetensors", "numpy", "pillow"):
        assert versions[name] == metadata.version(name)
    assert {"accelerate", "peft", "optimum-quanto", "torchao"} <= set(versions)


def test_each_package_and_base_file_that_is_not_what_it_was_has_its_line() -> None:
    old = {
        "packages": {"torch": "1", "numpy": "1", "peft": "2", "pillow": "3"},
        "base": {"files": {"vae/a": "0", "vae/b": "1", "vae/c": "2"}},
    }
    new = {
        "packages": {"torch": "2", "numpy": "1", "pillow": "4", "diffusers": "5"},
        "base": {"files": {"vae/a": "0", "vae/b": "2", "vae/d": "3"}},
    }
    assert lock_changes(old, new) == [
        "package diffusers changed since the last start: not there → 5",
        "package peft changed since the last start: 2 → not there",
        "package pillow changed since the last start: 3 → 4",
        "base model file vae/b changed since the last start: it has other content",
        "base model file vae/c changed since the last start: there → not there",
        "base model file vae/d changed since the last start: not there → there",
    ]
    assert lock_changes({}, {"packages": {}, "base": {"files": {}}}) == []


def test_a_resumed_run_warns_of_what_has_changed_and_a_fresh_one_does_not(tmp_path: Path, omnigen_folder: Path) -> None:
    loaded = load_here(write_run(tmp_path, omnigen_folder))
    family, seen = build_family(loaded.config), Notices()
    path = tmp_path / LOCK_FILE
    for resumes, before, expected in (
        (True, None, []),
        (False, {"peft": "0.1"}, []),
        (True, {"peft": "0.1"}, ["package peft changed since the last start: 0.1 → " + metadata.version("peft")]),
    ):
        if before:
            lock = json.loads(path.read_text())
            path.write_text(json.dumps(lock | {"packages": lock["packages"] | before}))
        write_lock(loaded, family, DATA, tmp_path, EventBus([seen]), resumes)
        assert seen.texts == [("warning", text) for text in expected]
        assert json.loads(path.read_text())["packages"]["peft"] == metadata.version("peft")
    path.write_text("{")
    [line] = changes_since(path, {"packages": {}, "base": {"files": {}}})
    assert str(path) in line
    assert line.endswith("; what changed since the last start is not known")


def test_the_command_repeats_what_the_command_line_set_and_no_secret(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "a run", omnigen_folder)
    words = ("--validation_prompt=a red cat", "--gradient_checkpointing=true", "--learning_rate=0.5")
    loaded = load_here(folder, *words, f"--webhook_config={WEBHOOK}", "--eval_dataset_pooling=true")
    command = train_command(loaded, "python -m simpletuner")
    start = f"CONFIG_PATH='{folder / 'config.json'}' 'python -m simpletuner' train "
    assert command.startswith(start)
    assert " --gradient_checkpointing=true" in command[len(start) - 1 :]
    assert " --learning_rate=0.5" in command
    assert "'--validation_prompt=a red cat'" in command
    assert "--eval_dataset_pooling=true" in command
    assert "webhook_config" not in command
    # A configuration without a file, and values that are lists.
    origins = {key: SimpleNamespace(kind="command line") for key in ("a", "b", "c", "d", "e")}
    values = {"a": [1, 2], "b": "****", "c": {"x": 1}, "d": None, "e": False, "f": 3}
    bare: Any = SimpleNamespace(origins=origins, resolved=lambda: values, config_file=None)
    assert train_command(bare) == "simpletuner train --a=1,2 --e=false"


def test_the_files_of_a_configuration_are_all_that_it_was_read_from() -> None:
    validation = SimpleNamespace(user_prompt_library="d")
    loaded: Any = SimpleNamespace(
        config_file="a", data_file="b", lycoris_file="c", config=SimpleNamespace(validation=validation)
    )
    assert config_files(loaded) == [Path(name) for name in "abcd"]
    loaded.data_file = loaded.lycoris_file = None
    assert config_files(loaded) == [Path("a"), Path("d")]


def test_a_part_of_one_file_has_its_settings_and_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "vae"
    (folder / "more.json").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "model.bin", "a.json"):
        (folder / name).write_text("")
    component: Any = SimpleNamespace(name="vae", config_file="config.json")
    monkeypatch.setattr("simpletuner.training.lock.component_file", lambda source, part, name: folder / name)
    places = {"of a folder": None, "of one file": "/models/own.safetensors"}
    found = {}
    for title, place in places.items():
        family: Any = SimpleNamespace(source=SimpleNamespace(own_place=lambda part, place=place: place))
        found[title] = [path.name for path in component_files(family, component)]
    assert found["of a folder"] == ["a.json", "config.json", "model.safetensors"]
    assert [name for name in found["of one file"] if name != "more.json"] == [
        "a.json",
        "config.json",
        "own.safetensors",
    ]
