"""`simpletuner plan`: memory, time and disk of a run before it starts.

Memory comes from the shapes of the real modules, not from a formula; time from real steps where they are cheap. What
was not measured is said.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from simpletuner.adapters.assistant import find_assistant, wants_assistant
from simpletuner.commands.check import cache_need, count_steps
from simpletuner.commands.probe import StepTimes, time_encoding, time_steps
from simpletuner.commands.text import Say, columns, short_count
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.data.holdout import hold_out
from simpletuner.data.sampler import Sampler, build_sampler
from simpletuner.errors import bytes_text
from simpletuner.models.build import build_family
from simpletuner.models.family import ModelFamily
from simpletuner.reporting.progress import duration_text
from simpletuner.text import count_text
from simpletuner.training.disk_space import LOG_BYTES, LOGS
from simpletuner.training.earlier_runs import delete_command, earlier_size
from simpletuner.training.kernels import chosen_kernels
from simpletuner.training.latents import fingerprint_of_vae
from simpletuner.training.planning.encoding import largest_references, text_cost
from simpletuner.training.planning.loads import choose_prompts, largest_load
from simpletuner.training.planning.memory import (
    Row,
    Shapes,
    decode_bytes,
    device_memory,
    memory_rows,
    on_demand_bytes,
    read_shapes,
)
from simpletuner.training.planning.settings import Room, choose_settings, with_activation_memory, with_settings
from simpletuner.training.planning.shapes import Load
from simpletuner.training.preflight import check_model_folder
from simpletuner.training.prepare import read_datasets, require_trainable
from simpletuner.training.rollout import build_rollouts

# Beyond it a probe on a CPU takes minutes; an accelerator is always probed.
CPU_PROBE_OPERATIONS = 4e11
PROBED_LOADS = 3
MAX_BATCHES = 5000


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Args:
        parameters: of the denoiser.
        trained: of them, or of the adapter.
        memory: of the device while training, largest size.
        other_activations: what they would take with other settings.
        available: bytes of the device's memory.
        disk: that the run writes.
        free_disk: bytes where it writes.
        steps: optimizer steps of the run.
        seconds: of all steps and of encoding; None where time was not measured.
        notes: what was measured and what was not.
    """

    model: str
    parameters: int
    trained: int
    memory: tuple[Row, ...]
    other_activations: tuple[Row, ...]
    available: int
    disk: tuple[Row, ...]
    free_disk: int
    steps: int
    seconds: tuple[float, float] | None
    notes: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        return sum(row.num_bytes for row in self.memory)

    @property
    def disk_bytes(self) -> int:
        return sum(row.num_bytes for row in self.disk)


def plan(loaded: LoadedRun, say: Say, probe: bool | None = None, other_gpu: int | None = None) -> Plan:
    """Work out and print what the run needs.

    Args:
        probe: whether steps are timed; None: where that is cheap.
        other_gpu: bytes of the GPU of another machine, where the run is to train; nothing is timed then.

    Raises:
        SimpleTunerError: what training would raise before it loads the denoiser.
    """
    result = make_plan(loaded, probe, other_gpu)
    for line in plan_lines(result):
        say(line)
    return result


def make_plan(loaded: LoadedRun, probe: bool | None = None, other_gpu: int | None = None) -> Plan:
    """As `plan`, without printing."""
    check_model_folder(loaded)
    family = build_family(loaded.config)
    datasets = read_datasets(loaded, family)
    require_trainable(loaded, family, datasets)
    loaded = with_activation_memory(loaded, family.device if other_gpu is None else torch.device("cuda"))
    chosen: list[str] = []
    if (limit := loaded.config.model.memory) is not None:
        room = Room.of(limit, family.device) if other_gpu is None else Room.of_other(limit, other_gpu)
        choice = choose_settings(loaded, family, datasets, room)
        loaded = with_settings(loaded, choice.settings)
        family = build_family(loaded.config)
        chosen = [f"memory: {line}" for line in (*choice.lines, *(problem.message for problem in choice.lacking))]
    config = loaded.config
    training = [dataset for dataset in hold_out(datasets, config.evaluation.eval_holdout) if dataset.kind == "image"]
    sampler = build_sampler(config, training)
    steps = count_steps(config.training, sampler)
    largest = largest_load(training, config.training.train_batch_size)

    shapes = read_shapes(loaded, family, largest, choose_prompts(family, training, largest, longest=True))
    available = device_memory(family.device) if other_gpu is None else other_gpu
    on_demand = on_demand_bytes(family, datasets, config.data.vae_batch_size)
    memory, other_activations = memory_rows(loaded, family, shapes, on_demand, available)
    captions = text_cost(loaded, family, datasets)
    if captions is not None and captions.stays and captions.cost is not None:
        memory.append(Row("text encoders, kept to encode on demand", captions.cost.weight_bytes))
    num_missing, missing_bytes = cache_needs(config, family, datasets)
    notes = memory_notes(config, family, largest, chosen)
    notes += [f"captions: {line}" for line in (captions.lines() if captions else ())]
    notes += [*assistant_notes(config), *earlier_notes(Path(config.checkpoint.output_dir))]

    operations = 6 * shapes.num_parameters * shapes.activations.num_tokens
    reason: str | None = "the run trains on another machine"
    if other_gpu is None:
        reason = why_no_probe(family, sum(row.num_bytes for row in memory), available, operations, probe)
    seconds = None
    if reason:
        notes.append(f"time was not measured: {reason}")
    else:
        seconds, about_time = measure(loaded, family, training, sampler, steps.total, num_missing)
        notes += about_time
    place = family.device if other_gpu is None else f"a GPU with {bytes_text(other_gpu)}"
    return Plan(
        model=f"{family.spec.title}, {config.model.model_type}, {_name(family.dtype)} on {place}",
        parameters=shapes.num_parameters,
        trained=sum(parameter.numel() for parameter in shapes.trained.values()),
        memory=tuple(memory),
        other_activations=tuple(other_activations),
        available=available,
        disk=tuple(disk_rows(loaded, shapes, (missing_bytes, captions.disk_bytes if captions else 0), steps.total)),
        free_disk=free_disk(Path(config.checkpoint.output_dir)),
        steps=steps.total,
        seconds=seconds,
        notes=tuple(notes),
    )


