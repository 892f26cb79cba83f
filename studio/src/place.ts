/** The page's address: `#/VIEW?token=…&…`. */

export interface Place {
  view: string;
  token: string;
  more: URLSearchParams;
}

export function place(): Place {
  const hash = location.hash.replace(/^#\/?/, "");
  const [view] = hash.split("?");
  const more = new URLSearchParams(hash.slice(hash.indexOf("?") + 1));
  const token = more.get("token") ?? "";
  more.delete("token");
  return { view: view ?? "", token, more };
}

/** The address of a view, with the token. */
export function link(view: string, more: Record<string, string> = {}): string {
  return `#/${view}?${new URLSearchParams({ token: place().token, ...more })}`;
}

/** Put what a view shows into the address, without a new entry in the history. */
export function keep(view: string, more: Record<string, string>): void {
  history.replaceState(null, "", link(view, more));
}
