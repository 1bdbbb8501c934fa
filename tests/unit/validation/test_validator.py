"""Validation of a run with a real family, adapter and EMA, all tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simpletuner import storage
from simpletuner.adapters.lycoris import LycorisAdapter, attach_lycoris
from simpletuner.config.prompt_library import LibraryPrompt
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.errors import DataError, SimpleTunerError
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.optim.ema import EMA
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import (
    Event,
    ImagesMade,
    ImagesScored,
    Notice,
    PhaseDone,
    PhaseProgress,
    PhaseStarted,
    PreviewMade,
)
from simpletuner.validation.sampling import make_images
from simpletuner.validation.validator import Validator
from tests.configs import config_of
from tests.tiny import tiny_clip_folder, tiny_preview_decoder

LOKR = {"algo": "lokr", "linear_dim": 10000, "factor": 4, "apply_preset": {"target_module": ["Attention"]}}


class Recorder:
    name = "recorder"
    failures: tuple[type[Exception], ...] = ()

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None: ...

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Setup:
    """A denoiser with an adapter that has learned something, and the options of a run."""

    def __init__(self, folder: Path, output_dir: Path):
        self.family = OmniGen(OMNIGEN, ModelSource(str(folder)), torch.device("cpu"), torch.float32)
        self.denoiser: nn.Module = self.family.load_denoiser()
        self.adapter: LycorisAdapter = attach_lycoris(self.denoiser, LOKR, OMNIGEN, torch.float32, 0)
        self.ema = EMA(self.adapter.trainable_parameters(), 0.9)
        with torch.no_grad():
            for parameter in self.adapter.trainable_parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        self.output_dir = output_dir
        self.recorder = Recorder()
        self.library = {"circle": LibraryPrompt("a red circle")}

    def validator(self, **changes: object) -> Validator:
        options = {
            "model_type": "lora",
            "mixed_precision": "no",
            "base_model_precision": "no_change",
            "validation_disable": False,
            "validation_prompt": "a star",
            "validation_resolution": "32x32",
            "validation_seed": 7,
            "seed": 42,
            "validation_num_inference_steps": 2,
            "validation_guidance": 2.0,
            "validation_negative_prompt": "<cfg>",
            "validation_on_startup": False,
            "disable_benchmark": False,
            "ema_validation": "comparison",
            "validation_prompt_library": False,
            "validation_disable_unconditional": True,
            "validation_guidance_rescale": 0.0,
            "validation_guidance_real": 1.0,
            "validation_guidance_image": None,
            "validation_guidance_skip_layers": None,
            "validation_lycoris_strength": 1.0,
            "num_validation_images": 1,
            "validation_noise_scheduler": None,
            "validation_seed_source": "cpu",
            "validation_randomize": False,
            "validation_preview": False,
            "validation_preview_steps": 1,
            "evaluation_type": "none",
            "pretrained_evaluation_model_name_or_path": None,
            "webhook_config": None,
        }
        config = config_of(**{**options, **changes})
        return Validator(config, self.family, self.library, self.output_dir, EventBus([self.recorder]))

    def run(self, step: int, ema: EMA | None = None, **changes: object) -> list[str]:
        paths = self.validator(**changes).run(self.denoiser, self.adapter, ema, step)
        return [path.relative_to(self.output_dir).as_posix() for path in paths]


@pytest.fixture
def setup(omnigen_folder: Path, tmp_path: Path) -> Setup:
    return Setup(omnigen_folder, tmp_path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_files_have_the_names_that_users_know(setup: Setup):
    assert setup.run(0) == ["benchmarks/base_model/validation_32x32.png", "benchmarks/base_model/circle_32x32.png"]
    assert setup.run(20) == [
        "validation_images/step_20_validation_0_32x32.png",
        "validation_images/step_20_circle_0_32x32.png",
        "validation_images/step_20_sheet.png",
    ]


def test_the_benchmark_is_the_base_model_even_when_drawn_late(setup: Setup, omnigen_folder: Path):
    setup.run(20)
    plain = setup.family.load_denoiser()
    validator = setup.validator()
    expected = make_images(setup.family.pipeline(plain, setup.family.load_vae()), validator.requests, batch_size=16)
    base = pixels(setup.output_dir / "benchmarks/base_model/validation_32x32.png")
    live = pixels(setup.output_dir / "validation_images/step_20_validation_0_32x32.png")
    assert np.array_equal(base, np.asarray(expected[0].image))
    assert not np.array_equal(base, live)


def test_the_benchmark_is_drawn_once_and_again_when_its_settings_change(setup: Setup):
    setup.run(0)
    assert setup.run(0) == []
    assert len(setup.run(0, validation_guidance=3.0)) == 2
    note = json.loads((setup.output_dir / "benchmarks/base_model/benchmark.json").read_text())
    settings = {"steps": 2, "guidance": 3.0, "negative_prompt": "<cfg>", "guidance_rescale": 0.0}
    settings |= {"true_guidance": 1.0, "skipped": None, "image_guidance": None}
    assert note["pictures"] == [
        ["validation", "a star", 32, 32, 0, 7, settings],
        ["circle", "a red circle", 32, 32, 0, 7, settings],
    ]
    # All that decides how an image of the base looks: with another one of these it is made again.
    assert {**note["settings"], **setup.family.prompt_settings} == note["settings"]
    own = {key: value for key, value in note["settings"].items() if key not in setup.family.prompt_settings}
    assert own == {
        "model": setup.family.source.model,
        "vae": None,
        "revision": None,
        "scheduler": None,
        "seed_source": "cpu",
        "base_model_precision": "no_change",
    }


def test_full_training_draws_its_base_before_the_first_step_only(setup: Setup):
    assert setup.run(5, model_type="full")[0].startswith("validation_images/")
    assert setup.run(0, model_type="full")[0].startswith("benchmarks/")


def test_ema_images_stand_beside_the_live_ones_and_leave_the_weights_as_they_were(setup: Setup):
    before = {name: value.clone() for name, value in setup.adapter.state_dict().items()}
    names = setup.run(20, setup.ema, disable_benchmark=True)
    assert names == [
        "validation_images/step_20_validation_0_32x32.png",
        "validation_images/step_20_circle_0_32x32.png",
        "validation_images/step_20_validation_0_32x32_ema.png",
        "validation_images/step_20_circle_0_32x32_ema.png",
        "validation_images/step_20_sheet.png",
    ]
    assert not np.array_equal(pixels(setup.output_dir / names[0]), pixels(setup.output_dir / names[2]))
    assert all(torch.equal(before[name], value) for name, value in setup.adapter.state_dict().items())


@pytest.mark.parametrize(("mode", "kinds"), [("none", {"live", "grid"}), ("ema_only", {"ema", "grid"})])
def test_ema_validation_chooses_the_weights(setup: Setup, mode: str, kinds: set[str]):
    setup.run(20, setup.ema, ema_validation=mode, disable_benchmark=True)
    [made] = setup.recorder.of(ImagesMade)
    assert {image.kind for image in made.images} == kinds


def test_training_goes_on_as_if_nothing_had_been_drawn(setup: Setup):
    setup.denoiser.train()
    next(setup.denoiser.children()).eval()
    modes = [module.training for module in setup.denoiser.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    setup.run(20, setup.ema)
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in setup.denoiser.modules()] == modes
    assert all(parameter.requires_grad for parameter in setup.adapter.trainable_parameters().values())


def test_progress_counts_every_image(setup: Setup):
    setup.run(20, setup.ema)
    [started], [done] = setup.recorder.of(PhaseStarted), setup.recorder.of(PhaseDone)
    assert (started.name, started.total) == ("images at step 20", 6)
    assert [(event.name, event.done) for event in setup.recorder.of(PhaseProgress)] == [
        ("images at step 20", count) for count in (2, 4, 6)
    ]
    assert (done.name, done.summary) == ("images at step 20", f"in {setup.output_dir / 'validation_images'}")
    assert 0 < done.seconds < 600
    [made] = setup.recorder.of(ImagesMade)
    assert (made.step, [image.kind for image in made.images]) == (
        20,
        ["base"] * 2 + ["live"] * 2 + ["ema"] * 2 + ["grid"],
    )
    assert setup.validator().has_generated(20)
    assert setup.validator().has_generated(20, setup.ema)
    assert not setup.validator().has_generated(21)
    (setup.output_dir / "validation_images/step_20_circle_0_32x32_ema.png").unlink()
    assert setup.validator().has_generated(20)
    assert not setup.validator().has_generated(20, setup.ema)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), OSError(28, "No space left on device")])
def test_a_failure_costs_the_images_and_not_the_run(setup: Setup, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*arguments: object, **options: object) -> Callable[..., object]:
        raise error

    monkeypatch.setattr(setup.family, "pipeline", fail)
    setup.denoiser.train()
    assert setup.run(20) == []
    [notice] = setup.recorder.of(Notice)
    assert notice.severity == "error"
    assert notice.text == f"no images at step 20: {error}; training continues"
    assert setup.denoiser.training


@pytest.mark.parametrize("error", [DataError("the disk is full"), OSError("the disk is full")])
def test_a_sheet_that_the_disk_refuses_costs_the_sheet_and_no_image(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    monkeypatch.setattr("simpletuner.validation.files.RETRY_SECONDS", 0.0)
    real = storage.write_bytes

    def write_bytes(path: Path, data: bytes) -> None:
        if path.name.endswith("_sheet.png"):
            raise error
        real(path, data)

    monkeypatch.setattr("simpletuner.validation.files.write_bytes", write_bytes)
    names = [f"validation_images/step_20_{name}_0_32x32.png" for name in ("validation", "circle")]
    assert setup.run(20, disable_benchmark=True) == names
    [event] = setup.recorder.of(ImagesMade)
    assert [image.path.name for image in event.images] == [Path(name).name for name in names]
    assert [notice.text for notice in setup.recorder.of(Notice)] == [
        "no sheet of the images at step 20: the disk is full"
    ]
    assert not setup.validator().has_generated(20)  # so the next start makes it


def test_a_preview_that_the_disk_refuses_costs_the_preview_and_no_image(setup: Setup, omnigen_folder: Path):
    tiny_preview_decoder().save_pretrained(setup.output_dir / "model" / "preview_decoder")
    for part in omnigen_folder.iterdir():
        (setup.output_dir / "model" / part.name).symlink_to(part)
    setup.family.source = ModelSource(str(setup.output_dir / "model"))
    (setup.output_dir / "validation_images").mkdir()
    (setup.output_dir / "validation_images" / "previews").write_text("no folder")
    setup.run(20, validation_preview=True)
    assert len(setup.recorder.of(ImagesMade)[0].images) == 2 + 2 + 1  # base, live, sheet
    assert setup.recorder.of(PreviewMade) == []
    assert setup.recorder.of(Notice)[-1].text.startswith("no preview at step 20: ")


def test_a_mistake_of_ours_is_not_hidden(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object, **options: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(setup.family, "pipeline", fail)
    with pytest.raises(AttributeError):
        setup.run(20)


def test_before_and_after_shows_base_and_last_step(setup: Setup):
    setup.run(0)
    for step in (10, 20):
        setup.run(step)
    sheets = setup.validator().write_summaries(20)
    assert sheets == {"images before and after": setup.output_dir / "before_after.png"}
    sheet = pixels(sheets["images before and after"])
    width_of_three_columns = 3 * 192 + 2 * 12 + 2 * 20
    assert sheet.shape[1] == width_of_three_columns
    assert setup.validator().write_summaries(30) == {}


def test_strength_scales_what_the_adapter_adds_and_leaves_it_as_it_was(setup: Setup):
    setup.library = {
        "off": LibraryPrompt("a star", adapter_strength=0.0),
        "half": LibraryPrompt("a star", adapter_strength=0.5),
        "whole": LibraryPrompt("a star"),
    }
    setup.run(20, validation_prompt=None)
    images = {name: setup.output_dir / f"validation_images/step_20_{name}_0_32x32.png" for name in setup.library}
    base = pixels(setup.output_dir / "benchmarks/base_model/off_32x32.png")
    assert np.array_equal(pixels(images["off"]), base)
    assert not np.array_equal(pixels(images["half"]), base)
    assert not np.array_equal(pixels(images["half"]), pixels(images["whole"]))
    assert {module.multiplier for module in setup.adapter.network.loras} == {1.0}


@pytest.mark.slow
def test_several_images_sizes_and_random_seeds(setup: Setup):
    changes: dict[str, Any] = {
        "num_validation_images": 2,
        "validation_resolution": "32,48x32",
        "disable_benchmark": True,
    }
    names = setup.run(20, **changes)
    assert len(names) == 2 * 2 * 2 + 1
    assert "validation_images/step_20_circle_1_48x32.png" in names
    fixed = pixels(setup.output_dir / names[0])
    setup.run(30, **changes)
    assert np.array_equal(pixels(setup.output_dir / names[0].replace("20", "30")), fixed)
    setup.run(40, **changes, validation_randomize=True)
    setup.run(50, **changes, validation_randomize=True)
    random = [pixels(setup.output_dir / names[0].replace("20", str(step))) for step in (40, 50)]
    assert not np.array_equal(random[0], fixed)
    assert not np.array_equal(random[0], random[1])
    setup.run(40, **changes, validation_randomize=True)
    assert np.array_equal(pixels(setup.output_dir / names[0].replace("20", "40")), random[0])


def test_seeds_that_change_with_each_validation_leave_the_base_s_images_alone(setup: Setup):
    """Images before and after training are compared with each other: the base has the seed that is written."""
    setup.run(0)
    plain = pixels(setup.output_dir / "benchmarks/base_model/validation_32x32.png")
    other = Setup(Path(setup.family.source.model), setup.output_dir / "other")
    other.run(20, validation_randomize=True)
    assert np.array_equal(pixels(other.output_dir / "benchmarks/base_model/validation_32x32.png"), plain)


def test_scores_name_each_image_and_a_failing_score_keeps_the_images(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {
        "evaluation_type": "clip",
        "pretrained_evaluation_model_name_or_path": str(tiny_clip_folder(tmp_path / "c")),
    }
    validator = setup.validator(**options)
    validator.run(setup.denoiser, setup.adapter, setup.ema, 20)
    [scored] = setup.recorder.of(ImagesScored)
    kinds = ("base", "live", "ema")
    assert list(scored.scores) == [f"{kind}/{name}_32x32" for kind in kinds for name in ("validation", "circle")]
    live = [score for name, score in scored.scores.items() if name.startswith("live/")]
    assert (scored.metric, scored.step) == ("clip", 20)
    assert scored.mean == pytest.approx(sum(live) / 2)
    averages = [score for name, score in scored.scores.items() if name.startswith("ema/")]
    assert averages != live
    setup.validator(**options, ema_validation="ema_only").run(setup.denoiser, setup.adapter, setup.ema, 20)
    assert setup.recorder.of(ImagesScored)[1].mean == pytest.approx(sum(averages) / 2)

    assert validator._scorer is not None
    monkeypatch.setattr(validator._scorer, "score", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # ours
        validator.run(setup.denoiser, setup.adapter, None, 30)

    def no_memory(images: object) -> list[float]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(validator._scorer, "score", no_memory)
    assert len(validator.run(setup.denoiser, setup.adapter, None, 40)) == 3
    assert "no scores at step 40: out of memory; training continues" in [n.text for n in setup.recorder.of(Notice)]


def test_previews_of_every_kind_of_weights_are_reported_where_no_webhook_is(setup: Setup, omnigen_folder: Path):
    tiny_preview_decoder().save_pretrained(setup.output_dir / "model" / "preview_decoder")
    for part in omnigen_folder.iterdir():
        (setup.output_dir / "model" / part.name).symlink_to(part)
    setup.family.source = ModelSource(str(setup.output_dir / "model"))
    setup.run(20, setup.ema, validation_preview=True, validation_preview_steps=2, validation_num_inference_steps=5)
    previews = setup.recorder.of(PreviewMade)
    assert len(previews) == 3 * 2 * 2  # kinds, prompts, steps 2 and 4
    assert {(event.image.kind, event.sampling_step) for event in previews} == {
        (kind, step) for kind in ("base", "live", "ema") for step in (2, 4)
    }
    assert all(pixels(event.image.path).shape == (32, 32, 3) for event in previews)
    assert setup.recorder.of(Notice)[0].text.startswith("previews are written to ")
    names = {path.name for path in (setup.output_dir / "validation_images").iterdir()}
    assert setup.validator().files.steps_with_images() == [20]
    assert "previews" in names


def test_a_preview_decoder_that_cannot_be_had_stops_the_start(setup: Setup):
    with pytest.raises(DataError) as caught:
        setup.validator(validation_preview=True)
    assert caught.value.problems[0].key == "validation_preview"


def test_a_run_that_is_asked_to_stop_leaves_its_images_not_generated(setup: Setup):
    validator, asked = setup.validator(validation_num_inference_steps=50), []
    validator.is_stopping = lambda: len(asked) > 2 or asked.append(1) is not None
    assert validator.run(setup.denoiser, setup.adapter, None, 20) == []
    assert len(asked) == 3  # not fifty steps of each
    assert [n.text for n in setup.recorder.of(Notice)] == ["no images at step 20: the run is asked to stop"]


class Pair(ProcessGroup):
    """Two processes that generate together; the other one says and decides what a test wants."""

    others_failures: list[bool]
    decided: list[str] | None = None

    def any(self, flag: bool) -> bool:
        return flag or (self.others_failures.pop(0) if self.others_failures else False)

    def from_main(self, value: Any) -> Any:
        return self.decided or value


def pair(*others_failures: bool, decided: list[str] | None = None) -> Pair:
    process_group = Pair(rank=0, size=2)
    object.__setattr__(process_group, "others_failures", list(others_failures))
    object.__setattr__(process_group, "decided", decided)
    return process_group


def test_processes_that_generate_together_draw_what_the_main_one_decides(setup: Setup):
    validator = setup.validator()
    validator.together = pair(decided=["live"])
    validator.run(setup.denoiser, setup.adapter, setup.ema, 20)
    assert {image.kind for image in setup.recorder.of(ImagesMade)[0].images} == {"live", "grid"}


def test_images_that_another_process_cannot_prepare_are_drawn_by_none(setup: Setup):
    """A process that generated alone would wait for ever for the others' parts of the denoiser."""
    validator = setup.validator()
    is_asked_to_stop, has_failed = False, True
    validator.together = pair(is_asked_to_stop, has_failed)
    assert validator.run(setup.denoiser, setup.adapter, None, 20) == []
    assert "another process failed; training continues" in setup.recorder.of(Notice)[-1].text
    assert not setup.recorder.of(PhaseProgress)


