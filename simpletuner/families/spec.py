"""What is known of a model family without loading it: facts as data.

Everything here is read before torch is imported: by the configuration's checks, the wizard, `simpletuner models`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import Reader, reading_text

PredictionType = Literal["flow", "epsilon", "v_prediction"]


@dataclass(frozen=True)
class Flavour:
    """One published checkpoint of a family.

    Args:
        parameters: of the denoiser, which decides the memory that training needs; 0 where nobody counted them.
        defaults: option -> default that differs from the family's.
        edits: it was made for editing images, so pairs are best taught to it.
    """

    name: str
    hub_id: str
    description: str = ""
    licence: str = ""
    parameters: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    edits: bool = False

    def weight_bytes(self, bits: int = 16) -> int:
        """Bytes of the frozen denoiser in a format of so many bits: the least that training an adapter needs."""
        return self.parameters * bits // 8


@dataclass(frozen=True)
class Component:
    """One folder of a model in diffusers layout.

    Args:
        name: folder and pipeline attribute (`vae`, `transformer`, `text_encoder_2`).
        class_name: dotted path of the class that loads it.
        role: what the trainer uses it for.
        config_file: the file that shows that the folder is there.
        in_file: how keys of this part begin in a single file of the whole model; empty where such files lack it.
        attention: of an encoder whose states depend on how transformers computes attention (rows of left padding do):
            the implementation that it is loaded with, which is part of the key of every cached prompt. Empty:
            transformers' own choice.
        is_optional: the model works without this text encoder.
        load_options: further arguments of its `from_pretrained`, of a text encoder.
        library: what `model_index.json` names in front of the class; the first word of `class_name` where it is empty.
        package: an optional package that reads this tokenizer where its folder has no `tokenizer.json`.
    """

    name: str
    class_name: str
    role: Literal["denoiser", "vae", "text_encoder", "tokenizer", "scheduler", "processor"]
    config_file: str = "config.json"
    in_file: tuple[str, ...] = ()
    attention: str = ""
    is_optional: bool = False
    load_options: Mapping[str, Any] = field(default_factory=dict)
    library: str = ""
    package: str = ""

    @property
    def index_entry(self) -> list[str]:
        """Library and class, as `model_index.json` names them."""
        module, _, name = self.class_name.rpartition(".")
        return [self.library or module.partition(".")[0], name]


def flow_components(denoiser: str, text_encoder: str, tokenizer: str) -> tuple[Component, ...]:
    """The folders of most models of flow with one text encoder.

    Args:
        denoiser: a class of diffusers.
        text_encoder: a class of transformers.
        tokenizer: likewise.
    """
    return (
        Component("transformer", f"diffusers.{denoiser}", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae"),
        Component("text_encoder", f"transformers.{text_encoder}", "text_encoder"),
        Component("tokenizer", f"transformers.{tokenizer}", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    )


@dataclass(frozen=True)
class AdaptableModule:
    """A class of layers inside the denoiser that an adapter can be attached to.

    Args:
        class_name: exact class, as presets name it.
        names: fnmatch patterns of the module paths of that class, relative to the denoiser.
    """

    class_name: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class FamilySpec:
    """Facts of a family.

    Args:
        name: `model_family` in the configuration.
        title: how people call it.
        family_class: dotted path `package.module:Class` of the `ModelFamily`.
        components: table of the model folder.
        latent_channels: C of the latents.
        vae_factor: pixels per latent, one side.
        patch_size: latents per token, one side; sizes are multiples of `vae_factor * patch_size`.
        max_size: largest image side in pixels that the family takes, None if unbounded.
        max_prompt_tokens: tokens that reach the denoiser; longer prompts are cut and counted.
        max_references: input images for editing; 0 where the family has none.
        stretches: images that keep their own size, and loose references, are stretched to multiples of
            `size_multiple`, as the family was trained; otherwise the rest is cut off.
        prompts_see_references: the encoders of prompts look at the reference images: the embeddings of a caption are
            other ones for each set of references.
        drops_references: where a caption is dropped, the references of its image are too.
        prompt_lengths: numbers of tokens that `tokenizer_max_length` may set; None where the family reads prompts of
            one length.
        caches_prompt_embeds: False where the prompt is only tokenized (nothing worth caching).
        prompt_tensors: names of the tensors that `encode_prompts` makes of a prompt; what a file of embeddings holds.
            Empty where files of them are not read.
        dropped_caption: what a dropped caption becomes.
        empty_negative: the text that an empty negative prompt is encoded as; another one than "" where the family
            takes zeros for that, as it does for a dropped caption.
        negative_mark: stands in front of a negative prompt that `encode_prompts` is given, where the family reads it
            otherwise than a prompt.
        default_flavour: used where `model_flavour` is not set.
        adaptable: what adapters can be attached to.
        class_aliases: preset class names that mean a class of this family (`FeedForward` -> `OmniGenFeedForward`).
        target_groups: names for sets of layers -> fnmatch patterns of their paths; `attention` and `feed-forward`
            should be among them, for LyCORIS' presets are made of these.
        default_lora_targets: fnmatch patterns of the linears that standard LoRA adapts by default.
        keys: names of the denoiser's modules in kohya's and ComfyUI's files.
        diffsynth: names of the denoiser's modules in DiffSynth-Studio; None where it has no such model.
        readers: which other programs read adapter files of the family.
        block_classes: repeated blocks, for checkpointing, FSDP and compile; quantization packs their linear layers.
        unadaptable: fnmatch patterns of layers on which no adapter may sit.
        unquantized: fnmatch patterns of linear layers in them that are never packed.
        pipeline_class: name written to `model_index.json`.
        preview_decoder: hub id of the tiny autoencoder that decodes previews; a model folder may carry its own in
            `preview_decoder/`.
        pipeline_options: arguments that the family's pipeline takes beyond those of the contract: `guidance_rescale`,
            `true_cfg_scale`, `skip_guidance_layers`.
        prompt_options: options of how prompts are encoded that the family takes: `clip_skip`,
            `force_zeros_for_empty_prompt`.
        other_prompt_options: option of that kind -> why it has no meaning here.
        reads_single_files: the key table names every tensor of the denoiser, so that a file of the original layout can
            be read.
        pipeline_aliases: other pipelines whose models are of this family, by the name in `model_index.json`.
        refused_models: pipelines (by the name in `model_index.json`) and hub ids of models that look like this family
            and are another network -> reason.
        defaults: option -> default that differs for this family.
        ignored_options: option -> reason: without meaning for this family; a warning says so, and the default counts.
        unusable_options: option -> (neutral values, reason): refused unless they hold a neutral value.
    """

    name: str
    title: str
    family_class: str
    flavours: Mapping[str, Flavour]
    default_flavour: str
    components: tuple[Component, ...]
    prediction_type: PredictionType
    latent_channels: int
    vae_factor: int
    patch_size: int
    max_prompt_tokens: int
    pipeline_class: str
    adaptable: tuple[AdaptableModule, ...]
    block_classes: tuple[str, ...]
    default_lora_targets: tuple[str, ...]
    unadaptable: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    class_aliases: Mapping[str, str] = field(default_factory=dict)
    target_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: KeyTable = field(default_factory=KeyTable)
    diffsynth: KeyTable | None = None
    readers: tuple[Reader, ...] = ()
    max_size: int | None = None
    max_references: int = 0
    stretches: bool = False
    prompts_see_references: bool = False
    drops_references: bool = True
    prompt_lengths: range | None = None
    caches_prompt_embeds: bool = True
    prompt_tensors: tuple[str, ...] = ()
    dropped_caption: str = ""
    empty_negative: str = ""
    negative_mark: str = ""
    preview_decoder: str | None = None
    pipeline_options: tuple[str, ...] = ()
    prompt_options: tuple[str, ...] = ()
    other_prompt_options: Mapping[str, str] = field(default_factory=dict)
    pipeline_aliases: tuple[str, ...] = ()
    refused_models: Mapping[str, str] = field(default_factory=dict)
    reads_single_files: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored_options: Mapping[str, str] = field(default_factory=dict)
    unusable_options: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {flavour.name for flavour in self.flavours.values()}
        if names != self.flavours.keys() or self.default_flavour not in names:
            raise ValueError(f"{self.name}: flavors {', '.join(names)} are listed as {', '.join(self.flavours)}")

    @property
    def size_multiple(self) -> int:
        """Pixels: every side of a training image is a multiple of this."""
        return self.vae_factor * self.patch_size

    def has_pipeline(self, name: str | None) -> bool:
        """Whether models whose `model_index.json` names this pipeline are of the family."""
        return name in (self.pipeline_class, *self.pipeline_aliases)

    @property
    def networks(self) -> set[tuple[str, str]]:
        """(Folder, class) of the denoiser and the text encoders; families that share them can share a model."""
        parts = [part for part in self.components if part.role in ("denoiser", "text_encoder")]
        return {(part.name, part.class_name) for part in parts}

    def defaults_for(self, flavour: str | None) -> dict[str, Any]:
        """Option -> default of a flavor; None is the family's first. An unknown flavor has the family's own."""
        chosen = self.flavours.get(flavour or self.default_flavour)
        return {**self.defaults, **(chosen.defaults if chosen else {})}

    def negative_text(self, negative: str | None) -> str:
        """The text whose embeddings guidance leads away from: a dropped caption's where no negative prompt is given."""
        if negative is None:
            return self.dropped_caption
        return self.negative_mark + negative if negative else self.empty_negative

    def default_form(self, kind: str) -> str:
        """Of the files of standard LoRA; weight decomposition (`dora`) means the same in diffusers' form alone."""
        return "diffusers" if kind == "dora" else self.defaults.get("lora_format", "diffusers")

    def read_by(self, form: str, kind: str, paths: Sequence[str] = ()) -> str:
        """Who reads an adapter file, in one line; see `families/readers.py`."""
        return reading_text(self.readers, form, kind, paths)

    def component(self, role: str) -> Component:
        """The one component of a role; KeyError where there is none."""
        found = [component for component in self.components if component.role == role]
        if len(found) != 1:
            raise KeyError(f"{self.name} has {len(found)} components of role {role}")
        return found[0]
