"""Processes on GPUs: limits of their links, turns at main memory, number formats of spread weights, pinned copies."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from simpletuner.adapters.build import attach_adapter
from simpletuner.config.options.processes import ProcessOptions
from simpletuner.distributed import process_group as process_groups
from simpletuner.distributed import sharding
from simpletuner.distributed.process_group import SINGLE_PROCESS, ConnectionLost, ProcessGroup, joined
from simpletuner.distributed.sharding import make_mesh, shard_denoiser
from simpletuner.distributed.zero import Zero
from simpletuner.errors import ConfigError
from simpletuner.models.build import build_family
from simpletuner.models.family import send
from simpletuner.training import device_placement
from tests.configs import config_of
from tests.processes import in_processes
from tests.runs import load_here, write_run


def test_links_between_gpus_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's; what goes over the CPU waits as long as another process encodes a cache."""
    reported: dict[str, Any] = {}
    backend = SimpleNamespace(_set_default_timeout=lambda limit: reported.update(links=limit))
    group = SimpleNamespace(_get_backend=lambda device: reported.update(of=device) or backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: reported.update(backend=backend, **options)
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=group))
    monkeypatch.setattr(process_groups, "store_of_run", lambda: None)
    monkeypatch.setattr(process_groups, "Heartbeat", lambda *about: MagicMock())
    with joined({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}):
        pass
    assert reported["backend"] == "cpu:gloo,cuda:nccl"
    assert reported["device_id"] == reported["of"] == torch.device("cuda", 1)
    assert reported["links"] == timedelta(minutes=30)


def test_memory_that_runs_out_is_no_lost_connection() -> None:
    with pytest.raises(torch.OutOfMemoryError), process_groups._connected():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ConnectionLost), process_groups._connected():
        raise RuntimeError("Connection closed by peer")


