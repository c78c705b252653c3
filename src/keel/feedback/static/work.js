// The work page: keys, time at work, views without a reload, and votes that are sent again until they arrive.
// Everything here is an addition: the page's forms work without it.

const form = document.getElementById("answer");
const keysDialog = document.getElementById("keys");
const keysOn = document.getElementById("keys-on");

// ---------------------------------------------------------------- time at work: seconds the page was in view
let active = 0;
let since = document.visibilityState === "visible" ? performance.now() : null;
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") since = performance.now();
  else if (since !== null) { active += performance.now() - since; since = null; }
});
const seconds = () => (active + (since === null ? 0 : performance.now() - since)) / 1000;

// ---------------------------------------------------------------- keys
const typing = (element) =>
  element instanceof HTMLTextAreaElement || element instanceof HTMLSelectElement ||
  (element instanceof HTMLInputElement && !["radio", "checkbox", "hidden"].includes(element.type));
const inView = (element) => element.getClientRects().length > 0;
const target = (key) => [...document.querySelectorAll("[data-key]")].find((e) => e.dataset.key === key && inView(e));

function switchedOn() {
  return !keysOn || keysOn.checked;
}

function press(element) {
  if (element instanceof HTMLElement && element.tagName === "SUMMARY") {
    const details = element.parentElement;
    details.open = !details.open;
    const field = details.querySelector("textarea");
    if (details.open && field) field.focus();
    else element.focus();
  } else element.click();
}

// Groups of radio buttons that digits fill one after the other: scales of a rating, places of a ranking.
const groups = form ? [...form.querySelectorAll("fieldset[data-scale], fieldset[data-place]")] : [];
let at = Math.max(0, groups.findIndex((group) => !group.querySelector(":checked")));
const mark = () => groups.forEach((group, index) =>
  (group.closest("[data-reply]") ?? group).classList.toggle("picked", index === at && groups.length > 1));
function choose(index, focus = true) {
  at = Math.min(Math.max(index, 0), groups.length - 1);
  mark();
  const group = groups[at];
  if (focus) (group.querySelector(":checked") ?? group.querySelector("input")).focus({ preventScroll: true });
  (group.closest("[data-reply]") ?? group).scrollIntoView({ block: "nearest" });
}
groups.forEach((group, index) => group.addEventListener("focusin", () => { at = index; mark(); }));

function digit(value) {
  const input = [...groups[at].querySelectorAll("input")].find((e) => e.value === value);
  if (!input) return false;
  input.checked = true;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  if (at < groups.length - 1) choose(at + 1);
  else input.focus({ preventScroll: true });
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.isComposing || event.altKey) return;
  const element = event.target;
  if (event.key === "Escape" && typing(element)) {
    element.closest("details.drawer")?.removeAttribute("open");
    element.blur();
    return;
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    const submit = form?.querySelector("[data-submit]");
    if (submit && element !== document.getElementById("reason")) { event.preventDefault(); submit.click(); }
    return;
  }
  if (event.ctrlKey || event.metaKey || typing(element) || keysDialog?.open || !switchedOn()) return;
  if (event.key === "Enter") {
    const submit = form?.querySelector("[data-submit]");
    const own = element.closest?.("a, button, summary, select");
    if (submit && !own) { event.preventDefault(); submit.click(); }
    return;
  }
  if (groups.length && /^[0-9]$/.test(event.key)) {
    if (digit(event.key)) event.preventDefault();
    return;
  }
  if (groups.length && groups[0].dataset.place !== undefined && /^[A-H]$/.test(event.key)) {
    const place = event.key.charCodeAt(0) - 65;
    if (place < groups.length) { event.preventDefault(); choose(place); }
    return;
  }
  const found = target(event.key.length === 1 ? event.key.toLowerCase() : event.key);
  if (found) { event.preventDefault(); press(found); }
});

