/** The box in which a question is written, with prompts to choose from. */

import { h } from "./dom";

export class Question {
  readonly form: HTMLElement;
  readonly offered = h("select", { "aria-label": "Example prompts" }, h("option", { value: "" }, "Example prompts …"));

  /** `ask` is given what was written, without space around it, and tells whether the box may be emptied. */
  constructor(placeholder: string, ask: (content: string) => boolean) {
    const box = h("textarea", { id: "question", rows: 2, "aria-label": "Message", placeholder });
    const send = (event?: Event) => {
      event?.preventDefault();
      if (ask(box.value.trim())) box.value = "";
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    });
    this.offered.addEventListener("change", () => {
      if (this.offered.value) box.value = this.offered.value;
      this.offered.value = "";
      box.focus();
    });
    this.form = h("form", { class: "ask", onsubmit: send as EventListener }, box, h("button", { type: "submit" }, "Send"));
  }
}

/** Prompts as options of a `select`. */
export function options(prompts: string[]): HTMLElement[] {
  return prompts.map((one) => h("option", { value: one }, one));
}
