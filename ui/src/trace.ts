// Step traces: their lines, what is wrong with a line, and the steps that are kept.
// Knows: the format of docs/trace.md. Knows nothing of where lines come from, nor of what is drawn.

export interface Header {
  version: number;
  server?: string;
  model?: string;
  time?: number;
  device?: string;
  device_name?: string;
  mode?: string;
  compilation?: { state: string; generation: number; reason: string };
  ladders?: Partial<Record<Ladder, number[]>>;
  in_service?: Record<Ladder, number[]>;
  graphs?: { captured: number; total: number };
  max_num_seqs?: number;
  max_num_batched_tokens?: number;
  max_model_len?: number;
  kv_blocks?: number;
  itl_target_ms?: number | null;
  startup?: { part: string; seconds: number }[];
}

export type Ladder = "decode" | "mixed" | "epilogue";
export const LADDERS: readonly Ladder[] = ["decode", "mixed", "epilogue"];

export interface Step {
  id: number;
  time: number;
  mode: string;
  reason: string;
  tokens: number;
  padding: number;
  rung?: number | null;
  rung_requests?: number | null;
  rows?: number;
  decode_rows?: number;
  prefill_tokens?: number;
  context?: number;
  leaves?: string;
  /** The padded rows of the second stage; null if there is none. */
  epilogue?: number | null;
  generation?: number;
  launches?: number | null;
  launches_replaced?: number | null;
  budget_reason?: string | null;
  predicted_ms?: number | null;
  measured_ms?: number | null;
  wall_ms?: number | null;
  host_ms?: Record<string, number>;
  sampled?: number;
  running?: number;
  waiting?: number;
  kv_used?: number;
  preempted?: number;
  requests?: [string, number][];
}

export interface TraceEvent {
  time: number;
  event: string;
  [name: string]: unknown;
}

export type Line =
  | { type: "header"; header: Header }
  | { type: "step"; step: Step }
  | { type: "event"; event: TraceEvent }
  | { type: "other" };

/** What is wrong with a line of a trace, in a sentence. */
export class TraceError extends Error {}

/** Characters of a line beyond which it is none of a trace: a file without line ends is not read
 * into memory as a whole. */
const LONGEST_LINE = 1 << 24;

/** Characters of a whole trace that the page reads: some hundred thousand steps, each of which takes
 * two or three times as much memory as its line. */
const LONGEST_TRACE = 1 << 28;

type Check = (value: unknown) => boolean;

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
const isNumber: Check = (value) => typeof value === "number" && Number.isFinite(value);
const isText: Check = (value) => typeof value === "string";
const isListOf = (each: Check): Check => (value) => Array.isArray(value) && value.every(each);
const isMapOf = (each: Check): Check => (value) => isObject(value) && Object.values(value).every(each);
const isRow: Check = (value) => Array.isArray(value) && isText(value[0]) && isNumber(value[1]);
const isPart: Check = (value) => isObject(value) && isText(value.part) && isNumber(value.seconds);

const each = (check: Check, ...names: string[]): Record<string, Check> =>
  Object.fromEntries(names.map((name) => [name, check]));

/** The fields that a line must have, by its type. */
const NEEDED: Record<string, Record<string, Check>> = {
  header: {},
  step: { ...each(isNumber, "id", "time", "tokens", "padding"), ...each(isText, "mode", "reason") },
  event: { ...each(isNumber, "time"), ...each(isText, "event") },
};

