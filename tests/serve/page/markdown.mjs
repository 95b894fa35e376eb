// Markdown and colours without a browser: node runs that part of the page's script. Prints one line for each check that
// passed and fails at the first that does not.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { EVERYTHING, ATTEMPTS } from "./texts.mjs";

const read = (name) => readFileSync(new URL(`../../../src/herd/serve/page/${name}.js`, import.meta.url), "utf8");
const part = ["elements", "inline", "blocks", "colours"].map(read).join("\n");
const source = `${part}\nfunction copyButton(text) { return h("button", { copies: text() }); }\nexport { markdown, typed, highlight, textOf, safeAddress, oneLine };`;
const { markdown, typed, highlight, textOf, safeAddress, oneLine } = await import(`data:text/javascript;base64,${Buffer.from(source).toString("base64")}`);

/** Nodes as HTML, to compare with what is expected. Only for tests: what it gives is not escaped. */
function html(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return node;
    const { href, start, class: kind } = node.properties;
    const attributes = [href && `href=${href}`, start > 1 && `start=${start}`, /^(right|center|link|task)$/.test(kind) && `.${kind}`].filter(Boolean);
    if (kind === "code") return `<pre ${node.children[0].children[0].children[0]}>${textOf(node.children[1].children).trimEnd()}</pre>`;
    if (["tag", "br", "hr"].includes(node.tag)) return `<${node.tag}>`;
    return `<${[node.tag, ...attributes].join(" ")}>${html(node.children)}</${node.tag}>`;
  }).join("");
}
const show = (text, partial = false) => html(markdown(text, partial));
const walk = (nodes, visit) => nodes.forEach((node) => typeof node !== "string" && (visit(node), walk(node.children, visit)));
const letters = (text) => text.replace(/[^a-z]/g, "");

function check(name, body) {
  body();
  console.log(`ok ${name}`);
}

check("inline", () => {
  const cases = {
    "*a* _b_ **c** __d__ ***e*** ~~f~~": "<em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <em><strong>e</strong></em> <del>f</del>",
    "snake_case_name 2*3*4 a * b": "snake_case_name 2<em>3</em>4 a * b",
    "**a *b* c**": "<strong>a <em>b</em> c</strong>",
    "*a **b** c*": "<em>a <strong>b</strong> c</em>",
    "**a `**` b**": "<strong>a <code>**</code> b</strong>",
    "`` a`b `` `c`": "<code>a`b</code> <code>c</code>",
    "`open and *em*": "`open and <em>em</em>",
    "\\*no\\* \\`no\\` \\_": "*no* `no` _",
    "\\(x_1\\) \\[y\\]": "\\(x_1\\) \\[y\\]",
    "a\nb": "a<br>b",
    "a<br>b<br/>c": "a<br>b<br>c",
    "[a *b*](https://x.example/p)": "<a href=https://x.example/p>a <em>b</em></a>",
    "[a](https://x.example/p_(q) \"t\")": "<a href=https://x.example/p_(q)>a</a>",
    "see [1] and [2](x)": "see [1] and [2](x)",
    "<https://x.example>": "<a href=https://x.example/>https://x.example</a>",
    "(https://x.example/a_b).": "(<a href=https://x.example/a_b>https://x.example/a_b</a>).",
    "![alt](https://x.example/i.png)": "<a href=https://x.example/i.png>Image: alt</a>",
    "[m](mailto:a@b.example)": "<a href=mailto:a@b.example>m</a>",
    "**a": "**a",
    "*a [b*](https://x.example/)": "*a <a href=https://x.example/>b*</a>",
  };
  for (const [text, expected] of Object.entries(cases)) assert.equal(show(text), `<p>${expected}</p>`, text);
});

check("blocks", () => {
  const cases = {
    "# a\n## b ##\n###### c\n#d": "<h3>a</h3><h4>b</h4><h6>c</h6><p>#d</p>",
    "a\n\nb\n***\nc": "<p>a</p><p>b</p><hr><p>c</p>",
    " a  \n    b\n\n    c\n\td": "<p>a<br>    b</p><p>    c<br>    d</p>",
    "> a\nb\n>\n> > c": "<blockquote><p>a<br>b</p><blockquote><p>c</p></blockquote></blockquote>",
    "- a\n- b\n  - c\n\n    d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li><li><p>e</p></li></ul>",
    "1. a\n2. b": "<ol><li><p>a</p></li><li><p>b</p></li></ol>",
    "3) a\n4) b": "<ol start=3><li><p>a</p></li><li><p>b</p></li></ol>",
    "1. a\n  - b\n2. c": "<ol><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>",
    "1. a\n\n   ```py\n   x\n     y\n   ```\n\n2. b": "<ol><li><p>a</p><pre py>x\n  y</pre></li><li><p>b</p></li></ol>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- a\n* b": "<ul><li><p>a</p></li></ul><ul><li><p>b</p></li></ul>",
    "- [ ] a\n- [x] b": "<ul><li .task><p>☐ a</p></li><li .task><p>☑ b</p></li></ul>",
    "```js\na\n\n# b\n```\nc": "<pre js>a\n\n# b</pre><p>c</p>",
    "~~~~\n```\n~~~\n~~~~": "<pre text>```\n~~~</pre>",
    "```\nopen": "<pre text>open</pre>",
    "text\n```\na\n```": "<p>text</p><pre text>a</pre>",
    "|a|b|\n|-|:-:|\n|1|2|\n|3|": "<div><table><thead><tr><th>a</th><th .center>b</th></tr></thead><tbody><tr><td>1</td><td .center>2</td></tr><tr><td>3</td><td .center></td></tr></tbody></table></div>",
    "a | b\n--|--:\n`x|y` | \\|": "<div><table><thead><tr><th>a</th><th .right>b</th></tr></thead><tbody><tr><td><code>x|y</code></td><td .right>|</td></tr></tbody></table></div>",
    "a | b\n\nc": "<p>a | b</p><p>c</p>",
    "- - -": "<hr>",
    "1986. A year\nmore": "<ol start=1986><li><p>A year<br>more</p></li></ol>",
  };
  for (const [text, expected] of Object.entries(cases)) assert.equal(show(text), expected, text);
});

