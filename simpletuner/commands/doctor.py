"""`simpletuner doctor`: what of this machine and installation would stand in the way of training.

One line for each thing that is looked at, with the remedy where there is one. Nothing is changed, nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpletuner.errors import EXIT_CONFIG, EXIT_OK, bytes_text
from simpletuner.hardware import GIB, Hardware, detect_hardware, missing_compiler
from simpletuner.reporting.trackers.readiness import wandb_problems
from simpletuner.text import without_login

State = Literal["ok", "note", "fault"]

OLDEST_PYTHON = (3, 11)
LITTLE_MEMORY = 12 * GIB
LITTLE_DISK = 20 * GIB
# Of those who work on the program; users need none of it.
_NOT_FOR_USERS = ("dev",)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        state: `fault` stands in the way of training, `note` may.
        name: what it is.
        text: what was found.
        remedy: what to do.
    """

    state: State
    name: str
    text: str
    remedy: str | None = None

    def line(self) -> str:
        before = "; " if self.state == "ok" else "; fix: "
        remedy = before + self.remedy if self.remedy else ""
        return f"{self.state:<6}{self.name:<11}{self.text}{remedy}"


def doctor(environment: Mapping[str, str], working_dir: Path, say: Callable[[str], None]) -> int:
    """Look at everything, say one line for each; the exit code: 2 where something stands in the way of training."""
    faults = notes = 0
    for finding in findings(environment, working_dir):
        say(finding.line())
        faults += finding.state == "fault"
        notes += finding.state == "note"
    found = [f"{faults} {'fault' if faults == 1 else 'faults'}"] if faults else ["ready to train"]
    say(f"\n{', '.join([*found, *([f'{notes} noted'] if notes else [])])}")
    return EXIT_CONFIG if faults else EXIT_OK


def findings(environment: Mapping[str, str], working_dir: Path) -> Iterator[Finding]:
    """Everything that is looked at, in the order in which it is reported."""
    hardware = detect_hardware()
    yield look_at_python(sys.version_info[:3], sys.prefix != sys.base_prefix)
    yield from look_at_torch(hardware)
    if hardware.device == "cuda":
        yield look_at_compiler(missing_compiler("cuda"))
    yield look_at_memory(hardware)
    yield look_at_disk(working_dir)
    requirements = importlib.metadata.requires("simpletuner") or []
    yield look_at_versions(requirements, installed_version)
    yield from look_at_extras(requirements, installed_version)
    yield look_at_caches(environment)
    yield from look_at_logins(environment)


# ---- the program ---------------------------------------------------------------------------------------------------


def look_at_python(version: tuple[int, ...], is_virtual: bool) -> Finding:
    shown = ".".join(str(number) for number in version)
    if version < OLDEST_PYTHON:
        return Finding("fault", "python", shown, "install Python 3.11 or newer")
    if not is_virtual:
        remedy = "python -m venv .venv, and install there"
        return Finding("note", "python", f"{shown}, shared with the system: other programs may change versions", remedy)
    return Finding("ok", "python", f"{shown} in {sys.prefix}")


def look_at_versions(requirements: list[str], version_of: Callable[[str], str | None]) -> Finding:
    """What the base install asks for, against what is there."""
    wrong, count = _unmet(requirements, version_of)
    if wrong:
        remedy = "pip install -c constraints.txt . in the clone"
        return Finding("fault", "versions", f"{', '.join(wrong)} of {count} packages have unsuitable versions", remedy)
    return Finding("ok", "versions", f"all {count} required packages have suitable versions")


