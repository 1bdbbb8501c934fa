"""Builds a run from its configuration, from top to bottom in the order in which it happens.

Order: which checkpoint -> data -> latent caches (VAE loaded, used, freed) -> denoiser -> adapter -> optimizer and EMA
-> evaluation and validation -> resume -> the output folder. What can fail cheaply comes before what is expensive, and
what can be refused comes before anything in the output folder is changed.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from simpletuner.adapters.assistant import attach_assistant, find_assistant
from simpletuner.adapters.base import Adapter
from simpletuner.adapters.build import attach_adapter
from simpletuner.config.loading import LoadedRun
from simpletuner.config.lycoris_algorithms import form_and_kind
from simpletuner.config.options import TrainConfig
from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.options.training import TrainingOptions
from simpletuner.data.dataset import Dataset
from simpletuner.data.sampler import Sampler, build_sampler
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.models.build import build_family
from simpletuner.models.components import check_denoiser_file
from simpletuner.models.devices import adapter_dtype, weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.optim.ema import EMA
from simpletuner.optim.optimizers import build_optimizer, require_optimizer
from simpletuner.optim.schedules import LrFactor, build_schedule, scaled_learning_rate
from simpletuner.precision.mixed import DTYPES
from simpletuner.precision.product_trials import choose_products, chosen_products
from simpletuner.precision.quantize import require_device
from simpletuner.reporting.events import RunStarted
from simpletuner.training.batches import BatchSource
from simpletuner.training.checkpoint import Checkpoints, load_checkpoint, read_state
from simpletuner.training.device_placement import is_denoiser_spread, mesh_of, must_take_turns, place_denoiser
from simpletuner.training.evaluate import evaluate_anew, is_comparable, read_eval_history, restore_best
from simpletuner.training.evaluation import Evaluator, losses_as_json, losses_from_json
from simpletuner.training.finish import was_finished
from simpletuner.training.fitting import fit_into_memory
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.kernels import compile_blocks, require_compiler
from simpletuner.training.latents import LatentSources
from simpletuner.training.lock import write_lock
from simpletuner.training.loss_scale import LossScale
from simpletuner.training.planning.memory import may_keep_least
from simpletuner.training.planning.settings import is_written, keep_choice
from simpletuner.training.prepare import prepare_data, prepare_datasets
from simpletuner.training.process import Process
from simpletuner.training.progress import Progress
from simpletuner.training.resuming import Length, resumed_length, resumed_progress, total_train_steps
from simpletuner.training.run import Model, Run, Session
from simpletuner.training.start import Start, begin_in_folder, plan_start
from simpletuner.validation.external import ExternalScript
from simpletuner.validation.references import references_of_run
from simpletuner.validation.validator import Validator


def build_run(loaded: LoadedRun, process: Process) -> Run:
    """All parts of the run, resumed where there is something to resume from."""
    process_group = process.process_group
    start = plan_start(loaded, process.output_dir, process_group)
    for line in (*loaded.warnings, *start.notices):
        process.warn(line)
    loaded = keep_choice(loaded, start.resume_from)
    family = build_family(loaded.config)
    require_usable(loaded, family)
    assistant_file = find_assistant(loaded.config)

    datasets = prepare_datasets(loaded, family, process)
    loaded, memory_limit = fit_into_memory(loaded, family, datasets, process)
    config, family = loaded.config, build_family(loaded.config)
    require_device(family.number_formats, family.device, family.dtype)
    datasets, sources = prepare_data(loaded, family, process, datasets)
    training = [dataset for dataset in datasets if dataset.kind == "image"]
    sampler = build_sampler(config, training, process_group.size)
    length = run_length(config.training, sampler, start.resume_from)
    if length.notice:
        process.inform(length.notice)

    session = Session(
        **vars(process),
        cache_dir=Path(config.data.cache_dir),
        checkpoints=Checkpoints(process.output_dir, config.checkpoint.checkpoints_total_limit, start.history),
        pauses_on_full_disk=config.checkpoint.pause_on_full_disk,
    )
    has_sizes = len({size for dataset in datasets for size in dataset.buckets}) > 1
    model = load_model(
        loaded, family, session, start.resume_from, length.total_steps, assistant_file, memory_limit, has_sizes
    )
    run = Run(
        loaded=loaded,
        seed=config.training.seed,
        model=model,
        progress=Progress(loss_scale=LossScale.of(config.precision.mixed_precision)),
        session=session,
        batches=BatchSource(family, training, sources, sampler, config, process_group),
        evaluator=build_evaluator(config, family, datasets, sources, session),
        validator=build_validator(loaded, family, datasets, session),
        max_train_steps=length.total_steps,
        datasets=datasets,
    )
    model.placement.take_over(model.optimizer)
    resume(run, start)
    return run


def require_usable(loaded: LoadedRun, family: ModelFamily) -> None:
    """Refuse what the device, the optimizer or the model cannot do, by shapes alone, before anything is read.

    Raises:
        ConfigError: a number format or optimizer that does not work here, or `trainable_modules` that name no weight.
        DataError: a single file of weights of another network.
    """
    config = loaded.config
    check_denoiser_file(family.source, family.spec)
    require_device(family.number_formats, family.device, family.dtype)
    require_compiler(config.precision.dynamo_backend, family.device)
    trained_dtype = weight_dtype(config) if config.model.model_type == "full" else adapter_dtype(config)
    require_optimizer(config.optimizer, family.device, trained_dtype)
    if config.optimizer.trainable_modules or config.optimizer.trainable_modules_low_learning_rate:
        attach_adapter(loaded, family, family.empty_denoiser())


def load_model(
    loaded: LoadedRun,
    family: ModelFamily,
    session: Session,
    resume_from: Path | None,
    total_steps: int,
    assistant_file: Path | None,
    memory_limit: int | None,
    has_sizes: bool,
) -> Model:
    """The denoiser with what trains on it, where it trains, and the optimizer; nothing is resumed yet.

    Args:
        assistant_file: of `find_assistant`.
        memory_limit: of `fit_into_memory`, in bytes.
        has_sizes: whether images come in several sizes.
    """
    config, process_group = loaded.config, session.process_group
    # Whole weights pass through main memory, in each process: one after the other where it does not hold them all.
    mesh = mesh_of(config.processes, family, process_group)
    turns = process_group.in_turns() if must_take_turns(config, family, process_group) else nullcontext()
    with turns, session.phase("loading the denoiser"):
        denoiser = family.load_base()
        assistant = None
        if assistant_file is not None:
            assistant = attach_assistant(denoiser, assistant_file, config.adapter.assistant_lora_strength, family.spec)
            session.inform(f"assistant LoRA: {assistant}")
        adapter = attach_adapter(loaded, family, denoiser)
        describe_adapter(adapter, session)
        placement = place_denoiser(config, family, denoiser, adapter, process_group, mesh)
        may_offload = config.model.memory is not None and not is_written(loaded, "gradient_checkpointing_backend")
        if family.device.type == "cpu" and not is_written(loaded, "activation_memory"):
            session.inform(f"activation_memory: {config.model.activation_memory}, the default on a CPU")
        recomputing = GradientCheckpointing.of(config, family.device, memory_limit, may_offload, may_keep_least(loaded))
        if recomputing is not None:
            cast(Any, denoiser).enable_gradient_checkpointing(recomputing)
        compile_blocks(denoiser, family.spec.block_classes, config.precision.dynamo_backend, has_sizes)
    choose_kernels(config.precision, adapter, denoiser, family.device, session, resume_from)
    parameters = adapter.trainable_parameters()
    options = config.training
    return Model(
        family=family,
        denoiser=denoiser,
        adapter=adapter,
        placement=placement,
        optimizer=build_optimizer(config.optimizer, parameters, options.seed),
        lr_factor=build_lr_factor(config, total_steps, process_group),
        ema=EMA(parameters, options.ema_decay, options.ema_update_interval) if options.use_ema else None,
        assistant=assistant,
        gradient_checkpointing=recomputing,
    )


def build_lr_factor(config: TrainConfig, total_steps: int, process_group: ProcessGroup) -> LrFactor:
    return build_schedule(
        config.optimizer.lr_scheduler,
        learning_rate=scaled_learning_rate(config, process_group.size),
        num_training_steps=total_steps,
        num_warmup_steps=config.optimizer.lr_warmup_steps,
        lr_end=config.optimizer.lr_end,
        lr_power=config.optimizer.lr_power,
        lr_num_cycles=config.optimizer.lr_num_cycles,
    )


def run_length(options: TrainingOptions, sampler: Sampler, resume_from: Path | None) -> Length:
    """Where the run ends; one that is resumed may have been meant to end elsewhere."""
    if resume_from is None:
        return Length(total_train_steps(options, sampler))
    saved = read_state(resume_from)
    return resumed_length(options, sampler, saved, resumed_progress(saved, sampler))


def describe_adapter(adapter: Adapter, session: Session) -> None:
    """Say which layers it is on and how much is trained: an entry that means too little shows here."""
    for match in adapter.report:
        alias = f" ({match.class_name})" if match.class_name != match.entry else ""
        if adapter.can_be_disabled:
            session.inform(f"adapter: {match.modules} modules of {match.entry}{alias}")
        else:
            session.inform(f"full training: {match.entry}, {match.modules} tensors of {match.class_name}")
    count = sum(parameter.numel() for parameter in adapter.trainable_parameters().values())
    session.inform(f"{count:,} parameters are trained")
    for line in adapter.notices:
        session.inform(line)


def choose_kernels(
    options: PrecisionOptions,
    adapter: Adapter,
    denoiser: nn.Module,
    device: torch.device,
    session: Session,
    resume_from: Path | None,
) -> None:
    """Choose the adapter's kernels, and those of products in 8 bits: as the checkpoint says, else by timing them.

    The main process times them for all: two processes, or two starts, may find others faster, which give other bits.
    A compiler makes kernels of its own, and the faster ones add up in no fixed order: there, none is timed.
    """
    is_timed = options.dynamo_backend == "no" and not options.deterministic
    dtype, process_group = DTYPES[options.mixed_precision], session.process_group
    saved = read_state(resume_from) if resume_from is not None else {}

    def settle(key: str, choose: Callable[[Mapping[str, Any]], list[str]], chosen: Callable[[], Any]) -> None:
        lines = choose(saved.get(key, {})) if process_group.is_main else []
        choice = process_group.from_main(chosen())
        if not process_group.is_main:
            lines = choose(choice)
        for line in lines:
            session.inform(line)

    if is_timed:
        settle("kernels", partial(adapter.choose_kernels, device, dtype), lambda: dict(adapter.kernel_choice))
    choose = partial(choose_products, denoiser, device, dtype, is_timed=is_timed)
    settle("products", choose, partial(chosen_products, denoiser))


def build_evaluator(
    config: TrainConfig, family: ModelFamily, datasets: Sequence[Dataset], sources: LatentSources, session: Session
) -> Evaluator | None:
    """None where there is nothing to evaluate; a rule reports an interval without an eval dataset."""
    wanted = config.evaluation.eval_dataset_id
    held_out = [dataset for dataset in datasets if dataset.kind == "eval" and wanted in (None, dataset.id)]
    if not config.evaluation.has_interval or not held_out:
        return None
    return Evaluator(
        family, held_out, sources, config, is_stopping=lambda: session.process_group.any(bool(session.stop))
    )


def build_validator(
    loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], session: Session
) -> Validator | ExternalScript | None:
    """None where nothing is generated by this process.

    Processes that share one denoiser generate together, for each has to fetch its part; only the main one keeps images.
    """
    config, process_group, output_dir = loaded.config, session.process_group, session.output_dir
    generates_together = is_denoiser_spread(config.processes)
    if config.validation.validation_disable or not (process_group.is_main or generates_together):
        return None
    if config.validation.validation_method == "external-script":
        if not process_group.is_main:
            return None
        facts = {
            "output_dir": str(output_dir),
            "model_family": config.model.model_family,
            "tracker_run_name": config.reporting.tracker_run_name or output_dir.name,
            "validation_prompt": config.validation.validation_prompt or "",
        }
        command = config.validation.validation_external_script
        assert command is not None, "config/rules/validation.py:external_script_is_named"
        return ExternalScript(command, facts, session.checkpoints.newest, output_dir, session.bus)
    sees_one = config.data.conditioning_multidataset_sampling == "random"
    references = references_of_run(config.validation, datasets, sees_one)
    images_dir = output_dir
    if not process_group.is_main:
        images_dir = Path(tempfile.mkdtemp(prefix="simpletuner-"))
        atexit.register(shutil.rmtree, images_dir, ignore_errors=True)
    validator = Validator(
        config,
        family,
        loaded.prompt_library,
        images_dir,
        session.bus,
        references,
        is_stopping=lambda: bool(session.stop),
        together=process_group if generates_together else SINGLE_PROCESS,
    )
    return validator if validator.requests else None


def resume(run: Run, start: Start) -> None:
    """Put the checkpoint into the run, then make the output folder its own: until here a start may be refused, and has
    changed nothing there.

    Raises:
        ConfigError: the checkpoint is of another model or adapter.
        DataError: the disk is full or cannot be written.
    """
    process_group, path = run.session.process_group, start.resume_from
    is_evaluated_anew = path is not None and start.is_own and not is_comparable(run, path)
    if path is not None:
        load_checkpoint(run, path, start.is_own)
        if is_evaluated_anew:
            run.progress.eval_losses.clear()
        elif start.is_own:
            noted = process_group.from_main(read_eval_history(run.session.output_dir, start.history, run.session.bus))
            run.progress.eval_losses |= losses_from_json(noted, until=run.progress.global_step)
    reported: list[str] = []
    if process_group.is_main:
        run.session.guard.require()
        reported = begin_in_folder(run, start)
        run.session.guard.note_history()
        if path is not None and is_evaluated_anew:
            evaluate_anew(run, path)
        restore_best(run)
    run.progress.eval_losses |= losses_from_json(process_group.from_main(losses_as_json(run.progress.eval_losses)))
    run.is_complete = run.is_finished and was_finished(run)
    announce(run)
    for line in reported:
        run.session.warn(line)
    if process_group.is_main:
        write_lock(
            run.loaded, run.model.family, run.datasets, run.session.output_dir, run.session.bus, resumes=start.is_own
        )
    if path is not None:
        name = path.name if start.is_own else path
        run.session.inform(f"resumed {name}: {run.place}")


def announce(run: Run) -> None:
    """Say what is about to run; the sinks open their files for it."""
    config, family, mark = run.config, run.model.family, run.session.checkpoints.history.mark
    details = {
        "model": f"{family.spec.title} ({family.source.model})",
        "training": "full" if config.model.model_type == "full" else f"lora {config.adapter.lora_type}",
        "device": f"{family.device} in {str(family.dtype).removeprefix('torch.')}",
        "images": ", ".join(f"{dataset.id}: {dataset.num_images}" for dataset in run.datasets),
    }
    details["checkpoints"] = checkpoint_plan(config.checkpoint)
    if config.model.model_type == "lora":
        form, kind = form_and_kind(config.adapter, run.loaded.lycoris)
        details["adapter file"] = f"{form} format, {family.spec.read_by(form, kind)}"
    run.session.bus.emit(
        RunStarted(
            run_name=config.reporting.tracker_run_name or run.session.output_dir.name,
            output_dir=run.session.output_dir,
            total_steps=run.max_train_steps,
            start_step=run.progress.global_step,
            details=details,
            options=run.loaded.resolved(),
            run_id=mark.run_id,
            branch=mark.branch,
            is_complete=run.is_complete,
        )
    )


def checkpoint_plan(options: CheckpointOptions) -> str:
    """When checkpoints are saved and how many are kept, for the start of the log."""
    steps, epochs, limit = (
        options.checkpoint_step_interval,
        options.checkpoint_epoch_interval,
        options.checkpoints_total_limit,
    )
    intervals = [f"every {steps} steps"] if steps else []
    intervals += [f"every {epochs:g} epochs"] if epochs else []
    return f"{', '.join([*intervals, 'at the end'])}; {f'the last {limit} are kept' if limit else 'all are kept'}"
