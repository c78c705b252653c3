"""PPO over seeds and learning rates, and TRL's last PPO beside it:

    python benchmarks/stability.py [CONFIG] [--seeds 0,1,2,3,4] [--jobs N] [key=value …]
    python benchmarks/stability.py [the same] --peer PYTHON --ppo-peer FOLDER

The first runs `keel sweep CONFIG STAGE.lr=…` with a quarter, one, four and eight times the config's own
learning rate, and counts the points that ended with an error (NaN among them), that diverged (KL above ten
times its target), or that left gold below the SFT model's. The second then trains TRL 1.12's PPO from what
each point of the sweep started from: the same base, SFT and reward model, prompts, sampling, batch,
mini-batches, epochs, number of updates and learning rates; the rest is TRL's own (a fixed `kl_coef`, which
gets the config's `kl.coef`; a value model that begins as the reward model; one response a prompt; linear
decay). Its policies are judged by the config's own evaluate stage.

PYTHON is an interpreter that has TRL's requirements; FOLDER holds TRL 1.12 and goes in front of the path
(`make bench` makes both). What is done already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FACTORS = (0.25, 1, 4, 8)
DIVERGED = 10  # times the target
JUDGING = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipe = Path(__file__).parents[1] / "recipes" / "helpdesk.yaml"
    parser.add_argument("config", nargs="?", default=str(recipe))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--stage", default="ppo")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--peer", help="an interpreter with TRL's requirements")
    parser.add_argument("--ppo-peer", help="a folder with TRL 1.12")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.side:
        of_trl(json.loads(settings.side.read_text()))
        return
    if "=" in settings.config:  # no config, but a setting of the default one
        settings.config, settings.overrides = str(recipe), [settings.config, *settings.overrides]
    points = sweep(settings)
    summary("keel", [judge(point, settings.stage, point["target"]) for point in points])
    if settings.peer:
        with ThreadPoolExecutor(settings.jobs) as pool:
            outcomes = list(pool.map(lambda point: peer(point, settings), points))
        summary("TRL 1.12", outcomes)


def summary(side: str, outcomes: list[tuple[str, str, str, str]]) -> None:
    counts = {"sound": 0, "failed": 0, "diverged": 0, "below SFT": 0}
    print(side)
    for name, verdict, kl, gold in outcomes:
        counts[verdict] += 1
        print(f"{name:<28} {verdict:<10} KL {kl:>8} gold {gold}")
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), flush=True)


# ---------------------------------------------------------------- keel's side


def sweep(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """The points of the sweep, each with the KL `target` that it had."""
    from keel.config import read

    stage: Any = read(Path(settings.config), settings.overrides).stages[settings.stage]
    rates = ",".join(f"{factor * stage.lr:g}" for factor in FACTORS)
    command = [
        sys.executable,
        "-m",
        "keel",
        "sweep",
        settings.config,
        *settings.overrides,
        f"{settings.stage}.lr={rates}",
        "--seeds",
        settings.seeds,
        "--jobs",
        str(settings.jobs),
        "--runs",
        str(settings.runs),
        "--name",
        "stability",
        "--json",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    return [{**point, "target": stage.kl.target} for point in json.loads(done.stdout)["points"]]


def judge(point: dict[str, Any], stage: str, target: float | None) -> tuple[str, str, str, str]:
    """(its name, what became of it, its KL, its gold reward → from SFT's)."""
    if point["status"] != "done":
        return point["name"], "failed", "–", str(point["error"])
    results = [json.loads(path.read_text()) for path in Path(str(point["run"])).glob("stages/*/result.json")]
    result = next(result for result in results if stage in result.get("models", {}))
    trained, before = result["models"][stage], result["models"][result["reference"]]
    kl, gold, sft = trained["kl"]["mean"], trained["gold"]["mean"], before["gold"]["mean"]
    far = target is not None and kl > DIVERGED * target
    verdict = "diverged" if far else "below SFT" if gold < sft else "sound"
    return point["name"], verdict, f"{kl:.1f}", f"{sft:.3f} → {gold:.3f}"


# ---------------------------------------------------------------- TRL's side


def peer(point: dict[str, Any], settings: argparse.Namespace) -> tuple[str, str, str, str]:
    """TRL's PPO from what a point of the sweep started from, judged as that point was."""
    from keel.errors import KeelError

    folder = settings.runs / "stability-trl" / point["name"]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "policy" / "config.json").exists():
            train(point, settings, folder)
        run = evaluate(point, settings, folder)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no word"]
        return point["name"], "failed", "–", last[0]
    except (RuntimeError, ValueError, KeelError) as error:  # its policy cannot even be sampled
        return point["name"], "failed", "–", str(error)
    return judge({**point, "status": "done", "run": str(run)}, "trl", point["target"])


