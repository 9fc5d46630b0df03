// Numbers and names in words. Knows: how people write them.

const whole = new Intl.NumberFormat("en");

export const count = (n: number): string => whole.format(Math.round(n));

export function ms(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value >= 10_000) return `${(value / 1000).toFixed(1)} s`;
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : value >= 0.1 ? 2 : 3;
  return `${value.toFixed(digits)} ms`;
}

export function seconds(value: number): string {
  if (value >= 120) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return value >= 10 ? `${value.toFixed(1)} s` : `${value.toFixed(2)} s`;
}

export function percent(share: number): string {
  const value = 100 * share;
  return `${value > 0 && value < 10 ? value.toFixed(1) : value.toFixed(0)} %`;
}

export const plural = (n: number, one: string, many = `${one}s`): string =>
  `${count(n)} ${n === 1 ? one : many}`;

export function clock(unixSeconds: number): string {
  return new Date(1000 * unixSeconds).toLocaleTimeString([], { hour12: false });
}

const REASONS: Record<string, string> = {
  pure_decode: "every request of the batch was decoding, and a captured size holds them",
  has_prefill: "the batch held prompt tokens, and a captured size for mixed batches holds it",
  cheaper: "this graph was measured to take less time than the smallest that holds the batch",
  size_missing:
    "the smallest size that holds the batch has no graph in service (not yet, or no more), so another ran it",
  no_full_graph: "the batch only decoded, but the configured mode captures no FULL graphs",
  no_mixed_graph: "the batch held prompt tokens, for which the configured mode captures no graph",
  above_ladder:
    "the batch has more tokens than the largest captured size; launches cost little beside such a step",
  graphs_off: "graphs are turned off (--enforce-eager, or the mode none)",
};

/** The reason of a step in words; a reason that is new to this page is shown as it is. */
export const reasonInWords = (reason: string): string =>
  REASONS[reason] ?? reason.replaceAll("_", " ");

const BUDGETS: Record<string, string> = {
  all_waiting: "all tokens that waited are in the step",
  step_limit: "it took as many as the step may hold (max_num_batched_tokens)",
  itl_target: "it took no more, as a larger step was predicted to miss the ITL target",
  fast_enough: "it took no more, as a larger step would hardly compute more tokens per millisecond",
  over_itl_target: "it took few, as every step with prompt tokens was predicted to miss the ITL target",
};

export const budgetInWords = (reason: string): string =>
  BUDGETS[reason] ?? reason.replaceAll("_", " ");
