"""`simpletuner export`: a trained adapter for other programs, or merged into its model, each result checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner import storage
from simpletuner.adapters.compress import compress, rank_that_keeps
from simpletuner.adapters.files import apply_weights, check_saved_adapter
from simpletuner.adapters.formats import FORMATS, Format, modules_in_file, named, peft_metadata
from simpletuner.adapters.merge import merge_into
from simpletuner.adapters.metadata import adapter_metadata, run_metadata
from simpletuner.adapters.reading import LYCORIS_CONFIG, read_adapter
from simpletuner.adapters.weights import AdapterWeights
from simpletuner.cache.prompts import PromptsAhead
from simpletuner.config.paths import ADAPTER_FILES, adapter_file_in
from simpletuner.errors import ConfigError, DataError, Problem, error_text
from simpletuner.families.readers import ALL_FORMS
from simpletuner.models.components import ModelSource, save_model_folder
from simpletuner.training.adapter_roundtrip import TOLERANCE, probe_output
from simpletuner.training.lock import LOCK_FILE
from simpletuner.training.prompts import PROBE_PROMPT

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
# Of the change that a LoRA must keep so that nothing is said of a larger one.
KEPT_SHARE = 0.95
# Merged weights are rounded once more than an adapter beside them.
MERGE_SLACK = 10


@dataclass(frozen=True)
class Source:
    """What is exported.

    Args:
        file: the adapter.
        folder: of the run, or of the file.
        lock: `run.lock.json` of the run; None where the file came alone.
    """

    file: Path
    folder: Path
    lock: dict[str, Any] | None

    @property
    def name(self) -> str:
        """What exported files are called."""
        is_named_by_folder = self.file.name in ADAPTER_FILES and (
            self.lock is not None or self.file.name != ADAPTER_FILE
        )
        name = self.folder.absolute().name if is_named_by_folder else self.file.stem
        return f"{name}-ema" if self.file.absolute().parent.name == "ema" else name


def find_source(path: Path, ema: bool = False) -> Source:
    """The adapter of an output folder, of a checkpoint, or a file itself.

    Args:
        ema: the averaged weights of the folder.

    Raises:
        ConfigError: there is none.
    """
    if path.is_file():
        folder = next((parent for parent in path.absolute().parents[:3] if (parent / LOCK_FILE).is_file()), path.parent)
        return Source(path, folder, _lock_in(folder))
    if not path.is_dir():
        allowed = "an output folder, a checkpoint, or an adapter file"
        raise ConfigError(Problem(f"there is nothing at {path}", key="SOURCE", allowed=allowed))
    file = path / "ema" / ADAPTER_FILE if ema else adapter_file_in(path)
    if not file.is_file():
        if (path / "pipeline").is_dir() or list(path.glob("*/diffusion_pytorch_model*.safetensors")):
            fix = f"use {path / 'pipeline'} as a model"
            raise ConfigError(Problem(f"{path} holds a whole model and no adapter", key="SOURCE", fix=fix))
        what = "averaged (EMA) adapter" if ema else "adapter"
        raise ConfigError(Problem(f"there is no {what} in {path}", key="SOURCE", allowed=" or ".join(ADAPTER_FILES)))
    folder = path.parent if (path.parent / LOCK_FILE).is_file() and not (path / LOCK_FILE).is_file() else path
    return Source(file, folder, _lock_in(folder))


def _lock_in(folder: Path) -> dict[str, Any] | None:
    return storage.read_json(folder / LOCK_FILE, dict) if (folder / LOCK_FILE).is_file() else None


@dataclass
class Export:
    """One source on one model.

    Args:
        family: bound to the model.
        weights: of the adapter, perhaps made smaller.
        reference: the output of the model with these weights for the probe.
        say: prints a line for the user.
    """

    source: Source
    family: ModelFamily
    weights: AdapterWeights
    reference: Tensor
    say: Callable[[str], None]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.family.dtype]


def open_export(source: Source, family: ModelFamily, rank: int | None, say: Callable[[str], None]) -> Export:
    """Load the model, put the adapter on it, and keep its output.

    Args:
        rank: make a plain LoRA of this rank of the adapter first.

    Raises:
        DataError: the adapter does not fit the model.
        ConfigError: a LoRA cannot hold what the adapter changes.
    """
    if family.spec.caches_prompt_embeds:
        family.prompts = PromptsAhead(family, [PROBE_PROMPT])
    denoiser = _load(family)
    weights = read_adapter(source.file, family.spec, denoiser)
    for line in weights.notices:
        say(f"{source.file}: {line}")
    if rank is None:
        apply_weights(denoiser, weights, family.spec, str(source.file))
        return Export(source, family, weights, probe_output(family, denoiser), say)
    small, lost = compress(weights, denoiser, rank)
    apply_weights(denoiser, small, family.spec, str(source.file))
    export = Export(source, family, small, probe_output(family, denoiser), say)
    whole = _load(family)
    apply_weights(whole, weights, family.spec, str(source.file))
    off = float((probe_output(family, whole) - export.reference).abs().max())
    say(f"rank {rank} leaves out {lost:.2%} of the change; the model's output differs by {off:.3g} at most")
    if lost > 1 - KEPT_SHARE:
        enough = rank_that_keeps(weights, _load(family), KEPT_SHARE)
        whole_file = family.spec.read_by("lycoris", weights.kind, [*weights.modules])
        say(f"--rank {enough} keeps {KEPT_SHARE:.0%} of it; without --rank, the lycoris file is {whole_file}")
    return export


def _load(family: ModelFamily) -> nn.Module:
    return family.load_denoiser().to(family.device).eval()


def write_formats(export: Export, formats: Sequence[Format], output: Path | None) -> list[Path]:
    """Write and check a file for each format; with none named, for each that can hold the adapter.

    Args:
        output: a folder, or the file itself where one format is named; None is `exported` in the source's folder.

    Raises:
        ConfigError: a named format cannot hold the adapter.
        DataError: a written file does not give the same output.
    """
    written = []
    for file_format in formats or FORMATS:
        path = _output_path(export.source, file_format, output, single=len(formats) == 1)
        try:
            write_format(export, file_format, path)
        except ConfigError as error:
            if formats:
                raise
            export.say(f"no {file_format} file: {error.problems[0].message}")
            continue
        reading = export.family.spec.read_by(file_format, export.weights.kind, [*export.weights.modules])
        export.say(f"{path.name}: {reading}")
        written.append(path)
    return written


def write_format(export: Export, file_format: Format, path: Path) -> None:
    """Write one file under a temporary name, load it onto a fresh model, compare, and give it its name."""
    spec = export.family.spec_of_weights
    fresh = _load(export.family)
    held = modules_in_file(export.weights, spec, file_format, fresh)
    tensors = named(held, spec, file_format)
    metadata = _kept_metadata(export) | adapter_metadata(replace(export.weights, modules=held), spec)
    if file_format == "diffusers":
        metadata |= peft_metadata(export.weights, spec)
    if file_format == "lycoris" and LYCORIS_CONFIG in export.weights.metadata:
        metadata[LYCORIS_CONFIG] = json.dumps({**export.weights.lycoris, "multiplier": 1.0})
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.replacing_file(path) as temporary:
        storage.save_tensors(temporary, tensors, metadata)
        check_saved_adapter(
            temporary,
            fresh,
            spec,
            lambda denoiser: probe_output(export.family, denoiser),
            export.reference,
            export.tolerance,
        )


def write_merged(export: Export, output: Path | None) -> Path:
    """Write the model with the adapter in its weights as a diffusers folder, load it again, and compare.

    Raises:
        DataError: the folder exists, or the merged model gives another output.
    """
    family = export.family
    path = output or export.source.folder / "exported" / f"{export.source.name}.merged"
    if path.exists():
        raise DataError(Problem(f"{path} already exists", key="--output", fix="name another folder, or remove it"))
    denoiser = family.load_denoiser()
    merge_into(denoiser, export.weights, device=family.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.commit_dir(path) as temporary:
        save_model_folder(family.source, family.spec, denoiser, family.scheduler_config, temporary)
        _require_merged(export, temporary)
    return path


def _require_merged(export: Export, folder: Path) -> None:
    family = export.family
    again = type(family)(family.spec, ModelSource(str(folder)), family.device, family.dtype)
    again.prompts = family.prompts
    output = probe_output(family, _load(again))
    off = float((output - export.reference).abs().max())
    allowed = MERGE_SLACK * export.tolerance * max(1.0, float(export.reference.abs().max()))
    if not off <= allowed:  # NaN fails too
        message = f"the merged model gives a different output: it differs by {off:.3g}, allowed is {allowed:.3g}"
        raise DataError(Problem(message, file=str(folder)))
    export.say(f"merged: the output differs from the adapter's by {off:.3g}")


def _kept_metadata(export: Export) -> dict[str, str]:
    """What the source says of its run; from the lock where the file does not carry it."""
    kept = {
        key: value
        for key, value in export.weights.metadata.items()
        if key in ("simpletuner", "global_step") or key.startswith("ss_")
    }
    if "simpletuner" not in kept and export.source.lock is not None:
        try:
            kept |= run_metadata(export.source.lock, int(kept.get("global_step", 0)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            file = str(export.source.folder / LOCK_FILE)
            raise DataError(Problem(f"is damaged: {error_text(error)}", file=file)) from error
    return kept


def _output_path(source: Source, file_format: str, output: Path | None, single: bool) -> Path:
    if output is not None and output.suffix == ".safetensors":
        if not single:
            message = f"{output} is one file, and several formats are written"
            raise ConfigError(Problem(message, key="--output", fix="name a folder, or one --format"))
        return output
    folder = output or source.folder / "exported"
    return folder / f"{source.name}.{file_format}.safetensors"


def export_command(
    source: Source,
    family: ModelFamily,
    formats: Sequence[str],
    output: Path | None,
    rank: int | None,
    merge: bool,
    say: Callable[[str], None],
) -> list[Path]:
    """What the verb does; returns what was written.

    Raises:
        ConfigError: options that do not go together, or a format that cannot hold the adapter.
        DataError: the adapter does not fit the model, or a written file failed its check.
    """
    unknown = [name for name in formats if name not in ALL_FORMS]
    if unknown:
        raise ConfigError(Problem(f'"{unknown[0]}" is not a format', key="--format", allowed=", ".join(ALL_FORMS)))
    with torch.no_grad():
        export = open_export(source, family, rank, say)
        if not merge:
            return write_formats(export, [name for name in ALL_FORMS if name in formats], output)
        if formats:
            raise ConfigError(Problem("--merge writes a model and --format an adapter", fix="give one of them"))
        return [write_merged(export, output)]
