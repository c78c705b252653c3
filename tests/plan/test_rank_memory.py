"""A stage on several ranks: memory by strategy, cards, bytes that are sent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keel.cli.main import app
from keel.config import Training, parse
from keel.errors import UsageError
from keel.plan import model_memory, model_shapes, rank_memory, stage_memory
from keel.plan.model_memory import Lora
from keel.plan.rank_memory import Asked
from keel.plan.stage_memory import Lengths, ModelRef, StageModels

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"
LENGTHS = Lengths(1024, 1024)
COMMON = {"data": "d", "batch_size": 64, "micro_batch": 1, "gradient_checkpointing": True}


def stage(kind: str, model: str | dict[str, str] = "meta-llama/Llama-3.1-8B", **more: Any) -> Training:
    on_policy = {"reward": "r", "mini_batch": 32, "sampling": {"max_new_tokens": 1024}}
    settings = {
        "kind": kind,
        "model": model,
        **COMMON,
        **(on_policy if kind in ("ppo", "grpo") else {}),
        **more,
    }
    found = parse({"name": "x", "stages": {kind: settings}}).stages[kind]
    assert isinstance(found, Training)
    return found


def refs(model: str = "meta-llama/Llama-3.1-8B", *, rewards: bool = False) -> StageModels:
    ref = ModelRef(model_shapes.KNOWN[model])
    return StageModels(ref, None, {"reward": ref} if rewards else {})


def phases(settings: Training, ranks: int, strategy: rank_memory.Strategy) -> dict[str, Any]:
    rewards = settings.kind in ("ppo", "grpo")
    found = rank_memory.phases(settings, refs(rewards=rewards), LENGTHS, ranks, strategy)
    return {phase.name: phase.parts for phase in found}


def test_weights_gradients_and_optimiser_are_whole_by_ddp_and_cut_by_fsdp() -> None:
    count = model_shapes.KNOWN["meta-llama/Llama-3.1-8B"].parameters()
    sft = stage("sft")
    whole = phases(sft, 8, "ddp")
    assert whole["train"]["model"]["weights"] == 4 * count
    assert whole["train"]["model"]["optimizer"] == 8 * count
    # the embedding is larger than a bucket, and is one by itself
    assert whole["sum of gradients"]["model"]["bucket"] == 4 * 128256 * 4096
    cut = phases(sft, 8, "fsdp")
    assert cut["train"]["model"]["weights"] == 4 * count / 8
    assert cut["train"]["model"]["optimizer"] == 8 * count / 8
    for one in (sft, stage("sft", lora={}), stage("dpo"), stage("dpo", lora={}), stage("grpo", lora={})):
        assert "open" not in phases(one, 8, "fsdp")  # the first rank opens it, in host memory
    assert phases(stage("dpo"), 8, "fsdp")["reference"]["policy"]["weights"] == 4 * count / 8
    packed = stage("sft", packing=True, max_length=2048)
    assert phases(packed, 8, "fsdp")["open"]["model"]["weights"] == 4 * count  # packed rows are tried on it
    layer = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336) + 2 * 4096
    embeddings_and_head = 2 * 128256 * 4096 + 4096
    norms, head = 2 * 4096, 128256 * 4096
    assert cut["train"]["model"]["gathered"] == 4 * (embeddings_and_head - head + 2 * norms) + 2 * (
        head + 2 * (layer - norms)
    )  # what is multiplied comes in bfloat16, and needs no cast
    assert "casts" not in cut["train"]["model"]
    assert cut["end of backward"]["model"]["gradients"] == 4 * count / 8 + 8 * embeddings_and_head - 2 * head
    in_float32 = phases(
        stage("sft", model={"path": "meta-llama/Llama-3.1-8B", "dtype": "float32"}), 8, "fsdp"
    )
    assert in_float32["train"]["model"]["gathered"] == 4 * (embeddings_and_head + 2 * layer)
    more = phases(sft, 64, "fsdp")["train"]["model"]
    assert sum(more.values()) < sum(cut["train"]["model"].values())


def test_roles_on_one_base_keep_their_parts_of_it_once() -> None:
    count = model_shapes.KNOWN["meta-llama/Llama-3.1-8B"].parameters()
    settings = stage("ppo", sharing="adapters")
    found = phases(settings, 8, "fsdp")
    held = sum(kinds["weights"] for role, kinds in found["train"].items() if role != "reward")
    assert 4 * count / 8 < held < 4 * count / 8 * 1.1
    assert found["train"]["reward"]["weights"] > 3.5 * count  # which has weights of its own, and is whole
    assert found["rollout"]["policy"]["gathered"] > 2 * count
    by_itself = StageModels(refs().model, None, {"reward": replace(refs().model, adapter=Lora(16))})
    on_base = {p.name: p.parts for p in rank_memory.phases(settings, by_itself, LENGTHS, 8, "fsdp")}
    assert on_base["train"]["reward"]["weights"] < 4 * count / 100
    assert on_base["score"]["policy"]["gathered"] > 2 * count > found["score"]["policy"]["gathered"]
    # policy and critic gather the same base, each for itself
    sent = rank_memory.bytes_of_step(settings, refs(), LENGTHS, 8, "fsdp")
    alone = rank_memory.bytes_of_step(stage("grpo", lora={}), refs(), LENGTHS, 8, "fsdp")
    assert sent["weights"] > 1.9 * alone["weights"]


def test_what_lies_in_host_memory_takes_none_of_the_card() -> None:
    """One unit at a time, with its gradient, is there; reward models, and what is not cut yet, stay."""
    count = model_shapes.KNOWN["meta-llama/Llama-3.1-8B"].parameters()
    sft = rank_memory.on_ranks(stage("sft"), refs(), LENGTHS, Asked(8, offload=True))
    assert sft["ddp"].host == 0
    assert sft["fsdp"].host == 16 * count / 8  # weights and gradient in float32, two moments
    own = rank_memory.phases(stage("sft"), refs(), LENGTHS, 8, "fsdp", True)
    cut = rank_memory.phases(stage("sft"), refs(), LENGTHS, 8, "fsdp")
    for here, before in zip(own, cut, strict=True):
        kinds, all_kinds = here.parts["model"], before.parts["model"]
        assert not kinds.keys() & {"weights", "optimizer"}
        assert kinds["gathered"] == all_kinds["gathered"]
        assert kinds["gradients"] == pytest.approx(all_kinds["gradients"] - 4 * count / 8)
    ppo = stage("ppo")
    found = rank_memory.phases(ppo, refs(rewards=True), LENGTHS, 8, "fsdp", True)
    assert all(p.parts["reward"]["weights"] > 3.5 * count for p in found)
    assert all("weights" not in p.parts[role] for p in found for role in ("policy", "reference", "critic"))
    packed = stage("sft", packing=True, max_length=2048)
    opened = rank_memory.phases(packed, refs(), LENGTHS, 8, "fsdp", True)[0]
    assert opened.parts["model"]["weights"] >= 4 * count
    found = rank_memory.as_dict(sft, Asked(8, offload=True))
    assert f"and {16 * count / 8 / 1e9:.3g} GB in host memory" in "\n".join(rank_memory.as_lines(found))


def test_responses_that_several_updates_sample_are_planned_all_together_and_shared_by_ranks() -> None:
    settings = {"batch_size": 8, "mini_batch": 8, "importance_cap": 2.0}
    whole = stage("grpo", **settings)
    partial = stage("grpo", **settings, rollout={"partial": 256})
    by_ranks = rank_memory.on_ranks(partial, refs(rewards=True), LENGTHS, Asked(2))
    assert all(one.runs for one in by_ranks.values())
    few = stage("grpo", **settings, rollout={"partial": 256}, updates=2)
    held = [
        next(
            p.total
            for p in stage_memory.phases(one, refs(rewards=True), LENGTHS, "cuda") or []
            if p.name == "rollout"
        )
        for one in (whole, partial, few)
    ]
    cache = model_memory.kv_cache(stage_memory.learners(whole, refs(), "cuda")["policy"], 8, LENGTHS.total)
    assert held[1] - held[0] > 3 * cache  # four updates' responses are on their way at a time
    assert held[1] - held[2] > 2 * cache  # of two updates no more than both


def test_the_rows_of_a_step_are_shared_whole_prompts_in_rl() -> None:
    sft = rank_memory.share(stage("sft"), 8)
    assert sft.batch_size == 8
    grpo = rank_memory.share(stage("grpo", samples_per_prompt=8), 3)
    assert (grpo.batch_size, grpo.mini_batch) == (24, 11)  # 8 prompts, of which one rank has 3
    many = {"batch_size": 64, "micro_batch": None, "gradient_checkpointing": False}
    one, eight = (phases(stage("sft", **many), ranks, "ddp")["train"]["model"] for ranks in (1, 8))
    assert eight["activations"] < one["activations"] / 7


def test_bytes_are_those_of_rings() -> None:
    count = model_shapes.KNOWN["meta-llama/Llama-3.1-8B"].parameters()
    ddp = rank_memory.bytes_of_step(stage("sft"), refs(), LENGTHS, 8, "ddp")
    assert ddp == {"gradients": 2 * 7 / 8 * 4 * count}
    # eight rows a rank, one at a time: weights come twice for each, gradients go once
    fsdp = rank_memory.bytes_of_step(stage("sft"), refs(), LENGTHS, 8, "fsdp")
    matrices = count - 128256 * 4096 - (2 * 32 + 1) * 4096
    way = 8 * 7 / 8
    assert fsdp == {"weights": 2 * way * (4 * count - 2 * matrices), "gradients": way * 4 * count}
    asked = Asked(8, mixed_precision=False)
    whole = rank_memory.on_ranks(stage("sft"), refs(), LENGTHS, asked)["fsdp"]
    assert whole.sent["weights"] == 2 * way * 4 * count
    larger = rank_memory.bytes_of_step(stage("sft", micro_batch=8), refs(), LENGTHS, 8, "fsdp")
    assert sum(larger.values()) == sum(fsdp.values()) / 8
    lora = rank_memory.bytes_of_step(stage("sft", lora={"r": 8}), refs(), LENGTHS, 8, "ddp")
    assert 0 < lora["gradients"] < ddp["gradients"] / 100


def test_rl_gathers_to_sample_and_to_score() -> None:
    """The policy once; policy, reference and critic for each part of the samples."""
    ppo = stage("ppo", model={"path": "meta-llama/Llama-3.1-8B", "dtype": "float32"})
    policy, critic = rank_memory.stage_memory.learners(ppo, refs(), "cuda").values()
    sizes = [model_memory.weights(model) for model in (policy, critic)]
    sent = rank_memory.bytes_of_step(ppo, refs(), LENGTHS, 8, "fsdp")
    planned = ppo.planned_steps(64)
    steps = planned["gradient_steps"] // planned["steps"]
    assert sent["sampling"] == pytest.approx(7 / 8 * sizes[0] / steps)
    assert sent["scoring"] == pytest.approx(8 * 7 / 8 * (2 * sizes[0] + sizes[1]) / steps)
    served = rank_memory.bytes_of_step(stage("ppo", rollout={"engine": "vllm"}), refs(), LENGTHS, 8, "fsdp")
    assert served["sampling"] == 0


def test_70b_with_adapters_fits_eight_cards() -> None:
    """No card has it whole; the first rank does, in host memory."""
    model, count = "meta-llama/Llama-3.1-70B", model_shapes.KNOWN["meta-llama/Llama-3.1-70B"].parameters()
    for kind in ("sft", "dpo"):
        settings = stage(kind, model={"path": model, "dtype": "bfloat16"}, lora={})
        found = rank_memory.on_ranks(settings, refs(model), LENGTHS, Asked(8))["fsdp"]
        assert found.fits
        assert found.peak < 70e9
        assert 2 * count <= found.opened < 2.1 * count
        lines = "\n".join(rank_memory.as_lines(rank_memory.as_dict({"fsdp": found}, Asked(8))))
        assert f"the first rank: {found.opened / 1e9:.3g} GB in host memory" in lines


def test_a_server_samples_for_several_ranks_in_memory_of_its_own() -> None:
    """No rank has the policy whole for it, ahead of training neither."""
    own, served = stage("grpo"), stage("grpo", rollout={"engine": "vllm"})
    found = rank_memory.on_ranks(served, refs(rewards=True), LENGTHS, Asked(2))
    assert [one.runs for one in found.values()] == [True, True]
    assert phases(own, 8, "fsdp")["rollout"]["policy"]["gathered"] > 0
    assert phases(served, 8, "fsdp")["rollout"]["policy"]["gathered"] == 0
    ahead = stage("grpo", rollout={"engine": "vllm", "ahead": 1}, importance_cap=2.0)
    by_ranks = rank_memory.on_ranks(ahead, refs(rewards=True), LENGTHS, Asked(2))
    assert all(one.runs for one in by_ranks.values())
    assert phases(ahead, 8, "fsdp")["rollout"]["policy"]["gathered"] == 0


def test_a_card_is_a_number_of_gb() -> None:
    assert [rank_memory.card_of(text) for text in ("80GB", "80", " 141 gb")] == [80, 80, 141]
    for wrong in ("80GiB", "0", "-1GB", "h100"):
        with pytest.raises(UsageError, match="write the size of a card in GB"):
            rank_memory.card_of(wrong)


def test_the_command_says_it_of_each_stage(data: Any, tiny_model: Path, tmp_path: Path) -> None:
    stages = {
        "sft": {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations)},
        "pairs": {
            "kind": "collect", "model": "sft", "data": str(data.prompts), "pairs": 2, "annotators": "people",
            "sampling": {"max_new_tokens": 6},
        },
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"name": "x", "device": "cpu", "stages": stages}))
    command = [
        "plan",
        str(path),
        "--runs",
        str(tmp_path),
        "--nproc",
        "4",
        "--card",
        "24GB",
        "--bandwidth",
        "10",
        "--tflops",
        "1",
        "--reading",
        "10",
    ]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert re.search(r"4 × 24 GB, ddp: \S+ GB a rank at its peak, .*; fits; a rank sends .*: \S+ s\n", shown)
    assert re.search(r"4 × 24 GB, fsdp: at least \S+ s: train \S+, optimizer \S+, sending \S+\n", shown)
    assert "4 × 24 GB, fsdp: not for this stage" in shown  # of collect
    facts = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    of_sft = facts["stages"][0]["ranks"]
    assert (of_sft["nproc"], of_sft["card_gb"]) == (4, 24)
    one = of_sft["strategies"]["fsdp"]
    assert one["runs"]
    assert one["peak"] == max(one["phases"].values())
    assert one["seconds_a_step"] == pytest.approx(one["sent_a_step"] / 1e10, rel=1e-3)
    for options in (["--card", "24GB"], ["--bandwidth", "3"]):
        outcome = CliRunner().invoke(app, ["plan", str(path), *options])
        assert "no effect without --nproc" in str(outcome.exception)


@pytest.mark.slow
def test_what_fits_on_eight_cards_is_what_the_page_says() -> None:
    table = re.findall(
        r"^\| (8|70) B \| `(\w+)` \| `(ddp|fsdp)` \| (.+?) \| (.+?) \| (.+?) \|$", DOCS.read_text(), re.M
    )
    assert len(table) == 12
    for size, kind, strategy, peak, fits, sent in table:
        model = f"meta-llama/Llama-3.1-{size}B"
        settings = stage(kind, model)
        found = rank_memory.on_ranks(settings, refs(model, rewards=kind == "ppo"), LENGTHS, Asked(8))[
            strategy
        ]
        assert peak == f"{found.peak / 1e9:,.0f} GB", (size, kind, strategy)
        if found.fits:
            assert fits == "yes"
        elif found.settings is None:
            assert fits == "no"
        else:
            told = rank_memory.card_fit.settings_text(found.settings)
            assert fits == f"with `{told}`", (size, kind, strategy)
        assert sent == f"{sum(found.sent.values()) / 1e9:,.0f} GB", (size, kind, strategy)
