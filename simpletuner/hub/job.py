"""What a run uploads, and its own description: taken from its configuration once, before it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.config.loading import LoadedRun
from simpletuner.config.lycoris_algorithms import DEFAULT_ALGORITHM, form_and_kind
from simpletuner.config.options import TrainConfig
from simpletuner.errors import DataError
from simpletuner.families.spec import FamilySpec
from simpletuner.hub.card import CardFacts, card_text
from simpletuner.hub.usage import usage_code
from simpletuner.reporting.events import SavedImage

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
MOST_IMAGES = 12


@dataclass(frozen=True)
class HubJob:
    """The uploads of one run.

    Args:
        output_dir: of the run.
        name: of the repository; without an owner it is the user's own.
        is_private: whether a new repository is.
        each_checkpoint: whether checkpoints are uploaded, beside the end.
        waits: whether training waits for the upload of a checkpoint.
        spec, kind, base_model, license, options, instance_prompts, is_safe, note, readers: as in `CardFacts`.
        form: of the adapter's file (`lora_format`, or `lycoris`).
        title: name of the run.
    """

    output_dir: Path
    name: str
    is_private: bool
    each_checkpoint: bool
    waits: bool
    spec: FamilySpec
    kind: str
    base_model: str | None
    licence: str
    title: str
    options: Mapping[str, Any]
    form: str = "lycoris"
    readers: str = ""
    instance_prompts: tuple[str, ...] = ()
    is_safe: bool = False
    note: str | None = None

    def checkpoint_files(self, folder: Path) -> dict[str, Path]:
        """Path in the repository -> file, for the weights in a checkpoint; not for what only a resume needs."""
        wanted = [folder / ADAPTER_FILE] if self.kind != "full" else [folder / self.spec.component("denoiser").name]
        return _files(folder, [*wanted, folder / "ema"])

    def final_files(self) -> dict[str, Path]:
        """Path in the repository -> file, for the weights at the end of the run."""
        if self.kind == "full":
            return _files(self.output_dir / "pipeline", [self.output_dir / "pipeline"])
        # Where EMA is off, the folder is that of an earlier end.
        averages = [self.output_dir / "ema"] if self.options.get("use_ema") else []
        return _files(self.output_dir, [self.output_dir / ADAPTER_FILE, *averages])

    def card(
        self, repo_id: str, step: int, total_steps: int, images: Sequence[SavedImage], eval_loss: float | None
    ) -> str:
        """README.md for the weights of a step; `images` are those that `image_files` names."""
        first = next((image for image in images if image.prompt), None)
        prompt = first.prompt if first else "a photo"
        usage = usage_code(
            self.spec, self.kind, self.form, repo_id, self.base_model, ADAPTER_FILE, prompt, self._generation(first)
        )
        named = zip(images, image_files(images), strict=True)
        facts = CardFacts(
            repo_id=repo_id,
            title=self.title,
            model=self.spec.title,
            base_model=self.base_model,
            licence=self.licence,
            kind=self.kind,
            usage=usage,
            step=step,
            total_steps=total_steps,
            options=self.options,
            datasets=self._datasets(),
            images=[(image.prompt, path) for image, path in named],
            eval_loss=eval_loss,
            instance_prompts=self.instance_prompts,
            is_safe=self.is_safe,
            note=self.note,
            readers=self.readers,
        )
        return card_text(facts)

    def _generation(self, image: SavedImage | None) -> dict[str, Any]:
        """How an image of the card was generated, as arguments that every pipeline of diffusers takes."""
        settings = {
            "num_inference_steps": self.options.get("validation_num_inference_steps"),
            "guidance_scale": self.options.get("validation_guidance"),
        }
        size = {"height": image.height, "width": image.width} if image else {}
        return size | {name: value for name, value in settings.items() if value is not None}

    def _datasets(self) -> list[Mapping[str, Any]]:
        try:
            return storage.read_json(self.output_dir / "dataset_report.json", list)
        except DataError:
            return []


def make_job(loaded: LoadedRun, spec: FamilySpec) -> HubJob | None:
    """The job of a configuration; None where nothing is to be uploaded."""
    config = loaded.config
    if not config.reporting.push_to_hub:
        return None
    output_dir = Path(config.checkpoint.output_dir)
    flavour = spec.flavours[config.model.model_flavour or spec.default_flavour]
    model = config.model.pretrained_model_name_or_path or flavour.hub_id
    prompts = [prompt for entry in loaded.datasets for prompt in getattr(entry, "instance_prompt", None) or ()]
    form, kind = form_and_kind(config.adapter, loaded.lycoris)
    return HubJob(
        output_dir=output_dir,
        name=repository_name(config),
        is_private=config.reporting.model_card_private,
        each_checkpoint=config.reporting.push_checkpoints_to_hub,
        waits=not config.reporting.push_to_hub_background,
        spec=spec,
        kind=kind_of(loaded),
        base_model=None if Path(model).is_absolute() else model,
        licence=flavour.licence,
        title=config.reporting.tracker_run_name or output_dir.name,
        options=loaded.resolved(),
        form=form,
        readers="" if config.model.model_type == "full" else spec.read_by(form, kind),
        instance_prompts=tuple(dict.fromkeys(prompts)),
        is_safe=config.reporting.model_card_safe_for_work,
        note=config.reporting.model_card_note,
    )


def kind_of(loaded: LoadedRun) -> str:
    """`full`, `lora`, `dora`, or the algorithm of LyCORIS."""
    config = loaded.config
    if config.model.model_type == "full":
        return "full"
    if config.adapter.lora_type == "lycoris":
        return str((loaded.lycoris or {}).get("algo", DEFAULT_ALGORITHM))
    return "dora" if config.adapter.use_dora else "lora"


def repository_name(config: TrainConfig) -> str:
    """`hub_model_id`, or where that is not set one made of the run's name."""
    if config.reporting.hub_model_id:
        return str(config.reporting.hub_model_id)
    name = str(config.reporting.tracker_run_name or Path(config.checkpoint.output_dir).name)
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    return re.sub(r"-{2,}|\.{2,}", "-", plain).strip("-.")[:96] or "simpletuner"


def gallery(images: Sequence[SavedImage]) -> list[SavedImage]:
    """The images for the card: those of the weights that were trained."""
    return [image for image in images if image.kind in ("live", "ema")][:MOST_IMAGES]


def image_files(images: Sequence[SavedImage]) -> list[str]:
    """Their paths in the repository, the same at each step, so that the newest replace the older ones."""
    stems = [re.sub(r"[^\w-]+", "_", image.shortname, flags=re.ASCII) for image in images]
    return [
        f"images/{index:02d}_{stem}_{image.kind}{image.path.suffix}"
        for index, (stem, image) in enumerate(zip(stems, images, strict=True))
    ]


def _files(root: Path, places: Sequence[Path]) -> dict[str, Path]:
    """The files at or below some places, by their path below `root`; the manifests of our commits are left out."""
    found = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return {
        path.relative_to(root).as_posix(): path for path in found if path.is_file() and path.name != storage.MANIFEST
    }
