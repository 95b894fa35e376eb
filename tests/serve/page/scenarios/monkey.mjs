// Anything at any time, in two tabs: what is shown and kept stays whole. Each export is a test: { play, options }; see driver.mjs.

import { answered, assert, becomes, enter } from "../reader.mjs";

/** A generator with a seed: failures can be repeated. */
const dice = (seed) => (most) => (seed = (seed * 48271) % 0x7fffffff) % most;

const click = (selector) => async (page, random) => {
  const all = page.locator(selector);
  const count = await all.count();
  if (count) await all.nth(random(count)).dispatchEvent("click").catch(() => {});
};
const press = (key) => (page) => page.keyboard.press(key);
const send = (delay) => async (page, random) => {
  await page.locator("#input").focus();
  await page.locator("#input").fill(`/delay ${delay}\nquestion ${random(1000)} ${"and more ".repeat(random(8))}`);
  await page.keyboard.press("Enter");
};
const edit = async (page) => {
  await page.locator("#input").fill("");
  await page.locator("#input").press("ArrowUp");
  await page.keyboard.type(" x");
  await page.keyboard.press("Enter");
};
const type = (page) => page.keyboard.type("abc");
const wait = (page, random) => page.waitForTimeout(random(120));
const ACTIONS = [
  send(0), send(0.03), send(0.03), edit, type, wait, wait, press("Escape"), press("Alt+n"), press("Alt+j"), press("Alt+k"), press("Alt+r"), press("Alt+z"),
  click('.message [aria-label="Delete"]'), click('.message [aria-label="Answer again"]'), click('.message [aria-label="Earlier version"]'),
  click('.message [aria-label="Answer this"]'), click('.message [aria-label="Edit"]'), click("#chats .open"), click('#chats [aria-label="Delete"]'), click(".toast button"),
];

const kept = (page) => page.evaluate(() => Object.keys(localStorage).filter((name) => name.startsWith("herd.chat.")).map((name) => JSON.parse(localStorage.getItem(name))));

/** Plays with one page or several for a while, then lets everything end and compares what is kept with what is shown. */
async function play(pages, seed) {
  const random = dice(seed);
  for (let i = 0; i < 60; i++) await ACTIONS[random(ACTIONS.length)](pages[random(pages.length)], random);
  for (const page of pages) {
    await page.bringToFront();
    for (const chat of await page.locator("#chats .open").all()) {
      await chat.click();
      await page.keyboard.press("Escape");
      await answered(page);
    }
    for (const field of await page.locator(".edit textarea").all()) await field.press("Escape");
  }
  const versions = (await kept(pages[0])).flatMap(({ messages }) => messages.filter(({ role }) => role === "assistant")).flatMap((message) => {
    assert.ok(message.shown < message.versions.length, "a version is shown");
    return message.versions;
  });
  // What one tab has of another's answer may be its beginning only.
  if (pages.length === 1) assert.ok(versions.every(({ finish, error }) => finish || error), "every answer has ended");
  for (const page of pages) {
    await becomes(async () => (await kept(page)).length, await page.locator("#chats .open").count());
    const texts = () => page.locator(".bubble, .prose").allInnerTexts();
    const before = await texts();
    await page.reload();
    await becomes(texts, before);
  }
}

export const anything_at_any_time = {
  async play({ page, url }) {
    await enter(page, url);
    await play([page], Number(process.env.SEED ?? 7));
  },
};

export const anything_in_two_tabs = {
  async play({ page, context, url }) {
    const other = await context.newPage();
    for (const each of [page, other]) await enter(each, url);
    await play([page, other], Number(process.env.SEED ?? 5));
  },
};
