"""The tiny world must be what the judge, the tokenizer and the example's data take it for."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from tiny_omnigen import render_example_data, shapes  # noqa: E402
from tiny_omnigen.judge import OVERLAP_THRESHOLD, Judge, segment  # noqa: E402
from tiny_omnigen.shapes import Scene, draw  # noqa: E402

DATASETS = REPOSITORY / "simpletuner/examples/omnigen-tiny/datasets"
RED_STAR = Scene("star", "red", "white")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(64, 64)


@pytest.fixture(scope="module")
def tokenizer():
    from tiny_omnigen.tokenizer import build_tokenizer

    return build_tokenizer()


def test_every_caption_parses_back_to_its_scene():
    scenes = list(shapes.balanced_scenes(8 * 8 * 8 * 15, random.Random(0), shapes.SHAPES))
    assert len({scene.caption() for scene in scenes}) == 8 * 8 * 8 * 15
    assert all(shapes.parse_caption(scene.caption()) == scene for scene in scenes)


def test_captions_read_as_english():
    assert Scene("circle", "orange", "white").caption() == "an orange circle on a white background"
    large = Scene("star", "orange", "navy", "large", "at the top")
    assert large.caption() == "a large orange star at the top on a navy background"


def test_a_caption_of_another_world_is_refused():
    with pytest.raises(ValueError, match="not a caption of the tiny world"):
        shapes.parse_caption("a red circle on a red background")


def test_colors_of_the_palette_are_far_apart():
    palette = [*shapes.COLORS.values(), *shapes.BACKGROUNDS.values()]
    distances = [np.linalg.norm(np.subtract(one, other)) for one, other in itertools.combinations(palette, 2)]
    assert min(distances) > 65
    assert not shapes.COLORS.keys() & shapes.BACKGROUNDS.keys()


def test_the_same_seed_draws_the_same_image():
    one, other = (draw(RED_STAR, 64, rng=random.Random(3)).tobytes() for _ in range(2))
    assert one == other
    assert one != draw(RED_STAR, 64, rng=random.Random(4)).tobytes()


@pytest.mark.parametrize("size", shapes.SIZES)
@pytest.mark.parametrize("position", shapes.POSITIONS)
def test_shapes_stay_inside_the_image(size, position):
    for shape in shapes.SHAPES:
        image = np.asarray(draw(Scene(shape, "red", "white", size, position), 64, 96, random.Random(0)))
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == shapes.BACKGROUNDS["white"]).all(), shape


@pytest.mark.slow
def test_real_drawings_are_right(judge):
    rng = random.Random(1)
    scenes = [shapes.sample_scene(rng, shapes.SHAPES) for _ in range(60)]
    verdicts = [judge.judge(draw(scene, 64, rng=rng), scene) for scene in scenes]
    assert [verdict.reason for verdict in verdicts if not verdict.is_right] == []


def test_a_wrong_color_is_wrong(judge):
    verdict = judge.judge(draw(Scene("star", "orange", "white")), RED_STAR)
    assert not verdict.is_right
    assert verdict.reason.startswith("color orange")


def test_a_wrong_background_is_wrong(judge):
    verdict = judge.judge(draw(Scene("star", "red", "lilac")), RED_STAR)
    assert not verdict.is_right
    assert verdict.reason.startswith("background lilac")


@pytest.mark.parametrize("shape", shapes.OLD_SHAPES)
def test_no_old_shape_passes_for_the_new_one(judge, shape):
    for size in shapes.SIZES:
        image = draw(Scene(shape, "red", "white", size))
        assert not judge.judge(image, RED_STAR).is_right
        mask = segment(np.asarray(image, dtype=np.float32))[2]
        assert judge.overlaps(mask)["star"] < OVERLAP_THRESHOLD - 0.1


def test_a_star_blurred_into_a_blob_is_wrong(judge):
    blurred = draw(RED_STAR).filter(ImageFilter.GaussianBlur(6))
    assert not judge.judge(blurred, RED_STAR).is_right


def test_an_empty_image_is_wrong(judge):
    empty = Image.new("RGB", (64, 64), shapes.BACKGROUNDS["white"])
    assert judge.judge(empty, RED_STAR).reason == "nothing generated"


def test_half_a_star_is_wrong(judge):
    image = draw(RED_STAR)
    image.paste(shapes.BACKGROUNDS["white"], (32, 0, 64, 64))
    assert not judge.judge(image, RED_STAR).is_right


def test_a_second_shape_in_the_image_is_wrong(judge):
    image = draw(Scene("star", "red", "white", "small", "on the left"))
    image.paste(draw(Scene("circle", "blue", "white")).crop((32, 0, 64, 64)), (32, 0))
    assert not judge.judge(image, RED_STAR).is_right


def test_the_prompt_of_an_image_is_sixteen_tokens_long(tokenizer):
    from tiny_omnigen.tokenizer import TEMPLATE

    scenes = (Scene("circle", "red", "blue"), Scene("star", "orange", "lilac"))
    assert [len(tokenizer(TEMPLATE.format(prompt=scene.caption())).input_ids) for scene in scenes] == [16, 16]


def test_special_tokens_have_the_ids_that_the_processor_expects(tokenizer):
    names = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|diffusion|>", "<|end|>", "<img>", "</img>", "<cfg>"]
    assert tokenizer.convert_tokens_to_ids(names) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert tokenizer.pad_token_id == 2
    assert tokenizer("<img></img>").input_ids == [7, 8]


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Zebras' café: 12 dodecahedra, over\nthere 🦓"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_example_holds_out_what_it_does_not_train_on():
    concept, held_out = render_example_data.concept_scenes(random.Random(0))
    assert (len(concept), len(held_out)) == (120, 8)
    assert not set(concept) & set(held_out)
    pairs = {(scene.color, scene.background) for scene in concept}
    assert len(pairs) == 32
    assert {color for color, _ in pairs} == set(shapes.COLORS)
    assert {background for _, background in pairs} == set(shapes.BACKGROUNDS)


@pytest.mark.slow
def test_the_committed_images_are_those_that_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["render_example_data.py", "--output", str(tmp_path)])
    render_example_data.main()
    for name in ("concept", "concept-eval", "regularisation"):
        generated = sorted((tmp_path / name).iterdir())
        committed = sorted((DATASETS / name).iterdir())
        assert [path.name for path in generated] == [path.name for path in committed]
        for one, other in zip(generated, committed, strict=True):
            if one.suffix == ".png":
                assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
            else:
                assert one.read_text(encoding="utf-8") == other.read_text(encoding="utf-8")


def test_the_benchmark_asks_only_for_pairs_that_the_training_set_lacks():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from concept_score import choose_scenes, unseen_pairs

    captions = [path.read_text(encoding="utf-8") for path in (DATASETS / "concept").glob("*.txt")]
    seen = {(scene.color, scene.background) for scene in map(shapes.parse_caption, captions)}
    scenes = choose_scenes(("star",), unseen_pairs(DATASETS / "concept"), 64, random.Random(0))
    asked = {(scene.color, scene.background) for scene in scenes}
    assert len(asked) == 32
    assert not asked & seen
    assert len(set(scenes)) == 64


def test_images_are_judged_at_the_size_that_they_have():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from concept_score import judge_all

    scenes = [replace(RED_STAR, size="large"), Scene("circle", "blue", "black", "large")]
    judged = judge_all(lambda prompts, seeds: [draw(shapes.parse_caption(p), 48) for p in prompts], scenes, 0)
    assert [(image.size, verdict.is_right) for image, _, verdict in judged] == [((48, 48), True)] * 2


@pytest.mark.slow
def test_the_score_counts_what_is_drawn(tmp_path):
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from concept_score import score

    def render_circles(prompts, seeds):
        return [draw(replace(shapes.parse_caption(prompt), shape="circle")) for prompt in prompts]

    def render_truth(prompts, seeds):
        pairs = zip(prompts, seeds, strict=True)
        return [draw(shapes.parse_caption(prompt), 64, rng=random.Random(seed)) for prompt, seed in pairs]

    figures = score(render_circles, render_truth, DATASETS / "concept", 0, tmp_path / "sheet.png")
    assert (figures["base_concept"], figures["adapter_concept"], figures["adapter_old"]) == (0, 1, 1)
    assert figures["base_old"] == pytest.approx(1 / 7, abs=0.02)
    assert figures["goal_reached"]
    assert not score(render_truth, render_circles, DATASETS / "concept", 0, tmp_path / "sheet.png")["goal_reached"]


def test_muon_orthogonalizes_its_updates():
    torch = pytest.importorskip("torch")
    from tiny_omnigen.muon import orthogonalize

    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    singular_values = torch.linalg.svdvals(orthogonalize(matrix))
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3