/** What fields are where they are there and not null. */
const KNOWN: Record<string, Record<string, Check>> = {
  header: {
    ...each(isText, "server", "model", "device", "device_name", "mode"),
    ...each(isMapOf(isListOf(isNumber)), "ladders", "in_service"),
    startup: isListOf(isPart),
  },
  step: {
    ...each(isNumber, "rung", "rung_requests", "rows", "decode_rows", "prefill_tokens", "context"),
    ...each(isNumber, "epilogue", "generation", "launches", "launches_replaced", "predicted_ms"),
    ...each(isNumber, "measured_ms", "wall_ms", "sampled", "running", "waiting", "kv_used"),
    ...each(isNumber, "preempted"),
    ...each(isText, "budget_reason"),
    host_ms: isMapOf(isNumber),
    requests: isListOf(isRow),
  },
  event: each(isMapOf(isListOf(isNumber)), "ladders", "in_service"),
};

/** Throws TraceError for a line in which a field is missing, or is not what it has to be. */
function check(line: Record<string, unknown>, type: string): void {
  for (const [name, is] of Object.entries(NEEDED[type]!)) {
    if (!is(line[name])) throw new TraceError(`the ${type} has no ${is === isNumber ? "number" : "text"} "${name}"`);
  }
  for (const [name, is] of Object.entries(KNOWN[type]!)) {
    const value = line[name];
    if (value !== undefined && value !== null && !is(value)) {
      throw new TraceError(`the "${name}" of the ${type} is not what docs/trace.md says`);
    }
  }
}

/** Reads one line. Throws TraceError. */
export function readLine(text: string): Line {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw new TraceError("this is not JSON. A trace has one JSON object on each line");
  }
  if (!isObject(value) || typeof value.type !== "string") {
    throw new TraceError('this is not an object with a "type", as every line of a trace is');
  }
  if (value.type === "header") {
    if (value.version !== 1) {
      throw new TraceError(`the format has version ${String(value.version)}, and this page reads version 1`);
    }
    check(value, value.type);
    return { type: "header", header: value as unknown as Header };
  }
  if (value.type === "step") {
    check(value, value.type);
    return { type: "step", step: value as unknown as Step };
  }
  if (value.type === "event") {
    check(value, value.type);
    return { type: "event", event: value as unknown as TraceEvent };
  }
  return { type: "other" };
}

/** The ladder by which a step was padded, and its rung; null for a step without a graph. */
export function rungOf(step: Step): { ladder: Ladder; rung: number } | null {
  if (step.rung === null || step.rung === undefined || step.mode === "NONE") return null;
  if (step.mode === "FULL" && !step.prefill_tokens) {
    return { ladder: "decode", rung: step.rung_requests ?? step.rung };
  }
  return { ladder: "mixed", rung: step.rung };
}

export interface RungCount {
  steps: number;
  tokens: number;
  padding: number;
}

/** The steps of one trace in order, at most `most` of them, and what is counted over all seen. */
export class TraceStore {
  header: Header | null = null;
  steps: Step[] = [];
  events: TraceEvent[] = [];
  readonly modes = new Map<string, RungCount>();
  readonly rungs = new Map<string, RungCount>();
  /** The rungs that serve, as the last line that told them said. */
  inService: Record<Ladder, number[]> | null = null;
  /** The number of steps that were dropped from the front of `steps`. */
  dropped = 0;

  constructor(readonly most = 6000) {}

  add(line: Line): void {
    if (line.type === "header") {
      this.header = line.header;
      this.inService = line.header.in_service ?? null;
    }
    if (line.type === "event") this.#addEvent(line.event);
    if (line.type === "step") this.#addStep(line.step);
  }

  clear(): void {
    this.steps = [];
    this.events = [];
    this.modes.clear();
    this.rungs.clear();
    this.dropped = 0;
  }

  get first(): Step | undefined {
    return this.steps[0];
  }

  get last(): Step | undefined {
    return this.steps[this.steps.length - 1];
  }

