"""What this machine computes with, found out without importing torch, so that the answer comes at once."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 1 << 30
_DRIVER_SECONDS = 10


def missing_compiler(device_type: str) -> str | None:
    """What torch.compile lacks to make kernels for a kind of device; None where it is there."""
    if device_type in ("cpu", "meta"):
        # The one that torch calls: no other is tried.
        compiler = os.environ.get("CXX") or {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
        if not shutil.which(compiler.split()[0]):
            return f"a C++ compiler ({compiler})"
    elif importlib.util.find_spec("triton") is None:
        return "triton"
    # triton compiles a stub in C for each kernel.
    elif not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "a C compiler (gcc or clang)"
    # Kernels of both kinds are modules of Python, compiled against its headers.
    return None if has_python_headers() else "the headers of Python (python3-dev)"


def has_python_headers() -> bool:
    """Whether Python.h is where compilers look for it."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has in containers and under job schedulers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Hardware:
    """One machine.

    Args:
        device: what torch would train on.
        name: of the first accelerator, or of the CPU.
        device_bytes: memory of the first accelerator; of the machine where there is none.
        ram_bytes: main memory.
        cores: of the CPU.
        num_devices: accelerators of this kind.
    """

    device: Literal["cuda", "rocm", "mps", "cpu"]
    name: str
    device_bytes: int
    ram_bytes: int
    cores: int
    num_devices: int = 1

    @property
    def trainer(self) -> str:
        """What trains here, in a few words."""
        return "its CPU" if self.device == "cpu" else f"{self.name}, {self.device_bytes / GIB:.0f} GiB"

    def __str__(self) -> str:
        if self.device == "cpu":
            return (
                f"no accelerator; training runs on the CPU, with {self.ram_bytes / GIB:.0f} GiB and {self.cores} cores"
            )
        machine = f"{self.ram_bytes / GIB:.0f} GiB of main memory, {self.cores} cores"
        count = f"{self.num_devices} x " if self.num_devices > 1 else ""
        return f"{count}{self.name}, {self.device_bytes / GIB:.0f} GiB; {machine}"


# What GPUs that people own or rent have, in GiB.
USUAL_GPUS = (8, 12, 16, 24, 48, 80)


def gpu_with(gib: float) -> Hardware:
    """An NVIDIA GPU of that much memory in a machine as one rents it: for who prepares a run elsewhere."""
    return Hardware("cuda", f"a GPU with {gib:g} GiB", round(gib * GIB), 64 * GIB, 16)


def detect_hardware() -> Hardware:
    """The accelerator that a driver reports, else the CPU."""
    import psutil

    ram, cores = psutil.virtual_memory().total, psutil.cpu_count() or 1
    found = nvidia_gpus() or amd_gpus()
    if found:
        device, name, size = found[0]
        return Hardware(device, name, size, ram, cores, len(found))
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return Hardware("mps", "Apple GPU (shares the main memory)", ram, ram, cores)
    return Hardware("cpu", platform.processor() or platform.machine(), ram, ram, cores)


Accelerator = tuple[Literal["cuda", "rocm"], str, int]

# What hides accelerators of a kind from a program.
VISIBLE: Mapping[str, str] = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES"}
# The first Linux driver that runs programs of a CUDA version (CUDA release notes, table of driver versions).
LEAST_DRIVER: Mapping[str, str] = {"13": "580", "12": "525"}


def least_driver(cuda_version: str | None) -> str | None:
    """The oldest driver for a CUDA version such as 13.0; None where that is not known."""
    return LEAST_DRIVER.get((cuda_version or "").partition(".")[0])


def hidden_gpus(environment: Mapping[str, str]) -> list[Accelerator]:
    """GPUs that a driver reports and nobody has hidden; of AMD those that programs can open."""
    found = nvidia_gpus() or (amd_gpus() if os.access("/dev/kfd", os.R_OK | os.W_OK) else [])
    if not found:
        return []
    visible = environment.get(VISIBLE[found[0][0]])
    return found if visible is None or visible.strip() not in ("", "-1", "none") else []


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.split()), None)


def nvidia_gpus() -> list[Accelerator]:
    """(device, name, bytes) of each NVIDIA GPU; empty where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return read_nvidia_answer(result.stdout)


def read_nvidia_answer(text: str) -> list[Accelerator]:
    """`NVIDIA H200, 143771` per line, in MiB; lines without a number (`[N/A]`) are passed over."""
    found: list[Accelerator] = []
    for line in text.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            found.append(("cuda", name.strip(), int(mebibytes) << 20))
    return found


def amd_gpus(root: Path = Path("/sys/class/drm")) -> list[Accelerator]:
    """(device, name, bytes) of each AMD GPU that has memory of its own, from the kernel's driver."""
    found: list[Accelerator] = []
    for file in sorted(root.glob("card*/device/mem_info_vram_total")):
        try:
            size = int(file.read_text())
        except (OSError, ValueError):
            continue
        if size >= 4 * GIB:  # smaller ones are parts of processors
            found.append(("rocm", "AMD GPU", size))
    return found
