// A take: one request, and the speech it gave, as it comes.

import { ApiError, speech } from "./api.js";

export const FORMATS = ["wav", "mp3", "opus", "aac", "flac", "pcm"];
const PEAKS_PER_S = 50;

export class Take {
  /** body: the request, with its seed. label: who speaks. rate: of the samples, in Hz. draft: what the fields held. */
  constructor(body, label, rate, draft) {
    Object.assign(this, { body, label, rate, draft });
    this.chunks = []; // Int16Array
    this.length = 0; // samples
    this.peaks = []; // largest amplitude, 0..1, of each part of the speech
    this.state = "waiting"; // then speaking; done, stopped or failed
    this.firstAudio = this.rtf = null; // seconds; seconds of work for each second of speech
    this.ignored = "";
    this.warnings = []; // what the model does not read well
  }

  get seconds() {
    return this.length / this.rate;
  }

  get bytes() {
    return this.length * 2;
  }

  /** Read the speech until its end; `heard(samples)` gets each part. Throws ApiError. */
  async read(signal, heard) {
    const asked = performance.now();
    try {
      const body = { ...this.body, response_format: "pcm", sample_rate: this.rate, stream: true };
      const reply = await speech(body, signal);
      const queued = Number(reply.headers.get("X-Queue-Time"));
      this.ignored = reply.headers.get("X-Ignored-Parameters") ?? "";
      this.warnings = JSON.parse(reply.headers.get("X-Warnings") ?? "[]");
      this.state = "speaking";
      let odd = new Uint8Array(0); // half a sample at the end of a part
      for (const reader = reply.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        const bytes = new Uint8Array(odd.length + value.length);
        bytes.set(odd);
        bytes.set(value, odd.length);
        const whole = bytes.length - (bytes.length % 2);
        odd = bytes.slice(whole);
        if (!whole) continue;
        this.firstAudio ??= (performance.now() - asked) / 1000;
        this.#add(new Int16Array(bytes.buffer.slice(0, whole)), heard);
      }
      this.rtf = ((performance.now() - asked) / 1000 - queued) / this.seconds;
      this.state = "done";
    } catch (error) {
      this.state = error.name === "AbortError" ? "stopped" : "failed";
      if (this.state === "stopped") return;
      throw error instanceof ApiError ? error : new ApiError("The server broke the speech off. Its log says why.", 0);
    }
  }

  #add(samples, heard) {
    const step = Math.round(this.rate / PEAKS_PER_S);
    for (let i = 0; i < samples.length; i++) {
      const at = Math.floor((this.length + i) / step);
      this.peaks[at] = Math.max(this.peaks[at] ?? 0, Math.abs(samples[i]) / 32768);
    }
    this.chunks.push(samples);
    this.length += samples.length;
    heard(samples);
  }

  /** Return all samples from one of them on. */
  from(start) {
    const all = new Int16Array(Math.max(this.length - start, 0));
    let at = -start;
    for (const chunk of this.chunks) {
      const skipped = Math.max(-at, 0);
      if (skipped < chunk.length) all.set(chunk.subarray(skipped), at + skipped);
      at += chunk.length;
    }
    return all;
  }

  /** Return the speech as a file: the server speaks once more, with the same seed. Throws ApiError. */
  async file(format) {
    const reply = await speech({ ...this.body, response_format: format, stream: false });
    const name = `${this.label.replace(/[^\p{L}\p{N}]+/gu, "-")}-${this.body.seed}.${format}`;
    return new File([await reply.blob()], name);
  }
}
