/** Find: what the measurement found by layer, where prompts lie along the direction, and a search. */

import { work, once, type Known, type Ready } from "./api";
import { chart, draw, type Chart, type Series } from "./chart";
import { field, fill, h, table } from "./dom";
import { search } from "./search";
import { sentence } from "./sentence";

export function find(known: Known, ready: Ready): HTMLElement {
  const facts = h("section", {}, h("h2", {}, "The direction"), h("p", { role: "status" }, "is being measured …"));
  const plane = h("section", {}, h("h2", {}, "The two sets of prompts"), h("p", {}, "…"));
  void measured(facts, known, ready);
  void clouds(plane, ready);
  return h("div", { class: "find" }, facts, plane, search());
}

function failed(element: HTMLElement, error: unknown): void {
  fill(element, h("p", { class: "error", role: "alert" }, sentence(error)));
}

async function measured(element: HTMLElement, known: Known, ready: Ready): Promise<void> {
  try {
    const about = await ready;
    const found = await once("find", {});
    const facts: [string, unknown][] = [
      ["model", known.name], ["architecture", about.architecture], ["layers", about.layers],
      ["width", about.width], ["method", about.method], ["layer", about.layer],
      ["position", about.position], ["rank", about.rank],
    ];
    const charts = h("div", { class: "charts" });
    fill(
      element,
      h("h2", {}, "The direction"),
      h("div", { class: "scroll" }, table("What was measured", ["what", "value"],
        facts.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => [name, String(value)]))),
      charts,
      h("details", {}, h("summary", {}, "The record"), h("pre", { tabindex: 0 }, JSON.stringify(found.record, null, 1))),
    );
    if (found.charts.length) draw(charts, () => found.charts as Chart[]);
    else fill(charts, h("p", {}, "This direction file has no figures by layer."));
  } catch (error) {
    failed(element, error);
  }
}

interface Point {
  set: "harmful" | "harmless";
  category: string;
  prompt: string;
  place: [number, number];
}

/** Both sets in a plane, after a layer that can be chosen: filled harmful, hollow harmless, a colour for each category. */
async function clouds(element: HTMLElement, ready: Ready): Promise<void> {
  const picture = h("div", { class: "charts" });
  const by = h("select", { id: "by" }, ...["category", "set"].map((one) => h("option", { value: one }, one)));
  let points: Point[] = [];
  let title = "";
  const given = (): Chart[] => [{
    title, x: "component along the direction", y: "largest other component", series: series(points, by.value === "category"),
  }];
  try {
    const about = await ready;
    const layer = h("select", { id: "at" }, h("option", { value: "" }, about.layer === null ? "last" : `measured (${about.layer})`),
      ...Array.from({ length: about.layers }, (_, index) => h("option", { value: index }, String(index))));
    const ask = async () => {
      try {
        for await (const found of work("clouds", { at: layer.value === "" ? undefined : Number(layer.value) })) {
          if (!found.points) continue;
          points = found.points;
          title = `Held-out prompts after layer ${found.layer}, at token ${found.position}`;
          fill(picture, ...given().map(chart));
        }
      } catch (error) {
        failed(picture, error);
      }
    };
    layer.addEventListener("change", () => void ask());
    by.addEventListener("change", () => fill(picture, ...given().map(chart)));
    fill(element, h("h2", {}, "The two sets of prompts"),
      h("div", { class: "row" }, field("After layer", layer), field("Colour by", by)), picture);
    await ask();
    addEventListener("resize", () => picture.isConnected && fill(picture, ...given().map(chart)));
  } catch (error) {
    failed(element, error);
  }
}

function series(points: Point[], categories: boolean): Series[] {
  const named = (one: Point) => (categories ? one.category : "") || one.set;
  const kinds = [...new Set(points.map(named))].sort();
  const found = new Map<string, Series>();
  for (const one of points) {
    const name = categories && one.category ? `${one.set}: ${one.category}` : one.set;
    const some: Series = found.get(name) ?? {
      name, points: [], labels: [], hollow: one.set === "harmless", kind: kinds.indexOf(named(one)),
    };
    some.points.push(one.place);
    some.labels!.push(one.prompt);
    found.set(name, some);
  }
  return [...found.values()].sort((a, b) => a.name.localeCompare(b.name));
}
