"""How fast the dashboard is: opening many runs, a new metric, idle traffic, a million steps, old replies.

    python benchmarks/dashboard.py [--runs 50] [--points 2000] [--steps 1000000] [--folder DIR]

Chromium (CHROMIUM, default /usr/bin/chromium) opens the pages of a server in a process of its own, on made-up
runs of PPO with the 37 metrics that keel writes (2.6 MB of metrics a run of 2,000 updates). `seconds` is by
the clock, from asking for an address until the page has drawn it; `server_cpu` and `browser_cpu` are the
processor's seconds that either spent on it, which say more where a machine is shared. `cold`: the first page
of a server that has read nothing, in a browser that has not seen the scripts; `warm`: the same page again.
`latency` is from the write of a metric that was never there before until its curve stands on the page;
`idle_bytes` is what the browser received in 30 s without any news, `step_bytes` for one new step.
Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "dashboard"))

import made_runs  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def server(folder: Path) -> Any:
    """Address and process of a dashboard."""
    command = [sys.executable, "-m", "keel", "dashboard", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        process.wait(20)


def cpu(pid: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def browser_cpu() -> float:
    """Seconds of processor that the browser's processes have used, all of those that this one started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
                parents[int(entry.name)] = int(fields.split()[1])
    total = 0.0
    for pid in parents:
        with contextlib.suppress(OSError, IndexError):
            if b"chrom" in (Path("/proc") / str(pid) / "cmdline").read_bytes() and _is_ours(pid, parents):
                total += cpu(pid)
    return total


