"""Everything that only a GPU can tell, in one command: measurements, full-size rows, and both beside what is published.

    python benchmarks/gpu.py [--file gpu.json] [--minutes 8] [--only NAME,...] [--list]
    python benchmarks/gpu.py --tiny       # all of it on a tiny shape, on the CPU: does it run?
    python benchmarks/gpu.py --wheels     # what a bare machine with torch 2.11 needs, for `pip download`

A call takes at most eight minutes and stops by itself; the same command goes on with what the file lacks, and exits
with 3 as long as something is left. Each part has a process and a limit of its own; one that fails says so and ends no
other. The last line is the file's content, one JSON object. Exit code 1 where a goal is missed, 2 without a GPU.

Where no registry can be reached, make the wheels elsewhere (`pip download --no-deps --dest wheels $(python
benchmarks/gpu.py --wheels)`, under 60 MB together), copy them with the clone, and set PYTHONPATH to the folder in which
`pip install --no-deps --target` has unpacked them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# On a bare machine the clone is not installed: neither here nor for the programs that are started.
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))

# What is imported here and not part of an installation of torch 2.11 with its own requirements (numpy among them).
WHEELS = (
    "diffusers", "transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate", "peft", "lycoris-lora",
    "einops", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typer", "click", "shellingham",
    "rich", "markdown-it-py", "mdurl", "pygments", "pillow", "httpx", "httpcore", "anyio", "h11", "idna", "certifi",
    "psutil", "tenacity", "regex", "tqdm", "requests", "urllib3", "charset-normalizer", "PyYAML", "packaging",
    "hf-xet", "optimum-quanto", "torchao", "toml", "importlib-metadata", "zipp", "lazy-importer", "httpx2", "httpcore2",
    "truststore", "annotated-doc", "typing-extensions", "jinja2", "markupsafe",
)  # fmt: skip
# Done without: bitsandbytes (the row nf4), deepspeed, wandb, tensorboard; matplotlib, without which a run warns that it
# has no loss curve; ninja, with which quanto would compile.
LIMIT_SECONDS = {"8 resumed bits": 420, "10 number formats": 420, "published": 420}
USUAL_LIMIT_SECONDS = 240
LEFT = 3


def parts(setting: Any) -> dict[str, Callable[[Any], dict[str, Any]]]:
    """Name -> what measures it, in order: what answers most comes first."""
    from gpu_measures import MEASURES
    from gpu_rows import FAMILY_ROWS, ROWS, measure

    rows = {f"row: {name}": partial(measure, row) for name, row in ROWS.items()}
    others = {f"family: {name}": partial(measure, row) for name, row in FAMILY_ROWS.items()}
    pairs = {
        f"published: {family} {adapter}{' recomputed' * recomputes}": partial(
            against_published, family, adapter, recomputes
        )
        for family, recomputes in (("omnigen", False), ("omnigen", True), ("flux", True))
        for adapter in ("lora", "lokr")
    }
    return {**MEASURES, **rows, **pairs, **others}


def against_published(family: str, adapter: str, recomputes: bool, setting: Any) -> dict[str, Any]:
    """Ours, then diffusers with PEFT, in this process: seconds and peak of a forward and backward pass."""
    import statistics

    import torch
    from gpu_rows import TINY, now
    from public_models import FLUX_TINY, ours, published

    shape = None if setting.is_full else TINY if family == "omnigen" else FLUX_TINY
    found: dict[str, Any] = {}
    for name, make in (("ours", ours), ("published", published)):
        side = make(family, adapter, recomputes, setting.device, setting.pixels, shape)
        is_cuda = setting.device.type == "cuda"
        seconds = []
        for number in range(3 + setting.steps):
            if is_cuda and number == 3:
                torch.cuda.reset_peak_memory_stats()
            started = now(setting.device)
            with torch.autocast(setting.device.type, torch.bfloat16):
                loss = side.losses()
            loss.backward()
            for parameter in side.parameters:
                parameter.grad = None
            seconds.append(now(setting.device) - started)
        peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None
        found[name] = {"seconds": round(statistics.median(seconds[3:]), 4), "peak_gib": peak and round(peak, 2)}
        del side, loss, parameter
        if is_cuda:
            torch.cuda.empty_cache()
    found["ratio"] = round(found["ours"]["seconds"] / found["published"]["seconds"], 3)
    return found


def in_its_own_process(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """A part whose memory and failures are its own: its figures, or what went wrong."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(timeout, 1))
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:.0f} s"}
    lines = (result.stderr if result.returncode else result.stdout).strip().splitlines()
    if result.returncode:
        return {"error": lines[-1] if lines else f"ended with {result.returncode} and without a word"}
    return json.loads(lines[-1])


