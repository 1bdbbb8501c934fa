"""The generated page `documentation/OPTIONS.md`. A test compares the file with what is generated here."""

from __future__ import annotations

import sys
from pathlib import Path

from simpletuner.config.foreign_keys import RENAMED, RETIRED, UNBUILT
from simpletuner.config.optimizers import OPTIMIZERS, OptimizerRow
from simpletuner.config.options import all_options
from simpletuner.config.reference import option_rows, planned_values_text

INTRODUCTION = """\
# Options

This page is generated from the declarations in `simpletuner/config/options/`; a test compares it with them.
`simpletuner options KEY` prints one of these rows, `simpletuner options --search WORD` finds some,
`simpletuner options --resolved` prints the value of each in your run and where it comes from, and
`simpletuner options --json-schema` prints a schema that editors complete and check `config.json` with
(`simpletuner options multidatabackend --json-schema`: that of the data file). The shipped configurations name it in
`$schema`; a list has no place for that, so [`.vscode/settings.json`](../.vscode/settings.json) names it for data files.

## How values are read

`config.json` is one flat object. Keys may begin with `--`; `//` and `/* */` comments are allowed. Numbers and truth
values may stand in quotes (`"4e-5"`, `"false"`). `null` and `""` leave a key unset. A key that is not known is an
error that names the nearest one, and so is a key that cannot act yet (*not built* below) unless it holds its default.

A value counts from the last of these that sets it: the default, the family's default, the file, the environment
(`SIMPLETUNER_LEARNING_RATE=1e-4`), the command line (`--learning_rate=1e-4`; a flag alone means `true`).

Relative paths are looked up in the working folder first, then in the folder of the configuration file. What the run
writes goes into the working folder.

## Environment configuration variables

| variable | meaning |
|---|---|
| `CONFIG_PATH` | The configuration: a file, a file without its ending, or a folder that holds `config.json`. |
| `ENV`, `SIMPLETUNER_ENV`, `SIMPLETUNER_ENVIRONMENT` | Name of a folder in `config/` (or a path); `default` is `config/` itself. |
| `CONFIG_BACKEND`, `SIMPLETUNER_CONFIG_BACKEND`, `CONFIG_TYPE` | `json`, `toml` or `env`: which kind of file is looked for; `cmd`: none, all options are on the command line. |
| `SIMPLETUNER_<OPTION>` | Sets an option. A misspelled one is an error; any other name that is not an option is reported and not read. |
| `TRAINER_EXTRA_ARGS` | Further options as on a command line. In `config.json` add the keys themselves instead. |
| `TRAINING_NUM_PROCESSES`, `TRAINING_NUM_MACHINES`, `NODE_RANK`, `MASTER_ADDR`, `MASTER_PORT` | Set `num_processes`, `num_machines`, `machine_rank`, `main_process_ip`, `main_process_port`: [DISTRIBUTED.md](DISTRIBUTED.md). |
| `MIXED_PRECISION`, `TRAINING_DYNAMO_BACKEND` | Set `mixed_precision`, `dynamo_backend`. |
| `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | Set by torchrun and `accelerate launch`: this process is one of several, and starts none. |
| `CUDA_VISIBLE_DEVICES` | Which GPU is used; it is read by CUDA itself. |
| `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` | Read by the Hugging Face libraries: a mirror, the folder of downloads, the login. |
| `SIMPLETUNER_LOG_LEVEL` | `debug`, `info`, `warning`, `error` or `critical`: what libraries log is shown from this level on. |
| `SIMPLETUNER_JOB_ID` | Events of raw webhooks carry it as `job_id`. |
| `SIMPLETUNER_MONITOR_TOKEN` | `--token` of `simpletuner monitor`. |
| `SIMPLETUNER_DEBUG` | `1` shows a traceback for errors of the program itself. |

Without any of them, `config/config.json` is read, then `config.json`, then the same names with `.toml` and `.env`.
A `config.env` file holds `NAME=value` lines with the options' names in capitals. Beside a `config.json` or `config.toml`
it is not a configuration: its variables are set before the run (`config/config.env` first, then `config/NAME/config.env` of
the chosen `ENV`), where the environment does not set them itself. There it may set `SIMPLETUNER_<OPTION>`, the variables
of launchers, and what CUDA, NCCL, Hugging Face and W&B read for devices, caches, offline work and tokens. What would load
code or send a token to another place (`PYTHONPATH`, `LD_PRELOAD`, `HF_ENDPOINT`, proxies) is refused by name: set it in
the shell.
"""  # noqa: E501 - rows of a table


def options_markdown() -> str:
    """The whole page."""
    infos = all_options()
    built = [info for info in infos.values() if not info.planned]
    planned = [info for info in infos.values() if info.planned]
    parts = [INTRODUCTION]
    for group in dict.fromkeys(info.group for info in built):
        rows = option_rows(info for info in built if info.group == group)
        parts.append(f"## {group}\n\n" + "\n".join(rows) + "\n")
    parts.append(_planned_values())
    parts.append(
        "## Not built\n\nKnown, and refused unless they hold their default.\n\n"
        + "\n".join(option_rows(planned))
        + "\n"
    )
    renamed = "\n".join(f"| `{old}` | `{new}` |" for old, new in RENAMED.items())
    parts.append(f"## Renamed keys\n\nRead with a warning.\n\n| old | new |\n|---|---|\n{renamed}\n")
    retired = "\n".join(f"| `{old}` | {why} |" for old, why in RETIRED.items())
    parts.append(
        f"## Retired keys\n\nAccepted with a warning; they have no effect.\n\n| key | why |\n|---|---|\n{retired}\n"
    )
    unbuilt = "\n".join(f"| `{name}` | {key.reason} | {key.fix or 'remove the key'} |" for name, key in UNBUILT.items())
    parts.append(
        "## Keys of other trainers\n\nRefused where they would change the result; accepted where they are off.\n\n"
        f"| key | why | what to do |\n|---|---|---|\n{unbuilt}\n"
    )
    return "\n".join(parts)


def optimizers_table() -> str:
    """Every optimizer: what it is, what it keeps for each weight, what `optimizer_config` may set."""
    rows = ["| `optimizer` | what it is | kept per weight | `optimizer_config` |", "|---|---|---|---|"]
    for name, row in OPTIMIZERS.items():
        arguments = ", ".join(f"`{key}={_shown(row, key)}`" for key in row.arguments)
        rows.append(f"| `{name}` | {row.notes} | {row.state} | {arguments} |")
    return "\n".join(rows)


def _shown(row: OptimizerRow, key: str) -> str:
    value = row.defaults.get(key, row.arguments[key])
    return str(list(value) if isinstance(value, tuple) else value)


def _planned_values() -> str:
    keys: dict[str, list[str]] = {}  # the number formats of five models have one row
    for info in all_options().values():
        if info.planned_values and not info.planned:
            keys.setdefault(planned_values_text(info), []).append(f"`{info.name}`")
    rows = [f"| {', '.join(names)} | {text} |" for text, names in keys.items()]
    table = "\n".join(["| key | values |", "|---|---|", *rows])
    return f"## Values that are not built\n\nKnown, and refused by name.\n\n{table}\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(options_markdown(), encoding="utf-8")
