"""Two processes train what one trains with the same global batch, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import cli, dataset, metrics, run_cli, write_images, write_run
from tests.tiny_folders import TINY_FOLDERS

pytestmark = pytest.mark.slow

# Ends of one process's runs and of two processes' differ by the order in which numbers are added up.
TOLERANCE = 1e-5


def steps(output: Path) -> list[dict]:
    return metrics(output, "step_done")


def weights(output: Path) -> dict:
    return load_file(output / "pytorch_lora_weights.safetensors")


def assert_same_steps(one: Path, other: Path) -> None:
    for mine, theirs in zip(steps(one), steps(other), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["samples"] == theirs["samples"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def assert_same_training(one: Path, other: Path) -> None:
    assert_same_steps(one, other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= TOLERANCE


def train(folder: Path, *arguments: str) -> Path:
    result = run_cli(folder, "train", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "output"


# Images of a global batch of four: 5 are 4 and 1, 3 are fewer than the two processes take together.
COUNTS = {"images": 5, "regularisation": 3, "held_out": 2}


def short_batches(folder: Path) -> list[dict]:
    """Data of which some batches have one image, so that one of two processes has none that counts."""
    for seed, (name, count) in enumerate(COUNTS.items(), 1):
        write_images(folder / name, count, seed=seed)
    return [
        dataset("images"),
        dataset("regularisation", is_regularisation_data=True),
        dataset("held_out", dataset_type="eval"),
    ]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, omnigen_folder) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return train(write_run(folder, omnigen_folder, short_batches(folder), train_batch_size=4, use_ema=True))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, omnigen_folder) -> Path:
    options = {"train_batch_size": 2, "num_processes": 2, "use_ema": True}
    folder = tmp_path_factory.mktemp("two")
    return train(write_run(folder, omnigen_folder, short_batches(folder), **options))


def test_two_processes_train_what_one_does_with_the_same_global_batch(one_process, two_processes):
    assert_same_training(one_process, two_processes)
    # Three batches an epoch: of 4, 1 and 3 images; eight steps are two epochs and two more.
    samples = [step["samples"] for step in steps(two_processes)]
    assert sorted(samples[:3]) == sorted(samples[3:6]) == [1, 3, 4]


def test_only_the_main_process_writes_and_speaks(two_processes):
    assert len(metrics(two_processes, "run_started")) == 1
    assert len(steps(two_processes)) == 8


def test_each_process_encodes_its_share_once(two_processes):
    done = [record["summary"] for record in metrics(two_processes, "phase_done") if "caching" in record["name"]]
    # 5 images: 3 for the main process, 2 for the other; 3 and 2 are divided likewise.
    assert done == ["3 encoded, 0 cached before", "2 encoded, 0 cached before", "1 encoded, 0 cached before"]


@pytest.mark.ci
def test_a_stopped_run_of_two_processes_resumes_to_the_same_bits(tmp_path, omnigen_folder, two_processes):
    options = {"train_batch_size": 2, "num_processes": 2, "use_ema": True}
    data = short_batches(tmp_path / "stopped")
    folder = write_run(tmp_path / "stopped", omnigen_folder, data, **options)
    train(folder, "--max_train_steps=4")
    resumed = train(folder)
    assert [record["step"] for record in steps(resumed)] == list(range(1, 9))
    name = "pytorch_lora_weights.safetensors"
    assert (resumed / "checkpoint-8" / name).read_bytes() == (two_processes / "checkpoint-8" / name).read_bytes()


def tensors(folder: Path) -> dict:
    """All tensors of a folder's safetensors files, named by file and key."""
    files = {path: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    return {
        f"{path.relative_to(folder)}/{key}": tensor
        for path, content in files.items()
        for key, tensor in content.items()
    }


def assert_same_tensors(one: Path, other: Path) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= TOLERANCE


SHARDED = {"train_batch_size": 2, "num_processes": 2, "fsdp_enable": True}
FULL = {"model_type": "full", "use_ema": True, "learning_rate": 1e-3, "gradient_checkpointing": True}


def test_an_adapter_on_a_spread_denoiser_trains_as_on_a_whole_one(tmp_path, omnigen_folder, one_process):
    options = {"validation_disable": False, "validation_prompt": "a box", "validation_resolution": "64"}
    options |= {"validation_num_inference_steps": 2, "validation_step_interval": 8, "validation_guidance": 1.0}
    data = short_batches(tmp_path)
    spread = train(write_run(tmp_path, omnigen_folder, data, use_ema=True, **SHARDED, **options))
    assert_same_training(one_process, spread)
    assert_same_tensors(one_process / "checkpoint-8", spread / "checkpoint-8")
    assert list((spread / "validation_images").glob("*.png"))


@pytest.fixture(scope="module")
def full_in_one_process(tmp_path_factory, omnigen_folder) -> Path:
    folder = tmp_path_factory.mktemp("full")
    return train(write_run(folder, omnigen_folder, num_processes=1, train_batch_size=4, **FULL))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(SHARDED, marks=pytest.mark.ci),
        pytest.param(SHARDED | {"fsdp_reshard_after_forward": False}, marks=pytest.mark.ci),
        pytest.param(
            {**SHARDED, "num_processes": 4, "train_batch_size": 1, "fsdp_shard_size": 2}, marks=pytest.mark.ci
        ),
    ],
    ids=["all share one copy", "kept after the forward pass", "two copies"],
)
def test_full_training_of_a_spread_denoiser_gives_whole_checkpoints(
    tmp_path, omnigen_folder, full_in_one_process, layout
):
    spread = train(write_run(tmp_path, omnigen_folder, **FULL, **layout))
    for name in ("checkpoint-8", "pipeline", "ema/pipeline"):
        assert_same_tensors(full_in_one_process / name, spread / name)


