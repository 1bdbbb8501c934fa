"""`simpletuner plan` against what really happens in tiny runs: weights, saved tensors, optimizer, checkpoints."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from safetensors import safe_open
from torch import nn

from simpletuner.adapters.build import attach_adapter
from simpletuner.commands import plan as planning
from simpletuner.commands import probe
from simpletuner.commands.probe import StepTimes
from simpletuner.commands.text import short_count
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.errors import bytes_text
from simpletuner.models.build import build_family
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.training.disk_space import check_disk_space
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.planning import memory
from simpletuner.training.planning.memory import Row, activation_rows, mix_that_fits, swapped_out
from simpletuner.training.planning.shapes import (
    Activations,
    Load,
    PeakBytes,
    SavedBytes,
    empty_batch,
    num_bytes,
    optimizer_bytes,
    step_bytes,
)
from simpletuner.training.step import compute_losses
from tests.configs import config_of
from tests.runs import dataset, load_here, train_here, write_images, write_run

# Of the released OmniGen, whose shapes these are.
RELEASED = {
    "hidden_size": 3072,
    "num_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
    "pos_embed_max_size": 192,
    "time_step_dim": 256,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [3.0] * 48},
}


@pytest.fixture
def folder(tmp_path: Path, omnigen_folder: Path) -> Path:
    return write_run(tmp_path / "run", omnigen_folder)


def tensor_bytes(paths) -> int:
    total = 0
    for path in paths:
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a dict
    return total


def rows(found) -> dict[str, int]:
    return {row.name: row.num_bytes for row in (*found.memory, *found.disk)}


def test_weights_are_counted_from_shapes_alone(folder, omnigen_folder, monkeypatch):
    monkeypatch.setattr("simpletuner.models.omnigen.family.OmniGen.load_denoiser", lambda self: pytest.fail("loaded"))
    found = planning.make_plan(load_here(folder), probe=False)
    in_file = tensor_bytes((omnigen_folder / "transformer").glob("*.safetensors"))
    assert in_file <= rows(found)["frozen weights"] < in_file + 64  # and a small buffer that is not saved
    assert found.parameters < rows(found)["frozen weights"] / 4  # the table of positions is no parameter


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_planned(folder):
    arguments = ("--use_ema=true", "--max_train_steps=2")
    found = planning.make_plan(load_here(folder, *arguments), probe=False)
    output = train_here(folder, *arguments)
    [planned] = [name for name in rows(found) if "checkpoint" in name]
    [checkpoint] = output.glob("checkpoint-*")
    written = tensor_bytes(checkpoint.rglob("*.safetensors"))
    # Alphas and step counters are in the file and not among the trained weights.
    assert rows(found)[planned] == pytest.approx(written, rel=0.02)
    assert planned.startswith("1 checkpoint of")
    assert rows(found)["trained weights"] * 2 == rows(found)["final weights"]


def test_the_start_asks_for_no_room_that_the_plan_does_not_count(folder, monkeypatch):
    """What earlier runs take is counted beside it, with the command that deletes it."""
    output = Path(load_here(folder).config.checkpoint.output_dir)
    (output / "earlier-runs/1-ab").mkdir(parents=True)
    (output / "earlier-runs/1-ab/weights").write_bytes(bytes(3000))
    found = planning.make_plan(load_here(folder), probe=False)
    assert f"2.9 KiB of 1 earlier run in {output}; to delete: rm -r {output}/earlier-runs" in found.notes
    asked = []
    monkeypatch.setattr(
        "simpletuner.training.disk_space.require_free_space", lambda path, size, what: asked.append(size)
    )
    check_disk_space(load_here(folder), {})
    assert asked == [rows(found)["logs, report and images"]]
    assert sum(asked) < found.disk_bytes


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_activations_from_shapes_are_those_that_a_real_pass_saves(folder, is_checkpointed):
    loaded = load_here(folder)
    family = build_family(loaded.config)
    load, embeds = Load(2, 64, 64), family.encode_prompts(["a short one", "a somewhat longer caption"])
    planned = planning.read_shapes(loaded, family, load, embeds).activations

    denoiser = family.load_denoiser()
    attach_adapter(loaded, family, denoiser)
    denoiser.train()
    if is_checkpointed:
        denoiser.enable_gradient_checkpointing()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = empty_batch(family, 64, 64, embeds)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_losses(family, denoiser, batch, torch.zeros(2, 4, 8, 8), torch.full((2,), 0.5, dtype=torch.float64))
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    if not is_checkpointed:
        assert planned.outside + sum(planned.inside) == pytest.approx(real, rel=0.05)
    else:  # a real pass keeps the blocks' inputs outside of these hooks, and the inside of a block only later
        assert real < planned.peak(range(2)) < planned.peak()


@pytest.mark.parametrize("large", [0, 1 << 20])
@pytest.mark.parametrize("recomputed", [0, 1])
def test_the_peak_from_shapes_is_the_most_that_the_tensors_of_a_real_step_take(folder, recomputed, large, monkeypatch):
    """With tensors that are kept, and with those that are made again."""
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", large)
    loaded = load_here(folder)
    family = build_family(loaded.config)
    embeds = family.encode_prompts(["a short one", "a somewhat longer caption"])
    planned = planning.read_shapes(loaded, family, Load(2, 128, 128), embeds).activations
    denoiser = family.load_denoiser()
    adapter = attach_adapter(loaded, family, denoiser)
    denoiser.train()
    if recomputed:
        denoiser.enable_gradient_checkpointing(GradientCheckpointing(family.device))
    starts = []
    with PeakBytes() as made:
        for _ in range(3):  # in the first pass nobody knows which block is the last
            starts.append(made.alive)
            batch = empty_batch(family, 128, 128, embeds)
            middle, noise = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, 4, 16, 16)
            made.peak = made.alive
            compute_losses(family, denoiser, batch, noise, middle).weighted_sum.backward()
            denoiser.zero_grad(set_to_none=True)
    assert starts[1] == pytest.approx(starts[2], abs=1000)  # nothing of a step outlives it
    gradients = num_bytes(adapter.trainable_parameters().values())
    assert planned.peak(range(recomputed)) == pytest.approx(made.peak, abs=gradients, rel=0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16"])
def test_the_state_of_the_optimizer_is_what_it_keeps(name):
    parameters = {f"p{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate([(64, 48), (64,), (3, 700, 300)])}
    dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
    parameters = {key: nn.Parameter(value.detach().to(dtype)) for key, value in parameters.items()}
    planned = optimizer_bytes(parameters, lambda tried: build_optimizer(OptimizerOptions(optimizer=name), tried))
    optimizer = build_optimizer(OptimizerOptions(optimizer=name), parameters)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    assert planned == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", 0),  # one fused call, in place
        ("torch-adadelta", 2 * 5 * 4 * 64 * 256),  # the delta and the deviation of all weights at once
        ("torch-rmsprop", 5 * 4 * 64 * 256),  # the root of the average
        ("adafactor", 5 * 4 * 64 * 256),  # the update of each weight, and sums of its rows and columns
        ("bnb-adamw8bit", 0),
    ],
)
def test_what_a_step_of_the_optimizer_makes_besides_its_state_is_counted(name: str, expected: int) -> None:
    """Five weights of 64 x 256 in float32."""
    weights = {f"p{index}": nn.Parameter(torch.zeros(64, 256, device="meta")) for index in range(5)}
    made = step_bytes(weights, lambda tried: build_optimizer(OptimizerOptions(optimizer=name), tried))
    assert made == pytest.approx(expected, rel=0.05)


def test_weights_of_one_shape_and_two_dtypes_make_what_each_dtype_makes() -> None:
    """adamw_bf16 copies weights and two averages of bfloat16 to float32; weights of float32 it writes in place."""

    def made(dtypes: dict[str, torch.dtype]) -> int:
        weights = {name: nn.Parameter(torch.zeros(64, 256, dtype=dtypes[name], device="meta")) for name in dtypes}
        return step_bytes(weights, lambda tried: build_optimizer(OptimizerOptions(optimizer="adamw_bf16"), tried))

    wide = dict.fromkeys("abcd", torch.float32)
    narrow = dict.fromkeys("efgh", torch.bfloat16)
    assert made(wide) == 0
    assert made(wide | narrow) >= 4 * 3 * 4 * 64 * 256


def test_a_plan_has_room_for_the_step_of_the_optimizer_where_the_activations_leave_too_little() -> None:
    with patch.object(memory, "activation_rows", lambda *given: (memory.Row("activations", 300), [])):
        shapes = memory.Shapes(1, 0, {}, 0, 0, MagicMock(), 0, update=1000)
        family = MagicMock(number_formats=MagicMock(base="no_change"))
        loaded = MagicMock(config=config_of(optimizer="came", mixed_precision="no"))
        rows, _ = memory.memory_rows(loaded, family, shapes, 0, 10**6)
    assert [(row.name, row.num_bytes) for row in rows] == [
        ("activations", 300),
        ("a step of came, beyond the activations", 700),
    ]


@pytest.mark.slow
def test_a_model_of_billions_is_planned_without_its_weights(folder, tmp_path, omnigen_folder):
    model = shutil.copytree(omnigen_folder, tmp_path / "released")
    config = json.loads((model / "transformer/config.json").read_text())
    (model / "transformer/config.json").write_text(json.dumps(config | RELEASED))
    for weights in (model / "transformer").glob("*.safetensors"):
        weights.unlink()
    arguments = [f"--pretrained_model_name_or_path={model}", "--mixed_precision=bf16", "--resolution=1024"]
    found = planning.make_plan(load_here(folder, *arguments))
    assert found.parameters == 3_762_072_592
    assert rows(found)["frozen weights"] == pytest.approx(2 * (found.parameters + 192 * 192 * 3072), rel=1e-6)
    assert found.seconds is None
    assert any("time was not measured" in note for note in found.notes)


def test_where_a_step_is_cheap_it_is_measured_and_nothing_is_written(folder):
    said: list[str] = []
    found = planning.plan(load_here(folder), said.append)
    assert found.seconds is not None
    assert all(0 < seconds < 600 for seconds in found.seconds)
    assert not (folder / "output").exists()
    text = "\n".join(said)
    assert "8 steps" in text
    assert "time was measured on cpu" in text
    assert "time was not measured: --no-probe" in "\n".join(
        planning.plan_lines(planning.make_plan(load_here(folder), probe=False))
    )


def test_another_machines_gpu_is_compared_with_and_nothing_is_timed(folder, monkeypatch):
    devices, choose = [], planning.with_activation_memory
    monkeypatch.setattr(
        planning,
        "with_activation_memory",
        lambda loaded, device: (devices.append(str(device)), choose(loaded, device))[1],
    )
    here = planning.make_plan(load_here(folder), probe=False)
    there = planning.make_plan(load_here(folder), probe=True, other_gpu=8 << 30)
    assert devices == ["cpu", "cuda"]
    assert there.available == 8 << 30
    assert there.model.endswith("on a GPU with 8.0 GiB")
    assert rows(there) == rows(here)
    assert there.seconds is None
    assert "time was not measured: the run trains on another machine" in there.notes


def test_full_training_trains_every_parameter(folder):
    data = json.loads((folder / "multidatabackend.json").read_text())[:1]
    (folder / "multidatabackend.json").write_text(json.dumps(data))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "full"}
    del config["lycoris_config"]
    (folder / "config.json").write_text(json.dumps(config))
    found = planning.make_plan(load_here(folder), probe=False)
    assert found.trained == found.parameters > 0
    assert "frozen weights" not in rows(found)


def test_numbers_read_well():
    assert [bytes_text(n) for n in (0, 1023, 1536, 7.5 * 2**30, 2**41)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "7.5 GiB",
        "2.0 TiB",
    ]
    assert [short_count(n) for n in (12, 45e3, 3.762e9)] == ["12", "45.00 k", "3.76 B"]


@pytest.mark.slow
def test_references_take_as_much_as_their_images(tmp_path: Path, omnigen_folder: Path):
    write_images(tmp_path / "after", 3, seed=1, side=256)
    write_images(tmp_path / "before", 3, seed=2, side=256)
    before = {"id": "before", "instance_data_dir": "before", "dataset_type": "conditioning"}
    before["conditioning_type"] = "reference_strict"
    edit = [dataset("after", conditioning_data="before", resolution=256), before]
    counted = {}
    for name, entries in (("plain", [dataset("after", resolution=256)]), ("edit", edit)):
        write_run(tmp_path, omnigen_folder, entries)
        found = planning.make_plan(load_here(tmp_path), probe=name == "edit")
        counted[name] = next(size for row, size in rows(found).items() if row.startswith("activations"))
    # Twice the image tokens, and one mask for all layers, which counts in a model so narrow; attention keeps no
    # matrix of pairs.
    assert 1.6 < counted["edit"] / counted["plain"] < 2.4
    assert "with a reference of 256x256" in found.notes[0]
    assert found.seconds is not None


def test_passes_of_rollouts_are_counted_and_not_for_regularisation():
    plain, prior = Load(1, 64, 64), Load(1, 64, 64, is_regularisation=True)
    times = StepTimes({plain: 3.0, prior: 4.0}, {plain: 1.0, prior: 1.0}, 0.5, None)
    loads = Counter({plain: 3, prior: 1})
    assert planning.seconds_per_step(loads, times, 1) == pytest.approx((3 * 3.0 + 4.0) / 4 + 0.5)
    assert planning.seconds_per_step(loads, times, 2, 1.5) == pytest.approx(2 * (3 * 4.5 + 4.0) / 4 + 0.5)


def test_a_plan_with_scheduled_sampling_says_how_many_passes_it_adds(folder):
    arguments = (
        "--scheduled_sampling_max_step_offset=3",
        "--scheduled_sampling_probability=0.5",
        "--max_train_steps=4",
    )
    found = planning.make_plan(load_here(folder, *arguments), probe=True)
    assert "scheduled sampling adds 1.0 passes without gradients to a batch, on average" in found.notes


def test_the_peak_of_recomputed_blocks_on_hand_numbers() -> None:
    kept = Activations(outside=1000, inside=(10, 20, 30), inputs=(1, 2, 3), num_tokens=0)
    assert kept.peak() == 1060
    assert kept.peak(range(3)) == 1000 + 6 + 30  # at the last block, where nothing is freed yet
    assert kept.peak(range(2)) == 1000 + 3 + 30
    assert kept.peak([2]) == 1000 + 10 + 20 + 3 + 30
    assert kept.peak(range(2), offloads_inputs=True) == 1000 + 30 + 2 * 3  # two inputs may be on their way
    working = replace(kept, working=(100, 5, 7), working_outside=4)
    assert working.peak() == 1000 + 10 + 100  # in the backward pass of the first block
    assert replace(kept, working=(0, 0, 7), working_outside=50).peak() == 1060 + 50
    assert replace(kept, working=(0, 0, 7)).peak(range(3)) == 1000 + 6 + 30 + 7
    # What tracing lets go at the end of a block is there until then: beside what the blocks before it keep.
    making = replace(kept, making=(15, 25, 90))
    assert making.peak() == 1000 + 10 + 20 + 90
    assert making.peak(range(3)) == 1000 + 6 + 90


@pytest.mark.parametrize(("free", "recomputed"), [(0, 3), (199, 3), (1_000, 0), (360, 2), (471, 1)])
def test_the_planned_mix_is_what_a_run_measures(free: int, recomputed: int) -> None:
    """The first step takes 203 bytes: one block keeps its own 100, three their inputs, the last one computes again."""
    kept = Activations(outside=0, inside=(100,) * 4, inputs=(1,) * 4, num_tokens=0)
    assert kept.peak(range(1, 4)) == 203
    assert mix_that_fits(kept, free) == range(recomputed)


def test_a_small_block_at_the_front_does_not_stand_for_the_large_ones() -> None:
    """Ten bytes of the first and 100 of the second are kept while they are measured; the peak is 213."""
    kept = Activations(outside=0, inside=(10, 100, 100, 100, 100), inputs=(1,) * 5, num_tokens=0)
    assert kept.peak([2, 3, 4]) == 213
    # 90 of 100 free bytes, and the 110 that were measured, hold two blocks; ten bytes less hold one.
    assert [mix_that_fits(kept, 213 + free) for free in (0, 100, 99)] == [range(4), range(3), range(4)]


def test_inputs_of_blocks_count_however_they_are_handed_over() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return x.exp() + condition

    model = nn.Sequential(Block())
    x, condition = torch.zeros(2, 5, 3, requires_grad=True), torch.zeros(3)
    for inputs, named in (
        ((x, condition), {}),
        ((x,), {"condition": condition}),
        ((), {"x": x, "condition": condition}),
    ):
        with SavedBytes(model, ["Block"]) as counter:
            model[0](*inputs, **named)
        assert list(counter.inputs.values()) == [x.nbytes + condition.nbytes]
        assert counter.num_tokens == 10


def test_the_most_that_is_alive_at_a_time_is_counted() -> None:
    with PeakBytes() as made:
        first = torch.empty(100, device="meta")  # 400 bytes
        second = first * 2
        assert made.alive == 800
        del first
        third = second + 1
        assert made.alive == 800
    assert made.peak == 800
    assert third.shape == second.shape


def test_a_plan_counts_the_decoding_of_images_and_unpacked_matrices(tmp_path: Path, omnigen_folder: Path) -> None:
    folder = write_run(
        tmp_path, omnigen_folder, base_model_precision="int8-quanto", validation_disable=False,
        validation_prompt="a star", validation_resolution="64x64",
    )  # fmt: skip
    found = planning.make_plan(load_here(folder), probe=False)
    # The largest packed matrix of the tiny model is gate and up: 128 x 32 in float32.
    assert {row.name: row.num_bytes for row in found.memory}["one unpacked matrix"] == 128 * 32 * 4
    assert any(note.startswith("decoding a validation image takes") for note in found.notes)


def test_a_plan_counts_what_a_product_in_8_bits_makes(tmp_path: Path, omnigen_folder: Path) -> None:
    folder = write_run(tmp_path, omnigen_folder, base_model_precision="int8dq-torchao")
    found = planning.make_plan(load_here(folder), probe=False)
    # Nine bytes for each of the 128 outputs of a token, and perhaps a copy of the matrix, 128 x 32 in int8.
    made = {row.name: row.num_bytes for row in found.memory}["one product in 8 bits"] - 128 * 32
    assert made % (9 * 128) == 0
    assert 16 < made // (9 * 128) < 400


def test_the_largest_batch_is_the_one_with_the_most_pixels():
    small = SimpleNamespace(id="a", batch_size=None, buckets={(64, 64): [0], (96, 32): [1]}, is_regularisation=False)
    large = SimpleNamespace(id="b", batch_size=2, buckets={(64, 80): [0]}, is_regularisation=True)
    for each in (small, large):
        each.references, each.samples = (), []
    assert planning.largest_load([small, large], 4) == Load(4, 64, 64)
    assert planning.largest_load([small, large], 1) == Load(2, 64, 80, True)


def test_one_checkpoint_more_than_is_kept_is_on_the_disk_while_it_is_written(folder):
    """Weights of 400 bytes, a state of 800, an average in float32 and in the adapter's own format: 400 + 400."""
    shapes = SimpleNamespace(trained={"w": torch.zeros(100)}, trained_bytes=400, optimizer=800)
    options = ("--checkpoint_step_interval=2", "--checkpoints_total_limit=3", "--use_ema=true")
    found = planning.disk_rows(load_here(folder, *options), shapes, (0, 0), 100)
    assert found[0].num_bytes == 4 * (400 + 800 + 800)
    assert planning.disk_rows(load_here(folder, *options), shapes, (0, 0), 4)[0].num_bytes == 2 * (400 + 800 + 800)
    for is_averaged, checkpoint, final in ((True, 2000, 800), (False, 1200, 400)):
        options = (f"--use_ema={is_averaged}", "--checkpoint_step_interval=0", "--checkpoint_keep_best=false")
        found = planning.disk_rows(load_here(folder, *options), shapes, (0, 7), 100)
        assert [row.num_bytes for row in found] == [7, checkpoint, final, planning.LOG_BYTES]


