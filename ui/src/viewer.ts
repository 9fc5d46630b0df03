// A recorded trace, or two with one axis: a strip and the details of a step for each, which a cursor
// moves through together. Knows: traces. Knows nothing of files or servers.
import { h, inNextFrame, setText } from "./dom";
import { details, stepTable } from "./details";
import { count, ms, percent, plural, seconds } from "./format";
import { ladders } from "./ladder";
import { startup } from "./startup";
import { Strip, typicalLength, ZOOMS, type Axis } from "./strip";
import type { TraceStore } from "./trace";

export interface NamedTrace {
  name: string;
  store: TraceStore;
}

const RATES = [0.1, 0.25, 1, 4, 16];
const NOBODY: ReadonlySet<string> = new Set();

interface Side extends NamedTrace {
  strip: Strip;
  panel: HTMLElement;
  shown: number;
}

export class Viewer {
  readonly element: HTMLElement;
  readonly #sides: Side[];
  readonly #scrub: HTMLInputElement;
  readonly #play = h("button", { type: "button", class: "primary" }, "Play");
  readonly #place = h("output", { class: "place" });
  #axis: Axis = "step";
  #at = 0;
  #rate = 1;
  #playing = false;
  #last = 0;

  constructor(traces: NamedTrace[], close: (() => void) | null) {
    const milliseconds = typicalLength(traces.map(({ store }) => store));
    this.#sides = traces.map((trace) => {
      const side: Side = {
        ...trace,
        strip: new Strip(trace.store, `Steps of ${trace.name}`, (index) => this.#pick(side, index), traces.length > 1 ? 140 : 180),
        panel: h("div", { class: "side-details" }),
        shown: -1,
      };
      side.strip.millisecondsPerCell = milliseconds;
      return side;
    });
    this.#scrub = h("input", { type: "range", min: 0, step: "any", value: 0, class: "scrub", "aria-label": "Position in the trace" });
    this.#scrub.addEventListener("input", () => this.#go(Number(this.#scrub.value)));
    this.#play.addEventListener("click", () => (this.#playing ? this.#pause() : this.#start()));
    this.element = h(
      "div",
      { class: "viewer" },
      this.#controls(close),
      ...this.#sides.map((side) =>
        h("div", { class: "side" }, h("h3", {}, side.name, h("small", {}, ` ${about(side.store)}`)), side.strip.element, side.strip.hoverLine),
      ),
      this.#scrub,
      h("div", { class: `pair pair-${traces.length}` }, ...this.#sides.map((side) => side.panel)),
      traces.length > 1 ? comparison(traces) : null,
      h("div", { class: `pair pair-${traces.length}` }, ...traces.map((trace) => more(trace, traces.length > 1))),
    );
    this.#setAxis("step");
  }

  recolour(): void {
    for (const { strip } of this.#sides) strip.recolour();
  }

  #controls(close: (() => void) | null): HTMLElement {
    const axis = h(
      "select",
      { "aria-label": "Axis" },
      h("option", { value: "step" }, "by step"),
      h("option", { value: "time" }, "by time"),
    );
    axis.addEventListener("change", () => this.#setAxis(axis.value as Axis));
    const rate = h(
      "select",
      { "aria-label": "Speed" },
      ...RATES.map((r) => h("option", { value: r, selected: r === 1 }, `×${r}`)),
    );
    rate.addEventListener("change", () => (this.#rate = Number(rate.value)));
    const zoom = (by: number) => (): void => {
      for (const { strip } of this.#sides) strip.zoom = Math.max(0, Math.min(strip.zoom + by, ZOOMS.length - 1));
      this.#go(this.#at);
    };
    const step = (by: number) => (): void => {
      this.#pause();
      const { strip, store } = this.#sides[0]!;
      this.#pick(this.#sides[0]!, Math.max(0, Math.min((strip.selected ?? 0) + by, store.steps.length - 1)));
    };
    const button = (text: string, label: string, run: () => void): HTMLElement =>
      h("button", { type: "button", "aria-label": label, title: label, onclick: run }, text);
    return h(
      "div",
      { class: "controls", role: "toolbar", "aria-label": "Replay" },
      this.#play,
      button("‹", "One step back", step(-1)),
      button("›", "One step on", step(1)),
      rate,
      axis,
      button("−", "Zoom out", zoom(-1)),
      button("+", "Zoom in", zoom(1)),
      this.#place,
      close ? button("Close", "Close the trace", close) : null,
    );
  }

  #setAxis(axis: Axis): void {
    // The cursor stays at the step of the first trace at which it was.
    const index = this.#sides[0]!.strip.selected ?? 0;
    this.#axis = axis;
    for (const { strip } of this.#sides) strip.axis = axis;
    this.#scrub.max = String(Math.max(...this.#sides.map(({ strip, store }) => strip.coordinate(store.last!, store.steps.length - 1))));
    const { strip, store } = this.#sides[0]!;
    this.#go(strip.coordinate(store.steps[index]!, index));
  }

  #pick(side: Side, index: number): void {
    this.#go(side.strip.coordinate(side.store.steps[index]!, index));
  }

  #go(at: number): void {
    this.#at = Math.max(0, Math.min(at, Number(this.#scrub.max)));
    this.#scrub.value = String(this.#at);
    // One window for all, so that the same place is the same moment.
    const span = this.#sides[0]!.strip.span;
    let left = this.#sides[0]!.strip.left;
    if (this.#at < left + 0.05 * span || this.#at > left + 0.85 * span) left = Math.max(0, this.#at - 0.4 * span);
    for (const side of this.#sides) {
      side.strip.left = left;
      side.strip.zoom = this.#sides[0]!.strip.zoom;
      side.strip.selected = Math.max(0, side.store.lastBefore(this.#at + 1e-6, side.strip.coordinate));
      side.strip.redraw();
    }
    inNextFrame(this.#draw);
  }

  readonly #draw = (): void => {
    const first = this.#sides[0]!.store.steps[this.#sides[0]!.strip.selected!]!;
    const where = this.#axis === "step" ? `step ${first.id}` : `${seconds(this.#at / 1000)} of ${seconds(Number(this.#scrub.max) / 1000)}`;
    setText(this.#place, where);
    this.#scrub.setAttribute("aria-valuetext", where);
    for (const side of this.#sides) {
      const index = side.strip.selected!;
      if (index === side.shown) continue;
      side.shown = index;
      const step = side.store.steps[index]!;
      const heading = this.#sides.length > 1 ? `${side.name}, step` : "Step";
      side.panel.replaceChildren(details(step, heading, NOBODY, side.store.eventsBefore(step)));
    }
  };

  #start(): void {
    if (this.#at >= Number(this.#scrub.max)) this.#go(0);
    this.#playing = true;
    setText(this.#play, "Pause");
    this.#last = performance.now();
    requestAnimationFrame(this.#tick);
  }

  #pause(): void {
    this.#playing = false;
    setText(this.#play, "Play");
  }

  readonly #tick = (now: number): void => {
    if (!this.#playing || !this.element.isConnected) return;
    const passed = (now - this.#last) * this.#rate;
    this.#last = now;
    // By step, a second is 20 of them; by time, it is a second.
    this.#go(this.#at + (this.#axis === "step" ? passed / 50 : passed));
    if (this.#at >= Number(this.#scrub.max)) this.#pause();
    else requestAnimationFrame(this.#tick);
  };
}

function about(store: TraceStore): string {
  const { header } = store;
  const took = store.last!.time - store.first!.time;
  return [header?.model, header?.device, header?.mode, plural(store.steps.length, "step"), seconds(took)].filter(Boolean).join(" · ");
}

function more(trace: NamedTrace, named: boolean): HTMLElement {
  const { store, name } = trace;
  const table = h("div");
  const listed = h("details", {}, h("summary", {}, "Steps as a table"), table);
  let from = 19;
  const fill = (): void =>
    table.replaceChildren(
      stepTable(store.steps, Math.min(from - 9, store.steps.length - 1), () => undefined),
      h("button", { type: "button", onclick: () => move(-20) }, "Earlier"),
      h("button", { type: "button", onclick: () => move(20) }, "Later"),
    );
  const move = (by: number): void => {
    from = Math.max(19, Math.min(from + by, store.steps.length + 9));
    fill();
  };
  listed.addEventListener("toggle", () => listed.open && fill());
  return h(
    "div",
    { class: "side-more" },
    named ? h("h3", {}, name) : null,
    ladders(store, store.inService, false),
    h("details", {}, h("summary", {}, "Start-up by part"), startup(store.header)),
    listed,
  );
}

function comparison(traces: NamedTrace[]): HTMLElement {
  const rows: [string, (store: TraceStore) => string][] = [
    ["Steps", (s) => count(s.steps.length)],
    ["FULL / PIECEWISE / NONE", (s) => ["FULL", "PIECEWISE", "NONE"].map((m) => count(s.modes.get(m)?.steps ?? 0)).join(" / ")],
    ["Tokens", (s) => count(sum(s, (step) => step.tokens))],
    ["Padding of all tokens", (s) => {
      const padding = sum(s, (step) => step.padding);
      return percent(padding / Math.max(1, padding + sum(s, (step) => step.tokens)));
    }],
    ["Median step", (s) => ms(median(s.steps.flatMap((step) => step.measured_ms ?? step.wall_ms ?? [])))],
    ["Tokens sampled per second", (s) => count(sum(s, (step) => step.sampled ?? 0) / Math.max(1e-3, s.last!.time - s.first!.time))],
  ];
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "The traces compared" },
    h(
      "table",
      { class: "comparison" },
      h("thead", {}, h("tr", {}, h("td", {}), ...traces.map((t) => h("th", { scope: "col" }, t.name)))),
      h("tbody", {}, ...rows.map(([name, of]) => h("tr", {}, h("th", { scope: "row" }, name), ...traces.map((t) => h("td", {}, of(t.store)))))),
    ),
  );
}

const sum = (store: TraceStore, of: (step: TraceStore["steps"][number]) => number): number =>
  store.steps.reduce((total, step) => total + of(step), 0);

function median(values: number[]): number | null {
  if (!values.length) return null;
  return values.sort((a, b) => a - b)[values.length >> 1]!;
}
