"""DiffSynth-Studio's command lines: what each flag becomes, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, HunyuanDiT2DModel, SD3Transformer2DModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from simpletuner.adapters.targets import lora_layers
from simpletuner.commands.diffsynth.flags import parse, parser_of
from simpletuner.commands.diffsynth.run import Translation, import_run, translate
from simpletuner.commands.diffsynth.scripts import SCRIPTS
from simpletuner.commands.diffsynth.targets import lora_target
from simpletuner.commands.diffsynth.weights import _of_one_path
from simpletuner.config.loading import load_run
from simpletuner.data.buckets import BucketRules, bucket_size
from simpletuner.data.datasets import build_datasets
from simpletuner.errors import ConfigError
from simpletuner.families.registry import family_names, get_spec

ROOT = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with `data/dog` and files of FLUX.1 at the paths that the scripts' page names."""
    monkeypatch.chdir(tmp_path)
    train = tmp_path / "data/dog/train"
    train.mkdir(parents=True)
    Image.new("RGB", (90, 60), "green").save(train / "00.jpg")
    (train / "metadata.csv").write_text("file_name,text\n00.jpg,一只小狗\n", encoding="utf-8")
    for name in ("text_encoder/model", "text_encoder_2/model", "flux1-dev", "ae"):
        file = tmp_path / f"models/FLUX/{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"joint_blocks.0": torch.zeros(1)}, file)
    return tmp_path


FLUX = [
    *("--pretrained_text_encoder_path", "models/FLUX/text_encoder/model.safetensors"),
    *("--pretrained_text_encoder_2_path", "models/FLUX/text_encoder_2"),
    *("--pretrained_dit_path", "models/FLUX/flux1-dev.safetensors"),
    *("--pretrained_vae_path", "models/FLUX/ae.safetensors", "--dataset_path", "data/dog"),
]
SD3 = ["--pretrained_path", "stabilityai/stable-diffusion-3-medium-diffusers", "--dataset_path", "data/dog"]


def translated(name: str, *words: str, processes: int = 1) -> Translation:
    return translate(name, words, Path.cwd(), lambda rest: processes)


def test_the_page_s_command_for_flux_becomes_these_files() -> None:
    found = translated(
        "flux",
        *FLUX,
        *("--output_path", "./models", "--max_epochs", "2", "--steps_per_epoch", "500", "--height", "1024"),
        *("--width", "1024", "--center_crop", "--precision", "bf16", "--learning_rate", "1e-4", "--lora_rank", "4"),
        *("--lora_alpha", "4", "--use_gradient_checkpointing", "--align_to_opensource_format"),
    )
    names = SCRIPTS["flux"].targets
    assert found.config.pop("lora_target") == [
        "single_transformer_blocks.*.proj_out" if name == "proj_out" else name for name in names
    ]
    assert found.config == {
        "model_family": "flux",
        "output_dir": "./models",
        "cache_dir": "./models/cache",
        "text_encoder_paths": ["models/FLUX/text_encoder/model.safetensors", "models/FLUX/text_encoder_2"],
        "pretrained_transformer_model_name_or_path": "models/FLUX/flux1-dev.safetensors",
        "pretrained_vae_model_name_or_path": "models/FLUX/ae.safetensors",
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": 4,
        "lora_alpha": 4.0,
        "lora_dropout": 0.0,
        "lora_init_type": "gaussian",
        "lora_format": "kohya",
        "max_train_steps": 1000,
        "num_train_epochs": 0,
        "checkpoint_step_interval": 500,
        "checkpoints_total_limit": 0,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "optimizer": "torch-adamw",
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "adam_weight_decay": 0.01,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": 0.0,
        "grad_clip_method": "norm",
        "caption_dropout_probability": 0.0,
        "aspect_bucket_alignment": 16,
        "validation_resolution": "1024x1024",
        "validation_step_interval": 500,
        "flow_use_uniform_schedule": True,
        "flow_schedule_shift": 3.0,
        "validation_seed": 0,
        "validation_num_inference_steps": 30,
        "validation_guidance": 3.5,
        "validation_negative_prompt": "",
    }
    assert found.data == [
        {
            "id": "dog",
            "type": "local",
            "instance_data_dir": "data/dog/train",
            "caption_strategy": "csv",
            "crop": True,
            "crop_aspect": "square",
            "resolution": 1024,
            "resolution_type": "pixel",
            "crop_style": "center",
            "minimum_image_size": 0,
            "with_replacement": True,
            "random_flip": False,
        }
    ]
    assert found.notes == ["tokenizers and configurations come from black-forest-labs/FLUX.1-dev"]


