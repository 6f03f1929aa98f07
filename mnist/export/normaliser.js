// What mnist/normaliser.py does, for one digit that a pen of 20 pixels or more has drawn: what is
// smaller, and has to be enlarged there, does not come about here.
"use strict";

const INK_SIZE = 20, IMAGE_SIZE = 28, COVERED = 0.99, EDGE = 1e-11;

/** MNIST's 28×28 of a drawing's ink, 0 to 255 in rows of `width` pixels; null where there is none. */
function normalise(ink, width, height) {
  const square = cutOut(ink, width, height);
  return square && place(resample(square, Math.sqrt(square.length)));
}

/** The ink's box, squared around its middle; null where there is none. */
function cutOut(ink, width, height) {
  let top = height, bottom = -1, left = width, right = -1;
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (!ink[at]) continue;
      if (y < top) top = y;
      if (y > bottom) bottom = y;
      if (x < left) left = x;
      if (x > right) right = x;
    }
  }
  if (bottom < 0) return null;
  const tall = bottom - top + 1, wide = right - left + 1, side = Math.max(tall, wide);
  const down = (side - tall) >> 1, across = (side - wide) >> 1;
  const square = new Float32Array(side * side);
  for (let y = 0; y < tall; y++) {
    const from = (top + y) * width + left, to = (down + y) * side + across;
    for (let x = 0; x < wide; x++) square[to + x] = ink[from + x];
  }
  return square;
}

/** How much of each of `side` pixels falls into each of the 20: triples of both and the share. */
function shares(side) {
  const scale = INK_SIZE / side, found = [];
  for (let pixel = 0; pixel < side; pixel++) {
    const start = scale * pixel, stop = scale * (pixel + COVERED);
    const first = Math.floor(start + EDGE), last = Math.ceil(stop - EDGE) - 1;
    for (let target = first; target <= last; target++) {
      let share = 1;
      if (first === last) share = scale;
      else if (target === first) share = first + 1 - start;
      else if (target === last) share = stop - last;
      found.push([target, pixel, share]);
    }
  }
  return found;
}

/** 20×20 by area; if none of it is fully inked, the most is made so. */
function resample(square, side) {
  const wide = new Float32Array(INK_SIZE * side), small = new Float32Array(INK_SIZE * INK_SIZE);
  const parts = shares(side);
  for (const [target, pixel, share] of parts) {
    for (let x = 0; x < side; x++) wide[target * side + x] += share * square[pixel * side + x];
  }
  for (const [target, pixel, share] of parts) {
    for (let y = 0; y < INK_SIZE; y++) small[y * INK_SIZE + target] += share * wide[y * side + pixel];
  }
  const most = small.reduce((most, value) => Math.max(most, value), 0);
  const full = Math.min(255, Math.max(1, most));
  return Uint8Array.from(small, value => Math.min(255, Math.floor(value * (255 / full) + 0.5)));
}

/** 20×20 in 28×28, the barycentre in the middle; what would lie outside is lost. */
function place(digit) {
  let sum = 0, down = 0, across = 0;
  for (let y = 0; y < INK_SIZE; y++) {
    for (let x = 0; x < INK_SIZE; x++) {
      const ink = digit[y * INK_SIZE + x];
      sum += ink;
      down += ink * (y + 0.5);
      across += ink * (x + 0.5);
    }
  }
  const top = Math.trunc(15 - down / sum), left = Math.trunc(15 - across / sum);
  const image = new Uint8Array(IMAGE_SIZE * IMAGE_SIZE);
  for (let y = 0; y < INK_SIZE; y++) {
    for (let x = 0; x < INK_SIZE; x++) {
      const row = top + y, column = left + x;
      if (row < 0 || column < 0 || row >= IMAGE_SIZE || column >= IMAGE_SIZE) continue;
      image[row * IMAGE_SIZE + column] = digit[y * INK_SIZE + x];
    }
  }
  return image;
}