check("typed text", () => {
  const cases = {
    "  *a* `b`\n\n# c": "  *a* <code>b</code>\n\n# c",
    "a `b\nc` ``": "a `b\nc` ``",
    "a\n```py\n  b\n```\nc": "a\n<pre py>  b</pre>c",
    "```\nopen": "<pre text>open</pre>",
    "": "",
  };
  for (const [text, expected] of Object.entries(cases)) assert.equal(html(typed(text)), expected, text);
});

check("what is open is shown closed while an answer grows", () => {
  const cases = {
    "a **b": "<p>a <strong>b</strong></p>",
    "a **b*": "<p>a <strong>b</strong></p>",
    "a **": "<p>a </p>",
    "a `b": "<p>a <code>b</code></p>",
    "[a](https://x.exam": "<p><span .link>a</span></p>",
    "a\n-": "<p>a</p>",
    "a\n1.": "<p>a</p>",
    "a\n``": "<p>a</p>",
    "```js\nx\n``": "<pre js>x</pre>",
    "| a | b |": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody></tbody></table></div>",
    "| a | b |\n|--": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody></tbody></table></div>",
    "2 * 3": "<p>2 * 3</p>",
  };
  for (const [text, expected] of Object.entries(cases)) assert.equal(show(text, true), expected, text);
});

