"""A working folder with a small, sound configuration, that tests change in one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from simpletuner.config.loading import LoadedRun, load_run
from simpletuner.errors import ConfigError
from simpletuner.families.registry import get_spec
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour

FAMILY = FamilySpec(
    name="toy",
    title="Toy",
    family_class="nowhere:Toy",
    flavours={"small": Flavour("small", "toys/small"), "large": Flavour("large", "toys/large")},
    default_flavour="small",
    components=(Component("vae", "nowhere.Vae", "vae"),),
    prediction_type="flow",
    latent_channels=4,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=77,
    pipeline_class="ToyPipeline",
    max_size=2048,
    adaptable=(
        AdaptableModule("Attention", ("layers.*.self_attn",)),
        AdaptableModule("ToyFeedForward", ("layers.*.mlp",)),
        AdaptableModule("Linear", ("layers.*.self_attn.to_q", "proj_out")),
    ),
    class_aliases={"FeedForward": "ToyFeedForward"},
    block_classes=("ToyBlock",),
    default_lora_targets=("layers.*.self_attn.to_q",),
    target_groups={"attention": ("layers.*.self_attn.to_q",)},
    defaults={"validation_guidance": 3.5, "validation_num_inference_steps": 25},
    preview_decoder="toys/tiny-decoder",
    unusable_options={"offset_noise": ((False,), "its noise is its own")},
)


def find_spec(name: str) -> FamilySpec:
    """The toy family, or a real one."""
    return FAMILY if name == FAMILY.name else get_spec(name)


CONFIG: Mapping[str, Any] = {
    "model_family": "toy",
    "model_type": "lora",
    "lora_type": "lycoris",
    "lycoris_config": "config/lycoris_config.json",
    "data_backend_config": "config/multidatabackend.json",
    "output_dir": "output/run",
    "max_train_steps": 100,
    "validation_prompt": "a cat",
}
LYCORIS: Mapping[str, Any] = {"algo": "lokr", "factor": 4, "apply_preset": {"target_module": ["Attention"]}}
DATASET: Mapping[str, Any] = {"id": "images", "instance_data_dir": "datasets/images"}


@dataclass
class Workspace:
    """A working folder; `load` reads what is in it."""

    root: Path
    config: dict[str, Any] = field(default_factory=lambda: dict(CONFIG))
    lycoris: Any = field(default_factory=lambda: json.loads(json.dumps(LYCORIS)))
    datasets: Any = field(default_factory=lambda: [dict(DATASET)])
    environment: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write the three files; a text is written as it is."""
        self.put("config/config.json", self.config)
        self.put("config/lycoris_config.json", self.lycoris)
        self.put("config/multidatabackend.json", self.datasets)

    def put(self, name: str, content: Any) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
        return path

    def line(self, name: str, key: str) -> int:
        """The line of a file in which a key stands first, by the text of it."""
        lines = (self.root / name).read_text(encoding="utf-8").splitlines()
        return next(number for number, line in enumerate(lines, 1) if line.lstrip().startswith(f'"{key}":'))

    def load(self, *arguments: str, check_files: bool = True) -> LoadedRun:
        with mock.patch("simpletuner.config.loading.get_spec", find_spec):
            return load_run(arguments, self.environment, self.root, check_files)

    def load_written(self, *arguments: str, check_files: bool = True) -> LoadedRun:
        self.write()
        return self.load(*arguments, check_files=check_files)

    def fails(self, *arguments: str) -> ConfigError:
        """The error of loading what is written."""
        with pytest.raises(ConfigError) as caught:
            self.load(*arguments)
        return caught.value

    def fails_written(self, *arguments: str) -> ConfigError:
        self.write()
        return self.fails(*arguments)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "datasets" / "images").mkdir(parents=True)
    return Workspace(tmp_path)


@pytest.fixture
def quickstart(tmp_path: Path) -> Callable[[str], Workspace]:
    """A working folder that follows the quickstart: its files, verbatim, where it says to put them."""

    def make(data_file: str) -> Workspace:
        fixtures = Path(__file__).parents[2] / "fixtures" / "quickstart"
        made = Workspace(tmp_path)
        for name in ("config.json", "lycoris_config.json", "user_prompt_library.json"):
            made.put(f"config/{name}", (fixtures / name).read_text(encoding="utf-8"))
        made.put("config/omnigen/multidatabackend.json", (fixtures / data_file).read_text(encoding="utf-8"))
        return made

    return make
