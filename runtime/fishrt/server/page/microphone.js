// A recording from the microphone, with its level.

const FLOOR_DB = -60;

export class Microphone {
  #recorder = null;

  /** Why there is none in this browser; "" if there is. */
  static get missing() {
    if (!isSecureContext) return "A browser gives the microphone only to pages by https or from localhost. Choose a file instead.";
    return navigator.mediaDevices?.getUserMedia && window.MediaRecorder ? "" : "This browser cannot record. Choose a file instead.";
  }

  get recording() {
    return this.#recorder !== null;
  }

  /** Record until `stop`; `show(level 0..1, seconds)` is called meanwhile. Return the recording as a Blob. */
  async record(show) {
    const wanted = { echoCancellation: false, noiseSuppression: false, autoGainControl: true };
    const stream = await navigator.mediaDevices.getUserMedia({ audio: wanted });
    const context = new AudioContext();
    const analyser = context.createAnalyser();
    context.createMediaStreamSource(stream).connect(analyser);
    const window = new Float32Array(analyser.fftSize);
    const recorder = (this.#recorder = new MediaRecorder(stream));
    const parts = [];
    const ended = new Promise((resolve, reject) => {
      recorder.ondataavailable = ({ data }) => parts.push(data);
      recorder.onstop = resolve;
      recorder.onerror = ({ error }) => reject(error);
    });
    recorder.start();
    const began = performance.now();
    const timer = setInterval(() => {
      analyser.getFloatTimeDomainData(window);
      const power = window.reduce((sum, value) => sum + value * value, 0) / window.length;
      show(Math.min(Math.max(1 - (10 * Math.log10(power + 1e-12)) / FLOOR_DB, 0), 1), (performance.now() - began) / 1000);
    }, 50);
    try {
      await ended;
    } finally {
      clearInterval(timer);
      this.#recorder = null;
      for (const track of stream.getTracks()) track.stop();
      context.close();
    }
    return new Blob(parts, { type: recorder.mimeType });
  }

  stop() {
    this.#recorder?.stop();
  }
}
