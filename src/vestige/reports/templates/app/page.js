/* The page: queries, filters, and what happens when something is chosen. */
function title(query) {
  return turnsOf(query.text, "p").join(" · ") || turnsOf(query.text, "a").join(" · ") || query.id;
}

function renderQueries() {
  const choose = (id) => { state.query = id; state.example = ""; expanded.clear(); refresh(); };
  const buttons = DATA.queries.map((query) =>
    html("li", {}, html("button", { type: "button", "aria-current": query.id === state.query ? "true" : null, "data-focus": `query ${query.id}`, onclick: () => choose(query.id) }, html("span", {}, title(query)))));
  const options = DATA.queries.map((query, place) => html("option", { value: query.id, selected: query.id === state.query }, `${place + 1}. ${title(query).slice(0, 120)}`));
  document.getElementById("layout").classList.toggle("single", DATA.queries.length < 2);
  const nav = document.getElementById("queries");
  const scrolled = nav.scrollTop;
  nav.replaceChildren(html("h2", {}, `${DATA.queries.length} queries`), html("ol", {}, buttons), html("select", { "aria-label": "Query", "data-focus": "queries", onchange: (event) => choose(event.target.value) }, options));
  nav.scrollTop = scrolled;
}

function renderFilters(query) {
  const sources = [...new Set(query.ranked.map((entry) => DATA.examples[entry.row].source).filter(Boolean))].sort();
  const set = (name) => (event) => { state[name] = event.target.value; refresh(); };
  return html("div", { class: "filters", role: "search" },
    segmented("Which end", [["both", "Both"], ["proponent", "Proponents"], ["opponent", "Opponents"]], state.end, (end) => { state.end = end; refresh(); }),
    sources.length ? html("label", {}, "Source", html("select", { "data-focus": "source", onchange: set("source") }, html("option", { value: "" }, "all sources"), sources.map((source) => html("option", { value: source, selected: source === state.source }, source)))) : null,
    html("label", { class: "grow" }, "Text contains", html("input", { type: "search", "data-focus": "text", value: state.text, oninput: set("text") })),
    html("label", { class: "narrow" }, "Least |score|", html("input", { type: "text", inputmode: "decimal", "data-focus": "min", value: state.min, oninput: set("min") })));
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
  document.getElementById("evidence").replaceChildren(...[renderDistribution(query), renderHeatmap(query), renderGroups(query)].filter(Boolean));
  document.getElementById("tip").hidden = true;
  const find = (name) => name && document.querySelector(`[data-focus="${CSS.escape(name)}"]`);
  const field = find(held) || find(next);
  if (!field) return;
  field.focus({ preventScroll: true });
  if (caret !== undefined && caret !== null) field.setSelectionRange(caret, caret);
}

/* Paper has no buttons: everything that is listed is printed. */
function startPrinting() {
  const draw = (on) => () => { printing = on; refresh(); };
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
  startPrinting();
  addEventListener("hashchange", () => { readState(); refresh(); });
} else {
  document.getElementById("answer").textContent = "This run has no query.";
}
