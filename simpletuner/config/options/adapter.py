"""The adapter that is trained when `model_type` is `lora`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, FilePath, Float, Int, Text, read_words

_NEEDS_DATA = "it initializes from activations or gradients on data, before the run has any"


class AdapterOptions(OptionGroup):
    """Adapter"""

    lora_type: Literal["lycoris", "standard"] = option(
        "lycoris",
        help="`lycoris` reads algorithm and targets from `lycoris_config`; `standard` is LoRA (or DoRA) as diffusers, "
        "PEFT and ComfyUI know it, set by the `lora_*` keys.",
        level="basic",
    )
    lycoris_config: FilePath | None = option(
        None,
        help="JSON file with the LyCORIS algorithm (`algo`, `factor`, ...) and the modules it applies to.",
        level="basic",
        path="input",
    )
    init_lora: FilePath | None = option(
        None,
        help="Adapter file (.safetensors), or folder of PEFT, to start from, of any format that `simpletuner generate` "
        "reads. It must be of the algorithm that is trained; a LoRA of smaller rank is filled up.",
        path="input",
    )
    assistant_lora_path: Text | None = option(
        None,
        help="LoRA that is on while training and off in validation, generation and all files, so that distilled "
        "weights (Turbo, schnell) keep their few steps; it never trains. A `.safetensors` file, a folder with one of "
        "a usual name, or a hub id, perhaps with a file behind it (`owner/name/file.safetensors`). Some flavors have "
        "one by default.",
    )
    assistant_lora_strength: Float = option(
        1.0, help="Multiplies what the assistant LoRA adds; 0 trains without it.", ge=0
    )
    lora_rank: Int = option(16, help="Rank of standard LoRA: its size and what it can learn.", level="basic", ge=1)
    lora_alpha: Float | None = option(
        None, help="The change is multiplied with `lora_alpha / lora_rank`. Unset: the rank, so with 1.", gt=0
    )
    lora_dropout: Float = option(
        0.1, help="Probability with which inputs of standard LoRA are dropped in training.", ge=0, lt=1
    )
    lora_target: Annotated[tuple[str, ...], BeforeValidator(read_words)] = option(
        ("default",),
        takes="list of names, or text with commas",
        help="Layers of standard LoRA: `default` and the groups of the family (`attention`, `feed-forward`, ...), "
        "`all-linear`, or patterns of module paths such as `layers.*.self_attn.to_q`; several with commas.",
        since="0.2",
    )
    lora_init_type: Literal[
        "default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq", "eva", "corda", "lora_ga"
    ] = option(
        "default",
        help="First weights of standard LoRA. `pissa` and `olora` start from parts of the base's own weights; their "
        "files have twice the rank, so that they fit the untouched model.",
        planned_values={
            "loftq": "it replaces the base by a quantized one, without which the file is of no use; set "
            "base_model_precision instead",
            **dict.fromkeys(("eva", "corda", "lora_ga"), _NEEDS_DATA),
        },
    )
    lora_format: Literal["diffusers", "kohya", "comfyui", "lycoris"] = option(
        "diffusers",
        help="File format of standard LoRA; `simpletuner export` writes the others later. SDXL's default is `kohya`, "
        "which more programs read; with `use_dora` it is `diffusers` for all.",
    )
    use_dora: Bool = option(
        False, help="Weight-decomposed LoRA (DoRA): also trains the magnitude of each row. Slower, needs the weights."
    )
    peft_lora_mode: Literal["standard", "singlora"] = option(
        "standard",
        help="Mode of standard LoRA.",
        planned_values={"singlora": "its symmetric updates exist in no maintained library; use standard"},
    )
