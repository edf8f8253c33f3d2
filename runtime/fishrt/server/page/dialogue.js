// A dialogue: lines, each with its voice. Every voice is a speaker; the model reads `<|speaker:0|>…`.

import { byId, make } from "./dom.js";

export function createDialogue() {
  let names = [];
  const root = byId("dialogue");
  const lines = make("div");
  const add = make("button", { type: "button", textContent: "Add a line", onclick: () => addLine().querySelector("textarea").focus() });
  root.append(lines, add);

  const options = (select, chosen) => {
    select.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
    select.value = names.includes(chosen) ? chosen : (names[0] ?? "");
  };

  function addLine(voice = names[lines.children.length % Math.max(names.length, 1)], text = "") {
    const select = make("select", { ariaLabel: "Voice of this line" });
    const words = make("textarea", { rows: 2, value: text, ariaLabel: "Words of this line" });
    const remove = make("button", { type: "button", className: "quiet", textContent: "✕", ariaLabel: "Remove this line" });
    const line = make("div", { className: "line" }, select, words, remove);
    remove.onclick = () => line.remove();
    options(select, voice);
    lines.append(line);
    return line;
  }

  return {
    setVoices(found) {
      names = found;
      for (const select of lines.querySelectorAll("select")) options(select, select.value);
    },
    get lines() {
      return [...lines.children].map((line) => ({
        voice: line.querySelector("select").value,
        text: line.querySelector("textarea").value.trim(),
      }));
    },
    set lines(given) {
      lines.replaceChildren();
      for (const { voice, text } of given) addLine(voice, text);
    },
  };
}

/** Return the fields of a request that speaks these lines. */
export function dialogueFields(lines) {
  const said = lines.filter(({ text }) => text);
  const speakers = [...new Set(said.map(({ voice }) => voice))];
  const input = said.map(({ voice, text }) => `<|speaker:${speakers.indexOf(voice)}|>${text}`).join("\n");
  return { input, voice: speakers };
}
