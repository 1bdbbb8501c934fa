"""The commands of DiffSynth-Studio's scripts, on tiny models: train, a checkpoint an epoch, and the public pipelines'
images with the LoRA.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner import cli
from simpletuner.config.loading import LoadedRun, load_run
from simpletuner.families.registry import get_spec
from simpletuner.launch import family_of_run
from simpletuner.validation.generate import apply_adapter_file
from tests.runs import run_cli, write_images
from tests.single_files import original_denoiser, original_vae, write_sd3_file
from tests.tiny_flux import tiny_flux_folder
from tests.tiny_hunyuan_dit import tiny_hunyuan_dit_folder
from tests.tiny_kolors import tiny_kolors_folder
from tests.tiny_sd3 import tiny_sd3_folder

PROMPT = "a cat"
SIDE = 64


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Calls the command line in a folder that holds `data/dog`; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "dog" / "train", "a dog")

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["simpletuner", *words])
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
        return 0

    return call


def write_dataset(folder: Path, caption: str) -> None:
    """Five images and `metadata.csv`, as the scripts' page shows it."""
    write_images(folder, 5, seed=1, side=80)
    for text in folder.glob("*.txt"):
        text.unlink()
    rows = [f"{path.name},{caption}" for path in sorted(folder.glob("*.png"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows, ""]), encoding="utf-8")


def bare(folder: Path) -> Path:
    """The folder without weights: tokenizers and configurations, which the original files lack."""
    weights = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(folder, folder.parent / "bare", ignore=weights)


# As in the scripts' own commands, smaller.
FLAGS = [
    *("--dataset_path", "data/dog", "--output_path", "./models", "--max_epochs", "2", "--steps_per_epoch", "3"),
    *("--height", str(SIDE), "--width", str(SIDE), "--center_crop", "--precision", "32", "--learning_rate", "1e-2"),
    *("--lora_rank", "4", "--lora_alpha", "8", "--use_gradient_checkpointing"),
]
OURS = [
    *("--report_to=none", "--num_processes=1", f"--validation_prompt={PROMPT}"),
    *("--validation_num_inference_steps=2", "--validation_step_interval=0"),
]


