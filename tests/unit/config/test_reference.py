"""What `simpletuner options` prints and the generated page say what the declarations say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.fill_pages import SCHEMAS
from simpletuner.config.foreign_keys import RENAMED, RETIRED, UNBUILT
from simpletuner.config.json_reader import parse_json
from simpletuner.config.options import all_options
from simpletuner.config.pages import options_markdown
from simpletuner.config.reference import run_options_command
from simpletuner.config.schema import config_schema, datasets_schema
from simpletuner.errors import ConfigError
from simpletuner.examples import copy_example, example_names

from .conftest import Workspace

REPOSITORY = Path(__file__).parents[3]
QUICKSTART = REPOSITORY / "tests" / "fixtures" / "quickstart"


def test_the_page_is_what_the_declarations_say() -> None:
    page = (REPOSITORY / "documentation" / "OPTIONS.md").read_text(encoding="utf-8")
    assert page == options_markdown(), "write it again: python -m simpletuner.config.pages documentation/OPTIONS.md"


def test_every_quickstart_key_has_a_row_and_the_anchor_is_there() -> None:
    page = options_markdown()
    for key in json.loads((QUICKSTART / "config.json").read_text()):
        assert f"| `{key}` |" in page
    assert "\n## Environment configuration variables\n" in page


def test_an_option_is_explained() -> None:
    text = run_options_command(key="max_grad_norm")
    for words in ("max_grad_norm (Optimizer and schedule)", "grad_clip_method", "default    2.0", "number >= 0"):
        assert words in text
    assert "not built  ControlNets cannot be trained" in run_options_command(key="--controlnet")
    assert "now called validation_step_interval" in run_options_command(key="validation_steps")
    assert "has no effect" in run_options_command(key="validation_torch_compile")
    with pytest.raises(ConfigError, match='did you mean "learning_rate"'):
        run_options_command(key="learning_rte")


def test_keys_of_datasets_are_explained_too() -> None:
    assert "repeats (key of an entry of multidatabackend.json)" in run_options_command(key="repeats")
    both = run_options_command(key="resolution")
    assert "resolution (Data)" in both
    assert "resolution (in an entry of multidatabackend.json)" in both
    assert "is_regularisation_data" in run_options_command(key="is_regularization_data")
    with pytest.raises(ConfigError, match='did you mean "repeats"'):
        run_options_command(key="repeets")
    assert "in entries of multidatabackend.json\n  " in run_options_command(search="crop")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_files_are_what_the_declarations_say(name: str) -> None:
    text = (REPOSITORY / f"config/schemas/{name}.schema.json").read_text(encoding="utf-8")
    assert text == run_options_command(key=name, json_schema=True) + "\n", (
        "python scripts/fill_pages.py writes it again"
    )


def test_every_shipped_configuration_names_a_schema_that_takes_it(tmp_path: Path) -> None:
    shipped = [REPOSITORY / "config/config.json.example", *(REPOSITORY / "config/examples").glob("*/config.json")]
    for name in example_names():
        shipped.append(copy_example(name, tmp_path / name) / "config.json")
    assert len(shipped) > 4
    for path in shipped:
        config = parse_json(path.read_text(encoding="utf-8"), "x").value
        schema = json.loads((path.parent / config["$schema"]).read_text(encoding="utf-8"))
        assert is_instance(config, schema), path


def test_options_are_found_by_what_they_do() -> None:
    found = run_options_command(search="checkpoints")
    assert "checkpoints_total_limit" in found
    assert "learning_rate" not in found
    assert run_options_command(search="zzzz") == 'no option mentions "zzzz"'


def test_the_overview_lists_what_is_built() -> None:
    text = run_options_command()
    for name, info in all_options().items():
        assert (f"  {name} " in text) == (info.planned is None)


def test_resolved_prints_one_aligned_line_for_each_option(workspace: Workspace) -> None:
    workspace.environment["SIMPLETUNER_TRAIN_BATCH_SIZE"] = "2"
    run = workspace.load_written("--seed=5")
    lines = run_options_command(resolved=run).splitlines()
    default, chosen = lines.index("default:"), lines.index("set:")
    table = {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in all_options()}
    assert set(table) == set(all_options())
    assert default < lines.index(table["lr_power"]) < chosen < lines.index(table["seed"])
    assert table["lr_power"].split() == ["lr_power", "0.8"]
    assert table["seed"].split() == ["seed", "5", "command", "line"]
    assert table["train_batch_size"].endswith("environment (SIMPLETUNER_TRAIN_BATCH_SIZE)")
    assert table["validation_guidance"].split() == ["validation_guidance", "3.5", "family"]
    assert table["model_type"].endswith("config/config.json:3")
    columns = {table["seed"].index("command line"), table["validation_guidance"].index("family")}
    assert len(columns) == 1
    assert "  images: image" in lines


def is_instance(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that the generated schemas use, as the specification words it."""
    types = {"string": str, "number": (int, float), "object": dict, "array": list, "null": type(None)}
    if "anyOf" in schema and not any(is_instance(value, option) for option in schema["anyOf"]):
        return False
    same = (value == item and isinstance(value, bool) == isinstance(item, bool) for item in schema.get("enum", ()))
    if "enum" in schema and not any(same):
        return False
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(isinstance(value, types[name]) and not isinstance(value, bool) for name in names):
        return False
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, dict) and "properties" in schema:
        return set(value) <= set(schema["properties"]) and all(
            is_instance(item, schema["properties"][key]) for key, item in value.items()
        )
    if isinstance(value, list) and "items" in schema:
        return all(is_instance(item, schema["items"]) for item in value)
    return True


def test_the_schema_takes_the_quickstart_and_refuses_misspelled_keys() -> None:
    schema = json.loads(run_options_command(json_schema=True))
    assert schema == config_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    config = json.loads((QUICKSTART / "config.json").read_text())
    assert is_instance(config, schema)
    assert is_instance(parse_json((REPOSITORY / "config/config.json.example").read_text(), "x").value, schema)
    assert not is_instance(config | {"learning_rte": 1}, schema)
    assert not is_instance(config | {"train_batch_size": 0}, schema)
    assert not is_instance(config | {"optimizer": "dadaptation"}, schema)
    assert set(all_options()) | set(RENAMED) | set(RETIRED) | set(UNBUILT) <= set(schema["properties"])


@pytest.mark.parametrize("name", ["multidatabackend-dreambooth.json", "multidatabackend-eval.json"])
def test_the_datasets_schema_takes_the_quickstart(name: str) -> None:
    entries = json.loads((QUICKSTART / name).read_text())
    assert is_instance(entries, datasets_schema())
    assert not is_instance([entries[0] | {"repeets": 1}], datasets_schema())
