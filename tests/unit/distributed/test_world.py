"""What one process knows of the others, and how many are started."""

from __future__ import annotations

import pytest

from simpletuner.distributed.launcher import LAST_WORDS, is_started_already, leave_last_words
from simpletuner.distributed.layout import layout_of, visible_accelerators
from simpletuner.distributed.world import ALONE, World, world_of
from simpletuner.errors import ConfigError
from tests.runs import load_here, write_run


def test_a_process_without_variables_is_alone():
    assert world_of({}) == ALONE
    assert ALONE.is_main
    assert ALONE.sum([1.5, 2]) == [1.5, 2.0]
    assert ALONE.gather({"a": 1}) == [{"a": 1}]


def test_torchruns_variables_are_understood():
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert world_of(environment) == World(rank=3, size=4, local_rank=1)
    assert is_started_already(environment)
    assert not is_started_already({"LOCAL_RANK": "0"})


def test_a_rank_outside_of_its_world_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="RANK is 2 and WORLD_SIZE is 2"):
        world_of({"RANK": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_each_item_once(size):
    items = list(range(11))
    shares = [World(rank, size).share(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items


def test_last_words_name_the_process_that_spoke(tmp_path):
    place = tmp_path / "1"
    told = leave_last_words("disk full", {LAST_WORDS: str(place), "RANK": "1", "WORLD_SIZE": "2"})
    assert told
    assert place.read_text() == "process 1 of 2: disk full"
    assert not leave_last_words("disk full", {})


def test_launchers_variables_set_options(tmp_path, omnigen_folder, monkeypatch):
    write_run(tmp_path, omnigen_folder)
    from simpletuner.config.loading import load_run
    from simpletuner.models.registry import get_spec

    environment = {"TRAINING_NUM_PROCESSES": "2", "TRAINING_NUM_MACHINES": "3", "NODE_RANK": "1"}
    environment |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    layout = layout_of(load_run((), environment, tmp_path, get_spec).config)
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


@pytest.mark.parametrize(("visible", "count"), [("0,2", 2), ("", 0), ("-1", 0), ("GPU-5d3", 1)])
def test_only_visible_accelerators_get_a_process(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_accelerators() == count
