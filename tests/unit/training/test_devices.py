"""A GPU that cannot be used ends the start, with what its driver says; memory that runs out ends with what helps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from simpletuner.cli.program import require_system
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.models.devices import pick_device, require_kernels, require_no_hidden_gpu
from simpletuner.optim.optimizers import require_optimizer
from simpletuner.training import loop
from simpletuner.training.device_failures import explain, is_shortage, remedies, shortage_error
from simpletuner.training.gradient_checkpointing import MeasuredMemory
from simpletuner.training.loss_bins import LossBins
from simpletuner.training.step import Losses
from tests.runs import load_here, metrics, train_here, write_run

DRIVER = """#!/bin/sh
case "$*" in
*driver_version*) echo 535.183.01 ;;
*) for number in 1 2; do echo "NVIDIA A100-SXM4-80GB, 81920"; done ;;
esac
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose NVIDIA driver is older than what torch was built for."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(DRIVER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_gpus_that_torch_cannot_see_are_no_reason_to_train_on_the_processor(driver: None) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device()
    for part in ("2 x NVIDIA A100-SXM4-80GB", "driver 535.183.01", "CUDA 13.0", "driver 580 or newer"):
        assert part in caught.value.render()


def test_a_run_refuses_them_before_it_makes_anything(driver: None, tmp_path: Path, omnigen_folder: Path) -> None:
    folder = write_run(tmp_path / "run", omnigen_folder)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        train_here(folder)
    assert not (folder / "cache").exists()


@pytest.mark.parametrize("value", ["", "-1"])
def test_whoever_hides_the_gpus_means_the_processor(driver: None, value: str) -> None:
    require_no_hidden_gpu({"CUDA_VISIBLE_DEVICES": value})


def test_a_build_without_cuda_is_named(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA"):
        pick_device()


@pytest.mark.parametrize(("capability", "is_known"), [((6, 1), False), ((7, 5), True), ((9, 0), True)])
def test_a_card_that_torch_has_no_kernels_for_is_named(
    capability: tuple[int, int], is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
    if is_known:
        require_kernels("a card", capability)
    else:
        with pytest.raises(ConfigError, match=r"GTX 1080 has compute capability 6\.1.*for 7\.5 and newer"):
            require_kernels("GTX 1080", capability)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
    ],
)
def test_a_shortage_of_memory_is_recognized(error: BaseException) -> None:
    assert is_shortage(error)
    assert not is_shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_shortage(ValueError("out of memory"))


def test_remedies_begin_with_what_costs_least(tmp_path: Path, omnigen_folder: Path) -> None:
    sizes = {"train_batch_size": 4, "gradient_accumulation_steps": 3}
    config = load_here(write_run(tmp_path / "a", omnigen_folder, **sizes)).config
    keys = [key for key, _ in remedies(config)]
    assert keys[:3] == ["gradient_checkpointing", "base_model_precision", "train_batch_size"]
    saving = {"gradient_checkpointing": True, "base_model_precision": "int8-quanto", "train_batch_size": 1}
    saving |= {"gradient_checkpointing_backend": "unsloth", "enable_group_offload": True}
    least = load_here(write_run(tmp_path / "b", omnigen_folder, **saving)).config
    assert [key for key, _ in remedies(least)] == ["resolution"]
    assert list(remedies(config)) == [
        ("gradient_checkpointing", "set gradient_checkpointing to true"),
        ("base_model_precision", "set base_model_precision to int8-quanto"),
        (
            "train_batch_size",
            "set train_batch_size to 2 and gradient_accumulation_steps to 6, which trains the same",
        ),
        ("gradient_checkpointing_backend", "set gradient_checkpointing_backend to unsloth"),
        ("enable_group_offload", "set enable_group_offload to true"),
        ("resolution", "lower resolution"),
    ]
    odd = config.with_values({"train_batch_size": 3, "gradient_accumulation_steps": 2})
    same = "set train_batch_size to 1 and gradient_accumulation_steps to 6, which trains the same"
    assert dict(remedies(odd))["train_batch_size"] == same
    spread = saving | {"gradient_checkpointing_interval": "2", "enable_group_offload": False, "fsdp_enable": True}
    spread["base_model_precision"] = "no_change"
    config = load_here(write_run(tmp_path / "c", omnigen_folder, **spread, num_processes=2)).config
    assert list(remedies(config)) == [
        ("gradient_checkpointing_interval", "remove gradient_checkpointing_interval"),
        ("base_model_precision", "set base_model_precision to int8-quanto"),
        ("resolution", "lower resolution"),
    ]
    full = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "1", "train_batch_size": 1}
    full |= {"model_type": "full", "gradient_checkpointing_backend": "unsloth"}
    config = load_here(write_run(tmp_path / "d", omnigen_folder, **full)).config
    optimizer = "choose an optimizer with less state (OPTIMIZERS.md), or set fsdp_enable on several GPUs"
    assert list(remedies(config)) == [("optimizer", optimizer), ("resolution", "lower resolution")]
    error = shortage_error(RuntimeError("no memory\nat all"), config, torch.device("cpu"), "training step 3")
    assert error.problems[0].message == "not enough memory on cpu while training step 3: no memory"
    assert error.problems[0].key == "optimizer"
    end = "`simpletuner plan` says what each setting takes"
    assert error.problems[0].fix == f"{optimizer}. If that is not enough: lower resolution. {end}"
    alone = shortage_error(MemoryError(), least, torch.device("cpu"), "starting").problems[0]
    assert (alone.message, alone.key) == ("not enough memory on cpu while starting: MemoryError", "resolution")
    assert alone.fix == f"lower resolution. {end}"


