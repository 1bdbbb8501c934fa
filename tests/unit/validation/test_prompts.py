"""Which validation images a configuration asks for: prompts, sizes, seeds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.config.builtin_prompts import BUILTIN_PROMPTS
from simpletuner.config.options import TrainConfig
from simpletuner.config.prompt_library import LibraryPrompt
from simpletuner.errors import ConfigError, DataError
from simpletuner.validation.prompts import (
    GenerationSettings,
    ImageRequest,
    SkippedLayers,
    requests_from_config,
    reseeded,
    rounded_sizes,
)
from simpletuner.validation.references import ReferenceImage
from tests.configs import config_of


def settings(**changes: object) -> TrainConfig:
    values = {
        "validation_disable": False,
        "validation_prompt": "a cat",
        "validation_resolution": "64x64",
        "validation_seed": 7,
        "seed": 42,
        "validation_prompt_library": False,
        "validation_disable_unconditional": True,
        "validation_num_inference_steps": 20,
        "validation_guidance": 2.5,
        "validation_guidance_rescale": 0.0,
        "validation_guidance_real": 1.0,
        "validation_guidance_image": None,
        "validation_guidance_skip_layers": None,
        "validation_negative_prompt": "bad",
        "validation_lycoris_strength": 1.0,
        "num_validation_images": 1,
    }
    return config_of(**{**values, **changes})


def test_every_prompt_is_drawn_at_every_size_height_first():
    config = settings(validation_resolution="1024x1024,1280x768")
    requests, notices = requests_from_config(config, {"dog": LibraryPrompt("a dog")}, 16)
    assert [(r.shortname, r.prompt, r.height, r.width, r.seed) for r in requests] == [
        ("validation", "a cat", 1024, 1024, 7),
        ("validation", "a cat", 768, 1280, 7),
        ("dog", "a dog", 1024, 1024, 7),
        ("dog", "a dog", 768, 1280, 7),
    ]
    assert notices == []


def test_a_number_is_a_square_and_odd_sizes_are_rounded_with_a_notice():
    requests, notices = requests_from_config(settings(validation_resolution="64,70x100"), None, 16)
    assert [(r.height, r.width) for r in requests] == [(64, 64), (96, 64)]
    assert notices == ["70x100 becomes 64x96: this model's sides are multiples of 16"]


def test_sizes_that_become_equal_are_drawn_once():
    requests, _ = requests_from_config(settings(validation_resolution="64,65"), None, 16)
    assert [(r.height, r.width) for r in requests] == [(64, 64)]


def test_without_a_seed_of_its_own_validation_uses_the_run_s_even_if_one_of_them_is_zero():
    assert requests_from_config(settings(validation_seed=None), None, 16)[0][0].seed == 42
    assert requests_from_config(settings(validation_seed=0), None, 16)[0][0].seed == 0


@pytest.mark.parametrize("config", [settings(validation_prompt=None), settings(validation_disable=True)])
def test_no_prompt_or_disabled_validation_draws_nothing(config: TrainConfig):
    assert requests_from_config(config, None, 16) == ([], [])


def test_a_size_beyond_the_family_is_refused_by_key():
    with pytest.raises(ConfigError) as caught:
        requests_from_config(settings(validation_resolution="4096x64"), None, 16, max_size=3072)
    [problem] = caught.value.problems
    assert (problem.key, problem.allowed) == ("validation_resolution", "sides up to 3072 pixels")
    assert problem.message == "4096x64 is larger than this model can generate"
    assert requests_from_config(settings(validation_resolution="3072x64"), None, 16, max_size=3072)[0]


def test_a_shortname_cannot_leave_its_folder():
    settings = GenerationSettings(20, 2.5)
    assert ImageRequest("../up\\a\nb", "p", 64, 64, 1, settings).file_stem == "..-up-a-b"
    assert ImageRequest("anime_<token>", "p", 64, 64, 1, settings).file_stem == "anime_<token>"


def test_what_a_prompt_says_of_itself_comes_before_the_configuration():
    prompt = LibraryPrompt("a dog", "", "32x64,32", 5, 0.0, 0.0, 0, 2, adapter_strength=0.0)
    requests, _ = requests_from_config(settings(), {"dog": prompt}, 16)
    main, *dogs = requests
    assert main.settings == GenerationSettings(20, 2.5, "bad")
    assert main.adapter_strength == 1.0
    assert [(r.height, r.width, r.seed, r.index) for r in dogs] == [
        (64, 32, 0, 0),
        (64, 32, 1, 1),
        (32, 32, 0, 0),
        (32, 32, 1, 1),
    ]
    assert {r.settings for r in dogs} == {GenerationSettings(5, 0.0, "")}
    assert {r.adapter_strength for r in dogs} == {0.0}


def test_every_option_of_guidance_is_one_of_the_pipeline_s_arguments():
    skipped = {"layers": (1, 2), "scale": 1.5, "layers_start": 0.25, "layers_stop": 0.75}
    options = {
        "validation_guidance_rescale": 0.7,
        "validation_guidance_real": 3.0,
        "validation_guidance_image": 1.25,
        **{f"validation_guidance_skip_{name}": value for name, value in skipped.items()},
    }
    [request], _ = requests_from_config(settings(**options), None, 16)
    assert request.settings.arguments() == {
        "negative_prompt": "bad",
        "num_inference_steps": 20,
        "guidance_scale": 2.5,
        "guidance_rescale": 0.7,
        "true_cfg_scale": 3.0,
        "img_guidance_scale": 1.25,
        "skip_guidance_layers": [1, 2],
        "skip_layer_guidance_scale": 1.5,
        "skip_layer_guidance_start": 0.25,
        "skip_layer_guidance_stop": 0.75,
    }
    bare = {"negative_prompt": None, "num_inference_steps": 4, "guidance_scale": 0.0}
    assert GenerationSettings(4, 0.0).arguments() == bare
    assert SkippedLayers((7,)) == SkippedLayers((7,), 2.8, 0.01, 0.2)


def test_prompts_see_the_references_of_the_run_unless_they_name_their_own(tmp_path: Path):
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "own.png")
    run = (ReferenceImage("run.png", "0" * 64, Image.new("RGB", (2, 2))),)
    own = LibraryPrompt("it as a drawing", references=(str(tmp_path / "own.png"),))
    none = LibraryPrompt("from nothing", references=())
    config = settings(validation_disable_unconditional=False)
    requests, _ = requests_from_config(config, {"own": own, "none": none}, 16, references=run)
    names = {r.shortname: [each.name for each in r.references] for r in requests}
    assert names == {"validation": ["run.png"], "own": [str(tmp_path / "own.png")], "none": [], "unconditional": []}
    [seen] = requests[1].references
    assert seen.digest == hashlib.sha256((tmp_path / "own.png").read_bytes()).hexdigest()
    assert seen.image.getpixel((0, 0)) == (9, 8, 7)
    missing = LibraryPrompt("of no image", references=(str(tmp_path / "no.png"),))
    with pytest.raises(DataError) as caught:
        requests_from_config(config, {"lost": missing}, 16)
    [problem] = caught.value.problems
    assert (problem.key, problem.fix) == ("lost.references", "name another image")
    assert problem.message.startswith(f"the image {tmp_path / 'no.png'} cannot be used: ")


def test_several_images_of_a_prompt_have_seeds_that_count_up():
    requests, _ = requests_from_config(settings(num_validation_images=3), None, 16)
    assert [(r.seed, r.index, r.title) for r in requests] == [
        (7, 0, "validation_64x64"),
        (8, 1, "validation_64x64_1"),
        (9, 2, "validation_64x64_2"),
    ]


def test_the_built_in_library_is_drawn_between_the_main_prompt_and_the_users_own_which_win():
    own = {"cat": LibraryPrompt("my cat"), "mine": LibraryPrompt("mine")}
    requests, _ = requests_from_config(settings(validation_prompt_library=True), own, 16)
    prompts = {r.shortname: r.prompt for r in requests}
    assert len(prompts) == 1 + len(BUILTIN_PROMPTS) + 1
    assert next(iter(prompts)) == "validation"
    assert list(prompts)[-1] == "mine"
    assert prompts["cat"] == "my cat"
    assert prompts["hands"] == BUILTIN_PROMPTS["hands"]


def test_the_empty_caption_is_drawn_on_request():
    requests, _ = requests_from_config(settings(validation_disable_unconditional=False), None, 16, empty_prompt="<cfg>")
    assert [(r.shortname, r.prompt) for r in requests] == [("validation", "a cat"), ("unconditional", "<cfg>")]


def test_randomized_seeds_differ_by_step_and_are_the_same_when_a_step_is_repeated():
    requests, _ = requests_from_config(settings(num_validation_images=2), None, 16)
    first, again, later = (reseeded(requests, step) for step in (10, 10, 20))
    assert first == again
    assert len({r.seed for r in [*requests, *first, *later]}) == 6


def test_sides_go_to_the_nearest_multiple_and_to_one_at_least() -> None:
    sizes, notices = rounded_sizes([(76, 71), (80, 64), (3, 16)], 16, None)
    assert sizes == [(80, 64), (16, 16)]
    assert len(notices) == 2
    assert rounded_sizes([(96, 64)], 16, 96)[0] == [(96, 64)]
