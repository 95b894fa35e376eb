// What a reader sees when something is wrong. Each export is a test: { play, options }; see driver.mjs.

import {
  answer, answered, answers, askAndWait, assert, becomes, button, ended, enter, exportText, failure, intercept,
  piece, prose, questions, say, sees, SLOW, stream,
} from "../reader.mjs";

export const server_goes_and_comes_back = {
  async play({ page, url, ask, shot }) {
    await enter(page, url);
    await askAndWait(page, "before");
    await ask("stop");
    await askAndWait(page, "lost?");
    await sees(page, /What you wrote is kept/);
    await sees(answer(page), "The server cannot be reached.");
    await shot("gone");
    await page.reload().catch(() => {}); // nothing answers; the next line comes back to the page when the server does
    await ask("start");
    await enter(page, url);
    await page.locator("#chats .open").first().click();
    await becomes(() => questions(page), ["before", "lost?"]);
    await button(answer(page), "Try again").click();
    await becomes(() => answers(page), ["before", "lost?"]);
  },
};

export const server_goes_in_the_middle_of_an_answer = {
  async play({ page, url, ask, shot }) {
    await enter(page, url);
    await say(page, SLOW);
    await page.waitForFunction(() => document.querySelector("[aria-busy] .prose")?.textContent.length > 20);
    await ask("stop");
    await sees(answer(page), /broke off/);
    await sees(page, /What you wrote is kept/);
    assert.ok((await prose(page).innerText()).length > 20, "what had come is kept");
    await shot("broken");
    await say(page, "quick {n}");
    await sees(answer(page), "The server cannot be reached.");
    await ask("start");
    await button(page, "Retry").click();
    await page.waitForFunction(() => /quick \d/.test([...document.querySelectorAll(".prose")].at(-1).textContent));
    await answered(page);
    assert.equal(await page.locator(".banner").count(), 0, "the banner goes when the server is back");
    assert.match(await prose(page).innerText(), /^quick \d+$/);
  },
};

export const waits_when_the_server_is_busy = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await page.evaluate(() => {
      window.seen = new Set();
      const note = () => document.querySelectorAll(".problem p").forEach((each) => seen.add(each.textContent));
      new MutationObserver(note).observe(document.querySelector("#messages"), { childList: true, subtree: true, characterData: true });
    });
    await intercept(page,
      failure(429, "Too many requests.", "rate_limited", { "Retry-After": "3" }),
      failure(503, "The model is loading.", "loading", { "Retry-After": new Date(Date.now() + 60_000).toUTCString() }),
    );
    await say(page, "patience");
    await sees(page, /Too many requests\. Trying again in \d s\./);
    await shot("countdown");
    await sees(page, /The model is loading\. Trying again in [56]\d s\./);
    const seen = await page.evaluate(() => [...window.seen].filter((text) => text.startsWith("Too many")));
    assert.ok(seen.length >= 2 && seen.every((text) => /in [123] s\.$/.test(text)), `it counts down: ${seen}`);
    await button(page, "Try now").click();
    await becomes(() => answers(page), ["patience"]);
    await answered(page);
    assert.equal(await page.locator(".problem").count(), 0);

    await page.unroute("**/v1/chat/completions");
    await intercept(page, failure(429, "Too many requests.", "rate_limited", { "Retry-After": "600" }));
    await say(page, "no patience");
    await sees(page, /Trying again in (600|599) s/);
    await button(page, "Give up").click();
    await becomes(() => answers(page), ["patience"]);
    await button(page.locator(".message.user").last(), "Answer this").click();
    await becomes(() => answers(page), ["patience", "no patience"]);
  },
};

export const says_when_a_conversation_is_too_long = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await askAndWait(page, "word ".repeat(9000));
    await sees(answer(page), /too long.*8192.*9000/);
    await shot("too-long");
    await button(answer(page), "New conversation").click();
    await sees(page, "What would you like to know?");
  },
};

export const shows_errors_of_a_stream = {
  async play({ page, url }) {
    await enter(page, url);
    await intercept(page,
      stream(piece("half"), { error: { message: "The model <b>failed</b>.", type: "server_error", code: "model_error" } }),
      stream(piece("half")),
      stream("{not json"),
      stream({ choices: [] }, { choices: [{ delta: { content: 5 } }] }, ended, "[DONE]"),
      { status: 500, contentType: "text/html", body: "<h1>oops</h1>" },
      { status: 200, contentType: "text/event-stream", body: ": ping\r\n\r\ndata: {\"choices\":\r\ndata: [{\"delta\":{\"content\":\"two lines\"},\"finish_reason\":\"length\"}]}\r\n\r\n" },
    );
    await askAndWait(page, "x");
    await sees(answer(page), "The model <b>failed</b>.");
    assert.deepEqual(await answers(page), ["half"]);
    for (const [name, expected] of [["Try again", /broke off/], ["Try again", /broke off/]]) {
      await button(answer(page), name).click();
      await answered(page);
      await sees(answer(page), expected);
    }
    await button(answer(page), "Try again").click();
    await answered(page);
    assert.equal(await page.locator(".problem").count(), 0);
    await button(answer(page), "Answer again").click();
    await sees(answer(page), "The server answered with status 500.");
    await button(answer(page), "Try again").click();
    await sees(answer(page), "Ended at the limit of tokens.");
    assert.equal(await prose(page).innerText(), "two lines");
  },
};

export const asks_for_a_key = {
  async play({ page, url, ask, shot }) {
    await ask("start", { key: "s3cret" });
    await page.goto(url);
    await sees(page, "This server needs an API key");
    await shot("dialog");
    await page.locator("#key-dialog:modal").waitFor();
    assert.equal(await page.evaluate(() => document.activeElement.id), "key");
    await page.keyboard.type("wrong");
    await page.keyboard.press("Enter");
    await sees(page, "a valid API key is needed");
    await page.keyboard.type("s3cret");
    await page.keyboard.press("Enter");
    await page.locator("#model option").first().waitFor({ state: "attached" });
    await askAndWait(page, "hello");
    assert.deepEqual(await answers(page), ["hello"]);
    const kept = await page.evaluate(() => ({ session: { ...sessionStorage }, local: JSON.stringify(localStorage), cookie: document.cookie }));
    assert.deepEqual(kept.session, { "herd.key": "s3cret" });
    assert.ok(!kept.local.includes("s3cret") && !kept.cookie);
    assert.ok(!(await exportText(page)).includes("s3cret"));
    await page.reload();
    await page.locator("#model option").first().waitFor({ state: "attached" });

    await ask("start", { key: "another" });
    await say(page, "again");
    await sees(page, "a valid API key is needed");
    await button(page, "Cancel").click();
    await sees(answer(page), "a valid API key is needed");
    await button(answer(page), "Try again").click();
    await page.locator("#key").fill("another");
    await page.keyboard.press("Enter");
    await becomes(() => answers(page), ["hello", "again"]);
    await ask("start");
  },
};
