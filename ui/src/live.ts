// Follows the steps of the server. Knows: /debug/steps. While the page is hidden nothing is read; a
// connection that is lost is made again, and steps that were seen before are left out.
import { ApiError, request, sleep } from "./api";
import { linesOf, readLine, type TraceStore } from "./trace";

export type LiveState =
  | { kind: "connecting" }
  | { kind: "following" }
  | { kind: "off"; message: string }
  | { kind: "key" }
  | { kind: "lost"; message: string; seconds: number };

const FIRST_WAIT = 1;
const LONGEST_WAIT = 15;

export class Live {
  #run: AbortController | null = null;
  #wanted = false;
  #follows = false;

  constructor(
    readonly store: TraceStore,
    private readonly changed: () => void,
    private readonly tell: (state: LiveState) => void,
  ) {
    document.addEventListener("visibilitychange", () => this.#apply());
  }

  start(): void {
    this.#wanted = true;
    this.#apply();
  }

  /** Tries again at once, unless the steps are being followed: the server has just become ready. */
  retry(): void {
    if (this.#follows) return;
    this.stop();
    this.start();
  }

  stop(): void {
    this.#wanted = false;
    this.#apply();
  }

  #apply(): void {
    const wanted = this.#wanted && !document.hidden;
    if (wanted === (this.#run !== null)) return;
    this.#run?.abort();
    this.#follows = false;
    this.#run = wanted ? new AbortController() : null;
    if (this.#run) void this.#follow(this.#run.signal);
  }

  async #follow(signal: AbortSignal): Promise<void> {
    let wait = FIRST_WAIT;
    this.tell({ kind: "connecting" });
    while (!signal.aborted) {
      let why = "The stream of steps has ended.";
      try {
        const path = "debug/steps?follow=true&limit=2000";
        const response = await request(path, { signal, accept: "application/x-ndjson" });
        this.#follows = true;
        this.tell({ kind: "following" });
        wait = FIRST_WAIT;
        await this.#read(response);
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof ApiError && error.status === 401) return this.#end({ kind: "key" });
        if (error instanceof ApiError && error.status === 404) {
          return this.#end({ kind: "off", message: error.message });
        }
        why = error instanceof ApiError ? error.message : "The server does not answer.";
      }
      if (signal.aborted) return;
      this.#follows = false;
      this.tell({ kind: "lost", message: why, seconds: wait });
      await sleep(1000 * wait, signal);
      wait = Math.min(2 * wait, LONGEST_WAIT);
    }
  }

  #end(state: LiveState): void {
    this.#wanted = false;
    this.#run = null;
    this.tell(state);
  }

  async #read(response: Response): Promise<void> {
    const store = this.store;
    for await (const { text } of linesOf(response.body!)) {
      const line = readLine(text);
      if (line.type === "step") {
        const last = store.last;
        if (last && line.step.id <= last.id) {
          if (line.step.time <= last.time) continue; // it came before the connection was lost
          store.clear(); // the server was started again
        }
      } else if (line.type === "event" && line.event.time <= (store.events.at(-1)?.time ?? 0)) {
        continue;
      }
      store.add(line);
      this.changed();
    }
  }
}