@pytest.mark.ci
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, omnigen_folder, full_in_one_process):
    folder = write_run(tmp_path, omnigen_folder, **FULL, **SHARDED)
    train(folder, "--max_train_steps=4")
    alone = train(folder, "--num_processes=1", "--train_batch_size=4", "--fsdp_enable=false")
    assert_same_tensors(full_in_one_process / "checkpoint-8", alone / "checkpoint-8")


def test_sharding_with_one_process_is_refused(tmp_path, omnigen_folder):
    result = run_cli(write_run(tmp_path, omnigen_folder, num_processes=1, fsdp_enable=True), "train")
    assert result.returncode == 2
    assert "fsdp_enable" in result.stderr


BY_NORM = {"grad_clip_method": "norm", "max_grad_norm": 0.01}


def with_deepspeed(folder: Path, stage: int) -> Path:
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": "auto"}))
    return folder


@pytest.fixture(scope="module")
def clipped_by_norm(tmp_path_factory, omnigen_folder) -> Path:
    folder = tmp_path_factory.mktemp("norm")
    return train(write_run(folder, omnigen_folder, num_processes=1, train_batch_size=4, **BY_NORM))


@pytest.mark.ci
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_what_one_process_does_and_resumes(tmp_path, omnigen_folder, clipped_by_norm, stage):
    options = {"num_processes": 2, "deepspeed_config": "deepspeed.json", **BY_NORM}
    options |= {"validation_disable": False, "validation_prompt": "a box", "validation_resolution": "64"}
    options |= {"validation_num_inference_steps": 2, "validation_step_interval": 8, "validation_guidance": 1.0}
    folder = with_deepspeed(write_run(tmp_path, omnigen_folder, **options), stage)
    train(folder, "--max_train_steps=4")
    resumed = train(folder)
    assert list((resumed / "validation_images").glob("*.png"))
    assert_same_training(clipped_by_norm, resumed)
    assert_same_tensors(clipped_by_norm / "checkpoint-8", resumed / "checkpoint-8")


