/* Layer by module: every cell is the sum of its components' scores, and the cells sum to the score. */
const CELL_FILL = 0.92;
const LABEL = 16;

/* Returns {cells, score, title}: of the selected example, or summed over the shown proponents. */
function heatmapSubject(query) {
  const entry = currentEntry();
  if (entry && entry.cells) return { cells: entry.cells, score: entry.score, title: `${entry.end} ${entry.rank}` };
  const entries = shownEntries(query).filter((shown) => shown.end === "proponent" && shown.cells);
  if (!entries.length) return null;
  const cells = DATA.grid.cells.map((_, index) => sum(entries.map((shown) => shown.cells[index])));
  return { cells, score: sum(entries.map((shown) => shown.score)), title: entries.length === 1 ? "the one proponent shown" : `the ${entries.length} proponents shown, summed` };
}

function renderHeatmap(query) {
  if (!DATA.grid) {
    return html("section", { class: "panel" }, html("h2", {}, "Where in the model"), html("p", { class: "sub" }, "This run has no scores per component: its method does not go through parameters, or they were not kept."));
  }
  const subject = heatmapSubject(query);
  if (!subject) return null;
  const total = sum(subject.cells);
  // float32 sums differ in the last digits; more than that is a part of the score that has no component
  const remainder = Math.abs(subject.score - total) > 1e-3 * largest([subject.score, ...subject.cells]) ? subject.score - total : null;
  const format = scoreFormat(largest([subject.score, ...subject.cells]));
  return html("section", { class: "panel", id: "heatmap", "aria-labelledby": "heatmap-title", "data-sum": total + (remainder || 0), "data-score": subject.score },
    html("div", { class: "panel-head" }, html("h2", { id: "heatmap-title" }, "Where in the model"),
      state.example ? html("button", { type: "button", class: "quiet", onclick: () => choose({ example: "" }, state.example) }, "Sum proponents") : null),
    html("p", { class: "sub" }, `${subject.title[0].toUpperCase()}${subject.title.slice(1)}. Cells sum to `, html("b", {}, format(total + (remainder || 0))), "; score ", html("b", {}, format(subject.score)), ". Click a cell for the examples that act there."),
    drawHeatmap(subject.cells, remainder, format),
    cellTables(subject.cells, remainder, format));
}

/* "self_attn.q_proj" is drawn under the heading "self_attn" as "q_proj". */
function moduleParts(module) {
  const cut = module.indexOf(".");
  return cut < 0 ? ["", module] : [module.slice(0, cut), module.slice(cut + 1)];
}

function drawHeatmap(cells, remainder, format) {
  const { layers, modules, others } = DATA.grid;
  const scale = largest([...cells, remainder]);
  const values = new Map(DATA.grid.cells.map(([layer, module], index) => [`${layer}/${module}`, cells[index]]));
  const longest = Math.min(LABEL, Math.max(0, ...modules.map((module) => moduleParts(module)[1].length)));
  const box = { left: 26, top: 16 + 4.2 * longest, totals: 44 };
  const wide = Math.min(40, (WIDE - box.left - box.totals - 8) / Math.max(1, modules.length));
  const high = Math.max(4, Math.min(15, 380 / Math.max(1, layers.length)));
  const parts = columnLabels(modules, box, wide);
  const every = Math.ceil(11 / high);
  const lines = layers.map((layer) => sum(modules.map((module) => values.get(`${layer}/${module}`))));
  layers.forEach((layer, row) => {
    const y = box.top + row * high;
    if (row % every === 0) parts.push(svg("text", { x: box.left - 5, y: y + high / 2 + 3.5, "text-anchor": "end" }, String(layer)));
    modules.forEach((module, column) => parts.push(cellOf(values.get(`${layer}/${module}`), box.left + column * wide, y, wide, high, scale, cellName([layer, module]), format)));
    parts.push(...totalBar(lines[row], largest(lines), box.left + modules.length * wide + 8, y, box.totals, high, `layer ${layer} in all`, format));
  });
  const below = box.top + layers.length * high;
  parts.push(...groupLabels(modules, box, wide, below));
  let y = below + (layers.length ? 26 : 0);
  const rest = others.map((module) => [module, values.get(`null/${module}`)]);
  if (remainder !== null) rest.push(["not in any component", remainder]);
  rest.forEach(([name, value]) => {
    parts.push(cellOf(value, box.left, y, wide, 14, scale, name, format));
    parts.push(svg("text", { x: box.left + wide + 7, y: y + 10.5 }, svg("tspan", {}, name), svg("tspan", { class: "strong", dx: 7 }, format(value))));
    y += 16;
  });
  const top = layers.length ? 0 : box.top - 4;
  return svg("svg", { viewBox: `0 ${top} ${WIDE} ${y + 2 - top}`, role: "img", "aria-label": "Heatmap of score by layer and module; the numbers are in the table below" }, parts);
}

