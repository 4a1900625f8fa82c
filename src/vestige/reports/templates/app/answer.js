/* The question, the answer, and what the numbers say of it in words. */
function renderAnswer(query) {
  const entry = currentEntry();
  const shared = DATA.system.queries !== null;
  const text = renderText(query.text, { matches: entry ? entry.answerMatch : [], scores: null, withTemplate, sharedSystem: shared, clipped: !printing && !unclipped.has(query.id) });
  const both = shared && DATA.system.queries === DATA.system.examples;
  const system = shared && !withTemplate ? systemPrompt(DATA.system.queries, both ? "all queries and examples" : "all queries") : null;
  document.getElementById("answer").replaceChildren(...[
    text, clipControl(text, query.id, "text"), otherAnswer(query), renderConclusion(query), renderProofs(query), html("div", { class: "answer-facts" }, answerFacts(query, entry), system),
  ].filter(Boolean));
}

/* A system prompt that many texts share is shown once, and closed. */
function systemPrompt(words, owners) {
  return html("details", { class: "system" }, html("summary", {}, `System prompt of ${owners}`), html("p", { class: "words" }, words));
}

function answerFacts(query, entry) {
  const facts = [query.generated ? "Answer by the model" : givenAnswer(query)];
  if (query.explained) facts.push(`Explained: ${query.explained}`);
  if (query.loss !== null) facts.push(`Loss ${query.loss.toFixed(3)}`);
  facts.push(`Query ${query.id}`);
  if (entry) {
    const share = entry.overlap === null ? "" : `: ${percent(entry.overlap)} of the answer’s words`;
    const place = `verbatim in ${entry.end} ${entry.rank}`;
    facts.push(entry.answerMatch.length ? `Underlined: ${place}${share}` : `Nothing ${place}`);
  }
  return facts.map((fact) => html("span", {}, fact));
}

function givenAnswer(query) {
  if (query.text.turns.some(([, , name]) => name === "Text")) return "A text: scores are for all of it";
  return query.text.roles.includes("a") ? "Answer given with the query" : "No answer: scores are for the question alone";
}

function renderConclusion(query) {
  const [headline, ...others] = query.conclusion.sentences;
  if (!headline) return null;
  return html("div", { class: `conclusion of-${query.conclusion.kind}` },
    html("h2", {}, linked(headline, query)), others.map((sentence) => html("p", {}, linked(sentence, query))));
}

/* What moved the model, what states the answer, whether it is memorized: none of the three follows from another. */
function renderProofs(query) {
  if (!query.proofs) return null;
  const { sentences, spans } = query.proofs;
  const facts = sentences.map(([name, sentence]) => [html("dt", {}, name), html("dd", {}, linked(sentence, query))]);
  const rows = (span) => span.listed.map(([id, before, after]) => html("p", {}, html("b", {}, linked(id, query)), ` …${before}`, html("mark", {}, span.text), `${after}…`));
  const items = spans.map((span) => html("li", {}, `${span.rows} row${span.rows === 1 ? "" : "s"}, ${span.occurrences} times`, rows(span)));
  const all = items.length ? html("details", {}, html("summary", {}, "Parts of the answer in the training data, the rarest first"), html("ol", {}, items)) : null;
  return html("div", { class: "proofs" }, html("dl", {}, facts), all);
}

/* A sentence in which the ids of listed examples open them. An id that could be a number or a word of the sentence does not. */
function linked(sentence, query) {
  const entries = new Map(query.ranked.map((entry) => [exampleOf(entry.row).id, entry]));
  return sentence.split(/([^\s,;:()]*[^\s,;:().])/).map((part) => {
    const telling = part.length > 2 && /\p{L}/u.test(part) && /[^\p{L}]/u.test(part);
    return telling && entries.has(part) ? exampleLink(entries.get(part), part) : part;
  });
}

function exampleLink(entry, words) {
  return html("button", { type: "button", class: "link", onclick: () => openEntry(entry) }, words);
}

function openEntry(entry) {
  const hidden = !shownEntries(currentQuery()).includes(entry);
  if (hidden) for (const name of ["end", ...Object.keys(FILTERS)]) state[name] = DEFAULTS[name];
  if (entry.rank > FIRST_SHOWN) expanded.add(entry.end);
  choose({ example: entryKey(entry), view: "list" });
  const card = document.querySelector(".card.selected");
  if (card) card.scrollIntoView({ block: "nearest", behavior: "instant" });
}
