/* A list that says which parts of the page are shown; what is chosen lives in the address. */
function startChoice(name, parts) {
  const list = document.getElementById(name);
  if (!list) return;
  const show = () => {
    for (const part of document.querySelectorAll(parts)) part.hidden = part.dataset[name] !== list.value;
  };
  const read = () => {
    const wanted = new URLSearchParams(location.hash.slice(1)).get(name);
    if ([...list.options].some((option) => option.value === wanted)) list.value = wanted;
    show();
  };
  list.addEventListener("change", () => { history.replaceState(null, "", `#${name}=${list.value}`); show(); });
  addEventListener("hashchange", read);
  read();
}

function startSearch() {
  const words = document.getElementById("words");
  if (words) words.addEventListener("input", () => {
    const wanted = words.value.toLowerCase();
    for (const card of document.querySelectorAll(".card")) card.hidden = !card.textContent.toLowerCase().includes(wanted);
  });
}

startTheme();
startCopy();
startChoice("measure", ".ranking");
startChoice("candidates", ".choice");
startSearch();
startLive();
