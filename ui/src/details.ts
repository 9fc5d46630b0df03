// One step in words and numbers. Knows: steps. Knows nothing of how it was chosen.
import { h, svg } from "./dom";
import { budgetInWords, clock, count, ms, percent, plural, reasonInWords } from "./format";
import type { Step, TraceEvent } from "./trace";

const GRAPHS: Record<string, string> = {
  FULL: "replayed one FULL graph",
  PIECEWISE: "replayed PIECEWISE graphs, with attention between them,",
  NONE: "ran without a graph",
};

/** The step in one or two sentences. */
export function sentence(step: Step): string {
  const who = [];
  const decoding = step.decode_rows ?? 0;
  if (decoding) who.push(plural(decoding, "decoding request"));
  if (step.prefill_tokens) who.push(plural(step.prefill_tokens, "prompt token"));
  const batch = who.join(" and ") || plural(step.tokens, "token");
  const budget = step.budget_reason ? ` Of the prompts, ${budgetInWords(step.budget_reason)}.` : "";
  const rung = step.rung && step.mode !== "NONE" ? ` of size ${step.rung}` : "";
  return `It ${GRAPHS[step.mode] ?? `ran as ${step.mode}`}${rung} for ${batch}: ${reasonInWords(step.reason)}.${budget}`;
}

/** Draws the details of a step.
 *
 * own: the opaque ids of requests that this page has sent.
 * events: those between the step before it and this one. */
export function details(step: Step, heading: string, own: ReadonlySet<string>, events: readonly TraceEvent[]): HTMLElement {
  const whole = step.tokens + step.padding;
  const facts: [string, string, string?][] = [
    ["Tokens", count(step.tokens)],
    ["Padding", step.padding ? `${count(step.padding)} of ${count(whole)} (${percent(step.padding / whole)})` : "none"],
    ["Measured", ms(step.measured_ms), step.measured_ms === null ? "This step was not timed" : undefined],
    ["Predicted", ms(step.predicted_ms), "By the cost model, with an ITL target only"],
    ["Since the step before", ms(step.wall_ms)],
    ["Launches", launches(step), "From the host, and how many the step takes without a graph"],
    ["Running / waiting", `${count(step.running ?? 0)} / ${count(step.waiting ?? 0)}`],
    ["KV blocks in use", step.kv_used === undefined ? "–" : count(step.kv_used)],
    ["Context read", step.context === undefined ? "–" : `${count(step.context)} tokens`],
    ["Sampled", count(step.sampled ?? 0)],
    ["Generation", String(step.generation ?? 0), "0 is the model’s own code, 1 is compiled code"],
  ];
  if (step.preempted) facts.push(["Preempted", count(step.preempted)]);
  return h(
    "article",
    { class: "details" },
    h(
      "header",
      {},
      h("h3", {}, heading, " ", h("span", { class: "number" }, `#${step.id}`)),
      h("span", { class: `mode mode-${step.mode.toLowerCase()}` }, step.mode),
      step.rung && step.mode !== "NONE" ? h("span", { class: "rung" }, `size ${step.rung}`) : null,
      h("time", {}, clock(step.time)),
    ),
    h("p", { class: "why" }, sentence(step)),
    events.length ? h("p", { class: "events" }, `Before it: ${events.map(eventInWords).join("; ")}.`) : null,
    h(
      "dl",
      { class: "facts" },
      ...facts.map(([name, value, title]) =>
        h("div", { title }, h("dt", {}, name), h("dd", {}, value)),
      ),
    ),
    hostTime(step),
    requests(step, own),
  );
}

const TOLD = new Set(["type", "time", "event", "after", "in_service"]);

function eventInWords(event: TraceEvent): string {
  const more = Object.entries(event).filter(([name, value]) => !TOLD.has(name) && value !== "" && typeof value !== "object");
  const told = more.map(([name, value]) => `${name} ${String(value)}`).join(", ");
  return `◆ ${event.event.replaceAll("_", " ")}${told ? ` (${told})` : ""}`;
}

function launches(step: Step): string {
  if (step.launches === undefined || step.launches === null) return "–";
  const stood = step.launches_replaced ? ` in place of ${count(step.launches_replaced)}` : "";
  return `${count(step.launches)}${stood}`;
}

function hostTime(step: Step): HTMLElement | null {
  const parts = Object.entries(step.host_ms ?? {}).filter(([, value]) => value > 0);
  const total = parts.reduce((sum, [, value]) => sum + value, 0);
  if (!total) return null;
  let x = 0;
  const bars = parts.map(([, value], index) => {
    const width = (100 * value) / total;
    const bar = svg("rect", { x, y: 0, width: Math.max(0.2, width - 0.3), height: 10, class: `part part-${index % 8}` });
    x += width;
    return bar;
  });
  return h(
    "div",
    { class: "host" },
    h("h4", {}, `Host ${ms(total)}`),
    svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", class: "stack", "aria-hidden": "true" }, ...bars),
    h(
      "ul",
      { class: "parts" },
      ...parts.map(([name, value], index) =>
        h("li", {}, h("i", { class: `key part-${index % 8}`, "aria-hidden": "true" }), `${name} `, h("b", {}, ms(value))),
      ),
    ),
  );
}

function requests(step: Step, own: ReadonlySet<string>): HTMLElement | null {
  const rows = step.requests ?? [];
  if (!rows.length) return null;
  const shown = rows.slice(0, 24);
  return h(
    "div",
    { class: "rows" },
    h("h4", {}, plural(rows.length, "row")),
    h(
      "ul",
      { class: "chips" },
      ...shown.map(([id, tokens]) =>
        h(
          "li",
          { class: own.has(id) ? "own" : "" },
          h("code", {}, id),
          tokens > 1 ? ` ×${tokens}` : "",
          own.has(id) ? " yours" : "",
        ),
      ),
      rows.length > shown.length ? h("li", {}, `and ${rows.length - shown.length} more`) : null,
    ),
  );
}

/** A table of the steps around one, for who cannot see the strip. */
export function stepTable(steps: readonly Step[], selected: number | null, pick: (index: number) => void): HTMLElement {
  const middle = selected ?? steps.length - 1;
  const from = Math.max(0, Math.min(middle - 10, steps.length - 20));
  const rows = steps.slice(from, from + 20).map((step, offset) => {
    const index = from + offset;
    const button = h("button", { type: "button", class: "link", onclick: () => pick(index) }, `#${step.id}`);
    return h(
      "tr",
      { "aria-current": index === selected ? "true" : null },
      h("th", { scope: "row" }, button),
      h("td", {}, step.mode),
      h("td", {}, String(step.rung ?? "–")),
      h("td", {}, count(step.tokens)),
      h("td", {}, count(step.padding)),
      h("td", {}, ms(step.measured_ms ?? step.wall_ms)),
      h("td", {}, reasonInWords(step.reason)),
    );
  });
  const names = ["Step", "Mode", "Size", "Tokens", "Padding", "Time", "Reason"];
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Steps as a table" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ...names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, ...rows),
    ),
  );
}
