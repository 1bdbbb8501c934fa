"""Generating with Qwen-Image and Qwen-Image-Edit: guidance whose strength does not change the length of predictions.

Source: QwenLM/Qwen-Image; diffusers' `pipeline_qwenimage.py` and `pipeline_qwenimage_edit_plus.py`, which cannot take
embeddings and references on live weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from simpletuner.batch import Conditioning
from simpletuner.models.guided_pipeline import GuidedFlowPipeline
from simpletuner.models.patches import pack, unpack


class QwenImagePipeline(GuidedFlowPipeline):
    """Text, and reference images where the family has them, to image; guidance is diffusers' `true_cfg_scale`."""

    pack = staticmethod(pack)

    def fit_reference(self, image: Image.Image) -> Image.Image:
        """As it is: the language model and the VAE have sizes of their own."""
        return image

    def encode_reference(self, image: Image.Image) -> Tensor:
        """(C, h, w) scaled latents of a reference image of any size."""
        return self.encode_fitted(super().fit_reference(image))

    def condition(
        self, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]], guidance_scale: float
    ) -> Conditioning:
        shown = [[self.family.prompt_image(each) for each in row] for row in references]
        seen = [[self.encode_reference(each) for each in row] for row in references]
        return self.family.condition_on(self.family.prompts.embeds(prompts, shown), seen)

    def guided(self, asked: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
        """Away from `negative`, each patch as long as that of `asked`."""
        wanted, unwanted = pack(asked), pack(negative)
        combined = unwanted + guidance_scale * (wanted - unwanted)
        combined *= wanted.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        return unpack(combined, *asked.shape[-2:])
