// The takes of this visit, the newest first.

import { byId, make } from "./dom.js";

const MOST_BYTES = 256 << 20;

/** play(take): hear it again. reuse(take): bring its text and settings back. */
export function createHistory({ play, reuse }) {
  let takes = [];

  const row = (take, current) => {
    const facts = [
      take.label,
      `${take.seconds.toFixed(1)} s`,
      take.firstAudio !== null && `first audio ${take.firstAudio.toFixed(2)} s`,
      take.rtf !== null && `RTF ${take.rtf.toFixed(2)}`,
      take.state === "stopped" && "stopped",
      take.state === "failed" && "broken off",
    ];
    const text = make("p", { className: "said", textContent: take.body.input, title: take.body.input });
    const about = make("p", { className: "note", textContent: facts.filter(Boolean).join(" · ") });
    const again = make("button", { type: "button", textContent: "Play", onclick: () => play(take) });
    const back = make("button", { type: "button", className: "quiet", textContent: "Use again", onclick: () => reuse(take) });
    const made = make("li", {}, make("div", {}, text, about), again, back);
    if (take === current) made.setAttribute("aria-current", "true");
    return made;
  };

  return {
    /** Show the takes, of which one is heard. */
    show(current) {
      byId("history").replaceChildren(...takes.map((take) => row(take, current)));
      byId("history-empty").hidden = takes.length > 0;
    },
    /** Add a take; the oldest are forgotten when all together are too large. */
    add(take) {
      takes.unshift(take);
      let bytes = 0;
      takes = takes.filter((each) => each === take || (bytes += each.bytes) < MOST_BYTES);
    },
  };
}
