"""What a plan measures on, and what it tells of captions; numbers by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.batch import Crop, PromptEmbeds
from simpletuner.config.layers import Origin
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.build import build_family
from simpletuner.models.components import ModelSource
from simpletuner.training.planning import memory
from simpletuner.training.planning import settings as planning
from simpletuner.training.planning.encoding import EncodingCost, TextCost, choose_texts, largest_references
from simpletuner.training.planning.loads import _prompts_of_files, largest_load
from simpletuner.training.planning.memory import (
    Row,
    encode_bytes,
    largest_encoded,
    memory_rows,
    on_demand_bytes,
    read_shapes,
)
from simpletuner.training.planning.settings import Cost, Room
from simpletuner.training.planning.shapes import Load, SavedBytes
from tests.configs import config_of
from tests.runs import load_here, write_run

KIB, MIB = 1 << 10, 1 << 20


def embeds(*num_bytes: int) -> list[PromptEmbeds]:
    return [PromptEmbeds({"a": torch.zeros(count, dtype=torch.uint8)}) for count in num_bytes]


def cost_of(**given: Any) -> TextCost:
    cost = EncodingCost(embeds(KIB, 4 * KIB, 2 * KIB), weight_bytes=3 * MIB, activation_bytes=MIB)
    values = {"num_texts": 1500, "num_missing": 1024, "cost": cost, "stays": False, "is_kept": True}
    return TextCost(**values | given, folder=Path("text/toy"))


def test_the_longest_caption_stands_for_all_that_are_missing() -> None:
    found = cost_of()
    assert found.cost is not None
    assert (found.cost.caption_bytes, found.cost.peak_bytes) == (4 * KIB, 4 * MIB)
    assert found.disk_bytes == 4 * MIB
    assert cost_of(is_kept=False).disk_bytes == cost_of(cost=None).disk_bytes == 0


def test_a_plan_tells_what_captions_take() -> None:
    assert cost_of().lines() == [
        "1,024 of 1,500 texts to encode, up to 4.0 KiB each, up to 4.0 MiB in text/toy; 476 are there",
        "encoding takes 4.0 MiB of memory, 3.0 MiB of it the text encoders; before the denoiser is loaded",
    ]
    first, second = cost_of(num_missing=1500, is_kept=False, stays=True).lines()
    assert first == "1,500 of 1,500 texts to encode, up to 4.0 KiB each, none of it is written"
    assert second.endswith("; they stay in memory")
    [line] = cost_of(num_texts=1, num_missing=1, cost=None).lines()
    assert line == "1 of 1 text to encode; what that takes is not known for this model before it is done"


class Samples(list):
    """As a dataset has them."""


def dataset(*captions: str, sizes: tuple[tuple[int, int], ...] = ((8, 8),), **given: Any) -> Any:
    rows = Samples(SimpleNamespace(captions=[caption], references=(), path=caption) for caption in captions)
    values = {"samples": rows, "references": (), "buckets": dict.fromkeys(sizes), "batch_size": None}
    return SimpleNamespace(**values | {"is_regularisation": False, "prompt_files": None} | given)


def test_captions_are_chosen_by_their_tokens_the_longest_or_the_middle_ones() -> None:
    """Tokens where a family can count them, here one for each "x"; else characters."""
    family: Any = SimpleNamespace(count_prompt_tokens=lambda captions: [caption.count("x") for caption in captions])
    data = [dataset("x", "xxx", "long but of one x"), dataset("xxxx", "xx")]
    assert choose_texts(family, data, 2, longest=True) == ["xxxx", "xxx"]
    assert choose_texts(family, data, 1, longest=False) == ["xx"]
    assert choose_texts(family, data, 2, longest=False) == ["xxx", "xx"]
    assert choose_texts(family, [dataset("x", "xx")], 3, longest=True) == ["xx", "x", "xx"]
    family.count_prompt_tokens = lambda captions: None
    assert choose_texts(family, data, 1, longest=True) == ["long but of one x"]


def test_the_references_of_a_plan_are_those_of_the_image_with_most_pixels() -> None:
    def references(*sizes: tuple[int, int]) -> Any:
        return SimpleNamespace(
            captions=[], references=[SimpleNamespace(crop=Crop(*size, 0, 0, *size)) for size in sizes]
        )

    rows = Samples([references((8, 8), (8, 8)), references((4, 64)), references((16, 8))])
    assert largest_references([dataset(samples=rows, references=("guides",))]) == ((4, 64),)
    assert largest_references([dataset(samples=rows)]) == ()


def test_memory_is_measured_on_the_micro_batch_with_most_pixels() -> None:
    """A wide image of 128 pixels twice is less than one of 320."""
    data = [dataset(sizes=((8, 16),), batch_size=2), dataset(sizes=((16, 20), (8, 8)), is_regularisation=True)]
    load = largest_load(data, 1)
    assert (load.batch_size, load.height, load.width, load.is_regularisation) == (1, 16, 20, True)
    assert largest_load(data, 3).batch_size == 3
    assert largest_load([*data, dataset(sizes=((8, 16),), batch_size=9)], 3).batch_size == 9


@pytest.mark.parametrize(
    ("longest", "count", "expected"), [(True, 2, [5, 4]), (False, 1, [3]), (True, 4, [5, 4, 3, 2])]
)
def test_embeddings_of_files_are_chosen_by_their_length(longest: bool, count: int, expected: list[int]) -> None:
    """Of the first samples of each dataset, as many as a batch has."""

    def files(*lengths: int) -> Any:
        return dataset(
            *map(str, lengths),
            prompt_files=SimpleNamespace(
                take=lambda samples: [SimpleNamespace(files=[int(each.path)]) for each in samples],
                read=lambda length: PromptEmbeds({"a": torch.zeros(length), "b": torch.zeros(1)}),
            ),
        )

    data = [files(2, 5, 1, 1), files(4, 3)] if longest else [files(3), files(9), files(1)]
    found = _prompts_of_files(data, count, longest)
    assert [len(each.tensors["a"]) for each in found] == expected


GIB = 1 << 30
ROOMY, TIGHT = Room(10 * GIB, 8 * GIB, 11 * GIB), Room(10 * GIB, None, 11 * GIB)
INT8 = {"base_model_precision": "int8-quanto"}
RECOMPUTED = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto"}
OFFLOADED = {**RECOMPUTED, "gradient_checkpointing_backend": "unsloth"}
SWAPPED = {**INT8, "gradient_checkpointing": True, "gradient_checkpointing_backend": "unsloth"}


def bare(kind: type, **facts: Any) -> Any:
    """A stage without what it measures."""
    stage = object.__new__(kind)
    for name, value in facts.items():
        setattr(stage, name, value)
    return stage


@pytest.mark.parametrize("room", [ROOMY, TIGHT])
def test_text_encoders_are_packed_the_large_ones_and_leave_where_main_memory_is_another(room: Room) -> None:
    """Of 16, 4 and 3 bytes the last is smaller than a quarter of the largest, and stays as it is."""
    keys = tuple(f"text_encoder_{number}_precision" for number in (1, 2, 3))
    stage = bare(planning._Captions, room=room, encoders=keys, sizes=[16, 4, 3])
    packed = dict.fromkeys(keys[:2], "int8-quanto")
    offloaded = [{**packed, "text_encoder_offload": True}] if room is ROOMY else []
    last = {**dict.fromkeys(keys[:2], "nf4-bnb"), "text_encoder_offload": room is ROOMY}
    assert list(stage.ways(None)) == [{}, packed, *offloaded, last]
    assert stage.last_resort() == "encode captions elsewhere (cache build), or give it more memory"


@pytest.mark.parametrize("tiles", [True, False])
def test_the_vae_takes_half_as_many_images_each_time_and_then_tiles(tiles: bool) -> None:
    vae = SimpleNamespace(**({"enable_tiling": None} if tiles else {}))
    stage = bare(planning._Vae, family=SimpleNamespace(empty_vae=lambda: vae))
    for count, batches in ((6, [6, 3, 1]), (1, [1]), (4, [4, 2, 1])):
        loaded: Any = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(vae_batch_size=count)))
        expected: list[Any] = [{"vae_batch_size": each} for each in batches]
        expected += [{"vae_batch_size": 1, "vae_enable_tiling": True}] if tiles else []
        assert list(stage.ways(loaded)) == expected


@pytest.mark.parametrize("room", [ROOMY, TIGHT])
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_ways_to_train_go_from_the_fastest_to_the_one_that_takes_least(
    room: Room, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "repeated_blocks", lambda denoiser, classes: [None, None])
    family = SimpleNamespace(spec=SimpleNamespace(block_classes=()))
    stage = bare(planning._Training, room=room, family=family, denoiser=None)
    expected: list[Any] = [
        {"gradient_checkpointing": False, "activation_memory": level} for level in ("high", "low", "lowest")
    ]
    expected += [RECOMPUTED, *([OFFLOADED] if room is ROOMY else [])]
    if model_type == "lora":
        expected += [{**INT8, **RECOMPUTED}]
        if room is ROOMY:
            expected += [{**INT8, **OFFLOADED}, *({**SWAPPED, "musubi_blocks_to_swap": count} for count in (1, 2))]
    for swaps in (False, True):
        monkeypatch.setattr(planning, "swaps_blocks", lambda model, swaps=swaps: swaps)
        loaded: Any = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(model_type=model_type)))
        expected[3] = {"gradient_checkpointing": True} if swaps else RECOMPUTED
        assert list(stage.ways(loaded)) == expected


def test_settings_that_a_resume_keeps_are_those_that_decide_results() -> None:
    packed = tuple(f"text_encoder_{number}_precision" for number in (1, 2, 3, 4))
    assert ("base_model_precision", "vae_batch_size", "vae_enable_tiling", *packed) == planning.KEPT
    assert (planning.PLANNED_SHARE, planning.CUDA_CONTEXT) == (0.94, 644245094)
    assert (
        *("activation_memory", "gradient_checkpointing", "gradient_checkpointing_interval"),
        *("gradient_checkpointing_backend", "base_model_precision", "musubi_blocks_to_swap"),
    ) == planning.TRAINING_KEYS
    assert planning.VAE_KEYS == ("vae_batch_size", "vae_enable_tiling")


def test_what_fits_fits_to_the_byte_and_is_told_with_main_memory() -> None:
    assert Cost(10 * GIB, 8 * GIB).fits(ROOMY)
    assert not Cost(10 * GIB + 1).fits(ROOMY)
    assert not Cost(1, 8 * GIB + 1).fits(ROOMY)
    assert Cost(1, 99 * GIB).fits(TIGHT)
    assert str(Cost(GIB)) == "1.0 GiB"
    assert str(Cost(GIB, 2 * GIB)) == "1.0 GiB and 2.0 GiB of main memory"


def test_of_a_gpu_the_context_is_taken_off_and_of_all_six_percent_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 20 GiB; a limit of 10 in all; and a CPU, whose process holds 2 GiB already."""
    monkeypatch.setattr(planning, "device_memory", lambda device: 20 * GIB)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=2 * GIB))
    monkeypatch.setattr(planning.psutil, "Process", lambda: process)
    cuda, cpu, context = torch.device("cuda"), torch.device("cpu"), 644245094
    main = int(0.94 * 100 * GIB)
    assert Room.of("auto", cuda) == Room(int(0.94 * 20 * GIB), main, 20 * GIB)
    assert Room.of("10", cuda) == Room(int(0.94 * (10 * GIB - context)), main, 10 * GIB - context)
    assert Room.of("auto", cpu) == Room(int(0.94 * 20 * GIB), None, 22 * GIB)
    assert Room.of("10", cpu) == Room(int(0.94 * 8 * GIB), None, 10 * GIB)
    assert Room.of("1", cpu) == Room(0, None, 2 * GIB)
    assert Room.of_other("auto", 24 * GIB) == Room(int(0.94 * (24 * GIB - context)), main, 24 * GIB - context)
    assert Room.of_other("10", 24 * GIB) == Room(int(0.94 * (10 * GIB - context)), main, 10 * GIB - context)
    assert Room.of_other("auto", 1) == Room(0, main, 0)


