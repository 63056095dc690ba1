"""What keeps a run of a month alive: signals and time limits, hangs, lost ranks, and faults on purpose."""
