"""Text that is the states of one layer of a causal language model (Z-Image: Qwen3, Lumina 2: Gemma 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.batch import PromptEmbeds
from simpletuner.models.family import PromptReferences
from simpletuner.models.flow import FlowFamily


class LanguageModelText(FlowFamily):
    """The states that the last layer reads, of the tokens of a template with the prompt in it."""

    text_layer = -2

    def encoded_text(self, prompt: str) -> str:
        """What the language model reads."""
        raise NotImplementedError

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", [self.encoded_text(prompt) for prompt in prompts])

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "template": self.encoded_text("{prompt}"), "layer": self.text_layer}

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D): template included; of a text that is too long the end is cut."""
        texts = [self.encoded_text(prompt) for prompt in prompts]
        rows = self.encoders.states_of(texts, [self.text_layer], self.max_prompt_tokens)
        return [PromptEmbeds({"prompt_embeds": row[:, 0]}) for row in rows]
