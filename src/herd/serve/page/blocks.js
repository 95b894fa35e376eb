// ── Markdown by blocks ─────────────────────────────────────────────────────────────────────────────────────
// Each rule looks at the lines from `at` on and returns null, or where its block ends and how to make its node.

const MOST_NESTED = 10;
const MOST_COLUMNS = 60;
const HEADING = /^ {0,3}(#{1,6})(?:\s|$)/;
const RULE = /^ {0,3}([-*_])(?: {0,9}\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TASK = /^\[([ xX])\] /;
const TABLE_RULE = /^\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;
const UNSETTLED = /^(?:> ?)*(?:[-*_+#|=]{1,3}|~{1,3}|`{1,3}|(?:`{3,}|~{3,})[\w+#-]*|\d{1,9}[.)]?)?\s*$/;

/**
 * The nodes of a Markdown text. While it is still growing (`partial`), a last line that may become several things
 * waits, and what is open is shown closed. `cache` maps a block's text to its node: blocks that stay are the same nodes.
 */
function markdown(text, partial = false, cache = new Map()) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n").map((line) => line.replace(/^[ \t]+/, (space) => space.replace(/\t/g, "    ")));
  if (partial && UNSETTLED.test(last(lines).trim())) lines.pop();
  return blocks(lines, { depth: 0, partial, cache });
}

function blocks(lines, context) {
  const nodes = [];
  const rules = context.depth < MOST_NESTED ? [fence, heading, rule, quote, list, table, paragraph] : [fence, paragraph];
  for (let at = afterBlank(lines, 0); at < lines.length;) {
    const block = rules.reduce((found, each) => found ?? each(lines, at, context), null);
    const isGrowing = context.partial && block.end === lines.length;
    nodes.push(isGrowing ? block.make(true) : cached(context.cache, lines.slice(at, block.end).join("\n"), block.make));
    at = afterBlank(lines, block.end);
  }
  return nodes;
}

function cached(cache, key, make) {
  if (!cache.has(key)) cache.set(key, make(false));
  return cache.get(key);
}

const within = (context, partial) => ({ depth: context.depth + 1, partial, cache: new Map() });
const indentOf = (line) => line.length - line.trimStart().length;

function afterBlank(lines, at) {
  while (at < lines.length && !lines[at].trim()) at++;
  return at;
}

function fence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const [, indent, marks, info] = open;
  const isClosing = (text) => text.length >= marks.length && text[0] === marks[0] && runLength(text, 0) === text.length;
  let end = at + 1;
  while (end < lines.length && !isClosing(lines[end].trim())) end++;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indentOf(line), indent.length)));
  return { end: Math.min(end + 1, lines.length), make: () => codeBlock(code.join("\n"), info) };
}

function codeBlock(code, info) {
  const language = oneLine(info.trim().split(/[\s{,:]/)[0], 24);
  const box = { tabindex: "0", role: "group", "aria-label": language ? `Code in ${language}` : "Code" };
  return h("div", { class: "code" },
    h("header", null, h("span", null, language || "text"), copyButton(() => code, "Copy code", "Copy")),
    h("pre", box, h("code", null, highlight(code, language))));
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  const level = found[1].length;
  const text = lines[at].trim().slice(level).trim().replace(/(?:^| )#+$/, "");
  // The page's own headings are of level 1 and 2.
  return { end: at + 1, make: (partial) => h(`h${Math.min(level + 2, 6)}`, { dir: "auto" }, inline(text, partial)) };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { end: at + 1, make: () => h("hr") } : null;
}

function quote(lines, at, context) {
  if (!QUOTE.test(lines[at])) return null;
  let end = at + 1;
  while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end].trim() && !startsBlock(lines, end)))) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { end, make: (partial) => h("blockquote", null, blocks(inner, within(context, partial))) };
}

function list(lines, at, context) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const items = [];
  let end = at;
  for (let next = at; isSibling(first, lines[next]); next = afterBlank(lines, end)) {
    const item = listItem(lines, next);
    items.push(item.lines);
    end = item.end;
  }
  const kind = (item) => (/^[☐☑] /.test(item[0]) ? "task" : null);
  const node = (item, partial) => h("li", { dir: "auto", class: kind(item) }, blocks(item, within(context, partial)));
  const [tag, properties] = first[2].length > 1 ? ["ol", { start: parseInt(first[2], 10) }] : ["ul", null];
  return { end, make: (partial) => h(tag, properties, items.map((item, i) => node(item, partial && i === items.length - 1))) };
}

