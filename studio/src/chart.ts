/** Charts: points by kind, in colour and shape, as wide as there is room, so that text keeps its size. */

import { fill, h } from "./dom";

export interface Series {
  name: string;
  points: [number, number][];
  /** Whether a line connects them. */
  joined?: boolean;
  /** Whether they are drawn in the background. */
  faint?: boolean;
  /** Whether marks are outlines. */
  hollow?: boolean;
  /** Its colour and shape; by default its place among the series. */
  kind?: number;
  /** What is said of each point. */
  labels?: string[];
  /** Points that can be picked: is called with the place of one. */
  choose?: (index: number) => void;
  /** The place of the picked point. */
  picked?: number;
}

export interface Chart {
  title: string;
  x: string;
  y: string;
  series: Series[];
  /** A value of x that is marked, and its name. */
  marker?: [number, string] | null;
  log?: boolean;
  whole?: boolean;
}

const KINDS = 6;
const HEIGHT = 260;
const [LEFT, RIGHT, TOP, BOTTOM] = [52, 12, 26, 36];
const SHAPES = [
  "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z", "M-3.2-3.2h6.4v6.4h-6.4z", "M0-4.4L4.2 3.2h-8.4z",
  "M0-4.6L4.6 0L0 4.6L-4.6 0z", "M-1.4-4h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z", "M0 4.4L4.2-3.2h-8.4z",
];

