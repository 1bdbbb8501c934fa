"""Learning rate schedules against hand numbers and against diffusers' own."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from simpletuner.distributed.process_group import SINGLE_PROCESS
from simpletuner.errors import ConfigError
from simpletuner.optim.schedules import SCHEDULES, build_schedule, scaled_learning_rate
from simpletuner.training.build import build_lr_factor
from tests.configs import config_of

RATE, STEPS, WARMUP = 2e-4, 50, 10


def factors(name: str, **settings) -> list[float]:
    values = {"learning_rate": RATE, "num_training_steps": STEPS, "num_warmup_steps": WARMUP, "lr_end": 0.0} | settings
    lr_factor = build_schedule(name, **values)
    return [lr_factor(step) for step in range(values["num_training_steps"] + 5)]


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"lr_num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_power": 0.8, "lr_end": 1e-7}, {"power": 0.8}),
        ("polynomial", {"lr_power": 2.0, "lr_end": 1e-7}, {"power": 2.0}),
    ],
)
def test_equal_to_diffusers(name: str, settings, theirs) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS, **theirs)
    expected = []
    for _ in range(STEPS + 1):  # beyond the end theirs turns back, ours stays
        expected.append(scheduler.get_last_lr()[0] / RATE)
        optimizer.step()
        scheduler.step()
    assert factors(name, **settings)[: STEPS + 1] == pytest.approx(expected, abs=1e-9)


def test_constant_is_one_and_warms_up_where_asked() -> None:
    assert factors("constant", num_warmup_steps=0) == [1.0] * (STEPS + 5)
    assert factors("constant")[:12] == pytest.approx([step / 10 for step in range(10)] + [1.0, 1.0])


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "sine"])
def test_every_decay_ends_at_lr_end_and_stays_there(name: str) -> None:
    tail = factors(name, lr_end=5e-5)[STEPS:]
    assert tail == pytest.approx([0.25] * 5)


def test_half_way_numbers() -> None:
    settings = {"num_warmup_steps": 0, "num_training_steps": 100, "lr_end": 4e-5}  # a floor of 0.2
    assert factors("linear", **settings)[50] == pytest.approx(0.6)
    assert factors("cosine", **settings)[25] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert factors("polynomial", lr_power=2, **settings)[50] == pytest.approx(0.2 + 0.8 * 0.25)
    sine = factors("sine", lr_num_cycles=2, **settings)
    assert [sine[step] for step in (0, 25, 50, 75)] == pytest.approx([0.2, 1.0, 0.2, 1.0])
    restarts = factors("cosine_with_restarts", lr_num_cycles=2, **settings)
    assert [restarts[step] for step in (0, 25, 50, 75)] == pytest.approx([1.0, 0.6, 1.0, 0.6])


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_factor_leaves_the_range_even_with_warmup_longer_than_the_run(name: str) -> None:
    values = factors(name, num_warmup_steps=80, lr_end=1e-5)
    assert all(0 <= value <= 1 for value in values)
    assert values[8] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "settings", "key"), [("cosin", {}, "lr_scheduler"), ("cosine", {"lr_end": 1e-3}, "lr_end")]
)
def test_mistakes_name_their_key(name: str, settings, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        factors(name, **settings)
    assert caught.value.problems[0].key == key


@pytest.mark.parametrize(("scale", "root", "factor"), [(False, False, 1), (True, False, 36), (True, True, 6)])
def test_the_rate_grows_with_the_images_of_a_step_of_all_processes(scale: bool, root: bool, factor: int) -> None:
    """Batches of 3, 4 of them, 3 processes: 36 images."""
    config = config_of(
        learning_rate=0.5, lr_scale=scale, lr_scale_sqrt=root, train_batch_size=3, gradient_accumulation_steps=4
    )
    assert scaled_learning_rate(config, 3) == 0.5 * factor


def test_every_setting_of_a_schedule_is_read_from_the_configuration() -> None:
    """Rate 0.5, 2 steps of warm-up, 10 in all; in the middle of the decay, at step 6, by hand."""
    options = {"learning_rate": 0.5, "lr_warmup_steps": 2, "lr_end": 0.125}
    for name, written, middle in (
        ("linear", {}, 0.625),  # half of the way from 1 to 1/4
        ("polynomial", {"lr_power": 2.0}, 0.4375),  # 1/4 + 3/4 of 1/4
        ("sine", {"lr_num_cycles": 3}, 1.0),  # in the middle of the second arch
        ("cosine_with_restarts", {"lr_num_cycles": 2}, 1.0),  # the second one begins
    ):
        config = config_of(lr_scheduler=name, **options, **written)
        factor = build_lr_factor(config, 10, SINGLE_PROCESS)
        assert [factor(step) for step in (0, 1, 6)] == pytest.approx([0, 0.5, middle])


def test_a_constant_rate_knows_no_end_and_an_equal_one_is_no_rise() -> None:
    assert factors("constant", num_warmup_steps=0, lr_end=1.0)[0] == 1
    assert factors("linear", num_warmup_steps=0, lr_end=RATE)[STEPS] == 1
    assert factors("linear", num_warmup_steps=0, learning_rate=0.0, lr_end=0.0)[0] == 1
