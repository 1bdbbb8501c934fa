"""Checkpoints: committed whole or not at all, found by name and manifest, rotated only after the new one is safe.

A checkpoint holds what `Progress` and the configuration cannot give back: trainable weights, optimizer state and EMA.
Names are matched strictly, so that a stray `checkpoint-1 (copy)` is never taken for one. `checkpoint-best` is one more,
complete by itself: it is not counted or rotated with the others, and a run may continue from it. Only checkpoints of
the run itself count (`run_history.py`): another run's beside them are neither taken for its own nor rotated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import __version__, storage
from simpletuner.distributed.placement import STATE_SEPARATOR
from simpletuner.distributed.zero import FLOAT32
from simpletuner.errors import ConfigError, DataError, Problem, error_text
from simpletuner.optim.ema import EMA
from simpletuner.optim.optimizers import averaged_weights, keeps_averages
from simpletuner.optim.state import (
    group_numbers,
    load_group_numbers,
    load_optimizer_tensors,
    optimizer_tensors,
)
from simpletuner.precision.product_trials import chosen_products
from simpletuner.reporting.events import Notice
from simpletuner.text import read_json_text
from simpletuner.training.damage import first_whole, why_unreadable
from simpletuner.training.divergence import require_finite
from simpletuner.training.earlier_runs import move_aside
from simpletuner.training.evaluation import losses_as_json, losses_from_json
from simpletuner.training.full_disk import write_patiently
from simpletuner.training.identity import compare_identity, option_changes, run_identity
from simpletuner.training.resuming import length_facts, resumed_progress
from simpletuner.training.run_files import BEST, CHECKPOINT_NAME, step_of
from simpletuner.training.run_history import HISTORY_KEY, RunHistory, find_run_history, history_of

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.training.run import Model, Run

STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
# The trained parameters as they are, where the file that others read holds them in another form, or their average.
TRAINABLE_FILE = "trainable.safetensors"
EMA_FILE = "ema.safetensors"
EMA_PREFIX = "ema."  # of each tensor in it


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is safe now.

    Args:
        is_new: it was written; else it was there already and was kept.
    """

    path: Path
    is_new: bool


