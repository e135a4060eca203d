"use strict";
const SECONDS = 5, live = document.getElementById("live");
let answered = new Date();
async function refresh() {
  try {
    const answer = await fetch(location.pathname, {
      headers: {Accept: "text/html"}, cache: "no-store", signal: AbortSignal.timeout(SECONDS * 1000),
    });
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const main = page.querySelector("main");
    if (page.documentElement.dataset.build !== document.documentElement.dataset.build) return location.reload();
    answered = new Date();
    document.body.classList.remove("old");
    live.textContent = "Live, every " + SECONDS + " s";
    document.title = page.title;
    if (getSelection().isCollapsed) document.querySelector("main").replaceWith(main);
  } catch (failure) {
    document.body.classList.add("old");
    live.textContent = "No answer since " + answered.toISOString().slice(0, 19) + "Z: what is shown is old";
  }
}
async function again() {
  if (!document.hidden) await refresh();
  setTimeout(again, SECONDS * 1000);
}
live.textContent = "Live, every " + SECONDS + " s";
setTimeout(again, SECONDS * 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
