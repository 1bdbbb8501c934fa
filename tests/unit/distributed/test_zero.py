"""What is asked of DeepSpeed's engine, call by call, by one that only notes it; real ones are in the process tests."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.distributed.process_group import ProcessGroup
from simpletuner.distributed.zero import Zero

SETTINGS = {
    "zero_optimization": {"stage": 2},
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "wall_clock_breakdown": True,
}


class Group(ProcessGroup):
    """One of two processes; the other one's answer is what a test says."""

    other = False

    def any(self, flag: bool) -> bool:
        return flag or Group.other


class Engine:
    """Notes its calls."""

    device = torch.device("cpu")

    def __init__(self, stage: int, flat: Tensor):
        self.calls: list[tuple[Any, ...]] = []
        note = self.calls.append
        self.optimizer = SimpleNamespace(
            zero_grad=lambda: note(("zero_grad",)),
            refresh_fp32_params=lambda: note(("refresh",)),
            _lazy_init_hp_params_optimizer_state=lambda: note(("lazy",)),
            **{"fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups": [flat]},
        )

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        self.calls.append(("boundary", is_last))

    def backward(self, loss: Tensor, **options: Any) -> None:
        self.calls.append(("backward", loss.item(), options))

    def step(self) -> None:
        self.calls.append(("step",))

    def get_global_grad_norm(self) -> float:
        return 2.5


class Fake:
    """DeepSpeed's functions over whole tensors, noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: int):
        self.log: list[tuple[Any, ...]] = []
        self.masters: dict[int, Tensor] = {}
        self.flat = torch.zeros(4)
        self.engine = Engine(stage, self.flat)
        self.options: dict[str, Any] = {}
        package, utils = ModuleType("deepspeed"), ModuleType("deepspeed.utils")
        package.ops = SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True})
        package.initialize = self.initialize
        package.zero = SimpleNamespace(
            GatheredParameters=self.gathered,
            register_external_parameter=lambda layer, parameter: self.log.append(("register", layer, parameter)),
        )
        utils.safe_get_full_fp32_param = lambda parameter: self.masters[id(parameter)].flatten()
        utils.safe_get_full_optimizer_state = lambda parameter, key: torch.full((parameter.numel(),), len(key) * 1.0)
        utils.safe_set_full_fp32_param = lambda parameter, value: self.log.append(("fp32", parameter, value))
        utils.safe_set_full_optimizer_state = lambda parameter, value, key: self.log.append((key, parameter, value))
        monkeypatch.setitem(sys.modules, "deepspeed", package)
        monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        self.package = package

    def initialize(self, **options: Any) -> tuple[Any, ...]:
        self.options = options
        return self.engine, None, None, None

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter], **options: Any) -> Iterator[None]:
        self.log.append(("gather", len(parameters), options))
        yield
        self.log.append(("release",))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=dtype))
        self.b = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))


def make(fake: Fake, stage: int, rank: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Zero:
    net = Net(dtype)
    given = {"accumulation": 4, "max_grad_norm": 2, "is_adapter": True} | changes
    settings = SETTINGS | {"zero_optimization": {"stage": stage}}
    zero = Zero(dict(net.named_parameters()), Group(rank, 2, rank), net, settings, **given)
    zero.take_over(torch.optim.AdamW(net.parameters()))
    return zero


def same(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> bool:
    """Equal, tensors by their values and parameters by being the same."""

    def equal(one: Any, other: Any) -> bool:
        if isinstance(other, nn.Parameter | nn.Module):
            return one is other
        return torch.equal(one, other) if isinstance(other, Tensor) else bool(one == other)

    return len(found) == len(expected) and all(
        len(one) == len(other) and all(map(equal, one, other)) for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_engine_gets_the_user_s_settings_and_those_of_the_run(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    fake = Fake(monkeypatch, stage)
    zero = make(fake, stage)
    assert fake.options["config"] == {
        "zero_optimization": {"stage": stage},
        "wall_clock_breakdown": True,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 2.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert fake.options["model"] is zero.denoiser
    assert isinstance(fake.options["optimizer"], torch.optim.AdamW)
    assert [id(each) for each in fake.options["model_parameters"]] == [id(each) for each in zero.parameters.values()]
    assert fake.options["dist_init_required"] is False
    assert fake.package.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert logging.getLogger("DeepSpeed").level == logging.WARNING
    assert (zero.stage, zero.is_spread, zero.has_own_state) == (stage, stage == 3, True)


def test_losses_count_for_all_processes_and_their_average_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine divides by two processes, and the loss by the whole window: it is given twice the loss."""
    fake = Fake(monkeypatch, 2)
    zero = make(fake, 2)
    assert math.isnan(zero.norm_before_clipping)
    zero.backward(torch.tensor(1.5), False)
    zero.backward(torch.tensor(0.25), True)
    zero.collect_gradients()
    zero.step(zero._optimizer)
    assert fake.engine.calls == [
        ("boundary", False),
        ("backward", 3.0, {"scale_wrt_gas": False}),
        ("boundary", True),
        ("backward", 0.5, {"scale_wrt_gas": False}),
        ("step",),
    ]
    assert zero.norm_before_clipping == torch.tensor(2.5)


