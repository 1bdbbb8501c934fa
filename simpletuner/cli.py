"""The command line: `simpletuner train`, `generate`, `options`, `examples`.

Everything heavy is imported inside the verb that needs it, so that `--help` answers at once. Only this module reads
`sys.argv` and turns errors into exit codes.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simpletuner import __version__
from simpletuner.errors import EXIT_DATA, EXIT_INTERRUPTED, ConfigError, Problem, SimpleTunerError
from simpletuner.quiet import hide_needless_lines

if TYPE_CHECKING:
    from simpletuner.config.loading import LoadedRun

# Options of a run are declared in config/, not here: what typer does not know is passed on as it was typed.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}

LOG_LEVEL = "SIMPLETUNER_LOG_LEVEL"

app = typer.Typer(
    name="simpletuner",
    help="Train image diffusion models: LoKr, LoRA and full fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or "[example=NAME]" would be taken for markup
    context_settings={"help_option_names": ["-h", "--help"]},
)
examples_app = typer.Typer(
    help="List or copy the shipped examples.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(examples_app, name="examples")
cache_app = typer.Typer(
    help="Build, verify, prune or count the caches of a configuration.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Run the command line; errors that a user can mend print without a traceback."""
    hide_needless_lines()
    try:
        app()
    except SimpleTunerError as error:
        _tell_the_end(error.render())
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # the last boundary: says what happened and ends the program
        if os.environ.get("SIMPLETUNER_DEBUG") == "1":
            raise
        _tell_the_end(_report_unexpected(error))
        sys.exit(1)
    finally:
        _let_go_of_stdout()


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(f"simpletuner {__version__}")
        raise typer.Exit
    _prepare_environment()


@app.command(context_settings=PASS_ON, short_help="Train as config.json says.")
def train(context: typer.Context) -> None:
    """Train as the configuration says: simpletuner train [example=NAME] [env=NAME] [--key=value ...]

    The configuration is config/config.json or config.json of this folder; env=NAME takes config/NAME/config.json,
    example=NAME one that is shipped. With none of them the example omnigen-tiny is trained. Every option of the
    configuration can be given here as --key=value; `simpletuner options` lists them.
    """
    from simpletuner.launch import load_arguments

    _run(load_arguments(context.args, os.environ, Path.cwd(), say=print), sys.argv[1:])


@app.command(context_settings=PASS_ON, short_help="Explain options, or print those of this folder's run.")
def options(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(help="Explain this option.", show_default=False)] = None,
    search: Annotated[str | None, typer.Option(help="List options that mention this word.")] = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every option of this folder's run, its value and its origin.")
    ] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print a JSON Schema for editors.")] = False,
) -> None:
    """Explain the options of config.json and the keys of datasets: simpletuner options [KEY] [--search WORD]
    [--resolved] [--json-schema]

    `options multidatabackend --json-schema` prints the schema of the data file.

    --resolved also takes example=NAME, env=NAME and --key=value, as `train` does.
    """
    from simpletuner.config.reference import run_options_command

    if key and "=" in key:  # example=NAME or env=NAME, which typer cannot tell from a key
        context.args.insert(0, key)
        key = None
    if resolved:
        from simpletuner.launch import load_arguments

        run = load_arguments(context.args, os.environ, Path.cwd(), _say_aside, check_files=False)
        print(run_options_command(resolved=run))
        return
    if context.args:
        raise ConfigError(
            Problem(
                f'"{context.args[0]}" is not understood here', allowed="KEY, --search WORD, --resolved, --json-schema"
            )
        )
    print(run_options_command(key=key, search=search, json_schema=json_schema))


