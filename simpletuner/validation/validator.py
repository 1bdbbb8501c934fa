"""Generates the validation images of a run from the live weights: base (once), current, EMA, and the sheets of them.

Nothing of it reaches training: images have generators of their own, the global generators and the mode of every
module are put back, and a failure costs the images, not the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from simpletuner.config.prompt_library import LibraryPrompt
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.errors import ConfigError, DataError, Problem, SimpleTunerError, Stopping
from simpletuner.models.lazy_vae import LazyVae
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import (
    ImagesMade,
    ImagesScored,
    Notice,
    PhaseDone,
    PhaseProgress,
    PhaseStarted,
    SavedImage,
)
from simpletuner.validation.clip_score import DEFAULT_MODEL, ClipScorer
from simpletuner.validation.files import ImageFiles, Kind
from simpletuner.validation.isolation import undisturbed
from simpletuner.validation.previews import Previews
from simpletuner.validation.prompts import ImageRequest, requests_from_config, reseeded
from simpletuner.validation.references import ReferenceImage
from simpletuner.validation.sampling import (
    GeneratedImage,
    Watch,
    batch_size_for,
    make_images,
    noise_device,
    pipeline_for,
)

if TYPE_CHECKING:
    from simpletuner.config.options import TrainConfig
    from simpletuner.models.family import ModelFamily

# What an image can cause: no memory, a driver's or sampler's complaint, a full disk, a model that is gone. Mistakes of
# this program (a missing attribute, a wrong type, a failed assertion) are none of these, and end the run with a
# traceback: images that silently stopped would be found days later.
IMAGE_FAILURES = (RuntimeError, OSError, ValueError, DataError, ConfigError)
# Those that one process may meet alone, in the middle of an image.
ONE_SIDED_FAILURES = (RuntimeError, OSError, DataError)


class Validator:
    """Validation of one run.

    Args:
        config: the validation options, `model_type`, `mixed_precision`.
        prompt_library: nickname -> prompt, or None.
        output_dir: images go to `validation_images/` and `benchmarks/base_model/` in it.
        references: input images of prompts that name none of their own.
        is_stopping: asked before each denoising step and before scores; where it says yes, the rest is left off.
        together: the processes that generate together, since each holds a part of the denoiser: all do the same, and
            leave off together; only the main one shows previews and scores.

    Attributes:
        requests: the images of one validation; empty where no prompt is set.

    Raises:
        ConfigError: a size is too large for the family.
        DataError: the model of previews or scores cannot be loaded.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: ModelFamily,
        prompt_library: Mapping[str, LibraryPrompt] | None,
        output_dir: Path,
        bus: EventBus,
        references: tuple[ReferenceImage, ...] = (),
        is_stopping: Callable[[], bool] = lambda: False,
        together: ProcessGroup = SINGLE_PROCESS,
    ):
        self.config = config
        self.family = family
        self.bus = bus
        self.is_stopping = is_stopping
        self.together = together
        self.requests, notices = requests_from_config(
            config,
            prompt_library,
            family.spec.size_multiple,
            family.largest_side(),
            family.spec.dropped_caption,
            references,
        )
        settings = {
            "model": family.source.model,
            "vae": family.source.vae,
            **({"text_encoders": dict(family.source.encoders)} if family.source.encoders else {}),
            **family.prompt_settings,
            "revision": family.source.revision,
            "scheduler": config.validation.validation_noise_scheduler,
            "seed_source": config.validation.validation_seed_source,
            "base_model_precision": config.precision.base_model_precision,
        }
        self.files = ImageFiles(Path(output_dir), self.requests, settings)
        self._vae = LazyVae(family)
        is_shown = bool(self.requests) and together.is_main
        self._previews = self._make_previews() if is_shown and config.validation.validation_preview else None
        self._scorer = self._make_scorer() if is_shown and config.evaluation.evaluation_type == "clip" else None
        for line in notices:
            bus.emit(Notice("warning", line))

    def run(self, denoiser: nn.Module, adapter: Any, ema: Any | None, step: int) -> list[Path]:
        """Generate what is due at `step`; paths of the new files, sheet last.

        Step 0 generates the base model's images (the benchmark), and the first validation after it where they are
        missing. A failure that the outside world can cause is reported and leaves training as it was.
        """
        if not self.requests:
            return []
        started, name = time.monotonic(), f"images at step {step}"
        saved: list[SavedImage] = []
        generated: dict[Kind, list[GeneratedImage]] = {}
        with self._costing_only(name), undisturbed(denoiser, self.family.device, self.config.precision.mixed_precision):
            saved, generated = self._generate_all(denoiser, adapter, ema, step, name)
        if saved:
            self.bus.emit(PhaseDone(name, time.monotonic() - started, f"in {saved[-1].path.parent}"))
            self.bus.emit(ImagesMade(step, tuple(saved)))
        if generated and self._scorer is not None:
            with self._costing_only(f"scores at step {step}"):
                self._emit_scores(self._scorer, generated, step)
        return [image.path for image in saved]

    def has_generated(self, step: int, ema: Any | None = None) -> bool:
        """Whether all images of `step` and their sheet are there: those of a run that was killed over them are not."""
        return self.together.from_main(self.files.has_step(step, self._step_kinds(ema)))

    def write_summaries(self, step: int) -> dict[str, Path]:
        """The sheets of a whole run, by what they are; none where `step` has no images."""
        sheets = {
            "images before and after": self.files.write_before_after(step),
            "images at all steps": self.files.write_all_steps(step),
        }
        return {name: path for name, path in sheets.items() if path is not None}

    @contextmanager
    def _costing_only(self, what: str) -> Iterator[None]:
        """A failure that an image can cause is reported, and costs only `what`."""
        try:
            yield
        except Stopping:
            # A machine that is taken away does not wait for thirty images.
            self._vae.free()
            self.bus.emit(Notice("info", f"no {what}: the run is asked to stop"))
        except NotImplementedError:
            raise  # a subclass of RuntimeError that only our own mistakes raise
        except IMAGE_FAILURES as error:
            self._vae.free()
            self.bus.emit(Notice("error", f"no {what}: {error}; training continues"))

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """What fails in one of the processes that generate together fails in all: none goes on alone."""
        failure: Exception | None = None
        try:
            yield
        except IMAGE_FAILURES as error:
            failure = error
        if self.together.any(failure is not None):
            raise failure or OSError("another process failed")

    @contextmanager
    def _never_alone(self, what: str) -> Iterator[None]:
        """Where several generate together, a failure in the middle of an image ends the run: the others may be waiting
        for this process's part of the denoiser, and would wait for ever.

        Raises:
            SimpleTunerError: says so.
        """
        try:
            yield
        except NotImplementedError:
            raise
        except ONE_SIDED_FAILURES as error:
            if self.together.size == 1:
                raise
            message = f"no {what}: {error}; the other processes wait for a part of this image, so the run ends"
            fix = "lower validation_resolution or set validation_disable, and start again: it continues where it was"
            raise SimpleTunerError(Problem(message, fix=fix)) from error

    def _stop_together(self) -> None:
        """Raise Stopping where one of the processes that generate together is asked to stop."""
        if self.together.any(self.is_stopping()):
            raise Stopping

    def _generate_all(
        self, denoiser: nn.Module, adapter: Any, ema: Any | None, step: int, name: str
    ) -> tuple[list[SavedImage], dict[Kind, list[GeneratedImage]]]:
        """Generate and write what is due; what was written, sheet last, and the images themselves."""
        kinds = self._kinds_due(ema, step)
        if not kinds:
            return [], {}
        self._stop_together()
        self.bus.emit(PhaseStarted(name, len(kinds) * len(self.requests)))
        with self._failing_together():
            pipeline = pipeline_for(self.config.validation, self.family, denoiser, self._vae.load())
        saved: list[SavedImage] = []
        generated: dict[Kind, list[GeneratedImage]] = {}
        for number, kind in enumerate(kinds):
            with self._weights(kind, adapter, ema), self._never_alone(name):
                generated[kind] = self._generate(pipeline, adapter, kind, step, name, number * len(self.requests))
            with self._failing_together():
                if kind == "base":
                    saved += self.files.save_benchmark(generated[kind])
                else:
                    saved += self.files.save(generated[kind], step, kind)
        self._vae.keep_if_small()
        if kinds != ["base"]:
            saved += self._save_sheet(step)
        return saved, generated

    def _save_sheet(self, step: int) -> list[SavedImage]:
        """The sheet of a step; a disk that refuses it costs the sheet, not the images that it shows."""
        try:
            return [self.files.save_sheet(step)]
        except (OSError, DataError) as error:
            self.bus.emit(Notice("warning", f"no sheet of the images at step {step}: {error}"))
            return []

    def _kinds_due(self, ema: Any | None, step: int) -> list[Kind]:
        """Which weights generate at `step`, in this order."""
        is_due = step > 0 or self.config.validation.validation_on_startup
        # Full training has its base only before its first step.
        has_base = step == 0 or self.config.model.model_type != "full"
        kinds: list[Kind] = []
        if has_base and not (self.config.validation.disable_benchmark or self.files.has_benchmark()):
            kinds.append("base")
        kinds += self._step_kinds(ema) if is_due else []
        return self.together.from_main(kinds)

    def _step_kinds(self, ema: Any | None) -> list[Literal["live", "ema"]]:
        """Which weights in training are shown at each validation."""
        mode = self.config.validation.ema_validation if ema is not None else "none"
        kinds: list[Literal["live", "ema"]] = ["live"] if mode != "ema_only" else []
        return kinds if mode == "none" else [*kinds, "ema"]

    def _weights(self, kind: Kind, adapter: Any, ema: Any | None) -> AbstractContextManager[Any]:
        """Inside the context the denoiser has the weights of `kind`."""
        if kind == "base" and self.config.model.model_type != "full":
            return adapter.disabled()
        if kind == "ema":
            assert ema is not None
            return ema.swapped_in(adapter.trainable_parameters())
        return nullcontext()

    def _generate(
        self, pipeline: Any, adapter: Any, kind: Kind, step: int, phase: str, done_before: int
    ) -> list[GeneratedImage]:
        """All requests with the present weights, in their order."""
        requests = self.requests
        if self.config.validation.validation_randomize and kind != "base":
            requests = reseeded(requests, step)
        generated: dict[int, GeneratedImage] = {}
        order = sorted(range(len(requests)), key=lambda index: requests[index].adapter_strength)
        for strength, group in groupby(order, key=lambda index: requests[index].adapter_strength):
            indices, done = list(group), done_before + len(generated)

            def report(count: int, done: int = done) -> None:
                self.bus.emit(PhaseProgress(phase, done + count))

            asked: list[ImageRequest] = [requests[index] for index in indices]
            with nullcontext() if strength == 1 or kind == "base" else adapter.scaled(strength):
                images = make_images(
                    pipeline,
                    asked,
                    batch_size=batch_size_for(asked),
                    on_progress=report,
                    watch=self._watch(step, kind),
                    noise_device=noise_device(self.config.validation, self.family),
                )
            generated |= dict(zip(indices, images, strict=True))
        return [generated[index] for index in range(len(requests))]

    def _watch(self, step: int, kind: Kind) -> Watch:
        """What sees each denoising step: previews, and whether the run is asked to stop."""
        shown = self._previews.watch(step, kind) if self._previews else None

        def watch(requests: Sequence[ImageRequest]) -> Callable[..., dict[str, Any]]:
            preview = shown(requests) if shown else None

            def after_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                self._stop_together()
                return preview(pipeline, index, timestep, tensors) if preview else tensors

            return after_step

        return watch

    def _emit_scores(self, scorer: ClipScorer, generated: Mapping[Kind, list[GeneratedImage]], step: int) -> None:
        """The score of each image; the mean is that of the weights in training, else of what there is."""
        scores: dict[Kind, list[float]] = {}
        for kind, images in generated.items():
            if self.is_stopping():
                raise Stopping
            scores[kind] = scorer.score(images)
        judged = next(scores[kind] for kind in ("live", "ema", "base") if kind in scores)
        by_name = {
            f"{kind}/{image.request.title}": score
            for kind, images in generated.items()
            for image, score in zip(images, scores[kind], strict=True)
        }
        self.bus.emit(ImagesScored(step, "clip", by_name, sum(judged) / len(judged)))

    def _make_previews(self) -> Previews:
        if not self.config.reporting.webhook_config:
            self.bus.emit(Notice("info", f"previews are written to {self.files.previews_dir}"))
        decoder = self.family.load_preview_decoder()
        return Previews(
            self.family, decoder, self.config.validation.validation_preview_steps, self.files, self.bus.emit
        )

    def _make_scorer(self) -> ClipScorer:
        model = self.config.evaluation.pretrained_evaluation_model_name_or_path or DEFAULT_MODEL
        return ClipScorer(model, self.family.device)
