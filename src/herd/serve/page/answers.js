// ── The server ─────────────────────────────────────────────────────────────────────────────────────────────

const GONE = "The server cannot be reached.";
const SHORTER = "Delete earlier messages, or begin a new conversation.";
const BROKEN_OFF = "The connection broke off before the answer was complete.";

/** `kind` is one of those that cleanVersion names; `wait` says when to try again, in seconds. */
class ServerError extends Error {
  constructor(kind, message, wait = null) {
    super(message);
    Object.assign(this, { kind, wait });
  }
}

async function request(path, options = {}) {
  const headers = options.body ? { "Content-Type": "application/json" } : {};
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" }).catch((error) => {
    throw options.signal?.aborted ? error : new ServerError("gone", GONE);
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw serverError(isObject(body?.error) ? body.error : {}, response.status, secondsOf(response.headers.get("Retry-After")));
}

/** An error as the server tells it, in a response or in a stream. */
function serverError(error, status, wait) {
  const told = typeof error.message === "string" ? error.message.slice(0, 1000) : "";
  const message = told || `The server answered with status ${status}.`;
  if (status === 401) return new ServerError("key", message);
  if (status === 429 || status === 503) return new ServerError("busy", message, wait ?? 5);
  if (error.code === "context_length_exceeded") return new ServerError("long", `This conversation is too long. ${message} ${SHORTER}`);
  return new ServerError("other", message);
}

