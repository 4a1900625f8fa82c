/* A text as pieces: fill = influence of learning to predict the piece, underline = verbatim match. */
const ROLE = { p: ["prompt", "Prompt"], a: ["answer", "Answer"], t: ["template", "Template"] };
const FILL = 0.6;

/* Returns [{role, indices}]: neighbouring pieces of one role. Template pieces are left out unless asked for; one that
   carries influence (an end marker that enters the loss) stays with the text before it. */
function segments(text, scores, withTemplate) {
  const found = [];
  let open = false;
  text.pieces.forEach((_, index) => {
    let role = text.roles[index];
    const last = found[found.length - 1];
    if (role === "t" && !withTemplate) {
      if (!scores || !scores[index] || !last) return void (open = false);
      role = last.role;
    }
    if (last && last.role === role && (open || role !== "p")) last.indices.push(index);
    else found.push({ role, indices: [index] });
    open = true;
  });
  return found;
}

function marked(ranges, count) {
  const flags = new Uint8Array(count);
  for (const [start, stop] of ranges || []) flags.fill(1, start, stop);
  return flags;
}

/* options: matches (ranges), scores (per piece or null), scale, format, withTemplate */
function renderText(text, options) {
  const flags = marked(options.matches, text.pieces.length);
  const parts = segments(text, options.scores, options.withTemplate);
  const plain = parts.every((part) => part.role === "a");
  const rows = parts.map((part) => {
    const [name, label] = ROLE[part.role];
    const words = part.indices.map((index, place) => renderPiece(text, index, place === 0, flags, options));
    return html("div", { class: `segment of-${name}` }, html("span", { class: "who" }, label), html("span", { class: "words" }, words));
  });
  return html("div", { class: plain ? "text plain" : "text" }, rows);
}

function renderPiece(text, index, first, flags, options) {
  const score = options.scores ? options.scores[index] : null;
  let shown = text.pieces[index];
  if (first) shown = shown.trimStart();
  const classes = ["piece"];
  if (text.roles[index] === "t") classes.push("template");
  if (!score && !flags[index]) {
    return classes.length > 1 ? html("span", { class: classes.join(" ") }, shown) : document.createTextNode(shown);
  }
  // the space before a word stays bare, except inside a verbatim run, whose underline should not break
  const space = shown.trim() && !(flags[index] && index > 0 && flags[index - 1]) ? shown.match(/^\s*/)[0] : "";
  if (flags[index]) classes.push("match");
  if (score && !shown.trim()) shown = shown.replace(/\n/g, "↵\n") || "␣";
  const tip = score
    ? `${options.format(score)}  learning to predict “${text.pieces[index].trim() || "white space"}”` + (flags[index] ? "\nverbatim in the query" : "")
    : null;
  const style = score ? { backgroundColor: diverging(score, options.scale, FILL) } : null;
  return [space, html("span", { class: classes.join(" "), "data-tip": tip, style }, shown.slice(space.length))];
}
