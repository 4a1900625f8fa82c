/* What is chosen lives in the address after the #, so that a link opens the same view. */
const DEFAULTS = { query: "", end: "both", source: "", text: "", min: "", example: "" };
const state = { ...DEFAULTS };

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

function currentQuery() {
  return DATA.queries.find((query) => query.id === state.query);
}

function currentEntry() {
  return shownEntries(currentQuery()).find((entry) => entryKey(entry) === state.example) || null;
}

/* An example may stand at both ends of a small data set: an entry is named by its end and its rank. */
function entryKey(entry) {
  return `${entry.end}-${entry.rank}`;
}

/* What each turn says; of one role if it is given. */
function turnsOf(text, role) {
  return text.turns.filter(([start]) => !role || text.roles[start] === role).map(([start, stop]) => text.pieces.slice(start, stop).join("").trim());
}

function fullText(text) {
  return turnsOf(text).join("\n");
}

/* System prompt, prompt or answer, for lists and exports; each turn begins a line. */
function wording(text, role) {
  return turnsOf(text, role).join("\n");
}

/* The entries of the query that pass the filters, proponents first. */
function shownEntries(query) {
  const needle = state.text.trim().toLowerCase();
  const least = Number(state.min) || 0;
  return query.ranked.filter((entry) => {
    const example = DATA.examples[entry.row];
    return (
      (state.end === "both" || entry.end === state.end) &&
      (!state.source || (example.source || "") === state.source) &&
      Math.abs(entry.score) >= least &&
      (!needle || fullText(example.text).toLowerCase().includes(needle) || example.id.toLowerCase().includes(needle))
    );
  });
}
