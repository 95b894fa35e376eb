// ── Drawing ────────────────────────────────────────────────────────────────────────────────────────────────

const LEAST_PAUSE = 30; // ms between two drawings of an answer that grows
const isNarrow = matchMedia("(max-width: 48rem)");

function draw() {
  drawSidebar();
  drawBar();
  drawMessages();
  drawComposer();
  drawBanners();
}

let isPlanned = false;
let pause = LEAST_PAUSE;

/** Draws an answer that grows, so seldom that drawing never takes more than a quarter of the time. */
function drawSoon() {
  if (isPlanned) return;
  isPlanned = true;
  setTimeout(() => {
    isPlanned = false;
    const started = performance.now();
    drawMessages();
    pause = Math.max(LEAST_PAUSE, 3 * (performance.now() - started));
  }, pause);
}

const icon = (name, kind = "") => h("svg", { class: `icon ${kind}`.trim(), "aria-hidden": "true" }, h("use", { href: `#i-${name}` }));

function tool(name, label, onclick, more = {}) {
  return h("button", { class: "tool", type: "button", "aria-label": label, title: label, onclick, ...more }, icon(name));
}

const button = (label, onclick, kind = "") => h("button", { class: `button ${kind}`.trim(), type: "button", onclick }, label);

/** A button that copies what `text()` gives; its sign is a tick for a moment. */
function copyButton(text, label, words) {
  const onclick = (event) => copy(text(), event.currentTarget);
  const properties = { class: "tool", type: "button", "aria-label": label, title: words ? null : label, onclick };
  return h("button", properties, icon("copy", "todo"), icon("check", "done"), words ?? null);
}

async function copy(text, element) {
  const isCopied = await navigator.clipboard?.writeText(text).then(() => true, () => false) || copyTheOldWay(text);
  if (!isCopied) return toast("The browser did not allow copying.");
  announce("Copied.");
  if (!element) return;
  element.dataset.copied = "";
  setTimeout(() => delete element.dataset.copied, 1500);
}

/** For pages that are not served securely, where there is no navigator.clipboard. */
function copyTheOldWay(text) {
  const focused = document.activeElement;
  const area = Object.assign(document.createElement("textarea"), { className: "unseen", value: text });
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isCopied;
}

// ── The list of conversations ──────────────────────────────────────────────────────────────────────────────

const shownChats = () => sorted().filter((chat) => hasWords(chat, state.search.trim().toLowerCase()));
const listButtons = () => [...$("chats").querySelectorAll(".open")];

function hasWords(chat, words) {
  const texts = chat.messages.map((message) => message.text ?? shownVersion(message)?.text ?? "");
  return !words || [chat.title, ...texts].some((each) => each.toLowerCase().includes(words));
}

function drawSidebar() {
  const nothing = state.search ? "Nothing found." : "Conversations appear here. They are kept in this browser only.";
  const items = shownChats().map(chatItem);
  render($("chats"), items.length ? items : [h("li", { class: "none", key: "none" }, nothing)]);
}

function chatItem(chat) {
  const isCurrent = chat === state.chat;
  const kind = isCurrent ? "current" : null;
  if (chat === state.renaming) return h("li", { key: `${chat.id} name`, class: kind }, nameField(chat));
  return h("li", { key: chat.id, class: kind },
    h("button", { class: "open", type: "button", title: chat.title, "aria-current": isCurrent ? "true" : null, onclick: () => choose(chat) },
      h("span", { dir: "auto" }, chat.title),
      runs.has(chat) && !isCurrent ? h("span", { class: "waiting", role: "img", "aria-label": "being answered" }) : null),
    h("span", { class: "tools" },
      tool("edit", "Rename", () => startRenaming(chat), { title: "Rename (F2)" }),
      tool("trash", "Delete", () => deleteFromList(chat), { title: "Delete (Del)" })));
}

function choose(chat) {
  if (chat !== state.chat) open(chat);
  if (isNarrow.matches) showSidebar(false);
  $("input").focus();
}

