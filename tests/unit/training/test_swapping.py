"""Swapped blocks while copies and computation run at their own pace: two at a time, and never the wrong weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.errors import ConfigError, DataError
from simpletuner.training.gradient_checkpointing import GradientCheckpointing, Offloading
from simpletuner.training.streams import SameLane, lane_of, pin_in_place
from simpletuner.training.swapping import (
    ALIGNMENT,
    NUM_BUFFERS,
    FlatWeights,
    Swapped,
    SwappedBlocks,
    move_with_swap,
)

CPU = torch.device("cpu")


@dataclass
class FakeStreams:
    """A host that queues everything before anything runs; then two queues that advance in any order that marks allow.

    Attributes:
        bytes_copied: of the copies that ran.
    """

    compute: list[tuple[str, object]] = field(default_factory=list)
    copies: list[tuple[str, object]] = field(default_factory=list)

    def copy(self, function: Callable[[], object]) -> object:
        begin, end = object(), object()
        self.compute.append(("mark", begin))
        self.copies += [("wait", begin), ("run", function), ("mark", end)]
        return end

    def wait(self, mark: object) -> None:
        self.compute.append(("wait", mark))

    def run(self, function: Callable[[], object]) -> None:
        self.compute.append(("run", function))

    def advance(self, seed: int) -> None:
        rng, done, queues = random.Random(seed), set(), [self.compute, self.copies]
        while any(queues):
            queue = rng.choice([each for each in queues if each and (each[0][0] != "wait" or each[0][1] in done)])
            kind, what = queue.pop(0)
            if kind == "mark":
                done.add(what)
            elif kind == "run":
                what()  # type: ignore[operator]


def numbered_blocks(count: int) -> list[nn.Module]:
    blocks = []
    for index in range(count):
        block = nn.Linear(3, 5 if index % 2 else 4)
        nn.init.constant_(block.weight, index)
        nn.init.constant_(block.bias, 100 + index)
        blocks.append(block.requires_grad_(False))
    return blocks


def note(seen: list[tuple[Any, ...]], index: int, weights: Mapping[str, Tensor]) -> None:
    seen.append((index, *(tensor.unique().tolist() for tensor in weights.values())))


ORDERS = {
    "training": [*range(6), *reversed(range(5))],
    "a pass without gradients, then training": [*range(6), *range(6), *reversed(range(5))],
    "out of order": [0, 1, 2, 5, 3, 4, 4, 3, 5, 2, 1, 0],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_at_most_two_blocks_are_on_the_device_and_each_computes_with_its_own_weights(order: list[int]) -> None:
    """However far the host is ahead: here it has queued the whole step before the first copy begins."""
    for seed in range(40):
        streams, seen, places = FakeStreams(), [], set()
        blocks = numbered_blocks(6)
        swap = SwappedBlocks(blocks, CPU, streams)
        for index in order:
            weights = swap.fetch(index)
            places |= {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
            streams.run(partial(note, seen, index, weights))
        streams.advance(seed)
        assert seen == [(index, [index], [100 + index]) for index in order]
        assert len(places) == len(swap.buffers) == NUM_BUFFERS
        assert sum(buffer.nbytes for buffer in swap.buffers) == 2 * max(each.num_bytes for each in swap.weights)


def test_a_block_is_one_copy_and_takes_no_more_memory_than_its_weights() -> None:
    """Not one pinned block of a power of two for each tensor."""
    streams = FakeStreams()
    blocks = [nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48)).requires_grad_(False) for _ in range(3)]
    wanted = sum(tensor.nbytes for tensor in blocks[0].parameters())
    swap = SwappedBlocks(blocks, CPU, streams)
    swap.fetch(0)
    assert [kind for kind, _ in streams.copies].count("run") == 2  # this one, and the next in advance
    storages = {tensor.untyped_storage().data_ptr() for tensor in blocks[0].parameters()}
    assert len(storages) == 1
    assert swap.weights[0].num_bytes < wanted + 4 * 256


def test_each_weight_begins_where_kernels_want_it() -> None:
    """At a multiple of 256 bytes, as torch's own allocator has it, whatever lies before it."""
    swap = SwappedBlocks([nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)).requires_grad_(False)], CPU)
    weights = swap.fetch(0).values()
    assert [weight.storage_offset() * weight.element_size() for weight in weights] == [0, 256, 512, 768]


def test_the_second_block_is_sent_for_beside_the_first_one_in_every_pass() -> None:
    """After a pass without gradients too, which ends with the last block."""
    streams = FakeStreams()
    swap = SwappedBlocks(numbered_blocks(6), CPU, streams)
    for index in range(6):
        swap.fetch(index)
    swap.fetch(0)
    assert [kind for kind, _ in streams.copies].count("run") == 6 + 2


