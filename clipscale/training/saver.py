"""A run's checkpoints: judged before they get their name, written in the background; what a failing one costs is the
setting's to say.

    saver = Saver(config, world)
    saver.prepare(nbytes, None, step=0, saves=7)         # before the first step
    saver.save(snapshot)                          # under way
    saver.judge(scores, step=500)                 # that one is the best so far: it stays
    saver.failing                                 # one could not be written, and that is to end the run: save at once
    saver.finish()                                # until the last one is on the disk
    saver.close()

A state that is not good is never published, and the run goes on: what to do about it is others' to say. A checkpoint
that cannot be written (a full disk) ends the run, or costs no more than itself, by `checkpoint.on_error`. The last one
of a run must be. Either is told, and a row of faults.jsonl. Every rank calls each method alike.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from clipscale.checkpoint import Snapshot, first_bad, save_checkpoint
from clipscale.checkpoint.best import is_better, keep_best
from clipscale.checkpoint.mirror import Mirror
from clipscale.checkpoint.room import require_room
from clipscale.checkpoint.writer import CheckpointWriter
from clipscale.config import Config
from clipscale.dist import World
from clipscale.errors import SharedError, UserError, reason
from clipscale.telemetry.faults import report_fault
from clipscale.telemetry.growing import FULL
from clipscale.tell import tell


class Saver:
    def __init__(self, config: Config, world: World) -> None:
        self._settings, self._run_dir, self._world = config.checkpoint, config.run.dir, world
        self._writer = CheckpointWriter(self._publish)
        self._published, self._refused = 0, (0, "")  # the last step that was, and that was not, with the reason
        self._failed = False  # the last one could not be written
        self._mirror: Mirror | None = None  # the main rank's

    @property
    def failing(self) -> bool:
        """Whether the next save will end the run; the main rank's to ask."""
        return self._failed and self._settings.on_error == "stop"

    def prepare(self, nbytes: int, found: Path | None, *, step: int, saves: int) -> None:
        """Take the host memory that saving in the background needs, before the step after `step`.

        Args:
            nbytes: of a state (staging.py).
            found: the run's own checkpoint that it goes on from: the last run may have ended before it was mirrored.
            saves: how many are to come.

        Raises:
            SharedError: there is not so much memory, or the disk has no room for them.
        """
        keep, best = self._settings.keep, self._settings.best is not None
        self._world.lead(partial(require_room, self._run_dir, nbytes, step=step, keep=keep, saves=saves, best=best))
        if self._settings.mirror is not None and self._world.is_main:
            self._mirror = Mirror(self._settings.mirror, self._run_dir, self._settings.keep)
            if found is not None:
                self._mirror.offer(found)
        if self._settings.background:
            tell(self._world.lead(partial(self._writer.prepare, nbytes, self._world.device)))

    def save(self, snapshot: Snapshot, *, problem: str = "") -> None:
        """Have `snapshot` published, unless its tensors or the caller have something against it.

        Args:
            problem: what is wrong with the run's state, alike on every rank; '' for nothing that is known yet.

        Raises:
            SharedError: this one or, in the background, the one before could not be written, and checkpoint.on_error
                says stop.
        """
        if problem:
            self._refuse(snapshot.step, problem)
            return
        try:
            self._world.lead(partial(self._writer.save, snapshot))
        except SharedError:
            if self._settings.on_error == "stop":
                raise

    def judge(self, scores: dict[str, float], *, step: int) -> None:
        """Keep the checkpoint of `step` as the best one, where these scores say so. What fails is told, and costs no
        more."""
        metric, run_dir = self._settings.best, self._run_dir
        if not self._world.is_main or metric not in scores:
            return
        if not is_better(run_dir, metric, value := scores[metric], step=step):
            return
        self._writer.join()
        try:
            keep_best(run_dir, metric, value, step=step)
            tell(f"step {step}: the best {metric} so far, {value:.4f}: kept as {Path(run_dir, 'best')}")
        except OSError as error:
            what = f"step {step} cannot be kept as the best one: {reason(error)}"
            report_fault("checkpoint", what, action="the run goes on", step=step)

    def finish(self, *, leaving: bool = False) -> str:
        """Until everything is on the disk, and in the mirror or given up.

        Args:
            leaving: the run goes on later: a state that is not good does not end it then, and the mirror can wait.

        Returns:
            Why the last state is not saved; "" where it is.

        Raises:
            SharedError: the last one is not good, or could not be written.
        """
        return self._world.lead(partial(self._finish, leaving))

    def settle(self) -> None:
        """Until what is being written is, or has failed; of this process alone."""
        with suppress(UserError):  # reported when it failed
            self._writer.wait()

    def close(self) -> None:
        """Until everything is on the disk, of this process alone, for a run that is ending anyhow."""
        self.settle()
        self._writer.close()
        if self._mirror is not None:
            self._mirror.close()

    def _finish(self, leaving: bool) -> str:
        self._writer.wait()
        step, what = self._refused
        refused = what if step > self._published else ""
        if refused and not leaving:
            raise UserError(
                f"{refused}; the run has ended badly: lower optim.lr, and go back to a good one of "
                f"{Path(self._run_dir, 'checkpoints')} by resume=<its path>"
            )
        if self._failed:
            raise UserError("the last checkpoint could not be written; make room, and start again")
        if self._mirror is not None and not leaving:
            self._mirror.wait()
        return refused

    def _publish(self, snapshot: Snapshot) -> None:
        """In the thread of the writer, with a copy of the state."""
        if problem := first_bad(**snapshot.trees):
            self._refuse(snapshot.step, problem)
            return
        try:
            path = save_checkpoint(self._run_dir, snapshot, self._settings.keep)
        except Exception as error:
            self._failed = True
            action = "the run stops" if self._settings.on_error == "stop" else "the run goes on (checkpoint.on_error)"
            cause = error.__cause__
            kind = "disk" if isinstance(cause, OSError) and cause.errno in FULL else "checkpoint"
            report_fault(kind, reason(error), action=f"{action}, the older ones stay", step=snapshot.step)
            raise
        self._published, self._failed = snapshot.step, False
        if self._mirror is not None:
            self._mirror.offer(path)

    def _refuse(self, step: int, problem: str) -> None:
        self._refused = step, f"step {step}: no checkpoint is written: {problem}"
        report_fault("checkpoint", self._refused[1], action="the older ones stay", step=step)
