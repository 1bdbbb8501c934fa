"""What a machine is said to compute with, by drivers and compilers that a test makes up."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from simpletuner import hardware
from simpletuner.distributed import layout
from simpletuner.hardware import GIB, Hardware, amd_gpus, gpu_with, hidden_gpus, least_driver, missing_compiler

CARDS = [("cuda", "NVIDIA H200", 143771 << 20)]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Programs that the machine has."""
    found: set[str] = set()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").write_text("")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_compiler_for_the_processor_is_the_one_that_torch_calls(
    tools: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert missing_compiler("cpu") == missing_compiler("meta") == "a C++ compiler (g++)"
    tools.add("g++")
    assert missing_compiler("cpu") is None
    for system, compiler in (("Darwin", "clang++"), ("Windows", "cl")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        assert missing_compiler("cpu") == f"a C++ compiler ({compiler})"
    monkeypatch.setenv("CXX", "g++ -O2")
    assert missing_compiler("meta") is None
    (tmp_path / "include" / "Python.h").unlink()
    assert missing_compiler("cpu") == "the headers of Python (python3-dev)"


def test_kernels_for_a_gpu_need_triton_and_a_c_compiler(tools: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[object] = [None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[0] if name == "triton" else None)
    assert missing_compiler("cuda") == "triton"
    there[0] = object()
    assert missing_compiler("cuda") == "a C compiler (gcc or clang)"
    for compiler in ("cc", "gcc", "clang"):
        tools.add(compiler)
        assert missing_compiler("cuda") is None
        tools.clear()
    monkeypatch.setenv("CC", "mycc")
    tools.add("mycc")
    assert missing_compiler("cuda") is None


def test_a_machine_is_described_in_words() -> None:
    one = Hardware("cuda", "NVIDIA H200", 140 * GIB, 256 * GIB, 32)
    assert (one.num_devices, one.trainer) == (1, "NVIDIA H200, 140 GiB")
    assert str(one) == "NVIDIA H200, 140 GiB; 256 GiB of main memory, 32 cores"
    assert str(Hardware("cuda", "A", 80 * GIB, 256 * GIB, 32, 4)).startswith("4 x A, 80 GiB; ")
    alone = Hardware("cpu", "x86", 8 * GIB, 8 * GIB, 2)
    assert alone.trainer == "its CPU"
    assert str(alone) == "no accelerator; training runs on the CPU, with 8 GiB and 2 cores"
    assert gpu_with(24.5) == Hardware("cuda", "a GPU with 24.5 GiB", 24 * GIB + GIB // 2, 64 * GIB, 16, 1)
    assert hardware.USUAL_GPUS == (8, 12, 16, 24, 48, 80)


def test_the_first_accelerator_that_a_driver_reports_trains_else_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    monkeypatch.setattr(psutil, "cpu_count", lambda: None)
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: CARDS * 2)
    monkeypatch.setattr(hardware, "amd_gpus", lambda: [("rocm", "AMD GPU", GIB)])
    assert hardware.detect_hardware() == Hardware("cuda", "NVIDIA H200", 143771 << 20, 64 * GIB, 1, 2)
    monkeypatch.setattr(hardware, "nvidia_gpus", list)
    assert hardware.detect_hardware() == Hardware("rocm", "AMD GPU", GIB, 64 * GIB, 1, 1)
    monkeypatch.setattr(hardware, "amd_gpus", list)
    for system, machine, device in (("Darwin", "arm64", "mps"), ("Darwin", "x86_64", "cpu"), ("Linux", "arm64", "cpu")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(platform, "processor", lambda: "")
        found = hardware.detect_hardware()
        assert (found.device, found.device_bytes, found.ram_bytes) == (device, 64 * GIB, 64 * GIB)
        assert found.name == ("Apple GPU (shares the main memory)" if device == "mps" else machine)


def test_drivers_are_asked_in_their_own_words_and_one_that_is_silent_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], dict[str, object]]] = []
    answers = ["535.183.01\n535.183.01\n", "NVIDIA H200, 143771\n"]

    def run(words: list[str], **options: object) -> SimpleNamespace:
        asked.append((words, options))
        if not answers:
            raise subprocess.TimeoutExpired(words, 10)
        return SimpleNamespace(stdout=answers.pop(0))

    monkeypatch.setattr(subprocess, "run", run)
    assert hardware.nvidia_driver() == "535.183.01"
    assert hardware.nvidia_gpus() == CARDS
    options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    assert asked == [
        (["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], options),
        (["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"], options),
    ]
    assert hardware.nvidia_driver() is None
    assert hardware.nvidia_gpus() == []
    answers.append("\n")
    assert hardware.nvidia_driver() is None


def test_gpus_that_somebody_has_hidden_are_meant_to_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    amd = [("rocm", "AMD GPU", 24 * GIB)]
    opens: list[tuple[object, ...]] = []
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: CARDS)
    monkeypatch.setattr(hardware, "amd_gpus", lambda: amd)
    monkeypatch.setattr(os, "access", lambda *given: bool(opens.append(given)) or len(opens) < 3)
    for value, found in ((None, CARDS), ("0", CARDS), ("", []), (" -1 ", []), ("none", [])):
        assert hidden_gpus({} if value is None else {"CUDA_VISIBLE_DEVICES": value}) == found
    assert hidden_gpus({"HIP_VISIBLE_DEVICES": ""}) == CARDS
    assert opens == []
    monkeypatch.setattr(hardware, "nvidia_gpus", list)
    assert hidden_gpus({"CUDA_VISIBLE_DEVICES": ""}) == amd
    assert hidden_gpus({"HIP_VISIBLE_DEVICES": "-1"}) == []
    assert hidden_gpus({}) == []  # nobody may open them
    assert opens == [("/dev/kfd", os.R_OK | os.W_OK)] * 3


def test_a_driver_s_least_version_is_that_of_the_release_notes() -> None:
    assert [least_driver(version) for version in ("13.0", "12.8", "11.8", None)] == ["580", "525", None, None]


def test_an_amd_gpu_has_four_gibibytes_of_its_own_and_others_are_parts_of_processors(tmp_path: Path) -> None:
    for card, text in (("card0", f"{4 * GIB}\n"), ("card1", f"{4 * GIB - 1}"), ("card2", "unknown")):
        (tmp_path / card / "device").mkdir(parents=True)
        (tmp_path / card / "device" / "mem_info_vram_total").write_text(text)
    assert amd_gpus(tmp_path) == [("rocm", "AMD GPU", 4 * GIB)]


def test_without_a_number_there_is_a_process_for_each_accelerator_that_is_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    cards: list[list[object]] = [[1, 2, 3], [1, 2]]
    monkeypatch.setattr(layout, "nvidia_gpus", lambda: cards[0])
    monkeypatch.setattr(layout, "amd_gpus", lambda: cards[1])
    assert layout.visible_accelerators() == 3
    cards[0] = []
    assert layout.visible_accelerators() == 2
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1, ,-1")
    assert layout.visible_accelerators() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert layout.visible_accelerators() == 4
    options = SimpleNamespace(
        num_processes=None, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", main_process_port=29500
    )
    assert layout.layout_of(options) == layout.Layout(4, 2, 1, "10.0.0.1", 29500)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert layout.layout_of(options).num_processes == 1
    options.num_processes = 3
    assert layout.layout_of(options).num_processes == 3
