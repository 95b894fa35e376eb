// What a reader of the page sees and does, for the scenarios.

import assert from "node:assert/strict";

export { assert };

/** Opens the page and waits until it knows its models. */
export async function enter(page, url) {
  await page.goto(url);
  await page.locator("#model option").first().waitFor({ state: "attached" });
}

/** Writes a message and sends it, without waiting for the answer. */
export async function say(page, text) {
  await page.locator("#input").fill(text);
  await page.locator("#input").press("Enter");
}

/** Sends a message and waits until it is answered, well or not. */
export async function askAndWait(page, text) {
  const before = await page.locator(".message").count();
  await say(page, text);
  await page.waitForFunction((count) => document.querySelectorAll(".message").length >= count, before + 2);
  await answered(page);
}

export const answered = (page) => page.waitForFunction(() => !document.querySelector("[aria-busy]") && document.querySelector("#stop").hidden);
export const answer = (page) => page.locator(".message.assistant").last();
export const prose = (page) => answer(page).locator(".prose");
export const button = (scope, name) => scope.getByRole("button", { name, exact: true });
export const questions = (page) => page.locator(".message.user .bubble").allInnerTexts();
export const answers = (page) => page.locator(".message.assistant .prose").allInnerTexts();
export const titles = (page) => page.locator("#chats .open span:first-child").allInnerTexts();
export const stored = (page) => page.evaluate(() => Object.entries(localStorage).map(([name, text]) => [name, JSON.parse(text)]));

/** Waits until a text stands somewhere. */
export async function sees(scope, text) {
  await scope.getByText(text).first().waitFor();
}

/** Waits until `get()` gives what is expected. */
export async function becomes(get, expected) {
  const until = Date.now() + 10_000;
  for (;;) {
    const value = await get();
    try {
      return assert.deepEqual(value, expected);
    } catch (error) {
      if (Date.now() > until) throw error;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}

/** The bodies of the requests for answers from now on, oldest first. */
export function watchRequests(page) {
  const bodies = [];
  page.on("request", (request) => request.method() === "POST" && bodies.push(request.postDataJSON()));
  return bodies;
}

/** Chooses a file with the given content for import. */
export async function importText(page, text, name = "conversations.json") {
  await page.locator("#import-file").setInputFiles({ name, mimeType: "application/json", buffer: Buffer.from(text) });
}

/** The text of the file that "Export" gives. */
export async function exportText(page) {
  const download = page.waitForEvent("download");
  await page.locator("#export").click();
  const stream = await (await download).createReadStream();
  const parts = [];
  for await (const part of stream) parts.push(part);
  return Buffer.concat(parts).toString("utf8");
}

/** Answers the next requests for an answer in the test's own way, one after the other; then the server does again. */
export async function intercept(page, ...responses) {
  await page.route("**/v1/chat/completions", (route) => (responses.length ? route.fulfill(responses.shift()) : route.continue()));
}

export const failure = (status, message, code, headers = {}) => ({
  status, headers, contentType: "application/json",
  body: JSON.stringify({ error: { message, type: "error", param: null, code } }),
});

export const stream = (...events) => ({
  status: 200, contentType: "text/event-stream",
  body: events.map((event) => `data: ${typeof event === "string" ? event : JSON.stringify(event)}\n\n`).join(""),
});

export const SLOW = `/delay 0.02\n${"word ".repeat(3000)}`; // an answer that takes much longer than any test
export const piece = (text) => ({ choices: [{ delta: { content: text }, finish_reason: null }] });
export const ended = { choices: [{ delta: {}, finish_reason: "stop" }] };

/** The names of what is in focus as Tab goes once around the page. */
export async function tabAround(page, most = 60) {
  const seen = [];
  for (let i = 0; i < most; i++) {
    await page.keyboard.press("Tab");
    const focus = await page.evaluate(() => {
      const element = document.activeElement;
      const style = getComputedStyle(element);
      const box = element.closest(".box");
      const ring = style.outlineStyle !== "none" || (box && getComputedStyle(box).borderColor !== getComputedStyle(document.querySelector("#messages")).borderColor);
      return { name: element.ariaLabel || element.textContent.trim() || element.id, tag: element.tagName, isVisible: Boolean(ring) };
    });
    if (focus.tag === "BODY") break;
    seen.push(focus);
  }
  return seen;
}
