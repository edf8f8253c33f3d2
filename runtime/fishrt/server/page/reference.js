// The user's own recording: from the microphone or a file, with its words. It speaks as it is, or is kept as a voice.

import { addVoice } from "./api.js";
import { byId } from "./dom.js";
import { Microphone } from "./microphone.js";

/** changed(): there is another recording. kept(name): it is a voice now. failed(error). */
export function createReference({ changed, kept, failed }) {
  const microphone = new Microphone();
  let audio = null;

  const use = (blob) => {
    audio = blob;
    URL.revokeObjectURL(byId("preview").src);
    byId("preview").src = URL.createObjectURL(blob);
    byId("preview").hidden = false;
    byId("keep").disabled = false;
    byId("kept").textContent = "";
    changed();
  };

  const record = async () => {
    if (microphone.recording) return microphone.stop();
    byId("record").disabled = true; // until the user has allowed it
    try {
      const recording = microphone.record((level, seconds) => {
        byId("record").disabled = false;
        byId("record").textContent = "Stop recording";
        byId("recording").hidden = false;
        byId("level").value = level;
        byId("recorded").textContent = `${seconds.toFixed(1)} s`;
      });
      use(await recording);
    } catch (error) {
      failed(new Error(`The microphone cannot be used: ${error.message}. Allow it for this page, or choose a file.`));
    } finally {
      byId("record").disabled = false;
      byId("record").textContent = "Record";
      byId("recording").hidden = true;
    }
  };

  const keep = async () => {
    byId("keep").disabled = true;
    byId("kept").textContent = "Keeping…";
    try {
      const { name, warnings } = await addVoice(byId("name").value.trim(), audio, byId("transcript").value);
      await kept(name);
      byId("name").value = "";
      byId("kept").textContent = [`Kept as ${name}.`, ...warnings.map((each) => `Warning: ${each}`)].join(" ");
    } catch (error) {
      byId("kept").textContent = "";
      failed(error);
    } finally {
      byId("keep").disabled = false;
    }
  };

  byId("record").disabled = Boolean(Microphone.missing);
  byId("record").addEventListener("click", record);
  byId("upload").addEventListener("change", ({ target }) => target.files.length && use(target.files[0]));
  byId("keep").addEventListener("click", keep);

  return {
    /** Say which recordings the model imitates well. */
    advise([least, most]) {
      byId("advice").textContent = `Clear speech of one person, ${least} to ${most} s long, without noise. ${Microphone.missing}`;
    },
    get given() {
      return audio !== null;
    },
    /** Return the fields of a request that speaks in this voice. */
    async fields() {
      const url = await new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.onerror = () => reject(new Error("The recording cannot be read; choose it again."));
        reader.readAsDataURL(audio);
      });
      return { ref_audio: url, ref_text: byId("transcript").value };
    },
    stop: () => microphone.stop(),
  };
}
