"""Makes the shipped tiny OmniGen from nothing: images, autoencoders, transformer. One command, seeded.

    python scripts/tiny_omnigen/make.py

Stages that are complete are not repeated; the transformer's stage is `simpletuner train` with the configuration in
`scripts/tiny_omnigen/pretrain/`, and goes on from its last checkpoint after an interruption. Takes about two hours of
two cores. `--stage` runs one stage alone, `--install` copies the finished model into the package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "tiny_omnigen"
BUILD = ROOT / "build" / "tiny_omnigen"
SHIPPED = ROOT / "simpletuner" / "examples" / "omnigen-tiny" / "model"


def make_autoencoders() -> None:
    """VAE and preview decoder, trained on generic drawings."""
    if not (BUILD / "autoencoders" / "preview_decoder").is_dir():
        run(sys.executable, SCRIPTS / "train_autoencoders.py", "--output", BUILD / "autoencoders")


def write_images() -> None:
    """The old shapes in all colors, sizes and positions, with captions; never the new shape."""
    if not (BUILD / "pretraining" / "128").is_dir():
        run(sys.executable, SCRIPTS / "render_pretraining_data.py", "--output", BUILD / "pretraining")


def build_fresh_model() -> None:
    """A model folder with a random transformer, where training starts."""
    if not (BUILD / "model" / "model_index.json").is_file():
        run(sys.executable, SCRIPTS / "build_model.py", "--output", BUILD / "model")


def train_transformer() -> None:
    """The project's own full training."""
    environment = os.environ | {"CONFIG_PATH": str(SCRIPTS / "pretrain" / "config.json")}
    run(sys.executable, "-m", "simpletuner", "train", environment=environment)


def install() -> None:
    """Put the average of the trained weights into the package, in bfloat16 like the released model."""
    trained = BUILD / "pretrain" / "ema" / "pipeline" / "transformer"
    finished = BUILD / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    run(sys.executable, SCRIPTS / "build_model.py", "--output", finished, "--transformer", trained)
    shutil.rmtree(SHIPPED, ignore_errors=True)
    shutil.copytree(finished, SHIPPED)


STAGES = {
    "autoencoders": make_autoencoders,
    "pictures": write_images,
    "model": build_fresh_model,
    "transformer": train_transformer,
}


def run(*command: object, environment: dict[str, str] | None = None) -> None:
    """Run a command in the root of the repository; leave with its exit code if it fails."""
    result = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone")
    parser.add_argument("--install", action="store_true", help="copy the finished model into the package")
    arguments = parser.parse_args()
    for name, stage in STAGES.items():
        if arguments.stage in (None, name):
            stage()
    if arguments.install:
        install()


if __name__ == "__main__":
    main()