def train(point: dict[str, Any], settings: argparse.Namespace, folder: Path) -> None:
    from keel.config import read
    from keel.data import chat
    from keel.models.load import load_tokenizer
    from keel.pipeline.pipeline import Pipeline
    from keel.pipeline.preflight import from_outside

    run = Path(point["run"])
    config = read(run / "config.yaml", [])
    stage: Any = config.stages[settings.stage]
    model, reward = (run / "stages" / name / "model" for name in (stage.model.path, stage.reward[0].model))
    tokenizer = load_tokenizer(str(model))
    ((sources, kinds), *_) = stage.main_data()
    records: Any = Pipeline(config, run).sources.load_data(from_outside(sources), kinds).records
    prompts = [chat.prompt_ids(tokenizer, record.prompt) for record in records]
    job = {
        "model": str(model.resolve()),
        "reward": str(reward.resolve()),
        "out": str((folder / "policy").resolve()),
        "prompts": prompts,
        "lr": stage.lr,
        "seed": config.seed,
        "batch": stage.batch_size,
        "mini_batches": stage.batch_size // (stage.mini_batch or stage.batch_size),
        "epochs": stage.epochs,
        "updates": stage.updates,
        "kl_coef": stage.kl.coef,
        "new": stage.sampling.max_new_tokens,
        "threads": config.threads,
    }
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job))
    environment = {
        **os.environ, "PYTHONPATH": settings.ppo_peer, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [settings.peer, __file__, "--side", str(job_file)]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def evaluate(point: dict[str, Any], settings: argparse.Namespace, folder: Path) -> Path:
    """Run the point's evaluate stage on TRL's policy; its directory."""
    from keel.config import parse, read
    from keel.pipeline.pipeline import Pipeline, resolved

    run = Path(point["run"])
    stages = resolved(read(run / "config.yaml", []))["stages"]
    stage = next(s for s in stages.values() if s["kind"] == "evaluate" and settings.stage in s["models"])
    places = {name: str((run / "stages" / name / "model").resolve()) for name in stages}
    links = folder / "models"
    links.mkdir(exist_ok=True)
    for name, target in (
        ("sft", places[stages[settings.stage]["model"]["path"]]),
        ("trl", str((folder / "policy").resolve())),
    ):
        (links / name).unlink(missing_ok=True)
        (links / name).symlink_to(target)
    judge = {
        "kind": "evaluate", "models": [str(links / "sft"), str(links / "trl")],
        **{key: stage[key] for key in ("gold", "data", "sampling")},
    }  # fmt: skip
    tree = {"name": "judged", "threads": 1, "stages": {"judge": judge}}
    with JUDGING:  # a pipeline sets threads and determinism of the whole process
        Pipeline(parse(tree), folder / "judged", lambda line: None).run()
    result_file = folder / "judged" / "stages" / "judge" / "result.json"
    result = json.loads(result_file.read_text())
    named = {Path(name).name: value for name, value in result["models"].items()}
    shown = folder / "stages" / "judge"
    shown.mkdir(parents=True, exist_ok=True)
    (shown / "result.json").write_text(json.dumps({"reference": "sft", "models": named}))
    return folder


def of_trl(job: dict[str, Any]) -> None:
    """In a process of its own: PPO as TRL 1.12 does it."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(job["threads"] or torch.get_num_threads())
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    data = datasets.Dataset.from_list([{"input_ids": ids} for ids in job["prompts"]])
    arguments: Any = PPOConfig(
        output_dir=job["out"] + "-log",
        learning_rate=job["lr"],
        seed=job["seed"],
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=job["mini_batches"],
        num_ppo_epochs=job["epochs"],
        total_episodes=job["batch"] * job["updates"],
        response_length=job["new"],
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=1.0,
        kl_coef=job["kl_coef"],
        local_rollout_forward_batch_size=64,
        num_sample_generations=0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def lm() -> Any:
        return AutoModelForCausalLM.from_pretrained(job["model"])

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1)

    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=lm(),
        ref_model=lm(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
    )
    trainer.train()
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    policy.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])


if __name__ == "__main__":
    main()
