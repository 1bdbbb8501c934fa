"""Runs with an assistant LoRA: trained with it on, validated with it off, and nothing of it in any file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from simpletuner.adapters.assistant import attach_assistant, without_assistant
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.precision.quantize import NumberFormats
from simpletuner.training.adapter_roundtrip import probe_output
from simpletuner.validation.generate import GenerationRequest, generate_images
from tests.assistants import write_assistant
from tests.runs import (
    dataset,
    metrics,
    require_same_bits_after_a_stop,
    train_here,
    write_images,
    write_run,
)
from tests.tiny_z_image import tiny_z_image_folder
from tests.witnesses import patched

ADAPTER = "pytorch_lora_weights.safetensors"
PROMPT = "a red star"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_z_image_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def assistant(model: Path) -> Path:
    return write_assistant(model.parent / "assistant.safetensors", family_of(model), targets=("feed-forward",))


def family_of(model: Path) -> ModelFamily:
    spec = get_spec("z_image")
    return get_family_class(spec)(spec, ModelSource(str(model)), torch.device("cpu"), torch.float32)


def run_folder(folder: Path, model: Path, assistant: Path | str | None, **options: Any) -> Path:
    write_images(folder / "images", 3, seed=1)
    settings: dict[str, Any] = {
        "model_family": "z_image",
        "model_flavour": "turbo",
        "lora_type": "standard",
        "lycoris_config": None,
        "lora_rank": 2,
        "max_train_steps": 4,
        "gradient_checkpointing": True,
        "use_ema": True,
        **({"assistant_lora_strength": 0} if assistant is None else {"assistant_lora_path": str(assistant)}),
    }
    return write_run(folder, model, [dataset("images")], **settings | options)


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in metrics(output, "step_done")]


@pytest.mark.slow
def test_images_and_files_are_of_the_trained_adapter_alone(tmp_path: Path, model: Path, assistant: Path) -> None:
    """The image of the last validation is what the saved file gives on the untouched model, and the file has the
    layers that train and no others."""
    shown = {
        "validation_disable": False,
        "validation_prompt": PROMPT,
        "validation_resolution": "64x64",
        "validation_num_inference_steps": 2,
        "validation_step_interval": 4,
        "validation_seed": 7,
        "disable_benchmark": False,
        "use_ema": False,
    }
    output = train_here(run_folder(tmp_path / "run", model, assistant, **shown))
    saved = load_file(output / ADAPTER)
    assert {key.split(".lora_")[0].rpartition(".attention.")[2] for key in saved} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    for checkpoint in output.glob("checkpoint-*"):
        assert not any("assistant" in key for file in checkpoint.rglob("*.safetensors") for key in load_file(file))
    options = ValidationOptions(
        validation_resolution="64x64", validation_num_inference_steps=2, validation_guidance=0.0
    )
    request = GenerationRequest((PROMPT,), options, seed=7)
    for kind, file in (("base", None), ("live", output / ADAPTER)):
        [path] = generate_images(family_of(model), request, file, tmp_path / f"{kind}.png", say=lambda line: None)
        expected = numpy.asarray(Image.open(path), dtype=int)
        found = [each for each in output.rglob("*.png") if numpy.asarray(Image.open(each)).shape == expected.shape]
        assert min(abs(numpy.asarray(Image.open(each), dtype=int) - expected).max() for each in found) <= 1, kind
    notices = [each["text"] for each in metrics(output, "notice")]
    assert any("assistant LoRA: assistant.safetensors on 12 layers, strength 1" in line for line in notices)


@pytest.mark.slow
def test_a_resume_has_the_same_bits_and_without_it_the_run_differs(
    tmp_path: Path, model: Path, assistant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path) -> Path:
        return run_folder(folder, model, assistant)

    straight, _ = require_same_bits_after_a_stop(write, tmp_path, monkeypatch, step=3)
    without = train_here(run_folder(tmp_path / "without", model, None))
    assert losses(without)[0] != losses(straight)[0]
    assert not torch.equal(*(next(iter(load_file(each / ADAPTER).values())) for each in (straight, without)))


def test_a_resume_with_another_file_is_reported(tmp_path: Path, model: Path, assistant: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(assistant.read_bytes())
    folder = run_folder(tmp_path / "run", model, own, max_train_steps=2, use_ema=False)
    train_here(folder, "--max_train_steps=1")
    write_assistant(own, family_of(model), seed=9, targets=("feed-forward",))
    output = train_here(folder)
    notices = [each["text"] for each in metrics(output, "notice")]
    assert "changed since checkpoint-1: the assistant LoRA is another file" in notices
    assert any(line.startswith(f"{ADAPTER}: read by diffusers and ComfyUI") for line in notices)


def first_loss(folder: Path, model: Path, assistant: Path | None, **options: Any) -> float:
    quick = {"max_train_steps": 1, "use_ema": False}
    return losses(train_here(run_folder(folder, model, assistant, **quick | options)))[0]


@pytest.fixture(scope="module")
def first_losses(tmp_path_factory: pytest.TempPathFactory, model: Path, assistant: Path) -> tuple[float, float]:
    """Without the assistant, and on a model that has it in its weights."""
    folder = tmp_path_factory.mktemp("first")
    merged = shutil.copytree(model, folder / "merged")
    transformer: Any = family_of(model).load_denoiser()
    file = {key.removeprefix("transformer."): tensor for key, tensor in load_file(assistant).items()}
    transformer.load_state_dict(patched(transformer.state_dict(), file))
    transformer.save_pretrained(merged / "transformer")
    return first_loss(folder / "without", model, None), first_loss(folder / "on merged", merged, None)


@pytest.mark.parametrize(
    "options",
    [{"musubi_blocks_to_swap": 1}, {"lora_type": "lycoris", "lycoris_config": "lycoris_config.json"}],
    ids=lambda options: next(iter(options)),
)
def test_the_first_loss_is_that_of_a_model_with_it_in_its_weights(
    tmp_path: Path, model: Path, assistant: Path, first_losses, options: dict[str, Any]
) -> None:
    """Also beside swapped blocks, and under any adapter, none of which changes anything at first."""
    without, merged = first_losses
    assert first_loss(tmp_path / "run", model, assistant, **options) == pytest.approx(merged, rel=1e-5)
    assert abs(merged - without) > 1e-4


@pytest.mark.parametrize(
    ("precision", "dtype"), [("int8-quanto", torch.float32), ("no_change", torch.bfloat16), ("nf4-bnb", torch.bfloat16)]
)
def test_beside_packed_and_16_bit_bases_it_changes_what_it_changes_in_float32(
    model: Path, assistant: Path, precision: str, dtype: torch.dtype
) -> None:
    changes = []
    for base, kind in (("no_change", torch.float32), (precision, dtype)):
        spec = get_spec("z_image")
        family = get_family_class(spec)(spec, ModelSource(str(model)), torch.device("cpu"), kind)
        family.number_formats = NumberFormats(base=base, packs_on_device=False)
        denoiser = family.load_base()
        attach_assistant(denoiser, assistant, 1.0, spec)
        with without_assistant(denoiser):
            off = probe_output(family, denoiser).float()
        changes.append(probe_output(family, denoiser).float() - off)
    expected, found = changes
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_a_file_with_alpha_does_what_the_same_without_it_does(model: Path, assistant: Path, tmp_path: Path) -> None:
    """diffusers' form has the scale in its weights, ComfyUI's has it as alpha."""
    other = write_assistant(
        tmp_path / "alpha.safetensors", family_of(model), targets=("feed-forward",), file_format="comfyui"
    )
    assert any(key.endswith(".alpha") for key in load_file(other))
    outputs = []
    for file in (assistant, other):
        family = family_of(model)
        denoiser = family.load_denoiser()
        attach_assistant(denoiser, file, 1.0, family.spec)
        outputs.append(probe_output(family, denoiser))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
