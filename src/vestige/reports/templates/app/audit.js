/* The page of an audit: which ranking is shown, and which examples of it. */
function startLists() {
  const measure = document.getElementById("measure");
  if (!measure) return;
  const words = document.getElementById("words");
  const show = () => {
    for (const ranking of document.querySelectorAll(".ranking")) ranking.hidden = ranking.dataset.measure !== measure.value;
    const wanted = words.value.toLowerCase();
    for (const card of document.querySelectorAll(".ranking .card")) card.hidden = !card.textContent.toLowerCase().includes(wanted);
  };
  const read = () => {
    const asked = new URLSearchParams(location.hash.slice(1)).get("measure");
    if (asked && [...measure.options].some((option) => option.value === asked)) measure.value = asked;
    show();
  };
  measure.addEventListener("change", () => { history.replaceState(null, "", `#measure=${measure.value}`); show(); });
  words.addEventListener("input", show);
  addEventListener("hashchange", read);
  read();
}

startTheme();
startCopy();
startLists();
startLive();
