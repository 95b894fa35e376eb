// Texts for the scenarios: a long answer with everything Markdown has, and attempts to have a model run code in the page.

export const EVERYTHING = `# Sorting in Python

You can sort a list of pairs with \`sorted()\` and a **key function**. The idea is *decorate, sort, undecorate*; see
[the docs](https://docs.python.org/3/howto/sorting.html) or https://wiki.python.org/moin/HowTo/Sorting.

## The short way

\`\`\`python
from operator import itemgetter

@dataclass
class Pair:
    """Two things that belong together."""
    name: str
    size: int = 42

def by_second(pairs: list[tuple[str, int]]) -> list[tuple[str, int]]:
    # itemgetter is faster than a lambda
    return sorted(pairs, key=itemgetter(1), reverse=True)

print(f"{by_second([('a', 3), ('b', 0x1f)])!r}")
\`\`\`

A few things to keep in mind:

1. \`sorted\` returns a **new** list; \`list.sort\` works in place.
2. Both are stable:
   - equal items keep their order,
   - so you can sort by several keys, one after the other
     - least important first.
3. \`key\` is called once per item.

| Method | In place | Returns | Time |
|:-------|:--------:|---------|-----:|
| \`sorted(x)\` | no | a new list | 1.25 ms |
| \`x.sort()\` | yes | \`None\` | 0.98 ms |
| \`heapq.nsmallest(3, x)\` | no | the 3 smallest | 12.4 µs |

> Premature optimisation is the root of all evil.
> — Donald Knuth

---

### In the shell

\`\`\`bash
sort -k2,2n pairs.txt | head -n 5   # by the second column
echo "$HOME"
\`\`\`

- [x] read the file
- [ ] write the result

That is *all* you need. ~~Nothing more.~~ 😀 Déjà vu, 漢字.
`;

/** Each would set window.herdWasHere, or ask something of another server, if it ran. */
export const ATTEMPTS = [
  "<script>window.herdWasHere = 1</script>",
  "<img src=x onerror=window.herdWasHere=1>",
  '<img src="https://evil.example/pixel.png">',
  "<svg onload=window.herdWasHere=1><script>window.herdWasHere=1</script></svg>",
  '<iframe srcdoc="<script>parent.herdWasHere=1</script>"></iframe>',
  '<a href="javascript:window.herdWasHere=1">click</a>',
  '<style>@import "https://evil.example/x.css";</style><link rel=stylesheet href=https://evil.example/y.css>',
  '<meta http-equiv="refresh" content="0;url=https://evil.example/">',
  "<form action=https://evil.example/><button>go</button></form>",
  '<details open ontoggle="window.herdWasHere=1">x</details>',
  "[click](javascript:window.herdWasHere=1)",
  "[click](JaVaScRiPt:window.herdWasHere=1)",
  "[click](java\tscript:window.herdWasHere=1)",
  "[click](java\nscript:window.herdWasHere=1)",
  "[click]( javascript:window.herdWasHere=1)",
  "[click](\u0001javascript:window.herdWasHere=1)",
  "[click](&#106;avascript:window.herdWasHere=1)",
  "[click](javascript&colon;window.herdWasHere=1)",
  "[click](javascript&#58;window.herdWasHere=1)",
  "[click](<javascript:window.herdWasHere=1>)",
  "[click](//evil.example/path)",
  "[click](/v1/models)",
  "[click](data:text/html,<script>window.herdWasHere=1</script>)",
  "[click](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
  "[click](vbscript:msgbox)",
  "[click](file:///etc/passwd)",
  "[click](blob:http://evil.example/x)",
  "[click](https:javascript:window.herdWasHere=1)",
  '[click](https://ok.example/" onmouseover="window.herdWasHere=1)',
  "[click](https://ok.example/ 'x' onclick=window.herdWasHere=1)",
  '[a](https://ok.example/"onmouseover="window.herdWasHere=1)',
  "[<img src=x onerror=window.herdWasHere=1>](https://ok.example/)",
  "[[click](javascript:window.herdWasHere=1)](https://ok.example/)",
  "![alt](https://evil.example/pixel.png)",
  "![alt](javascript:window.herdWasHere=1)",
  '![" onerror="window.herdWasHere=1](x)',
  "<javascript:window.herdWasHere=1>",
  "<https://ok.example/<script>window.herdWasHere=1</script>>",
  "https://ok.example/<script>window.herdWasHere=1</script>",
  'https://ok.example/"onmouseover="window.herdWasHere=1',
  "`</code><script>window.herdWasHere=1</script>`",
  "```\n</code></pre><script>window.herdWasHere=1</script>\n```",
  "```\"><script>window.herdWasHere=1</script>\nx\n```",
  "```html\n<img src=x onerror=window.herdWasHere=1>\n<!-- --><script>window.herdWasHere=1</script>\n```",
  "```js\" onclick=\"window.herdWasHere=1\ncode\n```",
  "~~~\n```\n<script>window.herdWasHere=1</script>\n~~~",
  "| <script>window.herdWasHere=1</script> | b |\n|---|---|\n| <img src=x onerror=window.herdWasHere=1> | [x](javascript:1) |",
  "> <script>window.herdWasHere=1</script>\n\n- <img src=x onerror=window.herdWasHere=1>",
  "# <img src=x onerror=window.herdWasHere=1>",
  "&lt;script&gt;window.herdWasHere=1&lt;/script&gt;",
  "<scr<script>ipt>window.herdWasHere=1</scr</script>ipt>",
  "<!--<script>--><script>window.herdWasHere=1</script>",
  "<math><mtext><table><mglyph><style><img src=x onerror=window.herdWasHere=1>",
  "\u202e<script>window.herdWasHere=1</script>",
  "[https://bank.example/\u202emoc.elpmaxe.live//:sptth](https://evil.example/)",
  "```py\u202egpj.exe\naccess = 'user\u202e \u2066# only for admins\u2069 \u2066'\n```",
  "__proto__ [constructor](prototype) {{constructor.constructor('window.herdWasHere=1')()}} ${window.herdWasHere=1}",
];
