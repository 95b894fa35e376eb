// ── Markdown within a line ─────────────────────────────────────────────────────────────────────────────────
// One pass over the text. What is open (emphasis, a bracket) is a stack; its bottom collects the finished nodes. No
// rule looks ahead without bound, so no text takes more than linear time. With `partial`, the text is still growing:
// what is open at its end is shown as if it were closed, and signs at its end that may mean several things wait.

const MOST_OPEN = 24;
const PLAIN = /(?:[^\\`*_~[\]!<\nh]|h(?!ttps?:\/\/)){1,500}/y;
const ADDRESS = "<([^<>\\n]{0,2000})>|([^\\s()<>]{0,2000}(?:\\([^\\s()<>]{0,500}\\)[^\\s()<>]{0,500}){0,9})";
const TARGET = new RegExp(`\\(\\s{0,9}(?:${ADDRESS})(?:\\s{1,9}(?:"[^"]{0,500}"|'[^']{0,500}'))?\\s{0,9}\\)`, "y");
const UNFINISHED_TARGET = /\((?:<[^<>\n]{0,2000}|[^\s()<>]{0,2000}(?:\([^\s()<>]{0,500}\)?)?)(?:\s{1,9}["'][^"'\n]{0,500}["']?)?$/y;
const BARE_LINK = /https?:\/\/[^\s<>"`]{1,2000}/y;
const ANGLE_LINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const BREAK_TAG = /<br\s?\/?>/iy;
const AFTER_LINK = ".,:;!?'*_~|"; // belongs to the sentence, not to the address before it

/** Where a link may lead: an address with http, https or mailto, spelled out. Everything else is no link: null. */
function safeAddress(text) {
  const url = /^(?:https?:\/\/|mailto:)/i.test(text) ? attempt(() => new URL(text), null) : null;
  return ["http:", "https:", "mailto:"].includes(url?.protocol) ? url.href : null;
}

function link(address, children) {
  const privacy = { target: "_blank", rel: "noopener noreferrer", referrerpolicy: "no-referrer" };
  return h("a", { href: address, title: oneLine(address, 300), ...privacy }, children.map(withoutDirection));
}

/** Link text that cannot be turned around to look like another address. */
function withoutDirection(node) {
  if (typeof node === "string") return node.replace(new RegExp(`[${DIRECTION}]`, "g"), "");
  return h(node.tag, node.properties, node.children.map(withoutDirection));
}

function inline(source, partial = false, rules = INLINE) {
  const text = partial ? withoutTail(source, "*_`~![\\<") : source;
  const state = { text, at: 0, partial, open: [{ mark: "", children: [] }], unpaired: new Set() };
  while (state.at < text.length) {
    const plain = match(PLAIN, state);
    if (plain) take(state, plain[0].length, plain[0]);
    else if (!rules.get(text[state.at])?.(state)) take(state, 1, text[state.at]);
  }
  while (state.open.length > 1) closeAtEnd(state);
  return state.open[0].children;
}

/** By its first sign, what may stand in a text. A rule that does not fit returns a false value and leaves the state as it is. */
const INLINE = new Map(Object.entries({
  "\\": escapedSign, "`": codeSpan, "*": emphasis, _: emphasis, "~": emphasis, "[": openBracket, "!": openBracket,
  "]": closeBracket, "<": angle, "\n": lineBreak, h: bareLink,
}));
const CODE_ONLY = new Map([["`", codeSpan]]);

function match(pattern, state, at = state.at) {
  pattern.lastIndex = at;
  return pattern.exec(state.text);
}

/** Goes on by `length` characters, which give `node`. Texts side by side become one. */
function take(state, length, node) {
  const { children } = last(state.open);
  if (typeof node === "string" && typeof last(children) === "string") children.push(children.pop() + node);
  else children.push(node);
  state.at += length;
  return true;
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return end - at;
}

function withoutTail(text, signs) {
  let end = text.length;
  while (end > 0 && signs.includes(text[end - 1])) end--;
  return text.slice(0, end);
}

function escapedSign(state) {
  const next = state.text[state.at + 1];
  if (next === undefined || !/[!-/:-@[-`{-~\n]/.test(next)) return false;
  const isFormula = "()[]".includes(next); // models write \(x\) and \[x\] around formulas: those stay readable
  return take(state, 2, next === "\n" ? h("br") : isFormula ? `\\${next}` : next);
}

function codeSpan(state) {
  const { text, at, unpaired } = state;
  const length = runLength(text, at);
  const end = unpaired.has(length) ? -1 : findRun(text, at + length, length);
  if (end < 0) unpaired.add(length);
  if (end < 0 && !state.partial) return take(state, length, "`".repeat(length));
  const code = text.slice(at + length, end < 0 ? text.length : end).replace(/\n/g, " ");
  const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
  return take(state, end < 0 ? text.length - at : end + length - at, h("code", null, visible(isPadded ? code.slice(1, -1) : code)));
}

/** Where a run of exactly `length` backticks begins, from `at` on; -1 where there is none. */
function findRun(text, at, length) {
  for (let i = text.indexOf("`", at); i >= 0; i = text.indexOf("`", i)) {
    const found = runLength(text, i);
    if (found === length) return i;
    i += found;
  }
  return -1;
}

function emphasis(state) {
  const { text, at } = state;
  const mark = text[at];
  let count = runLength(text, at);
  if (count > 3 || (mark === "~" && count !== 2)) return take(state, count, mark.repeat(count));
  // CommonMark's flanking rules: a mark opens before a word and closes after one; "_" does neither within a word.
  const before = text[at - 1] ?? " ";
  const after = text[at + count] ?? " ";
  const isSpace = (sign) => /\s/.test(sign);
  const isSign = (sign) => /[\p{P}\p{S}]/u.test(sign);
  const left = !isSpace(after) && (!isSign(after) || isSpace(before) || isSign(before));
  const right = !isSpace(before) && (!isSign(before) || isSpace(after) || isSign(after));
  state.at += count;
  if (right && (mark !== "_" || !left || isSign(after))) count = closeEmphasis(state, mark, count);
  const opens = left && (mark !== "_" || !right || isSign(before)) && state.open.length < MOST_OPEN;
  if (count && opens) state.open.push({ mark, sign: mark, count, children: [], isFirm: isSpace(before) || isSign(before) });
  else if (count) take(state, 0, mark.repeat(count));
  return true;
}

/** Closes as much emphasis as `count` marks can, but none that a bracket has open inside; returns how many marks are left. */
function closeEmphasis(state, mark, count) {
  while (count > 0) {
    const level = state.open.findLastIndex((each) => each.mark === mark || each.mark === "[");
    if (level < 0 || state.open[level].mark === "[") break;
    while (state.open.length - 1 > level) giveUp(state);
    count -= wrapEmphasis(state, count);
  }
  return count;
}

/** Makes the innermost open emphasis a node, using at most `count` of its marks; returns how many were used. */
function wrapEmphasis(state, count) {
  const inner = last(state.open);
  const used = Math.min(2, inner.count, count);
  const node = h(inner.mark === "~" ? "del" : used === 2 ? "strong" : "em", null, inner.children);
  inner.count -= used;
  inner.children = [node];
  if (inner.count === 0) {
    state.open.pop();
    take(state, 0, node);
  }
  return used;
}

/** What was open innermost is plain text after all. */
function giveUp(state) {
  const inner = state.open.pop();
  take(state, 0, inner.sign.repeat(inner.count));
  for (const child of inner.children) take(state, 0, child);
}

function closeAtEnd(state) {
  const inner = last(state.open);
  if (state.partial && inner.isFirm && inner.children.length) wrapEmphasis(state, inner.count);
  else giveUp(state);
}

const isInBracket = (state) => state.open.some((each) => each.mark === "[");

function openBracket(state) {
  const sign = state.text[state.at] === "[" ? "[" : state.text.startsWith("![", state.at) ? "![" : null;
  if (!sign || state.open.length >= MOST_OPEN) return false;
  state.open.push({ mark: "[", sign, count: 1, children: [] });
  state.at += sign.length;
  return true;
}

function closeBracket(state) {
  if (!isInBracket(state)) return false;
  while (last(state.open).mark !== "[") giveUp(state);
  const target = match(TARGET, state, state.at + 1);
  const address = target && safeAddress(target[1] ?? target[2]);
  const isUnfinished = state.partial && !target && match(UNFINISHED_TARGET, state, state.at + 1);
  if (last(state.open).isDead || (!address && !isUnfinished)) {
    giveUp(state); // text in brackets; an address that is no link is shown as it was written
    return take(state, 1, "]");
  }
  const bracket = state.open.pop();
  const children = bracket.sign === "[" ? bracket.children : ["Image: ", ...bracket.children]; // images are not loaded
  for (const outer of state.open) outer.isDead = true; // no link within a link
  if (isUnfinished) return take(state, state.text.length - state.at, h("span", { class: "link" }, children));
  return take(state, 1 + target[0].length, link(address, children));
}

function angle(state) {
  const lineEnd = match(BREAK_TAG, state);
  if (lineEnd) return take(state, lineEnd[0].length, h("br"));
  const found = match(ANGLE_LINK, state);
  const address = found && safeAddress(found[1]);
  return address && !isInBracket(state) && take(state, found[0].length, link(address, [found[1]]));
}

function bareLink(state) {
  const found = match(BARE_LINK, state);
  if (!found || /\w/.test(state.text[state.at - 1] ?? " ") || isInBracket(state)) return false;
  let text = withoutTail(found[0], AFTER_LINK);
  while (text.endsWith(")") && text.split(")").length > text.split("(").length) text = withoutTail(text.slice(0, -1), AFTER_LINK);
  const address = safeAddress(text);
  const isGrowing = state.partial && state.at + found[0].length === state.text.length;
  return address && take(state, text.length, isGrowing ? h("span", { class: "link" }, text) : link(address, [text]));
}

/** Blanks before the break go; those after it stay, as the style shows them: code is not always in a fence. */
function lineBreak(state) {
  const { children } = last(state.open);
  if (typeof last(children) === "string") children.push(children.pop().trimEnd());
  return take(state, 1, h("br"));
}

/** Code as nodes in which characters that turn the direction of text can be seen. */
function visible(code) {
  const name = (sign) => `U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  const parts = code.split(new RegExp(`([${DIRECTION}])`)).filter((part) => part !== "");
  return parts.map((part) => (new RegExp(`^[${DIRECTION}]$`).test(part) ? h("span", { class: "t-hidden" }, name(part)) : part));
}
