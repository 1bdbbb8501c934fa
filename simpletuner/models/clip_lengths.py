"""How many tokens of a prompt CLIP reads: chunks of 75, with a begin and an end; no torch."""

from __future__ import annotations

CHUNK = 75
# What CLIP reads at once.
WINDOW = CHUNK + 2
# For `FamilySpec.prompt_lengths`: one to four chunks.
CLIP_LENGTHS = range(WINDOW, 4 * CHUNK + 3, CHUNK)
