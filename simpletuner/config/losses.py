"""The losses that `loss_type` chooses from: what each one is, which options it reads, and where its code is.

One row each. The choices and the help of `loss_type`, the notice about options without effect, the reference page and
`training/losses/base.py` follow from it; a test compares every row with the class that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LossRow:
    """One loss.

    Args:
        help: what it is, for the help of `loss_type`: one sentence without its subject.
        target: `package.module:Class`.
        options: that only it reads; the fields of the class have the same names.
    """

    help: str
    target: str
    options: tuple[str, ...] = ()


LOSSES: Mapping[str, LossRow] = {
    "l2": LossRow("is the squared difference", "simpletuner.training.losses.l2:L2"),
    "huber": LossRow(
        "grows only linearly beyond `huber_c`, so that odd images pull less",
        "simpletuner.training.losses.huber:Huber",
        ("huber_schedule", "huber_c"),
    ),
    "smooth_l1": LossRow(
        "does so too, and there counts the same whatever `huber_c` is",
        "simpletuner.training.losses.smooth_l1:SmoothL1",
        ("huber_schedule", "huber_c"),
    ),
}
