/* The filters, and the ranked training examples of the query. */
const FIRST_SHOWN = 6;
const HUB_SHARE = 0.3;
const HUB_QUERIES = 4;
const ENDS = [
  ["proponent", "Proponents", DATA.causal ? "pull towards the answer" : "highest scores"],
  ["opponent", "Opponents", DATA.causal ? "pull away from it" : "lowest scores"],
];
const CLEAR_LEAD = 1.1;
const expanded = new Set();
let withTemplate = false;
let printing = false;

/* One scale per query: the 98th percentile of token scores, so that one extreme token does not bleach the rest. */
function tokenScale(query) {
  const sizes = query.ranked.flatMap((entry) => entry.tokens || []).map(Math.abs).filter((size) => size > 0).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] : 0;
}

function queryFormat(query) {
  return scoreFormat(largest(query.ranked.map((entry) => entry.score)));
}

function renderExamples(query) {
  const entries = shownEntries(query);
  const context = { query, format: queryFormat(query), scale: tokenScale(query) };
  const ends = ENDS.filter(([end]) => state.end === "both" || state.end === end);
  const blocks = ends.map(([end, title, note], place) => state.view === "sides" && otherRanking(query)
    ? renderSides(end, title, query)
    : renderEnd(end, title, note, entries.filter((entry) => entry.end === end), context, place === 0));
  document.getElementById("status").textContent = `${entries.length} of ${query.ranked.length} listed examples shown`;
  const alone = DATA.system.examples !== null && DATA.system.examples !== DATA.system.queries && !withTemplate;
  document.getElementById("examples").replaceChildren(...[
    renderFilters(query), renderChips(), renderComparison(query), alone ? systemPrompt(DATA.system.examples, "all examples") : null,
    ...blocks, renderTools(entries),
  ].filter(Boolean));
}

function renderFilters(query) {
  const met = query.ranked.map((entry) => exampleOf(entry.row).source);
  const sources = met.some(Boolean) ? [...new Set(met.map((source) => source || DATA.noSource))].sort() : [];
  const field = (name, label, more) => html("input", { "aria-label": label, placeholder: label, "data-focus": name, value: state[name], oninput: (event) => choose({ [name]: event.target.value }), ...more });
  const options = sources.map((source) => html("option", { value: source, selected: source === state.source }, source));
  return html("div", { class: "filters", role: "search" },
    segmented("Which end", [["both", "Both"], ...ENDS], state.end, (end) => choose({ end })),
    field("text", "Search texts", { type: "search", class: "grow", id: "search" }),
    sources.length ? html("select", { "aria-label": "Source", "data-focus": "source", onchange: (event) => choose({ source: event.target.value }) }, html("option", { value: "" }, "all sources"), options) : null,
    field("strength", "Least strength", { type: "text", inputmode: "numeric", class: "narrow" }));
}

/* What is filtered by, each with the way to clear it. */
function renderChips() {
  const format = queryFormat(currentQuery());
  const words = { source: (value) => value, min: (value) => `|score| ≥ ${value}`, cell: (value) => `acts in ${value}`, strength: (value) => `strength ≥ ${value}`, range: (value) => `score ${value.split(" ").map((end) => format(Number(end))).join(" to ")}`, token: (value) => `token “${value}”` };
  const chips = Object.entries(words).filter(([name]) => state[name]).map(([name, say]) =>
    html("button", { type: "button", class: "chip", "data-focus": `chip ${name}`, "aria-label": `Clear the filter ${say(state[name])}`, onclick: () => choose({ [name]: "" }, "text") }, say(state[name]), html("span", { "aria-hidden": "true" }, " ×")));
  return chips.length ? html("p", { class: "chips" }, chips) : null;
}

function renderEnd(end, title, note, entries, context, first) {
  const total = context.query.ranked.filter((entry) => entry.end === end).length;
  const all = printing || expanded.has(end) || entries.length <= FIRST_SHOWN + 1;
  const cards = entries.map((entry, place) => (all || place < FIRST_SHOWN ? renderCard(entry, context) : null));
  const more = all ? null : html("button", { type: "button", class: "more", "data-focus": `more ${end}`, onclick: () => { expanded.add(end); refresh(entryKey(entries[FIRST_SHOWN])); } }, `Show all ${entries.length}`);
  const count = entries.length === total ? "" : ` · ${entries.length} of ${total}`;
  return html("section", { "aria-label": title },
    html("div", { class: "list-head" }, html("h2", {}, title, " ", html("span", { class: "note" }, `${note}${count}`)), first ? renderLegend(context) : null),
    entries.length ? html("ol", {}, cards) : html("p", { class: "empty" }, total ? "None passes the filters." : "None is listed for this query."),
    more);
}

function strengthOf(entry, format) {
  return entry.strength === null ? format(entry.score) : tidy(entry.strength.toFixed(Math.abs(entry.strength) < 1 ? 1 : 0));
}

