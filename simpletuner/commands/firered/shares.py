"""How often each task and each number of source images is trained.

The original draws the number n of source images by its weight, then a task by its weight, again and again until the
task has rows with n source images: P(n, task) = w(n) w(task) / (the sum of w over all tasks that have such rows). With
a positive weight of an n that no task has it draws for ever. Here such weights are left out, with a warning.

Source: FireRedTeam/FireRed-Image-Edit (Apache-2.0), `train/src/data`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from simpletuner.errors import ConfigError, Problem

TASKS, COUNTS = "train_data_weights", "train_src_img_num_weights"


def read_weights(text: str, key: str) -> dict[str, float]:
    """`a=0.5,b=1.2` -> weights by name.

    Raises:
        ConfigError: another form, a name twice, or what is no weight.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (each.strip() for each in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or not equals or not 0 <= weight < math.inf:
            raise ConfigError(Problem(f'"{part}" is not a weight', f"--{key}", allowed="name=number,... from 0 on"))
        if name in weights:
            raise ConfigError(Problem(f'"{name}" is given twice', f"--{key}", fix="keep one of them"))
        weights[name] = weight
    return weights


def read_task_weights(text: str | None, tasks: Sequence[str]) -> dict[str, float]:
    """The weight of each task that is trained.

    Args:
        text: None weighs all tasks alike.
        tasks: folders that are there.

    Raises:
        ConfigError: a task that is not there, or no weight above 0.
    """
    if text is None:
        return dict.fromkeys(tasks, 1.0)
    weights = read_weights(text, TASKS)
    allowed = ", ".join(tasks)
    if missing := [name for name in weights if name not in tasks]:
        raise ConfigError(
            Problem(f'"{missing[0]}" is not a folder of --train_data_meta_dir', f"--{TASKS}", allowed=allowed)
        )
    trained = {name: weight for name, weight in weights.items() if weight}
    if not trained:
        raise ConfigError(Problem("no task has a weight above 0", f"--{TASKS}", allowed=f"weights of {allowed}"))
    return trained


def read_count_weights(text: str) -> dict[int, float]:
    """The weight of each number of source images, those of 0 left out.

    Raises:
        ConfigError: what is no such weight, or none above 0.
    """
    weights = read_weights(text, COUNTS)
    if wrong := [name for name in weights if not name.isdecimal()]:
        message = f'"{wrong[0]}" is not a number of source images'
        raise ConfigError(Problem(message, f"--{COUNTS}", allowed="0=weight,1=weight,..."))
    trained = {int(name): weight for name, weight in weights.items() if weight}
    if not trained:
        raise ConfigError(Problem("no number of source images has a weight above 0", f"--{COUNTS}"))
    return trained


def shares(
    counts: Mapping[int, float], tasks: Mapping[str, float], rows: Mapping[str, Collection[int]], notes: list[str]
) -> dict[tuple[str, int], float]:
    """P(n, task) by (task, n); they add up to 1.

    Args:
        counts: weights of numbers of source images, above 0.
        tasks: weights of tasks, above 0.
        rows: task -> the numbers of source images that its rows have.
        notes: gets a line for each weight that cannot be met, and for each task that is never trained.

    Raises:
        ConfigError: nothing is left.
    """
    there = {n: [task for task in tasks if n in rows[task]] for n in counts}
    absent = [n for n in counts if not there[n]]
    present = {n: weight for n, weight in counts.items() if there[n]}
    held = "; ".join(f"{task}: {', '.join(map(str, sorted(rows[task])))}" for task in tasks)
    if not present:
        message = f"no row of these tasks has {' or '.join(map(str, sorted(counts)))} source images"
        raise ConfigError(Problem(message, f"--{COUNTS}", allowed=f"what the rows have: {held}"))
    total = sum(present.values())
    for n in absent:
        left = ", ".join(f"{each}={weight / total:.4g}" for each, weight in sorted(present.items()))
        notes.append(f"--{COUNTS}: no row has {n} source images; the weights that are left are {left}")
    for task in tasks:
        if unseen := sorted(set(rows[task]) - present.keys()):
            numbers = ", ".join(map(str, unseen))
            what = "is never trained" if len(unseen) == len(rows[task]) else "is trained in part"
            notes.append(f"--{COUNTS}: {task} {what}: its rows with {numbers} source images have no weight")
    return {
        (task, n): weight / total * tasks[task] / sum(tasks[each] for each in there[n])
        for n, weight in present.items()
        for task in there[n]
    }
