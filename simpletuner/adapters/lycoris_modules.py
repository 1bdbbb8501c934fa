"""What LyCORIS' modules (4.1) need before they train here.

Some forget the layer's own forward, draw from Python's generator, or write a file of another strength than they trained
with. Each correction says what it corrects; keys and parameters stay LyCORIS' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.lokr import use_structured_forward

if TYPE_CHECKING:
    from lycoris.modules.base import LycorisBaseModule
    from lycoris.modules.dylora import DyLoraModule
    from lycoris.modules.ia3 import IA3Module


def prepare_module(module: LycorisBaseModule, prefers_bypass: bool = True) -> None:
    """Let a new module train as the others do: the base stays whole, draws can be repeated, the file tells the truth.

    Args:
        prefers_bypass: the adapter's output is added to the layer's where that is equal in result.
    """
    from lycoris.modules.base import LycorisBaseModule
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.dylora import DyLoraModule
    from lycoris.modules.ia3 import IA3Module

    if isinstance(module, DiagOFTModule | ButterflyOFTModule):
        never_wait_for_rotations()
        module.get_r = MethodType(lambda module: rotations(module.oft_blocks, module.I, module.constraint), module)
    if isinstance(module, DyLoraModule):
        module.forward = MethodType(dylora_forward, module)
        module.custom_state_dict = MethodType(dylora_tensors, module)
    elif isinstance(module, IA3Module):
        # Its own `apply_to` does not remember the layer's forward, so that it cannot be switched off.
        module.apply_to = MethodType(LycorisBaseModule.apply_to, module)
        module.forward = MethodType(ia3_forward, module)
    elif prefers_bypass:
        prefer_bypass(module)


def prefer_bypass(module: LycorisBaseModule) -> None:
    """Add the adapter's output to the layer's instead of building a merged weight, where the result is the same.

    It is the same for LoKr, LoHa, LoCon and GLoRA without weight decomposition and rank dropout, which are defined on
    the merged weight, and not for grouped convolutions. OFT and BOFT rotate the output: the same only without a bias.
    It is faster, and small changes survive in bfloat16, where adding them to a weight first would round them away.
    """
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    layer: Any = module.org_module[0]
    if getattr(layer, "groups", 1) != 1 or module.rank_dropout or getattr(module, "wd", False):
        return
    if isinstance(module, DiagOFTModule | ButterflyOFTModule):
        if layer.bias is None and not module.dropout:
            module.bypass_mode = True
            module.bypass_forward = MethodType(rotated_forward, module)
    elif isinstance(module, LokrModule | LohaModule | LoConModule | GLoRAModule):
        module.bypass_mode = True
        if isinstance(module, LokrModule) and module.module_type == "linear":
            use_structured_forward(module)


def merges(module: LycorisBaseModule) -> bool:
    """Whether it computes with its change merged into the layer's weight, and not with the layer itself."""
    from lycoris.modules.dylora import DyLoraModule
    from lycoris.modules.ia3 import IA3Module

    return not module.bypass_mode and not isinstance(module, DyLoraModule | IA3Module)


def unloadable(modules: Iterable[LycorisBaseModule]) -> tuple[str, Exception] | None:
    """A layer whose file LyCORIS could not load, and what it says; None where it can load all.

    Its loader guesses settings from the shapes of the tensors, and for some sizes guesses wrongly.
    """
    from lycoris.modules import get_module, make_module
    from lycoris.modules.full import FullModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.norms import NormModule

    tried = set()
    for module in modules:
        layer: Any = module.org_module[0]
        if isinstance(module, FullModule | IA3Module | NormModule) or layer.weight.is_meta:
            continue  # have nothing to guess, and a whole weight would be copied
        tensors = {f"{module.lora_name}.{name}": tensor for name, tensor in module.state_dict().items()}
        size = (type(module), tuple(layer.weight.shape), *(tuple(tensor.shape) for tensor in tensors.values()))
        if size in tried:
            continue
        tried.add(size)
        kind, parts = get_module(tensors, module.lora_name)
        try:
            make_module(kind, parts, module.lora_name, layer)
        except (RuntimeError, TypeError, ValueError) as error:
            return module.lora_name, error
    return None


def beside_the_base(module: LycorisBaseModule) -> LycorisBaseModule:
    """A module from a file; a `full` one as a difference beside the layer's weight."""
    from lycoris.modules.full import FullModule

    from simpletuner.adapters.lycoris_full import FullDifference

    return FullDifference.of(module) if isinstance(module, FullModule) else module