@pytest.mark.parametrize(
    ("words", "processes", "expected"),
    [
        (["--steps_per_epoch=10", "--max_epochs=3"], 1, (30, 10)),
        # Four processes take 3 of the 10 batches; two of them are a step, and the last one is a step of one.
        (["--steps_per_epoch=10", "--max_epochs=3", "--accumulate_grad_batches=2"], 4, (6, 2)),
        ([], 1, (500, 500)),
    ],
)
def test_steps_are_shared_by_the_processes_and_each_epoch_ends_with_a_checkpoint(words, processes, expected) -> None:
    config = translated("sd3", *SD3, *words, processes=processes).config
    assert (config["max_train_steps"], config["checkpoint_step_interval"]) == expected


def test_flags_of_the_data_and_of_later_versions() -> None:
    found = translated(
        "flux",
        *FLUX,
        *("--random_flip", "--batch_size", "2", "--dataloader_num_workers", "4", "--init_lora_weights", "kaiming"),
        *("--quantize", "float8_e4m3fn", "--num_timesteps", "1000", "--pretrained_lora_path", "lora.safetensors"),
    )
    assert found.data[0]["random_flip"] is True
    assert found.data[0]["crop_style"] == "random"
    assert found.data[0]["vae_cache_clear_each_epoch"] is True
    assert found.config["output_dir"] == "output/flux"
    assert found.config["mixed_precision"] == "fp16"
    assert (found.config["train_batch_size"], found.config["lora_init_type"]) == (2, "default")
    assert (found.config["base_model_precision"], found.config["init_lora"]) == ("fp8-quanto", "lora.safetensors")
    assert [note.split()[0] for note in found.notes[1:]] == ["--dataloader_num_workers", "--num_timesteps"]


@pytest.mark.parametrize(("width", "height"), [(512, 1024), (1152, 896), (640, 640)])
def test_images_are_cut_to_exactly_the_sides_of_the_flags(width: int, height: int) -> None:
    found = translated("flux", *FLUX, f"--width={width}", f"--height={height}")
    [entry], alignment = found.data, found.config["aspect_bucket_alignment"]
    rules = BucketRules(entry["resolution"], entry["resolution_type"], alignment=alignment)
    assert bucket_size(entry.get("crop_aspect_buckets", [1.0])[0], rules) == (height, width)
    assert found.config["validation_resolution"] == f"{width}x{height}"


def test_the_stage_of_deepspeed_needs_processes_and_no_float16(folder: Path) -> None:
    words = [*SD3, "--training_strategy", "deepspeed_stage_2", "--precision", "16-mixed"]
    alone = translated("sd3", *words)
    assert alone.deepspeed == {}
    assert alone.config["mixed_precision"] == "fp16"
    assert "no other to share with" in alone.notes[-1]
    several = translated("sd3", *words, processes=2)
    assert several.config["mixed_precision"] == "bf16"
    written = import_run(several, folder / "config/sd3", print)
    config = json.loads(written.read_text())
    assert json.loads(Path(config["deepspeed_config"]).read_text()) == {"zero_optimization": {"stage": 2}}