const chooseFirst = () => shownChats().length > 0 && choose(shownChats()[0]);

function nameField(chat) {
  const end = (title) => {
    rename(chat, title);
    focusInList(shownChats().indexOf(chat));
  };
  const onkeydown = keyed({ Enter: (event) => end(event.target.value), Escape: () => end("") });
  const onblur = (event) => state.renaming === chat && rename(chat, event.target.value);
  return h("input", { class: "field", value: chat.title, maxlength: 80, "aria-label": "New name", onkeydown, onblur });
}

function startRenaming(chat) {
  state.renaming = chat;
  drawSidebar();
  $("chats").querySelector("input").focus();
  $("chats").querySelector("input").select();
}

function deleteFromList(chat) {
  const at = shownChats().indexOf(chat);
  deleteChat(chat);
  if (listButtons().length) focusInList(at);
  else $("input").focus();
}

function focusInList(at) {
  listButtons()[clamp(at, 0, listButtons().length - 1)]?.focus();
}

function keyInList(event) {
  const at = listButtons().indexOf(event.target);
  if (at < 0) return;
  keyed({
    ArrowDown: () => focusInList(at + 1),
    ArrowUp: () => (at === 0 ? $("search").focus() : focusInList(at - 1)),
    Home: () => focusInList(0),
    End: () => focusInList(Infinity),
    F2: () => startRenaming(shownChats()[at]),
    Delete: () => deleteFromList(shownChats()[at]),
  })(event);
}

function search() {
  state.search = $("search").value;
  drawSidebar();
  announce(`${plural(shownChats().length, "conversation")}.`);
}

function showSidebar(isShown) {
  document.body.dataset.sidebar = isShown ? "open" : "closed";
  $("main").inert = isShown && isNarrow.matches;
}

function toggleSidebar() {
  const isShown = document.body.dataset.sidebar !== "open";
  showSidebar(isShown);
  $(isShown ? "new-chat" : "show-sidebar").focus();
}

// ── Messages ───────────────────────────────────────────────────────────────────────────────────────────────

function drawMessages() {
  const { chat } = state;
  const messages = chat.messages.map((message) => (message.role === "user" ? question(chat, message) : reply(chat, message)));
  render($("messages"), chat.messages.length ? [systemPrompt(chat), ...messages].flat() : [welcome()]);
  keepAtEnd();
}

function systemPrompt({ settings }) {
  const text = oneLine(settings.system, 200);
  const properties = { class: "system", type: "button", title: "Change the system prompt", onclick: showSettings };
  return text ? [h("li", { key: "system" }, h("button", properties, `System prompt: ${text}`))] : [];
}

function welcome() {
  const model = modelOf(state.chat);
  const room = model?.context ? ` · ${number(model.context)} tokens of context` : "";
  return h("li", { class: "welcome", key: "welcome" },
    h("h2", null, "What would you like to know?"),
    model ? h("p", null, oneLine(model.id) + room) : null);
}

const keys = new WeakMap(); // message → the key of its element

function keyOf(message) {
  if (!keys.has(message)) keys.set(message, newId());
  return keys.get(message);
}

function question(chat, message) {
  if (message === state.editing) return editor(chat, message);
  return h("li", { class: "message user", key: keyOf(message) },
    h("h2", { class: "unseen" }, "You"),
    h("div", { class: "bubble", dir: "auto" }, nodesOf(message, false, typed)),
    h("div", { class: "foot" },
      message === last(chat.messages) ? tool("again", "Answer this", () => answer(chat)) : null,
      tool("edit", "Edit", () => startEditing(message)),
      copyButton(() => message.text, "Copy"),
      tool("trash", "Delete", () => deleteMessage(chat, message))));
}

const editField = () => $("messages").querySelector(".edit textarea");

