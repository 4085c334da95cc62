"use strict";
// One request gets everything of at least LOWEST; the slider filters what came.
const LOWEST = 0.05;
const MASK_SIDE = 1024; // pixels of a mask's longer side, at most
const element = (id) => document.getElementById(id);
const canvas = element("picture");
const dialog = element("viewfinder");

let info = { attention: false, masks: false, threshold: 0.5, classes: [] };
let image = null; // what is shown: { file, bitmap, size, detections, maps }
let chosen = null; // an index of image.detections
let turn = 0; // of images: an answer to an earlier one comes too late

start();

async function start() {
  element("choose").addEventListener("click", () => element("file").click());
  element("camera").addEventListener("click", openCamera);
  for (const id of ["file", "capture"]) {
    element(id).addEventListener("change", (event) => {
      open(event.target.files[0]);
      event.target.value = ""; // so that the same file may be chosen again
    });
  }
  addEventListener("dragover", (event) => {
    event.preventDefault();
    element("stage").classList.add("over");
  });
  addEventListener("dragleave", () => element("stage").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    element("stage").classList.remove("over");
    open(event.dataTransfer.files[0]);
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !dialog.open) choose(null);
  });
  canvas.addEventListener("click", (event) => toggle(hit(event.offsetX, event.offsetY)));
  element("threshold").addEventListener("input", show);
  element("looked").addEventListener("change", () => choose(chosen));
  new ResizeObserver(draw).observe(element("stage"));
  dialog.addEventListener("close", closeCamera);
  try {
    info = await (await ask("info")).json();
  } catch (error) {
    report(error);
    return;
  }
  document.title = element("model").textContent = info.model;
  const count = info.classes.length;
  element("about").textContent =
    `${count} ${count === 1 ? "class" : "classes"}${info.masks ? ", with masks" : ""}` +
    (info.size ? ` · images at ${info.size}` : "");
  element("attention").hidden = !info.attention;
  element("threshold").value = Math.max(info.threshold, LOWEST);
  show();
}

async function ask(path, parameters = {}, file = undefined) {
  const headers = { "Content-Type": "application/octet-stream" }; // whatever its name says: the server looks into it
  const options = file ? { method: "POST", body: file, headers } : {};
  let response;
  try {
    response = await fetch(`${path}?${new URLSearchParams(parameters)}`, options);
  } catch {
    throw new Error("The server cannot be reached. Try again.");
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => ({}));
  throw new Error(content.error || `The server answered with status ${response.status}.`);
}

function report(error) {
  element("error").textContent = error ? error.message : "";
  element("error").hidden = !error;
}

async function open(file) {
  if (!file) return;
  const mine = ++turn;
  report(null);
  element("busy").hidden = false;
  try {
    const [answer, bitmap] = await Promise.all([
      ask("detect", { threshold: LOWEST }, file).then((response) => response.json()),
      createImageBitmap(file).catch(() => null),
    ]);
    if (mine !== turn) return;
    if (!bitmap) throw new Error("This browser cannot show this kind of image. Use JPEG, PNG or WebP.");
    image = { file, bitmap, size: answer.image, detections: answer.detections, maps: new Map() };
    chosen = null;
    element("empty").hidden = true;
    canvas.hidden = element("results").hidden = false;
    element("choose").textContent = "Another image";
    show();
  } catch (error) {
    if (mine === turn) report(error);
  } finally {
    if (mine === turn) element("busy").hidden = true;
  }
}

function threshold() {
  return Number(element("threshold").value);
}

function shown() {
  return image.detections.map((_, index) => index).filter((index) => image.detections[index].score >= threshold());
}

function show() {
  element("level").textContent = threshold().toFixed(2);
  if (!image) return;
  const indices = shown();
  if (!indices.includes(chosen)) chosen = null;
  const names = new Map();
  for (const index of indices) names.set(image.detections[index].name, (names.get(image.detections[index].name) ?? 0) + 1);
  const summary = indices.length === 1 ? "1 detection" : `${indices.length} detections`;
  const highest = image.detections.length ? ` The highest score is ${image.detections[0].score.toFixed(2)}.` : "";
  element("count").textContent = indices.length ? summary : `Nothing reaches this score.${highest}`;
  canvas.setAttribute("aria-label", `The image with ${summary}: ${[...names].map(([name, count]) => `${count} ${name}`).join(", ")}`);
  element("list").replaceChildren(...indices.map(entry));
  draw();
}

