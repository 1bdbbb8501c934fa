"""Where embeddings of captions come from: their folder, what is written, and which texts a process encodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner.batch import PromptRequest
from simpletuner.reporting.bus import EventBus
from simpletuner.training import prompts
from simpletuner.training.process import Process
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from tests.configs import config_of
from tests.toy import Recorder

SPEC: Any = SimpleNamespace(
    name="toy", caches_prompt_embeds=True, prompts_see_references=False, dropped_caption="nothing", size_multiple=8
)


def loaded_with(**options: Any) -> Any:
    return SimpleNamespace(config=config_of(**options), datasets=None, prompt_library=None)


@pytest.mark.parametrize("has_entry", [False, True])
def test_an_entry_for_captions_says_where_they_are_and_how_many_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_entry: bool
) -> None:
    entry = SimpleNamespace(cache_dir=str(tmp_path / "elsewhere"), write_batch_size=5) if has_entry else None
    monkeypatch.setattr(prompts, "text_cache_entry", lambda datasets: entry)
    monkeypatch.setattr(prompts, "prompt_fingerprint", lambda family, memo: "f")
    loaded = loaded_with(cache_dir=str(tmp_path), write_batch_size=7)
    cache = prompts.open_prompt_cache(loaded, SimpleNamespace(spec=SPEC))  # type: ignore[arg-type]
    folder = tmp_path / "elsewhere" if has_entry else tmp_path / "text" / "toy"
    assert (cache.store.folder, cache.write_batch_size) == (folder, 5 if has_entry else 7)
    assert prompts.prompts_folder(loaded, SPEC) == folder
    cache.store.close()


class Cache:
    """Notes what it is to encode."""

    write_batch_size = 1

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.store = SimpleNamespace(complete=lambda key: None)
        self.family = SimpleNamespace(spec=SPEC)

    def fill(self, requests: Any, report: Any) -> Any:
        self.asked += [request.text for request in requests]
        return SimpleNamespace(num_encoded=0, num_cached=0)


def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Cache, Any]:
    cache = Cache()
    family: Any = SimpleNamespace(spec=SPEC, device=torch.device("cpu"), free_prompt_encoders=lambda: None)
    second: Any = SimpleNamespace(
        is_main=False, from_main=lambda value: value, share=lambda items: items[1::2], barrier=lambda: None
    )
    for name, answer in {"open_prompt_cache": cache, "_set_fingerprint": "key"}.items():
        monkeypatch.setattr(prompts, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(prompts, "run_prompts", lambda *given: map(PromptRequest, ("a", "b", "b", "c", "d")))
    process = Process(guard=FolderGuard(tmp_path), bus=EventBus([Recorder()]), stop=StopRequest(), process_group=second)
    prompts.prepare_prompts(loaded_with(**options), family, [], process)
    return cache, family


def test_a_process_encodes_its_share_of_the_texts_each_once(tmp_path: Path, monkeypatch) -> None:
    cache, family = prepared(tmp_path, monkeypatch)
    assert cache.asked == ["b", "d"]
    assert (family.prompts.keeps_entries, family.prompts.keeps_encoders) == (True, False)


@pytest.mark.parametrize(
    ("option", "keeps"), [("text_cache_disable", (False, True)), ("text_cache_ondemand", (True, True))]
)
def test_on_demand_nothing_is_encoded_before_and_it_is_written_unless_that_is_off(
    tmp_path: Path, monkeypatch, option: str, keeps: tuple[bool, bool]
) -> None:
    cache, family = prepared(tmp_path, monkeypatch, **{option: True})
    assert cache.asked == []
    assert (family.prompts.keeps_entries, family.prompts.keeps_encoders) == keeps


def test_what_no_dataset_asks_for_is_encoded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dropped caption, none at all, and the probe of the file at the end."""
    monkeypatch.setattr(prompts, "has_all_embeddings", lambda *given: False)
    monkeypatch.setattr(prompts, "requests_from_config", lambda *given, **named: ([], None))
    family: Any = SimpleNamespace(spec=SPEC)
    texts = [request.text for request in prompts.fixed_prompts(loaded_with(), family, [])]
    assert texts == ["nothing", "", "a probe of the adapter"]
