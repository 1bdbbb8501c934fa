"""What `memory` chooses: against tensors of real steps, in order, and never what somebody wrote."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from simpletuner.adapters.build import attach_adapter
from simpletuner.config.loading import LoadedRun
from simpletuner.distributed.process_group import SINGLE_PROCESS
from simpletuner.errors import ConfigError
from simpletuner.hardware import GIB
from simpletuner.models.build import build_family
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training import fitting
from simpletuner.training.device_placement import place_denoiser
from simpletuner.training.gradient_checkpointing import GradientCheckpointing, MeasuredMemory
from simpletuner.training.planning import settings as planning
from simpletuner.training.planning.memory import Shapes, encode_bytes, may_keep_least, read_shapes
from simpletuner.training.planning.settings import (
    Choice,
    Cost,
    Room,
    choose_settings,
    with_activation_memory,
    with_settings,
)
from simpletuner.training.planning.shapes import BackwardPeaks, PeakBytes, empty_batch, num_bytes
from simpletuner.training.prepare import read_datasets
from simpletuner.training.process import Process
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from simpletuner.training.step import compute_losses
from tests.runs import dataset, load_here, metrics, train_here, weights_of, write_images, write_run
from tests.tiny import tiny_omnigen_folder
from tests.tiny_z_image import tiny_z_image_folder
from tests.toy import Recorder

LARGE = 10**12
MEASURED: dict[str, Shapes] = {}
LORA = {"lora_type": "standard", "lycoris_config": None, "lora_rank": 4}


def write(folder: Path, model: Path, written: dict[str, Any] | None = None, **options: Any) -> Path:
    """A run with `memory` whose options on memory are not written, but for `written`."""
    write_images(folder / "images", 4, seed=1, side=128)
    options = {"memory": "auto", "resolution": 128, "max_train_steps": 4, **LORA, **options}
    write_run(folder, model, [dataset("images", resolution=128)], **options)
    config = json.loads((folder / "config.json").read_text())
    del config["gradient_checkpointing"]
    (folder / "config.json").write_text(json.dumps(config | (written or {}), indent=1))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_omnigen_folder(tmp_path_factory.mktemp("wide") / "model", hidden_size=128, num_layers=6)


@pytest.fixture(autouse=True)
def _measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a configuration keeps is the same in all tests, and takes half a second to measure."""

    def measured(loaded: LoadedRun, *given: Any) -> Shapes:
        key = str(loaded.config).replace(str(tmp_path), "")
        if key not in MEASURED:
            MEASURED[key] = read_shapes(loaded, *given)
        return MEASURED[key]

    monkeypatch.setattr(planning, "read_shapes", measured)


def choose(loaded: LoadedRun, device: int, main: int | None = None) -> Choice:
    family = build_family(loaded.config)
    return choose_settings(loaded, family, read_datasets(loaded, family), Room(device, main, device))


def taken(loaded: LoadedRun) -> int:
    """Bytes of all tensors at the peak of real steps: weights, gradients, optimizer, what is kept and made."""
    family = build_family(loaded.config)
    denoiser = family.load_base()
    adapter = attach_adapter(loaded, family, denoiser)
    place_denoiser(loaded.config, family, denoiser, adapter, SINGLE_PROCESS)
    may_least = may_keep_least(loaded)
    if (recomputing := GradientCheckpointing.of(loaded.config, family.device, may_keep_least=may_least)) is not None:
        denoiser.enable_gradient_checkpointing(recomputing)
        if recomputing.room is not None:  # as a run does that finds so little free
            recomputing.room.free_bytes = lambda: 0  # type: ignore[method-assign]
    denoiser.train()
    held = num_bytes((*denoiser.parameters(), *denoiser.buffers()))
    optimizer = build_optimizer(loaded.config.optimizer, adapter.trainable_parameters(), 0)
    embeds = family.encode_prompts(["picture 0 of set 1"] * 2)
    with PeakBytes() as made:
        for _ in range(3):
            batch = empty_batch(family, 128, 128, embeds)
            noise, middle = torch.zeros_like(batch.latents), torch.full((2,), 0.5, dtype=torch.float64)
            made.peak = made.alive  # the first steps measure, and make the state of the optimizer
            compute_losses(family, denoiser, batch, noise, middle).weighted_sum.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if recomputing is not None:
                recomputing.after_step()
    return held + made.peak


