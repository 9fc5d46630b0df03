// Requests to the server that served this page. Knows: HTTP, the key. URLs are relative, so that the
// page works behind a proxy that adds a prefix.

export interface Settings {
  /** Whether requests need an API key. */
  keyed: boolean;
  /** Whether the model has a chat template. */
  chat: boolean;
  /** Traces to show, where the page is served for them alone. */
  traces: string[];
}

/** An answer that is an error, in the server's words. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code = "",
  ) {
    super(message);
  }
}

const STORED = "minisrv-key";
let current = readKey();

function readKey(): string {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return ""; // storage is turned off: the key lives as long as the page
  }
}

export const key = (): string => current;

/** Keeps the key for this tab until it is closed; an empty one forgets it. */
export function setKey(value: string): void {
  current = value;
  try {
    if (value) sessionStorage.setItem(STORED, value);
    else sessionStorage.removeItem(STORED);
  } catch {
    // As in readKey.
  }
}

interface Options {
  body?: unknown;
  signal?: AbortSignal;
  accept?: string;
}

/** Sends a request, and throws ApiError for an answer that is an error. */
export async function request(path: string, options: Options = {}): Promise<Response> {
  const headers: Record<string, string> = { accept: options.accept ?? "application/json" };
  const sent = current;
  if (sent) headers.authorization = `Bearer ${sent}`;
  const init: RequestInit = { headers, cache: "no-store", credentials: "same-origin" };
  if (options.signal) init.signal = options.signal;
  if (options.body !== undefined) {
    headers["content-type"] = "application/json";
    init.method = "POST";
    init.body = JSON.stringify(options.body);
  }
  const response = await fetch(path, init);
  if (response.ok) return response;
  const error = await errorOf(response);
  // Where another key was entered meanwhile, this answer says nothing about that one.
  if (error.status === 401 && current && current !== sent) return request(path, options);
  throw error;
}

async function errorOf(response: Response): Promise<ApiError> {
  try {
    const body = (await response.json()) as { error?: { message?: string; code?: string } };
    const { message, code } = body.error ?? {};
    return new ApiError(response.status, message ?? `The server answered ${response.status}.`, code ?? "");
  } catch {
    return new ApiError(response.status, `The server answered ${response.status}.`);
  }
}

export interface Ready {
  state: "loading" | "ready" | "asleep" | "draining" | "dead";
  loading?: { phase: string; done: number; total: number } | null;
  compilation?: { state: string; generation: number; reason: string };
  graphs?: {
    graphs: number;
    total: number;
    missing: number;
    decode: number[];
    mixed: number[];
    epilogues: number[];
    refused: Record<string, string>;
    quarantined: Record<string, string>;
    stopped: string;
  };
}

/** The state of the engine, whatever status it comes with. */
export async function ready(): Promise<Ready> {
  const response = await fetch("ready", { cache: "no-store" });
  const body = (await response.json()) as Ready;
  if (typeof body.state !== "string") throw new Error("no answer of minisrv");
  return body;
}

export const url = (path: string): string => new URL(path, document.baseURI).href;

export const sleep = (ms: number, signal?: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