class Toy(nn.Module):
    """Blocks that a recomputing denoiser calls, but for one that is called plainly, as UNets do in the middle."""

    def __init__(self, count: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(count))
        self.trained = nn.ParameterList(nn.Parameter(torch.zeros(6)) for _ in range(count))

    def forward(self, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
        for index, (block, trained) in enumerate(zip(self.blocks, self.trained, strict=True)):
            x = (block(x) if index == 2 else call(block, x)) + trained
        return x


def test_a_block_that_is_not_recomputed_fetches_its_weights_again() -> None:
    found = []
    for swaps in (False, True):
        torch.manual_seed(0)
        toy = Toy(6)
        toy.blocks.requires_grad_(False)
        if swaps:
            swap = SwappedBlocks(list(toy.blocks), CPU)
        recomputing = GradientCheckpointing(CPU)
        for _ in range(2):
            toy.zero_grad()
            toy(torch.ones(2, 6), recomputing).square().sum().backward()
        found.append([each.grad.clone() for each in toy.trained])
    assert len(swap.buffers) == 2
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


class CountingLane(SameLane):
    """How many copies there were."""

    count = 0

    def copy(self, function: Callable[[], object]) -> Any:
        self.count += 1
        return super().copy(function)


def test_blocks_of_which_none_is_recomputed_fetch_their_weights_and_their_neighbor_s_once_in_each_pass() -> None:
    """Six copies on the way there. On the way back the last two blocks are on the device still."""
    found = []
    for swaps in (False, True):
        torch.manual_seed(0)
        toy, lane = Toy(6), CountingLane()
        toy.blocks.requires_grad_(False)
        if swaps:
            SwappedBlocks(list(toy.blocks), CPU, lane)
        toy(torch.ones(2, 6), lambda block, x: block(x)).square().sum().backward()
        found.append([each.grad.clone() for each in toy.trained])
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert lane.count == 6 + 4


def test_offloaded_inputs_leave_beside_the_computation_two_at_a_time_and_come_back_in_advance() -> None:
    for seed in range(20):
        streams = FakeStreams()
        offloading = Offloading(CPU, streams)
        tensors = [torch.full((1, 2, 3), float(index)) for index in range(5)]
        offloaded = []
        for tensor in tensors:
            offloaded.append(offloading.offload([tensor, "a mask"]))
            assert len(offloading._leaving) <= 2
        seen: list[tuple[Any, ...]] = []
        for index in reversed(range(5)):
            back, mask = offloading.back(offloaded[index])
            assert mask == "a mask"
            streams.run(partial(note, seen, index, {"weight": back}))
        streams.advance(seed)
        assert seen == [(index, [index]) for index in (4, 3, 2, 1, 0)]


def test_inputs_come_back_from_main_memory_with_their_strides() -> None:
    """The product of a transposed input, as in Sana, keeps other tensors than that of a contiguous one."""
    torch.manual_seed(0)
    block, x = nn.Linear(4, 4, bias=False).requires_grad_(False), torch.randn(2, 4, 3, requires_grad=True)
    recomputing = GradientCheckpointing(CPU, offloads_inputs=True)
    recomputing(block, x.transpose(1, 2)).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.mT, 2 * x.detach().mT @ block.weight.T @ block.weight)


