// OpenAI's SDK for JavaScript. Arguments and report are those of report.py.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import OpenAI, { APIError } from "openai";

const [url, keyedUrl, , folder] = process.argv.slice(2);
const read = (name) => readFileSync(join(folder, name));
const write = (name, data) => writeFileSync(join(folder, name), data);
const text = read("text.txt").toString();
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });

async function refusal(kind, call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof APIError) || error.constructor.name !== kind) throw error;
    return { status: error.status, code: error.code, param: error.param, id: error.requestID };
  }
  throw new Error(`no ${kind}`);
}

const scenarios = {
  async formats() {
    for (const response_format of ["mp3", "opus", "aac", "flac", "wav", "pcm"]) {
      const reply = await client.audio.speech.create({ model: "tts-1", voice: { id: "awb" }, input: text, response_format, seed: 6 });
      write(`node.${response_format}`, Buffer.from(await reply.arrayBuffer()));
    }
  },

  async parts() {
    const reply = await client.audio.speech.create({
      model: "gpt-4o-mini-tts", voice: "awb", input: text, response_format: "pcm", instructions: "Calm.", seed: 6,
    });
    const parts = [];
    for await (const part of reply.body) parts.push(part.length);
    return parts;
  },

  async events() {
    const reply = await client.audio.speech.create({
      model: "gpt-4o-mini-tts", voice: "awb", input: text, response_format: "mp3", stream_format: "sse", seed: 6,
    });
    const events = (await reply.text()).split("\n").filter((line) => line.startsWith("data: ")).map((line) => JSON.parse(line.slice(6)));
    const deltas = events.filter((event) => event.type === "speech.audio.delta").map((event) => Buffer.from(event.audio, "base64"));
    write("events.mp3", Buffer.concat(deltas));
    return events.map((event) => event.type);
  },

  async models() {
    const found = [];
    for await (const model of client.models.list()) found.push(model.id);
    return [...found, (await client.models.retrieve(found[0])).id];
  },

  async mistakes() {
    const speak = (one, fields) => () => one.audio.speech.create({ model: "tts-1", voice: "alloy", input: "Hi.", ...fields });
    const wrong = new OpenAI({ baseURL: `${keyedUrl}/v1`, apiKey: "wrong", maxRetries: 0 });
    return [
      await refusal("BadRequestError", speak(client, { speed: 9 })),
      await refusal("NotFoundError", speak(client, { voice: "nobody" })),
      await refusal("AuthenticationError", speak(wrong, {})),
    ];
  },
};

const report = {};
for (const [name, scenario] of Object.entries(scenarios)) {
  try {
    report[name] = { result: (await scenario()) ?? null };
  } catch (error) {
    report[name] = { traceback: error.stack ?? String(error) };
  }
}
write("report.json", JSON.stringify(report));
