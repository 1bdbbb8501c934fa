"""Prompt embeddings, encoded once: what the text encoders say of a prompt, under a key of everything that made it.

The key holds the text and the encoders' fingerprint (weights, tokenizers, limits, number format), so another caption or
encoder can never meet a stale entry, and a caption that many images share is encoded once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simpletuner.batch import PromptEmbeds
from simpletuner.cache.encoded import EncodedCache
from simpletuner.cache.store import DamagedEntry, StoreWriter
from simpletuner.models.family import ModelFamily, ReferenceSizes

# Raise it when the same inputs would be stored in another way.
SCHEMA_VERSION = 1
# Encoders' results differ in the last bits with the size of the batch. So every batch has this size, short ones are
# filled up, and a prompt encoded again, alone or in other company, gives the same bits.
BATCH_SIZE = 8
# Embeddings that stay in memory: reading those of a small set again takes longer than a tiny model's step.
MEMO_BYTES = 256 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PromptFillReport:
    """What filling the cache did; a text that several captions share counts once."""

    num_encoded: int
    num_cached: int


class PromptCache(EncodedCache):
    """The prompts of one set of encoders in a store."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"schema": SCHEMA_VERSION, "encoders": self.fingerprint}

    def key(self, prompt: str) -> str:
        """sha256 in hex over everything that decides the embeddings of `prompt`."""
        return self.digest({"prompt": prompt})

    def find(self, prompt: str) -> PromptEmbeds | None:
        """The embeddings of `prompt`; None where they are missing or damaged."""
        try:
            return PromptEmbeds(self.store.get(self.key(prompt)))
        except (KeyError, DamagedEntry):
            return None

    def missing(self, prompts: Iterable[str]) -> tuple[list[str], int]:
        """Those of `prompts` that are not there, each once, and how many different ones are."""
        texts = {self.key(prompt): prompt for prompt in prompts}
        missing = self.store.missing(texts)
        return [texts[key] for key in missing], len(texts) - len(missing)

    def fill(self, prompts: Iterable[str], report: Progress | None = None) -> PromptFillReport:
        """Encode what is missing; the encoders are loaded only if something is.

        Args:
            report: called as `report(done, total)` after each batch. What it raises, as a signal does, stops the work;
                what was encoded stays.

        Raises:
            DataError: the encoders cannot be loaded, or the disk has no room.
        """
        missing, num_cached = self.missing(prompts)
        with StoreWriter(self.store, max_entries=self.write_batch_size) as writer:
            for done, (prompt, embeds) in enumerate(encode(self.family, missing), start=1):
                writer.put(self.key(prompt), embeds.tensors)
                if report and (done % BATCH_SIZE == 0 or done == len(missing)):
                    report(num_cached + done, num_cached + len(missing))
        return PromptFillReport(len(missing), num_cached)


def encode(family: ModelFamily, prompts: Sequence[str]) -> Iterator[tuple[str, PromptEmbeds]]:
    """Each prompt with its embeddings on the CPU, in batches of one fixed size, outside of any autocast."""
    for start in range(0, len(prompts), BATCH_SIZE):
        chunk = prompts[start : start + BATCH_SIZE]
        filled = [*chunk, *[""] * (BATCH_SIZE - len(chunk))]
        with torch.no_grad(), torch.autocast(family.device.type, enabled=False):
            rows = family.encode_prompts(filled)[: len(chunk)]
        for prompt, row in zip(chunk, rows, strict=True):
            # Copies: a row of a batch would keep the whole batch in memory.
            yield prompt, PromptEmbeds({name: tensor.detach().cpu().clone() for name, tensor in row.tensors.items()})


class CachedPrompts:
    """Looks embeddings up, and encodes what is missing or damaged. Safe to use from several threads.

    Args:
        keeps_encoders: the encoders stay after a prompt was encoded (`text_cache_ondemand`, `text_cache_disable`);
            otherwise the device's memory is the denoiser's, and they are freed at once.
        keeps_entries: what is encoded is written (not with `text_cache_disable`).
        warn: called with a line when a prompt was missing that should have been there.
    """

    def __init__(
        self,
        cache: PromptCache,
        keeps_encoders: bool = False,
        keeps_entries: bool = True,
        warn: Callable[[str], None] = lambda line: None,
    ):
        self.cache = cache
        self.keeps_encoders = keeps_encoders
        self.keeps_entries = keeps_entries
        self.warn = warn
        self._lock = threading.Lock()
        self._writer = StoreWriter(cache.store, max_entries=cache.write_batch_size)
        self._memo: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._memo_bytes = 0

    def embeds(self, prompts: Sequence[str], references: ReferenceSizes | None = None) -> list[PromptEmbeds]:
        """One entry per prompt. References do not matter: no encoder whose results are cached sees them."""
        with self._lock:
            found: dict[str, PromptEmbeds] = {}
            for prompt in prompts:
                embeds = self._memo.get(prompt) or self._find(prompt)
                if embeds is not None:
                    found[prompt] = embeds
            found |= self._encode([prompt for prompt in dict.fromkeys(prompts) if prompt not in found])
            for prompt, embeds in found.items():
                self._remember(prompt, embeds)
            return [found[prompt] for prompt in prompts]

    def close(self) -> None:
        """Write what was encoded and is not written yet."""
        self._writer.flush()

    def _find(self, prompt: str) -> PromptEmbeds | None:
        if not self.keeps_entries:
            return None
        waiting = self._writer.waiting(self.cache.key(prompt))
        return PromptEmbeds(waiting) if waiting is not None else self.cache.find(prompt)

    def _encode(self, prompts: Sequence[str]) -> Mapping[str, PromptEmbeds]:
        if not prompts:
            return {}
        if not self.keeps_encoders:
            self.warn(f'"{prompts[0][:60]}" is not in the cache of captions, or damaged there: it is encoded again')
        encoded = dict(encode(self.cache.family, prompts))
        for prompt, embeds in encoded.items() if self.keeps_entries else ():
            self._writer.put(self.cache.key(prompt), embeds.tensors)
        if not self.keeps_encoders:
            self.cache.family.free_prompt_encoders()
        return encoded

    def _remember(self, prompt: str, embeds: PromptEmbeds) -> None:
        if prompt in self._memo:
            self._memo.move_to_end(prompt)
            return
        self._memo[prompt] = embeds
        self._memo_bytes += _num_bytes(embeds)
        while self._memo_bytes > MEMO_BYTES:
            self._memo_bytes -= _num_bytes(self._memo.popitem(last=False)[1])


class PromptsAhead:
    """Prompts encoded before the denoiser takes the memory, outside of a run: nothing is written.

    Args:
        family: its encoders are freed again.
        prompts: those that are known; others are encoded when they are asked for.
    """

    def __init__(self, family: ModelFamily, prompts: Iterable[str]):
        self.family = family
        self._known: dict[str, PromptEmbeds] = {}
        self.embeds(list(prompts))

    def embeds(self, prompts: Sequence[str], references: ReferenceSizes | None = None) -> list[PromptEmbeds]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if missing:
            self._known |= dict(encode(self.family, missing))
            self.family.free_prompt_encoders()
        return [self._known[prompt] for prompt in prompts]

    def close(self) -> None:
        """There is nothing to write."""


def _num_bytes(embeds: PromptEmbeds) -> int:
    return sum(tensor.nbytes for tensor in embeds.tensors.values())