function editor(chat, message) {
  const cutsOff = chat.messages.indexOf(message) < chat.messages.length - 2;
  const resendField = () => resend(chat, message, editField().value);
  const onkeydown = keyed({ Enter: resendField, Escape: stopEditing });
  const oninput = () => fit(editField());
  return h("li", { class: "message user", key: `${keyOf(message)} edit` },
    h("div", { class: "edit" },
      h("textarea", { value: message.text, rows: 2, "aria-label": "Change the message", dir: "auto", onkeydown, oninput }),
      h("div", { class: "row" },
        h("p", null, cutsOff ? "What follows will be removed." : ""),
        button("Cancel", stopEditing),
        button("Send", resendField, "main"))));
}

function startEditing(message) {
  state.editing = message;
  drawMessages();
  fit(editField());
  editField().focus();
  editField().setSelectionRange(message.text.length, message.text.length);
}

function stopEditing() {
  const at = state.chat.messages.indexOf(state.editing);
  state.editing = null;
  drawMessages();
  $("messages").querySelectorAll(".message")[at]?.querySelector('[aria-label="Edit"]')?.focus();
}

const trees = new WeakMap(); // what has a text → { text, partial, cache, nodes }: a text is read again only when it changed

function nodesOf(owner, partial, read) {
  const { text } = owner;
  const known = trees.get(owner);
  if (known?.text === text && known.partial === partial) return known.nodes;
  const cache = known?.cache ?? new Map();
  const nodes = read(text, partial, cache);
  trees.set(owner, { text, partial, cache, nodes });
  return nodes;
}

function reply(chat, message) {
  const version = shownVersion(message);
  const run = runs.get(chat);
  const isWritten = run?.message === message && run.version === version;
  const waiting = h("div", { class: "foot", key: "busy" }, isWritten && !run.wait ? h("span", { class: "waiting" }) : null);
  return h("li", { class: "message assistant", key: keyOf(message), "aria-busy": isWritten ? "true" : null },
    h("h2", { class: "unseen" }, `Answer${version.model ? ` of ${oneLine(version.model)}` : ""}`),
    h("div", { class: "prose" }, nodesOf(version, isWritten, markdown)),
    isWritten && run.wait ? waitingNote(chat, run.wait) : null,
    isWritten ? null : endNote(version),
    version.error ? problem(chat, message, version.error) : null,
    isWritten ? waiting : replyFoot(chat, message, version));
}

function replyFoot(chat, message, version) {
  const isLast = message === last(chat.messages);
  const hint = { title: isLast ? `Answer again (${named("Alt+R")})` : "Answer again; removes what follows" };
  return h("div", { class: "foot", key: "done" },
    message.versions.length > 1 ? versionSwitch(chat, message) : null,
    version.text ? copyButton(() => version.text, "Copy") : null,
    tool("again", "Answer again", () => answerAgain(chat, message), hint),
    tool("trash", message.versions.length > 1 ? "Delete this version" : "Delete", () => deleteMessage(chat, message)),
    h("span", { class: "figures" }, figuresOf(version)));
}

function versionSwitch(chat, message) {
  const { shown: at, versions: { length } } = message;
  const step = (by) => () => {
    message.shown = clamp(message.shown + by, 0, message.versions.length - 1);
    saveChat(chat);
    draw();
    announce(`Version ${message.shown + 1} of ${message.versions.length}.`);
  };
  return h("span", { class: "versions", role: "group", "aria-label": "Versions of this answer" },
    tool("left", "Earlier version", step(-1), { "aria-disabled": at === 0 ? "true" : null }),
    `${at + 1} / ${length}`,
    tool("right", "Later version", step(1), { "aria-disabled": at === length - 1 ? "true" : null }));
}

function figuresOf({ stats, model }) {
  const parts = [];
  if (model && model !== modelOf(state.chat)?.id) parts.push(oneLine(model, 40));
  if (stats?.completion) parts.push(plural(stats.completion, "token"));
  if (stats?.speed) parts.push(`${stats.speed < 100 ? stats.speed.toFixed(1) : number(Math.round(stats.speed))} tokens/s`);
  if (Number.isFinite(stats?.first)) parts.push(`first after ${stats.first.toFixed(2)} s`);
  return parts.join(" · ");
}

