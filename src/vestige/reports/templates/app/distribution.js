/* Where the listed examples stand among all training examples. */
const WIDE = 340;

function renderDistribution(query) {
  const given = query.distribution;
  if (!given || !given.counts || !given.counts.length) return null;
  const format = queryFormat(query);
  const [low, middle, high] = [0.05, 0.5, 0.95].map((share) => quantile(given, share));
  const fine = scoreFormat(largest([low, high])); // the bulk is far smaller than the tail
  const sampled = given.sampled && given.sampled < given.count ? ` (histogram of ${grouped(given.sampled)} of them)` : "";
  return html("section", { class: "panel", "aria-labelledby": "distribution-title" },
    html("h2", { id: "distribution-title" }, "Among all training examples"),
    html("p", { class: "sub" }, html("b", {}, grouped(given.count)), ` scores${sampled}, log count. Nine in ten lie between `, html("b", {}, fine(low)), " and ", html("b", {}, fine(high)), " (shaded), half below ", html("b", {}, fine(middle)), ". Ticks: the listed examples; click a bar or a tick to filter."),
    histogram(query, given, [low, middle, high], format),
    cumulative(given));
}

/* Value below which `share` of the examples lie, read off the histogram. */
function quantile(given, share) {
  let left = share * sum(given.counts);
  for (let bin = 0; bin < given.counts.length; bin++) {
    if (left <= given.counts[bin]) {
      const inside = given.counts[bin] ? left / given.counts[bin] : 0;
      return given.edges[bin] + inside * (given.edges[bin + 1] - given.edges[bin]);
    }
    left -= given.counts[bin];
  }
  return given.edges[given.edges.length - 1];
}

function histogram(query, given, [low, middle, high], format) {
  const box = { left: 34, right: 6, top: 6, bottom: 34, height: 178 };
  const [first, last] = [given.edges[0], given.edges[given.edges.length - 1]];
  const floor = box.height - box.bottom;
  const x = (value) => box.left + ((value - first) / (last - first || 1)) * (WIDE - box.left - box.right);
  // log(count) with a half below one, so that a bin with a single example still stands above the axis
  const top = Math.log10(Math.max(...given.counts, 1) * 2);
  const y = (count) => (count > 0 ? floor - (Math.log10(count * 2) / top) * (floor - box.top) : floor);
  const parts = [svg("rect", { class: "band", x: x(low), y: box.top, width: Math.max(1, x(high) - x(low)), height: floor - box.top })];
  for (let count = 1; count <= Math.max(...given.counts); count *= 10) {
    parts.push(svg("line", { class: "rule", x1: box.left, x2: WIDE - box.right, y1: y(count), y2: y(count) }));
    parts.push(svg("text", { x: box.left - 5, y: y(count) + 3.5, "text-anchor": "end" }, count >= 1000 ? `${count / 1000}k` : String(count)));
  }
  given.counts.forEach((count, bin) => {
    if (!count) return;
    const [start, stop] = [x(given.edges[bin]), x(given.edges[bin + 1])];
    const tip = `${format(given.edges[bin])} to ${format(given.edges[bin + 1])}: ${grouped(count)} example${count === 1 ? "" : "s"}`;
    parts.push(svg("rect", { class: `bar${state.range === rangeOf(given, bin) ? " current" : ""}`, onclick: () => choose({ range: rangeOf(given, bin) }), x: start, y: y(count), width: Math.max(1, stop - start - 0.75), height: floor - y(count), "data-tip": tip }));
  });
  parts.push(svg("line", { class: "median", x1: x(middle), x2: x(middle), y1: box.top, y2: floor }));
  parts.push(svg("line", { class: "axis", x1: box.left, x2: WIDE - box.right, y1: floor, y2: floor }));
  query.ranked.forEach((entry) => parts.push(listedMark(given, entry, x(Math.min(last, Math.max(first, entry.score))), floor, format)));
  ticks(first, last, 5).forEach((mark) => parts.push(svg("text", { x: x(mark), y: box.height - 6, "text-anchor": x(mark) > WIDE - 24 ? "end" : "middle" }, format(mark))));
  const label = `Histogram of ${grouped(given.count)} scores, from ${format(given.min ?? first)} to ${format(given.max ?? last)}`;
  return svg("svg", { viewBox: `0 0 ${WIDE} ${box.height}`, role: "img", "aria-label": label }, parts);
}

