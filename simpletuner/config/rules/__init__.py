"""What must hold between keys, by topic: each rule is a function named like a sentence, and all of them are asked.

A rule looks at a draft and yields problems; a notice yields what is allowed but perhaps not meant. Rules that need the
file system are in `files`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from simpletuner.config.draft import Draft
from simpletuner.config.rules.adapter import ADAPTER_NOTICES, ADAPTER_RULES
from simpletuner.config.rules.data import DATASET_NOTICES, DATASET_RULES
from simpletuner.config.rules.files import FILE_RULES
from simpletuner.config.rules.images import IMAGE_NOTICES, IMAGE_RULES
from simpletuner.config.rules.model import MODEL_RULES
from simpletuner.config.rules.objective import OBJECTIVE_NOTICES, OBJECTIVE_RULES
from simpletuner.config.rules.optimizer import OPTIMIZER_NOTICES, OPTIMIZER_RULES
from simpletuner.config.rules.precision import PRECISION_RULES
from simpletuner.config.rules.processes import PROCESS_RULES
from simpletuner.config.rules.reporting import REPORTING_NOTICES, REPORTING_RULES
from simpletuner.config.rules.validation import VALIDATION_NOTICES, VALIDATION_RULES
from simpletuner.errors import Problem

RULES: tuple[Callable[[Draft], Iterator[Problem]], ...] = (
    *MODEL_RULES,
    *ADAPTER_RULES,
    *OPTIMIZER_RULES,
    *REPORTING_RULES,
    *IMAGE_RULES,
    *DATASET_RULES,
    *OBJECTIVE_RULES,
    *PROCESS_RULES,
    *VALIDATION_RULES,
    *PRECISION_RULES,
)
NOTICES: tuple[Callable[[Draft], Iterator[str]], ...] = (
    *OPTIMIZER_NOTICES,
    *IMAGE_NOTICES,
    *REPORTING_NOTICES,
    *ADAPTER_NOTICES,
    *OBJECTIVE_NOTICES,
    *DATASET_NOTICES,
    *VALIDATION_NOTICES,
)


def broken_rules(draft: Draft, looks_at_files: bool) -> list[Problem]:
    """The problems of all rules, but for options whose value was refused already."""
    rules = (*RULES, *FILE_RULES) if looks_at_files else RULES
    problems = [problem for rule in rules for problem in rule(draft)]
    return [problem for problem in problems if problem.key not in draft.faulty]


def notices(draft: Draft) -> list[str]:
    """What is allowed but perhaps not meant; each is said once."""
    return [line for notice in NOTICES for line in notice(draft)]
