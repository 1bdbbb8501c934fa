"""Ready latents of a dataset: how they are drawn, which of them are remembered, and what is encoded meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner.batch import Crop, Sample
from simpletuner.cache.store import DamagedEntry
from simpletuner.families.spec import FamilySpec
from simpletuner.randomness import keyed_seed
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training import latents, prompts
from simpletuner.training.latents import DatasetLatents
from simpletuner.training.process import Process
from simpletuner.training.prompts import has_all_embeddings, keeps_references_of_dropped
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from tests.configs import config_of
from tests.toy import Recorder


def sample(name: str, is_flipped: bool = False) -> Sample:
    return Sample("toys", name, name, 8, 8, (), Crop(8, 8, 0, 0, 8, 8), is_flipped=is_flipped)


class Cache:
    """Gives the number of a sample's name as its mean; the deviation is 1."""

    def __init__(self, damaged: str = "") -> None:
        self.damaged, self.read = damaged, []
        self.family = SimpleNamespace(
            vae_config={"scaling_factor": 10.0},
            latents_from_moments=lambda mean, generator, config: (
                config["scaling_factor"] * (mean + torch.randn(4, generator=generator))
            ),
        )

    def get(self, sample: Sample) -> float:
        if sample.path == self.damaged:
            raise DamagedEntry(self.damaged, Path("folder"), "cut")
        self.read.append(sample.path)
        return float(sample.path)


def source_of(cache: Cache, **options: Any) -> DatasetLatents:
    return DatasetLatents(cache, lambda sample: None, lambda: "the vae", 1, seed=7, **options)  # type: ignore[arg-type]


