"""Does an adapter learn to edit? Trained on pairs of the tiny world, judged on inputs that it has not seen, by pixels.

The shipped tiny OmniGen was trained on text alone. Rows of `records` teach it one edit, "recolor the shape <color>":
the reference has a shape in one color, the target is the same image in another one. Held-out inputs are combinations
of shape, color and background that no row has, on either side. An edit is right where the shape, of the same kind and
in the same place, has the asked color, and the rest of the image is what it was. The sheet shows input, base and
adapter; a green frame means right.

    python benchmarks/edit_score.py                       # makes the pairs, trains, judges
    python benchmarks/edit_score.py --adapter FILE        # judges what was trained before
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from tiny_omnigen.shapes import (  # noqa: E402
    BACKGROUNDS,
    COLORS,
    OLD_SHAPES,
    POSITIONS,
    SIZES,
    Scene,
    paint,
    place,
    shape_layers,
    write_mask,
)

MODEL = REPOSITORY / "simpletuner/examples/omnigen-tiny/model"
SIDE = 64
NUM_PAIRS = 2048
NUM_HELD_OUT = 64
LARGEST_BASE_SHARE = 0.1
SMALLEST_ADAPTER_SHARE = 0.8
# Euclidean distances in 8-bit RGB; neighbors in the palette are 68 or more apart.
COLOR_DISTANCE, KEPT_DISTANCE = 45.0, 20.0
# Intersection over union of the shape with what it was before.
SMALLEST_OVERLAP = 0.75

LYCORIS = {
    "algo": "full",
    "multiplier": 1.0,
    "apply_preset": {"target_module": ["Attention", "FeedForward", "Conv2d"]},
}

Generator = Callable[[Sequence["Edit"]], list[Image.Image]]


@dataclass(frozen=True)
class Edit:
    """One edit: a scene, its jitter, and the color that its shape is to have."""

    scene: Scene
    color: str
    seed: int

    @property
    def instruction(self) -> str:
        return f"recolor the shape {self.color}"

    def mask(self) -> np.ndarray:
        """(H, W) coverage of the shape, the same before and after."""
        center, radius = place(self.scene, SIDE, SIDE, random.Random(self.seed))
        return write_mask(shape_layers(self.scene.shape), center, radius, SIDE, SIDE)

    def image(self, color: str) -> Image.Image:
        return Image.fromarray(paint(self.mask(), COLORS[color], BACKGROUNDS[self.scene.background]))


def sample_edits(seed: int) -> tuple[list[Edit], list[Edit]]:
    """Edits to train on and held-out ones, whose combinations of shape, color and background no trained one has."""
    rng = random.Random(seed)
    combinations = [(s, c, b) for s in OLD_SHAPES for c in COLORS for b in BACKGROUNDS]
    rng.shuffle(combinations)
    held = combinations[:NUM_HELD_OUT]
    taken = {*held}
    edits: list[Edit] = []
    while len(edits) < NUM_PAIRS:
        shape, color, background = rng.choice(combinations[NUM_HELD_OUT:])
        other = rng.choice([each for each in COLORS if each != color])
        if (shape, other, background) not in taken:
            edits.append(Edit(_scene(shape, color, background, rng), other, len(edits)))
    tests = [
        Edit(_scene(*each, rng), rng.choice([c for c in COLORS if c != each[1]]), NUM_PAIRS + number)
        for number, each in enumerate(held)
    ]
    return edits, tests


def _scene(shape: str, color: str, background: str, rng: random.Random) -> Scene:
    return Scene(shape, color, background, rng.choice(list(SIZES)), rng.choice(list(POSITIONS)))


def write_pairs(folder: Path, edits: Sequence[Edit]) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, edit in enumerate(edits):
        names = [f"images/{number:04d}-{kind}.png" for kind in ("before", "after")]
        for name, color in zip(names, (edit.scene.color, edit.color), strict=True):
            edit.image(color).save(folder / name)
        rows.append({"target": names[1], "references": names[:1], "instruction": edit.instruction, "task": "edit"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_adapter(folder: Path, edits: Sequence[Edit], steps: int) -> Path:
    """Write pairs and configuration, train, and give the adapter's file."""
    from simpletuner.config.loading import load_run
    from simpletuner.training.trainer import train

    write_pairs(folder, edits)
    data = [{"id": "pairs", "type": "records", "records_file": "pairs.jsonl", "max_output_pixels": SIDE**2}]
    config = {
        "model_family": "omnigen",
        "pretrained_model_name_or_path": str(MODEL),
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "lycoris_config.json",
        "output_dir": "output",
        "data_backend_config": "multidatabackend.json",
        "train_batch_size": 8,
        "max_train_steps": steps,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "lr_end": 1e-5,
        "optimizer": "adamw",
        "grad_clip_method": "norm",
        "max_grad_norm": 1.0,
        "mixed_precision": "no",
        "caption_dropout_probability": 0.05,
        "timestep_stratified": True,
        "timestep_bias_strategy": "later",
        "timestep_bias_portion": 0.5,
        "timestep_bias_multiplier": 4.0,
        "resolution": SIDE,
        "checkpoint_step_interval": 0,
        "validation_disable": True,
        "report_to": "none",
        "seed": 42,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "lycoris_config.json").write_text(json.dumps(LYCORIS, indent=1), encoding="utf-8")
    (folder / "multidatabackend.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    train(load_run((), {}, folder))
    return folder / "output/pytorch_lora_weights.safetensors"


def make_generator(adapter: Path | None, steps: int, guidance: float) -> Generator:
    """A function from edits to images; `adapter` None edits with the base."""
    import torch

    from simpletuner.adapters.files import apply_adapter_file
    from simpletuner.families.registry import get_family_class, get_spec
    from simpletuner.models.components import ModelSource

    spec = get_spec("omnigen")
    family = get_family_class(spec)(spec, ModelSource(str(MODEL)), torch.device("cpu"), torch.float32)
    denoiser = family.load_denoiser()
    if adapter is not None:
        apply_adapter_file(denoiser, adapter, spec)
    pipeline = family.pipeline(denoiser, family.load_vae())

    def edit(edits: Sequence[Edit]) -> list[Image.Image]:
        images = []
        for start in range(0, len(edits), 16):
            part = edits[start : start + 16]
            images += pipeline(
                prompt=[each.instruction for each in part],
                negative_prompt="<cfg>",
                references=[[each.image(each.scene.color)] for each in part],
                generator=[torch.Generator().manual_seed(each.seed) for each in part],
                height=SIDE,
                width=SIDE,
                num_inference_steps=steps,
                guidance_scale=guidance,
            ).images
        return images

    return edit


def verdict(image: Image.Image, edit: Edit) -> str:
    """Why an edit is wrong; empty where it is right."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    mask = edit.mask()
    inside, outside = mask > 0.9, mask < 0.05
    asked = np.asarray(COLORS[edit.color], dtype=np.float32)
    ground = np.asarray(BACKGROUNDS[edit.scene.background], dtype=np.float32)
    if np.linalg.norm(np.median(pixels[inside], axis=0) - asked) > COLOR_DISTANCE:
        return "color"
    if np.linalg.norm(pixels[outside] - ground, axis=-1).mean() > KEPT_DISTANCE:
        return "background"
    is_shape = np.linalg.norm(pixels - asked, axis=-1) < np.linalg.norm(pixels - ground, axis=-1)
    before = mask > 0.5
    overlap = (is_shape & before).sum() / (is_shape | before).sum()
    return "" if overlap >= SMALLEST_OVERLAP else f"overlap {overlap:.2f}"


def write_sheet(path: Path, edits: Sequence[Edit], columns: Sequence[tuple[str, Sequence[Image.Image]]]) -> None:
    """For each edit its input, what base and adapter made of it, and the verdicts."""
    shown, per_row = 96, 4
    width, height = (len(columns) + 1) * (shown + 8) + 16, shown + 34
    rows = -(-len(edits) // per_row)
    sheet = Image.new("RGB", (per_row * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, edit in enumerate(edits):
        left, top = number % per_row * width + 6, number // per_row * height + 6
        pen.text((left, top + shown + 4), edit.instruction, fill="black", font_size=10)
        images = [("input", edit.image(edit.scene.color)), *((name, made[number]) for name, made in columns)]
        for place_, (name, image) in enumerate(images):
            x, reason = left + place_ * (shown + 8), "" if name == "input" else verdict(image, edit)
            frame = "white" if name == "input" else "red" if reason else "green"
            pen.rectangle((x - 3, top - 3, x + shown + 2, top + shown + 2), fill=frame)
            sheet.paste(image.resize((shown, shown), Image.Resampling.NEAREST), (x, top))
            pen.text((x, top + shown + 15), f"{name} {reason}", fill="black", font_size=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def score(edits: Sequence[Edit], base: Generator, adapted: Generator, sheet: Path) -> dict[str, object]:
    made = {"base": base(edits), "adapter": adapted(edits)}
    write_sheet(sheet, edits, list(made.items()))
    shares = {
        name: sum(not verdict(image, edit) for image, edit in zip(images, edits, strict=True)) / len(edits)
        for name, images in made.items()
    }
    copied = sum(
        not verdict(edit.image(edit.scene.color), replace(edit, color=edit.scene.color)) for edit in edits
    ) / len(edits)
    is_reached = shares["base"] < LARGEST_BASE_SHARE and shares["adapter"] >= SMALLEST_ADAPTER_SHARE
    return {**shares, "inputs": len(edits), "judge_on_inputs": copied, "goal_reached": is_reached, "sheet": str(sheet)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="judge this file; otherwise one is trained")
    parser.add_argument("--folder", type=Path, default=Path("output/edit_score"), help="for pairs, run and sheet")
    parser.add_argument("--train-steps", type=int, default=650)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    edits, held_out = sample_edits(arguments.seed)
    adapter = arguments.adapter or train_adapter(arguments.folder.resolve(), edits, arguments.train_steps)
    base, adapted = (make_generator(each, arguments.steps, arguments.guidance) for each in (None, adapter))
    figures = score(held_out, base, adapted, arguments.folder / "sheet.png")
    print(json.dumps(figures))
    return 0 if figures["goal_reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
