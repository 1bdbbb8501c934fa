"""What the wizard is given: the answers that both of its fronts, the screens and the command line, fill in.

What nobody answers is proposed (`proposals.py`) from the goal, the model, the images and the machine; what somebody
chose is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from simpletuner.errors import ConfigError, Problem
from simpletuner.families.readers import FORMS, Form, Kind, readers_of
from simpletuner.families.registry import get_spec
from simpletuner.families.spec import FamilySpec
from simpletuner.hardware import Hardware, gpu_with
from simpletuner.spelling import did_you_mean
from simpletuner.wizard.lycoris import ALGORITHMS, LAYERS, Layers, Lycoris

Goal = Literal["subject", "style", "edit", "full"]
Name = TypeVar("Name", bound=str)

# All but the second and third are algorithms of LyCORIS (`lycoris.py`).
ADAPTERS: Mapping[str, str] = {
    "lokr": "LoKr: learns much in a small file",
    "lora": "LoRA: loads in nearly every program",
    "dora": "DoRA: LoRA, and the magnitude of each row; slower",
    "loha": "LoHa: two low-rank matrices, multiplied; slower",
    "locon": "LoCon: LoRA in the format of LyCORIS",
    "dylora": "DyLoRA: LoRA that can be cut to any smaller rank",
    "glora": "GLoRA: LoRA, and a factor of the weight",
    "diag-oft": "Diag-OFT: rotates the output of each layer",
    "boft": "BOFT: the same rotation, in several steps",
    "ia3": "IA3: one factor for each output; the smallest file",
    "full": "full: the full weight difference; large",
}
GOALS: Mapping[Goal, str] = {
    "subject": "one person, animal or thing, from a few images",
    "style": "a visual style, from captioned images",
    "edit": "an edit, from pairs of images: before and after",
    "full": "the whole model, no adapter: many images, much memory",
}


@dataclass(frozen=True)
class ImageFacts:
    """What a scan found in a folder.

    Args:
        usable: images that decode.
        with_text: usable ones with a text file beside them.
        with_name: usable ones whose file name has words.
        are_numbered: the names are numbers of a camera, of which a model learns nothing.
        without_words: usable ones without a text file whose name says nothing.
        caption: the first of the text files, "" where there is none.
        side: median of the side of the square of equal area, in pixels.
        shapes: every (height, width) that occurs.
    """

    usable: int
    with_text: int
    with_name: int
    side: int
    shapes: frozenset[tuple[int, int]] = frozenset()
    are_numbered: bool = False
    caption: str = ""
    without_words: int = 0

    @property
    def is_partly_captioned(self) -> bool:
        """Whether some images have a text file and others none."""
        return 0 < self.with_text < self.usable

    @property
    def captions(self) -> str:
        """The caption strategy that serves every image."""
        return "textfile" if self.usable and self.with_text == self.usable else "filename"


@dataclass(frozen=True)
class Answers:
    """What somebody said, and what was found out.

    Args:
        hardware: of this machine.
        trains_on: GiB of the GPU that the run is written for; None: it trains on this machine.
        family: name in the registry.
        flavor: of the family; None is its default.
        model: folder or hub id in place of the flavor's.
        images: folder to train on, as typed; `eval_images` and `regularisation_images` likewise, or empty.
        reference_images: folder of what the images are made from, to teach an edit; or empty.
        reference_type: `reference_strict` or `reference_loose`; None is proposed.
        dataset: keys of the first folder's entry that were chosen.
        adapter: what is trained beside the model (`ADAPTERS`), unless the goal is the whole of it.
        factor, rank, layers: of an adapter of LyCORIS; None is proposed.
        prompts: generated while training; None is proposed, () generates nothing.
        options: options of config.json that were chosen, typed.
        seen: folder -> what its scan found.
        name: of the configuration (`env=NAME`), where it has one; the results are filed under it.
    """

    hardware: Hardware
    trains_on: int | None = None
    goal: Goal = "subject"
    family: str = ""
    flavour: str | None = None
    model: str | None = None
    images: str = ""
    eval_images: str = ""
    regularisation_images: str = ""
    reference_images: str = ""
    reference_type: str | None = None
    dataset: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = "lokr"
    factor: int | None = None
    rank: int | None = None
    layers: Layers | None = None
    prompts: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seen: Mapping[str, ImageFacts] = field(default_factory=dict)
    name: str = ""

    @property
    def target(self) -> Hardware:
        """The machine that trains."""
        return self.hardware if self.trains_on is None else gpu_with(self.trains_on)

    @property
    def spec(self) -> FamilySpec:
        return get_spec(self.family)

    @property
    def lycoris(self) -> Lycoris | None:
        """What is asked of LyCORIS; None where nothing of it is trained."""
        if self.goal == "full" or self.adapter not in ALGORITHMS:
            return None
        return Lycoris(self.adapter, self.factor, self.rank, self.layers)

    @property
    def flavour_name(self) -> str:
        """The one that was chosen, or is proposed: for an edit one that was made for it, where there is one."""
        if self.flavour:
            return self.flavour
        editing = [name for name, flavour in self.spec.flavours.items() if flavour.edits]
        if self.goal == "edit" and editing and self.spec.default_flavour not in editing:
            return editing[0]
        return self.spec.default_flavour


def proposed_adapter(spec: FamilySpec) -> str:
    """LoKr, but LoRA where programs read one of the family and none reads the LoKr file that training writes."""
    return "lora" if _programs(spec, FORMS, "lora") and not _programs(spec, ("lycoris",), "lokr") else "lokr"


def _programs(spec: FamilySpec, forms: Sequence[Form], kind: Kind) -> set[str]:
    """Those that generate images with such a file; PEFT and LyCORIS are libraries."""
    readers = [reader for form in forms for reader in readers_of(spec.readers, form, kind) if not reader.instead]
    return {reader.program for reader in readers} - {"PEFT", "LyCORIS"}


def adapter_after(answers: Answers, family: str) -> str:
    """The adapter where the family is changed: what is proposed for it, unless another than the proposal was chosen."""
    was_proposed = answers.adapter == proposed_adapter(answers.spec)
    return proposed_adapter(get_spec(family)) if was_proposed else answers.adapter


def read_adapter(text: str) -> str:
    """An adapter by its name.

    Raises:
        ConfigError: it is none.
    """
    return _one_of(ADAPTERS, text, "--adapter", "an adapter")


def read_layers(text: str) -> Layers:
    """Which layers are adapted, by their name.

    Raises:
        ConfigError: it is none.
    """
    return _one_of(LAYERS, text, "--layers", "a choice of layers")


def read_goal(text: str) -> Goal:
    """A goal by its name.

    Raises:
        ConfigError: it is none.
    """
    return _one_of(GOALS, text, "--goal", "a goal")


def _one_of(known: Mapping[Name, str], text: str, key: str, what: str) -> Name:
    for name in known:
        if text == name:
            return name
    fix = did_you_mean(text, known)
    raise ConfigError(Problem(f'"{text}" is not {what}', key=key, allowed=", ".join(known), fix=fix))
