/* Numbers as a reader wants them: one number of decimals per query, a true minus sign, a sign where it carries meaning. */
function tidy(text) {
  return text.replace("-", "−");
}

/* Returns a formatter whose decimals suit values up to `largest`. */
function scoreFormat(largest) {
  if (!(largest > 0)) return (value) => (value === null ? "–" : "0");
  const power = Math.floor(Math.log10(largest));
  const write = power < -3 || power > 5 ? (value) => value.toExponential(2) : (value) => value.toFixed(Math.max(0, 2 - power));
  return (value, plus = true) => {
    if (value === null || value === undefined) return "–";
    const text = write(value);
    if (Number(text) === 0) return write(0);
    return (plus && value > 0 ? "+" : "") + tidy(text);
  };
}

function percent(share, digits = 0) {
  return `${(100 * share).toFixed(digits)}%`;
}

function grouped(count) {
  return count.toLocaleString("en-US");
}

/* 99.97 stays 99.97, 50 becomes 50.0: the closer to an end, the more digits matter. */
function percentile(value) {
  const distance = Math.min(value, 100 - value);
  return value.toFixed(distance < 0.1 ? 2 : 1);
}

function sum(values) {
  return values.reduce((total, value) => total + (value || 0), 0);
}

function largest(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value || 0)), 0);
}

/* Round steps (1, 2 or 5 times a power of ten) that cut [low, high] into about `count` parts. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  const marks = [];
  for (let mark = Math.ceil(low / step) * step; mark <= high + step * 1e-9; mark += step) marks.push(Math.abs(mark) < step * 1e-9 ? 0 : mark);
  return marks;
}

/* Diverging fill: blue above zero, orange below, nothing at zero; |value| = scale is full strength. */
function diverging(value, scale, strongest) {
  const strength = scale > 0 ? Math.min(1, Math.abs(value) / scale) : 0;
  if (strength < 0.02) return "transparent";
  const tone = value > 0 ? "--positive" : "--negative";
  return `color-mix(in srgb, var(${tone}) ${(100 * strongest * strength).toFixed(1)}%, transparent)`;
}
