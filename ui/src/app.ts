// The page: joins its parts, and tells the state of the server. Knows: all of them.
import { ApiError, key, ready, request, setKey, type Ready, type Settings } from "./api";
import { charts } from "./charts";
import { details, stepTable } from "./details";
import { atMostEvery, byId, h, inNextFrame, setText } from "./dom";
import { percent, plural } from "./format";
import { ladders } from "./ladder";
import { Live, type LiveState } from "./live";
import { History, parse } from "./metrics";
import { Playground, type StepOfToken, type Traced } from "./playground";
import { startup } from "./startup";
import { Strip, ZOOMS } from "./strip";
import { linesOfTrace, readTrace, TraceError, TraceStore } from "./trace";
import { usage } from "./usage";
import { Viewer, type NamedTrace } from "./viewer";

const POLL_MS = 2000;
const MODES = ["FULL", "PIECEWISE", "NONE"];

// ---- light and dark ------------------------------------------------------------------------------

const THEME = "minisrv-theme";
const recolour: (() => void)[] = [];

function theme(): void {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const button = byId<HTMLButtonElement>("theme");
  try {
    const chosen = localStorage.getItem(THEME);
    if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  } catch {
    // Storage is turned off: the choice lives as long as the page.
  }
  const isDark = (): boolean => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const apply = (): void => {
    const name = isDark() ? "Light colours" : "Dark colours";
    button.setAttribute("aria-label", name);
    button.title = name;
    setText(button, isDark() ? "☀" : "☾");
    for (const each of recolour) each();
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem(THEME, root.dataset.theme);
    } catch {
      // As above.
    }
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

// ---- the server's state --------------------------------------------------------------------------

const STATES: Record<Ready["state"], string> = {
  ready: "Ready",
  loading: "Loading",
  asleep: "Asleep",
  draining: "Shutting down",
  dead: "Engine has died",
};

const ADVICE: Partial<Record<Ready["state"], string>> = {
  asleep: "The server sleeps: its memory is released and requests are refused. POST /wake_up wakes it.",
  draining: "The server is being stopped: open requests end, and new ones are refused.",
  dead: "The engine has died. Look at the log of the server, and start it again.",
};

class State {
  readonly #pill = byId("state");
  readonly #banner = byId("banner");
  now: Ready | null = null;
  #misses = 0;

  async poll(): Promise<boolean> {
    try {
      this.now = await ready();
      this.#misses = 0;
      this.#show(this.now);
      return true;
    } catch {
      this.now = null;
      this.#misses += 1;
      this.#pill.className = "pill lost";
      setText(this.#pill, "No connection");
      this.#tell("The server does not answer. It may have been stopped; this page tries again by itself.");
      return false;
    }
  }

  get misses(): number {
    return this.#misses;
  }

  #show({ state, loading }: Ready): void {
    this.#pill.className = `pill ${state}`;
    setText(this.#pill, STATES[state] ?? state);
    if (state === "loading") {
      const done = loading?.total ? ` (${loading.done} of ${loading.total})` : "";
      this.#tell("The engine is not ready yet. Requests are taken when it is.", `${loading?.phase ?? ""}${done}`);
    } else {
      this.#tell(ADVICE[state] ?? "");
    }
  }

  /** progress: changes often, and is not read aloud each time. */
  #tell(text: string, progress = ""): void {
    setText(byId("banner-text"), text);
    setText(byId("banner-progress"), progress);
    this.#banner.hidden = !text;
  }
}

// ---- the live server -----------------------------------------------------------------------------

class Server {
  readonly #store = new TraceStore();
  readonly #state = new State();
  readonly #history = new History();
  readonly #own = new Set<string>();
  readonly #strip: Strip;
  readonly #live: Live;
  readonly #drawCharts: () => void;
  readonly #shown = byId("step");
  readonly #table = byId<HTMLDetailsElement>("step-table");
  readonly #scrub = byId<HTMLInputElement>("scrub");
  #follows = true;
  #model = "";

  constructor(private readonly settings: Settings) {
    this.#strip = new Strip(this.#store, "Recent steps of the server", (index) => this.#select(index));
    byId("strip").replaceChildren(this.#strip.element, this.#strip.hoverLine);
    recolour.push(() => this.#strip.recolour());
    this.#strip.message = "Connecting";
    this.#drawCharts = charts(byId("charts"), this.#history.series);
    this.#live = new Live(this.#store, this.#changed, (state) => this.#tell(state));
    new Playground(settings, {
      stepOf: (request, token) => this.#stepOf(request, token),
      showStep: (id) => {
        const index = this.#store.indexOf(id);
        if (index < 0) return;
        this.#select(index);
        byId("steps").scrollIntoView({ block: "start" });
      },
      sent: (id) => this.#own.add(id),
      needsKey: () => this.#refused(),
    });
    this.#controls();
    this.#keyForm();
    this.#usage();
    this.#startup();
    this.#drawLadder();
    void this.#poll();
    if (settings.keyed && !key()) this.#askKey("");
    else this.#begin();
  }

  #begin(): void {
    this.#live.start();
    void this.#findModel();
    void this.#scrape();
  }

  // ---- the key

  #keyForm(): void {
    const form = byId<HTMLFormElement>("key-form");
    const field = byId<HTMLInputElement>("key");
    const forget = byId<HTMLButtonElement>("forget");
    const show = (): void => {
      forget.hidden = !key();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!field.value.trim()) return;
      setKey(field.value.trim());
      field.value = "";
      form.hidden = true;
      show();
      this.#begin();
    });
    forget.addEventListener("click", () => {
      setKey("");
      show();
      this.#live.stop();
      if (this.settings.keyed) this.#askKey("");
    });
    show();
  }

  /** The server did not accept the key: it is not sent again. */
  #refused(): void {
    const why = key() ? "The server did not accept this key." : byId("key-why").textContent!;
    setKey("");
    byId("forget").hidden = true;
    this.#askKey(why);
  }

  #askKey(why: string): void {
    const form = byId<HTMLFormElement>("key-form");
    setText(byId("key-why"), why);
    if (!form.hidden) return;
    form.hidden = false;
    this.#strip.message = "The steps are shown when the key is entered above.";
  }

  // ---- polling

  async #poll(): Promise<void> {
    for (;;) {
      if (!document.hidden) {
        const before = JSON.stringify(this.#state.now?.graphs);
        const was = this.#state.now?.state;
        const reached = await this.#state.poll();
        const allowed = !this.settings.keyed || key() !== "";
        if (allowed && was && was !== "ready" && this.#state.now?.state === "ready") this.#live.retry();
        if (JSON.stringify(this.#state.now?.graphs) !== before) this.#drawLadder();
        if (reached && allowed) await this.#scrape();
      }
      const wait = POLL_MS * Math.min(8, 2 ** Math.max(0, this.#state.misses - 1));
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }

  async #scrape(): Promise<void> {
    try {
      const response = await request("metrics?names=minisrv", { accept: "text/plain" });
      this.#history.add(performance.now() / 1000, parse(await response.text()));
      inNextFrame(this.#drawCharts);
      if (!this.#model) await this.#findModel();
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) this.#refused();
    }
  }

  async #findModel(): Promise<void> {
    try {
      const answer = (await (await request("v1/models")).json()) as { data: { id: string; max_model_len: number | null }[] };
      const card = answer.data[0];
      if (!card) return;
      this.#model = card.id;
      const { version } = (await (await request("version")).json()) as { version: string };
      setText(byId("version"), version);
      const context = card.max_model_len ? `, ${plural(card.max_model_len, "token")} of context` : "";
      setText(byId("model"), `${answer.data.map((each) => each.id).join(", ")}${context}`);
      this.#usage();
    } catch {
      // The state and the key form tell what is missing.
    }
  }

  #usage(): void {
    byId("usage").replaceChildren(usage(this.settings, this.#model || "MODEL"));
  }

  #startup(): void {
    byId("startup").replaceChildren(startup(this.#store.header));
  }

  // ---- steps

  readonly #changed = (): void => {
    this.#drawSteps();
    this.#drawLadder();
    this.#drawNewest();
  };

  readonly #drawSteps = atMostEvery(30, () => this.#steps());
  readonly #drawLadder = atMostEvery(500, () => this.#ladder());
  readonly #drawNewest = atMostEvery(700, () => this.#follows && this.#details());

  #dropped = 0;
  #header: unknown = null;

  #steps(): void {
    const { steps, header, dropped } = this.#store;
    if (header !== this.#header) {
      this.#header = header;
      this.#startup();
      const about = [header?.device_name || header?.device, header?.mode].filter(Boolean).join(" · ");
      setText(byId("machine"), about);
    }
    const moved = dropped - this.#dropped;
    this.#dropped = dropped;
    if (moved && this.#strip.selected !== null) {
      // Steps have left at the front, perhaps the selected one with them.
      this.#strip.selected = Math.max(0, this.#strip.selected - moved);
      this.#strip.left = Math.max(0, this.#strip.left - moved);
    }
    if (steps.length) this.#strip.message = "";
    if (this.#follows) this.#strip.left = Math.max(0, this.#strip.end - this.#strip.span);
    this.#scrub.max = String(Math.max(0, steps.length - 1));
    this.#scrub.disabled = !steps.length;
    if (this.#follows) this.#scrub.value = this.#scrub.max;
    setText(byId("summary"), this.#summary());
    this.#strip.redraw();
  }

  #summary(): string {
    let [all, real, padded] = [0, 0, 0];
    const parts = [];
    for (const [mode, found] of [...this.#store.modes].sort(([a], [b]) => MODES.indexOf(a) - MODES.indexOf(b))) {
      all += found.steps;
      real += found.tokens;
      padded += found.padding;
      parts.push([mode, found.steps] as const);
    }
    if (!all) return "";
    const modes = parts.map(([mode, steps]) => `${mode} ${percent(steps / all)}`).join(", ");
    return `${plural(all, "step")}: ${modes}; ${percent(padded / (real + padded))} of the tokens padding`;
  }

  #select(index: number): void {
    const { steps } = this.#store;
    if (!steps[index]) return;
    this.#setFollow(false);
    this.#strip.selected = index;
    this.#strip.reveal();
    this.#strip.redraw();
    this.#scrub.value = String(index);
    this.#scrub.setAttribute("aria-valuetext", `step ${steps[index].id}`);
    this.#details();
  }

  #setFollow(follows: boolean): void {
    this.#follows = follows;
    const button = byId<HTMLButtonElement>("follow");
    button.setAttribute("aria-pressed", String(follows));
    if (!follows) return;
    this.#strip.selected = null;
    this.#changed();
    this.#details();
  }

  readonly #details = (): void => {
    const { steps } = this.#store;
    const { selected } = this.#strip;
    const step = selected === null ? steps.at(-1) : steps[selected];
    if (!step) return;
    this.#shown.replaceChildren(details(step, selected === null ? "Newest step" : "Step", this.#own, this.#store.eventsBefore(step)));
    if (this.#table.open) this.#fillTable();
  };

  #fillTable(): void {
    byId("step-rows").replaceChildren(stepTable(this.#store.steps, this.#strip.selected, (index) => this.#select(index)));
  }

  #controls(): void {
    byId("follow").addEventListener("click", () => this.#setFollow(!this.#follows));
    this.#scrub.addEventListener("input", () => this.#select(Number(this.#scrub.value)));
    this.#table.addEventListener("toggle", () => this.#table.open && this.#fillTable());
    const zoom = (by: number) => (): void => {
      this.#strip.zoom = Math.max(0, Math.min(this.#strip.zoom + by, ZOOMS.length - 1));
      if (!this.#follows) this.#strip.reveal();
      this.#steps();
    };
    byId("zoom-out").addEventListener("click", zoom(-1));
    byId("zoom-in").addEventListener("click", zoom(1));
    byId("save").addEventListener("click", () => this.#save());
  }

  #save(): void {
    const lines = linesOfTrace(this.#store);
    if (!lines) return;
    const blob = new Blob([`${lines.join("\n")}\n`], { type: "application/x-ndjson" });
    const link = h("a", { href: URL.createObjectURL(blob), download: "steps.ndjson" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  #ladder(): void {
    const { now } = this.#state;
    const box = byId("ladder");
    if (now?.graphs && !now.graphs.total && !this.#store.rungs.size) {
      box.replaceChildren(h("p", { class: "empty" }, "The server captures no graphs (--enforce-eager, or the mode none): every step runs eagerly."));
    } else if (!now?.graphs && !this.#store.header) {
      box.replaceChildren(h("p", { class: "empty" }, "The ladder is shown when the server is ready."));
    } else {
      const graphs = now?.graphs;
      const serving = graphs ? { decode: graphs.decode, mixed: graphs.mixed, epilogue: graphs.epilogues } : this.#store.inService;
      const drawn = [ladders(this.#store, serving, !graphs || graphs.missing > 0)];
      if (graphs) drawn.unshift(ladderLine(graphs));
      box.replaceChildren(...drawn);
    }
  }

  #tell(state: LiveState): void {
    const { steps } = this.#store;
    const empty = !steps.length;
    if (state.kind === "key") this.#refused();
    else if (state.kind === "off") this.#strip.message = state.message;
    else if (state.kind === "lost") {
      const again = `${state.message} Trying again in ${plural(state.seconds, "second")}.`;
      if (empty) this.#strip.message = again;
      else setText(byId("summary"), again);
    } else if (state.kind === "following" && empty) {
      this.#strip.message = "No step yet: the server has had nothing to do. Send something in the playground, and its steps appear here.";
    }
  }

  /** The step that made a token: that which computed the end of the prompt made the first one, and
   * each step after it one more. */
  #stepOf({ id, prompt }: Traced, token: number): StepOfToken | null {
    let computed = 0;
    let made = 0;
    for (const step of this.#store.steps) {
      const row = step.requests?.find(([each]) => each === id);
      if (!row) continue;
      computed += row[1];
      if (computed >= prompt) made += 1;
      if (made === token) return { id: step.id, label: step.mode + (step.rung ? ` ${step.rung}` : "") };
    }
    return null;
  }
}

function ladderLine(graphs: NonNullable<Ready["graphs"]>): HTMLElement {
  const told = (found: Record<string, string>, what: string): string[] => {
    const names = Object.entries(found).map(([name, why]) => `${name}: ${why}`);
    return names.length ? [`${names.length} ${what} (${names.join("; ")})`] : [];
  };
  const parts = [`${graphs.graphs} of ${plural(graphs.total, "graph")} captured`];
  if (graphs.missing) parts.push(graphs.stopped ? `no more will come: ${graphs.stopped}` : `${graphs.missing} to come while serving`);
  parts.push(...told(graphs.refused, "refused"), ...told(graphs.quarantined, "taken out of service"));
  return h("p", { class: "sum" }, `${parts.join(", ")}.`);
}

// ---- replay --------------------------------------------------------------------------------------

class Replay {
  readonly #box = byId("viewer");
  readonly #message = byId("replay-message");
  readonly #drop = byId("drop");
  readonly #section = byId("replay");
  #traces: NamedTrace[] = [];
  #viewer: Viewer | null = null;

  constructor(private readonly closes: boolean) {
    recolour.push(() => this.#viewer?.recolour());
    const input = byId<HTMLInputElement>("files");
    input.addEventListener("change", () => {
      void this.open([...(input.files ?? [])].map((file) => [file.name, () => Promise.resolve(file.stream())]));
      input.value = "";
    });
    const over = (event: DragEvent): void => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.#drop.classList.toggle("over", event.type !== "dragleave");
    };
    addEventListener("dragover", over);
    addEventListener("dragleave", over);
    addEventListener("drop", (event) => {
      this.#drop.classList.remove("over");
      const files = [...(event.dataTransfer?.files ?? [])];
      if (!files.length) return;
      event.preventDefault();
      void this.open(files.map((file) => [file.name, () => Promise.resolve(file.stream())]));
    });
  }

  /** Opens traces. A second one is put beside the first. */
  async open(files: [string, () => Promise<ReadableStream<Uint8Array>>][]): Promise<void> {
    setText(this.#message, "Reading");
    let problem = "";
    const found: NamedTrace[] = [];
    for (const [name, stream] of files.slice(-2)) {
      try {
        found.push({ name, store: await readTrace(await stream()) });
      } catch (error) {
        const why = error instanceof TraceError || error instanceof ApiError ? error.message : "It cannot be read.";
        problem = `${name}: ${why}`;
      }
    }
    setText(this.#message, problem);
    if (!found.length) return;
    this.#traces = [...this.#traces, ...found].slice(-2);
    this.#viewer = new Viewer(this.#traces, this.closes ? () => this.#close() : null);
    this.#box.replaceChildren(this.#viewer.element);
    this.#section.classList.add("opened");
    this.#section.scrollIntoView({ block: "start" });
  }

  #close(): void {
    this.#traces = [];
    this.#viewer = null;
    this.#box.replaceChildren();
    this.#section.classList.remove("opened");
  }
}

async function start(): Promise<void> {
  theme();
  const settings = (await (await fetch("ui/settings.json", { cache: "no-store" })).json()) as Settings;
  const recorded = settings.traces.length > 0;
  document.body.classList.add(recorded ? "recorded" : "live");
  const replay = new Replay(!recorded);
  if (!recorded) {
    new Server(settings);
    return;
  }
  await replay.open(
    settings.traces.map((name, index) => [name, async () => (await request(`ui/traces/${index}`)).body!]),
  );
}

start().catch(() => {
  const banner = byId("banner");
  banner.hidden = false;
  setText(byId("banner-text"), "The server does not answer. Start it, then load this page again.");
});
