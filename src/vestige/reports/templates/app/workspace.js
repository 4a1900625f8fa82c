/* The workspace: its views, what is chosen in the address, and what the server is asked. */
const DEFAULTS = { view: "list", path: "", text: "", kind: "", sort: "-created", words: "", query: "", order: "row", start: "0" };
const state = { ...DEFAULTS };
const POLL = 3000;
const VIEWS = { list: renderList, open: renderOpen, rows: renderSearch, ask: renderAsk };
const main = document.getElementById("main");
let results = [];

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) || DEFAULTS[name];
  if (!Object.hasOwn(VIEWS, state.view)) state.view = "list";
}

function address(changes) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...state, ...changes })) if (value && value !== DEFAULTS[name]) given.set(name, value);
  return `#${given}`;
}

/* Opens another view; filters of the list stay in the address, so that the way back finds them. */
function go(changes) {
  location.hash = address({ words: "", query: "", order: "row", start: "0", ...changes });
}

function keep(changes) {
  Object.assign(state, changes);
  history.replaceState(null, "", address({}));
}

async function request(url, content) {
  const options = content ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) } : {};
  let answer;
  try { answer = await fetch(url, options); } catch { throw new Error("The server was closed: start `vestige view` again."); }
  const text = await answer.text();
  if (!answer.ok) throw new Error(text.startsWith("{") ? JSON.parse(text).error : text);
  return text.startsWith("{") ? JSON.parse(text) : text;
}

function url(place, values) {
  return `${place}?${new URLSearchParams(values)}`;
}

