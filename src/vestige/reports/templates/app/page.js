/* The page: queries, keys, and what happens when something is chosen. */
function title(query) {
  return lastOf(query.text, "p") || lastOf(query.text, "a") || query.id;
}

function openQuery(id, next) {
  expanded.clear();
  choose({ query: id, example: "" }, next);
}

function renderQueries() {
  const ticked = state.with ? chosenQueries().map((query) => query.id) : [];
  const tick = (id) => {
    const chosen = ticked.includes(id) ? ticked.filter((each) => each !== id) : [...ticked, id];
    choose({ with: chosen.length ? JSON.stringify(chosen) : "" });
  };
  const items = DATA.queries.map((query) =>
    html("li", {},
      html("input", { type: "checkbox", "aria-label": `Add up the sources of ${title(query)}`, "data-tip": "Add up the sources of the ticked queries", "data-focus": `tick ${query.id}`, checked: ticked.includes(query.id), onchange: () => tick(query.id) }),
      html("button", { type: "button", "aria-current": query.id === state.query ? "true" : null, "data-focus": `query ${query.id}`, onclick: () => openQuery(query.id) },
        html("span", {}, title(query)), query.text.roles.includes("p") ? html("small", {}, lastOf(query.text, "a")) : null)));
  const options = DATA.queries.map((query, place) => html("option", { value: query.id, selected: query.id === state.query }, `${place + 1}. ${title(query).slice(0, 120)}`));
  document.getElementById("layout").classList.toggle("single", DATA.queries.length < 2);
  const nav = document.getElementById("queries");
  const scrolled = nav.scrollTop;
  nav.replaceChildren(html("h2", {}, `${DATA.queries.length} queries`), html("ol", {}, items), html("select", { "aria-label": "Query", "data-focus": "queries", onchange: (event) => openQuery(event.target.value) }, options));
  nav.scrollTop = scrolled;
}

/* Draws everything again from the state. What had the focus keeps it; where that is gone, `next` gets it. */
function refresh(next) {
  const active = document.activeElement;
  const held = active.dataset.focus;
  const caret = active.selectionStart;
  writeState();
  const query = currentQuery();
  renderQueries();
  renderAnswer(query);
  renderExamples(query);
  document.getElementById("evidence").replaceChildren(...[renderGroups(query), renderDistribution(query), renderHeatmap(query)].filter(Boolean));
  document.getElementById("tip").hidden = true;
  const find = (name) => name && document.querySelector(`[data-focus="${CSS.escape(name)}"]`);
  const field = find(held) || find(next);
  if (!field) return;
  field.focus({ preventScroll: true });
  if (caret !== undefined && caret !== null && field.setSelectionRange) field.setSelectionRange(caret, caret);
}

/* Selects the example that stands `step` after the selected one. */
function moveExample(step) {
  const entries = shownEntries(currentQuery());
  const place = entries.indexOf(currentEntry());
  const entry = entries[place < 0 ? 0 : Math.min(entries.length - 1, Math.max(0, place + step))];
  if (entry) openEntry(entry);
}

function moveQuery(step) {
  const place = DATA.queries.indexOf(currentQuery()) + step;
  if (!DATA.queries[place]) return;
  openQuery(DATA.queries[place].id);
  const shown = document.querySelector('.queries [aria-current="true"]');
  if (shown) shown.scrollIntoView({ block: "nearest", behavior: "instant" });
}

function startKeys() {
  const help = document.getElementById("help");
  const actions = {
    j: () => moveExample(1), k: () => moveExample(-1), "]": () => moveQuery(1), "[": () => moveQuery(-1),
    "/": () => document.getElementById("search").focus(), "?": () => help.showModal(), Escape: clearFilters,
  };
  document.getElementById("help-button").addEventListener("click", actions["?"]);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches('input:not([type="checkbox"]), select, textarea');
    if (help.open || event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Escape") || !Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });
}

/* A coloured token filters by itself; text that is being marked to be copied does not. */
function startTokens() {
  document.getElementById("examples").addEventListener("click", (event) => {
    const token = event.target.closest("[data-token]");
    if (token && getSelection().isCollapsed) choose({ token: token.dataset.token });
  });
}

/* Paper has no buttons: everything that is listed is printed. */
function startPrinting() {
  const details = [...document.querySelectorAll("details.trust, details.about")];
  const draw = (on) => () => { printing = on; details.forEach((each) => (each.open = on)); refresh(); };
  addEventListener("beforeprint", draw(true));
  addEventListener("afterprint", draw(false));
}

startTheme();
startCopy();
startTooltip();
startLive();
readState();
if (DATA.queries.length) {
  refresh();
  startKeys();
  startTokens();
  startPrinting();
  addEventListener("hashchange", () => { readState(); refresh(); });
} else {
  document.getElementById("answer").textContent = "This run has no query.";
}