function cellOf(value, x, y, width, height, scale, name, format) {
  if (value === undefined || value === null) return svg("rect", { class: "blank", x, y, width, height });
  return [
    svg("rect", { class: "empty-cell", x: x + 0.5, y: y + 0.5, width: width - 1, height: height - 1 }),
    svg("rect", { class: `cell${state.cell === name ? " current" : ""}`, onclick: () => choose({ cell: state.cell === name ? "" : name }), x, y, width, height, style: { fill: diverging(value, scale, CELL_FILL) }, "data-tip": `${name}\n${format(value)}` }),
  ];
}

function columnLabels(modules, box, wide) {
  return modules.map((module, column) => {
    const name = moduleParts(module)[1];
    const place = `translate(${box.left + (column + 0.5) * wide + 3} ${box.top - 5}) rotate(-48)`;
    return svg("text", { class: "strong", transform: place, "data-tip": module }, name.length > LABEL ? `${name.slice(0, LABEL - 1)}…` : name);
  });
}

/* A bracket under neighbouring columns of one group, with its name. */
function groupLabels(modules, box, wide, y) {
  const runs = [];
  modules.forEach((module, column) => {
    const group = moduleParts(module)[0];
    const last = runs[runs.length - 1];
    if (last && last.group === group) last.stop = column + 1;
    else runs.push({ group, start: column, stop: column + 1 });
  });
  return runs.filter((run) => run.group).flatMap((run) => {
    const [from, to] = [box.left + run.start * wide + 2, box.left + run.stop * wide - 2];
    const fits = run.group.length * 5.6 < to - from + 12;
    return [
      svg("path", { class: "bracket", d: `M${from} ${y + 3}v3H${to}v-3` }),
      fits ? svg("text", { x: (from + to) / 2, y: y + 17, "text-anchor": "middle" }, run.group) : null,
    ];
  });
}

/* The layer's total as a bar from the middle: right is positive. */
function totalBar(value, most, x, y, width, height, name, format) {
  const middle = x + width / 2;
  const length = most > 0 ? (Math.abs(value) / most) * (width / 2) : 0;
  return [
    svg("line", { class: "rule", x1: middle, x2: middle, y1: y, y2: y + height }),
    svg("rect", { class: value > 0 ? "positive" : "negative", "stroke-width": 0, x: value > 0 ? middle : middle - length, y: y + height * 0.2, width: length, height: height * 0.6, "data-tip": `${name}\n${format(value)}` }),
  ];
}

/* The same numbers as text: the strongest cells, and totals per module over the layers. */
function cellTables(cells, remainder, format) {
  const totals = new Map();
  DATA.grid.cells.forEach(([, module], index) => totals.set(module, (totals.get(module) || 0) + (cells[index] || 0)));
  if (remainder !== null) totals.set("not in any component", remainder);
  const strong = cells.map((value, index) => [cellName(DATA.grid.cells[index]), value]).filter(([, value]) => value).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 8);
  const table = (title, sums, name, lines) => html("details", {}, html("summary", {}, title),
    html("table", {}, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, name), html("th", { scope: "col", class: "number" }, sums))), html("tbody", {}, lines)));
  const line = (first, value) => html("tr", {}, html("td", {}, first), html("td", { class: "number" }, format(value)));
  const button = (name) => html("button", { type: "button", class: "link", "data-focus": `cell ${name}`, onclick: () => choose({ cell: name }) }, name);
  return [
    table("Strongest cells", "Score", "Cell", strong.map(([name, value]) => line(button(name), value))),
    table("Totals per module", "Sum over layers", "Module", [...totals].map(([module, value]) => line(html("code", {}, module), value))),
  ];
}