@pytest.mark.parametrize(("own", "other"), [(math.nan, False), (math.inf, False), (1.0, True)])
def test_a_loss_that_is_not_finite_on_any_process_takes_no_step_on_all(
    monkeypatch: pytest.MonkeyPatch, own: float, other: bool
) -> None:
    fake = Fake(monkeypatch, 2)
    zero = make(fake, 2)
    monkeypatch.setattr(Group, "other", other)
    zero.backward(torch.tensor(own), False)
    zero.backward(torch.tensor(1.0), True)
    zero.collect_gradients()
    assert fake.engine.calls[4:] == [("zero_grad",)]
    assert math.isnan(zero.norm_before_clipping)
    monkeypatch.setattr(Group, "other", False)
    zero.backward(torch.tensor(1.0), True)
    zero.collect_gradients()  # the losses of the window before are forgotten
    assert fake.engine.calls[-1] == ("step",)


@pytest.mark.parametrize(
    ("stage", "is_adapter", "gathers"), [(2, True, False), (3, True, True), (3, False, False), (1, False, False)]
)
def test_only_the_third_stage_gathers_and_only_adapters(
    monkeypatch: pytest.MonkeyPatch, stage: int, is_adapter: bool, gathers: bool
) -> None:
    fake = Fake(monkeypatch, stage)
    zero = make(fake, stage, is_adapter=is_adapter)
    with zero.gathered():
        assert fake.log == ([("gather", 2, {})] if gathers else [])


def test_whole_weights_of_the_third_stage_are_the_parameters_on_the_main_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"b": torch.tensor([9.0])}
    second = make(Fake(monkeypatch, 2), 2)
    assert second.whole(given) == given
    for rank in (0, 1):
        fake = Fake(monkeypatch, 3)
        zero = make(fake, 3, rank)
        whole = zero.whole(given)
        assert list(whole) == (["b"] if rank == 0 else [])
        if rank == 0:
            assert whole["b"].tolist() == [3.0, 4.0]
            assert whole["b"].data_ptr() != zero.parameters["b"].data_ptr()
        assert fake.log == [("gather", 1, {}), ("release",)]  # all take part
        assert zero.shapes() == {"a": [1, 2], "b": [2]}
        zero.parameters["b"].ds_shape = torch.Size([5])
        assert zero.shapes() == {"a": [1, 2], "b": [5]}


def test_copies_are_compared_and_parts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, ...]] = []
    monkeypatch.setattr("simpletuner.distributed.placement.require_equal", lambda *given: compared.append(given[1:]))
    for stage in (1, 2, 3):
        make(Fake(monkeypatch, stage), stage).check(f"stage {stage}")
    assert [(sorted(names), when) for names, when in compared] == [(["a", "b"], "stage 1"), (["a", "b"], "stage 2")]


