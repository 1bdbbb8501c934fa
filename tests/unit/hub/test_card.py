"""The model card: its front matter is valid, its code runs, and user text cannot break it."""

from __future__ import annotations

import ast
import dataclasses
import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from simpletuner.families.registry import get_spec
from simpletuner.hub.card import HYPERPARAMETERS, LICENCES
from simpletuner.hub.job import gallery, make_job
from simpletuner.reporting.events import SavedImage
from tests.configs import config_of


@pytest.fixture
def card(job, image) -> ModelCard:
    shown = [SavedImage(image, "star", 'a "red" star: #1', 8, 8, 1, "live")]
    return ModelCard(job.card("me/stars", 500, 1000, shown, 0.4321))


def test_the_front_matter_is_what_the_hub_reads(card):
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["base_model"] == "Shitao/OmniGen-v1-diffusers"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["library_name"] == "diffusers"
    assert {"lora", "lycoris", "lokr", "not-for-all-audiences"} <= set(data["tags"])
    assert data["widget"] == [{"text": 'a "red" star: #1', "output": {"url": "images/00_star_live.png"}}]
    assert data["instance_prompt"] == "a xyz star"


def test_the_text_reports_of_training_and_data(card):
    assert "after 500 of 1,000 steps" in card.text
    assert "| learning_rate | 0.001 |" in card.text
    assert "| eval loss | 0.4321 |" in card.text
    assert "| stars | 45 | 64x64, 96x64 |" in card.text
    assert "Generates **stars**." in card.text
    assert "<Gallery />" in card.text