def fail_in(monkeypatch: pytest.MonkeyPatch, step: int, times: int) -> list[int]:
    """The backward pass of a step runs out of memory so many times; the numbers of the calls that did."""
    failed: list[int] = []
    whole = loop.backward_micro_batch

    def backward(run, window, micro_step, weight):
        losses = whole(run, window, micro_step, weight)
        if window.step == step and len(failed) < times:
            failed.append(window.step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")
        return losses

    monkeypatch.setattr(loop, "backward_micro_batch", backward)
    return failed


def test_a_step_without_memory_ends_the_run_with_what_helps(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, step=2, times=99)
    folder = write_run(tmp_path, omnigen_folder)
    with pytest.raises(SimpleTunerError) as caught:
        train_here(folder)
    text = caught.value.render()
    assert "not enough memory on cpu while training step 3" in text
    assert "set gradient_checkpointing to true" in text
    assert metrics(folder / "output", "run_failed")[-1]["exit_code"] == 2


@pytest.mark.slow
def test_measured_checkpointing_takes_the_step_again_with_more_blocks_recomputed(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends with the weights of a run that had the memory."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto", "max_train_steps": 4}
    expected = train_here(write_run(tmp_path / "roomy", omnigen_folder, **options))
    failed = fail_in(monkeypatch, step=2, times=2)
    found = train_here(write_run(tmp_path / "tight", omnigen_folder, **options))
    assert failed == [2, 2]
    reported = [record["text"] for record in metrics(found, "notice")]
    assert sum("step 3 is taken again with more blocks recomputed" in line for line in reported) == 2
    name = "pytorch_lora_weights.safetensors"
    assert (found / "checkpoint-4" / name).read_bytes() == (expected / "checkpoint-4" / name).read_bytes()


def test_what_cannot_recompute_more_does_not_try_for_ever() -> None:
    room = MeasuredMemory(torch.device("cpu"))
    x = torch.zeros(2, 3)
    room.ask(0, (x,))
    assert [room.recompute_more() for _ in range(3)] == [True, False, False]
    for index in range(5):
        room.ask(index, (torch.zeros(index + 1, 30),))  # each of a kind of its own
    assert [room.recompute_more() for _ in range(4)] == [True, True, True, False]  # 5, 2, 1, 0 keep theirs


def test_starting_without_memory_says_so(tmp_path: Path, omnigen_folder: Path) -> None:
    config = load_here(write_run(tmp_path, omnigen_folder)).config
    known = explain(MemoryError(), config, torch.device("cpu"), "preparing the run")
    assert known is not None
    assert "not enough memory on cpu while preparing the run: MemoryError" in known.render()
    assert explain(KeyError("x"), config, torch.device("cpu"), "") is None


def test_a_kernel_that_is_not_deterministic_is_named(tmp_path: Path, omnigen_folder: Path) -> None:
    config = load_here(write_run(tmp_path, omnigen_folder, deterministic=True)).config
    error = RuntimeError("upsample_bilinear2d_backward_out_cuda does not have a deterministic implementation, but ...")
    known = explain(error, config, torch.device("cpu"), "training step 1")
    assert known is not None
    [problem] = known.problems
    assert (problem.key, problem.allowed) == ("deterministic", "false")
    assert problem.message == f"cpu has no deterministic kernel for something in this run: {error}"
    assert explain(ValueError(str(error)), config, torch.device("cpu"), "") is None
    config = load_here(write_run(tmp_path / "other", omnigen_folder)).config
    assert explain(error, config, torch.device("cpu"), "") is None


def test_an_optimizer_is_tried_by_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As fp8 state fails on cards before compute capability 8.9: in the first step, not when it is made."""
    dtypes = []

    def step(self, closure=None):
        dtypes.append(self.param_groups[0]["params"][0].dtype)
        raise ValueError("type fp8e4nv not supported in this architecture\nsm_80")

    monkeypatch.setattr(torch.optim.RMSprop, "step", step)
    options = OptimizerOptions(optimizer="torch-rmsprop", learning_rate=1e-3)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ConfigError, match="torch-rmsprop cannot take a step on cpu: type fp8e4nv not supported"):
            require_optimizer(options, torch.device("cpu"), dtype)
    assert dtypes == [torch.float32, torch.bfloat16]


def test_the_loss_by_noise_level_needs_no_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have none: there `double()` raises."""
    order: list[str] = []
    double, to_cpu = torch.Tensor.double, torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "double", lambda self: order.append("double") or double(self))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: order.append("cpu") or to_cpu(self))
    bins = LossBins()
    bins.add(1, [Losses(torch.tensor([0.5, 1.5]), torch.ones(2), torch.tensor([0.05, 0.95]))])
    bins._sums()
    assert order == ["cpu", "double"]


def test_windows_is_refused_in_words() -> None:
    require_system(sys.platform)
    with pytest.raises(ConfigError, match=r"(?s)not on Windows.*WSL2"):
        require_system("win32")
