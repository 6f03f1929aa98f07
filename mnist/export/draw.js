// The page: a field to draw in, the network, and what it says.
"use strict";

const FIELD = 640; // pixels of the field's side, whatever its size on the screen
const PEN = 48; // of these

const settings = JSON.parse(document.getElementById("settings").textContent);
const layers = readLayers(document.getElementById("weights").textContent);

/** Each linear layer's weight, outputs×inputs, and bias. */
function readLayers(text) {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = packed.charCodeAt(at);
  const values = new Float32Array(bytes.buffer), found = [];
  let start = 0;
  const take = count => values.subarray(start, (start += count));
  for (let layer = 0; layer + 1 < settings.sizes.length; layer++) {
    const [inputs, outputs] = settings.sizes.slice(layer, layer + 2);
    found.push({ weight: take(outputs * inputs), bias: take(outputs), inputs, outputs });
  }
  return found;
}

/** Ten probabilities of a 28×28. */
function predict(image) {
  let hidden = Float32Array.from(image, value => (value / 255 - settings.mean) / settings.std);
  layers.forEach(({ weight, bias, inputs, outputs }, number) => {
    const next = new Float32Array(outputs);
    for (let output = 0, at = 0; output < outputs; output++) {
      let sum = 0;
      for (let input = 0; input < inputs; input++, at++) sum += weight[at] * hidden[input];
      sum += bias[output];
      next[output] = number + 1 < layers.length && sum < 0 ? 0 : sum;
    }
    hidden = next;
  });
  const scaled = Array.from(hidden, logit => logit / settings.temperature);
  const most = Math.max(...scaled);
  const powers = scaled.map(logit => Math.exp(logit - most));
  const sum = powers.reduce((all, power) => all + power);
  return powers.map(power => power / sum);
}

// ------------------------------------------------------------------------------------- drawing

const field = document.getElementById("field");
const pen = field.getContext("2d", { willReadFrequently: true });
let strokes = []; // lists of points, [x, y] in pixels of the field
let active = null; // the pointer that draws
let waiting = 0;

function pointOf(event) {
  const box = field.getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * FIELD,
    ((event.clientY - box.top) / box.height) * FIELD,
  ];
}

function redraw() {
  pen.clearRect(0, 0, FIELD, FIELD);
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = PEN;
  for (const points of strokes) {
    pen.beginPath();
    pen.moveTo(...points[0]);
    for (let at = 1; at + 1 < points.length; at++) {
      const [x, y] = points[at], [nextX, nextY] = points[at + 1];
      pen.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
    }
    const [x, y] = points[points.length - 1];
    pen.lineTo(x + 0.01, y); // of a point alone, which has no line, some browsers draw nothing
    pen.stroke();
  }
}

/** The field's ink, 0 to 255: how opaque it is. */
function inkOf() {
  const colours = pen.getImageData(0, 0, FIELD, FIELD).data, ink = new Uint8Array(FIELD * FIELD);
  for (let at = 0; at < ink.length; at++) ink[at] = colours[4 * at + 3];
  return ink;
}

function later() { // once for each picture that the screen shows
  if (waiting) return;
  waiting = requestAnimationFrame(() => {
    waiting = 0;
    redraw();
    answer();
  });
}

function now() {
  cancelAnimationFrame(waiting);
  waiting = 0;
  redraw();
  answer();
}

field.addEventListener("pointerdown", event => {
  if (active !== null || event.button !== 0) return; // one finger draws; another hand rests
  event.preventDefault();
  active = event.pointerId;
  try { field.setPointerCapture(active); } catch { /* one that a program made */ }
  strokes.push([pointOf(event)]);
  later();
});
field.addEventListener("pointermove", event => {
  if (event.pointerId !== active) return;
  const between = event.getCoalescedEvents?.() ?? [];
  strokes[strokes.length - 1].push(...(between.length ? between : [event]).map(pointOf));
  later();
});
for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
  field.addEventListener(end, event => {
    if (event.pointerId !== active) return;
    active = null;
    now();
  });
}
field.addEventListener("contextmenu", event => event.preventDefault());

function undo() {
  active = null; // a stroke that is being drawn ends
  strokes.pop();
  now();
}
function clear() {
  active = null;
  strokes = [];
  now();
}
document.getElementById("undo").addEventListener("click", undo);
document.getElementById("clear").addEventListener("click", clear);
document.addEventListener("keydown", event => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  else if (["Escape", "Delete", "Backspace"].includes(event.key)) clear();
  else return;
  event.preventDefault();
});

// ------------------------------------------------------------------------------------- answers

const percent = share => `${share > 0.9995 && share < 1 ? ">99.9" : (100 * share).toFixed(1)}%`;

/** Show what the network says of what is drawn. */
function answer() {
  const image = normalise(inkOf(), FIELD, FIELD);
  const probabilities = image && predict(image);
  showSeen(image);
  for (let digit = 0; digit < 10; digit++) {
    const bar = document.getElementById(`bar${digit}`), share = probabilities?.[digit] ?? 0;
    bar.style.setProperty("--share", share);
    bar.querySelector(".share").textContent = share >= 0.005 ? `${Math.round(100 * share)}` : "";
    bar.classList.toggle("best", !!image && share === Math.max(...probabilities));
  }
  const order = [...Array(10).keys()].sort((a, b) => (probabilities ? probabilities[b] - probabilities[a] : 0));
  const [best, second] = order, sure = !!image && probabilities[best] >= settings.threshold;
  document.body.className = !image ? "empty" : sure ? "sure" : "doubtful";
  document.getElementById("digit").textContent = !image ? "–" : sure ? best : `${best}?`;
  document.getElementById("says").textContent = !image
    ? "Draw a digit"
    : sure
      ? `${percent(probabilities[best])} sure`
      : `In doubt: ${percent(probabilities[best])} sure, or a ${second}, or no digit`;
  for (const id of ["undo", "clear"]) document.getElementById(id).disabled = !strokes.length;
  return { image, probabilities };
}

function showSeen(image) {
  const seen = document.getElementById("seen").getContext("2d");
  const pixels = seen.createImageData(IMAGE_SIZE, IMAGE_SIZE);
  for (let at = 0; at < IMAGE_SIZE * IMAGE_SIZE; at++) {
    pixels.data.set([255, 255, 255, image ? image[at] : 0], 4 * at);
  }
  seen.putImageData(pixels, 0, 0);
}

predict(new Uint8Array(IMAGE_SIZE * IMAGE_SIZE)); // or the first answer would wait for its compiler
answer();
