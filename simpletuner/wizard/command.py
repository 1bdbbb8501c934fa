"""`simpletuner configure` on the command line: the same answers as the screens ask for, given as options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpletuner.config.discovery import find_config
from simpletuner.config.layers import parse_arguments
from simpletuner.config.merging import merge_layers
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.registry import get_spec
from simpletuner.hardware import Hardware, detect_hardware
from simpletuner.launch import chosen_environment, split_arguments
from simpletuner.wizard.answers import Answers, Goal, adapter_after, read_adapter, read_goal, read_layers
from simpletuner.wizard.files import diff_lines, judge, save, start_command, texts_for
from simpletuner.wizard.given import Given
from simpletuner.wizard.lycoris import ALGORITHMS
from simpletuner.wizard.project import ANSWERED, Project, open_project, typed_options

USUAL_PLACE = Path("config/config.json")


def run_configure(
    given: Given, environment: Mapping[str, str], working_dir: Path, say: Callable[[str], None]
) -> Path | None:
    """Ask on screens, or write at once what the command line says; the config.json where the run is to be started.

    Raises:
        ConfigError: see `find_project` and `configure_without_screens`; or there is neither an answer nor a terminal.
    """
    project = find_project(given, environment, working_dir, detect_hardware())
    if given.has_answers:
        configure_without_screens(project, given, say)
        return None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        message, fix = (
            "there is no terminal to show the wizard",
            "give at least --goal and --data, see `simpletuner configure -h`",
        )
        raise ConfigError(Problem(message, fix=fix))
    from simpletuner.wizard.app import Wizard

    wizard = Wizard(project)
    outcome = wizard.run()
    if outcome == "saved":
        say(f"saved; start with: {start_command(wizard.project)}")
    return wizard.project.places.config if outcome == "start" else None


def find_project(given: Given, environment: Mapping[str, str], working_dir: Path, hardware: Hardware) -> Project:
    """The files that are to be edited or made: --config, env=NAME, those of this folder, config/config.json.

    Raises:
        ConfigError: a file cannot be read or edited.
    """
    chosen, _ = split_arguments(given.arguments)
    if "example" in chosen:
        fix = f"simpletuner examples copy {chosen['example']} makes a copy to edit"
        raise ConfigError(Problem("shipped examples are not edited", key="example", fix=fix))
    if given.config is not None:
        return open_project(given.config, working_dir, hardware)
    if "env" in chosen and not (working_dir / "config" / chosen["env"]).exists():
        return open_project(Path("config", chosen["env"], "config.json"), working_dir, hardware)
    source = find_config(chosen_environment(chosen, environment), working_dir)
    return open_project(source.path if source and source.path else USUAL_PLACE, working_dir, hardware)


def configure_without_screens(project: Project, given: Given, say: Callable[[str], None]) -> Project:
    """Write the files from what the command line says, and say what was written.

    Raises:
        ConfigError: an answer is missing or wrong, the checks of a start refuse the result, or existing files would
            be changed and `yes` was not given. Nothing is written then.
    """
    answers = apply(project, given)
    answers = look_at_images(project, answers, say)
    texts = texts_for(project, answers)
    if not texts:
        say("nothing to change")
        return project
    for line in diff_lines(project, texts):
        say(line)
    verdict = judge(project, texts, answers)
    if verdict.problems:
        raise ConfigError(verdict.problems)
    changed = [project.places.shown(path) for path in texts if path in project.texts]
    if changed and not given.yes:
        raise ConfigError(Problem(f"{', '.join(changed)} would be changed; nothing was written", fix="add --yes"))
    saved = save(project, texts, answers)
    for warning in verdict.warnings:
        say(f"note: {warning}")
    say(f"saved {', '.join(project.places.shown(path) for path in texts)}; start with: {start_command(project)}")
    return saved


def apply(project: Project, given: Given) -> Answers:
    """The answers of the files with those of the command line in place.

    Raises:
        ConfigError: an answer is wrong, or images are not named anywhere.
    """
    answers = project.answers
    goal = read_goal(given.goal) if given.goal else answers.goal
    family = get_spec(given.family).name if given.family else answers.family
    dataset = dict(answers.dataset)
    if given.captions:
        dataset["caption_strategy"] = given.captions
    if given.instance_prompt:
        dataset["instance_prompt"] = given.instance_prompt
    adapter = read_adapter(given.adapter) if given.adapter else adapter_after(answers, family)
    options = {**answers.options, **_run_options(given.arguments)}
    if given.rank is not None and adapter not in ALGORITHMS:
        options["lora_rank"] = given.rank
    if given.output_dir:
        options["output_dir"] = given.output_dir
    images = given.data or answers.images
    if not images:
        raise ConfigError(Problem("is missing: the folder with the training images", key="--data", allowed="a folder"))
    if goal == "subject" and project.is_new and not given.captions and not dataset.get("instance_prompt"):
        # Whether captions are there shows the scan; then the name of the subject is not needed.
        goal_needs_prompt = not _has_text_files(images, project.places.working_dir)
        if goal_needs_prompt:
            message = "is missing: what is the subject called?"
            fix = 'for example --instance-prompt "ohwx dog"; or put a text file with a caption beside each image'
            raise ConfigError(Problem(message, key="--instance-prompt", allowed="a text", fix=fix))
    is_other_family = family != answers.family
    return replace(
        answers,
        goal=goal,
        family=family,
        flavour=given.flavour or (None if is_other_family else answers.flavour),
        model=given.model or (None if is_other_family or given.flavour else answers.model),
        images=images,
        eval_images=given.eval_data or answers.eval_images,
        regularisation_images=given.regularisation_data or answers.regularisation_images,
        reference_images=_references(goal, given, answers),
        adapter=adapter,
        trains_on=given.device_memory or answers.trains_on,
        factor=given.factor or answers.factor,
        rank=given.rank or (answers.rank if adapter == answers.adapter else None),
        layers=read_layers(given.layers) if given.layers else answers.layers,
        dataset=dataset,
        prompts=tuple(given.prompt) if given.prompt else answers.prompts,
        options=options,
    )


def look_at_images(project: Project, answers: Answers, say: Callable[[str], None]) -> Answers:
    """The answers with what a scan of each folder found; folders that are not there are left to the checks."""
    from simpletuner.wizard.images import folder_path, look_at_folder

    seen = dict(answers.seen)
    folders = (answers.images, answers.reference_images, answers.eval_images, answers.regularisation_images)
    for folder in dict.fromkeys(folders):
        if folder and folder_path(folder, project.places.working_dir).is_dir():
            report = look_at_folder(folder, project.places.working_dir, project.places.cache_dir(answers), _no_progress)
            seen[folder] = report.facts
            say(f"{folder}: " + "; ".join(report.lines()))
    return replace(answers, seen=seen)


def _run_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of the run, typed.

    Raises:
        ConfigError: an option is unknown, has a wrong value, or has an option of this verb.
    """
    _, options = split_arguments(arguments)
    merged = merge_layers([parse_arguments(options)])
    values, problems = typed_options(merged.settings)
    for key in merged.settings:
        if key in ANSWERED:
            fix = "use --goal, --family, --flavour, --model, --adapter and --prompt"
            problems.append(Problem("is derived from other answers", key=f"--{key}", fix=fix))
    if merged.problems or problems:
        raise ConfigError([*merged.problems, *problems])
    return {key: values[key] for key in merged.settings}


def _references(goal: Goal, given: Given, answers: Answers) -> str:
    """Folder of what the images are made from.

    Raises:
        ConfigError: the goal needs one.
    """
    references = given.reference_data or answers.reference_images
    if goal == "edit" and not references:
        message = "is missing: the folder with the images before the edit"
        raise ConfigError(
            Problem(message, key="--reference-data", allowed="a folder", fix="each named like the image after the edit")
        )
    return references


def _has_text_files(folder: str, working_dir: Path) -> bool:
    from simpletuner.data.captions import CAPTION_SUFFIXES
    from simpletuner.wizard.images import folder_path

    names = folder_path(folder, working_dir).rglob("*")
    return any(path.suffix.lower() in CAPTION_SUFFIXES for path in names)


def _no_progress(num_files: int) -> None:
    """The command line waits without a word: a scan of a folder of usual size takes seconds."""
