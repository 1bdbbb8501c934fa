"""Compiled blocks stay compiled, whatever a run calls them with."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as symbolic_config

from simpletuner.adapters.build import attach_adapter
from simpletuner.errors import MissingDependency
from simpletuner.families.registry import get_spec
from simpletuner.models.build import build_family
from simpletuner.training import build, kernels
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.kernels import compile_blocks, require_compiler
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise
from tests.runs import dataset, load_here, train_here, write_images, write_run
from tests.tiny_folders import TINY_FOLDERS

SIZES = ((64, 64), (96, 64), (64, 96), (128, 64), (64, 128), (96, 96))
PROMPTS = {"of one length": ["a red star", "a red star"], "padded": ["a red star", "a moon that is blue"]}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """What was compiled by the backend `counting`, which computes it as it stands."""
    torch._dynamo.reset()
    counters.clear()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, "counting", None)
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "counting", backend)
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        symbolic_config.patch(use_duck_shape=True),  # what a test sets is taken back
        torch._inductor.config.patch(fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=True),
    ):
        yield graphs
    torch._dynamo.reset()


def loss_of(family: Any, denoiser: Any, prompts: list[str], height: int, width: int) -> torch.Tensor:
    batch = empty_batch(family, height, width, family.encode_prompts(prompts))
    quantiles = torch.full((len(prompts),), 0.5, dtype=torch.float64)
    return compute_losses(family, denoiser, batch, sample_noise(batch, 0, 0), quantiles).weighted_sum


@pytest.mark.slow
def test_sizes_batches_masks_and_evaluation_never_fall_back_to_eager(
    tmp_path: Path, omnigen_folder: Path, caplog: pytest.LogCaptureFixture, compiled: list[torch.fx.GraphModule]
) -> None:
    loaded = load_here(write_run(tmp_path, omnigen_folder))
    family = build_family(loaded.config)
    denoiser = family.load_base()
    attach_adapter(loaded, family, denoiser)
    compile_blocks(denoiser, family.spec.block_classes, "counting")
    with caplog.at_level(logging.WARNING, logger="torch._dynamo"):
        for count, names in ((1, ["of one length"]), (2, list(PROMPTS))):
            for name in names:
                for height, width in SIZES:
                    loss_of(family, denoiser, PROMPTS[name][:count], height, width).backward()
                    with torch.no_grad():
                        loss_of(family, denoiser, PROMPTS[name][:count], height, width)
    assert "recompile_limit" not in caplog.text
    assert 0 < len(compiled) <= 24
    assert not counters["graph_break"]


WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_type": "standard", "lora_rank": 2},
    "LoRA, recomputed": {"lora_type": "standard", "lora_rank": 2, "gradient_checkpointing": True},
    "LoKr, recomputed": {"gradient_checkpointing": True},
    "int8 base, recomputed": {"gradient_checkpointing": True, "base_model_precision": "int8-quanto"},
}
QUICK = [("omnigen", "LoRA"), ("omnigen", "LoKr, recomputed"), ("omnigen", "int8 base, recomputed")]
LONG = [("flux", "LoRA"), ("sdxl", "LoRA"), ("z_image", "LoRA, recomputed"), ("omnigen", "LoRA, recomputed")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.ci) for each in LONG)])
def test_what_one_size_was_compiled_for_serves_all_sizes(
    name: str, way: str, tmp_path: Path, compiled: list[torch.fx.GraphModule]
) -> None:
    model = TINY_FOLDERS[name](tmp_path / "model")
    loaded = load_here(write_run(tmp_path, model, model_family=name, **WAYS[way]))
    family = build_family(loaded.config)
    denoiser: Any = family.load_base()
    attach_adapter(loaded, family, denoiser)
    recomputing = GradientCheckpointing.of(loaded.config, family.device)
    if recomputing is not None:
        denoiser.enable_gradient_checkpointing(recomputing)
    denoiser.train()
    compile_blocks(denoiser, get_spec(name).block_classes, "counting", sizes_vary=True)
    counts = []
    for height, width in SIZES:
        loss_of(family, denoiser, PROMPTS["padded"], height, width).backward()
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts == [counts[0]] * len(counts)
    assert not counters["graph_break"]
    # A graph on the disk is that of the first size of an earlier run, and does not know that others come.
    assert not torch._inductor.config.fx_graph_cache
    assert not torch._functorch.config.enable_autograd_cache


@pytest.mark.parametrize(("sides", "vary"), [([64, 64], False), ([64, 96], True)])
def test_kernels_serve_any_size_where_the_run_has_several(
    sides: list[int], vary: bool, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(build, "compile_blocks", lambda *arguments: asked.append(arguments[-1]))
    data = [dataset(f"part{number}", resolution=side) for number, side in enumerate(sides)]
    for entry in data:
        write_images(tmp_path / entry["id"], 2, seed=1, side=96)
    train_here(write_run(tmp_path, omnigen_folder, data, max_train_steps=1))
    assert asked == [vary]


@pytest.mark.parametrize(
    ("there", "headers", "missing"),
    [((), True, "C++ compiler (g++)"), (("clang++",), True, "C++ compiler (g++)"), (("g++",), False, "python3-dev")],
)
def test_what_a_processor_needs_for_kernels_is_named(
    there: tuple[str, ...], headers: bool, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch calls g++ or what CXX says, and includes Python.h."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    monkeypatch.setattr("simpletuner.hardware.has_python_headers", lambda: headers)
    with pytest.raises(MissingDependency) as caught:
        require_compiler("inductor", torch.device("cpu"))
    assert missing in caught.value.render()
    assert caught.value.problems[0].key == "dynamo_backend"
    require_compiler("aot_eager", torch.device("cpu"))


def test_a_compiler_that_cxx_names_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++ -O1")
    monkeypatch.setattr("shutil.which", lambda name: name if name == "clang++" else None)
    monkeypatch.setattr("simpletuner.hardware.has_python_headers", lambda: True)
    require_compiler("inductor", torch.device("cpu"))


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


def test_the_attention_kernel_that_is_named_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_require_kernel", lambda *given: None)
    before = torch._C._get_sdp_priority_order()
    for mechanism in ("native-efficient", "native-math"):
        with kernels.attention_kernel(mechanism, torch.device("cpu"), torch.float32):
            assert torch._C._get_sdp_priority_order()[0] == kernels.PREFERRED[mechanism].value
    assert torch._C._get_sdp_priority_order() == before
