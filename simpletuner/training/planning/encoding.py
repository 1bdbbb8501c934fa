"""What encoding captions takes, known before an encoder is loaded: its weights, its activations, bytes per caption.

The family's own `encode_prompts` runs with its tokenizers and with encoders on torch's `meta` device, which have shapes
and no values: what it returns has the shapes of the real embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from simpletuner.batch import PromptEmbeds, PromptImage
from simpletuner.cache.prompts import BATCH_SIZE
from simpletuner.config.loading import LoadedRun
from simpletuner.data.dataset import Dataset
from simpletuner.errors import bytes_text
from simpletuner.families.spec import Component
from simpletuner.importing import import_class
from simpletuner.models.components import ModelSource, component_config
from simpletuner.models.family import ModelFamily
from simpletuner.models.layer_offload import repeated_layers
from simpletuner.models.text_encoders import TextEncoders
from simpletuner.precision.quantize import saved_bytes
from simpletuner.text import count_text
from simpletuner.training.planning.shapes import FusedAttention, PeakBytes, num_bytes
from simpletuner.training.prompts import open_prompt_cache, prompts_folder, run_prompts

MAX_CAPTIONS = 2000


@dataclass(frozen=True)
class EncodingCost:
    """Of the stage that encodes captions, before the denoiser is loaded.

    Args:
        embeds: of each prompt, on `meta`.
        weight_bytes: of all text encoders, packed as configured; of those that are offloaded, one layer and the rest.
        activation_bytes: the most that encoding a batch makes besides.
    """

    embeds: Sequence[PromptEmbeds]
    weight_bytes: int
    activation_bytes: int

    @property
    def caption_bytes(self) -> int:
        """What the largest of the embeddings takes."""
        return max(sum(tensor.nbytes for tensor in each.tensors.values()) for each in self.embeds)

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class TextCost:
    """What the captions of a run take.

    Args:
        num_texts: that differ, with those of validation.
        num_missing: of them, not in the cache yet.
        cost: of encoding them; None where that is not known before they are encoded.
        stays: the encoders stay in memory, for captions are encoded on demand.
        is_kept: what is encoded is written to `folder`.
    """

    num_texts: int
    num_missing: int
    cost: EncodingCost | None
    stays: bool
    is_kept: bool
    folder: Path

    @property
    def disk_bytes(self) -> int:
        """At most, for the longest caption is taken for all."""
        return self.num_missing * self.cost.caption_bytes if self.cost and self.is_kept else 0

    def lines(self) -> list[str]:
        there = self.num_texts - self.num_missing
        first = f"{self.num_missing:,} of {count_text(self.num_texts, 'text')} to encode"
        if self.cost is None:
            return [f"{first}; what that takes is not known for this model before it is done"]
        each = bytes_text(self.cost.caption_bytes)
        kept = f", up to {bytes_text(self.disk_bytes)} in {self.folder}" if self.is_kept else ", none of it is written"
        cached = f"; {there:,} are there" if there else ""
        rest = "they stay in memory" if self.stays else "before the denoiser is loaded"
        weights, peak = bytes_text(self.cost.weight_bytes), bytes_text(self.cost.peak_bytes)
        return [
            f"{first}, up to {each} each{kept}{cached}",
            f"encoding takes {peak} of memory, {weights} of it the text encoders; {rest}",
        ]


def text_cost(loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset]) -> TextCost | None:
    """Of a run, before anything is encoded or an encoder is fetched; None where there is nothing to encode."""
    if not family.spec.caches_prompt_embeds:
        return None
    config, folder = loaded.config, prompts_folder(loaded, family.spec)
    wanted = list(dict.fromkeys(run_prompts(loaded, family, datasets)))
    missing = len(wanted)
    if folder.exists():  # else no text was encoded, and its key would ask for digests of all encoders
        cache = open_prompt_cache(loaded, family)
        missing = len(cache.missing(wanted)[0])
        cache.store.close()
    if not wanted:
        return None
    texts = choose_texts(family, datasets, BATCH_SIZE, longest=True) or [wanted[0].text]
    images = None
    if family.spec.prompts_see_references:
        images = [[blank_image(*size) for size in largest_references(datasets)]] * len(texts)
    on_demand = config.data.text_cache_ondemand or config.data.text_cache_disable
    cost = encoding_cost(family, texts, images)
    return TextCost(len(wanted), missing, cost, on_demand, not config.data.text_cache_disable, folder)


def choose_texts(family: ModelFamily, datasets: Sequence[Dataset], count: int, longest: bool) -> list[str]:
    """So many captions: the longest ones, or the middle ones."""
    captions: list[str] = []
    for dataset in datasets:
        step = max(1, len(dataset.samples) * len(datasets) // MAX_CAPTIONS)
        for position in range(0, len(dataset.samples), step):
            captions += dataset.samples[position].captions
    lengths = family.count_prompt_tokens(captions) or [len(caption) for caption in captions]
    ordered = [caption for _, caption in sorted(zip(lengths, captions, strict=True), reverse=True)]
    start = 0 if longest else max(0, len(ordered) // 2 - count // 2)
    chosen = ordered[start : start + count]
    return (chosen * count)[:count]


def largest_references(training: Sequence[Dataset]) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of the reference images of the image that has most of them, by area."""
    found: tuple[tuple[int, int], ...] = ()
    for dataset in training:
        for sample in islice(dataset.samples if dataset.references else (), MAX_CAPTIONS):
            sizes = tuple((each.crop.height, each.crop.width) for each in sample.references)
            found = max(found, sizes, key=lambda row: sum(height * width for height, width in row))
    return found


