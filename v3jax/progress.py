"""The console's view of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

_LINE_SECONDS = 10.0


class Progress:
    """Steps done, loss, tokens a second and the time left; only the clock unless `shown`."""

    def __init__(self, name: str, start: int, total: int, *, shown: bool = True) -> None:
        self._start, self._total, self._shown = start, total, shown
        self._began = self._last = time.monotonic()
        self._printed = 0.0
        self._bar = None
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description} {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(name, total=total, completed=start, figures="")
            self._bar.start()

    def lap(self) -> float:
        """Seconds since the last call, at least a microsecond."""
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-6), now
        return seconds

    def show(self, row: dict[str, Any]) -> None:
        """Shows a step's row; plain lines come at most every ten seconds, and at the ends."""
        if not self._shown:
            return
        done = row["step"] + 1
        figures = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
            return
        now = time.monotonic()
        if now - self._printed < _LINE_SECONDS and done != self._total:
            return
        self._printed = now
        left = (now - self._began) / (done - self._start) * (self._total - done)
        print(f"step {done}/{self._total}  {figures}  {left:,.0f} s left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
