// Nothing that was written gets lost: two tabs at once, undoing, drafts. Each export is a test: { play, options }; see driver.mjs.

import {
  answer, answered, answers, askAndWait, assert, becomes, button, enter, questions, say, sees, SLOW, titles,
} from "../reader.mjs";

const isGrowing = (page) => page.waitForFunction(() => document.querySelector("[aria-busy] .prose")?.textContent.length > 60);

/** The questions of each conversation that the browser keeps, by their first lines. */
const keptQuestions = (page) => page.evaluate(() => Object.keys(localStorage).filter((name) => name.startsWith("herd.chat."))
  .map((name) => JSON.parse(localStorage.getItem(name)).messages.filter(({ role }) => role === "user").map(({ text }) => text.split("\n")[0]))
  .sort((a, b) => (String(a) < String(b) ? -1 : 1)));

export const two_tabs_write_in_one_conversation = {
  async play({ page, context, url }) {
    await enter(page, url);
    await askAndWait(page, "the beginning");
    const other = await context.newPage();
    await enter(other, page.url());
    await say(page, `/delay 0.01\n${"first tab ".repeat(60)}`);
    await isGrowing(page);
    await askAndWait(other, "second tab");
    await answered(page);
    await askAndWait(page, "first tab again");
    const both = [["the beginning", "/delay 0.01", "first tab again"], ["the beginning", "/delay 0.01", "second tab"]];
    await becomes(async () => {
      const kept = await keptQuestions(page);
      return both.filter((questions) => !kept.some((each) => String(each) === String(questions)));
    }, []);
    for (const each of [page, other]) assert.ok((await titles(each)).length >= 2, "both can be chosen in both tabs");
    assert.match((await answers(page))[1], /^(first tab ?){60}$/, "the answer is whole where it was asked for");
  },
};

export const a_tab_that_edits_hears_of_others = {
  async play({ page, context, url }) {
    await enter(page, url);
    await askAndWait(page, "mine");
    const other = await context.newPage();
    await enter(other, page.url());
    await page.locator("#input").press("ArrowUp");
    await page.getByLabel("Change the message").fill("mine, changed");
    await other.keyboard.press("Alt+n");
    await askAndWait(other, "news");
    await other.locator("#chats .open", { hasText: "mine" }).click();
    await askAndWait(other, "more");
    await becomes(async () => (await titles(page)).length, 2);
    await becomes(() => answers(page), ["mine", "more"]);
    assert.equal(await page.getByLabel("Change the message").inputValue(), "mine, changed", "what is being edited stays");
    await page.getByLabel("Change the message").press("Escape");
    await askAndWait(page, "end");
    await becomes(() => keptQuestions(page), [["mine", "more", "end"], ["news"]]);
  },
};

/** A tab whose focus is on the conversation that is being answered in `page`. */
async function anotherAboutToDelete(page, context, url) {
  await enter(page, url);
  await say(page, SLOW);
  await isGrowing(page);
  const other = await context.newPage();
  await enter(other, url);
  await other.locator("#chats .open").first().focus();
  return other;
}

export const what_another_tab_deletes_is_gone = {
  async play({ page, context, url }) {
    const other = await anotherAboutToDelete(page, context, url);
    await other.keyboard.press("Delete");
    await becomes(() => keptQuestions(other), []);
    await answered(page);
    await page.waitForTimeout(1200); // longer than between two savings
    await becomes(() => keptQuestions(page), []);
    await page.keyboard.press("Alt+r"); // whoever still reads it here can go on with it
    await becomes(() => keptQuestions(page), [["/delay 0.02"]]);
  },
};

export const what_is_saved_while_another_tab_deletes_is_gone_as_well = {
  async play({ page, context, url }) {
    const other = await anotherAboutToDelete(page, context, url);
    const saving = page.evaluate(() => {
      const [name, text] = Object.entries(localStorage).find(([each]) => each.startsWith("herd.chat."));
      for (const until = Date.now() + 1000; Date.now() < until;); // hears of nothing meanwhile
      localStorage.setItem(name, text); // as the page does twice a second while it answers
    });
    await other.keyboard.press("Delete");
    await saving;
    await becomes(() => keptQuestions(page), []);
    await becomes(() => titles(other), []);
  },
};

