// ── Colours in code ────────────────────────────────────────────────────────────────────────────────────────
// A language is a list of kinds of token with their patterns; at each place the first that fits wins, the rest is plain.

const MOST_COLOURED = 100_000;
const LANGUAGES = new Map(); // name → pattern with a group for each kind
const END = "(?![^])"; // of the text; "$" is the end of a line
const SLASHES = `\\/\\/.*|\\/\\*[^]*?(?:\\*\\/|${END})`;
const STRINGS = `"(?:\\\\[^]|[^"\\\\\\n])*"?|'(?:\\\\[^]|[^'\\\\\\n])*'?`;
const NUMBER = "\\b0[xXbBoO][\\da-fA-F_]+|\\b\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?";
const CALL = "\\b[A-Za-z_]\\w*(?=\\()";
const words = (text) => `\\b(?:${text.trim().split(/\s+/).join("|")})\\b`;

function language(names, kinds) {
  const pattern = new RegExp(Object.entries(kinds).map(([kind, each]) => `(?<${kind}>${each})`).join("|"), "gm");
  for (const name of names.split(" ")) LANGUAGES.set(name, pattern);
}

language("python py python3 pycon", {
  comment: "#.*",
  string: `(?:\\b[rbfuRBFU]{1,2})?(?:"""[^]*?(?:"""|${END})|'''[^]*?(?:'''|${END})|${STRINGS})`,
  keyword: words(`and as assert async await break case class continue def del elif else except finally for from global if import
    in is lambda match nonlocal not or pass raise return try while with yield True False None self`),
  number: NUMBER,
  name: `@[\\w.]+|${CALL}`,
});
language("javascript js jsx mjs typescript ts tsx", {
  comment: SLASHES,
  string: `\`(?:\\\\[^]|[^\`\\\\])*\`?|${STRINGS}`,
  keyword: words(`as async await break case catch class const continue debugger default delete do else enum export extends finally
    for from function get if implements import in instanceof interface let new of private public readonly return set static
    super switch this throw try type typeof var void while with yield true false null undefined`),
  number: NUMBER,
  name: CALL,
});
language("c h cpp c++ cc cuda java rust rs go c# csharp kotlin swift php", {
  comment: SLASHES,
  string: STRINGS,
  keyword: `^[ \\t]*#[ \\t]*\\w+|${words(`abstract alignas async auto await bool boolean break byte case catch char class const
    constexpr continue crate default defer delete do double else enum explicit export extends extern false final finally float
    fn for friend func goto go if impl implements import in inline instanceof int interface let long loop match mod move mut
    namespace new noexcept null nullptr operator override package private protected pub public range register return select
    self short signed sizeof static struct super switch template this throw throws trait true try type typedef typename union
    unsafe unsigned use using var virtual void volatile where while`)}`,
  number: NUMBER,
  name: CALL,
});
language("bash sh shell zsh console", {
  comment: "(?<![^\\s])#.*",
  string: `"(?:\\\\[^]|[^"\\\\])*"?|'[^']*'?`,
  number: "\\$\\w+|\\$\\{[^}\\n]*\\}?|\\$[@*#?$!-]",
  keyword: words("if then elif else fi for while until do done case esac in function return exit export local set unset source"),
  name: "^[ \\t]*(?:\\$ )?[\\w./-]+|(?<=[|;&] )[\\w./-]+",
});
language("json jsonc json5 jsonl", {
  name: '"(?:\\\\.|[^"\\\\\\n])*"(?= {0,9}:)',
  comment: SLASHES,
  string: '"(?:\\\\.|[^"\\\\\\n])*"?',
  keyword: words("true false null"),
  number: `-?(?:${NUMBER})`,
});
language("html xml svg vue", {
  comment: `<!--[^]*?(?:-->|${END})`,
  keyword: "<\\/?[A-Za-z][\\w:-]*|<!\\w+|\\/?>",
  string: `"[^"\\n]*"|'[^'\\n]*'`,
  name: "(?<![\\w:@.-])[\\w:@.-]+(?==)",
  number: "&#?\\w{1,8};",
});
language("yaml yml toml ini", {
  comment: "(?<![^\\s])#.*",
  name: "^[ \\t-]{0,40}[\\w.$-]{1,80}(?=\\s?[:=])|^\\[.*\\]",
  string: STRINGS,
  keyword: words("true false null yes no on off"),
  number: NUMBER,
});

function highlight(code, name) {
  const pattern = LANGUAGES.get(name.toLowerCase());
  if (!pattern || code.length > MOST_COLOURED) return visible(code);
  const nodes = [];
  let at = 0;
  for (const found of code.matchAll(pattern)) {
    const kind = Object.keys(found.groups).find((each) => found.groups[each] !== undefined);
    nodes.push(visible(code.slice(at, found.index)), h("span", { class: `t-${kind}` }, visible(found[0])));
    at = found.index + found[0].length;
  }
  return [...nodes, visible(code.slice(at))].flat();
}
