"""What saves memory changes no result: each way against the plain step, and in whole runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simpletuner.adapters.build import attach_adapter
from simpletuner.commands import plan as planning
from simpletuner.distributed.process_group import SINGLE_PROCESS
from simpletuner.errors import ConfigError
from simpletuner.models.build import build_family
from simpletuner.training.device_placement import place_denoiser
from simpletuner.training.gradient_checkpointing import GradientCheckpointing, MeasuredMemory
from simpletuner.training.kernels import attention_kernel, compile_blocks
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise
from simpletuner.training.swapping import SwappedBlocks, repeated_blocks
from tests.runs import dataset, load_here, metrics, train_here, write_images, write_run
from tests.tiny import tiny_omnigen_folder
from tests.tiny_folders import TINY_FOLDERS

LORA = {"lora_type": "standard", "lycoris_config": None, "lora_rank": 4}
WAYS: Mapping[str, dict[str, Any]] = {
    "little kept": {},
    "little kept, LoRA": LORA,
    "little kept, packed": {"base_model_precision": "int8-quanto"},
    "whole": {"gradient_checkpointing": True},
    "every second block": {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
    "measured": {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto"},
    "inputs in main memory": {"gradient_checkpointing": True, "gradient_checkpointing_backend": "unsloth"},
    "one block swapped": {"gradient_checkpointing": True, "musubi_blocks_to_swap": 1},
    "all blocks swapped": {"gradient_checkpointing": True, "enable_group_offload": True},
    "all blocks swapped, packed": {
        "gradient_checkpointing": True, "enable_group_offload": True, "base_model_precision": "int8-quanto"
    },
    "all blocks swapped, 8-bit products": {
        "gradient_checkpointing": True, "enable_group_offload": True, "base_model_precision": "int8dq-torchao"
    },
    "float8 products, recomputed, DoRA": {
        "gradient_checkpointing": True, "base_model_precision": "fp8-quanto", "quantize_activations": True,
        **LORA, "use_dora": True,
    },
    "swapped, inputs in main memory, LoRA": {
        "gradient_checkpointing": True, "enable_group_offload": True,
        "gradient_checkpointing_backend": "unsloth", **LORA,
    },
    "compiled": {"dynamo_backend": "aot_eager"},
    "compiled, recomputed": {"dynamo_backend": "aot_eager", "gradient_checkpointing": True},
    "compiled, packed": {"dynamo_backend": "aot_eager", "base_model_precision": "int8-torchao"},
    "compiled, 8-bit products": {"dynamo_backend": "aot_eager", "base_model_precision": "int8dq-torchao"},
    "LoRA with dropout, recomputed": {"gradient_checkpointing": True, **LORA, "lora_dropout": 0.5},
}  # fmt: skip
PLAIN_OF = (
    *("base_model_precision", "quantize_activations"),
    *("lora_type", "lycoris_config", "lora_rank", "lora_dropout", "use_dora"),
)


def gradients(folder: Path, model: Path, options: Mapping[str, Any], steps: int = 2) -> list[dict[str, Tensor]]:
    """Of the adapter, for a few batches of two sizes."""
    loaded = load_here(write_run(folder, model, **options))
    family = build_family(loaded.config)
    denoiser = family.load_base()
    adapter = attach_adapter(loaded, family, denoiser)
    perturb(adapter.trainable_parameters())
    place_denoiser(loaded.config, family, denoiser, adapter, SINGLE_PROCESS)
    if (recomputing := GradientCheckpointing.of(loaded.config, family.device)) is not None:
        denoiser.enable_gradient_checkpointing(recomputing)
    compile_blocks(denoiser, family.spec.block_classes, loaded.config.precision.dynamo_backend)
    denoiser.train()
    found = []
    for step in range(steps):
        side = (64, 96)[step % 2]
        batch = empty_batch(family, side, 64, family.encode_prompts(["a red star", "a blue moon"]))
        noise = sample_noise(batch, 0, step)
        torch.manual_seed(step)
        losses = compute_losses(family, denoiser, batch, noise, torch.full((2,), 0.5, dtype=torch.float64))
        losses.weighted_sum.backward()
        parameters = adapter.trainable_parameters()
        # What the last block makes of the text goes nowhere, so that some of its layers have no gradient.
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        found.append({name: gradient.clone() for name, gradient in gradients.items() if gradient is not None})
        for parameter in parameters.values():
            parameter.grad = None
        if recomputing is not None:
            recomputing.after_step()
    return found


def perturb(parameters: Mapping[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


QUICK = ("little kept", "every second block", "measured", "inputs in main memory", "all blocks swapped, packed")
LONG = ("compiled, recomputed", "compiled, packed", "compiled, 8-bit products")
MARKS = {way: pytest.mark.ci if way in LONG else pytest.mark.slow for way in WAYS if way not in QUICK}


@pytest.mark.parametrize("way", [pytest.param(way, marks=MARKS.get(way, ())) for way in WAYS])
def test_every_way_gives_the_gradients_of_the_plain_step(
    way: str, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain step keeps all, since its tensors are small; each way keeps as little as with large ones.

    Products in 8 bits round what they take: sums in another order, as a compiler makes them, can make an activation the
    next of 127 levels. Without 8-bit products, gradients differ by at least three times the limit.
    """
    options = WAYS[way]
    plain = {"gradient_checkpointing": False, **{key: options[key] for key in PLAIN_OF if key in options}}
    expected = gradients(tmp_path / "plain", omnigen_folder, plain, steps=4)
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 0)
    found = gradients(tmp_path / "saving", omnigen_folder, options, steps=4)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in theirs:
            if way == "compiled, 8-bit products":
                assert (ours[name] - theirs[name]).norm() < 5e-4 * theirs[name].norm(), f"{name}, step {step}"
            else:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=f"{name}, step {step}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY_FOLDERS if name != "omnigen"])
