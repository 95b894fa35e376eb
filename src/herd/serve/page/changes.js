// ── Changing conversations ─────────────────────────────────────────────────────────────────────────────────

function open(chat) {
  Object.assign(state, { chat, editing: null });
  $("input").value = draftOf(chat);
  fit($("input"));
  showInAddress();
  draw();
  follow();
}

/** The conversation that has not begun: whoever comes back to it finds what was typed and set there. */
function freshChat() {
  return (state.fresh ??= newChat());
}

function startChat() {
  if (state.chat.messages.length) open(freshChat());
  if (isNarrow.matches) showSidebar(false);
  $("input").focus();
}

/** Removes what comes after a message; it can be brought back. */
function cutAfter(chat, at, what) {
  const before = structuredClone(chat.messages);
  chat.messages.length = at + 1;
  toast(`${what}.`, () => restore(chat, before));
}

/** Brings back a conversation, or the messages it had. Those that it has now can be brought back in turn. */
function restore(chat, messages = null) {
  stop(chat);
  const now = chat.messages;
  chat.messages = messages ?? now;
  chats.set(chat.id, chat);
  saveChat(chat);
  open(chat);
  if (messages) toast("Undone.", () => restore(chat, now));
  else announce("Undone.");
}

/** Sends a message in other words. */
function resend(chat, message, content) {
  const at = chat.messages.indexOf(message);
  if (!content.trim() || at < 0) return;
  stop(chat);
  state.editing = null;
  cutAfter(chat, at, "Message changed");
  chat.messages[at] = asked(content);
  answer(chat);
  $("input").focus();
}

/** Deletes a message: a question with its answer, or one version of an answer. */
function deleteMessage(chat, message) {
  stop(chat);
  const at = chat.messages.indexOf(message);
  if (at < 0) return;
  const before = structuredClone(chat.messages);
  const hasAnswer = message.role === "user" && chat.messages[at + 1]?.role === "assistant";
  if (message.versions?.length > 1) {
    message.versions.splice(message.shown, 1);
    message.shown = Math.min(message.shown, message.versions.length - 1);
  } else {
    chat.messages.splice(at, hasAnswer ? 2 : 1);
  }
  saveChat(chat);
  draw();
  toast(message.role === "user" ? "Message deleted." : "Answer deleted.", () => restore(chat, before));
  $("input").focus();
}

function deleteChat(chat) {
  stop(chat);
  forgetChat(chat);
  if (chat === state.chat) open(sorted()[0] ?? freshChat());
  else draw();
  toast(`Deleted “${oneLine(chat.title, 40)}”.`, () => restore(chat));
}

function rename(chat, title) {
  state.renaming = null;
  if (oneLine(title)) Object.assign(chat, { title: oneLine(title), isNamed: true });
  saveChat(chat);
  draw();
}

/** The address names the conversation, so that reloading, going back and bookmarks work. */
function showInAddress() {
  const hash = chats.has(state.chat.id) ? `#${state.chat.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
}

function openFromAddress() {
  const chat = chats.get(location.hash.slice(1));
  if (chat && chat !== state.chat) open(chat);
  else if (!state.chat || (!location.hash && state.chat.messages.length)) open(freshChat());
}

/** Another tab has changed a conversation, begun one or deleted it. */
function onStorage({ key, newValue }) {
  if (!key?.startsWith(CHAT_ENTRY)) return;
  const id = key.slice(CHAT_ENTRY.length);
  const chat = state.chat.id === id ? state.chat : chats.get(id);
  const told = parseChat(id, newValue);
  if (newValue === null) leave(chat);
  else if (told && (runs.has(chat) || state.unsaved.has(chat))) split(chat, told);
  else if (told && chat) takeOver(chat, told);
  else if (told) chats.set(id, told);
  draw();
}

/** What another tab has deleted is kept by nobody; whoever reads it here still can. */
function leave(chat) {
  if (!chat) return;
  chats.delete(chat.id);
  state.unsaved.delete(chat);
  if (runs.has(chat)) writeStored("localStorage", CHAT_ENTRY + chat.id, null); // an answer may have been saved before this was known
  stop(chat);
}

/** Two tabs write in one conversation: what this one has goes on under a name of its own, so that neither is lost. */
function split(chat, told) {
  chats.set(told.id, told);
  chat.id = newId();
  chats.set(chat.id, chat);
  saveChat(chat);
  if (chat === state.chat) history.replaceState(null, "", `#${chat.id}`);
  toast("Another tab has written in this conversation. Both are kept.");
}

/** Makes a conversation what it is in another tab. Messages that are the same stay the same objects. */
function takeOver(chat, told) {
  told.messages = told.messages.map((message, i) => {
    const known = chat.messages[i];
    if (known) keys.set(message, keyOf(known)); // an answer that grows keeps its element
    return JSON.stringify(known) === JSON.stringify(message) ? known : message;
  });
  chats.set(chat.id, Object.assign(chat, told));
  if (chat === state.chat && !chat.messages.includes(state.editing)) state.editing = null;
}

// ── Import and export ──────────────────────────────────────────────────────────────────────────────────────

const FILE_FORMAT = "herd-conversations";
const MOST_FILE_BYTES = 50_000_000;

function exportChats() {
  if (!chats.size) return toast("There are no conversations to export yet.");
  const content = { format: FILE_FORMAT, version: 1, exported: new Date().toISOString(), chats: sorted() };
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  anchor.download = `herd-conversations-${content.exported.slice(0, 10)}.json`;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 10_000);
}

/** Takes in all conversations of a file or none. One that is here already, in other words, gets a new identifier. */
async function importChats(file) {
  try {
    demand(file.size <= MOST_FILE_BYTES, "It", "smaller than 50 MB");
    const found = parseExport(await file.text());
    const fresh = found.filter((chat) => JSON.stringify(chats.get(chat.id)) !== JSON.stringify(chat));
    for (const chat of fresh) {
      if (chats.has(chat.id)) chat.id = newId();
      chats.set(chat.id, chat);
      saveChat(chat);
    }
    draw();
    const same = found.length - fresh.length;
    toast(`${plural(fresh.length, "conversation")} imported${same ? `, ${number(same)} there already` : ""}.`);
  } catch (error) {
    toast(`The file was not imported. ${oneLine(error.message, 300)}.`);
  }
}

function parseExport(content) {
  const value = parseOr(null, content, (parsed) => parsed);
  demand(value !== null, "It", "JSON");
  demand(value.format === FILE_FORMAT && value.version === 1, "It", "an export of this page");
  const found = listOf(cleanChat, 10_000)(value.chats, "chats");
  demand(new Set(found.map((chat) => chat.id)).size === found.length, "chats", "a list of different conversations");
  return found.filter((chat) => chat.messages.length);
}
