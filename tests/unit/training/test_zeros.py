"""Steps whose loss or gradient is exactly 0 are reported with their reason."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from simpletuner.errors import ConfigError
from simpletuner.training.zeros import ZeroWatch, probable_reason
from tests.runs import dataset, load_here, metrics, train_here, write_images, write_run


def batch(masks: torch.Tensor | None = None, is_regularisation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(masks=masks, is_regularisation=is_regularisation)


def warnings_of(steps: list[tuple[float, float]], each=None, mixed_precision: str = "no") -> dict[int, str]:
    """Step -> warning, for (loss, gradient) of each step."""
    watch, found = ZeroWatch(), {}
    for number, (loss, grad_norm) in enumerate(steps, 1):
        text = watch.add(loss, grad_norm, [each or batch()], mixed_precision, number == len(steps))
        if text:
            found[number] = text
    return found


def test_ten_steps_of_zero_are_reported_once_for_each_stretch() -> None:
    good, bad = (0.5, 0.1), (0.5, 0.0)
    assert warnings_of([good] * 30) == {}
    assert warnings_of([bad] * 9 + [good] * 5) == {}
    assert list(warnings_of([good] + [bad] * 25 + [good] + [bad] * 10)) == [11, 37]


def test_a_short_run_is_judged_by_all_of_its_steps() -> None:
    assert warnings_of([(0.5, 0.1), (0.0, 0.0)]) == {}
    assert "exactly 0 for 3 steps" in warnings_of([(0.0, 0.0)] * 3)[3]


@pytest.mark.parametrize(
    ("loss", "each", "mixed_precision", "reason"),
    [
        (
            0.0,
            batch(torch.zeros(1, 1, 8, 8)),
            "no",
            "loss and gradient were .* the masks of these images leave nothing",
        ),
        (0.0, batch(is_regularisation=True), "no", "regularization data"),
        (0.5, batch(), "fp16", "the gradient was .* too small for fp16"),
        (0.5, batch(torch.ones(1, 1, 8, 8)), "bf16", "no trained weight changes the prediction"),
    ],
)
def test_the_reason_is_that_of_the_step(loss: float, each, mixed_precision: str, reason: str) -> None:
    (text,) = warnings_of([(loss, 0.0)] * 10, each, mixed_precision).values()
    assert re.search(reason, text)


def test_one_batch_of_several_is_not_the_reason() -> None:
    for other in (batch(is_regularisation=True), batch(torch.zeros(1, 1, 8, 8))):
        assert probable_reason(0.0, [other, batch()], "no").startswith("the prediction is the target already")


def test_a_run_whose_masks_are_black_says_so(tmp_path: Path, omnigen_folder: Path) -> None:
    """Masks that count almost always: the start warns, and the steps do."""
    write_images(tmp_path / "images", 2, seed=1)
    (tmp_path / "masks").mkdir()
    for number in range(2):
        Image.new("L", (64, 64)).save(tmp_path / f"masks/{number:03d}.png")
    data = [
        dataset("images", conditioning_data="masks"),
        {
            "id": "masks",
            "dataset_type": "conditioning",
            "conditioning_type": "mask",
            "instance_data_dir": "masks",
        },
    ]
    write_run(tmp_path, omnigen_folder, data, masked_loss_probability=0.999999, max_train_steps=2)
    output = train_here(tmp_path)
    texts = [record["text"] for record in metrics(output, "notice") if record["severity"] == "warning"]
    assert any("2 of 2 images have a mask that leaves nothing" in text for text in texts)
    assert any("exactly 0 for 2 steps in a row: the masks" in text for text in texts)


def test_regularisation_data_alone_are_refused(tmp_path: Path, omnigen_folder: Path) -> None:
    write_images(tmp_path / "images", 1, seed=1)
    write_run(tmp_path, omnigen_folder, [dataset("images", is_regularisation_data=True)])
    with pytest.raises(ConfigError, match="all datasets are regularization data"):
        load_here(tmp_path)
