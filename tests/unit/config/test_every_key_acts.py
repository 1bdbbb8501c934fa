"""No key is accepted and then forgotten: each built one is read outside of `config/`, or says here where it acts."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import simpletuner
from simpletuner.config.datasets import FROM_CONFIG, dataset_options, dataset_types
from simpletuner.config.options import OptionInfo, all_options, group_of_options

from .conftest import Workspace

PACKAGE = Path(simpletuner.__file__).parent

# Keys that act without being read as `<group>.<key>` or `entry.<key>`: where they do, and words that must stand there.
ELSEWHERE = {
    "caption_shuffle": ("config/datasets.py", "config.data.caption_shuffle and not says"),
    "eval_loss_disable": ("training/build.py", "config.evaluation.has_interval"),
    # A loss is built from the options that its fields are named after.
    "huber_c": ("training/losses/huber.py", "self.huber_c"),
    "huber_schedule": ("training/losses/huber.py", "self.huber_schedule"),
    "data_backend_config": ("training/prepare.py", "loaded.datasets"),
    "lycoris_config": ("adapters/build.py", "loaded.config, loaded.lycoris)"),
    "user_prompt_library": ("training/build.py", "loaded.prompt_library"),
    "webhook_config": ("training/trainer.py", "webhooks=loaded.webhooks"),
    "webhook_reporting_interval": ("reporting/webhooks/sink.py", "webhooks.reporting_interval"),
}
# Keys of dataset entries that act while the file is read.
WHILE_READING = {
    "disabled": ("config/dataset_loading.py", "_is_disabled(written)"),
    "dataset_type": ("config/dataset_loading.py", "_dataset_type(written"),
    "conditioning_data": ("config/datasets.py", "entry.conditioning_data or ()"),
    "source_dataset_id": ("config/datasets.py", "each.source_dataset_id == entry.id"),
    "text_embeds": ("config/rules/data.py", "entry.text_embeds != cache.id"),
    "metadata_file": ("config/datasets.py", "return entry.metadata_file"),
    "metadata_backend": ("config/datasets.py", '("metadata_backend", "json"): "discovery"'),
}


@functools.cache
def keys_read(package: Path = PACKAGE) -> set[tuple[str, str]]:
    """Name of a holder, and the attribute that any module outside of `config/` reads of it."""
    return {
        (name, node.attr)
        for path in package.rglob("*.py")
        if "config" not in path.relative_to(package).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and (name := _last_name(node.value))
    }


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def built(infos: Iterator[OptionInfo]) -> list[OptionInfo]:
    """Options that can be set to something: a choice with one built value is decided already."""
    return [info for info in infos if not info.planned and len(info.choices) != 1]


def stands_in(place: tuple[str, str]) -> bool:
    file, words = place
    return words in (PACKAGE / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_built_option_acts() -> None:
    # A function is given the whole configuration, or the group of options that it needs.
    read, group = keys_read(), group_of_options()
    forgotten = [
        info.name
        for info in built(iter(all_options().values()))
        if not {(group[info.name], info.name), ("options", info.name)} & read
        and not (info.name in FROM_CONFIG and ("entry", info.name) in read)
        and info.name not in ELSEWHERE
    ]
    assert forgotten == []


@pytest.mark.parametrize("kind", sorted(set(dataset_types()) - {"text_embeds"}))
def test_every_built_dataset_key_acts(kind: str) -> None:
    read = {key for holder, key in keys_read() if holder == "entry"}
    infos = dataset_options(kind)
    forgotten = [i.name for i in built(iter(infos.values())) if i.name not in read and i.name not in WHILE_READING]
    assert forgotten == []


@pytest.mark.parametrize("key", sorted(ELSEWHERE))
def test_an_option_that_acts_elsewhere_does(key: str) -> None:
    assert key in all_options()
    assert stands_in(ELSEWHERE[key])


@pytest.mark.parametrize("key", sorted(WHILE_READING))
def test_a_dataset_key_that_acts_while_reading_does(key: str) -> None:
    assert any(key in dataset_options(kind) for kind in dataset_types())
    assert stands_in(WHILE_READING[key])


def test_the_walk_finds_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def f(run):\n    return run.config.training.seed\n")
    assert keys_read(tmp_path) == {("run", "config"), ("config", "training"), ("training", "seed")}


def test_a_text_cache_that_nothing_is_kept_in_is_reported(workspace: Workspace) -> None:
    workspace.config["model_family"] = "omnigen"
    workspace.datasets.append({"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"})
    warnings = workspace.load_written().warnings
    assert [line for line in warnings if "text: a text_embeds entry has no use: OmniGen" in line]
