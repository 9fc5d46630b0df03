// Vercel's AI SDK, whose OpenAI provider speaks the Responses API by default, against a server.
//
//     npm install ai @ai-sdk/openai zod
//     node benchmarks/clients/use_vercel_ai.mjs http://127.0.0.1:8000 [out.json]
//
// The packages are looked up in the working directory. Runs against the default model. The first
// step of a turn requires a call; everything else is sent as the SDK sends it. Every step asserts
// its results; a failed step is reported and makes the exit status 1. The report also has the bodies
// of the requests.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "here.js"));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { generateObject, generateText, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { z } = await load("zod");

const [url, out] = process.argv.slice(2);
const SUM = "What is 17 + 25?";
const WEATHER = "What is the weather in Oslo?";

let bodies = [];
async function noting(input, init) {
  if (init?.body) bodies.push(JSON.parse(init.body));
  return fetch(input, init);
}

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none", fetch: noting });
const model = openai("minisrv-default");
const settings = { model, temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
const tools = {
  weather: tool({
    description: "The weather of a city.",
    inputSchema: z.object({ city: z.enum(["Oslo", "Rome"]) }),
    execute: async ({ city }) => `Sunny in ${city}.`,
  }),
};
const calling = {
  tools,
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
};

const steps = {
  async answer() {
    const result = await generateText({ ...settings, prompt: SUM });
    assert.equal(result.text, "42");
    assert.equal(result.finishReason, "stop");
    return result.usage.outputTokens;
  },
  async streamed() {
    const result = streamText({ ...settings, system: "Be brief.", prompt: SUM });
    const kinds = [];
    for await (const part of result.fullStream) kinds.push(part.type);
    assert.equal(await result.text, "42");
    assert.equal(await result.finishReason, "stop");
    assert.equal(kinds.at(-1), "finish");
    return kinds;
  },
  // The provider refers to the items of stored responses by their ids.
  async tool_call() {
    const result = await generateText({ ...settings, ...calling, prompt: WEATHER });
    assert.equal(result.steps.length, 2);
    for (const { output } of result.steps[0].toolResults) assert.match(output, /^Sunny in /);
    assert.ok(result.steps[0].toolResults.length > 0);
    return result.text;
  },
  async tool_call_streamed() {
    const result = streamText({ ...settings, ...calling, prompt: WEATHER });
    const kinds = [];
    for await (const part of result.fullStream) {
      assert.notEqual(part.type, "error", String(part.error));
      if (part.type !== kinds.at(-1)) kinds.push(part.type);
    }
    assert.ok(kinds.includes("tool-result"));
    return kinds;
  },
  // Without storing, the provider sends the items themselves.
  async tool_call_without_storing() {
    const providerOptions = { openai: { store: false } };
    const result = await generateText({ ...settings, ...calling, providerOptions, prompt: WEATHER });
    assert.equal(result.steps.length, 2);
    return result.text;
  },
  async previous_response() {
    const first = await generateText({ ...settings, prompt: SUM });
    const previousResponseId = first.providerMetadata.openai.responseId;
    const providerOptions = { openai: { previousResponseId } };
    const again = await generateText({ ...settings, providerOptions, prompt: "And 3 + 4?" });
    assert.ok(again.usage.inputTokens > first.usage.inputTokens);
    return again.text;
  },
  async structured_output() {
    const schema = z.object({ city: z.string().max(20) });
    const result = await generateObject({ ...settings, schema, prompt: "A city?" });
    return result.object;
  },
  async log_probabilities() {
    const providerOptions = { openai: { logprobs: 2 } };
    const result = await generateText({ ...settings, providerOptions, prompt: SUM });
    const [tokens] = result.providerMetadata.openai.logprobs;
    assert.ok(tokens.every((token) => token.top_logprobs.length === 2));
    return tokens.map((token) => token.token);
  },
  async cut_off() {
    const result = await generateText({ ...settings, maxOutputTokens: 1, prompt: SUM });
    assert.equal(result.finishReason, "length");
    return result.text;
  },
  async errors() {
    const told = [];
    for (const wrong of [{ model: openai("other") }, { topP: 7 }]) {
      try {
        await generateText({ ...settings, ...wrong, prompt: SUM });
      } catch (error) {
        told.push([error.statusCode, error.message]);
      }
    }
    assert.deepEqual(told.map(([status]) => status), [404, 400]);
    return told;
  },
  async cancelled() {
    const controller = new AbortController();
    const story = { ...settings, maxOutputTokens: 1000, prompt: "Tell me a story." };
    const result = streamText({ ...story, abortSignal: controller.signal });
    let number = 0;
    for await (const part of result.fullStream) {
      if (part.type === "text-delta" && ++number === 2) controller.abort();
    }
    return (await generateText({ ...settings, prompt: SUM })).text;
  },
};

const report = { versions: { node: process.versions.node }, steps: [] };
for (const name of ["ai", "@ai-sdk/openai", "zod"]) {
  const file = join(process.cwd(), "node_modules", name, "package.json");
  report.versions[name] = JSON.parse(readFileSync(file, "utf-8")).version;
}
for (const [step, run] of Object.entries(steps)) {
  bodies = [];
  try {
    const told = await run();
    report.steps.push({ step, works: true, told: { told, requests: bodies } });
  } catch (error) {
    console.error(error);
    report.steps.push({ step, works: false, told: String(error) });
  }
}
const text = JSON.stringify(report, null, 1) + "\n";
console.log(text);
if (out) writeFileSync(out, text);
process.exitCode = report.steps.every((step) => step.works) ? 0 : 1;