def memory_notes(config: TrainConfig, family: ModelFamily, largest: Load, chosen: Sequence[str]) -> list[str]:
    """What the rows of memory are of, how `memory` chose, and what is left out."""
    beside = "".join(f" with a reference of {width}x{height}" for height, width in largest.references)
    notes = [f"memory is that of the largest batch, {largest.batch_size} of {largest.width}x{largest.height}{beside}"]
    notes += chosen
    if family.device.type == "cuda":
        notes.append("the CUDA context is not counted; available memory is what it leaves")
    if not config.validation.validation_disable:
        decode = decode_bytes(family, *max(config.validation.validation_sizes, key=math.prod))
        notes.append(f"decoding a validation image takes {bytes_text(decode)} beside the weights, between two steps")
    return notes


def measure(
    loaded: LoadedRun,
    family: ModelFamily,
    training: Sequence[Dataset],
    sampler: Sampler,
    total_steps: int,
    num_missing: int,
) -> tuple[tuple[float, float], list[str]]:
    """Seconds of all steps and of encoding `num_missing` images, timed on this device; and what to say of them."""
    config, loads = loaded.config, count_loads(training, sampler)
    largest = largest_load(training, config.training.train_batch_size)
    typical = choose_prompts(family, training, largest, longest=False)
    depth = build_rollouts(config, family.spec).expected_depth(total_steps)
    with chosen_kernels(config, family.device):
        probed = [load for load, _ in loads.most_common(PROBED_LOADS)]
        times = time_steps(loaded, family, probed, typical, has_rollouts=depth > 0)
    common = loads.most_common(1)[0][0]
    encode = time_encoding(family, common.height, common.width, config.data.vae_batch_size) if num_missing else 0.0
    each = seconds_per_step(loads, times, config.training.gradient_accumulation_steps, depth)
    notes = [f"time was measured on {family.device}, without validation, evaluation and checkpoints"]
    if depth:
        notes.append(f"scheduled sampling adds {depth:.1f} passes without gradients to a batch, on average")
    if times.peak_bytes is not None:
        notes.append(f"the steps that were timed took {bytes_text(times.peak_bytes)} at most")
    return (each * total_steps, encode * num_missing), notes


def assistant_notes(config: TrainConfig) -> list[str]:
    """What is not counted of an assistant LoRA."""
    if not wants_assistant(config):
        return []
    if find_assistant(config, fetches=False) is None:
        name = config.adapter.assistant_lora_path
        return [f"the assistant LoRA {name} is fetched at the start; its memory is not counted"]
    return ["time is without the assistant LoRA, which adds two small products to each of its layers"]


