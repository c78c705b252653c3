// The list of runs: sorted, filtered and chosen from, kept up by the server.
import { Feed } from "./feed.js";
import { ago, by, el, number, show } from "./format.js";

const runs = new Map(); // name → what the server said last
const rows = new Map(); // name → its row
const chosen = new Set();
let sort = { by: "changed", down: true };

const STATUS = { running: 0, active: 1, interrupted: 2, unfinished: 3, waiting: 4, idle: 5, done: 6 };

function value(run, what) {
  if (what.startsWith("value ")) return run.values[what.slice(6)] ?? null;
  if (what === "status") return STATUS[run.status] ?? 9;
  if (what === "share") return run.steps ? run.step / run.steps : (run.step ?? null);
  return run[what] ?? null;
}

function compared(a, b) {
  const [x, y] = [value(a, sort.by), value(b, sort.by)];
  if (x === null || y === null) return (x === null) - (y === null) || named(a, b);
  const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
  return (sort.down ? -order : order) || named(a, b);
}

const named = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });

function found(run) {
  const text = `${run.name} ${run.status} ${run.kind ?? ""} ${run.stage ?? ""} ${run.format}`.toLowerCase();
  return by("filter").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function row(run) {
  const box = el("input", { type: "checkbox", name: "run", value: run.name, "aria-label": `Choose ${run.name}` });
  box.checked = chosen.has(run.name);
  box.addEventListener("change", () => {
    chosen[box.checked ? "add" : "delete"](run.name);
    tools();
  });
  const stage = el("td", { class: "progress" });
  if (run.stage) {
    const step = run.step === null ? "" : run.steps ? `${number(run.step)} of ${number(run.steps)}` : `step ${number(run.step)}`;
    stage.append(el("span", {}, run.stage), el("small", {}, step));
    if (run.steps && run.status === "running") stage.append(el("progress", { max: run.steps, value: run.step ?? 0, "aria-label": `${run.name}: ${step}` }));
  }
  const format = { keel: null, transformers: "TRL, transformers", tensorboard: "TensorBoard" }[run.format];
  const heads = [...document.querySelectorAll("th[data-sort^='value ']")].map((th) => th.dataset.sort.slice(6));
  return el("tr", { "data-run": run.name },
    el("td", {}, box),
    el("th", { scope: "row" }, el("a", { href: `/run?${new URLSearchParams({ run: run.name })}` }, run.name), format ? el("small", {}, format) : run.seed === null ? null : el("small", {}, `seed ${run.seed}`)),
    el("td", {}, el("span", { class: `status ${run.status}` }, run.status)),
    stage,
    ...heads.map((key) => el("td", { class: "value" }, run.values[key] === undefined ? "" : number(run.values[key], 3))),
    el("td", { class: "value changed", "data-changed": run.changed }, ago(run.changed)),
  );
}

function draw() {
  const body = document.querySelector("#runs tbody");
  const shown = [...runs.values()].filter(found).sort(compared);
  const focus = document.activeElement;
  body.replaceChildren(...shown.map((run) => rows.get(run.name)));
  if (focus?.isConnected) focus.focus();
  show(by("empty"), runs.size === 0);
  show(by("runs"), runs.size > 0);
  by("count").textContent = shown.length === runs.size ? `${number(runs.size)} ${runs.size === 1 ? "run" : "runs"}` : `${number(shown.length)} of ${number(runs.size)} runs`;
  for (const head of document.querySelectorAll("th[data-sort]")) {
    head.setAttribute("aria-sort", head.dataset.sort !== sort.by ? "none" : sort.down ? "descending" : "ascending");
    const key = head.dataset.sort;
    if (key.startsWith("value ")) {  // a column that no run fills takes no room
      const used = [...runs.values()].some((run) => run.values[key.slice(6)] !== undefined);
      const place = [...head.parentNode.children].indexOf(head) + 1;
      document.querySelectorAll(`#runs tr > :nth-child(${place})`).forEach((cell) => (cell.hidden = !used));
    }
  }
  tools();
  document.documentElement.dataset.ready = String(shown.length);
}

function tools() {
  const button = by("compare");
  button.disabled = chosen.size === 0;
  button.textContent = chosen.size ? `Compare ${chosen.size}` : "Compare";
  const shown = [...runs.values()].filter(found);
  by("all").checked = shown.length > 0 && shown.every((run) => chosen.has(run.name));
}

by("filter").addEventListener("input", draw);
by("tools").addEventListener("submit", (event) => {
  event.preventDefault();
  const every = chosen.size === runs.size;
  location.href = `/compare?${new URLSearchParams(every ? [] : [...chosen].map((name) => ["run", name]))}`;
});
by("all").addEventListener("change", (event) => {
  for (const run of [...runs.values()].filter(found)) {
    chosen[event.target.checked ? "add" : "delete"](run.name);
    rows.get(run.name).querySelector("input").checked = event.target.checked;
  }
  tools();
});
document.querySelectorAll("th[data-sort] button").forEach((button) =>
  button.addEventListener("click", () => {
    const key = button.closest("th").dataset.sort;
    sort = { by: key, down: sort.by === key ? !sort.down : key !== "name" && key !== "status" };
    draw();
  }),
);
setInterval(() => document.querySelectorAll("td.changed").forEach((cell) => (cell.textContent = ago(Number(cell.dataset.changed)))), 5000);

new Feed("/events/list", {
  runs: ({ runs: changed, gone }) => {
    for (const run of changed) {
      runs.set(run.name, run);
      rows.set(run.name, row(run));
    }
    for (const name of gone) {
      runs.delete(name);
      rows.delete(name);
      chosen.delete(name);
    }
    draw();
  },
}).start([]);
