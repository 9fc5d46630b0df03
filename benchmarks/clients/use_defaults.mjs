// JavaScript clients as they come, with their defaults, against a server: the steps of
// use_defaults.py for the official clients of OpenAI and Anthropic and for Vercel's AI SDK over chat
// completions and Anthropic's API (use_vercel_ai.mjs has the Responses API).
//
//     npm install openai @anthropic-ai/sdk ai @ai-sdk/openai @ai-sdk/openai-compatible \
//         @ai-sdk/anthropic zod
//     node benchmarks/clients/use_defaults.mjs http://127.0.0.1:8000 [out.json]
//
// The packages are looked up in the working directory. The server has the default model with a
// context of 8,192 tokens, as benchmarks/README.md says. Every step asserts its results; a failed
// step is reported and makes the exit status 1. The results are added to those in the file, with the
// bodies of the requests.

import assert from "node:assert/strict";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "here.js"));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { default: OpenAI } = await load("openai");
const { default: Anthropic } = await load("@anthropic-ai/sdk");
const { generateObject, generateText, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { z } = await load("zod");

const [url, out] = process.argv.slice(2);
const MODEL = "minisrv-default";
const SUM = "What is 17 + 25?";
const QUESTION = "What is the weather in Oslo?";
const STORY = "Tell me a long story.";
const SCHEMA = {
  type: "object",
  properties: { city: { type: "string", enum: ["Oslo", "Rome"] } },
  required: ["city"],
};
const DESCRIPTION = "The weather of a city.";

let bodies = [];
async function noting(input, init) {
  if (typeof init?.body === "string") {
    bodies.push({ path: new URL(input).pathname, body: JSON.parse(init.body) });
  }
  return fetch(input, init);
}

const user = (content) => ({ role: "user", content });
const weather = ({ city }) => `Sunny in ${city}.`;

function nonempty(text) {
  assert.ok(text?.trim());
  return text;
}

async function errorOf(call) {
  try {
    await call();
  } catch (error) {
    assert.match(error.message, /other/);
    return `${error.name}: ${error.message}`;
  }
  assert.fail("a model that does not exist has answered");
}

async function someOf(pieces) {
  let number = 0;
  for await (const _ of pieces) if (++number === 4) break;
  assert.equal(number, 4);
  return number;
}

// Waits until the server has no request any more, for ten seconds at most.
async function ends() {
  for (let attempt = 0; attempt < 100; attempt++) {
    if ((await (await fetch(`${url}/load`)).json()).server_load === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.fail("the server still works for a client that has gone");
}

function openai() {
  const { chat } = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", fetch: noting });
  const asked = { model: MODEL, messages: [user(SUM)] };
  const tools = [
    { type: "function", function: { name: "weather", description: DESCRIPTION, parameters: SCHEMA } },
  ];
  const schema = { name: "city", schema: SCHEMA, strict: true };
  return {
    async plain() {
      return nonempty((await chat.completions.create(asked)).choices[0].message.content);
    },
    async streamed() {
      const stream = chat.completions.stream(asked);
      return nonempty((await stream.finalChatCompletion()).choices[0].message.content);
    },
    async tool_call() {
      const messages = [user(QUESTION)];
      const first = await chat.completions.create({
        ...asked, messages, tools, tool_choice: "required",
      });
      const { message } = first.choices[0];
      const results = message.tool_calls.map(({ id, function: { arguments: given } }) => ({
        role: "tool", tool_call_id: id, content: weather(JSON.parse(given)),
      }));
      messages.push(message, ...results);
      const again = await chat.completions.create({ ...asked, messages, tools });
      return [...results.map(({ content }) => content), again.choices[0].finish_reason];
    },
    async structured_output() {
      const answer = await chat.completions.parse({
        ...asked, messages: [user("A city?")],
        response_format: { type: "json_schema", json_schema: schema },
      });
      return JSON.parse(answer.choices[0].message.content).city;
    },
    error: () => errorOf(() => chat.completions.create({ ...asked, model: "other" })),
    async cancelled() {
      const story = { ...asked, messages: [user(STORY)], stream: true };
      return someOf(await chat.completions.create(story));
    },
  };
}

function anthropic() {
  const { messages } = new Anthropic({ baseURL: url, apiKey: "none", fetch: noting });
  const asked = { model: MODEL, max_tokens: 200, messages: [user(SUM)] };
  const tools = [{ name: "weather", description: DESCRIPTION, input_schema: SCHEMA }];
  return {
    async plain() {
      return nonempty((await messages.create(asked)).content[0].text);
    },
    async streamed() {
      return nonempty(await messages.stream(asked).finalText());
    },
    async tool_call() {
      const said = [user(QUESTION)];
      const first = await messages.create({
        ...asked, messages: said, tools, tool_choice: { type: "any" },
      });
      const results = first.content
        .filter(({ type }) => type === "tool_use")
        .map(({ id, input }) => ({ type: "tool_result", tool_use_id: id, content: weather(input) }));
      assert.ok(results.length > 0);
      said.push({ role: "assistant", content: first.content }, user(results));
      const again = await messages.create({ ...asked, messages: said, tools });
      return [...results.map(({ content }) => content), again.stop_reason];
    },
    async structured_output() {
      const output_config = { format: { type: "json_schema", schema: SCHEMA } };
      const answer = await messages.create({
        ...asked, messages: [user("A city?")], output_config,
      });
      return JSON.parse(answer.content[0].text).city;
    },
    error: () => errorOf(() => messages.create({ ...asked, model: "other" })),
    async cancelled() {
      const story = { ...asked, max_tokens: 4000, messages: [user(STORY)], stream: true };
      return someOf(await messages.create(story));
    },
  };
}

function vercel(modelOf) {
  const model = modelOf(MODEL);
  const schema = z.object({ city: z.enum(["Oslo", "Rome"]) });
  const tools = {
    weather: tool({
      description: DESCRIPTION, inputSchema: schema, execute: async (given) => weather(given),
    }),
  };
  return {
    async plain() {
      return nonempty((await generateText({ model, prompt: SUM })).text);
    },
    async streamed() {
      return nonempty(await streamText({ model, prompt: SUM }).text);
    },
    async tool_call() {
      const result = await generateText({
        model, tools, prompt: QUESTION, stopWhen: stepCountIs(2),
        prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
      });
      assert.equal(result.steps.length, 2);
      return result.steps[0].toolResults.map(({ output }) => output);
    },
    async structured_output() {
      return (await generateObject({ model, schema, prompt: "A city?" })).object.city;
    },
    error: () => errorOf(() => generateText({ model: modelOf("other"), prompt: SUM })),
    async cancelled() {
      const controller = new AbortController();
      const { signal: abortSignal } = controller;
      const pieces = streamText({ model, prompt: STORY, abortSignal }).textStream;
      const number = await someOf(pieces);
      controller.abort();
      return number;
    },
  };
}

const settings = { baseURL: `${url}/v1`, apiKey: "none", fetch: noting };
const compatible = createOpenAICompatible({
  ...settings, name: "minisrv", supportsStructuredOutputs: true,
});
const CLIENTS = {
  "openai for Node, chat": [openai(), ["openai"]],
  "@anthropic-ai/sdk": [anthropic(), ["@anthropic-ai/sdk"]],
  "ai, @ai-sdk/openai, chat": [vercel(createOpenAI(settings).chat), ["ai", "@ai-sdk/openai"]],
  "ai, @ai-sdk/openai-compatible": [vercel(compatible), ["ai", "@ai-sdk/openai-compatible"]],
  "ai, @ai-sdk/anthropic": [vercel(createAnthropic(settings)), ["ai", "@ai-sdk/anthropic"]],
};

const results = {};
for (const [client, [steps, packages]] of Object.entries(CLIENTS)) {
  const versions = { node: process.versions.node };
  for (const name of packages) {
    const file = join(process.cwd(), "node_modules", name, "package.json");
    versions[name] = JSON.parse(readFileSync(file, "utf-8")).version;
  }
  const done = [];
  for (const [step, run] of Object.entries(steps)) {
    bodies = [];
    try {
      const told = await run();
      if (step === "cancelled") await ends();
      const requests = step === "cancelled" ? {} : { requests: bodies };
      done.push({ step, works: true, told: { told, ...requests } });
    } catch (error) {
      console.error(error);
      done.push({ step, works: false, told: String(error) });
    }
  }
  const failed = done.filter(({ works }) => !works).map(({ step }) => step);
  console.log(`${client}: ${done.length} steps, failed: ${failed.join(", ") || "none"}`);
  results[client] = { versions, steps: done };
}
if (out) {
  const before = existsSync(out) ? JSON.parse(readFileSync(out, "utf-8")) : {};
  writeFileSync(out, JSON.stringify({ ...before, ...results }, null, 1) + "\n");
}
const all = Object.values(results).flatMap(({ steps }) => steps);
process.exitCode = all.every(({ works }) => works) ? 0 : 1;
