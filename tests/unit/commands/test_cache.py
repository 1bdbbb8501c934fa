"""`simpletuner cache` on a small run: what is built, found damaged, and removed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from simpletuner.cache.store import StoreStats
from simpletuner.commands import cache
from simpletuner.commands.check import gather
from simpletuner.errors import bytes_text
from tests.runs import dataset, load_here, write_images, write_run


@pytest.fixture
def folder(tmp_path: Path, omnigen_folder: Path) -> Path:
    return write_run(tmp_path / "run", omnigen_folder)


def lines_of(verb, folder: Path, *arguments: object) -> str:
    said: list[str] = []
    verb(load_here(folder), said.append, *arguments)
    return "\n".join(said)


def shards(folder: Path, name: str = "images") -> list[Path]:
    return sorted((folder / "cache/vae/omnigen" / name).glob("*.safetensors"))


def test_build_encodes_everything_once_and_loads_no_denoiser(folder, monkeypatch, capsys):
    def refuse(self):
        raise AssertionError("the denoiser is not part of the caches")

    monkeypatch.setattr("simpletuner.models.omnigen.family.OmniGen.load_denoiser", refuse)
    cache.build(load_here(folder, "--vae_cache_ondemand=true"))
    assert "7 encoded, 0 cached before" in capsys.readouterr().out
    monkeypatch.setattr("simpletuner.models.omnigen.family.OmniGen.load_vae", refuse)
    cache.build(load_here(folder))
    assert "0 encoded, 7 cached before" in capsys.readouterr().out
    assert not (folder / "output/metrics.jsonl").exists()


def test_verify_counts_flipped_and_cut_entries_and_a_build_makes_them_anew(folder, capsys):
    cache.build(load_here(folder))
    assert cache.verify(load_here(folder), print) == 0
    [flipped], [cut] = shards(folder), shards(folder, "regularisation")
    damaged = bytearray(flipped.read_bytes())
    damaged[-1] ^= 1
    flipped.write_bytes(damaged)
    cut.write_bytes(cut.read_bytes()[:-8])
    capsys.readouterr()
    assert cache.verify(load_here(folder), print) == 2  # one entry of each: the last one of its file
    assert "skipped" not in capsys.readouterr().err
    cache.build(load_here(folder))
    out = capsys.readouterr().out
    assert "1 encoded, 6 cached before" in out
    assert "1 encoded, 2 cached before" in out
    assert cache.verify(load_here(folder), print) == 0


def test_prune_removes_what_no_dataset_uses_and_nothing_else(folder, capsys):
    cache.build(load_here(folder))
    (folder / "images/003.png").unlink()
    assert "in use: 6, unused: 1, still to encode: 0" in lines_of(cache.stats, folder)
    assert "would remove 1 of 7" in lines_of(cache.prune, folder, True)
    assert len(shards(folder)) == 1
    assert "removed 1 of 7 entries\n" in lines_of(cache.prune, folder)
    assert "in use: 6, unused: 0, still to encode: 0" in lines_of(cache.stats, folder)
    capsys.readouterr()
    cache.build(load_here(folder))
    assert "0 encoded, 6 cached before" in capsys.readouterr().out


def test_prune_leaves_folders_of_other_configurations_unless_asked(folder):
    cache.build(load_here(folder))
    data = json.loads((folder / "multidatabackend.json").read_text())
    (folder / "multidatabackend.json").write_text(json.dumps([data[0]]))
    assert lines_of(cache.prune, folder).count("left alone") == 2
    assert shards(folder, "held_out")
    lines_of(cache.prune, folder, False, True)
    assert not shards(folder, "held_out")
    assert not shards(folder, "regularisation")
    assert shards(folder)


def test_prune_removes_files_that_were_skipped(folder):
    cache.build(load_here(folder))
    [shard] = shards(folder)
    shard.write_bytes(shard.read_bytes()[:-8])
    cache.verify(load_here(folder), print)
    assert "in quarantine as damaged: 1 file" in lines_of(cache.stats, folder)
    lines_of(cache.prune, folder)
    assert "skipped" not in lines_of(cache.stats, folder)


def test_two_datasets_in_one_folder_keep_each_others_entries(tmp_path, omnigen_folder, capsys):
    folder = tmp_path / "run"
    for seed, name in enumerate(("one", "two")):
        write_images(folder / name, 3, seed=seed)
    shared = str(folder / "shared")
    write_run(folder, omnigen_folder, [dataset(name, cache_dir_vae=shared) for name in ("one", "two")])
    cache.build(load_here(folder))
    assert "removed 0 of 6" in lines_of(cache.prune, folder)


def test_without_any_cache_the_verb_that_makes_it_is_named(folder):
    said: list[str] = []
    cache.verify(load_here(folder), said.append)
    assert "cache build" in said[0]


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "multidatabackend.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps([{**each, "id": new if each["id"] == old else each["id"]} for each in data]))


def test_a_dataset_that_is_renamed_finds_its_latents(folder, monkeypatch, capsys):
    cache.build(load_here(folder))
    before = {path.name: path.read_bytes() for path in shards(folder)}
    rename(folder, "images", "photographs")

    def refuse(self):
        raise AssertionError("everything is there")

    monkeypatch.setattr("simpletuner.models.omnigen.family.OmniGen.load_vae", refuse)
    capsys.readouterr()
    cache.build(load_here(folder))
    assert "0 encoded, 7 cached before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in shards(folder, "photographs")} == before
    assert shards(folder, "photographs")[0].samefile(shards(folder)[0])  # takes no room


def test_where_files_cannot_be_linked_entries_are_copied(folder, monkeypatch, capsys):
    cache.build(load_here(folder))
    rename(folder, "images", "photographs")
    (folder / "images/003.png").unlink()

    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    capsys.readouterr()
    cache.build(load_here(folder))
    assert "0 encoded, 6 cached before" in capsys.readouterr().out
    assert "in use: 6, unused: 0, still to encode: 0" in lines_of(cache.stats, folder)


def test_only_what_is_wanted_of_another_folder_is_taken_over(folder):
    cache.build(load_here(folder))
    rename(folder, "images", "photographs")
    (folder / "images/003.png").unlink()
    cache.build(load_here(folder))
    text = lines_of(cache.stats, folder)
    assert "in use: 6, unused: 0, still to encode: 0" in text
    assert f"  {folder.resolve()}/cache/vae/omnigen/images: 7 entries, " in text.split("no longer used")[1]


def test_check_counts_what_another_name_has_encoded(folder):
    cache.build(load_here(folder))
    rename(folder, "images", "photographs")
    found = gather(load_here(folder))
    need = next(each.cache for each in found.datasets if each.dataset.id == "photographs")
    assert (need.num_present, need.num_missing, need.bytes_missing) == (7, 0, 0)
    assert not shards(folder, "photographs")  # nothing is written


def test_a_file_with_two_names_takes_its_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [SimpleNamespace(path=tmp_path / name, label=name, datasets=(), quarantined=()) for name in "ab"]
    for folder in folders:
        folder.path.mkdir()
        (folder.path / "shard-0.safetensors").write_bytes(bytes(3_000_000))
    os.link(tmp_path / "a/shard-0.safetensors", tmp_path / "b/shard-1.safetensors")
    store = SimpleNamespace(stats=lambda: StoreStats(1, 1, 3_000_000))
    monkeypatch.setattr(cache, "_stores", lambda loaded, say: [(folder, store) for folder in folders])
    monkeypatch.setattr(cache, "used_keys", lambda loaded: {})
    said: list[str] = []
    cache.stats(SimpleNamespace(), said.append)
    assert f"{bytes_text(6_000_000)} in all" in said
