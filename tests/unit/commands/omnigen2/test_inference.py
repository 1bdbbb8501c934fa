"""The flags of OmniGen2's `inference.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from simpletuner.commands.omnigen2.inference import collage, generated_size, input_files, is_asked, parse
from simpletuner.errors import ConfigError


def test_the_documented_command_is_understood() -> None:
    """As OmniGen2's document has it, but for the program's name."""
    flags = parse(
        [
            *("--model_path", "OmniGen2/OmniGen2", "--num_inference_step", "50", "--height", "1024", "--width", "1024"),
            *("--text_guidance_scale", "4.0", "--instruction", "A crystal ladybug", "--num_images_per_prompt", "1"),
            *("--output_image_path", "outputs/output_t2i_lora.png"),
            *("--transformer_lora_path", "experiments/ft_lora/checkpoint-10/transformer_lora"),
        ]
    )
    assert flags["text_guidance_scale"] == 4.0
    assert flags["instruction"] == "A crystal ladybug"
    assert flags["transformer_lora_path"] == "experiments/ft_lora/checkpoint-10/transformer_lora"
    assert (flags["image_guidance_scale"], flags["scheduler"], flags["seed"]) == (2.0, "euler", 0)
    assert flags["negative_prompt"].startswith("(((deformed)))")
    assert flags["input_image_path"] == []


def test_several_input_images_stand_behind_one_flag() -> None:
    flags = parse(["--input_image_path", "a.png", "b.png", "--instruction=x", "--enable_model_cpu_offload"])
    assert flags["input_image_path"] == ["a.png", "b.png"]
    assert flags["enable_model_cpu_offload"]
    assert not flags["enable_group_offload"]


def test_only_an_instruction_makes_them_these_flags() -> None:
    assert is_asked(["--instruction", "x"])
    assert is_asked(["--instruction=x"])
    assert not is_asked(["--prompt", "instruction"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--enable_teacache"], "it is not built: steps are not skipped"),
        (["--enable_taylorseer"], "it is not built: steps are not extrapolated"),
        (["--max_input_image_pixels", "3"], "it is not built"),
        (["--hight", "3"], '"--hight" is not a flag'),
        (["--height", "tall"], '"tall" is not a number'),
        (["--scheduler", "ddim"], "euler, dpmsolver"),
        (["--height"], "it needs a value"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(words)


@pytest.mark.parametrize(
    ("asked", "generated"), [((1024, 1024), (1024, 1024)), ((500, 300), (496, 288)), ((2048, 1024), (1440, 720))]
)
def test_a_size_is_reduced_to_a_megapixel_of_whole_tokens(asked: tuple[int, int], generated: tuple[int, int]) -> None:
    assert generated_size(*asked) == generated


def test_a_folder_stands_for_the_images_in_it(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "note.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in input_files([str(tmp_path)])] == ["a.JPG", "b.png"]
    with pytest.raises(ConfigError, match="there is no image"):
        input_files([str(tmp_path / "c.png")])


def test_a_collage_has_the_images_side_by_side_on_gray() -> None:
    whole = collage([Image.new("RGB", (2, 3), "red"), Image.new("RGB", (4, 1), "blue")])
    assert whole.size == (6, 3)
    assert [whole.getpixel(place) for place in ((0, 2), (2, 0), (5, 2))] == [(255, 0, 0), (0, 0, 255), (127, 127, 127)]
