"use strict";
// Every text is put in with textContent, so nothing in it becomes an element.
const FULL_COLOR = 3; // nats: from here on, a token has the scale's full color
const OPACITY = 0.45; // of the full color
const shown = JSON.parse(document.getElementById("data").textContent);
const readText = document.querySelector("#on .text");
const status = document.getElementById("token");
let chosen = -1;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const signed = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(2);
const nats = (value) => (value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(2);

function tokenElement(index) {
  const text = shown.tokens[index];
  const made = element("span", "token" + (index < shown.prompt_length ? " prompt" : ""), text);
  if (text === "") made.classList.add("part");
  made.dataset.index = index;
  if (shown.on[index] !== null) {
    const change = shown.on[index] - shown.off[index];
    const strength = (Math.min(Math.abs(change) / FULL_COLOR, 1) * OPACITY).toFixed(3);
    if (strength > 0.01) made.style.background = `rgb(${change > 0 ? "43 120 200" : "230 97 1"} / ${strength})`;
  }
  return made;
}

function say(index) {
  document.querySelectorAll(".token.active").forEach((token) => token.classList.remove("active"));
  readText.querySelector(`[data-index="${index}"]`).classList.add("active");
  status.replaceChildren("Token ", element("code", "", JSON.stringify(shown.tokens[index])));
  if (shown.on[index] === null) {
    status.append(" begins the text.");
    return;
  }
  status.append(`: log probability ${nats(shown.on[index])} with neighbors, ${nats(shown.off[index])} without, change `);
  status.append(element("b", "", signed(shown.on[index] - shown.off[index])), " nats");
}

function neighborElement(neighbor) {
  const made = element("article", "neighbor");
  const title = element("h3", "", neighbor.doc_id);
  title.append(element("span", "", `chunk ${neighbor.chunk_index}`));
  title.append(element("span", "", `similarity ${neighbor.similarity.toFixed(3)}`));
  const text = element("p");
  let done = 0;
  for (const [start, end] of neighbor.copied) {
    text.append(neighbor.tokens.slice(done, start).join(""));
    text.append(element("mark", "", neighbor.tokens.slice(start, end).join("")));
    done = end;
  }
  text.append(neighbor.tokens.slice(done).join(""));
  made.append(title, text);
  return made;
}

function choose(number) {
  if (number === chosen) return;
  chosen = number;
  readText.querySelectorAll(".chunk").forEach((made, place) => {
    made.classList.toggle("chosen", place === number);
    made.tabIndex = place === number ? 0 : -1; // the next Tab leads to the neighbors
  });
  const chunk = shown.chunks[number];
  const panel = document.getElementById("neighbors");
  const title = element("h2", "", `Neighbors of chunk ${number + 1} of ${shown.chunks.length}`);
  title.id = "neighbors-title";
  const copied = chunk.neighbors.some((neighbor) => neighbor.copied.length);
  const note = !chunk.neighbors.length
    ? "No neighbors were found."
    : copied ? `Marked: ${shown.copied_run} tokens or more in a row that this chunk repeats.`
    : `This chunk repeats no ${shown.copied_run} tokens in a row from these neighbors.`;
  panel.replaceChildren(title, element("p", "note", note), ...chunk.neighbors.map(neighborElement));
  panel.scrollTop = 0;
}

function fill() {
  const first = shown.chunks.length ? shown.chunks[0].start : shown.tokens.length;
  const plain = element("div", "plain");
  for (let index = 0; index < first; index++) plain.append(tokenElement(index));
  readText.append(plain);
  shown.chunks.forEach((chunk, number) => {
    const made = element("div", "chunk");
    if (chunk.start === shown.prompt_length) label(made, "Written with neighbors");
    made.setAttribute("role", "group");
    made.setAttribute("aria-label", `Chunk ${number + 1} of ${shown.chunks.length}, ${chunk.neighbors.length} ` +
      "neighbors. Arrow keys: up and down for chunks, left and right for tokens.");
    for (let index = chunk.start; index < chunk.end; index++) made.append(tokenElement(index));
    made.addEventListener("pointerenter", () => choose(number));
    made.addEventListener("focus", () => choose(number));
    made.addEventListener("keydown", (event) => move(event, number));
    readText.append(made);
  });
  readText.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token) say(Number(token.dataset.index));
  });
  const alone = element("div", "plain");
  alone.append(element("span", "prompt", shown.tokens.slice(0, shown.prompt_length).join("")));
  if (shown.off_tokens.length) {
    alone.firstChild.classList.add("given"); // on a phone, it is shown once
    alone.append(label(element("div", ""), "Written without neighbors"));
    alone.lastChild.append(shown.off_tokens.join(""));
  }
  document.querySelector("#off .text").append(alone);
}

function label(made, text) {
  made.classList.add("written");
  made.dataset.label = text;
  return made;
}

function move(event, number) {
  const chunks = readText.querySelectorAll(".chunk");
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && chunks[number + step]) chunks[number + step].focus();
  const along = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const { start, end } = shown.chunks[number];
  if (along) {
    const active = readText.querySelector(".token.active");
    const at = active ? Number(active.dataset.index) : -1;
    say(at < start || at >= end ? start : Math.min(Math.max(at + along, start), end - 1));
    readText.querySelector(".token.active").scrollIntoView({ block: "nearest" });
  }
  if (step || along) event.preventDefault();
}

function followTheme() {
  // Inside another page, the frame has that page's theme and background.
  let frame = null;
  try { frame = window.frameElement; } catch (error) { return; }
  if (!frame) return;
  const [root, outer] = [document.documentElement, frame.ownerDocument.body];
  root.classList.add("framed");
  root.dataset.theme = outer.classList.contains("dark") ? "dark" : "light";
  let around = frame;
  const background = () => getComputedStyle(around).backgroundColor;
  while (around.parentElement && background() === "rgba(0, 0, 0, 0)") around = around.parentElement;
  root.style.setProperty("--page", background());
}

function view(value) {
  document.body.dataset.view = value;
  // begin with what was written: the pane alone moves, not the page around it
  const [written] = [...document.querySelectorAll(".written")].filter((made) => made.offsetParent);
  const pane = document.getElementById("texts");
  if (written) pane.scrollTop = written.offsetTop - pane.clientHeight / 3;
}

document.querySelectorAll("#view input").forEach((input) => {
  input.addEventListener("change", () => view(input.value));
});
fill();
view("on");
if (shown.chunks.length) {
  choose(Math.max(0, shown.chunks.findIndex((chunk) => chunk.start >= shown.prompt_length)));
} else {
  const title = element("h2", "", "No chunk is complete, so nothing was searched for.");
  title.id = "neighbors-title";
  document.getElementById("neighbors").append(title);
}
status.textContent = "Point at a token or press the arrow keys to read its numbers.";
followTheme();
