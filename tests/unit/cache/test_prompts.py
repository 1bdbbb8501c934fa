"""What is encoded of prompts, how often, under which key, and what stays in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner.batch import PromptEmbeds, PromptImage, PromptRequest
from simpletuner.cache import prompts as prompts_module
from simpletuner.cache.prompts import CachedPrompts, PromptCache, PromptsAhead, encode, requests_of
from simpletuner.cache.store import TensorStore

# Embeddings of one prompt here: two float32.
NUM_BYTES = 8


class Encoders:
    """A family whose embedding of a prompt is its length, and its place in the batch."""

    def __init__(self, sees_references: bool = True, singly: bool = False):
        self.device = torch.device("cpu")
        self.reads_prompts_singly = singly
        self.spec = SimpleNamespace(prompts_see_references=sees_references)
        self.calls: list[tuple[list[str], Any]] = []
        self.num_freed = 0

    def encode_prompts(self, prompts: Sequence[str], images: Any = None) -> list[PromptEmbeds]:
        self.calls.append((list(prompts), images))
        whole = torch.tensor([[float(len(prompt)), place] for place, prompt in enumerate(prompts)])
        return [PromptEmbeds({"embeds": row}) for row in whole]

    def free_prompt_encoders(self) -> None:
        self.num_freed += 1


def lengths(found: Sequence[PromptEmbeds]) -> list[float]:
    return [float(each.tensors["embeds"][0]) for each in found]


def requests(*texts: str) -> list[PromptRequest]:
    return [PromptRequest(text) for text in texts]


@pytest.fixture
def family() -> Any:
    return Encoders()


@pytest.fixture
def cache(tmp_path: Path, family: Any) -> Iterator[PromptCache]:
    with TensorStore(tmp_path / "prompts") as store:
        yield PromptCache(store, family, "encoders of today")


def test_a_key_knows_text_images_encoders_and_how_entries_are_kept(cache: PromptCache, monkeypatch) -> None:
    request = PromptRequest("a dog")
    keys = {cache.key(request), cache.key(PromptRequest("a cat"))}
    keys |= {
        cache.key(replace(request, images=images)) for images in ((PromptImage(8, 8, "x"),), (PromptImage(8, 8, "y"),))
    }
    keys.add(PromptCache(cache.store, cache.family, "others").key(request))
    monkeypatch.setattr(prompts_module, "SCHEMA_VERSION", 999)
    keys.add(cache.key(request))
    assert len(keys) == 6


def test_each_text_is_encoded_once_in_batches_of_eight_and_progress_counts_what_was_there(
    cache: PromptCache, family: Any
) -> None:
    first = cache.fill(requests("a", "bb", "a"))
    assert (first.num_encoded, first.num_cached) == (2, 0)
    assert family.calls == [(["a", "bb", "", "", "", "", "", ""], None)]
    family.calls.clear()
    seen: list[tuple[int, int]] = []
    texts = [f"{'c' * number}" for number in range(3, 13)]
    report = cache.fill(requests("bb", *texts), lambda done, total: seen.append((done, total)))
    assert (report.num_encoded, report.num_cached) == (10, 1)
    assert [len(texts) for texts, _ in family.calls] == [8, 8]
    assert seen == [(9, 11), (11, 11)]
    found = [cache.find(request) for request in requests("a", "bb", *texts)]
    assert lengths([each for each in found if each is not None]) == list(range(1, 13))
    assert cache.find(PromptRequest("zzz")) is None


def test_prompts_are_read_singly_where_the_family_asks_for_it() -> None:
    family: Any = Encoders(singly=True)
    assert [request.text for request, _ in encode(family, requests("a", "bb"))] == ["a", "bb"]
    assert family.calls == [(["a"], None), (["bb"], None)]


def test_an_entry_keeps_no_batch_in_memory(family: Any) -> None:
    for _, embeds in encode(family, requests("a", "bb")):
        assert embeds.tensors["embeds"].untyped_storage().nbytes() == NUM_BYTES


def test_images_are_given_to_encoders_that_look_at_them_alone(family: Any) -> None:
    image = PromptImage(8, 8, "x")
    assert requests_of(family, ["a"], [[image]]) == [PromptRequest("a", (image,))]
    blind: Any = Encoders(sees_references=False)
    assert requests_of(blind, ["a"], [[image]]) == [PromptRequest("a")]
    list(encode(family, [PromptRequest("a", (image,)), PromptRequest("b")]))
    assert family.calls[0][1][:2] == [(image,), ()]


def test_a_missing_prompt_is_encoded_once_kept_and_the_encoders_are_freed(cache: PromptCache, family: Any) -> None:
    said: list[str] = []
    prompts = CachedPrompts(cache, warn=said.append)
    assert lengths(prompts.embeds(["bb", "a", "bb"])) == [2, 1, 2]
    assert family.calls == [(["bb", "a", "", "", "", "", "", ""], None)]
    assert family.num_freed == 1
    assert ['"bb" is not in the cache' in line for line in said] == [True]
    assert cache.find(PromptRequest("a")) is None  # waits to be written
    prompts.close()
    assert cache.find(PromptRequest("a")) is not None
    assert lengths(CachedPrompts(cache).embeds(["a", "bb"])) == [1, 2]
    assert len(family.calls) == 1


def test_encoders_that_stay_are_not_freed_and_nobody_is_warned(cache: PromptCache, family: Any) -> None:
    said: list[str] = []
    CachedPrompts(cache, keeps_encoders=True, warn=said.append).embeds(["a"])
    assert (family.num_freed, said) == (0, [])


def test_a_cache_that_is_off_is_not_read_and_not_written(cache: PromptCache, family: Any) -> None:
    cache.fill(requests("a"))
    off = CachedPrompts(cache, keeps_encoders=True, keeps_entries=False)
    off.embeds(["a", "bb"])
    off.close()
    assert family.calls[1][0][:2] == ["a", "bb"]
    assert cache.find(PromptRequest("bb")) is None


def test_memory_holds_the_prompts_that_were_used_last(cache: PromptCache, family: Any, monkeypatch) -> None:
    monkeypatch.setattr(prompts_module, "MEMO_BYTES", 2 * NUM_BYTES)
    cache.fill(requests("a", "bb", "ccc"))
    prompts, read = CachedPrompts(cache), []
    find = cache.find
    monkeypatch.setattr(cache, "find", lambda request: (read.append(request.text), find(request))[1])
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        prompts.embeds([text])
    assert read == ["a", "bb", "ccc", "bb"]  # the second "a" and the third came from memory, "bb" had to go
    assert len(family.calls) == 1


def test_prompts_that_are_encoded_ahead_leave_the_memory_to_the_denoiser(family: Any) -> None:
    ahead = PromptsAhead(family, ["a", "bb"])
    assert family.num_freed == 1
    assert lengths(ahead.embeds(["bb", "a"])) == [2, 1]
    assert len(family.calls) == 1
    assert lengths(ahead.embeds(["ccc", "ccc"])) == [3, 3]
    assert (len(family.calls), family.num_freed) == (2, 2)


def test_what_is_encoded_amid_training_is_computed_as_before_it(family: Any) -> None:
    """Encoders have a number format of their own: the autocast of a training step is none of theirs."""
    seen: list[bool] = []
    family.encode_prompts = lambda prompts, images: (
        seen.append(torch.is_autocast_enabled("cpu")),
        [PromptEmbeds({"embeds": torch.zeros(2)}) for _ in prompts],
    )[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(list(encode(family, requests("a dog")))) == 1
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_one_thread_at_a_time_looks_prompts_up_and_encodes_them(cache: PromptCache, family: Any, monkeypatch) -> None:
    prompts, encode_prompts, held = CachedPrompts(cache), family.encode_prompts, []
    monkeypatch.setattr(
        family, "encode_prompts", lambda *given: (held.append(prompts._lock.locked()), encode_prompts(*given))[1]
    )
    prompts.embeds(["a dog"])
    assert held == [True]
    assert not prompts._lock.locked()