def look_at_extras(requirements: list[str], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Optional packages by the name of their extra."""
    from packaging.requirements import Requirement

    markers = [str(Requirement(text).marker) for text in requirements]
    parts = (marker.partition('extra == "')[2].partition('"')[0] for marker in markers)
    complete = []
    for extra in dict.fromkeys(name for name in parts if name and name not in _NOT_FOR_USERS):
        unmet, _ = _unmet(requirements, version_of, extra)
        if unmet:
            remedy = f"where it is needed: pip install -c constraints.txt '.[{extra}]'"
            yield Finding("ok", "optional", f"{extra}: {', '.join(unmet)}", remedy)
        else:
            complete.append(extra)
    if complete:
        yield Finding("ok", "optional", f"complete: {', '.join(complete)}")


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet(
    requirements: list[str], version_of: Callable[[str], str | None], extra: str | None = None
) -> tuple[list[str], int]:
    """What is missing or of another version, and how many packages were asked for: of the base, or of an extra."""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for requirement in map(Requirement, requirements):
        of_base = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        wanted = requirement.marker is not None and requirement.marker.evaluate({"extra": extra or ""})
        if of_base if extra is None else (wanted and not of_base):
            count += 1
            version = version_of(requirement.name)
            if version is None:
                wrong.append(f"{requirement.name} is missing")
            elif not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    return wrong, count


# ---- the machine ---------------------------------------------------------------------------------------------------


def look_at_torch(hardware: Hardware) -> Iterator[Finding]:
    """Whether torch can be imported, and sees the accelerator that the driver reports."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing shared library raises OSError
        yield Finding("fault", "torch", f"cannot be imported: {error}", "pip install -c constraints.txt .")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not torch.version.cuda and not torch.version.hip:
        build = "for the CPU" + (" and Apple GPUs" if torch.backends.mps.is_available() else "")
    yield Finding("ok", "torch", f"{torch.__version__}, {build}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            text = f"{torch.cuda.get_device_name(number)}, {bytes_text(free)} of {bytes_text(total)} free"
            no_bf16 = "it does not support bf16: set mixed_precision to no"
            supports_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            yield Finding("ok", "device", text) if supports_bf16 else Finding("note", "device", text, no_bf16)
        return
    yield look_at_device(hardware, bool(torch.version.cuda or torch.version.hip), torch.backends.mps.is_available())


def look_at_device(hardware: Hardware, has_gpu_build: bool, has_mps: bool) -> Finding:
    """The device where torch sees no CUDA or ROCm device."""
    if hardware.device in ("cuda", "rocm"):
        hidden, kind = ("CUDA", "CUDA") if hardware.device == "cuda" else ("HIP", "ROCm")
        remedy = (
            f"update the driver, or check {hidden}_VISIBLE_DEVICES"
            if has_gpu_build
            else f"install torch from PyTorch's index for {kind}: INSTALL.md, torch for your hardware"
        )
        return Finding("fault", "device", f"the driver reports {hardware.name}, but torch does not see it", remedy)
    if has_mps:
        return Finding("ok", "device", "Apple GPU (mps)")
    return Finding("note", "device", "no accelerator: training runs on the CPU, which suits only tiny models")


def look_at_compiler(missing: str | None) -> Finding:
    """Whether kernels can be compiled for a GPU; without them torch's own compute."""
    if missing is None:
        return Finding("ok", "compiler", "Triton, a C compiler and Python's headers: kernels can be compiled")
    text = f"kernels cannot be compiled (LoKr, dynamo_backend inductor, some optimizers): {missing} is missing"
    return Finding("note", "compiler", text, "apt install gcc python3-dev; Triton comes with torch on Linux")


def look_at_memory(hardware: Hardware) -> Finding:
    import psutil

    available = psutil.virtual_memory().available
    text = f"{bytes_text(available)} of {bytes_text(hardware.ram_bytes)} free, {hardware.cores} cores"
    if available < LITTLE_MEMORY:
        return Finding("note", "memory", text, "close other programs; models of billions of weights need more to load")
    return Finding("ok", "memory", text)


def look_at_disk(working_dir: Path) -> Finding:
    free = shutil.disk_usage(working_dir).free
    text = f"{bytes_text(free)} free at {working_dir}"
    if not os.access(working_dir, os.W_OK):
        return Finding("fault", "disk", f"{working_dir} cannot be written", "use a folder that you can write to")
    if free < LITTLE_DISK:
        return Finding("note", "disk", text, "free some space: models, caches and checkpoints take tens of GiB")
    return Finding("ok", "disk", text)


# ---- accounts and what is kept -------------------------------------------------------------------------------------


def look_at_caches(environment: Mapping[str, str]) -> Finding:
    """Where models of the hub are kept."""
    home = Path(environment.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    folder = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK):
        return Finding("fault", "hub cache", f"{folder} cannot be written", "set HF_HOME to a writable folder")
    count = sum(1 for _ in folder.glob("models--*"))
    free = bytes_text(shutil.disk_usage(existing).free)
    return Finding("ok", "hub cache", f"{count} models in {folder}, {free} free")


def look_at_logins(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether there are keys, not whether they are good: nothing is sent anywhere."""
    from huggingface_hub import get_token

    endpoint = environment.get("HF_ENDPOINT")
    at = f" at {without_login(endpoint)}" if endpoint else ""
    if environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("note", "hub", "HF_HUB_OFFLINE is set: models cannot be downloaded", "unset it")
    elif get_token():
        yield Finding("ok", "hub", f"logged in{at}")
    else:
        yield Finding("ok", "hub", f"not logged in{at}", "for gated models and uploads: hf auth login")
    problems = list(wandb_problems(environment, Path.cwd()))
    if problems:
        yield Finding("ok", "wandb", "not logged in", "where report_to names it: wandb login")
    else:
        yield Finding("ok", "wandb", "logged in, or not online")
