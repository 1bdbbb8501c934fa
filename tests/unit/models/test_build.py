"""One place builds a family: options of the model reach it through every command, and an export takes its run's."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from simpletuner.cli.program import app
from simpletuner.commands import cache
from simpletuner.commands.check import check
from simpletuner.commands.plan import plan
from simpletuner.config.loading import LoadedRun
from simpletuner.config.paths import WITHOUT
from simpletuner.errors import ConfigError
from simpletuner.launch import family_of_export, family_of_model
from simpletuner.models import build, lazy_vae
from simpletuner.models.components import ModelSource
from simpletuner.models.devices import adapter_dtype, number_formats, weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.models.lazy_vae import LazyVae
from simpletuner.models.local_check import check_local_model
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.sd3.spec import SD3
from simpletuner.precision.quantize import NumberFormats
from simpletuner.training.planning.memory import decode_bytes
from simpletuner.training.trainer import train
from tests.configs import config_of
from tests.runs import dataset, load_here, write_images, write_run

OPTIONS = {
    "text_encoder_offload": True,
    "vae_enable_slicing": True,
    "vae_enable_tiling": True,
    "base_model_precision": "int8-quanto",
    "quantize_via": "cpu",
    "variant": "fp16",
    "revision": "main",
    "mixed_precision": "bf16",
}


class Reached(Exception):
    """Something is about to be loaded: the family is as the command has built it."""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[ModelFamily]:
    """The families that are built from here on; nothing of them can be loaded."""
    families: list[ModelFamily] = []
    init = ModelFamily.__init__

    def noted(family: ModelFamily, *args: object, **kwargs: object) -> None:
        init(family, *args, **kwargs)
        families.append(family)

    def stop(family: ModelFamily) -> None:
        raise Reached

    monkeypatch.setattr(ModelFamily, "__init__", noted)
    for owner, name in ((ModelFamily, "load_vae"), (OmniGen, "load_denoiser"), (OmniGen, "empty_denoiser")):
        monkeypatch.setattr(owner, name, stop)
    monkeypatch.setattr(build, "use_tf32", lambda is_on: None)  # a switch of the whole process
    return families


def generate(loaded: LoadedRun) -> None:
    arguments = ["generate", "--config", str(loaded.config_file), "--prompt", "a star"]
    raise CliRunner().invoke(app, arguments).exception or AssertionError


COMMANDS: dict[str, Callable[[LoadedRun], object]] = {
    "train": train,
    "generate": generate,
    "plan": lambda loaded: plan(loaded, print, probe=False),
    "check": lambda loaded: check(loaded, print, None, 1),
    "cache build": cache.build,
    "cache prune": cache.used_keys,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_the_model_reach_every_command(
    command: str, tmp_path: Path, omnigen_folder: Path, built: list[ModelFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 2, seed=1)
    vae = shutil.copytree(omnigen_folder / "vae", tmp_path / "other-vae")
    folder = write_run(
        tmp_path, omnigen_folder, [dataset("images")], **OPTIONS, pretrained_vae_model_name_or_path=str(vae)
    )
    with contextlib.suppress(Reached):
        COMMANDS[command](load_here(folder))
    family = built[0]
    assert family.vae_modes == ("slicing", "tiling")
    assert family.number_formats.base == "int8-quanto"
    assert not family.number_formats.packs_on_device
    assert family.number_formats.offloads_encoders
    assert (family.source.vae, family.source.variant, family.source.revision) == (str(vae), "fp16", "main")
    assert family.dtype == torch.bfloat16


@pytest.mark.parametrize("command", ["train", "generate", "cache build", "plan with times"])
def test_what_computes_takes_the_kernels_that_were_chosen(
    command: str, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[bool, bool]] = []

    def note(*_: object) -> None:
        found.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        raise Reached

    for name in ("load_vae", "load_base"):
        monkeypatch.setattr(ModelFamily, name, note)
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 2, seed=1)
    options = {"attention_mechanism": "native-math", "deterministic": True}
    loaded = load_here(write_run(tmp_path, omnigen_folder, [dataset("images")], **options))
    commands = {**COMMANDS, "plan with times": lambda loaded: plan(loaded, print, probe=True)}
    with contextlib.suppress(Reached):
        commands[command](loaded)
    assert found[0] == (True, False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    config = Path(tmp_path, "config.json")
    config.write_text(config.read_text().replace("native-math", "cudnn"))
    with pytest.raises(ConfigError, match=r"(?s)attention_mechanism.*cpu has no such kernel"):
        commands[command](load_here(tmp_path))


def test_an_export_takes_vae_revision_and_variant_from_its_run(
    tmp_path: Path, omnigen_folder: Path, built: list[ModelFamily]
) -> None:
    vae = shutil.copytree(omnigen_folder / "vae", tmp_path / "other-vae")
    config = {"model_family": "omnigen", "revision": "v2", "variant": "fp16"}
    config["pretrained_vae_model_name_or_path"] = str(vae)
    lock = {"config": config, "base": {"model": str(omnigen_folder)}}
    (tmp_path / "run.lock.json").write_text(json.dumps(lock))
    source = family_of_export(tmp_path, None, None).source
    assert (source.model, source.vae, source.revision, source.variant) == (str(omnigen_folder), str(vae), "v2", "fp16")
    moved = shutil.copytree(omnigen_folder, tmp_path / "moved")
    source = family_of_export(tmp_path, str(moved), None).source
    assert (source.model, source.vae, source.revision, source.variant) == (str(moved), str(vae), None, None)


def test_a_model_alone_is_packed_as_asked(omnigen_folder: Path, built: list[ModelFamily]) -> None:
    assert family_of_model(str(omnigen_folder), "omnigen", "int8-quanto").number_formats.base == "int8-quanto"
    assert family_of_model(str(omnigen_folder), "omnigen").number_formats.base == "no_change"
    with pytest.raises(ConfigError, match="no model folder"):
        family_of_model("./nowhere", "omnigen")


FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, BRAIN),  # mixed_precision is bf16, model_type is lora
        ({"mixed_precision": "no"}, FLOAT),
        ({"mixed_precision": "fp16"}, HALF),
        ({"base_model_default_dtype": "fp32"}, FLOAT),
        ({"base_model_default_dtype": "bf16"}, BRAIN),
        ({"model_type": "full", "optimizer": "adamw_bf16"}, BRAIN),
        ({"model_type": "full", "optimizer": "optimi-lion"}, BRAIN),
        ({"model_type": "full", "optimizer": "torch-adamw"}, FLOAT),
        ({"model_type": "lora", "optimizer": "torch-adamw"}, BRAIN),
        ({"model_type": "full", "optimizer": "adamw_bf16", "mixed_precision": "fp16"}, FLOAT),
        ({"model_type": "full", "optimizer": "adamw_bf16", "base_model_default_dtype": "fp32"}, FLOAT),
    ],
)
def test_weights_have_the_dtype_in_which_they_can_train(options: dict[str, str], dtype: torch.dtype) -> None:
    assert weight_dtype(config_of(**options)) == dtype


@pytest.mark.parametrize(
    ("mixed_precision", "optimizer", "dtype"),
    [
        ("bf16", "adamw_bf16", BRAIN),
        ("bf16", "optimi-lion", FLOAT),
        ("no", "adamw_bf16", FLOAT),
        ("fp16", "adamw_bf16", FLOAT),
    ],
)
def test_an_adapter_is_float32_but_for_one_optimizer(mixed_precision: str, optimizer: str, dtype: torch.dtype) -> None:
    assert adapter_dtype(config_of(mixed_precision=mixed_precision, optimizer=optimizer)) == dtype


def test_number_formats_are_those_of_their_options_in_the_order_of_the_encoders() -> None:
    options = {f"text_encoder_{n}_precision": f"int{2 * n}-quanto" for n in (1, 2)}
    options |= {"text_encoder_3_precision": "nf4-bnb", "text_encoder_4_precision": "fp8-quanto"}
    given = {"base_model_precision": "int8-quanto", "quantize_activations": True, "text_encoder_offload": True}
    found = number_formats(config_of(**options, **given))
    encoders = ("int2-quanto", "int4-quanto", "nf4-bnb", "fp8-quanto")
    assert found == NumberFormats("int8-quanto", True, True, encoders, True)
    assert [found.of_encoder(index) for index in range(5)] == [*encoders, "no_change"]
    assert number_formats(config_of()) == NumberFormats("no_change", False, True, ("no_change",) * 4, False)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize_via": "cpu"},
        {"quantize_via": "accelerator", "musubi_blocks_to_swap": 1},
        {"quantize_via": "accelerator", "enable_group_offload": True},
    ],
)
def test_what_waits_in_main_memory_is_packed_there(options: dict[str, Any]) -> None:
    assert not number_formats(config_of(**options)).packs_on_device
    assert number_formats(config_of(quantize_via="accelerator")).packs_on_device


def test_a_small_vae_stays_and_one_of_more_than_256_mib_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[nn.Module] = []

    def load_vae() -> nn.Module:
        loaded.append(nn.Linear(2, 3, dtype=torch.float64))
        return loaded[-1]

    vae = LazyVae(cast(ModelFamily, SimpleNamespace(load_vae=load_vae, device=torch.device("cpu"))))
    vae.keep_if_small()
    assert loaded == []
    assert lazy_vae.SMALL_BYTES == 268_435_456
    assert vae.load() is vae.load() is loaded[0]
    assert lazy_vae.num_bytes(loaded[0]) == 72  # 2 x 3 weights and 3 biases of 8 bytes
    for limit, count in ((72, 1), (71, 2)):
        monkeypatch.setattr(lazy_vae, "SMALL_BYTES", limit)
        vae.keep_if_small()
        vae.load()
        assert len(loaded) == count


def test_a_denoiser_without_values_is_as_the_loaded_one_but_for_them(omnigen_folder: Path) -> None:
    family = family_of_model(str(omnigen_folder), "omnigen")
    empty, loaded = family.empty_denoiser(), family.load_denoiser()
    shapes = [{name: (p.shape, p.dtype) for name, p in module.named_parameters()} for module in (empty, loaded)]
    assert shapes[0] == shapes[1]
    for module, device in ((empty, "meta"), (loaded, "cpu"), (family.empty_vae(), "meta"), (family.load_vae(), "cpu")):
        assert {(p.device.type, p.requires_grad) for p in module.parameters()} == {(device, False)}
        assert not module.training
    assert {p.dtype for p in family.load_vae().parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_plan_counts_a_vae_that_decodes_in_tiles_with_less_memory(omnigen_folder: Path) -> None:
    whole = family_of_model(str(omnigen_folder), "omnigen")
    tiled = family_of_model(str(omnigen_folder), "omnigen", vae_enable_tiling=True)
    assert decode_bytes(tiled, 512, 512) < decode_bytes(whole, 512, 512)


def test_a_family_reads_prompts_and_encodes_images_as_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "pick_device", lambda: torch.device("cpu"))
    prompts = {"clip_skip": 2, "force_zeros_for_empty_prompt": False, "tokenizer_max_length": 152}
    family = build.build_family(config_of(model_family="sdxl", vae_enable_tiling=True, **prompts))
    assert (family.clip_skip, family.force_zeros_for_empty_prompt, family.prompt_length) == (2, False, 152)
    kept = {"prompt_length": 152, "clip_skip": 2, "force_zeros_for_empty_prompt": False}
    assert family.prompt_settings == kept  # what images of the base model are kept by
    assert family.vae_modes == ("tiling",)
    plain = build.build_family(config_of(model_family="sdxl"))
    assert plain.prompt_settings == {}
    assert plain.vae_modes == ()


def test_only_what_a_model_works_without_can_be_left_out() -> None:
    found = {
        name: [each.message for each in check_local_model(ModelSource("me/sd3", encoders={name: WITHOUT}), SD3)]
        for name in ("text_encoder", "text_encoder_3")
    }
    assert found == {"text_encoder": ["nothing works without text_encoder"], "text_encoder_3": []}
