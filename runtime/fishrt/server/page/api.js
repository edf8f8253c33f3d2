// The server's API. Addresses are relative, so that the page also works below a path of a reverse proxy.

const KEY = "fishrt-key";

/** A request that was not answered with what it asks for; `message` is the server's, which ends with what to do. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

/** Send a request and return its reply. Throws ApiError, and AbortError when `signal` ends it. */
async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Check that it runs, then try again.", 0);
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => ({}));
  throw new ApiError(said.error?.message ?? `The server answered ${reply.status} ${reply.statusText}`, reply.status);
}

/** Return the state of the server, also while it is not ready. */
export async function health() {
  const reply = await fetch("health", { cache: "no-store" });
  return reply.json();
}

export const model = async () => (await (await ask("v1/models")).json()).data[0];
export const voices = async () => (await ask("v1/voices")).json();
export const sample = async (name) => (await ask(`v1/voices/${encodeURIComponent(name)}/sample`)).blob();
export const removeVoice = (name) => ask(`v1/voices/${encodeURIComponent(name)}`, { method: "DELETE" });

/** Store a recording as a voice; return it. */
export async function addVoice(name, audio, transcript) {
  const form = new FormData();
  form.append("name", name);
  form.append("ref_text", transcript);
  form.append("audio_sample", audio, "recording");
  return (await ask("v1/voices", { method: "POST", body: form })).json();
}

/** Return the reply to a request to speak, with its audio still to be read. */
export const speech = (body, signal) =>
  ask("v1/audio/speech", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
