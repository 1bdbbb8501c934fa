"""What is known of AuraFlow and Pony V7 without loading them.

Sources: `fal/AuraFlow-v0.3`, `purplesmartai/pony-v7-base`; diffusers' transformer and pipeline of AuraFlow.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import OTHER_DORA, SILENT, Reader
from simpletuner.families.spec import AdaptableModule, FamilySpec, Flavour, flow_components

_SMALL, _LARGE = 6_842_876_928, 6_858_605_568  # parameters: their tables of positions differ
JOINT, SINGLE = "joint_transformer_blocks.*", "single_transformer_blocks.*"
# Layers -> their names in the original release, where projections of text are w1 and those of images beside it w2.
_IMAGE = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_TEXT = {"add_q_proj": "q", "add_k_proj": "k", "add_v_proj": "v", "to_add_out": "o"}
_WIDE = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
_PARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (f"{JOINT}.attn", "double_layers.*.attn.w2", _IMAGE),
    (f"{JOINT}.attn", "double_layers.*.attn.w1", _TEXT),
    (f"{SINGLE}.attn", "single_layers.*.attn.w1", _IMAGE),
    (f"{JOINT}.ff", "double_layers.*.mlpX.", _WIDE),
    (f"{JOINT}.ff_context", "double_layers.*.mlpC.", _WIDE),
    (f"{SINGLE}.ff", "single_layers.*.mlp.", _WIDE),
    (JOINT, "double_layers.*.", {"norm1.linear": "modX.1", "norm1_context.linear": "modC.1"}),
    (SINGLE, "single_layers.*.", {"norm1.linear": "modCX.1"}),
)
_ATTENTION, _FEED_FORWARD, _NORMS = (
    tuple(f"{part}.{layer}" for part, _, layers in _PARTS[rows] for layer in layers)
    for rows in (slice(3), slice(3, 6), slice(6, None))
)
_OTHER = ("pos_embed.proj", "context_embedder", "time_step_proj.linear_*", "norm_out.linear", "proj_out")
AURAFLOW_KEYS = KeyTable(
    renamed={
        **{JOINT: "double_layers.*", SINGLE: "single_layers.*"},
        **{f"{ours}.{layer}": theirs + name for ours, theirs, layers in _PARTS for layer, name in layers.items()},
        **{"norm_out.linear": "modF.1", "proj_out": "final_linear"},
        **{"time_step_proj.linear_1": "t_embedder.mlp.0", "time_step_proj.linear_2": "t_embedder.mlp.2"},
        **{"pos_embed.proj": "init_x_linear", "context_embedder": "cond_seq_linear"},
        "pos_embed.pos_embed": "positional_encoding",  # the tensor itself
    },
    swapped=("norm_out.linear",),
)

AURAFLOW = FamilySpec(
    name="auraflow",
    title="AuraFlow",
    family_class="simpletuner.models.auraflow.family:AuraFlow",
    flavours={
        "v0.3": Flavour("v0.3", "fal/AuraFlow-v0.3", "up to 1536 px", "Apache-2.0", _LARGE),
        "v0.2": Flavour("v0.2", "fal/AuraFlow-v0.2", "up to 1024 px", "Apache-2.0", _SMALL),
        "v0.1": Flavour("v0.1", "fal/AuraFlow", "the first release, up to 1024 px", "Apache-2.0", _SMALL),
        "pony-v7": Flavour("pony-v7", "purplesmartai/pony-v7-base", "drawings, up to 1536 px", "Pony License", _LARGE),
    },
    default_flavour="v0.3",
    components=flow_components("AuraFlowTransformer2DModel", "UMT5EncoderModel", "PreTrainedTokenizerFast"),
    prediction_type="flow",
    latent_channels=4,
    vae_factor=8,
    patch_size=2,
    max_size=1536,
    max_prompt_tokens=256,
    prompt_tensors=("prompt_embeds",),
    pipeline_class="AuraFlowPipeline",
    adaptable=(
        AdaptableModule("Attention", (f"{JOINT}.attn", f"{SINGLE}.attn")),
        AdaptableModule("AuraFlowFeedForward", (f"{JOINT}.ff", f"{JOINT}.ff_context", f"{SINGLE}.ff")),
        AdaptableModule("AuraFlowJointTransformerBlock", (JOINT,)),
        AdaptableModule("AuraFlowSingleTransformerBlock", (SINGLE,)),
        AdaptableModule("Linear", (*_ATTENTION, *_FEED_FORWARD, *_NORMS, *_OTHER)),
    ),
    class_aliases={"FeedForward": "AuraFlowFeedForward"},
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD},
    keys=AURAFLOW_KEYS,
    readers=(
        Reader("diffusers", ("diffusers",), ("lora", "dora")),
        Reader("diffusers", ("kohya",), ("lora", "dora", "lokr", "loha"), instead=SILENT),
        Reader("ComfyUI", ("diffusers",), ("lora",), misreads=("norm_out.linear",)),
        Reader("ComfyUI", ("kohya", "comfyui"), ("lora", "lokr", "loha")),
        Reader("ComfyUI", ("kohya", "comfyui"), ("dora",), instead=OTHER_DORA),
    ),
    reads_single_files=True,
    block_classes=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    preview_decoder="madebyollin/taesdxl",
    defaults={"validation_guidance": 3.5, "validation_num_inference_steps": 50, "validation_resolution": "1024x1024"},
)
