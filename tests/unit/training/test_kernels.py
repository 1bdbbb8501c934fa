"""Compiled blocks stay compiled, whatever a run calls them with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from simpletuner.models.build import build_family
from simpletuner.training.build import attach_adapter
from simpletuner.training.kernels import compile_blocks
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise
from tests.runs import load_here, write_run

SIZES = ((64, 64), (96, 64), (64, 96), (128, 64), (64, 128), (96, 96))
PROMPTS = {"of one length": ["a red star", "a red star"], "padded": ["a red star", "a moon that is blue"]}


@pytest.mark.slow
def test_sizes_batches_masks_and_evaluation_never_fall_back_to_eager(
    tmp_path: Path, omnigen_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters.clear()
    loaded = load_here(write_run(tmp_path, omnigen_folder))
    family = build_family(loaded.config)
    denoiser = family.load_base()
    attach_adapter(loaded, family, denoiser)
    calls = {"compiled": 0}

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls["compiled"] += 1
        return graph.forward

    monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, "counting", None)
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "counting", backend)
    compile_blocks(denoiser, family.spec.block_classes, "counting")
    with (
        caplog.at_level(logging.WARNING, logger="torch._dynamo"),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        for count, names in ((1, ["of one length"]), (2, list(PROMPTS))):
            for name in names:
                embeds = family.encode_prompts(PROMPTS[name][:count])
                for height, width in SIZES:
                    batch = empty_batch(family, height, width, embeds)
                    quantiles = torch.full((count,), 0.5, dtype=torch.float64)
                    for trains in (True, False):
                        with torch.set_grad_enabled(trains):
                            loss = compute_losses(family, denoiser, batch, sample_noise(batch, 0, 0), quantiles)
                        if trains:
                            loss.weighted_sum.backward()
    assert "recompile_limit" not in caplog.text
    assert 0 < calls["compiled"] <= 24
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_a_first_block_is_called_like_all_others() -> None:
    """Its input has no gradient in LoRA training: each variant would be compiled twice."""

    class Block(torch.nn.Linear):
        pass

    blocks = torch.nn.Sequential(Block(4, 4), Block(4, 4)).requires_grad_(False)
    compile_blocks(blocks, ["Block"], "eager")
    x = torch.ones(1, 2, 4)
    assert blocks(x).requires_grad
    assert not x.requires_grad
    with torch.no_grad():
        assert not blocks(x).requires_grad
