"""The training run: build, resume, loop, evaluate, save.

    summary = train(config)          # one process, or every rank of torchrun / srun

Read `Trainer.run` for the loop and `Trainer.step` for one step. What a step does is a function of the config, the seed
and its position alone, so a run that was killed and started again goes the way of one that was not.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from clipscale.checkpoint import RunFolder, RunState, SaveClock, Snapshot, Start, begin_start, find_start, load_start
from clipscale.checkpoint.staging import staged_bytes, state_bytes
from clipscale.config import Config
from clipscale.config.load import dump_config
from clipscale.data.load.loader import StepBatch
from clipscale.deterministic import deterministic
from clipscale.dist import World, lost_peer, start_world
from clipscale.errors import Interrupted, SharedError, reason
from clipscale.eval.suite import CutShort, EvalSuite
from clipscale.files import write_file
from clipscale.guard.divergence import Diverged, Guard
from clipscale.guard.drift import compare_ranks
from clipscale.guard.rollback import go_back, keep_rollbacks, passed_over
from clipscale.launch import check_ranks
from clipscale.loss.engines import adopt_shapes, check_engine, tuned_shapes
from clipscale.loss.link import open_link
from clipscale.optim import lock_towers, optimizer_state, set_lr
from clipscale.preflight.checks import check_training
from clipscale.preflight.prepare import prepare_files
from clipscale.progress import duration
from clipscale.resilience.injection import injected
from clipscale.resilience.leaving import TIME_LIMIT, Leaving, mark, unmark
from clipscale.resilience.watchdog import Watchdog, rank_is_lost
from clipscale.resilience.wishes import LEAVE, SAVE, Wishes
from clipscale.schedule import is_due, learning_rate, others_left, rate_jump, save_due, total_steps
from clipscale.step.planning import plan_line, plan_record, plan_step
from clipscale.step.shortage import shortage_explained
from clipscale.telemetry.faults import record_fault
from clipscale.telemetry.parts import Parts
from clipscale.telemetry.parts_picture import draw_run
from clipscale.telemetry.runlog import Pace, RunLog, memory
from clipscale.tell import tell
from clipscale.towers import autocast_dtype, build_towers, try_backward
from clipscale.training.ema import Ema
from clipscale.training.feed import Feed, Skips
from clipscale.training.learner import Learner
from clipscale.training.report import evaluation_lines, left_line, start_lines, step_line, step_row, summary_lines
from clipscale.training.saver import Saver
from clipscale.words import counted

_SLOW_SECONDS = 0.4  # of an injected fault
_STEPS_OF_A_PICTURE = 20  # a run of fewer is not drawn: its first steps start threads and tune kernels


def train(config: Config, notes: list[str] | None = None, leaving: Leaving | None = None) -> list[str]:
    """Train to the end of `config.train.samples`; returns what to tell the person, in three lines.

    Args:
        notes: what `check_training(config)` gave, where that has been called already.
        leaving: what listens for signals already, if anything does.

    Raises:
        UserError: anything the person can mend, in one line.
        Interrupted: told to leave, by a signal or a time limit; the state is saved.
    """
    leaving = leaving or Leaving(config.run.leave_before_seconds)
    with leaving.starting(config.run.dir):
        notes = check_training(config) if notes is None else notes
        with start_world(config.device, config.run.timeout_seconds) as world, deterministic(config.train.deterministic):
            while (end := _attempt(config, world, notes, leaving)) is None:
                notes = []
                gc.collect()  # the trainer's memory
        summary, left = end
        if left:  # the ranks have left each other in order
            raise Interrupted(left, summary[0])
        return summary


def _attempt(config: Config, world: World, notes: list[str], leaving: Leaving) -> tuple[list[str], str] | None:
    """One trainer's way: its summary, and why it left before the end; None: it has gone back, for another to go on."""
    trainer = Trainer(config, world, notes, leaving=leaving, prepared=world.size == 1)  # by `check_training`
    try:
        try:
            return trainer.run(), trainer.left
        except Diverged as error:
            return go_back(error, config, world, trainer.saver.settle, position=trainer.position)
    except Exception as error:
        if world.size > 1 and lost_peer(error):
            raise rank_is_lost(error, config.run, world, step=trainer.steps_done + 1) from error
        what, alike = f"the run ended: {reason(error)}", isinstance(error, SharedError)
        record_fault("error", what, action="none", step=trainer.steps_done, every_rank=not alike)
        raise
    finally:
        trainer.close()


