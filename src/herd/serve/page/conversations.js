// ── Conversations ──────────────────────────────────────────────────────────────────────────────────────────
// What comes from storage or a file is copied field by field, so nothing gets in that is not named here. A rule takes a
// value and its path, and returns what is kept of it or raises an Error that says where it is not what it should be.

/** name → [least, most, step]; a step of 1 means whole numbers. null stands for what the server has as its default. */
const NUMBERS = {
  temperature: [0, 10, 0.1], top_p: [0, 1, 0.05], top_k: [0, 1_000_000, 1], min_p: [0, 1, 0.01],
  max_tokens: [1, 1_000_000_000, 1], seed: [0, Number.MAX_SAFE_INTEGER, 1],
};
const MOST_STOPS = 16;
const NEW_TITLE = "New conversation";

function demand(condition, path, expected) {
  if (!condition) throw new Error(`${path} is not ${expected}`);
}

function text(value, path) {
  demand(typeof value === "string", path, "a text");
  return value;
}

const short = (value, path) => oneLine(text(value, path), 300);
const oneOf = (...values) => (value, path) => (demand(values.includes(value), path, values.map((each) => `"${each}"`).join(" or ")), value);
const or = (fallback, rule) => (value, path) => (value === undefined || value === null ? fallback : rule(value, path));

const between = (least, most, step = 0) => (value, path) => {
  const isNumber = typeof value === "number" && value >= least && value <= most && (step !== 1 || Number.isInteger(value));
  demand(isNumber, path, `${step === 1 ? "a whole number" : "a number"} from ${number(least)} to ${number(most)}`);
  return value;
};

const listOf = (rule, most = 100_000) => (value, path) => {
  demand(Array.isArray(value) && value.length <= most, path, "a list");
  return value.map((each, i) => rule(each, `${path}[${i}]`));
};

const record = (rules) => (value, path) => {
  demand(isObject(value), path, "an object");
  return Object.fromEntries(Object.entries(rules).map(([name, rule]) => [name, rule(value[name], `${path}.${name}`)]));
};

const figure = or(null, between(0, Number.MAX_SAFE_INTEGER));
const cleanSettings = record({
  model: or("", short),
  system: or("", text),
  stop: or([], listOf(text, MOST_STOPS)),
  ...Object.fromEntries(Object.entries(NUMBERS).map(([name, range]) => [name, or(null, between(...range))])),
});
/** One for each time an answer was generated. `finish` is the server's reason for the end, or "stopped". */
const cleanVersion = record({
  text,
  model: or("", short),
  finish: or(null, short),
  error: or(null, record({ kind: oneOf("gone", "key", "busy", "long", "other"), message: text })),
  stats: or(null, record({ prompt: figure, completion: figure, first: figure, speed: figure })),
});
const cleanQuestion = record({ role: oneOf("user"), text });
const cleanAnswer = record({ role: oneOf("user", "assistant"), versions: listOf(cleanVersion, 1000), shown: or(0, between(0, 999, 1)) });
const cleanContent = record({
  id: (value) => (typeof value === "string" && /^[0-9a-z]{8,40}$/.test(value) ? value : newId()),
  title: (value, path) => oneLine(or(NEW_TITLE, text)(value, path)) || NEW_TITLE,
  isNamed: (value) => value === true,
  updated: or(0, between(0, 8e15)),
  settings: or(cleanSettings({}), cleanSettings),
  messages: listOf((value, path) => (value?.role === "user" ? cleanQuestion : cleanAnswer)(value, path)),
});

function cleanChat(value, path) {
  const chat = cleanContent(value, path);
  chat.messages.forEach((message, i) => {
    demand(message.role === "user" || message.shown < message.versions.length, `${path}.messages[${i}].shown`, "one of the versions");
  });
  return chat;
}

const newVersion = (model) => cleanVersion({ text: "", model }, "version");
const newChat = () => cleanChat({ updated: Date.now(), settings: preferences.settings, messages: [] }, "chat");
const shownVersion = (message) => message.versions[message.shown];