@pytest.mark.parametrize("kind", ["lokr", pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_the_code_is_python_that_names_the_files(job, kind):
    form = "diffusers" if kind == "lora" else "lycoris"
    text = dataclasses.replace(job, kind=kind, form=form).card("me/stars", 1, 1, [], None)
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(code)
    assert "'me/stars'" in code
    assert ("create_lycoris_from_weights" in code) == (kind == "lokr")
    assert ("Shitao/OmniGen-v1-diffusers" in code) == (kind != "full")


@pytest.mark.parametrize(
    ("family", "kind", "form", "loader", "readers"),
    [
        ("sdxl", "lora", "kohya", "load_lora_weights('me/stars'", "read by diffusers, ComfyUI, A1111, Forge and"),
        ("sdxl", "dora", "kohya", 'load_lora_weights("exported"', "diffusers drops the trained magnitudes"),
        ("sd3", "lora", "kohya", 'load_lora_weights("exported"', "diffusers changes nothing, without an error"),
        ("omnigen", "dora", "kohya", "load_file('exported/", "read by no other program"),
        ("flux", "lora", "comfyui", 'load_lora_weights("exported"', "read by ComfyUI"),
        ("flux", "dora", "diffusers", "load_lora_weights('me/stars'", "read by diffusers"),
        ("flux", "lora", "lycoris", "create_lycoris_from_weights(1.0", "read by ComfyUI and LyCORIS"),
        ("sdxl", "diag-oft", "lycoris", "create_lycoris_from_weights(1.0", "read by LyCORIS"),
    ],
)
def test_the_code_loads_the_file_by_a_loader_that_reads_its_form(job, family, kind, form, loader, readers):
    spec = get_spec(family)
    held = kind if kind in ("lora", "dora") else "other"
    job = dataclasses.replace(job, spec=spec, kind=kind, form=form, readers=spec.read_by(form, held))
    text = job.card("me/stars", 1, 1, [], None)
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(code)
    assert loader in code
    assert ("--format diffusers" in code) == ("exported" in loader)
    assert readers in text


def test_the_code_draws_as_the_images_of_the_card_were_drawn(job, image):
    options = {**job.options, "validation_num_inference_steps": 28, "validation_guidance": 3.5}
    shown = [SavedImage(image, "star", "a star", 96, 64, 1, "live")]
    text = dataclasses.replace(job, options=options).card("me/stars", 1, 1, shown, None)
    assert "pipeline('a star', height=64, width=96, num_inference_steps=28, guidance_scale=3.5)" in text


def test_a_licence_that_the_hub_does_not_know_is_named(job):
    job = dataclasses.replace(job, licence="SDXL 0.9 Research License")
    data = yaml.safe_load(job.card("a/b", 1, 1, [], None).split("---")[1])
    assert (data["license"], data["license_name"]) == ("other", "sdxl-0.9-research-license")


def test_a_base_that_is_a_folder_is_not_named(job):
    text = dataclasses.replace(job, base_model=None).card("a/b", 1, 1, [], None)
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_a_card_that_is_safe_has_no_warning_tag(job):
    text = dataclasses.replace(job, is_safe=True).card("a/b", 1, 1, [], None)
    assert "not-for-all-audiences" not in text


def test_the_gallery_shows_what_was_trained_and_no_more_than_twelve(image):
    kinds = ["base", "live", "grid", "ema"]
    images = [SavedImage(image, f"{kind}-{number}", "", 8, 8, 1, kind) for number in range(7) for kind in kinds]
    shown = gallery(images)
    assert [each.kind for each in shown] == ["live", "ema"] * 6
    assert shown[0].shortname == "live-0"


def test_a_whole_model_has_a_card_of_its_own(job):
    """A fine-tune and no adapter: other tags, no file to convert; a prompt that is empty still has an image."""
    shown = [SavedImage(job.output_dir / "a.webp", "the cat!", "", 8, 8, 1, "ema")]
    whole = dataclasses.replace(job, kind="full", instance_prompts=("one", "two"), licence="Apache 2.0")
    card = ModelCard(whole.card("me/stars", 3, 4000, shown, None))
    data = card.data.to_dict()
    assert data["tags"] == ["text-to-image", "image-generation", "simpletuner", "not-for-all-audiences"]
    assert data["license"] == "apache-2.0"
    assert "license_name" not in data
    assert data["base_model_relation"] == "finetune"
    assert data["instance_prompt"] == "one"
    assert data["widget"] == [{"text": "-", "output": {"url": "images/00_the_cat__ema.webp"}}]
    assert "A fine-tuned version of [Shitao/OmniGen-v1-diffusers]" in card.text
    assert "after 3 of 4,000 steps" in card.text
    assert "trigger words `one`, `two`." in card.text
    assert "simpletuner export" not in card.text
    assert "eval loss" not in card.text
    assert "pipeline('a photo')" in card.text
    assert ".from_pretrained('me/stars', torch_dtype=torch.bfloat16)" in card.text


def test_an_adapter_of_another_kind_has_its_tags_and_settings_and_its_export_command(job):
    tags = {
        kind: ModelCard(dataclasses.replace(job, kind=kind).card("a/b", 1, 1, [], None)).data.tags[3:-1]
        for kind in ("lora", "dora", "loha")
    }
    plain = ["lora", "template:sd-lora"]
    assert tags == {"lora": plain, "dora": plain, "loha": [*plain, "lycoris", "loha"]}
    options = {name: number for number, name in enumerate(HYPERPARAMETERS)} | {"seed": "", "optimizer": None}
    text = dataclasses.replace(job, options=options, base_model=None).card("a/b", 1, 1, [], None)
    rows = re.findall(r"^\| (\w+) \| (\w+) \|$", text, re.MULTILINE)
    assert dict(rows) == {
        **{"steps": "1", "learning_rate": "0", "lr_scheduler": "1", "lr_warmup_steps": "2", "train_batch_size": "4"},
        **{"gradient_accumulation_steps": "5", "mixed_precision": "6", "base_model_precision": "7"},
        **{"resolution": "8", "resolution_type": "9", "caption_dropout_probability": "10"},
        **{"max_grad_norm": "11", "use_ema": "12"},
    }
    assert "simpletuner export pytorch_lora_weights.safetensors --model PATH\n" in text
    assert "An adapter (lokr) of OmniGen, after" in text


def test_licenses_have_the_names_that_the_hub_knows():
    assert dict(LICENCES) == {
        **{"mit": "mit", "apache 2.0": "apache-2.0", "apache-2.0": "apache-2.0"},
        **{"creativeml open rail++-m": "openrail++", "creativeml open rail-m": "creativeml-openrail-m"},
    }


def test_the_job_of_a_run_is_what_its_configuration_says(tmp_path):
    options = {
        **{"push_to_hub": True, "output_dir": str(tmp_path / "out"), "hub_model_id": "house/x"},
        **{"model_card_private": False, "model_card_safe_for_work": True, "model_card_note": "a note"},
        **{"push_checkpoints_to_hub": False, "push_to_hub_background": False, "lora_type": "lycoris"},
        **{"tracker_run_name": "My run"},
    }
    entries = [
        SimpleNamespace(instance_prompt=["xyz", "abc"]),
        SimpleNamespace(),
        SimpleNamespace(instance_prompt=["xyz"]),
    ]

    def made(lycoris=None, **changed):
        config = config_of(**options | changed)
        run = SimpleNamespace(config=config, datasets=entries, lycoris=lycoris, resolved=lambda: {"seed": 7})
        return make_job(run, get_spec(config.model.model_family))

    first = made({"algo": "loha"})
    facts = {name: value for name, value in vars(first).items() if name != "spec"}
    assert facts == {
        **{"output_dir": tmp_path / "out", "name": "house/x", "is_private": False, "each_checkpoint": False},
        **{"waits": True, "kind": "loha", "base_model": "Shitao/OmniGen-v1-diffusers", "licence": "MIT"},
        **{
            "title": "My run",
            "options": {"seed": 7},
            "form": "lycoris",
            "readers": get_spec("omnigen").read_by("lycoris", "loha"),
        },
        **{"instance_prompts": ("xyz", "abc"), "is_safe": True, "note": "a note"},
    }
    folder = made(pretrained_model_name_or_path="/models/own", tracker_run_name=None, model_type="full")
    assert (folder.base_model, folder.title, folder.kind, folder.readers) == (None, "out", "full", "")
    assert made(pretrained_model_name_or_path="a/b", push_to_hub_background=True).base_model == "a/b"
    assert not made(push_to_hub_background=True).waits
    assert made(push_checkpoints_to_hub=True, model_card_private=True).each_checkpoint
    assert made(model_card_private=True).is_private
    assert made(push_to_hub=False) is None
