/** Talk: the model before and after the edit, side by side. */

import { once, work, type Known, type Ready } from "./api";
import { Column, type Message, type Piece, type Replies } from "./column";
import { download, field, h } from "./dom";
import { controls, edit, named } from "./edit";
import { options, Question } from "./question";

export function talk(known: Known, ready: Ready): HTMLElement {
  const title = h("h2", { class: "name" }, "Edited");
  const system = h("textarea", { rows: 1, id: "system", placeholder: "none" });
  const thinks = h("input", { type: "checkbox", id: "thinking" });
  const longest = h("input", { type: "number", min: 1, max: 8192, value: 256, id: "longest" });
  const temperature = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0, id: "temperature" });

  const common = () => ({
    system: system.value, thinking: thinks.checked, max_tokens: Number(longest.value),
    temperature: Number(temperature.value),
  });
  const before = new Column(h("h2", {}, "Original"), "Original", replies(() => ({ ...common(), strength: 0 })));
  const after = new Column(title, "Edited", replies(() => ({ ...common(), ...edit })));
  const entitle = () => {
    title.textContent = `Edited at ${edit.strength}`;
    title.title = named(edit.strength);
  };
  const changed = () => {
    entitle();
    void after.again();
  };
  entitle();
  const where = h("p", { class: "note", hidden: true });
  void ready.then(({ talks_in }) => {
    where.hidden = talks_in === "mlx-lm";
    where.textContent = `Both columns reply in ${talks_in}; the edit is a LoRA adapter, and the strength its scale. Below 0 the component along the direction is strengthened.`;
  }, () => undefined);

  const question = new Question("Ask both models", (content) => {
    if (!content) return false;
    void before.ask(content);
    void after.ask(content);
    return true;
  });
  void once("examples", {}).then(({ examples }) => {
    for (const [name, some] of Object.entries((examples ?? {}) as Record<string, string[]>))
      question.offered.append(h("optgroup", { label: name }, ...options(some)));
  }).catch(() => undefined);

  const button = (name: string, act: () => void) => h("button", { type: "button", onclick: act }, name);
  return h(
    "div",
    { class: "talk" },
    controls(ready, changed),
    where,
    h("div", { class: "columns" }, before.element, after.element),
    question.form,
    h(
      "div",
      { class: "row" },
      question.offered,
      button("Regenerate", () => {
        void before.again();
        void after.again();
      }),
      button("Stop", () => [before, after].forEach((one) => one.halt())),
      button("Clear", () => [before, after].forEach((one) => one.clear())),
      button("Export", () => download("conversation.json", {
        model: known.name, edit, original: before.messages, edited: after.messages,
      })),
    ),
    h(
      "details",
      { class: "more" },
      h("summary", {}, "System message, thinking and length"),
      h("div", { class: "row" },
        field("System message", system), field("Thinking", thinks),
        field("Longest reply in tokens", longest), field("Temperature", temperature)),
    ),
  );
}

/** The replies of a model on the server. */
function replies(chosen: () => object): Replies {
  return async function* (messages: Message[], signal: AbortSignal): AsyncGenerator<Piece> {
    for await (const { text, done, verdict, tokens, condition } of work("talk", { ...chosen(), messages }, signal)) {
      if (text) yield { text };
      if (done) yield { verdict, note: `${verdict}, ${tokens} tokens${condition ? `; ${condition}` : ""}` };
    }
  };
}