def is_usable_norm(module: LycorisBaseModule) -> bool:
    """Whether a module on a normalization can compute: LyCORIS makes some that fail in their forward pass.

    It knows LayerNorm and GroupNorm with weight and bias; RMSNorm has no place in it.
    """
    layer = module.org_module[0]
    known = isinstance(layer, nn.LayerNorm | nn.GroupNorm)
    return known and layer.weight is not None and layer.bias is not None


def dylora_forward(module: DyLoraModule, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A LoRA cut to a rank that is resampled in each pass; all of it outside of training.

    DyLoRA (arXiv 2210.07558, section 3): the blocks up to a random one compute, only the last of them learns, and the
    scale is alpha over the rank in use. LyCORIS divides by the number of blocks, so that its files have another
    strength than the training, and draws from Python's generator, which neither a resume nor the recomputation of a
    checkpointed block can repeat; torch's is reseeded for each micro-batch.
    """
    base = module.org_forward(x, *args, **kwargs)
    if module.module_dropout and module.training and torch.rand(1) < module.module_dropout:
        return base
    last = int(torch.randint(module.block_count, (), device="cpu")) if module.training else module.block_count - 1
    learns = module.training
    downs = [part.detach() if learns else part for part in module.down_list[:last]] + [module.down_list[last]]
    ups = [part.detach() if learns else part for part in module.up_list[:last]] + [module.up_list[last]]
    # Its own scale is alpha over all ranks.
    scale = module.scale * module.lora_dim / ((last + 1) * module.block_size) * module.multiplier
    down, up = torch.cat(downs).to(x.dtype), torch.cat(ups, dim=1).to(x.dtype)
    if module.module_type == "linear":
        return base + nn.functional.linear(nn.functional.linear(x, down), up) * scale
    return base + module.op(x, (up @ down).view(module.shape) * scale, None, **module.kw_dict)


def dylora_tensors(module: DyLoraModule) -> dict[str, Tensor]:
    """What its file holds: LyCORIS forgets the kernel of a convolution in `up`, and cannot load its own file."""
    tensors = type(module).custom_state_dict(module)
    up = tensors["lora_up.weight"]
    return tensors | {"lora_up.weight": up.reshape(*up.shape, *[1] * (len(module.shape) - 2))}


def never_wait_for_rotations() -> None:
    """Put `rotations` in the place of LyCORIS' function of the same arguments and result, which its layers call."""
    from lycoris.functional import boft, diag_oft

    diag_oft.get_r = boft.get_r = rotations


def rotations(oft_blocks: Tensor, I: Tensor | None = None, constraint: float | None = 0) -> Tensor:  # noqa: E741
    """OFT's and BOFT's rotations (I + Q)(I - Q)^-1 of skew-symmetric Q (Cayley), without waiting for the device.

    LyCORIS asks whether the norm is above the constraint, and torch's `inverse` whether the matrix is singular, each in
    every layer; I - Q never is, for the eigenvalues of Q are imaginary.

    Args:
        oft_blocks: (..., b, b).
        I: (b, b) the identity.
    """
    identity = torch.eye(oft_blocks.shape[-1], device=oft_blocks.device) if I is None else I
    q = oft_blocks - oft_blocks.transpose(-1, -2)
    if constraint:
        q = q * (constraint / (torch.norm(q) + 1e-8)).clamp(max=1.0)
    inverse, _ = torch.linalg.inv_ex((identity - q).float())
    return (identity + q) @ inverse


def rotated_forward(module: LycorisBaseModule, x: Tensor, scale: float = 1.0) -> Tensor:
    """The bypass of OFT and BOFT in the dtype of its input: they invert in float32 and leave their output there.

    That of OFT fails with any other scale than 1, where the merged weight serves.
    """
    from lycoris.modules.diag_oft import DiagOFTModule

    if scale != 1 and isinstance(module, DiagOFTModule):
        weight = module.make_weight(scale, x.device).to(x.dtype)
        return module.op(x, weight, None, **module.kw_dict)
    return type(module).bypass_forward(module, x, scale).to(x.dtype)


def ia3_forward(module: IA3Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer with its rows, or its inputs, multiplied by 1 + w; the bias stays.

    Equal to LyCORIS' own forward, which builds the scaled weight; its bypass scales the bias too.
    """
    if module.module_dropout and module.training and torch.rand(1) < module.module_dropout:
        return module.org_forward(x, *args, **kwargs)
    channels = [1, -1, *[1] * (x.dim() - 2)] if module.module_type.startswith("conv") else [-1]
    change = module.weight.to(x.dtype).reshape(channels) * module.multiplier
    if module.train_input:
        return module.org_forward(x + x * change, *args, **kwargs)
    output = module.org_forward(x, *args, **kwargs)
    bias = module.org_module[0].bias
    linear = output if bias is None else output - bias.to(output.dtype).reshape(channels)
    return output + linear * change