def test_processes_of_a_machine_load_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of three processes: the barriers between the turns are the same for all."""
    events: list[str] = []
    monkeypatch.setattr(ProcessGroup, "barrier", lambda self: events.append("barrier"))
    monkeypatch.setattr(ProcessGroup, "gather", lambda self, value: [0, 1, 2, 0, 1, 2])
    for local_rank, before in ((0, 0), (2, 2)):
        events.clear()
        with ProcessGroup(local_rank, 6, local_rank).in_turns():
            events.append("load")
        assert events == ["barrier"] * before + ["load"] + ["barrier"] * (3 - before)


@pytest.mark.parametrize(("available", "waits"), [(299, True), (300, False)])
def test_turns_are_taken_where_main_memory_does_not_hold_all(
    available: int, waits: bool, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes read 100 bytes each, and each takes half as much again."""
    loaded = load_here(write_run(tmp_path, omnigen_folder))
    monkeypatch.setattr(ProcessGroup, "gather", lambda self, value: [0, 1])
    monkeypatch.setattr(ProcessGroup, "any", lambda self, flag: flag)
    monkeypatch.setattr(device_placement, "denoiser_bytes", lambda *given: 100)
    monkeypatch.setattr(device_placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert device_placement.must_take_turns(loaded.config, build_family(loaded.config), ProcessGroup(0, 2, 0)) is waits
    assert not device_placement.must_take_turns(loaded.config, build_family(loaded.config), ProcessGroup())


@pytest.mark.parametrize("options", [{"fsdp_enable": True}, {"deepspeed_config": {"zero_optimization": {"stage": 3}}}])
def test_processes_that_share_the_weights_take_turns_to_read_them(
    options: dict, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "deepspeed_config" in options:
        (tmp_path / "zero.json").write_text(json.dumps(options["deepspeed_config"]))
        options = {"deepspeed_config": str(tmp_path / "zero.json"), "grad_clip_method": "norm"}
    loaded = load_here(write_run(tmp_path, omnigen_folder, num_processes=2, **options))
    monkeypatch.setattr(ProcessGroup, "gather", lambda self, value: [0, 1])
    monkeypatch.setattr(ProcessGroup, "any", lambda self, flag: flag)
    monkeypatch.setattr(device_placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    assert device_placement.must_take_turns(loaded.config, build_family(loaded.config), ProcessGroup(0, 2, 0))


def of_one_machine(process_group: ProcessGroup) -> ProcessGroup:
    """The processes of `in_processes` call themselves machines of one process each; those take no turns."""
    return ProcessGroup(process_group.rank, process_group.size, process_group.rank)


class Half(nn.Linear):
    """A block whose rows two processes share."""


def test_a_process_cuts_out_its_part_before_the_next_one_loads() -> None:
    """Row r of the weight is r, the input ones: the output is 0, 3, 6, 9, the gradient of each row 1 per process."""

    def work(joined_group: ProcessGroup) -> dict:
        process_group = of_one_machine(joined_group)
        mesh = make_mesh(process_group, torch.device("cpu"), None)
        sharding.make_mesh = None  # of this process: making a mesh waits for all, and they wait for their turn
        with process_group.in_turns():
            net = nn.Sequential(Half(3, 4, bias=False))
            net[0].weight.data = torch.arange(4.0)[:, None].repeat(1, 3)
            shard_denoiser(net, ("Half",), process_group, torch.device("cpu"), whole=set(), mesh=mesh)
            own = net[0].weight.to_local().tolist()
        output = net(torch.ones(1, 3))
        output.sum().backward()
        return {"own": own, "output": output.tolist(), "gradient": net[0].weight.grad.to_local().tolist()}

    first, second = in_processes(2, work)
    assert first == {"own": [[0.0] * 3, [1.0] * 3], "output": [[0, 3, 6, 9]], "gradient": [[2.0] * 3] * 2}
    assert second == {"own": [[2.0] * 3, [3.0] * 3], "output": [[0, 3, 6, 9]], "gradient": [[2.0] * 3] * 2}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_s_processes_load_one_after_the_other_and_wait_for_nobody_meanwhile(
    stage: int, tmp_path: Path, omnigen_folder: Path
) -> None:
    """Two real processes: one that waited for the other inside of its turn would never end."""
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    options = {"deepspeed_config": str(tmp_path / "zero.json"), "grad_clip_method": "norm", "lora_type": "standard"}
    loaded = load_here(write_run(tmp_path, omnigen_folder, num_processes=2, **options))

    def work(joined_group: ProcessGroup) -> list[float]:
        process_group = of_one_machine(joined_group)
        family = build_family(loaded.config)
        device_placement.psutil.virtual_memory = lambda: SimpleNamespace(available=1)  # of this process
        assert device_placement.must_take_turns(loaded.config, family, process_group)
        with process_group.in_turns():
            began = time.monotonic()
            denoiser = family.load_base()
            adapter = attach_adapter(loaded, family, denoiser)
            placement = device_placement.place_denoiser(loaded.config, family, denoiser, adapter, process_group)
            ended = time.monotonic()
        assert isinstance(placement, Zero)
        return [began, ended]

    (first_began, first_ended), (second_began, second_ended) = in_processes(2, work)
    assert first_began < first_ended <= second_began < second_ended


@pytest.mark.parametrize("computes_in", [torch.bfloat16, torch.float32])
def test_spread_weights_travel_in_the_number_format_of_products_and_gradients_are_summed_in_float32(
    computes_in: torch.dtype,
) -> None:
    class Block(nn.Linear):
        pass

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(Block(8, 8), Block(8, 8))
        seen: list[torch.dtype] = []
        model[0].register_forward_pre_hook(lambda block, inputs: seen.append(block.weight.dtype))
        shard_denoiser(
            model, ("Block",), ProcessGroup(0, 1, 0), torch.device("cpu"), whole=set(), computes_in=computes_in
        )
        x = torch.ones(2, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=computes_in != torch.float32):
            model(x).sum().backward()
        assert seen == [computes_in]
        assert model[0].weight.dtype == torch.float32
        assert model[0].weight.grad.dtype == torch.float32
        policy = model[0]._get_fsdp_state()._fsdp_param_group.mp_policy
        assert policy.reduce_dtype == torch.float32
        assert not policy.cast_forward_inputs
    finally:
        dist.destroy_process_group()


def test_copies_to_a_gpu_come_out_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of any other the host waits for them, `non_blocking` or not."""
    calls: list[str] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, device, dtype=None, non_blocking=False: calls.append(f"to {device} {non_blocking}"),
    )
    send(torch.zeros(2), torch.device("cuda"))
    send(torch.zeros(2), torch.device("cpu"))
    assert calls == ["pin", "to cuda True", "to cpu True"]


@pytest.mark.parametrize(("stage", "spread"), [(1, False), (2, False), (3, True)])
def test_the_third_stage_of_deepspeed_spreads_the_denoiser(stage: int, spread: bool, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    options = ProcessOptions(deepspeed_config=str(tmp_path / "zero.json"))
    assert device_placement.is_denoiser_spread(options) is spread


def test_fsdp_spreads_the_denoiser_and_a_process_alone_has_nobody_to_share_with() -> None:
    assert device_placement.is_denoiser_spread(ProcessOptions(fsdp_enable=True))
    assert not device_placement.is_denoiser_spread(ProcessOptions())
    for key, value in (("fsdp_enable", True), ("deepspeed_config", "zero.json")):
        config = SimpleNamespace(processes=ProcessOptions(**{key: value}))
        with pytest.raises(ConfigError) as caught:
            device_placement.place_denoiser(config, None, nn.Linear(1, 1), None, SINGLE_PROCESS)
        [problem] = caught.value.problems
        assert (problem.key, problem.fix) == (key, "set num_processes above 1, or remove the key")


def test_a_process_without_an_accelerator_is_told_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    with pytest.raises(ConfigError) as caught, joined(environment):
        pass
    [problem] = caught.value.problems
    assert problem.message == "process 3 of this machine has no accelerator: 2 are visible"
    assert (problem.key, problem.allowed) == ("num_processes", "1 to 2")
    monkeypatch.setattr(torch.cuda, "set_device", MagicMock(side_effect=LookupError))
    with pytest.raises(LookupError), joined(environment | {"LOCAL_RANK": "1"}):  # it takes its own, whatever its rank
        pass
    torch.cuda.set_device.assert_called_once_with(1)


def test_processes_that_divide_by_the_shard_size_alone_make_a_mesh() -> None:
    with pytest.raises(ConfigError) as caught:
        make_mesh(ProcessGroup(0, 6, 0), torch.device("cpu"), 4)
    [problem] = caught.value.problems
    assert (problem.key, problem.message) == ("fsdp_shard_size", "4 does not divide the 6 processes")


@pytest.mark.parametrize(("reshards", "offloads"), [(False, False), (True, True)])
def test_what_the_options_of_fsdp_say_reaches_each_block(
    monkeypatch: pytest.MonkeyPatch, reshards: bool, offloads: bool
) -> None:
    import torch.distributed.fsdp as fsdp

    asked: list[tuple[bool | None, type]] = []

    def note(module: nn.Module, reshard_after_forward: bool | None = None, **options: Any) -> None:
        asked.append((reshard_after_forward, type(options["offload_policy"])))

    monkeypatch.setattr(fsdp, "fully_shard", note)
    monkeypatch.setattr(sharding, "_require_spread", lambda *about: None)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shard_denoiser(
        model,
        ("Linear",),
        SINGLE_PROCESS,
        torch.device("cpu"),
        whole=set(),
        reshards=reshards,
        offloads=offloads,
        mesh=MagicMock(),
    )
    policy = fsdp.CPUOffloadPolicy if offloads else fsdp.OffloadPolicy
    assert asked == [(reshards, policy), (reshards, policy), (None, policy)]


def test_a_configuration_of_fsdp_is_how_the_denoiser_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(device_placement, "shard_denoiser", lambda *given, **options: asked.update(options))
    options = {"fsdp_shard_size": 2, "fsdp_cpu_offload": True, "fsdp_reshard_after_forward": False}
    config = config_of(fsdp_enable=True, num_processes=4, mixed_precision="bf16", **options)
    family: Any = SimpleNamespace(spec=SimpleNamespace(block_classes=("Linear",)), device=torch.device("cpu"))
    adapter: Any = SimpleNamespace(all_parameters=list, trainable_parameters=dict)
    mesh = MagicMock()
    device_placement.place_denoiser(config, family, nn.Linear(1, 1), adapter, ProcessGroup(0, 4, 0), mesh)
    assert asked == {
        **{"whole": set(), "shard_size": 2, "reshards": False, "offloads": True},
        **{"computes_in": torch.bfloat16, "mesh": mesh},
    }


@pytest.mark.parametrize(("limit", "passed"), [(0.5, 0.5), (0.0, 0.0)])
def test_deepspeed_is_told_how_often_gradients_add_up_and_where_they_are_clipped(
    limit: float, passed: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(device_placement, "Zero", lambda *given, **options: asked.update(options))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    options = {"deepspeed_config": str(tmp_path / "zero.json"), "num_processes": 2, "gradient_accumulation_steps": 3}
    family: Any = SimpleNamespace(device=torch.device("cpu"))
    adapter: Any = SimpleNamespace(trainable_parameters=dict)
    config = config_of(**options, max_grad_norm=limit)
    device_placement.place_denoiser(config, family, nn.Linear(1, 1), adapter, ProcessGroup(0, 2, 0))
    assert asked == {"accumulation": 3, "max_grad_norm": passed, "is_adapter": True}


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 0), ({"musubi_blocks_to_swap": 2}, 2), ({"enable_group_offload": True}, 3)]
)
def test_as_many_blocks_are_swapped_as_are_asked_for_and_all_with_group_offload(
    options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(device_placement, "move_with_swap", lambda *given: asked.append(given))
    device, denoiser = torch.device("cpu"), nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)), nn.ReLU())
    family: Any = SimpleNamespace(spec=SimpleNamespace(block_classes=("Linear",)), device=device)
    adapter: Any = SimpleNamespace(trainable_parameters=dict)
    device_placement.place_denoiser(config_of(**options), family, denoiser, adapter, SINGLE_PROCESS)
    assert asked == [(denoiser, ("Linear",), expected, device)]
