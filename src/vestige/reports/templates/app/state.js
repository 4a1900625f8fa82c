/* What is chosen lives in the address after the #, so that a link opens the same view. */
const DEFAULTS = { query: "", end: "both", source: "", text: "", min: "", strength: "", cell: "", range: "", token: "", with: "", view: "list", example: "" };
const state = { ...DEFAULTS };

/* What each filter lets pass. */
const FILTERS = {
  source: (entry, example, wanted) => (example.source || DATA.noSource) === wanted,
  text: (entry, example, wanted) => [fullText(example.text), example.id].some((words) => words.toLowerCase().includes(wanted.trim().toLowerCase())),
  min: (entry, example, wanted) => Math.abs(entry.score) >= (Number(wanted) || 0),
  strength: (entry, example, wanted) => Math.abs(entry.strength) >= (Number(wanted) || 0),
  cell: (entry, example, wanted) => strongestCells(entry).has(wanted),
  range: (entry, example, wanted) => wanted.split(" ").every((end, place) => (place ? entry.score <= Number(end) : entry.score >= Number(end))),
  token: (entry, example, wanted) => example.text.pieces.some((piece) => tokenName(piece) === wanted),
};
const OF_EXAMPLES = ["source", "text", "strength", "token"];
const CELL_SHARE = 0.1;

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) || DEFAULTS[name];
  if (!DATA.queries.some((query) => query.id === state.query)) state.query = DATA.queries.length ? DATA.queries[0].id : "";
}

function writeState() {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value && value !== DEFAULTS[name]) given.set(name, value);
  history.replaceState(null, "", `#${given}`);
}

/* Changes some of the state and draws everything again. */
function choose(changes, next) {
  Object.assign(state, changes);
  refresh(next);
}

function clearFilters() {
  choose(Object.fromEntries(["end", ...Object.keys(FILTERS)].map((name) => [name, DEFAULTS[name]])));
}

function currentQuery() {
  return DATA.queries.find((query) => query.id === state.query);
}

function currentEntry() {
  return shownEntries(currentQuery()).find((entry) => entryKey(entry) === state.example) || null;
}

/* The queries whose sources are added up: those that are ticked, or the one that is shown. */
function chosenQueries() {
  let ids = [];
  try { ids = JSON.parse(state.with || "[]"); } catch { /* a link that somebody shortened */ }
  const ticked = DATA.queries.filter((query) => Array.isArray(ids) && ids.includes(query.id));
  return ticked.length ? ticked : [currentQuery()];
}

function exampleOf(row) {
  return DATA.examples[row] || DATA.other.examples[row];
}

/* An example may stand at both ends of a small data set: an entry is named by its end and its rank. */
function entryKey(entry) {
  return `${entry.end}-${entry.rank}`;
}

/* The entries that pass the filters, proponents first; those of another run only have to pass filters of examples. */
function shownEntries({ ranked }, names = Object.keys(FILTERS)) {
  const wanted = names.filter((name) => state[name]).map((name) => [name, FILTERS[name]]);
  return ranked.filter((entry) =>
    (state.end === "both" || entry.end === state.end) && wanted.every(([name, passes]) => passes(entry, exampleOf(entry.row), state[name])));
}

function cellName([layer, module]) {
  return layer === null ? module : `layer ${layer} · ${module}`;
}

/* Names of the cells that carry most of an entry's score: a tenth of all cells. */
function strongestCells(entry) {
  if (!entry.cells) return new Set();
  const order = entry.cells.map((value, index) => [Math.abs(value), index]).filter(([size]) => size).sort((a, b) => b[0] - a[0]);
  return new Set(order.slice(0, Math.ceil(CELL_SHARE * entry.cells.length)).map(([, index]) => cellName(DATA.grid.cells[index])));
}
