// Sending, streaming, stopping, answering again, editing, deleting. Each export is a test: { play, options }; see driver.mjs.

import {
  answer, answered, answers, askAndWait, assert, becomes, button, enter, prose, questions, say, sees, SLOW,
  watchRequests,
} from "../reader.mjs";
import { EVERYTHING } from "../texts.mjs";

export const sends_and_streams = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await shot("empty");
    const bodies = watchRequests(page);
    await say(page, "/delay 0.01\nThe *first* answer, 漢字 and 😀. " + "More words. ".repeat(60));
    await page.waitForFunction(() => document.querySelector("[aria-busy] .prose")?.textContent.length > 40);
    assert.equal(await page.locator("#stop").isVisible(), true, "an answer that is being written can be stopped");
    assert.equal(await page.locator(".prose em").innerText(), "first");
    await answered(page);
    assert.match(await prose(page).innerText(), /^The first answer, 漢字 and 😀\. (More words\. ?){60}$/);
    assert.match(await answer(page).locator(".figures").innerText(), /^\d+ tokens · [\d.,]+ tokens\/s · first after [\d.]+ s$/);
    assert.match(await page.locator("#context").innerText(), /^\d+ of 8,192 tokens$/);
    assert.equal(await page.evaluate(() => document.activeElement.id), "input", "the focus stays in the message box");
    assert.deepEqual(Object.keys(bodies[0]).sort(), ["messages", "model", "stream", "stream_options"], "what is not set is not sent");
    assert.equal(bodies[0].stream_options.include_usage, true);
    await askAndWait(page, "Second\nwith a second line");
    assert.deepEqual(bodies[1].messages.map((message) => message.role), ["user", "assistant", "user"]);
    assert.equal(bodies[1].messages[2].content, "Second\nwith a second line");
    assert.match(await page.title(), /delay/);
  },
};

export const answers_are_announced_once = {
  async play({ page, url }) {
    await enter(page, url);
    await page.evaluate(() => {
      window.said = [];
      const note = () => document.querySelector("#live").textContent && said.push(document.querySelector("#live").textContent);
      new MutationObserver(note).observe(document.querySelector("#live"), { childList: true });
    });
    await askAndWait(page, `/delay 0.002\nThe **answer** with ${"many words, ".repeat(20)}and an end`);
    await page.waitForFunction(() => said.some((text) => text.startsWith("Answer: The answer with many")));
    const said = await page.evaluate(() => window.said);
    assert.ok(said.length <= 2, `said ${said.length} things`);
    const live = await page.locator("[aria-live], [role=status], [role=alert], [role=log]").evaluateAll((all) => all.map((each) => each.id));
    assert.ok(!live.includes("messages"), "messages are not read token by token");
  },
};

export const shows_markdown = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await askAndWait(page, EVERYTHING);
    const tags = await prose(page).evaluate((element) => [...element.children].map((child) => child.tagName));
    assert.deepEqual(tags, ["H3", "P", "H4", "DIV", "P", "OL", "DIV", "BLOCKQUOTE", "HR", "H5", "DIV", "UL", "P"]);
    assert.equal(await prose(page).locator("ol > li > ul > li > ul > li").innerText(), "least important first.");
    assert.deepEqual(await prose(page).locator("th").allInnerTexts(), ["Method", "In place", "Returns", "Time"]);
    assert.equal(await prose(page).locator("td.right").last().innerText(), "12.4 µs");
    assert.equal(await prose(page).locator(".t-keyword").first().innerText(), "from");
    assert.equal(await prose(page).locator(".t-comment").first().innerText(), "# itemgetter is faster than a lambda");
    await button(prose(page), "Copy code").first().click();
    await becomes(() => page.evaluate(() => navigator.clipboard.readText()), EVERYTHING.split("```python\n")[1].split("\n```")[0]);
    await button(answer(page), "Copy").click();
    await becomes(() => page.evaluate(() => navigator.clipboard.readText()), EVERYTHING.trim());
    const scroll = (top) => page.evaluate((value) => (document.querySelector("#scroller").scrollTop = value), top);
    const start = await answer(page).evaluate((element) => element.offsetTop);
    for (const [i, top] of [start - 70, start + 560, 1e6].entries()) {
      await scroll(top);
      await shot(`light-${i + 1}`);
    }
    await page.emulateMedia({ colorScheme: "dark" });
    for (const [i, top] of [start - 70, start + 560, 1e6].entries()) {
      await scroll(top);
      await shot(`dark-${i + 1}`);
    }
  },
};

