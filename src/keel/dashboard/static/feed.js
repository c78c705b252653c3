// Events of the server. A page that is hidden lets go of its connection, of which a browser has few, and asks
// for what it missed when it is seen again.
import { by } from "./format.js";

export class Feed {
  constructor(path, handlers) {
    this.path = path;
    this.handlers = handlers;
    this.position = "";
    document.addEventListener("visibilitychange", () => (document.hidden ? this.close() : this.open()));
    addEventListener("pagehide", () => this.close());
    addEventListener("pageshow", (event) => event.persisted && this.open());
  }

  // parameters: [[name, value], …]; from the beginning where they are others than before
  start(parameters) {
    this.parameters = parameters;
    this.position = "";
    this.close();
    this.open();
  }

  open() {
    if (this.source || document.hidden || !this.parameters) return;
    const query = new URLSearchParams(this.parameters);
    if (this.position) query.append("position", this.position);
    const source = new EventSource(`${this.path}?${query}`);
    this.source = source;
    source.onopen = () => said("live");
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) return said("reconnecting");
      if (this.source !== source) return;
      this.source = null;
      this.refused(source.url);
    };
    for (const [name, handle] of Object.entries(this.handlers)) {
      source.addEventListener(name, (event) => {
        if (this.source !== source) return;
        this.position = event.lastEventId;
        handle(JSON.parse(event.data));
      });
    }
  }

  // A browser does not tell why the server would not: it is asked once more, without waiting for events
  async refused(url) {
    let seconds = 2, word = "lost", why = "";
    const asking = new AbortController();
    try {
      const answer = await fetch(url, { signal: asking.signal });
      if (answer.status === 503) {
        [word, seconds, why] = ["full", Number(answer.headers.get("retry-after")) || 10, (await answer.json()).error];
      } else if (answer.ok) seconds = 0.1;
    } catch { /* nobody answers */ }
    asking.abort();
    said(word, why);
    setTimeout(() => this.open(), seconds * 1000);
  }

  close() {
    this.source?.close();
    this.source = null;
  }
}

function said(word, why = "") {
  const place = by("link");
  const text = why ? `${word}: ${why}` : word;
  if (place.textContent === text) return;
  place.textContent = text;
  place.dataset.state = word;
}