class Checkpoints:
    """The checkpoints of one run.

    Args:
        output_dir: they are its `checkpoint-<step>` folders.
        limit: how many are kept; None or 0 keeps all.
        history: of the run; other runs' checkpoints are not seen. None: what the checkpoints in the folder say.
    """

    def __init__(self, output_dir: Path, limit: int | None, history: RunHistory | None = None):
        self.output_dir = output_dir
        self.limit = limit
        self.history = history or find_run_history(output_dir, numbered_checkpoints(output_dir))[0]
        # Whether a finite step came after the last save or load: until then the one before it stays too.
        self.is_settled = True

    def found(self) -> list[Path]:
        """This run's folders named like checkpoints, oldest step first; does not check whether they are valid."""
        return [path for path in numbered_checkpoints(self.output_dir) if self.owns(path)]

    def others(self) -> list[Path]:
        """Whole checkpoints in the folder that are another run's, oldest step first, the best one last."""
        best = self.output_dir / BEST
        paths = [*numbered_checkpoints(self.output_dir), *([best] if best.is_dir() else [])]
        return [path for path in paths if not self.owns(path)]

    def owns(self, path: Path) -> bool:
        """Whether a checkpoint is this run's; one that cannot be read counts as such, since nobody can tell."""
        try:
            manifest = storage.read_manifest(path)
            step = int(manifest.metadata["global_step"])
        except (DataError, KeyError, TypeError, ValueError):
            return True
        if is_misnamed(path, step):
            return False
        history = history_of(manifest)
        return self.history.owns(history.mark if history else None, step)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return next((path for path in reversed(self.found()) if not storage.verify_dir(path, full=False)), None)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.output_dir / f"checkpoint-{step}"

    def has(self, step: int) -> bool:
        """Whether this run's checkpoint of a step is there and whole."""
        path = self.path_of(step)
        return path.is_dir() and not storage.verify_dir(path, full=False) and self.owns(path)

    def save(self, run: Run) -> Saved:
        """Commit the current state, then rotate. This run's checkpoint of this step, if whole, is kept as it is.

        Raises:
            DataError: the disk is full or cannot be written; earlier checkpoints stay.
        """
        path = self.path_of(run.progress.global_step)
        content = checkpoint_content(run)
        is_new = False
        with run.model.placement.gathered():
            if run.session.process_group.is_main:
                is_new = self._save_here(run, path, content)
            is_new = run.session.process_group.any(is_new)
        return Saved(path, is_new)

    def _save_here(self, run: Run, path: Path, content: CheckpointContent) -> bool:
        if self.has(run.progress.global_step):
            return False
        self._make_way(path)

        def commit() -> None:
            with storage.commit_dir(path, metadata=self._metadata(run)) as folder:
                write_checkpoint(run, folder, content)

        write_patiently(run.session, run.progress.global_step, path.name, commit)
        self.is_settled = False
        for notice in self.rotate(keep=path, at_least=2):
            run.session.bus.emit(notice)
        return True

    def _metadata(self, run: Run) -> dict[str, Any]:
        """What the manifest says of a checkpoint."""
        return {"global_step": run.progress.global_step, HISTORY_KEY: self.history.to_json()}

    def _make_way(self, path: Path) -> None:
        """Move what is in the way of this run's checkpoint: another run's, or what is no folder."""
        if os.path.lexists(path) and not (path.is_dir() and self.owns(path)):
            move_aside(self.output_dir, path)

    def save_best(self, run: Run, eval_loss: float) -> Path:
        """Commit the current state as `checkpoint-best`, in place of an earlier one.

        Where the checkpoint of this step already exists, its files are linked and take no further room.

        Raises:
            DataError: the disk is full or cannot be written; the earlier best stays.
        """
        path = self.output_dir / BEST
        content = checkpoint_content(run)
        with run.model.placement.gathered():
            if run.session.process_group.is_main:
                self._save_best_here(run, path, content, eval_loss)
            run.session.process_group.barrier()
        return path

    def _save_best_here(self, run: Run, path: Path, content: CheckpointContent, eval_loss: float) -> None:
        self._make_way(path)

        def commit() -> None:
            with storage.commit_dir(path, metadata={**self._metadata(run), "eval_loss": eval_loss}) as folder:
                if self.has(run.progress.global_step):
                    storage.link_files(self.path_of(run.progress.global_step), folder)
                else:
                    write_checkpoint(run, folder, content)

        write_patiently(run.session, run.progress.global_step, path.name, commit)

    def link_best(self, step: int, eval_loss: float) -> None:
        """Make this run's checkpoint of a step `checkpoint-best` as well.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        metadata = {"global_step": step, HISTORY_KEY: self.history.to_json(), "eval_loss": eval_loss}
        with storage.commit_dir(self.output_dir / BEST, metadata) as folder:
            storage.link_files(self.path_of(step), folder)

    def best(self) -> Path | None:
        """The folder of this run's best checkpoint; does not check whether it is valid."""
        path = self.output_dir / BEST
        return path if path.is_dir() and self.owns(path) else None

    def best_evaluation(self) -> tuple[int, float] | None:
        """(step, eval loss) of this run's best checkpoint, if it is whole."""
        path = self.best()
        if path is None or storage.verify_dir(path, full=False):
            return None
        metadata = storage.read_manifest(path).metadata
        return int(metadata["global_step"]), float(metadata["eval_loss"])

    def rotate(self, keep: Path, at_least: int = 1) -> list[Notice]:
        """Remove the oldest checkpoints beyond the limit; only valid ones count, `keep` is never removed.

        Args:
            at_least: are left, whatever the limit.

        Returns:
            What was removed, and what could not be.
        """
        if not self.limit:
            return []
        notices = []
        valid = [path for path in self.found() if not storage.verify_dir(path, full=False)]
        for path in valid[: max(len(valid) - max(self.limit, at_least), 0)]:
            try:
                if path != keep:
                    storage.remove_dir(path)
                    notices.append(Notice("info", f"{path.name} removed: checkpoints_total_limit is {self.limit}"))
            except DataError as error:
                text = f"an old checkpoint could not be removed: {error.problems[0].render()}"
                notices.append(Notice("warning", text))
        return notices

    def settle(self) -> list[Notice]:
        """The weights of the last save or load have given a finite loss since: what is beyond the limit may be removed.

        That is the one before it where one is kept, and what a kill between a commit and its rotation has left.

        Returns:
            As of `rotate`.
        """
        if self.is_settled:
            return []
        self.is_settled = True
        newest = self.newest() if self.limit else None
        return self.rotate(keep=newest) if newest else []

    def choose(self, wanted: str | None) -> tuple[Path | None, list[str]]:
        """The checkpoint to resume from, and what there is to tell about it.

        Args:
            wanted: `latest`, a folder name, a path, or None / "" for a fresh start.

        Raises:
            ConfigError: a named checkpoint is not there, or the folder holds only damaged ones or other runs'.
            DataError: the newest one cannot be read now.
        """
        if not wanted:
            return None, []
        if wanted != "latest":
            return self._named(wanted), []
        path, notices = self._latest()
        if path is None and (others := self.others()):
            names = ", ".join(each.name for each in others)
            raise ConfigError(_others_problem(f"{self.output_dir} has checkpoints of other runs only: {names}", others))
        return path, notices

    def _named(self, wanted: str) -> Path:
        """A name is looked for in the output folder first; a path means exactly that path."""
        is_name = Path(wanted).name == wanted
        places = [self.output_dir / wanted, Path(wanted)] if is_name else [Path(wanted)]
        path = next((place for place in places if place.is_dir()), None)
        if path is None:
            where = f"{wanted} in {self.output_dir}" if is_name else f"at {Path(wanted).absolute()}"
            raise ConfigError(_resume_problem(f"there is no checkpoint {where}", self.found()))
        damage = storage.verify_dir(path)
        if damage:
            state = "cannot be read now" if why_unreadable(path) else "is damaged"
            raise ConfigError(_resume_problem(f"{path} {state}: {damage[0]}", self.found()))
        if is_misnamed(path, step := step_of(path)):
            text = f"{path} holds step {step}: it was renamed, or is a copy under another name"
            raise ConfigError(_resume_problem(text, self.found()))
        return path

    def _latest(self) -> tuple[Path | None, list[str]]:
        return first_whole(self._resumable()[::-1])

    def _resumable(self) -> list[Path]:
        """All checkpoints, the best among them by its step (before the numbered one of the same step)."""
        numbered = [(checkpoint_step(path), 1, path) for path in self.found()]
        best = self.best()
        return [path for *_, path in sorted([*numbered, *([(step_of(best), 0, best)] if best else [])])]


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named like checkpoints, whoever made them, oldest step first."""
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if CHECKPOINT_NAME.match(path.name) and path.is_dir()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    match = CHECKPOINT_NAME.match(path.name)
    assert match is not None
    return int(match.group(1))


def is_misnamed(path: Path, step: int) -> bool:
    """Whether the checkpoint of a step has the name of another one: it would be resumed and rotated in its place."""
    match = CHECKPOINT_NAME.match(path.name)
    return match is not None and int(match[1]) != step


def _resume_problem(message: str, found: list[Path]) -> Problem:
    names = ", ".join(path.name for path in found) or "none"
    return Problem(
        message,
        key="resume_from_checkpoint",
        allowed=f"latest, or one of: {names}",
        fix="name another checkpoint, or choose another output_dir for a fresh start",
    )


def _others_problem(message: str, others: list[Path]) -> Problem:
    return Problem(
        message,
        key="resume_from_checkpoint",
        allowed="none for a fresh start, which moves them to earlier-runs/ and deletes nothing, or the path of one",
        fix=f"choose one of: none, {', '.join(str(path) for path in others)}",
    )


@dataclass(frozen=True)
class CheckpointContent:
    """Whole tensors, whoever holds their parts; on the main process alone where they are parts.

    Args:
        weights: what others read: the average, of an optimizer that keeps one. None where the adapter itself holds it.
        trained: the trained parameters as they are; None where the file of `weights` holds them.
        optimizer: `name//state`.
        plain: what of the optimizer is no tensor.
        ema: by parameter; None without EMA.
    """

    weights: Mapping[str, Tensor] | None
    trained: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Tensor]
    plain: dict[str, Any]
    ema: Mapping[str, Tensor] | None


def checkpoint_content(run: Run) -> CheckpointContent:
    """Gather what is to be written; all processes take part.

    Raises:
        DivergedError: it is not finite.
    """
    placement = run.model.placement
    require_finite(run, "weights", placement.parameters)
    own = placement.own_state()
    tensors, plain = own or optimizer_tensors(run.model.optimizer, placement.parameters)
    if own:
        plain["groups"] = group_numbers(run.model.optimizer)
    require_finite(run, "states of the optimizer", tensors)
    if run.model.ema is not None:
        require_finite(run, "averages of the weights", run.model.ema.state_dict())
    weights, averages = None, keeps_averages(run.model.optimizer)
    if placement.is_spread or averages:
        with averaged_weights(run.model.optimizer):
            live = run.model.adapter.state_to_save().items()
            weights = placement.whole({name: tensor.clone() if averages else tensor for name, tensor in live})
    return CheckpointContent(
        weights=weights,
        trained=None if file_is_exact(run.model) else placement.whole(run.model.adapter.state_dict()),
        optimizer=tensors if own else placement.whole(tensors),
        plain=plain,
        ema=placement.whole(run.model.ema.state_dict()) if run.model.ema is not None else None,
    )


def write_checkpoint(run: Run, folder: Path, content: CheckpointContent) -> None:
    """Write all files of a checkpoint into `folder` (not yet committed)."""
    metadata = {"global_step": str(run.progress.global_step)}
    run.model.adapter.save(weights_file(run.model, folder), metadata, state=content.weights)
    if content.trained is not None:
        storage.save_tensors(folder / TRAINABLE_FILE, dict(content.trained))
    storage.save_tensors(folder / OPTIMIZER_FILE, dict(content.optimizer))
    if content.ema is not None:
        storage.save_tensors(folder / EMA_FILE, {f"{EMA_PREFIX}{name}": value for name, value in content.ema.items()})
        state = {**(content.weights or {}), **content.ema}
        run.model.adapter.save(weights_file(run.model, folder / "ema"), metadata, state=state)
    storage.write_json(
        folder / STATE_FILE,
        {
            "version": __version__,
            "state": run.progress.place(),
            "length": length_facts(run.progress, run.batches.sampler, run.max_train_steps),
            "loss_scale": run.progress.loss_scale.to_json(),
            "optimizer": content.plain,
            "identity": _identity(run),
            "kernels": dict(run.model.adapter.kernel_choice),
            "products": chosen_products(run.model.denoiser),
            "eval_losses": losses_as_json(run.progress.eval_losses),
            "evaluated": run.evaluator.identity if run.evaluator else None,
        },
    )
    storage.write_json(folder / "config.json", run.loaded.resolved())


def _identity(run: Run) -> dict[str, Any]:
    datasets, shapes = run.batches.datasets.values(), run.model.placement.shapes()
    return run_identity(run.loaded, datasets, shapes, run.session.process_group.size, run.model.assistant)


def weights_file(model: Model, folder: Path) -> Path:
    """Where the weights are in a checkpoint: an adapter at the top, a denoiser in the folder that diffusers reads."""
    if not model.adapter.can_be_disabled:
        folder = folder / model.family.spec.component("denoiser").name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / model.adapter.file_name


def file_is_exact(model: Model) -> bool:
    """Whether the file that others read holds the trained parameters as they are."""
    return model.adapter.file_is_exact and not keeps_averages(model.optimizer)


def load_checkpoint(run: Run, path: Path, is_own: bool = True) -> None:
    """Put a verified checkpoint into a built run.

    Args:
        is_own: the checkpoint is this run's; else its eval losses are not: they are another run's.

    Raises:
        ConfigError: the run differs in what cannot be changed on resume (model, adapter, optimizer).
        DataError: the checkpoint was made by a version that this one cannot read.
    """
    saved = read_state(path)
    changes = compare_identity(saved["identity"], _identity(run), path)
    for change in [*changes, *option_changes(storage.read_json(path / "config.json", dict), run.loaded, path)]:
        run.session.warn(change)
    from safetensors.torch import load_file

    parameters, part = run.model.placement.parameters, run.model.placement.part
    is_apart = (
        not file_is_exact(run.model) and (path / TRAINABLE_FILE).is_file()
    )  # a version before may have had it in the file
    weights = load_file(path / TRAINABLE_FILE if is_apart else weights_file(run.model, path))
    with run.model.placement.writing():
        run.model.adapter.load_state_dict(
            part({name: tensor for name, tensor in weights.items() if name in parameters})
        )
    tensors = load_file(path / OPTIMIZER_FILE)
    if run.model.placement.has_own_state:
        run.model.placement.load_own_state(tensors)
        load_group_numbers(run.model.optimizer, saved["optimizer"])
    else:
        own = {key: tensor for key, tensor in tensors.items() if not key.endswith(f"{STATE_SEPARATOR}{FLOAT32}")}
        load_optimizer_tensors(run.model.optimizer, parameters, part(own), saved["optimizer"])
    if run.model.ema is not None:
        if (path / EMA_FILE).is_file():
            averages = load_file(path / EMA_FILE)
            whole = {name.removeprefix(EMA_PREFIX): average for name, average in averages.items()}
            run.model.ema.load_state_dict(part(whole))
        else:
            run.session.warn(f"{path.name} has no EMA; the average starts from its weights")
            run.model.ema = EMA(parameters, run.model.ema.decay, run.model.ema.update_interval)
    run.session.checkpoints.is_settled = False
    require_finite(run, "weights", parameters)
    place = resumed_progress(saved, run.batches.sampler)
    run.progress = replace(place, loss_scale=run.progress.loss_scale, eval_losses=run.progress.eval_losses)
    run.progress.loss_scale.load_json(saved["loss_scale"])
    if is_own:
        run.progress.eval_losses.update(losses_from_json(saved["eval_losses"]))


def read_state(path: Path) -> dict[str, Any]:
    """`training_state.json` of a checkpoint."""
    try:
        saved = read_json_text((path / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("it holds no object")
        saved["state"], saved["loss_scale"], saved["identity"], saved["optimizer"], saved["eval_losses"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            Problem(
                f"{path / STATE_FILE} cannot be read ({error_text(error)}); this is simpletuner {__version__}",
                key="resume_from_checkpoint",
                fix="use the version that wrote it, or another checkpoint",
            )
        ) from error
    return saved
