// Keys and signs on every keyboard, and fields that name what they do not take. Each export is a test: { play, options }; see driver.mjs.

import { answered, askAndWait, assert, becomes, enter, questions, say, sees, SLOW, watchRequests } from "../reader.mjs";

export const every_sign_can_be_typed = {
  async play({ page, url }) {
    await enter(page, url);
    await page.keyboard.type("?");
    assert.equal(await page.locator("#input").inputValue(), "?");
  },
};

export const on_a_mac_option_writes_letters = {
  async play({ page, context, url }) {
    await context.addInitScript(() => Object.defineProperty(navigator, "platform", { value: "MacIntel" }));
    await enter(page, url);
    await askAndWait(page, "one");
    await page.keyboard.press("Alt+n"); // ñ, in two steps
    await becomes(() => questions(page), ["one"]);
    await page.keyboard.press("Control+Alt+n");
    await becomes(() => questions(page), []);
    await page.keyboard.press("Control+k"); // what a Mac does with it in a text
    assert.equal(await page.evaluate(() => document.activeElement.id), "input");
    await page.keyboard.press("Meta+k");
    assert.equal(await page.evaluate(() => document.activeElement.id), "search");
    await page.keyboard.press("Control+Alt+h");
    await sees(page.locator("#keys"), "⌃⌥H");
  },
};

export const escape_belongs_to_what_is_being_composed = {
  async play({ page, url }) {
    await enter(page, url);
    await say(page, SLOW);
    await page.waitForFunction(() => document.querySelector("[aria-busy] .prose")?.textContent.length > 10);
    await page.locator("#input").evaluate((field) => field.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", isComposing: true, bubbles: true })));
    assert.equal(await page.locator("#stop").isVisible(), true, "the answer goes on");
    await page.keyboard.press("Escape");
    await answered(page);
  },
};

export const code_keeps_its_indent = {
  async play({ page, url }) {
    await enter(page, url);
    const bodies = watchRequests(page);
    await page.locator("#input").fill("\n    if x:\n        y\n\n");
    await page.locator("#input").press("Enter");
    await answered(page);
    await becomes(() => bodies[0]?.messages.at(-1).content, "    if x:\n        y");
  },
};

export const too_many_stops_are_named = {
  async play({ page, url }) {
    await enter(page, url);
    await page.keyboard.press("Alt+s");
    await page.getByLabel(/Stop at/).fill(Array.from({ length: 17 }, (_, i) => `end ${i}`).join("\n"));
    await sees(page, /Stop at.*16/);
  },
};
