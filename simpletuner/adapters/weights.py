"""The weights of an adapter, apart from any file's names: what every format is read into and written from.

Tensors carry LyCORIS' names (`lora_down.weight`, `lokr_w1`, `alpha`, ...), for that is the only naming in which all
algorithms are written down. A plain LoRA adds `alpha / rank * lora_up @ lora_down` to its layer's weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simpletuner.errors import ConfigError, Problem
from simpletuner.families.readers import Kind

Module = Mapping[str, Tensor]

DOWN, UP, MID, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"

# A tensor that only modules of this algorithm have -> the algorithm. `lora` also covers LoCon and DyLoRA files.
SIGNS: Mapping[str, str] = {
    UP: "lora",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "hada_w1_a": "loha",
    "oft_blocks": "oft",
    "a1.weight": "glora",
    "on_input": "ia3",
    "diff": "full",
    "w_norm": "norm",
}
TENSOR_NAMES = (
    *(DOWN, UP, MID, ALPHA, DORA, "diff", "diff_b", "w_norm", "b_norm", "on_input", "weight", "oft_blocks", "rescale"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
)


@dataclass(frozen=True)
class AdapterWeights:
    """What an adapter file holds.

    Args:
        modules: path of a layer in the denoiser -> LyCORIS' name of a tensor -> the tensor, on the CPU.
        metadata: of the file that it was read from.
        lycoris: the configuration it was trained with, where it is known.
        notices: what a person should know of how the file was read.
    """

    modules: Mapping[str, Module]
    metadata: Mapping[str, str] = field(default_factory=dict)
    lycoris: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def algorithms(self) -> list[str]:
        """The kinds of modules, sorted; `lora` alone is what every program reads."""
        return sorted({algorithm_of(module) for module in self.modules.values()})

    @property
    def multiplier(self) -> float:
        """What the whole change is multiplied with, as the configuration says."""
        return float(self.lycoris.get("multiplier", 1.0))

    @property
    def is_plain_lora(self) -> bool:
        """Whether every layer's change is `up @ down` and nothing else (weight decomposition allowed)."""
        return self.algorithms == ["lora"] and not any(MID in module for module in self.modules.values())

    @property
    def kind(self) -> Kind:
        """What readers of files distinguish."""
        has_lengths = any(DORA in module for module in self.modules.values())
        if self.is_plain_lora:
            return "dora" if has_lengths else "lora"
        if has_lengths:
            return "other"
        return "lokr" if self.algorithms == ["lokr"] else "loha" if self.algorithms == ["loha"] else "other"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; alpha and switches are no weights."""
        tensors = (item for module in self.modules.values() for item in module.items())
        return next(tensor.dtype for name, tensor in tensors if name not in (ALPHA, "on_input"))

    @property
    def ranks(self) -> set[int]:
        """Ranks of the plain LoRA modules."""
        return {rank_of(module) for module in self.modules.values() if DOWN in module}


def algorithm_of(module: Module) -> str:
    """The algorithm of one module's tensors; `unknown` where none of them tells."""
    return next((algorithm for name, algorithm in SIGNS.items() if name in module), "unknown")


def rank_of(lora: Module) -> int:
    return lora[DOWN].shape[0]


def scale_of(lora: Module) -> float:
    """What `up @ down` is multiplied with."""
    return float(lora[ALPHA]) / rank_of(lora) if ALPHA in lora else 1.0


def with_unit_scale(lora: Module) -> dict[str, Tensor]:
    """The same change with alpha equal to the rank, for readers that know no alpha; `up` takes the scale."""
    scale = scale_of(lora)
    return {**lora, UP: _times(lora[UP], scale) if scale != 1 else lora[UP], ALPHA: alpha_tensor(rank_of(lora))}


def is_whole_lokr(module: Module) -> bool:
    """A LoKr without low-rank factors: all readers give it the scale 1, as LyCORIS does, whatever its alpha is."""
    return "lokr_w1" in module and "lokr_w2" in module


def scaled(module: Module, factor: float) -> dict[str, Tensor] | None:
    """The same module with `factor` times the change, by its weights alone; None where its change is no multiple of any
    weight (a rotation, weight decomposition)."""
    if factor == 1:
        return dict(module)
    names = next((names for sign, names in _FACTORS.items() if sign in module), ())
    if not names or DORA in module:
        return None
    multiplied = {name: _times(module[name], factor) for name in names if name in module}
    return {**module, **multiplied}


