// ── Small helpers ──────────────────────────────────────────────────────────────────────────────────────────

const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
const last = (list) => list[list.length - 1];
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const attempt = (action, fallback) => { try { return action(); } catch { return fallback; } };
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

/** An identifier that nobody else has. (crypto.randomUUID is missing where a page is not served securely.) */
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(10)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Characters that turn the direction of text around: a name with them can look like another name. */
const DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069";
const UNPRINTABLE = new RegExp(`[\\u0000-\\u001f\\u007f-\\u009f\\u2028\\u2029${DIRECTION}]+`, "g");

/** Any text as a single line that can stand in a label: nothing unprintable, nothing endless. */
function oneLine(text, limit = 80) {
  const line = text.slice(0, 4 * limit).replace(UNPRINTABLE, " ").replace(/ {2,}/g, " ").trim();
  return line.length > limit ? `${line.slice(0, limit - 1).replace(/[\ud800-\udbff]$/, "").trimEnd()}…` : line;
}

// ── Elements from data ─────────────────────────────────────────────────────────────────────────────────────
// A part of the page is described by nodes: a text, or what h() returns. render() makes an element's children equal to
// a list of nodes and touches only what differs from the list before, so a growing answer keeps its selection and focus.
// Text becomes text nodes, never markup. A node must not be changed after it was made; the same one may stand twice.

const SVG_TAGS = new Set(["svg", "use", "rect"]);
const INLINE_TAGS = new Set(["a", "code", "del", "em", "span", "strong"]);
const rendered = new WeakMap(); // element → the nodes it shows

function h(tag, properties, ...children) {
  const nodes = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  return { tag, properties: properties ?? {}, children: nodes };
}

function render(parent, nodes) {
  const before = rendered.get(parent) ?? [];
  nodes.forEach((node, i) => {
    if (node === before[i]) return;
    const place = parent.childNodes[i];
    if (!place) parent.append(create(node));
    else if (!isSameKind(before[i], node)) place.replaceWith(create(node));
    else if (typeof node !== "string") update(place, before[i].properties, node);
    else if (node.startsWith(before[i])) place.appendData(node.slice(before[i].length));
    else place.data = node;
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
  rendered.set(parent, nodes);
}

function isSameKind(before, node) {
  if (typeof before !== typeof node) return false;
  return typeof node === "string" || (before.tag === node.tag && before.properties.key === node.properties.key);
}

function create(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const space = SVG_TAGS.has(node.tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, node.tag);
  update(element, {}, node);
  return element;
}

function update(element, before, node) {
  for (const name of new Set([...Object.keys(before), ...Object.keys(node.properties)])) {
    if (before[name] !== node.properties[name]) setProperty(element, name, node.properties[name]);
  }
  render(element, node.children);
}

function setProperty(element, name, value) {
  if (name === "href" && value && !/^(https?:|mailto:|#i-)/.test(value)) throw new Error("an address that is not safe");
  if (name === "key") return;
  if (name.startsWith("on")) element[name] = typeof value === "function" ? value : null;
  else if (name === "value") element.value = value ?? "";
  else if (value === undefined || value === null || value === false) element.removeAttribute(name);
  else element.setAttribute(name, value === true ? "" : value);
}

/** The text of nodes as it is read aloud. */
function textOf(nodes) {
  return nodes.map((node) => (typeof node === "string" ? node : textOf(node.children) + (INLINE_TAGS.has(node.tag) ? "" : " "))).join("");
}
