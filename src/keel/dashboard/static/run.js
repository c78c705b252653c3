// One run: its pipeline, the curves of a stage, what diagnosis says, times, replies, judgement.
/* global drawArrows, coloured, Plotly */
import { Chart, curve, line, middle } from "./chart.js";
import { Feed } from "./feed.js";
import { ask, by, duration, el, large, memory, number, show } from "./format.js";
import { Replies } from "./replies.js";
import { Curves } from "./series.js";

const name = by("main").dataset.run;
const stages = new Map(); // name → what the server says of it
const kept = new Map(); // stage → step or model → how many replies of it were kept
let run = {};
let shown = null; // the stage whose curves are here
let following = true; // whether the stage at work is shown, since nobody chose one
let zoom = null; // {low, high, metrics, times}
const curves = { metrics: new Curves(), times: new Curves() };
const charts = new Map(); // metric → Chart
const replies = new Replies(name);

// ------------------------------------------------------------ what comes

const feed = new Feed("/events/run", {
  state: (state) => {
    if (state.run) run = state.run;
    for (const stage of state.stages) stages.set(stage.name, stage);
    if (state.order) for (const gone of [...stages.keys()]) if (!state.order.names.includes(gone)) stages.delete(gone);
    if (following && run.shown) choose(run.shown, false);
    head();
    pipeline();
    if (shown) stageParts();
    replies.update(withReplies());
    judgement();
  },
  replies: ({ stage, reset, groups }) => {
    const known = reset ? new Map() : (kept.get(stage) ?? new Map());
    for (const [name, count] of groups) known.set(name, count);
    kept.set(stage, known);
    replies.update(withReplies());
  },
  points: ({ stage, file, ...news }) => {
    if (stage !== shown) return;
    const full = curves[file].take(news);
    if (file === "metrics") gallery();
    else times();
    for (const chart of charts.values()) if (chart.file === file) chart.touch();
    document.documentElement.dataset.ready = stage;
    if (full) feed.start(feed.parameters);
  },
});

const withReplies = () => [...stages.values()].map(({ name }) => ({ name, samples: [...(kept.get(name) ?? [])] }));

function choose(stage, byHand = true) {
  if (stage === shown) return;
  shown = stage;
  first = null;
  zoom = null;
  curves.metrics.clear();
  curves.times.clear();
  for (const chart of charts.values()) chart.element.remove();
  charts.clear();
  if (byHand) {
    following = false;
    feed.parameters = [["run", name], ["stage", stage]];
    history.replaceState(null, "", `?${new URLSearchParams(feed.parameters)}${location.hash}`);
    feed.start(feed.parameters);
    pipeline();
    stageParts();
  }
}

// ------------------------------------------------------------ head and pipeline

function head() {
  by("title").textContent = run.title;
  const facts = [run.seed === null ? null : `seed ${run.seed}`, run.created?.replace("T", " ").replace(/[:]\d\d(\+00:00|Z)$/, " UTC"), run.machine, run.format === "keel" ? null : run.format];
  by("imprint").replaceChildren(...facts.filter(Boolean).map((fact) => el("span", {}, fact)));
  by("description").textContent = run.description;
  show(by("description"), run.description !== "");
  const working = [...stages.values()].find((stage) => stage.status === "running");
  const said = el("span", { class: `status ${run.status}` }, run.status);
  by("status").replaceChildren(said, working && run.can_stop ? ` ${course(working)}` : "");
  show(by("stop"), run.can_stop);
}

function course(stage) {
  const parts = [stage.name];
  if (stage.step !== null) parts.push(stage.steps ? `${number(stage.step)} of ${number(stage.steps)}` : `step ${number(stage.step)}`);
  if (stage.left !== null) parts.push(`${duration(stage.left)} left`);
  return parts.join(" · ");
}

function pipeline() {
  const graph = by("graph");
  const all = [...stages.values()];
  show(by("no-stages"), all.length === 0);
  show(graph, all.length > 0);
  const columns = Math.max(0, ...all.map((stage) => stage.column)) + 1;
  graph.classList.toggle("tall", columns > 6);
  graph.style.setProperty("--columns", columns);
  graph.style.maxWidth = `${columns * 300}px`;
  const list = graph.querySelector("ol");
  const focused = document.activeElement?.closest("[data-stage]")?.dataset.stage;
  list.replaceChildren(...all.map(box));
  if (focused) list.querySelector(`[data-stage="${CSS.escape(focused)}"] button`)?.focus();
  if (all.length) drawArrows(graph);
}

