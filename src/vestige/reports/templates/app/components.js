/* The page of a component search: which choice of candidates is shown. */
function startChoices() {
  const choice = document.getElementById("candidates");
  if (!choice) return;
  const show = () => {
    for (const part of document.querySelectorAll(".choice")) part.hidden = part.dataset.candidates !== choice.value;
  };
  const read = () => {
    const asked = new URLSearchParams(location.hash.slice(1)).get("candidates");
    if (asked && [...choice.options].some((option) => option.value === asked)) choice.value = asked;
    show();
  };
  choice.addEventListener("change", () => { history.replaceState(null, "", `#candidates=${choice.value}`); show(); });
  addEventListener("hashchange", read);
  read();
}

startTheme();
startCopy();
startChoices();
startLive();
