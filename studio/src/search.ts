/** The front of a search for a gentler edit, as it runs, and its edits to talk to. */

import { work, type Event } from "./api";
import { chart, short } from "./chart";
import { field, fill, h, table } from "./dom";
import { edit, edited } from "./edit";
import { link } from "./place";
import { sentence } from "./sentence";

interface Trial {
  kl: number;
  refusal_score: number;
  refused_first_token: number;
  method: string;
  [parameter: string]: unknown;
}

export function search(): HTMLElement {
  const most = h("input", { id: "trials", type: "number", min: 1, max: 100000, value: 64 });
  const journal = h("input", { id: "journal", type: "text", size: 28, placeholder: "kept until the studio ends" });
  const status = h("p", { role: "status" }, "A search tries edits with other strengths, layers and directions, for the lowest KL without refusals.");
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Trials" });
  const picture = h("div", { class: "charts" });
  const details = h("div", { role: "status" });
  const replies = h("div", { class: "scroll" });
  const go = h("button", { type: "submit" }, "Search");
  const stop = h("button", { type: "button", disabled: true, onclick: () => running?.abort() }, "Stop");
  let running: AbortController | null = null;
  let trials: Trial[] = [];
  let front: number[] = [];
  let picked: number | null = null;

  const at = (some: number[]) => some.map((one): [number, number] => [trials[one]!.refusal_score, trials[one]!.kl]);
  const said = (one: number) => `trial ${one}: refusal score ${short(trials[one]!.refusal_score)}, KL ${short(trials[one]!.kl)}`;
  const draw = () => {
    const others = trials.map((_, index) => index).filter((one) => !front.includes(one));
    const focused = picture.contains(document.activeElement);
    fill(picture, chart({
      title: "Trials: fewer refusals to the left, less change below", x: "refusal score, nats", y: "KL, nats", log: true,
      series: [
        { name: "front", points: at(front), labels: front.map(said), joined: true, kind: 0, choose: (index) => pick(front[index]!), picked: front.indexOf(picked ?? -1) },
        { name: "other trials", points: at(others), labels: others.map(said), faint: true, kind: 1 },
      ],
    }));
    if (focused) picture.querySelector<SVGElement>('[aria-pressed="true"]')?.focus();
  };
  const pick = (number: number) => {
    picked = number;
    const one = trials[number]!;
    const mean = (part: string) => short(Number(one[`${part}_strength`]));
    fill(details, table(`Trial ${number}`, ["what", "value"], [
      ["KL on harmless prompts, nats", short(one.kl)], ["refusal score, nats", short(one.refusal_score)],
      ["refused at the first token", `${Math.round(one.refused_first_token * 100)}%`], ["directions", one.method],
      ["strength in attention and MLP", `${mean("attention")} and ${mean("mlp")}`],
      ["layers", `${one.first_layer} to ${one.last_layer}`], ["embedding", one.embedding ? "edited" : "as it is"],
    ]), h("p", {}, h("button", { type: "button", onclick: () => talk(number) }, "Talk to it")));
    draw();
  };
  const talk = (number: number) => {
    Object.assign(edit, { point: number, layer: null, rank: null });
    edited();
    location.hash = link("talk");
  };
  const seen = (one: Event) => {
    if (one.trials) {
      trials.push(...one.trials);
      front = one.front;
      bar.value = trials.length;
      status.textContent = `${trials.length} of ${most.value} trials, ${front.length} on the front`;
      if (trials.length) draw();
    }
    if (one.ended) {
      status.textContent = `${trials.length} trials; ended: ${one.ended}. Chosen: trial ${one.chosen}`;
      fill(replies, table("Replies of edits on the front", ["trial", "KL", "refused", "broken"], one.replies.map((row: Event) => [
        `${row.number}${row.number === one.chosen ? ", chosen" : ""}`, short(row.kl), `${Math.round(row.refusal_rate * 100)}%`, `${Math.round(row.broken_rate * 100)}%`,
      ])));
      pick(one.chosen);
    }
  };
  const run = async (event: globalThis.Event) => {
    event.preventDefault();
    const mine = (running = new AbortController());
    [trials, front, picked] = [[], [], null];
    fill(replies);
    fill(details);
    status.textContent = "encoding the prompts …";
    go.disabled = true;
    stop.disabled = bar.hidden = false;
    bar.max = Number(most.value);
    try {
      for await (const one of work("search", { trials: Number(most.value), journal: journal.value }, mine.signal)) seen(one);
      go.textContent = "Search";
    } catch (error) {
      status.textContent = mine.signal.aborted ? `stopped after ${trials.length} trials; Resume goes on` : sentence(error);
      if (mine.signal.aborted) go.textContent = "Resume";
    }
    bar.hidden = stop.disabled = true;
    go.disabled = false;
  };
  return h("section", {}, h("h2", {}, "A search for a gentler edit"),
    h("form", { class: "row", onsubmit: run as EventListener },
      field("Trials at most", most), field("Journal: a file from which a search goes on", journal), go, stop),
    status, bar, picture, details, replies);
}
