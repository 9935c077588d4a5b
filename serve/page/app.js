// The page: an image, an instruction, and every step on the way.

import * as api from "/page/api.js";
import { History } from "/page/history.js";
import { Mask } from "/page/mask.js";

const find = (id) => document.getElementById(id);
const form = find("form");
const frame = find("frame");

const SMALL = 160; // side in pixels below which an image is shown with its pixels as squares
const STATUS_SECONDS = 5;

const history = new History(); // steps: {before, after, prompt, facts}; before and after are Blobs
const mask = new Mask(find("paint"), () => refresh());
const links = new Map(); // an object URL for each Blob that is shown
let running = null; // the AbortController of the edit under way
let painting = false;
const VERDICTS = {
  asked: "Is this what you asked for?",
  sent: "Your answer is on its way.",
  kept: "Thank you; your answer is kept.",
  gone: "This edit is too old for an answer.",
};
let asksVerdict = false; // whether the server keeps what people say of their edits

const show = (element, visible) => { element.hidden = !visible; };

function showError(error) {
  find("error").textContent = error?.message ?? "";
  show(find("error"), Boolean(error));
  if (error?.status === 401) {
    show(find("key"), true);
    find("key-field").focus();
  }
}

// -- showing ----------------------------------------------------------------------------------------------------------

function link(blob) {
  if (!links.has(blob)) links.set(blob, URL.createObjectURL(blob));
  return links.get(blob);
}

/** Let go of images that no step shows any more. */
function tidy() {
  const shown = new Set(history.steps.flatMap((step) => [step.before, step.after]));
  for (const [blob, url] of links) {
    if (shown.has(blob)) continue;
    URL.revokeObjectURL(url);
    links.delete(blob);
  }
}

