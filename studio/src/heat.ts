/** The heat map of a prompt: the component along the direction at every layer and token. */

import { fill, h } from "./dom";

/** A colour from below 0 (blue) to above 0 (orange), the same for all colour vision. */
function tint(share: number): string {
  const name = share < 0 ? "--minus" : "--plus";
  return `color-mix(in srgb, var(${name}) ${Math.round(Math.min(1, Math.abs(share)) * 100)}%, var(--surface))`;
}

/** A token with its spaces made visible. */
export function plain(token: string): string {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
}

/** The largest size of a value; a little above 0 if there is none. */
export function largest(values: number[]): number {
  return values.reduce((most, one) => Math.max(most, Math.abs(one)), 1e-9);
}

/**
 * A grid of layers and tokens, in which arrow keys move and Enter chooses.
 *
 * @param rows the component after each layer at each token.
 * @param most the value that has the full colour.
 * @param choose is called with a layer and a token.
 */
export function heat(
  title: string, tokens: string[], rows: number[][], most: number,
  choose?: (layer: number, token: number) => void,
): HTMLElement {
  const grid = h("table", { class: choose ? "heat chosen" : "heat", role: "grid" });
  const head = h("tr", {}, h("th", { scope: "col" }, "layer"),
    ...tokens.map((one) => h("th", { scope: "col", class: "token" }, h("span", {}, plain(one)))));
  const body = rows.map((row, layer) => h("tr", {}, h("th", { scope: "row" }, String(layer)),
    ...row.map((value, token) => {
      const cell = h("td", {
        role: "gridcell", tabindex: layer === rows.length - 1 && token === row.length - 1 ? 0 : -1,
        title: `layer ${layer}, ${plain(tokens[token] ?? "")}: ${value.toFixed(3)}`,
        "aria-label": `layer ${layer}, token ${tokens[token]}: ${value.toFixed(3)}`,
      });
      cell.style.backgroundColor = tint(value / most);
      cell.addEventListener("click", () => choose?.(layer, token));
      return cell;
    }))).reverse();
  fill(grid, h("caption", {}, title), h("thead", {}, head), h("tbody", {}, ...body));
  grid.addEventListener("keydown", (event) => move(event, rows.length, choose));
  return h("div", { class: "scroll" }, grid);
}

function move(event: KeyboardEvent, layers: number, choose?: (layer: number, token: number) => void): void {
  const cell = event.target as HTMLTableCellElement;
  const row = cell.parentElement as HTMLTableRowElement;
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (choose && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    choose(layers - 1 - row.sectionRowIndex, cell.cellIndex - 1);
  }
  if (!step) return;
  event.preventDefault();
  const rows = (row.parentElement as HTMLTableSectionElement).rows;
  const next = rows[row.sectionRowIndex + (step[0] ?? 0)]?.cells[cell.cellIndex + (step[1] ?? 0)];
  if (next?.tagName !== "TD") return;
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

/** What the colours mean. */
export function legend(most: number): HTMLElement {
  const steps = [-1, -0.5, 0, 0.5, 1].map((one) => {
    const box = h("span", { class: "swatch" });
    box.style.backgroundColor = tint(one);
    return h("span", { class: "step" }, box, (one * most).toFixed(2));
  });
  return h("p", { class: "legend", "aria-label": "Legend: the component r·h/|h|" }, "r·h/|h| ", ...steps);
}