/** Retry-After is a number of seconds or a date. */
function secondsOf(text) {
  const seconds = /^\d+$/.test(text ?? "") ? Number(text) : (Date.parse(text) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? clamp(Math.ceil(seconds), 1, 3600) : null;
}

/** The data of each event of a stream. Comments, which only say that the server lives, are passed over. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (let isOver = false; !isOver;) {
      const { value, done } = await reader.read();
      isOver = done;
      const lines = (rest + (done ? "\n\n" : value)).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever reads may have had enough
  }
}

/** Asks which models there are; this is also how the page finds out whether the server is back. */
async function loadModels() {
  try {
    const body = await (await request("v1/models")).json().catch(() => ({}));
    const models = Array.isArray(body.data) ? body.data.filter((each) => typeof each?.id === "string") : [];
    state.models = models.map(({ id, context_length: context }) => ({ id, context: context > 0 ? Number(context) : null }));
    serverIsBack();
  } catch (error) {
    if (error.kind !== "key") serverIsGone(error.message);
    else if (await askForKey(error.message)) await loadModels();
  }
  draw();
}

function serverIsBack() {
  if (state.gone) announce("The server is back.");
  clearTimeout(state.gone?.timer);
  state.gone = null;
}

/** Says so, and looks for the server again, less and less often. */
function serverIsGone(message) {
  clearTimeout(state.gone?.timer);
  const pause = Math.min(2 * (state.gone?.pause ?? 1), 30);
  state.gone = { message, pause, timer: setTimeout(loadModels, pause * 1000) };
}

/** Looks for the server at once; when it is back, the question that did not reach it is asked again. */
async function retryServer() {
  await loadModels();
  const message = last(state.chat.messages);
  const hasFailed = message?.role === "assistant" && shownVersion(message).error?.kind === "gone";
  if (!state.gone && hasFailed && !runs.has(state.chat)) answerAgain(state.chat, message);
}

// ── Answers ────────────────────────────────────────────────────────────────────────────────────────────────

const MOST_TRIES = 8; // when the server is busy
const TIME_TO_SAVE = 1000; // ms between two savings of an answer that grows
const LEAST_FOR_SPEED = { tokens: 16, time: 200 }; // ms; of less, which may come in one piece, there is no speed to tell

function send(content) {
  const { chat } = state;
  if (!content.trim() || runs.has(chat)) return false;
  if (!chat.messages.length && !chat.isNamed) chat.title = oneLine(content.replace(/^[\s#]+/, "").split("\n")[0], 60) || NEW_TITLE;
  chat.messages.push(asked(content));
  keepDraft(chat, "");
  answer(chat);
  return true;
}

/** A message without empty lines around it; how far its first line is indented may matter. */
const asked = (content) => ({ role: "user", text: content.replace(/^\s*\n/, "").trimEnd() });

/** Answers the last message of a conversation. */
function answer(chat) {
  chat.messages.push({ role: "assistant", versions: [], shown: 0 });
  write(chat, last(chat.messages));
}

/** One more version of an answer. What came after it is cut off. */
function answerAgain(chat, message) {
  stop(chat);
  const at = chat.messages.indexOf(message);
  if (at < chat.messages.length - 1) cutAfter(chat, at, "Later messages removed");
  dropEmpty(message);
  write(chat, message);
}

/** Versions without any text are not worth stepping through. */
function dropEmpty(message) {
  message.versions = message.versions.filter((version) => version.text);
  message.shown = Math.max(0, message.versions.length - 1);
}

async function write(chat, message) {
  const run = { chat, message, version: newVersion(modelOf(chat)?.id), controller: new AbortController(), wait: null, saved: 0 };
  message.versions.push(run.version);
  message.shown = message.versions.length - 1;
  chat.updated = Date.now();
  chats.set(chat.id, chat);
  if (chat === state.fresh) state.fresh = null;
  runs.set(chat, run);
  saveChat(chat);
  showInAddress();
  if (chat === state.chat) follow();
  draw();
  announce("Waiting for the answer.");
  for (let tries = 1, isOver = false; !isOver; tries++) {
    isOver = await receive(run).then(() => true, (error) => handle(run, error, tries));
  }
  if (runs.get(chat) === run) finish(run);
}

/** One try: sends the conversation and takes in the answer. */
async function receive(run) {
  const times = { started: performance.now(), first: null, last: null };
  const body = JSON.stringify(bodyOf(run));
  const response = await request("v1/chat/completions", { method: "POST", body, signal: run.controller.signal });
  let usage = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") {
      run.version.finish ??= "stop";
      break;
    }
    const event = JSON.parse(data);
    if (isObject(event.error)) throw serverError(event.error, 0, null);
    if (isObject(event.usage)) usage = event.usage;
    const choice = event.choices?.[0];
    if (typeof choice?.finish_reason === "string") run.version.finish = choice.finish_reason;
    const piece = choice?.delta?.content;
    if (typeof piece !== "string" || !piece) continue;
    times.last = performance.now();
    times.first ??= times.last;
    grow(run, piece);
  }
  if (!run.version.finish) throw new Error(BROKEN_OFF);
  run.version.stats = statsOf(usage, times);
}

function grow(run, piece) {
  run.version.text += piece;
  if (run.chat === state.chat) drawSoon();
  if (performance.now() - run.saved < TIME_TO_SAVE) return;
  saveChat(run.chat);
  run.saved = performance.now();
}

function statsOf(usage, { started, first, last }) {
  const tokens = (value) => (Number.isFinite(value) && value >= 0 ? value : null);
  const completion = tokens(usage?.completion_tokens);
  const hasSpeed = completion >= LEAST_FOR_SPEED.tokens && last - first >= LEAST_FOR_SPEED.time;
  return {
    prompt: tokens(usage?.prompt_tokens),
    completion,
    first: first === null ? null : (first - started) / 1000,
    speed: hasSpeed ? (1000 * (completion - 1)) / (last - first) : null, // the first token is the wait before it
  };
}

function bodyOf({ chat, message, version }) {
  const { settings } = chat;
  const before = chat.messages.slice(0, chat.messages.indexOf(message));
  const contents = before.map((each) => ({ role: each.role, content: each.role === "user" ? each.text : shownVersion(each).text }));
  const body = {
    messages: [{ role: "system", content: settings.system }, ...contents].filter(({ content }) => content.trim()),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (version.model) body.model = version.model;
  if (settings.stop.length) body.stop = settings.stop;
  for (const name of Object.keys(NUMBERS)) if (settings[name] !== null) body[name] = settings[name];
  return body;
}

/** What follows from a failed try: true when that is the end of it, false to try again. */
async function handle(run, error, tries) {
  const { version, controller } = run;
  if (controller.signal.aborted) return true;
  if (error.kind === "key" && await askForKey(error.message)) return controller.signal.aborted;
  if (error.kind === "busy" && !version.text && tries < MOST_TRIES) return !await waitFor(run, error);
  if (error.kind === "gone") serverIsGone(error.message);
  else if (!(error instanceof ServerError)) loadModels(); // says whether the server has gone
  version.error = { kind: error.kind ?? "other", message: error instanceof ServerError ? error.message : BROKEN_OFF };
  return true;
}

/** Waits until the server may be asked again, or the reader wants to; false when the reader gives up. */
function waitFor(run, { message, wait }) {
  announce(`${message} Trying again in ${wait} seconds.`);
  return new Promise((resolve) => {
    const until = Date.now() + wait * 1000;
    const end = (goesOn) => {
      clearInterval(timer);
      run.wait = null;
      resolve(goesOn);
      draw();
    };
    const timer = setInterval(() => (Date.now() < until ? draw() : end(true)), 250);
    run.wait = { message, until, now: () => end(true) };
    run.controller.signal.addEventListener("abort", () => end(false), { once: true });
    draw();
  });
}

/** Ends the answer that is being written, at once. */
function stop(chat) {
  const run = runs.get(chat);
  if (!run) return;
  run.version.finish ??= "stopped";
  run.controller.abort();
  finish(run);
}

function finish({ chat, message, version }) {
  runs.delete(chat);
  if (version.finish === "stopped" && !version.text) dropEmpty(message);
  if (!message.versions.length) chat.messages = chat.messages.filter((each) => each !== message);
  saveChat(chat);
  if (chat === state.chat) announceAnswer(version);
  if (modelOf(chat)?.context === null) loadModels(); // it is known only once the model is loaded
  draw();
}
