"""The adapter that a configuration asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from simpletuner.adapters import build
from tests.configs import config_of

DENOISER: Any = nn.Linear(1, 1)
SPEC: Any = object()


@pytest.mark.parametrize(("lora_type", "attaching"), [("standard", "attach_lora"), ("lycoris", "attach_lycoris")])
def test_an_adapter_gets_the_number_format_and_the_seed_of_its_run(
    lora_type: str, attaching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build, attaching, lambda *given: (asked.extend(given[2:5]), "adapter")[1])
    config = config_of(lora_type=lora_type, seed=7, mixed_precision="bf16", lora_rank=3)
    found: Any = build.build_adapter(DENOISER, SPEC, config, {})
    assert found == "adapter"
    assert asked == [SPEC, build.adapter_dtype(config), 7]


def test_options_of_a_lora_are_its_settings() -> None:
    options = {"lora_rank": 3, "lora_alpha": 5.0, "lora_dropout": 0.25, "lora_format": "kohya", "use_dora": True}
    found = build.lora_settings(config_of(**options).adapter)
    assert (found.rank, found.alpha, found.dropout, found.use_dora) == (3, 5.0, 0.25, True)
    assert found.file_format == "kohya"


@pytest.mark.parametrize(("level", "expected"), [(None, []), ("high", ["high"]), ("lowest", ["lowest"])])
def test_what_blocks_keep_is_set_where_it_is_written(
    level: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build, "set_activation_memory", lambda denoiser, level: asked.append((denoiser, level)))
    monkeypatch.setattr(build, "build_adapter", lambda *given: given)
    loaded: Any = SimpleNamespace(config=config_of(activation_memory=level), lycoris={"algo": "lokr"})
    family: Any = SimpleNamespace(spec_of_weights=SPEC)
    found: Any = build.attach_adapter(loaded, family, DENOISER)
    assert found == (DENOISER, SPEC, loaded.config, loaded.lycoris)
    assert asked == [(DENOISER, level) for level in expected]
