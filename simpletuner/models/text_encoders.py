"""The tokenizers and text encoders of a family: loaded when a prompt is first encoded, freed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simpletuner.errors import DataError, MissingDependency, Problem
from simpletuner.families.spec import Component, FamilySpec
from simpletuner.importing import import_class
from simpletuner.models.components import ModelSource, component_folder, load_component
from simpletuner.models.hidden_states import hidden_states
from simpletuner.models.layer_offload import offload_layers
from simpletuner.models.local_check import lacks_package, missing_package
from simpletuner.models.safe_loading import load_errors, load_tokenizer
from simpletuner.precision.quantize import NumberFormats, quantize


class EncoderSettings(Protocol):
    """What loading and using encoders needs of a model family."""

    spec: FamilySpec
    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    number_formats: NumberFormats
    num_cut_prompts: int


class TextEncoders:
    """Parts of one model by the names of their folders (`text_encoder`, `tokenizer_2`).

    Args:
        family: knows where they are, and in which number format and on which device encoders work.
    """

    def __init__(self, family: EncoderSettings):
        self.family = family
        self._tokenizers: dict[str, Any] = {}
        self._encoders: dict[str, nn.Module] = {}

    def tokenizer(self, name: str = "tokenizer") -> Any:
        """The tokenizer in folder `name`, or what cuts images into patches for an encoder that sees them.

        Raises:
            DataError: it cannot be read.
            MissingDependency: it needs a package that is not installed.
        """
        if name not in self._tokenizers:
            self._tokenizers[name] = _load_tokenizer(self.family.source, self._component(name))
        return self._tokenizers[name]

    def encoder(self, name: str = "text_encoder") -> Any:
        """The text encoder in folder `name`, in eval mode, without gradients.

        Raises:
            DataError: it cannot be loaded.
        """
        if name not in self._encoders:
            from transformers.utils import logging

            logging.disable_progress_bar()  # a bar over single tensors says nothing
            encoder = load_component(self.family.source, self._component(name), self.family.dtype)
            formats, device = self.family.number_formats, self.family.device
            encoder = encoder.eval().requires_grad_(False)
            offloads = formats.offloads_encoders
            packs_there = formats.packs_on_device and not offloads
            quantize(encoder, self.precision(name), device=device if packs_there else None)
            if offloads:
                offload_layers(encoder, device)
            self._encoders[name] = encoder if offloads else encoder.to(device)
        return self._encoders[name]

    def precision(self, name: str) -> str:
        """The number format of the encoder in folder `name`: `text_encoder_1_precision` is the family's first."""
        encoders = [part.name for part in self.family.spec.components if part.role == "text_encoder"]
        return self.family.number_formats.of_encoder(encoders.index(name))

    def everything(self) -> dict[str, Any]:
        """Folder -> tokenizer or encoder, all of them: what a whole saved model needs."""
        parts = self.family.source.parts(self.family.spec)
        return {part.name: self.tokenizer(part.name) for part in parts if part.role == "tokenizer"} | {
            part.name: self.encoder(part.name) for part in parts if part.role == "text_encoder"
        }

    def free(self) -> None:
        """Let go of the encoders; tokenizers are small and stay."""
        self._encoders.clear()

    def tokenize(self, name: str, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """((B, length) ids, (B, length) mask) of prompts that are cut or padded to `length`."""
        tokens = self.tokenizer(name)(
            list(prompts), truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        ).to(self.family.device)
        return tokens.input_ids, tokens.attention_mask

    def states_of(
        self,
        texts: Sequence[str],
        layers: Sequence[int],
        length: int,
        *,
        name: str = "text_encoder",
        tokenizer: str = "tokenizer",
        final_norm: bool = True,
    ) -> list[Tensor]:
        """Per text (L, K, D): the states of K layers of a language model for its tokens, on the CPU.

        Each text is read by itself, without padding, so that its states do not depend on the others.

        Args:
            texts: with their template; what is longer than `length` tokens is cut and counted.
            layers: see `hidden_states.py`.
            name: folder of the encoder.
            tokenizer: folder of the tokenizer.
        """
        self.note_cut_prompts(tokenizer, texts, length)
        tokenize, encoder, rows = self.tokenizer(tokenizer), self.encoder(name), []
        for text in texts:
            ids = tokenize(text, truncation=True, max_length=length, return_tensors="pt").input_ids
            [states] = hidden_states(encoder, layers, final_norm, input_ids=ids.to(self.family.device))
            rows.append(states.cpu())
        return rows

    def masked_states(self, texts: Sequence[str], length: int, num_padding: int = 0) -> list[Tensor]:
        """Per text (L, D): the last states of its tokens and of `num_padding` tokens of padding, on the CPU.

        The encoder reads texts that are padded to `length`, and a mask that hides the padding, as T5 is asked by
        diffusers' pipelines. Texts that are longer are cut and counted.
        """
        self.note_cut_prompts("tokenizer", texts, length)
        ids, mask = self.tokenize("tokenizer", texts, length)
        with torch.no_grad():
            states = self.encoder()(ids, attention_mask=mask).last_hidden_state.cpu()
        counts = mask.sum(dim=1).tolist()
        return [row[: count + num_padding].clone() for row, count in zip(states, counts, strict=True)]

    def note_cut_prompts(self, name: str, prompts: Sequence[str], length: int) -> None:
        """Count the prompts that `length` tokens cut, to be reported at the end of the run."""
        self.family.num_cut_prompts += sum(count > length for count in self.count(name, prompts))

    def count(self, name: str, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before anything is cut, special ones included."""
        return [len(ids) for ids in self.tokenizer(name)(list(prompts), verbose=False).input_ids]

    def _component(self, name: str) -> Component:
        return next(part for part in self.family.spec.components if part.name == name)


def _load_tokenizer(source: ModelSource, component: Component) -> Any:
    folder = component_folder(source, component)
    if lacks_package(component, folder):
        raise MissingDependency(missing_package(component, folder))
    try:
        return load_tokenizer(import_class(component.class_name), folder)
    except load_errors() as error:
        raise DataError(
            Problem(
                f"cannot load the {component.role} {folder}: {error}",
                key="pretrained_model_name_or_path",
                allowed="the files that transformers' save_pretrained writes",
            )
        ) from error
