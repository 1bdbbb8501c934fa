"""OmniGen for the shared trainer: prompts to token rows, and its time and sign to the project's.

OmniGen counts time from noise (t = 0) to data (t = 1) and predicts `data - noise`: VectorSpaceLab/OmniGen,
`OmniGen/train_helper/loss.py`, has `xt = t * x1 + (1 - t) * x0` and `ut = x1 - x0`, where x1 is the data. Here sigma is
0 on data and the velocity is `noise - data`: t = 1 - sigma, and the output changes sign. Its training times are
sigmoid(N(0, 1)), and so are then the sigmas, for the normal is symmetric: the default of `sigmas_at` serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from simpletuner.batch import Batch, Conditioning, PromptEmbeds
from simpletuner.models.components import component_config
from simpletuner.models.family import ModelFamily, PromptReferences
from simpletuner.models.omnigen.denoiser import install
from simpletuner.models.omnigen.tokens import PromptTokenizer, TokenRows, collate_tokens, embeds_from_tokens


class OmniGen(ModelFamily):
    """OmniGen's transformer reads token ids: there is no text encoder, and nothing worth caching.

    Attributes:
        num_cut_prompts: prompts so far that were longer than `spec.max_prompt_tokens` and were cut.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.num_cut_prompts = 0
        self._tokenizer: PromptTokenizer | None = None

    def largest_side(self) -> int | None:
        """The position table has `pos_embed_max_size` rows of patches: 3072 px in the released model."""
        config = component_config(self.source, self.spec.component("denoiser"))
        return config["pos_embed_max_size"] * self.spec.size_multiple

    def load_denoiser(self) -> nn.Module:
        return install(super().load_denoiser())

    def empty_denoiser(self) -> nn.Module:
        return install(super().empty_denoiser())

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [self._prompt_tokenizer().count(prompt) for prompt in prompts]

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`input_ids` (L,) int64 per prompt; with references also `reference_spans` (R, 3): start, end, reference.

        Raises:
            DataError: the placeholders of a prompt do not fit its references.
        """
        tokenizer = self._prompt_tokenizer()
        sizes = [[(each.height, each.width) for each in row] for row in references or [()] * len(prompts)]
        tokens = [tokenizer(prompt, row) for prompt, row in zip(prompts, sizes, strict=True)]
        self.num_cut_prompts += sum(each.is_cut for each in tokens)
        return [embeds_from_tokens(each) for each in tokens]

    def _prompt_tokenizer(self) -> PromptTokenizer:
        if self._tokenizer is None:
            self._tokenizer = PromptTokenizer.from_source(self.source, self.spec)
        return self._tokenizer

    def collate(self, batch: Batch) -> TokenRows:
        return collate_tokens(batch.prompt_embeds, batch.references, self.device)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        return -denoiser(noisy_latents.to(self.dtype), 1 - sigmas, conditioning)

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from simpletuner.models.omnigen.pipeline import build_pipeline

        return build_pipeline(self, denoiser, vae)
