// ── Telling the reader ─────────────────────────────────────────────────────────────────────────────────────

const TOAST_TIME = 10_000; // ms
const MOST_READ = 1500; // characters of an answer that are read aloud
const toasts = []; // { text, undo, key }

/** Has a screen reader say something when it has nothing else to say. */
function announce(text) {
  $("live").textContent = "";
  setTimeout(() => ($("live").textContent = text), 50);
}

function announceAnswer(version) {
  const text = textOf(nodesOf(version, false, markdown)).trim();
  const read = text.length > MOST_READ ? `${text.slice(0, MOST_READ)} … The answer goes on.` : text;
  if (version.error) announce(`${read} ${version.error.message}`);
  else announce(version.finish === "stopped" ? "Stopped." : `Answer: ${read}`);
}

/** Says something for a while, and may offer to undo it. */
function toast(text, undo = null) {
  const entry = { text, undo, key: newId() };
  toasts.push(entry);
  toasts.splice(0, toasts.length - 3);
  drawToasts();
  // Whoever points at it or has it in focus is still reading.
  const end = () => ($("toasts").matches(":hover, :focus-within") ? setTimeout(end, 1000) : endToast(entry));
  setTimeout(end, TOAST_TIME);
}

function endToast(entry) {
  const hadFocus = $("toasts").contains(document.activeElement);
  toasts.splice(0, toasts.length, ...toasts.filter((each) => each !== entry));
  drawToasts();
  if (hadFocus) $("input").focus();
}

function undo(entry = toasts.findLast((each) => each.undo)) {
  if (!entry) return;
  endToast(entry);
  entry.undo();
}

function drawToasts() {
  render($("toasts"), toasts.map((entry) => h("div", { class: "toast", key: entry.key },
    h("p", null, entry.text),
    entry.undo ? h("button", { type: "button", title: `Undo (${named("Alt+Z")})`, onclick: () => undo(entry) }, "Undo") : null,
    h("button", { type: "button", onclick: () => endToast(entry) }, entry.undo ? "Dismiss" : "OK"))));
}

// ── Dialogs ────────────────────────────────────────────────────────────────────────────────────────────────
// The browser keeps the focus inside a modal dialog, closes it at Esc and puts the focus back where it was.

function setUpDialog(dialog) {
  const isOutside = ({ clientX: x, clientY: y }, box) => x < box.left || x > box.right || y < box.top || y > box.bottom;
  for (const each of dialog.querySelectorAll(".close")) each.onclick = () => dialog.close();
  dialog.onclick = (event) => {
    if (event.target === dialog && isOutside(event, dialog.getBoundingClientRect())) dialog.close();
  };
}

const fields = $("settings").elements;
const escapeLine = (text) => text.replace(/\\/g, "\\\\").replace(/\n/g, "\\n").replace(/\t/g, "\\t");
const unescapeLine = (text) => text.replace(/\\([nt\\])/g, (_, sign) => ({ n: "\n", t: "\t", "\\": "\\" })[sign]);

function setUpSettings() {
  for (const [name, [min, max, step]] of Object.entries(NUMBERS)) {
    // A step would make 0.123 invalid; only whole numbers need one.
    Object.assign(fields[name], { min, max, step: step === 1 ? 1 : "any", placeholder: "default" });
  }
  $("settings").oninput = readSettings;
  $("settings").onsubmit = (event) => (event.preventDefault(), $("settings-dialog").close());
  $("settings-dialog").onclose = draw;
  $("reset-settings").onclick = () => fillSettings(cleanSettings({ model: state.chat.settings.model }));
  $("keep-settings").onclick = () => {
    preferences.settings = structuredClone(state.chat.settings);
    state.fresh = null;
    toast(`New conversations begin with these settings${savePreferences() ? "" : " until this page is closed"}.`);
    $("settings-dialog").close();
  };
}

function showSettings() {
  fillSettings(state.chat.settings);
  $("settings-dialog").showModal();
  fields.system.focus();
}

function fillSettings(settings) {
  fields.system.value = settings.system;
  fields.stop.value = settings.stop.map(escapeLine).join("\n");
  for (const name of Object.keys(NUMBERS)) fields[name].value = settings[name] ?? "";
  readSettings();
}

/** Takes over every field that is valid; the others are named. */
function readSettings() {
  const { settings } = state.chat;
  const wrong = [];
  const stops = fields.stop.value.split("\n").filter((line) => line !== "").map(unescapeLine);
  settings.system = fields.system.value;
  if (stops.length <= MOST_STOPS) settings.stop = stops;
  else wrong.push(`Stop at takes ${MOST_STOPS} texts at most.`);
  for (const [name, range] of Object.entries(NUMBERS)) {
    const value = fields[name].value === "" && !fields[name].validity.badInput ? null : fields[name].valueAsNumber;
    try {
      settings[name] = or(null, between(...range))(value, fields[name].labels[0].textContent.trim());
    } catch (error) {
      wrong.push(`${error.message}.`);
    }
  }
  for (const field of [fields.system, fields.stop]) fit(field);
  $("settings-problem").textContent = wrong.join(" ");
  saveChat(state.chat);
}

let keyAsked = null; // while the dialog for the API key is open: the promise of whether there is a key now

/** Asks for an API key; every request that needs one meanwhile waits for the same answer. */
function askForKey(message) {
  keyAsked ??= new Promise((resolve) => {
    $("key-problem").textContent = state.key ? message : "";
    keepKey("");
    $("key-dialog").showModal();
    $("key-dialog").onclose = () => {
      keyAsked = null;
      resolve(Boolean(state.key));
    };
  });
  return keyAsked;
}

function keepKey(key) {
  state.key = key;
  $("key").value = "";
  writeStored("sessionStorage", KEY_ENTRY, key || null);
}

function takeKey(event) {
  event.preventDefault();
  const key = $("key").value.trim();
  const isKey = /^[\x21-\x7e]{1,1000}$/.test(key);
  $("key-problem").textContent = isKey ? "" : "A key has letters, digits and signs, and no spaces.";
  if (!isKey) return;
  keepKey(key);
  $("key-dialog").close();
}

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function applyTheme() {
  const label = `Colours: ${THEMES[preferences.theme]}`;
  document.documentElement.dataset.theme = preferences.theme;
  Object.assign($("theme"), { title: `${label} (${named("Alt+T")})`, ariaLabel: label });
  render($("theme"), [icon(preferences.theme)]);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  preferences.theme = names[(names.indexOf(preferences.theme) + 1) % names.length];
  savePreferences();
  applyTheme();
  announce(`Colours: ${THEMES[preferences.theme]}.`);
}