class Stage(planning._Stage):
    """Two ways; each option takes so many GiB less than 12."""

    name, keys = "trying", ("a", "b")
    saves = {"a": 1, "b": 1}
    main = 0

    def ways(self, loaded: Any) -> Any:
        yield from ({}, {"a": 1}, {"a": 1}, {"a": 1, "b": True})

    def cost(self, loaded: Any) -> Cost:
        return Cost((12 - sum(self.saves[key] for key in loaded.now)) * GIB, self.main * GIB)


class Loaded:
    """A run of two options; `written` are somebody's."""

    def __init__(self, now: dict[str, Any], written: tuple[str, ...] = ()):
        self.now, self.written = now, written
        self.config = SimpleNamespace(value=lambda key: None)

    def origin(self, key: str) -> Any:
        return SimpleNamespace(kind="file" if key in self.written else "default", __str__=lambda self: "config")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(planning, "with_settings", lambda loaded, way: Loaded(way, loaded.written))
    monkeypatch.setattr(planning, "without", lambda loaded, keys: Loaded({}, tuple({*loaded.written} - {*keys})))
    monkeypatch.setattr(planning, "is_sound", lambda tried, spec: True)

    def make(room: Room, *written: str) -> Stage:
        family: Any = SimpleNamespace(spec=None)
        loaded: Any = Loaded({}, written)
        return Stage(loaded, family, [], room)

    return make