export const stops = {
  async play({ page, url }) {
    await enter(page, url);
    for (const way of [() => page.keyboard.press("Escape"), () => page.locator("#stop").click()]) {
      await say(page, SLOW);
      await page.waitForFunction(() => document.querySelector("[aria-busy] .prose")?.textContent.length > 10);
      await way();
      await answered(page);
      await sees(answer(page), "Stopped.");
      const text = await prose(page).innerText();
      assert.ok(text.length > 10 && text.length < 5000);
      assert.equal(await page.evaluate(() => document.activeElement.id), "input");
    }
    await askAndWait(page, "still works");
    assert.equal(await prose(page).innerText(), "still works");
  },
};

export const generates_again_and_keeps_versions = {
  async play({ page, url }) {
    await enter(page, url);
    await askAndWait(page, "number {n}");
    const first = await prose(page).innerText();
    await button(answer(page), "Answer again").click();
    await sees(answer(page), "2 / 2");
    await answered(page);
    const second = await prose(page).innerText();
    assert.notEqual(first, second);
    await button(answer(page), "Earlier version").click();
    await becomes(() => prose(page).innerText(), first);
    await page.reload();
    await becomes(() => prose(page).innerText(), first);
    await button(answer(page), "Later version").click();
    await becomes(() => prose(page).innerText(), second);
    await button(answer(page), "Delete this version").click();
    await becomes(() => prose(page).innerText(), first);
    assert.equal(await button(answer(page), "Later version").count(), 0);
    await page.keyboard.press("Alt+r");
    await sees(answer(page), "2 / 2");
    await answered(page);
  },
};

export const edits_a_message = {
  async play({ page, url, shot }) {
    await enter(page, url);
    const bodies = watchRequests(page);
    for (const text of ["one", "two", "three"]) await askAndWait(page, text);
    await page.locator(".message.user").nth(1).hover();
    await button(page.locator(".message.user").nth(1), "Edit").click();
    await sees(page, "What follows will be removed.");
    await shot("editor");
    const field = page.getByLabel("Change the message");
    assert.equal(await field.inputValue(), "two");
    await field.press("Escape");
    assert.equal(await page.evaluate(() => document.activeElement.ariaLabel), "Edit", "the focus goes back");
    await page.keyboard.press("Enter");
    await field.fill("zwei");
    await field.press("Enter");
    await becomes(() => questions(page), ["one", "zwei"]);
    await answered(page);
    assert.deepEqual(bodies.at(-1).messages.map((message) => message.content), ["one", "one", "zwei"]);
    await shot("undo");
    await page.keyboard.press("Alt+z");
    await becomes(() => questions(page), ["one", "two", "three"]);
    await becomes(() => answers(page), ["one", "two", "three"]);
    await page.locator("#input").press("ArrowUp");
    assert.equal(await page.getByLabel("Change the message").inputValue(), "three");
  },
};

export const deletes_with_undo = {
  async play({ page, url }) {
    await enter(page, url);
    for (const text of ["one", "two"]) await askAndWait(page, text);
    await page.locator(".message.user").first().hover();
    await button(page.locator(".message.user").first(), "Delete").click();
    await becomes(() => questions(page), ["two"]);
    await button(page, "Undo").click();
    await becomes(() => questions(page), ["one", "two"]);
    await button(answer(page), "Delete").click();
    await becomes(() => answers(page), ["one"]);
    await button(page.locator(".message.user").last(), "Answer this").click();
    await becomes(() => answers(page), ["one", "two"]);
  },
};

export const scrolls_along_until_the_reader_scrolls_up = {
  async play({ page, url }) {
    await enter(page, url);
    const atEnd = () => page.evaluate(() => {
      const box = document.querySelector("#scroller");
      return box.scrollHeight - box.clientHeight - box.scrollTop < 4;
    });
    await say(page, `/delay 0.001\n${"A line.\n\n".repeat(400)}`);
    await page.waitForFunction(() => document.querySelectorAll("[aria-busy] .prose p").length > 40);
    assert.equal(await atEnd(), true);
    await page.evaluate(() => getSelection().selectAllChildren(document.querySelector("[aria-busy] .prose p")));
    await page.mouse.move(700, 400);
    await page.mouse.wheel(0, -300);
    await page.locator("#to-end").waitFor();
    await page.waitForFunction(() => { // until the browser's own smooth scrolling is over
      const [before, now] = [window.place, document.querySelector("#scroller").scrollTop];
      window.place = now;
      return before === now;
    });
    const place = await page.evaluate(() => document.querySelector("#scroller").scrollTop);
    const count = await prose(page).locator("p").count();
    await page.waitForFunction((before) => document.querySelectorAll(".message.assistant .prose p").length > before + 5, count);
    assert.equal(await page.evaluate(() => document.querySelector("#scroller").scrollTop), place, "the place stays");
    assert.equal(await page.evaluate(() => String(getSelection())), "A line.", "what is selected stays selected");
    await page.locator("#to-end").click();
    assert.equal(await atEnd(), true);
    await answered(page);
    assert.equal(await atEnd(), true);
  },
};
