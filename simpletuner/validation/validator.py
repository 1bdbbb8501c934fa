"""Draws the validation pictures of a run from the live weights: base (once), current, EMA, and the sheets of them.

Nothing of it reaches training: pictures have generators of their own, the global generators and the mode of every
module are put back, and a failure costs the pictures, not the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from simpletuner.errors import DataError
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice, PhaseDone, PhaseProgress, PhaseStarted, PicturesMade, SavedPicture
from simpletuner.validation.files import PictureFiles
from simpletuner.validation.prompts import requests_from_config
from simpletuner.validation.sampling import Picture, batch_size_for, make_pictures

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

# A VAE up to this size stays loaded between validations; a larger one would take memory from training.
SMALL_VAE_BYTES = 256 * 2**20


class Validator:
    """Validation of one run.

    Args:
        config: the validation options, `model_type`, `mixed_precision`.
        prompt_library: nickname -> prompt, or None.
        output_dir: pictures go to `validation_images/` and `benchmarks/base_model/` in it.

    Attributes:
        requests: the pictures of one validation; empty where no prompt is set.

    Raises:
        ConfigError: `validation_resolution` is too large for the family.
    """

    def __init__(
        self,
        config: Any,
        family: ModelFamily,
        prompt_library: Mapping[str, str] | None,
        output_dir: Path,
        bus: EventBus,
    ):
        self.config = config
        self.family = family
        self.bus = bus
        self.requests, notices = requests_from_config(
            config, prompt_library, family.spec.size_multiple, family.largest_side()
        )
        settings = {
            "model": family.source.model,
            "vae": family.source.vae,
            "revision": family.source.revision,
            "steps": config.validation_num_inference_steps,
            "guidance": config.validation_guidance,
            "negative_prompt": config.validation_negative_prompt,
        }
        self.files = PictureFiles(Path(output_dir), self.requests, settings)
        self._vae: nn.Module | None = None
        for line in notices:
            bus.emit(Notice("warning", line))

    def run(self, denoiser: nn.Module, adapter: Any, ema: Any | None, step: int) -> list[Path]:
        """Draw what is due at `step`; paths of the new files, sheet last.

        Step 0 draws the base model's pictures (the benchmark), and the first validation after it where they are
        missing. A failure that the outside world can cause is told and leaves training as it was.
        """
        if not self.requests:
            return []
        started, name = time.monotonic(), f"pictures at step {step}"
        try:
            with self._undisturbed(denoiser):
                saved = self._draw_all(denoiser, adapter, ema, step, name)
        except NotImplementedError:
            raise  # a subclass of RuntimeError that only our own mistakes raise
        except (RuntimeError, OSError, ValueError, DataError) as error:
            self._free_vae()
            self.bus.emit(Notice("error", f"no {name}: {error}; training goes on"))
            return []
        if saved:
            self.bus.emit(PhaseDone(name, time.monotonic() - started, f"in {saved[-1].path.parent}"))
            self.bus.emit(PicturesMade(step, tuple(saved)))
        return [picture.path for picture in saved]

    def before_after_grid(self, step: int) -> Path | None:
        """Write the sheet base | steps between | last step (| EMA) to `before_after.png`; None without pictures."""
        return self.files.write_before_after(step)

    def _draw_all(self, denoiser: nn.Module, adapter: Any, ema: Any | None, step: int, name: str) -> list[SavedPicture]:
        mode = self.config.ema_validation if ema is not None else "none"
        draws_live = (step > 0 or self.config.validation_on_startup) and mode != "ema_only"
        draws_base = not (self.config.disable_benchmark or self.files.has_benchmark()) and self._has_base(step)
        draws_ema = mode != "none" and (step > 0 or self.config.validation_on_startup)
        if not (draws_live or draws_base or draws_ema):
            return []
        rounds = draws_live + draws_base + draws_ema
        self.bus.emit(PhaseStarted(name, rounds * len(self.requests)))
        pipeline = self.family.pipeline(denoiser, self._load_vae())
        saved, done = [], 0
        if draws_base:
            with nullcontext() if self._is_full else adapter.disabled():
                saved += self.files.save_benchmark(self._draw(pipeline, name, done))
            done += len(self.requests)
        if draws_live:
            saved += self.files.save(self._draw(pipeline, name, done), step, "live")
            done += len(self.requests)
        if draws_ema:
            with ema.swapped_in(adapter.trainable_parameters()):
                saved += self.files.save(self._draw(pipeline, name, done), step, "ema")
        self._keep_small_vae()
        if draws_live or draws_ema:
            saved.append(self.files.save_sheet(step))
        return saved

    def _draw(self, pipeline: Any, phase: str, done_before: int) -> Sequence[Picture]:
        return make_pictures(
            pipeline,
            self.requests,
            steps=self.config.validation_num_inference_steps,
            guidance=self.config.validation_guidance,
            negative_prompt=self.config.validation_negative_prompt,
            batch_size=batch_size_for(self.requests),
            on_progress=lambda done: self.bus.emit(PhaseProgress(phase, done_before + done)),
        )

    @contextmanager
    def _undisturbed(self, denoiser: nn.Module) -> Iterator[None]:
        """Eval mode, no gradients, `mixed_precision`; afterwards modes and generators are as before."""
        modes = {module: module.training for module in denoiser.modules()}
        device = self.family.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), self._autocast():
            denoiser.eval()
            try:
                yield
            finally:
                for module, was_training in modes.items():
                    module.training = was_training

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.family.device.type, dtype=torch.bfloat16)

    @property
    def _is_full(self) -> bool:
        return self.config.model_type == "full"

    def _has_base(self, step: int) -> bool:
        """Whether the base model can still be drawn: full training only has it before its first step."""
        return step == 0 or not self._is_full

    def _load_vae(self) -> nn.Module:
        if self._vae is None:
            self._vae = self.family.load_vae()
        return self._vae

    def _keep_small_vae(self) -> None:
        if self._vae is not None:
            size = sum(parameter.numel() * parameter.element_size() for parameter in self._vae.parameters())
            if size > SMALL_VAE_BYTES:
                self._free_vae()

    def _free_vae(self) -> None:
        self._vae = None
        if self.family.device.type == "cuda":
            torch.cuda.empty_cache()
