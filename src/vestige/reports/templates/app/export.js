/* What is shown, taken along: JSONL and CSV to read, ids to select or drop by; commands read all three. */
function shownRecords(entries) {
  return entries.map((entry) => {
    const example = DATA.examples[entry.row];
    return {
      query_id: state.query, end: entry.end, rank: entry.rank, example_id: example.id, row: example.row, strength: entry.strength, score: entry.score,
      percentile: entry.percentile, source: example.source, label: example.label, length: example.length, duplicates: example.duplicates,
      verbatim: entry.overlap, ...Object.fromEntries([["system", "s"], ["prompt", "p"], ["answer", "a"]].map(([name, role]) => [name, turnsOf(example.text, role).join("\n")])),
    };
  });
}

/* A spreadsheet runs a cell that starts with = + - or @; training text is data, so such a text gets an apostrophe. */
function csvCell(value) {
  if (value === null || value === undefined) return "";
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

function asCsv(records) {
  if (!records.length) return "";
  const names = Object.keys(records[0]);
  return [names.join(","), ...records.map((record) => names.map((name) => csvCell(record[name])).join(","))].join("\n") + "\n";
}

function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  html("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function renderTools(entries) {
  const name = `${DATA.run}-${state.query}`.replace(/[^\w.-]+/g, "_");
  const offer = (label, tip, make) => html("button", { type: "button", "data-tip": tip, disabled: !entries.length, onclick: make }, label);
  return html("div", { class: "tools" },
    `Take along the ${entries.length} shown:`,
    offer("JSONL", "One JSON object per example", () => save(`${name}.jsonl`, shownRecords(entries).map((record) => JSON.stringify(record) + "\n").join(""), "application/x-ndjson")),
    offer("CSV", "For a spreadsheet", () => save(`${name}.csv`, asCsv(shownRecords(entries)), "text/csv")),
    offer("Row list", "Ids of the examples, one per line, for `vestige data clean --flagged` and the like", () => save(`${name}-rows.txt`, [...new Set(entries.map((entry) => DATA.examples[entry.row].id))].join("\n") + "\n", "text/plain")));
}
