"""What one process knows of the others, and how many are started."""

from __future__ import annotations

import time

import pytest
import torch

from simpletuner.config.loading import load_run
from simpletuner.distributed.launcher import LAST_WORDS, forget_machine_numbers, is_started_already, leave_last_words
from simpletuner.distributed.layout import layout_of, visible_accelerators
from simpletuner.distributed.process_group import (
    SINGLE_PROCESS,
    ProcessGroup,
    _buckets,
    process_group_of,
    require_equal,
)
from simpletuner.errors import ConfigError
from tests.processes import in_processes
from tests.runs import load_here, write_run


def test_a_process_without_variables_is_alone():
    assert process_group_of({}) == SINGLE_PROCESS
    assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.sum([1.5, 2]) == [1.5, 2.0]
    assert SINGLE_PROCESS.gather({"a": 1}) == [{"a": 1}]


def test_torchruns_variables_are_understood():
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert process_group_of(environment) == ProcessGroup(rank=3, size=4, local_rank=1)
    assert is_started_already(environment)
    assert not is_started_already({"LOCAL_RANK": "0"})
    assert is_started_already({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"})


def test_a_shell_that_exports_numbers_of_machines_makes_no_process():
    """As clusters do, and as OmniGen2's and FireRed's documents recommend."""
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert not is_started_already(environment)
    forget_machine_numbers(environment)
    assert environment == {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert process_group_of(environment) == SINGLE_PROCESS
    worker = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    forget_machine_numbers(worker)
    assert worker == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def test_a_rank_outside_of_its_world_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="RANK is 2 and WORLD_SIZE is 2"):
        process_group_of({"RANK": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_each_item_once(size):
    items = list(range(11))
    shares = [ProcessGroup(rank, size).share(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items


def test_last_words_name_the_process_that_spoke(tmp_path):
    place = tmp_path / "1"
    reported = leave_last_words("disk full", {LAST_WORDS: str(place), "RANK": "1", "WORLD_SIZE": "2"})
    assert reported
    assert place.read_text() == "process 1 of 2: disk full"
    assert not leave_last_words("disk full", {})


def test_launchers_variables_set_options(tmp_path, omnigen_folder, monkeypatch):
    write_run(tmp_path, omnigen_folder)
    environment = {"TRAINING_NUM_PROCESSES": "2", "TRAINING_NUM_MACHINES": "3", "NODE_RANK": "1"}
    environment |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    layout = layout_of(load_run((), environment, tmp_path).config.processes)
    assert (layout.world_size, layout.machine_rank, layout.address, layout.port) == (6, 1, "10.0.0.1", 29500)


def test_machines_that_cannot_meet_are_refused_before_anything_starts(tmp_path, omnigen_folder):
    write_run(tmp_path, omnigen_folder, num_machines=2, machine_rank=2)
    with pytest.raises(ConfigError) as raised:
        load_here(tmp_path)
    assert {problem.key for problem in raised.value.problems} == {
        "machine_rank",
        "main_process_ip",
        "main_process_port",
    }


@pytest.mark.parametrize(("visible", "processes"), [("", 1), ("0", 1), ("0,1,2", 3)])
def test_each_accelerator_has_a_process_and_a_machine_without_one_has_one(
    tmp_path, omnigen_folder, monkeypatch, visible, processes
):
    write_run(tmp_path, omnigen_folder)
    config = load_run((), {}, tmp_path).config
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert layout_of(config.processes).num_processes == processes


@pytest.mark.parametrize(("visible", "count"), [("0,2", 2), ("", 0), ("-1", 0), ("1,-1", 1), ("GPU-5d3", 1)])
def test_only_visible_accelerators_get_a_process(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_accelerators() == count


def test_numbers_are_summed_and_values_gathered_in_the_order_of_ranks():
    def work(process_group):
        text = "long " * process_group.rank + "ü"
        return {
            "sum": process_group.sum([process_group.rank + 1, 1 + 2**-40]),
            "any": [process_group.any(False), process_group.any(process_group.rank == 2), process_group.any(True)],
            "gather": process_group.gather({"rank": process_group.rank, "text": text}),
            "main": process_group.from_main([process_group.rank, "x"]),
            "key": list(process_group.key),
            "is_main": process_group.is_main,
        }

    answers = in_processes(3, work)
    assert answers[0]["sum"] == [6, 3 + 3 * 2**-40]  # exact in float64, and only there
    assert answers[0]["sum"] == answers[1]["sum"] == answers[2]["sum"]
    assert [answer["any"] for answer in answers] == [[False, True, True]] * 3
    wanted = [{"rank": rank, "text": "long " * rank + "ü"} for rank in range(3)]
    assert [answer["gather"] for answer in answers] == [wanted] * 3
    assert [answer["main"] for answer in answers] == [[0, "x"]] * 3
    assert [answer["key"] for answer in answers] == [[0], [1], [2]]
    assert [answer["is_main"] for answer in answers] == [True, False, False]
    assert SINGLE_PROCESS.key == ()


def test_the_others_begin_when_the_main_process_has_ended_its_block():
    def work(process_group):
        times = []
        with process_group.main_first():
            times.append(time.monotonic())
            if process_group.is_main:
                time.sleep(0.1)
            times.append(time.monotonic())
        return times

    main, *others = in_processes(3, work)
    assert all(other[0] >= main[1] for other in others)


def test_nobody_goes_on_from_a_barrier_before_all_are_there():
    def work(process_group):
        time.sleep(0.1 * process_group.rank)
        came = time.monotonic()
        process_group.barrier()
        return [came, time.monotonic()]

    first, second = in_processes(2, work)
    assert first[1] >= second[0]


@pytest.mark.parametrize("bucket_bytes", [64 * 2**20, 8])
def test_gradients_are_summed_in_float32_and_a_missing_one_counts_as_zeros(monkeypatch, bucket_bytes):
    """Ranks 0 to 2 have 1, 2, 3; the second parameter has a gradient on rank 1 alone. Buckets change nothing."""
    monkeypatch.setattr("simpletuner.distributed.process_group.BUCKET_BYTES", bucket_bytes)

    def work(process_group):
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 1)]
        half = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        parameters[0].grad = torch.full((2,), float(process_group.rank + 1))
        if process_group.rank == 1:
            parameters[1].grad = torch.tensor([1.0, 2.0, 3.0])
        parameters[2].grad = torch.tensor([10.0**process_group.rank])
        half.grad = torch.ones(3, dtype=torch.bfloat16)
        half.grad[process_group.rank] = 256
        process_group.sum_gradients(parameters)
        process_group.sum_gradients([half])
        return [parameter.grad.tolist() for parameter in (*parameters, half)]

    for answer in in_processes(3, work):
        # In bfloat16 256 + 1 is 256, and whatever the order, one of the three begins so; in float32 they are 258.
        assert answer == [[6, 6], [1, 2, 3], [111], [258, 258, 258]]


def test_processes_that_hold_different_weights_are_stopped():
    def work(process_group):
        # In float32 the sums would be equal: 2**24 + 1 is 2**24 there.
        same = {"a": torch.ones(2), "b": torch.tensor([2.0**24, float(process_group.rank)])}
        require_equal(process_group, {"a": torch.ones(2)}, "start")
        with pytest.raises(
            RuntimeError, match=f"after step 3: process {1 - process_group.rank} holds another b than process"
        ):
            require_equal(process_group, same, "after step 3")
        return True

    assert in_processes(2, work) == [True, True]


def test_buckets_are_full_but_not_overfull(monkeypatch):
    monkeypatch.setattr("simpletuner.distributed.process_group.BUCKET_BYTES", 16)
    sizes = [1, 2, 1, 1, 2, 9, 4]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    assert [[each.numel() for each in bucket] for bucket in _buckets(parameters)] == [[1, 2, 1], [1, 2], [9], [4]]


def test_node_rank_wins_over_machine_rank(tmp_path, omnigen_folder):
    write_run(tmp_path, omnigen_folder)
    environment = {"TRAINING_NUM_MACHINES": "3", "NODE_RANK": "1", "MACHINE_RANK": "2"}
    environment |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert layout_of(load_run((), environment, tmp_path).config.processes).machine_rank == 1
    del environment["NODE_RANK"]
    assert layout_of(load_run((), environment, tmp_path).config.processes).machine_rank == 2
