"""A training run whose every number can be worked out by hand: two weights, images of two numbers, plain SGD.

The denoiser predicts its weights `w`, whatever it sees, and the target of an image is its two numbers `t`. The loss of
a sample is the mean of two squares, so its gradient is `w - t`; that of a window is `w` minus the weighted mean of `t`.
Everything between the configuration and the weights is the real code: sampler, batches, loop, placement, checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simpletuner.adapters.base import Adapter
from simpletuner.batch import Batch, Conditioning, Crop, PromptEmbeds, PromptImage, Sample
from simpletuner.config.loading import LoadedRun
from simpletuner.data.sampler import build_sampler
from simpletuner.data.schedule import Schedule
from simpletuner.distributed.placement import Replicated
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.models.family import ModelFamily
from simpletuner.optim.ema import EMA
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Event
from simpletuner.storage import save_tensors
from simpletuner.training.batches import BatchSource
from simpletuner.training.build import build_lr_factor
from simpletuner.training.checkpoint import Checkpoints
from simpletuner.training.evaluation import EvalResult
from simpletuner.training.loss_scale import LossScale
from simpletuner.training.progress import Progress
from simpletuner.training.resuming import total_train_steps
from simpletuner.training.run import Model, Run, Session
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from tests.unit.config.conftest import FAMILY, Workspace

OPTIONS = {
    "seed": 3,
    "train_batch_size": 1,
    "learning_rate": 0.5,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_train_steps": 3,
    "optimizer": "adamw",  # checked with the rest of the file; a toy run takes SGD instead
    "max_grad_norm": 0,
    "mixed_precision": "no",
    "caption_dropout_probability": 0.0,
    "validation_disable": True,
    "checkpoint_step_interval": 0,
    "report_to": "none",
}


class ToyDenoiser(nn.Module):
    """Predicts its two weights everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, noisy_latents: Tensor) -> Tensor:
        return self.weight.reshape(1, 2, 1, 1) + torch.zeros_like(noisy_latents)


@dataclass(frozen=True)
class ToyConditioning(Conditioning):
    """The whole batch, so that a test can look at what reached the model."""

    batch: Batch = None  # type: ignore[assignment]


class ToyFamily(ModelFamily):
    """Notes what it is asked, and answers NaN where it is reported to.

    Args:
        spoiled: forward passes of training, from 0, whose answer is NaN.
    """

    def __init__(self, spoiled: Sequence[int] = ()) -> None:
        super().__init__(FAMILY, None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
        self.spoiled = set(spoiled)
        self.batches: list[Batch] = []  # one for each forward pass with gradients
        self.draws: list[float] = []  # what a dropout inside the denoiser would have drawn there
        self.noisy: list[Tensor] = []
        self.sigmas: list[Tensor] = []

    def encode_prompts(self, prompts: Sequence[str], references: Any = None) -> list[PromptEmbeds]:
        return [PromptEmbeds({"length": torch.tensor([float(len(prompt))])}) for prompt in prompts]

    def collate(self, batch: Batch) -> ToyConditioning:
        return ToyConditioning({}, batch=batch)

    def make_target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return latents

    def predict(self, denoiser: nn.Module, noisy_latents: Any, sigmas: Tensor, conditioning: Any) -> Any:
        prediction = denoiser(noisy_latents)
        self.noisy.append(noisy_latents)
        self.sigmas.append(sigmas)
        if torch.is_grad_enabled():
            if len(self.batches) in self.spoiled:
                prediction = prediction * torch.nan
            self.batches.append(conditioning.batch)
            self.draws.append(float(torch.rand(1)))
        return prediction

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        raise AssertionError("a toy generates no images")


class ToyAdapter(Adapter):
    """Trains the denoiser's own two weights; without it they are zeros."""

    file_name = "toy.safetensors"

    def __init__(self, denoiser: ToyDenoiser) -> None:
        super().__init__([])
        self.denoiser = denoiser

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.denoiser.weight}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        kept = self.denoiser.weight.detach().clone()
        with torch.no_grad():
            self.denoiser.weight.zero_()
            yield
            self.denoiser.weight.copy_(kept)

    def save(self, path: Path, extra_metadata: Mapping[str, str], state: Mapping[str, Tensor] | None = None) -> None:
        save_tensors(path, state if state is not None else self.state_dict(), extra_metadata)


class ToySamples:
    """Images by name; `digest` is the name too."""

    def __init__(self, dataset_id: str, names: Sequence[str], captions: Sequence[str]) -> None:
        crop = Crop(8, 8, 0, 0, 8, 8)
        self.rows = [
            Sample(dataset_id, name, name, 8, 8, tuple(captions) or (f"caption of {name}",), crop) for name in names
        ]

    def take(self, positions: Sequence[int], round_number: int = 0) -> list[Sample]:
        return [self.rows[int(position)] for position in positions]


