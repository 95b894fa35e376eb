// Keyboard, phone, screen readers, light and dark, speed. Each export is a test: { play, options }; see driver.mjs.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import {
  answer, answered, answers, askAndWait, assert, becomes, ended, enter, failure, importText, intercept, piece,
  prose, questions, say, sees, SLOW, stream, tabAround,
} from "../reader.mjs";
import { EVERYTHING } from "../texts.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const PHONE = { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true };

export const keyboard_is_enough = {
  async play({ page, url, shot }) {
    await enter(page, url);
    assert.equal(await page.evaluate(() => document.activeElement.id), "input");
    await page.keyboard.type("first line");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("second line");
    await page.keyboard.press("Enter");
    await becomes(() => questions(page), ["first line\nsecond line"]);
    await answered(page);

    await page.keyboard.press("Alt+h");
    await sees(page, "Keyboard shortcuts");
    await shot("shortcuts");
    for (let i = 0; i < 5; i++) {
      await page.keyboard.press("Tab");
      const inside = await page.evaluate(() => document.activeElement === document.body || document.activeElement.closest("dialog") !== null);
      assert.ok(inside, "the focus stays in the dialog");
    }
    await page.keyboard.press("Escape");
    assert.equal(await page.evaluate(() => document.activeElement.id), "input", "and goes back where it was");

    await page.locator("#skip").focus();
    const seen = await tabAround(page);
    assert.deepEqual(seen.filter((each) => !each.isVisible), [], "the focus can always be seen");
    const names = seen.map((each) => each.name);
    for (const name of ["New conversation", "Search conversations", "Rename", "Delete", "Model", "Settings of this conversation", "Edit", "Copy", "Answer again", "Message", "Send",
      "Import conversations", "Export all conversations", "Keyboard shortcuts", "Colours: as the system"]) {
      assert.ok(names.includes(name), `${name} can be reached: ${names}`);
    }

    await page.keyboard.press("Alt+n");
    await page.keyboard.type("another");
    await page.keyboard.press("Enter");
    await becomes(() => answers(page), ["another"]);
    await page.keyboard.press("Alt+j");
    await becomes(() => answers(page), ["first line\nsecond line"]);
    await page.keyboard.press("Alt+k");
    await becomes(() => answers(page), ["another"]);
    await page.keyboard.press("Control+k");
    await page.keyboard.type("second");
    await page.keyboard.press("Enter");
    await becomes(() => answers(page), ["first line\nsecond line"]);
    await page.keyboard.press("Alt+b");
    await page.locator("#sidebar").waitFor({ state: "hidden" });
    await page.keyboard.press("Alt+b");
    await page.locator("#sidebar").waitFor();
    await page.keyboard.press("Escape");
    await page.keyboard.press("ArrowUp");
    await page.keyboard.type(" changed");
    await page.keyboard.press("Enter");
    await becomes(() => answers(page), ["first line\nsecond line changed"]);
    await page.keyboard.press("Alt+c");
    await becomes(() => page.evaluate(() => navigator.clipboard.readText()), "first line\nsecond line changed");
  },
};

export const fits_a_phone = {
  options: PHONE,
  async play({ page, url, shot }) {
    const isWithin = () => page.evaluate(() => {
      const wide = [...document.querySelectorAll("body, main, #scroller, #messages, .message, #composer")].filter((each) => each.scrollWidth > each.clientWidth + 1);
      return wide.map((each) => each.id || each.className || each.tagName).concat(document.documentElement.scrollWidth > innerWidth ? ["page"] : []);
    });
    await enter(page, url);
    await shot("empty");
    assert.deepEqual(await isWithin(), []);
    await askAndWait(page, EVERYTHING);
    await askAndWait(page, `${"unbroken".repeat(60)}\n\n\`${"x".repeat(300)}\`\n\n| a | ${"wide ".repeat(60)} |\n|---|---|\n| ${"y".repeat(200)} | z |\n\n\`\`\`\n${"code ".repeat(90)}\n\`\`\`\n\nhttps://ok.example/${"path/".repeat(60)}`);
    assert.deepEqual(await isWithin(), []);
    await shot("wide");
    const start = await page.locator(".message.assistant").first().evaluate((element) => element.offsetTop);
    for (const [i, top] of [start - 70, start + 620].entries()) {
      await page.evaluate((value) => (document.querySelector("#scroller").scrollTop = value), top);
      await shot(`answer-${i + 1}`);
    }
    await page.locator("#show-sidebar").tap();
    await page.locator("#sidebar").waitFor();
    await shot("list");
    assert.deepEqual(await isWithin(), []);
    await page.locator("#scrim").tap({ position: { x: 380, y: 400 } });
    await page.locator("#sidebar").waitFor({ state: "hidden" });
    await page.locator("#show-settings").tap();
    await shot("settings");
    const small = await page.locator("main button:visible, #sidebar button:visible").evaluateAll((all) => all.filter((each) => Math.min(each.offsetWidth, each.offsetHeight) < 28).map((each) => each.ariaLabel));
    assert.deepEqual(small, [], "buttons are large enough to touch");
    await page.keyboard.press("Escape");
    await page.emulateMedia({ colorScheme: "dark" });
    await shot("dark");
  },
};