function hint(map) {
  const looked = info.attention && element("looked").checked;
  if (!shown().length) return "";
  if (chosen === null) return `Choose a detection, here or in the image, to see ${looked ? "where the model looked for it" : "it alone"}.`;
  return `${map ? "Bright is where the model looked most for this detection. " : ""}Choose it again, or Escape, to see all.`;
}

function entry(index) {
  const { name, score, label } = image.detections[index];
  const [item, button, color, text, value] = ["li", "button", "i", "span", "data"].map((tag) => document.createElement(tag));
  button.type = "button";
  button.dataset.index = index;
  button.setAttribute("aria-pressed", index === chosen);
  color.style.background = colorOf(label);
  text.textContent = name;
  value.textContent = score.toFixed(2);
  button.append(color, text, value);
  button.addEventListener("click", () => toggle(index));
  item.append(button);
  return item;
}

function toggle(index) {
  choose(index === chosen ? null : index);
}

async function choose(index) {
  if (!image) return;
  chosen = index;
  for (const button of element("list").querySelectorAll("button")) {
    const pressed = Number(button.dataset.index) === index;
    button.setAttribute("aria-pressed", pressed);
    if (pressed) scrollTo(button.parentElement);
  }
  draw();
  if (index === null || !info.attention || !element("looked").checked || image.maps.has(index)) return;
  const of = image;
  element("busy").hidden = false;
  report(null);
  try {
    const response = await ask("attention", { threshold: LOWEST, index }, of.file);
    of.maps.set(index, await createImageBitmap(await response.blob()));
  } catch (error) {
    if (of === image) report(error);
  } finally {
    if (of === image && chosen === index) element("busy").hidden = true;
  }
  if (of === image) draw();
}

// Within the list alone: the page stays where it is.
function scrollTo(item) {
  const list = element("list");
  const top = item.offsetTop - list.offsetTop;
  if (top < list.scrollTop || top + item.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
}

function scale() {
  const beside = matchMedia("(min-width: 52rem)").matches; // else the list is below, and the image stays in view
  const most = { width: element("stage").clientWidth, height: Math.max(innerHeight * (beside ? 0.72 : 0.5), 240) };
  return Math.min(most.width / image.size.width, most.height / image.size.height);
}

function hit(x, y) {
  const at = [x / scale(), y / scale()];
  const area = ({ box: [left, top, right, bottom] }) => (right - left) * (bottom - top);
  const under = shown().filter((index) => {
    const [left, top, right, bottom] = image.detections[index].box;
    return left <= at[0] && at[0] <= right && top <= at[1] && at[1] <= bottom;
  });
  under.sort((one, other) => area(image.detections[one]) - area(image.detections[other]));
  return under[0] ?? null; // the smallest, which larger ones cannot hide
}

function draw() {
  if (!image) return;
  const factor = scale();
  const [width, height] = [image.size.width * factor, image.size.height * factor];
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  const context = canvas.getContext("2d");
  context.scale(canvas.width / width, canvas.height / height);
  const map = element("looked").checked && image.maps.get(chosen);
  element("hint").textContent = hint(map);
  context.drawImage(map || image.bitmap, 0, 0, width, height);
  const indices = chosen === null ? shown() : [chosen];
  if (chosen !== null && !map) {
    context.fillStyle = "rgb(0 0 0 / 0.35)";
    context.fillRect(0, 0, width, height);
  }
  const boxes = indices.map((index) => image.detections[index]);
  for (const found of [...boxes].reverse()) {
    if (found.segmentation && !map) drawMask(context, found, factor);
    const [left, top, right, bottom] = found.box.map((value) => value * factor);
    for (const [color, line] of [["rgb(0 0 0 / 0.65)", 4], [colorOf(found.label), 2]]) {
      context.strokeStyle = color;
      context.lineWidth = line;
      context.strokeRect(left, top, right - left, bottom - top);
    }
  }
  drawNames(context, boxes, factor, width, height);
}

// Best score first. A name that would hide another one is left out: the list has it.
function drawNames(context, boxes, factor, width, height) {
  const taken = [];
  context.font = "600 13px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (const { name, score, label, box } of boxes) {
    const text = `${name.length > 30 ? `${name.slice(0, 30)}…` : name} ${score.toFixed(2)}`;
    const [wide, high] = [context.measureText(text).width + 10, 20];
    const x = Math.max(Math.min(box[0] * factor, width - wide), 0);
    const y = Math.min(Math.max(box[1] * factor - high, 0), height - high);
    const hidden = taken.some(([a, b, c]) => x < a + c && a < x + wide && y < b + high && b < y + high);
    if (hidden) continue;
    taken.push([x, y, wide]);
    context.fillStyle = colorOf(label);
    context.fillRect(x, y, wide, high);
    context.fillStyle = brightness(colorOf(label)) > 128 ? "#000" : "#fff";
    context.fillText(text, x + 5, y + high / 2 + 1);
  }
}

