"""Which families the quick suite looks at here: one of each kind. The whole suite looks at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simpletuner.families.registry import FAMILIES

UNET = "kolors"  # the tiny one with the fewest blocks
# An own denoiser that only tokenizes, a UNet that predicts noise, a transformer of flow, one that sees references.
QUICK = {"omnigen", UNET, "flux", "qwen_image_edit"}
HERE = Path(__file__).parent
# A UNet has several times the layers of others: of these tests the quick suite looks at one form, which the row names.
ONE_FORM = {
    "test_every_adapter_is_whole_on_its_device_and_waits_for_nothing": "LoRA",
    "test_every_number_format_is_whole_on_its_device_and_waits_for_nothing": "LoRA",
    "test_a_trained_lora_gives_the_same_output_from_every_format_and_can_be_gone_on_from": "False",  # no DoRA
    "test_other_algorithms_keep_their_output_in_every_format_that_can_hold_them": "lokr",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        words = set(re.split(r"[\[\]-]", item.name))
        if HERE in item.path.parents and words & (FAMILIES.keys() - QUICK):
            item.add_marker(pytest.mark.slow)
        if UNET in words and ONE_FORM.get(getattr(item, "originalname", ""), UNET) not in words:
            item.add_marker(pytest.mark.slow)