def test_the_first_way_that_fits_is_chosen_and_those_before_it_are_told(stage: Any) -> None:
    choice = stage(Room(11 * GIB, None, 0)).choose()
    assert choice.settings == {"a": 1}
    assert choice.lines == (
        "trying: 11.0 GiB with a 1",
        "trying: it does not fit, which takes 12.0 GiB",
    )
    assert choice.lacking == ()
    assert stage(Room(12 * GIB, None, 0)).choose().settings == {}


def test_where_none_fits_the_last_is_chosen_and_what_is_missing_told(stage: Any) -> None:
    [problem] = stage(Room(9 * GIB, None, 0)).choose().lacking
    told = "trying takes 10.0 GiB at least with a 1, b true"
    assert problem.message == f"{told}: 1.0 GiB more than the 9.0 GiB planned"
    assert (problem.key, problem.fix) == ("memory", "lower train_batch_size or resolution, or give it more memory")
    short = stage(Room(10 * GIB, 2 * GIB, 0))
    short.main = 3
    [problem] = short.choose().lacking
    assert problem.message == (
        "trying takes 10.0 GiB and 3.0 GiB of main memory at least with a 1, b true: "
        "1.0 GiB of main memory more than there is"
    )


def test_a_written_option_without_which_it_would_fit_is_named(stage: Any) -> None:
    limited = stage(Room(10 * GIB, None, 0), "b")
    [problem] = limited.choose().lacking
    assert problem.message.startswith("trying takes 11.0 GiB at least with a 1: 1.0 GiB more")
    assert problem.fix.startswith("remove b (")
    assert ": it fits with a 1, b true; or lower train_batch_size" in problem.fix
    both = stage(Room(10 * GIB, None, 0), "a", "b")
    [problem] = both.choose().lacking
    assert problem.fix.startswith("remove a (")
    assert ", b (" in problem.fix