function box(stage) {
  const cost = [stage.seconds === null ? null : duration(stage.seconds), stage.rows === null ? null : `${number(stage.rows)} rows`, stage.parameters === null ? null : `${large(stage.parameters)} parameters`];
  const going = stage.status === "running" || stage.status === "interrupted";
  const item = el("li", { class: `stage ${stage.status.replaceAll(" ", "-")}${stage.name === shown ? " shown" : ""}`, "data-stage": stage.name, "data-inputs": JSON.stringify(stage.inputs.filter((input) => stages.has(input))), "data-column": stage.column },
    el("p", { class: "kind" }, stage.kind),
    el("h3", {}, el("button", { type: "button", "aria-pressed": String(stage.name === shown), title: "show its curves" }, stage.name)),
    stage.result ? el("p", { class: "result" }, stage.result) : null,
    el("p", { class: "cost" }, ...cost.filter(Boolean).map((text) => el("span", {}, text)), stage.status === "done" ? null : el("span", { class: "status-word" }, stage.status)),
    going && stage.step !== null ? el("p", { class: "cost" }, course(stage).replace(`${stage.name} · `, "")) : null,
    going && stage.steps ? el("progress", { max: stage.steps, value: stage.step ?? 0, "aria-label": course(stage) }) : null,
    stage.inputs.length ? el("p", { class: "from" }, `from ${stage.inputs.join(", ")}`) : null);
  item.style.gridColumn = stage.column + 1;
  item.style.gridRow = stage.row + 1;
  item.addEventListener("click", () => choose(stage.name));
  return item;
}

// ------------------------------------------------------------ curves

let first = null; // the metrics that were there when the stage was opened
const HIDDEN = new Set(["epoch", "episode", "num_tokens"]);

function specs(stage) {
  const names = [...curves.metrics.curves.keys()];
  if (names.length) first ??= new Set(names);
  const known = (stage?.curves ?? []).filter((spec) => names.includes(spec.metric));
  const used = new Set(known.flatMap((spec) => [spec.metric, spec.held_out]));
  const main = [...known];
  if (stage && names.includes("eval/judge") && !used.has("eval/judge")) {
    main.splice(1, 0, { title: "Judge", unit: "held out", metric: "eval/judge", held_out: "", smooth: false });
    used.add("eval/judge");
  }
  const others = names.filter((metric) => !used.has(metric) && (known.length || !HIDDEN.has(metric))).sort((a, b) => a.localeCompare(b)).map((metric) => ({ title: metric, unit: "", metric, held_out: "" }));
  // what nobody knows of is folded away; not so what is new while one looks, and a kind that names no curves
  const unfolded = (spec) => !stage?.known || !first?.has(spec.metric);
  return [[...main, ...others.filter(unfolded)], others.filter((spec) => !unfolded(spec))];
}

function gallery() {
  const stage = stages.get(shown);
  const [main, others] = specs(stage);
  const wanted = by("metric-filter").value.toLowerCase();
  const hit = (spec) => `${spec.title} ${spec.metric}`.toLowerCase().includes(wanted);
  for (const [place, list] of [[by("charts"), main], [by("others"), others]]) {
    for (const spec of list) {
      if (!charts.has(spec.metric)) {
        const chart = new Chart(spec.title, spec.unit, () => made(spec, "metrics"), zoomed);
        chart.file = "metrics";
        chart.element.dataset.metric = spec.metric;
        charts.set(spec.metric, chart);
      }
      const element = charts.get(spec.metric).element;
      if (element.parentNode !== place) place.append(element);
      show(element, hit(spec));
    }
  }
  const some = main.length + others.length > 0;
  show(by("more"), others.length > 0);
  by("more").querySelector("summary").textContent = `All other metrics (${others.filter(hit).length})`;
  if (wanted && others.some(hit)) by("more").open = true;
  show(by("no-curves"), !some);
  show(by("metric-filter").closest("label"), some);
  by("no-curves").textContent = stage?.has_steps === false ? "This stage measures once, at its end: see Judgement and Replies." : "No metrics yet.";
  keys(stage);
}

function keys(stage) {
  const heldOut = (stage?.curves ?? []).some((spec) => curves.metrics.curves.has(spec.held_out));
  const key = (mark, colour, text) => el("span", { class: "key" }, el("i", { class: mark, "--colour": `var(${colour})` }), text);
  const smooth = [...curves.metrics.curves.values()].some((series) => middle(series));
  by("keys").replaceChildren(...(smooth ? [key("thin", "--train-faint", `each ${stage?.x_word ?? "step"}`), key("line", "--train", "mean of its surroundings")] : heldOut ? [key("line", "--train", "training")] : []), ...(heldOut ? [key("dot", "--held-out", "held out")] : []));
}

