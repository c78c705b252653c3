// Curves. A chart is drawn when it is seen, and again at most four times a second.
/* global Plotly, coloured */
import { el, number, plain } from "./format.js";

const AGAIN = 250; // ms between two drawings of a chart
const SMOOTH_FROM = 40; // points from which a mean is drawn over the curve
const LEVELS = { note: "--quiet", warn: "--unclear", act: "--worse", done: "--better" };

export const isPhone = () => matchMedia("(max-width: 560px), (pointer: coarse)").matches;

function axis(extra) {
  return {
    gridcolor: "--grid", linecolor: "--rule", tickcolor: "--rule", zerolinecolor: "--rule", zerolinewidth: 1,
    ticks: "outside", ticklen: 3, automargin: true, nticks: 6, exponentformat: "e", ...extra,
  };
}

export function layout(xTitle, height) {
  return {
    height,
    margin: { l: 8, r: 12, t: 14, b: 8 },
    showlegend: false,
    dragmode: isPhone() ? false : "zoom",
    hovermode: "x unified",
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 11, color: "--quiet" },
    hoverlabel: { bgcolor: "--paper", bordercolor: "--rule", font: { color: "--ink", size: 12 } },
    xaxis: axis({ nticks: 4, showgrid: false, title: { text: plain(xTitle), standoff: 4 } }),
    yaxis: axis({ showline: false, ticks: "", fixedrange: true }),
  };
}

// The line through the middle of a curve: of a short one a running mean, of a reduced one the server's means.
export function middle(series) {
  const [x, y, meanX, meanY] = series;
  if (meanX) return [meanX, meanY];
  if (x.length < SMOOTH_FROM) return null;
  const half = Math.max(Math.floor(x.length / 20) | 1, 3) >> 1;
  const out = y.map((_, i) => {
    const near = y.slice(Math.max(0, i - half), i + half + 1).filter((v) => v !== null);
    return near.length ? near.reduce((a, b) => a + b, 0) / near.length : null;
  });
  return [x, out];
}

export function line(x, y, colour, width, name, extra = {}) {
  return {
    type: "scatter", mode: x.length > 1 ? "lines" : "markers", x, y, name: plain(name), connectgaps: false,
    line: { color: colour, width }, marker: { color: colour, size: 7 },
    hovertemplate: `%{y:.4~g}<extra>${plain(name)}</extra>`, ...extra,
  };
}

// One curve and what belongs to it: its middle line, held-out points, a level, findings.
export function curve(spec, series, heldOut) {
  const traces = [];
  if (series) {
    const smooth = spec.smooth === false ? null : middle(series);
    traces.push(line(series[0], series[1], smooth ? "--train-faint" : "--train", smooth ? 1 : 2, heldOut ? "training" : spec.title));
    if (smooth) traces.push(line(smooth[0], smooth[1], "--train", 2, "mean", { hoverinfo: "skip", hovertemplate: null }));
  }
  if (heldOut) {
    const mode = heldOut[0].length <= 30 ? "lines+markers" : "lines";
    traces.push(line(heldOut[0], heldOut[1], "--held-out", 1.5, "held out", { mode, marker: { color: "--held-out", size: 6 } }));
  }
  return traces;
}

export function marks(findings, low, high) {
  const seen = findings.filter((f) => (low === undefined || (f.step >= low && f.step <= high)));
  const near = (a, b) => a && b && Math.abs(a.step - b.step) < 0.04 * (high - low || 1);
  return {
    shapes: seen.map((f) => ({
      type: "line", x0: f.step, x1: f.step, yref: "paper", y0: 0, y1: 1, layer: "below",
      line: { color: LEVELS[f.level] ?? "--quiet", width: 1.5, dash: f.level === "done" ? "solid" : "dot" },
    })),
    annotations: seen.map((f, i) => ({
      x: f.step, y: 1, yref: "paper", yanchor: "bottom", text: String(f.number), showarrow: false, borderpad: 1,
      xanchor: near(seen[i - 1], f) ? "left" : near(f, seen[i + 1]) ? "right" : "center",
      font: { color: LEVELS[f.level] ?? "--quiet", size: 11 }, captureevents: true, name: String(f.number),
      hovertext: plain(`${f.number}. ${f.name}, step ${f.step}: ${f.evidence}${f.remedy ? ` – ${f.remedy}` : ""}`).replace(/(.{60,80}?) /g, "$1<br>"),
    })),
  };
}

export function level(value) {
  return { type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, layer: "below", line: { color: "--ink", width: 1, dash: "dash" } };
}

function spread(values, share) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low) * share || Math.max(Math.abs(high) * share, 0.1);
  return [low - room, high + room];
}

