"""Solvers on problems whose answer is known, and against diffusers' own."""

from __future__ import annotations

import itertools

import pytest
import torch

from simpletuner.diffusion.solvers import Level, Solver

SPREAD = 0.4  # deviation of the data


def level(sigma: float, count: int = 1) -> Level:
    sigmas = torch.full((count,), sigma, dtype=torch.float64)
    return Level(1 - sigmas, sigmas)


def exact_data(noisy: torch.Tensor, at: Level) -> torch.Tensor:
    """The mean of normal data of deviation SPREAD, given the noisy latents: what a perfect model estimates."""
    a, b = at.signal, at.noise
    return a * SPREAD**2 / (a**2 * SPREAD**2 + b**2) * noisy


def solve(name, order: int, steps: int, start: float = 0.9, end: float = 0.2) -> float:
    noisy = torch.ones(1, dtype=torch.float64)
    solver = Solver(name, order)
    sigmas = torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    for here, there in itertools.pairwise(sigmas):
        noisy = solver.step(noisy, exact_data(noisy, level(here)), level(here), level(there))
    return noisy.item()


def exact(start: float = 0.9, end: float = 0.2) -> float:
    """The flow of normal data only stretches: latents go as the deviation of the noisy data."""
    deviation = [((1 - s) ** 2 * SPREAD**2 + s**2) ** 0.5 for s in (start, end)]
    return deviation[1] / deviation[0]


@pytest.mark.parametrize("name", ["euler", "dpm", "unipc"])
def test_a_model_that_knows_the_answer_is_led_there_in_any_number_of_steps(name) -> None:
    data, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for steps, end in itertools.product((1, 2, 5), (0.1, 0.0)):  # 0: the data itself, where lambda is infinite
        sigmas = torch.linspace(1, end, steps + 1)
        noisy, solver = noise, Solver(name)
        for here, there in itertools.pairwise(sigmas):
            levels = [Level((1 - s).expand(2), s.expand(2)) for s in (here, there)]
            noisy = solver.step(noisy, data, *levels)
        torch.testing.assert_close(noisy, (1 - end) * data + end * noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "order", "rate"), [("euler", 2, 2), ("dpm", 1, 2), ("dpm", 2, 4), ("unipc", 2, 4)])
def test_twice_the_steps_halve_the_error_or_quarter_it(name, order: int, rate: float) -> None:
    errors = [abs(solve(name, order, steps) - exact()) for steps in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(rate, rel=0.3) if rate == 2 else errors[0] / errors[1] > 3
    assert errors[1] < 1e-2


def test_higher_orders_are_closer() -> None:
    errors = {key: abs(solve(*key, 10) - exact()) for key in (("euler", 1), ("dpm", 2), ("unipc", 1), ("unipc", 2))}
    assert errors["dpm", 2] < 0.5 * errors["euler", 1]
    assert errors["unipc", 1] < 0.5 * errors["euler", 1]
    assert errors["unipc", 2] < 0.5 * errors["dpm", 2]


def test_rows_are_solved_each_at_its_own_levels() -> None:
    starts, ends = torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.1])
    noisy, solver, alone = torch.ones(2), Solver("unipc"), [1.0, 1.0]
    singles = [Solver("unipc"), Solver("unipc")]
    for number in range(3):
        here, there = (starts + (ends - starts) * n / 3 for n in (number, number + 1))
        levels = [Level(1 - s, s) for s in (here, there)]
        noisy = solver.step(noisy, exact_data(noisy, levels[0]), *levels)
        for row in range(2):
            one = [Level(1 - s[row : row + 1], s[row : row + 1]) for s in (here, there)]
            x = torch.tensor([alone[row]])
            alone[row] = singles[row].step(x, exact_data(x, one[0]), *one).item()
    assert noisy.tolist() == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "cls"), [("unipc", "UniPCMultistepScheduler"), ("dpm", "DPMSolverMultistepScheduler")]
)
def test_trajectories_are_those_of_diffusers(name, cls: str) -> None:
    import diffusers

    scheduler = getattr(diffusers, cls)(
        solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, lower_order_final=False
    )
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.double()
    mine = theirs = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    solver = Solver(name)
    for number, timestep in enumerate(scheduler.timesteps[:5]):
        here, there = level(sigmas[number].item()), level(sigmas[number + 1].item())
        data = exact_data(mine, here)
        velocity = (theirs - exact_data(theirs, here)) / here.noise
        mine = solver.step(mine, data, here, there)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        torch.testing.assert_close(mine, theirs.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["dpm", "unipc"])
def test_levels_that_coincide_are_passed_over(name) -> None:
    """A rollout that ends at pure noise has nowhere to go, and steps of a discrete schedule may be of no length."""
    for path, wanted in (([1.0] * 4, 1.0), ([0.9, 0.9, 0.7, 0.7, 0.7, 0.4, 0.2], exact())):
        noisy, solver = torch.ones(1, dtype=torch.float64), Solver(name)
        for here, there in itertools.pairwise(path):
            noisy = solver.step(noisy, exact_data(noisy, level(here)), level(here), level(there))
        assert noisy.item() == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize("name", ["dpm", "unipc"])
def test_a_first_level_that_comes_twice_changes_no_step(name) -> None:
    ends = []
    for path in ([0.9, 0.7, 0.4, 0.2], [0.9, 0.9, 0.7, 0.4, 0.2]):
        noisy, solver = torch.ones(1, dtype=torch.float64), Solver(name)
        for here, there in itertools.pairwise(path):
            noisy = solver.step(noisy, exact_data(noisy, level(here)), level(here), level(there))
        ends.append(noisy.item())
    assert ends[1] == pytest.approx(ends[0], rel=1e-12)
