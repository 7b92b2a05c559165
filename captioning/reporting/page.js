// Text from the data goes into text nodes and into attributes with fixed names, never into HTML.

const PORTION = 24;         // cards added at a time
const CLIP = 420;           // characters of a caption on a card; all of it is in the dialog
const NEAR = "900px";       // distance from the window within which cards and images are made
const TOOLBAR = 160;        // pixels covered by the toolbar
const WORD = /([\p{L}\p{N}]+)/gu;
const PLACES = [["both", "✓ ", "in both: "], ["reference", "– ", "only in the reference: "],  // of a tag
  ["prediction", "+ ", "only in the prediction: "], ["concept", "", "concept of the image: "],
  ["concept", "✓ ", "concept, predicted: "], ["concept reference", "missed: ", ""],
  ["concept prediction", "wrong: ", ""], ["concept", "", "concept, predicted: "]];
const THEMES = ["system", "light", "dark"];

const element = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);
const payload = JSON.parse(element("payload").textContent);
const {rows, unscored} = payload;
const cards = element("cards"), dialog = element("dialog"), search = element("search"), view = element("view");

/** `Map.groupBy` of the rows, which Firefox before 119 lacks. */
function groupRows(keyOf) {
  const groups = new Map();
  for (const row of rows) {
    const key = keyOf(row);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return groups;
}

const byAddress = new Map();
rows.forEach((row, index) => {
  row.index = index;
  const tags = [...row.concepts, ...row.tags.flat()].map(([text]) => text);
  row.text = [row.id, row.reference, ...row.predictions, ...tags].join("\n").toLowerCase();
  row.address = `#${encodeURIComponent(row.id.toWellFormed?.() ?? row.id)}`;
  byAddress.set(row.address, row);
});
for (const same of groupRows((row) => row.predictions[0]).values()) {
  for (const row of same) row.same = same;  // those with the same prediction
}

// --- Images: base64, in blocks after this script; a block is parsed when one of its images comes near the window ---

const parsed = new Map();

/** Return base64, null for an image that could not be read, undefined for one that is not there, or not loaded yet. */
function imageOf(row) {
  const number = Math.floor(row.index / payload.block);
  if (!parsed.has(number)) {
    const block = element(`images-${number}`);
    if (!block || (document.readyState === "loading" && !block.nextElementSibling)) return undefined;
    if (parsed.size >= 8) parsed.delete(parsed.keys().next().value);
    parsed.set(number, JSON.parse(block.textContent));
  }
  return parsed.get(number)[row.index % payload.block];
}

/** Show the image of `holder.row`, and return its element, if there is one. */
function showImage(holder) {
  const data = imageOf(holder.row);
  holder.querySelector("img, .none")?.remove();
  if (data === undefined) return;
  if (data === null) return holder.prepend(make("span", "none", "no image"));
  const image = make("img");
  image.alt = `Image ${holder.row.id}`;
  image.decoding = "async";
  image.src = `data:image/jpeg;base64,${data}`;
  holder.prepend(image);
  return image;
}

const near = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) {
    target.isNear = isIntersecting;
    if (isIntersecting) showImage(target);
    else target.querySelector("img")?.remove();  // keeps memory flat over ten thousand cards
  }
}, {rootMargin: NEAR});
addEventListener("beforeprint", () => {  // all captions that are chosen, and all tables
  for (const fold of all("details")) fold.open = true;
  while (cards.children.length < hits.length) grow();
  near.disconnect();  // it would let go what is out of sight
  all(".open").forEach(showImage);
});

// --- Cards ---

const wordsOf = (texts) => new Set(texts.join(" ").toLowerCase().match(WORD));
const number = (value, digits) => value === null ? "–" : value.toFixed(digits);

