"""Needless lines of libraries are hidden, all others are shown."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from simpletuner.quiet import NEEDLESS, hide_needless_lines

IMPORTS = "import diffusers.models.transformers.transformer_omnigen, lycoris, peft"


@pytest.mark.slow
def test_importing_what_a_run_needs_prints_nothing():
    program = f"from simpletuner.quiet import hide_needless_lines; hide_needless_lines(); {IMPORTS}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_other_lines_of_these_libraries_are_shown(caplog: pytest.LogCaptureFixture):
    hide_needless_lines()
    for name, beginnings in NEEDLESS.items():
        logging.getLogger(name).warning(f"{beginnings[0]} something")
        logging.getLogger(name).warning("the image is upside down")
    assert [record.message for record in caplog.records] == ["the image is upside down"] * len(NEEDLESS)


def test_remarks_of_libraries_about_their_own_future_are_hidden():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_needless_lines()
        for text in (
            "Paged optimizers are not supported on CPU; x",
            "`FluxPosEmbed` is deprecated and will go",
            "`torch.jit.script_method` is deprecated",
            "the image is upside down",
        ):
            warnings.warn(text, stacklevel=1)
    assert [str(each.message) for each in shown] == ["the image is upside down"]


def test_a_second_call_adds_no_second_filter():
    hide_needless_lines()
    counts = [len(logging.getLogger(name).filters) for name in NEEDLESS]
    hide_needless_lines()
    assert [len(logging.getLogger(name).filters) for name in NEEDLESS] == counts
