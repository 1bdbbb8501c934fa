"""One folder, one run: what another run or an abandoned branch left is never taken for this run's, and never lost."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner import storage
from simpletuner.errors import ConfigError, DataError
from simpletuner.reporting.report.record import read_run
from simpletuner.training import build, evaluate, loop
from tests.runs import dataset, metrics, slow_but, train_here, write_images, write_run

FIXTURE = Path(__file__).parent.parent / "fixtures" / "run_without_identity.tar.xz"
WEIGHTS = "pytorch_lora_weights.safetensors"
QUICK: dict[str, Any] = {"max_train_steps": 4, "checkpoint_step_interval": 2, "checkpoints_total_limit": 10}
IMAGES: dict[str, Any] = {
    "validation_disable": False,
    "validation_prompt": "a star",
    "validation_num_inference_steps": 1,
    "validation_resolution": "32x32",
    "validation_guidance": 1.0,
    "validation_seed": 1,
    "validation_step_interval": 2,
}


def rate_of(checkpoint: Path) -> float:
    return json.loads((checkpoint / "config.json").read_text())["learning_rate"]


def branch_of(folder: Path) -> tuple[str, str]:
    history = storage.read_manifest(folder).metadata["run_history"]
    return history["run"], history["branches"][-1]["id"]


def notices(output: Path) -> list[str]:
    return [event["text"] for event in metrics(output, "notice")]


def earlier(output: Path) -> Path:
    [folder] = (output / "earlier-runs").iterdir()
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != ".lock"}


@pytest.mark.slow
def test_a_fresh_start_saves_its_own_checkpoints_and_the_latest_is_its_own(tmp_path: Path, omnigen_folder: Path):
    folder = write_run(tmp_path, omnigen_folder, **{**QUICK, "checkpoints_total_limit": 2}, max_grad_norm=1.0)
    output = train_here(folder, "--max_train_steps=6")
    first = {path.name: rate_of(path) for path in output.glob("checkpoint-*")}
    fresh = ("--resume_from_checkpoint=none", "--learning_rate=0.001")
    train_here(folder, *fresh)
    assert first == {"checkpoint-4": 0.01, "checkpoint-6": 0.01}
    assert {path.name: rate_of(path) for path in output.glob("checkpoint-*")} == {
        "checkpoint-2": 0.001,
        "checkpoint-4": 0.001,
    }
    assert {path.name: rate_of(path) for path in earlier(output).glob("checkpoint-*")} == first
    assert [event["is_new"] for event in metrics(output, "checkpoint_saved")] == [True, True]
    assert metrics(earlier(output), "run_started")[0]["run_id"] != metrics(output, "run_started")[0]["run_id"]
    train_here(folder, "--learning_rate=0.001", "--max_train_steps=5")
    assert "resumed checkpoint-4: step 4 of 5" in notices(output)


@pytest.mark.slow
def test_going_back_replaces_what_lies_after_the_step(tmp_path: Path, omnigen_folder: Path):
    folder = write_run(tmp_path, omnigen_folder, **QUICK, eval_steps_interval=2)
    output = train_here(folder)
    before = branch_of(output / "checkpoint-2")
    train_here(folder, "--resume_from_checkpoint=checkpoint-2", "--learning_rate=0.001")
    run, branch = branch_of(output / "checkpoint-4")
    assert run == before[0]
    assert branch != before[1]
    assert branch_of(output / "checkpoint-2") == before
    assert rate_of(output / "checkpoint-4") == 0.001
    assert rate_of(earlier(output) / "checkpoint-4") == 0.01
    assert (output / WEIGHTS).read_bytes() != (earlier(output) / WEIGHTS).read_bytes()
    assert len(metrics(output, "step_done")) == len(metrics(earlier(output), "step_done")) == 4
    train_here(folder, "--learning_rate=0.001", "--max_train_steps=5")
    assert "resumed checkpoint-4: step 4 of 5" in notices(output)
    assert branch_of(output / "checkpoint-5") == (run, branch)


@pytest.mark.slow
def test_the_latest_beside_other_runs_checkpoints_exits_with_the_choices(tmp_path: Path, omnigen_folder: Path):
    one = train_here(write_run(tmp_path / "one", omnigen_folder, **QUICK))
    folder = write_run(tmp_path / "two", omnigen_folder, **QUICK)
    two = train_here(folder)
    for path in two.glob("checkpoint-*"):
        shutil.rmtree(path)
    shutil.copytree(one / "checkpoint-4", two / "checkpoint-4")
    before = content(two)
    with pytest.raises(ConfigError, match=r"checkpoints of other runs only: checkpoint-4(.|\n)*choose one of: none, "):
        train_here(folder)
    assert content(two) == before
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        train_here(folder, f"--resume_from_checkpoint={tmp_path}/nowhere/checkpoint-4")


@pytest.mark.slow
def test_a_path_means_that_checkpoint_and_not_one_of_its_name_in_the_folder(tmp_path: Path, omnigen_folder: Path):
    one = train_here(write_run(tmp_path / "one", omnigen_folder, **QUICK, seed=5))
    folder = write_run(tmp_path / "two", omnigen_folder, **QUICK)
    two = train_here(folder)
    train_here(folder, f"--resume_from_checkpoint={one}/checkpoint-4", "--max_train_steps=4", "--seed=5")
    assert load_file(two / WEIGHTS).keys() == load_file(one / WEIGHTS).keys()
    for name, tensor in load_file(one / WEIGHTS).items():
        assert torch.equal(load_file(two / WEIGHTS)[name], tensor)
    assert f"resumed {one}/checkpoint-4: step 4 of 4" in notices(two)
    assert (earlier(two) / "checkpoint-4").is_dir()
    wrong = "--optimizer=adafactor"
    with pytest.raises(ConfigError, match=f"{one}/checkpoint-4 was trained"):
        train_here(folder, f"--resume_from_checkpoint={one}/checkpoint-4", wrong)


OPTIMIZER, ADAPTER = "--optimizer=adafactor", "--lycoris_config=other.json"


@pytest.mark.parametrize("change", slow_but((OPTIMIZER, ADAPTER), (ADAPTER,)))
def test_a_resume_that_is_refused_changes_nothing(tmp_path: Path, omnigen_folder: Path, monkeypatch, change: str):
    folder = write_run(tmp_path, omnigen_folder, **QUICK)
    lycoris = json.loads((folder / "lycoris_config.json").read_text())
    (folder / "other.json").write_text(json.dumps({**lycoris, "factor": 2}))
    output = train_here(folder)
    before = content(output)
    monkeypatch.setattr("simpletuner.training.build.build_family", None)  # nothing is loaded for it
    with pytest.raises(ConfigError, match="was trained with another value"):
        train_here(folder, change)
    assert content(output) == before
    assert read_run(output).state == "finished"


def test_shapes_that_do_not_fit_are_refused_before_anything_is_changed(tmp_path: Path, omnigen_folder: Path):
    lora = {"lora_type": "standard", "lora_rank": 2, "lora_alpha": 2}
    folder = write_run(tmp_path, omnigen_folder, **QUICK, **lora)
    config = json.loads((folder / "config.json").read_text())
    del config["lycoris_config"]
    (folder / "config.json").write_text(json.dumps(config))
    output = train_here(folder)
    before = content(output)
    with pytest.raises(ConfigError, match="rank 2, the configuration says 4"):
        train_here(folder, "--lora_rank=4")
    assert content(output) == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", slow_but(("empty", "missing", "another step"), ("another step",)))
def test_complete_means_readable_final_weights_of_this_step(tmp_path: Path, omnigen_folder: Path, damage: str):
    folder = write_run(tmp_path, omnigen_folder, **QUICK)
    output = train_here(folder)
    right = (output / WEIGHTS).read_bytes()
    train_here(folder)
    assert notices(output)[-1].endswith("is complete: step 4 of 4")
    assert read_run(output).state == "finished"
    if damage == "empty":
        train_here(folder, "--max_train_steps=3")
        assert notices(output)[-1].endswith("is complete: step 4, beyond the 3 of the configuration")
    assert len(metrics(output, "run_finished")) == 1
    if damage == "empty":
        (output / WEIGHTS).write_bytes(b"")
    elif damage == "missing":
        (output / WEIGHTS).unlink()
    else:
        train_here(folder, "--max_train_steps=6")
        train_here(folder, "--resume_from_checkpoint=checkpoint-4")
    train_here(folder)
    assert (output / WEIGHTS).read_bytes() == right


@pytest.mark.slow
def test_what_a_kill_left_out_of_the_end_is_made_by_the_next_start(tmp_path: Path, omnigen_folder: Path):
    folder = write_run(tmp_path, omnigen_folder, **QUICK, **IMAGES, use_ema=True)
    output = train_here(folder)
    made = ["report.html", "before_after.png", "validation_images/step_4_validation_0_32x32_ema.png"]
    for name in made:
        (output / name).unlink()
        train_here(folder)
        assert (output / name).is_file()
    assert not (output / "earlier-runs").exists()


def test_output_dir_that_is_renamed_under_a_run_ends_it_at_the_next_write(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_run(tmp_path, omnigen_folder, **QUICK)
    report = loop.report_step

    def rename(run: Any, *arguments: Any) -> None:
        report(run, *arguments)
        if run.progress.global_step == 3:
            run.session.output_dir.rename(tmp_path / "renamed")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "report_step", rename)
        with pytest.raises(DataError, match="renamed, deleted or replaced"):
            train_here(folder)
    assert not (tmp_path / "output").exists()
    (tmp_path / "renamed").rename(tmp_path / "output")
    assert "resumed checkpoint-2: step 2 of 4" in notices(train_here(folder))


def test_output_dir_that_is_replaced_while_images_are_encoded_is_not_begun_in(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_run(tmp_path, omnigen_folder, **QUICK)
    prepare = build.prepare_data

    def replace(loaded: Any, family: Any, process: Any, *rest: Any) -> Any:
        found = prepare(loaded, family, process, *rest)
        process.output_dir.rename(tmp_path / "renamed")
        process.output_dir.mkdir()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(build, "prepare_data", replace)
        with pytest.raises(DataError, match="renamed, deleted or replaced"):
            train_here(folder)
    assert not (tmp_path / "output" / "run_history.json").exists()


def test_a_fresh_run_goes_on_where_a_network_disk_numbers_its_folders_anew(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_run(tmp_path, omnigen_folder, **QUICK)
    report = loop.report_step

    def number_anew(run: Any, *arguments: Any) -> None:
        report(run, *arguments)
        run.session.guard._place = (0, 0)

    monkeypatch.setattr(loop, "report_step", number_anew)
    assert (train_here(folder) / "checkpoint-4").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the record", "after the record"])
def test_a_kill_around_the_best_checkpoint_is_made_up_for(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    folder = write_run(tmp_path, omnigen_folder, **{**QUICK, "checkpoint_step_interval": 3}, eval_steps_interval=1)
    real = evaluate.write_eval_history

    def die(session: Any, eval_losses: dict[int, float]) -> None:
        if max(eval_losses) == 2:
            if moment == "after the record":
                real(session, eval_losses)
            raise KeyboardInterrupt
        real(session, eval_losses)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "write_eval_history", die)
        with pytest.raises(KeyboardInterrupt):
            train_here(folder)
    output = train_here(folder)
    assert "resumed checkpoint-best: step 2 of 4" in notices(output)
    losses = {event["step"]: event["pooled"] for event in metrics(output, "eval_done")}
    best = storage.read_manifest(output / "checkpoint-best").metadata
    assert (best["global_step"], best["eval_loss"]) == min((step, loss) for step, loss in losses.items() if step == 4)
    assert losses[4] == min(losses.values())
    recorded = json.loads((output / "eval_losses.json").read_text())["losses"]
    assert recorded == {str(step): loss for step, loss in losses.items()}


@pytest.mark.slow
def test_the_best_is_kept_by_default_and_comes_back_from_its_numbered_checkpoint(tmp_path: Path, omnigen_folder: Path):
    folder = write_run(tmp_path, omnigen_folder, **QUICK, eval_steps_interval=2)
    output = train_here(folder)
    step = storage.read_manifest(output / "checkpoint-best").metadata["global_step"]
    assert step == 4
    train_here(folder, "--resume_from_checkpoint=checkpoint-2")
    assert storage.read_manifest(earlier(output) / "checkpoint-best").metadata["global_step"] == 4
    off = write_run(tmp_path / "off", omnigen_folder, **QUICK, eval_steps_interval=2, checkpoint_keep_best=False)
    assert not (train_here(off) / "checkpoint-best").exists()
    output = train_here(off, "--checkpoint_keep_best=true", "--max_train_steps=5")
    assert "checkpoint-best is checkpoint-4" in " ".join(notices(output))


@pytest.mark.slow
def test_losses_of_another_evaluation_are_compared_with_nothing(tmp_path: Path, omnigen_folder: Path):
    """At other noise levels no loss is that of before: the best of then is moved, and the first new one counts."""
    folder = write_run(tmp_path, omnigen_folder, **QUICK, eval_steps_interval=2)
    output = train_here(folder)
    train_here(folder)
    assert not (output / "earlier-runs").exists()
    other = "--eval_timesteps=1"
    train_here(folder, "--max_train_steps=5", other, "--learning_rate=10")
    known = json.loads((output / "eval_losses.json").read_text())["losses"]
    assert list(known) == ["4", "5"]
    assert known["4"] < known["5"]
    best = storage.read_manifest(output / "checkpoint-best").metadata
    assert (best["global_step"], best["eval_loss"]) == (4, known["4"])
    assert storage.read_manifest(earlier(output) / "checkpoint-best").metadata["global_step"] == 4
    assert sum("start anew" in text for text in notices(output)) == 1
    train_here(folder, "--max_train_steps=6", other)
    assert sum("start anew" in text for text in notices(output)) == 1


@pytest.mark.slow
def test_no_tenth_of_an_epoch_is_lost(tmp_path: Path, omnigen_folder: Path):
    """Ten batches in an epoch: each step ends a tenth, also where a resume begins. In floats 0.3 // 0.1 is 2."""
    data = [dataset("images", repeats=0), dataset("held_out", dataset_type="eval")]
    options = {"train_batch_size": 1, "eval_epoch_interval": 0.1, "checkpoint_step_interval": 0, "eval_timesteps": 1}
    folder = write_run(tmp_path, omnigen_folder, data, max_train_steps=20, **options, checkpoint_keep_best=False)
    write_images(folder / "images", 10, seed=1)
    write_images(folder / "held_out", 1, seed=2)
    assert [event["step"] for event in metrics(train_here(folder), "eval_done")] == list(range(21))


