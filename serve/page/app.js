"use strict";

const find = (id) => document.getElementById(id);
const form = find("form");
const frame = document.querySelector(".frame");
const compareOnly = [find("after"), find("handle"), find("slider"), ...document.querySelectorAll(".tag")];

// Below this side in pixels an image is shown with its pixels as squares.
const SMALL = 160;

let source = null; // the image to edit, a Blob
let result = null; // its edit, a Blob
let running = null; // the AbortController of the edit under way

function show(element, visible) {
  element.hidden = !visible;
}

function showError(message) {
  find("error").textContent = message;
  show(find("error"), Boolean(message));
}

/** Put a Blob into an image element; resolves when it is decoded, rejects when it is not an image. */
async function display(image, blob) {
  const old = image.src;
  image.src = URL.createObjectURL(blob);
  if (old) URL.revokeObjectURL(old);
  await image.decode();
  image.classList.toggle("pixelated", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
}

function refresh() {
  show(find("drop"), !source);
  show(find("compare"), Boolean(source));
  show(find("tools"), Boolean(source));
  show(find("again"), Boolean(result));
  show(find("download"), Boolean(result));
  show(find("facts"), Boolean(result));
  for (const element of compareOnly) show(element, Boolean(result));
  show(find("busy"), Boolean(running));
  find("edit").disabled = !source;
  find("edit").textContent = running ? "Cancel" : "Edit";
}

async function useSource(blob) {
  showError("");
  const image = find("before");
  try {
    await display(image, blob);
  } catch {
    showError("This is not an image that can be shown; choose a PNG, JPEG or WebP file.");
    return;
  }
  frame.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  running?.abort();
  source = blob;
  result = null;
  refresh();
  find("prompt").focus();
}

function moveSlider(value) {
  find("slider").value = value;
  frame.style.setProperty("--at", `${value}%`);
}

function requestBody() {
  const body = new FormData();
  body.append("image", source, "image");
  for (const [name, value] of new FormData(form)) {
    if (value !== "") body.append(name, value);
  }
  return body;
}

async function send(signal) {
  const response = await fetch("/v1/images/edits", { method: "POST", body: requestBody(), signal });
  const answer = await response.json().catch(() => null);
  if (!response.ok || !answer) {
    throw new Error(answer?.error?.message ?? `The server answered ${response.status}.`);
  }
  return answer;
}

async function edit() {
  const controller = new AbortController();
  const begun = performance.now();
  const clock = setInterval(() => {
    find("clock").textContent = `${((performance.now() - begun) / 1000).toFixed(1)} s`;
  }, 100);
  running = controller;
  showError("");
  refresh();
  try {
    const answer = await send(controller.signal);
    const blob = decoded(answer.data[0].b64_json, `image/${answer.output_format}`);
    await display(find("after"), blob);
    result = blob;
    find("download").href = find("after").src;
    find("fact-version").textContent = answer.model_version;
    find("fact-seed").textContent = answer.seed;
    find("fact-size").textContent = answer.size;
    find("fact-time").textContent = `${answer.timing.total.toFixed(2)} s`;
    moveSlider(50);
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
  } finally {
    clearInterval(clock);
    if (running === controller) running = null;
    refresh();
  }
}

function decoded(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}

function suggest(instructions) {
  const buttons = instructions.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => { find("prompt").value = text; });
    return button;
  });
  find("ideas").replaceChildren(...buttons);
}

async function drawExample() {
  const seed = Math.floor(Math.random() * 1e6);
  const example = await (await fetch(`/page/example.json?seed=${seed}`)).json();
  await useSource(decoded(example.image, "image/png"));
  suggest(example.instructions);
  find("prompt").value = example.instructions.at(-1);
}

async function listVersions() {
  const response = await fetch("/v1/models");
  if (!response.ok) return;
  const versions = (await response.json()).data;
  const select = form.elements.model;
  for (const version of versions) {
    const name = version.aliases.length ? `${version.id} (${version.aliases.join(", ")})` : version.id;
    select.add(new Option(name, version.id, version.default, version.default));
  }
  const own = versions.find((version) => version.default);
  find("served").textContent = `version ${select.selectedOptions[0].text}`;
  show(find("served"), true);
  show(find("version"), versions.length > 1);
  for (const name of ["num_inference_steps", "guidance_scale", "image_guidance_scale"]) {
    form.elements[name].placeholder = own[name];
  }
  // Models this small know the world of shapes, which there are no photos of.
  show(find("example"), own.resolution !== null && own.resolution <= 64);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (source) edit();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    form.requestSubmit();
  }
});
find("slider").addEventListener("input", (event) => moveSlider(event.target.value));
find("fact-seed").addEventListener("click", () => {
  form.elements.seed.value = find("fact-seed").textContent;
  form.querySelector("details").open = true;
});
find("again").addEventListener("click", () => useSource(result));
find("other").addEventListener("click", () => find("file").click());
find("example").addEventListener("click", () => drawExample().catch((error) => showError(error.message)));
find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) { suggest([]); useSource(file); }
  event.target.value = "";
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) { suggest([]); useSource(file); }
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", over);
    frame.classList.toggle("over", over);
  });
}
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) { suggest([]); useSource(file); }
});

refresh();
listVersions().catch(() => showError("The server does not answer; is it still up?"));
