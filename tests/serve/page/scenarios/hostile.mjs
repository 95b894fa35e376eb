// Whatever a model, a user or a file says stays text. Each export is a test: { play, options }; see driver.mjs.

import {
  askAndWait, assert, button, enter, failure, importText, intercept, sees, stored, titles,
} from "../reader.mjs";
import { ATTEMPTS } from "../texts.mjs";

/** Nothing that came as text has become anything but text and safe links. */
async function isInert(page) {
  const found = await page.evaluate(() => {
    const here = [...document.querySelectorAll("#messages *, #chats *, #toasts *, #banners *, .bar *")];
    const allowed = /^(?:li|div|p|span|h[2-6]|ol|ul|pre|code|header|strong|em|del|br|hr|blockquote|table|thead|tbody|tr|th|td|a|button|svg|use|h1|select|option|textarea|input)$/;
    const safe = /^(?:https?:\/\/|mailto:)/;
    const inSvg = (element) => element.tagName === "use" && element.getAttribute("href").startsWith("#i-");
    return {
      ran: window.herdWasHere,
      tags: here.map((each) => each.localName).filter((name) => !allowed.test(name)),
      handlers: here.flatMap((each) => each.getAttributeNames()).filter((name) => /^on|^style$|^src/i.test(name)),
      links: here.filter((each) => each.hasAttribute("href") && !inSvg(each)).filter((each) =>
        each.localName !== "a" || !safe.test(each.getAttribute("href")) || each.rel !== "noopener noreferrer" || each.target !== "_blank").map((each) => each.outerHTML),
      scripts: document.scripts.length,
      frames: window.length + document.querySelectorAll("iframe, object, embed, img, base, form:not(#composer, #settings, #key-form)").length,
    };
  });
  assert.deepEqual(found, { ran: undefined, tags: [], handlers: [], links: [], scripts: 1, frames: 0 });
}

export const refuses_hostile_files = {
  async play({ page, url, shot }) {
    await enter(page, url);
    await askAndWait(page, "mine");
    const before = await stored(page);
    const chat = (fields) => JSON.stringify({ format: "herd-conversations", version: 1, chats: [{ id: "abcdefgh12", title: "t", messages: [], ...fields }] });
    const refused = {
      "It is not JSON": "{",
      "It is not an export of this page": "[]",
      "chats is not a list": '{"format":"herd-conversations","version":1,"chats":{"length":1}}',
      "chats[0].messages is not a list": chat({ messages: null }),
      "chats[0].messages[0].text is not a text": chat({ messages: [{ role: "user", text: { toString: 1 } }] }),
      'chats[0].messages[0].role is not "user" or "assistant"': chat({ messages: [{ role: "system", text: "x" }] }),
      "chats[0].messages[0].shown is not one of the versions": chat({ messages: [{ role: "assistant", versions: [] }] }),
      "chats[0].messages[0].shown is not a whole number from 0 to 999": chat({ messages: [{ role: "assistant", versions: [{ text: "x" }], shown: 0.5 }] }),
      "chats[0].settings.temperature is not a number from 0 to 10": chat({ settings: { temperature: 1e999 === 1 ? 0 : "hot" } }),
    };
    for (const [reason, text] of Object.entries(refused)) {
      await importText(page, text, "\u202egpj.exe.json");
      await sees(page, `The file was not imported. ${reason}.`);
    }
    assert.deepEqual(await stored(page), before, "a refused file changes nothing");

    const hostile = `{"format":"herd-conversations","version":1,"__proto__":{"polluted":1},"constructor":{"prototype":{"polluted":1}},"chats":[{
      "id":"__proto__","updated":8000000000000,"title":"\u202e<img src=x onerror=window.herdWasHere=1>","__proto__":{"polluted":1},
      "settings":{"__proto__":{"polluted":1},"model":"</select><script>window.herdWasHere=1</script>","system":"<script>window.herdWasHere=1</script>"},
      "messages":[{"role":"user","text":"<script>window.herdWasHere=1</script>","__proto__":{"polluted":1}},
        {"role":"assistant","shown":0,"versions":[{"text":"[x](javascript:window.herdWasHere=1)<img src=x onerror=window.herdWasHere=1>",
          "model":"<b>","finish":"constructor","error":{"kind":"other","message":"<img src=x onerror=window.herdWasHere=1>"},"stats":{"prompt":1,"completion":2,"first":0.1,"speed":3}}]}]}]}`;
    await importText(page, hostile);
    await sees(page, "1 conversation imported.");
    await page.locator("#chats .open").first().click();
    await sees(page, "System prompt: <script>");
    assert.deepEqual((await titles(page))[0], "<img src=x onerror=window.herdWasHere=1>", "no character turns the title around");
    await shot("hostile");
    await page.reload();
    await sees(page, "System prompt: <script>");
    await isInert(page);
    assert.equal(await page.evaluate(() => ({}).polluted ?? Object.prototype.polluted ?? window.polluted), undefined);
    assert.ok((await stored(page)).every(([name]) => /^herd\.chat\.[0-9a-f]{20}$/.test(name)));
  },
};

export const hostile_text_is_inert = {
  async play({ page, url, shot }) {
    await enter(page, url);
    for (let i = 0; i < ATTEMPTS.length; i += 10) {
      await askAndWait(page, ATTEMPTS.slice(i, i + 10).join("\n\n"));
      await isInert(page);
    }
    await shot("text");
    await page.keyboard.press("Alt+s");
    await page.locator("#system").fill(ATTEMPTS.join("\n"));
    await page.keyboard.press("Escape");
    await intercept(page, failure(400, ATTEMPTS.slice(0, 12).join(" "), ATTEMPTS[0]), failure(429, ATTEMPTS[1], "x", { "Retry-After": "1" }));
    await askAndWait(page, ATTEMPTS[0]);
    await isInert(page);
    await page.reload();
    await page.locator(".message").first().waitFor();
    await isInert(page);
    // Whoever clicks on what looks like a link goes to that address or nowhere.
    const addresses = await page.locator("#messages a").evaluateAll((all) => [...new Set(all.map((each) => new URL(each.href).hostname))].sort());
    assert.deepEqual(addresses.filter((each) => !/^(ok\.example|evil\.example|bank\.example)$/.test(each)), []);
    assert.equal(await page.locator("#messages a").evaluateAll((all) => all.filter((each) => /[\u202a-\u202e\u2066-\u2069]/.test(each.textContent)).length), 0);
    assert.ok((await page.locator(".t-hidden").allInnerTexts()).includes("U+202E"), "characters that turn code around are shown");
  },
};

export const hostile_model_names_are_inert = {
  async play({ page, url }) {
    await page.route("**/v1/models", (route) => route.fulfill({ json: { data: [
      { id: "</option></select><img src=x onerror=window.herdWasHere=1>", context_length: "1e9" }, { id: 5 }, null, { id: "\u202eevil" },
    ] } }));
    await enter(page, url);
    await page.locator("#input").fill("x");
    await isInert(page);
    assert.equal(await page.locator("#model option").count(), 2);
  },
};
