// Runs scenarios in Chromium for test_serve_page.py. One line of JSON each way:
//   in   {"scenario": "stop", "url": "http://127.0.0.1:…/", "screenshots": "folder"}
//   out  {"ask": "stop"} and the like, which the test answers with a line, then {"passed": true} or {"failed": "why"}

import { readdirSync } from "node:fs";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const EXECUTABLE = process.env.HERD_CHROMIUM ?? "/usr/bin/chromium";
const ARGUMENTS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const PATIENCE = 10_000; // ms for each condition that is waited for

const files = readdirSync(new URL("scenarios", import.meta.url)).filter((name) => name.endsWith(".mjs"));
const scenarios = Object.assign({}, ...await Promise.all(files.map((name) => import(`./scenarios/${name}`))));
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const receive = async () => JSON.parse((await lines.next()).value ?? "null");
const reply = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

/** Has the test do something to the server, and waits until it is done. */
async function ask(what, more = {}) {
  reply({ ask: what, ...more });
  return receive();
}

/** What no scenario may cause: script errors, violations of the policy, requests to anywhere else, dialogs. */
async function watch(context, url) {
  const faults = [];
  await context.exposeBinding("herdViolation", (_, text) => faults.push(`policy: ${text}`));
  await context.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => {
      window.herdViolation(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
    });
  });
  context.on("request", (request) => {
    const target = new URL(request.url());
    if (!["data:", "blob:"].includes(target.protocol) && target.origin !== new URL(url).origin) faults.push(`request: ${request.url()}`);
  });
  context.on("weberror", (error) => faults.push(`script: ${error.error().stack}`));
  context.on("dialog", (dialog) => {
    faults.push(`dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  context.on("console", (message) => {
    const isExpected = message.text().startsWith("Failed to load resource"); // the browser's own line for each status above 399
    if (["error", "warning"].includes(message.type()) && !isExpected) faults.push(`console: ${message.text()}`);
  });
  return faults;
}

async function run(browser, { scenario, url, screenshots }) {
  const { options = {}, play } = scenarios[scenario];
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, acceptDownloads: true, ...options });
  context.setDefaultTimeout(PATIENCE);
  await context.grantPermissions(["clipboard-read", "clipboard-write"]);
  const faults = await watch(context, url);
  const page = await context.newPage();
  const shot = (name) => page.screenshot({ path: `${screenshots}/${scenario}-${name}.png`, animations: "disabled" });
  try {
    await play({ page, context, url, ask, shot });
    if (faults.length) throw new Error(faults.join("\n"));
    return { passed: true };
  } catch (error) {
    await shot("failed").catch(() => {});
    return { failed: [error.stack, ...faults].join("\n") };
  } finally {
    await context.close();
  }
}

const browser = await chromium.launch({ executablePath: EXECUTABLE, args: ARGUMENTS });
reply({ scenarios: Object.keys(scenarios) });
for (let task = await receive(); task; task = await receive()) reply(await run(browser, task));
await browser.close();
process.exit();