if (keysOn) {
  keysOn.checked = localStorage.getItem("keel-label-keys") !== "off";
  keysOn.addEventListener("change", () => localStorage.setItem("keel-label-keys", keysOn.checked ? "on" : "off"));
}

for (const opener of document.querySelectorAll("[data-opens]")) {
  opener.hidden = false;
  opener.addEventListener("click", () => { fillKeys(); document.getElementById(opener.dataset.opens).showModal(); });
}
for (const closer of document.querySelectorAll("[data-closes]")) {
  closer.addEventListener("click", () => closer.closest("dialog").close());
}

function fillKeys() {
  const list = keysDialog.querySelector("[data-keylist]");
  list.replaceChildren();
  const add = (key, text) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd"), kbd = document.createElement("kbd");
    kbd.textContent = key;
    dt.append(kbd);
    dd.textContent = text;
    list.append(dt, dd);
  };
  for (const element of document.querySelectorAll("[data-key]")) {
    if (!inView(element)) continue;
    const copy = element.cloneNode(true);
    const shown = copy.querySelector("kbd")?.textContent ?? element.dataset.key;
    copy.querySelectorAll("kbd").forEach((kbd) => kbd.remove());
    add(shown, copy.textContent.trim());
  }
  if (groups.length) add("1 … 9", groups[0].querySelector("legend").textContent.trim());
}

// ---------------------------------------------------------------- views without losing what was typed
document.addEventListener("click", async (event) => {
  const link = event.target.closest?.("a[data-view]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  let page;
  try {
    const answer = await fetch(link.href, { headers: { "X-Keel-View": "1" } });
    if (!answer.ok) throw new Error(String(answer.status));
    page = new DOMParser().parseFromString(await answer.text(), "text/html");
  } catch { location.assign(link.href); return; }
  for (const selector of [".views", ".prompt", ".replies"]) {
    const old = document.querySelector(selector), fresh = page.querySelector(selector);
    if (!old || !fresh) continue;
    if (selector === ".replies") {  // their fields stay; only what is read changes
      const articles = fresh.querySelectorAll("article");
      old.querySelectorAll("article").forEach((article, index) => {
        const places = article.querySelector("fieldset");
        const body = [...articles[index].childNodes].filter((node) => node.nodeName !== "FIELDSET");
        article.replaceChildren(...body.map((node) => document.adoptNode(node)), ...(places ? [places] : []));
      });
    } else old.replaceWith(document.adoptNode(fresh));
  }
  history.replaceState(null, "", link.href);
  if (form?.elements.view) form.elements.view.value = link.dataset.view;
  document.querySelector(`a[data-view="${link.dataset.view}"]`)?.focus();
});

// ---------------------------------------------------------------- sending, again until it arrives
let sending = false;
form?.addEventListener("submit", async (event) => {
  const button = event.submitter;
  form.elements.seconds.value = seconds().toFixed(2);
  if (button?.hasAttribute("formaction")) return;  // skip and flag: plain forms
  event.preventDefault();
  if (sending) return;
  sending = true;
  const body = new URLSearchParams(new FormData(form, button?.name ? button : undefined));
  const unsent = document.getElementById("unsent");
  for (let wait = 500; ; wait = Math.min(wait * 2, 15000)) {
    try {
      const answer = await fetch(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
      if (answer.status >= 500 || answer.status === 429) throw new Error(String(answer.status));
      const kind = answer.headers.get("content-type") ?? "";
      if (kind.startsWith("application/json")) {
        const told = await answer.json();
        if (told.next) { location.assign(told.next); return; }
        unsent.textContent = told.problem;
        unsent.hidden = false;
        sending = false;
        return;
      }
      location.reload();  // signed out, or a page of its own: let it be seen
      return;
    } catch {
      unsent.textContent = unsent.dataset.text;
      unsent.hidden = false;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
});

const narrow = matchMedia("(max-width: 1179px)");
if (narrow.matches) document.querySelector("#instructions[data-seen]")?.removeAttribute("open");
mark();
