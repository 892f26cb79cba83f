/** Requests to the studio's server, with the token of the page's address. */

import { place } from "./place";

export type Event = Record<string, any>;

/** What is known of the model before it is loaded. */
export interface Known {
  name: string;
  version: string;
  strength: number;
  direction: string | null;
  ready: boolean;
  /** What is done until it is ready, and how far it is. */
  doing?: string;
  progress?: { label: string; done: number; total: number | null } | null;
}

export interface About extends Known {
  architecture: string;
  layers: number;
  width: number;
  rank: number;
  method: string | null;
  layer: number | null;
  position: number | string | null;
  means: boolean;
  /** The runtime in which it replies. */
  talks_in: string;
}

/** The model, once it is loaded. */
export type Ready = Promise<About>;

function headers(): Record<string, string> {
  return { Authorization: `Bearer ${place().token}`, "Content-Type": "application/json" };
}

async function refused(answer: Response): Promise<Error> {
  const said = await answer.json().catch(() => ({}));
  return new Error(said.error ?? `the server answers ${answer.status}.`);
}

/** What the model is. */
export async function about(): Promise<Known | About> {
  const answer = await fetch("/api/about", { headers: headers() });
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

/** The events of a piece of work, as they come. */
export async function* work(name: string, body: object, signal?: AbortSignal): AsyncGenerator<Event> {
  const answer = await fetch(`/api/${name}`, {
    method: "POST",
    headers: headers(),
    body: JSON.stringify(body),
    signal: signal ?? null,
  });
  if (!answer.ok || !answer.body) throw await refused(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (left + value).split("\n");
    left = lines.pop() ?? "";
    for (const line of lines) {
      const event: Event = JSON.parse(line);
      if (event.error) throw new Error(event.error);
      yield event;
    }
  }
}

/** The last event of a short piece of work. */
export async function once(name: string, body: object): Promise<Event> {
  let last: Event = {};
  for await (const event of work(name, body)) last = event;
  return last;
}

/** Copy a file to the server, which keeps it until it was read; gives its number there. */
export async function drop(file: File): Promise<number> {
  const answer = await fetch(`/api/drop?${new URLSearchParams({ name: file.name })}`, {
    method: "POST", headers: headers(), body: file,
  });
  if (!answer.ok) throw await refused(answer);
  return (await answer.json()).dropped;
}
