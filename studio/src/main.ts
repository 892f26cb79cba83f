/** The views, and which of them the page's address names. */

import "./style.css";
import { about, type About, type Known, type Ready } from "./api";
import { check } from "./check";
import { fill, h } from "./dom";
import { edit } from "./edit";
import { find } from "./find";
import { judge } from "./judge";
import { look } from "./look";
import { link, place } from "./place";
import { sentence } from "./sentence";
import { talk } from "./talk";
import { write } from "./write";

const VIEWS: Record<string, { title: string; make: (known: Known, ready: Ready) => HTMLElement }> = {
  talk: { title: "Talk", make: talk },
  look: { title: "Look", make: look },
  find: { title: "Find", make: find },
  judge: { title: "Judge", make: judge },
  check: { title: "Check", make: check },
  write: { title: "Write", make: write },
};

const main = document.querySelector("main") as HTMLElement;
const nav = document.querySelector("nav") as HTMLElement;
const told = document.querySelector("#about") as HTMLElement;
const bar = h("progress", { hidden: true, "aria-label": "Progress" });
told.after(bar);

/** Views that were opened, which keep what they show. */
const opened = new Map<string, HTMLElement>();

/** The view that the address names. */
function named(): string {
  return Object.hasOwn(VIEWS, place().view) ? place().view : "talk";
}

function navigate(): void {
  fill(nav, ...Object.entries(VIEWS).map(([one, { title }]) =>
    h("a", { href: link(one), "aria-current": one === named() && "page" }, title)));
}

/** The model, once it is loaded; until then the page says what is being done. */
async function loaded(known: Known): Ready {
  for (let found = known; ; found = await about()) {
    if (found.ready) return found as About;
    const { doing, progress } = found;
    told.textContent = `${found.name} is being loaded: ${doing}${progress ? `, ${progress.label}` : ""} …`;
    far(progress);
    await new Promise((done) => setTimeout(done, 300));
  }
}

/** Show how far a piece of work is, in the header of all views. */
function far(progress: Known["progress"]): void {
  bar.hidden = !progress;
  if (!progress) return;
  if (progress.total === null) bar.removeAttribute("value");
  else [bar.max, bar.value] = [progress.total, progress.done];
}

function show(known: Known, ready: Ready): void {
  const name = named();
  navigate();
  if (!opened.has(name)) opened.set(name, VIEWS[name]!.make(known, ready));
  document.title = `${VIEWS[name]!.title}: ${known.name}`;
  fill(main, opened.get(name));
}

function failed(error: unknown): void {
  fill(main, h("p", { class: "error", role: "alert" }, sentence(error)));
}

async function start(): Promise<void> {
  try {
    const known = await about();
    edit.strength = known.strength;
    const ready = loaded(known);
    ready.then((found) => {
      far(null);
      told.textContent = `${found.name}: ${found.architecture}, ${found.layers} layers, ${found.width} dimensions`;
    }, failed);
    show(known, ready);
    window.addEventListener("hashchange", () => show(known, ready));
  } catch (error) {
    failed(error);
  }
}

void start();
