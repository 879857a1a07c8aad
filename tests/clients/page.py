#!/usr/bin/env python3
"""Opens a running server's page in Chromium and asks what is the capital of France, as a person would.

    apt-get install chromium
    page.py http://127.0.0.1:8000 [--api-key KEY] [--answer Paris] [--screenshot docs/page.png]

Needs nothing but Chromium and Python: the browser is spoken to over a pipe. Prints a line a check; exits with 1 at the
first that failed. A model that does not know is given another --answer, or "" for any.
"""

import argparse
import base64
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time

SIZE = (1200, 800)
PHONE = (390, 780)
WITHIN = 120
# What came into the conversation, as it came; and what the page's policy kept from running.
WATCH = """
window.seen = [];
window.refused = [];
document.addEventListener("securitypolicyviolation", (e) => refused.push(e.violatedDirective + " " + e.blockedURI));
document.addEventListener("DOMContentLoaded", () => {
  new MutationObserver(() => {
    const answers = document.querySelectorAll("article.answer .prose");
    const text = answers.length ? answers[answers.length - 1].textContent : "";
    if (text && text !== seen.at(-1)) seen.push(text);
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
});
"""
# How many parts of answers came.
COUNT_PIECES = """
window.pieces = 0;
const take = Answer.prototype.take;
Answer.prototype.take = function (chunk) {
  pieces += chunk.choices[0]?.delta.content ? 1 : 0;
  take.call(this, chunk);
};
"""
# A person who stops an answer at its first word.
STOP_AT_FIRST = """
const answers = document.getElementsByTagName("article");
const before = answers.length;
new MutationObserver((_, observer) => {
  if (answers.length === before || !answers[before].querySelector(".prose")) return;
  observer.disconnect();
  document.getElementById("stop").click();
}).observe(document.getElementById("talk"), { subtree: true, childList: true });
"""


