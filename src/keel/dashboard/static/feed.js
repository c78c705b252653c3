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
      said(source.readyState === EventSource.CLOSED ? "lost" : "reconnecting");
      if (source.readyState === EventSource.CLOSED && this.source === source) {
        this.source = null;
        setTimeout(() => this.open(), 2000);
      }
    };
    for (const [name, handle] of Object.entries(this.handlers)) {
      source.addEventListener(name, (event) => {
        if (this.source !== source) return;
        this.position = event.lastEventId;
        handle(JSON.parse(event.data));
      });
    }
  }

  close() {
    this.source?.close();
    this.source = null;
  }
}

function said(word) {
  const place = by("link");
  if (place.textContent === word) return;
  place.textContent = word;
  place.dataset.state = word;
}
