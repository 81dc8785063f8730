"""Chromium, and what one does with a page of the explorer in it."""

import base64
import time
from pathlib import Path


class Browser:
    """A headless Chromium. `page` methods speak of the explorer's own elements, by their `data-name`."""

    def __init__(self, chromium, chromedriver, downloads):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(chromedriver))
        self.downloads = Path(downloads)
        behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)

    def quit(self):
        self.driver.quit()

    # ---- the window

    def resize(self, width, height, *, touch=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})

    def prefer(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, path, query=""):
        self.driver.get(Path(path).as_uri() + query)

    def screenshot(self, path):
        """The whole page, however long."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def messages(self):
        """What the console has said."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def errors(self):
        """What the console has called an error."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def asked_for(self):
        """What the page has asked for beside itself; data that it carries and its own blobs do not count."""
        urls = self.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def find(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def actions(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.driver)

    # ---- the explorer

    def choose(self, **values):
        """Give controls a value, as a user does: a select, a number, a slider or a checkbox, by its `data-name`."""
        for name, value in values.items():
            self.script(
                """const control = document.querySelector(`[data-name="${arguments[0]}"]`);
                if (control.type === "checkbox") { if (control.checked !== arguments[1]) control.click(); return; }
                control.value = String(arguments[1]);
                if (control.value !== String(arguments[1])) throw new Error(`${arguments[0]} has no ${arguments[1]}`);
                for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, { bubbles: true }));""",
                name.replace("_", "-"),
                value,
            )

    def go(self, position):
        self.choose(position_0=position[0], position_1=position[1])

    def focus_tap(self, index):
        """Focus a dot of the large map."""
        self.script("document.querySelectorAll('#stage .dot')[arguments[0]].focus()", index)

    def state(self):
        return self.script("return dcn.state()")

    def numbers(self):
        """The whole numbers behind all that are shown, by name. One that is not finite comes as text."""
        return {
            name: float(value)
            for name, value in self.script(
                "return [...document.querySelectorAll('.number')].map(({ dataset }) => [dataset.name, dataset.value])"
            )
        }

    def text(self, name):
        return self.script("return document.querySelector(`[data-name='${arguments[0]}']`).textContent", name)

    def sources(self, name):
        self.find(f"[data-source={name}]").click()

    def point(self, y, x, stage="main"):
        """A point of a map, in pixels of the window."""
        return self.script(
            """const stage = document.querySelector(`[data-stage=${arguments[2]}]`);
            stage.scrollIntoView({ block: "center" });
            const at = new DOMPoint(arguments[1], arguments[0]).matrixTransform(stage.getScreenCTM());
            return [at.x, at.y];""",
            y,
            x,
            stage,
        )

    def until(self, condition, seconds=10):
        """Wait until a condition of the page holds: events that a finger or a file makes come a little later."""
        for _ in range(50 * seconds):
            if condition():
                return
            time.sleep(0.02)
        raise AssertionError(f"not so within {seconds} s: {condition()!r}")

    def saved(self, name):
        """The file that the page saves under this name."""
        path = self.downloads / name
        self.until(lambda: path.is_file() and path.stat().st_size > 0)
        return path
