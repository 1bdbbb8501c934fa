"""What the end of a run tells its user."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from simpletuner.training.finish import generate_command, has_final_weights, note_final_weights
from tests.toy import load_toy, toy_run


def test_the_command_at_the_end_generates_as_validation_does(tmp_path: Path) -> None:
    """`validation_resolution` is width x height."""
    loaded = load_toy(
        tmp_path,
        validation_prompt="a red star",
        validation_resolution="64x32",
        validation_num_inference_steps=7,
        validation_guidance=2.5,
    )
    family: Any = SimpleNamespace(source=SimpleNamespace(model="the/base", file=None), prompt_settings={})
    words = shlex.split(generate_command(loaded, family, {"adapter": Path("out/a.safetensors")}))
    assert words[1] == "generate"
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--model"] == "the/base"
    assert given["--adapter"] == "out/a.safetensors"
    assert given["--prompt"] == "a red star"
    assert (given["--width"], given["--height"]) == ("64", "32")
    assert (given["--steps"], given["--guidance"]) == ("7", "2.5")
    whole = shlex.split(generate_command(loaded, family, {"model": Path("out/pipeline")}))
    assert whole[whole.index("--model") + 1] == "out/pipeline"
    assert "--adapter" not in whole


def test_final_weights_count_where_they_are_whole_and_of_this_step(tmp_path: Path) -> None:
    run, _ = toy_run(tmp_path, {"a": (1.0, 3.0)}, max_train_steps=2)
    path = run.session.output_dir / run.model.adapter.file_name
    run.model.adapter.save(path, {})
    run.progress.global_step = 2
    note_final_weights(run)
    assert has_final_weights(run)
    run.progress.global_step = 3
    assert not has_final_weights(run)
    run.progress.global_step = 2
    run.model.adapter.save(path, {"written": "again"})
    assert not has_final_weights(run)
