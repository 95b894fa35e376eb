// ── Keyboard ───────────────────────────────────────────────────────────────────────────────────────────────

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);
const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

/** A handler of keys by their names; what it handles goes no further, unless its function returns false. */
const keyed = (handlers) => (event) => {
  const handler = event.key !== "Enter" || isEnter(event) ? handlers[event.key] : null;
  if (!handler || handler(event) === false) return;
  event.preventDefault();
  event.stopPropagation();
};

/** How keys are called here. On a Mac, Option with a letter writes ñ, ç or ś: shortcuts have Control beside it. */
const named = (keys) => (isMac ? keys.replace("Alt+", "⌃⌥").replace("Ctrl+", "⌘") : keys);

/** Whether an event is "Alt+N" and the like. Keys count by their place, as Alt gives other letters on some keyboards. */
function isPressed(keys, { code, altKey, ctrlKey, metaKey }) {
  const [modifier, letter] = keys.split("+");
  if (code !== `Key${letter}`) return false;
  return modifier === "Alt" ? altKey && ctrlKey === isMac && !metaKey : (isMac ? metaKey : ctrlKey) && !altKey;
}

/** What works anywhere on the page: keys, what they do, how. */
const SHORTCUTS = [
  ["Alt+N", "New conversation", startChat],
  ["Ctrl+K", "Search conversations", () => (showSidebar(true), $("search").focus())],
  ["Alt+J", "Next conversation", () => stepChat(1)],
  ["Alt+K", "Previous conversation", () => stepChat(-1)],
  ["Alt+R", "Answer again", () => withLastAnswer((message) => answerAgain(state.chat, message))],
  ["Alt+C", "Copy the last answer", () => withLastAnswer((message) => copy(shownVersion(message).text))],
  ["Alt+Z", "Undo the last deletion", () => undo()],
  ["Alt+S", "Settings of this conversation", showSettings],
  ["Alt+B", "Show or hide conversations", toggleSidebar],
  ["Alt+T", "Light, dark or as the system", nextTheme],
  ["Alt+H", "This list", () => $("help-dialog").showModal()],
];
const OTHER_KEYS = [
  ["Enter", "Send"],
  ["Shift+Enter", "New line"],
  ["Esc", "Stop the answer, close, cancel"],
  ["↑", "In an empty message: edit the last one"],
  ["F2 · Del", "In the list: rename, delete"],
];

function drawShortcuts() {
  const row = ([names, what]) => h("tr", null, h("td", null, what), h("td", null, h("kbd", null, named(names))));
  render($("keys"), [...OTHER_KEYS, ...SHORTCUTS].map(row));
  $("help-key").textContent = named("Alt+H");
}

function onKey(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const shortcut = SHORTCUTS.find(([names]) => isPressed(names, event));
  if (shortcut) event.preventDefault();
  if (shortcut) shortcut[2]();
  else if (event.key === "Escape") onEscape(event);
}

function onEscape(event) {
  if (runs.has(state.chat)) return stop(state.chat);
  if (isNarrow.matches && document.body.dataset.sidebar === "open") return toggleSidebar();
  if (event.target === $("search")) $("search").value = state.search = "";
  drawSidebar();
  $("input").focus();
}

function editLast() {
  const question = state.chat.messages.findLast((each) => each.role === "user");
  if ($("input").value || !question) return false;
  startEditing(question);
}

function submit() {
  if (runs.has(state.chat)) announce("The answer is still being written.");
  else if (send($("input").value)) $("input").value = "";
  fit($("input"));
  drawComposer();
}

function withLastAnswer(act) {
  const message = last(state.chat.messages);
  if (message?.role === "assistant" && !runs.has(state.chat)) act(message);
}

function stepChat(by) {
  const all = shownChats();
  const chat = all[clamp(all.indexOf(state.chat) + by, 0, all.length - 1)];
  if (!chat || chat === state.chat) return;
  open(chat);
  announce(chat.title);
}
