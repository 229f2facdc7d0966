// Every page works without this. It makes pages live, and the approvals quick from the keyboard.
"use strict";

const typing = (element) => element && element.matches("input:not([type=checkbox]), textarea, select");
const main = () => document.getElementById("main");

// What somebody has begun must not be taken from under their hands.
const busy = () =>
  typing(document.activeElement) ||
  main().querySelector("details[open], input:checked") !== null ||
  [...main().querySelectorAll("input, textarea")].some((field) => field.type !== "hidden" && field.value !== field.defaultValue);

const changed = () => {
  const note = document.getElementById("changed");
  note.querySelector("a").href = main().dataset.here || location.href;
  note.hidden = false;
};

const refresh = async () => {
  if (busy()) return changed();
  // The draft that is shown stays the one that is shown.
  const answer = await fetch(main().dataset.here || location.href, { credentials: "same-origin" });
  if (answer.redirected || !answer.ok) return changed();
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("main");
  if (busy()) return changed();
  const there = document.activeElement && document.activeElement.getAttribute("href");
  main().replaceChildren(...fresh.childNodes);
  if (fresh.dataset.here) main().dataset.here = fresh.dataset.here;
  const again = there && [...main().querySelectorAll("a")].find((each) => each.getAttribute("href") === there);
  if (again) again.focus();
  document.getElementById("changed").hidden = true;
};

// A browser opens only a few connections to one server, so a page that nobody sees holds none.
let events = null;
let seen = null;
const listen = () => {
  events?.close();
  if (document.hidden) return;
  const url = new URL(document.body.dataset.events, location.href);
  if (seen) url.searchParams.set("seen", seen);
  events = new EventSource(url);
  events.addEventListener("changed", (event) => {
    seen = event.lastEventId;
    refresh().catch(changed);
  });
};
if (document.body.dataset.events) {
  listen();
  document.addEventListener("visibilitychange", listen);
}

document.addEventListener("input", ({ target }) => {
  if (target.id !== "message" || !document.getElementById("approve")) return;
  const isEdited = target.value !== target.defaultValue;
  document.querySelector("#approve button").textContent = isEdited ? "Approve with my words" : "Approve";
});

// One click is one decision.
document.addEventListener("submit", (event) => {
  const target = event.target;
  if (target.method !== "post") return;
  if (target.dataset.sent) return event.preventDefault();
  target.dataset.sent = "yes";
});
window.addEventListener("pageshow", () => document.querySelectorAll("form").forEach((form) => delete form.dataset.sent));

const step = (by) => {
  const links = [...document.querySelectorAll(".queue a")];
  const at = links.findIndex((link) => link.hasAttribute("aria-current"));
  const next = links[Math.min(Math.max(at + by, 0), links.length - 1)];
  if (next && !next.hasAttribute("aria-current")) location.assign(next.href);
};

const keys = {
  j: () => step(1),
  k: () => step(-1),
  a: () => document.querySelector("#approve button")?.click(),
  e: () => {
    const text = document.querySelector("#approve textarea");
    text?.focus();
    text?.setSelectionRange(text.value.length, text.value.length);
  },
  r: () => document.getElementById("reason")?.focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && typing(document.activeElement)) return document.activeElement.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || typing(document.activeElement)) return;
  if (!document.querySelector(".queue") || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
