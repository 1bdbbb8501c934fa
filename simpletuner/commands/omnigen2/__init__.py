"""Files and command lines of OmniGen2's own training program, read as runs of this one."""