@pytest.fixture(scope="module")
def plain_peak(model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    folder = write(
        tmp_path_factory.mktemp("plain") / "run", model, {"gradient_checkpointing": False, "activation_memory": "high"}
    )
    return taken(load_here(folder))


@pytest.mark.parametrize("share", [1.05, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.8, 0.6, 0.4))])
def test_a_plan_holds_under_each_share_of_the_plain_peak_or_says_what_is_missing(
    share: float, model: Path, plain_peak: int, tmp_path: Path
) -> None:
    loaded = load_here(write(tmp_path / "run", model))
    limit = int(share * plain_peak)
    choice = choose(loaded, limit)
    measured = taken(with_settings(loaded, choice.settings))
    if choice.lacking:
        [problem] = choice.lacking
        assert measured > limit
        assert "more than the" in problem.message
    else:
        assert measured <= limit * 1.05
    assert (choice.settings.get("activation_memory") == "high") is (share > 1)


def test_the_first_way_that_fits_is_taken_in_the_order_of_what_they_cost(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_here(write(tmp_path / "run", model))
    costs = {  # a GPU with main memory of its own; the keys are what each way adds
        "high": 100, "low": 97, "lowest": 95, "auto": 90, "unsloth": 80, "int8 auto": 70, "int8 unsloth": 60,
        "swap 1": 55, "swap 2": 50, "swap 3": 45, "swap 4": 40, "swap 5": 35, "swap 6": 30,
    }  # fmt: skip

    def name_of(loaded: LoadedRun) -> str:
        config = loaded.config
        if config.model.musubi_blocks_to_swap:
            assert config.model.gradient_checkpointing_interval is None
            return f"swap {config.model.musubi_blocks_to_swap}"
        if not config.model.gradient_checkpointing:
            return config.model.activation_memory
        int8 = "int8 " if config.precision.base_model_precision == "int8-quanto" else ""
        return int8 + ("unsloth" if config.model.gradient_checkpointing_backend == "unsloth" else "auto")

    monkeypatch.setattr(planning._Training, "cost", lambda self, loaded: Cost(costs[name_of(loaded)]))
    training = stage_of(loaded)
    for way, size in costs.items():
        training.room = Room(size, LARGE, size)
        choice = training.choose()
        assert name_of(with_settings(loaded, choice.settings)) == way
        assert not choice.lacking
    training.room = Room(27, LARGE, 27)
    short = training.choose()
    [problem] = short.lacking
    assert problem.message.endswith("3 bytes more than the 27 bytes planned")
    reasons = [line for line in short.lines if "does not fit" in line]
    assert len(reasons) == 7  # of the ways that swap blocks, the last one counts
    assert reasons[0].endswith("with gradient_checkpointing false, activation_memory high, which takes 100 bytes")


def test_what_somebody_wrote_stays_and_is_named_where_it_is_in_the_way(model: Path, tmp_path: Path) -> None:
    loaded = load_here(write(tmp_path / "run", model, {"gradient_checkpointing": False}))
    plain = choose(loaded, LARGE)
    assert "gradient_checkpointing" not in plain.settings
    choice = choose(loaded, 10_000_000)
    assert "gradient_checkpointing" not in choice.settings
    [problem] = choice.lacking
    assert problem.key == "memory"
    assert problem.fix is not None
    assert problem.fix.startswith("remove gradient_checkpointing (config.json:")


@pytest.mark.slow
@pytest.mark.parametrize(
    "written", [{"gradient_checkpointing_interval": "2"}, {"enable_group_offload": True}, {"dynamo_backend": "eager"}]
)
def test_no_choice_contradicts_what_is_written(written: dict[str, Any], model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model, written)
    loaded = load_here(folder)
    training = stage_of(loaded)
    for device in (LARGE, 0):
        training.room = Room(device, LARGE, device)
        chosen = dict(training.choose().settings)
        assert not chosen.keys() & written.keys()
        load_here(folder, *(f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in chosen.items()))


def test_main_memory_is_counted(model: Path, tmp_path: Path) -> None:
    loaded = load_here(write(tmp_path / "run", model))
    training = stage_of(loaded)
    settings, cost = list(training.try_ways(loaded))[-1]
    assert settings["musubi_blocks_to_swap"] == 6
    # The six blocks have 9 squares of 128 x 128 weights each, which are read in float32 before they are packed.
    assert cost.main > 6 * 9 * 128 * 128 * 4
    training.room = Room(cost.device, cost.main, 0)
    assert not training.choose().lacking
    training.room = Room(cost.device, cost.main - 1024, 0)
    [problem] = training.choose().lacking
    assert problem.message.endswith(": 1.0 KiB of main memory more than there is")


def stage_of(loaded: LoadedRun) -> planning._Training:
    """Training alone, on a GPU without any room."""
    family = build_family(loaded.config)
    return planning._Training(loaded, family, read_datasets(loaded, family), Room(0, LARGE, 0), None)


def test_the_vae_gets_smaller_batches_and_then_tiles(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_here(write(tmp_path / "run", model, vae_batch_size=6))
    tried = []

    def peak(family: Any, height: int, width: int, batch_size: int) -> int:
        tried.append((height, width, batch_size, family.vae_modes))
        return 100 * batch_size // (1 + len(family.vae_modes))

    monkeypatch.setattr(planning, "encode_bytes", peak)
    monkeypatch.setattr(planning._Training, "cost", lambda self, loaded: Cost(0))
    assert choose(loaded, 350).settings.get("vae_batch_size") is None  # it is written: see below
    unwritten = planning.without(loaded, ["vae_batch_size"])
    assert choose(unwritten, 399).settings["vae_batch_size"] == 2
    tiled = choose(unwritten, 60).settings
    assert (tiled["vae_batch_size"], tiled["vae_enable_tiling"]) == (1, True)
    assert (128, 128, 1, ("tiling",)) in tried
    assert choose(unwritten, 40).lacking[0].message.startswith("the VAE takes 50 bytes at least")


def test_validation_images_of_the_largest_size_are_decoded_beside_what_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = {"validation_disable": False, "validation_prompt": "a star", "validation_resolution": "64x64,128x64"}
    loaded = load_here(write(tmp_path / "run", model, **validation))
    monkeypatch.setattr(planning, "encode_bytes", lambda *given: 0)
    monkeypatch.setattr(planning, "decode_bytes", lambda family, height, width: 10 * height * width)
    family = build_family(loaded.config)
    stage = planning._Vae(loaded, family, read_datasets(loaded, family), Room(0, None, 0), 7)
    assert stage.cost(loaded) == Cost(10 * 128 * 64 + 7)


def test_images_that_are_encoded_on_demand_take_their_memory_beside_the_steps(model: Path, tmp_path: Path) -> None:
    """A thread encodes the next images while a step is taken."""
    folder = write(tmp_path / "run", model)
    before = stage_of(load_here(folder)).cost(load_here(folder))
    data = json.loads((folder / "multidatabackend.json").read_text())
    (folder / "multidatabackend.json").write_text(json.dumps([{**data[0], "vae_cache_ondemand": True}]))
    loaded = load_here(folder)
    encoding = encode_bytes(build_family(loaded.config), 128, 128, loaded.config.data.vae_batch_size)
    assert encoding > 0
    assert stage_of(loaded).cost(loaded).device == before.device + encoding


@pytest.mark.slow
def test_text_encoders_are_packed_where_they_do_not_fit(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", tiny_z_image_folder(tmp_path / "model"), model_family="z_image")
    loaded = load_here(folder)
    family = build_family(loaded.config)
    datasets = read_datasets(loaded, family)
    whole = planning.text_cost(loaded, family, datasets)
    assert whole is not None
    assert whole.cost is not None

    def chosen(device: int) -> Any:
        return planning._Captions(loaded, family, datasets, Room(device, LARGE, device), whole).choose()

    assert chosen(whole.cost.peak_bytes).settings == {}
    packed = chosen(whole.cost.peak_bytes - 1)
    assert packed.settings == {"text_encoder_1_precision": "int8-quanto"}
    assert not packed.lacking
    assert chosen(0).lacking[0].message.startswith("encoding captions takes")


def rooms(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    monkeypatch.setattr(fitting.Room, "of", classmethod(lambda cls, memory, device: room))


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_before_anything_is_encoded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "run", model)
    rooms(monkeypatch, Room(1000, None, 1000))
    with pytest.raises(ConfigError) as caught:
        train_here(folder)
    assert {problem.key for problem in caught.value.problems} == {"memory"}
    assert not list((folder / "cache").rglob("*.safetensors"))
    assert not list((folder / "output").glob("checkpoint-*"))


def test_a_run_gets_what_was_chosen_and_torch_is_kept_within_the_limit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_here(write(tmp_path / "run", model))
    rooms(monkeypatch, Room(900, None, 1000))
    monkeypatch.setattr(fitting, "choose_settings", lambda *given: Choice({"activation_memory": "lowest"}, ("a line",)))
    limits: list[tuple[int, str]] = []
    monkeypatch.setattr(fitting, "keep_within", lambda limit, device: limits.append((limit, device.type)))
    recorder = Recorder()
    family: Any = SimpleNamespace(device=torch.device("cpu"))
    process = Process(guard=FolderGuard(tmp_path), bus=EventBus([recorder]), stop=StopRequest())
    fitted, limit = fitting.fit_into_memory(loaded, family, [], process)
    assert limit == 1000
    assert limits == [(1000, "cpu")]
    assert fitted.config.model.activation_memory == "lowest"
    assert fitted.origin("activation_memory").kind == "memory"
    assert [notice.text for notice in recorder.of(Notice)] == ["memory: a line"]


def test_a_resume_keeps_what_its_checkpoint_was_trained_with_where_that_decides_results(
    model: Path, tmp_path: Path
) -> None:
    loaded = load_here(write(tmp_path / "run", model, {"vae_batch_size": 2}))
    saved = {"base_model_precision": "int8-quanto", "vae_batch_size": 1, "activation_memory": "lowest"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    kept = planning.keep_choice(loaded, tmp_path).config
    assert kept.precision.base_model_precision == "int8-quanto"
    assert kept.data.vae_batch_size == 2  # somebody wrote it
    assert kept.model.activation_memory == loaded.config.model.activation_memory  # gives the same bits
    assert planning.keep_choice(loaded, None) is loaded


def test_gradients_of_weights_are_not_counted_among_the_activations() -> None:
    layer = torch.nn.Linear(4, 8, bias=False)
    with BackwardPeaks(layer) as peaks:
        layer.weight.grad = torch.zeros(8, 4)  # 128 bytes, which stay
        peaks.begin(layer)
        held = torch.zeros(10)
        peaks.begin(None)
    assert peaks.of[layer] == held.nbytes == 40


@pytest.mark.slow
def test_a_resumed_run_keeps_the_precision_that_was_chosen_and_gives_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms(monkeypatch, Room(6_500_000, None, LARGE))
    limits: list[int] = []  # of later tests, memory is as it was
    monkeypatch.setattr(fitting, "keep_within", lambda limit, device: limits.append(limit))
    straight = train_here(write(tmp_path / "straight", model))
    saved = json.loads((straight / "checkpoint-4" / "config.json").read_text())
    assert saved["base_model_precision"] == "int8-quanto"
    assert limits == [LARGE]
    folder = write(tmp_path / "resumed", model)
    train_here(folder, "--max_train_steps=2")
    rooms(monkeypatch, Room(LARGE, None, LARGE))  # there is more memory now
    resumed = train_here(folder)
    assert weights_of(resumed / "checkpoint-4") == weights_of(straight / "checkpoint-4")
    assert [row["loss"] for row in metrics(resumed, "step_done")] == [
        row["loss"] for row in metrics(straight, "step_done")
    ]


def test_measured_steps_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 bytes may be taken and 700 were at the peak: 300 are free, however many the machine has."""
    monkeypatch.setattr("simpletuner.training.gradient_checkpointing.peak_bytes", lambda: 700)
    assert MeasuredMemory(torch.device("cpu"), 1000).free_bytes() == 300
    assert MeasuredMemory(torch.device("cpu"), 10**15).free_bytes() <= psutil.virtual_memory().total
    room = MeasuredMemory(torch.device("cpu"), 1000)
    for _ in range(2):
        for index in range(3):
            _, count = room.ask(index, (torch.zeros(10, 5),), torch.nn.Tanh())
            if count is not None:
                with count:
                    torch.zeros(10, 5, requires_grad=True).exp()
        lines = room.after_step()
    # 270 of 300 bytes and the 200 that were measured hold two blocks of 200.
    assert lines == [
        "memory: 300 bytes were free at the peak of the first step of this size; from now on 1 of 3 blocks are "
        "recomputed"
    ]


def test_what_blocks_keep_follows_the_device_where_nobody_wrote_it(model: Path, tmp_path: Path) -> None:
    loaded = load_here(write(tmp_path / "free", model))
    for device, level in (("cpu", "high"), ("cuda", "low")):
        found = with_activation_memory(loaded, torch.device(device))
        assert found.config.model.activation_memory == level
        assert not planning.is_written(found, "activation_memory")  # so that `memory` may choose another
    written = load_here(write(tmp_path / "written", model, {"activation_memory": "low"}))
    assert with_activation_memory(written, torch.device("cpu")) is written


@pytest.mark.parametrize("written", [{}, {"activation_memory": "low"}])
def test_a_run_logs_what_its_device_decided_and_not_what_somebody_wrote(
    written: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "run", model, written, memory=None, max_train_steps=1)
    output = train_here(folder)
    texts = [row["text"] for row in metrics(output, "notice") if row["text"].startswith("activation_memory")]
    assert texts == ([] if written else ["activation_memory: high, the default on a CPU"])


@pytest.mark.parametrize(("share", "num_recomputed"), [(5.0, 0), (0.0, 5)])
def test_auto_lets_blocks_keep_least_before_it_forgets_whole_ones(
    share: float, num_recomputed: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the block that was measured, room for 4.5 is room for all five that keep least; bits stay the same."""
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 0)
    auto = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto"}
    loaded = with_activation_memory(load_here(write(tmp_path / "run", model, auto)), torch.device("cuda"))
    family = build_family(loaded.config)
    denoiser = family.load_base()
    adapter = attach_adapter(loaded, family, denoiser)
    recomputing = GradientCheckpointing.of(loaded.config, family.device, may_keep_least=may_keep_least(loaded))
    assert recomputing is not None
    room = recomputing.room
    assert room is not None
    counts: list[int] = []

    def free() -> int:
        counts.append(max(room._counted.values()))
        return int(share * counts[0])

    monkeypatch.setattr(room, "free_bytes", free)
    denoiser.enable_gradient_checkpointing(recomputing)
    denoiser.train()
    found, lines = [], []
    for _ in range(4):
        torch.manual_seed(0)
        batch = empty_batch(family, 64, 64, family.encode_prompts(["a star"]))
        middle = torch.full((1,), 0.5, dtype=torch.float64)
        compute_losses(family, denoiser, batch, torch.ones_like(batch.latents), middle).weighted_sum.backward()
        parameters = adapter.trainable_parameters().values()
        found.append([each.grad.clone() for each in parameters if each.grad is not None])
        denoiser.zero_grad(set_to_none=True)
        lines += recomputing.after_step()
    assert lines == [
        "memory: not all blocks fit with what they keep; with activation_memory lowest they are measured again"
    ]
    assert counts[1] < 0.8 * counts[0]
    assert sum(room.recomputes.values()) == num_recomputed
    levels = [getattr(layer, "_activation_memory") for layer in denoiser.layers]  # noqa: B009 - private
    assert levels == ["high"] * num_recomputed + ["lowest"] * (6 - num_recomputed)
    for again in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(again, found[0], strict=True))


@pytest.mark.parametrize(
    "written", [{"activation_memory": "low"}, {"dynamo_backend": "eager"}, {"gradient_checkpointing_interval": "2"}]
)
def test_auto_changes_nothing_of_what_blocks_keep_where_that_is_decided(
    written: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    auto = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto"}
    assert may_keep_least(load_here(write(tmp_path / "free", model, auto)))
    assert not may_keep_least(load_here(write(tmp_path / "written", model, auto | written)))


def test_inputs_go_to_main_memory_where_all_blocks_are_recomputed_and_a_step_still_fails() -> None:
    recomputing = GradientCheckpointing(torch.device("cpu"), may_offload=True)
    assert not recomputing.recompute_more()  # a CPU has no other memory
    recomputing.may_offload = True
    assert recomputing.recompute_more()
    assert recomputing.offloading is not None
    assert not recomputing.recompute_more()


def test_a_number_is_all_that_a_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "device_memory", lambda device: 20 * GIB)
    held = psutil.Process().memory_info().rss
    cpu = Room.of("8", torch.device("cpu"))
    assert cpu.main is None
    assert cpu.limit == pytest.approx(8 * GIB, rel=0.01)
    assert cpu.device == pytest.approx(0.94 * (8 * GIB - held), rel=0.02)
    gpu = Room.of("8", torch.device("cuda"))
    assert gpu.limit == 8 * GIB - round(0.6 * GIB)
    assert gpu.main is not None
    assert Room.of("auto", torch.device("cuda")).limit == 20 * GIB
    assert Room.of("100", torch.device("cuda")).limit == 20 * GIB
    assert Room.of_other("8", 24 * GIB).device == int(0.94 * (8 * GIB - round(0.6 * GIB)))


@pytest.mark.parametrize("value", ["0", "-3", "much", "nan"])
def test_memory_is_auto_or_a_number_of_gb(value: str, model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model)
    with pytest.raises(ConfigError) as caught:
        load_here(folder, f"--memory={value}")
    assert caught.value.problems[0].key == "memory"
    assert load_here(folder, "--memory=7.5").config.model.memory == "7.5"
    assert load_here(folder, "--memory=AUTO").config.model.memory == "auto"


def test_processes_that_share_the_weights_are_not_planned_for(model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", model, {"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match="divides the weights among the processes"):
        load_here(folder, "--fsdp_enable=true", "--num_processes=2")
