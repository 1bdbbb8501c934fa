"""From the configuration to the parts of a run, one function each; `trainer.py` puts them together."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.build import build_adapter
from simpletuner.config.loading import LoadedRun
from simpletuner.data.dataset import Dataset
from simpletuner.data.sampler import Sampler
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.models.family import ModelFamily
from simpletuner.optim.schedules import LrFactor, build_schedule, scaled_learning_rate
from simpletuner.reporting.bus import EventBus
from simpletuner.training.batches import BatchSource
from simpletuner.training.checkpoint import Checkpoints
from simpletuner.training.device_placement import is_denoiser_spread
from simpletuner.training.evaluation import Evaluator
from simpletuner.training.latents import LatentSources
from simpletuner.training.signals import StopRequest
from simpletuner.validation.external import ExternalScript
from simpletuner.validation.references import references_of_run
from simpletuner.validation.validator import Validator


def attach_adapter(loaded: LoadedRun, family: ModelFamily, denoiser: nn.Module) -> Adapter:
    """What the configuration trains, attached to a denoiser; `simpletuner plan` gives it one without values."""
    return build_adapter(denoiser, family.spec_of_weights, loaded.config, loaded.lycoris)  # its files say which spec


def require_trained_parts(loaded: LoadedRun, family: ModelFamily) -> None:
    """Look for the weights that `trainable_modules` names, by shapes alone, before anything is read or encoded.

    Raises:
        ConfigError: a text that is in no weight's name.
    """
    if loaded.config.optimizer.trainable_modules or loaded.config.optimizer.trainable_modules_low_learning_rate:
        attach_adapter(loaded, family, family.empty_denoiser())


def build_sampler(
    loaded: LoadedRun, datasets: Sequence[Dataset], process_group: ProcessGroup = SINGLE_PROCESS
) -> Sampler:
    """The order of the datasets that are trained on; a batch of it is that of all processes together."""
    config = loaded.config
    return Sampler(
        datasets,
        config.training.train_batch_size * process_group.size,
        config.training.seed,
        num_ranks=process_group.size,
        fills_batches=bool(config.data.allow_dataset_oversubscription),
        mixes_evenly=config.data.data_backend_sampling == "uniform",
    )


def build_lr_factor(loaded: LoadedRun, total_steps: int, process_group: ProcessGroup) -> LrFactor:
    config = loaded.config
    return build_schedule(
        config.optimizer.lr_scheduler,
        learning_rate=scaled_learning_rate(config, process_group.size),
        num_training_steps=total_steps,
        num_warmup_steps=config.optimizer.lr_warmup_steps,
        lr_end=config.optimizer.lr_end,
        lr_power=config.optimizer.lr_power,
        lr_num_cycles=config.optimizer.lr_num_cycles,
    )


def build_batches(
    loaded: LoadedRun,
    family: ModelFamily,
    datasets: Sequence[Dataset],
    sources: LatentSources,
    sampler: Sampler,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> BatchSource:
    config = loaded.config
    return BatchSource(
        family,
        datasets,
        sources,
        sampler,
        config.training.seed,
        accumulation=config.training.gradient_accumulation_steps,
        dropout=config.training.caption_dropout_probability or 0.0,
        reference_dropout=config.training.reference_dropout_probability,
        masking=config.training.masked_loss_probability,
        process_group=process_group,
        samples_reference=config.data.conditioning_multidataset_sampling == "random",
        weighs_by_size=config.objective.loss_balance == "pixels",
    )


def build_evaluator(
    loaded: LoadedRun,
    family: ModelFamily,
    datasets: Sequence[Dataset],
    sources: LatentSources,
    stop: StopRequest,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Evaluator | None:
    """None where there is nothing to evaluate; a rule reports an interval without an eval dataset."""
    config = loaded.config
    wanted = config.evaluation.eval_dataset_id
    held_out = [dataset for dataset in datasets if dataset.kind == "eval" and wanted in (None, dataset.id)]
    is_wanted = (
        config.evaluation.eval_steps_interval or config.evaluation.eval_epoch_interval
    ) and not config.evaluation.eval_loss_disable
    if not is_wanted or not held_out:
        return None
    return Evaluator(
        family,
        held_out,
        sources,
        config.evaluation.num_eval_images,
        config.evaluation.eval_timesteps,
        config.training.train_batch_size,
        one_reference=config.data.conditioning_multidataset_sampling == "random",
        is_stopping=lambda: process_group.any(bool(stop)),
    )


def build_validator(
    loaded: LoadedRun,
    family: ModelFamily,
    datasets: Sequence[Dataset],
    checkpoints: Checkpoints,
    bus: EventBus,
    stop: StopRequest,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Validator | ExternalScript | None:
    """None where nothing is generated by this process.

    Processes that share one denoiser generate together, for each has to fetch its part; only the main one keeps images.
    """
    config = loaded.config
    generates_together = is_denoiser_spread(config.processes)
    if config.validation.validation_disable or not (process_group.is_main or generates_together):
        return None
    if config.validation.validation_method == "external-script":
        if not process_group.is_main:
            return None
        facts = {
            "output_dir": str(checkpoints.output_dir),
            "model_family": config.model.model_family,
            "tracker_run_name": config.reporting.tracker_run_name or checkpoints.output_dir.name,
            "validation_prompt": config.validation.validation_prompt or "",
        }
        command = config.validation.validation_external_script
        assert command is not None, "config/rules/validation.py:external_script_is_named"
        return ExternalScript(command, facts, checkpoints.newest, checkpoints.output_dir, bus)
    sees_one = config.data.conditioning_multidataset_sampling == "random"
    references = references_of_run(config.validation, datasets, sees_one)
    images_dir = checkpoints.output_dir
    if not process_group.is_main:
        images_dir = Path(tempfile.mkdtemp(prefix="simpletuner-"))
        atexit.register(shutil.rmtree, images_dir, ignore_errors=True)
    validator = Validator(
        config,
        family,
        loaded.prompt_library,
        images_dir,
        bus,
        references,
        is_stopping=lambda: bool(stop),
        together=process_group if generates_together else SINGLE_PROCESS,
    )
    return validator if validator.requests else None
