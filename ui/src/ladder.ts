// The ladders: for each rung how many steps it ran, and how much of them was padding.
// Knows: counts of steps by rung, and which rungs serve.
import { h, svg } from "./dom";
import { count, percent } from "./format";
import { LADDERS, type Ladder, type TraceStore } from "./trace";

const TITLES: Record<Ladder, [string, string]> = {
  decode: ["Decode", "requests that only decode"],
  mixed: ["Mixed", "tokens, prompts among them"],
  epilogue: ["Epilogues", "rows that are sampled apart"],
};

interface Rungs {
  all: number[];
  serving: Set<number> | null;
}

export type Serving = Record<Ladder, number[]> | null;

function rungs(store: TraceStore, ladder: Ladder, serving: Serving): Rungs {
  const served = serving?.[ladder];
  const planned = store.header?.ladders?.[ladder] ?? [];
  const used = [...store.rungs.keys()]
    .filter((key) => key.startsWith(`${ladder}/`))
    .map((key) => Number(key.slice(ladder.length + 1)));
  const all = [...new Set([...planned, ...(served ?? []), ...used])].sort((a, b) => a - b);
  return { all, serving: served ? new Set(served) : null };
}

/** Draws the ladders.
 *
 * serving: which rungs serve; null if that is not known, and then all are taken to.
 * fills: whether those that do not serve may still come. */
export function ladders(store: TraceStore, serving: Serving, fills: boolean): HTMLElement {
  const columns = LADDERS.map((ladder) => column(store, ladder, rungs(store, ladder, serving), fills));
  return h("div", { class: "ladders" }, ...columns.filter((c) => c !== null));
}

function column(store: TraceStore, ladder: Ladder, { all, serving }: Rungs, fills: boolean): HTMLElement | null {
  if (!all.length) return null;
  const [title, unit] = TITLES[ladder];
  const most = Math.max(1, ...all.map((rung) => store.rungs.get(`${ladder}/${rung}`)?.steps ?? 0));
  const rows = all.map((rung) => {
    const found = store.rungs.get(`${ladder}/${rung}`) ?? { steps: 0, tokens: 0, padding: 0 };
    const missing = serving !== null && !serving.has(rung);
    const padding = found.padding / Math.max(1, found.tokens + found.padding);
    const words = [
      found.steps ? `${count(found.steps)} · ${percent(padding)} padding` : missing ? "" : "no steps",
      missing ? (fills ? "not captured yet" : "not in service") : "",
    ];
    return h(
      "li",
      { class: missing ? "missing" : found.steps ? "" : "unused", "data-rung": rung, "data-steps": found.steps },
      h("span", { class: "size" }, String(rung)),
      bar(found.steps / most, padding, ladder),
      h("span", { class: "hits" }, words.filter(Boolean).join(", ")),
    );
  });
  return h("section", {}, h("h3", {}, title, h("small", {}, ` ${unit}`)), h("ol", { class: `ladder ladder-${ladder}` }, ...rows));
}

function bar(share: number, padding: number, ladder: Ladder): SVGElement {
  const width = share ? Math.max(1, 100 * share) : 0;
  const real = width * (1 - padding);
  return svg(
    "svg",
    { viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: `bar bar-${ladder}`, width: real, height: 12 }),
    svg("rect", { class: `bar padding bar-${ladder}`, x: real, width: width - real, height: 12 }),
  );
}
