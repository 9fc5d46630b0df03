// The playground: a completion or a chat, streamed, with the time of each token.
// Knows: the two generation paths and their streams. Knows nothing of steps, except that a request
// has an opaque id there.
import { ApiError, request, type Settings } from "./api";
import { byId, h, setText } from "./dom";
import { ms, plural } from "./format";
import { linesOf } from "./trace";

interface Turn {
  role: "user" | "assistant";
  content: string;
}

interface Piece {
  text: string;
  /** Milliseconds since the piece before, or since the request was sent. */
  gap: number;
  /** The number of the last token in it, from 1 on. */
  token: number;
  element: HTMLElement;
}

/** What the page knows of the step that made a token. */
export interface StepOfToken {
  id: number;
  label: string;
}

/** A request as the trace of steps knows it. */
export interface Traced {
  id: string;
  /** The tokens of its prompt that were computed, and not found in the prefix cache. */
  prompt: number;
}

interface Hooks {
  /** The step that made a token of a request, if it is known. */
  stepOf: (request: Traced, token: number) => StepOfToken | null;
  showStep: (id: number) => void;
  /** A request has been answered; its opaque id. */
  sent: (request: string) => void;
  needsKey: () => void;
}

interface Chunk {
  error?: { message: string };
  choices?: {
    text?: string;
    delta?: { content?: string | null; reasoning_content?: string | null };
    finish_reason?: string | null;
    graph_stats?: { id: string | null; cached_tokens: number; preemptions: number };
  }[];
  usage?: { prompt_tokens: number; completion_tokens: number } | null;
}

const QUESTION = "What is 17 + 25?";
const BEGINNING = "Once upon a time";

export class Playground {
  readonly #form = byId<HTMLFormElement>("play");
  readonly #prompt = byId<HTMLTextAreaElement>("prompt");
  readonly #output = byId("output");
  readonly #note = byId("token-note");
  readonly #status = byId("play-status");
  readonly #send = byId<HTMLButtonElement>("send");
  readonly #stop = byId<HTMLButtonElement>("stop");
  readonly #fresh = byId<HTMLButtonElement>("fresh");
  #chats = false;
  #turns: Turn[] = [];
  #pieces: Piece[] = [];
  #request: Traced | null = null;
  #tokens = 0;
  #running: AbortController | null = null;

