/* What each source has to do with the answer: its share of the positive influence over its share of the rows. */
const THIN = 10;

/* Adds up some queries: [{source, examples, rows, influence, lift, half, thin}], thin ones last, then the highest lift first.
   Every query counts alike, however large its scores are; `half` is half of the 95% interval. */
function addLifts(queries) {
  const mean = (values) => sum(values) / values.length;
  return queries[0].lift.map(({ source, examples, rows }) => {
    const parts = queries.map((query) => query.lift.find((each) => each.source === source));
    const influence = mean(parts.map((part) => part.influence));
    const halves = parts.map((part) => part.half).filter((half) => half !== null);
    return { source, examples, rows, influence, lift: influence / rows, half: halves.length ? mean(halves) : null, thin: parts.every((part) => part.thin) };
  }).sort((a, b) => a.thin - b.thin || b.lift - a.lift);
}

function renderGroups(query) {
  const queries = chosenQueries().filter((each) => each.groups.length);
  if (!queries.length) return null;
  const several = state.with ? `Over the ${queries.length} chosen ${queries.length === 1 ? "query" : "queries"}` : "For this query";
  const clear = state.with ? html("button", { type: "button", class: "chip", "data-focus": "chip with", onclick: () => choose({ with: "" }) }, "this query only", html("span", { "aria-hidden": "true" }, " ×")) : null;
  const more = DATA.queries.length > 1 && !state.with ? " Tick queries in their list to add them up." : "";
  const known = queries.filter((each) => each.lift.length);
  return html("section", { class: "panel groups", "aria-labelledby": "groups-title" },
    html("div", { class: "panel-head" }, html("h2", { id: "groups-title" }, "By source"), clear),
    known.length ? describeLifts(addLifts(known), several, more) : null,
    meanTable(query, known.length > 0));
}

function describeLifts(lifts, several, more) {
  const [first] = lifts;
  const words = first.thin || first.lift <= 1 ? "no source holds much more of the influence than of the rows." : `${first.source} holds ${percent(first.influence)} of the positive influence with ${percent(first.rows)} of the rows.`;
  const carried = lifts.filter((each) => each.thin && each.lift > Math.max(1, first.thin ? 1 : first.lift));
  const grey = carried.length ? ` Grey: one or a few rows carry the ${percent(carried[0].influence)} of ${carried[0].source}.` : "";
  return [html("p", { class: "sub" }, html("b", {}, several), ` ${words}${grey}${more}`), liftTable(lifts)];
}

function liftTable(lifts) {
  const most = Math.max(2, ...lifts.map((each) => each.lift));
  const rows = lifts.map((each) =>
    html("tr", { class: each.thin ? "thin" : null, "aria-current": each.source === state.source ? "true" : null },
      html("td", {}, sourceButton(each.source)),
      html("td", { class: "number" }, percent(each.rows)),
      html("td", { class: "number" }, percent(each.influence)),
      html("td", { class: "number lift", "data-tip": liftTip(each) }, html("span", { class: "bar" }, html("i", { style: { width: `${(100 * each.lift) / most}%` } })), `${each.lift.toFixed(1)}×`)));
  return sourceTable(["Source", "Rows", "Influence", "Lift"], rows);
}

function liftTip(each) {
  const ends = each.half === null ? "" : `\n95% interval of the lift: ${Math.max(0, each.lift - each.half).toFixed(1)} to ${Math.min(1 / each.rows, each.lift + each.half).toFixed(1)}`;
  return `${grouped(each.examples)} rows, ${percent(each.rows, 1)} of the data,\nhold ${percent(each.influence, 1)} of the positive influence${ends}${each.thin ? "\nthin: one or a few rows carry it" : ""}`;
}

function sourceButton(source) {
  return html("button", { type: "button", class: "link", "data-focus": `source ${source}`, onclick: () => choose({ source: state.source === source ? "" : source }) }, source);
}

function sourceTable(titles, rows) {
  const heads = titles.map((title, place) => html("th", { scope: "col", class: place ? "number" : null }, title));
  return html("div", { class: rows.length > 12 ? "scroll" : null }, html("table", {}, html("thead", {}, html("tr", {}, heads)), html("tbody", {}, rows)));
}

/* The mean score of every example of a source, with its interval. */
function meanTable(query, closed) {
  const groups = query.groups.filter((group) => group.mean !== null).sort((a, b) => b.mean - a.mean);
  const ends = groups.flatMap((group) => [group.low ?? group.mean, group.high ?? group.mean, 0]);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const format = scoreFormat(largest(groups.map((group) => group.mean)));
  const thin = groups.some((group) => group.examples < THIN);
  const rows = groups.map((group) =>
    html("tr", { class: group.examples < THIN ? "thin" : null },
      html("td", {}, group.source),
      html("td", { class: "number" }, grouped(group.examples)),
      html("td", { class: "number" }, format(group.mean)),
      html("td", {}, interval(group, low, high, format))));
  return html("details", { open: !closed },
    html("summary", {}, "Mean scores"),
    html("p", { class: "sub" }, "Mean score of all examples of a source, with its 95% interval.", thin ? ` Fewer than ${THIN} examples (grey): read the interval, not the mean.` : ""),
    sourceTable(["Source", "Rows", "Mean", "Interval"], rows));
}

function interval(group, low, high, format) {
  const wide = 90;
  const x = (value) => 4 + ((value - low) / (high - low || 1)) * (wide - 8);
  const tone = group.mean > 0 ? "positive" : "negative";
  const [from, to] = [group.low ?? group.mean, group.high ?? group.mean];
  return svg("svg", { viewBox: `0 0 ${wide} 14`, role: "img", "aria-label": `${format(from)} to ${format(to)}`, "data-tip": `${format(from)} to ${format(to)}\nsum ${format(group.sum)}` },
    svg("rect", { x: 0, y: 0, width: wide, height: 14, fill: "transparent" }),
    svg("line", { class: "rule", x1: x(0), x2: x(0), y1: 0, y2: 14 }),
    svg("line", { class: tone, x1: x(from), x2: x(to), y1: 7, y2: 7, "stroke-width": 1.5 }),
    svg("circle", { class: tone, cx: x(group.mean), cy: 7, r: 2.75 }));
}