function drawMask(context, found, factor) {
  found.mask ??= maskOf(found.segmentation, colorOf(found.label));
  if (!found.mask) return;
  const { picture, left, top, step } = found.mask;
  context.globalAlpha = 0.45;
  context.drawImage(picture, left * factor, top * factor, picture.width * step * factor, picture.height * step * factor);
  context.globalAlpha = 1;
}

// The part of the image that a mask covers, as a picture of its own; every `step`-th pixel each way.
function maskOf({ size: [height, width], counts }, color) {
  const ends = [];
  let bounds = null;
  let end = 0;
  for (const run of runsOf(counts)) {
    const begin = end;
    end += run;
    ends.push(end);
    if (ends.length % 2 || !run) continue;
    const columns = [Math.floor(begin / height), Math.floor((end - 1) / height)];
    const rows = columns[0] === columns[1] ? [begin % height, (end - 1) % height] : [0, height - 1];
    bounds ??= [columns[0], rows[0], columns[1], rows[1]];
    bounds = [bounds[0], Math.min(bounds[1], rows[0]), columns[1], Math.max(bounds[3], rows[1])];
  }
  if (!bounds) return null;
  const [left, top, right, bottom] = bounds;
  const step = Math.max(width, height) / Math.min(Math.max(width, height), MASK_SIDE);
  const picture = document.createElement("canvas");
  picture.width = Math.ceil((right + 1 - left) / step);
  picture.height = Math.ceil((bottom + 1 - top) / step);
  const data = new ImageData(picture.width, picture.height);
  const rgb = partsOf(color);
  let run = 0;
  for (let x = 0; x < picture.width; x++) {
    const column = Math.min(left + Math.floor(x * step), right) * height;
    for (let y = 0; y < picture.height; y++) {
      const place = column + Math.min(top + Math.floor(y * step), bottom);
      while (ends[run] <= place) run++;
      if (run % 2) data.data.set([...rgb, 255], 4 * (y * picture.width + x));
    }
  }
  picture.getContext("2d").putImageData(data, 0, 0);
  return { picture, left, top, step };
}

// COCO's compressed run lengths: five bits a character, from the fourth run on as differences from the run before the last.
function runsOf(text) {
  const runs = [];
  for (let at = 0; at < text.length; ) {
    let [value, shift, code] = [0, 0, 0];
    do {
      code = text.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

function colorOf(label) {
  return info.classes[label]?.color ?? "#ffd23f";
}

function partsOf(color) {
  return [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
}

function brightness(color) {
  const [red, green, blue] = partsOf(color);
  return (299 * red + 587 * green + 114 * blue) / 1000;
}

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) { // phones have a camera without it, and pages over plain HTTP never have it
    element("capture").click();
    return;
  }
  report(null);
  try {
    element("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    report(new Error("The camera cannot be used. Allow it for this page, or choose an image."));
    return;
  }
  dialog.returnValue = "cancel";
  dialog.showModal();
}

function closeCamera() {
  const video = element("video");
  const frame = document.createElement("canvas");
  [frame.width, frame.height] = [video.videoWidth, video.videoHeight];
  if (dialog.returnValue === "shoot" && frame.width) {
    frame.getContext("2d").drawImage(video, 0, 0);
    frame.toBlob(open, "image/jpeg", 0.92);
  }
  for (const track of video.srcObject.getTracks()) track.stop();
  video.srcObject = null;
}