  constructor(
    settings: Settings,
    private readonly hooks: Hooks,
  ) {
    const chat = byId<HTMLInputElement>("as-chat");
    const complete = byId<HTMLInputElement>("as-completion");
    chat.disabled = !settings.chat;
    chat.title = settings.chat ? "" : "The model has no chat template";
    (settings.chat ? chat : complete).checked = true;
    for (const choice of [chat, complete]) choice.addEventListener("change", () => this.#choose(chat.checked));
    this.#choose(chat.checked);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#generate();
    });
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && this.#chats) {
        event.preventDefault();
        this.#form.requestSubmit();
      }
    });
    this.#stop.addEventListener("click", () => this.#running?.abort());
    this.#fresh.addEventListener("click", () => this.#choose(this.#chats));
    this.#output.addEventListener("keydown", (event) => this.#key(event));
    for (const [id, out] of [
      ["temperature", "temperature-value"],
      ["max-tokens", "max-tokens-value"],
    ] as const) {
      const input = byId<HTMLInputElement>(id);
      const show = (): void => setText(byId(out), input.value);
      input.addEventListener("input", show);
      show();
    }
  }

  #choose(chats: boolean): void {
    this.#running?.abort();
    this.#chats = chats;
    this.#turns = [];
    this.#pieces = [];
    this.#output.replaceChildren(
      h("p", { class: "empty" }, "The answer appears here, token by token. Point at a token, or move through them with the arrow keys, to see its time; a click or Enter shows its step."),
    );
    setText(this.#note, "");
    setText(this.#status, "");
    this.#fresh.hidden = !chats;
    this.#prompt.placeholder = chats ? "Ask something (Enter sends)" : "Begin a text that the model continues";
    setText(this.#send, chats ? "Send" : "Complete");
    const [own, other] = chats ? [QUESTION, BEGINNING] : [BEGINNING, QUESTION];
    if (!this.#prompt.value || this.#prompt.value === other) this.#prompt.value = own;
  }

  async #generate(): Promise<void> {
    const text = this.#prompt.value;
    if (this.#running || !text.trim()) return;
    const stop = (this.#running = new AbortController());
    const body: Record<string, unknown> = {
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      include_graph_steps: true,
      temperature: Number(byId<HTMLInputElement>("temperature").value),
      max_tokens: Number(byId<HTMLInputElement>("max-tokens").value),
    };
    if (this.#chats) body.messages = [...this.#turns, { role: "user", content: text }];
    else body.prompt = text;
    const answer = this.#begin(text);
    const began = performance.now();
    let first = 0;
    try {
      const path = this.#chats ? "v1/chat/completions" : "v1/completions";
      const response = await request(path, { body, signal: stop.signal, accept: "text/event-stream" });
      let last = began;
      let finish = "";
      for await (const { text: line } of linesOf(response.body!)) {
        stop.signal.throwIfAborted(); // also while lines are left that came before it was stopped
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const chunk = JSON.parse(line.slice(6)) as Chunk;
        if (chunk.error) throw new ApiError(200, chunk.error.message);
        this.#tokens = chunk.usage?.completion_tokens ?? this.#tokens;
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        finish = choice.finish_reason ?? finish;
        const stats = choice.graph_stats;
        if (stats?.id) {
          this.hooks.sent(stats.id);
          // A request that was preempted has computed some of its tokens twice.
          const prompt = (chunk.usage?.prompt_tokens ?? 0) - stats.cached_tokens;
          this.#request = stats.preemptions || prompt <= 0 ? null : { id: stats.id, prompt };
        }
        const piece = choice.text ?? choice.delta?.reasoning_content ?? choice.delta?.content;
        if (!piece) continue;
        const now = performance.now();
        first ||= now;
        this.#add(answer, piece, now - last);
        last = now;
      }
      this.#done(began, first, last, finish);
    } catch (error) {
      this.#failed(error, stop.signal.aborted);
    } finally {
      this.#running = null;
      this.#busy(false);
      const content = this.#pieces.map((piece) => piece.text).join("");
      if (this.#chats && content) {
        this.#turns.push({ role: "user", content: text }, { role: "assistant", content });
        this.#prompt.value = "";
      }
    }
  }

  #begin(text: string): HTMLElement {
    const answer = h("p", { class: "answer", role: "group", "aria-label": "Answer, by token" });
    const asked = h("p", { class: this.#chats ? "asked" : "given" }, text);
    if (this.#turns.length) this.#output.append(asked, answer);
    else this.#output.replaceChildren(asked, answer);
    this.#pieces = [];
    this.#tokens = 0;
    this.#request = null;
    setText(this.#note, "");
    setText(this.#status, "Waiting for the first token");
    this.#busy(true);
    return answer;
  }

  #busy(busy: boolean): void {
    this.#send.disabled = busy;
    this.#stop.disabled = !busy;
    this.#output.setAttribute("aria-busy", String(busy));
  }

  #add(answer: HTMLElement, text: string, gap: number): void {
    const index = this.#pieces.length;
    const element = h("span", { class: "token", tabindex: index ? "-1" : "0", "data-index": index }, text);
    const piece: Piece = { text, gap, token: this.#tokens, element };
    this.#pieces.push(piece);
    const pieces = this.#pieces;
    const tell = (): void => this.#tell(pieces, index);
    element.addEventListener("pointerenter", tell);
    element.addEventListener("focus", tell);
    element.addEventListener("click", () => {
      const step = this.#stepOf(pieces, piece);
      if (step) this.hooks.showStep(step.id);
    });
    const atEnd = this.#output.scrollHeight - this.#output.scrollTop - this.#output.clientHeight < 40;
    answer.append(element);
    if (atEnd) this.#output.scrollTop = this.#output.scrollHeight;
  }

  #stepOf(pieces: readonly Piece[], piece: Piece): StepOfToken | null {
    if (pieces !== this.#pieces || !this.#request) return null;
    return this.hooks.stepOf(this.#request, piece.token);
  }

  #tell(pieces: readonly Piece[], index: number): void {
    const piece = pieces[index]!;
    const since = index ? "after the one before" : "after the request was sent";
    const step = this.#stepOf(pieces, piece);
    const made = step ? ` By step ${step.id} (${step.label}).` : "";
    setText(this.#note, `Token ${piece.token || index + 1}: ${ms(piece.gap)} ${since}.${made}`);
  }

  #key(event: KeyboardEvent): void {
    const element = event.target as HTMLElement;
    if (!element.classList.contains("token")) return;
    if (event.key === "Enter") element.click();
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way) return;
    const next = (way > 0 ? element.nextElementSibling : element.previousElementSibling) as HTMLElement | null;
    if (!next) return;
    event.preventDefault();
    element.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  #done(began: number, first: number, last: number, finish: string): void {
    const slow = [...this.#pieces].slice(1).sort((a, b) => b.gap - a.gap)[0];
    const typical = this.#pieces.slice(1).map((p) => p.gap).sort((a, b) => a - b)[this.#pieces.length >> 1] ?? 0;
    const late = this.#pieces.length < 8 ? [] : this.#pieces.slice(1).filter(({ gap }) => gap > 3 * typical && gap > 5);
    for (const { element } of late) element.classList.add("late");
    const parts = [plural(this.#tokens, "token")];
    if (first) parts.push(`first after ${ms(first - began)}`);
    if (this.#tokens > 1) {
      parts.push(`then ${ms((last - first) / (this.#tokens - 1))} each`);
      if (slow) parts.push(`longest gap ${ms(slow.gap)}${late.length ? " (slow tokens are marked)" : ""}`);
    }
    setText(this.#status, `${parts.join(", ")}${finish === "length" ? "; cut at the maximum" : ""}.`);
  }

  #failed(error: unknown, stopped: boolean): void {
    if (stopped) {
      setText(this.#status, `Stopped after ${plural(this.#tokens, "token")}.`);
    } else if (error instanceof ApiError && error.status === 401) {
      setText(this.#status, "The server asks for an API key: enter it above, then send again.");
      this.hooks.needsKey();
    } else if (error instanceof ApiError) {
      setText(this.#status, error.message);
    } else {
      setText(this.#status, "The connection was lost. The server may have stopped; the state above says when it answers again.");
    }
  }
}
