"""Hunyuan-DiT for the shared trainer: BERT and mT5 with fixed lengths, and v of a discrete schedule.

The network is given t = 0 ... 999 and predicts v in the first four of eight channels; the other four were a variance,
which nothing here trains or reads (`pipeline_hunyuandit.py`, denoising loop). Its text is always 77 and 256 tokens
long: a learned padding stands where the masks are 0, but the pooled vector is of all 256 states of mT5.

Sizes of images are (width, height), as the weights of 1.1 were trained with (Tencent/HunyuanDiT,
`hydit/data_loader/arrow_load_stream.py`); diffusers' pipeline has the target the other way round by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers import hunyuan_transformer_2d
from diffusers.pipelines.hunyuandit import pipeline_hunyuandit as published
from torch import Tensor, nn

from simpletuner.batch import Batch, Conditioning, PromptEmbeds, Sample
from simpletuner.models.discrete import DiscreteFamily
from simpletuner.models.family import PromptReferences, send
from simpletuner.models.live_pipeline import LivePipeline
from simpletuner.models.size_conditioned_unet import time_ids

BERT_TOKENS = 77
# Pixels of the side to which the rotary table is scaled (`pipeline_hunyuandit.py`, step 7).
BASE_SIZE = 512
# The inputs of a block after the first one, in the order of its forward pass.
_NAMES = ("encoder_hidden_states", "temb", "image_rotary_emb", "skip")


class HunyuanDiT(DiscreteFamily):
    """Embeddings are padded, with their masks; `_2` are those of mT5."""

    @property
    def architecture(self) -> str:
        is_given_sizes = self.denoiser_config.get("use_style_cond_and_image_meta_size", True)
        return f"hunyuan-dit-v{'1.1' if is_given_sizes else '1.2'}"

    def load_denoiser(self) -> nn.Module:
        return prepare(super().load_denoiser())

    def empty_denoiser(self) -> nn.Module:
        return prepare(super().empty_denoiser())

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer_2", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (77, D) and `prompt_embeds_2` (256, D), and their masks (77,) and (256,)."""
        self.encoders.note_cut_prompts("tokenizer_2", prompts, self.max_prompt_tokens)
        rows: list[dict[str, Tensor]] = [{} for _ in prompts]
        for suffix, length in (("", BERT_TOKENS), ("_2", self.spec.max_prompt_tokens)):
            ids, mask = self.encoders.tokenize(f"tokenizer{suffix}", prompts, length)
            with torch.no_grad():
                states = self.encoders.encoder(f"text_encoder{suffix}")(ids, attention_mask=mask)[0]
            for row, embeds, kept in zip(rows, states.cpu(), mask.cpu(), strict=True):
                row |= {f"prompt_embeds{suffix}": embeds.clone(), f"prompt_attention_mask{suffix}": kept.clone()}
        return [PromptEmbeds(row) for row in rows]

    def collate(self, batch: Batch) -> Conditioning:
        """Also `image_meta_size` (B, 6): original size, size of the crop, its upper left corner; across, then down."""
        height, width = (side * self.spec.vae_factor for side in batch.latents.shape[-2:])
        rows = [meta_size(sample) for sample in batch.samples] or [(width, height, width, height, 0, 0)] * len(batch)
        sizes = send(torch.tensor(rows, dtype=torch.float32), self.device)
        return super().collate(batch).with_tensors(image_meta_size=sizes)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        style = torch.zeros(len(noisy_latents), dtype=torch.long, device=noisy_latents.device)
        output = denoiser(
            noisy_latents.to(self.dtype),
            self.schedule.timesteps(sigmas).float(),
            encoder_hidden_states=conditioning["prompt_embeds"],
            text_embedding_mask=conditioning["prompt_attention_mask"],
            encoder_hidden_states_t5=conditioning["prompt_embeds_2"],
            text_embedding_mask_t5=conditioning["prompt_attention_mask_2"],
            image_meta_size=conditioning["image_meta_size"],
            style=style,
            image_rotary_emb=self.rotary_table(*noisy_latents.shape[-2:]),
            return_dict=False,
        )[0]
        return output[:, : noisy_latents.shape[1]]

    def rotary_table(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (h/2 * w/2, head size) for h x w latents; the longer side counts from 0 to 32."""
        patch = self.denoiser_config["patch_size"]
        grid = height // patch, width // patch
        region = published.get_resize_crop_region_for_grid(grid, BASE_SIZE // self.spec.vae_factor // patch)
        table = get_2d_rotary_pos_embed(
            self.denoiser_config["attention_head_dim"], region, grid, device=torch.device("cpu"), output_type="pt"
        )
        return send(table[0], self.device), send(table[1], self.device)

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        return LivePipeline.of(self, HunyuanDiTPipeline, denoiser, vae, requires_safety_checker=False)


class HunyuanDiTPipeline(published.HunyuanDiTPipeline):
    """diffusers' pipeline, under its name: images of the size that is asked for, latents and times in float32."""

    def __call__(self, **options: Any) -> Any:
        options = {"target_size": (options["width"], options["height"]), **options, "use_resolution_binning": False}
        return super().__call__(**options)

    def prepare_latents(self, *arguments: Any) -> Tensor:
        arguments = (*arguments[:4], torch.float32, *arguments[5:])  # the fifth is their dtype
        return super().prepare_latents(*arguments).float()


def meta_size(sample: Sample) -> tuple[int, ...]:
    """Original width and height, width and height of the crop, left and top of the crop in the resized image."""
    height, width, top, left, crop_height, crop_width = time_ids(sample)
    return width, height, crop_width, crop_height, left, top


class HunyuanDiTBlock(hunyuan_transformer_2d.HunyuanDiTBlock):
    """The denoiser calls it by keywords; gradient checkpointing, which then comes between, by position.

    diffusers' `enable_gradient_checkpointing` sets both attributes.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        if named and self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self, *inputs, *(named.get(name) for name in _NAMES))
        return super().__call__(*inputs, **named)


def prepare(denoiser: Any) -> nn.Module:
    """Let the denoiser's blocks be recomputed, and its time and sizes come in float32; returns the denoiser."""
    for block in denoiser.blocks:
        block.__class__ = HunyuanDiTBlock
    denoiser._supports_gradient_checkpointing = True
    denoiser.time_extra_emb.register_forward_pre_hook(_embed_in_the_dtype_of_weights, with_kwargs=True)
    # Sampling keeps its latents in float32, and its times with them.
    denoiser.pos_embed.register_forward_pre_hook(lambda embed, inputs: (inputs[0].to(embed.proj.weight.dtype),))
    return denoiser


def _embed_in_the_dtype_of_weights(module: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The denoiser takes the dtype of its time for that of the weights, and bfloat16 knows no 999."""
    return inputs, {**named, "hidden_dtype": module.pooler.positional_embedding.dtype}
