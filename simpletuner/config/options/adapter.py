"""The adapter that is trained when `model_type` is `lora`."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, FilePath, Float, Int, Text

STANDARD_LORA = "standard LoRA is not built yet; use lora_type lycoris"


class AdapterOptions(OptionGroup):
    """Adapter"""

    lora_type: Literal["lycoris", "standard"] = option(
        "lycoris",
        help="`lycoris` reads algorithm and targets from `lycoris_config`.",
        level="basic",
        planned_values={"standard": STANDARD_LORA},
    )
    lycoris_config: FilePath | None = option(
        None,
        help="JSON file with the LyCORIS algorithm (`algo`, `factor`, ...) and the modules it applies to.",
        level="basic",
        path="input",
    )
    init_lora: Text | None = option(
        None, help="Adapter file to start from.", planned="starting from another adapter is not built"
    )
    lora_rank: Int = option(16, help="Rank of standard LoRA.", planned=STANDARD_LORA, ge=1)
    lora_alpha: Float | None = option(None, help="Alpha of standard LoRA.", planned=STANDARD_LORA, gt=0)
    lora_dropout: Float = option(0.1, help="Dropout of standard LoRA.", planned=STANDARD_LORA, ge=0, le=1)
    lora_init_type: Text = option("default", help="Initialisation of standard LoRA.", planned=STANDARD_LORA)
    lora_format: Text = option("diffusers", help="File format of standard LoRA.", planned=STANDARD_LORA)
    use_dora: Bool = option(False, help="Weight-decomposed LoRA.", planned=STANDARD_LORA)
    peft_lora_mode: Text = option("standard", help="Mode of standard LoRA.", planned=STANDARD_LORA)
