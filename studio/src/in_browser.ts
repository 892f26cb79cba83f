/** A GGUF in llama.cpp, which runs in this browser as WebAssembly (wllama). */

import { LoggerWithoutDebug, Wllama } from "@wllama/wllama";
import type { Message } from "./column";

export interface Files {
  /** The address of the GGUF; of a split one, that of the first part. */
  url: string;
  bytes: number;
}

const ENGINE = { default: "./wllama.wasm" };

/** For browsers without WebAssembly's 64-bit memory, such as Safari. */
const COMPATIBLE = { wasm: "./wllama-compat.wasm", worker: "./wllama-compat.js" };

export class InBrowser {
  private engine: Wllama | null = null;

  constructor(private readonly files: Files) {}

  get ready(): boolean {
    return this.engine !== null;
  }

  get threads(): number {
    return this.engine?.isMultithread() ? this.engine.getNumThreads() : 1;
  }

  /** Fetch the model, of which the browser keeps a copy, and load it. */
  async load(progress: (loaded: number, total: number) => void): Promise<void> {
    const engine = new Wllama(ENGINE, { logger: LoggerWithoutDebug, suppressNativeLog: true });
    engine.setCompat(COMPATIBLE);
    await engine.loadModelFromUrl(new URL(this.files.url, document.baseURI).href, {
      n_ctx: 4096, n_parallel: 1, jinja: true,
      progressCallback: ({ loaded }) => progress(loaded, this.files.bytes),
    });
    this.engine = engine;
  }

  /** The pieces of a reply: at each step the likeliest token. */
  async *reply(
    messages: (Message | { role: "system"; content: string })[], values: Record<string, unknown>, signal: AbortSignal,
  ): AsyncGenerator<string> {
    const chunks = await this.engine!.createChatCompletion({
      messages, max_tokens: 512, temperature: 0, stream: true, abortSignal: signal,
      chat_template_kwargs: values, reasoning_format: "none",
    } as Parameters<Wllama["createChatCompletion"]>[0] & { stream: true });
    for await (const chunk of chunks) {
      const text = chunk.choices[0]?.delta.content;
      if (text) yield text;
    }
  }
}