def _is_ours(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != os.getpid():
        pid = parents[pid]
    return pid == os.getpid()


def resident(pid: int) -> float:
    """MiB that a process holds."""
    return (
        int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        * os.sysconf("SC_PAGE_SIZE")
        / 2**20
    )


def opened(page: Any, pid: int, address: str, ready: str) -> dict[str, float]:
    """Seconds until an element is there."""
    before, drawing, start = cpu(pid), browser_cpu(), time.monotonic()
    page.goto(address)
    page.wait_for_selector(ready)
    seconds = time.monotonic() - start
    return {
        "seconds": round(seconds, 2),
        "server_cpu": round(cpu(pid) - before, 2),
        "browser_cpu": round(browser_cpu() - drawing, 2),
    }


def many(browser: Any, folder: Path, runs: int) -> dict[str, Any]:
    """The list of all runs, and all of them in one picture a quantity."""
    found: dict[str, Any] = {}
    with server(folder) as (address, pid):
        page = browser.new_page()
        drawn = f"html[data-ready='{runs}'] figure[data-metric='reward'][data-drawn]"
        found["compare, cold"] = opened(page, pid, f"{address}compare", drawn)
        found["compare, warm"] = opened(page, pid, f"{address}compare", drawn)
        found["list"] = opened(page, pid, address, f"html[data-ready='{runs}']")
        found["one run"] = opened(
            page, pid, f"{address}run?run=run00", "figure[data-metric='objective/kl'][data-drawn]"
        )
        found["server_mib"] = round(resident(pid))
        page.close()
    return found


def news(browser: Any, folder: Path, tries: int = 10) -> dict[str, Any]:
    """Time until a new metric is seen, and traffic."""
    metrics = folder / "run00" / "stages" / "ppo" / "metrics.jsonl"
    with server(folder) as (address, _):
        page = browser.new_page()
        page.goto(f"{address}run?run=run00")
        page.wait_for_selector("figure[data-metric='objective/kl'][data-drawn]")
        waits = []
        for n in range(tries):
            start = time.monotonic()
            made_runs.append(metrics, [{"step": 10**6 + n, f"new/{n}": 1.0}])
            page.wait_for_selector(f"figure[data-metric='new/{n}']", state="attached")
            waits.append(time.monotonic() - start)
        client, received = page.context.new_cdp_session(page), [0]

        def count(event: dict[str, Any]) -> None:
            received[0] += event["encodedDataLength"] or event["dataLength"]

        client.on("Network.dataReceived", count)
        client.send("Network.enable")
        page.wait_for_timeout(3000)
        received[0] = 0
        page.wait_for_timeout(30_000)
        idle, received[0] = received[0], 0
        made_runs.append(metrics, [made_runs.ppo_row(10**6 + tries, 10**6, random.Random(0))])
        page.wait_for_timeout(3000)
        page.close()
    return {
        "latency_median": round(statistics.median(waits), 2), "latency_worst": round(max(waits), 2),
        "tries": tries, "idle_bytes": idle, "step_bytes": received[0],
    }  # fmt: skip


def million(browser: Any, folder: Path, steps: int) -> dict[str, Any]:
    """A long run with a spike of one point, and a look at it from near."""
    made_runs.keel_run(folder / "long", 10)
    metrics, at = folder / "long" / "stages" / "ppo" / "metrics.jsonl", steps * 3 // 4 + 1
    with metrics.open("w", encoding="utf-8") as handle:
        for n in range(1, steps + 1):
            score = 99.5 if n == at else n % 7 / 7
            handle.write(f'{{"step": {n}, "objective/scores": {score}, "objective/kl": {n % 11 / 3}}}\n')
    chart = "figure[data-metric='objective/scores']"
    with server(folder) as (address, pid):
        page = browser.new_page()
        found: dict[str, Any] = {"megabytes": round(metrics.stat().st_size / 1e6)}
        found["cold"] = opened(page, pid, f"{address}run?run=long", f"{chart}[data-drawn]")
        found["warm"] = opened(page, pid, f"{address}run?run=long", f"{chart}[data-drawn]")
        y = page.locator(chart).evaluate("(figure) => figure.chart.plot.data[0].y")
        found["points"], found["spike_drawn"] = len(y), max(y) == 99.5
        start = time.monotonic()
        page.locator(chart).evaluate(f"(figure) => figure.chart.onZoom({at - 50}, {at + 50})")
        while len(page.locator(chart).evaluate("(figure) => figure.chart.plot.data[0].y")) > 110:
            page.wait_for_timeout(10)
        found["zoom_seconds"] = round(time.monotonic() - start, 2)
        found["server_mib"] = round(resident(pid))
        page.close()
    return found


def replies(browser: Any, folder: Path) -> dict[str, Any]:
    """Replies of the first step, of ten thousand with four each."""
    made_runs.keel_run(folder / "replies", 10)
    samples = folder / "replies" / "stages" / "ppo" / "samples.jsonl"
    samples.write_text("", encoding="utf-8")
    made_runs.append(samples, (made_runs.sample_row(s, n) for s in range(1, 10_001) for n in range(4)))
    with server(folder) as (address, pid):
        page = browser.new_page()
        first = opened(page, pid, f"{address}run?run=replies", "html[data-replies='step 10000 | step 1']")
        start = time.monotonic()
        page.select_option("#reply-of", "step 1")
        page.wait_for_selector("html[data-replies='step 1 | step 1']")
        chosen = round(time.monotonic() - start, 2)
        text = page.locator("#reply-list .reply").first.inner_text()
        page.close()
    return {"opened": first, "step_1_seconds": chosen, "step_1_shown": "Reply 0 of step 1." in text}


def main() -> None:
    """Write the runs, open them, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the runs are written; default: a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = asked.folder or Path(temporary)
        folder = place / "many"
        for number in range(asked.runs):
            if not (folder / f"run{number:02}").exists():
                made_runs.keel_run(folder / f"run{number:02}", asked.points, seed=number, samples=2)
        with sync_playwright() as playwright:
            path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS])
            found: dict[str, Any] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
            found["many runs"] = many(browser, folder, asked.runs)
            found["news"] = news(browser, folder)
            found["a long run"] = million(browser, place / "long", asked.steps)
            found["replies"] = replies(browser, place / "replies")
            browser.close()
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
