"""What is made of losses: the best step, patience, JSON, and means by noise level; by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch

from simpletuner.batch import Crop, Sample
from simpletuner.distributed.process_group import SINGLE_PROCESS
from simpletuner.randomness import keyed_seed
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training.evaluate import read_eval_history
from simpletuner.training.evaluation import (
    Evaluator,
    best_step,
    evaluations_without_gain,
    losses_as_json,
    losses_from_json,
)
from simpletuner.training.loss_bins import LossBins
from simpletuner.training.run_history import RunHistory
from simpletuner.training.step import Losses
from tests.configs import config_of
from tests.toy import Recorder, ToyDataset, ToyFamily, ToySource


def test_the_best_step_is_the_earliest_of_the_lowest_and_not_the_untrained_model():
    assert best_step({0: 0.1, 10: 0.5, 20: 0.4, 30: 0.4}) == 20
    assert best_step({0: 0.5, 10: math.nan, 20: 0.6}) == 20
    assert best_step({0: 0.5}) == 0


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ({}, 0),
        ({0: 0.5}, 0),
        ({0: 0.5, 10: 0.4}, 0),
        ({0: 0.5, 10: 0.5}, 1),
        ({0: 0.5, 10: 0.6, 20: 0.55}, 2),
        ({0: 0.5, 10: 0.6, 20: 0.4, 30: math.nan}, 1),
    ],
)
def test_patience_counts_the_last_evaluations_that_brought_nothing_lower(losses: dict[int, float], count: int):
    assert evaluations_without_gain(losses) == count


def test_losses_survive_json_and_are_cut_at_a_step():
    written = json.loads(json.dumps(losses_as_json({0: 0.5, 10: math.nan, 20: 0.25}), allow_nan=False))
    read = losses_from_json(written, until=10)
    assert list(read) == [0, 10]
    assert read[0] == 0.5
    assert math.isnan(read[10])


def losses(*rows: tuple[float, float, float]) -> Losses:
    sigmas, per_sample, weights = torch.tensor(rows).T
    return Losses(per_sample, weights, sigmas)


def test_losses_are_averaged_by_noise_level_with_their_weights():
    bins = LossBins()
    bins.add(4, [losses((0.05, 1.0, 1.0), (0.95, 4.0, 1.0)), losses((0.09, 3.0, 3.0))])
    bins.add(5, [losses((1.0, 8.0, 1.0), (0.5, math.nan, 1.0), (0.05, 7.0, 0.0))])
    event = bins.take(5, SINGLE_PROCESS)
    assert event is not None
    assert (event.step, event.first_step) == (5, 4)
    # 0.0-0.1: (1 * 1 + 3 * 3) / 4; 0.9-1.0: (4 + 8) / 2. What is not finite or only fills up does not count.
    assert [tuple(map(float, row)) for row in event.bins] == [(0.0, 0.1, 2.5, 2.0), (0.9, 1.0, 6.0, 2.0)]
    assert bins.take(6, SINGLE_PROCESS) is None


class Copying(ToyFamily):
    """Predicts what it sees, so the loss is the mean of (sigma * (noise - latents))^2: noise and level by hand."""

    def predict(self, denoiser, noisy_latents, sigmas, conditioning):
        self.batches.append(conditioning.batch)
        self.modes.append((denoiser.training, torch.is_grad_enabled()))
        return noisy_latents

    def __init__(self):
        super().__init__()
        self.modes = []


THREE = {"b": (1.0, 2.0), "c": (3.0, -1.0), "d": (0.0, 4.0)}


def evaluator_of(data, is_stopping: Callable[[], bool] = lambda: False, **options) -> Evaluator:
    data = data if isinstance(data, list) else [ToyDataset(data)]
    sources = {each.id: ToySource(each.images) for each in data}
    config = config_of(**{"num_eval_images": 10, "eval_timesteps": 2, "train_batch_size": 4} | options)
    return Evaluator(Copying(), data, sources, config, is_stopping)


def loss_by_hand(name: str, values: tuple[float, float], quantile: int, count: int) -> float:
    """The noise of (name, quantile), mixed in at the middle of its part of the distribution."""
    generator = torch.Generator().manual_seed(keyed_seed(0, "eval noise", name, quantile))
    noise = torch.randn(2, 1, 1, generator=generator).flatten()
    sigma = 1 / (1 + math.exp(-NormalDist().inv_cdf((quantile + 0.5) / count)))
    return float(((sigma * (noise - torch.tensor(values))) ** 2).mean())


def test_the_eval_loss_by_hand():
    data = [ToyDataset(THREE), ToyDataset({"e": (5.0, 5.0)}, id="others")]
    result = evaluator_of(data).run(torch.nn.Identity())
    rows = {
        name: [loss_by_hand(name, values, q, 2) for q in (0, 1)] for name, values in [*THREE.items(), ("e", (5, 5))]
    }
    means = {name: sum(row) / 2 for name, row in rows.items()}
    assert result.by_dataset["toys"] == pytest.approx((means["b"] + means["c"] + means["d"]) / 3, rel=1e-5)
    assert result.by_dataset["others"] == pytest.approx(means["e"], rel=1e-5)
    assert result.pooled == pytest.approx(sum(means.values()) / 4, rel=1e-5)
    assert [quantile for quantile, _ in result.by_quantile] == [0.25, 0.75]
    by_quantile = [sum(row[q] for row in rows.values()) / 4 for q in (0, 1)]
    assert [loss for _, loss in result.by_quantile] == pytest.approx(by_quantile, rel=1e-5)


def test_an_image_that_sorts_first_leaves_the_losses_of_the_others_alone():
    """The noise goes with the content: of three images the sum is the same, whichever stand before them."""
    before = evaluator_of(THREE).run(torch.nn.Identity()).pooled * 3
    after = evaluator_of({"a": (7.0, 7.0), **THREE}).run(torch.nn.Identity()).pooled * 4
    own = sum(loss_by_hand("a", (7.0, 7.0), quantile, 2) for quantile in (0, 1)) / 2
    assert after - own == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_the_size_of_a_batch_decides_nothing(batch_size):
    plain = evaluator_of(THREE).run(torch.nn.Identity())
    other = evaluator_of(THREE, train_batch_size=batch_size)
    assert other.run(torch.nn.Identity()).pooled == pytest.approx(plain.pooled, rel=1e-6)
    assert max(len(batch) for batch in other.family.batches) == batch_size


def test_the_first_images_in_the_order_of_paths_are_used():
    evaluator = evaluator_of({"d": (0.0, 4.0), "b": (1.0, 2.0)}, num_eval_images=1)
    evaluator.run(torch.nn.Identity())
    assert {digest for batch in evaluator.family.batches for digest in batch.digests} == {"d"}


@pytest.mark.parametrize("was_training", [True, False])
def test_the_network_judges_without_dropout_or_gradients_and_gets_its_mode_back(was_training):
    evaluator, denoiser = evaluator_of(THREE), torch.nn.Dropout().train(was_training)
    evaluator.run(denoiser)
    assert set(evaluator.family.modes) == {(False, False)}
    assert denoiser.training == was_training


def test_a_stop_in_the_middle_gives_no_loss_and_the_mode_back():
    asked = []
    evaluator = evaluator_of(THREE, is_stopping=lambda: asked.append(0) or len(asked) > 1)
    denoiser = torch.nn.Identity()
    assert evaluator.run(denoiser) is None
    assert len(evaluator.family.batches) == 1
    assert denoiser.training


def test_images_of_another_size_are_judged_in_a_batch_of_their_own():
    data = ToyDataset(THREE)
    wide = dataclasses.replace(data.samples.rows[1], crop=Crop(8, 16, 0, 0, 8, 16))
    data.samples.rows[1] = wide
    evaluator = evaluator_of([data], train_batch_size=6)
    evaluator.run(torch.nn.Identity())
    assert [list(dict.fromkeys(batch.digests)) for batch in evaluator.family.batches] == [["b"], ["c"], ["d"]]


def test_masks_count_always():
    """An empty mask leaves nothing of an image: its loss is 0 and that of the others as it was."""
    masked = evaluator_of([ToyDataset(THREE, mask_of={"b": 1.0, "c": 0.0, "d": 0.5})])
    result = masked.run(torch.nn.Identity())
    rows = [loss_by_hand(name, THREE[name], quantile, 2) for name in "bd" for quantile in (0, 1)]
    assert result.pooled == pytest.approx(sum(rows) / 6, rel=1e-5)


def test_an_evaluation_of_other_images_levels_or_references_is_another_one():
    kinds = [
        *({"num_eval_images": 3}, {"eval_timesteps": 5}, {"conditioning_multidataset_sampling": "random"}, {}),
        {"train_batch_size": 1},
    ]
    data = [ToyDataset(THREE)]
    data[0].fingerprint = "toys"
    identities = [json.dumps(evaluator_of(data, **kind).identity) for kind in kinds]
    assert len(set(identities)) == 4
    assert identities[-1] == identities[-2]
    data[0].fingerprint = "others"
    assert json.dumps(evaluator_of(data).identity) not in identities


def test_the_caption_is_the_first_and_one_reference_is_the_first_too():
    data = ToyDataset(THREE, captions=["one", "three"])
    evaluator = evaluator_of([data], conditioning_multidataset_sampling="random")
    first, second = (Sample("toys", name, name, 8, 8, (), Crop(8, 8, 0, 0, 8, 8)) for name in "bc")
    data.samples.rows = [dataclasses.replace(row, references=(first, second)) for row in data.samples.rows]
    asked = []
    evaluator.family.encode_prompts = lambda prompts, references=None: (
        asked.append((prompts, references)) or [None] * len(prompts)
    )
    evaluator.run(torch.nn.Identity())
    assert {prompt for prompts, _ in asked for prompt in prompts} == {"one"}
    seen = {(each.height, each.width, each.content) for _, rows in asked for row in rows for each in row}
    assert seen == {(8, 8, "b")}
    [shown] = {
        tuple(each.flatten().tolist()) for batch in evaluator.family.batches for row in batch.references for each in row
    }
    assert shown == THREE["b"]


def test_losses_of_an_abandoned_branch_do_not_count(tmp_path):
    history = RunHistory.new()
    noted = {**history.mark.to_json(), "losses": {"1": 5.0, "2": 4.0, "3": 3.0}}
    (tmp_path / "eval_losses.json").write_text(json.dumps(noted))
    bus = EventBus([])
    assert read_eval_history(tmp_path, history, bus) == {"1": 5.0, "2": 4.0, "3": 3.0}
    assert read_eval_history(tmp_path, history.branched(2), bus) == {"1": 5.0, "2": 4.0}
    assert read_eval_history(tmp_path, RunHistory.new(), bus) == {}


DAMAGES = {"cut": '{"losses": {"1": 5', "other kind": "[]", "no number": '{"losses": {"1": "five"}}', "empty": ""}


@pytest.mark.parametrize("text", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_of_eval_losses_is_read_from_the_metrics_and_patience_goes_on(tmp_path, text):
    """Losses 5, 6, 7 are two evaluations without gain: read as nothing, patience would begin anew."""
    history, recorder = RunHistory.new(), Recorder()
    (tmp_path / "eval_losses.json").write_text(text)
    records = [{"event": "eval_done", "step": step, "pooled": loss} for step, loss in ((1, 5.0), (2, 6.0), (3, 7.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    losses = losses_from_json(read_eval_history(tmp_path, history, EventBus([recorder])))
    assert evaluations_without_gain(losses) == 2
    [notice] = recorder.of(Notice)
    assert "is damaged: 3 eval losses are read from metrics.jsonl instead" in notice.text


def test_an_infinite_loss_is_no_number_of_json():
    assert losses_as_json({1: math.inf, 2: -math.inf, 3: 0.5}) == {"1": None, "2": None, "3": 0.5}


def test_images_are_taken_in_the_order_of_paths_whatever_their_buckets():
    data = ToyDataset(THREE)
    data.buckets = {(8, 8): [2, 0], (8, 16): [1]}
    evaluator = evaluator_of([data], num_eval_images=2)
    evaluator.run(torch.nn.Identity())
    assert [list(batch.digests) for batch in evaluator.family.batches] == [["b", "b", "c", "c"]]


class Wide(ToySource):
    """One row of three."""

    def latents(self, samples):
        return [torch.zeros(2, 1, 3) for _ in samples]


def test_a_mask_has_the_height_and_the_width_of_its_latents():
    data, asked = ToyDataset(THREE, mask_of={}), []
    data._mask = lambda index, sample, size: asked.append((index, sample.path, size)) or torch.ones(1, *size)
    evaluator = evaluator_of([data], eval_timesteps=1)
    evaluator.sources = {"toys": Wide(THREE)}
    evaluator.run(torch.nn.Identity())
    assert asked == [(0, "b", (1, 3)), (1, "c", (1, 3)), (2, "d", (1, 3))]


def test_files_of_embeddings_give_the_first_of_each_image():
    data, read = ToyDataset({"a": (1.0, 1.0)}), []
    data.prompt_files = SimpleNamespace(
        take=lambda samples: [SimpleNamespace(files=(f"{each.path}.0", f"{each.path}.1")) for each in samples],
        read=lambda file: read.append(file),
    )
    evaluator_of([data], eval_timesteps=2).run(torch.nn.Identity())
    assert read == ["a.0", "a.0"]
