from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from simpletuner.validation.files import PictureFiles, spread
from simpletuner.validation.prompts import DrawSettings, PictureRequest, SkippedLayers
from simpletuner.validation.sampling import Picture


def test_a_long_run_is_shown_by_evenly_spread_steps_and_its_last():
    assert spread(list(range(100, 1100, 100)), 4) == [100, 400, 700, 1000]
    assert spread([100, 200], 4) == [100, 200]
    assert spread([100, 200, 300], 1) == [300]


def test_pictures_of_the_base_are_known_again_until_their_settings_change(tmp_path: Path):
    request = PictureRequest("a", "a cat", 8, 8, 1, DrawSettings(4, 2.0, skipped=SkippedLayers((7, 8))))
    PictureFiles(tmp_path, [request], {"model": "m"}).save_benchmark([Picture(request, Image.new("RGB", (8, 8)))])
    assert PictureFiles(tmp_path, [request], {"model": "m"}).has_benchmark()
    other = replace(request, settings=replace(request.settings, skipped=SkippedLayers((7, 9))))
    assert not PictureFiles(tmp_path, [other], {"model": "m"}).has_benchmark()