/** Whether a line begins another item of the list that `first` began. */
function isSibling(first, line) {
  const found = line !== undefined && !RULE.test(line) && ITEM.exec(line);
  return found && last(found[2]) === last(first[2]) && found[1].length < first[1].length + 2;
}

/** The lines of one item without their indent. Models indent by 2, 3 or 4 whatever the marker: 2 more is inside. */
function listItem(lines, at) {
  const [whole, indent, , gap] = ITEM.exec(lines[at]);
  const inside = gap.length > 4 ? whole.length - gap.length + 1 : whole.length;
  const belongs = (line) => indentOf(line) >= indent.length + 2;
  const item = [lines[at].slice(inside).replace(TASK, (_, state) => (state === " " ? "☐ " : "☑ "))];
  let end = at + 1;
  while (end < lines.length) {
    const next = afterBlank(lines, end);
    if (next > end && (next === lines.length || !belongs(lines[next]))) break;
    if (next > end) item.push("");
    end = next;
    const line = lines[end];
    if (belongs(line)) item.push(line.slice(Math.min(indentOf(line), inside)));
    else if (startsBlock(lines, end)) break;
    else item.push(line.trim());
    end++;
  }
  return { lines: item, end };
}

function table(lines, at, context) {
  const isGrowing = context.partial && lines[at].trimStart().startsWith("|") &&
    (at === lines.length - 1 || (at === lines.length - 2 && /^[|:\- ]*$/.test(lines[at + 1])));
  if (!isGrowing && !isTable(lines, at)) return null;
  let end = Math.min(at + 2, lines.length);
  while (end < lines.length && lines[end].includes("|")) end++;
  return { end, make: (partial) => tableNode(lines.slice(at, end), partial) };
}

function isTable(lines, at) {
  const [head, below = ""] = lines.slice(at, at + 2);
  return head.includes("|") && TABLE_RULE.test(below.trim()) && cells(head).length === cells(below).length;
}

function tableNode([head, rule = "", ...rows], partial) {
  const names = cells(head);
  const sides = cells(rule).map((cell) => (/^:-*:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : null));
  const row = (tag, texts, isLast) => h("tr", null, names.map((_, i) => {
    const properties = { class: sides[i], dir: "auto", scope: tag === "th" ? "col" : null };
    return h(tag, properties, inline(texts[i] ?? "", partial && isLast && i >= texts.length - 1));
  }));
  return h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, h("table", null,
    h("thead", null, row("th", names, !rows.length)),
    h("tbody", null, rows.map((line, i) => row("td", cells(line), i === rows.length - 1)))));
}

/** The cells of a table's line: split at each "|" that is neither escaped nor in code. */
function cells(line) {
  const texts = [""];
  for (const [piece] of line.trim().matchAll(/\\\||`[^`]*`|[^|`\\]+|[^]/g)) {
    if (piece === "|") texts.push("");
    else texts.push(texts.pop() + (piece === "\\|" ? "|" : piece));
  }
  if (!texts[0].trim()) texts.shift();
  if (texts.length && !last(texts).trim()) texts.pop();
  return texts.map((text) => text.trim()).slice(0, MOST_COLUMNS);
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end)) end++;
  // A single blank is how some models begin a text; more are an indent.
  const text = lines.slice(at, end).join("\n").trimEnd().replace(/^ (?! )/, "");
  return { end, make: (partial) => h("p", { dir: "auto" }, inline(text, partial)) };
}

/** The nodes of a text that stays as it was typed, but for its code: fences, and spans within a line. */
function typed(text) {
  const lines = text.split("\n");
  const nodes = [];
  for (let at = 0, end; at < lines.length; at = end) {
    const block = fence(lines, at);
    end = block?.end ?? at + 1;
    nodes.push(...(block ? [block.make()] : inline(lines[at], false, CODE_ONLY)));
    if (!block && end < lines.length) nodes.push("\n");
  }
  return nodes;
}

function startsBlock(lines, at) {
  return [HEADING, RULE, QUOTE, FENCE, ITEM].some((pattern) => pattern.test(lines[at])) || isTable(lines, at);
}
