"""Qwen-Image-Edit for the shared trainer: the language model sees the reference images of an instruction, and the
network has their latents as further patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.batch import PromptEmbeds
from simpletuner.models.components import model_index
from simpletuner.models.family import PromptReferences
from simpletuner.models.qwen_image.family import QwenImage
from simpletuner.models.qwen_image_edit.preparation import (
    TEMPLATE,
    TEMPLATE_TOKENS,
    chat_text,
    encoder_inputs,
    fit_to_area,
    prompt_states,
)

# Pixels of an image for the language model: of the first release, which has one image, and of the later ones.
AREA_OF_ONE, AREA_OF_SEVERAL = 1024 * 1024, 384 * 384


class QwenImageEdit(QwenImage):
    """The pipeline that a model names for itself says how its language model is shown images."""

    @property
    def labels_images(self) -> bool:
        """Whether images are announced as "Picture 1: " and seen small, as in all releases but the first."""
        return model_index(self.source).get("_class_name") != "QwenImageEditPipeline"

    @property
    def encoder_area(self) -> int:
        """Pixels that the language model sees of each image."""
        return AREA_OF_SEVERAL if self.labels_images else AREA_OF_ONE

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Without the template, and without images."""
        counts = self.encoders.count("tokenizer", [chat_text(prompt, 0, False) for prompt in prompts])
        return [count - TEMPLATE_TOKENS for count in counts]

    def prompt_facts(self) -> Mapping[str, Any]:
        own = {"template": [TEMPLATE, TEMPLATE_TOKENS], "images": [self.labels_images, self.encoder_area]}
        return {**super().prompt_facts(), **own}

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D) per prompt: the last states of its images, the instruction and what follows."""
        rows = references or [()] * len(prompts)
        tokenizer, processor = self.encoders.tokenizer("tokenizer"), self.encoders.tokenizer("processor")
        encoder = self.encoders.encoder("text_encoder")
        embeds = []
        for prompt, row in zip(prompts, rows, strict=True):
            images = [fit_to_area(each.load(), self.encoder_area) for each in row]
            text = chat_text(prompt, len(images), self.labels_images)
            max_tokens = TEMPLATE_TOKENS + self.max_prompt_tokens
            self.encoders.note_cut_prompts("tokenizer", [text], max_tokens)
            inputs = encoder_inputs(tokenizer, processor, text, images, max_tokens)
            embeds.append(PromptEmbeds({"prompt_embeds": prompt_states(encoder, inputs, self.device)}))
        return embeds
