// Makes elements, and gathers changes into one frame. Knows: the DOM. Knows nothing of minisrv.
// Texts become text nodes only, so no data is ever read as markup.

export type Child = Node | string | number | null | undefined | false;
type Value = string | number | boolean | null | undefined | ((event: never) => void);

function fill<T extends Element>(element: T, attributes: Record<string, Value>, children: Child[]): T {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") {
      element.addEventListener(name.slice(2), value as EventListener);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.filter((c) => c !== null && c !== undefined && c !== false).map(asNode));
  return element;
}

const asNode = (child: Child): Node | string => (child instanceof Node ? child : String(child));

/** Makes an HTML element. An attribute that begins with "on" is a listener. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, Value> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  return fill(document.createElement(tag), attributes, children);
}

/** Makes an SVG element. */
export function svg<K extends keyof SVGElementTagNameMap>(
  tag: K,
  attributes: Record<string, Value> = {},
  ...children: Child[]
): SVGElementTagNameMap[K] {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** The element of index.html with this id. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`index.html has no #${id}`);
  return found as T;
}

/** Sets a text only where it differs, so that nothing is laid out or read aloud again. */
export function setText(node: Node, text: string): void {
  if (node.textContent !== text) node.textContent = text;
}

const pending = new Set<() => void>();
let asked = false;

/** Calls `draw` in the next frame, once, however often it is asked for until then. */
export function inNextFrame(draw: () => void): void {
  pending.add(draw);
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    const now = [...pending];
    pending.clear();
    for (const each of now) each();
  });
}

/** Returns a function that draws at most once in `ms`, in a frame, and never misses the last call. */
export function atMostEvery(ms: number, draw: () => void): () => void {
  let timer = 0;
  let last = -Infinity;
  return () => {
    if (timer) return;
    timer = window.setTimeout(
      () => {
        timer = 0;
        last = performance.now();
        inNextFrame(draw);
      },
      Math.max(0, last + ms - performance.now()),
    );
  };
}

/** A button that copies a text. */
export function copyButton(text: () => string, of: string): HTMLButtonElement {
  const button = h("button", { type: "button", class: "copy", "aria-label": `Copy ${of}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select and copy by hand"; // a page without HTTPS may not copy
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}
