"""Trains a matrix of tiny runs and prints what each left: losses, and digests of tensors, keys, images and files.

Use it to show that a change leaves every result as it was. Times, run ids and versions are not recorded. The script
uses only what a user has (the files of a run, the `train` command, the output folder), so it also runs an older tree:

    python scripts/same_results.py --tree ../older-clone > before.json
    python scripts/same_results.py --compare before.json        # exit code 1 and the rows that differ

A row is FAMILY/ADAPTER/VARIANT; `--rows 'sdxl/*/masks'` takes some, `--quick` takes one or two of each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import pkgutil
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Facts = dict[str, Any]

FAMILIES = ("omnigen", "sdxl", "flux", "sd3", "kolors", "hunyuan_dit")
ADAPTERS: Mapping[str, Facts] = {
    "lokr": {"lora_type": "lycoris", "lycoris_config": "lycoris_config.json"},
    "lora": {"lora_type": "standard", "lora_rank": 4},
    "dora": {"lora_type": "standard", "lora_rank": 4, "use_dora": True},
    "full": {"model_type": "full"},
}
# Options of each variant. Masks and regularization are datasets; "resumed" trains to step 2 first.
VARIANTS: Mapping[str, Facts] = {
    "plain": {
        "validation_disable": False,
        "validation_prompt": "a box",
        "validation_resolution": "64",
        "validation_num_inference_steps": 2,
    },
    "int8": {"base_model_precision": "int8-quanto"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "ema": {"use_ema": True, "ema_decay": 0.9},
    "masks": {},
    "regularization": {},
    "rollout": {"scheduled_sampling_max_step_offset": 3, "scheduled_sampling_probability": 0.7},
    "resumed": {"use_ema": True, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"},
    "objective": {
        "loss_type": "huber",
        "snr_gamma": 5,
        "offset_noise": True,
        "noise_offset_probability": 0.5,
        "input_perturbation": 0.1,
        "timestep_bias_strategy": "later",
        "timestep_bias_multiplier": 3,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "optimizer": "adamw_bf16",
    },
}
QUICK = (
    "omnigen/lokr/plain",
    "omnigen/full/accumulation",
    "sdxl/lora/masks",
    "sdxl/lokr/objective",
    "flux/dora/regularization",
    "flux/lora/int8",
    "sd3/lokr/rollout",
    "sd3/lora/resumed",
)
LYCORIS = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 4,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 4}}},
}
OPTIONS = {
    "output_dir": "output",
    "cache_dir": "cache",
    "data_backend_config": "multidatabackend.json",
    "seed": 3,
    "resolution": 64,
    "resolution_type": "pixel_area",
    "train_batch_size": 2,
    "max_train_steps": 3,
    "num_train_epochs": 0,
    "mixed_precision": "no",
    "optimizer": "adamw",
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "caption_dropout_probability": 0.3,
    "validation_disable": True,
    "checkpoint_step_interval": 2,
    "eval_steps_interval": 3,
    "eval_timesteps": 2,
    "report_to": "none",
}
# What is recorded of a line of metrics.jsonl.
RECORDED = {
    "step_done": ("loss", "learning_rate", "grad_norm", "samples", "epoch", "extra"),
    "eval_done": ("pooled", "losses", "per_quantile", "reference", "reference_per_quantile"),
    "loss_by_sigma": ("bins",),
}
# Names in the metadata of a tensor file whose values hold times, versions, the run's id or paths.
UNSTABLE = ("simpletuner", "version", "date", "hash", "time", "id", "path", "name")


def all_rows() -> list[str]:
    return [f"{family}/{adapter}/{kind}" for family in FAMILIES for adapter in ADAPTERS for kind in VARIANTS]


def write_images(folder: Path, count: int, seed: int, *, size: int = 64, is_mask: bool = False) -> None:
    """PNGs of one rectangle each; a mask is white in the rectangle, any other image has a caption file."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for index in range(count):
        left, top = rng.randrange(size // 2), rng.randrange(size // 2)
        ground, color = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        image = Image.new("RGB", (size, size), (0, 0, 0) if is_mask else ground)
        box = (left, top, left + size // 2, top + size // 3)
        ImageDraw.Draw(image).rectangle(box, fill=(255, 255, 255) if is_mask else color)
        image.save(folder / f"{index:03d}.png")
        if not is_mask:
            (folder / f"{index:03d}.txt").write_text(f"image {index} of set {seed}\n")


def write_run(folder: Path, model: Path, row: str) -> None:
    """The images and the JSON files of a row's run."""
    family, adapter, variant = row.split("/")
    write_images(folder / "images", 5, seed=1)
    write_images(folder / "held_out", 2, seed=2)
    data = [_dataset("images", repeats=1), _dataset("held_out", dataset_type="eval")]
    if variant == "masks":
        write_images(folder / "masks", 5, seed=3, is_mask=True)
        data[0]["conditioning_data"] = "masks"
        data.append(_dataset("masks", dataset_type="conditioning", conditioning_type="mask"))
    if variant == "regularization":
        write_images(folder / "others", 3, seed=4)
        # So many repeats that some of the few steps are of this dataset.
        data.append(_dataset("others", is_regularisation_data=True, repeats=5))
    model_options = {"model_family": family, "pretrained_model_name_or_path": str(model)}
    config = OPTIONS | model_options | ADAPTERS[adapter] | VARIANTS[variant]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "multidatabackend.json").write_text(json.dumps(data))
    (folder / "lycoris_config.json").write_text(json.dumps(LYCORIS))


def _dataset(name: str, **keys: Any) -> Facts:
    entry = {"id": name, "type": "local", "instance_data_dir": name, "caption_strategy": "textfile", "resolution": 64}
    return entry | keys


def train(folder: Path, *arguments: str) -> int:
    """`simpletuner train ARGUMENTS` in `folder`, in a fork of this process.

    Returns:
        The exit code.
    """

    def command() -> None:
        os.chdir(folder)
        sys.argv = ["simpletuner", "train", *arguments]
        import_module("simpletuner.cli").main()

    return in_fork(command, folder / "log")


def in_fork(work: Callable[[], None], log: Path) -> int:
    """Do work in a fork of this process, which keeps what it imports to itself; returns the exit code.

    Args:
        log: gets what the work prints.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except BaseException:  # noqa: BLE001 - the fork must end here, whatever it was
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_row(row: str, folder: Path, models: Path) -> Facts:
    """Train a row, and what it left."""
    folder.mkdir(parents=True)
    write_run(folder, models / row.partition("/")[0], row)
    starts = [["--max_train_steps=2"], []] if row.endswith("/resumed") else [[]]
    codes = [train(folder, *arguments) for arguments in starts]
    return {"exit": codes, **facts_of(folder)}


def facts_of(folder: Path) -> Facts:
    """What a run left: numbers of metrics.jsonl, digests of tensors and images, names of files."""
    output = folder / "output"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.is_relative_to(output))
    cached = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
    images = [path for path in files if path.suffix == ".png" and {"validation_images", "benchmarks"} & {*path.parts}]
    return {
        "metrics": metrics_facts(output / "metrics.jsonl"),
        "tensors": {
            _stable_name(path, folder): tensor_facts(path)
            for path in [*files, *cached]
            if path.suffix == ".safetensors"
        },
        "images": {_stable_name(path, folder): image_digest(path) for path in images},
        "files": sorted({_stable_name(path, folder) for path in [*files, *cached]}),
    }


def _stable_name(path: Path, folder: Path) -> str:
    """A file's name in its run; digests of paths and random names are left out."""
    return re.sub(r"[0-9a-f]{16,}", "*", str(path.relative_to(folder)))


def metrics_facts(path: Path) -> Facts:
    facts: Facts = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        record = json.loads(line)
        names = RECORDED.get(record["event"], ())
        for name in names:
            facts[f"{record['event']}.{record['step']}.{name}"] = record[name]
    return facts


def tensor_facts(path: Path) -> Facts:
    """Digests of a tensor file: its keys with types and shapes, its numbers, and what its metadata says."""
    import torch
    from safetensors import safe_open

    keys, numbers = hashlib.sha256(), hashlib.sha256()
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key).contiguous()
            keys.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            numbers.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    stable = {key: value for key, value in metadata.items() if not any(word in key.lower() for word in UNSTABLE)}
    said = json.dumps([sorted(metadata), stable], sort_keys=True)
    return {"keys": keys.hexdigest()[:16], "numbers": numbers.hexdigest()[:16], "metadata": digest(said.encode())}