@pytest.mark.slow
def test_files_that_cannot_be_written_cost_the_images_of_all_processes(setup: Setup):
    (setup.output_dir / "validation_images").write_text("no folder")
    validator = setup.validator()
    validator.together = pair()
    assert validator.run(setup.denoiser, setup.adapter, setup.ema, 20) == []
    assert "training continues" in setup.recorder.of(Notice)[-1].text


def test_a_failure_inside_of_an_image_ends_processes_that_generate_together(setup: Setup, monkeypatch):
    def no_memory(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("simpletuner.validation.validator.make_images", no_memory)
    validator = setup.validator()
    validator.together = pair()
    with pytest.raises(SimpleTunerError, match="no memory left; the other processes wait"):
        validator.run(setup.denoiser, setup.adapter, None, 20)
    validator.together = SINGLE_PROCESS
    assert validator.run(setup.denoiser, setup.adapter, None, 20) == []  # where one generates alone it costs the images


def test_images_belong_to_their_prompt_whatever_the_strengths(setup: Setup):
    """The weaker one is generated first, and stands second."""
    options = {"disable_benchmark": True}
    setup.run(20, **options)
    alone = pixels(setup.output_dir / "validation_images/step_20_validation_0_32x32.png")
    setup.library = {"circle": LibraryPrompt("a red circle", adapter_strength=0.5)}
    names = setup.run(30, **options)
    assert [name.split("_")[3] for name in names[:2]] == ["validation", "circle"]
    assert np.array_equal(pixels(setup.output_dir / "validation_images/step_30_validation_0_32x32.png"), alone)
