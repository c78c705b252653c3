// Replies that a run kept, a page at a time, each beside another step's, model's or run's.
import { ask, by, el, number, show } from "./format.js";

const PAGE = 8;

export class Replies {
  constructor(run) {
    this.run = run;
    this.stages = [];
    this.first = 0;
    this.touched = false;
    this.others = new Map([[run, null]]); // run → its stages with replies
    for (const id of ["reply-stage", "reply-of", "beside-run", "beside-stage", "beside-of"]) {
      by(id).addEventListener("change", () => this.changed(id));
    }
    by("before").addEventListener("click", () => this.turn(-PAGE));
    by("after").addEventListener("click", () => this.turn(PAGE));
  }

  // The stages as the server says them now
  update(stages) {
    const found = stages.filter((stage) => stage.samples.length).map(({ name, samples }) => ({ name, samples }));
    const text = JSON.stringify(found);
    if (text === this.text) return;
    this.text = text;
    this.stages = found;
    this.others.set(this.run, found);
    show(by("no-replies"), found.length === 0);
    show(by("reply-tools"), found.length > 0);
    if (!found.length) return;
    if (!by("beside-run").options.length) this.runs();
    this.fill();
    this.load();
  }

  async runs() {
    options(by("beside-run"), [[this.run, "this run"]], this.run);
    const { runs } = await ask("/api/runs");
    options(by("beside-run"), [[this.run, "this run"], ...runs.filter((name) => name !== this.run).map((name) => [name, name])], this.run);
  }

  fill() {
    const names = this.stages.map((stage) => stage.name);
    const best = this.stages.findLast((stage) => stage.samples.length > 1)?.name ?? names.at(-1);
    options(by("reply-stage"), names.map((name) => [name, name]), this.touched ? by("reply-stage").value : best);
    const groups = of(this.stages, by("reply-stage").value);
    options(by("reply-of"), groups.map(counted), this.touched ? by("reply-of").value : groups.at(-1)?.[0]);
    this.fillBeside();
  }

  fillBeside() {
    const there = this.others.get(by("beside-run").value || this.run) ?? [];
    const same = by("reply-stage").value;
    const chosen = by("beside-stage").value;
    const stage = this.touched && there.some((one) => one.name === chosen) ? chosen : (there.find((one) => one.name === same) ?? there.at(-1))?.name;
    options(by("beside-stage"), there.map(({ name }) => [name, name]), stage);
    const groups = of(there, stage);
    const before = this.touched ? by("beside-of").value : (groups.length > 1 ? groups[0][0] : "");
    options(by("beside-of"), [["", "nothing"], ...groups.map(counted)], before);
  }

  async changed(id) {
    this.first = 0;
    if (id === "reply-stage") {
      this.touched = false;
      const stage = by("reply-stage").value;
      const groups = of(this.stages, stage);
      options(by("reply-of"), groups.map(counted), groups.at(-1)?.[0]);
    }
    if (id === "beside-run") {
      const run = by("beside-run").value;
      if (!this.others.get(run)) this.others.set(run, (await ask("/api/stages", { run })).stages);
    }
    if (id === "beside-stage") this.touched = true;
    if (id === "reply-stage" || id.startsWith("beside-") && id !== "beside-of") this.fillBeside();
    this.touched = true;
    this.load();
  }

  turn(by_) {
    this.first = Math.max(this.first + by_, 0);
    this.load();
    by("replies").scrollIntoView();
  }

  async load() {
    const asked = { run: this.run, stage: by("reply-stage").value, of: by("reply-of").value, beside: by("beside-of").value, beside_stage: by("beside-stage").value, beside_run: by("beside-run").value, first: this.first };
    const key = (this.asked = JSON.stringify(asked));
    const { total, same_prompts: same, rows } = await ask("/api/samples", asked);
    if (key !== this.asked) return;
    const [here, there] = [asked.of, asked.beside];
    by("reply-note").textContent = !there ? "" : same ? "Beside each reply, one to the same prompt." : "No prompt is in both: replies in the same place stand beside each other.";
    by("reply-list").replaceChildren(...rows.map((row, i) => sample(row, this.first + i, here, there, same, asked)));
    show(by("pager"), total > PAGE);
    by("place").textContent = `${number(this.first + 1)} to ${number(Math.min(this.first + PAGE, total))} of ${number(total)}`;
    by("before").disabled = this.first === 0;
    by("after").disabled = this.first + PAGE >= total;
    document.documentElement.dataset.replies = `${asked.of} | ${asked.beside}`;
  }
}

const of = (stages, name) => stages.find((stage) => stage.name === name)?.samples ?? [];
const counted = ([name, count]) => [name, count > 1 ? `${name} (${number(count)})` : name];

function options(select, pairs, value) {
  const known = [...select.options].map((option) => option.value).join("\n");
  if (known !== pairs.map(([key]) => key).join("\n")) select.replaceChildren(...pairs.map(([key, text]) => el("option", { value: key }, text)));
  if (pairs.some(([key]) => key === value)) select.value = value;
}

function sample({ a, b }, place, here, there, same, asked) {
  const prompt = same || !there ? [turns(a.prompt)] : [];
  return el("article", { class: "sample" },
    el("header", {}, el("h4", {}, `Reply ${number(place + 1)}`), ...prompt),
    el("div", { class: "replies" },
      reply(a, b, label(here, asked.run, asked), same || !there ? null : a.prompt, 1),
      there ? (b ? reply(b, null, label(there, asked.beside_run, asked), same ? null : b.prompt, 2) : el("section", { class: "reply" }, el("p", { class: "quiet" }, "No reply to this prompt there."))) : null));
}

const label = (group, run, asked) => (run && run !== asked.run ? `${run}: ${group}` : group);

function turns(list) {
  return el("div", {}, ...list.map(({ role, text }) => el("div", { class: "turn" }, role ? el("span", { class: "role" }, role) : null, el("p", { class: "words", dir: "auto" }, text))));
}

function reply(one, other, title, prompt, position) {
  const text = one.completion.some((turn) => turn.text) ? turns(one.completion) : el("p", { class: "words quiet" }, "(empty reply)");
  const values = Object.entries(one.values).map(([key, value]) => {
    const before = other?.values[key];
    const change = typeof before === "number" && typeof value === "number" ? value - before : null;
    return el("div", {}, el("dt", {}, key), el("dd", {}, el("span", { class: "value" }, value === null ? "does not apply" : number(value, 3)), change ? el("small", { title: "against the other one" }, `(${change > 0 ? "+" : ""}${number(change, 3)})`) : null));
  });
  const stop = { eos: "ended by itself", stop: "ended at a stop text", length: "cut off" }[one.stop_reason] ?? one.stop_reason;
  return el("section", { class: "reply" },
    el("h5", {}, el("span", { class: "swatch", "--colour": `var(--model-${position})` }), title),
    prompt ? el("details", {}, el("summary", {}, "its prompt"), turns(prompt)) : null,
    text,
    el("div", { class: "measured" }, el("dl", { class: "parts" }, ...values), stop ? el("p", { class: "remarks" }, stop) : null));
}
