/** Check: whether a direction was removed from a model's weights. */

import { work } from "./api";
import { field, fill, h } from "./dom";
import { sentence } from "./sentence";

export function check(): HTMLElement {
  const model = h("input", { type: "text", id: "model", required: true, size: 40, placeholder: "a folder, a .gguf, a Hugging Face id" });
  const result = h("div", { role: "status" });
  const run = async (event: Event) => {
    event.preventDefault();
    fill(result, h("p", {}, "reading the weights …"));
    try {
      for await (const one of work("check", { model: model.value })) {
        if (!one.verdict) continue;
        fill(
          result,
          h("h2", {}, `Verdict: ${one.verdict}`),
          h("p", {}, "The same on the command line: ", h("code", {}, one.command)),
          h("iframe", { src: one.page, title: "Evidence", class: "report" }),
        );
      }
    } catch (error) {
      fill(result, h("p", { class: "error", role: "alert" }, sentence(error)));
    }
  };
  return h(
    "div", { class: "check" },
    h("form", { class: "row", onsubmit: run as EventListener },
      field("Model on this machine or on Hugging Face", model), h("button", { type: "submit" }, "Check")),
    result,
  );
}