def limit_of(name: str) -> float:
    return next((limit for begin, limit in LIMIT_SECONDS.items() if name.startswith(begin)), USUAL_LIMIT_SECONDS)


def run_parts(names: Sequence[str], file: Path, minutes: float, command: Sequence[str]) -> dict[str, Any]:
    """Measure what the file lacks, until the time is over; the content of the file.

    What ran out of the call's time, not of its own, is taken again by the next call.
    """
    ends = time.monotonic() + 60 * minutes
    found = json.loads(file.read_text()) if file.exists() else {"benchmark": "gpu", "parts": {}}
    for name in names:
        if name in found["parts"]:
            continue
        left = ends - time.monotonic()
        if left < min(60.0, limit_of(name)) and minutes > 1:
            break
        limit = min(limit_of(name), left)
        result = in_its_own_process([*command, f"--one={name}"], limit)
        if "took longer" in str(result.get("error")) and limit < limit_of(name):
            break
        found["parts"][name] = result
        print(f"{name}: {json.dumps(result)}", flush=True)
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(file)
    return found


def missed_goals(found: dict[str, Any]) -> list[str]:
    from gpu_rows import ROWS, is_missed

    rows = {name.removeprefix("row: "): part for name, part in found["parts"].items() if name.startswith("row: ")}
    return [name for name, part in rows.items() if is_missed(ROWS[name], part)]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path("gpu.json"), help="figures so far; a call adds to it")
    parser.add_argument("--minutes", type=float, default=8, help="of this call")
    parser.add_argument("--only", help="names of parts, or their beginnings, with commas")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--list", action="store_true", help="the names of all parts")
    parser.add_argument("--wheels", action="store_true", help="what a bare machine needs, pinned")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def pinned(names: Sequence[str]) -> list[str]:
    """The packages in the versions of `constraints.txt`."""
    lines = (Path(__file__).resolve().parent.parent / "constraints.txt").read_text().splitlines()
    versions = {line.partition("==")[0].lower().replace("_", "-"): line for line in lines if "==" in line}
    return [versions[name.lower().replace("_", "-")] for name in names]


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.wheels:
        print(" ".join(pinned(WHEELS)))
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from gpu_rows import setting_of

    setting = setting_of(arguments.tiny, arguments.pixels, arguments.batch, arguments.steps)
    every = parts(setting)
    if arguments.list:
        print("\n".join(every))
        return 0
    if not arguments.tiny and not torch.cuda.is_available():
        print("this machine has no CUDA device: there is nothing to measure (--tiny tries every part on the CPU)")
        return 2
    if arguments.one:
        print(json.dumps(every[arguments.one](setting)))
        return 0
    wanted = [begin.strip() for begin in arguments.only.split(",")] if arguments.only else [""]
    names = [name for name in every if name.startswith(tuple(wanted))]
    command = [sys.executable, __file__, *["--tiny"] * arguments.tiny]
    command += [f"--{key}={getattr(arguments, key)}" for key in ("pixels", "batch", "steps")]
    found = run_parts(names, arguments.file, arguments.minutes, command)
    found["device"] = "processor, tiny shape" if arguments.tiny else torch.cuda.get_device_name()
    found["torch"] = torch.__version__
    left = [name for name in names if name not in found["parts"]]
    if left:
        print(f"{len(left)} parts are left: the same command goes on with {left[0]}")
    print(json.dumps(found))
    if left:
        return LEFT
    if arguments.tiny:
        return int(any("error" in part for part in found["parts"].values()))
    return int(bool(missed_goals(found)))


if __name__ == "__main__":
    sys.exit(main())