export const accessible_by_axe = {
  async play({ page, url }) {
    const check = async (where) => {
      const found = await page.evaluate(async () => {
        const { violations } = await window.axe.run(document, { resultTypes: ["violations"] });
        return violations.map(({ id, impact, nodes }) => `${impact} ${id}: ${nodes.map((node) => node.target.join(" ") + " " + (node.any[0]?.message ?? "")).slice(0, 3).join(" | ")}`);
      });
      assert.deepEqual(found, [], where);
    };
    await enter(page, url);
    await page.evaluate(AXE);
    await check("empty");
    await askAndWait(page, EVERYTHING);
    await check("conversation");
    await page.emulateMedia({ colorScheme: "dark" });
    await check("conversation, dark");
    await intercept(page, failure(400, "No.", "bad"));
    await askAndWait(page, "x");
    await check("error, dark");
    await page.emulateMedia({ colorScheme: "light" });
    await check("error, light");
    await page.keyboard.press("Alt+s");
    await check("settings");
    await page.keyboard.press("Escape");
    await page.locator("#show-help").click();
    await check("shortcuts");
    await page.keyboard.press("Escape");
    await page.locator("#input").press("ArrowUp");
    await check("editor");
  },
};

export const light_and_dark = {
  async play({ page, url }) {
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await enter(page, url);
    const light = await ground();
    await page.emulateMedia({ colorScheme: "dark" });
    const dark = await ground();
    assert.notEqual(light, dark, "the page follows the system");
    await page.locator("#theme").click();
    assert.equal(await ground(), light);
    await page.reload();
    assert.equal(await ground(), light, "the choice is kept");
    await page.keyboard.press("Alt+t");
    await page.emulateMedia({ colorScheme: "light" });
    assert.equal(await ground(), dark);
  },
};

export const moves_nothing_for_who_wants_no_motion = {
  options: { reducedMotion: "reduce" },
  async play({ page, url }) {
    await enter(page, url);
    await say(page, SLOW);
    await page.locator(".waiting").waitFor();
    assert.equal(await page.evaluate(() => document.getAnimations().length), 0);
    await page.keyboard.press("Escape");
    await answered(page);
    await page.keyboard.press("Control+k");
    await page.locator("#chats .open").first().focus();
    await page.keyboard.press("Delete");
    await page.locator(".toast").waitFor();
    assert.equal(await page.evaluate(() => document.getAnimations().length), 0);
  },
};

export const long_answers_stay_quick = {
  async play({ page, url }) {
    await enter(page, url);
    // 60 answers of 4 KB each, then one more of 100 KB: what the page's own thread spends on it is bounded.
    const version = { text: EVERYTHING.repeat(2), model: "echo-1b", finish: "stop" };
    const messages = Array.from({ length: 60 }, () => [{ role: "user", text: "more" }, { role: "assistant", versions: [version], shown: 0 }]).flat();
    await importText(page, JSON.stringify({ format: "herd-conversations", version: 1, chats: [{ id: "abcdefgh12", title: "Long", messages }] }));
    await sees(page, "1 conversation imported.");
    await page.locator("#chats .open").first().click();
    await page.locator(".message").nth(119).waitFor();
    const text = EVERYTHING.repeat(50);
    const events = Array.from({ length: Math.ceil(text.length / 20) }, (_, i) => piece(text.slice(20 * i, 20 * i + 20)));
    await page.evaluate(() => {
      window.longest = 0;
      new PerformanceObserver((list) => list.getEntries().forEach((entry) => (window.longest = Math.max(window.longest, entry.duration)))).observe({ type: "longtask" });
    });
    await intercept(page, stream(...events, ended, "[DONE]"));
    await say(page, "long");
    await answered(page);
    assert.equal(await prose(page).locator("ol").count(), 50);
    const longest = await page.evaluate(() => window.longest);
    assert.ok(longest < 2000, `the page stood still for ${longest} ms`);
  },
};