@app.command(context_settings=PASS_ON, short_help="Draw pictures with a model and an adapter.")
def generate(
    context: typer.Context,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub id.")] = None,
    model_family: Annotated[str | None, typer.Option(help="Of --model, where its folder does not tell.")] = None,
    config: Annotated[Path | None, typer.Option(help="config.json of a run: its model and its validation_*.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter file (.safetensors) of any format.")] = None,
    strength: Annotated[float, typer.Option(help="How much of the adapter; 1 is as it was trained.")] = 1.0,
    reference: Annotated[list[Path] | None, typer.Option(help="Picture to edit; several times for several.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", min=8)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", min=8)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.", min=0)] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; each further one counts up.", min=0)] = 42,
    count: Annotated[int, typer.Option(help="Pictures per prompt.", min=1)] = 1,
    base_precision: Annotated[
        str | None, typer.Option(help="Pack the model's weights, as base_model_precision does: int8-quanto, ...")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder, or a .png file for a single picture.")] = Path("generated"),
) -> None:
    """Draw: simpletuner generate --prompt "..." [--model FOLDER | --config FILE | example=NAME] [--adapter FILE]

    Without --model, the model is that of a configuration, found as `train` finds it, and its validation_* options are
    the defaults of what is not given here; --key=value overrides its options.
    """
    from simpletuner import launch

    if model is not None:
        if config is not None or context.args:
            raise ConfigError(
                Problem(
                    "--model needs no configuration", key="--model", fix="give --model, or --config with --key=value"
                )
            )
        family = launch.family_of_model(model, model_family)
        defaults = launch.drawing_defaults(family.spec)
    else:
        loaded = launch.load_arguments(context.args, os.environ, Path.cwd(), _say_aside, config, check_files=False)
        family = launch.family_of_run(loaded)
        defaults = launch.drawing_defaults(family.spec, loaded.config)
    if base_precision is not None:
        launch.pack_base(family, base_precision)

    from simpletuner.validation.generate import Drawing, generate_pictures

    drawing = Drawing(
        prompts=tuple(prompt),
        negative_prompt=defaults.negative_prompt if negative_prompt is None else negative_prompt,
        height=height or width or defaults.height,
        width=width or height or defaults.width,
        steps=steps or defaults.steps,
        guidance=defaults.guidance if guidance is None else guidance,
        seed=seed,
        count=count,
        references=tuple(reference or ()),
    )
    for path in generate_pictures(family, drawing, adapter, output, _say_aside, strength):
        print(path)


@app.command(short_help="Write a trained adapter for other programs, or merge it into its model.")
def export(
    source: Annotated[Path, typer.Argument(help="Output folder, checkpoint, or adapter file.", show_default=False)],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="diffusers, kohya, comfyui or lycoris; may be given several times. All if unset."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder, or a .safetensors file for one format.")] = None,
    rank: Annotated[int | None, typer.Option(help="Make a plain LoRA of this rank of it first.", min=1)] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model with the adapter in it.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights of the folder.")] = False,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id, if it is not where it was.")] = None,
    model_family: Annotated[str | None, typer.Option(help="Of --model, where its folder does not tell.")] = None,
) -> None:
    """Write files for other programs: simpletuner export FOLDER [--format kohya] [--rank N | --merge]

    Every file is loaded onto a fresh model and must give the trainer's own output before it gets its name.
    """
    from simpletuner.commands.export import export_command, find_source
    from simpletuner.launch import family_of_export

    found = find_source(source, ema)
    family = family_of_export(source, model, model_family)
    for path in export_command(found, family, formats or (), output, rank, merge, _say_aside):
        print(path)


@cache_app.command("build", context_settings=PASS_ON)
def build_cache(context: typer.Context) -> None:
    """Encode what is missing, as `train` does before its first step: simpletuner cache build [as for train]"""
    loaded = _load(context)
    from simpletuner.commands import cache

    cache.build(loaded)


@cache_app.command("verify", context_settings=PASS_ON)
def verify_cache(context: typer.Context) -> None:
    """Read every entry and compare it with its sha256; damaged ones are set aside, and the exit code is 3."""
    loaded = _load(context)
    from simpletuner.commands import cache

    if cache.verify(loaded, print):
        raise typer.Exit(EXIT_DATA)


@cache_app.command("prune", context_settings=PASS_ON)
def prune_cache(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    others: Annotated[
        bool, typer.Option("--others", help="Also empty cache folders that no dataset of this configuration uses.")
    ] = False,
) -> None:
    """Remove entries that no configured dataset uses, and files that were set aside as damaged."""
    loaded = _load(context)
    from simpletuner.commands import cache

    cache.prune(loaded, print, dry_run, others)


@cache_app.command("stats", context_settings=PASS_ON)
def count_cache(context: typer.Context) -> None:
    """Say what the caches hold, how much of it is in use, and what is still to be encoded."""
    loaded = _load(context)
    from simpletuner.commands import cache

    cache.stats(loaded, print)


@app.command(context_settings=PASS_ON, short_help="Look at configuration and data before training.")
def check(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the contact sheet; OUTPUT_DIR/check if not given.", show_default=False),
    ] = None,
    pictures: Annotated[int, typer.Option(help="Of each dataset on the contact sheet.", min=1, max=500)] = 21,
) -> None:
    """Show what a run would see of its data: simpletuner check [example=NAME] [env=NAME] [--key=value ...]

    Prints what becomes of the files, sizes, steps, captions and caches, and draws the real crops with their captions
    as contact_sheet.png and check.html.
    """
    loaded = _load(context)
    from simpletuner.commands.check import check as run_check

    run_check(loaded, print, output, pictures)