def test_an_average_takes_four_bytes_a_weight(folder, omnigen_folder):
    found = [planning.make_plan(load_here(folder, f"--use_ema={flag}"), probe=False) for flag in ("true", "false")]
    [ema] = [row.num_bytes for row in found[0].memory if row.name.startswith("EMA")]
    assert ema == 4 * found[0].trained
    assert not [row for row in found[1].memory if row.name.startswith("EMA")]


def test_slow_steps_are_timed_once_and_what_there_is_no_time_for_counts_by_its_pixels(folder, monkeypatch):
    """Each look at the clock is two seconds after the last one: a batch takes two, and so does an update."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(probe, "_now", lambda family: float(next(clock)))
    taken = []
    losses = probe._losses
    monkeypatch.setattr(probe, "_losses", lambda *given: taken.append(given[4]) or losses(*given))
    loaded = load_here(folder)
    family = build_family(loaded.config)
    embeds = family.encode_prompts(["a star"])
    times = probe.time_steps(loaded, family, [Load(1, 64, 64), Load(1, 128, 64)], embeds)
    assert taken == [Load(1, 64, 64)]
    assert times.micro_batch == {Load(1, 64, 64): 2.0}
    assert times.update == 2.0
    assert times.passes == {}
    assert probe.time_encoding(family, 64, 64, batch_size=4) == 0.5
    assert planning.seconds_per_step(Counter({Load(1, 128, 64): 1}), times, 1) == 2 * 2.0 + 2.0


def test_swapped_blocks_leave_two_buffers_of_the_largest_on_the_device() -> None:
    """Blocks of 400 bytes, and one of 600."""
    blocks = [nn.Linear(10, rows, bias=False) for rows in (10, 10, 15, 10, 10)]
    assert swapped_out(blocks, "no_change", ()) == 4 * 400 + 600 - 2 * 600
    assert swapped_out(blocks[:2], "no_change", ()) == 0
    assert swapped_out([], "no_change", ()) == 0


def test_the_last_block_is_never_planned_as_recomputed() -> None:
    """Its own 100 bytes are needed first in the backward pass. Of four blocks three keep their inputs, of 1 byte."""
    kept = Activations(outside=0, inside=(100,) * 4, inputs=(1,) * 4, num_tokens=0)
    chosen, others = activation_rows(config_of(gradient_checkpointing=True), kept, 0)
    assert chosen == Row("activations, checkpointed", 3 + 100)
    assert {row.name: row.num_bytes for row in others}["activations without gradient_checkpointing"] == 400
    third, _ = activation_rows(config_of(gradient_checkpointing=True, gradient_checkpointing_interval="2"), kept, 0)
    assert third == Row("activations, 2 of 4 blocks checkpointed", 2 + 200)


def test_trained_weights_have_copies_in_16_bits_where_products_are(folder) -> None:
    found = rows(planning.make_plan(load_here(folder, "--mixed_precision=bf16", "--optimizer=adamw"), probe=False))
    assert 2 * found["16-bit copies of trained weights"] == found["trained weights"]


@pytest.mark.parametrize(
    ("keep", "holdout", "kind", "is_kept"),
    [(None, 5, "image", True), (True, 0, "eval", True), (False, 5, "eval", False), (None, 0, "image", False)],
)
def test_the_best_state_is_kept_unless_it_is_refused(keep: bool | None, holdout: int, kind: str, is_kept: bool) -> None:
    options = SimpleNamespace(eval_holdout=holdout, has_interval=True, checkpoint_keep_best=keep)
    run = SimpleNamespace(config=SimpleNamespace(evaluation=options), datasets=[SimpleNamespace(dataset_type=kind)])
    assert planning.keeps_best(run) == is_kept
    options.has_interval = False
    assert not planning.keeps_best(run)


def test_encoding_is_timed_per_image_and_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 s, then 2 s for four images."""
    times = iter([0.0, 4.0, 4.0, 6.0])
    seen: list[int] = []
    monkeypatch.setattr(probe, "_now", lambda family: next(times))
    encoder = SimpleNamespace(encode=lambda images: seen.append(len(images)))
    monkeypatch.setattr(probe, "BatchEncoder", lambda family, vae, size: encoder)
    assert probe.time_encoding(SimpleNamespace(load_vae=lambda: None), 8, 8, 4) == 0.5
    assert seen == [4, 4]
