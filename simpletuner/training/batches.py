"""From the sampler's plan to batches of tensors, one accumulation window at a time.

A window is a pure function of (epoch, position, optimizer step): it can be prepared ahead of time in a thread without
changing what the model sees.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.batch import Batch, PromptEmbeds, Sample
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.data.sampler import BatchPlan, Sampler, range_for_rank
from simpletuner.diffusion.loss import sample_weights
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import keyed_seed, keyed_uniform

# A thread beside the model's costs the model's some milliseconds of waiting for the interpreter at each step. Windows
# that are built from memory are quicker than that; those that read disks or encode images are not.
WORTH_A_THREAD_SECONDS = 0.003


class LatentSource(Protocol):
    """Gives the scaled latents of a sample; the VAE cache, on disk or on demand."""

    def latents(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """(C, h, w) float32 of each sample, scaled and shifted."""
        ...

    def close(self) -> None:
        """Write what was encoded on demand and is not written yet."""


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, where the data stand after it, and the epochs done before and after.

    Args:
        num_slots: samples of the global batch of the step, those of the other processes included.
    """

    step: int
    batches: list[Batch]
    next_epoch: int
    next_position: int
    epochs_before: Fraction = Fraction(0)
    epochs_after: Fraction = Fraction(0)
    num_slots: int = 0

    @property
    def weight(self) -> float:
        """What all samples of the window count together; the loss of the step is normalized by it."""
        weights = [sample_weights(batch.loss_weights, batch.masks).sum() for batch in self.batches]
        return max(float(sum(weights)), 1e-12)

    @property
    def num_samples(self) -> int:
        """Without what only fills up a batch for a process that has no sample of its own."""
        return sum(int(batch.loss_weights.count_nonzero()) for batch in self.batches)


