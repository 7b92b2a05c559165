"use strict";
// Words of a caption as buttons that show their attention maps over the image, for the report page and the demo.
// The style lays a map over its image, and draws the same colors as a legend.

const MAP_SIDE = 256;  // pixels of the longer side of a heat map
// From black over red and orange to light yellow; each stop is brighter than the one before, so that gray shows it too.
const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

/** Return an element; children that are no elements become text. */
function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function heat(level) {
  const at = level / 255 * (STOPS.length - 1), i = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[i].map((low, channel) => low + (STOPS[i + 1][channel] - low) * (at - i));
}

function drawMap(canvas, map) {
  const levels = Uint8Array.from(atob(map.levels), (character) => character.charCodeAt(0));
  const small = new OffscreenCanvas(map.columns, levels.length / map.columns);
  const grid = new ImageData(small.width, small.height);
  levels.forEach((level, i) => grid.data.set([level, level, level, 255], 4 * i));
  small.getContext("2d").putImageData(grid, 0, 0);
  // Smooth the levels, then color them: the mean of two colors is not always the color of the mean level
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const level = pixels.data[i];
    pixels.data.set([...heat(level), 20 + level * 0.5], i);  // the image shows through even where the map is brightest
  }
  context.putImageData(pixels, 0, 0);
}

function attention(maps, stage, image) {
  const canvas = make("canvas"), list = make("ul", "tokens");
  const scale = MAP_SIDE / Math.max(image.naturalWidth, image.naturalHeight);
  canvas.width = Math.max(1, scale * image.naturalWidth);  // rounded down, so that it is no higher than the image
  canvas.height = Math.max(1, scale * image.naturalHeight);
  canvas.hidden = true;
  canvas.setAttribute("role", "img");
  stage.append(canvas);
  let pressed = null;
  const display = (button) => {
    canvas.hidden = !button;
    if (!button) return;
    drawMap(canvas, button.map);
    canvas.setAttribute("aria-label", `Attention for ${button.map.word}`);
  };
  for (const map of maps) {
    const button = make("button", "", make("bdi", "", map.word.trim()));
    button.map = map;
    button.setAttribute("aria-pressed", "false");
    for (const name of ["mouseenter", "focus"]) button.addEventListener(name, () => display(button));
    for (const name of ["mouseleave", "blur"]) button.addEventListener(name, () => display(pressed));
    button.addEventListener("click", () => {
      pressed = pressed === button ? null : button;
      for (const other of list.querySelectorAll("button")) other.setAttribute("aria-pressed", other === pressed);
      display(pressed);
    });
    list.append(make("li", "", button));
  }
  const note = "Where the model's attention was while it wrote the word; each map is scaled to its own maximum. "
    + "Attention is not an explanation: a bright spot does not mean that the word came from there.";
  const legend = make("p", "legend muted", "none", make("span", "ramp"), "most attention");
  return [make("p", "label", "Attention by word"), list, legend, make("p", "note", note)];
}
