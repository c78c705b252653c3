"""What must hold of every model type: keel's reading, sampling and saving against transformers' own.

Each check is given a type and says how it holds (a word for the table in docs/models.md), or raises:
UsageError where keel refuses the type by name, AssertionError where a number differs. The truth is always a
model that keel has not touched, reading one row alone, without padding and without a cache.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.accel import decode_step, disabled, own_cache
from keel.data.batches import pad
from keel.errors import UsageError
from keel.models.load import ModelSource, causal_lm, scorer
from keel.models.logprobs import head_inputs, token_logprobs
from keel.models.lora import Adapters, add_adapters, merged
from keel.models.save import save
from keel.rewards import learned
from keel.rollout import engine, reference_engine
from keel.rollout.protocol import GenerationRequest
from keel.stages import language, sft
from keel.types import Sampling

sys.path.insert(0, str(Path(__file__).parent))
import zoo

ROUGH = 2e-4  # nats: rounding of a few float32 layers, and no more
# types whose `generate` is not their own forward: the positions that it hands on begin at 0, where theirs
# begin behind the id of padding; XLM is given a token more; Moshi makes sounds too; BLT's raises
GENERATES_OTHERWISE = (
    "blt", "camembert", "data2vec-text", "moshi", "roberta", "roberta-prelayernorm", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
LENGTHS = (5, 21, 38, 30)  # tokens: shorter and longer than the windows of `zoo`


@dataclass(frozen=True)
class Outcome:
    """What came of a check."""

    state: Literal["holds", "refused", "differs", "crashes"]
    said: str  # how it holds, keel's own line, or what went wrong

    @property
    def sound(self) -> bool:
        return self.state in ("holds", "refused")


def rows_of(lengths: Sequence[int] = LENGTHS, common: int = 0) -> list[list[int]]:
    """Seeded byte tokens; common: tokens that all rows begin with."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(1, 256, (common,), generator=generator).tolist()
    return [start + torch.randint(1, 256, (n,), generator=generator).tolist() for n in lengths]


def saved(kind: str, folder: Path) -> Path:
    """The type's tiny model with its tokenizer, as transformers saves it; made once."""
    place = folder / kind
    if not (place / "tokenizer.json").is_file():
        zoo.build(kind).save_pretrained(place)
        zoo.tokenizer().save_pretrained(place)
    return place


def theirs(place: Path) -> Any:
    """The model as transformers opens it."""
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def ours(place: Path) -> Any:
    """The model as keel's stages open it."""
    return causal_lm(ModelSource(str(place)), 0)


