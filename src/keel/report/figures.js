"use strict";

// What the report and the dashboard draw alike.

// A colour in a figure is the name of a CSS variable: the page's theme decides what it looks like.
function coloured(value, style) {
  if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return value.map((item) => coloured(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
}

// A polyline with rounded corners, as an SVG path.
function rounded(points, radius) {
  let path = `M${points[0]}`;
  for (let i = 1; i < points.length - 1; i++) {
    const [before, corner, after] = [points[i - 1], points[i], points[i + 1]];
    const towards = (other) => {
      const [dx, dy] = [other[0] - corner[0], other[1] - corner[1]];
      const length = Math.hypot(dx, dy) || 1;
      const reach = Math.min(radius, length / 2) / length;
      return [corner[0] + dx * reach, corner[1] + dy * reach];
    };
    path += `L${towards(before)}Q${corner} ${towards(after)}`;
  }
  return path + `L${points.at(-1)}`;
}

// Arrows from each stage to those that use it. A neighbour is reached straight across the gutter; a stage
// further on by a lane beside the boxes, one lane for each source, the earliest source outermost.
function drawArrows(pipeline) {
  const boxes = [...pipeline.querySelectorAll("[data-stage]")];
  const vertical = getComputedStyle(pipeline.querySelector("ol")).display === "flex";
  const depth = new Map(boxes.map((box, i) => [box.dataset.stage, vertical ? i : Number(box.dataset.column)]));
  const edges = boxes.flatMap((box) => JSON.parse(box.dataset.inputs).map((source) => [source, box.dataset.stage]));
  const far = (edge) => depth.get(edge[1]) - depth.get(edge[0]) > 1;
  const lanes = [...new Set(edges.filter(far).map(([source]) => source))].reverse();
  pipeline.style.setProperty("--lanes", lanes.length);

  const origin = pipeline.getBoundingClientRect();
  const span = new Map(boxes.map((box) => {
    const r = box.getBoundingClientRect();
    const [x0, x1, y0, y1] = [r.left - origin.left, r.right - origin.left, r.top - origin.top, r.bottom - origin.top];
    // "along" is the direction of the flow, "across" points from the boxes to the lanes
    return [box.dataset.stage, vertical
      ? { start: y0, end: y1, middle: -(x0 + Math.min(56, (x1 - x0) / 3)), edge: -x0 }
      : { start: x0, end: x1, middle: y0 + Math.min(34, (y1 - y0) / 2), edge: y1 }];
  }));
  const outside = Math.max(...[...span.values()].map((s) => s.edge));
  const place = ([along, across]) => (vertical ? [-across, along] : [along, across]);

  const route = ([source, target]) => {
    const [from, to] = [span.get(source), span.get(target)];
    if (!far([source, target])) {
      const bend = (from.end + to.start) / 2;
      return [[from.end, from.middle], [bend, from.middle], [bend, to.middle], [to.start, to.middle]];
    }
    const lane = lanes.indexOf(source);
    const order = lanes.filter((other) => edges.some((e) => e[0] === other && e[1] === target && far(e))).indexOf(source);
    const leave = [from.end + 9 + 5 * (lane % 2), from.middle + 13];
    const arrive = [to.start - 20 + 6 * (order % 3), to.middle + 13 * (order + 1)];
    const beside = outside + 14 + 11 * lane;
    return [[from.end, leave[1]], leave, [leave[0], beside], [arrive[0], beside], arrive, [to.start, arrive[1]]];
  };
  const drawn = (edge) => rounded(route(edge).map(place), 6);
  // Lines of one source may join, so its halos come before its lines; other sources' lines pass over or under.
  const layers = [...lanes.map((lane) => edges.filter((e) => far(e) && e[0] === lane)), edges.filter((e) => !far(e))];
  const svg = pipeline.querySelector("svg");
  svg.innerHTML = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    + '<path d="M1 1L7 4L1 7" class="tip"/></marker></defs>'
    + layers.map((layer) => layer.map((edge) => `<path class="halo" d="${drawn(edge)}"/>`).join("")
      + layer.map((edge) => `<path class="arrow" d="${drawn(edge)}" marker-end="url(#tip)"/>`).join("")).join("");
}
