/** Find: what the measurement found, layer by layer. */

import { once, type About } from "./api";
import { fill, h, table } from "./dom";
import { sentence } from "./sentence";

export function find(about: About): HTMLElement {
  const element = h("div", { class: "find" }, h("p", { role: "status" }, "…"));
  void draw(element, about);
  return element;
}

async function draw(element: HTMLElement, about: About): Promise<void> {
  try {
    const found = await once("find", {});
    const record = found.record as Record<string, any>;
    const facts: [string, unknown][] = [
      ["model", about.name], ["architecture", about.architecture], ["layers", about.layers],
      ["width", about.width], ["method", about.method], ["layer", about.layer],
      ["position", about.position], ["rank", about.rank],
    ];
    fill(
      element,
      table("The direction", ["what", "value"], facts.filter(([, value]) => value !== null && value !== undefined)
        .map(([name, value]) => [name, String(value)])),
      found.charts.length
        ? h("div", { class: "row" }, ...(found.charts as Chart[]).map(picture))
        : h("p", {}, "This direction file has no figures by layer."),
      h("details", {}, h("summary", {}, "The record"), h("pre", {}, JSON.stringify(record, null, 1))),
    );
  } catch (error) {
    fill(element, h("p", { class: "error", role: "alert" }, sentence(error)));
  }
}

interface Chart {
  title: string;
  svg: string;
}

/** An SVG as an image, which runs nothing. */
function picture(chart: Chart): HTMLElement {
  const image = h("img", {
    src: URL.createObjectURL(new Blob([chart.svg], { type: "image/svg+xml" })), alt: `Chart: ${chart.title}`, class: "charts",
  });
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  return image;
}
