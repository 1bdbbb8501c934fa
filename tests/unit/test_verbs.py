"""What each verb hands to the code behind it, word by word: an option that gets lost on the way changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner import cli, launch
from simpletuner.cli import weights
from simpletuner.cli.imports import processes_of, run_of_options
from simpletuner.cli.shared import print_to_stderr, say
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.errors import ConfigError
from tests.exit_codes import exit_code_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Calls the command line in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["simpletuner", *arguments])
        code = exit_code_of(cli.main)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Replaces a function; what it is called with."""

    def note(place: str, answer: Any = None) -> list[Any]:
        calls: list[Any] = []

        def function(*given: Any, **options: Any) -> Any:
            calls.append((given, options) if options else given)
            return answer

        monkeypatch.setattr(place, function)
        return calls

    return note


def test_verbs_of_the_cache(run: Run, noted: Any) -> None:
    loaded = noted("simpletuner.launch.load_arguments", "run")
    build, stats = noted("simpletuner.commands.cache.build"), noted("simpletuner.commands.cache.stats")
    prune = noted("simpletuner.commands.cache.prune")
    assert run("cache", "build", "env=a", "--seed=1")[0] == 0
    assert loaded[0][0] == ["env=a", "--seed=1"]
    assert loaded[0][2] == Path.cwd()
    assert loaded[0][3] is print_to_stderr
    assert run("cache", "stats")[0] == 0
    for words, expected in (
        ((), (False, False)),
        (("--dry-run",), (True, False)),
        (("--others",), (False, True)),
    ):
        assert run("cache", "prune", *words)[0] == 0
        assert prune.pop() == ("run", say, *expected)
    assert (build, stats) == ([("run",)], [("run", say)])
    for damaged, code in ((0, 0), (2, 3)):
        verify = noted("simpletuner.commands.cache.verify", damaged)
        assert run("cache", "verify")[0] == code
        assert verify == [("run", say)]


def test_verbs_that_look_before_a_run(run: Run, noted: Any) -> None:
    loaded = noted("simpletuner.launch.load_arguments", "run")
    noted("simpletuner.training.preflight.check_model_folder")
    check, plan = noted("simpletuner.commands.check.check"), noted("simpletuner.commands.plan.plan")
    assert run("check", "--images", "3")[0] == run("check", "--output", "sheets")[0] == 0
    assert check == [("run", say, None, 3), ("run", say, Path("sheets"), 21)]
    assert run("plan", "--device-memory", "24", "--no-probe")[0] == run("plan")[0] == 0
    assert plan == [("run", say, False, 24 << 30), ("run", say, None, None)]
    for code in (0, 2):
        noted("simpletuner.commands.doctor.doctor", code)
        assert run("doctor")[0] == code
    for is_equal, code in ((False, 1), (True, 0)):
        proof = noted("simpletuner.commands.verify_resume.verify_resume", is_equal)
        assert run("verify-resume", "env=a", "--steps", "8")[0] == code
        assert proof == [("run", ["env=a"], 8, say)]
    loaded.clear()
    job = noted("simpletuner.commands.verify_resume.prepared_run")
    noted("simpletuner.cli.runs.run_in_processes")
    words = ("--config", "mine.json", "--seed=1")
    for verb in ("check", "plan", "verify-resume"):
        assert run(verb, *words)[0] == 0
    assert run("verify-resume", "--run", "job.json")[0] == 0
    assert job[0][1](words) == "run"
    assert [(arguments, file) for arguments, _, _, _, file in loaded] == [(["--seed=1"], Path("mine.json"))] * 4