def drawn(name: str, content: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(keyed_seed(7, "posterior", content))
    return 10 * (float(name) + torch.randn(4, generator=generator))


def test_latents_are_drawn_by_seed_and_content_and_once() -> None:
    cache = Cache()
    source = source_of(cache)
    crop = str(Crop(8, 8, 0, 0, 8, 8))
    first = source.latents([sample("2"), sample("3"), sample("2", is_flipped=True)])
    assert torch.equal(first[0], drawn("2", f"2/{crop}"))
    assert torch.equal(first[1], drawn("3", f"3/{crop}"))
    assert torch.equal(first[2], drawn("2", f"2/{crop}/flipped"))
    again = source.latents([sample("3"), sample("5"), sample("2")])
    assert torch.equal(again[0], first[1])
    assert torch.equal(again[2], first[0])
    assert cache.read == ["2", "3", "2", "5"]


@pytest.mark.parametrize(("resamples", "kept"), [(False, ["1", "2"]), (True, ["2", "3"])])
def test_of_a_full_memory_the_first_stay_or_the_last_where_crops_change(
    monkeypatch: pytest.MonkeyPatch, resamples: bool, kept: list[str]
) -> None:
    """There is room for two of 16 bytes each."""
    monkeypatch.setattr(latents, "MEMO_BYTES", 32)
    cache = Cache()
    source = source_of(cache, resamples=resamples)
    for name in "123":
        source.latents([sample(name)])
    source.latents([sample(name) for name in kept])
    assert cache.read == ["1", "2", "3"]
    [gone] = {"1", "2", "3"} - set(kept)
    source.latents([sample(gone)])
    assert cache.read == ["1", "2", "3", gone]


def test_a_batch_of_old_and_new_images_is_served_where_the_new_push_out_the_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Crops change, but not of every image: one that has its shape already is cut the same in each round."""
    monkeypatch.setattr(latents, "MEMO_BYTES", 32)
    source = source_of(Cache(), resamples=True)
    first, _ = source.latents([sample("1"), sample("2")])
    new, again, twice = source.latents([sample("3"), sample("1"), sample("3")])
    assert torch.equal(again, first)
    assert torch.equal(new, twice)


def test_a_damaged_entry_is_encoded_anew_and_so_is_all_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    class OnDemand:
        def __init__(self, *given: Any) -> None:
            made.append(given)
            self.closed = 0

        def get_many(self, samples: Any) -> list[float]:
            return [100.0] * len(samples)

        def close(self) -> None:
            self.closed += 1

    monkeypatch.setattr(latents, "OnDemandLatents", OnDemand)
    cache = Cache(damaged="3")
    source = source_of(cache, keeps=False)
    source.close()  # nothing was encoded
    values = [float(row.mean()) for row in source.latents([sample("2"), sample("3")])]
    assert all(value > 900 for value in values)
    source.latents([sample("5")])
    assert cache.read == ["2"]
    [(given_cache, images, vae, batch_size, keeps)] = made
    assert (given_cache, vae, batch_size, keeps) == (cache, "the vae", 1, False)
    assert images is source.images
    source.close()
    assert source.encode_on_demand().closed == 1


@pytest.mark.parametrize(
    ("dropout", "share", "drops", "keeps"),
    [
        (0.0, 0.0, False, False),  # no caption is dropped
        (0.1, None, False, True),
        (0.1, None, True, False),  # the family drops references with their caption
        (0.1, 0.5, True, True),
        (0.1, 1.0, False, False),
    ],
)
def test_references_of_a_dropped_caption_stay_where_not_all_go(dropout, share, drops, keeps) -> None:
    options = config_of(caption_dropout_probability=dropout, reference_dropout_probability=share).training
    spec: FamilySpec = SimpleNamespace(drops_references=drops)  # type: ignore[assignment]
    assert keeps_references_of_dropped(options, spec) is keeps


def test_files_hold_all_embeddings_where_every_dataset_has_them_and_nothing_else_asks() -> None:
    def found(has_dropped: list[bool | None], dropout: float = 0.1, model_type: str = "full") -> bool:
        files = [None if each is None else SimpleNamespace(has_dropped=each) for each in has_dropped]
        config = config_of(caption_dropout_probability=dropout, model_type=model_type)
        return has_all_embeddings(config, [SimpleNamespace(prompt_files=each) for each in files])  # type: ignore[misc]

    assert found([True, True])
    assert not found([True, False])
    assert found([True, False], dropout=0.0)
    assert not found([True, None], dropout=0.0)
    assert not found([True], model_type="lora")  # the proof of its file asks for an embedding


def test_other_rules_of_what_is_seen_with_a_prompt_are_other_texts_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that finds all texts complete asks for no single one."""
    image = SimpleNamespace(content="an image")
    monkeypatch.setattr(prompts, "fixed_prompts", lambda *given: [SimpleNamespace(text="", images=[image])])

    def named(sees: bool = True, **options: Any) -> str:
        spec = SimpleNamespace(prompts_see_references=sees, drops_references=True)
        cache: Any = SimpleNamespace(family=SimpleNamespace(spec=spec), set_fingerprint=lambda *facts: repr(facts))
        loaded: Any = SimpleNamespace(config=config_of(**options))
        return prompts._set_fingerprint(loaded, cache, [SimpleNamespace(fingerprint="a")])  # type: ignore[list-item]

    dropping = {"caption_dropout_probability": 0.1}
    rules = [{}, {"conditioning_multidataset_sampling": "random"}, dropping | {"reference_dropout_probability": 0.5}]
    assert len({named(**rule) for rule in rules}) == 3
    assert named() == named(**dropping)  # a dropped caption has no references
    assert len({named(sees=False, **rule) for rule in rules}) == 1


def test_a_set_of_which_an_image_cannot_be_encoded_is_not_noted_as_complete(tmp_path: Path, monkeypatch) -> None:
    """The next start would not look for what cannot be encoded, and train on it."""
    noted: list[int] = []
    recorder = Recorder()
    process = Process(guard=FolderGuard(tmp_path), bus=EventBus([recorder]), stop=StopRequest())
    for name, answer in {"KeptSamples": [1, 2, 3], "adopt_latents": 0, "set_fingerprint": "key"}.items():
        monkeypatch.setattr(latents, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(latents, "without", lambda dataset, bad: bad)
    dataset: Any = SimpleNamespace(parts=[SimpleNamespace(id="toys")])

    def filled(*unusable: Any) -> Any:
        report = SimpleNamespace(unusable=unusable, num_encoded=3, num_cached=2)
        store = SimpleNamespace(complete=lambda key: None, note_complete=lambda key, count: noted.append(count))
        cache = SimpleNamespace(store=store, fill=lambda *given: report)
        source: Any = SimpleNamespace(cache=cache, images=SimpleNamespace(read_pixels=None), batch_size=1)
        vae: Any = SimpleNamespace(load=None)
        return latents.fill_caches(dataset, {"toys": source}, vae, tmp_path, process)

    assert filled() is dataset
    assert noted == [5]
    assert filled(SimpleNamespace(sample=SimpleNamespace(path="a.png"), reason="no memory")) == {
        ("toys", "a.png"): "no memory"
    }
    assert noted == [5]
    assert recorder.of(Notice) == [Notice("warning", "toys: a.png is left out: no memory")]


def test_images_and_their_references_are_sets_of_their_own() -> None:
    """Both may lie in one folder."""
    cache: Any = SimpleNamespace(
        family=SimpleNamespace(spec=SimpleNamespace(name="toy")), set_fingerprint=lambda *parts: parts
    )
    dataset: Any = SimpleNamespace(id="toys", fingerprint="f")
    sets = {latents.set_fingerprint(dataset, part, cache) for part in ("toys", "references")}
    dataset.fingerprint = "g"
    assert len(sets | {latents.set_fingerprint(dataset, "toys", cache)}) == 3


@pytest.mark.parametrize("sees", [False, True])
def test_a_new_prompt_of_validation_is_another_set_of_texts(monkeypatch: pytest.MonkeyPatch, sees: bool) -> None:
    """It is encoded before the denoiser takes the memory, though all captions are there."""
    spec = SimpleNamespace(prompts_see_references=sees, drops_references=True)
    cache: Any = SimpleNamespace(family=SimpleNamespace(spec=spec), set_fingerprint=lambda *facts: repr(facts))
    loaded: Any = SimpleNamespace(config=config_of())
    datasets: Any = [SimpleNamespace(fingerprint="a")]
    found = set()
    for text in ("a dog", "a cat"):
        monkeypatch.setattr(prompts, "fixed_prompts", lambda *given, text=text: [SimpleNamespace(text=text, images=[])])
        found.add(prompts._set_fingerprint(loaded, cache, datasets))
    assert len(found) == 2


@pytest.mark.parametrize("is_on", [False, True])
def test_latents_are_written_and_remembered_as_their_dataset_says(tmp_path: Path, monkeypatch, is_on: bool) -> None:
    for name, answer in {"fingerprint_of_vae": "f", "latents_folder": tmp_path / "cache"}.items():
        monkeypatch.setattr(latents, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(latents, "LazyVae", lambda family: SimpleNamespace(load=None, free=lambda: None))
    monkeypatch.setattr(latents, "fill_caches", lambda dataset, *given: dataset)
    part = SimpleNamespace(id="toys", entry=None, read_pixels=None)
    draws = SimpleNamespace(crops=is_on)
    dataset: Any = SimpleNamespace(
        parts=[part], keeps_latents=is_on, samples=SimpleNamespace(draws=draws), encodes_on_demand=False
    )
    family: Any = SimpleNamespace(spec=None, vae_config={})
    process = Process(guard=FolderGuard(tmp_path), bus=EventBus([Recorder()]), stop=StopRequest())
    _, sources = latents.prepare_latents(config_of(cache_dir=str(tmp_path)), family, [dataset], process)
    assert (sources["toys"].keeps, sources["toys"].resamples) == (is_on, is_on)
    sources["toys"].cache.store.close()


def test_a_cache_is_filled_in_batches_of_the_size_that_is_written(tmp_path: Path, monkeypatch) -> None:
    for name, answer in {"KeptSamples": [1], "adopt_latents": 0, "set_fingerprint": "key"}.items():
        monkeypatch.setattr(latents, name, lambda *given, answer=answer: answer)
    sizes: list[int] = []

    def fill(images: Any, load: Any, batch_size: int, *rest: Any) -> Any:
        sizes.append(batch_size)
        return SimpleNamespace(unusable=(), num_encoded=1, num_cached=0)

    store = SimpleNamespace(complete=lambda key: None, note_complete=lambda key, count: None)
    cache = SimpleNamespace(store=store, fill=fill)
    source: Any = SimpleNamespace(cache=cache, images=SimpleNamespace(read_pixels=None), batch_size=6)
    dataset: Any = SimpleNamespace(parts=[SimpleNamespace(id="toys")])
    vae: Any = SimpleNamespace(load=None)
    process = Process(guard=FolderGuard(tmp_path), bus=EventBus([Recorder()]), stop=StopRequest())
    latents.fill_caches(dataset, {"toys": source}, vae, tmp_path, process)
    assert sizes == [6]