def blank_image(height: int, width: int) -> PromptImage:
    """Stands for a reference: encoders make as many tokens of it as of any other of its size."""
    return PromptImage(height, width, load=lambda: Image.new("RGB", (width, height)))


def encoding_cost(
    family: ModelFamily, texts: Sequence[str], images: Sequence[Sequence[PromptImage]] | None = None
) -> EncodingCost | None:
    """Of a family whose embeddings are cached; None where its encoders cannot do without values.

    Args:
        texts: the longest ones of a run; the batch that is measured is filled with them.
        images: references of each text.
    """
    # On the CPU: ids and masks keep their values, only what comes out of encoders has none.
    empty = copy.copy(family)
    empty.device = torch.device("cpu")
    empty.encoders = encoders = EmptyEncoders(empty)
    filled = [texts[index % len(texts)] for index in range(max(BATCH_SIZE, len(texts)))]
    seen = [images[index % len(images)] for index in range(len(filled))] if images else None
    try:
        with torch.no_grad(), PeakBytes() as made, FusedAttention(), StaysOnMeta():
            embeds = empty.encode_prompts(filled, seen)
    except (RuntimeError, NotImplementedError):  # code that reads values, or was compiled by TorchScript
        return None
    return EncodingCost(embeds[: len(texts)], encoders.num_bytes, made.peak)


def encoder_bytes(family: ModelFamily, names: Sequence[str]) -> list[int]:
    """What each text encoder takes, packed as configured."""
    found = []
    for name in names:
        encoders = EmptyEncoders(family)
        with suppress(RuntimeError, NotImplementedError):  # of such a one nothing is known, and it is not packed
            encoders.encoder(name)
        found.append(encoders.num_bytes)
    return found


class EmptyEncoders(TextEncoders):
    """The encoders of a family without values; the tokenizers are the real ones."""

    num_bytes = 0

    def encoder(self, name: str = "text_encoder") -> Any:
        if name not in self._encoders:
            component = self._component(name)
            encoder = _without_values(import_class(component.class_name), self.family.source, component)
            for tensor in (*encoder.parameters(), *encoder.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(self.family.dtype)
            self.num_bytes += self._packed_bytes(encoder, name)
            if self.family.number_formats.offloads_encoders:
                layers = [self._packed_bytes(layer, name) for layer in repeated_layers(encoder)]
                self.num_bytes -= sum(layers) - max(layers, default=0)
            self._encoders[name] = encoder.eval().requires_grad_(False)
        return self._encoders[name]

    def _packed_bytes(self, module: nn.Module, name: str) -> int:
        """What a part of the encoder in folder `name` takes."""
        return num_bytes((*module.parameters(), *module.buffers())) - saved_bytes(module, self.precision(name))


def _without_values(cls: Any, source: ModelSource, component: Component) -> nn.Module:
    from transformers import AutoConfig

    config = component_config(source, component)
    with torch.device("meta"):
        if (config_class := getattr(cls, "config_class", None)) is None:  # one of the classes that choose
            return cls.from_config(AutoConfig.for_model(**config))
        return cls(config_class.from_dict(config))


def _without_value(leaf: Any) -> Any:
    """Tables with values (positions, masks) lose them where they meet what has none."""
    return leaf.to("meta") if isinstance(leaf, Tensor) and leaf.dim() and not leaf.is_meta else leaf


class StaysOnMeta(TorchFunctionMode):
    """What is moved to the CPU without having values stays where it is, and no shortcut is taken for it: masks
    are asked whether they hide nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named: dict[str, Any] = dict(kwargs or {})
        if any(isinstance(each, Tensor) and each.is_meta for each in tree_leaves((args, named))):
            args, named = tree_map(_without_value, (args, named))
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is Tensor.__bool__:
                return False
            if func is Tensor.cpu:
                return args[0]
            if func is Tensor.to:
                args = (args[0], *(each for each in args[1:] if not isinstance(each, torch.device | str)))
                named.pop("device", None)
                if len(args) == 1 and not named.keys() & {"dtype"}:
                    return args[0]
        return func(*args, **named)
