// Several runs in one picture a quantity, as lines or, over seeds, as bands.
import { Chart, line, middle } from "./chart.js";
import { Feed } from "./feed.js";
import { ask, by, el, number, show } from "./format.js";
import { Curves } from "./series.js";

const asked = new URLSearchParams(location.search);
const names = asked.getAll("run");
const DEFAULT = ["reward", "judge", "kl", "entropy", "length", "clip", "loss", "eval_loss"];
let quantities = asked.getAll("q").length ? asked.getAll("q") : DEFAULT;
const runs = new Map(); // run → Curves by quantity
let lines = [];
let groups = {};
let bands = {}; // group → quantity → band
let zoom = null;
const hidden = new Set();
const charts = new Map();
let used = new Set();

by("seeds").value = asked.get("seeds") === "bands" ? "bands" : "lines";

const feed = new Feed("/events/compare", {
  legend: (said) => {
    lines = said.lines;
    groups = said.groups;
    for (const group of Object.keys(bands)) if (!groups[group]) delete bands[group];
    const grouped = new Set(Object.values(groups).flat());
    for (const run of [...runs.keys()]) if (grouped.has(run) || !lines.some((one) => one.run === run)) runs.delete(run);
    used = new Set(lines.flatMap((one) => Object.keys(one.metrics)));
    legend(said.missing);
    gallery();
  },
  points: ({ runs: news }) => {
    let full = false;
    for (const { run, ...curves } of news) {
      if (!runs.has(run)) runs.set(run, new Curves());
      full = runs.get(run).take(curves) || full;
    }
    touched();
    if (full) start();
  },
  band: ({ group, series }) => {
    bands[group] = series;
    touched();
  },
});

function parameters() {
  return [...names.map((name) => ["run", name]), ...quantities.map((q) => ["q", q]), ["seeds", by("seeds").value]];
}

function start() {
  feed.start(parameters());
}

function restart() {
  zoom = null;
  show(by("unzoom"), false);
  runs.clear();
  bands = {};
  history.replaceState(null, "", `?${new URLSearchParams(parameters())}`);
  start();
}

let ready = null;
function touched() {
  for (const chart of charts.values()) chart.touch();
  clearTimeout(ready);
  ready = setTimeout(() => (document.documentElement.dataset.ready = String(runs.size + Object.keys(bands).length)), 0);
}

// ------------------------------------------------------------ colours and legend

function items() {
  const grouped = new Set(Object.values(groups).flat());
  return [...Object.keys(groups).map((group) => ({ group, name: `${group}, ${groups[group].length} runs` })), ...lines.filter((one) => !grouped.has(one.run)).map((one) => ({ run: one.run, name: one.run, stage: one.stage }))];
}

const key = (item) => item.group ?? item.run;

function colour(i) {
  if (i < 5) return `--model-${i + 1}`;
  const light = matchMedia("(prefers-color-scheme: dark)").matches ? 68 : 40;
  return `hsl(${Math.round(i * 137.5) % 360} 55% ${light}%)`;
}

const dash = (i) => ["solid", "dash", "dot", "dashdot"][Math.floor(i / 8) % 4];

function legend(missing) {
  const all = items();
  by("how-many").textContent = `${number(lines.length)} ${lines.length === 1 ? "run" : "runs"}`;
  show(by("empty"), lines.length === 0);
  by("empty").textContent = missing.length ? "None of these runs has any of what is shown." : "There is no such run.";
  show(by("band-note"), Object.keys(groups).length > 0);
  by("legend").replaceChildren(...all.map((item, i) => {
    const button = el("button", { type: "button", "aria-pressed": String(!hidden.has(key(item))), title: "show or hide" }, el("i", { class: `key-line ${dash(i)}`, "--colour": i < 5 ? `var(${colour(i)})` : colour(i) }), item.name, item.stage ? el("small", {}, item.stage) : null);
    button.addEventListener("click", () => {
      hidden[hidden.has(key(item)) ? "delete" : "add"](key(item));
      button.setAttribute("aria-pressed", String(!hidden.has(key(item))));
      touched();
    });
    return el("li", {}, button);
  }));
}

