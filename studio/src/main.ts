/** The views, and which of them the page's address names. */

import "./style.css";
import { about, type About } from "./api";
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

const VIEWS: Record<string, { title: string; make: (about: About) => HTMLElement }> = {
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

async function model(): Promise<About> {
  for (;;) {
    const found = await about();
    if (found.ready) return found;
    navigate();
    told.textContent = `${found.name} is being loaded: ${found.doing} …`;
    await new Promise((done) => setTimeout(done, 300));
  }
}

function show(found: About): void {
  const name = named();
  navigate();
  if (!opened.has(name)) opened.set(name, VIEWS[name]!.make(found));
  document.title = `${VIEWS[name]!.title}: ${found.name}`;
  fill(main, opened.get(name));
}

async function start(): Promise<void> {
  try {
    const found = await model();
    edit.strength = found.strength;
    told.textContent = `${found.name}: ${found.architecture}, ${found.layers} layers, ${found.width} dimensions`;
    show(found);
    window.addEventListener("hashchange", () => show(found));
  } catch (error) {
    fill(main, h("p", { class: "error", role: "alert" }, sentence(error)));
  }
}

void start();