# A tensor that shows the algorithm -> those that its whole change is proportional to, together.
_FACTORS = {
    UP: (UP,),
    "lokr_w1": ("lokr_w1",),
    "lokr_w1_a": ("lokr_w1_a",),
    "hada_w1_a": ("hada_w1_a",),
    "a1.weight": ("a1.weight", "b1.weight"),
    "on_input": ("weight",),
    "diff": ("diff", "diff_b"),
    "w_norm": ("w_norm", "b_norm"),
}


def _times(tensor: Tensor, factor: float) -> Tensor:
    """In float32 where half precision would round the product; a power of two changes no digit."""
    return (tensor if math.frexp(factor)[0] == 0.5 else tensor.float()) * factor


def alpha_tensor(alpha: float) -> Tensor:
    """Alpha as files hold it: float32, because bfloat16 would turn 10000 into 9984."""
    return torch.tensor(float(alpha))


def fuse_loras(parts: Sequence[tuple[int, Module]]) -> dict[str, Tensor]:
    """One LoRA on a matrix whose rows are those of several layers: `down` stacked, `up` block-diagonal.

    Args:
        parts: rows of each layer from the top, and its LoRA. A layer without one has no tensors, or beside layers that
            are weight-decomposed its own norms, which leave its rows as they are.

    Raises:
        ConfigError: some of the LoRAs are weight-decomposed and others are not.
    """
    present = [lora for _, lora in parts if UP in lora]
    same_scale = len({scale_of(lora) for lora in present}) == 1
    loras = [lora if UP not in lora or same_scale else with_unit_scale(lora) for _, lora in parts]
    down = torch.cat([lora[DOWN] for lora in loras if UP in lora])
    dtype = functools.reduce(torch.promote_types, (lora[UP].dtype for lora in loras if UP in lora))
    up = torch.zeros(sum(rows for rows, _ in parts), down.shape[0], *[1] * (down.dim() - 2), dtype=dtype)
    row = column = 0
    for (rows, _), lora in zip(parts, loras, strict=True):
        if UP in lora:
            rank = rank_of(lora)
            up[row : row + rows, column : column + rank] = lora[UP]
            column += rank
        row += rows
    fused = {DOWN: down, UP: up, ALPHA: alpha_tensor(scale_of(present[0]) * down.shape[0] if same_scale else len(down))}
    if any(DORA in lora for lora in loras):
        if not all(DORA in lora for lora in loras):
            message = "of layers that are one matrix some are weight-decomposed and others are not"
            fix = "write the file in the lycoris format"
            raise ConfigError(Problem(message, key="format", allowed="lycoris", fix=fix))
        fused[DORA] = torch.cat([lora[DORA] for lora in loras])
    return fused


def split_lora(lora: Module, rows: Sequence[int]) -> list[dict[str, Tensor]]:
    """The LoRAs of the layers whose rows make up a matrix, each of the ranks that it uses: of a matrix that was joined
    from several LoRAs, those."""
    pieces = []
    for index, up in enumerate(lora[UP].split(list(rows))):
        used = up.flatten(2).any(2).any(0) if up.dim() > 2 else up.any(0)
        used[0] |= not used.any()  # a LoRA has one rank at least
        piece = {**lora, UP: up[:, used].contiguous(), DOWN: lora[DOWN][used].contiguous()}
        piece[ALPHA] = alpha_tensor(scale_of(lora) * int(used.sum()))
        if DORA in lora:
            piece[DORA] = lora[DORA].split(list(rows))[index].contiguous()
        pieces.append(piece)
    return pieces


def row_norms(weight: Tensor) -> Tensor:
    """(out, 1, ...) float32 lengths of a weight's rows: magnitudes that leave them as they are."""
    norms = weight.detach().cpu().float().flatten(1).norm(dim=1)
    return norms.reshape(-1, *[1] * (weight.dim() - 1))


def swap_halves(lora: Module) -> dict[str, Tensor]:
    """The LoRA of a layer whose first and second half of rows are exchanged."""
    swapped = dict(lora)
    for name in (UP, DORA):
        if name in lora:
            swapped[name] = torch.cat(list(lora[name].chunk(2))[::-1])
    return swapped
