// The strip of steps: a cell for each, coloured and drawn by mode, as high as its batch, with the
// padding hatched on top. Knows: canvas, steps. Knows nothing of where steps come from.
import { h, inNextFrame, setText } from "./dom";
import { ms, percent } from "./format";
import type { Step, TraceStore } from "./trace";

export type Axis = "step" | "time";

const TOP = 16; // pixels for markers of events and of the selection
const BOTTOM = 18; // pixels for the axis
const LEFT = 34; // pixels for the scale
const ROOM_FOR_LABELS = 140; // pixels from the first label to the end of the last one
export const ZOOMS = [2, 3, 5, 7, 10, 14, 20];

export interface Palette {
  ink: string;
  muted: string;
  line: string;
  accent: string;
  modes: Record<string, string>;
}

export function palette(): Palette {
  const style = getComputedStyle(document.documentElement);
  const get = (name: string): string => style.getPropertyValue(name).trim();
  return {
    ink: get("--ink"),
    muted: get("--muted"),
    line: get("--line"),
    accent: get("--accent"),
    modes: { FULL: get("--full"), PIECEWISE: get("--piecewise"), NONE: get("--none") },
  };
}

/** The length of a step on the time axis, in milliseconds, from its launch on. */
const duration = (step: Step): number => step.measured_ms || step.wall_ms || 1;

/** Milliseconds of the time axis that are as long as a cell of the step axis: about a step. */
export function typicalLength(stores: readonly TraceStore[]): number {
  const some = stores.flatMap(({ steps }) => steps.slice(-1000).map(duration)).sort((a, b) => a - b);
  return Math.max(0.01, some[some.length >> 1] ?? 1);
}

/** A step in one sentence, for a reader that sees no strip. */
export function inShort(step: Step): string {
  const rung = step.rung ? ` ${step.rung}` : "";
  const padding = step.padding ? `, ${step.padding} padding` : "";
  return `Step ${step.id}: ${step.mode}${rung}, ${step.tokens} tokens${padding}, ${ms(step.measured_ms ?? step.wall_ms)}`;
}

export class Strip {
  readonly element: HTMLElement;
  axis: Axis = "step";
  /** Index of the selected step; null for none. */
  selected: number | null = null;
  /** The first coordinate that is drawn: a step's index, or milliseconds since the first step. */
  left = 0;
  zoom = 3;
  /** See typicalLength; strips with one axis have the same. */
  millisecondsPerCell = 1;
  readonly #canvas = h("canvas", { "aria-hidden": "true" });
  readonly #message = h("p", { class: "strip-message" });
  readonly #hover = h("p", { class: "strip-hover", "aria-hidden": "true" });
  #palette = palette();
  #width = 600;
  readonly #height: number;

