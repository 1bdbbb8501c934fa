"""Generating with Qwen-Image and Qwen-Image-Edit: guidance whose strength does not change the length of predictions.

Source: QwenLM/Qwen-Image; diffusers' `pipeline_qwenimage.py` and `pipeline_qwenimage_edit_plus.py`, which cannot take
embeddings and references on live weights.
"""

from __future__ import annotations

from torch import Tensor

from simpletuner.models.guided_pipeline import GuidedFlowPipeline
from simpletuner.models.patches import pack, unpack


class QwenImagePipeline(GuidedFlowPipeline):
    """Text, and reference images where the family has them, to image; guidance is diffusers' `true_cfg_scale`."""

    pack = staticmethod(pack)

    def guided(self, positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
        """Away from `negative`, each patch as long as that of `positive`."""
        wanted, unwanted = pack(positive), pack(negative)
        combined = unwanted + guidance_scale * (wanted - unwanted)
        combined *= wanted.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        return unpack(combined, *positive.shape[-2:])