class BatchSource:
    """Builds windows in the sampler's order and prepares the next one while the model works.

    Args:
        sources: dataset id -> where its latents come from.
        process_group: this process takes its part of each global batch.
    """

    def __init__(
        self,
        family: ModelFamily,
        datasets: Sequence[Dataset],
        sources: Mapping[str, LatentSource],
        sampler: Sampler,
        config: TrainConfig,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ):
        options = config.training
        self.family = family
        self.datasets = {dataset.id: dataset for dataset in datasets}
        self.sources = sources
        self.sampler = sampler
        self.process_group = process_group
        self.seed = options.seed
        self.accumulation = options.gradient_accumulation_steps
        self.dropout = options.caption_dropout_probability
        own = options.reference_dropout_probability
        self.reference_dropout = float(family.spec.drops_references) if own is None else own
        self.masking = options.masked_loss_probability
        self.samples_reference = config.data.conditioning_multidataset_sampling == "random"
        self.weighs_by_size = config.objective.loss_balance == "pixels"
        self._build_seconds = 0.0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int, int], Future[Window]] | None = None

    def window(self, step: int, epoch: int, position: int) -> Window:
        """The window that starts at (epoch, position): the one begun by `begin_next`, or built now."""
        key = (step, epoch, position)
        if self._ahead is not None and self._ahead[0] == key:
            return self._ahead[1].result()
        return self.build_window(*key)

    def begin_next(self, window: Window) -> None:
        """Begin the window after `window` in the background, where that pays."""
        if self._build_seconds < WORTH_A_THREAD_SECONDS:
            return
        ahead = (window.step + 1, window.next_epoch, window.next_position)
        if self._ahead is None or self._ahead[0] != ahead:
            self._ahead = (ahead, self._executor.submit(self.build_window, *ahead))

    def build_window(self, step: int, epoch: int, position: int) -> Window:
        """Build a window without looking ahead."""
        started = time.perf_counter()
        batches: list[Batch] = []
        slot = 0
        epochs_before = self.sampler.epochs_at(epoch, position)
        for _ in range(self.accumulation):
            epoch, position = self.sampler.seek(epoch, position, step)
            plan = self.sampler.batch(epoch, position)
            batches.append(self.build_batch(*self.own_part(plan), step, slot))
            slot += len(plan.sample_indices)
            epoch, position = self.sampler.after(epoch, position)
        self._build_seconds = time.perf_counter() - started
        return Window(step, batches, epoch, position, epochs_before, self.sampler.epochs_at(epoch, position), slot)

    def own_part(self, plan: BatchPlan) -> tuple[BatchPlan, range]:
        """What this process takes of a global batch, and where in it that is.

        Each process takes one at least, so that all call the denoiser equally often; one too many counts nothing.
        """
        if self.process_group.size == 1:
            return plan, range(len(plan.sample_indices))
        padded = self.sampler.batch(plan.epoch, plan.position, pad_to=self.process_group.size)
        part = range_for_rank(len(padded.sample_indices), self.process_group.rank, self.process_group.size)
        num_real = min(max(padded.num_real - part.start, 0), len(part))
        return replace(padded, sample_indices=padded.sample_indices[part.start : part.stop], num_real=num_real), part

    def build_batch(self, plan: BatchPlan, part: range, step: int, first_slot: int) -> Batch:
        """Latents, masks, captions and prompt embeddings of a plan.

        Args:
            part: places of its samples in the global micro-batch.
            first_slot: of the global micro-batch in the global batch of the step.
        """
        dataset = self.datasets[plan.dataset_id]
        samples = dataset.samples.take(plan.sample_indices, plan.round_number)
        slots = [first_slot + place for place in part]
        latents = torch.stack(self.sources[dataset.id].latents(samples))
        if self.family.device.type == "cuda":
            latents = latents.pin_memory()  # here, beside the model's work
        captions = [self.caption(dataset, sample, step, slot) for sample, slot in zip(samples, slots, strict=True)]
        shown = [self.references(sample, step, slot) for sample, slot in zip(samples, slots, strict=True)]
        return Batch(
            latents=latents,
            prompt_embeds=self.prompt_embeds(dataset, samples, captions, shown, step, slots),
            slots=slots,
            digests=[sample.digest for sample in samples],
            loss_weights=torch.tensor(plan.loss_weights) * (latents[0][0].numel() if self.weighs_by_size else 1),
            dataset_id=dataset.id,
            references=reference_latents(self.sources, shown),
            masks=self.masks(dataset, plan, samples, latents, step, slots),
            is_regularisation=dataset.is_regularisation,
            captions=captions,
            samples=samples,
        )

    def masks(
        self, dataset: Dataset, plan: BatchPlan, samples: Sequence[Sample], latents: Tensor, step: int, slots: list[int]
    ) -> Tensor | None:
        """(B, 1, h, w) where the loss counts; all of an image where its mask does not apply. Keyed like the noise."""
        if dataset.masks is None:
            return None
        height, width = latents.shape[-2:]
        rows = []
        for index, sample, slot in zip(plan.sample_indices, samples, slots, strict=True):
            counts = keyed_uniform(self.seed, "masked loss", step, slot) < self.masking
            whole = torch.ones(1, height, width)
            rows.append(dataset.masks.weights(index, sample, (height, width)) if counts else whole)
        return torch.stack(rows)

    def caption(self, dataset: Dataset, sample: Sample, step: int, slot: int) -> str:
        """One caption variant, or the family's empty caption where it is dropped."""
        if self.drops_caption(step, slot):
            return self.family.spec.dropped_caption
        return dataset.caption_for(sample, self.seed, step, slot)

    def prompt_embeds(
        self,
        dataset: Dataset,
        samples: Sequence[Sample],
        captions: Sequence[str],
        references: Sequence[Sequence[Sample]],
        step: int,
        slots: Sequence[int],
    ) -> list[PromptEmbeds]:
        """Of `captions`: what the family's prompts give, or what the files of the dataset hold."""
        images = dataset.prompt_images(references)
        if dataset.prompt_files is None:
            return self.family.prompts.embeds(captions, images)
        rows = []
        for place, (sample, row) in enumerate(zip(samples, dataset.prompt_files.take(samples), strict=True)):
            if not self.drops_caption(step, slots[place]):
                rows.append(dataset.prompt_files.embeds(row, sample, self.seed, step, slots[place]))
            elif row.dropped is not None:
                rows.append(dataset.prompt_files.read(row.dropped))
            else:
                rows += self.family.prompts.embeds([captions[place]], [images[place]])
        return rows

    def references(self, sample: Sample, step: int, slot: int) -> Sequence[Sample]:
        """The references that the model sees: all, a drawn one, or none, where they are dropped with the caption."""
        references = sample.references
        if self.drops_caption(step, slot) and self.drops_references(step, slot):
            return ()
        if self.samples_reference and references:
            return (references[keyed_seed(self.seed, "reference", step, slot) % len(references)],)
        return references

    def drops_caption(self, step: int, slot: int) -> bool:
        """Whether the caption of a slot is dropped; keyed like the noise."""
        return bool(self.dropout) and keyed_uniform(self.seed, "caption dropout", step, slot) < self.dropout

    def drops_references(self, step: int, slot: int) -> bool:
        """Whether the references of a slot are dropped where its caption is."""
        return keyed_uniform(self.seed, "reference dropout", step, slot) < self.reference_dropout

    def close(self) -> None:
        """Stop preparing windows, which hold no state, and let the sources write what they have."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        for source in self.sources.values():
            source.close()


def reference_latents(
    sources: Mapping[str, LatentSource], references: Sequence[Sequence[Sample]]
) -> list[list[Tensor]]:
    """Per sample the latents of its references, (C, h, w) each; an empty list where no sample has any."""
    if not any(references):
        return []
    return [[sources[each.dataset_id].latents([each])[0] for each in row] for row in references]
