/** Check: whether a direction was removed from a model's weights. */

import { drop, work } from "./api";
import { field, fill, h } from "./dom";
import { sentence } from "./sentence";

export function check(): HTMLElement {
  const model = h("input", { type: "text", id: "model", required: true, size: 40, placeholder: "a folder, a .gguf, a Hugging Face id" });
  const file = h("input", { type: "file", id: "file", accept: ".gguf" });
  const result = h("div", { role: "status" });
  const run = async (name: string, asked: () => Promise<object>) => {
    fill(result, h("p", {}, `${name}: reading the weights …`));
    try {
      for await (const one of work("check", await asked())) {
        if (!one.verdict) continue;
        fill(
          result,
          h("h2", {}, `${name}: ${one.verdict}`),
          h("p", {}, "The same on the command line: ", h("code", {}, one.command)),
          h("iframe", { src: one.page, title: "Evidence", class: "report" }),
        );
      }
    } catch (error) {
      fill(result, h("p", { class: "error", role: "alert" }, sentence(error)));
    }
  };
  const named = (event: Event) => {
    event.preventDefault();
    void run(model.value, async () => ({ model: model.value }));
  };
  const given = (one: File | undefined) => one && void run(one.name, async () => ({ dropped: await drop(one) }));
  file.addEventListener("change", () => given(file.files?.[0]));
  const element = h(
    "div", { class: "check" },
    h("form", { class: "row", onsubmit: named },
      field("Model on this machine or on Hugging Face", model), h("button", { type: "submit" }, "Check"),
      field("Or a file, chosen or dropped here", file)),
    result,
  );
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    given(event.dataTransfer?.files[0]);
  });
  return element;
}