def image_digest(path: Path) -> str:
    from PIL import Image

    image = Image.open(path).convert("RGB")
    return digest(str(image.size).encode() + image.tobytes())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def flat(facts: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each fact with the path of its keys."""
    if isinstance(facts, list) and all(isinstance(name, str) for name in facts):
        facts = dict.fromkeys(facts, "is there")
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from flat(value, f"{name} > {key}" if name else key)
    else:
        yield name, facts


def differences(before: Facts, after: Facts) -> list[str]:
    """What a row of `before` has that `after` has not, or has otherwise; additions come last, marked with +."""
    old, new = dict(flat(before)), dict(flat(after))
    lines = [f"{name}: {old[name]} -> {new.get(name, 'missing')}" for name in old if old[name] != new.get(name)]
    return lines + [f"+ {name}: {new[name]}" for name in new if name not in old]


def compare(before: Mapping[str, Facts], after: Mapping[str, Facts]) -> int:
    """Print which rows differ, and how; returns how many."""
    found = {row: differences(before[row], facts) for row, facts in after.items() if row in before}
    changed = {row: lines for row, lines in found.items() if lines}
    for row, lines in changed.items():
        print(row)
        print(*(f"    {line}" for line in lines[:12]), sep="\n")
        if len(lines) > 12:
            print(f"    and {len(lines) - 12} more")
    for row in after.keys() - before.keys():
        print(f"{row}: not in the earlier file")
    print(f"{len(found) - len(changed)} of {len(found)} rows are equal")
    return len(changed)


def build_models(folder: Path, families: set[str]) -> None:
    """Tiny random models of this tree's tests, the same for every tree that is tried."""

    def build() -> None:
        sys.path.insert(0, str(ROOT))
        builders = import_module("tests.tiny_folders").TINY_FOLDERS
        for family in sorted(families):
            builders[family](folder / family)

    folder.mkdir(parents=True)
    if in_fork(build, folder / "log"):  # in a fork, since the builders import this tree's package
        raise SystemExit((folder / "log").read_text())


def import_package(tree: Path) -> ModuleType:
    """The package of `tree`, and of no other clone or installation."""
    sys.path.insert(0, str(tree))
    package = import_module("simpletuner")
    if not Path(str(package.__file__)).is_relative_to(tree):
        raise SystemExit(f"simpletuner was imported from {package.__file__}, not from {tree}")
    return package


def run_matrix(rows: list[str], tree: Path, folder: Path) -> dict[str, Facts]:
    """Train the rows with the package of `tree`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    build_models(folder / "models", {row.partition("/")[0] for row in rows})
    package = import_package(tree)
    for module in pkgutil.walk_packages(package.__path__, "simpletuner."):  # once, and not in each fork
        if not module.name.endswith("__main__"):
            import_module(module.name)
    results = {}
    for row in rows:
        started = time.monotonic()
        results[row] = run_row(row, folder / row.replace("/", "-"), folder / "models")
        print(f"{row}: exit {results[row]['exit']}, {time.monotonic() - started:.1f} s", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the clone whose package is used; this one")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="which rows; all")
    parser.add_argument("--quick", action="store_true", help=f"only {len(QUICK)} rows")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what an earlier call printed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs in this new folder")
    given = parser.parse_args()
    names = QUICK if given.quick else all_rows()
    rows = [row for row in names if any(fnmatch.fnmatch(row, pattern) for pattern in given.rows)]
    if not rows:
        parser.error(f"no row matches {' '.join(given.rows)}; rows are FAMILY/ADAPTER/VARIANT")
    # Libraries print warnings to standard output when they are imported.
    with tempfile.TemporaryDirectory(prefix="same-results-") as temporary, contextlib.redirect_stdout(sys.stderr):
        after = run_matrix(rows, given.tree.resolve(), given.keep.resolve() if given.keep else Path(temporary))
    if given.compare is None:
        print(json.dumps(after, indent=1))
        return
    raise SystemExit(1 if compare(json.loads(given.compare.read_text()), after) else 0)


if __name__ == "__main__":
    main()
