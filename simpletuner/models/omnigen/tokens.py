"""Prompts as OmniGen reads them: token ids in the chat template, and the layout of a batch of them.

diffusers' processor needs torchvision; this one needs the `tokenizers` library only, and gives the same ids. The layout
of a row is `[padding][text, with input images in it][time][patches of the image that is generated]`. Text and time are
causal, an input image sees all of itself, the generated image sees everything but padding.

Source: diffusers' `pipelines/omnigen/processor_omnigen.py`; arXiv 2409.11340, section 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_left

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.errors import DataError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.models.components import ModelSource, component_file
from simpletuner.models.family import send
from simpletuner.text import printable

PREFIX = "<|user|>\nGenerate an image according to the following instructions\n"
SUFFIX = "<|end|>\n<|assistant|>\n<|diffusion|>"
PAD_ID = 2
PIXELS_PER_TOKEN = 16  # one side: 8 pixels per latent, 2 latents per patch

_IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")


@dataclass(frozen=True)
class PromptTokens:
    """One prompt: its ids, and where input images stand in them.

    Args:
        input_ids: template and prompt, with zeros where an input image's patches go.
        reference_spans: (start, end, index of the reference image) of each placeholder.
        is_cut: the prompt was longer than the limit.
    """

    input_ids: list[int]
    reference_spans: list[tuple[int, int, int]]
    is_cut: bool


class PromptTokenizer:
    """Turns prompts into ids as `tokenizer.json` states it.

    Its post-processor decides about BOS, as in transformers. Its normalizer rules too, as when the weights were
    trained: transformers 5 rebuilds Llama tokenizers from their vocabulary, and then a `Prepend` is lost.

    Args:
        backend: a `tokenizers.Tokenizer`.
        max_tokens: limit of the text tokens of a prompt, template included.
    """

    def __init__(self, backend: Any, max_tokens: int):
        self.backend = backend
        self.max_tokens = max_tokens

    @classmethod
    def from_source(cls, source: ModelSource, spec: FamilySpec) -> PromptTokenizer:
        """Read the tokenizer folder of a model.

        Raises:
            DataError: there is no readable `tokenizer.json`.
        """
        from tokenizers import Tokenizer

        path = component_file(source, spec.component("tokenizer"), "tokenizer.json")
        if not path.is_file():
            raise DataError(
                Problem(
                    f"the model has no tokenizer/tokenizer.json ({path})",
                    key="pretrained_model_name_or_path",
                    fix="save the tokenizer with transformers' AutoTokenizer(...).save_pretrained, which writes it",
                )
            )
        return cls(Tokenizer.from_file(str(path)), spec.max_prompt_tokens)

    def __call__(self, prompt: str, reference_sizes: Sequence[tuple[int, int]] = ()) -> PromptTokens:
        """Tokenise one prompt; `reference_sizes` are the (height, width) in pixels of its input images.

        A prompt that names no input image has all of them in front.

        Raises:
            DataError: the placeholders `<img><|image_1|></img>` do not fit the input images.
        """
        if reference_sizes and not _IMAGE_TAG.search(prompt):
            prompt = f"{image_placeholders(len(reference_sizes))} {prompt}"
        text = PREFIX + prompt + SUFFIX
        tags = [int(number) for number in _IMAGE_TAG.findall(text)]
        _check_placeholders(prompt, tags, len(reference_sizes))
        chunks = [self._encode(chunk, is_first=i == 0) for i, chunk in enumerate(_split_at_images(text, bool(tags)))]
        num_text = sum(len(chunk) for chunk in chunks)
        if num_text > self.max_tokens:
            chunks[-1] = self._cut(chunks[-1], num_text - self.max_tokens, prompt)

        ids, spans = list(chunks[0]), []
        for tag, chunk in zip(tags, chunks[1:], strict=True):
            height, width = reference_sizes[tag - 1]
            num_patches = height * width // PIXELS_PER_TOKEN**2
            spans.append((len(ids), len(ids) + num_patches, tag - 1))
            ids += [0] * num_patches + chunk
        return PromptTokens(ids, spans, is_cut=num_text > self.max_tokens)

    def count(self, prompt: str) -> int:
        """Text tokens of a prompt, template included, before anything is cut."""
        text = PREFIX + prompt + SUFFIX
        chunks = _split_at_images(text, bool(_IMAGE_TAG.search(text)))
        return sum(len(self._encode(chunk, is_first=i == 0)) for i, chunk in enumerate(chunks))

    def _encode(self, text: str, is_first: bool) -> list[int]:
        """Ids of a chunk; only the first one begins with BOS."""
        return self.backend.encode(text, add_special_tokens=is_first).ids

    def _cut(self, chunk: list[int], excess: int, prompt: str) -> list[int]:
        """Take `excess` ids from the end of the prompt, keeping the template behind it."""
        tail = self._encode(SUFFIX, is_first=False)
        room = len(chunk) - len(tail)
        if excess > room:
            raise DataError(
                Problem(
                    f"the prompt is {excess} tokens too long, with {room} behind its last image to cut: "
                    f"{_quoted(prompt)}",
                    allowed=f"{self.max_tokens} tokens of text",
                    fix="shorten the prompt",
                )
            )
        return chunk[: room - excess] + tail


def image_placeholders(count: int) -> str:
    """What stands for input images in a prompt: `<img><|image_1|></img> <img><|image_2|></img>` ..."""
    return " ".join(f"<img><|image_{number}|></img>" for number in range(1, count + 1))


def _quoted(prompt: str) -> str:
    return f'"{printable(prompt)[:100]}"'


def _split_at_images(text: str, has_images: bool) -> list[str]:
    return re.split(r"<\|image_\d+\|>", text) if has_images else [text]


def _check_placeholders(prompt: str, tags: list[int], num_references: int) -> None:
    if sorted(set(tags)) == list(range(1, num_references + 1)):
        return
    named = ", ".join(map(str, sorted(set(tags)))) or "none"
    raise DataError(
        Problem(
            f"the prompt names the input images {named}, but has {num_references}: {_quoted(prompt)}",
            allowed="<img><|image_1|></img>, <img><|image_2|></img>, ... once or more for each input image",
            fix="correct the prompt, or the number of reference images",
        )
    )


def embeds_from_tokens(tokens: PromptTokens) -> PromptEmbeds:
    """`input_ids` (L,) int64; with input images also `reference_spans` (R, 3) int64."""
    tensors = {"input_ids": torch.tensor(tokens.input_ids, dtype=torch.int64)}
    if tokens.reference_spans:
        tensors["reference_spans"] = torch.tensor(tokens.reference_spans, dtype=torch.int64)
    return PromptEmbeds(tensors)


@dataclass(frozen=True)
class TokenRows(Conditioning):
    """The prompts of a batch, padded on the left, and what each token may see.

    Args:
        tensors: `input_ids` (B, T) int64; `lengths` (B,) int64, real tokens of each row; where a row is padded
            `text_visible` (B, T) bool, False on padding; where plain causality does not say it all `condition_mask`
            (B, 1, T + 1, T + 1) bool, which text and time tokens (rows) see which (columns).
        reference_spans: per row (start, end, index of the reference), counted in the padded row.
    """

    reference_spans: tuple[tuple[tuple[int, int, int], ...], ...] = ()

    @property
    def input_ids(self) -> Tensor:
        return self["input_ids"]

    @property
    def text_visible(self) -> Tensor | None:
        return self.tensors.get("text_visible")

    @property
    def condition_mask(self) -> Tensor | None:
        return self.tensors.get("condition_mask")

    @property
    def num_text(self) -> int:
        return self.input_ids.shape[1]

    def position_ids(self, num_image_tokens: int) -> Tensor:
        """(B, T + 1 + N) int64: 0 on padding, then counted through text, time and patches."""
        num_tokens = self.num_text + 1 + num_image_tokens
        padding = (self.num_text - self["lengths"])[:, None]
        return (torch.arange(num_tokens, device=padding.device)[None] - padding).clamp_min(0)


def collate_tokens(
    prompt_embeds: Sequence[PromptEmbeds], references: Sequence[Sequence[Tensor]], device: torch.device
) -> TokenRows:
    """Pad a batch of prompts on the left.

    Args:
        references: per prompt its reference latents; an empty sequence where no prompt has any.
    """
    rows = [embeds.tensors["input_ids"] for embeds in prompt_embeds]
    lengths = [len(row) for row in rows]
    num_text = max(lengths)
    padding = [num_text - length for length in lengths]
    padded = [pad_left(row, (pad, 0), value=PAD_ID) for row, pad in zip(rows, padding, strict=True)]
    spans = tuple(
        tuple((start + pad, end + pad, index) for start, end, index in _spans_of(embeds))
        for embeds, pad in zip(prompt_embeds, padding, strict=True)
    )

    tensors = {"input_ids": torch.stack(padded), "lengths": torch.tensor(lengths)}
    if any(padding):
        tensors["text_visible"] = torch.arange(num_text)[None] >= torch.tensor(padding)[:, None]
    if any(padding) or any(spans):
        tensors["condition_mask"] = make_condition_mask(padding, spans, num_text)
    latents = [[send(latent, device) for latent in row] for row in references] or [[] for _ in rows]
    on_device = {name: send(tensor, device) for name, tensor in tensors.items()}
    return TokenRows(on_device, latents, reference_spans=spans)


def _spans_of(embeds: PromptEmbeds) -> list[list[int]]:
    spans = embeds.tensors.get("reference_spans")
    return [] if spans is None else spans.tolist()


def make_condition_mask(
    padding: Sequence[int], spans: Sequence[Sequence[tuple[int, int, int]]], num_text: int
) -> Tensor:
    """(B, 1, T + 1, T + 1) bool: causal, without padding, input images open within themselves.

    A padding token sees itself alone: a row that sees nothing would be NaN, and nobody looks at padding.
    """
    num_tokens = num_text + 1
    masks = torch.ones(len(padding), num_tokens, num_tokens, dtype=torch.bool).tril()
    for mask, pad, row_spans in zip(masks, padding, spans, strict=True):
        mask[:, :pad] = False
        for start, end, _ in row_spans:
            mask[start:end, start:end] = True
        mask.diagonal().fill_(True)
    return masks[:, None]