  /** The index of the last step for which `key` is at most `value`; -1 if there is none. */
  lastBefore(value: number, key: (step: Step, index: number) => number): number {
    let low = 0;
    let high = this.steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (key(this.steps[middle]!, middle) <= value) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  indexOf(id: number): number {
    const index = this.lastBefore(id, (step) => step.id);
    return this.steps[index]?.id === id ? index : -1;
  }

  /** The events between the step before a step and the step. */
  eventsBefore(step: Step): TraceEvent[] {
    const index = this.indexOf(step.id);
    const before = this.steps[index - 1];
    if (!before) return [];
    return this.events.filter(({ time }) => time > before.time && time <= step.time);
  }

  #addEvent(event: TraceEvent): void {
    this.events.push(event);
    if (event.ladders && this.header) this.header = { ...this.header, ladders: event.ladders as Header["ladders"] };
    if (event.in_service) this.inService = event.in_service as Record<Ladder, number[]>;
    if (this.events.length > this.most / 12) this.events.splice(0, 250);
  }

  #addStep(step: Step): void {
    this.steps.push(step);
    if (this.steps.length > 1.25 * this.most) {
      const old = this.steps.length - this.most;
      this.steps.splice(0, old);
      this.dropped += old;
    }
    tally(this.modes, step.mode, step);
    const at = rungOf(step);
    if (at) tally(this.rungs, `${at.ladder}/${at.rung}`, step);
    if (step.epilogue) {
      const sampled = Math.min(step.sampled ?? 0, step.epilogue);
      tally(this.rungs, `epilogue/${step.epilogue}`, { tokens: sampled, padding: step.epilogue - sampled });
    }
  }
}

function tally(counts: Map<string, RungCount>, key: string, step: { tokens: number; padding: number }): void {
  let found = counts.get(key);
  if (!found) counts.set(key, (found = { steps: 0, tokens: 0, padding: 0 }));
  found.steps += 1;
  found.tokens += step.tokens;
  found.padding += step.padding;
}

/** The lines of a trace file with the steps and events that are kept, in the order of their times;
 * null if there is no step. */
export function linesOfTrace({ header, steps, events }: TraceStore): string[] | null {
  if (!header || !steps.length) return null;
  const inOrder = [...steps, ...events].sort((a, b) => a.time - b.time);
  return [header, ...inOrder].map((line) => JSON.stringify(line));
}

/** The lines of a stream of bytes, without those that are empty, each with its number. */
export async function* linesOf(
  stream: ReadableStream<Uint8Array>,
): AsyncGenerator<{ text: string; number: number }> {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let number = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const lines = (done ? decoder.decode() : decoder.decode(value, { stream: true })).split("\n");
      lines[0] = rest + lines[0];
      rest = done ? "" : lines.pop()!;
      for (const text of lines) {
        number += 1;
        if (text.trim()) yield { text, number };
      }
      if (rest.length > LONGEST_LINE) {
        throw new TraceError(`Line ${number + 1} has more than ${LONGEST_LINE} characters, as none of a trace has.`);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

/** Reads a whole trace. Throws TraceError, whose message names the line. */
export async function readTrace(stream: ReadableStream<Uint8Array>): Promise<TraceStore> {
  const store = new TraceStore(Infinity);
  let length = 0;
  for await (const { text, number } of linesOf(stream)) {
    length += text.length;
    if (length > LONGEST_TRACE) {
      throw new TraceError(
        `Line ${number}: the trace has more than ${LONGEST_TRACE} characters, the most that this page reads. ` +
          "Record less with “minisrv trace --steps N FILE”.",
      );
    }
    try {
      const line = readLine(text);
      if (!store.header && line.type !== "header") {
        throw new TraceError('a trace begins with its header ("type": "header")');
      }
      store.add(line);
    } catch (error) {
      if (!(error instanceof TraceError)) throw error;
      throw new TraceError(`Line ${number}: ${error.message}. Record one with “minisrv trace FILE”.`);
    }
  }
  if (!store.header) throw new TraceError("Line 1: the file is empty. Record one with “minisrv trace FILE”.");
  if (!store.steps.length) throw new TraceError("The trace has a header and no step: the server had no work while it was recorded.");
  return store;
}