@pytest.mark.ci
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_all_weights_as_one_process_does(tmp_path, omnigen_folder, stage):
    options = {**FULL, **BY_NORM, "use_ema": False, "max_train_steps": 4}
    alone = train(write_run(tmp_path / "one", omnigen_folder, num_processes=1, train_batch_size=4, **options))
    options |= {"num_processes": 2, "deepspeed_config": "deepspeed.json"}
    spread = train(with_deepspeed(write_run(tmp_path / "two", omnigen_folder, **options), stage))
    for name in ("checkpoint-4/transformer", "pipeline"):
        mine, theirs = tensors(alone / name), tensors(spread / name)
        assert mine.keys() == theirs.keys()
        # No step has a reference image, and DeepSpeed decays weights that none uses.
        used = [key for key in mine if "input_image_proj" not in key]
        assert max(float((mine[key] - theirs[key]).abs().max()) for key in used) <= TOLERANCE


def test_a_deepspeed_file_that_says_what_config_json_says_is_refused(tmp_path, omnigen_folder):
    folder = write_run(tmp_path, omnigen_folder, num_processes=2, deepspeed_config="deepspeed.json", **BY_NORM)
    (folder / "deepspeed.json").write_text('{"zero_optimization": {"stage": 4}, "train_batch_size": 8}')
    result = run_cli(folder, "train")
    assert result.returncode == 2
    assert "train_batch_size is set in the DeepSpeed file" in result.stderr
    assert "zero_optimization.stage is 4" in result.stderr


