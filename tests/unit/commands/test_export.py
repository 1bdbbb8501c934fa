"""`simpletuner export`: files for other programs and merged models, each of which gives the trainer's own output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.adapters.files import apply_adapter_file
from simpletuner.commands import export as exporting
from simpletuner.commands.export import _kept_metadata, export_command, find_source
from simpletuner.errors import ConfigError, DataError
from simpletuner.launch import family_of_export, family_of_model
from simpletuner.models.family import ModelFamily
from simpletuner.training.adapter_roundtrip import probe_output
from tests.runs import run_forked, train_here, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, omnigen_folder: Path) -> dict[str, Path]:
    """Output folders of a LoRA and of a LoKr, two steps each."""
    root = tmp_path_factory.mktemp("export")
    options = {"max_train_steps": 2, "checkpoint_step_interval": 2}
    lora = {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 3, "use_ema": True}
    return {
        "lora": train_here(write_run(root / "lora", omnigen_folder, **options, **lora)),
        "lokr": train_here(write_run(root / "lokr", omnigen_folder, **options)),
    }


def export(folder: Path, *formats: str, output: Path | None = None, rank: int | None = None, **options):
    said: list[str] = []
    family = family_of_export(folder, None, None)
    source = find_source(folder, options.pop("ema", False))
    paths = export_command(source, family, formats, output, rank, options.pop("merge", False), said.append)
    return paths, said


def answer(family: ModelFamily, adapter: Path | None = None) -> torch.Tensor:
    denoiser = family.load_denoiser()
    if adapter is not None:
        apply_adapter_file(denoiser, adapter, family.spec)
    return probe_output(family, denoiser)


def test_a_lora_is_written_in_every_format_with_the_facts_of_its_run(
    runs, tmp_path: Path, omnigen_folder: Path
) -> None:
    paths, said = export(runs["lora"], output=tmp_path)
    assert [path.name for path in paths] == [
        f"output.{name}.safetensors" for name in ("diffusers", "kohya", "comfyui", "lycoris")
    ]
    assert [line.split(": ")[0] for line in said] == [path.name for path in paths]
    assert said[0].endswith("read by PEFT")
    assert said[3].endswith("read by LyCORIS")
    family = family_of_model(str(omnigen_folder), "omnigen")
    expected = answer(family, runs["lora"] / "pytorch_lora_weights.safetensors")
    assert (answer(family) - expected).abs().max() > 1e-4
    for path in paths:
        torch.testing.assert_close(answer(family, path), expected, rtol=0, atol=1e-5)
    with safe_open(paths[1], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "Dynamic"  # queries, keys and values are one matrix there
    assert metadata["ss_network_alpha"] == "Dynamic"
    assert metadata["ss_learning_rate"] == "0.01"
    assert metadata["modelspec.architecture"] == "omnigen-v1/lora"
    own = json.loads(metadata["simpletuner"])
    lock = json.loads((runs["lora"] / "run.lock.json").read_text())
    assert own["datasets"] == {name: data["fingerprint"] for name, data in lock["data"].items()}
    assert own["step"] == 2
    assert str(omnigen_folder) not in json.dumps(metadata)


def test_a_lokr_is_written_where_it_can_be_and_the_rest_is_reported(runs, tmp_path: Path) -> None:
    paths, said = export(runs["lokr"], output=tmp_path)
    assert [path.name for path in paths] == ["output.lycoris.safetensors"]
    refused = ["no diffusers file", "no kohya file", "no comfyui file"]
    assert [line.split(":")[0] for line in said] == [*refused, paths[0].name]
    with pytest.raises(ConfigError, match="only a plain LoRA can be moved there"):
        export(runs["lokr"], "kohya", output=tmp_path)


@pytest.mark.slow
def test_a_lokr_becomes_a_lora_when_asked_and_the_loss_is_reported(runs, tmp_path: Path) -> None:
    paths, said = export(runs["lokr"], "diffusers", output=tmp_path / "small.safetensors", rank=2)
    assert paths == [tmp_path / "small.safetensors"]
    assert {tensor.shape[0] for key, tensor in load_file(paths[0]).items() if "lora_A" in key} == {2}
    assert "leaves out" in said[0]
    enough = int(re.match(r"--rank (\d+) keeps 95% of it", said[1])[1])
    assert "read by LyCORIS" in said[1]
    _, again = export(runs["lokr"], "diffusers", output=tmp_path / "enough.safetensors", rank=enough)
    assert float(re.search(r"leaves out ([\d.]+)%", again[0])[1]) <= 5
    assert len(again) == 2  # nothing but the file's readers
    _, less = export(runs["lokr"], "diffusers", output=tmp_path / "less.safetensors", rank=enough - 1)
    assert float(re.search(r"leaves out ([\d.]+)%", less[0])[1]) > 5


def test_a_merged_model_answers_as_the_adapter_and_lacks_nothing(runs, tmp_path: Path, omnigen_folder: Path) -> None:
    [path], _ = export(runs["lokr"], output=tmp_path / "merged", merge=True)
    merged = family_of_model(str(path), None)  # told by its model_index.json
    family = family_of_model(str(omnigen_folder), "omnigen")
    expected = answer(family, runs["lokr"] / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(answer(merged), expected, rtol=0, atol=1e-4)
    merged.load_vae()
    with pytest.raises(DataError, match="already exists"):
        export(runs["lokr"], output=path, merge=True)


def test_checkpoints_averages_and_single_files_are_sources(runs, tmp_path: Path, omnigen_folder: Path) -> None:
    assert find_source(runs["lora"] / "checkpoint-2").lock is not None
    assert find_source(runs["lora"], ema=True).name == "output-ema"
    lone = tmp_path / "lone.safetensors"
    save_file(load_file(runs["lokr"] / "pytorch_lora_weights.safetensors"), lone)
    assert find_source(lone).lock is None
    with pytest.raises(ConfigError, match="add --model"):
        family_of_export(lone, None, None)
    family = family_of_export(lone, str(omnigen_folder), "omnigen")
    [path] = export_command(find_source(lone), family, ["lycoris"], tmp_path / "out", None, False, print)
    assert path.name == "lone.lycoris.safetensors"


def test_a_file_that_fails_its_check_gets_no_name(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import simpletuner.commands.export as module

    named = module.named

    def with_a_stranger(*arguments):
        tensors = named(*arguments)
        return tensors | {"transformer.layers.9.self_attn.to_q.lora_A.weight": torch.ones(4, 32)}

    monkeypatch.setattr(module, "named", with_a_stranger)
    with pytest.raises(DataError, match=r"layers\.9"):
        export(runs["lora"], "diffusers", output=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_prints_the_files_and_refuses_what_is_no_source(runs, tmp_path: Path) -> None:
    done = run_forked(tmp_path, "export", str(runs["lora"]), "--format", "kohya", "--output", "files")
    assert (done.returncode, done.stdout) == (0, "files/output.kohya.safetensors\n")
    with pytest.raises(ConfigError, match="there is nothing at"):
        find_source(tmp_path / "nothing")


@pytest.mark.parametrize("lock", ["{}", "[1]", '{"config": [], "base": {"files": 1}}'])
def test_a_lock_of_another_form_is_named_and_no_crash(tmp_path: Path, lock: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "run.lock.json").write_text(lock)
    with pytest.raises(DataError, match=r"run\.lock\.json: (is damaged|cannot be read)"):
        _kept_metadata(SimpleNamespace(source=find_source(tmp_path), weights=SimpleNamespace(metadata={})))


@pytest.mark.parametrize(("output", "words"), [(1.0, None), (2.0, "differs by 1,"), (float("nan"), "differs by nan")])
def test_a_merged_model_that_answers_differently_or_not_at_all_is_refused(
    output: float, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Family:
        spec = device = dtype = prompts = None

        def __init__(self, *given: object):
            pass

    monkeypatch.setattr(exporting, "_load", lambda family: None)
    monkeypatch.setattr(exporting, "probe_output", lambda family, denoiser: torch.tensor([output]))
    export = SimpleNamespace(family=Family(), reference=torch.ones(1), tolerance=1e-3, say=lambda line: None)
    if words is None:
        exporting._require_merged(export, tmp_path)
    else:
        with pytest.raises(DataError, match=words):
            exporting._require_merged(export, tmp_path)
