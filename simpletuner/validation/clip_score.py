"""CLIP scores: how well a validation image fits its prompt, as a public model sees it.

    score = 100 * max(cos(image embedding, text embedding), 0)

Source: Hessel et al., "CLIPScore" (arXiv 2104.08718), with the factor 100 that tools use in place of its 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.errors import DataError, Problem
from simpletuner.models.components import fetch
from simpletuner.models.lazy_vae import SMALL_BYTES, give_back_memory, num_bytes
from simpletuner.models.safe_loading import load_errors, load_pretrained, load_tokenizer
from simpletuner.validation.sampling import GeneratedImage

if TYPE_CHECKING:
    from transformers import CLIPModel

DEFAULT_MODEL = "openai/clip-vit-large-patch14"
KEY = "pretrained_evaluation_model_name_or_path"
BATCH_SIZE = 8


class ClipScorer:
    """Scores images; the model is loaded when there are some, and freed afterwards where it is large.

    Args:
        model: folder or hub id of a CLIP model with safetensors weights.
        device: where it works.

    Raises:
        DataError: there is no such model; tokenizer and image processor are loaded at once.
    """

    def __init__(self, model: str, device: torch.device):
        # The processor of CLIPProcessor needs torchvision; this one works on PIL images.
        from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil

        self.name = model
        self.device = device
        if not Path(model).is_dir():
            fetch(model, "config.json", None, KEY)
        self._tokenizer: Any = _loaded(load_tokenizer, AutoTokenizer, model)
        self._processor: Any = _loaded(load_tokenizer, CLIPImageProcessorPil, model)
        num_tokens = _loaded(load_tokenizer, CLIPConfig, model).text_config.vocab_size
        # Where its files are missing, transformers makes an empty one and says nothing.
        if len(self._tokenizer) < num_tokens:
            raise DataError(
                Problem(
                    f"the tokenizer of {model} knows {len(self._tokenizer)} tokens and its model {num_tokens}",
                    key=KEY,
                    fix="complete the folder with the tokenizer's files",
                )
            )
        self._model: CLIPModel | None = None

    def score(self, images: Sequence[GeneratedImage]) -> list[float]:
        """One score for each image, 0 to 100; a prompt longer than CLIP's 77 tokens is cut.

        Raises:
            DataError: the weights cannot be loaded.
        """
        scores: list[float] = []
        for start in range(0, len(images), BATCH_SIZE):
            scores += self._scores(images[start : start + BATCH_SIZE]).tolist()
        if self._model is not None and num_bytes(self._model) > SMALL_BYTES:
            self._model = None
            give_back_memory(self.device)
        return scores

    def _scores(self, images: Sequence[GeneratedImage]) -> Tensor:
        model = self._load()
        prompts = [image.request.prompt for image in images]
        text_config: Any = model.config.text_config
        limit = text_config.max_position_embeddings
        text = self._tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        pixels = self._processor(images=[image.image for image in images], return_tensors="pt")["pixel_values"]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            output = model(
                input_ids=text["input_ids"].to(self.device),
                attention_mask=text["attention_mask"].to(self.device),
                pixel_values=pixels.to(self.device, torch.float32),
            )
        return 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).clamp_min(0)

    def _load(self) -> CLIPModel:
        if self._model is None:
            from transformers import CLIPModel

            self._model = _loaded(load_pretrained, CLIPModel, self.name, dtype=torch.float32)
            self._model.eval().requires_grad_(False).to(self.device)
        return self._model


def _loaded(load: Any, cls: Any, name: str, **options: Any) -> Any:
    try:
        return load(cls, name, **options)
    except load_errors() as error:
        raise DataError(
            Problem(
                f"cannot load the CLIP model {name}: {error}",
                key=KEY,
                allowed="a folder or hub id of a CLIP model with safetensors weights",
                fix='name another one, or set evaluation_type to "none"',
            )
        ) from error