class Trainer:
    """One rank of a run. Construction resumes; `run` trains; `close` lets go of threads and files.

    Args:
        notes: lines to tell first, in the run's log too.
        leaving: when to leave before the end; None: never.
        prepared: the run's files are made ready already (preflight/prepare.py).
    """

    left = ""  # why the run has left before its end

    def __init__(
        self,
        config: Config,
        world: World,
        notes: Sequence[str] = (),
        *,
        leaving: Leaving | None = None,
        prepared: bool = False,
    ) -> None:
        check_ranks(config.train.global_batch, world.size)
        try:
            check_engine(config.loss.engine, config.loss.precision, world.device)
        except ValueError as error:
            raise SharedError(str(error)) from error
        self.config, self.world, self.parts = config, world, Parts(world.device)
        self._leaving, self._wishes = leaving or Leaving(0), Wishes(open_link(None), self._wish)
        self._resources = ExitStack()
        try:
            self._resume(notes, prepared)
        except BaseException:
            self.close()
            raise

    def _resume(self, notes: Sequence[str], prepared: bool) -> None:
        """Find where the run stands, and build everything that its next step needs; then tell what will be trained."""
        config, world = self.config, self.world
        self.log = self._resources.enter_context(RunLog(config.run.dir, rank=world.rank, ranks=world.size))
        self._start = world.lead(self._find_start)
        for line in filter(None, [*notes, self._start.note]):
            tell(line)
        found, snapshot = load_start(self._start, world)
        self.steps_done = snapshot.step if snapshot else 0
        self._saved_position = snapshot.position if snapshot else 0
        self.position = world.lead(partial(passed_over, config.run.dir, self.steps_done, self._saved_position))
        state = snapshot.state if snapshot else RunState()
        self.last_row = state.last_row
        adopt_shapes(state.kernels)
        self._clock = SaveClock(config.checkpoint, step=self.steps_done)
        self.last_step = self.steps_done + total_steps(config, self.position)
        self.skips = self._resources.enter_context(closing(Skips(config, state.skips, world)))
        own = found if self._start.kind in ("own", "rewind") else None
        self._look_at_last_row(own)
        unfinished = self.steps_done < self.last_step
        if self._cut_short or (unfinished and not prepared):
            self._prepare_files(state.order)
        self._build_towers(snapshot)
        self.guard = Guard(config, self.towers, world, state.health)
        if unfinished or self._cut_short:
            self._prepare_saving(own)
            self.plan = plan_step(config, self.towers, world, state.plan)
            self._build_data(state.order)
            world.each(self._begin)
        for line in start_lines(config, world, last_step=self.last_step, found=found, snapshot=snapshot):
            tell(line)
        if snapshot and (jump := rate_jump(snapshot.config, config, self.position)):
            tell(jump)

    def run(self) -> list[str]:
        """From where it stands to the last step, unless it is told to leave; then a summary."""
        if self.steps_done == self.last_step and not self._cut_short:
            return self._summary("already complete: nothing to do")
        self.towers.model.train()
        first, pace = self.steps_done, Pace()
        self.parts.take()  # what building took is no step's
        watchdog = Watchdog(self.config.run, self.world, self.parts, step=lambda: self.steps_done + 1)
        with self._leaving.training(), watchdog:
            if not self._train(pace):
                return self._leave(pace)
        self.saver.finish()
        if self.world.is_main and self.last_step >= _STEPS_OF_A_PICTURE:
            tell(draw_run(self.config.run.dir))
        return self._summary(f"trained {counted(self.last_step - first, 'step')} in {duration(pace.elapsed())}")

    def _train(self, pace: Pace) -> bool:
        """The loop: take a batch, step, save, evaluate, tell. False: the run is to leave, and its step is saved."""
        config, saves = self.config, True
        try:
            if self._cut_short:
                self._finish_row(pace)
            while self.steps_done < self.last_step:
                begin = time.perf_counter()
                self.last_row = self._timed_step(pace)
                wishes = self._wishes.agreed()
                saves = bool(wishes) or save_due(config, self.steps_done, self.last_step)
                if (every := config.train.check_ranks_every_steps) and (saves or self._due(every)):
                    compare_ranks(self.towers.model, self.ema.averages, self.world, step=self.steps_done)
                if saves:
                    self._save_now(pace)
                self._step_seconds = time.perf_counter() - begin
                if wishes & LEAVE:
                    return False
                self._finish_row(pace)
        except CutShort:
            if not saves:
                self._save_now(pace)
            return False
        return True

    def step(self, batch: StepBatch) -> dict[str, Any]:
        """One optimizer step on one global batch; returns its row of metrics, with repeats where it is logged."""
        config, model = self.config, self.towers.model
        lr = learning_rate(config, self.position)
        set_lr(self.learner.optimizer, lr)
        step = self.steps_done + 1
        with shortage_explained(step=step, plan=self.plan, settings=config.gradcache):
            result = self.learner.gradients(batch, plan=self.plan, step=step)
            with self.parts.part("optimizer"):
                grad_norm = self.learner.update(step=step) if result.pairs else 0.0 * result.loss  # or NaN
        self.steps_done = step
        self.position += config.train.global_batch
        self.skips.account(batch, masked=result.pairs < config.train.global_batch, seen=self.position)
        clamped = self.last_row.get("logit_scale_clamped", 0) + self.towers.clamp_logit_scale()
        self.ema.update(samples=self.position)
        repeats = self.feed.repeats(batch) if self._due(config.run.log_every_steps) else {}
        learned = {"logit_scale": math.exp(model.logit_scale.item()), "logit_scale_clamped": clamped}
        learned |= {"grad_norm": grad_norm, "lr": lr}
        row = step_row(self.steps_done, self.position, result, learned, masked=self.skips.counts.total())
        row |= repeats | memory()
        self.guard.look(row, result.pairs, self.learner.trouble, partial(self.feed.keys, batch))
        return row

    def close(self) -> None:
        """Let go of threads, files and the run's folder."""
        self._resources.close()

    # --- one step -----------------------------------------------------------------------------------------------------

    def _timed_step(self, pace: Pace) -> dict[str, Any]:
        """The step on the next batch; its row with how fast it went."""
        loader, begin = self.feed.loader, time.perf_counter()
        waited = loader.waited_seconds
        with self.parts.part("data wait"):
            batch = next(loader)
        if injected("slow", step=self.steps_done + 1, rank=self.world.rank):
            time.sleep(_SLOW_SECONDS)
        row = self.step(batch)
        waited = loader.waited_seconds - waited
        return row | pace.add(self.config.train.global_batch, waited, time.perf_counter() - begin)

    # --- leaving ------------------------------------------------------------------------------------------------------

    _step_seconds = 0.0  # of the last step, with its checkpoint

    def _wish(self) -> int:
        """What this rank wants after the step that it is in (resilience/wishes.py)."""
        save = self.world.is_main and (self.saver.failing or self._clock.wants(step=self.steps_done + 1))
        return LEAVE * self._told() | SAVE * save

    def _told(self) -> bool:
        return bool(self._leaving.why(step_seconds=self._step_seconds))

    def _leave(self, pace: Pace) -> list[str]:
        """The step is done and saved; its evaluations are made up for at the next start, which finds no row of it."""
        if not self.evaluations.due(self.steps_done, self.last_step):
            self._finish_row(pace)
        refused = self.saver.finish(leaving=True)
        whys = self.world.gather(self._leaving.why(step_seconds=self._step_seconds))
        self.left = next(filter(None, whys), TIME_LIMIT)
        if self.world.is_main:
            mark(self.config.run.dir, step=self.steps_done, why=self.left)
        line = left_line(self.left, step=self.steps_done, refused=refused)
        tell(line)
        return [line]

    # --- evaluation and saving ----------------------------------------------------------------------------------------

    def _due(self, every_steps: int) -> bool:
        return is_due(every_steps, self.steps_done, self.last_step)

    def _finish_row(self, pace: Pace) -> None:
        """Evaluate what is due after this step, and write its row; its checkpoint, if it has one, is there already."""
        scores = {}
        for name in self.evaluations.due(self.steps_done, self.last_step):
            with pace.other(name), self.parts.part("evaluation"):
                scores |= self.evaluations.scores(name, step=self.steps_done, of=self.ema.evaluated())
        self.saver.judge(scores, step=self.steps_done)
        row = self.last_row = self.last_row | scores | pace.spent(self.parts.take())
        left = others_left(self.config, self.steps_done, self.last_step)
        eta_seconds = pace.eta_seconds(self.last_step - self.steps_done, left)
        self.log.metrics(row)
        self.log.advance(self.steps_done, eta_seconds)
        if self._due(self.config.run.log_every_steps) and not self._cut_short:
            tell(step_line(row | pace.interval(), last_step=self.last_step, eta_seconds=eta_seconds))
        for line in evaluation_lines(scores, step=self.steps_done, last_step=self.last_step):
            tell(line)
        self._cut_short = False

    def _summary(self, what: str) -> list[str]:
        return summary_lines(what, self.last_row, run_dir=self.config.run.dir, pairs=self.config.train.global_batch)

    def _save_now(self, pace: Pace) -> None:
        with pace.other("checkpoint"), self.parts.part("checkpoint"):
            self._save()
        self._clock.saved()

    def _save(self) -> None:
        """Every rank reaches this at the same step; the main rank writes, in the background. What fails there is
        everyone's at the next save or at the end of the run."""
        snapshot = Snapshot(
            step=self.steps_done,
            position=self.position,
            model=self.towers.model.state_dict(),
            optimizer=optimizer_state(self.learner.optimizer),
            state=RunState(
                order=self.feed.pipeline.identity(),
                skips=dict(self.skips.counts),
                scaler=self.learner.scaler.state_dict(),
                last_row=self.last_row,
                kernels=tuned_shapes(),  # the main rank's: on equal machines, everyone's
                plan=plan_record(self.plan, self.config, self.world),
                health=self.guard.record(),
            ),
            config=self.config,
            ema=self.ema.averages,
        )
        self.saver.save(snapshot, problem=self.guard.problem())

    # --- building -----------------------------------------------------------------------------------------------------

    def _find_start(self) -> Start:
        """Where the run begins, by `resume`. Holds the run's folder."""
        run_dir = self.config.run.dir
        self._folder = self._resources.enter_context(closing(RunFolder(run_dir)))
        return find_start(run_dir, self.config.resume, samples=self.config.train.samples)

    def _look_at_last_row(self, own: Path | None) -> None:
        """Whether the step that the run's own checkpoint was written after got its row: it is written last, behind the
        evaluations. They are made up for where the run was cut short between the two."""
        row = self.world.lead(partial(self.log.row_of, self.steps_done)) if own else None
        self.last_row = row or self.last_row
        self._cut_short = own is not None and row is None

    def _build_towers(self, snapshot: Snapshot | None) -> None:
        config, device = self.config, self.world.device
        autocast = autocast_dtype(config.train.precision, device)
        self.towers = build_towers(config.model, config.towers, device=device, autocast=autocast, seed=config.seed)
        for line in (*lock_towers(self.towers, config.train.lock), f"towers: {self.towers.how_computed()}"):
            tell(line)
        if config.train.deterministic:
            try_backward(self.towers)
        self.learner = Learner(config, self.towers, self.world, self.parts, self._wishes)
        self.learner.begin(snapshot)
        self.ema = Ema(config, self.towers.model)
        self.ema.begin(snapshot)

    def _prepare_saving(self, own: Path | None) -> None:
        """Closed before the log and the run's folder: what is being written is finished, however the run ends."""
        self.saver = self._resources.enter_context(closing(Saver(self.config, self.world)))
        saves = others_left(self.config, self.steps_done, self.last_step)["checkpoint"]
        nbytes = state_bytes(self.towers.model, self.learner.optimizer) + staged_bytes(self.ema.averages)
        self.saver.prepare(nbytes, own, step=self.steps_done, saves=saves)

    def _prepare_files(self, recorded: dict[str, Any] | None) -> None:
        """The first rank of a node writes what is missing."""
        for line in self.world.lead(partial(prepare_files, self.config, recorded), on_each_node=True, patient=True):
            tell(line)

    def _build_data(self, recorded: dict[str, Any] | None) -> None:
        """Sources and evaluation sets."""
        self.feed = Feed(
            self.config,
            self.towers,
            self.plan.image,
            self.world,
            recorded=recorded,
            position=self.position,
            parts=self.parts,
        )
        self._resources.callback(self.feed.close)
        tell(plan_line(self.plan, self.towers, self.config.train.global_batch // self.world.size))
        tokenize, chunks = self.feed.pipeline.tokenize, self.plan.chunks
        self.evaluations = EvalSuite(self.config, self.towers, chunks, tokenize, self.world, self.parts, self._told)

    def _begin(self) -> None:
        """Only now does the run's folder change: a run that is refused leaves it as it was."""
        why, anew = self._start.why, self._start.kind == "rewind"
        self.log.begin(self.steps_done, self.last_step, why=why, anew=anew, config=self.config)
        self.skips.begin(self._saved_position)
        if self.world.is_main:
            self._folder.keep()
            unmark(self.config.run.dir)
            keep_rollbacks(self.config.run.dir, self.steps_done)
            begin_start(self._start, self.config.run.dir, step=self.steps_done, resume=self.config.resume)
            write_file(Path(self.config.run.dir, "config.yaml"), dump_config(self.config))
