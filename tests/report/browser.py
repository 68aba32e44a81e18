"""A real headless Chromium, driven over its own pipe with the standard library alone."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab. Commands of the DevTools protocol go to file descriptor 3 and answers come from 4, ended by a zero byte.

    `errors` collects exceptions, console errors and failed loads of the pages shown.
    """

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands_out, self.commands = os.pipe()
        self.answers, answers_in = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands_out, answers_in)]  # apart from 3 and 4
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", "--hide-scrollbars", f"--user-data-dir={self.profile.name}"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        shell = ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash"]
        self.process = subprocess.Popen([*shell, CHROMIUM, *flags], pass_fds=ends, **quiet)
        for end in (commands_out, answers_in, *ends):
            os.close(end)
        self.buffer, self.count, self.session, self.errors, self.seen = b"", 0, None, [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.answers, 1 << 20)
            assert piece, "the browser ended"
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        self.seen.append(method)
        wrong = method in ("Runtime.exceptionThrown", "Network.loadingFailed")
        wrong |= method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
        wrong |= method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")
        if wrong:
            self.errors.append(message)
        return message

    def open(self, path, width, height=844):
        """Show a local page at so many CSS pixels, as a phone does below 600."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.seen.clear()
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        while "Page.loadEventFired" not in self.seen:
            self.receive()

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path, *, whole=False):
        shown = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shown["data"]))

    def close(self):
        self.send("Browser.close")
        self.process.wait(timeout=30)
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()