@dataclass
class ToyDataset:
    """What training asks a dataset for, in memory.

    Args:
        images: name -> its two numbers, in the order of names that the index would have.
        mask_of: name -> what its mask is everywhere; None has no masks.
    """

    images: Mapping[str, Sequence[float]]
    id: str = "toys"
    repeats: int = 0
    with_replacement: bool = False
    is_regularisation: bool = False
    batch_size: int | None = None
    schedule: Schedule = field(default_factory=Schedule)
    captions: Sequence[str] = ()
    mask_of: Mapping[str, float] | None = None
    fingerprint: str = "f"
    prompt_files: Any = None

    def __post_init__(self) -> None:
        self.samples = ToySamples(self.id, list(self.images), self.captions)
        self.buckets = {(8, 8): np.arange(len(self.images))}

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def masks(self) -> Any:
        return None if self.mask_of is None else SimpleNamespace(weights=self._mask)

    def _mask(self, index: int, sample: Sample, size: tuple[int, int]) -> Tensor:
        assert self.mask_of is not None
        return torch.full((1, *size), self.mask_of[sample.path])

    def buckets_in(self, round_number: int) -> Mapping[tuple[int, int], Any]:
        return self.buckets

    def prompt_images(self, rows: Sequence[Sequence[Sample]]) -> list[tuple[PromptImage, ...]]:
        return [tuple(PromptImage(each.crop.height, each.crop.width, each.digest) for each in row) for row in rows]

    def caption_for(self, sample: Sample, *key: int | str) -> str:
        return sample.captions[0]


class ToySource:
    """The latents of an image: its two numbers."""

    def __init__(self, images: Mapping[str, Sequence[float]]) -> None:
        self.images = images

    def latents(self, samples: Sequence[Sample]) -> list[Tensor]:
        return [torch.tensor(self.images[sample.path]).reshape(2, 1, 1) for sample in samples]

    def close(self) -> None:
        """There is nothing to write."""


class ToyEvaluator:
    """Gives eval losses from a list, one after the other."""

    identity: Mapping[str, Any] = {"datasets": ["toys"]}

    def __init__(self, losses: Sequence[float]) -> None:
        self.losses = list(losses)

    def run(self, denoiser: nn.Module) -> EvalResult:
        loss = self.losses.pop(0)
        return EvalResult({"held_out": loss}, loss, [(0.5, loss)])


class Recorder:
    """Keeps all events."""

    name = "recorder"
    failures = ()

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """There is nothing to close."""

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def load_toy(folder: Path, **options: Any) -> LoadedRun:
    """A real configuration, all rules asked."""
    work = Workspace(folder)
    (folder / "datasets" / "images").mkdir(parents=True, exist_ok=True)
    (folder / "datasets" / "held_out").mkdir(exist_ok=True)
    work.config |= OPTIONS | options
    work.datasets.append({"id": "held_out", "dataset_type": "eval", "instance_data_dir": "datasets/held_out"})
    return work.load_written()


def toy_run(
    folder: Path,
    images: Mapping[str, Sequence[float]] | Sequence[ToyDataset],
    *,
    spoiled: Sequence[int] = (),
    losses: Sequence[float] = (),
    process_group: ProcessGroup = SINGLE_PROCESS,
    optimizer: Any = None,
    optimizer_name: str | None = None,
    **options: Any,
) -> tuple[Run, Recorder]:
    """A run that has not begun, and what it will report.

    Args:
        images: of one dataset, or the datasets.
        spoiled: forward passes that answer NaN.
        losses: what the evaluations will give, where there are any.
        optimizer: parameters and learning rate -> an optimizer; SGD.
        optimizer_name: what the configuration says.
    """
    loaded = load_toy(folder, **options | ({"optimizer": optimizer_name} if optimizer_name else {}))
    (folder / "output").mkdir(exist_ok=True)
    datasets = [ToyDataset(images)] if isinstance(images, Mapping) else list(images)
    family, denoiser, recorder = ToyFamily(spoiled), ToyDenoiser(), Recorder()
    adapter = ToyAdapter(denoiser)
    parameters = adapter.trainable_parameters()
    sampler = build_sampler(loaded.config, datasets, process_group.size)  # type: ignore[arg-type]
    sources: Any = {dataset.id: ToySource(dataset.images) for dataset in datasets}
    total = total_train_steps(loaded.config.training, sampler)
    config = loaded.config
    run = Run(
        loaded=loaded,
        seed=config.training.seed,
        model=Model(
            family=family,
            denoiser=denoiser,
            adapter=adapter,
            placement=Replicated(parameters, process_group),
            optimizer=(optimizer or torch.optim.SGD)(list(parameters.values()), lr=123.0),  # set again before each step
            lr_factor=build_lr_factor(config, total, process_group),
            ema=EMA(parameters, config.training.ema_decay, config.training.ema_update_interval)
            if config.training.use_ema
            else None,
        ),
        progress=Progress(loss_scale=LossScale.of(config.precision.mixed_precision)),
        session=Session(
            guard=FolderGuard(folder / "output"),
            bus=EventBus([recorder]),
            stop=StopRequest(),
            process_group=process_group,
            cache_dir=Path(config.data.cache_dir),
            checkpoints=Checkpoints(folder / "output", config.checkpoint.checkpoints_total_limit),
            pauses_on_full_disk=config.checkpoint.pause_on_full_disk,
        ),
        batches=BatchSource(family, datasets, sources, sampler, config, process_group),  # type: ignore[arg-type]
        evaluator=ToyEvaluator(losses) if losses else None,  # type: ignore[arg-type]
        validator=None,
        max_train_steps=total,
    )
    return run, recorder


def weights_of(run: Run) -> list[float]:
    return run.model.adapter.state_dict()["weight"].tolist()