def test_what_is_written_reaches_the_engine_s_float32_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, 2)
    with make(fake, 2).writing():
        assert fake.engine.calls == []
    assert fake.engine.calls == [("refresh",)]
    fake = Fake(monkeypatch, 3)
    zero = make(fake, 3, dtype=torch.bfloat16)
    with zero.writing(), torch.no_grad():
        assert fake.log == [("gather", 2, {"modifier_rank": 0})]
        zero.parameters["b"].fill_(7.0)
    a, b = zero.parameters["a"], zero.parameters["b"]
    expected = [("gather", 2, {"modifier_rank": 0}), ("release",)]
    expected += [("gather", 1, {}), ("release",), ("fp32", a, torch.tensor([[1.0, 2.0]]))]
    expected += [("gather", 1, {}), ("release",), ("fp32", b, torch.tensor([7.0, 7.0]))]
    assert same(fake.log, expected)
    assert fake.log[4][2].dtype == torch.float32
    assert fake.engine.calls == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_that_of_a_single_process_and_float32_copies_of_fewer_bits(
    monkeypatch: pytest.MonkeyPatch, rank: int, dtype: torch.dtype
) -> None:
    fake = Fake(monkeypatch, 2)
    zero = make(fake, 2, rank, dtype)
    step = torch.tensor(3.0)
    zero._optimizer.state[fake.flat] = {"step": step, "exp_avg": torch.ones(4), "name": "no tensor"}
    fake.masters = {id(zero.parameters[name]): torch.tensor([0.5, 0.25]) for name in "ab"}
    tensors, about = zero.own_state()
    assert about == {"class": "AdamW", "states": {}, "groups": [{}]}
    expected = {"a//step": step, "b//step": step}  # what is no part is known to all
    if rank == 0:
        expected |= {"a//exp_avg": torch.tensor([[7.0, 7.0]]), "b//exp_avg": torch.tensor([7.0, 7.0])}
        if dtype != torch.float32:
            expected |= {"a//float32": torch.tensor([[0.5, 0.25]]), "b//float32": torch.tensor([0.5, 0.25])}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    assert tensors["a//step"] is not step


@pytest.mark.parametrize("stage", [2, 3])
def test_a_state_goes_back_to_where_it_was(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    fake = Fake(monkeypatch, stage)
    zero = make(fake, stage)
    assert zero._flat_parameters()[0] is fake.flat
    a, b = zero.parameters["a"], zero.parameters["b"]
    saved = {"a//step": torch.tensor(3.0), "a//exp_avg": torch.tensor([[1.0, 2.0]], dtype=torch.float64)}
    saved |= {"b//step": torch.tensor(3.0), "b//exp_avg": torch.tensor([3.0, 4.0])}
    saved |= {"b//float32": torch.tensor([5.0, 6.0])}
    zero.load_own_state(saved)
    state = zero._optimizer.state[fake.flat]
    assert state.keys() == {"step", "exp_avg"}
    assert state["step"] == 3.0
    assert state["step"] is not saved["a//step"]
    assert torch.equal(state["exp_avg"], torch.zeros(4))
    expected = [("exp_avg", a, torch.tensor([[1.0, 2.0]])), ("exp_avg", b, torch.tensor([3.0, 4.0]))]
    assert same(fake.log, [*expected, ("fp32", b, torch.tensor([5.0, 6.0]))])
    assert fake.engine.calls == ([("lazy",)] if stage < 3 else [])


def test_layers_of_the_third_stage_are_fetched_with_the_adapter_that_changes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stage in (2, 3):
        fake = Fake(monkeypatch, stage)
        net, layer = Net(), nn.Linear(1, 1)
        net.lycoris = nn.Linear(2, 2, bias=False)
        net.lycoris.org_module = [layer]
        zero = Zero(
            dict(net.named_parameters()), Group(0, 2, 0), net, {"zero_optimization": {"stage": stage}}, 1, 0.0, True
        )
        zero.take_over(torch.optim.SGD(net.parameters(), 0.1))
        assert same(fake.log, [("register", layer, net.lycoris.weight)] if stage == 3 else [])
