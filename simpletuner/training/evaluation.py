"""The stable eval loss: held-out images, fixed noise, fixed timesteps.

Training loss is mostly the luck of which timestep was drawn. Here each image is noised at the same quantiles of the
family's distribution with the same noise every time, so that two evaluations differ only by the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch, PromptEmbeds, Sample
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.diffusion.timesteps import fixed_quantiles
from simpletuner.errors import Stopping
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import keyed_generator
from simpletuner.training.batches import LatentSource, reference_latents
from simpletuner.training.step import compute_losses

EVAL_SEED = 0


@dataclass(frozen=True)
class EvalResult:
    """Losses of one evaluation.

    Args:
        by_dataset: dataset id -> mean over its images and timesteps.
        pooled: mean over all images of all datasets.
        by_quantile: (quantile, mean loss) over all images; quantiles of the family's distribution of sigmas.
    """

    by_dataset: Mapping[str, float]
    pooled: float
    by_quantile: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class EvalRow:
    """One image at one quantile: what one row of a forward pass judges.

    Args:
        position: of the sample in its dataset.
        quantile: index into the evaluator's quantiles.
    """

    position: int
    sample: Sample
    quantile: int


class Evaluator:
    """Evaluates live weights without touching training's randomness or mode.

    Args:
        datasets: the entries of dataset_type eval.
        sources: dataset id -> latents.
        is_stopping: asked before each forward pass; every process must get the same answer.
    """

    def __init__(
        self,
        family: ModelFamily,
        datasets: Sequence[Dataset],
        sources: Mapping[str, LatentSource],
        config: TrainConfig,
        is_stopping: Callable[[], bool] = lambda: False,
    ):
        self.family = family
        self.datasets = list(datasets)
        self.sources = sources
        self.num_images = config.evaluation.num_eval_images  # of each dataset, in path order
        self.quantiles = fixed_quantiles(config.evaluation.eval_timesteps)
        # Rows per forward pass; part of what is fixed, since it may change the last bits.
        self.batch_size = config.training.train_batch_size
        # The model sees one reference of an image, where it has several: always the first here.
        self.one_reference = config.data.conditioning_multidataset_sampling == "random"
        self.is_stopping = is_stopping

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able: what decides a loss beside the weights. Losses of another one are not comparable."""
        fingerprints = sorted(dataset.fingerprint for dataset in self.datasets)
        facts = {"datasets": fingerprints, "images": self.num_images, "timesteps": len(self.quantiles)}
        return {**facts, "references": "first"} if self.one_reference else facts

    def run(self, denoiser: nn.Module) -> EvalResult | None:
        """Evaluate; None where the run was asked to stop meanwhile, since half of a loss is none.

        Raises what the denoiser raises.
        """
        was_training = denoiser.training
        denoiser.eval()
        try:
            with torch.no_grad():
                losses = {dataset.id: self._dataset_losses(denoiser, dataset) for dataset in self.datasets}
        except Stopping:
            return None
        finally:
            denoiser.train(was_training)
        pooled = torch.cat(list(losses.values()))
        by_quantile = pooled.mean(dim=0).tolist()
        return EvalResult(
            by_dataset={dataset_id: float(rows.mean()) for dataset_id, rows in losses.items()},
            pooled=float(pooled.mean()),
            by_quantile=list(zip(self.quantiles.tolist(), by_quantile, strict=True)),
        )

    def _dataset_losses(self, denoiser: nn.Module, dataset: Dataset) -> Tensor:
        """(images, timesteps) loss of each image at each quantile."""
        usable = sorted(int(index) for members in dataset.buckets.values() for index in members)
        positions = usable[: self.num_images]
        samples = dataset.samples.take(positions)
        each = zip(positions, samples, strict=True)
        rows = [EvalRow(position, sample, index) for position, sample in each for index in range(len(self.quantiles))]
        losses: list[float] = []
        start = 0
        while start < len(rows):
            if self.is_stopping():
                raise Stopping
            chunk = _same_size_run(rows[start : start + self.batch_size])
            losses += self._chunk_losses(denoiser, dataset, chunk)
            start += len(chunk)
        return torch.tensor(losses, dtype=torch.float64).reshape(len(samples), len(self.quantiles))

    def _references(self, sample: Sample) -> Sequence[Sample]:
        return sample.references[:1] if self.one_reference else sample.references

    def _prompt_embeds(
        self, dataset: Dataset, samples: Sequence[Sample], references: Sequence[Sequence[Sample]]
    ) -> list[PromptEmbeds]:
        """Of the first caption of each sample."""
        files = dataset.prompt_files
        if files is None:
            captions = [sample.captions[0] for sample in samples]
            return self.family.prompts.embeds(captions, dataset.prompt_images(references))
        return [files.read(row.files[0]) for row in files.take(samples)]

    def _chunk_losses(self, denoiser: nn.Module, dataset: Dataset, rows: list[EvalRow]) -> list[float]:
        samples = [row.sample for row in rows]
        latents = torch.stack(self.sources[dataset.id].latents(samples))
        generators = [keyed_generator(EVAL_SEED, "eval noise", row.sample.digest, row.quantile) for row in rows]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        shown = [self._references(sample) for sample in samples]
        batch = Batch(
            latents=latents,
            prompt_embeds=self._prompt_embeds(dataset, samples, shown),
            slots=range(len(rows)),
            digests=[sample.digest for sample in samples],
            loss_weights=torch.ones(len(rows)),
            dataset_id=dataset.id,
            references=reference_latents(self.sources, shown),
            masks=_masks(dataset, rows, (latents.shape[-2], latents.shape[-1])),
            samples=samples,
        )
        quantiles = self.quantiles[[row.quantile for row in rows]]
        return compute_losses(self.family, denoiser, batch, noise, quantiles).per_sample.tolist()