def test_what_a_family_prefers_was_written_by_nobody() -> None:
    kinds = ("default", "family", "file", "environment", "command line", "memory")
    found = [planning.is_written(SimpleNamespace(origin=lambda key, kind=kind: Origin(kind)), "a") for kind in kinds]
    assert found == [False, False, True, True, True, True]


def test_references_count_where_the_largest_is_looked_for() -> None:
    """Twice 8 x 16 and a reference of 4 x 4: 288 pixels; and a reference may be the largest that a VAE sees."""
    assert Load(2, 8, 16, references=((4, 4),)).num_pixels == 288
    guide = SimpleNamespace(crop=Crop(64, 96, 0, 0, 64, 96))
    rows = [SimpleNamespace(references=(guide,))]
    plain, guided = dataset(sizes=((32, 64), (64, 64))), dataset(samples=rows, references=("guides",), sizes=((8, 8),))
    assert largest_encoded([plain]) == (64, 64)
    assert sorted(largest_encoded([plain, guided])) == [64, 96]


@pytest.mark.parametrize(("room", "expected"), [(ROOMY, Cost(7 + 3, 20 + 8)), (TIGHT, Cost(7 + 3 + 20 + 8))])
def test_what_waits_in_main_memory_counts_where_that_is_the_device_s_own(
    room: Room, expected: Cost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 bytes of swapped blocks, inputs of 3 and 5; rows of 7, and 3 of encoders. The whole denoiser has 8."""
    shapes = SimpleNamespace(activations=SimpleNamespace(inputs=[3, 5]), swapped_bytes=20)
    monkeypatch.setattr(planning, "settled", lambda given, *others: given)
    monkeypatch.setattr(planning, "_configured", lambda family, loaded: family)
    monkeypatch.setattr(planning, "memory_rows", lambda *given: ([Row("weights", 7)], []))
    facts = {"family": None, "encoders": 3, "on_demand": 0, "shapes": lambda loaded: shapes}
    stage = bare(planning._Training, room=room, denoiser=nn.Linear(1, 1), **facts)
    model = {"gradient_checkpointing": True, "gradient_checkpointing_backend": "unsloth"}
    assert stage.cost(SimpleNamespace(config=config_of(**model))) == expected
    plain = SimpleNamespace(config=config_of(gradient_checkpointing=True))
    assert stage.cost(plain).device + stage.cost(plain).main == 7 + 3 + 20


def test_no_more_is_planned_with_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "device_memory", lambda device: 20 * GIB)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=2 * GIB))
    monkeypatch.setattr(planning.psutil, "Process", lambda: process)
    assert Room.of("100", torch.device("cpu")) == Room(int(0.94 * 20 * GIB), None, 22 * GIB)
    assert Room.of("100", torch.device("cuda")).device == int(0.94 * 20 * GIB)


def test_the_assistant_and_copies_in_16_bits_of_float32_weights_have_their_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "assistant.safetensors").write_bytes(bytes(77))
    monkeypatch.setattr(memory, "find_assistant", lambda config, fetches: tmp_path / "assistant.safetensors")
    monkeypatch.setattr(memory, "quantizes_activations", lambda formats: False)
    monkeypatch.setattr(memory, "activation_rows", lambda *given: (Row("activations", 0), []))
    trained = {"a": torch.zeros(100), "b": torch.zeros(50, dtype=torch.bfloat16)}
    numbers = dict.fromkeys(("frozen_bytes", "swapped_bytes", "optimizer", "unpacked", "update"), 0)
    shapes: Any = SimpleNamespace(trained=trained, trained_bytes=500, activations=None, least=None, **numbers)
    for mixed_precision, copies in (("bf16", {"16-bit copies of trained weights": 200}), ("no", {})):
        loaded: Any = SimpleNamespace(config=config_of(mixed_precision=mixed_precision))
        rows, _ = memory_rows(loaded, SimpleNamespace(number_formats=None), shapes, 0, 1000)
        found = {row.name: row.num_bytes for row in rows}
        weights = {"trained weights": 500, "gradients": 500}
        assert found == {**weights, "assistant LoRA, frozen": 77, **copies}


def test_the_vae_counts_beside_the_steps_where_images_are_encoded_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "encode_bytes", lambda family, height, width, count: height * width * count)
    before = dataset(sizes=((64, 64),), encodes_on_demand=False)
    beside = dataset(sizes=((16, 32),), encodes_on_demand=True)
    assert on_demand_bytes(None, [before], 4) == 0
    assert on_demand_bytes(None, [before, beside], 4) == 16 * 32 * 4


def test_counting_what_autograd_saves_ends_with_its_context() -> None:
    layer = nn.Linear(2, 2)
    with SavedBytes(layer, ("Linear",)) as counter:
        layer(torch.ones(4, 2, requires_grad=True))
    before = dict(counter.saved)
    layer(torch.ones(4, 2, requires_grad=True)).square()
    assert counter.saved == before
    assert sum(before.values()) == 4 * 2 * 4
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("is_free", [True, False])
def test_where_blocks_may_keep_less_that_is_measured_too(
    omnigen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_free: bool
) -> None:
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 0)
    auto: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_interval": "auto" if is_free else "1",
    }
    loaded = load_here(write_run(tmp_path / "run", omnigen_folder, **auto))
    family = build_family(loaded.config)
    shapes = read_shapes(loaded, family, Load(1, 64, 64), family.encode_prompts(["a cat"]))
    assert (shapes.least is not None) == is_free
    if shapes.least is not None:
        assert sum(shapes.least.inside) < 0.8 * sum(shapes.activations.inside)


def test_what_the_vae_makes_while_it_encodes_grows_with_images_and_batches(omnigen_folder: Path) -> None:
    spec = get_spec("omnigen")
    family = get_family_class(spec)(spec, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)
    weights = sum(parameter.nbytes for parameter in family.empty_vae().parameters())
    small, tall, two = (encode_bytes(family, *size) - weights for size in ((64, 64, 1), (128, 64, 1), (64, 64, 2)))
    assert small > 10 * 3 * 64 * 64 * 4  # several feature maps of the image's size
    assert tall == pytest.approx(2 * small, rel=0.1)
    assert two == pytest.approx(2 * small, rel=0.1)
