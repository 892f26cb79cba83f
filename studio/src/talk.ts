/** Talk: the model before and after the edit, side by side. */

import { once, sentence, work, type About } from "./api";
import { download, field, fill, h } from "./dom";
import { controls, edit, named } from "./edit";

interface Message {
  role: "user" | "assistant";
  content: string;
}

/** A column: one history of the conversation, and its replies. */
class Column {
  readonly element: HTMLElement;
  readonly messages: Message[] = [];
  private readonly log = h("div", { class: "log", role: "log", "aria-live": "polite", tabindex: 0 });
  private stop: AbortController | null = null;

  constructor(title: HTMLElement, label: string) {
    this.element = h("section", { class: "column", "aria-label": label }, title, this.log);
  }

  async ask(content: string, body: object): Promise<void> {
    this.messages.push({ role: "user", content });
    await this.reply(body);
  }

  /** Reply to the last question anew. */
  async again(body: object): Promise<void> {
    if (!this.messages.length) return;
    this.halt();
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    await this.reply(body);
  }

  halt(): void {
    this.stop?.abort();
  }

  clear(): void {
    this.halt();
    this.messages.length = 0;
    this.draw();
  }

  private async reply(body: object): Promise<void> {
    const stop = (this.stop = new AbortController());
    const asked = { ...body, messages: [...this.messages] };
    const said: Message = { role: "assistant", content: "" };
    this.messages.push(said);
    this.draw();
    const box = this.log.lastElementChild as HTMLElement;
    box.setAttribute("aria-busy", "true");
    try {
      for await (const event of work("talk", asked, stop.signal)) {
        if (event.text) {
          said.content += event.text;
          shown(box, said.content);
        }
        if (event.done) {
          box.dataset.verdict = event.verdict;
          box.append(h("p", { class: "note" }, `${event.verdict}, ${event.tokens} tokens${event.condition ? `; ${event.condition}` : ""}`));
        }
      }
    } catch (error) {
      if (!stop.signal.aborted) box.append(h("p", { class: "error", role: "alert" }, sentence(error)));
      else box.append(h("p", { class: "note" }, "stopped"));
    } finally {
      box.removeAttribute("aria-busy");
      this.log.scrollTop = this.log.scrollHeight;
    }
  }

  private draw(): void {
    fill(this.log, ...this.messages.map((one) => {
      const box = h("div", { class: `message ${one.role}` });
      shown(box, one.content);
      return box;
    }));
    this.log.scrollTop = this.log.scrollHeight;
  }
}

/** Show a reply: its thought folded, and a button that copies it. */
function shown(box: HTMLElement, content: string): void {
  const thought = /^\s*<think>([\s\S]*?)(?:<\/think>|$)/.exec(content);
  const rest = thought ? content.slice(thought[0].length) : content;
  const copy = h("button", {
    type: "button", class: "small", onclick: () => void navigator.clipboard.writeText(content),
  }, "Copy");
  fill(
    box,
    thought && h("details", {}, h("summary", {}, "Thought"), h("p", { class: "text" }, thought[1] ?? "")),
    h("p", { class: "text" }, rest.trimStart()),
    box.classList.contains("assistant") && copy,
  );
}

export function talk(about: About): HTMLElement {
  const title = h("h2", { class: "name" }, "Edited");
  const before = new Column(h("h2", {}, "Original"), "Original");
  const after = new Column(title, "Edited");
  const system = h("textarea", { rows: 1, id: "system", placeholder: "none" });
  const thinks = h("input", { type: "checkbox", id: "thinking" });
  const longest = h("input", { type: "number", min: 1, max: 8192, value: 256, id: "longest" });
  const temperature = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0, id: "temperature" });
  const question = h("textarea", { id: "question", rows: 2, "aria-label": "Message", placeholder: "Ask both models" });
  const offered = h("select", { "aria-label": "Example prompts" }, h("option", { value: "" }, "Example prompts …"));

  const common = () => ({
    system: system.value, thinking: thinks.checked, max_tokens: Number(longest.value),
    temperature: Number(temperature.value),
  });
  const original = () => ({ ...common(), strength: 0 });
  const edited = () => ({ ...common(), ...edit });
  const changed = () => {
    title.textContent = `Edited at ${edit.strength}`;
    title.title = named(edit.strength);
    void after.again(edited());
  };
  title.textContent = `Edited at ${edit.strength}`;

  const send = (event?: Event) => {
    event?.preventDefault();
    const content = question.value.trim();
    if (!content) return;
    question.value = "";
    void before.ask(content, original());
    void after.ask(content, edited());
  };
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  offered.addEventListener("change", () => {
    if (offered.value) question.value = offered.value;
    offered.value = "";
    question.focus();
  });
  void once("examples", {}).then(({ examples }) => {
    for (const [name, some] of Object.entries((examples ?? {}) as Record<string, string[]>))
      offered.append(h("optgroup", { label: name }, ...some.map((one) => h("option", { value: one }, one))));
  }).catch(() => undefined);

  const button = (name: string, act: () => void) => h("button", { type: "button", onclick: act }, name);
  return h(
    "div",
    { class: "talk" },
    controls(about, changed),
    h("div", { class: "columns" }, before.element, after.element),
    h("form", { class: "ask", onsubmit: send as EventListener }, question, h("button", { type: "submit" }, "Send")),
    h(
      "div",
      { class: "row" },
      offered,
      button("Regenerate", () => {
        void before.again(original());
        void after.again(edited());
      }),
      button("Stop", () => [before, after].forEach((one) => one.halt())),
      button("Clear", () => [before, after].forEach((one) => one.clear())),
      button("Export", () => download("conversation.json", {
        model: about.name, edit, original: before.messages, edited: after.messages,
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
