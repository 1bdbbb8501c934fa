"""The model card: its front matter is valid, its code runs, and user text cannot break it."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from simpletuner.families.registry import get_spec
from simpletuner.hub.job import gallery
from simpletuner.reporting.events import SavedImage


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
