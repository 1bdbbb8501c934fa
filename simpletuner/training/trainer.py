"""Builds the parts of a run in a named order, runs the loop, and closes what it opened.

Order: which checkpoint -> data -> latent caches (VAE loaded, used, freed) -> denoiser -> adapter -> optimizer and EMA
-> evaluation and validation -> resume -> the output folder. What can fail cheaply comes before what is expensive, and
what can be refused comes before anything in the output folder is changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from simpletuner import storage
from simpletuner.adapters.assistant import attach_assistant, find_assistant
from simpletuner.adapters.base import Adapter
from simpletuner.config.loading import LoadedRun
from simpletuner.config.lycoris_algorithms import form_and_kind
from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.data.sampler import Sampler
from simpletuner.disk import disk_error, reported_as_disk_errors
from simpletuner.distributed.process_group import SINGLE_PROCESS, ConnectionLost, ProcessGroup, joined
from simpletuner.errors import Interrupted, SimpleTunerError, UploadError
from simpletuner.families.registry import get_spec
from simpletuner.hub.job import make_job
from simpletuner.hub.publisher import Publisher
from simpletuner.models.build import build_family
from simpletuner.models.devices import adapter_dtype, pick_device, weight_dtype
from simpletuner.optim.ema import EMA
from simpletuner.optim.optimizers import build_optimizer, require_optimizer
from simpletuner.precision.mixed import DTYPES
from simpletuner.precision.product_trials import choose_products, chosen_products
from simpletuner.precision.quantize import require_device
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice, RunFailed, RunStarted
from simpletuner.reporting.sinks import build_sinks
from simpletuner.training.batches import BatchSource
from simpletuner.training.build import (
    attach_adapter,
    build_evaluator,
    build_lr_factor,
    build_sampler,
    build_validator,
    require_trained_parts,
)
from simpletuner.training.checkpoint import Checkpoints, load_checkpoint, read_state
from simpletuner.training.device_failures import explain
from simpletuner.training.device_placement import mesh_of, must_take_turns, place_denoiser
from simpletuner.training.evaluate import read_eval_history, restore_best
from simpletuner.training.evaluation import losses_as_json, losses_from_json
from simpletuner.training.finish import finish_run, was_finished
from simpletuner.training.fitting import fit_into_memory
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.kernels import chosen_kernels, compile_blocks, require_compiler
from simpletuner.training.lock import write_lock
from simpletuner.training.loop import run_training
from simpletuner.training.loss_scale import LossScale
from simpletuner.training.phases import phase
from simpletuner.training.planning.settings import is_written, keep_choice
from simpletuner.training.prepare import prepare_data, prepare_datasets
from simpletuner.training.progress import Progress
from simpletuner.training.report import report_run
from simpletuner.training.resuming import Length, resumed_length, resumed_progress, total_train_steps
from simpletuner.training.run import Model, Run, Session
from simpletuner.training.signals import StopRequest
from simpletuner.training.start import Start, begin_in_folder, plan_start


def train(loaded: LoadedRun) -> None:
    """Train as configured, from the start or from the newest checkpoint.

    Raises:
        SimpleTunerError: anything that a user can fix; it carries the exit code.
    """
    output_dir = Path(loaded.config.checkpoint.output_dir)
    with reported_as_disk_errors(), ExitStack() as stack:
        output_dir.mkdir(parents=True, exist_ok=True)
        process_group = stack.enter_context(joined(os.environ, loaded.config.processes.distributed_timeout))
        if process_group.is_main:
            stack.enter_context(storage.exclusive_lock(output_dir / ".lock", f"training into {output_dir}"))
            storage.clean_stale_tree(output_dir, is_locked=True)
        stop = stack.enter_context(StopRequest())
        if process_group.heartbeat is not None:
            process_group.heartbeat.stopping = stop.error_while_waiting
        is_new = not loaded.config.checkpoint.resumes
        sinks = (
            build_sinks(loaded.config.reporting, output_dir, is_new, webhooks=loaded.webhooks)
            if process_group.is_main
            else []
        )
        publisher = build_publisher(loaded) if process_group.is_main else None
        bus = stack.enter_context(EventBus([*sinks, publisher] if publisher else sinks))
        run: Run | None = None
        try:
            stack.enter_context(chosen_kernels(loaded.config, pick_device()))
            with stopped_by_signals(stop):
                run = build_run(loaded, output_dir, bus, stop, process_group)
            stack.callback(run.close)
            started = time.monotonic()
            if run.is_complete:
                bus.emit(
                    Notice(
                        "info", f"{output_dir} is complete: step {run.progress.global_step} of {run.max_train_steps}"
                    )
                )
            else:
                run_training(run)
                finish_run(run, time.monotonic() - started)
            if publisher is not None:
                publish(publisher, run.progress.global_step, run.session)
        except UploadError:
            raise  # the run itself is done, and its sinks have reported it
        except SimpleTunerError as error:
            step = run.progress.global_step if run is not None else 0
            bus.emit(RunFailed(step=step, message=error.render(), exit_code=error.exit_code))
            is_writing = run is not None and process_group.is_main and run.session.guard.is_there()
            if run is not None and is_writing and not isinstance(error, Interrupted):  # who stops a run is in haste
                report_run(output_dir, run.datasets, bus)
            raise
        except Exception as error:  # told to whoever listens; `cli.main` shows it
            step = run.progress.global_step if run is not None else 0
            what = f"training step {step + 1}" if run is not None else "preparing the run"
            if (known := explain(error, loaded.config, pick_device(), what) or disk_error(error)) is not None:
                bus.emit(RunFailed(step=step, message=known.render(), exit_code=known.exit_code))
                raise known from error
            bus.emit(RunFailed(step=step, message=f"unexpected {type(error).__name__}: {error}"))
            raise


@contextmanager
def stopped_by_signals(stop: StopRequest) -> Iterator[None]:
    """Inside, a signal ends each process by itself; what waits for one that has left was asked to leave too.

    Raises:
        Interrupted: a signal came.
    """
    try:
        yield
    except ConnectionLost:
        stop.check()
        raise


def build_publisher(loaded: LoadedRun) -> Publisher | None:
    job = make_job(loaded, get_spec(loaded.config.model.model_family))
    return Publisher(job) if job is not None else None


def publish(publisher: Publisher, step: int, session: Session) -> None:
    """Upload the end of the run.

    Raises:
        UploadError: it did not succeed.
    """
    with phase(session.bus, "uploading to the Hub"):
        publisher.finish(step, lambda: bool(session.stop))


def build_run(
    loaded: LoadedRun, output_dir: Path, bus: EventBus, stop: StopRequest, process_group: ProcessGroup = SINGLE_PROCESS
) -> Run:
    """All parts of the run, resumed where there is something to resume from."""
    config = loaded.config
    for line in loaded.warnings:
        bus.emit(Notice("warning", line))
    start = plan_start(loaded, output_dir, process_group)
    for line in start.notices:
        bus.emit(Notice("warning", line))
    checkpoints = Checkpoints(output_dir, config.checkpoint.checkpoints_total_limit, start.history)

    loaded = keep_choice(loaded, start.resume_from)
    family = build_family(loaded.config)
    require_device(family.number_formats, family.device, family.dtype)
    require_compiler(config.precision.dynamo_backend, family.device)
    trained_dtype = weight_dtype(config) if config.model.model_type == "full" else adapter_dtype(config)
    require_optimizer(config.optimizer, family.device, trained_dtype)
    require_trained_parts(loaded, family)
    assistant_file = find_assistant(config)
    datasets = prepare_datasets(loaded, family, output_dir, bus, stop, process_group)
    loaded, memory_limit = fit_into_memory(loaded, family, datasets, bus, process_group)
    config, family = loaded.config, build_family(loaded.config)
    require_device(family.number_formats, family.device, family.dtype)
    datasets, sources = prepare_data(loaded, family, output_dir, bus, stop, process_group, datasets)
    training = [dataset for dataset in datasets if dataset.kind == "image"]
    sampler = build_sampler(loaded, training, process_group)
    length = run_length(loaded, sampler, start.resume_from)
    total_steps = length.total_steps
    if length.notice:
        bus.emit(Notice("info", length.notice))

    # Whole weights pass through main memory, in each process: one after the other where it does not hold them all.
    mesh = mesh_of(config.processes, family, process_group)
    turns = process_group.in_turns() if must_take_turns(loaded, family, process_group) else nullcontext()
    with turns, phase(bus, "loading the denoiser"):
        denoiser = family.load_base()
        assistant = None
        if assistant_file is not None:
            assistant = attach_assistant(denoiser, assistant_file, config.adapter.assistant_lora_strength, family.spec)
            bus.emit(Notice("info", f"assistant LoRA: {assistant}"))
        adapter = attach_adapter(loaded, family, denoiser)
        describe_adapter(adapter, bus)
        placement = place_denoiser(config, family, denoiser, adapter, process_group, mesh)
        may_offload = config.model.memory is not None and not is_written(loaded, "gradient_checkpointing_backend")
        recomputing = GradientCheckpointing.of(config, family.device, memory_limit, may_offload)
        if recomputing is not None:
            cast(Any, denoiser).enable_gradient_checkpointing(recomputing)
        sizes = {size for dataset in datasets for size in dataset.buckets}
        compile_blocks(denoiser, family.spec.block_classes, config.precision.dynamo_backend, len(sizes) > 1)
    choose_kernels(loaded, adapter, family.device, start.resume_from, bus, process_group)
    choose_8_bit_products(loaded, denoiser, family.device, start.resume_from, bus, process_group)
    parameters = adapter.trainable_parameters()
    model = Model(
        family=family,
        denoiser=denoiser,
        adapter=adapter,
        placement=placement,
        optimizer=build_optimizer(config.optimizer, parameters, config.training.seed),
        lr_factor=build_lr_factor(loaded, total_steps, process_group),
        ema=EMA(parameters, config.training.ema_decay, config.training.ema_update_interval)
        if config.training.use_ema
        else None,
        assistant=assistant,
        gradient_checkpointing=recomputing,
    )
    run = Run(
        loaded=loaded,
        seed=config.training.seed,
        model=model,
        progress=Progress(loss_scale=LossScale.of(config.precision.mixed_precision)),
        session=Session(
            output_dir,
            Path(config.data.cache_dir),
            bus,
            stop,
            checkpoints,
            process_group,
            config.checkpoint.pause_on_full_disk,
        ),
        batches=BatchSource(family, training, sources, sampler, config, process_group),
        evaluator=build_evaluator(loaded, family, datasets, sources, stop, process_group),
        validator=build_validator(loaded, family, datasets, checkpoints, bus, stop, process_group),
        max_train_steps=total_steps,
        datasets=datasets,
    )
    placement.take_over(run.model.optimizer)
    resume(run, start)
    return run


def run_length(loaded: LoadedRun, sampler: Sampler, resume_from: Path | None) -> Length:
    """Where the run ends; one that is resumed may have been meant to end elsewhere."""
    if resume_from is None:
        return Length(total_train_steps(loaded, sampler))
    saved = read_state(resume_from)
    return resumed_length(loaded, sampler, saved, resumed_progress(saved, sampler))


def choose_kernels(
    loaded: LoadedRun,
    adapter: Adapter,
    device: torch.device,
    resume_from: Path | None,
    bus: EventBus,
    process_group: ProcessGroup,
) -> None:
    """Let the adapter's kernels be chosen: by the checkpoint, else by the main process, which times them; for all.

    Two starts may time them differently, and other kernels give other bits.
    """
    config = loaded.config
    if config.precision.dynamo_backend != "no" or config.precision.deterministic:
        return  # a compiler makes its own; the faster ones add up in no fixed order
    known = read_state(resume_from).get("kernels", {}) if resume_from is not None else {}
    lines = (
        adapter.choose_kernels(device, DTYPES[config.precision.mixed_precision], known) if process_group.is_main else []
    )
    choice = process_group.from_main(dict(adapter.kernel_choice))
    if not process_group.is_main:
        lines = adapter.choose_kernels(device, DTYPES[config.precision.mixed_precision], choice)
    for line in lines:
        bus.emit(Notice("info", line))


def choose_8_bit_products(
    loaded: LoadedRun,
    denoiser: nn.Module,
    device: torch.device,
    resume_from: Path | None,
    bus: EventBus,
    process_group: ProcessGroup,
) -> None:
    """Let products be made in 8 bits where `quantize_activations` asks for them: chosen as the adapter's kernels are.

    Under a compiler, and where bits are promised, none is timed: all are made in 8 bits that can be.
    """
    options = loaded.config.precision
    dtype, is_timed = DTYPES[options.mixed_precision], options.dynamo_backend == "no" and not options.deterministic
    known = read_state(resume_from).get("products", {}) if resume_from is not None else {}
    lines = choose_products(denoiser, device, dtype, known, is_timed) if process_group.is_main else []
    choice = process_group.from_main(chosen_products(denoiser))
    if not process_group.is_main:
        lines = choose_products(denoiser, device, dtype, choice, is_timed)
    for line in lines:
        bus.emit(Notice("info", line))


def resume(run: Run, start: Start) -> None:
    """Put the checkpoint into the run, then make the output folder its own: until here a start may be refused, and has
    changed nothing there.

    Raises:
        ConfigError: the checkpoint is of another model or adapter.
        DataError: the disk is full or cannot be written.
    """
    process_group, path = run.session.process_group, start.resume_from
    if path is not None:
        load_checkpoint(run, path, start.is_own)
        if start.is_own:
            noted = process_group.from_main(read_eval_history(run.session.output_dir, start.history, run.session.bus))
            run.progress.eval_losses |= losses_from_json(noted, until=run.progress.global_step)
    reported = begin_in_folder(run, start) if process_group.is_main else []
    if process_group.is_main:
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
        text = f"resumed {name}: step {run.progress.global_step} of {run.max_train_steps}"
        run.session.inform(text)


def describe_adapter(adapter: Adapter, bus: EventBus) -> None:
    """Say which layers it is on and how much is trained: an entry that means too little shows here."""
    for match in adapter.report:
        alias = f" ({match.class_name})" if match.class_name != match.entry else ""
        bus.emit(Notice("info", f"adapter: {match.modules} modules of {match.entry}{alias}"))
    count = sum(parameter.numel() for parameter in adapter.trainable_parameters().values())
    bus.emit(Notice("info", f"{count:,} parameters are trained"))
    for line in adapter.notices:
        bus.emit(Notice("info", line))


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
