"""Which of two products an adapter takes: timed once, by the main process, and the same wherever the run computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.training import build
from tests.configs import config_of
from tests.processes import in_processes

CPU = torch.device("cpu")


class TimedAdapter:
    """Its clock says something else in each process: the fused product is faster in those of an odd rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.kernel_choice: dict[str, bool] = {}
        self.num_trials = 0

    def choose_kernels(self, device: torch.device, dtype: torch.dtype, known: dict[str, bool]) -> list[str]:
        for shape in ("8 x 8", "16 x 8"):
            if shape not in known:
                self.num_trials += 1
            self.kernel_choice[shape] = known.get(shape, self.rank % 2 == 1)
        return []


def choose(adapter: Any, process_group: ProcessGroup, resume_from: Path | None = None, **settings: Any) -> None:
    options = config_of(mixed_precision="bf16", **settings).precision
    session: Any = SimpleNamespace(process_group=process_group, inform=print)
    build.choose_kernels(options, adapter, torch.nn.Identity(), CPU, session, resume_from)


def test_all_processes_take_what_the_main_process_timed() -> None:
    def work(process_group: ProcessGroup) -> dict:
        adapter = TimedAdapter(process_group.rank)
        choose(adapter, process_group)
        return {"choice": adapter.kernel_choice, "trials": adapter.num_trials}

    timed = {"8 x 8": False, "16 x 8": False}
    assert in_processes(3, work) == [{"choice": timed, "trials": 2}] + [{"choice": timed, "trials": 0}] * 2


def test_a_resumed_run_takes_what_its_checkpoint_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "read_state", lambda path: {"kernels": {"8 x 8": True}})
    adapter = TimedAdapter(0)
    choose(adapter, SINGLE_PROCESS, Path("checkpoint-4"))
    assert adapter.kernel_choice == {"8 x 8": True, "16 x 8": False}
    assert adapter.num_trials == 1


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"dynamo_backend": "inductor"}])
def test_nothing_is_timed_where_the_choice_is_made_already(settings: dict[str, Any]) -> None:
    adapter = TimedAdapter(0)
    choose(adapter, SINGLE_PROCESS, **settings)
    assert adapter.num_trials == 0
