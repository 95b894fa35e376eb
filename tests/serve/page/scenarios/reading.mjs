// What a text looks like as it was written, and figures that can be believed. Each export is a test: { play, options }; see driver.mjs.

import {
  answer, answers, askAndWait, assert, button, becomes, ended, enter, intercept, piece, prose, questions, stream,
} from "../reader.mjs";

/** How far each line that holds one of the words is from the left of the element, in px. */
const indents = (locator, words) => locator.evaluate((element, all) => {
  const nodes = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  const found = {};
  for (let node = nodes.nextNode(); node; node = nodes.nextNode()) {
    for (const word of all) {
      const at = node.data.indexOf(word);
      if (at < 0) continue;
      const range = document.createRange();
      range.setStart(node, at);
      range.setEnd(node, at + word.length);
      found[word] = range.getBoundingClientRect().left;
    }
  }
  return all.map((word) => Math.round(found[word] - found[all[0]]));
}, words);

export const code_without_fences_keeps_its_indent = {
  async play({ page, url }) {
    const code = "def first(values):\n    if values:\n\treturn values[0]\n\n        raise IndexError";
    await enter(page, url);
    await askAndWait(page, code);
    assert.deepEqual(await answers(page), [code.replace("\t", "    ")], "what is selected and copied has the indent too");
    for (const text of [prose(page), page.locator(".bubble")]) {
      const [def, test, value, error] = await indents(text, ["def", "if", "return", "raise"]);
      assert.ok(def === 0 && test > 10 && value >= test && error > 1.9 * test, `${[def, test, value, error]}`);
    }
    await askAndWait(page, " one\n- two\n    three");
    const [one, two, three] = await indents(prose(page), ["one", "two", "three"]);
    assert.ok(one === 0 && two === three, "an item of a list stands as one, however far it was indented");
  },
};

export const no_speed_of_what_comes_at_once = {
  async play({ page, url }) {
    const figures = () => answer(page).locator(".figures").innerText();
    const usage = (tokens) => ({ choices: [], usage: { prompt_tokens: 9, completion_tokens: tokens, total_tokens: 9 + tokens } });
    await enter(page, url);
    const events = Array.from({ length: 400 }, () => piece("word "));
    await intercept(page, stream(...events, ended, usage(400), "[DONE]"));
    await askAndWait(page, "all at once");
    assert.match(await figures(), /^400 tokens · first after [\d.]+ s$/);
    await askAndWait(page, "/delay 0.15\none two three");
    assert.match(await figures(), /^3 tokens · first after [\d.]+ s$/);
    await askAndWait(page, `/delay 0.01\n${"word ".repeat(40)}end`);
    assert.match(await figures(), /^41 tokens · [\d.]+ tokens\/s · first after [\d.]+ s$/);
  },
};

export const code_in_questions_is_drawn = {
  async play({ page, url, shot }) {
    const question = "What does `a *b* c` do, and **why**?\n\n```python\ndef f(x):\n    return x\n```\nA ` alone\nand `another\n  stay\n";
    await enter(page, url);
    await askAndWait(page, question);
    const bubble = page.locator(".bubble");
    assert.deepEqual(await bubble.locator("> code").allInnerTexts(), ["a *b* c"]);
    assert.equal(await bubble.locator("pre").innerText(), "def f(x):\n    return x");
    assert.equal(await bubble.locator(".t-keyword").first().innerText(), "def");
    assert.equal(await bubble.locator("strong, em, p, a").count(), 0, "nothing but code is drawn");
    const [shown] = await questions(page);
    for (const text of ["and **why**?", "A ` alone\nand `another\n  stay"]) assert.ok(shown.includes(text), shown);
    await button(bubble, "Copy code").click();
    await becomes(() => page.evaluate(() => navigator.clipboard.readText()), "def f(x):\n    return x");
    await button(page.locator(".message.user"), "Copy").last().click();
    await becomes(() => page.evaluate(() => navigator.clipboard.readText()), question.trimEnd());
    await shot("question");
  },
};