function made(spec, file) {
  const stage = stages.get(shown) ?? {};
  const source = zoom?.[file] ?? curves[file].curves;
  const series = source.get(spec.metric);
  const heldOut = spec.held_out ? source.get(spec.held_out) : null;
  const findings = numbered(stage).filter((f) => file === "metrics" && (!f.curves.length || f.curves.includes(spec.metric)));
  return { traces: curve(spec, series ?? [[], []], heldOut), xTitle: stage.x_word ?? "step", findings, level: spec.level, levelLabel: spec.level_label, range: zoom ? [zoom.low, zoom.high] : range(), points: series && { x: series[0], y: series[1] } };
}

function range() {
  let [low, high] = [Infinity, -Infinity];
  for (const [x] of curves.metrics.curves.values()) {
    low = Math.min(low, x[0]);
    high = Math.max(high, x.at(-1));
  }
  return low <= high ? [low, high] : undefined;
}

async function zoomed(low, high) {
  if (low === undefined) {
    zoom = null;
  } else {
    const stage = shown;
    const names = (file) => [...charts.values()].filter((chart) => chart.file === file).flatMap((chart) => chart.names ?? []);
    const all = [...curves.metrics.curves.keys()];
    const visible = all.filter((metric) => charts.has(metric) || (stages.get(stage)?.curves ?? []).some((spec) => spec.held_out === metric));
    const asked = { run: name, stage, low, high };
    const [metrics, timesFound] = await Promise.all([
      ask("/api/series", { ...asked, name: visible }),
      ask("/api/series", { ...asked, file: "times", name: [...new Set(names("times"))] }),
    ]);
    if (stage !== shown) return;
    zoom = { low, high, metrics: new Map(Object.entries(metrics.series)), times: new Map(Object.entries(timesFound.series)) };
  }
  show(by("unzoom"), zoom !== null);
  for (const chart of charts.values()) chart.touch();
}

by("unzoom").addEventListener("click", () => zoomed());
by("metric-filter").addEventListener("input", gallery);
by("more").addEventListener("toggle", () => charts.forEach((chart) => chart.touch()));

// ------------------------------------------------------------ findings

const numbered = (stage) => (stage.findings ?? []).map((finding, i) => ({ ...finding, number: i + 1 }));
let listed = "";

function stageParts() {
  const stage = stages.get(shown);
  if (!stage) return;
  by("stage-name").textContent = stage.kind === stage.name ? stage.name : `${stage.name}, ${stage.kind}`;
  by("stage-data").textContent = stage.data;
  show(by("stage-data"), stage.data !== "");
  const broken = stage.broken_lines ? `${number(stage.broken_lines)} lines of its metrics cannot be read and are left out.` : "";
  by("stage-note").textContent = [broken, stage.note].filter(Boolean).join(" ");
  show(by("stage-note"), Boolean(broken || stage.note));
  findings(stage);
  costs(stage);
  gallery();
  times();
}

function findings(stage) {
  const text = JSON.stringify([stage.name, stage.findings]);
  if (text === listed) return;
  listed = text;
  const rows = numbered(stage);
  show(by("no-findings"), rows.length === 0);
  by("no-findings").textContent = stage.findings === null ? "Only stages that learn from their own replies are diagnosed." : "No finding.";
  show(by("finding-table"), rows.length > 0);
  by("finding-table").querySelector("tbody").replaceChildren(...rows.map((f) =>
    el("tr", { id: `finding-${f.number}`, class: f.level, tabindex: "-1" },
      el("td", {}, number(f.step)),
      el("td", {}, el("span", { class: "mark" }, String(f.number)), el("b", {}, `${f.name}`), el("small", {}, { note: "worth knowing", warn: "look at it", act: "it is going wrong", done: "done about it" }[f.level])),
      el("td", {}, el("p", {}, f.evidence), f.cause ? el("p", { class: "quiet" }, `Likely: ${f.cause}.`) : null, f.remedy ? el("p", {}, `Remedy: ${f.remedy}.`) : null))));
  for (const chart of charts.values()) chart.touch();
}

// ------------------------------------------------------------ time

const PHASES = ["--train", "--held-out", "--model-3", "--model-4", "--model-5", "--model-0"];
const RATES = { tokens_per_second: ["Throughput", "useful tokens a second"], useful: ["Useful tokens", "share of those computed"], mfu: ["Model-FLOP utilisation", "share of the machine’s speed"], roofline: ["Roofline", "share of the time that the machine needs at least"] };