@app.command(context_settings=PASS_ON, short_help="Memory, time and disk of a run before it starts.")
def plan(
    context: typer.Context,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe", help="Time real steps; if not given, where that is cheap.", show_default=False
        ),
    ] = None,
) -> None:
    """Say what a run needs: simpletuner plan [example=NAME] [env=NAME] [--key=value ...]

    Memory comes from the shapes of the model, which needs no accelerator; time from a few real steps.
    """
    loaded = _load(context)
    from simpletuner.commands.plan import plan as run_plan

    run_plan(loaded, print, probe)


@app.command(context_settings=PASS_ON, short_help="Write the configuration, by questions on screens or by options.")
def configure(
    context: typer.Context,
    goal: Annotated[str | None, typer.Option(help="subject, style, edit or full.")] = None,
    family: Annotated[str | None, typer.Option(help="Model family.")] = None,
    flavour: Annotated[str | None, typer.Option(help="Published checkpoint of the family.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id in place of the flavour's.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the pictures.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Folder with pictures that are never trained on.")] = None,
    regularisation_data: Annotated[str | None, typer.Option(help="Folder for prior preservation.")] = None,
    adapter: Annotated[str | None, typer.Option(help="lokr, lora or dora; not of goal full.")] = None,
    reference_data: Annotated[
        str | None, typer.Option(help="Of goal edit: the pictures before the change, each named as the one after.")
    ] = None,
    captions: Annotated[str | None, typer.Option(help="filename, textfile or instanceprompt.")] = None,
    instance_prompt: Annotated[str | None, typer.Option(help="What the subject is called.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Validation prompt; may be given several times.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the results.")] = None,
    config: Annotated[Path | None, typer.Option(help="The config.json to make or edit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Existing files may be changed.")] = False,
) -> None:
    """Make or edit config.json and multidatabackend.json: simpletuner configure [env=NAME] [--goal ... --data ...]

    Without options, screens ask for everything; with them, the same files are written at once. --key=value sets any
    option of the run. In files that exist only what changes is rewritten.
    """
    from simpletuner.wizard import command

    prompts = tuple(prompt) if prompt else None
    folders = {"data": data, "eval_data": eval_data, "regularisation_data": regularisation_data}
    folders["reference_data"] = reference_data
    words = {"captions": captions, "instance_prompt": instance_prompt, "prompts": prompts, "output_dir": output_dir}
    chosen = {
        "adapter": adapter,
        "goal": goal,
        "family": family,
        "flavour": flavour,
        "model": model,
        "config": config,
        "yes": yes,
    }
    given = command.Given(**chosen, **folders, **words, arguments=tuple(context.args))
    config_file = command.run_configure(given, os.environ, Path.cwd(), print)
    if config_file is not None:
        from simpletuner.launch import load_arguments

        loaded = load_arguments((), os.environ, Path.cwd(), print, config_file)
        os.environ["CONFIG_PATH"] = str(config_file)  # for further processes, which are told `train`
        _run(loaded, ["train"])


@app.command(short_help="Look at this machine and installation.")
def doctor() -> None:
    """Say what would stand in the way of training, with the remedy; the exit code is 2 where something does."""
    from simpletuner.commands.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(os.environ, Path.cwd(), print))


@app.command("verify-resume", context_settings=PASS_ON, short_help="Prove that a killed run ends with the same bits.")
def verify_resume(
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.", min=6)] = 9,
) -> None:
    """Train a few steps twice, once killed and resumed, and compare every bit: simpletuner verify-resume [as for train]

    Both runs are made in a folder beside output_dir, which is removed; caches are used and filled as by `train`. The
    exit code is 1 where something differs.
    """
    loaded = _load(context)
    from simpletuner.training.preflight import check_model_folder

    check_model_folder(loaded)
    from simpletuner.commands.verify_resume import verify_resume as run_verify_resume

    if not run_verify_resume(loaded, context.args, steps, print):
        raise typer.Exit(1)


@app.command(short_help="One page that explains a run: report.html.")
def report(
    output_dir: Annotated[Path, typer.Argument(help="output_dir of a run; it may still be going on.")],
    output: Annotated[
        Path | None, typer.Option(help="The file; OUTPUT_DIR/report.html if not given.", show_default=False)
    ] = None,
) -> None:
    """Write a run as one HTML file with everything in it: curves, pictures, data, configuration, commands.

    It is made from the files of the folder alone, and shows them in any browser, without a network.
    """
    from simpletuner.reporting.report import write_report

    print(write_report(output_dir, output))


