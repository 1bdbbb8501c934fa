"""Which other programs read an adapter file, by its form and by what it holds: one table per family, without torch.

The wizard, `simpletuner export`, the end of a run and the documentation all take it from here. A test holds it against
the readers that can be run: diffusers, PEFT and LyCORIS. What is said of ComfyUI and of kohya's scripts is public
(their issues and documentation), and a test holds the files against the weights that they apply them to.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Form = Literal["diffusers", "kohya", "comfyui", "lycoris", "diffsynth"]
# What a file holds: LoRA (with convolutions: LoCon), LoRA with weight decomposition, LoKr, LoHa, anything else.
Kind = Literal["lora", "dora", "lokr", "loha", "other"]
ALL_FORMS: tuple[Form, ...] = get_args(Form)
# Those that every family has: DiffSynth-Studio trains some of them.
FORMS = ALL_FORMS[:-1]
KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_TITLES = {"lora": "LoRA, LoCon", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa", "other": "other algorithms"}

# What is computed where a reader leaves the lengths of weight decomposition away, or applies them in its own way.
NO_LENGTHS = "drops the trained magnitudes, so that images differ"
OTHER_DORA = "computes another weight decomposition, so that images differ"
SILENT = "changes nothing, without an error"


@dataclass(frozen=True)
class Reader:
    """What one program makes of files.

    Args:
        program: its name.
        forms: of the files.
        kinds: of what they hold.
        leaves_out: fnmatch patterns of layers that it does not change, without an error.
        refuses: fnmatch patterns of layers with one of which it takes no file at all.
        whole_blocks: layers, by paths with a `*` for the number of their block; it takes no file in which a block or
            one before it lacks one of these, if it has any layer of that block.
        misreads: fnmatch patterns of layers that it changes in another way than they were trained, without an error.
        instead: what it does in place of the right thing; empty where it computes what was trained.
    """

    program: str
    forms: tuple[Form, ...]
    kinds: tuple[Kind, ...]
    leaves_out: tuple[str, ...] = ()
    instead: str = ""
    refuses: tuple[str, ...] = ()
    misreads: tuple[str, ...] = ()
    whole_blocks: tuple[str, ...] = ()

    def layers_left_out(self, paths: Iterable[str]) -> list[str]:
        """Those of the adapted layers that it does not change."""
        return [path for path in paths if _fits(path, self.leaves_out)]

    def layers_refused(self, paths: Iterable[str]) -> list[str]:
        """Those of the adapted layers that make it refuse the file."""
        there = set(paths)
        return [path for path in there if _fits(path, self.refuses) or not there.issuperset(self._needed_with(path))]

    def _needed_with(self, path: str) -> list[str]:
        """The layers of the block of `path`, and of those before it, that must be in a file with it."""
        stack, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        numbers = range(int(number) + 1) if number.isdecimal() else ()
        return [
            name.replace("*", str(n)) for name in self.whole_blocks if name.startswith(f"{stack}.") for n in numbers
        ]

    def layers_misread(self, paths: Iterable[str]) -> list[str]:
        """Those of the adapted layers that it changes otherwise than they were trained."""
        return [path for path in paths if _fits(path, self.misreads)]


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


# Its own files alone, of the families that it has.
DIFFSYNTH = Reader("DiffSynth-Studio", ("diffsynth",), ("lora",))
# LyCORIS' own loader reads its own names, whatever the model.
LYCORIS = Reader("LyCORIS", ("lycoris",), KINDS)


def usual_readers(
    left_out_of_kohya: tuple[str, ...] | None = (),
    silent: tuple[Form, ...] = (),
    left_out_by_comfyui: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
    refused_of_kohya: tuple[str, ...] = (),
) -> tuple[Reader, ...]:
    """Those of a family that diffusers, ComfyUI and kohya's scripts know.

    Args:
        left_out_of_kohya: layers of kohya's form that diffusers leaves out; None where it does not read that form.
        silent: forms that diffusers takes without an error and does nothing with.
        left_out_by_comfyui: layers of diffusers' form that ComfyUI leaves out.
        others: further programs that read kohya's form.
        refused_of_kohya: layers with which diffusers refuses a file of kohya's form.
    """
    by_own_names: tuple[Form, ...] = ("kohya", "comfyui", "lycoris")
    found = [Reader("diffusers", ("diffusers",), ("lora", "dora"))]
    if left_out_of_kohya is not None:
        found.append(Reader("diffusers", ("kohya",), ("lora",), left_out_of_kohya, refuses=refused_of_kohya))
        found.append(Reader("diffusers", ("kohya",), ("dora",), instead=NO_LENGTHS, refuses=refused_of_kohya))
    if silent:
        found.append(Reader("diffusers", silent, ("lora", "dora"), instead=SILENT))
    found.append(Reader("ComfyUI", by_own_names, ("lora", "lokr", "loha")))
    found.append(Reader("ComfyUI", by_own_names, ("dora",), instead=OTHER_DORA))
    found.append(Reader("ComfyUI", ("diffusers",), ("lora",), left_out_by_comfyui))
    return (*found, *(Reader(name, ("kohya",), ("lora",)) for name in (*others, "kohya's scripts")))


def readers_of(readers: Sequence[Reader], form: str, kind: str) -> list[Reader]:
    """The programs that do something with such a file."""
    return [reader for reader in (*readers, LYCORIS, DIFFSYNTH) if form in reader.forms and kind in reader.kinds]


def reading_text(readers: Sequence[Reader], form: str, kind: str, paths: Sequence[str] = ()) -> str:
    """Who reads a file, in one line: "read by diffusers and ComfyUI; diffusers leaves out 10 of 30 layers".

    Args:
        readers: of the family.
        paths: of the adapted layers, as far as they are known.
    """
    whole, remarks = [], []
    for reader in readers_of(readers, form, kind):
        left = reader.layers_left_out(paths)
        if refused := reader.layers_refused(paths):
            remarks.append(f"{reader.program} refuses it for {len(refused)} of {len(paths)} layers")
        elif reader.instead:
            remarks.append(f"{reader.program} {reader.instead}")
        elif left and len(left) == len(paths):
            remarks.append(f"{reader.program} changes none of its layers")
        elif left:
            remarks.append(f"{reader.program} leaves out {len(left)} of {len(paths)} layers")
        elif misread := reader.layers_misread(paths):
            remarks.append(f"{reader.program} misreads {len(misread)} of {len(paths)} layers")
        else:
            whole.append(reader.program)
    return "; ".join([f"read by {_joined(whole)}" if whole else "read by no other program that is known", *remarks])


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def readers_table(families: Iterable[tuple[str, Sequence[Reader], Sequence[Form]]]) -> str:
    """The table of the documentation: title, readers, and the forms that join layers, of each family."""
    rows = ["| family | format | holds | read by | not, or not whole |", "|---|---|---|---|---|"]
    for title, readers, joining in families:
        for form in FORMS:
            held: dict[tuple[str, str], list[str]] = {}
            for kind in KINDS[:-1]:
                held.setdefault(_cells(readers, form, kind, form in joining), []).append(KIND_TITLES[kind])
            for (whole, part), kinds in held.items():
                rows.append(f"| {title} | `{form}` | {', '.join(kinds)} | {whole} | {part} |")
    return "\n".join(rows)


def _cells(readers: Sequence[Reader], form: Form, kind: Kind, joins: bool) -> tuple[str, str]:
    if form == "diffusers" and kind not in ("lora", "dora"):
        return "not written", "`--rank` makes a LoRA of it"
    found = readers_of(readers, form, kind)
    whole = [reader.program for reader in found if not _limit(reader)]
    parts = [f"{reader.program}: {_limit(reader)}" for reader in found if _limit(reader)]
    if joins and kind in ("lokr", "loha"):
        parts.append("only layers that are not part of a joined matrix (`qkv`) are written")
    return ", ".join(whole) or "none", "; ".join(parts)


def _limit(reader: Reader) -> str:
    words = {"leaves out": reader.leaves_out, "misreads": reader.misreads, "refuses files with": reader.refuses}
    named = [f"{verb} {', '.join(f'`{each}`' for each in patterns)}" for verb, patterns in words.items() if patterns]
    parts = ["refuses files with parts of blocks"] if reader.whole_blocks else []
    return reader.instead or ", ".join([*named, *parts])
