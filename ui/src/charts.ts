// Small charts of the last minutes, as SVG. Knows: series. Knows nothing of where they come from.
import { h, setText, svg } from "./dom";
import { count, ms, percent } from "./format";
import type { Point, Series } from "./metrics";

const W = 240;
const H = 76;
const SHORTEST_SECONDS = 60;

const formats: Record<Series["unit"], (value: number) => string> = {
  ms,
  rate: (value) => (value < 10 ? value.toFixed(1) : count(value)),
  count,
  share: percent,
};

class Chart {
  readonly element: HTMLElement;
  readonly #value = h("span", { class: "value" }, "–");
  readonly #more = h("span", { class: "more" });
  readonly #area = svg("path", { class: "area" });
  readonly #line = svg("path", { class: "line" });
  readonly #second = svg("path", { class: "line second" });
  readonly #top = svg("text", { x: W, y: 9, class: "scale" });
  readonly #svg: SVGSVGElement;

  constructor(private readonly series: Series) {
    this.#svg = svg(
      "svg",
      { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${series.title}: nothing yet` },
      svg("line", { class: "base", x1: 0, x2: W, y1: H - 0.5, y2: H - 0.5 }),
      this.#area,
      this.#second,
      this.#line,
      this.#top,
    );
    this.element = h(
      "figure",
      { class: "chart", "data-chart": series.key },
      h("figcaption", {}, series.title, h("span", { class: "figures" }, this.#value, this.#more)),
      this.#svg,
    );
  }

  draw(): void {
    const { series } = this;
    const format = formats[series.unit];
    const values = [...series.points, ...(series.more?.points ?? [])].flatMap((p) => (p.value === null ? [] : [p.value]));
    const top = Math.max(...values, series.unit === "count" ? 4 : series.unit === "share" ? 0.05 : 0) || 1;
    const now = series.points.at(-1)?.time ?? 0;
    const length = Math.max(SHORTEST_SECONDS, now - (series.points[0]?.time ?? now));
    const line = path(series.points, now, length, top);
    this.#line.setAttribute("d", line.line);
    this.#area.setAttribute("d", line.area);
    this.#second.setAttribute("d", series.more ? path(series.more.points, now, length, top).line : "");
    const last = series.points.at(-1)?.value ?? null;
    const second = series.more?.points.at(-1)?.value ?? null;
    setText(this.#value, last === null ? "–" : format(last));
    setText(this.#more, series.more && second !== null ? ` ${series.more.title} ${format(second)}` : "");
    setText(this.#top, values.length ? `▴ ${format(top)}` : "");
    const most = values.length ? Math.max(...values) : null;
    const label =
      most === null
        ? `${series.title}: nothing in the last five minutes`
        : `${series.title}: ${last === null ? "nothing now" : `${format(last)} now`}, at most ${format(most)} in the last five minutes`;
    this.#svg.setAttribute("aria-label", label);
  }
}

function path(points: readonly Point[], now: number, length: number, top: number): { line: string; area: string } {
  let line = "";
  let area = "";
  let begun: number | null = null;
  let x = 0;
  const close = (): void => {
    if (begun !== null) area += `V${H}H${begun}Z`;
    begun = null;
  };
  for (const { time, value } of points) {
    if (value === null) {
      close();
      continue;
    }
    x = Math.round(10 * (W - (W * (now - time)) / length)) / 10;
    const y = Math.round(10 * (H - 1 - (H - 14) * Math.min(1, value / top))) / 10;
    line += `${begun === null ? "M" : "L"}${x} ${y}`;
    area += `${begun === null ? `M${x} ${H}L` : "L"}${x} ${y}`;
    begun ??= x;
  }
  close();
  return { line, area };
}

/** Makes the charts of all series; the function that is returned draws them anew. */
export function charts(into: HTMLElement, series: readonly Series[]): () => void {
  const all = series.map((each) => new Chart(each));
  into.replaceChildren(...all.map((chart) => chart.element));
  return () => {
    for (const chart of all) chart.draw();
  };
}
