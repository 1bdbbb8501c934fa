from __future__ import annotations

from types import SimpleNamespace

import pytest

from simpletuner.errors import ConfigError
from simpletuner.validation.prompts import PictureRequest, requests_from_config


def settings(**changes: object) -> SimpleNamespace:
    values = {
        "validation_disable": False,
        "validation_prompt": "a cat",
        "validation_resolution": "64x64",
        "validation_seed": 7,
        "seed": 42,
    }
    return SimpleNamespace(**{**values, **changes})


def test_every_prompt_is_drawn_at_every_size_height_first():
    config = settings(validation_resolution="1024x1024,1280x768")
    requests, notices = requests_from_config(config, {"dog": "a dog"}, 16)
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
    assert len(notices) == 1
    assert "70x100 is drawn at 64x96" in notices[0]


def test_sizes_that_become_equal_are_drawn_once():
    requests, _ = requests_from_config(settings(validation_resolution="64,65"), None, 16)
    assert [(r.height, r.width) for r in requests] == [(64, 64)]


def test_without_a_seed_of_its_own_validation_uses_the_run_s_even_if_one_of_them_is_zero():
    assert requests_from_config(settings(validation_seed=None), None, 16)[0][0].seed == 42
    assert requests_from_config(settings(validation_seed=0), None, 16)[0][0].seed == 0


@pytest.mark.parametrize("config", [settings(validation_prompt=None), settings(validation_disable=True)])
def test_no_prompt_or_disabled_validation_draws_nothing(config: SimpleNamespace):
    assert requests_from_config(config, None, 16) == ([], [])


def test_a_size_beyond_the_family_is_refused_by_key():
    with pytest.raises(ConfigError) as caught:
        requests_from_config(settings(validation_resolution="4096x64"), None, 16, max_size=3072)
    assert caught.value.problems[0].key == "validation_resolution"
    assert "3072" in str(caught.value)


def test_a_shortname_cannot_leave_its_folder():
    assert PictureRequest("../up\\a\nb", "p", 64, 64, 1).file_stem == "..-up-a-b"
    assert PictureRequest("anime_<token>", "p", 64, 64, 1).file_stem == "anime_<token>"