def test_checkpoint_is_given_a_tensor_by_which_it_knows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it saves no random state of a GPU, and dropout draws another mask in the second run."""
    given: list[tuple[Any, ...]] = []

    def checkpoint(function: Callable[..., Any], *arguments: Any, use_reentrant: bool) -> Any:
        given.append(arguments)
        return function(*arguments)

    monkeypatch.setattr("simpletuner.training.gradient_checkpointing.checkpoint", checkpoint)
    recomputing = GradientCheckpointing(CPU, offloads_inputs=True)
    recomputing(nn.Linear(4, 4), torch.ones(1, 2, 4, requires_grad=True))
    [arguments] = given
    assert [each.device for each in arguments if isinstance(each, Tensor)] == [CPU]
    assert all(each.numel() == 0 for each in arguments)  # the input itself would be kept


def test_weights_that_are_saved_as_views_are_no_activations() -> None:
    from simpletuner.training.gradient_checkpointing import CountSaved, weights_of

    block = nn.Sequential(nn.Linear(64, 64), nn.Tanh()).requires_grad_(False)
    x = torch.randn(2, 64, requires_grad=True)
    counts: dict[int, int] = {}
    with CountSaved(counts, 0, weights_of(block)):
        block(x).sum().backward()
    assert counts[0] == 2 * 64 * 4  # the output of tanh; the weight's transpose is 16 KB


def test_the_weights_of_an_adapter_beside_a_layer_are_no_activations(omnigen_folder, tmp_path) -> None:
    from simpletuner.adapters.build import attach_adapter
    from simpletuner.models.build import build_family
    from simpletuner.training.gradient_checkpointing import weights_of
    from tests.runs import load_here, write_run

    loaded = load_here(write_run(tmp_path, omnigen_folder))
    family = build_family(loaded.config)
    denoiser = family.load_base()
    adapter = attach_adapter(loaded, family, denoiser)
    of_block = {id(each) for each in weights_of(denoiser.layers[0])}
    own = [each for name, each in adapter.trainable_parameters().items() if "layers_0_" in name]
    assert own
    assert {id(each) for each in own} <= of_block


def test_a_gpu_s_copies_begin_behind_what_is_queued_and_leave_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[Any, ...]] = []

    class Stream:
        def __init__(self, name: Any):
            self.name = name

        def wait_stream(self, other: Any) -> None:
            log.append((self.name, "waits for", other.name))

        def wait_event(self, event: Any) -> None:
            log.append((self.name, "waits for mark", event.stream))

    class Event:
        def record(self, stream: Any) -> None:
            self.stream = stream.name
            log.append(("mark", stream.name))

    @contextmanager
    def stream(given: Any) -> Iterator[None]:
        log.append(("in", given.name))
        yield
        log.append(("out", given.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"copies of {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"work of {device}"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    lane = lane_of(torch.device("cuda", 1))
    lane.wait(lane.copy(lambda: log.append(("copy",))))
    copies, work = "copies of cuda:1", "work of cuda:1"
    assert log == [
        (copies, "waits for", work),
        ("in", copies),
        ("copy",),
        ("mark", copies),
        ("out", copies),
        (work, "waits for mark", copies),
    ]
    assert isinstance(lane_of(CPU), SameLane)


def test_memory_is_pinned_to_the_byte_and_a_refusal_names_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    answer = 0

    def register(*given: int) -> int:
        calls.append(given)
        return answer

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    tensor, nothing = torch.zeros(3, dtype=torch.float64), torch.zeros(0)
    assert pin_in_place(tensor) is tensor
    assert pin_in_place(nothing) is nothing
    assert calls == [(tensor.data_ptr(), 24, 0)]
    answer = 2
    large = torch.empty(3 << 29, dtype=torch.uint8, device="meta")
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    with pytest.raises(DataError) as caught:
        pin_in_place(large)
    [problem] = caught.value.problems
    assert problem.message == "1.5 GiB of main memory cannot be pinned for copies to the GPU (CUDA error 2)"
    assert problem.key == "musubi_blocks_to_swap"
    assert problem.fix == "raise the limit of locked memory (ulimit -l unlimited), or swap fewer blocks"


def test_frozen_weights_lie_at_multiples_of_the_alignment_and_stay_the_block_s_own() -> None:
    """By hand: 15 numbers of 4 bytes, then 5: the second begins at the next multiple."""
    [_, block] = numbered_blocks(2)
    block.requires_grad_(False)
    flat = FlatWeights(block, pins=False)
    assert ALIGNMENT == 256
    assert flat.num_bytes == 512
    assert block.weight.data_ptr() == flat.flat.data_ptr()
    assert block.bias.data_ptr() == flat.flat.data_ptr() + 256
    assert block.weight.tolist() == [[1.0] * 3] * 5
    assert block.bias.tolist() == [101.0] * 5
    assert {name: tuple(view.shape) for name, view in flat.views(flat.flat).items()} == {"weight": (5, 3), "bias": (5,)}


def test_the_last_blocks_are_swapped_and_no_more_than_there_are() -> None:
    blocks = [block.requires_grad_(False) for block in numbered_blocks(4)]
    net = nn.Sequential(*blocks)
    assert move_with_swap(net, ("Linear",), 0, CPU) is None
    swap = move_with_swap(net, ("Linear",), 3, CPU)
    assert [isinstance(block.forward, Swapped) for block in blocks] == [False, True, True, True]
    assert [weights.views(weights.flat)["bias"][0].item() for weights in swap.weights] == [101.0, 102.0, 103.0]
    assert len(swap.buffers) == NUM_BUFFERS == 2
    with pytest.raises(ConfigError) as caught:
        move_with_swap(net, ("Linear",), 5, CPU)
    [problem] = caught.value.problems
    assert problem.message == "5 blocks cannot be swapped: Sequential has 4"
    assert (problem.key, problem.allowed) == ("musubi_blocks_to_swap", "0 to 4")
