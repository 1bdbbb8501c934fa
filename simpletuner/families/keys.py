"""How other programs call a family's modules: one table per family, names only, from which every file format follows.

An adapter trains on the modules of diffusers' denoiser. kohya and ComfyUI know the same layers by the names of the
original release, where some of them are rows of one larger matrix (`qkv`) or have their halves the other way round.
Nothing here imports torch; what the table means for tensors is in `adapters/formats.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from simpletuner.families.readers import Form


@dataclass(frozen=True)
class OriginalModule:
    """Where a module of the denoiser is in the original layout.

    Args:
        name: path of the original module.
        parts: paths in the denoiser of all modules that share it, as its rows from the top; one where it is not shared.
        swaps_halves: its first and second half of rows are the other way round.
    """

    name: str
    parts: tuple[str, ...]
    swaps_halves: bool = False


@dataclass(frozen=True)
class KeyTable:
    """Names of a family's modules in other programs. A `*` stands for one number and is carried over in order.

    Args:
        renamed: path in the denoiser -> path in the original layout, of modules and of everything below them; the
            longest entry that fits counts. What no entry fits is called the same in both.
        fused: path in the original layout -> paths in the denoiser that are its rows, from the top.
        fused_in_files: the same for single files alone, where adapter files know the layers one by one.
        unused: tensors and modules of original files that no network has; they are skipped.
        own_names: forms of adapter files that have the denoiser's names, because their readers know these best.
        without_alpha: forms of adapter files in which LoRA has the scale 1 and no alpha, because diffusers reads them
            so, and refuses them with alpha. Of other families it takes them without an error and changes nothing.
        swapped: paths in the denoiser whose halves of rows are swapped in the original layout (scale and shift). A `$`
            stands for the last block of a model, which `in_model` finds.
        architecture: `modelspec.architecture`, in front of `/lora`; the family's name where it is empty.
        base_model_version: `ss_base_model_version`; the family's name where it is empty.
        kohya_network: `ss_network_module` of a plain LoRA.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_in_files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    own_names: tuple[Form, ...] = ()
    without_alpha: tuple[Form, ...] = ()
    swapped: tuple[str, ...] = ()
    architecture: str = ""
    base_model_version: str = ""
    kohya_network: str = "networks.lora"

    @property
    def joining_forms(self) -> tuple[Form, ...]:
        """The forms of adapter files in which some layers are rows of one matrix."""
        forms: tuple[Form, ...] = ("kohya", "comfyui")
        return tuple(form for form in forms if self.fused and form not in self.own_names)

    @property
    def of_files(self) -> KeyTable:
        """The table for weights in a single file."""
        return replace(self, fused={**self.fused, **self.fused_in_files})

    def in_model(self, names: Iterable[str], swaps_last_block: bool = True) -> KeyTable:
        """The table for one model, in which it is known which block is the last.

        Args:
            names: paths of the denoiser's modules or tensors.
            swaps_last_block: False leaves out the entries of the last block.
        """
        names = list(names)
        swapped = [path for path in self.swapped if "$" not in path]
        for path in (path for path in self.swapped if "$" in path and swaps_last_block):
            block = re.compile(_source(path.partition("$")[0]) + r"(\d+)\.")
            numbers = [int(match[1]) for name in names if (match := block.match(name))]
            swapped += [path.replace("$", str(max(numbers)))] if numbers else []
        return replace(self, swapped=tuple(swapped))

    def original(self, path: str) -> OriginalModule:
        """The original module that holds the denoiser's module `path`.

        Raises:
            ValueError: it depends on which block is the last; ask the table of `in_model`.
        """
        if any(pattern.fullmatch(path) for pattern in self._last_block_patterns):
            raise ValueError(f"whether {path} is in the last block is known in a model only")
        for part, (name, parts) in self._part_patterns.items():
            if match := part.fullmatch(path):
                numbers = match.groups()
                return OriginalModule(_fill(name, numbers), tuple(_fill(each, numbers) for each in parts))
        swaps = any(pattern.fullmatch(path) for pattern in self._swap_patterns)
        for pattern, name in self._rename_patterns:
            if match := pattern.match(path):
                return OriginalModule(_fill(name, match.groups()) + path[match.end() :], (path,), swaps)
        return OriginalModule(path, (path,), swaps)

    @cached_property
    def _part_patterns(self) -> dict[re.Pattern[str], tuple[str, tuple[str, ...]]]:
        return {_compile(part): (name, parts) for name, parts in self.fused.items() for part in parts}

    @cached_property
    def _rename_patterns(self) -> list[tuple[re.Pattern[str], str]]:
        longest_first = sorted(self.renamed.items(), key=lambda entry: -len(entry[0]))
        # Only whole names: `layers.1` is not the beginning of `layers.10`.
        return [(re.compile(_source(path) + r"(?=\.|$)"), name) for path, name in longest_first]

    @cached_property
    def _swap_patterns(self) -> list[re.Pattern[str]]:
        return [_compile(path) for path in self.swapped]

    @cached_property
    def _last_block_patterns(self) -> list[re.Pattern[str]]:
        return [_compile(path.replace("$", "*")) for path in self.swapped if "$" in path]


def _source(path: str) -> str:
    return r"(\d+)".join(re.escape(piece) for piece in path.split("*"))


def _compile(path: str) -> re.Pattern[str]:
    return re.compile(_source(path))


def _fill(name: str, numbers: tuple[str, ...]) -> str:
    """`name` with its stars replaced by `numbers`, in order."""
    pieces = name.split("*")
    return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))
