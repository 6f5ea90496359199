"""A progress bar that nobody sees who does not wait: it appears after a second, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from loreg.checkpoint import Advance

PATIENCE_S = 1.0


@dataclass
class _Stage:
    label: str
    total: int
    done: int = 0
    task: TaskID | None = None


class ProgressBar:
    """Bytes done, rate and time left of one or more stages, on stderr. ``shown``: whether anybody looks.

    rich is imported when the bar appears: a quick command does not pay for it.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._began = time.monotonic()
        self._stages: list[_Stage] = []
        self._bar: Progress | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, label: str, total: int) -> Advance:
        """The callback of a stage of ``total`` bytes, 0 if that is not known. Any thread may call it."""
        stage = _Stage(label, total)

        def advance(count: int) -> None:
            if self._shown:
                with self._lock:
                    self._advance(stage, count)

        self._stages.append(stage)
        return advance

    def _advance(self, stage: _Stage, count: int) -> None:
        stage.done += count
        if self._bar is None:
            if time.monotonic() - self._began < PATIENCE_S:
                return
            self._bar = _new_bar()
            self._bar.start()
        if stage.task is None:
            stage.task = self._bar.add_task(stage.label, total=stage.total or None)
        self._bar.update(stage.task, completed=stage.done)


def _new_bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
    )