export class Chart {
  // make() → {traces, xTitle, findings?, level?, empty?}; onZoom(low, high) when somebody zooms, onZoom() for all
  constructor(title, unit, make, onZoom) {
    this.make = make;
    this.onZoom = onZoom;
    this.plot = el("div", { class: "plot", tabindex: onZoom ? "0" : null, role: "img", "aria-label": title });
    this.caption = el("figcaption", {}, el("b", {}, title), unit ? el("span", { class: "unit" }, ` ${unit}`) : null);
    this.last = el("span", { class: "value" });
    this.caption.append(" ", this.last);
    this.element = el("figure", { class: "picture" }, this.caption, this.plot);
    this.element.chart = this;
    this.title = title;
    this.stale = true;
    this.seen = false;
    observer.observe(this.element);
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  touch() {
    this.stale = true;
    if (!this.seen || this.waiting) return;
    const wait = Math.max(0, (this.drawn ?? -Infinity) + AGAIN - performance.now());
    this.waiting = setTimeout(() => requestAnimationFrame(() => this.draw()), wait);
  }

  draw() {
    this.waiting = null;
    if (!this.stale || !this.element.isConnected) return;
    this.stale = false;
    const { traces, xTitle, findings = [], level: at, levelLabel = "", range, height = 200, points } = this.make();
    if (!this.drawn && !traces.some((trace) => trace.x.length)) return;  // its points are on their way
    const view = layout(xTitle, height);
    const values = traces.flatMap((trace) => trace.y.filter((v) => v !== null));
    const steps = traces.flatMap((trace) => [trace.x[0], trace.x.at(-1)]).filter((v) => v !== undefined);
    const [low, high] = range ?? (steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1]);
    if (low < high) view.xaxis.range = [low, high];
    if (high - low < 6) view.xaxis.dtick = 1;
    const found = marks(findings, low, high);
    view.shapes = found.shapes;
    view.annotations = found.annotations;
    if (at !== null && at !== undefined) {
      view.shapes.push(level(at));
      view.annotations.push({ x: 0, xref: "paper", xanchor: "left", y: at, yanchor: "bottom", text: plain(`${levelLabel} ${number(at, 3)}`), showarrow: false, font: { color: "--quiet", size: 10 }, borderpad: 1 });
      if (values.length) view.yaxis.range = spread([at, ...extent(values)], 0.08);
    }
    const [bottom, top] = extent(values);
    const largest = Math.max(Math.abs(bottom), Math.abs(top));
    if (values.length && top - bottom <= 1e-6 * largest) view.yaxis.range = spread([top, top], 0.08);  // rounding is no curve
    if (largest >= 1e-3 && largest < 1e6) view.yaxis.exponentformat = "none";
    const style = getComputedStyle(document.documentElement);
    const figure = coloured({ traces, view }, style);
    Plotly.react(this.plot, figure.traces, figure.view, { responsive: true, displayModeBar: false, doubleClick: false });
    this.hear();
    this.drawn = performance.now();
    this.say(points ?? traces[0], points !== undefined);
    this.element.dataset.drawn = String(values.length);
  }

  hear() {
    if (this.heard) return;
    this.heard = true;
    this.plot.on("plotly_relayout", (change) => {
      const low = change["xaxis.range[0]"] ?? change["xaxis.range"]?.[0];
      const high = change["xaxis.range[1]"] ?? change["xaxis.range"]?.[1];
      if (low !== undefined && this.onZoom) this.onZoom(low, high);
    });
    this.plot.on("plotly_doubleclick", () => this.onZoom?.());
    this.plot.on("plotly_clickannotation", ({ annotation }) => {
      const row = annotation.name && document.getElementById(`finding-${annotation.name}`);
      if (!row) return;
      row.scrollIntoView({ block: "center" });
      row.focus({ preventScroll: true });
    });
  }

  // + and − zoom, arrows move, 0 shows everything
  key(event) {
    const range = this.plot.layout?.xaxis?.range;
    if (!this.onZoom || !range || event.ctrlKey || event.metaKey || event.altKey) return;
    const [low, high] = range;
    const [centre, half] = [(low + high) / 2, (high - low) / 2];
    const moves = {
      "+": [centre - half / 2, centre + half / 2], "=": [centre - half / 2, centre + half / 2],
      "-": [centre - half * 2, centre + half * 2],
      ArrowLeft: [low - half / 2, high - half / 2], ArrowRight: [low + half / 2, high + half / 2],
    };
    if (event.key === "0") this.onZoom();
    else if (moves[event.key]) this.onZoom(...moves[event.key]);
    else return;
    event.preventDefault();
  }

  say(trace, alone) {
    const finite = (trace?.y ?? []).map((y, i) => [trace.x[i], y]).filter(([, y]) => y !== null);
    if (!finite.length) {
      this.last.textContent = "";
      this.plot.setAttribute("aria-label", `${this.title}: no values`);
      return;
    }
    const [x, y] = finite.at(-1);
    const [low, high] = extent(finite.map((pair) => pair[1]));
    this.last.textContent = alone ? number(y) : "";
    this.plot.setAttribute("aria-label", `${this.title}: ${number(y)} at ${number(x)}, from ${number(low)} to ${number(high)}`);
  }
}

export function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      target.chart.seen = isIntersecting;
      if (isIntersecting && target.chart.stale) target.chart.touch();
    }
  },
  { rootMargin: "300px" },
);

export function redrawAll() {
  document.querySelectorAll("figure.picture").forEach((figure) => figure.chart?.touch());
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
