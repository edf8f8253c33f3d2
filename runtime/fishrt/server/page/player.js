// Playback of samples while they come. Each part begins at the very sample at which the one before it ends: the audio context
// has the rate of the samples, so nothing is resampled between parts. (An AudioWorklet would need https.)

const LEAD_S = 0.06; // from a part to its sound
const REFILL_S = 0.4; // the same, after the speech came slower than it is heard
const AHEAD_S = 30; // sound that the context is given ahead of time: each part costs it work until it has ended
const PART_S = 5; // longest part

export class Player {
  #context = null;
  #out = null;
  #parts = []; // { at, offset, length } in seconds: time of the context, place in the speech, length
  #sources = new Set();
  #pending = []; // samples that the context has not been given yet
  #complete = true;
  #offset = 0;
  gaps = 0;
  /** Called when the sound has ended by itself. */
  onend = () => {};

  /** Get ready for samples at `rate` Hz that begin `offset` s after the start of the speech. Call it from a user's action. */
  open(rate, offset = 0) {
    this.stop();
    if (this.#context?.sampleRate !== rate) {
      this.#context?.close();
      this.#context = new AudioContext({ sampleRate: rate });
    }
    this.#context.resume();
    this.#out = this.#context.createGain();
    this.#out.connect(this.#context.destination);
    this.#complete = false;
    this.#offset = offset;
    this.gaps = 0;
  }

  /** Play samples, int16, behind all earlier ones. */
  push(samples) {
    if (this.#complete) return;
    const most = PART_S * this.#context.sampleRate;
    for (let at = 0; at < samples.length; at += most) this.#pending.push(samples.subarray(at, at + most));
    this.#fill();
  }

  #fill() {
    const until = this.#context.currentTime + AHEAD_S;
    while (this.#pending.length && !(this.#parts.at(-1)?.at > until)) this.#schedule(this.#pending.shift());
  }

  #schedule(samples) {
    const context = this.#context;
    const buffer = context.createBuffer(1, samples.length, context.sampleRate);
    buffer.getChannelData(0).set(Float32Array.from(samples, (value) => value / 32768));
    const last = this.#parts.at(-1);
    let at = last ? last.at + last.length : context.currentTime + LEAD_S;
    if (last && at < context.currentTime) {
      this.gaps++;
      at = context.currentTime + REFILL_S;
    }
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(this.#out);
    source.onended = () => {
      this.#sources.delete(source);
      this.#fill();
      this.#endIfOver();
    };
    source.start(at);
    this.#sources.add(source);
    this.#parts.push({ at, offset: this.#offset, length: buffer.duration });
    this.#offset += buffer.duration;
  }

  /** No more samples come. */
  finish() {
    this.#complete = true;
    this.#endIfOver();
  }

  /** Be silent at once, without a click. */
  stop() {
    for (const source of this.#sources) source.onended = null;
    this.#out?.gain.setTargetAtTime(0, this.#context.currentTime, 0.005);
    for (const source of this.#sources) source.stop(this.#context.currentTime + 0.03);
    this.#sources.clear();
    this.#parts = [];
    this.#pending = [];
    this.#complete = true;
  }

  /** Whether there is sound now, or soon. */
  get playing() {
    return this.#sources.size > 0 || !this.#complete;
  }

  /** The place in the speech that is heard now, in seconds. */
  get position() {
    const now = this.#context?.currentTime ?? 0;
    const part = this.#parts.findLast(({ at }) => at <= now) ?? this.#parts[0];
    return part ? part.offset + Math.min(Math.max(now - part.at, 0), part.length) : this.#offset;
  }

  #endIfOver() {
    if (this.#complete && !this.#sources.size && this.#parts.length) {
      this.#parts = [];
      this.onend();
    }
  }
}
