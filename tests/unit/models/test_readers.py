"""Who reads a file, in one line: of the table that `tests/families/test_other_programs.py` holds against readers."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from simpletuner.config.lycoris_algorithms import form_and_kind
from simpletuner.families.registry import get_spec

OUTSIDE, INSIDE = "x_embedder", "single_transformer_blocks.0.attn.to_q"
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FEED_FORWARD = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize(
    ("family", "form", "kind", "paths", "text"),
    [
        ("sdxl", "kohya", "lora", (), "read by diffusers, ComfyUI, A1111, Forge and kohya's scripts"),
        ("sdxl", "diffusers", "lora", (ATTENTION,), "read by diffusers; ComfyUI changes none of its layers"),
        (
            *("sdxl", "diffusers", "lora", (ATTENTION, FEED_FORWARD)),
            "read by diffusers; ComfyUI leaves out 1 of 2 layers",
        ),
        ("flux", "kohya", "lora", (INSIDE,), "read by diffusers, ComfyUI and kohya's scripts"),
        (
            *("flux", "kohya", "lora", (INSIDE, OUTSIDE)),
            "read by ComfyUI and kohya's scripts; diffusers leaves out 1 of 2 layers",
        ),
        (
            *("chroma", "kohya", "lora", (INSIDE, "distilled_guidance_layer.in_proj")),
            "read by ComfyUI and kohya's scripts; diffusers refuses it for 1 of 2 layers",
        ),
        ("flux", "lycoris", "lokr", (), "read by ComfyUI and LyCORIS"),
        ("krea2", "comfyui", "lora", (), "read by ComfyUI and diffusers"),
        (
            *("flux2", "comfyui", "lora", ("norm_out.linear", "proj_out")),
            "read by ComfyUI; diffusers misreads 1 of 2 layers",
        ),
        ("omnigen", "kohya", "lora", (), "read by no other program that is known"),
    ],
)
def test_a_file_names_its_readers_and_what_they_leave_out(family, form, kind, paths, text) -> None:
    assert get_spec(family).read_by(form, kind, paths) == text


@pytest.mark.parametrize(
    ("lycoris", "kind"),
    [
        ({"algo": "lokr"}, "lokr"),
        ({}, "lora"),
        ({"algo": "lora"}, "lora"),
        ({"algo": "locon", "dora_wd": True}, "dora"),
        ({"algo": "lokr", "dora_wd": True}, "other"),
        ({"algo": "lokr", "apply_preset": {"module_algo_map": {"FeedForward": {"algo": "full"}}}}, "other"),
        ({"algo": "loha", "train_norm": True}, "other"),
    ],
    ids=str,
)
def test_a_configuration_reports_what_its_files_hold(lycoris, kind) -> None:
    assert form_and_kind(SimpleNamespace(lora_type="lycoris"), lycoris) == ("lycoris", kind)


def test_the_table_is_read_without_torch() -> None:
    code = "import sys; from simpletuner.families.registry import get_spec; get_spec('flux').read_by('kohya', 'lora')"
    check = "; assert not {'torch', 'diffusers', 'lycoris', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True)