/** Put a Blob into an image element; rejects when it is not an image. */
async function display(image, blob) {
  image.src = link(blob);
  await image.decode();
  image.classList.toggle("pixelated", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
}

/** Bring everything on the page to the current step. */
async function showStep() {
  const { before, after, prompt, facts } = history.current;
  painting = false;
  find("said").textContent = "";
  await display(find("before"), before);
  const { naturalWidth, naturalHeight } = find("before");
  frame.style.setProperty("--ratio", naturalWidth / naturalHeight);
  mask.reset(naturalWidth, naturalHeight);
  if (after) await display(find("after"), after);
  if (prompt) find("prompt").value = prompt;
  for (const [name, value] of Object.entries(facts ?? {})) find(`fact-${name}`).textContent = value;
  if (after) find("download").href = link(after);
  moveSlider(50);
  drawHistory();
  refresh();
}

function refresh() {
  const step = history.current;
  const result = Boolean(step?.after);
  const comparing = result && !running && !painting;
  show(find("drop"), !step);
  show(frame, Boolean(step));
  show(find("tools"), Boolean(step));
  for (const name of ["handle", "slider", "tag-before", "tag-after"]) show(find(name), comparing);
  show(find("after"), comparing);
  for (const name of ["again", "download"]) show(find(name), result);
  show(find("facts"), result);
  show(find("verdict"), result && asksVerdict && step.answer !== undefined);
  for (const name of ["accept", "reject"]) find(name).disabled = Boolean(step?.verdict);
  find("verdict-title").textContent = VERDICTS[step?.verdict ?? "asked"];
  show(find("paint"), Boolean(step) && !running && (painting || (!mask.empty && !result)));
  find("paint").classList.toggle("on", painting);
  show(find("brush"), painting);
  find("mask").setAttribute("aria-pressed", String(painting));
  find("mask").textContent = mask.empty ? "Paint a mask" : "Mask painted";
  find("undo").disabled = !history.canUndo || Boolean(running);
  find("redo").disabled = !history.canRedo || Boolean(running);
  show(find("busy"), Boolean(running));
  find("edit").disabled = !step;
  find("edit").textContent = running ? "Cancel" : "Edit";
}

function drawHistory() {
  const items = history.steps.map((step, number) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    picture.src = link(step.after ?? step.before);
    picture.alt = step.prompt ? `Step ${number + 1}: ${step.prompt}` : `Step ${number + 1}: the image`;
    button.title = step.prompt || "The image";
    button.type = "button";
    button.append(picture);
    if (number === history.at) button.setAttribute("aria-current", "step");
    button.addEventListener("click", () => goTo(number));
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  find("history").replaceChildren(...items);
  show(find("history"), history.steps.length > 1);
}

function moveSlider(value) {
  find("slider").value = value;
  frame.style.setProperty("--at", `${value}%`);
}

// -- steps ------------------------------------------------------------------------------------------------------------

async function addStep(step) {
  history.push(step);
  tidy();
  await showStep();
}

async function goTo(number) {
  if (running || !(number in history.steps)) return;
  history.go(number);
  await showStep();
}

async function useSource(blob) {
  showError(null);
  try {
    // Looked at before it becomes a step.
    await display(new Image(), blob);
  } catch {
    showError(new Error("This is not an image that can be shown; choose a PNG, JPEG or WebP file."));
    return;
  }
  running?.abort();
  await addStep({ before: blob, after: null });
  find("prompt").focus();
}

const editResult = () => history.current?.after && !running && addStep({ before: history.current.after, after: null });

function paint(on) {
  if (!history.current || running) return;
  painting = on;
  refresh();
}

// -- editing ----------------------------------------------------------------------------------------------------------

async function edit() {
  const controller = new AbortController();
  const step = history.current;
  const fields = { image: step.before, ...Object.fromEntries(new FormData(form)) };
  const painted = await mask.png();
  if (painted) fields.mask = painted;
  running = controller;
  painting = false;
  showError(null);
  find("said").textContent = "Editing.";
  find("busy").classList.remove("forming");
  refresh();
  const stop = startClock();
  try {
    const answer = await api.edit(fields, {
      signal: controller.signal,
      onPartial: (blob) => showPartial(blob, controller),
      onBusy: (seconds) => { find("said").textContent = `The server is busy; next try in ${seconds} s.`; },
    });
    if (running !== controller) return;
    running = null;
    await addStep({ before: step.before, after: answer.blob, prompt: fields.prompt, facts: factsOf(answer), answer });
    if (find("keep").checked && answer.seed !== undefined) form.elements.seed.value = answer.seed;
    find("said").textContent = "The edit is done.";
  } catch (error) {
    if (running === controller) running = null;
    find("said").textContent = error.name === "AbortError" ? "Cancelled." : "";
    if (error.name !== "AbortError") showError(error);
  } finally {
    stop();
    refresh();
  }
}

/** Show the edit as far as it is. */
async function showPartial(blob, controller) {
  await display(find("after"), blob);
  if (running !== controller) return;
  frame.style.setProperty("--at", "0%");
  find("busy").classList.add("forming");
  show(find("after"), true);
}

async function judge(verdict) {
  const step = history.current;
  step.verdict = "sent";
  refresh();
  try {
    await api.judge(step.answer, verdict);
    step.verdict = "kept";
  } catch (error) {
    step.verdict = error.status === 404 ? "gone" : undefined;
    showError(step.verdict ? null : error);
  }
  refresh();
}

function factsOf(answer) {
  return {
    version: answer.model_version ?? "",
    seed: answer.seed ?? "",
    size: answer.size ?? "",
    time: answer.timing ? `${answer.timing.total.toFixed(2)} s` : "",
  };
}

function startClock() {
  const begun = performance.now();
  const tick = () => { find("clock").textContent = `${((performance.now() - begun) / 1000).toFixed(1)} s`; };
  tick();
  const timer = setInterval(tick, 100);
  return () => clearInterval(timer);
}

// -- what the server has ----------------------------------------------------------------------------------------------

async function listVersions() {
  const versions = await api.versions();
  const select = form.elements.model;
  select.replaceChildren();
  for (const version of versions) {
    const name = version.aliases.length ? `${version.id} (${version.aliases.join(", ")})` : version.id;
    select.add(new Option(name, version.id, version.default, version.default));
  }
  const own = versions.find((version) => version.default);
  find("served").textContent = `version ${select.selectedOptions[0].text}`;
  show(find("served"), true);
  for (const name of ["num_inference_steps", "guidance_scale", "image_guidance_scale"]) {
    form.elements[name].placeholder = own[name];
  }
  // Models this small know the world of shapes, which there are no photos of.
  show(find("example"), own.resolution !== null && own.resolution <= 64);
}

/** Show replicas and queues, again and again, as long as somebody looks and the server tells. */
async function watchStatus() {
  if (document.visibilityState === "visible") {
    let fleet;
    try {
      fleet = await api.status();
    } catch (error) {
      if (error.status === 404) return;
      fleet = { deployments: [] };
    }
    const rows = fleet.deployments.map((part) => {
      const row = document.createElement("tr");
      const name = part.version === null ? part.name : `${part.name} v${part.version}`;
      const replicas = part.starting ? `${part.running} (+${part.starting})` : part.running;
      if (part.starting) row.title = `${part.starting} more are starting`;
      for (const text of [name, replicas, part.ongoing, part.queued]) row.insertCell().textContent = text;
      return row;
    });
    find("fleet-rows").replaceChildren(...rows);
    show(find("fleet"), rows.length > 0);
  }
  setTimeout(watchStatus, 1000 * STATUS_SECONDS);
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
  const example = await api.example(Math.floor(Math.random() * 1e6));
  await useSource(api.decoded(example.image, "png"));
  suggest(example.instructions);
  find("prompt").value = example.instructions.at(-1);
}

// -- what people do ---------------------------------------------------------------------------------------------------

function choose(files) {
  const [file] = files;
  if (!file) return;
  suggest([]);
  useSource(file);
}

const actions = {
  e: editResult,
  m: () => paint(!painting),
  "[": () => sizeBrush(-2),
  "]": () => sizeBrush(2),
  "/": () => find("prompt").focus(),
  "?": () => find("shortcuts").showModal(),
};

function sizeBrush(change) {
  find("brush-size").value = Number(find("brush-size").value) + change;
  mask.size = Number(find("brush-size").value);
}

document.addEventListener("keydown", (event) => {
  if (find("shortcuts").open) return;
  if (event.key === "Escape") {
    if (running) running.abort();
    else paint(false);
    return;
  }
  if (event.target.matches("textarea, select, input:not([type=range], [type=checkbox])")) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) {
    event.preventDefault();
    goTo(history.at + (key === "y" || event.shiftKey ? 1 : -1));
  } else if (!event.ctrlKey && !event.metaKey && !event.altKey && actions[key]) {
    event.preventDefault();
    actions[key]();
  }
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (history.current) edit();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) form.requestSubmit();
  }
});
find("key-field").addEventListener("change", (event) => {
  api.setKey(event.target.value.trim());
  listVersions().then(() => { showError(null); watchStatus(); }, showError);
});
find("slider").addEventListener("input", (event) => moveSlider(event.target.value));
find("brush-size").addEventListener("input", () => sizeBrush(0));
find("erase").addEventListener("change", (event) => mask.erase(event.target.checked));
find("clear").addEventListener("click", () => { mask.clear(); refresh(); });
find("fact-seed").addEventListener("click", () => {
  form.elements.seed.value = find("fact-seed").textContent;
  find("settings").open = true;
});
find("accept").addEventListener("click", () => judge("accept"));
find("reject").addEventListener("click", () => judge("reject"));
find("undo").addEventListener("click", () => goTo(history.at - 1));
find("redo").addEventListener("click", () => goTo(history.at + 1));
find("mask").addEventListener("click", () => paint(!painting));
find("again").addEventListener("click", editResult);
find("help").addEventListener("click", () => find("shortcuts").showModal());
find("other").addEventListener("click", () => find("file").click());
find("example").addEventListener("click", () => drawExample().catch(showError));
find("file").addEventListener("change", (event) => {
  choose(event.target.files);
  event.target.value = "";
});
document.addEventListener("paste", (event) => choose(event.clipboardData.files));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", over);
    frame.classList.toggle("over", over);
  });
}
document.addEventListener("drop", (event) => choose(event.dataTransfer.files));

refresh();
listVersions().catch((error) => {
  showError(error.status ? error : new Error("The server does not answer; is it still up?"));
});
watchStatus();
api.feedbackAsked().then((asked) => { asksVerdict = asked; refresh(); }, () => {});