export const an_answer_of_another_tab_is_told_from_one_that_broke_off = {
  async play({ page, context, url }) {
    await enter(page, url);
    await say(page, SLOW);
    await isGrowing(page);
    const other = await context.newPage();
    await enter(other, page.url());
    await sees(answer(other), /still being written in another tab/);
    await page.keyboard.press("Escape");
    await sees(answer(other), "Stopped.");
  },
};

export const a_draft_changes_nothing_else = {
  async play({ page, context, url }) {
    await enter(page, url);
    await askAndWait(page, "begin");
    const other = await context.newPage();
    await enter(other, page.url());
    await other.locator("#input").pressSequentially("half a");
    await askAndWait(page, "from the first tab");
    await other.waitForTimeout(700);
    await becomes(() => keptQuestions(page), [["begin", "from the first tab"]]);
    assert.equal(await other.locator("#input").inputValue(), "half a");
    assert.equal(await page.locator("#input").inputValue(), "");
  },
};

export const drafts_stay_with_their_conversations = {
  async play({ page, url }) {
    await enter(page, url);
    await askAndWait(page, "one");
    await page.keyboard.press("Alt+n");
    await page.keyboard.type("not sent yet");
    await page.locator("#chats .open").first().click();
    await becomes(() => page.locator("#input").inputValue(), "");
    await page.keyboard.type("and more");
    await page.keyboard.press("Alt+n");
    assert.equal(await page.locator("#input").inputValue(), "not sent yet");
    await page.locator("#chats .open").first().click();
    assert.equal(await page.locator("#input").inputValue(), "and more");
    await page.locator("#input").fill("");
    await button(answer(page), "Delete").click();
    await page.locator("#input").fill("typed meanwhile");
    await page.keyboard.press("Alt+z");
    await becomes(() => answers(page), ["one"]);
    assert.equal(await page.locator("#input").inputValue(), "typed meanwhile");
  },
};

export const undo_can_be_undone = {
  async play({ page, url }) {
    await enter(page, url);
    for (const text of ["one", "two"]) await askAndWait(page, text);
    await button(page.locator(".message.user").first(), "Delete").click();
    await becomes(() => questions(page), ["two"]);
    await askAndWait(page, "three");
    await page.keyboard.press("Alt+z");
    await becomes(() => questions(page), ["one", "two"]);
    await page.keyboard.press("Alt+z");
    await becomes(() => questions(page), ["two", "three"]);
    await page.keyboard.press("Alt+z");
    await becomes(() => questions(page), ["one", "two"]);
  },
};

export const a_page_that_comes_back_has_heard_of_others = {
  async play({ page, context, url }) {
    await enter(page, url);
    await askAndWait(page, "one");
    await page.evaluate(() => (window.onstorage = null)); // as while a browser keeps a page that was left
    const other = await context.newPage();
    await enter(other, page.url());
    await askAndWait(other, "two");
    const loaded = page.waitForEvent("load");
    await page.evaluate(() => window.dispatchEvent(new PageTransitionEvent("pageshow", { persisted: true })));
    await loaded;
    await becomes(() => questions(page), ["one", "two"]);
  },
};

export const what_storage_has_no_room_for_is_not_replaced = {
  async play({ page, context, url }) {
    await enter(page, url);
    await askAndWait(page, "one");
    await page.evaluate(() => (Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); }));
    await askAndWait(page, "two");
    await sees(page, /no room for this conversation/);
    const other = await context.newPage();
    await enter(other, page.url());
    await askAndWait(other, "three");
    await sees(page, "Another tab has written in this conversation.");
    await becomes(() => questions(page), ["one", "two"]);
    await becomes(async () => (await titles(page)).length, 2);
    await page.keyboard.press("Alt+s");
    await button(page, "Make default").click();
    await sees(page, "New conversations begin with these settings until this page is closed.");
  },
};

export const what_is_stored_under_a_wrong_name_does_not_multiply = {
  async play({ page, url }) {
    await enter(page, url);
    await page.evaluate(() => {
      for (const id of ["abcdefgh12", "", 5]) localStorage.setItem(`herd.chat.other${id}`, JSON.stringify({ id, title: "Not mine", messages: [] }));
    });
    for (let i = 0; i < 2; i++) {
      await page.reload();
      await askAndWait(page, `question ${i}`);
    }
    assert.deepEqual(await titles(page), ["question 0"]);
    assert.equal(await page.evaluate(() => localStorage.length), 4);
  },
};