def test_verbs_that_show(run: Run, noted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIMPLETUNER_MONITOR_TOKEN", raising=False)
    report = noted("simpletuner.reporting.report.write_report", Path("page.html"))
    assert run("report", "out")[:2] == (0, "page.html\n")
    assert run("report", "out", "--output", "mine.html")[0] == 0
    assert report == [(Path("out"), None), (Path("out"), Path("mine.html"))]
    monitor = noted("simpletuner.commands.monitor.monitor")
    run("monitor")
    run("monitor", "out", "--host", "0.0.0.0", "--port", "0", "--token", "t", "--until-eof")
    assert monitor == [
        (None, "127.0.0.1", 8642, None, say, False),
        (Path("out"), "0.0.0.0", 0, "t", say, True),
    ]
    assert run("monitor", "--port", "65536")[0] == 2
    models = noted("simpletuner.commands.models.show_models")
    run("models")
    run("models", "flux", "--json")
    assert models == [(None, False, say, print_to_stderr), ("flux", True, print, print_to_stderr)]


def test_examples_are_copied_to_their_name_or_a_folder(run: Run, noted: Any) -> None:
    copied = noted("simpletuner.examples.copy_example", Path("there"))
    code, out, _ = run("examples", "copy", "omnigen-tiny")
    assert code == 0
    assert out.splitlines()[0] == "copied to there; train it with"
    assert out.splitlines()[1].startswith("  CONFIG_PATH=there/config.json ")
    run("examples", "copy", "omnigen-tiny", "mine")
    assert copied == [("omnigen-tiny", Path("omnigen-tiny")), ("omnigen-tiny", Path("mine"))]


def test_an_export_names_its_source_model_and_formats(run: Run, noted: Any) -> None:
    found = noted("simpletuner.commands.export.find_source", "source")
    family = noted("simpletuner.launch.family_of_export", "family")
    export = noted("simpletuner.commands.export.export_command", [Path("a"), Path("b")])
    assert run("export", "out") == (0, "a\nb\n", "")
    words = ["--format", "kohya", "--format", "lycoris", "--output", "o", "--rank", "4", "--merge", "--ema"]
    run("export", "out", *words, "--model", "m", "--model-family", "flux")
    assert found == [(Path("out"), False), (Path("out"), True)]
    assert family == [(Path("out"), None, None), (Path("out"), "m", "flux")]
    assert export == [
        ("source", "family", (), None, None, False, print_to_stderr),
        ("source", "family", ["kohya", "lycoris"], Path("o"), 4, True, print_to_stderr),
    ]


def test_a_conversion_is_of_a_file_a_folder_or_a_checkpoint_of_another_program(run: Run, noted: Any) -> None:
    convert = noted("simpletuner.commands.convert.convert", Path("a.safetensors"))
    assert run("convert", "a.bin", "--output", "b.safetensors", "--alpha", "8") == (0, "a.safetensors\n", "")
    assert convert == [(Path("a.bin"), Path("b.safetensors"), 8.0)]
    folder = noted("simpletuner.commands.convert.convert_folder", 3)
    Path("folder").mkdir()
    assert run("convert", "folder") == (0, "3 files written in folder\n", "")
    assert folder == [(Path("folder"),)]
    for option in (("--output", "x"), ("--alpha", "1")):
        code, _, err = run("convert", "folder", *option)
        assert (code, "a folder takes no further option" in err) == (2, True)
    code, _, err = run("convert")
    assert (code, "SOURCE is missing" in err) == (2, True)
    other = noted("simpletuner.commands.omnigen2.convert.convert_checkpoint", Path("saved"))
    words = {"--config_path": "c.yml", "--model_path": "m", "--save_path": "s"}
    assert run("convert", *(word for pair in words.items() for word in pair)) == (0, "saved\n", "")
    assert other == [(Path("c.yml"), Path("m"), Path("s"), print_to_stderr)]
    for name in words:
        fewer = [word for pair in words.items() if pair[0] != name for word in pair]
        assert "these do not go together" in run("convert", *fewer)[2]
    whole = [word for pair in words.items() for word in pair]
    for more in (["a.bin"], ["--output", "x"], ["--alpha", "1"]):
        assert "these do not go together" in run("convert", *more, *whole)[2]


def test_flags_of_generation_become_a_request(run: Run, noted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(title="Toy", pipeline_options=("img_guidance_scale",))
    family = SimpleNamespace(spec=spec)
    options = ValidationOptions(validation_resolution="64x64", validation_guidance=9.0)
    model = noted("simpletuner.cli.weights._model_of", (family, options, nullcontext()))
    made = noted("simpletuner.validation.generate.generate_images", [Path("1.png")])
    assert run("generate", "--prompt", "a cat") == (0, "1.png\n", "")
    words = ["--prompt", "a", "--prompt", "b", "--adapter", "x", "--strength", "0.5", "--reference", "r.png"]
    words += ["--negative-prompt", "n", "--width", "32", "--steps", "7", "--guidance", "2.5", "--guidance-image", "1.5"]
    words += ["--seed", "3", "--count", "2", "--output", "o", "--base-precision", "nf4", "--model", "m"]
    assert run("generate", *words, "--model-family", "flux", "--config", "c")[0] == 0
    first, second = made
    assert (first[0], first[2:]) == (family, (None, Path("generated"), print_to_stderr, 1.0))
    assert (first[1].prompts, first[1].seed, first[1].count, first[1].references) == (("a cat",), 42, 1, ())
    assert first[1].options == options
    assert second[2:] == (Path("x"), Path("o"), print_to_stderr, 0.5)
    request = second[1]
    assert (request.prompts, request.seed, request.count) == (("a", "b"), 3, 2)
    assert request.references == (Path("r.png"),)
    given = request.options
    assert (given.validation_resolution, given.validation_negative_prompt) == ("32x32", "n")
    assert (given.validation_num_inference_steps, given.validation_guidance) == (7, 2.5)
    assert given.validation_guidance_image == 1.5
    flags = model[1][0]
    assert (flags.model, flags.model_family, flags.config) == ("m", "flux", Path("c"))
    assert flags.base_precision == "nf4"
    both = weights.GenerateFlags(width=32, height=48)
    assert both.options == {"validation_resolution": "32x48"}
    assert weights.GenerateFlags(height=48).options == {"validation_resolution": "48x48"}
    spec.pipeline_options = ()
    code, _, err = run("generate", "--prompt", "a", "--guidance-image", "1")
    assert code == 2
    assert "--guidance-image: the pipeline of Toy has one guidance scale" in err
    assert "--prompt is missing" in run("generate")[2]


def test_the_model_of_a_generation_is_named_or_a_configuration_s(noted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimpleNamespace(spec="spec", device="device")
    loaded = SimpleNamespace(config=SimpleNamespace(validation="options"))
    by_name = noted("simpletuner.launch.family_of_model", family)
    options = noted("simpletuner.launch.generation_options", "defaults")
    by_run, load = noted("simpletuner.launch.family_of_run", family), noted("simpletuner.launch.load_arguments", loaded)
    kernels = noted("simpletuner.training.kernels.chosen_kernels", "kernels")
    flags = weights.GenerateFlags(model="m", model_family="flux", base_precision="int8-quanto")
    assert weights._model_of(flags, [])[:2] == (family, "defaults")
    assert (by_name, options) == ([("m", "flux", "int8-quanto")], [("spec",)])
    assert weights._model_of(weights.GenerateFlags(config=Path("c")), ["--seed=1"]) == (family, "options", "kernels")
    [(given, keys)] = load
    assert (given[0], given[2], given[4]) == (["--seed=1"], Path.cwd(), Path("c"))
    assert keys == {"check_files": False}
    assert by_run == [(loaded, None)]
    assert kernels == [(loaded.config, "device")]
    for refused in (weights.GenerateFlags(model="m", config=Path("c")), weights.GenerateFlags(base_precision="int9")):
        with pytest.raises(ConfigError):
            weights._model_of(refused, [])
    with pytest.raises(ConfigError, match="--model needs no configuration"):
        weights._model_of(weights.GenerateFlags(model="m"), ["env=a"])
    assert launch.__name__ == "simpletuner.launch"


def test_files_of_other_programs_are_imported_into_a_folder_of_their_name(
    run: Run, noted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.distributed.layout.visible_accelerators", lambda: 0)
    written = noted("simpletuner.commands.omnigen2.run.import_run", Path("config.json"))
    Path("ft.yml").write_text("name: stars\n")
    Path("plain.yml").write_text("seed: 1\n")
    assert run("import", "omnigen2", "ft.yml") == (0, "config.json\n", "")
    run("import", "omnigen2", "plain.yml", "--output", "o", "--skip_bad_rows", "--num_processes=2")
    run("import", "omnigen2", "plain.yml")
    first, second, third = written
    assert first[:3] == (Path("ft.yml"), Path.cwd(), 1)
    assert (first[4].skips_bad_rows, first[5]) == (False, Path("config/stars"))
    assert (second[2], second[4].skips_bad_rows, second[5]) == (2, True, Path("o"))
    assert third[5] == Path("config/plain")
    code, _, err = run("import", "kohya", "a.yml")
    assert (code, "omnigen2, diffsynth, firered" in err) == (2, True)
    translate = noted("simpletuner.commands.diffsynth.run.translate", "translation")
    scripts = noted("simpletuner.commands.diffsynth.run.import_run", Path("c.json"))
    assert run("import", "diffsynth", "flux", "--a=1") == (0, "c.json\n", "")
    run("import", "diffsynth", "flux", "--output", "o")
    assert translate[0][:3] == ("flux", ["--a=1"], Path.cwd())
    assert translate[0][3](["--num_processes=3"]) == 3
    assert scripts == [
        ("translation", Path("config/diffsynth-flux"), print_to_stderr),
        ("translation", Path("o"), print_to_stderr),
    ]


def test_an_options_file_is_told_from_a_configuration_by_its_name(
    tmp_path: Path, noted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.distributed.layout.visible_accelerators", lambda: 4)
    written = noted("simpletuner.commands.omnigen2.run.import_run", Path("made.json"))

    def read(*words: str) -> tuple[list[str], Path | None]:
        return run_of_options(words, {}, tmp_path, print)

    assert read("--seed=1", "env=a") == (["--seed=1", "env=a"], None)
    assert read("--config", "mine.json", "--seed=1") == (["--seed=1"], Path("mine.json"))
    assert read("--config=a.YML", "--global-batch-size", "8", "--data_path=d", "--skip_bad_rows", "--seed=2") == (
        ["--seed=2"],
        Path("made.json"),
    )
    [(file, folder, processes, _, overrides)] = written
    assert (file, folder, processes) == (Path("a.YML"), tmp_path, 4)
    assert (overrides.global_batch_size, overrides.data_path, overrides.skips_bad_rows) == (8, "d", True)
    read("--config", "b.yaml")
    assert written[1][4].global_batch_size is None
    assert not written[1][4].skips_bad_rows
    with pytest.raises(ConfigError, match=r"--data_path, --skip_bad_rows belongs to an options file"):
        read("--config=mine.json", "--data_path=d", "--skip_bad_rows")
    with pytest.raises(ConfigError, match='"x" is not a whole number'):
        read("--config=a.yml", "--global_batch_size=x")
    with pytest.raises(ConfigError) as caught:
        read("--config")
    assert (caught.value.problems[0].key, caught.value.problems[0].message) == ("--config", "it needs a value")


def test_the_processes_of_a_run_are_counted_on_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.distributed.layout.visible_accelerators", lambda: 2)
    assert processes_of([], {}) == 2
    assert processes_of(["--num_machines=3"], {}) == 6
    assert processes_of(["--num_processes=4", "--num_machines=3"], {"NUM_PROCESSES": "8"}) == 12
    monkeypatch.setattr("simpletuner.distributed.layout.visible_accelerators", lambda: 0)
    assert processes_of([], {}) == 1
    with pytest.raises(ConfigError) as caught:
        processes_of(["--num_processes=x", "--num_machines=2"], {})
    [problem] = caught.value.problems
    assert (problem.key, problem.message) == ("num_processes, num_machines", '"x" and "2" are no numbers')
