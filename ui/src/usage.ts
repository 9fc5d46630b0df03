// How to call the server: commands to copy, and links. Knows: what a newcomer would type.
import { url, type Settings } from "./api";
import { copyButton, h } from "./dom";

const LINKS: [string, string][] = [
  ["docs", "the API, to read and to try"],
  ["v1/models", "the names of the model"],
  ["health", "whether the server lives"],
  ["ready", "whether it takes requests"],
  ["metrics", "counters for Prometheus"],
];

/** A text as one word of a POSIX shell. */
export const quoted = (text: string): string =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;

export function usage(settings: Settings, model: string): HTMLElement {
  const blocks: [string, string][] = [];
  const base = url("v1");
  const key = settings.keyed ? `\n  -H "Authorization: Bearer $MINISRV_API_KEY" \\` : "";
  if (settings.keyed) blocks.push(["First, the API key", "export MINISRV_API_KEY=KEY"]);
  const [path, body] = settings.chat
    ? ["chat/completions", { messages: [{ role: "user", content: "Hello!" }], max_tokens: 64 }]
    : ["completions", { prompt: "Once upon a time", max_tokens: 64 }];
  blocks.push([
    "With curl",
    `curl ${quoted(`${base}/${path}`)} \\${key}\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}`,
  ]);
  const call = settings.chat
    ? `client.chat.completions.create(\n    model=${JSON.stringify(model)},\n    messages=[{"role": "user", "content": "Hello!"}],\n)\nprint(answer.choices[0].message.content)`
    : `client.completions.create(\n    model=${JSON.stringify(model)}, prompt="Once upon a time"\n)\nprint(answer.choices[0].text)`;
  const secret = settings.keyed ? 'os.environ["MINISRV_API_KEY"]' : '"none"';
  blocks.push([
    "With OpenAI’s client for Python",
    `${settings.keyed ? "import os\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(base)}, api_key=${secret})\nanswer = ${call}`,
  ]);
  if (settings.chat) blocks.push(["In a terminal", `minisrv chat --url ${quoted(base)}`]);
  return h(
    "div",
    { class: "usage" },
    ...blocks.map(([title, code]) =>
      h(
        "div",
        { class: "snippet" },
        h("div", { class: "snippet-head" }, h("h3", {}, title), copyButton(() => code, title)),
        h("pre", { tabindex: "0", role: "region", "aria-label": title }, h("code", {}, code)),
      ),
    ),
    h(
      "ul",
      { class: "links" },
      ...LINKS.map(([link, what]) => h("li", {}, h("a", { href: link }, `/${link}`), ` ${what}`)),
    ),
  );
}
