"""Whether a push has arrived: by the log-probabilities that the server gives a short text, beside those of
the trainer under the new weights and under older ones.

Near to the new ones is not enough. One update at a learning rate of 1e-6 moves a token's log-probability by
some 2e-4 nats, so a server that answers every step of a push and loads nothing is near, too. So it must also
be nearer to the new weights than to older ones, wherever the two lie so far apart that rounding cannot be the
reason. Where they do not yet, the older ones stay what the next push is compared with: a server that stays
behind is found once the weights have moved visibly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

APART = {torch.float32: 0.05, torch.float64: 0.05}  # nats a token that the server may differ
APART_HALF = 0.5  # in 16 bit
LEAST = {torch.float32: 1e-5, torch.float64: 1e-5}  # nats a token that are rounding, whatever was seen
LEAST_HALF = 0.01  # in 16 bit
TELLING = (
    4.0  # times the rounding that weights must be apart; a false alarm takes twice the rounding ever seen
)


class PushCheck:
    """What a server was given so far, by the log-probabilities of a text. `gap`: |log π of the trainer − of
    the server| a token, of the last push."""

    def __init__(self) -> None:
        self.gap = 0.0
        self._older: list[Tensor] = []  # (N − 1,) of the first weights, and of the last that were told apart
        self._rounding = 0.0  # the largest gap of a push that was told apart

    def fault(self, new: Tensor, server: Tensor, widths: Iterable[torch.dtype]) -> str | None:
        """What is wrong with a push; None where it has arrived as far as can be told.

        new: (N − 1,) log-probabilities of the text's tokens by the trainer. server: (N − 1,) by the server.
        widths: what the two compute in.
        """
        widths = set(widths)
        most = max(APART.get(width, APART_HALF) for width in widths)
        least = max(LEAST.get(width, LEAST_HALF) for width in widths)
        self.gap = _apart(new, server)
        if not self.gap <= most:
            return (
                f"its log-probabilities of a text differ by {self.gap:.3g} nats a token (at most {most} is "
                "rounding)"
            )
        visible = TELLING * max(self._rounding, least)
        moved = [_apart(new, older) > visible for older in self._older]
        for older, told_apart in zip(self._older, moved, strict=True):
            if told_apart and self.gap >= (behind := _apart(older, server)):
                return (
                    f"it answers a push and keeps older weights: its log-probabilities of a text differ by "
                    f"{behind:.3g} nats a token from those of weights that were pushed before, and by "
                    f"{self.gap:.3g} from those of the new ones"
                )
        if not moved or moved[-1]:
            self._rounding = max(self._rounding, self.gap)
            self._older = [*self._older[:1], new]
        return None


def _apart(one: Tensor, other: Tensor) -> float:
    """Nats a token."""
    return (one - other).abs().mean().item()
