// Keeping, finding, exporting and importing conversations; settings. Each export is a test: { play, options }; see driver.mjs.

import {
  answer, answered, answers, askAndWait, assert, becomes, button, enter, exportText, importText, prose,
  questions, say, sees, SLOW, stored, titles, watchRequests,
} from "../reader.mjs";
import { EVERYTHING } from "../texts.mjs";

export const keeps_conversations = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await askAndWait(page, "About apples");
    await page.keyboard.press("Alt+n");
    await askAndWait(page, "About **pears**");
    await becomes(() => titles(page), ["About **pears**", "About apples"]);
    await page.reload();
    await becomes(() => questions(page), ["About **pears**"]);
    assert.equal(await prose(page).locator("strong").innerText(), "pears");
    await page.locator("#chats .open", { hasText: "apples" }).click();
    await becomes(() => questions(page), ["About apples"]);
    await page.goBack();
    await becomes(() => questions(page), ["About **pears**"]);

    await page.locator("#search").fill("apples");
    await becomes(() => titles(page), ["About apples"]);
    await page.locator("#search").press("Escape");
    await page.locator("#chats .open").last().focus();
    await page.keyboard.press("F2");
    await page.keyboard.type("Fruit");
    await page.keyboard.press("Enter");
    await becomes(() => titles(page), ["About **pears**", "Fruit"]);
    await shot("list");
    await page.keyboard.press("Delete");
    await becomes(() => titles(page), ["About **pears**"]);
    assert.equal((await stored(page)).length, 1);
    await button(page, "Undo").click();
    await becomes(() => titles(page), ["About **pears**", "Fruit"]);
    await becomes(() => questions(page), ["About apples"]);
    assert.deepEqual((await stored(page)).map(([name]) => name.replace(/[0-9a-f]{20}/, "id")), ["herd.chat.id", "herd.chat.id"]);
  },
};

export const answers_go_on_in_the_background = {
  async play({ page, url }) {
    await enter(page, url);
    await say(page, `/delay 0.01\n${"slow and steady ".repeat(12)}end`);
    await page.waitForFunction(() => document.querySelector("[aria-busy] .prose")?.textContent.length > 10);
    await page.keyboard.press("Alt+n");
    await askAndWait(page, "quick");
    await page.locator("#chats .open").last().click();
    await answered(page);
    assert.match(await prose(page).innerText(), /^(slow and steady ){12}end$/);
  },
};

export const an_answer_survives_a_reload_in_the_middle = {
  async play({ page, url }) {
    await enter(page, url);
    await say(page, SLOW);
    await page.waitForFunction(() => document.querySelector("[aria-busy] .prose")?.textContent.length > 60);
    await page.reload();
    await sees(answer(page), /(?:broke|Broken) off/);
    assert.ok((await prose(page).innerText()).length > 60);
    await page.locator("#input").fill("half a thou");
    await page.waitForFunction(() => Object.values(localStorage).some((text) => text.includes("half a thou")));
    await page.reload();
    await becomes(() => page.locator("#input").inputValue(), "half a thou");
  },
};

export const two_tabs_agree = {
  async play({ page, context, url }) {
    await enter(page, url);
    await askAndWait(page, "from the first tab");
    const other = await context.newPage();
    await enter(other, page.url());
    await becomes(() => questions(other), ["from the first tab"]);
    await askAndWait(other, "from the second tab");
    await becomes(() => questions(page), ["from the first tab", "from the second tab"]);
    await becomes(() => answers(page), ["from the first tab", "from the second tab"]);
  },
};