function caption(label, text, others, tags, length) {
  const parts = text.slice(0, length).split(WORD);  // every second part is a word
  const marked = parts.map((part, i) => i % 2 && !others.has(part.toLowerCase()) ? make("mark", "", part) : part);
  const shown = text.trim() ? make("p", "caption", ...marked) : make("p", "caption empty", "(empty)");
  shown.dir = "auto";
  if (text.length > length) shown.append("…");
  const items = tags.map(([text, where]) => {
    const [kind, sign, meaning] = PLACES[where];
    return make("li", kind, make("span", "sr", meaning), sign, make("bdi", "", text));
  });
  return [make("p", "label", make("bdi", "", label)), shown, ...(items.length ? [make("ul", "tags", ...items)] : [])];
}

function scoresOf(row, isLarge) {
  const scores = make("p", "scores");
  const add = (before, value, after = "") => scores.append(make("span", "", `${before} `, make("b", "", value), after));
  payload.scores.forEach((label, i) => {
    const isShown = isLarge || payload.onCard.includes(label);
    if (isShown) add(label, number(row.scores[i], label.startsWith("NLL") ? 1 : 3));
  });
  if (row.same.length > 1) add("same caption on", row.same.length, " images");
  return scores;
}

function textsOf(row, linkText, isLarge) {
  const link = make("a", "", make("bdi", "", linkText));
  link.href = row.address;
  link.row = row;
  const meta = make("p", "meta", link, ...(unscored ? [] : [make("bdi", "", row.modality || "(unknown)")]));
  const predicted = wordsOf(row.predictions), stated = unscored ? predicted : wordsOf([row.reference]);
  const length = isLarge ? Infinity : CLIP;
  const texts = unscored ? [] : caption("Reference", row.reference, predicted, row.concepts, length);
  row.predictions.forEach((text, i) => texts.push(...caption(payload.systems[i], text, stated, row.tags[i], length)));
  for (const [id, text] of row.retrieved ?? []) {
    texts.push(...caption(`In the prompt: ${id}`, text, wordsOf([text]), [], length));
  }
  return [meta, ...texts, scoresOf(row, isLarge)];
}

function card(row) {
  const open = make("button", "open", payload.hasImages ? "" : "Enlarge");
  const attended = payload.attention[row.index] ? ", with attention" : "";
  open.row = row;
  open.setAttribute("aria-label", `Enlarge example ${row.id}${attended}`);
  if (attended) open.append(make("span", "badge", "attention"));
  open.addEventListener("click", () => show(row));
  near.observe(open);
  return make("li", "card", open, make("div", "words", ...textsOf(row, row.id, false)));
}

// --- Which rows, in which order ---

let hits = rows;

function comparison(order) {
  if (order === "dataset") return () => 0;  // the rows are in the order of the data, and a sort keeps that of equals
  if (order === "uses") return (a, b) => b.same.length - a.same.length || a.same[0].index - b.same[0].index;
  const sign = order.endsWith("lowest") ? 1 : -1;
  const of = (row) => row.scores[parseInt(order)];  // a caption without a score comes last in both directions
  return (a, b) => (of(a) === null) - (of(b) === null) || sign * (of(a) - of(b));
}

function update() {
  const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const modality = element("modality").selectedOptions[0].modality;
  const attended = element("attended").checked, kind = element("kind").value;
  hits = rows.filter((row) => (modality === undefined || row.modality === modality)
    && (!kind || row.kinds.includes(kind)) && (!attended || payload.attention[row.index])
    && terms.every((term) => row.text.includes(term)));
  hits.sort(comparison(element("order").value));
  element("nothing").hidden = hits.length > 0;
  for (const open of cards.querySelectorAll(".open")) near.unobserve(open);
  cards.replaceChildren();
  grow();
  if (cards.getBoundingClientRect().top < 0) cards.scrollIntoView({behavior: "instant"});  // show the first hit
  const some = hits.length === rows.length ? "" : `${hits.length.toLocaleString("en")} of `;
  element("hits").textContent = `${some}${rows.length.toLocaleString("en")} caption${rows.length === 1 ? "" : "s"}`;
}

