// How long each part of the start took. Knows: the parts that a trace's header tells.
import { h, svg } from "./dom";
import { seconds } from "./format";
import type { Header } from "./trace";

export function startup(header: Header | null): HTMLElement {
  const parts = header?.startup ?? [];
  if (!parts.length) {
    return h("p", { class: "empty" }, "The parts of the start come with the trace of steps; there is none yet.");
  }
  const total = parts.reduce((sum, part) => sum + part.seconds, 0);
  const most = Math.max(...parts.map((part) => part.seconds));
  const rows = parts.map((part) =>
    h(
      "li",
      {},
      h("span", { class: "part-name" }, part.part.replaceAll("_", " ")),
      svg(
        "svg",
        { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("rect", { class: "bar bar-start", width: Math.max(0.5, (100 * part.seconds) / most), height: 8 }),
      ),
      h("span", { class: "hits" }, seconds(part.seconds)),
    ),
  );
  return h(
    "div",
    {},
    h("p", { class: "sum" }, h("b", {}, seconds(total)), " in all"),
    h("ol", { class: "startup" }, ...rows),
  );
}