class Browser:
    """A headless Chromium with one page, over its remote debugging pipe: JSON, each ended by a zero byte."""

    def __init__(self, program, profile):
        theirs, ours = os.pipe(), os.pipe()
        # Away from 3 and 4, where the browser wants them.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs[0], ours[1])]
        actions = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
        log = os.open(os.path.join(profile, "log"), os.O_WRONLY | os.O_CREAT)
        actions += [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        command = [program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"]
        command += ["--no-first-run", "--disable-gpu", "--disable-background-networking"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")
        self.to = os.fdopen(theirs[1], "wb", buffering=0)
        self.of = os.fdopen(ours[0], "rb", buffering=0)
        self.process = os.posix_spawn(program, [*command, "about:blank"], os.environ, file_actions=actions)
        for end in (theirs[0], ours[1], *ends, log):
            os.close(end)
        self.rest = b""
        self.count = 0
        self.session = None
        self.faults = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)

    def read(self):
        while b"\0" not in self.rest:
            more = self.of.read(1 << 16)
            assert more, "the browser ended"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self.count += 1
        request = {"id": self.count, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        self.to.write(json.dumps(request).encode() + b"\0")
        while True:
            message = self.read()
            if message.get("id") == self.count:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.note(message)

    def note(self, event):
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.faults.append(params["exceptionDetails"])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.faults.append(params["entry"].get("text", "") + " " + params["entry"].get("url", ""))

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def until(self, what, expression):
        end = time.monotonic() + WITHIN
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"never: {what}"
            time.sleep(0.05)
        return value

    def text(self, name):
        return self.js(f"document.getElementById({json.dumps(name)}).textContent")

    def click(self, name):
        self.js(f"document.getElementById({json.dumps(name)}).click()")

    def type(self, name, text):
        self.js(f"document.getElementById({json.dumps(name)}).focus()")
        self.js("document.activeElement.select?.()")
        self.call("Input.insertText", text=text)

    def key(self, name, shift=False):
        key = {"key": name, "code": name, "windowsVirtualKeyCode": 13, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def size(self, size, phone=False):
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def theme(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path):
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        with open(path, "wb") as file:
            file.write(data)
        return len(data)

    def close(self):
        self.session = None
        self.to.write(json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        os.waitpid(self.process, 0)


def done(what, found=""):
    print(f"ok    {what}" + (f": {found}" if found else ""), flush=True)


def run(browser, options):
    browser.size(SIZE)
    browser.theme("light")
    browser.call("Page.navigate", url=options.url)
    browser.until("the page", "location.href !== 'about:blank' && document.readyState === 'complete'")
    if options.api_key:
        browser.until("the page wants a key", "!document.getElementById('key').hidden")
        assert browser.text("state") == "wants a key", browser.text("state")
        browser.type("secret", "none-of-the-server's")
        browser.key("Enter")
        browser.until("another is wanted", "document.getElementById('wanted').textContent.includes('Another')")
        # The two refusals are errors to the browser.
        refused = [fault for fault in browser.faults if "401" in str(fault)]
        assert len(refused) == 2, browser.faults
        browser.faults.clear()
        browser.type("secret", options.api_key)
        browser.key("Enter")
        done("it asks for a key")
    browser.until("the server is ready", "document.getElementById('state').textContent === 'ready'")
    before = {name: browser.text(name) for name in ("generated", "ended", "uptime")}
    assert browser.text("model") != "dsv4" and len(browser.text("artifact")) > 8, browser.text("artifact")
    assert "free of" in browser.text("machine") and "B" in browser.text("process"), browser.text("machine")
    done("numbers of the server", f"{browser.text('model')}, {browser.text('process')}, up {before['uptime']}")

    browser.js("document.getElementById('think').checked = false")
    browser.type("temperature", "0")
    browser.js(COUNT_PIECES)
    browser.type("text", "What is")
    browser.key("Enter", shift=True)
    assert browser.js("document.getElementById('text').value") == "What is\n", "Shift+Enter begins a new line"
    browser.type("text", "What is the capital of France?")
    browser.key("Enter")
    over = "document.getElementById('stop').hidden && document.querySelector('article.answer .note').textContent"
    note = browser.until("the answer's end", over)
    seen, pieces = browser.js("seen"), browser.js("pieces")
    assert seen and options.answer in seen[-1], seen
    assert all(b.startswith(a) for a, b in zip(seen, seen[1:])), seen
    # A browser may show several at once.
    assert pieces > 1, f"{pieces} pieces of {seen[-1]!r}"
    done("an answer streams in", f"{pieces} pieces of {seen[-1]!r}, shown in {len(seen)} steps")
    assert "tokens/s" in note and "first after" in note and "drafts" in note, note
    done("what it took", note)

    for name in ("generated", "ended", "uptime"):
        browser.until(f"{name} moves", f"document.getElementById('{name}').textContent !== {json.dumps(before[name])}")
    rate = browser.until("a rate", "Number(document.getElementById('rate').textContent.replace(',', ''))")
    points = browser.js("document.getElementById('line').points.numberOfItems")
    done("numbers move", f"{rate} tokens/s, a line of {points} points, {browser.text('generated')} tokens in all")

    question = "Tell me a long story of France.\nThen another."
    browser.type("text", question)
    browser.js("submit(); document.getElementById('stop').click()")
    browser.until("it is stopped", "asking === null")
    assert browser.js("document.getElementById('text').value") == question, "a question stopped at once can be asked again"
    browser.js(STOP_AT_FIRST)
    browser.key("Enter")
    browser.until("it is stopped", "asking === null")
    browser.until("nothing runs", "document.getElementById('running').textContent.startsWith('0')")
    note = browser.js("[...document.querySelectorAll('.note')].at(-1).textContent")
    assert note.startswith("stopped"), note
    assert browser.js("messages.length") == 4, "what was said before the stop stays in the conversation"
    done("an answer is stopped", note)

    browser.js("answer_of_a_test = new Answer()")
    browser.js("document.getElementById('talk').append(answer_of_a_test.root)")
    hostile = "<img src=x onerror='window.hit = 1'>\n```html\n<script>window.hit = 1</script>\n```\ndone"
    chunk = {"choices": [{"delta": {"reasoning_content": hostile, "content": hostile}}]}
    browser.js(f"answer_of_a_test.take({json.dumps(chunk)}); answer_of_a_test.end('')")
    shape = "[...answer_of_a_test.root.querySelectorAll('.prose, pre, img, script')].map((e) => e.tagName).join()"
    assert browser.js(shape) == "DIV,PRE,DIV,DIV,PRE,DIV", browser.js(shape)
    browser.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hit = 2'}))")
    assert browser.js("window.hit") is None, "text of a model runs"
    assert any("script-src" in found for found in browser.js("refused")), browser.js("refused")
    assert len(browser.js("refused")) == 1, browser.js("refused")
    browser.faults = [fault for fault in browser.faults if "Content Security Policy" not in str(fault)]
    done("text stays text")

    browser.click("fresh")
    assert browser.js("document.querySelectorAll('article, .user').length") == 0 and browser.js("messages.length") == 0
    browser.size(PHONE, phone=True)
    wide = browser.js("document.documentElement.scrollWidth")
    assert wide <= PHONE[0], f"{wide} wide on a phone"
    browser.until("numbers fold up", "!document.getElementById('numbers').open")
    assert "tokens/s" in browser.text("brief"), browser.text("brief")
    browser.size(SIZE)
    done("a new conversation; a phone")

    if options.screenshot:
        # Some seconds of numbers, too.
        for text in ("What is the capital of France?", "And of Italy?", "And of Spain?"):
            browser.type("text", text)
            browser.key("Enter")
            browser.until("the answer's end", "document.getElementById('stop').hidden")
            time.sleep(2.5)
        browser.theme(options.theme)
        size = browser.screenshot(options.screenshot)
        assert size < 200_000, f"{size} bytes"
        done("screenshot", f"{options.screenshot}, {size} bytes")
    assert not browser.faults, browser.faults
    done("no error in the browser")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--api-key")
    parser.add_argument("--answer", default="Paris")
    parser.add_argument("--screenshot")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    if not options.browser:
        sys.exit("found no Chromium\n  help: apt-get install chromium, or give --browser")
    profile = tempfile.mkdtemp(prefix="page-")
    browser = Browser(options.browser, profile)
    try:
        run(browser, options)
    except AssertionError as failed:
        sys.exit(f"FAILED {failed}")
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)


if __name__ == "__main__":
    main()
