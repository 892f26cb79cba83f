/** An error as a sentence. */
export function sentence(error: unknown): string {
  if (error instanceof TypeError) return "The server does not answer: is it still running?";
  const said = error instanceof Error ? error.message : String(error);
  return said.charAt(0).toUpperCase() + said.slice(1);
}
