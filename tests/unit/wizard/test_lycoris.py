"""The builder of lycoris_config.json: what it writes passes the checks, and what a file says otherwise stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from simpletuner.config.json_reader import Document, parse_json
from simpletuner.config.loading import load_run
from simpletuner.config.lycoris import check_lycoris
from simpletuner.config.lycoris_algorithms import ALGORITHMS as TRAINABLE
from simpletuner.config.lycoris_algorithms import useless_settings
from simpletuner.errors import ConfigError
from simpletuner.families.registry import family_names, get_spec
from simpletuner.wizard.answers import ADAPTERS, read_adapter, read_layers
from simpletuner.wizard.files import texts_for
from simpletuner.wizard.lycoris import ALGORITHMS, Lycoris, edited_lycoris, lycoris_settings, read_lycoris
from simpletuner.wizard.project import open_project
from simpletuner.wizard.questions import LAYERS_QUESTION, LYCORIS_RANK
from tests.unit.wizard.projects import CONFIG, CPU, answers, configured, new_folder

OMNIGEN = get_spec("omnigen")
BY_HAND = """{
  // of an old run
  "algo": "lokr", "linear_dim": 10000, "linear_alpha": 1,
  "factor": 12, /* smaller than usual */
  "dropout": 0.1,
  "apply_preset": {
    "target_module": ["Attention", "TimestepEmbedding"],
    "module_algo_map": {"Attention": {"factor": 8}}
  }
}
"""


def test_everything_that_can_be_trained_can_be_chosen():
    assert set(ALGORITHMS) == set(TRAINABLE) - {"lora"}  # LyCORIS' other name of locon
    assert set(ADAPTERS) == {*ALGORITHMS, "lora", "dora"}
    for read, given in ((read_adapter, "lockr"), (read_layers, "none")):
        with pytest.raises(ConfigError, match=given):
            read(given)


@pytest.mark.parametrize("family", family_names())
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_written_passes_the_checks_of_every_family(family: str, algorithm: str):
    spec = get_spec(family)
    for layers in ("all", "attention"):
        settings = lycoris_settings(spec, Lycoris(algorithm, layers=layers))
        assert check_lycoris(Document("lycoris_config.json", settings), spec) == []
        assert useless_settings(settings) == []


@pytest.mark.parametrize(
    "chosen",
    [
        Lycoris("lokr", factor=4, layers="attention"),
        Lycoris("loha", rank=6, layers="all"),
        Lycoris("diag-oft", rank=8, layers="attention"),
        Lycoris("ia3", layers="all"),
    ],
)
def test_what_was_written_is_read_back(chosen: Lycoris):
    assert read_lycoris(lycoris_settings(OMNIGEN, chosen)) == chosen


def test_both_names_of_locon_are_read():
    """LyCORIS takes `lora` for it too; what is unknown is shown as the usual one."""
    found = [read_lycoris({"algo": name, "linear_dim": 4}) for name in ("lora", "locon", "of the future")]
    assert [(each.algorithm, each.rank) for each in found] == [("locon", 4), ("locon", 4), ("lokr", None)]


def test_feed_forward_layers_get_a_larger_part_than_attention():
    """LoKr's matrices grow as its factor falls: half of 12 for feed-forward layers, and never less than 1."""
    preset = lycoris_settings(OMNIGEN, Lycoris(factor=12))["apply_preset"]
    factors = {"Attention": {"factor": 12}, "FeedForward": {"factor": 6}}
    assert preset == {"target_module": ["Attention", "FeedForward"], "module_algo_map": factors}
    smallest = lycoris_settings(OMNIGEN, Lycoris(factor=1))["apply_preset"]["module_algo_map"]
    assert smallest["FeedForward"] == {"factor": 1}


def test_an_untouched_file_stays_as_it_is():
    found = read_lycoris(parse_json(BY_HAND, "").value)
    assert found == Lycoris("lokr", factor=12, layers="as written")
    assert edited_lycoris(BY_HAND, OMNIGEN, found) == BY_HAND


def test_another_factor_changes_one_number():
    found = replace(read_lycoris(parse_json(BY_HAND, "").value), factor=20)
    text = edited_lycoris(BY_HAND, OMNIGEN, found)
    assert '"factor": 20, /* smaller than usual */' in text
    assert parse_json(text, "").value["apply_preset"]["target_module"] == ["Attention", "TimestepEmbedding"]


def test_another_algorithm_keeps_layers_and_remarks_and_leaves_nothing_useless():
    found = replace(read_lycoris(parse_json(BY_HAND, "").value), algorithm="loha", rank=6)
    text = edited_lycoris(BY_HAND, OMNIGEN, found)
    content = parse_json(text, "").value
    assert "// of an old run" in text
    assert content["apply_preset"] == {"target_module": ["Attention", "TimestepEmbedding"]}
    assert (content["algo"], content["linear_dim"], content["linear_alpha"], content["dropout"]) == ("loha", 6, 6, 0.1)
    assert useless_settings(content) == []
    assert check_lycoris(Document("", content), OMNIGEN) == []


def test_chosen_layers_replace_those_of_the_file_and_its_preset():
    named = '{"algo": "locon", "linear_dim": 16, "preset": "attn-mlp"}'
    for text in (BY_HAND, named):
        found = read_lycoris(parse_json(text, "").value)
        content = parse_json(edited_lycoris(text, OMNIGEN, replace(found, layers="attention")), "").value
        assert content["apply_preset"]["target_module"] == ["Attention"]
        assert "preset" not in content
        assert check_lycoris(Document("", content), OMNIGEN) == []


def test_a_file_in_another_form_opens(tmp_path: Path):
    for content in (
        [],
        {"algo": ["lokr"]},
        {"algo": 7, "factor": "8"},
        {"apply_preset": []},
        {"algo": "lora", "linear_dim": 4},
    ):
        assert read_lycoris(content).algorithm in ALGORITHMS


def test_size_and_layers_are_asked_where_they_mean_something():
    assert not LYCORIS_RANK.applies(answers())
    assert LYCORIS_RANK.applies(answers(adapter="loha"))
    assert not LYCORIS_RANK.applies(answers(adapter="ia3"))
    assert LAYERS_QUESTION.applies(answers(adapter="ia3"))
    assert not LAYERS_QUESTION.applies(answers(adapter="lora"))
    assert not LAYERS_QUESTION.applies(answers(goal="full"))


def test_the_command_line_changes_algorithm_rank_and_layers(tmp_path: Path, omnigen_folder: Path):
    folder = new_folder(tmp_path)
    configured(folder, omnigen_folder, factor=4)
    assert written(folder)["factor"] == 4
    configured(folder, omnigen_folder, adapter="loha", rank=6, layers="attention", yes=True)
    assert written(folder) == {
        "algo": "loha",
        "multiplier": 1,
        "linear_dim": 6,
        "linear_alpha": 6,
        "apply_preset": {"target_module": ["Attention"]},
    }
    run = load_run((), {}, folder)
    assert (run.lycoris, run.warnings) == (written(folder), ())
    project = open_project(CONFIG, folder, CPU)
    assert texts_for(project, project.answers) == {}
    configured(folder, omnigen_folder, adapter="lora", rank=5, yes=True)
    assert load_run((), {}, folder).config.adapter.lora_rank == 5
    configured(folder, omnigen_folder, adapter="dylora", yes=True)
    assert (written(folder)["algo"], written(folder)["linear_dim"]) == ("dylora", 16)


def written(folder: Path) -> dict:
    return json.loads((folder / "config" / "lycoris_config.json").read_text())