  /** pick: called with the index of a step that was chosen by pointer or keys. */
  constructor(
    public store: TraceStore,
    label: string,
    private readonly pick: (index: number) => void,
    height = 190,
  ) {
    this.#height = height;
    this.element = h(
      "div",
      {
        class: "strip",
        role: "slider",
        tabindex: "0",
        "aria-label": label,
        "aria-orientation": "horizontal",
        "aria-valuemin": 0,
        "aria-valuemax": 0,
        "aria-valuenow": 0,
        "aria-valuetext": "no steps yet",
        onkeydown: (event: KeyboardEvent) => this.#key(event),
        onpointerdown: (event: PointerEvent) => this.#down(event),
        onpointermove: (event: PointerEvent) => this.#move(event),
        onpointerleave: () => setText(this.#hover, ""),
      },
      this.#canvas,
      this.#message,
    );
    this.#canvas.style.height = `${height}px`;
    new ResizeObserver(() => {
      // Drawn before the frame is shown, so that none shows a drawing of another width.
      this.#width = this.element.clientWidth;
      this.#draw();
    }).observe(this.element);
  }

  get hoverLine(): HTMLElement {
    return this.#hover;
  }

  set message(text: string) {
    setText(this.#message, text);
    this.#message.hidden = !text;
  }

  recolour(): void {
    this.#palette = palette();
    this.redraw();
  }

  redraw(): void {
    inNextFrame(this.#draw);
  }

  /** Pixels of one unit of the axis. */
  get scale(): number {
    const cell = ZOOMS[this.zoom]!;
    return this.axis === "step" ? cell : cell / this.millisecondsPerCell;
  }

  /** The length of what is visible, in units of the axis. */
  get span(): number {
    return Math.max(1, (this.#width - LEFT) / this.scale);
  }

  coordinate = (step: Step, index: number): number =>
    this.axis === "step" ? index : 1000 * (step.time - this.store.first!.time);

  /** The end of the last step. */
  get end(): number {
    const { steps } = this.store;
    const last = steps.length - 1;
    if (last < 0) return 0;
    return this.coordinate(steps[last]!, last) + (this.axis === "step" ? 1 : duration(steps[last]!));
  }

  /** Moves the window as little as makes the selected step visible. */
  reveal(): void {
    const step = this.selected === null ? undefined : this.store.steps[this.selected];
    if (!step) return;
    const at = this.coordinate(step, this.selected!);
    const margin = Math.min(this.span / 4, 4 / this.scale + (this.axis === "step" ? 1 : duration(step)));
    if (at < this.left + margin) this.left = Math.max(0, at - margin);
    else if (at > this.left + this.span - 2 * margin) this.left = at - this.span + 2 * margin;
  }

  #indexAt(event: PointerEvent): number {
    const x = event.clientX - this.#canvas.getBoundingClientRect().left - LEFT;
    const value = this.left + x / this.scale;
    const index = this.store.lastBefore(value, this.coordinate);
    return Math.max(0, Math.min(index, this.store.steps.length - 1));
  }

  #down(event: PointerEvent): void {
    if (event.button !== 0 || !this.store.steps.length) return;
    this.element.setPointerCapture(event.pointerId);
    this.pick(this.#indexAt(event));
  }

  #move(event: PointerEvent): void {
    if (!this.store.steps.length) return;
    const index = this.#indexAt(event);
    if (event.buttons & 1) this.pick(index);
    else setText(this.#hover, inShort(this.store.steps[index]!));
  }

  #key(event: KeyboardEvent): void {
    const last = this.store.steps.length - 1;
    if (last < 0) return;
    const now = this.selected ?? last;
    const page = Math.max(1, Math.floor(this.span / 2));
    const to = {
      ArrowLeft: now - (event.shiftKey ? 10 : 1),
      ArrowDown: now - 1,
      ArrowRight: now + (event.shiftKey ? 10 : 1),
      ArrowUp: now + 1,
      PageUp: now + page,
      PageDown: now - page,
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.pick(Math.max(0, Math.min(to, last)));
  }

  readonly #draw = (): void => {
    const { steps } = this.store;
    const ratio = window.devicePixelRatio || 1;
    const width = this.#width;
    const height = this.#height;
    if (this.#canvas.width !== Math.round(width * ratio) || this.#canvas.height !== Math.round(height * ratio)) {
      this.#canvas.width = Math.round(width * ratio);
      this.#canvas.height = Math.round(height * ratio);
    }
    const context = this.#canvas.getContext("2d")!;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    this.#name();
    if (!steps.length) return;
    const scale = this.scale;
    const first = Math.max(0, this.store.lastBefore(this.left, this.coordinate));
    let top = 4;
    let end = first;
    for (; end < steps.length; end++) {
      const step = steps[end]!;
      if (this.coordinate(step, end) > this.left + this.span) break;
      top = Math.max(top, step.tokens + step.padding);
    }
    top = 2 ** Math.ceil(Math.log2(top));
    const base = height - BOTTOM;
    // The root keeps a decode step of 8 visible beside a prompt of 512, and padding in proportion.
    const y = (tokens: number): number => base - (base - TOP) * Math.sqrt(tokens / top);
    this.#grid(context, top, y);
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, width - LEFT, height);
    context.clip();
    for (let index = first; index < end; index++) {
      const step = steps[index]!;
      const x = LEFT + (this.coordinate(step, index) - this.left) * scale;
      const full = this.axis === "step" ? scale : Math.max(1, duration(step) * scale);
      // Only what is visible is drawn, however long the step took.
      const from = Math.max(x, LEFT - 8);
      const to = Math.min(x + full - (full > 4 ? 1 : 0), width + 8);
      this.#cell(context, step, from, Math.max(1, to - from), y, base);
      if (index === this.selected) this.#mark(context, x, full, base);
    }
    this.#events(context, scale, first, end);
    context.restore();
    this.#axisLabels(context, scale, base, first, end);
  };

  #cell(c: CanvasRenderingContext2D, step: Step, x: number, w: number, y: (n: number) => number, base: number): void {
    const colour = this.#palette.modes[step.mode] ?? this.#palette.muted;
    const high = y(step.tokens);
    c.fillStyle = colour;
    c.strokeStyle = colour;
    c.lineWidth = 1;
    if (step.mode === "NONE") {
      // Hollow, so that it differs without colour.
      c.globalAlpha = 0.22;
      c.fillRect(x, high, w, base - high);
      c.globalAlpha = 1;
      if (w >= 3) c.strokeRect(x + 0.5, high + 0.5, w - 1, base - high - 1);
      else c.fillRect(x, high, w, 2);
    } else if (step.mode === "PIECEWISE") {
      // In pieces: bands with gaps between them.
      for (let at = base; at > high; at -= 7) c.fillRect(x, Math.max(high, at - 5), w, Math.min(5, at - high));
    } else {
      c.fillRect(x, high, w, base - high);
    }
    if (!step.padding) return;
    const over = y(step.tokens + step.padding);
    c.globalAlpha = 0.18;
    c.fillRect(x, over, w, high - over);
    c.globalAlpha = 1;
    c.save();
    c.beginPath();
    c.rect(x, over, w, high - over);
    c.clip();
    c.beginPath();
    for (let at = over - w; at < high; at += 4) {
      c.moveTo(x, at + w);
      c.lineTo(x + w, at);
    }
    c.stroke();
    c.restore();
  }

  #mark(c: CanvasRenderingContext2D, x: number, w: number, base: number): void {
    c.strokeStyle = this.#palette.ink;
    c.fillStyle = this.#palette.ink;
    c.lineWidth = 2;
    c.strokeRect(x - 1, TOP - 3, w + 1, base - TOP + 4);
    const middle = x + w / 2;
    c.beginPath();
    c.moveTo(middle - 5, TOP - 11);
    c.lineTo(middle + 5, TOP - 11);
    c.lineTo(middle, TOP - 4);
    c.fill();
  }

