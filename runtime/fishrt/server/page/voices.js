// The list of voices: which one speaks, how each sounds, and the removal of those that were stored here.

import { removeVoice, sample, voices as listVoices } from "./api.js";
import { byId, make } from "./dom.js";

/** The choice of the user's own recording; no voice has a name like it. */
export const RECORDING = "\0recording";
const ORIGINS = { bundle: "built in", user: "yours", session: "until the server ends" };

/** language: of the voices, in words. changed(names): the list is another. failed(error). */
export function createVoices({ changed, failed }) {
  const player = new Audio();
  const samples = new Map(); // name → URL
  let language = "";
  let list = null; // as the server gave it
  let own = false; // whether there is a recording of the user's

  const chosen = () => document.querySelector("input[name=voice]:checked")?.value;

  const hear = async (name) => {
    try {
      if (!samples.has(name)) samples.set(name, URL.createObjectURL(await sample(name)));
      player.src = samples.get(name);
      await player.play();
    } catch (error) {
      if (error.name !== "AbortError") failed(error);
    }
  };

  const remove = async (name) => {
    if (!confirm(`Delete the voice ${name}? Its recording is deleted, too.`)) return;
    try {
      await removeVoice(name);
      URL.revokeObjectURL(samples.get(name));
      samples.delete(name);
      await refresh();
    } catch (error) {
      failed(error);
    }
  };

  const row = (value, title, note, ...buttons) => {
    const radio = make("input", { type: "radio", name: "voice", value });
    const said = make("small", { className: "note", textContent: note });
    return make("li", { className: value === RECORDING ? "own" : "" }, make("label", {}, radio, make("span", {}, title, said)), ...buttons);
  };

  const button = (sign, what, act) =>
    make("button", { type: "button", className: "quiet", textContent: sign, title: what, ariaLabel: what, onclick: act });

  /** Show the voices that the server lists and, if there is one, the user's recording; choose `name`, else what was chosen. */
  function show(found, name = chosen()) {
    list = found;
    const { voices, default_voice: usual } = found;
    const names = voices.map((voice) => voice.name);
    const rows = voices.map((voice) =>
      row(
        voice.name,
        voice.name,
        [voice.name === usual && "default", language, ORIGINS[voice.origin]].filter(Boolean).join(" · "),
        button("▶", `Hear ${voice.name}`, () => hear(voice.name)),
        ...(voice.origin === "bundle" ? [] : [button("✕", `Delete ${voice.name}`, () => remove(voice.name))]),
      ),
    );
    if (own) rows.unshift(row(RECORDING, "Your recording", ""));
    if (!names.length) rows.push(row("", "No voice", "the model chooses one"));
    byId("voices").replaceChildren(...rows);
    select(name) || select(usual) || select("");
    changed(names);
  }

  const refresh = async (name) => show(await listVoices(), name);

  /** Choose a voice; return whether there is one. */
  function select(name) {
    const radio = [...document.querySelectorAll("input[name=voice]")].find(({ value }) => value === name);
    if (radio) radio.checked = true;
    return Boolean(radio);
  }

  return {
    show,
    refresh,
    select,
    chosen,
    stop: () => player.pause(),
    setLanguage: (words) => (language = words),
    /** List the user's recording, and choose it. */
    offerRecording() {
      own = true;
      if (list) show(list, RECORDING);
    },
  };
}