def require_epochs_and_sheet() -> LoadedRun:
    """A checkpoint for each epoch, and images without and with the LoRA side by side; returns the run."""
    for step in (3, 6):
        assert (Path("models") / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors").is_file()
    assert not list(Path("models").glob("checkpoint-[1245]"))
    with Image.open("models/before_after.png") as sheet:
        assert sheet.width > 2 * sheet.height / 2
    return load_run([], {"CONFIG_PATH": "models/diffsynth/config.json"}, Path.cwd())


def image_of(pipeline: Any, **options: Any) -> Tensor:
    return pipeline(
        prompt=PROMPT,
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


def trained_image(loaded: LoadedRun) -> tuple[Tensor, Tensor]:
    """Our latents without and with the run's LoRA."""
    family = family_of_run(loaded)
    denoiser = family.load_denoiser()
    before = image_of(family.pipeline(denoiser))
    apply_adapter_file(denoiser, Path("models/pytorch_lora_weights.safetensors"), family.spec)
    return before, image_of(family.pipeline(denoiser))


def require_same_image(loaded: LoadedRun, pipeline: Any, unpack: Callable[[Tensor], Tensor], **options: Any) -> None:
    before, ours = trained_image(loaded)
    assert (ours - before).abs().max() > 1e-3
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights("models", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(unpack(image_of(pipeline, **options)), ours, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_flux_trains_from_its_four_files_and_generates_as_diffusers_does(run: Callable[..., int], tmp_path: Path):
    folder = tiny_flux_folder(tmp_path / "flux")
    save_file(original_vae(folder / "vae", prefix=""), "ae.safetensors")
    save_file(
        original_denoiser(folder / "transformer", get_spec("flux").keys, norm_name="scale"), "flux1-dev.safetensors"
    )
    clip = shutil.copyfile(folder / "text_encoder/model.safetensors", "clip.safetensors")
    words = [
        *("diffsynth", "flux", "--pretrained_text_encoder_path", clip),
        *("--pretrained_text_encoder_2_path", str(folder / "text_encoder_2")),
        *("--pretrained_dit_path", "flux1-dev.safetensors", "--pretrained_vae_path", "ae.safetensors"),
    ]
    assert run(*words, *FLAGS, *OURS, f"--pretrained_model_name_or_path={bare(folder)}") == 0
    loaded = require_epochs_and_sheet()
    tensors = load_file("models/pytorch_lora_weights.safetensors")
    # The joint block: twelve layers and two modulations; the single one: q, k, v, mlp, out, modulation.
    assert len(tensors) == 2 * (12 + 2 + 6)
    pipeline = diffusers.FluxPipeline.from_pretrained(folder)
    family = family_of_run(loaded)
    require_same_image(loaded, pipeline, lambda latents: family.unpack_latents(latents, SIDE, SIDE))


@pytest.mark.slow
def test_sd3_trains_from_one_file_without_t5_and_generates_as_diffusers_does(run: Callable[..., int], tmp_path: Path):
    folder = tiny_sd3_folder(tmp_path / "sd3")
    file = folder / "text_encoder/model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": torch.eye(8)}, file, {"format": "pt"})
    single = write_sd3_file(folder, get_spec("sd3").keys, tmp_path / "sd3_medium_incl_clips.safetensors", with_t5=False)
    words = ["diffsynth", "sd3", "--pretrained_path", str(single)]
    assert run(*words, *FLAGS, *OURS, f"--pretrained_model_name_or_path={bare(folder)}") == 0
    loaded = require_epochs_and_sheet()
    # Two blocks with six layers, and the second attention of the first one.
    assert len(load_file("models/pytorch_lora_weights.safetensors")) == 2 * (2 * 6 + 3)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    require_same_image(loaded, pipeline, lambda latents: latents, max_sequence_length=77)


@pytest.mark.slow
def test_kolors_trains_on_chinese_captions_and_generates_as_diffusers_does(run: Callable[..., int], tmp_path: Path):
    folder = tiny_kolors_folder(tmp_path / "kolors")
    shutil.rmtree("data/dog")
    write_dataset(tmp_path / "data/dog/train", "一只小狗")
    words = [
        *("diffsynth", "kolors", "--pretrained_unet_path", str(folder / "unet/diffusion_pytorch_model.safetensors")),
        *("--pretrained_text_encoder_path", str(folder / "text_encoder")),
        *("--pretrained_fp16_vae_path", str(folder / "vae/diffusion_pytorch_model.safetensors")),
    ]
    assert run(*words, *FLAGS, *OURS) == 0
    loaded = require_epochs_and_sheet()
    assert loaded.config.model.pretrained_model_name_or_path == str(folder)  # the folder around the three
    pipeline = diffusers.KolorsPipeline.from_pretrained(folder)
    require_same_image(loaded, pipeline, lambda latents: latents)


@pytest.mark.slow
def test_hunyuan_dit_trains_from_its_folder_and_generates_as_diffusers_and_peft_do(
    run: Callable[..., int], tmp_path: Path
):
    """diffusers has no loader of LoRA files for this pipeline, so PEFT's own reads the file."""
    folder = tiny_hunyuan_dit_folder(tmp_path / "hunyuan")
    shutil.rmtree("data/dog")
    write_dataset(tmp_path / "data/dog/train", "一只小狗")
    assert run("diffsynth", "hunyuan-dit", "--pretrained_path", str(folder), *FLAGS, *OURS) == 0
    loaded = require_epochs_and_sheet()
    before, ours = trained_image(loaded)
    assert (ours - before).abs().max() > 1e-3
    pipeline = diffusers.HunyuanDiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with safe_open("models/pytorch_lora_weights.safetensors", "pt") as file:
        tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        written = json.loads(file.metadata()["lora_adapter_metadata"])
    names = ("r", "lora_alpha", "target_modules")
    settings = LoraConfig(**{name: written[f"transformer.{name}"] for name in names})
    inject_adapter_in_model(settings, pipeline.transformer)
    assert not set_peft_model_state_dict(pipeline.transformer, tensors).unexpected_keys
    theirs = image_of(pipeline, use_resolution_binning=False, target_size=(SIDE, SIDE))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.ci
def test_two_processes_share_the_batches_of_an_epoch_and_deepspeed_spreads_them(
    run: Callable[..., int], tmp_path: Path
):
    folder = tiny_sd3_folder(tmp_path / "sd3")
    write_sd3_file(folder, get_spec("sd3").keys, tmp_path / "sd3.safetensors")
    words = ["diffsynth", "sd3", "--pretrained_path", "sd3.safetensors", *FLAGS, "--steps_per_epoch", "6"]
    ours = ["--report_to=none", "--num_processes=2", f"--pretrained_model_name_or_path={bare(folder)}"]
    for strategy in ("auto", "deepspeed_stage_2"):
        output = ["--output_path", strategy, "--training_strategy", strategy]
        result = run_cli(tmp_path, *words, *output, *ours)
        assert result.returncode == 0, result.stderr
    [plain, spread] = [
        load_file(Path(each) / "checkpoint-6/pytorch_lora_weights.safetensors")
        for each in ("auto", "deepspeed_stage_2")
    ]
    assert plain.keys() == spread.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(spread[name], tensor, rtol=0, atol=1e-5)
