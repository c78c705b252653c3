"""A test double: an engine that says what it was told to say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from keel.rollout.protocol import GenerationRequest, TokenCount
from keel.types import Completion, StopReason


class ScriptedEngine:
    """Gives each prompt the next of some fixed responses, and starts over after the last one.

    For tests of what is done with samples. No model is read, so log-probabilities are `logp` for each token,
    or unknown where that is None.

    responses: token ids, one or more a response. A response is cut after its first stop token and after
    its limit. `requests`: what was asked so far. ValueError for no responses, or an empty one.
    """

    def __init__(self, responses: Sequence[Sequence[int]], *, logp: float | None = -1.0) -> None:
        if not responses or not all(responses):
            raise ValueError("a script needs responses of one token or more")
        self._script = cycle([tuple(response) for response in responses])
        self._logp = logp
        self.requests: list[GenerationRequest] = []

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        """The next of the responses for each prompt, in order."""
        self.requests.append(request)
        most = request.limits or [request.sampling.max_new_tokens] * len(request.prompts)
        completions = [
            self._complete(tuple(prompt), request, limit)
            for prompt, limit in zip(request.prompts, most, strict=True)
        ]
        if count is not None:
            tokens = sum(len(c.prompt_ids) + len(c.ids) - 1 for c in completions)
            count.useful, count.computed = count.useful + tokens, count.computed + tokens
        return completions

    def _complete(self, prompt: tuple[int, ...], request: GenerationRequest, limit: int) -> Completion:
        ids = next(self._script)[:limit]
        end = next((i for i, token in enumerate(ids) if token in request.stop_ids), None)
        reason: StopReason = "length"
        if end is not None:
            ids = ids[: end + 1]
            reason = "eos" if ids[-1] == request.stop_ids[0] else "stop"
        logp = () if self._logp is None else (self._logp,) * len(ids)
        return Completion(prompt, ids, reason, logp)