@pytest.mark.parametrize("way", ["measured", "inputs in main memory", "all blocks swapped, packed"])
def test_the_ways_serve_every_family(name: str, way: str, tmp_path: Path) -> None:
    model, options = TINY_FOLDERS[name](tmp_path / "model"), {"model_family": name, **WAYS[way], **LORA}
    plain = {key: value for key, value in options.items() if key in (*PLAIN_OF, "model_family")}
    expected = gradients(tmp_path / "plain", model, plain)
    found = gradients(tmp_path / "saving", model, options)
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["measured", "inputs in main memory", "all blocks swapped, packed"])
def test_a_run_that_saves_memory_ends_with_the_weights_of_one_that_does_not(
    way: str, tmp_path: Path, omnigen_folder: Path
) -> None:
    options = {"use_ema": True, "eval_steps_interval": 4, **WAYS[way]}
    plain = {key: value for key, value in options.items() if key in (*PLAIN_OF, "use_ema", "eval_steps_interval")}
    expected = train_here(write_run(tmp_path / "plain", omnigen_folder, **plain))
    found = train_here(write_run(tmp_path / "saving", omnigen_folder, **options))
    name = "pytorch_lora_weights.safetensors"
    weights, plain_weights = load_file(found / name), load_file(expected / name)
    for key in plain_weights:
        torch.testing.assert_close(weights[key], plain_weights[key], rtol=1e-4, atol=1e-5)
    for event in ("step_done", "eval_done"):
        key = "loss" if event == "step_done" else "pooled"
        ours, theirs = ([record[key] for record in metrics(output, event)] for output in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_swapped_weights_leave_no_copy_behind(tmp_path: Path, omnigen_folder: Path) -> None:
    options = {"gradient_checkpointing": True, "enable_group_offload": True}
    loaded = load_here(write_run(tmp_path, omnigen_folder, **options))
    family = build_family(loaded.config)
    denoiser = family.load_base()
    adapter = attach_adapter(loaded, family, denoiser)
    blocks = repeated_blocks(denoiser, family.spec.block_classes)
    swap = SwappedBlocks(blocks, torch.device("cpu"))
    denoiser.enable_gradient_checkpointing(GradientCheckpointing(family.device))
    denoiser.train()
    fetched: list[int] = []
    fetch = swap.fetch
    swap.fetch = lambda index: fetched.append(index) or fetch(index)  # type: ignore[method-assign]
    perturb(adapter.trainable_parameters())
    batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star"]))
    loss = compute_losses(family, denoiser, batch, torch.randn(1, 4, 8, 8), torch.full((1,), 0.5, dtype=torch.float64))
    loss.weighted_sum.backward()
    assert fetched == [0, 1, 1, 0]
    assert all(buffer.nbytes == swap.weights[0].num_bytes for buffer in swap.buffers)
    assert len(swap.buffers) == 2


def test_more_blocks_than_there_are_cannot_be_swapped(tmp_path: Path, omnigen_folder: Path) -> None:
    options = {"gradient_checkpointing": True, "musubi_blocks_to_swap": 3}
    with pytest.raises(ConfigError, match="has 2"):
        gradients(tmp_path, omnigen_folder, options)


def asked(room: MeasuredMemory, blocks: Sequence[tuple[nn.Module, Tensor]]) -> list[bool]:
    """Which blocks of a forward pass are recomputed; where one is counted, it keeps its result."""
    found = []
    for index, (module, x) in enumerate(blocks):
        is_recomputed, count = room.ask(index, (x,), module)
        with count or nullcontext():
            x.exp()
        found.append(is_recomputed)
    return found


def test_as_many_blocks_keep_their_activations_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    room = MeasuredMemory(torch.device("cpu"))
    monkeypatch.setattr(room, "free_bytes", lambda: 1000)
    blocks = [(nn.Tanh(), torch.randn(10, 5, requires_grad=True))] * 8  # each keeps 200 bytes
    # The optimizer makes its state after the peak of the first step: the second one decides.
    for _ in range(2):
        assert asked(room, blocks) == [False] + [True] * 7
        room.after_step()
    # 1000 bytes, a tenth of them spared, hold 4 more blocks: the last ones, which are freed first.
    assert asked(room, blocks) == [True] * 3 + [False] * 5
    assert asked(room, [(nn.Tanh(), torch.zeros(20, 5))] * 2) == [False, True]  # another size is measured again


def test_each_kind_of_block_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two text refiners that keep 20 bytes stand before six blocks that keep 200."""
    room = MeasuredMemory(torch.device("cpu"))
    monkeypatch.setattr(room, "free_bytes", lambda: 500)
    text, image = torch.randn(1, 5, requires_grad=True), torch.randn(10, 5, requires_grad=True)
    blocks = [(nn.Identity(), text)] * 2 + [(nn.Tanh(), image)] * 6
    for _ in range(2):
        assert asked(room, blocks) == [False, True, False] + [True] * 5
        room.after_step()
    # 450 of 500 bytes, and the 220 of the blocks that were measured, hold three blocks of 200.
    assert asked(room, blocks) == [True] * 5 + [False] * 3


def test_a_larger_image_behind_the_same_text_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block sees the text alone: it says nothing of how much the blocks behind it keep."""
    room = MeasuredMemory(torch.device("cpu"))
    monkeypatch.setattr(room, "free_bytes", lambda: 500)
    text = (nn.Identity(), torch.randn(1, 5, requires_grad=True))
    small, large = ([text] + [(nn.Tanh(), torch.randn(rows, 5, requires_grad=True))] * 3 for rows in (10, 100))
    for _ in range(2):
        asked(room, small)
        room.after_step()
    assert asked(room, small) == [False] * 4
    assert asked(room, large) == [False, False, True, True]
    room.after_step()
    # Each of the large ones keeps 2000 bytes: one alone fits.
    assert asked(room, large)[1:] == [True, True, False]
    assert asked(room, small)[1:] == [False] * 3


def test_captions_of_almost_one_length_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    room = MeasuredMemory(torch.device("cpu"))
    monkeypatch.setattr(room, "free_bytes", lambda: 0)
    for _ in range(2):
        asked(room, [(nn.Tanh(), torch.zeros(1000, 5, requires_grad=True))] * 3)
        room.after_step()
    counted = [room.ask(0, (torch.zeros(rows, 5),), nn.Tanh())[1] is not None for rows in (990, 1000, 1200)]
    assert counted == [False, False, True]


@pytest.mark.parametrize("large", [0, 1 << 20])
def test_blocks_computed_again_give_the_same_bits(
    large: int, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hence a resumed run may recompute other blocks than the one that was cut off did."""
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", large)
    ways = ({"gradient_checkpointing": False}, {"gradient_checkpointing": True})
    plain, whole = (gradients(tmp_path / str(i), omnigen_folder, way, steps=2) for i, way in enumerate(ways))
    for step, again in zip(plain, whole, strict=True):
        assert all(torch.equal(again[name], step[name]) for name in step)


def test_the_last_block_is_never_computed_again() -> None:
    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)]
    calls = [0, 0, 0]
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *args, index=index: calls.__setitem__(index, calls[index] + 1))
    recomputing = GradientCheckpointing(torch.device("cpu"))
    for expected in ([2, 2, 2], [4, 4, 3]):  # the first pass does not know which is the last
        x = torch.randn(2, 4, requires_grad=True)
        for block in blocks:
            x = recomputing(block, x)
        x.sum().backward()
        assert calls == expected


@pytest.mark.parametrize("mechanism", ["native-flash", "native-math"])
def test_an_attention_kernel_of_the_processor_gives_the_same_result(
    mechanism: str, tmp_path: Path, omnigen_folder: Path
) -> None:
    expected = gradients(tmp_path / "plain", omnigen_folder, {}, steps=1)[0]
    with attention_kernel(mechanism, torch.device("cpu"), torch.float32):
        found = gradients(tmp_path / "kernel", omnigen_folder, {}, steps=1)[0]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_kernel_that_the_device_lacks_is_named(tmp_path: Path, omnigen_folder: Path) -> None:
    folder = write_run(tmp_path, omnigen_folder, attention_mechanism="cudnn")
    with pytest.raises(ConfigError, match=r"(?s)attention_mechanism.*cpu has no such kernel"):
        train_here(folder)


@pytest.mark.ci
def test_compiled_blocks_train_in_a_run(tmp_path: Path, omnigen_folder: Path) -> None:
    losses = []
    for backend in ("no", "inductor"):
        folder = write_run(tmp_path / backend, omnigen_folder, max_train_steps=4, dynamo_backend=backend)
        data = json.loads((folder / "multidatabackend.json").read_text())
        kept = [entry for entry in data if not entry.get("is_regularisation_data")]
        (folder / "multidatabackend.json").write_text(json.dumps(kept))
        losses.append([record["loss"] for record in metrics(train_here(folder), "step_done")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.ci
def test_a_compiled_run_of_two_sizes_with_an_ema_resumes_to_the_same_bits(tmp_path: Path, omnigen_folder: Path) -> None:
    write_images(tmp_path / "small", 3, seed=1)
    write_images(tmp_path / "large", 3, seed=2)
    data = [dataset("small", resolution=32), dataset("large")]
    # One epoch: three steps of each size.
    options = {"max_train_steps": 6, "train_batch_size": 1, "checkpoint_step_interval": 3, "use_ema": True}
    folder = write_run(tmp_path, omnigen_folder, data, **options, dynamo_backend="inductor")

    def saved() -> dict[str, bytes]:
        names = ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors")
        return {name: (folder / "output" / name).read_bytes() for name in names}

    train_here(folder)
    straight = saved()
    train_here(folder, "--resume_from_checkpoint=checkpoint-3")
    assert straight == saved()


@pytest.mark.ci
def test_a_compiled_base_without_its_adapter_is_the_base(tmp_path: Path, omnigen_folder: Path) -> None:
    """The first batch of this run is regularization: an adapter that changes nothing yet is compared with the base."""
    folder = write_run(tmp_path, omnigen_folder, max_train_steps=1, dynamo_backend="inductor")
    [step] = metrics(train_here(folder), "step_done")
    assert step["extra"]["regularisation_loss"] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_the_plan_counts_what_is_saved(tmp_path: Path) -> None:
    model = tiny_omnigen_folder(tmp_path / "model", num_layers=6)

    def rows(**options: Any) -> dict[str, int]:
        folder = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), model, **options)
        return {row.name: row.num_bytes for row in planning.make_plan(load_here(folder), probe=False).memory}

    recomputed = {"gradient_checkpointing": True}
    frozen, name = "frozen weights", "activations, checkpointed"
    plain, whole = rows(), rows(**recomputed)
    offloaded = rows(**recomputed, gradient_checkpointing_backend="unsloth")
    assert offloaded[name] < whole[name] < plain["activations"]
    packed = rows(base_model_precision="int8-quanto")
    assert packed[frozen] < plain[frozen]
