"""The command lines of DiffSynth-Studio's LoRA scripts, read as runs of this program."""