def started(folder: Path) -> subprocess.Popen:
    """A run of two processes that would take minutes, once it has taken a step."""
    arguments = cli("train", "--max_train_steps=100000", "--checkpoint_step_interval=0")
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    record = folder / "output" / "metrics.jsonl"
    while not (record.is_file() and '"step_done"' in record.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def child_of_rank(launcher: subprocess.Popen, rank: int) -> int:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    found = [int(pid) for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    assert len(found) == 1
    return found[0]


def test_when_one_process_is_killed_all_end_and_the_reason_is_said(tmp_path, omnigen_folder):
    launcher = started(write_run(tmp_path, omnigen_folder, num_processes=2))
    victim, other = child_of_rank(launcher, 1), child_of_rank(launcher, 0)
    os.kill(victim, signal.SIGKILL)
    _, reported = launcher.communicate(timeout=300)  # by itself it would train for longer
    assert launcher.returncode == 137
    assert "process 1 of 2 was killed" in reported
    assert not Path(f"/proc/{other}").exists()


def test_when_the_launcher_is_killed_all_save_and_end(tmp_path, omnigen_folder):
    launcher = started(write_run(tmp_path, omnigen_folder, num_processes=2))
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.stderr is not None
    while "run_training" not in (line := launcher.stderr.readline()):  # where a process was when it was asked
        assert line
    launcher.kill()
    reported = launcher.stderr.read()  # the pipe closes when the last process has ended
    launcher.wait()
    assert "stopped by SIGTERM: saved" in reported
    assert len(list((tmp_path / "output").glob("checkpoint-*"))) == 1


@pytest.mark.ci
def test_sigterm_to_the_launcher_saves_once_and_leaves(tmp_path, omnigen_folder):
    launcher = started(write_run(tmp_path, omnigen_folder, num_processes=2))
    launcher.terminate()
    _, reported = launcher.communicate(timeout=300)
    assert launcher.returncode == 143, reported
    assert reported.count("stopped by SIGTERM") == 1
    saved = [path for path in (tmp_path / "output").iterdir() if path.name.startswith("checkpoint-")]
    assert len(saved) == 1
    state = json.loads((saved[0] / "training_state.json").read_text())["state"]
    assert saved[0].name == f"checkpoint-{state['global_step']}"


@pytest.mark.ci
def test_processes_that_generate_together_leave_their_images_together(tmp_path, omnigen_folder):
    options = {"validation_disable": False, "validation_prompt": "a box", "validation_resolution": "64"}
    options |= {"validation_num_inference_steps": 1000, "validation_step_interval": 1, "validation_guidance": 1.0}
    launcher = started(write_run(tmp_path, omnigen_folder, **SHARDED, **options, disable_benchmark=True))
    launcher.terminate()
    _, reported = launcher.communicate(timeout=300)
    assert launcher.returncode == 143, reported
    [saved] = metrics(tmp_path / "output", "checkpoint_saved")
    assert saved["step"] <= 3  # a thousand steps of each image would have taken longer


@pytest.mark.ci
def test_an_error_of_every_process_is_printed_once(tmp_path, omnigen_folder):
    folder = write_run(tmp_path, omnigen_folder, num_processes=2)
    for image in (folder / "images").glob("*.png"):
        image.write_bytes(b"no image")
    result = run_cli(folder, "train")
    assert result.returncode == 3
    assert result.stderr.count("images") >= 1
    assert result.stderr.count("to fix it") <= 1
    assert "Traceback" not in result.stderr + result.stdout


@pytest.mark.ci
def test_captions_are_encoded_once_by_either_process_and_the_run_is_that_of_one(tmp_path):
    from tests.tiny_sdxl import tiny_sdxl_folder

    model = tiny_sdxl_folder(tmp_path / "model")
    options = {"model_family": "sdxl", "max_train_steps": 2, "learning_rate": 1e-3}
    one = train(write_run(tmp_path / "one", model, train_batch_size=4, **options))
    two = train(write_run(tmp_path / "two", model, train_batch_size=2, num_processes=2, **options))
    assert_same_training(one, two)
    encoded = [
        [record["summary"] for record in metrics(output, "phase_done") if record["name"] == "caching captions"]
        for output in (one, two)
    ]
    # 7 + 2 + 3 captions, the empty one and the probe of the proof.
    assert encoded == [["14 encoded, 0 cached before"], ["7 encoded, 0 cached before"]]


@pytest.mark.ci
def test_references_offset_noise_strata_and_rollouts_are_those_of_one_process(tmp_path, omnigen_folder):
    """All of them are keyed by the index in the global batch, and the depth of a rollout for all processes together."""
    options = {
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.7,
        "offset_noise": True,
        "noise_offset_probability": 0.5,
        "input_perturbation": 0.1,
        "timestep_stratified": True,
        "loss_balance": "pixels",
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
    }
    before = {"dataset_type": "conditioning", "conditioning_type": "reference_strict", "instance_data_dir": "before"}
    outputs = []
    for name, layout in (("one", {"train_batch_size": 4}), ("two", {"train_batch_size": 2, "num_processes": 2})):
        for kind, seed in (("after", 1), ("before", 2)):
            write_images(tmp_path / name / kind, 7, seed=seed)
        data = [dataset("after", conditioning_data="before", random_flip=True), {"id": "before"} | before]
        outputs.append(train(write_run(tmp_path / name, omnigen_folder, data, **options, **layout)))
    assert_same_training(*outputs)
    depths = [[record["extra"]["rollout_depth"] for record in steps(output)] for output in outputs]
    assert depths[0] == depths[1]
    assert sum(depths[0]) > 0


@pytest.mark.ci
@pytest.mark.parametrize("layout", [{}, {"fsdp_enable": True, "model_type": "full"}], ids=["lora", "full, spread"])
@pytest.mark.parametrize("family", ["kolors", "hunyuan_dit"])
def test_two_processes_train_a_family_with_discrete_levels_as_one_does(tmp_path, family, layout):
    """One of Hunyuan-DiT's weights has a single row, of which one process then holds nothing."""
    model = TINY_FOLDERS[family](tmp_path / "model")
    options = {"model_family": family, "max_train_steps": 2, "learning_rate": 1e-3, "gradient_checkpointing": True}
    options |= {"model_type": layout.get("model_type", "lora")}
    one = train(write_run(tmp_path / "one", model, train_batch_size=4, **options))
    two = train(write_run(tmp_path / "two", model, train_batch_size=2, num_processes=2, **(options | layout)))
    if layout:  # Adam turns a gradient that is nearly zero into a whole step of either sign
        assert_same_steps(one, two)
    else:
        assert_same_training(one, two)
