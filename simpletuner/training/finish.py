"""The end of a run: weights where people look for them, images before and after, the curve, the next command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from simpletuner import storage
from simpletuner.adapters.metadata import run_metadata
from simpletuner.config.loading import LoadedRun
from simpletuner.disk import disk_error
from simpletuner.errors import DataError, SimpleTunerError
from simpletuner.models.components import save_model_folder
from simpletuner.optim.optimizers import averaged_weights
from simpletuner.program import program
from simpletuner.reporting.events import RunFinished
from simpletuner.reporting.loss_plot import plot_loss
from simpletuner.reporting.report import REPORT_FILE
from simpletuner.reporting.sinks.jsonl import METRICS_FILE, read_records
from simpletuner.text import count_text
from simpletuner.training.adapter_roundtrip import live_output, prove_adapter
from simpletuner.training.earlier_runs import move_aside
from simpletuner.training.full_disk import write_patiently
from simpletuner.training.lock import LOCK_FILE
from simpletuner.training.phases import phase
from simpletuner.training.report import report_run
from simpletuner.training.run import Model, Run, Session
from simpletuner.training.run_files import BEST, EMA_DIR, FINAL_FILE, PIPELINE_DIR, step_of
from simpletuner.training.run_history import Mark

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily


def finish_run(run: Run, seconds: float) -> None:
    """Write and check the final weights, write the summary, and say what to do next.

    All processes take part where they hold parts of the weights; only the main one writes.
    """
    if run.model.family.num_cut_prompts:
        limit = run.model.family.max_prompt_tokens
        prompts = count_text(run.model.family.num_cut_prompts, "prompt")
        run.session.warn(f"truncated {prompts} to {limit} tokens")
    if run.session.process_group.is_main:
        run.session.guard.require()
    outputs = save_weights(run)
    if not run.session.process_group.is_main:
        return
    note_final_weights(run)
    for notice in run.session.checkpoints.settle():
        run.session.bus.emit(notice)
    if run.validator is not None:
        with costing_only(run.session, "sheets of the images"):
            outputs |= run.validator.write_summaries(run.progress.global_step)
    if (best := run.session.checkpoints.best_evaluation()) is not None:
        step, loss = best
        outputs[f"best checkpoint (step {step}, eval loss {loss:.4f})"] = run.session.output_dir / BEST
    with costing_only(run.session, "loss curve"):
        plot = plot_loss(run.session.output_dir / METRICS_FILE, run.session.output_dir / "loss.png")
        if plot is not None:
            outputs["loss curve"] = plot
    outputs["report"] = run.session.output_dir / REPORT_FILE
    outputs["report"].unlink(missing_ok=True)  # a kill before the new one is written shall not leave that of before
    if (readers := run.model.adapter.read_by()) is not None:
        run.session.inform(f"{run.model.adapter.file_name}: {readers}")
    command = generate_command(run.loaded, run.model.family, outputs)
    run.session.bus.emit(
        RunFinished(step=run.progress.global_step, seconds=seconds, outputs=outputs, commands=(command,))
    )
    report_run(run.session.output_dir, run.datasets, run.session.bus)


@contextmanager
def costing_only(session: Session, what: str) -> Iterator[None]:
    """What fails in the block costs `what` and a warning: the weights are saved by then."""
    try:
        yield
    except (OSError, DataError) as error:
        session.warn(f"no {what}: {disk_error(error) or error}")
    except ImportError as error:
        session.warn(f"no {what}: the package {error.name or ''} cannot be imported; fix: install it again")


def was_finished(run: Run) -> bool:
    """Whether an earlier process brought the run to this end: its final weights can be read, and all else is there."""
    is_generated = run.validator is None or run.validator.has_generated(run.progress.global_step, run.model.ema)
    return bool(
        run.session.process_group.from_main(
            run.session.process_group.is_main and is_generated and has_final_weights(run) and has_outputs(run)
        )
    )


def final_files(model: Model, output_dir: Path) -> list[Path]:
    """The files that say whether the final weights are whole; the manifest stands for a folder's."""
    folders = [output_dir, *([output_dir / EMA_DIR] if model.ema is not None else [])]
    if model.adapter.can_be_disabled:
        return [folder / model.adapter.file_name for folder in folders]
    return [folder / PIPELINE_DIR / storage.MANIFEST for folder in folders]


def note_final_weights(run: Run) -> None:
    """Write down whose the final weights are, and of which step: the files themselves are equal in equal runs."""
    digests = {
        str(path.relative_to(run.session.output_dir)): storage.file_digest(path)
        for path in final_files(run.model, run.session.output_dir)
    }
    noted = {**run.session.checkpoints.history.mark.to_json(), "step": run.progress.global_step, "files": digests}
    storage.write_json(run.session.output_dir / FINAL_FILE, noted)


def has_final_weights(run: Run) -> bool:
    """Whether the final weights in the folder are whole, this run's, and of its step."""
    step, history, files = (
        run.progress.global_step,
        run.session.checkpoints.history,
        final_files(run.model, run.session.output_dir),
    )
    try:
        if not (run.session.output_dir / FINAL_FILE).is_file():  # those of an earlier version say their step themselves
            return history.adopts_unmarked and {step_of(path) for path in files} == {step}
        noted = storage.read_json(run.session.output_dir / FINAL_FILE, dict)
        digests = {str(path.relative_to(run.session.output_dir)): storage.file_digest(path) for path in files}
        is_same = noted["step"] == step and history.owns(Mark.from_json(noted), step) and noted["files"] == digests
    except (SimpleTunerError, OSError, KeyError, TypeError):
        return False
    folders = [path.parent for path in files if path.name == storage.MANIFEST]
    return is_same and not any(storage.verify_dir(folder, full=False) for folder in folders)


