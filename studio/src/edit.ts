/** The edit that all views share: its strength, direction, rank and layers. */

import type { About, Ready } from "./api";
import { field, fill, h } from "./dom";

export interface Edit {
  strength: number;
  layer: number | null;
  rank: number | null;
  layers: number[] | null;
  /** The number of a trial of a search, whose edit is taken. */
  point: number | null;
}

export const edit: Edit = { strength: 1, layer: null, rank: null, layers: null, point: null };

/** Tell the controls of all views that the edit has changed. */
export function edited(): void {
  document.dispatchEvent(new Event("edited"));
}

/**
 * "0-3,5" as numbers; null for all.
 *
 * @throws where the text says anything else.
 */
function layersOf(text: string, count: number): number[] | null {
  const found = new Set<number>();
  for (const part of text.split(",").map((one) => one.trim()).filter(Boolean)) {
    const [, first, last] = /^(\d+)(?:-(\d+))?$/.exec(part) ?? [];
    const [from, to] = [Number(first), Number(last ?? first)];
    if (!(from <= to && to < count)) throw new Error(`Give layers from 0 to ${count - 1}, such as 0-3,5; nothing for all.`);
    for (let one = from; one <= to; one++) found.add(one);
  }
  return found.size ? [...found].sort((a, b) => a - b) : null;
}

export function named(strength: number): string {
  if (strength < 0) return `${strength}: the direction is added, so the model refuses`;
  if (strength === 0) return "0: the model as it is";
  if (strength === 1) return "1: the direction is removed";
  return strength < 1 ? `${strength}: a part of the direction is removed` : `${strength}: beyond removal`;
}

/** The controls of the edit; `changed` is called when a value was chosen, also in another view. */
export function controls(ready: Ready, changed: () => void): HTMLElement {
  const output = h("output", { for: "strength" });
  const slider = h("input", {
    id: "strength", type: "range", min: -2, max: 2, step: 0.05, list: "marks", "aria-label": "Strength of the edit",
  });
  const marks = h("datalist", { id: "marks" }, ...[-1, 0, 1].map((one) => h("option", { value: one })));
  const more = h("div");
  const show = () => {
    slider.value = String(edit.strength);
    output.textContent = named(edit.strength);
    slider.setAttribute("aria-valuetext", named(edit.strength));
  };
  slider.addEventListener("input", () => {
    edit.strength = Number(slider.value);
    show();
  });
  slider.addEventListener("change", edited);
  show();
  void ready.then((about) => fill(more, ...choices(about)), () => undefined);
  document.addEventListener("edited", () => {
    show();
    changed();
  });
  return h(
    "fieldset",
    { class: "edit" },
    h("legend", {}, "Edit"),
    h("div", { class: "dial" }, field("Strength", slider), marks, output),
    more,
  );
}

/** What is chosen besides the strength: a direction and layers, or a trial of a search. */
function choices(about: About): HTMLElement[] {
  const set = (some: Partial<Edit>) => {
    Object.assign(edit, some);
    edited();
  };
  const layers = h("input", { id: "layers", type: "text", placeholder: "all, or 0-3,5", size: 12 });
  layers.addEventListener("change", () => {
    try {
      const found = layersOf(layers.value, about.layers);
      layers.setCustomValidity("");
      set({ layers: found });
    } catch (error) {
      layers.setCustomValidity((error as Error).message);
      layers.reportValidity();
    }
  });
  const layer = chosen(range(0, about.layers), (value) => set({ layer: value }),
    about.layer === null ? "measured" : `measured (${about.layer})`);
  const rank = chosen(range(1, about.rank + 1), (value) => set({ rank: value }), `all (${about.rank})`);
  const own = h("div", { class: "row" },
    about.means && field("Direction after layer", layer), about.rank > 1 && field("Rank", rank), field("Edited layers", layers));
  const trial = h("p", {});
  const point = h("div", { class: "row" }, trial,
    h("button", { type: "button", onclick: () => set({ point: null }) }, "Take the measured direction"));
  const show = () => {
    own.hidden = edit.point !== null;
    point.hidden = edit.point === null;
    trial.textContent = `The edit of trial ${edit.point} of the search.`;
    layer.value = String(edit.layer ?? "");
    rank.value = String(edit.rank ?? "");
    layers.value = edit.layers?.join(",") ?? "";
  };
  show();
  document.addEventListener("edited", show);
  return [own, point];
}

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, index) => from + index);
}

function chosen(values: number[], choose: (value: number | null) => void, none: string): HTMLSelectElement {
  const select = h(
    "select", {}, h("option", { value: "" }, none), ...values.map((one) => h("option", { value: one }, String(one))),
  );
  select.addEventListener("change", () => choose(select.value === "" ? null : Number(select.value)));
  return select;
}
