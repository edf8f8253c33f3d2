// The page: fields → request → take → sound, waveform, figures, history.

import * as api from "./api.js";
import { createDialogue, dialogueFields } from "./dialogue.js";
import { byId, clock, make } from "./dom.js";
import { createHistory } from "./history.js";
import { Player } from "./player.js";
import { createReference } from "./reference.js";
import * as settings from "./settings.js";
import { FORMATS, Take } from "./take.js";
import { createVoices, RECORDING } from "./voices.js";
import { draw } from "./wave.js";

let model = null;
let take = null; // the one that is shown
let running = null; // AbortController of the request that is being answered

const player = new Player();
const dialogue = createDialogue();
const voices = createVoices({ changed: showModes, failed });
const reference = createReference({
  changed: voices.offerRecording,
  kept: (name) => {
    byId("error").hidden = true;
    return voices.refresh(name);
  },
  failed,
});
const history = createHistory({ play: (chosen) => play(chosen), reuse });

function failed(error) {
  byId("error").textContent = error.message;
  byId("error").hidden = false;
  byId("error").scrollIntoView({ block: "nearest" });
  if (error.status === 401) askKey();
}

function askKey() {
  byId("key").hidden = false;
  byId("key-value").focus();
}

// Speaking

const mode = () => document.querySelector("input[name=mode]:checked").value;

function showModes(names) {
  dialogue.setVoices(names);
  byId("modes").hidden = !model.speakers || !names.length;
}

function setMode(value) {
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.checked = radio.value === value;
  document.body.classList.toggle("dialogue", value === "dialogue");
  byId("text").hidden = value === "dialogue";
  byId("dialogue").hidden = value !== "dialogue";
  if (value === "dialogue" && !dialogue.lines.length) dialogue.lines = [{ text: "Good morning." }, { text: "Good morning to you." }];
}

/** Return the request of the fields, and who speaks; null if a field is out of range. */
async function request() {
  const given = settings.settings();
  if (given === null) return null;
  const draft = { mode: mode(), text: byId("text").value, lines: dialogue.lines, voice: voices.chosen(), settings: given };
  const seed = given.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  if (draft.mode === "dialogue") {
    const fields = dialogueFields(draft.lines);
    return { body: { ...fields, ...given, seed }, label: fields.voice.join(", "), draft };
  }
  const own = draft.voice === RECORDING;
  const voice = own ? await reference.fields() : draft.voice ? { voice: draft.voice } : {};
  return { body: { input: draft.text, ...voice, ...given, seed }, label: own ? "your recording" : draft.voice || "no voice", draft };
}

async function speak() {
  stop();
  byId("error").hidden = true;
  if (!model) return failed(new Error(`The server cannot speak yet: ${byId("state").textContent}.`));
  player.open(model.sample_rate); // now, while the browser knows that the user wants sound
  const control = (running = new AbortController());
  let made = null;
  try {
    const asked = await request();
    if (asked === null || control.signal.aborted) return;
    made = new Take(asked.body, asked.label, model.sample_rate, asked.draft);
    take = made;
    show();
    await made.read(control.signal, (samples) => {
      if (take === made) player.push(samples);
      show();
    });
  } catch (error) {
    failed(error);
  } finally {
    if (running === control) {
      running = null;
      player.finish();
    }
    if (made?.length) history.add(made);
    history.show(take);
    show();
  }
}

function stop() {
  running?.abort();
  running = null;
  player.stop();
  voices.stop();
  show();
}

/** Play a take from a place in it, in seconds. */
function play(chosen, from = 0) {
  if (chosen !== take || !running) stop();
  take = chosen;
  const start = Math.floor(from * take.rate);
  player.open(take.rate, start / take.rate);
  player.push(take.from(start));
  if (!running) player.finish();
  history.show(take);
  show();
}

function reuse(chosen) {
  const { draft } = chosen;
  setMode(draft.mode);
  byId("text").value = draft.text;
  dialogue.lines = draft.lines;
  voices.select(draft.voice);
  settings.restore({ ...draft.settings, seed: chosen.body.seed });
  byId(draft.mode === "dialogue" ? "speak" : "text").focus();
}