def has_outputs(run: Run) -> bool:
    """Whether all that the end of the run at this step has made is still there: sheets, the curve, the report."""
    records = read_records(run.session.output_dir / METRICS_FILE)
    ends = [each for each in records if each.get("event") == "run_finished"]
    outputs = next(
        (each.get("outputs") for each in reversed(ends) if each.get("step") == run.progress.global_step), None
    )
    if not isinstance(outputs, dict):
        return False
    before = Path(str(next((each["output_dir"] for each in records if "output_dir" in each), run.session.output_dir)))
    written = [Path(str(path)) for path in outputs.values()]
    inside = [path.relative_to(before) for path in written if path.is_relative_to(before)]  # the folder may have moved
    return all((run.session.output_dir / path).exists() for path in inside)


def save_weights(run: Run) -> dict[str, Path]:
    """Final weights in the output folder, and their EMA; an adapter is proved before it counts."""
    name, save = ("adapter", save_adapter) if run.model.adapter.can_be_disabled else ("model", save_model)
    with phase(run.session.bus, "saving and checking the weights"):
        with averaged_weights(run.model.optimizer):
            outputs = {name: save(run, run.session.output_dir)}
        if run.model.ema is not None:
            with run.model.ema.swapped_in(run.model.adapter.trainable_parameters()):
                outputs[f"{name} (EMA)"] = save(run, run.session.output_dir / EMA_DIR)
        averages = run.session.output_dir / EMA_DIR
        if run.model.ema is None and run.session.process_group.is_main and averages.exists():
            move_aside(run.session.output_dir, averages)  # of an earlier end, before EMA was off
        run.session.process_group.barrier()
    return outputs


def save_model(run: Run, folder: Path) -> Path:
    """Write the live weights as a whole model folder: `pipeline` in `folder`."""
    path = folder / PIPELINE_DIR
    denoiser = whole_denoiser(run.model, run.session.process_group.is_main)
    if run.session.process_group.is_main:
        folder.mkdir(parents=True, exist_ok=True)

        def commit() -> None:
            with storage.commit_dir(path, {"global_step": run.progress.global_step}) as temporary:
                save_model_folder(
                    run.model.family.source,
                    run.model.family.spec,
                    denoiser,
                    run.model.family.scheduler_config,
                    temporary,
                )

        write_patiently(run.session, run.progress.global_step, path.name, commit)
    return path


def whole_denoiser(model: Model, is_main: bool) -> nn.Module:
    """The denoiser; one that is spread over processes is put together in main memory, on the main process."""
    if not model.placement.is_spread:
        return model.denoiser
    weights = model.placement.whole(model.adapter.state_to_save())
    denoiser = model.family.empty_denoiser()
    if is_main:
        kept = {name: tensor for name, tensor in model.denoiser.state_dict().items() if name not in weights}
        denoiser.load_state_dict(kept | weights, assign=True)
    return denoiser


def save_adapter(run: Run, folder: Path) -> Path:
    """Write the live adapter to `folder` under a temporary name, prove it, then give it its name."""
    path = folder / run.model.adapter.file_name
    reference = live_output(run)
    with run.model.placement.gathered():
        if run.session.process_group.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            lock = storage.read_json(run.session.output_dir / LOCK_FILE, dict)

            def commit() -> None:
                with storage.replacing_file(path) as temporary:
                    run.model.adapter.save(temporary, run_metadata(lock, run.progress.global_step))
                    prove_adapter(run.model, run.session, temporary, reference)

            write_patiently(run.session, run.progress.global_step, path.name, commit)
        run.session.process_group.barrier()
    return path


def generate_command(loaded: LoadedRun, family: ModelFamily, outputs: dict[str, Path]) -> str:
    """The shell command that generates with what was trained; by the configuration where it says what no flag does."""
    config = loaded.config
    library = [each.prompt for each in (loaded.prompt_library or {}).values()]
    prompt = config.validation.validation_prompt or next(iter(library), "a photo")
    height, width = config.validation.validation_sizes[0]
    model = str(outputs.get("model", family.source.model))
    words = ["generate", "--model-family", config.model.model_family, "--model", model]
    is_file, is_whole = bool(family.source.file), "model" in outputs
    needs_configuration = not is_whole if is_file else bool(family.prompt_settings)
    if needs_configuration and loaded.config_file is not None:
        words = ["generate", "--config", str(loaded.config_file)]
        words += [f"--pretrained_model_name_or_path={model}"] if is_whole else []
    if "adapter" in outputs:
        words += ["--adapter", str(outputs["adapter"])]
    words += ["--prompt", prompt, "--width", str(width), "--height", str(height)]
    words += [
        "--steps",
        str(config.validation.validation_num_inference_steps),
        "--guidance",
        str(config.validation.validation_guidance),
    ]
    if config.precision.base_model_precision != "no_change":
        words += ["--base-precision", config.precision.base_model_precision]
    if config.validation.validation_negative_prompt is not None:
        words += ["--negative-prompt", config.validation.validation_negative_prompt]
    return f"{program()} {shlex.join(words)}"
