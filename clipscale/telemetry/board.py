"""A run's curves for TensorBoard, written at once: no thread that could fail unseen.

board = Board("runs/a/tensorboard", first_step=1)
board.describe({"optim.lr": 1e-3}, "optim: {lr: 1e-3}", ["zeroshot/top1"])
board.add({"train/loss": 5.5}, step=1)
"""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar
from torch.utils.tensorboard.summary import text as text_summary

from clipscale.telemetry.growing import GrowingFile


class Board:
    """An events file of its own; earlier files' points from `first_step` on are no longer shown."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = GrowingFile(folder / name)
        self._write(
            Event(file_version="brain.Event:2"),
            Event(step=first_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def describe(self, settings: dict[str, Any], text: str, scores: list[str]) -> None:
        """For the tabs of hyperparameters and of texts.

        Args:
            settings: by key; those that are neither number, truth value nor text are left out.
            text: the config.
            scores: curves that runs are compared by.
        """
        plain = {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
        summaries = *hparams(plain, dict.fromkeys(scores, 0.0)), text_summary("config", f"```\n{text}```")
        self._write(*(Event(summary=summary) for summary in summaries))

    def add(self, scalars: dict[str, float], step: int) -> None:
        """One point of each curve."""
        self._write(*(Event(step=step, summary=scalar(name, value)) for name, value in scalars.items()))

    def close(self) -> None:
        self._file.close()

    def _write(self, *events: Event) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        self._file.add(records.getvalue())
