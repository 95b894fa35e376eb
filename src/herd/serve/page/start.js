// ── Start ──────────────────────────────────────────────────────────────────────────────────────────────────

function onInput() {
  keepDraft(state.chat, $("input").value);
  fit($("input"));
  drawComposer();
}

/** Makes a text field as high as its text, where the browser does not do it by itself. */
function fit(field) {
  if (CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

function chooseModel(event) {
  state.chat.settings.model = event.target.value;
  saveChat(state.chat);
  draw();
}

function chooseFiles({ target }) {
  for (const file of target.files) importChats(file);
  target.value = ""; // so that the same file can be chosen again
}

function setUp() {
  const parts = {
    skip: { onclick: () => $("input").focus() },
    "new-chat": { onclick: startChat },
    "hide-sidebar": { onclick: toggleSidebar },
    "show-sidebar": { onclick: toggleSidebar },
    scrim: { onclick: toggleSidebar },
    search: { oninput: search, onkeydown: keyed({ ArrowDown: () => focusInList(0), Enter: chooseFirst }) },
    chats: { onkeydown: keyInList },
    import: { onclick: () => $("import-file").click() },
    "import-file": { onchange: chooseFiles },
    export: { onclick: exportChats },
    theme: { onclick: nextTheme },
    "show-help": { onclick: () => $("help-dialog").showModal() },
    model: { onchange: chooseModel },
    "show-settings": { onclick: showSettings },
    scroller: { onscroll: onScroll },
    "to-end": { onclick: () => (follow(), $("input").focus()) },
    composer: { onsubmit: (event) => (event.preventDefault(), submit()) },
    input: { oninput: onInput, onkeydown: keyed({ Enter: submit, ArrowUp: editLast }) },
    stop: { onclick: () => stop(state.chat) },
    "key-form": { onsubmit: takeKey },
  };
  for (const [id, handlers] of Object.entries(parts)) Object.assign($(id), handlers);
  Object.assign(window, { onkeydown: onKey, onpopstate: openFromAddress, onstorage: onStorage, onresize: keepAtEnd, ononline: loadModels });
  window.onpageshow = ({ persisted }) => persisted && location.reload(); // it has not heard of other tabs meanwhile
  window.onpagehide = () => runs.forEach((run) => saveChat(run.chat));
  isNarrow.onchange = () => showSidebar(!isNarrow.matches);
  document.querySelectorAll("dialog").forEach(setUpDialog);
}

setUp();
setUpSettings();
drawShortcuts();
applyTheme();
readChats();
openFromAddress();
if (isNarrow.matches) showSidebar(false);
else $("input").focus();
loadModels();
