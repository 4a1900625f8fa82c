/* The training data behind a result: searched for words, a page at a time, each row with its score where known. */
function searchControls(found) {
  const changed = (changes) => { keep({ start: "0", ...changes }); drawRows(); };
  let waiting = 0;
  const words = html("input", { type: "search", placeholder: "Search all rows …", "aria-label": "Search the training data", value: state.words, oninput: (event) => { clearTimeout(waiting); waiting = setTimeout(() => changed({ words: event.target.value }), 200); } });
  const option = (chosen) => ([value, text]) => html("option", { value, selected: value === chosen }, text);
  const select = (name, options, label) => html("select", { "aria-label": label, onchange: (event) => changed({ [name]: event.target.value }) }, options.map(option(state[name])));
  const queries = found.queries.map(({ id, text }) => [id, `${id}: ${text.slice(0, 80)}`]);
  const scored = found.scores && [select("query", queries, "Query"), select("order", [["row", "order of the data"], ["high", "highest score first"], ["low", "lowest score first"]], "Order")];
  const note = !found.scores && found.queries.length ? html("span", { class: "note" }, "The run keeps no scores of all rows; --dense does.") : null;
  return html("div", { class: "list-tools" }, words, scored, note);
}

async function renderSearch() {
  const found = await readRows();
  if (!found) return;
  show(html("div", { class: "open-head" }, html("h2", {}, nameOf(state.path)), actions(lineOf(state.path))), searchControls(found), html("div", { id: "rows" }));
  showRows(found);
}

async function readRows() {
  const { view, path, words, query, order, start } = state, asked = { view, path, words, query, order, start };
  try {
    const found = await request(url("/api/rows", { path, words, order, start, ...(query && { query }) }));
    // The answer to an earlier choice may come after that to a later one.
    return Object.entries(asked).every(([name, value]) => state[name] === value) ? found : null;
  } catch (error) { show(problem(error)); return null; }
}

async function drawRows() {
  const found = await readRows();
  if (found) showRows(found);
}

function showRows(found) {
  const place = Math.max(0, found.queries.findIndex(({ id }) => id === state.query));
  const every = found.scores ? found.scores.map((scores) => scores[place]) : [];
  const format = scoreFormat(largest(every));
  const rows = found.rows.map((row, number) => {
    const tip = found.scores && found.queries.map(({ id }, column) => `${id}  ${format(found.scores[number][column])}`).slice(0, 30).join("\n");
    const score = found.scores ? html("span", { class: `score ${every[number] < 0 ? "opponent" : "proponent"}` , "data-tip": tip }, format(every[number])) : null;
    return html("li", { class: "card" }, html("div", { class: "pick" }, html("span", { class: "rank" }, `row ${grouped(row.row)}`), score),
      html("div", {}, renderTurns(row.turns), html("p", { class: "card-facts" }, html("span", {}, row.id), row.source && html("span", {}, row.source))));
  });
  const last = Math.min(found.start + found.page, found.found);
  const turn = (text, start) => button(text, () => { keep({ start: String(start) }); drawRows(); main.scrollIntoView(); }, { disabled: start < 0 || start >= found.found });
  const of = state.words ? `${grouped(found.found)} that hold these words, of ${grouped(found.total)} rows` : `${grouped(found.total)} rows`;
  const count = found.found ? `${grouped(found.start + 1)}–${grouped(last)} of ${of}` : "No row holds these words";
  const pager = html("p", { class: "pager" }, `${count} `, turn("Previous", found.start - found.page), turn("Next", found.start + found.page));
  document.getElementById("rows").replaceChildren(pager, html("ol", {}, rows));
  document.getElementById("status").textContent = count;
}

/* The words that were searched for are marked. */
function renderTurns(turns) {
  return html("div", { class: "text" }, turns.map(([role, text]) => html("div", { class: `turn of-${role === "assistant" || role === "completion" ? "answer" : role}` }, html("span", { class: "who" }, role), html("span", { class: "words" }, markWords(text)))));
}

function markWords(text) {
  const wanted = state.view === "rows" ? state.words.trim().toLowerCase() : "", parts = [];
  const lower = text.toLowerCase();
  if (!wanted || lower.length !== text.length) return text;
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
    parts.push(text.slice(from, at), html("mark", {}, text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  return [...parts, text.slice(from)];
}
