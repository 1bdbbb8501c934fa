"""Qwen-Image 2.1 for the shared trainer: Qwen3-VL reads the text and its references, one sequence holds everything.

The network is given sigma (1 on noise) and predicts `noise - data`, which is the project's sign
(`pipeline_qwenimage21.py`, step 5). Times are shifted with the size of the image as the model's own scheduler shifts
them; that its sampling ends at sigma 0.02 (`shift_terminal`) is not a part of the training distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil

from simpletuner.batch import Conditioning, PromptEmbeds, PromptImage
from simpletuner.errors import DataError, Problem
from simpletuner.models.components import component_folder, model_index
from simpletuner.models.family import LatentMoments, PromptReferences, have_one_shape, send
from simpletuner.models.flow import FlowFamily
from simpletuner.models.guided_pipeline import GuidedFlowPipeline
from simpletuner.models.hidden_states import hidden_states
from simpletuner.models.patches import flatten
from simpletuner.models.qwen_image_edit.preparation import IMAGE_TAGS, encoder_inputs, fit_to_area
from simpletuner.models.safe_loading import load_tokenizer

SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE = f"<image{{}}>{IMAGE_TAGS}"


class QwenImage21(FlowFamily):
    """What stands for a reference in the text is replaced by its latents; rows of other lengths fit no batch."""

    reads_prompts_singly = True
    # Pixels of a reference that is generated with; larger and smaller ones are scaled to it.
    reference_area = 1024 * 1024

    @cached_property
    def image_processor(self) -> Any:
        # transformers' own processor of this folder asks for torchvision.
        return load_tokenizer(Qwen2VLImageProcessorPil, component_folder(self.source, self.spec.component("tokenizer")))

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "template": [SYSTEM, USER, IMAGE], "before the norm": True}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Without the system's part, whose states are dropped, and without references."""
        return self.encoders.count("processor", [USER.format(prompt or " ") for prompt in prompts])

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D), the last states before the final norm; `image_slots` (L,), those of references."""
        return [self._encode(*row) for row in zip(prompts, references or [()] * len(prompts), strict=True)]

    def _encode(self, prompt: str, images: Sequence[PromptImage]) -> PromptEmbeds:
        tokenizer, processor = self.encoders.tokenizer("processor"), self.image_processor if images else None
        marks = " ".join(IMAGE.format(number) for number in range(1, len(images) + 1))
        text = SYSTEM + USER.format(marks + (prompt or " "))
        inputs = encoder_inputs(tokenizer, processor, text, [each.load() for each in images])
        for image, grid in zip(images, inputs.get("image_grid_thw", ()), strict=True):
            if int(grid.prod()) * self.spec.vae_factor**2 != image.height * image.width:
                message = f"the text encoder takes no reference of {image.width} x {image.height} pixels as it is"
                allowed = "multiples of 32 pixels, at least as many as 256 x 256"
                fix = "raise the resolution of the dataset of references"
                raise DataError(Problem(message, key="conditioning_data", allowed=allowed, fix=fix))
        slots = inputs["mm_token_type_ids"].bool()[0]
        dropped, end = (len(tokenizer(text).input_ids) for text in (SYSTEM, USER.partition("{}")[2]))
        excess = int((~slots).sum()) - dropped - self.max_prompt_tokens
        if excess > 0:
            self.num_cut_prompts += 1
            kept = [*range(len(slots) - end - excess), *range(len(slots) - end, len(slots))]
            inputs |= {name: inputs[name][:, kept] for name in ("input_ids", "mm_token_type_ids")}
            slots = slots[kept]
        inputs = {name: send(tensor, self.device) for name, tensor in inputs.items()}
        [states] = hidden_states(self.encoders.encoder(), [-1], final_norm=False, **inputs)
        return PromptEmbeds({"prompt_embeds": states[dropped:, 0].cpu(), "image_slots": slots[dropped:]})

    def fit_reference(self, image: Image.Image) -> Image.Image:
        """A reference that is generated with, RGBA, at the size that encoder and VAE see."""
        return fit_to_area(image.convert("RGBA"), self.reference_area)

    def prompt_image(self, image: Image.Image) -> PromptImage:
        """In front of white, where it is transparent."""
        fitted = self.fit_reference(image)
        shown = Image.new("RGB", fitted.size, "white")
        shown.paste(fitted, mask=fitted.getchannel("A"))
        return PromptImage.of(shown)

    def encode_images(self, vae: Any, pixel_values: Tensor) -> list[LatentMoments]:
        """With an opaque alpha, where there is none: the VAE has four channels."""
        if pixel_values.shape[1] == 3:
            pixel_values = torch.cat([pixel_values, torch.ones_like(pixel_values[:, :1])], dim=1)
        return super().encode_images(vae, pixel_values)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return super().decode_latents(vae, latents)[:, :3]

    def condition_on(self, prompts: Sequence[PromptEmbeds], references: Sequence[Sequence[Tensor]]) -> Conditioning:
        """As the contract has it, and `image_slots` (B, L) on the CPU, where the layout of the sequence is made."""
        padded = nn.utils.rnn.pad_sequence([row.tensors["image_slots"] for row in prompts], batch_first=True)
        return super().condition_on(prompts, references).with_tensors(image_slots=padded)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        slots = conditioning["image_slots"]
        fits = len(set(conditioning.num_tokens)) == 1 and bool((slots == slots[:1]).all())
        if not fits or not have_one_shape(conditioning.references):
            return self.predict_each(denoiser, noisy_latents, sigmas, conditioning)
        length, references = conditioning.num_tokens[0], zip(*conditioning.references, strict=True)
        images = [*(torch.stack(each) for each in references), noisy_latents.to(self.dtype)]
        shapes = tuple((1, *image.shape[-2:]) for image in images)
        output = denoiser(
            hidden_states=torch.cat([flatten(each) for each in images], dim=1),
            encoder_hidden_states=conditioning["prompt_embeds"][:, :length],
            timestep=sigmas,
            img_shapes=shapes,
            image_slots=tuple(slots[0, :length].tolist()),
        )[0]
        return output.mT.unflatten(-1, noisy_latents.shape[-2:])

    def training_shift(self, num_patches: int) -> float:
        """The network takes each latent by itself, so the scheduler counts four where sizes count one."""
        return super().training_shift(num_patches * self.spec.patch_size**2)

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        return QwenImage21Pipeline(self, denoiser, vae)


class QwenImage21Pipeline(GuidedFlowPipeline):
    """Encoder and VAE are shown each reference at one size, that of `QwenImage21.fit_reference`."""

    pack = staticmethod(flatten)
    family: QwenImage21

    def first_sigmas(self, num_steps: int) -> Sequence[float]:
        """Distilled weights name their own, for the number of steps that they were distilled for."""
        own = model_index(self.family.source).get("sample_sigmas") or ()
        return own if len(own) == num_steps else super().first_sigmas(num_steps)

    def fit_reference(self, image: Image.Image) -> Image.Image:
        return self.family.fit_reference(image)
