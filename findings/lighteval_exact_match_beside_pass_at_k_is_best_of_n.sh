#!/usr/bin/env bash
# A task of lighteval asks for as many replies to a question as the metric that wants most, and hands all of them to each
# metric. exact_match, a metric of one reply, takes the best of those. So a model that answers one time in eight has
# an exact match of 0.125 by itself, and of 1.0 as soon as pass@k of n = 8 stands beside it, under the same name; pass@1 of the
# same replies is 0.125. Beside it avg@n reads replies as they came, with their reasoning and spaces, and pass@k what is left
# without: replies that are all right have pass@1 of 1 and avg@n of 0.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lighteval==0.13.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from lighteval.metrics import apply_metric
from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTask, LightevalTaskConfig
from lighteval.tasks.requests import Doc

assert version("lighteval") == "0.13.0", version("lighteval")
docs = [Doc(query=f"{n} + 1 =", choices=[str(n + 1)], gold_index=0) for n in range(8)]


def scores(metrics: list, right: int = 1, before: str = "") -> dict[str, float]:
    """Means over eight questions, of a model of whose first eight replies to a question so many are right."""
    config = LightevalTaskConfig("sums", lambda line, name: None, "", "", metrics, evaluation_splits=["test"])
    task = LightevalTask(config)
    asked = max(task.num_samples)  # what the task writes into each question
    responses = []
    for n in range(8):
        said = [str(n + 1) if (k - n) % 8 < right else "99" for k in range(asked)]
        # What the pipeline does with reasoning: the text stays, and what is left without it is beside it.
        responses.append(ModelResponse(text=[before + text for text in said], text_post_processed=said))
    rows = apply_metric(responses, docs, list(task.metrics))
    return {name: round(float(sum(row[name] for row in rows) / len(rows)), 4) for name in rows[0]}


alone = scores([Metrics.exact_match])
beside = scores([Metrics.exact_match, Metrics.pass_at_k(sample_params={"k": 1, "n": 8})])
print("exact match alone:", alone)
print("and beside pass@1:", beside)
assert alone == {"em": 0.125}
assert beside == {"em": 1.0, "pass@k:k=1&n=8": 0.125}
means = [Metrics.avg_at_n(sample_params={"n": 8}), Metrics.pass_at_k(sample_params={"k": 1, "n": 8})]
print("bare replies, all right:", scores(means, 8))
print("with reasoning before:  ", scores(means, 8, "<think>It is 7.</think>"))
assert scores(means, 8) == {"avg@n:n=8": 1.0, "pass@k:k=1&n=8": 1.0}
assert scores(means, 8, "<think>It is 7.</think>") == {"avg@n:n=8": 0.0, "pass@k:k=1&n=8": 1.0}
PYTHON
