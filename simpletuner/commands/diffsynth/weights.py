"""Where DiffSynth-Studio's scripts have their weights, as options of this program; pickles are refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from simpletuner.commands.diffsynth.scripts import Script
from simpletuner.config.paths import SINGLE_FILE, WITHOUT, looks_like_path
from simpletuner.errors import ConfigError, Problem
from simpletuner.models.safe_loading import PICKLES

INDEX = "model_index.json"
# How far above a file the folder of its model may be: <model>/text_encoder_2/model.safetensors.
_LEVELS = 3


def weight_options(
    script: Script, flags: argparse.Namespace, working_dir: Path, note: Callable[[str], None]
) -> dict[str, Any]:
    """The options that name the model, and the parts of it that have files of their own.

    Raises:
        ConfigError: a path leads nowhere, to pickles, or to something else than the flag takes; all at once.
    """
    places = {flag: getattr(flags, flag) for flag in script.paths}
    problems = [each for flag, text in places.items() for each in _unusable(flag, text, script, working_dir)]
    if problems:
        raise ConfigError(problems)
    if "pretrained_path" in places:
        return _of_one_path(script, places["pretrained_path"], working_dir, note)
    model = next((found for text in places.values() if (found := _model_around(text, working_dir))), None)
    options = {"pretrained_model_name_or_path": model} if model else {}
    note(f"tokenizers and configurations come from {model or script.safetensors}")
    if script.family == "flux":
        encoders = [places["pretrained_text_encoder_path"], places["pretrained_text_encoder_2_path"]]
        denoiser, vae = places["pretrained_dit_path"], places["pretrained_vae_path"]
    else:
        encoders = [places["pretrained_text_encoder_path"]]
        denoiser, vae = places["pretrained_unet_path"], places["pretrained_fp16_vae_path"]
    return {
        **options,
        "text_encoder_paths": encoders,
        "pretrained_transformer_model_name_or_path": denoiser,
        "pretrained_vae_model_name_or_path": vae,
    }


def _unusable(flag: str, text: str, script: Script, working_dir: Path) -> Iterator[Problem]:
    """What is wrong with a path, or with one of several with commas."""
    is_model = flag == "pretrained_path"
    for each in text.split(","):
        path = _path(each, working_dir)
        fix = f"name the safetensors of {script.safetensors}"
        if path.suffix.lower() in PICKLES or _holds_pickles(path):
            yield Problem(f"{each} is a pickle, which may run a program when it is opened", f"--{flag}", fix=fix)
        elif not path.exists():
            if not is_model or looks_like_path(each):
                yield Problem(f"{each} is not there", key=f"--{flag}", fix="correct the path")
        elif path.is_dir() and is_model and not (path / INDEX).is_file():
            yield Problem(f"{each} has no {INDEX}", f"--{flag}", allowed="a diffusers folder", fix=fix)
        elif path.is_dir() and flag in ("pretrained_dit_path", "pretrained_unet_path"):
            yield Problem(f"{each} is a folder", key=f"--{flag}", allowed=f"a {SINGLE_FILE} file")
        elif path.is_file() and not each.endswith(SINGLE_FILE):
            yield Problem(f"{each} is not a {SINGLE_FILE} file", key=f"--{flag}", fix=fix)


def _holds_pickles(folder: Path) -> bool:
    """Whether a folder has weights in pickles alone, at its top or in the folders of its parts."""
    found = [each for pattern in ("*", "*/*") for each in folder.glob(pattern)] if folder.is_dir() else []
    suffixes = {each.suffix.lower() for each in found}
    return not suffixes.isdisjoint(PICKLES) and SINGLE_FILE not in suffixes


def _path(text: str, working_dir: Path) -> Path:
    return working_dir / Path(text).expanduser()


def _model_around(text: str, working_dir: Path) -> str | None:
    """The diffusers folder that a file lies in."""
    place = Path(text)
    around = [place, *place.parents][: _LEVELS + 1]
    return next((str(each) for each in around if (_path(str(each), working_dir) / INDEX).is_file()), None)


def _of_one_path(script: Script, text: str, working_dir: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """A diffusers folder, a hub id, or single files with commas."""
    if not text.endswith(SINGLE_FILE):
        return {"pretrained_model_name_or_path": text}
    from simpletuner.models.single_file import names_in_file

    names = {each: names_in_file(str(_path(each, working_dir))) for each in text.split(",")}
    whole = next((each for each, found in names.items() if any("joint_blocks." in name for name in found)), None)
    if script.family != "sd3" or whole is None:
        message = f"{text} holds no transformer of Stable Diffusion 3" if script.family == "sd3" else "is one file"
        allowed = "a file of the original release" if script.family == "sd3" else "a diffusers folder or a hub id"
        raise ConfigError(Problem(message, key="--pretrained_path", allowed=allowed))
    model = _model_around(whole, working_dir)
    flavour = {} if model else {"model_flavour": _flavour_of(names[whole])}
    note(f"tokenizers and configurations come from {model or 'the hub id of ' + flavour['model_flavour']}")
    encoders = _encoder_files({each: found for each, found in names.items() if each != whole})
    if not encoders[2] and not any(name.startswith("text_encoders.t5xxl.") for name in names[whole]):
        note(f"{whole} has no T5: its tokens are rows of zeros")
        encoders[2] = WITHOUT
    return {
        **({"pretrained_model_name_or_path": model} if model else flavour),
        "pretrained_transformer_model_name_or_path": whole,
        **({"text_encoder_paths": encoders} if any(encoders) else {}),
    }


def _flavour_of(names: set[str]) -> str:
    """Only 3.5 norms queries and keys, and only its medium size has second attentions."""
    if any(".attn2." in name for name in names):
        return "3.5-medium"
    return "3.5-large" if any(".ln_q." in name for name in names) else "3-medium"


def _encoder_files(names: dict[str, set[str]]) -> list[str]:
    """The files of CLIP-L, CLIP-G and T5, "" for those that are not given; CLIP-G is the one with more layers."""
    clips = [each for each, found in names.items() if any("text_model." in name for name in found)]
    t5 = [each for each, found in names.items() if any(name.startswith("encoder.block.") for name in found)]
    if strangers := [each for each in names if each not in (*clips, *t5)]:
        message = f"{strangers[0]} is not a text encoder of Stable Diffusion 3"
        raise ConfigError(Problem(message, key="--pretrained_path", allowed="files of CLIP-L, CLIP-G and T5"))
    smaller, *larger = sorted(clips, key=lambda each: len(names[each])) or [""]
    return [smaller, larger[0] if larger else "", t5[0] if t5 else ""]
