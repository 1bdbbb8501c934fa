"""What travels from the data to the training step: samples, prompt embeddings, batches.

These are plain containers. They hold tensors of any device and know nothing of families, files or losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class Crop:
    """How an image becomes pixels: resize to `intermediate`, cut `target` out at (`top`, `left`). All in pixels."""

    intermediate_height: int
    intermediate_width: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    """One usable image of a dataset.

    Args:
        dataset_id: `id` of the dataset entry.
        path: path relative to the dataset's root, `/`-separated.
        digest: sha256 of the file's bytes (hex); the identity of the content.
        width: pixels after EXIF orientation.
        height: pixels after EXIF orientation.
        captions: every caption variant that the caption strategy found; at least one, none for references.
        crop: what is cut out of the image.
        is_flipped: mirrored left to right after the cut.
        references: the reference images of edit training, in the order in which the model sees them.
    """

    dataset_id: str
    path: str
    digest: str
    width: int
    height: int
    captions: tuple[str, ...]
    crop: Crop
    is_flipped: bool = False
    references: tuple[Sample, ...] = ()

    def mirrored(self) -> Sample:
        """The same images the other way round, references too."""
        references = tuple(reference.mirrored() for reference in self.references)
        return replace(self, is_flipped=not self.is_flipped, references=references)


def _no_image() -> Image:
    raise ValueError("only the size of this reference image is known")


@dataclass(frozen=True)
class PromptImage:
    """A reference image as it is given to the encoders of its prompt, of which most ask for its size alone.

    Args:
        height: pixels.
        width: pixels.
        content: tells images apart: a digest of what is shown.
        load: gives the image, RGB and of this size.
    """

    height: int
    width: int
    content: str = ""
    load: Callable[[], Image] = field(default=_no_image, compare=False, repr=False)

    @classmethod
    def of(cls, image: Image) -> PromptImage:
        """An image that is in memory; its pixels are its content."""
        image = image.convert("RGB")
        content = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return cls(image.height, image.width, content, lambda: image)


@dataclass(frozen=True)
class PromptRequest:
    """What is encoded: a text, and the reference images that the encoders see with it."""

    text: str
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True)
class PromptEmbeds:
    """What one prompt became: named tensors of one sample, without a batch axis, unpadded, so that it can be cached.

    Families choose the names: OmniGen `input_ids` (L,), SDXL `prompt_embeds` (L, D) and `pooled_prompt_embeds` (D,).
    """

    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Args:
        latents: (B, C, h, w) float32, scaled and shifted: buckets give a batch one size.
        prompt_embeds: B entries.
        references: per sample the latents of its reference images, (C, h, w) each; empty where there are none.
        slots: index of each sample in the global batch of its optimizer step; keys its noise and timestep.
        digests: content digest of each sample; keys the fixed noise of the eval loss.
        loss_weights: (B,) float32; 0 for a sample that only fills up a short batch.
        masks: (B, 1, h, w) in [0, 1] or None: where the loss counts.
        dataset_id: all samples of a batch come from one dataset.
        is_regularisation: the target is the base model's own prediction (prior preservation).
        captions: the caption that was drawn for each sample, for reports.
        samples: where each row comes from, for families that see sizes and crops; empty where there is no image.
    """

    latents: torch.Tensor
    prompt_embeds: Sequence[PromptEmbeds]
    slots: Sequence[int]
    digests: Sequence[str]
    loss_weights: torch.Tensor
    dataset_id: str
    references: Sequence[Sequence[torch.Tensor]] = field(default_factory=list)
    masks: torch.Tensor | None = None
    is_regularisation: bool = False
    captions: Sequence[str] = field(default_factory=list)
    samples: Sequence[Sample] = ()

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is given beside noisy latents and sigmas, for all samples of a batch and on the device.

    Args:
        tensors: (B, ...) each, under the names that the family's `collate` chose.
        references: per sample the latents of its reference images, (C, h, w) each, of any size.
        num_tokens: per sample the tokens of its prompt before padding, for networks that are wrong on padded rows.
    """

    tensors: Mapping[str, torch.Tensor]
    references: Sequence[Sequence[torch.Tensor]] = ()
    num_tokens: Sequence[int] = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def row(self, index: int) -> Conditioning:
        """One sample, as a batch of its own."""
        one = slice(index, index + 1)
        tensors = {name: tensor[one] for name, tensor in self.tensors.items()}
        return Conditioning(tensors, self.references[one], self.num_tokens[one])

    def with_tensors(self, **tensors: torch.Tensor) -> Conditioning:
        """The same with further tensors."""
        return replace(self, tensors={**self.tensors, **tensors})