const END_NOTES = new Map([
  ["length", "Ended at the limit of tokens."],
  ["content_filter", "Ended by the server's guard."],
  ["stopped", "Stopped."],
  [null, "Broken off, or still being written in another tab."],
]);

function endNote({ finish, error }) {
  const note = error ? null : END_NOTES.get(finish);
  return note && h("p", { class: "note" }, note);
}

function waitingNote(chat, { message, until, now }) {
  const seconds = Math.max(1, Math.ceil((until - Date.now()) / 1000));
  return h("div", { class: "problem" },
    h("p", null, `${message} Trying again in ${seconds} s.`),
    button("Try now", now),
    button("Give up", () => stop(chat)));
}

function problem(chat, message, error) {
  const way = error.kind === "long" ? button("New conversation", startChat) : button("Try again", () => answerAgain(chat, message));
  return h("div", { class: "problem" }, h("p", null, error.message), way);
}

// ── Around the messages ────────────────────────────────────────────────────────────────────────────────────

function drawBar() {
  const { chat, models } = state;
  const title = chat.messages.length || chat.isNamed ? chat.title : "";
  const current = modelOf(chat);
  document.title = title ? `${title} · Herd` : "Herd";
  Object.assign($("title"), { textContent: title || "Herd", dir: "auto" });
  render($("model"), models.map((model) => h("option", { value: model.id, key: model.id }, oneLine(model.id))));
  Object.assign($("model"), { hidden: !models.length, value: current?.id ?? "" });
  $("input").placeholder = current ? `Message ${oneLine(current.id, 40)}` : "Message";
}

function drawComposer() {
  const isRunning = runs.has(state.chat);
  if (!isRunning && document.activeElement === $("stop")) $("input").focus();
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("send").ariaDisabled = String(!$("input").value.trim());
  render($("context"), contextOf(state.chat));
}

/** How full the model's context is, as far as the last answer's usage says. */
function contextOf(chat) {
  const stats = chat.messages.map((message) => message.versions && shownVersion(message)?.stats).findLast((each) => each?.prompt);
  if (!stats) return [];
  const room = modelOf(chat)?.context;
  const used = stats.prompt + (stats.completion ?? 0);
  if (!room) return [h("span", null, plural(used, "token"))];
  const percent = Math.min(100, (100 * used) / room);
  const meter = { role: "img", "aria-label": `Context ${Math.round(percent)} % full`, class: percent > 90 ? "tight" : null };
  const bar = h("rect", { width: `${percent.toFixed(1)}%`, height: "100%" });
  return [h("svg", meter, bar), h("span", null, `${number(used)} of ${number(room)} tokens`)];
}

function drawBanners() {
  const banner = (text, label, onclick) => h("div", { class: "banner", key: label }, h("p", null, text), button(label, onclick));
  const hadFocus = $("banners").contains(document.activeElement);
  const full = "The browser has no room for this conversation: it is lost when the page is closed. Export it, or delete others.";
  render($("banners"), [
    ...(state.gone ? [banner(`${state.gone.message} What you wrote is kept; the page goes on trying.`, "Retry", retryServer)] : []),
    ...(state.unsaved.size ? [banner(full, "Export", exportChats)] : []),
  ]);
  if (hadFocus && !$("banners").contains(document.activeElement)) $("input").focus();
}

// Scrolling: the end stays in view while an answer grows, until the reader scrolls up.

let isFollowing = true;
let lastTop = 0;

const distanceToEnd = () => $("scroller").scrollHeight - $("scroller").clientHeight - $("scroller").scrollTop;

function follow() {
  isFollowing = true;
  keepAtEnd();
}

function keepAtEnd() {
  if (isFollowing) $("scroller").scrollTop = $("scroller").scrollHeight;
  $("to-end").hidden = isFollowing || distanceToEnd() < 80;
}

function onScroll() {
  const top = $("scroller").scrollTop;
  if (distanceToEnd() < 4) isFollowing = true;
  else if (top < lastTop) isFollowing = false;
  lastTop = top;
  $("to-end").hidden = isFollowing || distanceToEnd() < 80;
}
