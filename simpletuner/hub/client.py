"""The Hub as the rest of this package sees it: who we are there, and what an error means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.models.hub_connectivity import hub_failures
from simpletuner.text import without_login

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Answers after which the same request cannot succeed; all others are worth another try.
FINAL_ANSWERS = (400, 401, 403, 404, 409, 422)


def make_api() -> HfApi:
    """A client with the token of the environment or of `hf auth login`; it honors HF_ENDPOINT."""
    from huggingface_hub import HfApi

    return HfApi(library_name="simpletuner")


def upload_failures() -> tuple[type[Exception], ...]:
    """What an upload can raise without a fault of ours. Large files go through a library that raises RuntimeError."""
    return (*hub_failures(), RuntimeError)


def status_of(error: BaseException) -> int | None:
    """The status of the answer that is an error, None where there was no answer."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def is_final(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    return status_of(error) in FINAL_ANSWERS


def reason_of(error: BaseException) -> str:
    """The error in one line. The Hub's own errors name addresses and never the token."""
    lines = [line.strip() for line in without_login(str(error)).splitlines() if line.strip()]
    status = status_of(error)
    if status == 401:
        return "the token is not accepted"
    if status == 403:
        return "the token may not write there"
    return lines[0] if lines else type(error).__name__