def logp_alone(model: Any, row: Sequence[int]) -> Tensor:
    """(n − 1,) log-probabilities of a row's tokens behind its first, by the model's own forward of it."""
    ids = torch.tensor([list(row)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)


def _same(what: str, found: Tensor, truth: Tensor, rough: float = ROUGH) -> None:
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    gap = float((found - truth).abs().max()) if len(found) else 0.0
    assert gap <= rough * max(1.0, float(truth.abs().max()) / 10), f"{what}: {gap:.2g} off"  # NaN fails too


def _batch(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of all rows' tokens, as the stages read them: one batch, padded on the right."""
    ids, _ = pad(rows, zoo.PAD)
    width = ids.shape[1]
    index = torch.cat([r * width + torch.arange(len(row) - 1) for r, row in enumerate(rows)])
    return token_logprobs(head_inputs(model, ids, index), ids.flatten()[index + 1]).logp


# ---------------------------------------------------------------- the checks


def padded(kind: str, folder: Path) -> str:
    """Rows of several lengths in one batch, the fast paths off and on: each as it is alone."""
    place, rows = saved(kind, folder), rows_of()
    truth = torch.cat([logp_alone(theirs(place), row) for row in rows])
    with disabled():
        _same("padded, accel off", _batch(ours(place), rows).detach(), truth)
    _same("padded", _batch(ours(place), rows).detach(), truth)
    return "yes"


def prefixes(kind: str, folder: Path) -> str:
    """Samples of one prompt in one batch, as the fast paths read them: log-probabilities and the gradients of
    their sum as with the fast paths off, one row at a time."""
    place, rows = saved(kind, folder), rows_of((3, 9, 5, 12), common=24)
    model, plain = ours(place).train(), ours(place).train()  # there is no dropout in `zoo`
    with disabled():
        alone = [_batch(plain, [row]) for row in rows]
        torch.cat(alone).sum().backward()
    read = _batch(model, rows)
    read.sum().backward()
    _same("common start", read.detach(), torch.cat(alone).detach())
    slopes = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        own, other = parameter.grad, slopes[name].grad
        assert (own is None) == (other is None), f"gradient of {name}: on one side only"
        if own is not None and other is not None:
            scale = max(1.0, float(other.abs().max()))
            _same(f"gradient of {name}", own / scale, other / scale, rough=2e-3)
    return "yes"


def packed(kind: str, folder: Path) -> str:
    """Three examples in a row, as `packing: true` has them: the loss and its gradients as of the examples
    alone."""
    place = saved(kind, folder)
    examples = [language.LanguageRow(row, [False] * 2 + [True] * (len(row) - 2)) for row in rows_of()]
    count = sum(row.counted for row in examples)
    model, plain = ours(place).train(), ours(place).train()
    together, _ = language.loss(model, [sft._pack(examples)], zoo.PAD, count)
    together.backward()
    untouched = theirs(place)
    truth = torch.cat([logp_alone(untouched, row.ids)[1:] for row in examples])
    _same("packed loss", together.detach()[None], -truth.sum()[None] / count)
    with disabled():
        for row in examples:
            language.loss(plain, [row], zoo.PAD, count)[0].backward()
    slopes = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        own, other = parameter.grad, slopes[name].grad
        if own is not None and other is not None:
            scale = max(1.0, float(other.abs().max()))
            _same(f"packed: gradient of {name}", own / scale, other / scale, rough=2e-3)
    return "yes"


def sampled(kind: str, folder: Path) -> str:
    """Prompts of several lengths, two of them equal, through fewer slots than prompts: greedy tokens as the
    reference engine and transformers' `generate` have them, sampled ones with the log-probabilities that a
    forward gives."""
    place = saved(kind, folder)
    model, untouched = ours(place), theirs(place)
    prompts = rows_of()
    prompts.append(prompts[1])

    def request(temperature: float) -> GenerationRequest:
        sampling = Sampling(max_new_tokens=8, temperature=temperature)
        return GenerationRequest(prompts, sampling, [zoo.EOS], zoo.PAD, 7)

    greedy = engine.KeelEngine(model, batch_size=3).generate(request(0.0))
    with disabled():
        reference = reference_engine.ReferenceEngine(ours(place)).generate(request(0.0))
    for own, other in zip(greedy, reference, strict=True):
        assert own.ids == other.ids, f"greedy {own.ids}, the reference engine {other.ids}"
    if kind not in GENERATES_OTHERWISE:
        own = _generated(untouched, prompts[1])
        assert greedy[1].ids == own, f"greedy {greedy[1].ids}, transformers' generate {own}"
    drawn = engine.KeelEngine(model, batch_size=3).generate(request(1.0))
    with disabled():
        again = reference_engine.ReferenceEngine(ours(place)).generate(request(1.0))
    for one, other in zip(drawn, again, strict=True):
        assert one.ids == other.ids, f"sampled {one.ids}, the reference engine {other.ids}"
        truth = logp_alone(untouched, [*one.prompt_ids, *one.ids])[-len(one.ids) :]
        _same("log-probabilities of samples", torch.tensor(one.logp), truth)
    return _way_of_sampling(model)


def _generated(model: Any, prompt: Sequence[int]) -> tuple[int, ...]:
    """Greedy tokens by transformers' `generate` with its own cache, one prompt without padding."""
    ids = torch.tensor([list(prompt)])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=zoo.PAD,
        eos_token_id=zoo.EOS,
    )  # fmt: skip
    return tuple(made[0, len(prompt) :].tolist())


def _way_of_sampling(model: Any) -> str:
    """How the engine samples from it."""
    longest = max(LENGTHS) + 8
    if decode_step.keeps_slots(model, longest):
        return "slots"
    together = own_cache.rows_at_once(model, longest)
    return {True: "own cache", False: "own cache, one row at a time", None: "whole forwards"}[together]


def adapted(kind: str, folder: Path) -> str:
    """Adapters on all linear layers, a step, merged, saved, opened by transformers alone: the same logits."""
    place, rows = saved(kind, folder), rows_of()
    model = add_adapters(ours(place).train(), Adapters(r=4, alpha=8), 0)
    rate = 1.0  # length of a step
    for _ in range(2):  # B is 0 at first, and A learns nothing in the first step
        loss, _ = language.loss(model, [language.LanguageRow(r, [True] * len(r)) for r in rows], zoo.PAD, 90)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    parameter -= rate * parameter.grad / parameter.grad.norm().clamp(min=1e-6)
        model.zero_grad()
    with torch.no_grad():
        trained = _batch(model.eval(), rows)
        before = torch.cat([logp_alone(theirs(place), row) for row in rows])
    assert float((trained - before).abs().max()) > 1e-2, "the adapters change nothing"
    targets, away = _targets(model), folder / f"{kind}-adapted"
    save(merged(model), zoo.tokenizer(), away, "")
    reloaded = theirs(away)
    _same("merged, reloaded", torch.cat([logp_alone(reloaded, row) for row in rows]), trained)
    return targets


def _targets(model: Any) -> str:
    """Names of the modules that have adapters."""
    names = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return " ".join(sorted(names))


def scored(kind: str, folder: Path) -> str:
    """A reward model made of it: scores of rows in one batch, as transformers' own class, opened from what
    keel saved, has them on each row alone and on rows padded on the right."""
    place, rows = saved(kind, folder), [[*row, zoo.EOS] for row in rows_of()]
    model, away = scorer(ModelSource(str(place)), 0).eval(), folder / f"{kind}-scorer"
    reward = learned.wrap(model, zoo.tokenizer())
    found = learned.score(reward, [{"input_ids": row} for row in rows])
    save(model, reward.tokenizer, away, "")
    other = AutoModelForSequenceClassification.from_pretrained(away, dtype=torch.float32).eval()
    with torch.no_grad():
        alone = torch.cat([other(input_ids=torch.tensor([row])).logits[0] for row in rows])
        ids, lengths = pad(rows, zoo.PAD)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        beside = other(input_ids=ids, attention_mask=mask).logits[:, 0]
    _same("scores", found, alone)
    _same("scores of rows padded on the right", found, beside)
    return "yes"


CHECKS: dict[str, Callable[[str, Path], str]] = {
    "padded": padded,
    "prefixes": prefixes,
    "packed": packed,
    "sampled": sampled,
    "adapted": adapted,
    "scored": scored,
}


def outcome(check: str, kind: str, folder: Path) -> Outcome:
    """A check of a type, whatever happens in it."""
    torch.manual_seed(0)
    try:
        return Outcome("holds", CHECKS[check](kind, folder))
    except UsageError as error:
        lines = str(error).splitlines()
        return (
            Outcome("refused", str(error)) if len(lines) == 1 else Outcome("crashes", f"many lines: {error}")
        )
    except AssertionError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if "architectures" in frame.filename:
            return Outcome("differs", str(error))
        return Outcome("crashes", where(error))
    except Exception as error:
        return Outcome("crashes", where(error))


def where(error: BaseException) -> str:
    """An error in a line, with the last of keel's and the last of all lines that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "/keel/" in frame.filename]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in (*inside[-1:], frames[-1])]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({', '.join(places)})"
