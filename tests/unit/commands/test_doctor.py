"""What `simpletuner doctor` makes of machines and installations that are not this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from simpletuner.commands.doctor import (
    doctor,
    findings,
    look_at_caches,
    look_at_compiler,
    look_at_device,
    look_at_disk,
    look_at_extras,
    look_at_logins,
    look_at_memory,
    look_at_python,
    look_at_versions,
)
from simpletuner.hardware import GIB, Hardware, amd_gpus, read_nvidia_answer

GPU = Hardware("cuda", "NVIDIA H200", 140 * GIB, 128 * GIB, 16)
REQUIREMENTS = [
    "torch>=2.10",
    "rich>=14",
    "winonly>=1; sys_platform == 'nowhere'",
    'bitsandbytes>=0.49; extra == "cuda"',
    'pytest>=9; extra == "dev"',
]


def test_a_gpu_that_torch_does_not_see_is_a_fault_and_names_the_build():
    finding = look_at_device(GPU, has_gpu_build=False, has_mps=False)
    assert finding.state == "fault"
    assert "NVIDIA H200" in finding.text
    assert "PyTorch's index for CUDA" in str(finding.remedy)
    amd = Hardware("rocm", "AMD GPU", 24 * GIB, 64 * GIB, 16)
    assert "PyTorch's index for ROCm" in str(look_at_device(amd, has_gpu_build=False, has_mps=False).remedy)
    assert "driver" in str(look_at_device(GPU, has_gpu_build=True, has_mps=False).remedy)


def test_no_accelerator_is_noted_and_no_fault():
    assert look_at_device(Hardware("cpu", "x", GIB, GIB, 1), has_gpu_build=False, has_mps=False).state == "note"


def test_packages_that_are_missing_or_too_old_are_named():
    there = {"torch": "2.9.1", "rich": "15.0.0"}
    finding = look_at_versions(REQUIREMENTS, there.get)
    assert finding.state == "fault"
    assert "torch 2.9.1 is not >=2.10 of 2 packages" in finding.text
    assert look_at_versions(REQUIREMENTS, {"torch": "2.13.0+cu128", "rich": "15"}.get).state == "ok"
    assert "rich is missing" in look_at_versions(REQUIREMENTS, {"torch": "2.13.0"}.get).text


def test_extras_are_distinguished_from_what_developers_need():
    [line] = [finding.line() for finding in look_at_extras(REQUIREMENTS, {}.get)]
    assert "cuda: bitsandbytes is missing" in line
    assert "'.[cuda]'" in line
    [line] = [finding.line() for finding in look_at_extras(REQUIREMENTS, {"bitsandbytes": "0.49.2"}.get)]
    assert line.endswith("complete: cuda")
    asked = [*REQUIREMENTS, "everywhere>=1; python_version >= '3'"]  # of the base: look_at_versions reports it
    [line] = [finding.line() for finding in look_at_extras(asked, {"bitsandbytes": "0.49.2"}.get)]
    assert line.endswith("complete: cuda")
    assert "everywhere is missing" in look_at_versions(asked, {"torch": "2.13.0", "rich": "15"}.get).text


@pytest.mark.parametrize(("version", "state"), [((3, 10, 9), "fault"), ((3, 11, 0), "ok"), ((3, 14, 0), "ok")])
def test_python_must_be_new_enough(version: tuple[int, ...], state: str):
    assert look_at_python(version, is_virtual=True).state == state
    assert look_at_python(version, is_virtual=False).state == {"fault": "fault", "ok": "note"}[state]


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert look_at_disk(tmp_path).state != "fault"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert look_at_disk(tmp_path).state == "fault"
    assert look_at_caches({"HF_HOME": str(tmp_path)}).state == "fault"


def test_models_of_the_hub_are_counted_where_hf_home_says(tmp_path: Path):
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    assert f"1 models in {tmp_path / 'hub'}" in look_at_caches({"HF_HOME": str(tmp_path)}).text
    assert look_at_caches({"HF_HOME": str(tmp_path / "not" / "yet")}).state == "ok"
    (tmp_path / "own" / "models--c--d").mkdir(parents=True)
    own = {"HF_HOME": str(tmp_path / "elsewhere"), "HF_HUB_CACHE": str(tmp_path / "own")}
    assert f"1 models in {tmp_path / 'own'}" in look_at_caches(own).text


@pytest.mark.parametrize(("gib", "state"), [(11, "note"), (13, "ok")])
def test_memory_that_others_hold_is_missing(gib: int, state: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=gib * GIB))
    finding = look_at_memory(GPU)
    assert finding.state == state
    assert f"{gib}.0 GiB of 128.0 GiB free, 16 cores" in finding.text


@pytest.mark.parametrize(("gib", "state"), [(19, "note"), (21, "ok")])
def test_a_disk_with_little_room_is_noted(gib: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=gib * GIB))
    assert look_at_disk(tmp_path).state == state


def test_what_keeps_kernels_from_being_compiled_is_named():
    assert look_at_compiler(None).state == "ok"
    finding = look_at_compiler("triton")
    assert (finding.state, finding.text.endswith("triton is missing")) == ("note", True)


def test_each_thing_is_one_line_and_the_exit_code_follows_the_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    assert doctor({"HF_HOME": str(tmp_path)}, tmp_path, lines.append) in (0, 2)
    names = [line.split()[1] for line in lines[:-1]]
    assert names[:5] == ["python", "torch", "device", "memory", "disk"]
    assert all("\n" not in line for line in lines[:-1])
    faulty = look_at_python((3, 9), is_virtual=True)
    monkeypatch.setattr("simpletuner.commands.doctor.findings", lambda *arguments: iter([faulty]))
    assert doctor({}, tmp_path, lines.append) == 2
    monkeypatch.setattr("simpletuner.commands.doctor.findings", lambda *arguments: iter([]))
    assert doctor({}, tmp_path, lines.append) == 0


def test_a_hub_that_is_switched_off_is_noted(tmp_path: Path):
    found = list(findings({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, tmp_path))
    assert [finding.state for finding in found if finding.name == "hub"] == ["note"]


def test_the_login_in_an_address_is_not_printed():
    [hub] = [each for each in look_at_logins({"HF_ENDPOINT": "https://me:pw@hub.example"}) if each.name == "hub"]
    assert "logged in at https://hub.example" in hub.text


@pytest.mark.slow
def test_the_verb_prints_its_findings(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "simpletuner", "doctor"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode in (0, 2)
    assert result.stdout.startswith(("ok    python", "note  python"))
    assert result.stderr == ""


def test_the_driver_s_answers_are_read(tmp_path: Path):
    assert read_nvidia_answer("NVIDIA H200, 143771\nNVIDIA A, B, 81920\nGrace, [N/A]\n") == [
        ("cuda", "NVIDIA H200", 143771 << 20),
        ("cuda", "NVIDIA A, B", 81920 << 20),
    ]
    for card, size in (("card0", 512 << 20), ("card1", 24 << 30)):
        (tmp_path / card / "device").mkdir(parents=True)
        (tmp_path / card / "device" / "mem_info_vram_total").write_text(f"{size}\n")
    assert amd_gpus(tmp_path) == [("rocm", "AMD GPU", 24 << 30)]