function show(...children) {
  main.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

function problem(error) {
  return html("p", { class: "problem", role: "alert" }, error.message || String(error));
}

function button(text, action, properties) {
  return html("button", { type: "button", class: "quiet", onclick: action, ...properties }, text);
}

function when(text) {
  return text ? new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "short" }).format(new Date(text)) : "";
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 60) return `${seconds.toFixed(seconds < 9.95 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function bytes(count) {
  return !count ? "" : count < 1e9 ? `${Math.round(count / 1e6)} MB` : `${(count / 1e9).toFixed(1)} GB`;
}

/* The last part of a path; a hub id stays whole. */
function short(name) {
  return !name ? "" : name.startsWith("/") || name.startsWith(".") || name.split("/").length > 2 ? name.split("/").filter(Boolean).pop() : name;
}

function nameOf(path) {
  return path === "." ? document.querySelector("h1").textContent : path.split("/").pop();
}

function stateMark(line) {
  return html("span", { class: `state ${line.state}`, "data-tip": line.error || line.lacking || line.command || null }, line.state);
}

/* One result: the buttons of what can be done with it. */
function actions(line) {
  const found = [];
  if (line.page) found.push(html("a", { class: "quiet", href: url("/page", { path: line.path }) }, "Report"));
  if (line.rows && state.view !== "rows") found.push(button("Search data", () => go({ view: "rows", path: line.path })));
  if (line.answers && state.view !== "ask") found.push(button("Ask", () => go({ view: "ask", path: line.path })));
  if (state.view !== "open") found.push(button("Facts", () => go({ view: "open", path: line.path })));
  return html("span", { class: "actions" }, found);
}

function lineOf(path) {
  return results.find((line) => line.path === path) || { path, kind: "", state: "" };
}

async function refreshResults() {
  const before = JSON.stringify(results);
  results = (await request("/api/list")).results;
  return JSON.stringify(results) !== before;
}

async function renderOpen() {
  const path = state.path;
  let found;
  try { found = await request(url("/api/open", { path })); } catch (error) { return show(problem(error)); }
  if (state.view !== "open" || state.path !== path) return;
  const [, ...lines] = found.text.split("\n");
  const facts = lines.map((line) => line.trim().match(/^(\S+(?: \S+)*?)\s{2,}(.*)$/) || [null, "", line.trim()]);
  show(
    html("div", { class: "open-head" }, html("h2", {}, nameOf(path)), html("span", { class: "kind" }, found.kind || ""), stateMark(found), actions({ ...found, path })),
    found.about && html("p", { class: "about-line" }, found.about),
    found.error && problem(found.error),
    html("dl", { class: "open-facts" }, facts.map(([, name, value]) => [html("dt", {}, name), html("dd", {}, value)])),
    found.curve && found.curve.length > 1 && renderCurve(found.curve),
    found.table && renderTable(found.table),
  );
  if (found.state === "running") setTimeout(() => state.view === "open" && state.path === path && renderOpen(), POLL);
}

function renderTable({ columns, rows }) {
  const row = (cells, tag) => html("tr", {}, cells.map((cell, place) => html(place ? tag : "th", { class: place ? "number" : null, scope: tag === "th" ? "col" : place ? null : "row" }, cell)));
  return html("div", { class: "wide" }, html("table", {}, html("thead", {}, row(columns, "th")), html("tbody", {}, rows.map((cells) => row(cells, "td")))));
}

/* Mean loss over the steps of a training. */
function renderCurve(points) {
  const [width, height, left, bottom] = [760, 220, 44, 22];
  const steps = points.map(([step]) => step), losses = points.map(([, loss]) => loss);
  const [first, last, low, high] = [Math.min(...steps), Math.max(...steps), Math.min(0, ...losses), Math.max(...losses)];
  const x = (step) => left + ((width - left - 8) * (step - first)) / Math.max(1, last - first);
  const y = (loss) => 8 + ((height - bottom - 8) * (high - loss)) / (high - low || 1);
  const marks = ticks(low, high, 4).map((mark) => [svg("line", { class: "grid", x1: left, x2: width - 8, y1: y(mark), y2: y(mark) }), svg("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, tidy(String(+mark.toFixed(6))))]);
  const path = points.map(([step, loss], place) => `${place ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  return html("figure", { class: "curve" }, html("h3", {}, "Mean loss of each step, nats a token"),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Loss from ${losses[0].toFixed(3)} to ${losses[losses.length - 1].toFixed(3)}` }, marks,
      svg("path", { class: "loss", d: path }), svg("text", { x: left, y: height - 4 }, `step ${first}`), svg("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, `step ${grouped(last)}`)));
}

function render() {
  const names = { open: "", rows: "Training data", ask: "Ask" };
  const back = html("a", { href: address({ view: "list", path: "", words: "", query: "", order: "row", start: "0" }) }, "All results");
  document.getElementById("crumbs").replaceChildren(...(state.view === "list" ? [] : [back, ` › ${state.path} ${names[state.view] && `› ${names[state.view]}`}`]));
  VIEWS[state.view]();
}

function startKeys() {
  const help = document.getElementById("help");
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches('input:not([type="checkbox"]), select, textarea');
    if (help.open || event.ctrlKey || event.metaKey || event.altKey) return;
    const list = state.view === "list";
    const keys = {
      "/": () => (main.querySelector('[type="search"]') || main.querySelector("textarea") || main).focus(),
      "?": () => help.showModal(),
      Escape: () => (typing ? event.target.blur() : list ? clearList() : go({ view: "list", path: "" })),
      ...(list && { j: () => moveLine(1), k: () => moveLine(-1), x: () => mark(currentLine()) }),
      ...(list && (typing || event.target === document.body || event.target === main) && { Enter: () => openLine(currentLine() || (typing && shownLines()[0])) }),
    };
    if (!Object.hasOwn(keys, event.key) || (typing && !["Escape", "Enter"].includes(event.key))) return;
    event.preventDefault();
    keys[event.key]();
  });
}

/* The list follows what happens in the folder. */
async function followResults() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL));
    if (document.hidden || state.view !== "list") continue;
    try { if (await refreshResults() && state.view === "list") drawLines(); } catch (error) { document.getElementById("compare").replaceChildren(problem(error)); }
  }
}

async function start() {
  startTheme();
  startTooltip();
  readState();
  try { await refreshResults(); } catch (error) { return show(problem(error)); }
  render();
  startKeys();
  addEventListener("hashchange", () => {
    readState();
    scrollTo({ top: 0, behavior: "instant" });
    render();
  });
  followResults();
}

start();
