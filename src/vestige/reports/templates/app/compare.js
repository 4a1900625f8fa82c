/* Another run of the same data and queries beside this one: rank changes and overlap. */
const SIDE = 20;

function otherRanking(query) {
  return DATA.other ? DATA.other.queries[query.id] || null : null;
}

/* The entry of the other run with the same row at the same end. */
function findElsewhere(entry, query) {
  return otherRanking(query).ranked.find((each) => each.end === entry.end && each.row === entry.row);
}

function rankElsewhere(entry, query) {
  const found = findElsewhere(entry, query);
  return `${DATA.other.names[1]}: ${found ? `#${found.rank}` : "not listed"}`;
}

function otherAnswer(query) {
  const other = otherRanking(query);
  if (!other || !other.text) return null;
  return html("p", { class: "other-answer" }, html("b", {}, `${DATA.other.names[1]} answers: `), lastOf(other.text, "a") || "nothing");
}

function renderComparison(query) {
  if (!DATA.other) return null;
  const { names, compared, queries } = DATA.other;
  const other = otherRanking(query);
  if (!other) return html("p", { class: "comparison" }, `${names[1]} did not rank this query.`);
  const shared = Object.values(queries).map((each) => each.shared);
  const mean = shared.length > 1 ? `, on average ${(sum(shared) / shared.length).toFixed(1)}` : "";
  const correlation = other.correlation === null ? "" : `. Rank correlation of all examples: ${tidy(other.correlation.toFixed(2))}`;
  return html("div", { class: "comparison" },
    html("span", {}, html("b", {}, `${names[0]} and ${names[1]}`), ` share ${other.shared} of the first ${compared}${mean}${correlation}.`),
    segmented("Layout", [["list", "List"], ["sides", "Side by side"]], state.view, (view) => choose({ view })));
}

function renderSides(end, title, query) {
  const other = otherRanking(query);
  const lines = (entries, others, own) => entries.filter((entry) => entry.end === end).slice(0, SIDE)
    .map((entry) => sideLine(entry, others.find((each) => each.end === end && each.row === entry.row), own));
  const column = (name, rows) => html("section", { "aria-label": `${title} of ${name}` }, html("h3", {}, name), html("ol", {}, rows));
  return html("section", { "aria-label": title },
    html("div", { class: "list-head" }, html("h2", {}, title)),
    html("div", { class: "sides" }, column(DATA.other.names[0], lines(shownEntries(query), other.ranked, true)), column(DATA.other.names[1], lines(shownEntries(other, OF_EXAMPLES), query.ranked, false))));
}

/* One example of one run: its rank, how far it moved against the other run, and its words. */
function sideLine(entry, elsewhere, own) {
  const example = exampleOf(entry.row);
  const moved = elsewhere ? elsewhere.rank - entry.rank : null;
  const [mark, name] = moved === null ? ["only here", "new"] : moved === 0 ? ["=", "same"] : moved > 0 ? [`▲ ${moved}`, "up"] : [`▼ ${-moved}`, "down"];
  const words = lastOf(example.text, "a") || fullText(example.text);
  const id = own ? exampleLink(entry, example.id) : html("span", { class: "id" }, example.id);
  return html("li", { class: `side ${entry.end}`, "data-tip": `${lastOf(example.text, "p")}\n${words}`.trim().slice(0, 400) },
    html("span", { class: "rank" }, `#${entry.rank}`),
    html("span", { class: "what" }, id, " ", html("span", { class: "words" }, words.slice(0, 200))),
    html("span", { class: `moved ${name}`, "aria-label": elsewhere ? `rank ${elsewhere.rank} in the other run` : "not listed in the other run" }, mark));
}