export const settings_are_sent_and_kept = {
  async play({ page, url, shot }) {
    await enter(page, url);
    const bodies = watchRequests(page);
    await page.keyboard.press("Alt+s");
    await page.locator("#settings-dialog:modal").waitFor();
    assert.equal(await page.evaluate(() => document.activeElement.id), "system");
    await page.getByLabel("System prompt").fill("You are a goat.");
    const values = { Temperature: "0.7", "Top p": "0.9", "Top k": "40", "Min p": "0.05", "Max tokens": "100", Seed: "7" };
    for (const [name, value] of Object.entries(values)) await page.getByLabel(name, { exact: true }).fill(value);
    await page.getByLabel(/Stop at/).fill("\\n\\n\nEND");
    await shot("dialog");
    await button(page, "Done").click();
    await page.locator("#model").selectOption("echo-8b");
    await askAndWait(page, "hello");
    const { messages, stream_options, stream: isStream, ...rest } = bodies[0];
    assert.deepEqual(rest, { model: "echo-8b", temperature: 0.7, top_p: 0.9, top_k: 40, min_p: 0.05, max_tokens: 100, seed: 7, stop: ["\n\n", "END"] });
    assert.deepEqual(messages[0], { role: "system", content: "You are a goat." });
    await sees(page, "System prompt: You are a goat.");
    await page.reload();
    await page.locator("#model option").first().waitFor({ state: "attached" });
    assert.equal(await page.locator("#model").inputValue(), "echo-8b");
    await page.keyboard.press("Alt+s");
    assert.equal(await page.getByLabel("Seed").inputValue(), "7");
    await page.getByLabel("Temperature").fill("-1");
    await sees(page, "Temperature is not a number from 0 to 10.");
    await page.getByLabel("Temperature").fill("1.5");
    await button(page, "Make default").click();
    await page.keyboard.press("Alt+n");
    await askAndWait(page, "another");
    assert.equal(bodies[1].temperature, 1.5);
    await page.keyboard.press("Alt+s");
    await button(page, "Reset").click();
    await page.keyboard.press("Escape");
    await askAndWait(page, "plain");
    assert.deepEqual(Object.keys(bodies[2]).sort(), ["messages", "model", "stream", "stream_options"]);
  },
};

export const exports_and_imports = {
  async play({ page, url }) {
    await enter(page, url);
    await askAndWait(page, "number {n}");
    await button(answer(page), "Answer again").click();
    await answered(page);
    await page.keyboard.press("Alt+n");
    await askAndWait(page, EVERYTHING);
    const before = Object.fromEntries(await stored(page));
    const text = await exportText(page);
    await importText(page, text);
    await sees(page, "0 conversations imported, 2 there already.");
    await page.evaluate(() => localStorage.clear());
    await page.goto(url);
    await page.reload();
    await becomes(() => titles(page), []);
    await importText(page, text);
    await sees(page, "2 conversations imported.");
    assert.deepEqual(Object.fromEntries(await stored(page)), before, "nothing is lost");
    await importText(page, text.replaceAll("number", "figure"));
    await sees(page, "1 conversation imported, 1 there already.");
    await becomes(async () => (await titles(page)).length, 3);
  },
};

export const goes_on_when_storage_is_full = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await page.evaluate(() => {
      for (let size = 1 << 20; size; size >>= 1) {
        try {
          for (;;) localStorage.setItem(`filler${Math.random()}`, "x".repeat(size));
        } catch { /* full; smaller pieces still fit */ }
      }
    });
    await askAndWait(page, "no room");
    await sees(page, /no room for this conversation/);
    await shot("full");
    assert.equal(await prose(page).innerText(), "no room");
    await askAndWait(page, "goes on");
    assert.match(await exportText(page), /goes on/);
    await page.evaluate(() => Object.keys(localStorage).filter((name) => name.startsWith("filler")).forEach((name) => localStorage.removeItem(name)));
    await askAndWait(page, "room again");
    assert.equal(await page.locator(".banner").count(), 0);
    await page.reload();
    await becomes(() => questions(page), ["no room", "goes on", "room again"]);
  },
};

export const works_without_storage = {
  async play({ page, context, url }) {
    await context.addInitScript(() => {
      const forbid = () => { throw new DOMException("denied", "SecurityError"); };
      Object.defineProperty(window, "localStorage", { get: forbid });
      Object.defineProperty(window, "sessionStorage", { get: forbid });
    });
    await enter(page, url);
    await askAndWait(page, "hello");
    assert.equal(await prose(page).innerText(), "hello");
  },
};
