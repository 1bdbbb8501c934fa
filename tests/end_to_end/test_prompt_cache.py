"""Captions are encoded before the denoiser is there, once, and never met stale: with AuraFlow's encoder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.batch import PromptRequest
from simpletuner.commands import cache
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.models.auraflow.family import AuraFlow
from simpletuner.models.build import build_family
from simpletuner.reporting.bus import EventBus
from simpletuner.training.prepare import prepare_data
from simpletuner.training.process import Process
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from tests.runs import dataset, load_here, metrics, slow_but, train_here, write_images, write_run
from tests.tiny_auraflow import tiny_auraflow_folder

COUNT = 3
# The dropped caption (here the empty one) and what the proof of an adapter asks.
ALWAYS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_auraflow_folder(tmp_path_factory.mktemp("auraflow"))


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_images(tmp_path / "run/images", COUNT, seed=1)
    copy = shutil.copytree(model, tmp_path / "model")
    return write_run(tmp_path / "run", copy, [dataset("images", repeats=3)], model_family="auraflow", max_train_steps=3)


class Encoded:
    """The prompts that the encoders see, without what fills batches up, and whether the denoiser was there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.prompts: list[str] = []
        self.after_denoiser: list[str] = []
        self.has_denoiser = False
        encode, load = AuraFlow.encode_prompts, AuraFlow.load_denoiser

        def count(family, prompts, references=None):
            new = [prompt for index, prompt in enumerate(prompts) if prompt or index == 0]
            self.prompts += new
            self.after_denoiser += new if self.has_denoiser else []
            return encode(family, prompts, references)

        def note(family):
            self.has_denoiser = True
            return load(family)

        monkeypatch.setattr(AuraFlow, "encode_prompts", count)
        monkeypatch.setattr(AuraFlow, "load_denoiser", note)


def embeds(folder: Path, *arguments: str) -> dict[str, torch.Tensor]:
    """Caption -> embedding, as a training run gets them."""
    loaded = load_here(folder, *arguments)
    family = build_family(loaded.config)
    (folder / "output").mkdir(exist_ok=True)
    process = Process(guard=FolderGuard(folder / "output"), bus=EventBus(), stop=StopRequest())
    [each], _ = prepare_data(loaded, family, process)
    captions = [caption for sample in each.samples for caption in sample.captions]
    rows = family.prompts.embeds(captions)
    family.prompts.close()
    return {caption: row.tensors["prompt_embeds"] for caption, row in zip(captions, rows, strict=True)}


def change_weights(folder: Path) -> None:
    [path] = (folder.parent / "model/text_encoder").glob("*.safetensors")
    tensors = load_file(path)
    tensors["shared.weight"] = tensors["shared.weight"] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(folder: Path, name: str, **keys: object) -> None:
    path = folder.parent / "model" / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")


def change_tokenizer(folder: Path) -> None:
    path = folder.parent / "model/tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [*tokenizer["added_tokens"][:-1]]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def flip_a_byte(folder: Path) -> None:
    [shard] = (folder / "cache/text/auraflow").glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


# What is changed, and how many prompts must be encoded again.
MATRIX: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda f: None, 0),
    "a caption": (lambda f: (f / "images/001.txt").write_text("other words"), 1),
    "two captions swapped": (
        lambda f: [(f / f"images/{a}.txt").write_text(f"picture {b} of set 1\n") for a, b in (("000", 1), ("001", 0))],
        0,
    ),
    "a variant more": (lambda f: (f / "images/001.txt").write_text("picture 1 of set 1\nanother line"), 1),
    "the bytes of an image": (lambda f: shutil.copy(f / "images/000.png", f / "images/001.png"), 0),
    "the resolution": (lambda f: None, 0),
    "the weights of the encoder": (change_weights, COUNT + ALWAYS),
    "the configuration of the encoder": (
        lambda f: change_json(f, "text_encoder/config.json", layer_norm_epsilon=0.1),
        5,
    ),
    "the tokenizer": (change_tokenizer, COUNT + ALWAYS),
    "a damaged entry": (flip_a_byte, 1),
}


# Of the rest each costs more than a second, and says little that these do not.
QUICK = ("a caption", "the weights of the encoder", "the tokenizer", "a damaged entry")


@pytest.mark.parametrize("what", slow_but(MATRIX, QUICK))
def test_after_a_change_nothing_stale_is_used_and_nothing_is_made_twice(folder, monkeypatch, what):
    change, num_encoded = MATRIX[what]
    embeds(folder)
    change(folder)
    encoded = Encoded(monkeypatch)
    again = embeds(folder, "--resolution=48") if what == "the resolution" else embeds(folder)
    assert len(encoded.prompts) == num_encoded
    fresh = embeds(folder, "--cache_dir=fresh")
    assert again.keys() == fresh.keys()
    assert all(torch.equal(again[caption], fresh[caption]) for caption in fresh)


def test_the_number_format_of_the_encoders_is_part_of_every_key(folder, monkeypatch):
    before = embeds(folder)
    encoded = Encoded(monkeypatch)
    after = embeds(folder, "--mixed_precision=bf16")
    assert len(encoded.prompts) == COUNT + ALWAYS
    assert all(after[caption].dtype != before[caption].dtype for caption in before)


def test_the_limit_of_a_family_is_part_of_every_key(folder, monkeypatch):
    embeds(folder)
    monkeypatch.setattr(AuraFlow, "prompt_facts", lambda family: {"max_prompt_tokens": 77})
    encoded = Encoded(monkeypatch)
    embeds(folder)
    assert len(encoded.prompts) == COUNT + ALWAYS


