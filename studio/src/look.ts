/** Look: the component along the direction at every layer and token, and what is in one state. */

import { once, type Event, type Known, type Ready } from "./api";
import { field, fill, h, table } from "./dom";
import { controls, edit } from "./edit";
import { heat, largest, legend, plain } from "./heat";
import { keep, place } from "./place";
import { sentence } from "./sentence";

/** The pictures of one prompt. */
class Panel {
  readonly element = h("section", { class: "panel", "aria-live": "polite" });
  private readonly more = h("div", { class: "state" });
  private token = -1;
  private layer = -1;

  constructor(private readonly prompt: string) {}

  async draw(): Promise<void> {
    fill(this.element, h("p", {}, "…"));
    try {
      const found = await once("look", { prompt: this.prompt, ...edit });
      const most = largest((found.before as number[][]).flat());
      const choose = (layer: number, token: number) => void this.choose(layer, token);
      this.token = found.tokens.length - 1;
      this.layer = found.before.length - 1;
      fill(
        this.element,
        h("h3", { class: "text" }, this.prompt),
        heat("Before", found.tokens, found.before, most, choose),
        heat(`After, at ${edit.strength}`, found.tokens, found.after, most, choose),
        legend(most),
        this.more,
      );
      await this.state();
    } catch (error) {
      fill(this.element, h("p", { class: "error", role: "alert" }, sentence(error)));
    }
  }

  private async choose(layer: number, token: number): Promise<void> {
    this.layer = layer;
    this.token = token;
    await this.state();
  }

  /** One state: its dimensions as boxes, and the likeliest next tokens by layer. */
  private async state(): Promise<void> {
    const found = await once("token", { prompt: this.prompt, token: this.token, state: this.layer, ...edit });
    const most = largest([...found.before, ...found.after]);
    fill(
      this.more,
      h("h3", {}, `Token ${this.token}, after layer ${this.layer}`),
      h("div", { class: "columns" },
        boxes("Dimensions before", found.before, most), boxes("Dimensions after", found.after, most)),
      dimensions(found),
      lens(found),
    );
  }
}

/** The dimensions of a state as boxes, coloured by what each adds to the component. */
function boxes(title: string, values: number[], most: number): HTMLElement {
  const across = columns(values.length);
  const size = Math.max(3, Math.min(12, Math.floor(560 / across)));
  const canvas = h("canvas", {
    width: across * size, height: Math.ceil(values.length / across) * size, role: "img",
    "aria-label": `${title}: ${values.length} dimensions, together ${sum(values).toFixed(3)}`,
  });
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const [minus, plus, line] = ["--minus", "--plus", "--line"].map((name) => style.getPropertyValue(name));
  values.forEach((value, index) => {
    if (!context) return;
    const [x, y] = [(index % across) * size, Math.floor(index / across) * size];
    context.globalAlpha = 0.25;
    context.fillStyle = line ?? "";
    context.fillRect(x, y, size - 1, size - 1);
    context.globalAlpha = Math.min(1, Math.abs(value) / most);
    context.fillStyle = (value < 0 ? minus : plus) ?? "";
    context.fillRect(x, y, size - 1, size - 1);
  });
  return h("figure", {}, canvas, h("figcaption", {}, `${title}: together ${sum(values).toFixed(3)}`));
}

/** How many boxes stand side by side: about twice as many as rows, without a rest if that can be. */
function columns(count: number): number {
  const wanted = Math.ceil(Math.sqrt(count * 2));
  for (let one = wanted; one < wanted * 2; one++) if (count % one === 0) return one;
  return wanted;
}

function sum(values: number[]): number {
  return values.reduce((all, one) => all + one, 0);
}

function dimensions(found: Event): HTMLElement {
  const before: number[] = found.before;
  const order = before.map((_, index) => index).sort((a, b) => Math.abs(before[b] ?? 0) - Math.abs(before[a] ?? 0));
  return h("div", { class: "scroll" }, table("The dimensions that add most", ["dimension", "before", "after"],
    order.slice(0, 6).map((one) => [String(one), (before[one] ?? 0).toFixed(4), found.after[one].toFixed(4)])));
}

function lens(found: Event): HTMLElement {
  const words = (some: [string, number][]) => h("span", { class: "words" },
    ...some.map(([token, share]) => h("span", { class: "word", title: share.toFixed(4) },
      `${plain(token)} ${Math.round(share * 100)}%`)));
  return h("div", { class: "scroll" }, table("Logit lens: the likeliest next tokens, if that layer were the last",
    ["layer", "before", "after"],
    [...found.lens].reverse().map((one: Event) => [String(one.layer), words(one.before), words(one.after)])));
}

export function look(_: Known, ready: Ready): HTMLElement {
  const first = h("textarea", { id: "prompt", rows: 2 });
  const second = h("textarea", { id: "second", rows: 2, placeholder: "none" });
  first.value = place().more.get("prompt") ?? "";
  second.value = place().more.get("second") ?? "";
  const panels = h("div", { class: "columns" });
  const draw = (event?: Event) => {
    event?.preventDefault?.();
    const prompts = [first.value, second.value].map((one) => one.trim()).filter(Boolean);
    keep("look", { prompt: first.value.trim(), ...(second.value.trim() && { second: second.value.trim() }) });
    const some = prompts.map((one) => new Panel(one));
    fill(panels, ...some.map((one) => one.element));
    for (const one of some) void one.draw();
  };
  if (first.value) queueMicrotask(draw);
  const element = h(
    "div", { class: "look" },
    controls(ready, () => element.isConnected && first.value.trim() && draw()),
    h("form", { class: "row", onsubmit: draw as EventListener },
      field("Prompt", first), field("Compare with", second), h("button", { type: "submit" }, "Look")),
    panels,
  );
  return element;
}
