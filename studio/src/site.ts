/** The page of `abl-mlx publish`: both models in the visitor's browser, and what was edited. */

import "./style.css";
import { Column, type Message, type Piece } from "./column";
import { fill, h, table } from "./dom";
import { heat, largest, legend } from "./heat";
import { InBrowser, type Files } from "./in_browser";
import { options, Question } from "./question";
import { sentence } from "./sentence";

interface Example {
  prompt: string;
  tokens: string[];
  before: number[][];
  after: number[][];
}

/** What `abl-mlx publish` writes of the edit into site.json. */
interface Site {
  title: string;
  said: string;
  original: Files;
  edited: Files;
  system: string | null;
  template_values: Record<string, unknown>;
  examples: string[];
  pictures: Example[];
  facts: [string, string][];
  figures: [string, string, string, string][];
}

/** A column whose model is loaded when the visitor asks for it. */
class Model {
  readonly element: HTMLElement;
  readonly column: Column;
  private readonly model: InBrowser;
  private readonly button: HTMLButtonElement;
  private readonly status = h("p", { class: "note", role: "status" });

  constructor(title: string, files: Files, private readonly site: Site) {
    this.model = new InBrowser(files);
    this.column = new Column(h("h2", {}, title), title, (messages, signal) => this.replies(messages, signal));
    this.button = h("button", { type: "submit", onclick: () => void this.load() },
      `Load the ${title.toLowerCase()} model, ${megabytes(files.bytes)}`);
    this.column.element.append(this.button, this.status);
    this.element = this.column.element;
  }

  get ready(): boolean {
    return this.model.ready;
  }

  async load(): Promise<void> {
    this.button.disabled = true;
    try {
      await this.model.load((loaded, total) => {
        this.status.textContent = loaded < total
          ? `${megabytes(loaded)} of ${megabytes(total)}` : "reading the weights …";
      });
      this.button.hidden = true;
      this.status.textContent = `ready: ${this.model.threads} thread${this.model.threads > 1 ? "s" : ""} of this device`;
    } catch (error) {
      this.button.disabled = false;
      this.status.textContent = sentence(error);
    }
  }

  private async *replies(messages: Message[], signal: AbortSignal): AsyncGenerator<Piece> {
    const system = this.site.system === null ? [] : [{ role: "system" as const, content: this.site.system }];
    let count = 0;
    for await (const text of this.model.reply([...system, ...messages], this.site.template_values, signal)) {
      count++;
      yield { text };
    }
    yield { note: `${count} tokens` };
  }
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e8 ? 1 : 0 })} MB`;
}

function ask(models: Model[], examples: string[]): HTMLElement[] {
  const told = h("p", { class: "note", role: "status" });
  const question = new Question("Ask the models", (content) => {
    const ready = models.filter((one) => one.ready);
    told.textContent = ready.length ? "" : "Load a model first.";
    if (!content || !ready.length) return false;
    for (const one of ready) void one.column.ask(content);
    return true;
  });
  question.offered.append(...options(examples));
  const all = (name: string, act: (column: Column) => void) =>
    h("button", { type: "button", onclick: () => models.forEach((one) => act(one.column)) }, name);
  return [
    question.form,
    h("div", { class: "row" }, question.offered, all("Stop", (one) => one.halt()), all("Clear", (one) => one.clear())),
    told,
  ];
}

function picture(one: Example): HTMLElement {
  const most = largest(one.before.flat());
  return h("section", { class: "panel" },
    h("h3", { class: "text" }, one.prompt),
    h("div", { class: "columns" },
      heat("Original", one.tokens, one.before, most), heat("Edited", one.tokens, one.after, most)),
    legend(most));
}

function show(site: Site): HTMLElement {
  const models = [new Model("Original", site.original, site), new Model("Edited", site.edited, site)];
  return h(
    "div", { class: "site" },
    h("p", {}, site.said),
    h("p", { class: "note" },
      "The models run in this browser: what is asked stays on this device. A model answers wrongly and may say what offends; what is done with its replies is the responsibility of whoever asks."),
    h("div", { class: "columns" }, ...models.map((one) => one.element)),
    ...ask(models, site.examples),
    site.pictures.length > 0 && h("h2", {}, "What the residual stream holds along the direction"),
    site.pictures.length > 0 && h("p", { class: "note" },
      "The component r·h/|h| of the stream along the direction, after every layer at every token of a prompt."),
    ...site.pictures.map(picture),
    h("h2", {}, "What was edited, and how"),
    h("div", { class: "scroll" }, table("The edit", ["what", "value"], site.facts)),
    site.figures.length > 0 && h("div", { class: "scroll" },
      table("On held-out prompts", ["what", "original", "edited", "note"], site.figures)),
    h("p", {}, "Everything measured is in ", h("a", { href: "abl.json" }, "the record"), ". Made with ",
      h("a", { href: "https://pypi.org/project/abl-mlx/" }, "abl-mlx"), "; the models run in ",
      h("a", { href: "wllama.LICENCE.txt" }, "wllama and llama.cpp (MIT)"), "."),
  );
}

async function start(): Promise<void> {
  const main = document.querySelector("main") as HTMLElement;
  try {
    const answer = await fetch("site.json");
    if (!answer.ok) throw new Error(`site.json: the server answers ${answer.status}.`);
    const site: Site = await answer.json();
    document.title = site.title;
    document.querySelector("h1")!.textContent = site.title;
    fill(main, show(site));
  } catch (error) {
    fill(main, h("p", { class: "error", role: "alert" }, sentence(error)));
  }
}

void start();
