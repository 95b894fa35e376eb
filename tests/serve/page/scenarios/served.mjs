// The same page with `herd serve` itself and a tiny model that says nothing of sense.

import { answer, answered, askAndWait, assert, button, enter, prose, say, sees } from "../reader.mjs";

export const talks_to_herd_serve = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await sees(page, /^\w+ · 512 tokens of context$/);
    await page.keyboard.press("Alt+s");
    await page.getByLabel("Max tokens").fill("60");
    await page.getByLabel("Temperature").fill("0.8");
    await page.getByLabel("Top k").fill("50");
    await page.getByLabel("Min p").fill("0.01");
    await page.getByLabel("Top p").fill("0.95");
    await page.getByLabel("Seed").fill("5");
    await page.getByLabel(/Stop at/).fill("\\n\\n\\n\\n");
    await page.keyboard.press("Escape");
    await askAndWait(page, "Who are you?");
    assert.equal(await page.locator(".problem").count(), 0);
    assert.match(await answer(page).locator(".figures").innerText(), /^\d+ tokens?( · [\d.,]+ tokens\/s)?( · first after [\d.]+ s)?$/);
    assert.match(await page.locator("#context").innerText(), /^\d+ of 512 tokens$/);
    const first = await prose(page).innerText();
    await button(answer(page), "Answer again").click();
    await sees(answer(page), "2 / 2");
    await answered(page);
    assert.equal(await prose(page).innerText(), first, "the same seed gives the same answer");
    await shot("answer");
    await askAndWait(page, "word ".repeat(600));
    await sees(answer(page), /too long.*512.*\d{3,}/);
  },
};

export const stops_herd_serve = {
  async play({ page, url }) {
    await enter(page, url);
    await say(page, "Tell me everything.");
    await page.keyboard.press("Escape");
    await answered(page);
    const running = async () => (await (await fetch(`${url}/v1/models`)).json()).data[0].running;
    const until = Date.now() + 10_000;
    while (await running()) assert.ok(Date.now() < until, "the server goes on with an answer that nobody reads");
    await page.keyboard.press("Alt+n"); // the answer may have come to the end of the context before it was stopped
    await askAndWait(page, "And now?");
    assert.equal(await page.locator(".problem").count(), 0);
  },
};
