/* A text as turns of pieces: fill = influence of learning to predict the piece, underline = verbatim match. */
const ROLE = { s: "system", p: "prompt", a: "answer", t: "template" };
const FILL = 0.6;
const LONG = 320; // characters of a turn that is cut off until it is opened
const unclipped = new Set();
const END = "▪"; // stands for a template token that carries influence while the template is hidden

/* What each turn says; of one role if it is given. */
function turnsOf(text, role) {
  return text.turns.filter(([start]) => !role || text.roles[start] === role).map(([start, stop]) => text.pieces.slice(start, stop).join("").trim());
}

function fullText(text) {
  return turnsOf(text).join("\n");
}

function lastOf(text, role) {
  return turnsOf(text, role).pop() || "";
}

/* Returns [{role, name, turn, indices}]: the pieces of each turn. Template pieces are left out unless requested, and so
   is a system prompt that is shown elsewhere; one that carries influence (an end marker that enters the loss) stays with
   the turn before it. */
function segments(text, { scores, withTemplate, sharedSystem }) {
  const turns = new Int32Array(text.pieces.length).fill(-1);
  text.turns.forEach(([start, stop], turn) => turns.fill(turn, start, stop));
  const found = [];
  text.pieces.forEach((_, index) => {
    let turn = turns[index];
    const last = found[found.length - 1];
    const hidden = turn < 0 || (sharedSystem && text.roles[index] === "s");
    if (hidden && !withTemplate) {
      if (!scores || !scores[index] || !last) return;
      turn = last.turn;
    }
    if (last && last.turn === turn) last.indices.push(index);
    else found.push({ role: text.roles[index], name: turn < 0 ? "Template" : text.turns[turn][2], turn, indices: [index] });
  });
  return found;
}

/* Opens the turns of a text that are cut off; `key` is what it is known by. */
function clipControl(text, key, next) {
  if (!text.querySelector(".clipped")) return null;
  return html("button", { type: "button", class: "unclip", onclick: () => { unclipped.add(key); refresh(next); } }, "Show the whole text");
}

function visible(piece) {
  return piece.replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

function tokenName(piece) {
  return visible(piece.trim() || piece).toLowerCase();
}

function marked(ranges, count) {
  const flags = new Uint8Array(count);
  for (const [start, stop] of ranges || []) flags.fill(1, start, stop);
  return flags;
}

/* options: matches (ranges), scores (per piece or null), scale, format, withTemplate, sharedSystem, clipped */
function renderText(text, options) {
  const flags = marked(options.matches, text.pieces.length);
  const parts = segments(text, options);
  const rows = parts.map((part) => {
    const words = part.indices.map((index, place) => renderPiece(text, index, place === 0, flags, options));
    const long = options.clipped && sum(part.indices.map((index) => text.pieces[index].length)) > LONG;
    return html("div", { class: `turn of-${ROLE[part.role]}` }, html("span", { class: "who" }, part.name), html("span", { class: long ? "words clipped" : "words" }, words));
  });
  return html("div", { class: parts.every((part) => part.name === "Text") ? "text plain" : "text" }, rows);
}

function renderPiece(text, index, first, flags, options) {
  const score = options.scores ? options.scores[index] : null;
  let shown = text.pieces[index];
  if (first && !(score && !shown.trim())) shown = shown.trimStart();
  const classes = ["piece"];
  if (text.roles[index] === "t") classes.push("template");
  if (!score && !flags[index]) {
    return classes.length > 1 ? html("span", { class: classes.join(" ") }, shown) : document.createTextNode(shown);
  }
  // the space before a word stays bare, except inside a verbatim run, whose underline should not break
  const space = shown.trim() && !(flags[index] && index > 0 && flags[index - 1]) ? shown.match(/^\s*/)[0] : "";
  if (flags[index]) classes.push("match");
  if (text.roles[index] === "t" && !options.withTemplate) shown = END;
  if (score && !shown.trim()) shown = shown.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
  const tip = score
    ? `${options.format(score)}  learning to predict “${visible(text.pieces[index])}”` + (flags[index] ? "\nverbatim in the query" : "")
    : null;
  const style = score ? { backgroundColor: diverging(score, options.scale, FILL) } : null;
  return [space, html("span", { class: classes.join(" "), "data-tip": tip, "data-token": score ? tokenName(text.pieces[index]) : null, style }, shown.slice(space.length))];
}
