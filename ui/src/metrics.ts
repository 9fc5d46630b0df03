// What /metrics says over the last minutes. Knows: Prometheus' text format, and how to take rates and
// quantiles of what was counted between two scrapes.

export type Sample = Map<string, number>;

/** Reads a scrape. Names lose the prefix of the server's own names. */
export function parse(text: string): Sample {
  const found: Sample = new Map();
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const at = line.lastIndexOf(" ");
    const name = line.slice(0, at);
    if (name.startsWith("minisrv")) found.set(name.slice("minisrv:".length), Number(line.slice(at + 1)));
  }
  return found;
}

/** The sum over all series of a name, whatever their labels; null where there is none. */
export function total(sample: Sample, name: string): number | null {
  let sum: number | null = null;
  for (const [key, value] of sample) {
    if (key === name || key.startsWith(`${name}{`)) sum = (sum ?? 0) + value;
  }
  return sum;
}

/** A quantile of what a histogram has counted between two scrapes, within a bucket by proportion. */
export function quantile(before: Sample, after: Sample, name: string, q: number): number | null {
  const bounds: [number, number][] = [];
  for (const [key, value] of after) {
    const match = key.startsWith(`${name}_bucket{`) && /le="([^"]+)"/.exec(key);
    if (match) bounds.push([match[1] === "+Inf" ? Infinity : Number(match[1]), value - (before.get(key) ?? 0)]);
  }
  bounds.sort((a, b) => a[0] - b[0]);
  const all = bounds.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  let low = 0;
  let below = 0;
  for (const [bound, counted] of bounds) {
    if (counted >= q * all) {
      if (bound === Infinity) return low;
      return low + ((bound - low) * (q * all - below)) / Math.max(1, counted - below);
    }
    [low, below] = [bound, counted];
  }
  return low;
}

export interface Point {
  time: number;
  value: number | null;
}

export interface Series {
  key: string;
  title: string;
  unit: "ms" | "rate" | "count" | "share";
  points: Point[];
  /** A second line, drawn dashed, and its name. */
  more?: { title: string; points: Point[] };
}

const KEPT_SECONDS = 300;
/** Seconds whose tokens are told as one, so that few requests do not make a saw of the line. */
const WINDOW_SECONDS = 6;

/** Seconds between two scrapes below which their difference says little. */
const SHORTEST_SECONDS = 1;

export class History {
  readonly series: Series[] = [
    { key: "itl", title: "ITL, median", unit: "ms", points: [], more: { title: "p95", points: [] } },
    { key: "ttft", title: "TTFT, median", unit: "ms", points: [], more: { title: "p95", points: [] } },
    { key: "tokens", title: "Generated tokens/s", unit: "rate", points: [] },
    { key: "requests", title: "Running", unit: "count", points: [], more: { title: "waiting", points: [] } },
    { key: "kv", title: "KV cache used", unit: "share", points: [] },
    { key: "padding", title: "Padding of all tokens", unit: "share", points: [] },
  ];
  #scrapes: { time: number; sample: Sample }[] = [];

  /** Takes a scrape at a time in seconds. */
  add(time: number, sample: Sample): void {
    const last = this.#scrapes.at(-1);
    if (last && time - last.time < SHORTEST_SECONDS) return;
    if (last && restarted(last.sample, sample)) this.#scrapes = [];
    while (this.#scrapes.length > 1 && time - this.#scrapes[1]!.time >= WINDOW_SECONDS) this.#scrapes.shift();
    const before = this.#scrapes[0];
    this.#scrapes.push({ time, sample });
    const of = (name: string): number | null => total(sample, name);
    const rate = (name: string): number | null => {
      if (!before) return null;
      const now = of(name);
      return now === null ? null : (now - (total(before.sample, name) ?? 0)) / (time - before.time);
    };
    const within = (name: string, q: number): number | null => {
      const value = before ? quantile(before.sample, sample, name, q) : null;
      return value === null ? null : 1000 * value;
    };
    const [real, padded] = [rate("step_tokens_total"), rate("padded_tokens_total")];
    const values: Record<string, [number | null, (number | null)?]> = {
      itl: [within("inter_token_latency_seconds", 0.5), within("inter_token_latency_seconds", 0.95)],
      ttft: [within("time_to_first_token_seconds", 0.5), within("time_to_first_token_seconds", 0.95)],
      tokens: [rate("generation_tokens_total")],
      requests: [of("num_requests_running"), of("num_requests_waiting")],
      kv: [of("kv_cache_usage_perc")],
      padding: [real !== null && padded !== null && real + padded > 0 ? padded / (real + padded) : null],
    };
    for (const series of this.series) {
      const [value, more] = values[series.key]!;
      push(series.points, time, value);
      if (series.more) push(series.more.points, time, more ?? null);
    }
  }
}

function push(points: Point[], time: number, value: number | null): void {
  points.push({ time, value });
  while (points[0]!.time < time - KEPT_SECONDS) points.shift();
}

const restarted = (before: Sample, after: Sample): boolean =>
  (total(after, "generation_tokens_total") ?? 0) < (total(before, "generation_tokens_total") ?? 0);
