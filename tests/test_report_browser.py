"""A report in a browser: nothing of the data runs, nothing is fetched, and what can be operated works."""

import shutil
from dataclasses import replace

import pytest
from reports import EVIL, METHODS, hostile_predictions, random_predictions, write_run

from bayes_lora.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium was found; on Debian: apt-get install chromium")
ARGUMENTS = [
    *["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
    *["--disable-component-update", "--disable-sync"],
]
OPEN = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def predictions():
    return random_predictions({"colours": ("red", "green", "blue"), "truth": ("yes", "no")})


@pytest.fixture(scope="module")
def plain(predictions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    curve = [{"step": i, "loss": 3.0 - i} for i in (1, 2)]
    return write_report([write_run(folder / "run", predictions, curve=curve)], folder / "report.html")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Two runs, with words that are as wide as several screens."""
    folder, found = tmp_path_factory.mktemp("hostile"), hostile_predictions()
    first, *rest = found.questions
    wide = replace(first.example, input="w" * 500, options=("o" * 300, *first.example.options[1:]))
    found = replace(found, questions=(replace(first, example=wide), *rest))
    small = random_predictions({"y" * 200: ("yes", "no")}, methods={"z" * 100: 1}, count=4)
    runs = [("<script>alert(1)<", found), ("x" * 120, small)]
    return write_report([write_run(folder / name, one) for name, one in runs], folder / "report.html")


@pytest.fixture
def opened(browser):
    """Open a page; what it says on the console, its errors, dialogs and requests are listed in ``page.seen``."""
    contexts = []

    def opened(path, *, width=1000, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.seen = []
        page.on("console", lambda message: page.seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: page.seen.append(f"error: {error}"))
        page.on("request", lambda request: page.seen.append(f"request: {request.url}"))
        page.on("dialog", lambda dialog: (page.seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


def columns(page, table, index):
    """Texts of a column, in the order that is shown."""
    cells = page.locator(f"table.{table} tbody tr > :nth-child({index})")
    return [text.split()[0] if text.split() else "" for text in cells.all_inner_texts()]


def test_nothing_of_the_data_runs_and_nothing_is_fetched(opened, hostile):
    page = opened(hostile)
    page.evaluate(OPEN)
    page.evaluate("document.querySelectorAll('thead button').forEach((one) => one.click())")
    page.evaluate("document.querySelectorAll('.bin').forEach((one) => one.focus())")
    assert page.seen == [f"request: {hostile.as_uri()}"]
    assert page.locator("img").count() == 0 and page.locator("script").count() == 3
    text = page.locator(".bin-panel").first.inner_text()
    assert EVIL[0] in text or EVIL[2] in text


def test_a_policy_stops_scripts_that_are_not_of_the_package(opened, plain):
    page = opened(plain)
    page.evaluate("""() => {
        const made = document.createElement("script");
        made.textContent = "document.title = 'ran'";
        document.body.append(made);
    }""")
    assert page.title() != "ran" and any("Content Security Policy" in line for line in page.seen)


@pytest.mark.parametrize("key", [None, "Enter"])
def test_a_heading_sorts_its_column(opened, plain, key):
    page = opened(plain)
    heading = page.locator("table.methods thead th").nth(2)
    assert heading.inner_text() == "NLL (nats)"

    def press():
        button = heading.locator("button")
        button.click() if key is None else button.press(key)

    before = columns(page, "methods", 3)
    press()
    assert (
        columns(page, "methods", 3) == sorted(before, key=float) and heading.get_attribute("aria-sort") == "ascending"
    )
    press()
    assert columns(page, "methods", 3) == sorted(before, key=float, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    page.locator("table.methods thead button").first.click()
    assert columns(page, "methods", 1) == sorted(name.split()[0] for name in METHODS)
    assert heading.get_attribute("aria-sort") is None


def test_undefined_numbers_stay_at_the_end(opened, plain):
    page = opened(plain)
    page.locator("summary", has_text="All metrics").click()
    button = page.locator("table.all thead button", has_text="floor")
    for sign in (1, -1):
        button.click()
        found = columns(page, "all", 6)
        known = [float(text) for text in found if text]
        assert known == sorted(known, key=lambda value: sign * value) and len(known) == 9
        assert not any(found[len(known) :])


@pytest.mark.parametrize("how", ["hover", "keyboard"])
def test_a_bin_shows_its_questions(opened, plain, predictions, how):
    page = opened(plain)
    panel = page.locator(".bin-panel")
    bins = page.locator('.bin[data-method="pretrained"]')
    facts = [
        {name: one.get_attribute(f"data-{name}") for name in ("start", "end", "count", "right")} for one in bins.all()
    ]
    if how == "keyboard":
        page.locator('.bin[data-method="label counts"]').last.focus()
    for place, one in enumerate(facts):
        bins.nth(place).hover() if how == "hover" else page.keyboard.press("Tab")
        heading = f"pretrained, confidence {one['start']} to {one['end']}: {one['right']} of {one['count']} right"
        assert panel.locator("h3").inner_text() == heading
        start, end = (float(one[name].rstrip("%\u00a0")) / 100 for name in ("start", "end"))
        confidence = predictions.padded("pretrained")[0].exp().amax(1)
        shown = panel.locator("li").all_inner_texts()
        assert len(shown) == int(one["count"]) and sum("right:" in text for text in shown) == int(one["right"])
        inside = [
            question.example.input
            for question, sure in zip(predictions.questions, confidence.tolist(), strict=True)
            if start - 0.006 <= sure <= end + 0.006  # the ends are shown in whole percents
        ]
        assert {text.split("\n")[0] for text in shown} <= set(inside)
    assert bins.last.evaluate("one => one.classList.contains('chosen')")


def test_the_main_method_s_most_confident_bin_is_shown_at_first(opened, plain):
    page = opened(plain)
    last = page.locator(f'.bin[data-method="{[*METHODS][-1]}"]').last
    assert last.get_attribute("data-start") in page.locator(".bin-panel h3").inner_text()


def test_a_narrow_screen_shows_the_questions_of_a_bin_that_is_tapped(opened, plain):
    page = opened(plain, width=360)
    page.locator(".bin").first.click()
    box = page.locator(".bin-panel").bounding_box()
    assert 0 <= box["y"] and box["y"] + box["height"] <= 801 and box["height"] > 200


def test_dark_and_light_differ(opened, plain):
    colours = "one => [getComputedStyle(one).backgroundColor, getComputedStyle(one).color]"
    light, dark = (opened(plain, scheme=scheme).locator("body").evaluate(colours) for scheme in ("light", "dark"))
    assert light == ["rgb(255, 255, 255)", "rgb(51, 51, 51)"]
    assert dark == ["rgb(21, 24, 29)", "rgb(227, 229, 232)"]
    text = opened(plain, scheme="dark").locator("svg.plot text").first
    assert text.evaluate("one => getComputedStyle(one).fill") == dark[1]


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_the_page_is_never_wider_than_the_window(opened, request, kind):
    page = opened(request.getfixturevalue(kind))
    page.evaluate(OPEN)
    for width in (360, 800, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        wide = """width => [...document.querySelectorAll("body *")].filter(
            (one) => one.getBoundingClientRect().right > width && !one.closest(".scroll")
        ).map((one) => one.tagName + "." + one.className)"""
        assert page.evaluate("document.documentElement.scrollWidth") == width, page.evaluate(wide, width)
