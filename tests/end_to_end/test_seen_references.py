"""Prompts whose encoders see reference images, through a whole run: what is encoded, when, and for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.commands import cache
from simpletuner.errors import ConfigError
from simpletuner.models.build import build_family
from simpletuner.models.qwen_image_edit.family import QwenImageEdit
from simpletuner.training.prepare import prepare_datasets
from simpletuner.training.prompts import run_prompts
from tests.end_to_end.test_edit_pairs import entries, write_pairs
from tests.runs import load_here, metrics, train_here, write_run
from tests.tiny_qwen_image import tiny_qwen_image_edit_folder, tiny_qwen_image_transformer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen_image_edit_folder(tmp_path_factory.mktemp("edit"))


class Encoded:
    """What the encoders are asked for, and whether the denoiser was there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.after_denoiser = 0
        self.has_denoiser = False
        encode, load = QwenImageEdit.encode_prompts, QwenImageEdit.load_denoiser

        def count(family: Any, prompts: Any, references: Any = None) -> Any:
            rows = references or [()] * len(prompts)
            self.asked += [
                (prompt, tuple(each.content for each in row)) for prompt, row in zip(prompts, rows, strict=True)
            ]
            self.after_denoiser += self.has_denoiser
            return encode(family, prompts, references)

        def note(family: Any) -> Any:
            self.has_denoiser = True
            return load(family)

        monkeypatch.setattr(QwenImageEdit, "encode_prompts", count)
        monkeypatch.setattr(QwenImageEdit, "load_denoiser", note)


def write(folder: Path, model: Path, **options: Any) -> Path:
    """Three pairs that are mirrored too, one held-out pair, captions dropped while references stay."""
    write_pairs(folder, "pairs", 3, seed=1)
    write_pairs(folder, "held-out", 1, seed=2)
    data = [*entries("pairs", random_flip=True), *entries("held-out", dataset_type="eval")]
    settings = {
        "model_family": "qwen_image_edit",
        "caption_dropout_probability": 0.5,
        "max_train_steps": 6,
        "eval_steps_interval": 3,
        "num_eval_images": 1,
        "eval_timesteps": 1,
        "validation_disable": False,
        "validation_prompt": "turn it green",
        "validation_resolution": "32",
        "validation_num_inference_steps": 2,
        "validation_guidance": 3,
        "checkpoint_step_interval": 0,
    }
    return write_run(folder, model, data, **settings | options)


@pytest.mark.slow
def test_every_caption_is_encoded_once_with_its_references_before_the_denoiser_is_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, encoded = write(tmp_path, model), Encoded(monkeypatch)
    output = train_here(folder)
    assert encoded.after_denoiser == 0
    assert len(encoded.asked) == len(set(encoded.asked))
    with_images = [each for each in encoded.asked if each[1]]
    captions = {text for text, _ in with_images}
    assert captions == {
        *(f"picture {number} of set 1" for number in range(3)),
        "picture 0 of set 2",
        " ",
        "turn it green",
    }
    # Both versions of three pairs and one that is held out, each with its caption and with the dropped one; the
    # validation prompt and its negative one; three texts alone, and the negative prompt of the empty image.
    assert len(with_images) == 2 * (2 * 3 + 1) + 2
    assert {text for text, images in encoded.asked if not images} == {" ", "", "a probe of the adapter"}
    assert list((output / "validation_images").glob("*.png"))
    assert len(metrics(output, "eval_done")) == 3

    encoded.asked.clear()
    train_here(folder, "--output_dir=again")
    assert encoded.asked == []
    said: list[str] = []
    cache.stats(load_here(folder), said.append)
    counts = [line for line in said if "in use" in line]
    assert len(counts) == 5
    assert all(line.endswith("unused: 0, still to encode: 0") for line in counts)
    capsys.readouterr()


@pytest.mark.slow
def test_another_reference_asks_for_its_captions_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, encoded = write(tmp_path, model, validation_disable=True), Encoded(monkeypatch)
    cache.build(load_here(folder))
    encoded.asked.clear()
    Image.new("RGB", (32, 32), "purple").save(folder / "pairs-sources/000.png")
    cache.build(load_here(folder))
    assert {text for text, _ in encoded.asked} == {"picture 0 of set 1", " "}
    assert len(encoded.asked) == 4  # mirrored too


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"caption_dropout_probability": 0}, 7),
        ({"reference_dropout_probability": 1}, 7),
        ({"reference_dropout_probability": 0.5}, 14),
    ],
)
def test_a_dropped_caption_is_encoded_with_references_only_where_it_may_keep_them(
    tmp_path: Path, model: Path, options: dict[str, float], count: int
) -> None:
    from simpletuner.reporting.bus import EventBus
    from simpletuner.training.process import Process
    from simpletuner.training.run_history import FolderGuard
    from simpletuner.training.signals import StopRequest

    loaded = load_here(write(tmp_path, model, validation_disable=True, **options))
    family = build_family(loaded.config)
    (tmp_path / "output").mkdir()
    datasets = prepare_datasets(
        loaded, family, Process(guard=FolderGuard(tmp_path / "output"), bus=EventBus(), stop=StopRequest())
    )
    wanted = list(run_prompts(loaded, family, datasets))
    assert len([each for each in wanted if each.images]) == count


@pytest.mark.slow
def test_references_that_are_cut_anew_in_each_round_need_encoders_that_stay(tmp_path: Path, model: Path) -> None:
    folder = write(tmp_path, model, validation_disable=True)
    text = (folder / "multidatabackend.json").read_text()
    crops = '"random_flip": true, "vae_cache_clear_each_epoch": true, "crop": true, "crop_style": "random"'
    (folder / "multidatabackend.json").write_text(text.replace('"random_flip": true', crops))
    with pytest.raises(ConfigError, match="cropped anew in each round"):
        train_here(folder)
    output = train_here(folder, "--text_cache_ondemand=true", "--max_train_steps=2")
    assert len(metrics(output, "step_done")) == 2


@pytest.mark.slow
def test_a_tiny_model_learns_to_copy_what_it_is_shown(tmp_path: Path) -> None:
    """From an answer of zeros on: the eval loss of held-out pairs falls by more than a third."""
    model = tiny_qwen_image_edit_folder(tmp_path / "model")
    transformer = tiny_qwen_image_transformer()
    transformer.proj_out.weight.data.zero_()
    transformer.proj_out.bias.data.zero_()
    transformer.save_pretrained(model / "transformer")
    write_pairs(tmp_path, "pairs", 24, seed=1)
    write_pairs(tmp_path, "held-out", 4, seed=2)
    options = {"model_type": "full", "learning_rate": 1e-2, "max_train_steps": 240, "train_batch_size": 8}
    options |= {"eval_steps_interval": 240, "num_eval_images": 4, "eval_timesteps": 4, "validation_disable": True}
    data = [*entries("pairs"), *entries("held-out", dataset_type="eval")]
    folder = write_run(
        tmp_path,
        model,
        data,
        model_family="qwen_image_edit",
        caption_dropout_probability=0,
        checkpoint_step_interval=0,
        **options,
    )
    first, *_, last = [record["pooled"] for record in metrics(train_here(folder), "eval_done")]
    assert last < 2 / 3 * first
