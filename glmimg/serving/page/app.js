// The page: a form, a stage, a history. Every button sends a request that the API documents.

import { curl, get, stream } from "./api.js";
import * as history from "./history.js";
import { draw, ids } from "./layout.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  "a 3D render of a fox on a light blue background",
  "a strawberry on a white background",
  "a red circle above a blue square",
  'a sign that says "HELLO"',
];
const NUMBERS = ["steps", "guidance", "temperature", "top_p", "token_guidance", "token_candidates"];
const SIDES = ["left", "top", "right", "bottom"];

let references = []; // files
let current = null; // {blob, tokens, seed, prompt, width, height, path, fields, files}
let variants = [];
let running = null; // AbortController

// Look.

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  localStorage.setItem("theme", name);
}
theme(localStorage.getItem("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

// `passing`: every few moments another one, of which a screen reader would never come to an end.
function say(text, wrong = false, passing = false) {
  $("status").ariaLive = passing ? "off" : "polite";
  $("status").textContent = text;
  $("status").className = wrong ? "error" : "";
}

for (const text of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.onclick = () => { $("prompt").value = text; $("prompt").focus(); };
  $("examples").append(button);
}

// What the server can do.

async function about() {
  const [model] = (await get("v1/models")).data;
  const it = model.glmimg, usual = it.defaults;
  $("model").textContent = `${model.id} on ${[...new Set(Object.values(it.backend))].join(" and ")}`;
  $("size").replaceChildren(new Option("auto", "auto"));
  const sides = new Set();
  for (const [w, h] of [[1, 1], [3, 2], [2, 3], [16, 9], [9, 16], [2, 2], [0.5, 0.5]]) {
    const unit = Math.sqrt((usual.width * usual.height) / (w === h ? 1 : w * h));
    const [width, height] = [w, h].map((part) => Math.round((unit * part) / 32) * 32);
    if (Math.min(width, height) >= it.min_size && Math.max(width, height) <= it.max_size) sides.add(`${width}x${height}`);
  }
  for (const size of sides) $("size").append(new Option(size, size));
  $("sampler").replaceChildren(...it.samplers.map((name) => new Option(name, name, name === usual.sampler, name === usual.sampler)));
  $("steps").placeholder = usual.num_inference_steps;
  $("guidance").placeholder = usual.guidance_scale;
  $("temperature").placeholder = usual.temperature;
  $("top_p").placeholder = usual.top_p;
  const adapters = (await get("v1/adapters")).data;
  $("adapter").replaceChildren(new Option("none", ""), ...adapters.map((one) => new Option(one.id, one.id)));
  $("adapter-field").hidden = !adapters.length;
}

async function begin() {
  try {
    await about();
    say("Ready when you are.");
  } catch (error) {
    $("key-field").hidden = error.status !== 401;
    say(error.status === 401 ? "This server needs an API key." : error.message, true);
  }
}
$("key").onchange = () => { sessionStorage.setItem("key", $("key").value.trim()); begin(); };

// Requests.

function settings() {
  const fields = { prompt: $("prompt").value, n: Number($("n").value) || 1 };
  if ($("size").value && $("size").value !== "auto") fields.size = $("size").value;
  for (const name of NUMBERS) if ($(name).value !== "") fields[name] = Number($(name).value);
  if ($("sampler").selectedIndex >= 0 && !$("sampler").selectedOptions[0].defaultSelected) fields.sampler = $("sampler").value;
  if ($("negative").value.trim()) fields.negative = $("negative").value;
  if ($("adapter").value) fields.adapters = [{ name: $("adapter").value }];
  fields.seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 32) : Number($("seed").value);
  return fields;
}

async function run(path, fields, files = []) {
  running?.abort();
  const mine = (running = new AbortController());
  variants = [];
  $("variants").replaceChildren();
  $("make").disabled = true;
  $("stop").disabled = false;
  $("tools").hidden = $("region").hidden = true;
  for (const stage of ["tokens", "decoder"]) $(`bar-${stage}`).value = 0;
  say("Sent.");
  if (matchMedia("(max-width: 879px)").matches) $("stage").scrollIntoView(); // there it is below the form
  const all = { ...fields, stream: true, progress: true, partial_images: 2, return_tokens: true };
  try {
    const shown = [];
    await stream(path, all, files, (event) => shown.push(told(event, path, fields, files)), mine.signal);
    await Promise.all(shown);
    const wanted = fields.n || 1;
    if (variants.length < wanted) throw new Error(`The connection ended after ${variants.length} of ${wanted} pictures.`);
    say(variants.length === 1 ? `Done: seed ${current.seed}.` : `Done: ${variants.length} pictures.`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "Stopped." : error.message, !stopped);
    $("key-field").hidden = error.status !== 401 && $("key-field").hidden;
  } finally {
    if (running === mine) {
      running = null;
      $("make").disabled = false;
      $("stop").disabled = true;
      if (current) show(current);
    }
  }
}

async function told(event, path, fields, files) {
  const kind = event.type.split(".")[1];
  if (kind === "queued") {
    say(`Number ${event.position} in the queue.`);
  } else if (kind === "progress") {
    const bar = $(`bar-${event.stage}`);
    bar.max = event.total;
    bar.value = event.step;
    if (event.stage === "tokens") {
      say(`Layout: token ${event.step} of ${event.total}.`, false, true);
      if (event.index === 0) {
        const started = event.target.some((row) => row.some((id) => id >= 0));
        draw($("layout"), started || !event.preview ? event.target : event.preview);
        $("layout").className = "alone";
      }
    } else {
      $("bar-tokens").value = $("bar-tokens").max;
      say(`Picture: step ${event.step} of ${event.total}.`, false, true);
    }
  } else if (kind === "partial_image" && event.index === variants.length) {
    paint(await createImageBitmap(blobOf(event)));
  } else if (kind === "completed") {
    const [width, height] = event.size.split("x").map(Number);
    const entry = {
      blob: blobOf(event), tokens: event.tokens, seed: event.seed, prompt: fields.prompt, width, height,
      path, fields: { ...fields, seed: event.seed, n: 1 }, files, made: Date.now(),
    };
    variants.push(entry);
    addThumbnail($("variants"), entry);
    current = entry;
    await show(entry);
    try {
      await history.keep(entry);
      await showHistory();
    } catch { /* a browser that keeps nothing still shows everything */ }
  }
}

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (one) => one.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format}` });
}

// The stage.

function paint(bitmap, width = bitmap.width, height = bitmap.height) {
  const canvas = $("picture");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  if ($("layout").className === "alone") $("layout").className = $("show-layout").ariaPressed === "true" ? "on" : "";
}

async function show(entry) {
  current = entry;
  paint(await createImageBitmap(entry.blob));
  $("picture").setAttribute("aria-label", `Picture of: ${entry.prompt}`);
  draw($("layout"), ids(entry.tokens.target, entry.tokens.codebook_size));
  $("layout").className = $("show-layout").getAttribute("aria-pressed") === "true" ? "on" : "";
  $("tools").hidden = $("region").hidden = false;
  for (const side of SIDES) $(side).max = side === "left" || side === "right" ? entry.width : entry.height;
  select(null);
}

function addThumbnail(place, entry) {
  const button = document.createElement("button"), image = document.createElement("img");
  button.type = "button";
  button.title = entry.prompt;
  image.alt = `${entry.prompt}, seed ${entry.seed}`;
  image.src = URL.createObjectURL(entry.blob);
  image.onload = () => URL.revokeObjectURL(image.src);
  button.append(image);
  button.onclick = async () => {
    $("prompt").value = entry.prompt;
    $("seed").value = entry.seed;
    await show(entry);
    say(`Seed ${entry.seed}.`);
  };
  if (place.tagName === "UL") {
    const item = document.createElement("li");
    item.append(button);
    place.append(item);
  } else {
    place.append(button);
  }
}

async function showHistory() {
  const entries = await history.all();
  $("history").replaceChildren();
  for (const entry of entries.reverse()) addThumbnail($("history"), entry);
}

// A region, by pointer or by number.

function select(box) {
  $("box").hidden = !box;
  SIDES.forEach((side, k) => { $(side).value = box ? box[k] : ""; });
  $("resample").disabled = !box;
  if (!box) return;
  const scale = $("picture").clientWidth / current.width, [left, top, right, bottom] = box;
  Object.assign($("box").style, {
    left: `${left * scale}px`, top: `${top * scale}px`,
    width: `${(right - left) * scale}px`, height: `${(bottom - top) * scale}px`,
  });
}

function typed() {
  const box = SIDES.map((side) => Number($(side).value));
  const whole = SIDES.every((side) => $(side).value !== "");
  if (whole && box[0] < box[2] && box[1] < box[3] && box[2] <= current.width && box[3] <= current.height) select(box);
  else $("resample").disabled = true;
}
for (const side of SIDES) $(side).oninput = typed;

let corner = null;
function point(event) {
  const frame = $("picture").getBoundingClientRect(), scale = current.width / frame.width;
  const clamp = (value, most) => Math.max(0, Math.min(most, value));
  return [clamp((event.clientX - frame.left) * scale, current.width), clamp((event.clientY - frame.top) * scale, current.height)];
}
$("frame").onpointerdown = (event) => {
  if (!current || running) return;
  corner = point(event);
  $("frame").setPointerCapture(event.pointerId);
};
$("frame").onpointermove = (event) => {
  if (!corner) return;
  const [x, y] = point(event), down = (value) => Math.floor(value / 32) * 32;
  const up = (value, most) => Math.min(most, Math.ceil(value / 32) * 32);
  const box = [
    down(Math.min(x, corner[0])), down(Math.min(y, corner[1])),
    up(Math.max(x, corner[0]), current.width), up(Math.max(y, corner[1]), current.height),
  ];
  if (box[0] < box[2] && box[1] < box[3]) select(box);
};
$("frame").onpointerup = $("frame").onpointercancel = () => { corner = null; };

// Buttons.

const random = () => Math.floor(Math.random() * 2 ** 32);
function again(entry) {
  // Size and layout are the tokens' own; what only shapes the layout is of no use to the decoder.
  const { size, region, ...fields } = entry.fields;
  return { ...fields, tokens: entry.tokens, seed: random(), n: 1 };
}
$("form").onsubmit = (event) => {
  event.preventDefault();
  run(references.length ? "v1/images/edits" : "v1/images/generations", settings(), [...references]);
};
$("stop").onclick = () => running?.abort();
$("show-layout").onclick = () => {
  const on = $("show-layout").getAttribute("aria-pressed") !== "true";
  $("show-layout").setAttribute("aria-pressed", on);
  $("layout").className = on ? "on" : "";
};
function remake(path, more) {
  // What a picture was made after goes along: edits take a layout and a region as well.
  run(current.files.length ? "v1/images/edits" : path, { ...again(current), ...more }, current.files);
}
$("other-seed").onclick = () => remake("v1/images/decode", {});
$("resample").onclick = () => remake("v1/images/regions", { region: SIDES.map((side) => Number($(side).value)) });
$("reuse").onclick = () => addReferences([new File([current.blob], `seed-${current.seed}.png`, { type: "image/png" })]);
$("download").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(current.blob);
  link.download = `glmimg-${current.seed}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
$("copy").onclick = async () => {
  const text = curl(current.path, current.fields, current.files);
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say(text); // no clipboard here: it can be marked and copied by hand
  }
};
$("forget").onclick = async () => { await history.forget(); await showHistory(); };

// References.

function addReferences(files) {
  references.push(...[...files].filter((file) => file.type.startsWith("image/")));
  showReferences();
}
function showReferences() {
  $("references").replaceChildren(...references.map((file, k) => {
    const item = document.createElement("li"), image = document.createElement("img"), remove = document.createElement("button");
    image.src = URL.createObjectURL(file);
    image.alt = file.name;
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.onclick = () => { references.splice(k, 1); showReferences(); };
    item.append(image, remove);
    return item;
  }));
}
$("files").onchange = () => { addReferences($("files").files); $("files").value = ""; };
$("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  addReferences(event.dataTransfer.files);
};

document.onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  else if (event.key === "Escape") running?.abort();
};

begin();
showHistory().catch(() => {});