def _masks(dataset: Dataset, rows: Sequence[EvalRow], size: tuple[int, int]) -> Tensor | None:
    """(B, 1, h, w) where the loss counts, as in training but always; None where the dataset has no masks."""
    if dataset.masks is None:
        return None
    return torch.stack([dataset.masks.weights(row.position, row.sample, size) for row in rows])


def _same_size_run(rows: list[EvalRow]) -> list[EvalRow]:
    """The leading rows whose images have one size, since a batch has one."""
    first = rows[0].sample.crop
    size = (first.height, first.width)
    count = 0
    while count < len(rows) and (rows[count].sample.crop.height, rows[count].sample.crop.width) == size:
        count += 1
    return rows[:count]


def best_step(losses: Mapping[int, float]) -> int:
    """The trained step with the lowest eval loss, the earliest of equals; step 0 only where there is no other."""
    trained = {step: loss for step, loss in losses.items() if step > 0 and math.isfinite(loss)} or losses
    return min(trained, key=lambda step: (trained[step], step))


def evaluations_without_gain(losses: Mapping[int, float]) -> int:
    """How many of the last evaluations in a row brought no loss below all that came before them."""
    lowest, count = math.inf, 0
    for step in sorted(losses):
        count = 0 if losses[step] < lowest else count + 1
        lowest = min(lowest, losses[step])
    return count


def losses_as_json(losses: Mapping[int, float]) -> dict[str, float | None]:
    """Step -> eval loss as JSON holds it: a loss that is not finite is null."""
    return {str(step): loss if math.isfinite(loss) else None for step, loss in losses.items()}


def losses_from_json(losses: Mapping[str, float | None], until: int | None = None) -> dict[int, float]:
    """What `losses_as_json` gave, up to step `until`."""
    known = {int(step): math.nan if loss is None else float(loss) for step, loss in losses.items()}
    return {step: loss for step, loss in known.items() if until is None or step <= until}
