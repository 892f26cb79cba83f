/** Write: the edit in files, and the command line that does the same. */

import { work, type Event, type Known, type Ready } from "./api";
import { field, fill, h, table } from "./dom";
import { controls, edit } from "./edit";
import { sentence } from "./sentence";

export function write(known: Known, ready: Ready): HTMLElement {
  const output = h("input", { type: "text", id: "output", required: true, size: 40, placeholder: "edited/ or edited.gguf or edit.lora.gguf" });
  const direction = h("input", { type: "text", id: "direction", size: 30 });
  direction.value = "direction.safetensors";
  const result = h("div", { role: "status" });
  const run = async (event: globalThis.Event | null, writes: boolean) => {
    event?.preventDefault();
    if (!output.reportValidity()) return;
    const asked = { output: output.value, direction: direction.value, ...edit, write: writes };
    fill(result);
    try {
      for await (const one of work("write", asked)) show(one);
    } catch (error) {
      result.append(h("p", { class: "error", role: "alert" }, sentence(error)));
    }
  };
  const show = (one: Event) => {
    if (one.command)
      result.append(h("p", {}, "The command line that does the same:"), h("pre", {}, h("code", {}, one.command)));
    if (one.written)
      result.append(table("Written", ["output", "format", "files", "note"],
        one.written.map((row: Event) => [row.output, row.format, (row.files ?? []).join(", "), row.note ?? ""])));
  };
  return h(
    "div", { class: "write" },
    controls(ready, () => undefined),
    h("form", { class: "row", onsubmit: ((event: globalThis.Event) => run(event, true)) as EventListener },
      field("Output: the ending chooses the format", output),
      field(known.direction ? `Direction file, written if it is not ${known.direction}` : "Direction file, written first", direction),
      h("button", { type: "button", onclick: () => void run(null, false) }, "Show the command"),
      h("button", { type: "submit" }, "Write")),
    result,
  );
}