function renderCard(entry, context) {
  const example = exampleOf(entry.row);
  const key = entryKey(entry);
  const selected = state.example === key;
  const pick = html("button", {
    type: "button", class: "pick", "aria-pressed": String(selected), "data-focus": key, "data-tip": scoreTip(entry, context.format),
    "aria-label": `${entry.end} ${entry.rank}, strength ${strengthOf(entry, context.format)}, score ${context.format(entry.score)}: show where it acts`,
    onclick: () => choose({ example: selected ? "" : key }),
  },
    html("span", { class: "rank" }, `#${entry.rank}`),
    html("span", { class: "score" }, strengthOf(entry, context.format)),
    html("span", { class: "meter" }, html("i", { style: { width: `${Math.min(100, Math.abs(entry.strength ?? 0))}%` } })));
  const text = renderText(example.text, { matches: entry.match, scores: entry.tokens, scale: context.scale, format: context.format, withTemplate, sharedSystem: DATA.system.examples !== null, clipped: !selected && !printing && !unclipped.has(entry.row) });
  return html("li", { class: `card ${entry.end}${selected ? " selected" : ""}` }, pick,
    html("div", {}, text, clipControl(text, entry.row, key), cardFacts(entry, example, context), selected ? strongest(entry, example, context) : null));
}

function scoreTip(entry, format) {
  const place = entry.percentile === null ? "" : `\npercentile ${percentile(entry.percentile)} of all training examples`;
  return `score ${format(entry.score)}${place}`;
}

function cardFacts(entry, example, context) {
  const { conclusion } = context.query;
  const facts = [html("span", { class: "id" }, example.id)];
  const add = (words, name) => facts.push(html("span", { class: name }, words));
  if (example.source) add(example.source);
  if (entry.end === "proponent" && entry.rank === 1 && conclusion.lead >= CLEAR_LEAD) add(`${conclusion.lead.toFixed(1)} times the next`, "flag");
  conclusion.conflicts.forEach((pair) => facts.push(conflictBadge(pair, entry, example, context)));
  if (example.duplicates > 1) add(`${example.duplicates} identical texts`, "flag");
  if (entry.overlap > 0) add(`${percent(entry.overlap)} of the answer verbatim`, entry.overlap >= 0.5 ? "flag" : "");
  if (example.hub >= HUB_SHARE && DATA.queries.length >= HUB_QUERIES) add(`hub: in the top 10 of ${percent(example.hub)} of queries`, "hub");
  if (otherRanking(context.query)) add(rankElsewhere(entry, context.query), "elsewhere");
  if (state.example === entryKey(entry) || printing) {
    add(`score ${context.format(entry.score)}`);
    if (entry.percentile !== null) add(`percentile ${percentile(entry.percentile)}`);
    if (example.label) add(`label ${example.label}`);
    if (example.length) add(`${example.length} tokens`);
  }
  return html("p", { class: "card-facts" }, facts);
}

/* Says with which listed example this one is in conflict, and opens it. */
function conflictBadge(pair, entry, example, { query }) {
  if (pair[entry.end === "proponent" ? 0 : 1] !== example.id) return null;
  const [other, end] = entry.end === "proponent" ? [pair[1], "opponent"] : [pair[0], "proponent"];
  const rival = query.ranked.find((each) => each.end === end && exampleOf(each.row).id === other);
  const words = `conflict: ${other} answers differently`;
  return rival ? html("button", { type: "button", class: "conflict", "data-focus": `conflict ${entryKey(entry)} ${other}`, onclick: () => openEntry(rival) }, words) : html("span", { class: "conflict" }, words);
}

/* The tokens that carry most of the score, in words: what a highlight shows, readable without a mouse and on paper. */
function strongest(entry, example, context) {
  if (!entry.tokens) return null;
  const order = entry.tokens.map((score, index) => [score, index]).filter(([score]) => score).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 5);
  const parts = order.map(([score, index]) => {
    const piece = example.text.pieces[index];
    return [html("button", { type: "button", class: "token", "data-tip": "Only examples with this token", onclick: () => choose({ token: tokenName(piece) }) }, visible(piece)), ` ${context.format(score)}  `];
  });
  return html("p", { class: "strongest" }, "Strongest tokens: ", parts, ` · all tokens sum to ${context.format(sum(entry.tokens))}`);
}

function renderLegend(context) {
  const items = [], { query } = context;
  if (context.scale > 0) {
    const ends = `${context.format(-context.scale)} (orange) to ${context.format(context.scale)} (blue)`;
    items.push(html("span", { "data-tip": ends }, html("span", { class: "ramp", role: "img", "aria-label": ends }), "token influence"));
  } else if (!DATA.missing.includes("tokens")) {
    items.push(html("span", { "data-tip": "No token scores in this run: vestige attribute --tokens adds them" }, html("code", {}, "--tokens"), " colours words"));
  }
  items.push(html("span", {}, html("span", { class: "piece match" }, "underline"), " in the query"));
  if ([query.text, ...query.ranked.map((entry) => exampleOf(entry.row).text)].some((text) => text.roles.includes("t"))) {
    items.push(html("label", {}, html("input", { type: "checkbox", "data-focus": "template", checked: withTemplate, onchange: (event) => { withTemplate = event.target.checked; refresh(); } }), " template"));
  }
  return html("p", { class: "legend" }, items);
}
