"""Code for the model card: how to generate images with the uploaded files, in diffusers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.families.readers import readers_of
from simpletuner.families.spec import FamilySpec


def usage_code(
    spec: FamilySpec,
    kind: str,
    form: str,
    repo_id: str,
    base_model: str | None,
    file_name: str,
    prompt: str,
    generation: Mapping[str, Any],
) -> str:
    """Python that generates images with what is in the repository.

    Args:
        kind: `full`, `lora`, `dora`, or an algorithm of LyCORIS.
        form: of the adapter's file.
        base_model: hub id; where the base was a folder, a place to fill in.
        file_name: of the adapter in the repository.
        generating: arguments of the pipeline beside the prompt.
    """
    base = repr(base_model or "PATH/OF/THE/BASE/MODEL")
    arguments = ", ".join([repr(prompt), *(f"{name}={value!r}" for name, value in generation.items())])
    draw = f'image = pipeline({arguments}).images[0]\nimage.save("image.png")\n'
    head = f"import torch\nfrom diffusers import {spec.pipeline_class}\n"
    source = repr(repo_id) if kind == "full" else base
    load = f'pipeline = {spec.pipeline_class}.from_pretrained({source}, torch_dtype=torch.bfloat16).to("cuda")\n'
    if kind == "full":
        return f"{head}\n{load}{draw}"
    denoiser = f"pipeline.{spec.component('denoiser').name}"
    if form == "lycoris":
        head += "from huggingface_hub import hf_hub_download\nfrom lycoris import create_lycoris_from_weights\n"
        load += (
            f"file = hf_hub_download({repo_id!r}, {file_name!r})\n"
            f"adapter, _ = create_lycoris_from_weights(1.0, file, {denoiser})\nadapter.merge_to()\n"
        )
    elif form == "diffusers" or _is_read(spec, kind, form):
        if not pipeline_loads_lora(spec):
            return _with_peft(spec, f"hf_hub_download({repo_id!r}, {file_name!r})", base) + draw
        load += f"pipeline.load_lora_weights({repo_id!r}, weight_name={file_name!r})\n"
    else:
        exported = f"{file_name.removesuffix('.safetensors')}.diffusers.safetensors"
        note = (
            f"# diffusers does not read the {form} format. This writes one that it reads beside the downloaded file:\n"
        )
        note += f"# simpletuner export {file_name} --format diffusers --model {base_model or 'PATH'}\n"
        if not pipeline_loads_lora(spec):
            return note + _with_peft(spec, repr(f"exported/{exported}"), base) + draw
        load += f'{note}pipeline.load_lora_weights("exported", weight_name={exported!r})\n'
    return f"{head}\n{load}{draw}"


def _is_read(spec: FamilySpec, kind: str, form: str) -> bool:
    """Whether diffusers computes what was trained from a file of this form."""
    return any(each.program == "diffusers" and not each.instead for each in readers_of(spec.readers, form, kind))


def pipeline_loads_lora(spec: FamilySpec) -> bool:
    """Whether diffusers' pipeline of the family has a loader of its own."""
    import diffusers

    return hasattr(getattr(diffusers, spec.pipeline_class, None), "load_lora_weights")


def _with_peft(spec: FamilySpec, file: str, base: str) -> str:
    """For pipelines without a loader: PEFT places the tensors, whose names are those of the denoiser's modules.

    Args:
        file: of diffusers' form, as an expression.
    """
    denoiser = spec.component("denoiser").name
    return f"""import torch
from diffusers import {spec.pipeline_class}
from huggingface_hub import hf_hub_download
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

pipeline = {spec.pipeline_class}.from_pretrained({base}, torch_dtype=torch.bfloat16).to("cuda")
weights = load_file({file})
weights = {{name.removeprefix("{denoiser}."): tensor for name, tensor in weights.items()}}
ranks = {{n.removesuffix(".lora_A.weight"): len(t) for n, t in weights.items() if n.endswith(".lora_A.weight")}}
rank = next(iter(ranks.values()))
is_dora = any("lora_magnitude_vector" in name for name in weights)
options = dict(rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(ranks), use_dora=is_dora)
config = LoraConfig(r=rank, lora_alpha=rank, **options)
inject_adapter_in_model(config, pipeline.{denoiser}, state_dict=weights)
set_peft_model_state_dict(pipeline.{denoiser}, weights)
"""
