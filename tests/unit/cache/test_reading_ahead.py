"""Images that are read while others are encoded: small ones several in a task, and never many more than are needed."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch

from simpletuner.batch import Crop, Sample
from simpletuner.cache.encoding import in_tasks, read_ahead


def sample(index: int, height: int, width: int) -> Sample:
    crop = Crop(height, width, 0, 0, height, width)
    return Sample("set", f"{index}.png", f"{index:064x}", width, height, ("an image",), crop)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(128, 128)] * 17, [8, 8, 1]),
        ([(256, 256)] * 5, [2, 2, 1]),
        ([(512, 512)] * 3, [1, 1, 1]),
        ([(256, 384), (256, 128), (1024, 1024), (128, 128)], [2, 1, 1]),
        ([], []),
    ],
)
def test_a_task_has_131072_pixels_to_read_or_one_image(sizes: list[tuple[int, int]], expected: list[int]) -> None:
    samples = [sample(index, height, width) for index, (height, width) in enumerate(sizes)]
    tasks = list(in_tasks(samples))
    assert [len(task) for task in tasks] == expected
    assert [each for task in tasks for each in task] == samples


class Eager(Executor):
    """Runs each task as it comes."""

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


@pytest.mark.parametrize(
    ("side", "num_ahead", "expected"),
    [
        (512, 4, [*range(5, 14)]),  # one in a task: the next one comes for each that is taken
        (128, 4, [24] * 8 + [32]),  # eight in a task: each of the two threads has one
        (128, 30, [32] * 8 + [40]),
    ],
)
def test_so_many_images_are_read_when_the_first_are_taken(side: int, num_ahead: int, expected: list[int]) -> None:
    samples = [sample(index, side, side) for index in range(64)]
    read: list[Sample] = []
    images = read_ahead(in_tasks(samples), lambda each: read.append(each) or torch.zeros(3), Eager(), 2, num_ahead)
    assert [len(read) for _, _ in zip(range(9), images, strict=False)] == expected
    assert [image.sample for image in images] == samples[9:]
    assert read == samples