// ── What the browser keeps ─────────────────────────────────────────────────────────────────────────────────
// localStorage has one entry for each conversation, one for what is typed there and not sent, and one for preferences;
// nothing else is stored, save the API key until the tab is closed. Storage may be full or forbidden: then the page goes
// on in memory and says so.

const CHAT_ENTRY = "herd.chat.";
const DRAFT_ENTRY = "herd.draft.";
const PREFERENCES_ENTRY = "herd.preferences";
const KEY_ENTRY = "herd.key";

const readStored = (storage, name) => attempt(() => window[storage].getItem(name), null);
/** Keeps a text, or forgets it where it is null. Returns whether that worked. */
const writeStored = (storage, name, text) => attempt(() => {
  if (text === null) window[storage].removeItem(name);
  else window[storage].setItem(name, text);
  return true;
}, false);
/** What cannot be read stays where it is: a newer version of this page may be able to. */
const parseOr = (fallback, text, clean) => attempt(() => clean(JSON.parse(text), "it"), fallback);

/** A conversation as it is stored; null where it cannot be read or stands in another one's place. */
function parseChat(id, text) {
  const chat = parseOr(null, text, cleanChat);
  return chat?.id === id ? chat : null;
}

function readChats() {
  const names = attempt(() => Object.keys(localStorage), []);
  for (const name of names.filter((each) => each.startsWith(CHAT_ENTRY))) {
    const chat = parseChat(name.slice(CHAT_ENTRY.length), readStored("localStorage", name));
    if (chat) chats.set(chat.id, chat);
  }
}

function saveChat(chat) {
  if (!chats.has(chat.id)) return;
  if (writeStored("localStorage", CHAT_ENTRY + chat.id, JSON.stringify(chat))) state.unsaved.delete(chat);
  else state.unsaved.add(chat);
  drawBanners();
}

function forgetChat(chat) {
  chats.delete(chat.id);
  for (const entry of [CHAT_ENTRY, DRAFT_ENTRY]) writeStored("localStorage", entry + chat.id, null);
  state.unsaved.delete(chat);
  for (const each of [...state.unsaved]) saveChat(each); // there is more room now
}

const drafts = new WeakMap(); // conversation → what is typed there and not sent
const draftOf = (chat) => drafts.get(chat) ?? readStored("localStorage", DRAFT_ENTRY + chat.id) ?? "";

function keepDraft(chat, text) {
  drafts.set(chat, text);
  if (chats.has(chat.id)) writeStored("localStorage", DRAFT_ENTRY + chat.id, text || null);
}

const cleanPreferences = record({ theme: oneOf("auto", "light", "dark"), settings: cleanSettings });
const atFirst = { theme: "auto", settings: cleanSettings({}) };
const preferences = parseOr(atFirst, readStored("localStorage", PREFERENCES_ENTRY), cleanPreferences);
const savePreferences = () => writeStored("localStorage", PREFERENCES_ENTRY, JSON.stringify(preferences));

// ── State ──────────────────────────────────────────────────────────────────────────────────────────────────

const chats = new Map(); // id → conversation
const runs = new Map(); // conversation → the answer being written: { chat, message, version, controller, wait, saved }
const state = {
  chat: null, // the one that is shown
  fresh: null, // one that has not begun and is not among `chats` yet
  models: [], // [{ id, context }]
  key: readStored("sessionStorage", KEY_ENTRY) ?? "",
  gone: null, // while the server cannot be reached or does not say its models: { message, pause, timer }
  unsaved: new Set(), // conversations that storage had no room for
  editing: null, // the message that is being edited
  renaming: null, // the conversation that is being renamed
  search: "",
};

const modelOf = (chat) => state.models.find((model) => model.id === chat.settings.model) ?? state.models[0] ?? null;
const sorted = () => [...chats.values()].sort((a, b) => b.updated - a.updated);