@app.command(short_help="Watch runs live on a page in the browser.")
def monitor(
    output_dir: Annotated[
        Path | None, typer.Argument(help="Follow this run, which needs no webhook.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Listen here; 0.0.0.0: for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Listen here; 0: any that is free.", min=0, max=65535)] = 8642,
    token: Annotated[
        str | None,
        typer.Option(
            help="What runs and pages must show. Made for you where other machines can reach the page.",
            envvar="SIMPLETUNER_MONITOR_TOKEN",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show runs as they learn: simpletuner monitor [OUTPUT_DIR] [--host HOST] [--port PORT] [--token TOKEN]

    Runs report to it through webhook_config; with OUTPUT_DIR it reads that run's metrics.jsonl instead.
    """
    from simpletuner.commands.monitor import monitor as run_monitor

    run_monitor(output_dir, host, port, token, lambda line: print(line, flush=True))


@app.command(short_help="The model families: flavours, licences, sizes, what each supports.")
def models(
    name: Annotated[str | None, typer.Argument(help="A family; without one all are listed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the model families that can be trained, those of other packages included."""
    from simpletuner.commands.models import show_models

    show_models(name, as_json, print, _say_aside)


@examples_app.command("list")
def list_examples() -> None:
    """List the shipped examples."""
    from simpletuner.examples import example_names, example_summary

    for name in example_names():
        print(f"{name}  ({example_summary(name)})")


@examples_app.command("copy")
def copy_example(
    name: Annotated[str, typer.Argument(help="As `simpletuner examples list` prints it.")],
    folder: Annotated[Path | None, typer.Argument(help="New folder; ./NAME if not given.", show_default=False)] = None,
) -> None:
    """Copy an example to a folder of your own, to change it."""
    from simpletuner.examples import copy_example as copy

    destination = copy(name, folder or Path(name))
    print(f"copied to {destination}; train it with")
    print(f"  CONFIG_PATH={destination / 'config.json'} simpletuner train")


def _run(loaded: LoadedRun, words: list[str]) -> None:
    """Train, in as many processes as the configuration says.

    Args:
        words: of the command line that starts each of them.
    """
    from simpletuner.training.preflight import check_model_folder, check_services

    check_model_folder(loaded)
    for line in check_services(loaded, os.environ, Path.cwd()):
        _say_aside(f"warning: {line}")

    from simpletuner.training.room import check_room

    check_room(loaded, os.environ)

    from simpletuner.distributed.launcher import is_started_already, launch
    from simpletuner.distributed.layout import layout_of

    layout = layout_of(loaded.config)
    if layout.world_size > 1 and not is_started_already(os.environ):
        raise typer.Exit(launch(words, layout, _say_aside))

    from simpletuner.training.trainer import train as run_training

    run_training(loaded)


def _prepare_environment() -> None:
    """Set what `config.env` beside a configuration sets, and the level of what libraries log."""
    from simpletuner.config.env_files import variables_of_files

    name = next((word.removeprefix("env=") for word in sys.argv if word.startswith("env=")), None)
    os.environ.update(variables_of_files(os.environ, Path.cwd(), name))
    if written := os.environ.get(LOG_LEVEL):
        import logging

        level = logging.getLevelNamesMapping().get(written.strip().upper())
        if level is None:
            allowed = "debug, info, warning, error, critical"
            raise ConfigError(Problem(f'"{written}" is no level', key=LOG_LEVEL, allowed=allowed))
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def _load(context: typer.Context) -> LoadedRun:
    """The run that example=NAME, env=NAME and --key=value mean."""
    from simpletuner.launch import load_arguments

    return load_arguments(context.args, os.environ, Path.cwd(), _say_aside)


def _say_aside(line: str) -> None:
    """To stderr: stdout holds what was asked for, and nothing else."""
    print(line, file=sys.stderr)


def _tell_the_end(text: str) -> None:
    """To stderr; one of several processes tells its launcher, which prints it for all."""
    from simpletuner.distributed.launcher import leave_last_words

    if not leave_last_words(text, os.environ):
        print(text, file=sys.stderr)


def _let_go_of_stdout() -> None:
    """`simpletuner train | head` ends as the run did: otherwise Python's own flush at exit fails with code 120."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_unexpected(error: Exception) -> str:
    """Keep the traceback in a file and name it in one line: it is a fault of ours, not of the user's."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    summary = f"unexpected {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="simpletuner-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"simpletuner {__version__}, {_command_line(sys.argv)}\n\n{text}")
    except OSError:
        return f"{summary}\n{text}"
    return f"{summary}\n  the traceback is in {file.name}; please report it with your configuration"


def _command_line(arguments: list[str]) -> str:
    """The command as it was given, without the values of options: one may be a token."""
    shown = [Path(arguments[0]).name]
    for before, argument in itertools.pairwise(arguments):
        name, equals, _ = argument.partition("=")
        is_value = before.startswith("--") and "=" not in before and not argument.startswith("--")
        shown.append("..." if is_value else f"{name}=..." if equals and name.startswith("--") else argument)
    return " ".join(shown)