def test_the_key_of_a_prompt_does_not_depend_on_its_data_set_or_the_rest(folder, monkeypatch):
    embeds(folder)
    (folder / "images/000.png").unlink()
    (folder / "images").rename(folder / "others")
    (folder / "multidatabackend.json").write_text(json.dumps([dataset("others")]))
    encoded = Encoded(monkeypatch)
    embeds(folder)
    assert encoded.prompts == []


@pytest.mark.slow
def test_every_text_of_a_run_is_encoded_before_the_denoiser_and_only_once(folder, monkeypatch):
    encoded = Encoded(monkeypatch)
    images = {"validation_disable": "false", "validation_prompt": "a box", "validation_resolution": "64"}
    options = [f"--{key}={value}" for key, value in images.items()]
    options += ["--validation_num_inference_steps=2", "--validation_negative_prompt=blurred"]
    output = train_here(folder, *options)
    assert (output / "before_after.png").is_file()
    assert encoded.after_denoiser == []
    assert len(encoded.prompts) == len(set(encoded.prompts)) == COUNT + ALWAYS + 2
    encoded.prompts.clear()
    train_here(folder, *options, "--output_dir=second")
    assert encoded.prompts == []


@pytest.mark.slow
def test_encoders_that_stay_give_the_same_losses_bit_for_bit(folder):
    def losses(name: str, *arguments: str) -> list[float]:
        output = train_here(folder, f"--output_dir={name}", f"--cache_dir={name}/cache", *arguments)
        return [record["loss"] for record in metrics(output, "step_done")]

    cached = losses("cached")
    assert losses("on_demand", "--text_cache_ondemand=true") == cached
    assert losses("disabled", "--text_cache_disable=true") == cached
    assert list((folder / "on_demand/cache/text/auraflow").glob("shard-*"))
    assert not list((folder / "disabled/cache").glob("text/auraflow/shard-*"))


def _untimed(capsys: pytest.CaptureFixture[str]) -> str:
    return re.sub(r"in [\d.]+ s", "in 0.0 s", capsys.readouterr().out)


def test_the_verbs_of_the_cache_know_captions(folder, capsys):
    cache.build(load_here(folder, "--text_cache_ondemand=true"))
    assert f"caching captions done in 0.0 s: {COUNT + ALWAYS} encoded, 0 cached before" in _untimed(capsys)
    flip_a_byte(folder)
    assert cache.verify(load_here(folder), print) == 1
    said: list[str] = []
    cache.stats(load_here(folder), said.append)
    [place] = [index for index, line in enumerate(said) if line.endswith("text/auraflow (captions)")]
    assert said[place + 2] == f"  in use: {COUNT + ALWAYS - 1}, unused: 0, still to encode: 1"
    (folder / "images/001.txt").write_text("other words")
    cache.build(load_here(folder))
    # Of the two that the first build and the changed caption left, the damaged one is gone already or goes now.
    cache.prune(load_here(folder), said.append)
    said.clear()
    cache.stats(load_here(folder), said.append)
    assert f"  in use: {COUNT + ALWAYS}, unused: 0, still to encode: 0" in said
    assert cache.verify(load_here(folder), print) == 0


def test_the_entry_of_the_data_file_says_where_captions_are_kept_and_how_many_are_written_at_once(folder):
    entry = {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "kept", "write_batch_size": 2}
    (folder / "multidatabackend.json").write_text(json.dumps([dataset("images"), entry]))
    embeds(folder)
    assert len(list((folder / "kept").glob("shard-*.safetensors"))) == 3  # 5 entries, 2 at once
    assert not (folder / "cache/text").exists()


class Recorder:
    """A sink that keeps what it is reported."""

    name = "recorder"
    failures = ()

    def __init__(self) -> None:
        self.events: list[object] = []

    def handle(self, event: object) -> None:
        self.events.append(event)

    def close(self) -> None: ...


def test_a_prompt_that_nobody_foresaw_is_encoded_reported_and_kept(folder):
    loaded = load_here(folder)
    family = build_family(loaded.config)
    (folder / "output").mkdir()
    recorder = Recorder()
    with EventBus([recorder]) as bus:
        prepare_data(loaded, family, Process(guard=FolderGuard(folder / "output"), bus=bus, stop=StopRequest()))
        [first] = family.prompts.embeds(["nobody wrote this"])
        [again] = family.prompts.embeds(["nobody wrote this"])
    family.prompts.close()
    assert sum("nobody wrote this" in str(event) for event in recorder.events) == 1
    assert torch.equal(first.tensors["prompt_embeds"], again.tensors["prompt_embeds"])
    assert family.prompts.cache.find(PromptRequest("nobody wrote this")) is not None


def test_generation_encodes_its_prompts_before_the_denoiser_is_there(model, tmp_path, monkeypatch):
    from simpletuner.models.auraflow.spec import AURAFLOW
    from simpletuner.models.components import ModelSource
    from simpletuner.validation.generate import GenerationRequest, generate_images

    family = AuraFlow(AURAFLOW, ModelSource(str(model)), torch.device("cpu"), torch.float32)
    encoded = Encoded(monkeypatch)
    options = ValidationOptions(validation_resolution="32", validation_num_inference_steps=1, validation_guidance=2.0)
    generation = GenerationRequest(("a cat", "a dog", "a cat"), options)
    generate_images(family, generation, None, tmp_path, lambda line: None)
    assert encoded.prompts == ["a cat", "a dog"]  # and the empty one, which this counter leaves out
    assert encoded.after_denoiser == []
    assert family.encoders._encoders == {}
