/** The edit that all views share: its strength, direction, rank and layers. */

import type { About } from "./api";
import { field, h } from "./dom";

export interface Edit {
  strength: number;
  layer: number | null;
  rank: number | null;
  layers: number[] | null;
}

export const edit: Edit = { strength: 1, layer: null, rank: null, layers: null };

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

/** The controls of the edit; `changed` is called when a value was chosen. */
export function controls(about: About, changed: () => void): HTMLElement {
  const output = h("output", { for: "strength" }, named(edit.strength));
  const slider = h("input", {
    id: "strength", type: "range", min: -2, max: 2, step: 0.05, list: "marks",
    value: edit.strength, "aria-label": "Strength of the edit",
  });
  slider.value = String(edit.strength);
  slider.addEventListener("input", () => {
    edit.strength = Number(slider.value);
    output.textContent = named(edit.strength);
  });
  slider.addEventListener("change", changed);
  const marks = h("datalist", { id: "marks" }, ...[-1, 0, 1].map((one) => h("option", { value: one })));
  const layers = h("input", { id: "layers", type: "text", placeholder: "all, or 0-3,5", size: 12 });
  layers.value = edit.layers?.join(",") ?? "";
  layers.addEventListener("change", () => {
    try {
      edit.layers = layersOf(layers.value, about.layers);
      layers.setCustomValidity("");
      changed();
    } catch (error) {
      layers.setCustomValidity((error as Error).message);
      layers.reportValidity();
    }
  });
  return h(
    "fieldset",
    { class: "edit" },
    h("legend", {}, "Edit"),
    h("div", { class: "dial" }, field("Strength", slider), marks, output),
    h(
      "div",
      { class: "row" },
      about.means && field("Direction after layer", chosen(range(0, about.layers), edit.layer, (value) => {
        edit.layer = value;
        changed();
      }, about.layer === null ? "measured" : `measured (${about.layer})`)),
      about.rank > 1 && field("Rank", chosen(range(1, about.rank + 1), edit.rank, (value) => {
        edit.rank = value;
        changed();
      }, `all (${about.rank})`)),
      field("Edited layers", layers),
    ),
  );
}

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, index) => from + index);
}

function chosen(
  values: number[], now: number | null, choose: (value: number | null) => void, none: string,
): HTMLSelectElement {
  const select = h(
    "select", {}, h("option", { value: "" }, none), ...values.map((one) => h("option", { value: one }, String(one))),
  );
  select.value = now === null ? "" : String(now);
  select.addEventListener("change", () => choose(select.value === "" ? null : Number(select.value)));
  return select;
}