function s(tag: string, attributes: Record<string, string | number>, ...children: (Node | string)[]): SVGElement {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** A number with about four digits. */
export function short(value: number): string {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e5 ? value.toExponential(1).replace(".0e", "e").replace("e+", "e") : String(Number(value.toPrecision(4)));
  return text.replaceAll("-", "−");
}

/** Round numbers from `low` to `high`. */
function ticks(low: number, high: number, most: number, whole = false): number[] {
  const span = high - low;
  if (!(span > 0)) return [low];
  const unit = 10 ** Math.floor(Math.log10(span / most));
  let step = unit * ([1, 2, 5, 10].find((one) => span / (unit * one) <= most) ?? 20);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * span; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

interface Scale {
  at: (value: number) => number;
  ticks: number[];
}

function scale(values: number[], most: number, log = false, whole = false): Scale {
  if (log) {
    const above = values.filter((one) => one > 0);
    const low = Math.floor(Math.log10(Math.min(...above, Infinity)) - 0.05);
    const [from, to] = Number.isFinite(low) ? [low, Math.ceil(Math.log10(Math.max(...above)) + 0.05)] : [-1, 0];
    const step = Math.max(1, Math.ceil((to - from) / most));
    const powers = ticks(from, to, to - from, true).filter((one) => (one - from) % step === 0);
    return { at: (value) => (Math.log10(Math.max(value, 10 ** from)) - from) / (to - from), ticks: powers.map((one) => 10 ** one) };
  }
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const room = whole ? 0.5 : 0.06 * (high - low || Math.abs(high) || 1);
  [low, high] = [low >= 0 && low < 0.5 * high && !whole ? 0 : low - room, high + room];
  return { at: (value) => (value - low) / (high - low), ticks: ticks(low, high, most, whole) };
}

/** A chart with its legend. */
export function chart(one: Chart): HTMLElement {
  const width = Math.max(220, Math.min(460, document.documentElement.clientWidth - 34));
  const points = one.series.flatMap((some) => some.points);
  if (!points.length) return h("figure", {}, h("figcaption", {}, `${one.title}: nothing yet`));
  const across = scale([...points.map(([x]) => x), ...(one.marker ? [one.marker[0]] : [])], width / 70, false, one.whole);
  const up = scale(points.map(([, y]) => y), 6, one.log);
  const place = ([x, y]: [number, number]): [number, number] => [
    LEFT + across.at(x) * (width - LEFT - RIGHT), HEIGHT - BOTTOM - up.at(y) * (HEIGHT - TOP - BOTTOM),
  ];
  const bottom = HEIGHT - BOTTOM;
  const parts: SVGElement[] = [];
  for (const tick of up.ticks) {
    const y = bottom - up.at(tick) * (HEIGHT - TOP - BOTTOM);
    parts.push(s("path", { class: "grid", d: `M${LEFT} ${y}H${width - RIGHT}` }));
    parts.push(s("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(tick)));
  }
  for (const tick of across.ticks)
    parts.push(s("text", { x: LEFT + across.at(tick) * (width - LEFT - RIGHT), y: bottom + 16, "text-anchor": "middle" }, short(tick)));
  parts.push(s("path", { class: "axis", d: `M${LEFT} ${bottom}H${width - RIGHT}` }));
  parts.push(s("text", { x: 2, y: 12 }, `↑ ${one.y}`), s("text", { x: width - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, `${one.x} →`));
  if (one.marker) {
    const [x] = place([one.marker[0], 0]);
    parts.push(s("path", { class: "marker", d: `M${x} ${TOP}V${bottom}` }));
  }
  const order = one.series.map((some, index) => ({ some, kind: some.kind ?? index })).sort((a, b) => Number(b.some.faint ?? 0) - Number(a.some.faint ?? 0));
  for (const { some, kind } of order) parts.push(drawn(some, kind, place));
  const picture = s("svg", { class: "chart", width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "group", "aria-label": one.title }, ...parts);
  const named = one.series.map((some, index) => ({ some, kind: some.kind ?? index })).filter(({ some }) => some.name);
  return h("figure", {}, h("figcaption", { class: "heading" }, one.title), picture as unknown as HTMLElement,
    (named.length > 1 || one.marker) && h("p", { class: "legend" },
      ...named.map(({ some, kind }) => h("span", { class: "step" }, swatch(some, kind), some.name)),
      one.marker && h("span", { class: "step" }, line(), `${one.marker[1]} (${short(one.marker[0])})`)));
}

function classes(some: Series, kind: number): string {
  return `s${kind % KINDS}${some.faint ? " faint" : ""}${some.hollow ? " hollow" : ""}`;
}

function shape(kind: number): string {
  return SHAPES[(kind + Math.floor(kind / KINDS)) % SHAPES.length]!;
}

function swatch(some: Series, kind: number): HTMLElement {
  return s("svg", { class: "chart", width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" },
    s("g", { class: classes(some, kind) }, s("path", { class: "mark", d: shape(kind) }))) as unknown as HTMLElement;
}

function line(): HTMLElement {
  return s("svg", { class: "chart", width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" },
    s("path", { class: "marker", d: "M0-7V7" })) as unknown as HTMLElement;
}

function drawn(some: Series, kind: number, place: (point: [number, number]) => [number, number]): SVGElement {
  const places = some.points.map(place);
  const group = s("g", { class: classes(some, kind) });
  if (some.joined && places.length > 1) group.append(s("path", { class: "line", d: `M${places.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}` }));
  places.forEach(([x, y], index) => {
    const [px, py] = some.points[index]!;
    const said = `${some.name ? `${some.name}, ` : ""}${some.labels?.[index] ?? `${short(px)}: ${short(py)}`}`;
    const mark = s("path", { class: "mark", d: shape(kind), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` }, s("title", {}, said));
    if (some.choose) pickable(mark, said, index, some);
    group.append(mark);
  });
  return group;
}

function pickable(mark: SVGElement, said: string, index: number, some: Series): void {
  for (const [name, value] of Object.entries({ tabindex: 0, role: "button", "aria-label": said, "aria-pressed": index === some.picked }))
    mark.setAttribute(name, String(value));
  mark.addEventListener("click", () => some.choose?.(index));
  mark.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    some.choose?.(index);
  });
}

/** Draw a chart in an element, and anew when the window gets another width. */
export function draw(element: HTMLElement, given: () => Chart[]): void {
  const all = () => fill(element, ...given().map(chart));
  all();
  addEventListener("resize", () => element.isConnected && all());
}
