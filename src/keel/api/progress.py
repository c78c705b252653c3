# pyright: strict
"""Progress of a run as plain text: one line that is drawn again on a terminal and in a notebook, else a line
at every tenth of a stage. It needs no library."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from keel.api.terminal import show

Progress = Callable[[str, int, int, Mapping[str, float]], None]  # stage, step, steps, metrics

SHOWN = ("loss", "accuracy", "objective/scores", "objective/kl", "eval_loss", "eval_accuracy")


def shown(metrics: Mapping[str, float]) -> str:
    """The few metrics that fit behind a bar.

    >>> shown({"loss": 0.6125, "objective/kl": 2.0, "grad_norm": 0.1})
    'loss 0.613  kl 2'
    """
    return "  ".join(
        f"{name.removeprefix('objective/')} {metrics[name]:.3g}" for name in SHOWN if name in metrics
    )


def _clock(left: float | None) -> str:
    """The time of day, and how many seconds a stage will still take, where something is left and known."""
    now = time.strftime("%H:%M:%S")
    if not left:
        return now
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{now}, {f'{hours}:{minutes:02}' if hours else minutes}:{seconds:02} left"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class TextProgress:
    """Writes progress to a stream; `stream` None means standard error, in a notebook its output cell."""

    def __init__(self, stream: TextIO | None = None, *, redraw: bool | None = None) -> None:
        """redraw: whether one line is drawn again and again; None asks the stream."""
        notebook = in_notebook()
        self.stream = stream or (sys.stdout if notebook else sys.stderr)
        self.redraw = (notebook or self.stream.isatty()) if redraw is None else redraw
        self._width = 0  # of the line that the cursor stands on; 0: on a new one
        self._begun: dict[str, tuple[float, int]] = {}  # when a stage was first heard of, and at which step

    def say(self, line: str) -> None:
        """A line that stays."""
        self.close()
        show(line, self.stream)

    def __call__(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Step `step` of `steps` of a stage is done."""
        since, first = self._begun.setdefault(stage, (time.monotonic(), step))
        line = f"{stage} {step}/{steps}  {shown(metrics)}".rstrip()
        if not self.redraw:
            if step == steps or step % max(1, steps // 10) == 0:
                left = None if step == first else (time.monotonic() - since) / (step - first) * (steps - step)
                print(f"{line}  [{_clock(left)}]", file=self.stream, flush=True)
            return
        print("\r" + line.ljust(self._width), end="", file=self.stream, flush=True)
        self._width = len(line)
        if step == steps:
            self.close()

    def close(self) -> None:
        """End the line that is being drawn, if there is one."""
        if self._width:
            print(file=self.stream, flush=True)
            self._width = 0