def disk_rows(loaded: LoadedRun, shapes: Shapes, cached: tuple[int, int], total_steps: int) -> list[Row]:
    """What is to come, and as many checkpoints as exist at once: one more than are kept, while one is written.

    Args:
        cached: bytes of latents and of captions.
    """
    config = loaded.config
    count = sum(parameter.numel() for parameter in shapes.trained.values())
    ema = 4 * count + shapes.trained_bytes if config.training.use_ema else 0
    checkpoint = shapes.trained_bytes + shapes.optimizer + ema
    written = (
        max(total_steps // config.checkpoint.checkpoint_step_interval, 1)
        if config.checkpoint.checkpoint_step_interval
        else 1
    )
    kept = min(written, (config.checkpoint.checkpoints_total_limit or written) + 1)
    rows = [
        Row("latents to be cached", cached[0]),
        Row("captions to be cached", cached[1]),
        Row(f"{count_text(kept, 'checkpoint')} of {bytes_text(checkpoint)}", kept * checkpoint),
        Row("the best checkpoint", checkpoint if keeps_best(loaded) else 0),
        Row("final weights", shapes.trained_bytes * (2 if config.training.use_ema else 1)),
        Row(LOGS, LOG_BYTES),
    ]
    return [row for row in rows if row.num_bytes]


def keeps_best(loaded: LoadedRun) -> bool:
    """Whether the state with the lowest eval loss is kept beside the numbered checkpoints."""
    options = loaded.config.evaluation
    has_images = bool(options.eval_holdout) or any(entry.dataset_type == "eval" for entry in loaded.datasets)
    return options.has_interval and has_images and options.checkpoint_keep_best is not False


def earlier_notes(output_dir: Path) -> list[str]:
    """What earlier runs left in the output folder, and the command that deletes it."""
    count, num_bytes = earlier_size(output_dir)
    if not count:
        return []
    runs = count_text(count, "earlier run")
    return [f"{bytes_text(num_bytes)} of {runs} in {output_dir}; to delete: {delete_command(output_dir)}"]


def count_loads(training: Sequence[Dataset], sampler: Sampler) -> Counter[Load]:
    """Kinds of micro-batch -> how many of them the first epoch has; of a long epoch, a part of it.

    Images of a run with references all count with the largest ones, since prompts name them.
    """
    references = largest_references(training)
    regularisation = {dataset.id for dataset in training if dataset.is_regularisation}
    batches = sampler.batches_in(0)
    loads: Counter[Load] = Counter()
    for index in range(min(batches, MAX_BATCHES)):
        batch = sampler.batch(0, index * batches // min(batches, MAX_BATCHES))
        loads[Load(len(batch.sample_indices), *batch.size, batch.dataset_id in regularisation, references)] += 1
    return loads


def why_no_probe(family: ModelFamily, needed: int, available: int, operations: float, wanted: bool | None) -> str:
    """Why no step is timed; empty where steps are timed."""
    if wanted is not None:
        return "" if wanted else "--no-probe"
    if needed > 0.9 * available:
        return f"the memory that is needed is not available on {family.device}"
    if not family.source.is_local:
        return "the weights are on the hub; --probe fetches them"
    if family.device.type == "cpu" and operations > CPU_PROBE_OPERATIONS:
        return f"a batch takes {operations / 1e12:,.0f} tera-operations, too many for a CPU; --probe runs it anyway"
    return ""


def seconds_per_step(loads: Counter[Load], times: StepTimes, accumulation: int, rollout_depth: float = 0.0) -> float:
    """Mean over an epoch; sizes that were not timed count by their pixels.

    Args:
        rollout_depth: passes without gradients that a micro-batch takes before its own, on average.
    """

    def seconds(load: Load) -> float:
        nearest = min(times.micro_batch, key=lambda known: (known != load, abs(known.num_pixels - load.num_pixels)))
        rolled_out = 0.0 if load.is_regularisation else rollout_depth
        timed = times.micro_batch[nearest] + rolled_out * times.passes.get(nearest, 0.0)
        return timed * load.num_pixels / nearest.num_pixels

    mean = sum(seconds(load) * count for load, count in loads.items()) / loads.total()
    return mean * accumulation + times.update


def cache_needs(config: TrainConfig, family: ModelFamily, datasets: Sequence[Dataset]) -> tuple[int, int]:
    """(images, bytes) of the latents that are not there yet, over all datasets."""
    fingerprint = fingerprint_of_vae(family, Path(config.data.cache_dir))
    needs = [cache_need(config.data, family, dataset, fingerprint) for dataset in datasets]
    return sum(need.num_missing for need in needs), sum(need.bytes_missing for need in needs)


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def plan_lines(found: Plan) -> list[str]:
    """For the terminal."""
    share = f"{found.trained / found.parameters:.2%}" if found.parameters else "0 %"
    lines = [
        found.model,
        f"  {short_count(found.parameters)} parameters, {short_count(found.trained)} trained ({share})",
    ]
    lines += [
        "memory while training",
        *_rows(found.memory, found.memory_bytes, f"{bytes_text(found.available)} available", found.available),
    ]
    lines += [f"  {row.name}: {bytes_text(row.num_bytes)}" for row in found.other_activations]
    lines += ["disk", *_rows(found.disk, found.disk_bytes, f"{bytes_text(found.free_disk)} free", found.free_disk)]
    lines.append("time")
    if found.seconds is None:
        lines.append(f"  {count_text(found.steps, 'step')}")
    else:
        training, encoding = found.seconds
        each = f"{training / max(found.steps, 1):.3g} s each"
        lines.append(f"  {count_text(found.steps, 'step')}, {each}: {duration_text(training)}")
        lines.append(f"  encoding what is missing: {duration_text(encoding)}")
    return lines + [f"  {note}" for note in found.notes]


def _rows(rows: Sequence[Row], total: int, there: str, limit: int) -> list[str]:
    verdict = "" if total <= limit else ": NOT ENOUGH"
    table = [(bytes_text(row.num_bytes), row.name) for row in rows]
    return columns([*table, (bytes_text(total), f"together; {there}{verdict}")])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
