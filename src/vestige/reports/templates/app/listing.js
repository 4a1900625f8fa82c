/* The list of results: filtered, sorted, opened, and two runs marked for comparison. */
const COLUMNS = [["path", "Result"], ["kind", "Kind"], ["model", "Model"], ["data", "Data"], ["method", "Method"], ["created", "Date"], ["seconds", "Time"], ["memory", "Memory"], ["state", "State"]];
const marked = [];
let currentPath = "";

function shownLines() {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const down = state.sort.startsWith("-"), key = state.sort.replace("-", "");
  const text = (line) => [line.path, line.kind, line.about, line.model, line.data, line.method, line.state, line.error].join(" ").toLowerCase();
  const found = results.filter((line) => (!state.kind || line.kind === state.kind) && words.every((word) => text(line).includes(word)));
  const value = (line) => (line[key] === undefined || line[key] === null ? "" : line[key]);
  const compare = (one, other) => (typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other), "en", { numeric: true }));
  return found.sort((one, other) => (down ? -1 : 1) * compare(value(one), value(other)) || compare(one.path, other.path));
}

function currentLine() {
  const lines = shownLines();
  return lines.find((line) => line.path === currentPath) || null;
}

function moveLine(step) {
  const lines = shownLines();
  const place = lines.findIndex((line) => line.path === currentPath);
  const line = lines[place < 0 ? 0 : Math.min(lines.length - 1, Math.max(0, place + step))];
  if (!line) return;
  currentPath = line.path;
  drawLines();
  showCurrent();
}

function showCurrent() {
  const row = main.querySelector('tr[aria-selected="true"]');
  if (row) row.scrollIntoView({ block: "nearest", behavior: "instant" });
}

function openLine(line) {
  if (!line) return;
  if (line.page && line.state !== "damaged") location.assign(url("/page", { path: line.path }));
  else go({ view: "open", path: line.path });
}

/* Results that rank rows, on a page of their own. */
function comparable(line) {
  return Boolean(line.page && line.rows);
}

/* Marks a run for comparison; a third one takes the place of the first. */
function mark(line) {
  if (!line || !comparable(line)) return;
  const place = marked.indexOf(line.path);
  if (place >= 0) marked.splice(place, 1);
  else marked.push(line.path);
  if (marked.length > 2) marked.shift();
  drawLines();
}

async function compareMarked() {
  const [path, compare] = marked;
  try {
    await request(url("/version", { path, compare }));
    location.assign(url("/page", { path, compare }));
  } catch (error) { document.getElementById("compare").replaceChildren(problem(error)); }
}

function clearList() {
  marked.length = 0;
  keep({ text: "", kind: "" });
  renderList();
}

function renderList() {
  const search = html("input", { type: "search", id: "search", placeholder: "Search names, questions, models, data …", "aria-label": "Search the results", value: state.text, oninput: (event) => { keep({ text: event.target.value }); drawLines(); } });
  show(html("div", { class: "list-tools" }, search, html("span", { id: "kinds" }), html("span", { id: "compare", class: "compare" })), html("div", { class: "results" }, html("table", {}, html("thead", { id: "heads" }), html("tbody", { id: "lines" }))), html("p", { id: "empty", class: "empty", hidden: true }));
  drawLines();
  showCurrent();
}

function drawKinds() {
  const counts = {};
  for (const line of results) counts[line.kind] = (counts[line.kind] || 0) + 1;
  const options = [["", `All ${results.length}`], ...Object.keys(counts).sort().map((kind) => [kind, `${kind} ${counts[kind]}`])];
  document.getElementById("kinds").replaceChildren(segmented("Kind", options, state.kind, (kind) => { keep({ kind }); drawLines(); }));
}

function drawHeads() {
  const down = state.sort.startsWith("-"), key = state.sort.replace("-", "");
  const heads = COLUMNS.map(([name, title]) => html("th", { scope: "col", class: name, "aria-sort": name === key ? (down ? "descending" : "ascending") : null },
    html("button", { type: "button", class: "sort", onclick: () => { keep({ sort: name === key && !down ? `-${name}` : name }); drawLines(); } }, title, name === key ? (down ? " ↓" : " ↑") : "")));
  document.getElementById("heads").replaceChildren(html("tr", {}, html("th", { class: "mark" }, html("span", { class: "hidden-text" }, "Compare")), heads));
}

function drawLine(line) {
  const folder = line.path.includes("/") ? line.path.slice(0, line.path.lastIndexOf("/") + 1) : "";
  const box = comparable(line) && html("input", { type: "checkbox", checked: marked.includes(line.path), "aria-label": `Compare ${line.path}`, onclick: () => mark(line) });
  const open = (event) => { event.preventDefault(); currentPath = line.path; openLine(line); };
  const name = html("a", { href: line.page ? url("/page", { path: line.path }) : address({ view: "open", path: line.path }), onclick: open }, html("span", { class: "folder" }, folder), nameOf(line.path));
  const cell = (key, value, tip) => html("td", { class: key, "data-tip": tip && tip !== value ? tip : null }, value);
  return html("tr", { "aria-selected": String(line.path === currentPath), "data-path": line.path, class: line.state },
    html("td", { class: "mark" }, box),
    html("td", { class: "path" }, name, html("small", {}, line.error || line.about || line.command || ""), actions({ ...line, page: false })),
    html("td", { class: "kind" }, html("span", { class: "tag" }, line.kind)), cell("model", short(line.model), line.model), cell("data", short(line.data), line.data), cell("method", line.method || ""),
    cell("created", when(line.created)), cell("seconds", duration(line.seconds)), cell("memory", bytes(line.memory)), html("td", { class: "state-cell" }, stateMark(line)));
}

function drawLines() {
  drawKinds();
  drawHeads();
  const lines = shownLines();
  document.getElementById("lines").replaceChildren(...lines.map(drawLine));
  const empty = document.getElementById("empty");
  empty.hidden = lines.length > 0;
  empty.textContent = results.length ? "Nothing matches." : "No result lies here yet. `vestige attribute`, `index`, `train`, `audit` and the others leave one in their --out.";
  const ready = marked.length === 2;
  const words = ready ? button(`Compare ${nameOf(marked[0])} with ${nameOf(marked[1])}`, compareMarked, { class: "primary" }) : marked.length ? html("span", { class: "note" }, "Mark a second run to compare it.") : null;
  document.getElementById("compare").replaceChildren(...[words].filter(Boolean));
  document.getElementById("status").textContent = `${lines.length} results`;
}
