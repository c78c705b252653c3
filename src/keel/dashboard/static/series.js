// Curves as they grow: what the server sent, and what it sent since.
const MOST_NEW = 600; // points after which a curve is asked for again, reduced

export class Curves {
  constructor() {
    this.curves = new Map(); // name → [steps, values, mean steps, means]
    this.appended = 0;
  }

  // {reset, series}: whether it is time to ask for whole curves again
  take({ reset, series }) {
    if (reset) this.clear();
    let most = 0;
    for (const [name, [x, y, meanX, meanY]] of Object.entries(series)) {
      const known = this.curves.get(name);
      if (!known || reset) {
        this.curves.set(name, meanX ? [x, y, meanX, meanY] : [x, y]);
        continue;
      }
      const last = known[0].at(-1);
      if (x[0] <= last) sorted(known, x, y);
      else {
        known[0].push(...x);
        known[1].push(...y);
      }
      most = Math.max(most, x.length);
    }
    this.appended += most;
    return this.appended > MOST_NEW;
  }

  clear() {
    this.curves.clear();
    this.appended = 0;
  }
}

// A step that comes again takes the place of the one before.
function sorted(known, x, y) {
  const all = new Map(known[0].map((step, i) => [step, known[1][i]]));
  x.forEach((step, i) => all.set(step, y[i]));
  const pairs = [...all].sort((a, b) => a[0] - b[0]);
  known[0] = pairs.map((pair) => pair[0]);
  known[1] = pairs.map((pair) => pair[1]);
}
