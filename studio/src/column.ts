/** A conversation with one model: its messages, and replies that grow while they come. */

import { fill, h } from "./dom";
import { sentence } from "./sentence";

export interface Message {
  role: "user" | "assistant";
  content: string;
}

/** What a reply is made of: pieces of text, and at its end a note and perhaps a verdict. */
export interface Piece {
  text?: string;
  note?: string;
  verdict?: string;
}

/** Replies to a conversation whose last message is the user's. */
export type Replies = (messages: Message[], signal: AbortSignal) => AsyncIterable<Piece>;

/** A column: one history of the conversation, and its replies. */
export class Column {
  readonly element: HTMLElement;
  readonly messages: Message[] = [];
  private readonly log = h("div", { class: "log", role: "log", "aria-live": "polite", tabindex: 0 });
  private stop: AbortController | null = null;

  constructor(title: HTMLElement, label: string, private readonly replies: Replies) {
    this.element = h("section", { class: "column", "aria-label": label }, title, this.log);
  }

  async ask(content: string): Promise<void> {
    this.halt();
    this.messages.push({ role: "user", content });
    await this.reply();
  }

  /** Reply to the last question anew. */
  async again(): Promise<void> {
    if (!this.messages.length) return;
    this.halt();
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    await this.reply();
  }

  halt(): void {
    this.stop?.abort();
  }

  clear(): void {
    this.halt();
    this.messages.length = 0;
    this.draw();
  }

  private async reply(): Promise<void> {
    const stop = (this.stop = new AbortController());
    const asked = [...this.messages];
    const said: Message = { role: "assistant", content: "" };
    this.messages.push(said);
    this.draw();
    const box = this.log.lastElementChild as HTMLElement;
    box.setAttribute("aria-busy", "true");
    const note = (kind: string, text: string) => box.append(h("p", { class: kind, role: kind === "error" && "alert" }, text));
    try {
      for await (const piece of this.replies(asked, stop.signal)) {
        if (piece.text) {
          said.content += piece.text;
          this.follow(() => show(box, said.content));
        }
        if (piece.verdict) box.dataset.verdict = piece.verdict;
        if (piece.note) note("note", piece.note);
      }
    } catch (error) {
      if (stop.signal.aborted) note("note", "stopped");
      else note("error", sentence(error));
    } finally {
      box.removeAttribute("aria-busy");
      this.follow(() => undefined);
    }
  }

  /** Change what is shown, and stay at its end unless the reader has gone elsewhere. */
  private follow(change: () => void): void {
    const { scrollTop, scrollHeight, clientHeight } = this.log;
    const atEnd = scrollHeight - scrollTop - clientHeight < 40;
    change();
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  private draw(): void {
    fill(this.log, ...this.messages.map(message));
    this.log.scrollTop = this.log.scrollHeight;
  }
}

/** A message: of a reply also its thought, folded, and a button that copies it. */
function message(one: Message): HTMLElement {
  const text = h("p", { class: "text" });
  if (one.role === "user") {
    text.textContent = one.content;
    return h("div", { class: "message user" }, text);
  }
  const copy = h("button", {
    type: "button", class: "small", onclick: () => void navigator.clipboard.writeText(one.content),
  }, "Copy");
  const thought = h("details", { hidden: true }, h("summary", {}, "Thought"), h("p", { class: "thought" }));
  const box = h("div", { class: "message assistant" }, thought, text, copy);
  show(box, one.content);
  return box;
}

/** Show the text of a reply. Its elements stay, so that an opened thought stays open. */
function show(box: HTMLElement, content: string): void {
  const found = /^\s*<think>([\s\S]*?)(?:<\/think>|$)/.exec(content);
  box.querySelector("details")!.hidden = !found;
  box.querySelector(".thought")!.textContent = found?.[1] ?? "";
  box.querySelector(".text")!.textContent = (found ? content.slice(found[0].length) : content).trimStart();
}
