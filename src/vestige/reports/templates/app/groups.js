/* Mean score by source, with its interval. */
const THIN = 10;

function renderGroups(query) {
  const groups = query.groups.filter((group) => group.mean !== null).sort((a, b) => b.mean - a.mean);
  if (!groups.length) return null;
  const ends = groups.flatMap((group) => [group.low ?? group.mean, group.high ?? group.mean, 0]);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const format = scoreFormat(largest(groups.map((group) => group.mean)));
  const thin = groups.filter((group) => group.examples < THIN);
  const rows = groups.map((group) =>
    html("tr", { class: group.examples < THIN ? "thin" : null },
      html("td", {}, group.source || "no source"),
      html("td", { class: "number" }, grouped(group.examples)),
      html("td", { class: "number" }, format(group.mean)),
      html("td", {}, interval(group, low, high, format))));
  return html("section", { class: "panel groups", "aria-labelledby": "groups-title" },
    html("h2", { id: "groups-title" }, "By source"),
    html("p", { class: "sub" }, "Mean score of all examples of a source, with its 95% interval.", thin.length ? ` Fewer than ${THIN} examples (grey): read the interval, not the mean.` : ""),
    html("div", { class: groups.length > 12 ? "scroll" : null },
      html("table", {}, html("thead", {}, html("tr", {}, ["Source", "Examples", "Mean"].map((title, place) => html("th", { scope: "col", class: place ? "number" : null }, title)), html("th", {}, html("span", { class: "hidden-text" }, "Interval")))), html("tbody", {}, rows))));
}

function interval(group, low, high, format) {
  const wide = 120;
  const x = (value) => 4 + ((value - low) / (high - low || 1)) * (wide - 8);
  const tone = group.mean > 0 ? "positive" : "negative";
  const [from, to] = [group.low ?? group.mean, group.high ?? group.mean];
  return svg("svg", { viewBox: `0 0 ${wide} 14`, role: "img", "aria-label": `${format(from)} to ${format(to)}`, "data-tip": `${format(from)} to ${format(to)}\nsum ${format(group.sum)}` },
    svg("rect", { x: 0, y: 0, width: wide, height: 14, fill: "transparent" }),
    svg("line", { class: "rule", x1: x(0), x2: x(0), y1: 0, y2: 14 }),
    svg("line", { class: tone, x1: x(from), x2: x(to), y1: 7, y2: 7, "stroke-width": 1.5 }),
    svg("circle", { class: tone, cx: x(group.mean), cy: 7, r: 2.75 }));
}
