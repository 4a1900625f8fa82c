/* Elements. Text only ever enters the page as text nodes, so nothing in a training example can become markup. */
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("drawing").namespaceURI; // so that the file names no address at all

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function html(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

function svg(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/* One tooltip for the whole page: anything with data-tip shows it on hover and on keyboard focus. */
function startTooltip() {
  const tip = document.getElementById("tip");
  const show = (event) => {
    const target = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.dataset.tip;
    const box = target.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 7;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 7}px`;
  };
  document.addEventListener("mouseover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));
}

/* A row of buttons of which one is pressed. */
function segmented(label, options, chosen, choose) {
  const buttons = options.map(([value, text]) =>
    html("button", { type: "button", "data-focus": `${label} ${value}`, "aria-pressed": String(value === chosen), onclick: () => choose(value) }, text)
  );
  return html("span", { class: "segmented", role: "group", "aria-label": label }, buttons);
}
