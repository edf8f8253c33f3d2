// The waveform: one bar for a few pixels, the heard ones in another colour.

const BAR = 3;
const GAP = 1;
const LEAST_S = 2; // a shorter speech does not fill the width

/** Draw the peaks of a speech of `seconds`, of which `heard` seconds were heard. */
export function draw(canvas, peaks, seconds, heard) {
  const scale = devicePixelRatio;
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = width * scale;
  canvas.height = height * scale;
  const paint = canvas.getContext("2d");
  paint.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const [past, rest] = ["--accent", "--wave"].map((name) => style.getPropertyValue(name));
  const bars = Math.floor((width / (BAR + GAP)) * Math.min(seconds / LEAST_S, 1));
  for (let bar = 0; bar < bars; bar++) {
    const first = Math.floor((bar * peaks.length) / bars);
    const last = Math.max(Math.floor(((bar + 1) * peaks.length) / bars), first + 1);
    const tall = Math.max(Math.max(...peaks.slice(first, last)) * height, 2);
    paint.fillStyle = (bar + 0.5) / bars < heard / seconds ? past : rest;
    paint.fillRect(bar * (BAR + GAP), (height - tall) / 2, BAR, tall);
  }
  if (!bars) {
    paint.fillStyle = rest;
    paint.fillRect(0, height / 2 - 1, width, 2);
  }
}