async function download(format) {
  byId("error").hidden = true;
  byId("progress").textContent = `Making ${format}…`;
  try {
    const file = await take.file(format);
    const url = URL.createObjectURL(file);
    make("a", { href: url, download: file.name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch (error) {
    failed(error);
  }
  byId("progress").textContent = "";
}

// What is shown of a take

const STATES = { waiting: "Waiting for the first audio…", speaking: "Speaking…", stopped: "Stopped.", failed: "Broken off." };
let drawing = 0;

function show() {
  const has = Boolean(take?.length);
  const active = running !== null || player.playing;
  byId("stop").disabled = !active;
  byId("play").disabled = byId("position").disabled = !has;
  for (const button of byId("downloads").querySelectorAll("button")) button.disabled = !has || running !== null;
  byId("first").textContent = take?.firstAudio != null ? `${take.firstAudio.toFixed(2)} s` : "–";
  byId("rtf").textContent = take?.rtf != null ? take.rtf.toFixed(2) : "–";
  byId("length").textContent = has ? `${take.seconds.toFixed(1)} s` : "–";
  byId("used-seed").textContent = take ? String(take.body.seed) : "–";
  const notes = [(has || running) && STATES[take?.state], take?.ignored && `Not used by this model: ${take.ignored}.`];
  notes.push(...(take?.warnings ?? []).map((each) => `Warning: ${each}.`));
  if (player.gaps) notes.push("The server speaks slower than real time, so there are pauses.");
  const said = notes.filter(Boolean).join(" ");
  if (byId("progress").textContent !== said) byId("progress").textContent = said;
  if (!drawing) drawing = requestAnimationFrame(follow);
}

/** Draw the waveform, and go on while there is sound. */
function follow() {
  drawing = player.playing ? requestAnimationFrame(follow) : 0;
  const heard = player.playing ? player.position : 0;
  const seconds = take?.seconds ?? 0;
  draw(byId("wave").querySelector("canvas"), take?.peaks ?? [], seconds, heard);
  const position = byId("position");
  position.max = seconds;
  position.value = heard;
  position.setAttribute("aria-valuetext", `${clock(heard)} of ${clock(seconds)}`);
  byId("time").textContent = `${clock(heard)} / ${clock(seconds)}`;
}

// The server

const words = (codes) => codes.map((code) => new Intl.DisplayNames(["en"], { type: "language" }).of(code)).join(", ");

async function load() {
  const [found, list] = await Promise.all([api.model(), api.voices()]);
  model = found;
  const facts = [model.id, model.family, words(model.languages), `${model.sample_rate / 1000}\u00a0kHz`];
  byId("model").textContent = facts.filter(Boolean).join(" · ");
  settings.setDefaults(model);
  reference.advise(model.voice_seconds);
  voices.setLanguage(model.languages.length < 4 ? words(model.languages) : "");
  voices.show(list);
}

/** Show the state of the server, and ask again: soon while it loads, otherwise now and then. */
async function watch() {
  let health;
  try {
    health = await api.health();
  } catch {
    health = { status: "down", reason: "not reachable" };
  }
  byId("state").dataset.state = { ok: "ok", loading: "loading" }[health.status] ?? "down";
  byId("state").textContent = health.status === "ok" ? `ready · ${health.provider}` : health.reason;
  if (health.needs_key && !api.getKey()) byId("key").hidden = false;
  if (!model && health.status !== "down") await load().catch(failed);
  setTimeout(watch, health.status === "loading" ? 500 : 30_000);
}

// Actions

for (const format of FORMATS) {
  byId("downloads").append(make("button", { type: "button", textContent: format, onclick: () => download(format), disabled: true }));
}
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  speak();
});
byId("stop").addEventListener("click", stop);
byId("play").addEventListener("click", () => play(take));
byId("position").addEventListener("input", ({ target }) => play(take, Number(target.value)));
byId("modes").addEventListener("change", ({ target }) => setMode(target.value));
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey(byId("key-value").value.trim());
  byId("key").hidden = true;
  byId("error").hidden = true;
  byId("speak").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    speak();
  } else if (event.key === "Escape") {
    stop();
    reference.stop();
  }
});
player.onend = show;
addEventListener("resize", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
setMode("text"); // a browser may bring the fields of an earlier visit back
show();
watch();