/* A bin as the filter of scores has it: both ends, a little wider than the digits that are shown. */
function rangeOf(given, bin) {
  const [low, high] = [given.edges[bin], given.edges[bin + 1]];
  const digits = 4 - Math.floor(Math.log10(high - low || 1));
  const places = Math.min(20, Math.max(0, digits));
  const unit = 10 ** -places;
  return `${(low - unit).toFixed(places)} ${(high + unit).toFixed(places)}`;
}

function binOf(given, score) {
  const after = given.edges.findIndex((edge) => edge > score);
  return Math.max(0, (after < 0 ? given.counts.length : after) - 1);
}

function listedMark(given, entry, place, floor, format) {
  const chosen = state.example === entryKey(entry);
  return svg("rect", {
    class: `tick ${entry.end === "proponent" ? "positive" : "negative"}${chosen ? " current" : ""}`, "stroke-width": chosen ? 1.25 : 0,
    x: place - (chosen ? 1.5 : 0.75), y: floor + 2, width: chosen ? 3 : 1.5, height: chosen ? 11 : 8,
    onclick: () => choose({ range: rangeOf(given, binOf(given, entry.score)), example: entryKey(entry) }),
    "data-tip": `${entry.end} ${entry.rank}: ${format(entry.score)}`,
  });
}

/* Share of the sum of all positive scores that the k highest hold: do a few carry it, or everybody a little? */
function cumulative(given) {
  const points = (given.cumulative_share || []).filter(([, share]) => share !== null);
  if (points.length < 2) return null;
  const box = { left: 34, right: 6, top: 8, bottom: 20, height: 96 };
  const most = Math.log10(points[points.length - 1][0]) || 1;
  const x = (depth) => box.left + (Math.log10(depth) / most) * (WIDE - box.left - box.right);
  const y = (share) => box.height - box.bottom - Math.min(1, share) * (box.height - box.bottom - box.top);
  const parts = [0, 0.5, 1].flatMap((share) => [
    svg("line", { class: share ? "rule" : "axis", x1: box.left, x2: WIDE - box.right, y1: y(share), y2: y(share) }),
    svg("text", { x: box.left - 5, y: y(share) + 3.5, "text-anchor": "end" }, percent(share)),
  ]);
  for (let depth = 1; depth <= points[points.length - 1][0]; depth *= 10) {
    parts.push(svg("text", { x: x(depth), y: box.height - 6, "text-anchor": depth === 1 ? "start" : x(depth) > WIDE - 24 ? "end" : "middle" }, depth === 1 ? "top 1" : grouped(depth)));
  }
  parts.push(svg("polyline", { class: "curve", points: points.map(([depth, share]) => `${x(depth)},${y(share)}`).join(" ") }));
  points.forEach(([depth, share]) => parts.push(svg("circle", { cx: x(depth), cy: y(share), r: 5, fill: "transparent", "data-tip": `top ${grouped(depth)}: ${percent(share, 1)}` })));
  const known = points.filter(([depth]) => depth === 10 || depth === 100).map(([depth, share]) => `the top ${depth} carry ${percent(share)}`);
  const sentence = known.length ? `${known.join(", ")}.` : "";
  return html("figure", { style: { marginTop: "12px" } },
    html("p", { class: "sub" }, html("b", {}, "Share of all positive score"), sentence ? `: ${sentence}` : " held by the highest examples."),
    svg("svg", { viewBox: `0 0 ${WIDE} ${box.height}`, role: "img", "aria-label": `Cumulative share of positive score: ${sentence}` }, parts));
}