function grow() {
  const start = cards.children.length;
  cards.append(...hits.slice(start, start + PORTION).map(card));
  end.unobserve(element("end"));
  if (cards.children.length < hits.length) end.observe(element("end"));  // again: it reports once more if still in view
}
const end = new IntersectionObserver(
  (entries) => entries.some((entry) => entry.isIntersecting) && grow(), {rootMargin: NEAR});

function fillControls() {
  const counted = (text, own) => `${text} (${own.length.toLocaleString("en")})`;
  const byModality = unscored ? [] : [...groupRows((row) => row.modality)];
  const add = (text, modality) => element("modality").add(Object.assign(new Option(text), {modality}));
  add("all");
  for (const [modality, own] of byModality.sort(([, a], [, b]) => b.length - a.length)) {
    add(counted(modality || "(unknown)", own), modality);
  }
  element("kind").add(new Option("all", ""));
  for (const [kind, label] of Object.entries(payload.kinds)) {
    const own = rows.filter((row) => row.kinds.includes(kind));
    if (own.length) element("kind").add(new Option(counted(label, own), kind));
  }
  payload.scores.forEach((label, i) => ["highest", "lowest"].forEach((direction) =>
    element("order").add(new Option(`${label}, ${direction} first`, `${i} ${direction}`))));
}

/** Show in the gallery what an example at the top stands for, or all captions. */
function choose(controls = {}) {
  element("controls").reset();
  for (const name of ["kind", "order"]) if (name in controls) element(name).value = controls[name];
  update();
  element("section-gallery").scrollIntoView();
  element("section-gallery").focus({preventScroll: true});
}

