"""What one layer of the full-size OmniGen keeps between forward and backward pass, tensor by tensor.

Counted on torch's `meta` device from the real modules, as `simpletuner plan` counts: 1024 px, batch 1, bf16, the LoKr
of `config/lycoris_config.json.example`. One "width" is a tensor of the hidden width, (tokens, 3072) in bf16. The last
line is one JSON object; the exit code is 1 where a layer keeps more than `--limit` widths.

    python benchmarks/kept_activations.py [--pixels 1024] [--limit 11.5]
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_rows import FULL, PROMPT, RandomOmniGen, lokr_of_the_example
from torch import Tensor

from simpletuner.training.planning.shapes import SavedBytes, measure_activations

LIMIT = 11.5
LAYER = 1  # the first may have an input without gradient
PACKAGES = ("simpletuner", "diffusers", "lycoris", "peft")


class KeptTensors(SavedBytes):
    """Remembers, for one block, where each tensor that autograd saves came from."""

    found: list[tuple[str, Tensor]]

    def __enter__(self) -> SavedBytes:
        self.found = []
        return super().__enter__()

    def _count(self, tensor: Tensor) -> Tensor:
        before = sum(self.saved.values())
        super()._count(tensor)
        if self._current is self._blocks[LAYER] and sum(self.saved.values()) > before:
            self.found.append((place(), tensor))
        return tensor


def place() -> str:
    """`file:line function` of the innermost frame in the packages that make up a layer."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        package = next((part for part in path.parts if part in PACKAGES), None)
        if package is not None and path.name != "shapes.py":
            return f"{package}/{path.name}:{frame.lineno} {frame.name}"
    return "torch"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=LIMIT)
    arguments = parser.parse_args(words)
    shape = FULL | {"num_layers": LAYER + 1}
    family = RandomOmniGen(shape, torch.device("meta"))
    denoiser = family.load_denoiser()
    lokr_of_the_example(denoiser, family)
    counter = KeptTensors(denoiser, family.spec.block_classes)
    size = arguments.pixels
    measure_activations(family, denoiser, size, size, family.encode_prompts([PROMPT]), counter=counter)
    width = counter.num_tokens * shape["hidden_size"] * 2
    rows: list[dict[str, Any]] = []
    for where, tensor in counter.found:
        widths = tensor.untyped_storage().nbytes() / width
        rows.append({"place": where, "shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:], "widths": widths})
        print(f"{widths:6.2f}  {str(tensor.dtype)[6:]:9} {list(tensor.shape)!s:22} {where}")
    widths = sum(row["widths"] for row in rows)
    gib = widths * width * FULL["num_layers"] / 2**30
    print(f"{widths:6.2f}  together; {gib:.1f} GiB in {FULL['num_layers']} layers of {counter.num_tokens} tokens")
    print(json.dumps({"widths": round(widths, 3), "gib": round(gib, 2), "limit": arguments.limit, "kept": rows}))
    return int(widths > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