  #events(c: CanvasRenderingContext2D, scale: number, first: number, end: number): void {
    const { steps, events } = this.store;
    const from = steps[first]!.time;
    const to = steps[end - 1]!.time;
    c.fillStyle = this.#palette.muted;
    for (const event of events) {
      if (event.time < from || event.time > to) continue;
      const index = this.store.lastBefore(event.time, (step) => step.time);
      const x = LEFT + (this.coordinate(steps[index]!, index) + (this.axis === "step" ? 1 : 0) - this.left) * scale;
      c.beginPath();
      c.moveTo(x, 2);
      c.lineTo(x + 3.5, 5.5);
      c.lineTo(x, 9);
      c.lineTo(x - 3.5, 5.5);
      c.fill();
    }
  }

  #grid(c: CanvasRenderingContext2D, top: number, y: (n: number) => number): void {
    c.font = "11px ui-sans-serif, system-ui, sans-serif";
    c.fillStyle = this.#palette.muted;
    c.strokeStyle = this.#palette.line;
    c.lineWidth = 1;
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (const tokens of [top, top / 4, 0]) {
      const at = Math.round(y(tokens)) + 0.5;
      c.beginPath();
      c.moveTo(LEFT, at);
      c.lineTo(this.#width, at);
      c.stroke();
      c.fillText(String(tokens), LEFT - 6, at);
    }
  }

  #axisLabels(c: CanvasRenderingContext2D, scale: number, base: number, first: number, end: number): void {
    const { steps } = this.store;
    c.fillStyle = this.#palette.muted;
    c.textBaseline = "alphabetic";
    const text = (index: number): string =>
      this.axis === "step" ? `step ${steps[index]!.id}` : ms(this.coordinate(steps[index]!, index));
    c.textAlign = "left";
    c.fillText(text(first), LEFT, base + 14);
    const last = steps[end - 1]!;
    const length = this.axis === "step" ? 1 : duration(last);
    const right = Math.min(this.#width - 2, LEFT + (this.coordinate(last, end - 1) + length - this.left) * scale);
    c.textAlign = "right";
    if (right > LEFT + ROOM_FOR_LABELS) c.fillText(text(end - 1), right, base + 14);
  }

  #name(): void {
    const { steps } = this.store;
    const now = this.selected ?? steps.length - 1;
    const step = steps[now];
    if (!step || (this.selected === null && document.activeElement === this.element)) return;
    const share = step.padding ? `, ${percent(step.padding / (step.tokens + step.padding))} of it padding` : "";
    const values = {
      "aria-valuemin": steps[0]!.id,
      "aria-valuemax": steps[steps.length - 1]!.id,
      "aria-valuenow": step.id,
      "aria-valuetext": inShort(step) + share,
    };
    for (const [name, value] of Object.entries(values)) this.element.setAttribute(name, String(value));
  }
}
