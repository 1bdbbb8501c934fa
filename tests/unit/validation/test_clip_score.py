"""CLIP scores against transformers' own model, fed by hand: without its processor, which needs torchvision."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from simpletuner.errors import DataError
from simpletuner.validation.clip_score import BATCH_SIZE, DEFAULT_MODEL, ClipScorer
from simpletuner.validation.prompts import GenerationSettings, ImageRequest
from simpletuner.validation.sampling import GeneratedImage
from tests.tiny import tiny_clip_folder

SIDE = 32
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_folder(tmp_path_factory.mktemp("clip"))


def generated(prompt: str, color: tuple[int, int, int], size: tuple[int, int] = (SIDE, SIDE)) -> GeneratedImage:
    image = Image.new("RGB", size, color)
    image.paste((255, 255, 255), (2, 2, 20, 9))
    width, height = size
    return GeneratedImage(ImageRequest("a", prompt, height, width, 1, GenerationSettings(1, 1.0)), image)


def score_by_hand(folder: Path, prompt: str, image: Image.Image) -> float:
    """Byte tokens of the tiny vocabulary, normalized pixels, and the model's own logit."""
    model = CLIPModel.from_pretrained(folder).eval()
    vocabulary = json.loads((folder / "vocab.json").read_text())
    letters = [token for word in prompt.split() for token in [*word[:-1], f"{word[-1]}</w>"]]
    ids = [vocabulary["<|startoftext|>"], *(vocabulary[token] for token in letters), vocabulary["<|endoftext|>"]]
    values = ((np.asarray(image, dtype=float) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), pixel_values=torch.tensor(values, dtype=torch.float32))
        cosine = output.logits_per_image / model.logit_scale.exp()
    return 100 * max(float(cosine), 0.0)


def test_scores_are_those_of_the_model_fed_by_hand(folder: Path) -> None:
    prompts = ["a cat", "dog", "a red box on it"]
    colors = [(200, 30, 30), (20, 90, 160), (0, 0, 0)]
    images = [generated(prompt, color) for prompt, color in zip(prompts, colors, strict=True)]
    expected = [score_by_hand(folder, each.request.prompt, each.image) for each in images]
    assert ClipScorer(str(folder), torch.device("cpu")).score(images) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) == 3
    assert any(score > 0 for score in expected)


def test_a_score_depends_on_image_and_prompt_but_not_on_its_neighbors(folder: Path) -> None:
    scorer = ClipScorer(str(folder), torch.device("cpu"))
    images = [generated("a cat", (200, 30, number)) for number in range(0, 180, 20)]  # more than one batch
    assert len(images) == BATCH_SIZE + 1 == 9
    together = scorer.score(images)
    assert together == pytest.approx([scorer.score([each])[0] for each in images], abs=1e-4)
    assert scorer.score([generated("a cat", (200, 30, 0), (64, 32))]) != together[:1]


def test_a_prompt_that_is_too_long_is_cut(folder: Path) -> None:
    scorer = ClipScorer(str(folder), torch.device("cpu"))
    long, longer = (generated("a " * count + "cat", (200, 30, 30)) for count in (100, 200))
    assert scorer.score([long]) == scorer.score([longer])


def test_autocast_and_gradients_of_a_run_do_not_reach_the_score(folder: Path) -> None:
    scorer = ClipScorer(str(folder), torch.device("cpu"))
    expected = scorer.score([generated("a cat", (200, 30, 30))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scorer.score([generated("a cat", (200, 30, 30))]) == expected


def test_it_works_without_torchvision() -> None:
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("part", ["tokenizer.json", "model.safetensors"])
def test_what_is_missing_is_named(tmp_path: Path, part: str) -> None:
    folder = tiny_clip_folder(tmp_path / "clip")
    for name in (part, "vocab.json", "merges.txt") if part == "tokenizer.json" else (part,):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(DataError) as caught:
        ClipScorer(str(folder), torch.device("cpu")).score([generated("a cat", (1, 2, 3))])
    [problem] = caught.value.problems
    assert problem.key == "pretrained_evaluation_model_name_or_path"
    if part == "tokenizer.json":
        assert problem.fix == "complete the folder with the tokenizer's files"
    else:
        assert problem.fix == 'name another one, or set evaluation_type to "none"'
        assert problem.allowed == "a folder or hub id of a CLIP model with safetensors weights"
        assert problem.message.startswith(f"cannot load the CLIP model {folder}: ")


def test_without_a_name_images_are_scored_by_openai_s_large_model() -> None:
    assert DEFAULT_MODEL == "openai/clip-vit-large-patch14"


def test_a_large_scorer_is_freed_after_its_images_and_a_small_one_stays(folder: Path, monkeypatch) -> None:
    scorer = ClipScorer(str(folder), torch.device("cpu"))
    scorer.score([generated("a cat", (1, 2, 3))])
    model = scorer._model
    assert model is not None
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    size = sum(parameter.nbytes for parameter in model.parameters())
    given: list[torch.device] = []
    monkeypatch.setattr("simpletuner.validation.clip_score.give_back_memory", given.append)
    monkeypatch.setattr("simpletuner.validation.clip_score.num_bytes", lambda model: size)
    monkeypatch.setattr("simpletuner.validation.clip_score.SMALL_BYTES", size)
    scorer.score([generated("a cat", (1, 2, 3))])
    assert scorer._model is model
    monkeypatch.setattr("simpletuner.validation.clip_score.SMALL_BYTES", size - 1)
    scorer.score([generated("a cat", (1, 2, 3))])
    assert scorer._model is None
    assert given == [torch.device("cpu")]


def test_opposite_directions_score_nothing_and_equal_ones_a_hundred(folder: Path) -> None:
    scorer = ClipScorer(str(folder), torch.device("cpu"))
    model = scorer._load()
    ones = torch.ones(2, 16)

    def answer(**given):
        return SimpleNamespace(image_embeds=ones, text_embeds=torch.stack([ones[0], -ones[0]]))

    answer.config = model.config
    scorer._model = answer
    scores = scorer._scores([generated("a", (0, 0, 0)), generated("b", (0, 0, 0))]).tolist()
    assert scores == pytest.approx([100, 0])
