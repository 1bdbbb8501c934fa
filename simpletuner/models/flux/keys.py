"""FLUX.1's modules by the names of the original release (`flux/model.py`); its blocks are in `models/flux_blocks.py`.

Scale and shift of the last layer are the other way round. Source: black-forest-labs/flux; diffusers'
`scripts/convert_flux_to_diffusers.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.models.flux_blocks import DOUBLE, FUSED, RENAMED, SINGLE, renamed_embedders

FLUX_KEYS = KeyTable(
    renamed={
        **RENAMED,
        f"{DOUBLE}.norm1.linear": "double_blocks.*.img_mod.lin",
        f"{DOUBLE}.norm1_context.linear": "double_blocks.*.txt_mod.lin",
        f"{SINGLE}.norm.linear": "single_blocks.*.modulation.lin",
        **renamed_embedders("time_text_embed", {"timestep": "time", "text": "vector", "guidance": "guidance"}),
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    fused=FUSED,
    swapped=("norm_out.linear",),
    architecture="flux-1-dev",
    base_model_version="flux1",
    kohya_network="networks.lora_flux",
)