function times() {
  const all = [...curves.times.curves.keys()];
  const place = by("time-charts");
  const groups = [["seconds", "Time by phase", "seconds a step", all.filter((metric) => !metric.includes("/"))]];
  for (const [end, [title, unit]] of Object.entries(RATES)) groups.push([end, title, unit, all.filter((metric) => metric.endsWith(`/${end}`))]);
  for (const [key, title, unit, names] of groups) {
    const id = `time ${key}`;
    if (!names.length) continue;
    if (!charts.has(id)) {
      const chart = new Chart(title, unit, () => phases(chart.names, key === "seconds"), zoomed);
      chart.file = "times";
      chart.element.dataset.metric = id;
      charts.set(id, chart);
      chart.element.append(el("p", { class: "keys" }));
      place.append(chart.element);
    }
    const chart = charts.get(id);
    if (chart.names?.join() !== names.join()) {
      chart.names = names;
      chart.element.querySelector(".keys").replaceChildren(...names.map((metric, i) => el("span", { class: "key" }, el("i", { class: "line", "--colour": `var(${PHASES[i % PHASES.length]})` }), metric.split("/")[0])));
    }
  }
  show(by("no-times"), all.length === 0);
}

function phases(names, stacked) {
  const source = zoom?.times ?? curves.times.curves;
  const traces = names.map((metric, i) => {
    const [x, y] = source.get(metric) ?? [[], []];
    const colour = PHASES[i % PHASES.length];
    const extra = stacked && x.length <= 400 ? { stackgroup: "time", line: { color: colour, width: 1 } } : {};
    return line(x, y, colour, 1.5, metric.split("/")[0], extra);
  });
  return { traces, xTitle: stages.get(shown)?.x_word ?? "step", range: zoom ? [zoom.low, zoom.high] : range() };
}

function costs(stage) {
  const parts = [];
  if (stage.seconds !== null) parts.push(`The stage took ${duration(stage.seconds)}.`);
  if (stage.pace !== null) parts.push(`A step takes ${duration(stage.pace)}${stage.left === null ? "" : `; ${duration(stage.left)} are left`}.`);
  if (stage.memory_mib !== null) parts.push(`Its most memory was ${memory(stage.memory_mib)}.`);
  if (run.memory_mib && stage.status === "running") parts.push(`The process holds ${memory(run.memory_mib)} now.`);
  by("costs").textContent = parts.join(" ");
  show(by("costs"), parts.length > 0);
}

// ------------------------------------------------------------ judgement

let judgedAs = "";

async function judgement() {
  const done = JSON.stringify([...stages.values()].filter((stage) => stage.compares || stage.findings).map((stage) => [stage.name, stage.status, stage.compares ? 0 : Math.floor((stage.step ?? 0) / 20)]));
  if (done === judgedAs) return;
  judgedAs = done;
  const { pictures, reward_models: models } = await ask("/api/pictures", { run: name });
  show(by("no-judged"), pictures.length + models.length === 0);
  by("judged-pictures").replaceChildren(...pictures.map(still));
  by("judged-tables").replaceChildren(...models.filter((model) => model.rows.length).map((model) => el("div", { class: "scroll" }, el("p", { class: "lead rm" }, `The reward model on held-out comparisons, by ${model.stage}:`),
    el("table", { class: "last rm-table" }, el("tbody", {}, ...model.rows.map(([label, value, meaning]) => el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, value), el("td", { class: "quiet" }, meaning))))))));
  document.documentElement.dataset.judged = String(pictures.length);
}

function still(picture) {
  const chart = new Chart(picture.title, picture.unit, () => ({ traces: [] }), null);
  chart.draw = () => {
    chart.waiting = null;
    chart.stale = false;
    const { data, layout } = coloured({ data: picture.data, layout: picture.layout }, getComputedStyle(document.documentElement));
    Plotly.react(chart.plot, data, layout, { responsive: true, displayModeBar: false });
    chart.plot.setAttribute("aria-label", picture.title);
  };
  chart.caption.append(el("p", { class: "keys" }, ...picture.keys.map(([label, colour, mark]) => el("span", { class: "key" }, el("i", { class: mark, "--colour": `var(${colour})` }), label))));
  return chart.element;
}

// ------------------------------------------------------------ stopping

by("stop").addEventListener("click", () => by("sure").showModal());
by("sure").addEventListener("close", async () => {
  if (by("sure").returnValue !== "yes") return;
  const answer = await fetch("/api/stop", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Keel-CSRF": document.querySelector("meta[name=csrf]").content },
    body: JSON.stringify({ run: name }),
  });
  const said = await answer.json();
  by("status").append(answer.ok ? " · asked to stop" : ` · ${said.error}`);
});

addEventListener("resize", () => stages.size && drawArrows(by("graph")));
document.documentElement.classList.add("drawn");
const asked = new URLSearchParams(location.search).get("stage");
if (asked) choose(asked);
else feed.start([["run", name]]);