def unpack(folder: Path, model: Path) -> Path:
    """The run of an earlier version: 4 steps, EMA, best, images, ids of W&B and the Hub; its files and caches."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    config = json.loads((folder / "run/config.json").read_text())
    config["pretrained_model_name_or_path"] = str(model)
    (folder / "run/config.json").write_text(json.dumps(config))
    return folder / "run"


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_is_adopted_and_goes_on(tmp_path: Path, omnigen_folder: Path):
    folder = unpack(tmp_path, omnigen_folder)
    output = folder / "output"
    kept = storage.read_manifest(output / "checkpoint-2")
    train_here(folder, "--max_train_steps=6")
    reported = notices(output)
    assert "resumed checkpoint-4: step 4 of 6" in reported
    assert sum("written by an earlier version" in text for text in reported) == 1
    assert storage.read_manifest(output / "checkpoint-2") == kept
    assert not (output / "earlier-runs").exists()
    summaries = [event["summary"] for event in metrics(output, "phase_done") if "latents" in event["name"]]
    assert summaries[-2:] == ["0 encoded, 4 cached before", "0 encoded, 1 cached before"]
    assert [event["step"] for event in metrics(output, "step_done")] == [1, 2, 3, 4, 5, 6]
    run = storage.read_json(output / "run_history.json")["run"]
    assert branch_of(output / "checkpoint-6")[0] == run

    straight = train_here(write_copy(folder, tmp_path / "straight"), "--max_train_steps=6")
    mine, theirs = (load_file(each / "checkpoint-6" / WEIGHTS) for each in (output, straight))
    for name, tensor in mine.items():  # the machine that made the fixture may round otherwise
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)

    train_here(folder, "--max_train_steps=8")
    assert sum("written by an earlier version" in text for text in notices(output)) == 1
    train_here(folder, "--resume_from_checkpoint=checkpoint-4", "--max_train_steps=5")
    assert {path.name for path in output.glob("checkpoint-*[0-9]")} == {"checkpoint-4", "checkpoint-5"}
    assert storage.read_json(output / "run_history.json")["run"] == run


def write_copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=lambda folder, names: [name for name in names if name == "output"])
    return target


def test_a_fresh_start_in_a_folder_of_an_earlier_version_moves_all_of_it(tmp_path: Path, omnigen_folder: Path):
    folder = unpack(tmp_path, omnigen_folder)
    output = folder / "output"
    before = content(output)
    train_here(folder, "--resume_from_checkpoint=none", "--seed=9")
    assert content(earlier(output)).items() >= before.items()


@pytest.mark.slow
def test_a_sheet_shows_no_image_of_an_earlier_run(tmp_path: Path, omnigen_folder: Path):
    folder = write_run(tmp_path, omnigen_folder, **QUICK, **IMAGES)
    output = train_here(folder)
    train_here(folder, "--resume_from_checkpoint=none", "--validation_step_interval=4", "--seed=8")
    names = sorted(path.name for path in (output / "validation_images").glob("step_*_32x32.png"))
    assert names == ["step_4_validation_0_32x32.png"]
    assert (earlier(output) / "benchmarks/base_model").is_dir()