def test_options_of_this_program_are_written_and_secrets_are_not(folder: Path) -> None:
    words = ["--lora_rank=8", "--max_train_steps=7", "--validation_prompt", "a dog", "--checkpointing_steps=5"]
    secret = '--webhook_config={"webhook_type": "raw", "callback_url": "https://example.org/secret"}'
    found = translated("sd3", *SD3, *words, secret)
    assert (found.rest, "secret" in str(found.config)) == ([secret], False)  # for the run, and for no file
    assert (found.config["max_train_steps"], found.config["validation_prompt"]) == (7, "a dog")
    assert found.config["checkpoint_step_interval"] == 5
    run = load_run([], {"CONFIG_PATH": str(import_run(found, folder / "config/dog", print))}, folder)
    assert (
        run.config.adapter.lora_rank,
        run.config.training.max_train_steps,
        run.config.model.tokenizer_max_length,
    ) == (8, 7, 77)
    with pytest.raises(ConfigError, match="already"):
        import_run(found, folder / "config/dog", print)


@pytest.mark.parametrize(("side", "size"), [((64, 64), (64, 64)), ((96, 48), (96, 48)), ((48, 80), (48, 80))])
def test_images_are_cut_to_width_and_height(folder: Path, side: tuple[int, int], size: tuple[int, int]) -> None:
    words = [*SD3, f"--width={side[0]}", f"--height={side[1]}", "--center_crop"]
    run = load_run(
        [], {"CONFIG_PATH": str(import_run(translated("sd3", *words), folder / "config/dog", print))}, folder
    )
    [dataset] = build_datasets(run.datasets, run.config, get_spec("sd3"), folder / "work")
    [sample] = dataset.samples
    assert (sample.crop.width, sample.crop.height) == size
    assert sample.captions == ("一只小狗",)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("sd3", [*SD3, "--modelscope_model_id", "me/dog"], "hub_model_id"),
        ("sd3", [*SD3, "--modelscope_access_token", "x"], "Hugging Face hub only"),
        ("sd3", [*SD3, "--use_swanlab"], "report_to"),
        ("sd3", [*SD3, "--height", "1000"], "1000 is not a multiple of 16"),
        ("sd3", [*SD3, "--lora_target_modules", "to_q"], "ends no path of a layer"),
        ("sd3", [*SD3, "--precision", "8"], "invalid choice"),
        ("sd3", [*SD3, "--max_epochs", "0"], "--max_epochs"),
        ("sd3", ["--pretrained_path", "owner/name"], "--dataset_path"),
        ("sd3", [*SD3[:2], "--dataset_path", "data/cat"], "metadata.csv"),
        ("sd3", ["--pretrained_path", "./nowhere", *SD3[2:]], "is not there"),
        ("flux", [*FLUX, "--preset_lora_path", "lora.safetensors"], "export --merge"),
        ("flux", [*FLUX, "--pretrained_dit_path", "models/FLUX/text_encoder_2"], "is a folder"),
        ("flux", [*FLUX, "--pretrained_vae_path", "ae.ckpt"], "black-forest-labs/FLUX.1-dev"),
        ("sdxl", [*SD3], "flux, kolors, sd3, hunyuan-dit"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(name: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translated(name, *words)
    assert message in caught.value.render()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", [each for each in SCRIPTS if SCRIPTS[each].family in family_names()])
def test_pickled_weights_are_refused_with_the_repository_that_has_safetensors(folder: Path, name: str) -> None:
    """Kolors' text encoder and all of Hunyuan-DiT are pickles in the original repositories."""
    parts = folder / "t2i/mt5"
    parts.mkdir(parents=True)
    (parts / "pytorch_model.bin").touch()
    script = SCRIPTS[name]
    words = [f"--{flag}={'t2i' if flag == 'pretrained_path' else 't2i/mt5'}" for flag in script.paths]
    with pytest.raises(ConfigError) as caught:
        translated(name, *words, "--dataset_path", "data/dog")
    assert caught.value.render().count(script.safetensors) == len(script.paths)


def test_several_files_of_sd3_are_told_apart_by_what_they_hold(folder: Path) -> None:
    def write(name: str, *keys: str) -> str:
        save_file({key: torch.zeros(1) for key in keys}, folder / name)
        return name

    clip = [f"text_model.encoder.layers.{number}.mlp.fc1.weight" for number in range(3)]
    main = write("sd3.safetensors", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight")
    files = [
        main,
        write("t5.safetensors", "encoder.block.0.x"),
        write("g.safetensors", *clip),
        write("l.safetensors", clip[0]),
    ]
    config = translated("sd3", "--pretrained_path", ",".join(files), *SD3[2:]).config
    assert config["pretrained_transformer_model_name_or_path"] == main
    assert config["text_encoder_paths"] == ["l.safetensors", "g.safetensors", "t5.safetensors"]
    assert config["model_flavour"] == "3-medium"
    alone = translated("sd3", "--pretrained_path", main, *SD3[2:])
    assert alone.config["text_encoder_paths"] == ["", "", "none"]
    assert any("no T5" in note for note in alone.notes)
    with pytest.raises(ConfigError, match="no transformer"):
        translated("sd3", "--pretrained_path", "l.safetensors", *SD3[2:])


# Sizes of the published models, and how many layers DiffSynth's default names stand for, counted in its files.
FULL_SIZE: dict[str, tuple[Any, dict[str, Any], int]] = {
    "flux": (FluxTransformer2DModel, {}, 494),
    "sd3": (SD3Transformer2DModel, {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}, 144),
    "kolors": (
        UNet2DConditionModel,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
        },
        560,
    ),
    "hunyuan-dit": (
        HunyuanDiT2DModel,
        {
            "num_attention_heads": 16,
            "attention_head_dim": 88,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "cross_attention_dim": 1024,
            "cross_attention_dim_t5": 2048,
            "pooled_projection_dim": 1024,
        },
        320,
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_default_targets_are_the_layers_of_the_published_models(name: str) -> None:
    cls, options, count = FULL_SIZE[name]
    with torch.device("meta"):
        denoiser = cls(**options)
    spec = get_spec(SCRIPTS[name].family)
    paths, _ = lora_layers(denoiser, lora_target(",".join(SCRIPTS[name].targets), spec), spec)
    assert len(paths) == count


def test_a_name_is_the_end_of_a_path() -> None:
    assert lora_target("proj_out", get_spec("flux")) == ["single_transformer_blocks.*.proj_out"]
    assert lora_target("attn1.to_out, mlp.2", get_spec("hunyuan_dit")) == ["attn1.to_out", "mlp.2"]


@pytest.mark.parametrize("page", ["DIFFSYNTH.md", "DIFFSYNTH.zh.md"])
def test_the_page_s_commands_and_flags_are_those_of_the_scripts(page: str) -> None:
    text = (ROOT / "documentation/quickstart" / page).read_text(encoding="utf-8")
    commands = re.findall(r"simpletuner diffsynth (\S+) \\\n((?:  .*\n)+)", text)
    assert [name for name, _ in commands] == list(SCRIPTS)
    for name, words in commands:
        flags, rest = parse(name, shlex.split(words.replace("\\\n", " ")))
        assert rest == []
        assert (flags.steps_per_epoch, flags.lora_rank, flags.center_crop) == (500, 4, True)
    flags_of_all = {
        word for name in SCRIPTS for word in parser_of(name)._option_string_actions if word.startswith("--")
    }
    unnamed = [
        word
        for word in flags_of_all - {"--help"}
        if word not in text and not word.startswith(("--modelscope", "--swanlab"))
    ]
    assert unnamed == []


@pytest.mark.parametrize("place", ["some-one/a-model", "models/a folder"])
def test_what_is_no_single_file_names_the_model_itself(tmp_path: Path, place: str) -> None:
    script = next(iter(SCRIPTS.values()))
    assert _of_one_path(script, place, tmp_path, print) == {"pretrained_model_name_or_path": place}