check("no prefix of an answer shows what its end takes back", () => {
  const whole = markdown(EVERYTHING);
  const kinds = whole.map((node) => node.tag);
  const text = letters(textOf(whole));
  const cache = new Map();
  for (let length = 0; length <= EVERYTHING.length; length++) {
    const nodes = markdown(EVERYTHING.slice(0, length), true, cache);
    const prefix = EVERYTHING.slice(0, length);
    assert.deepEqual(nodes.map((node) => node.tag), kinds.slice(0, nodes.length), prefix);
    assert.ok(text.startsWith(letters(textOf(nodes)).slice(0, -12)), prefix); // a language's name may still be short
    assert.ok(!/\*\*|~~|`|\]\(/.test(textOf(nodes.filter((node) => node.properties.class !== "code"))), prefix);
  }
  assert.deepEqual(html(markdown(EVERYTHING, false, cache)), html(whole));
});

check("blocks that stay are the same nodes", () => {
  const cache = new Map();
  const before = markdown("# a\n\nb\n\nc", true, cache);
  const after = markdown("# a\n\nb\n\nc d", true, cache);
  assert.ok(before[0] === after[0] && before[1] === after[1] && before[2] !== after[2]);
});

check("links", () => {
  for (const good of ["https://a.example", "HTTP://a.example/x?y#z", "mailto:a@b.example"]) assert.ok(safeAddress(good), good);
  for (const bad of ["javascript:1", " https://a", "//a.example", "/a", "a", "https:a", "data:text/html,x", "ftp://a", "java\nscript:1", "https://", "https://[", "", "#i-copy"]) {
    assert.equal(safeAddress(bad), null, bad);
  }
  for (const text of ATTEMPTS) {
    for (const partial of [false, true]) walk(markdown(text, partial), ({ tag, properties }) => {
      assert.match(tag, /^(?:p|a|h[3-6]|ul|ol|li|pre|code|div|header|span|button|strong|em|del|br|hr|blockquote|table|thead|tbody|tr|th|td)$/);
      if (properties.href) assert.match(properties.href, /^(?:https?:\/\/|mailto:)/);
      assert.ok(Object.keys(properties).every((name) => !/^on|^style$|^src/.test(name)));
    });
  }
});

check("labels", () => {
  assert.equal(oneLine("a\u202eb\n\u0000c\u2066"), "a b c");
  assert.equal(oneLine("x".repeat(100), 10), `${"x".repeat(9)}…`);
  assert.equal(oneLine("😀".repeat(100), 10), "😀😀😀😀…", "no half of a character");
});

check("colours", () => {
  const kinds = (code, name) => highlight(code, name).filter((node) => typeof node !== "string").map((node) => [node.properties.class, textOf(node.children)]);
  assert.deepEqual(kinds("x = 'a' # b", "python"), [["t-string", "'a'"], ["t-comment", "# b"]]);
  assert.deepEqual(kinds('"""a\n# b"', "py"), [["t-string", '"""a\n# b"']]);
  assert.deepEqual(kinds("const a = `b` // c", "ts"), [["t-keyword", "const"], ["t-string", "`b`"], ["t-comment", "// c"]]);
  assert.deepEqual(kinds('{"a": "b", "c": [1, true]}', "json"), [["t-name", '"a"'], ["t-string", '"b"'], ["t-name", '"c"'], ["t-number", "1"], ["t-keyword", "true"]]);
  assert.deepEqual(kinds("#include <x>\nint main() { return 0x1f; }", "cpp"), [["t-keyword", "#include"], ["t-keyword", "int"], ["t-name", "main"], ["t-keyword", "return"], ["t-number", "0x1f"]]);
  assert.deepEqual(kinds('<a href="x">b</a>', "html").map(([kind]) => kind), ["t-keyword", "t-name", "t-string", "t-keyword", "t-keyword", "t-keyword"]);
  assert.deepEqual(kinds('ls -l "$x" # y', "bash"), [["t-name", "ls"], ["t-string", '"$x"'], ["t-comment", "# y"]]);
  for (const name of ["python", "js", "c", "sh", "json", "html", "css", "yaml", "sql", "nothing", "__proto__", "constructor"]) {
    assert.equal(textOf(highlight(EVERYTHING, name)).replace(/ /g, ""), EVERYTHING.replace(/ /g, ""), `${name} loses nothing`);
  }
});

// A generator with a seed: failures can be repeated.
let seed = 1;
const random = (most) => (seed = (seed * 48271) % 0x7fffffff) % most;
const SCRAPS = ["*", "**", "_", "`", "```", "\n```py\n", "~~", "[", "](", ")", "![", "\\", "<", ">", "\n> ", "\n- ", "\n  - ", "\n1. ", "\n\n", "\n", "# ", "\n## ",
  "|", "\n|-|-|\n", "\n---\n", " ", "  ", "\t", "a", "bc", "https://x.example", "&amp;", "&", "!", "\r\n", "😀", "\u202e", "[ ] ", "(", "mailto:"];

check("no text is lost, and none fails", () => {
  for (let i = 0; i < 8_000; i++) {
    const text = Array.from({ length: 1 + random(30) }, () => SCRAPS[random(SCRAPS.length)]).join("");
    const nodes = markdown(text);
    markdown(text.slice(0, random(text.length + 1)), true);
    typed(text);
    walk(nodes, ({ properties }) => properties.href && assert.match(properties.href, /^(?:https?:\/\/|mailto:)/));
    // Links hide their target, fences say the language elsewhere, &amp; is a sign: elsewhere every letter is still there.
    if (!/\(|```|~~~|&/.test(text)) assert.equal(letters(textOf(nodes)), letters(text), JSON.stringify(text));
  }
});

check("no text takes long", () => {
  const size = 30_000;
  const units = ["[", "*a ", "**a", "_a", "`a ", "``a`", "![", "[a](", "[a](https://x.example ", "](", "\\", "<", "&", "a*", "> ", ">", "- ", "\n- ", "\n  - ", "\n1. a\n\n", "|", "|a", "\n|-|-|", "\n|a|b|\n|-|-|\n",
    "# ", "#", "\n# #", "```\n", "\n```", "~~a", "h", "http", "https://", "https://a)", "\n", " ", "\t", "\n\n", "- - ", "-", "***", "*".repeat(7), "a\n", "( ", "[a](<", "\"", "'", "/*", "<!--", "a-", "a=", "$", "\u202e", "a_", "[*", "*[", "`*[_"];
  for (const unit of units) {
    for (const [before, after] of [["", ""], ["x", "x"], ["| a | b |\n|---|---|\n", "x"], ["# ", "x"], ["> ", "x"], ["- ", "x"]]) {
      const text = before + unit.repeat(Math.ceil(size / unit.length)) + after;
      for (const partial of [false, true]) {
        const started = performance.now();
        markdown(text, partial);
        typed(text);
        const took = performance.now() - started;
        assert.ok(took < 1000, `${JSON.stringify(before + unit)}… takes ${took} ms`);
      }
    }
    for (const name of ["python", "js", "c", "sh", "json", "html", "css", "yaml", "sql"]) {
      const started = performance.now();
      highlight(unit.repeat(Math.ceil(size / unit.length)), name);
      const took = performance.now() - started;
      assert.ok(took < 1000, `${name} ${JSON.stringify(unit)}… takes ${took} ms`);
    }
  }
  const nested = markdown(`${"> - ".repeat(3000)}a`);
  assert.ok(textOf(nested).includes("a"));
});
