"""The model families that exist, by name: those of this package, and those that other packages bring.

Another package offers a family by an entry point of the group `simpletuner.families`, whose name is the family's and
whose value is `package.module:SPEC`. Importing this imports no torch, and no package is searched before a name is asked
for that is not among our own. A package that fails to load is an error for whoever asks for its family, and a line for
all others.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.importing import import_class
from simpletuner.spelling import did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "simpletuner.families"

# One line per family. The first is what the wizard proposes.
FAMILIES: dict[str, str] = {
    "omnigen": "simpletuner.models.omnigen.spec:OMNIGEN",
    "sdxl": "simpletuner.models.sdxl.spec:SDXL",
    "sd15": "simpletuner.models.sd15.spec:SD15",
    "flux": "simpletuner.models.flux.spec:FLUX",
    "sd3": "simpletuner.models.sd3.spec:SD3",
    "chroma": "simpletuner.models.chroma.spec:CHROMA",
    "omnigen2": "simpletuner.models.omnigen2.spec:OMNIGEN2",
    "kolors": "simpletuner.models.kolors.spec:KOLORS",
    "hunyuan_dit": "simpletuner.models.hunyuan_dit.spec:HUNYUAN_DIT",
    "qwen_image": "simpletuner.models.qwen_image.spec:QWEN_IMAGE",
    "qwen_image_edit": "simpletuner.models.qwen_image_edit.spec:QWEN_IMAGE_EDIT",
    "z_image": "simpletuner.models.z_image.spec:Z_IMAGE",
    "flux2": "simpletuner.models.flux2.spec:FLUX2",
    "krea2": "simpletuner.models.krea2.spec:KREA2",
    "qwen_image_21": "simpletuner.models.qwen_image_21.spec:QWEN_IMAGE_21",
    "pixart_sigma": "simpletuner.models.pixart_sigma.spec:PIXART_SIGMA",
    "sana": "simpletuner.models.sana.spec:SANA",
    "auraflow": "simpletuner.models.auraflow.spec:AURAFLOW",
    "lumina2": "simpletuner.models.lumina2.spec:LUMINA2",
}


def family_names() -> list[str]:
    """Our own families first, then those of other packages by name; none of them is loaded."""
    return [*FAMILIES, *sorted(plugins().keys() - FAMILIES.keys())]


def get_spec(name: str) -> FamilySpec:
    """The facts of a family.

    Raises:
        ConfigError: unknown name; suggests the nearest and lists all. Or a package's family that cannot be loaded.
    """
    if name in FAMILIES:
        return import_class(FAMILIES[name])
    if name in plugins():
        return load_plugin(plugins()[name])
    fix = did_you_mean(name, family_names())
    raise ConfigError(
        Problem(f'"{name}" is not a known model family', key="model_family", allowed=", ".join(family_names()), fix=fix)
    )


def all_specs() -> tuple[list[FamilySpec], list[str]]:
    """The facts of every family that can be loaded, and one line for each package that fails."""
    specs, failures = [], []
    for name in family_names():
        try:
            specs.append(get_spec(name))
        except ConfigError as error:
            failures.append(error.render())
    shadowed = sorted(plugins().keys() & FAMILIES.keys())
    failures += [f"{_origin(plugins()[name])} brings a family {name} too; ours is used" for name in shadowed]
    return specs, failures


@functools.cache
def plugins() -> dict[str, EntryPoint]:
    """Name -> entry point of the families of other packages; of several with one name the first package's."""
    from importlib.metadata import entry_points  # twenty milliseconds that `--help` need not wait for

    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=_origin):
        found.setdefault(entry.name, entry)
    return found


def load_plugin(entry: EntryPoint) -> FamilySpec:
    """The facts of another package's family.

    Raises:
        ConfigError: the package fails, or what it offers is no `FamilySpec` of that name.
    """
    try:
        spec = entry.load()
    except Exception as error:
        raise _broken(entry, f"{type(error).__name__}: {error}") from error
    if not isinstance(spec, FamilySpec):
        raise _broken(entry, f"{entry.value} is not a FamilySpec")
    if spec.name != entry.name:
        raise _broken(entry, f'{entry.value} calls itself "{spec.name}"')
    return spec


def get_family_class(spec: FamilySpec) -> Any:
    """The `ModelFamily` subclass of a spec; imports torch and the family's code.

    Raises:
        ConfigError: another package's class cannot be imported.
    """
    if spec.name in FAMILIES or spec.name not in plugins():
        return import_class(spec.family_class)
    try:
        return import_class(spec.family_class)
    except Exception as error:
        raise _broken(plugins()[spec.name], f"{spec.family_class}: {type(error).__name__}: {error}") from error


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _broken(entry: EntryPoint, what: str) -> ConfigError:
    message = f"the family {entry.name} of the package {_origin(entry)} cannot be loaded: {what}"
    return ConfigError(Problem(message, key="model_family", fix="repair, update or remove that package"))