element("csv").addEventListener("click", () => {
  // A text that a spreadsheet would compute gets an apostrophe before it
  const cell = (value) => typeof value === "string"
    ? `"${value.replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"` : String(value ?? "");
  const header = ["image_id", "modality", "concepts", "reference", ...payload.systems, "kind", ...payload.scores];
  const cellsOf = (row) => [row.id, row.modality,
    row.concepts.map(([text, where]) => PLACES[where][1] + text).join("; "), row.reference, ...row.predictions,
    row.kinds.map((kind) => payload.kinds[kind]).join("; "), ...row.scores];
  const table = unscored ? [["ID", "Caption"], ...hits.map((row) => [row.id, ...row.predictions])]
    : [header, ...hits.map(cellsOf)];
  const link = make("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", table.map((row) => row.map(cell).join(",")).join("\r\n")]));
  link.download = `${document.title}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// --- Enlarged example ---

let shown = null;  // the example in the dialog

function show(row) {
  shown = row;
  element("dialog-title").replaceChildren("Example ", make("bdi", "", row.id));
  const stage = element("stage");
  stage.querySelector("canvas")?.remove();
  stage.row = row;
  const image = showImage(stage), maps = payload.attention[row.index];
  element("words").replaceChildren(...textsOf(row, "Link to this example", true));
  if (maps?.length && image) element("words").append(...attention(maps, stage, image));
  view.zoom.value = 1;  // window and level stay, to compare images
  applyView();
  const position = hits.indexOf(row);
  element("previous").disabled = position <= 0;
  element("next").disabled = position < 0 || position === hits.length - 1;
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  setAddress(row.address);
}

function setAddress(hash) {
  try {
    history.replaceState(null, "", hash || location.pathname + location.search);
  } catch { /* the page has no address of its own, as in a frame */ }
}

function move(by) {
  const row = hits[hits.indexOf(shown) + by];
  if (row) show(row);
}

function applyView() {
  const [zoom, width, level] = ["zoom", "width", "level"].map((name) => Number(view[name].value));
  for (const input of view.querySelectorAll("input")) input.previousElementSibling.value = input.value;
  // Gray values from level - width / 2 to level + width / 2 are spread over those of the screen
  for (const channel of all("#window feComponentTransfer > *")) {
    channel.setAttribute("slope", 256 / width);
    channel.setAttribute("intercept", 0.5 - level / width);
  }
  for (const part of all("#stage :is(img, canvas)")) {
    Object.assign(part.style, {width: `${100 * zoom}%`, maxHeight: zoom > 1 ? "none" : ""});
    if (part.matches("img")) part.style.filter = width !== 256 || level !== 128 ? "url(#window)" : "";
  }
}
view.addEventListener("input", applyView);
view.addEventListener("reset", () => setTimeout(applyView));  // once it has its values
element("stage").addEventListener("pointermove", (event) => {
  if (event.buttons === 1 && event.pointerType === "mouse") element("stage").scrollBy(-event.movementX, -event.movementY);
});

element("previous").addEventListener("click", () => move(-1));
element("next").addEventListener("click", () => move(1));
element("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());  // its backdrop
dialog.addEventListener("close", () => {
  setAddress("");
  focusCard(hits.indexOf(shown));
});

function openAddress() {
  const row = byAddress.get(location.hash);
  if (!row && dialog.open) dialog.close();  // "back" from an example
  if (!row || (dialog.open && shown === row)) return;
  if (!hits.includes(row)) {
    element("controls").reset();
    update();
  }
  show(row);
}
addEventListener("hashchange", openAddress);
// In a frame without an address of its own, a link to a part of the page would leave the page
document.addEventListener("click", (event) => {
  const link = event.target.closest?.('a[href^="#"]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (link.row) return show(link.row);
  const part = element(link.hash.slice(1)), fold = part.querySelector(".fold");
  if (fold) fold.open = true;
  part.scrollIntoView();
  part.focus({preventScroll: true});
});

// --- Keyboard ---

function focusCard(position) {
  if (position < 0 || position >= hits.length) return;
  while (cards.children.length <= position) grow();
  const target = cards.children[position], open = target.querySelector(".open");
  open.focus({preventScroll: true});
  // Show a card whole if it fits, else the focused button in it
  const fits = target.clientHeight < innerHeight - TOOLBAR;
  (fits ? target : open).scrollIntoView({block: "nearest", behavior: "instant"});
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=checkbox]), select")) {
    if (event.key === "Escape" && event.target === search) search.blur();
    return;
  }
  if (event.key === "/" && !dialog.open) {
    event.preventDefault();
    search.focus();
    return search.select();
  }
  const current = [...cards.children].findIndex((item) => item.contains(document.activeElement));
  const columns = getComputedStyle(cards).gridTemplateColumns.split(" ").length;
  const keys = {j: 1, k: -1};
  if (dialog.open || current >= 0) Object.assign(keys, {ArrowRight: 1, ArrowLeft: -1});
  if (!dialog.open && current >= 0) Object.assign(keys, {ArrowDown: columns, ArrowUp: -columns});
  const by = keys[event.key];
  if (!by) return;
  event.preventDefault();
  if (dialog.open) move(by);
  else focusCard(current < 0 ? 0 : current + by);
});

// --- Start ---

element("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  document.documentElement.dataset.theme = theme;
  element("theme").textContent = `Theme: ${theme}`;
});
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
element("all").addEventListener("click", () => choose());
element("controls").addEventListener("input", update);
element("attended-label").hidden = !Object.keys(payload.attention).length;
if (matchMedia("(max-width: 54rem)").matches) all(".fold").forEach((fold) => { fold.open = false; });
element("picture").hidden = !payload.hasImages;
document.body.classList.toggle("without-images", !payload.hasImages);
fillControls();
for (const highlight of payload.highlights) {
  const more = make("button", "plain", "More"), heading = make("h3", "", make("bdi", "", highlight.title));
  more.setAttribute("aria-label", `More: ${highlight.title}`);
  more.addEventListener("click", () => choose(highlight));
  const example = make("ul", "", card(rows[highlight.row]));
  element("highlights").append(make("li", "", make("div", "title", heading, more), example));
}
update();
openAddress();
document.addEventListener("DOMContentLoaded", () => {  // the images of cards, and of an example opened by its address
  for (const holder of all(".open")) if (holder.isNear) showImage(holder);
  if (dialog.open && !dialog.querySelector(".stage img")) show(shown);
});
