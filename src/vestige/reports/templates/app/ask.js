/* Questions: the answer as it grows, then the rows behind it; what was asked is a run of the workspace. */
let asked = null;

function renderAsk() {
  const question = html("textarea", { rows: 2, placeholder: "Ask the model that this index was made with …", "aria-label": "Question", onkeydown: (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); event.stopPropagation(); ask(question.value); } } });
  show(
    html("div", { class: "open-head" }, html("h2", {}, `Ask ${nameOf(state.path)}`), html("span", { class: "note" }, short(lineOf(state.path).model)), actions(lineOf(state.path))),
    html("form", { class: "ask", onsubmit: (event) => { event.preventDefault(); ask(question.value); } }, question, html("button", { class: "primary", type: "submit" }, "Ask"), button("Stop", () => request("/api/stop", {}).catch(showFailure), { id: "stop", hidden: true })),
    html("div", { id: "answer", "aria-live": "polite" }),
  );
  question.focus();
  if (!asked || asked.index !== state.path) begin("");
  else drawAnswer();
}

function ask(question) {
  if (!question.trim()) return;
  if (asked && asked.question && !asked.over) showFailure(new Error("Another question is being answered. Wait for it, or stop it."));
  else begin(question.trim());
}

/* Begins a question as soon as what was begun before is over; without words it loads the model while they are typed. */
function begin(question) {
  const before = asked, mine = { index: state.path, question, stage: "Waiting for the model" };
  asked = mine;
  mine.followed = follow(mine, before).catch((error) => { mine.error = error.message; }).then(() => { mine.over = true; drawAnswer(); });
  drawAnswer();
}

/* Reads events of the question, a line of JSON each, until it is over. */
async function follow(one, before) {
  if (before) await before.followed;
  try { await request("/api/ask", { path: one.index, question: one.question }); } catch (error) {
    if (one.question) throw error; // without words: what is being answered is followed
  }
  const reader = (await fetch("/api/events")).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) Object.assign(one, JSON.parse(line));
    drawAnswer();
  }
}

function showFailure(error) {
  document.getElementById("answer").prepend(problem(error));
}

function drawAnswer() {
  const place = document.getElementById("answer");
  if (!place || !asked || asked.index !== state.path) return;
  const { question, answer, stage, sources, error, over, path } = asked;
  document.getElementById("stop").hidden = over || !question;
  const waiting = !over && html("p", { class: "stage" }, stage || "", " …");
  const ready = over && !question && !error && html("p", { class: "note" }, "The model is in memory. Answers take seconds.");
  const bubbles = question && renderTurns([["question", question], ...(answer === undefined ? [] : [["answer", answer || "(nothing)"]])]);
  const list = (end, title) => sources[end].length > 0 && [html("h3", {}, title), html("ol", {}, sources[end].map(sourceCard))];
  const found = sources && [
    html("div", { class: "conclusion" }, sources.conclusion.map((sentence, place) => html(place ? "p" : "h2", {}, sentence))),
    html("p", { class: "asked-run" }, html("a", { href: url("/page", { path }) }, "Open the report of this question"), html("span", { class: "note" }, ` ${path}`)),
    html("div", { class: "sources" }, html("section", {}, list("proponents", "Pull the model towards the answer")), html("section", {}, list("opponents", "Pull it away"))),
  ];
  place.replaceChildren(...[bubbles, waiting, error && problem(error), ready, found].flat(Infinity).filter(Boolean));
}

function sourceCard(row) {
  const turns = row.turns.length ? row.turns : [["text", row.text]];
  return html("li", { class: "card" }, html("div", { class: "pick" }, html("span", { class: `score ${row.score < 0 ? "opponent" : "proponent"}`, "data-tip": String(row.score) }, row.strength === null ? "" : tidy(row.strength.toFixed(0)))),
    html("div", {}, renderTurns(turns.map(([role, text]) => [role, text.slice(0, 600)])), html("p", { class: "card-facts" }, html("span", {}, row.example_id), row.source && html("span", {}, row.source))));
}
