/* What every page has: its theme, the command to copy, and reloading where it is served live. */
const LIVE = document.currentScript.dataset.live;

function startTheme() {
  const button = document.getElementById("theme");
  const names = ["auto", "light", "dark"];
  let chosen = "auto";
  try { chosen = localStorage.getItem("vestige-theme") || "auto"; } catch { /* storage may be closed to files */ }
  const apply = () => {
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    button.textContent = `Theme: ${chosen}`;
  };
  button.addEventListener("click", () => {
    chosen = names[(names.indexOf(chosen) + 1) % names.length];
    try { localStorage.setItem("vestige-theme", chosen); } catch { /* the choice then lasts as long as the page */ }
    apply();
  });
  apply();
}

function startCopy() {
  for (const button of document.querySelectorAll("button.copy")) {
    const command = button.previousElementSibling;
    button.addEventListener("click", async () => {
      getSelection().selectAllChildren(command);
      try { await navigator.clipboard.writeText(command.textContent); button.textContent = "Copied"; }
      catch { button.textContent = document.execCommand("copy") ? "Copied" : "Selected"; }
      setTimeout(() => (button.textContent = "Copy"), 1600);
    });
  }
}

/* Served live, the page asks for the version of the run's files and loads itself again when they changed. */
function startLive() {
  if (LIVE === undefined) return;
  const mark = document.querySelector(".live");
  setInterval(async () => {
    try {
      const answer = await fetch(`/version${location.search}`);
      const version = await answer.text();
      mark.textContent = answer.ok ? "live" : "run removed";
      if (answer.ok && version !== LIVE) location.reload();
    } catch { mark.textContent = "server closed"; }
  }, 2000);
}
