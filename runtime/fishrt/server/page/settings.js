// Seed, sampling or preset, speed and volume. An empty field is left out of the request, so that the model's value counts.

import { byId, make } from "./dom.js";

const form = byId("settings");
const USUAL = { speed: "1", volume_db: "0" };

function show() {
  byId("speed-shown").textContent = `${Number(form.speed.value).toFixed(2)} ×`;
  byId("volume_db-shown").textContent = `${form.volume_db.value} dB`;
}

/** Show the model's values in the empty fields, without the fields that it has not. presets: names, of a diffusion model. */
export function setDefaults({ sampling, presets = [] }) {
  form.preset.append(...presets.map((value) => make("option", { value, textContent: value.replaceAll("_", " ") })));
  for (const element of [form.preset, form.querySelector("label[for=preset]")]) element.hidden = !presets.length;
  for (const [name, value] of Object.entries(sampling)) form[name].placeholder = value ?? "all";
  for (const name of ["temperature", "top_p", "top_k", "repetition_penalty"]) {
    const missing = !(name in sampling) || (name === "repetition_penalty" && sampling[name] === null);
    for (const element of [form[name], form.querySelector(`label[for=${name}]`)]) element.hidden = missing;
  }
}

/** Return the fields of a request that are set; the browser shows what is out of range, and null is returned then. */
export function settings() {
  if (!form.reportValidity()) return null;
  const given = [...new FormData(form)].filter(([name, value]) => value !== "" && value !== USUAL[name]);
  return Object.fromEntries(given.map(([name, value]) => [name, name === "preset" ? value : Number(value)]));
}

/** Set the fields as a request had them. */
export function restore(values) {
  form.reset();
  for (const [name, value] of Object.entries(values)) form[name].value = value;
  show();
}

form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
byId("reset").addEventListener("click", () => restore({}));
show();
