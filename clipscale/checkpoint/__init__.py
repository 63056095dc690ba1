"""Checkpoints that are whole or not there: written aside, synced, hashed, then renamed.

    save_checkpoint("runs/a", Snapshot(step=500, ...), keep=2)
    found = newest_checkpoint("runs/a")                # the newest that verifies, or None where there is none
    snapshot = load_checkpoint(found)

A checkpoint is a folder `checkpoints/step-000000500` with model.safetensors (open_clip's CustomTextCLIP state dict),
optimizer.safetensors, of a run that averages its weights ema.safetensors, state.json (step, position and the fields of
RunState), config.yaml and manifest.json (size and SHA-256 of each). Version 1 had model.pt and optimizer.pt in place of
the first two, and is still read.
Randomness needs no state: it is keyed by the seed and by steps and positions (step/, data/), which are here.

Found and verified without torch; it is imported only where tensors are written or read, and by writer.py, which writes
them while training goes on.
"""

from clipscale.checkpoint.due import SaveClock
from clipscale.checkpoint.find import find_checkpoint, newest_checkpoint, verify
from clipscale.checkpoint.folder import RunFolder, refuse_held
from clipscale.checkpoint.judge import first_bad
from clipscale.checkpoint.load import load_checkpoint, load_config_of, load_model, load_state, require_average
from clipscale.checkpoint.retention import set_aside
from clipscale.checkpoint.save import save_checkpoint
from clipscale.checkpoint.snapshot import VERSION, RunState, Snapshot
from clipscale.checkpoint.start import Start, begin_start, find_start, load_start, saved_state

__all__ = [
    "VERSION",
    "RunFolder",
    "RunState",
    "SaveClock",
    "Snapshot",
    "Start",
    "begin_start",
    "find_checkpoint",
    "find_start",
    "first_bad",
    "load_checkpoint",
    "load_config_of",
    "load_model",
    "load_start",
    "load_state",
    "newest_checkpoint",
    "refuse_held",
    "require_average",
    "save_checkpoint",
    "saved_state",
    "set_aside",
    "verify",
]
