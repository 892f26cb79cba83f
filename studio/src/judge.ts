/** Judge: refusals before and after, prompt by prompt, and verdicts corrected by hand. */

import { work, type Event, type Known, type Ready } from "./api";
import { download, field, fill, h, table } from "./dom";
import { controls, edit } from "./edit";
import { sentence } from "./sentence";

const VERDICTS = ["refusal", "answer", "broken"];

interface Reply {
  text: string;
  verdict: string;
  /** The words that mark a refusal. */
  marker: string | null;
  byHand?: boolean;
}

interface Row {
  set: string;
  category: string;
  prompt: string;
  before: Reply;
  after: Reply;
}

export function judge(_: Known, ready: Ready): HTMLElement {
  const limit = h("input", { type: "number", min: 1, max: 512, value: 8, id: "limit" });
  const longest = h("input", { type: "number", min: 1, max: 4096, value: 64, id: "judge-longest" });
  const status = h("p", { role: "status" });
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Replies" });
  const summary = h("div", { class: "scroll" });
  const list = h("div", { class: "scroll" });
  const capable = h("div", { class: "scroll" });
  const rows: Row[] = [];
  let stop: AbortController | null = null;

  const count = () => {
    const groups = new Map<string, Row[]>();
    for (const row of rows)
      for (const name of [row.set, row.category && `${row.set}: ${row.category}`])
        if (name) groups.set(name, [...(groups.get(name) ?? []), row]);
    const share = (some: Row[], side: "before" | "after") =>
      `${some.filter((one) => one[side].verdict === "refusal").length} of ${some.length}`;
    fill(summary, table("Refusals", ["prompts", "before", "after"],
      [...groups].sort(([a], [b]) => a.localeCompare(b)).map(([name, some]) => [name, share(some, "before"), share(some, "after")])));
  };

  const verdict = (row: Row, side: "before" | "after") => {
    const select = h("select", { "aria-label": `Verdict ${side}: ${row.prompt}` }, ...VERDICTS.map((one) => h("option", { value: one }, one)));
    select.value = row[side].verdict;
    select.addEventListener("change", () => {
      row[side] = { ...row[side], verdict: select.value, byHand: true };
      count();
    });
    return h("div", {}, select, row[side].marker && h("span", { class: "note" }, ` by “${row[side].marker}”`),
      h("p", { class: "text" }, row[side].text));
  };

  const body = h("tbody");
  const run = async (event: Event | SubmitEvent) => {
    (event as SubmitEvent).preventDefault();
    stop?.abort();
    const mine = (stop = new AbortController());
    rows.length = 0;
    fill(body);
    bar.hidden = false;
    bar.removeAttribute("value");
    status.textContent = "asking both models …";
    try {
      const asked = { ...edit, limit: Number(limit.value), max_tokens: Number(longest.value) };
      for await (const one of work("judge", asked, mine.signal)) {
        if (one.total) bar.max = one.total;
        if (!one.prompt) continue;
        const row = one as unknown as Row;
        rows.push(row);
        bar.value = rows.length;
        body.append(h("tr", {}, h("td", {}, row.set), h("td", {}, row.category), h("td", { class: "text" }, row.prompt),
          h("td", { "data-label": "before" }, verdict(row, "before")), h("td", { "data-label": "after" }, verdict(row, "after"))));
        status.textContent = `${rows.length} of ${bar.max} prompts`;
        count();
      }
    } catch (error) {
      status.textContent = mine.signal.aborted ? `stopped after ${rows.length} prompts` : sentence(error);
    }
    bar.hidden = true;
  };
  const tasks = async () => {
    stop?.abort();
    const mine = (stop = new AbortController());
    fill(capable, h("p", { role: "status" }, "asking both models small tasks …"));
    try {
      for await (const one of work("capability", { ...edit }, mine.signal)) {
        if (!one.capability) continue;
        const groups = Object.entries(one.capability as Record<string, [number, number, number]>);
        fill(capable, table("Right answers to small tasks", ["tasks", "before", "after"],
          groups.map(([name, [before, after, count]]) => [name, `${before} of ${count}`, `${after} of ${count}`])));
      }
    } catch (error) {
      capable.append(h("p", { role: "status" }, mine.signal.aborted ? "stopped" : sentence(error)));
    }
  };
  fill(list, h("table", { class: "replies" }, h("caption", {}, "Replies"), h("thead", {}, h("tr", {},
    ...["set", "category", "prompt", "before", "after"].map((one) => h("th", { scope: "col" }, one)))), body));
  return h(
    "div", { class: "judge" },
    controls(ready, () => undefined),
    h("form", { class: "row", onsubmit: run as EventListener },
      field("Prompts of each set", limit), field("Longest reply in tokens", longest),
      h("button", { type: "submit" }, "Judge"),
      h("button", { type: "button", onclick: () => void tasks() }, "Capability"),
      h("button", { type: "button", onclick: () => stop?.abort() }, "Stop"),
      h("button", { type: "button", onclick: () => download("labels.json", rows) }, "Export labels")),
    status, bar, summary, capable, list,
  );
}
