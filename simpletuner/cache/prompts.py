"""Prompt embeddings, encoded once: what the text encoders say of a prompt, under a key of everything that made it.

The key holds the text, the images where the encoders see them, and the encoders' fingerprint (weights, tokenizers,
limits, number format), so another caption or encoder can never meet a stale entry, and a caption that many images share
is encoded once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simpletuner.batch import PromptEmbeds, PromptImage, PromptRequest
from simpletuner.cache.encoded import EncodedCache
from simpletuner.cache.store import DamagedEntry, StoreWriter
from simpletuner.models.family import ModelFamily, PromptReferences

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

    def key(self, request: PromptRequest) -> str:
        """sha256 in hex over everything that decides the embeddings of a prompt."""
        images = [image.content for image in request.images]
        return self.digest({"prompt": request.text, **({"images": images} if images else {})})

    def find(self, request: PromptRequest) -> PromptEmbeds | None:
        """The embeddings of a prompt; None where they are missing or damaged."""
        try:
            return PromptEmbeds(self.store.get(self.key(request)))
        except (KeyError, DamagedEntry):
            return None

    def missing(self, requests: Iterable[PromptRequest]) -> tuple[list[PromptRequest], int]:
        """Those of `requests` that are not there, each once, and how many different ones are."""
        known = {self.key(request): request for request in requests}
        missing = self.store.missing(known)
        return [known[key] for key in missing], len(known) - len(missing)

    def fill(self, requests: Iterable[PromptRequest], report: Progress | None = None) -> PromptFillReport:
        """Encode what is missing; the encoders are loaded only if something is.

        Args:
            report: called as `report(done, total)` after each batch. What it raises, as a signal does, stops the work;
                what was encoded stays.

        Raises:
            DataError: the encoders cannot be loaded, or the disk has no room.
        """
        missing, num_cached = self.missing(requests)
        with StoreWriter(self.store, max_entries=self.write_batch_size) as writer:
            for done, (request, embeds) in enumerate(encode(self.family, missing), start=1):
                writer.put(self.key(request), embeds.tensors)
                if report and (done % BATCH_SIZE == 0 or done == len(missing)):
                    report(num_cached + done, num_cached + len(missing))
        return PromptFillReport(len(missing), num_cached)


def encode(family: ModelFamily, requests: Sequence[PromptRequest]) -> Iterator[tuple[PromptRequest, PromptEmbeds]]:
    """Each prompt with its embeddings on the CPU, in batches of one fixed size, outside of any autocast."""
    size = 1 if family.reads_prompts_singly else BATCH_SIZE
    for start in range(0, len(requests), size):
        chunk = requests[start : start + size]
        filled = [*chunk, *[PromptRequest("")] * (size - len(chunk))]
        images = [request.images for request in filled]
        with torch.no_grad(), torch.autocast(family.device.type, enabled=False):
            rows = family.encode_prompts([request.text for request in filled], images if any(images) else None)
        for request, row in zip(chunk, rows[: len(chunk)], strict=True):
            # Copies: a row of a batch would keep the whole batch in memory.
            yield request, PromptEmbeds({name: tensor.detach().cpu().clone() for name, tensor in row.tensors.items()})


def requests_of(
    family: ModelFamily, prompts: Sequence[str], references: PromptReferences | None
) -> list[PromptRequest]:
    """What the encoders of a family are asked for: they get no images that they do not look at."""
    if references is None or not family.spec.prompts_see_references:
        return [PromptRequest(prompt) for prompt in prompts]
    return [PromptRequest(prompt, tuple(images)) for prompt, images in zip(prompts, references, strict=True)]


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
        self._memo: OrderedDict[PromptRequest, PromptEmbeds] = OrderedDict()
        self._memo_bytes = 0

    def embeds(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """One entry per prompt."""
        requests = requests_of(self.cache.family, prompts, references)
        with self._lock:
            found: dict[PromptRequest, PromptEmbeds] = {}
            for request in requests:
                embeds = self._memo.get(request) or self._find(request)
                if embeds is not None:
                    found[request] = embeds
            found |= self._encode([request for request in dict.fromkeys(requests) if request not in found])
            for request, embeds in found.items():
                self._remember(request, embeds)
            return [found[request] for request in requests]

    def close(self) -> None:
        """Write what was encoded and is not written yet."""
        self._writer.flush()

    def _find(self, request: PromptRequest) -> PromptEmbeds | None:
        if not self.keeps_entries:
            return None
        waiting = self._writer.waiting(self.cache.key(request))
        return PromptEmbeds(waiting) if waiting is not None else self.cache.find(request)

    def _encode(self, requests: Sequence[PromptRequest]) -> Mapping[PromptRequest, PromptEmbeds]:
        if not requests:
            return {}
        if not self.keeps_encoders:
            self.warn(
                f'"{requests[0].text[:60]}" is not in the cache of captions, or damaged there: it is encoded again'
            )
        encoded = dict(encode(self.cache.family, requests))
        for request, embeds in encoded.items() if self.keeps_entries else ():
            self._writer.put(self.cache.key(request), embeds.tensors)
        if not self.keeps_encoders:
            self.cache.family.free_prompt_encoders()
        return encoded

    def _remember(self, request: PromptRequest, embeds: PromptEmbeds) -> None:
        if request in self._memo:
            self._memo.move_to_end(request)
            return
        self._memo[request] = embeds
        self._memo_bytes += _num_bytes(embeds)
        while self._memo_bytes > MEMO_BYTES:
            self._memo_bytes -= _num_bytes(self._memo.popitem(last=False)[1])


class PromptsAhead:
    """Prompts encoded before the denoiser takes the memory, outside of a run: nothing is written.

    Args:
        family: its encoders are freed again.
        prompts: those that are known; others are encoded when they are asked for.
        images: the references that each of them has.
    """

    def __init__(self, family: ModelFamily, prompts: Iterable[str], images: Sequence[PromptImage] = ()):
        self.family = family
        self._known: dict[PromptRequest, PromptEmbeds] = {}
        texts = list(prompts)
        self.embeds(texts, [images] * len(texts))

    def embeds(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        requests = requests_of(self.family, prompts, references)
        missing = [request for request in dict.fromkeys(requests) if request not in self._known]
        if missing:
            self._known |= dict(encode(self.family, missing))
            self.family.free_prompt_encoders()
        return [self._known[request] for request in requests]

    def close(self) -> None:
        """There is nothing to write."""


def _num_bytes(embeds: PromptEmbeds) -> int:
    return sum(tensor.nbytes for tensor in embeds.tensors.values())
