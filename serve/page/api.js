// What the page asks of the server: an edit as a stream of events, versions, how busy it is, an example.

const EDITS = "/v1/images/edits";
const PARTIALS = 2;
const BUSY_TRIES = 5; // beyond the first, while the server says that it is at its limit

let key = sessionStorage.getItem("key") ?? ""; // gone with the tab
let streams = true; // until the server refuses

/** Use an API key from now on. */
export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

/** An answer with a status of 400 or more, in the server's own words. */
export class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.param = error?.param ?? null;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const error = new ServerError(response.status, answer?.error);
  error.pause = Number(response.headers.get("retry-after") ?? 2);
  throw error;
}

const json = async (path) => (await ask(path)).json();
export const versions = async () => (await json("/v1/models")).data;
export const feedbackAsked = async () => (await json("/v1/feedback")).consent;
export const status = () => json("/v1/status");
export const example = (seed) => json(`/page/example.json?seed=${seed}`);

/** Say whether an edit is what was asked for; `verdict` is accept or reject. */
export async function judge(answer, verdict) {
  const body = JSON.stringify({ request_id: answer.request_id, image_index: answer.image_index ?? 0, verdict });
  await ask("/v1/feedback", { method: "POST", body, headers: { "content-type": "application/json" } });
}

/** A picture of an answer as a Blob. */
export function decoded(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format ?? "png"}` });
}

/**
 * Have an image edited.
 *
 * @param fields the form's fields; `image` and `mask` are Blobs.
 * @param signal aborts it.
 * @param onPartial shows each partial image, a Blob, before the next one is taken; its index counts from 0.
 * @param onBusy is told the seconds until the next try, while the server is at its limit.
 * @returns the edit: `blob`, and what the answer says of it.
 */
export async function edit(fields, { signal, onPartial, onBusy }) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await send(fields, signal, onPartial);
    } catch (error) {
      if (streams && error.status === 400 && ["stream", "partial_images"].includes(error.param)) {
        streams = false;
      } else if (error.status === 429 && tries < BUSY_TRIES) {
        onBusy(error.pause);
        await pause(error.pause, signal);
      } else throw error;
    }
  }
}

async function send(fields, signal, onPartial) {
  const body = new FormData();
  const extra = streams ? { stream: "true", partial_images: String(PARTIALS) } : {};
  for (const [name, value] of Object.entries({ ...fields, ...extra })) {
    if (value instanceof Blob) body.append(name, value, name);
    else if (value !== "") body.append(name, value);
  }
  const response = await ask(EDITS, { method: "POST", body, signal });
  if (!response.headers.get("content-type").startsWith("text/event-stream")) {
    const answer = await response.json();
    return { ...answer, blob: decoded(answer.data[0].b64_json, answer.output_format) };
  }
  for await (const event of events(response.body)) {
    if (event.error) throw new ServerError(500, event.error);
    const blob = decoded(event.b64_json, event.output_format);
    if (event.type === "image_edit.completed") return { ...event, blob };
    await onPartial(blob, event.partial_image_index);
  }
  throw new ServerError(502, { message: "The answer ended before the image was there; try again." });
}

/** The data of server-sent events, parsed. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      text = text.slice(end + 2);
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}