// ------------------------------------------------------------ charts

function gallery() {
  const boxes = [...document.querySelectorAll("#quantities input")];
  for (const box of boxes) box.checked = quantities.includes(box.value);
  for (const [quantity, chart] of charts) {
    if (quantities.includes(quantity) && used.has(quantity)) continue;
    chart.element.remove();
    charts.delete(quantity);
  }
  for (const quantity of quantities.filter((q) => used.has(q))) {
    if (!charts.has(quantity)) {
      const box = boxes.find((one) => one.value === quantity);
      const chart = new Chart(box?.dataset.title ?? quantity, box?.dataset.unit ?? "", () => made(quantity), zoomed);
      chart.element.dataset.metric = quantity;
      chart.element.classList.add("wide");
      chart.last.hidden = true;
      charts.set(quantity, chart);
    }
    by("charts").append(charts.get(quantity).element);
  }
  touched();
}

function made(quantity) {
  const all = items();
  const shown = all.map((item, i) => [item, i]).filter(([item]) => !hidden.has(key(item)));
  const smoothed = lines.length <= 16; // as the server has it
  const traces = shown.flatMap(([item, i]) => {
    const ink = colour(i);
    if (item.group) return area((zoom?.bands ?? bands)[item.group]?.[quantity], ink, item.name);
    const series = zoom ? zoom.lines[item.run]?.[quantity] : runs.get(item.run)?.curves.get(quantity);
    if (!series) return [];
    const smooth = smoothed ? middle(series) : null;
    const raw = line(series[0], series[1], ink, smooth ? 0.75 : 1.25, item.name, { opacity: smooth ? (shown.length > 6 ? 0.25 : 0.45) : 1 });
    if (!smooth) {
      raw.line.dash = series[0].length < 100 ? dash(i) : "solid";
      return [raw];
    }
    const main = line(smooth[0], smooth[1], ink, 2, item.name, { hoverinfo: "skip", hovertemplate: null });
    main.line.dash = dash(i);
    return [raw, main];
  });
  return { traces, xTitle: "step", height: 260, range: zoom ? [zoom.low, zoom.high] : undefined };
}

// Upper and lower end with what lies between them, and the median.
function area(band, ink, name) {
  if (!band) return [];
  const end = (values, extra) => line(band.steps, values, ink, 0, name, { hoverinfo: "skip", hovertemplate: null, opacity: 0.6, ...extra });
  return [end(band.high, { mode: "lines" }), end(band.low, { mode: "lines", fill: "tonexty" }), line(band.steps, band.middle, ink, 2, name)];
}

async function zoomed(low, high) {
  if (low === undefined) zoom = null;
  else {
    const found = await ask("/api/compare", { run: names, q: quantities, seeds: by("seeds").value, low, high });
    zoom = { low, high, ...found };
  }
  show(by("unzoom"), zoom !== null);
  touched();
}

by("unzoom").addEventListener("click", () => zoomed());
by("seeds").addEventListener("change", restart);
by("quantities").addEventListener("change", (event) => {
  const { value, checked } = event.target;
  quantities = checked ? [...quantities, value] : quantities.filter((q) => q !== value);
  restart();
});
by("tools").addEventListener("submit", (event) => {
  event.preventDefault();
  const metric = by("metric").value.trim();
  if (!metric || quantities.includes(metric)) return;
  quantities = [...quantities, metric];
  by("metric").value = "";
  restart();
});
by("metric").addEventListener("focus", async () => {
  if (by("names").children.length) return;
  const found = await ask("/api/names", { run: names });
  by("names").replaceChildren(...found.names.map((name) => el("option", { value: name })));
}, { once: true });

start();
