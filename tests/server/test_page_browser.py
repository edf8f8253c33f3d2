"""The page in Chromium, with a server in a process of its own."""

from __future__ import annotations

import io
import json
import re
import shutil
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browsing import LISTEN, heard, pcm, same, speak, until
from serving import LONG, Server, serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: `make clients` installs it")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The system's. None: Playwright's own, if it is there."""
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SAID = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def chromium(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser whose microphone hears a speech of the server again and again."""
    spoken = server.ask("POST", "/v1/audio/speech", {"input": SAID, "seed": 1, "response_format": "wav"}).read()
    file = tmp_path_factory.mktemp("microphone") / "speech.wav"
    file.write_bytes(spoken)
    options = f"use-fake-ui-for-media-stream use-fake-device-for-media-stream use-file-for-fake-audio-capture={file}".split()
    options += ["autoplay-policy=no-user-gesture-required", "no-sandbox"]
    with playwright.sync_playwright() as play:
        if CHROMIUM is None and not Path(play.chromium.executable_path).is_file():
            pytest.skip("needs Chromium: `apt-get install chromium`, or `.venv/bin/playwright install chromium`")
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[f"--{option}" for option in options])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the page of a server; a fault on the console or a request elsewhere fails the test."""
    faults: list[str] = []
    contexts = []

    def opened(server: Server, *, expected: str = "", prepare: Any = None, **options: Any) -> Any:
        """expected: a pattern of what the browser says of replies that are errors. prepare: called before the page loads."""
        context = chromium.new_context(permissions=["microphone"], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.add_init_script(LISTEN)

        def said(message: Any) -> None:
            if message.type in ("error", "warning") and not (expected and re.search(expected, message.text)):
                faults.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith((f"http://127.0.0.1:{server.port}/", "blob:", "data:")):
                faults.append(request.url)

        page.on("console", said)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", asked)
        if prepare:
            prepare(page)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#state[data-state=ok]")
        page.wait_for_selector("#voices li")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def test_speech_is_heard_while_it_is_made_without_gap_or_loss(server: Server, visit: Any) -> None:
    page = visit(server)
    assert page.inner_text("#model") == "minnow · Fish Audio S2-Pro · English · 16\u00a0kHz"
    assert [each.split("\n")[0] for each in page.locator("#voices label").all_inner_texts()] == ["awb", "rms", "slt"]
    body = speak(page, f"{SAID} " * 3)
    parts = page.evaluate("heard.map(({ at, sounds, rate, samples }) => [at, sounds, rate, samples.length])")
    assert len(parts) > 2
    assert parts[0][1] < page.evaluate("replied[0]"), "sound begins before the reply ends"
    assert {rate for _, _, rate, _ in parts} == {16000}
    ends = [at + length / rate for at, _, rate, length in parts]
    pauses = [after[0] - end for end, after in zip(ends, parts[1:], strict=False)]
    assert min(pauses) > -1e-6, "parts do not overlap"
    if "pauses" not in page.inner_text("#progress"):
        assert max(pauses) < 1e-6, "parts follow one another"
    assert same(heard(page), pcm(server, body))
    assert re.fullmatch(r"\d+\.\d\d s", page.inner_text("#first"))
    assert float(page.inner_text("#rtf")) > 0
    assert page.inner_text("#length") == f"{len(pcm(server, body)) / 16000:.1f} s"
    assert page.inner_text("#used-seed") == str(body["seed"])
    painted = "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 300, 90).data].filter(Boolean).length"
    assert page.evaluate(painted) > 1000


def test_the_page_says_what_the_model_does_not_read_well(server: Server, visit: Any) -> None:
    page = visit(server)
    assert "seconds of work for each second of speech" in page.inner_text("#player")
    speak(page, "Hi 7.")
    assert "Warning: minnow does not read well: digits 7." in page.inner_text("#progress")
    speak(page, "Hi.", takes=2)
    assert "Warning" not in page.inner_text("#progress")


def test_keys_speak_and_stop(server: Server, visit: Any) -> None:
    page = visit(server)
    page.fill("#text", LONG)
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    until(page, "heard.length > 1")
    assert server.health()["queue"]["active"] == 1
    page.keyboard.press("Escape")
    page.wait_for_selector("#progress:text('Stopped.')")
    assert page.is_disabled("#stop")
    until(page, "fetch('health').then((reply) => reply.json()).then(({ queue }) => queue.active === 0)")
    assert "stopped" in page.inner_text("#history")
    page.click("#play")  # what was heard can be heard again
    assert page.is_enabled("#stop")


def test_settings_are_in_the_request(server: Server, visit: Any) -> None:
    page = visit(server)
    assert page.get_attribute("#temperature", "placeholder") == "0.6"
    assert page.is_hidden("#repetition_penalty"), "minnow has none"
    page.check("input[value=slt]")
    for name, value in {"seed": "7", "temperature": "0.5", "top_p": "0.9", "top_k": "0"}.items():
        page.fill(f"#{name}", value)
    for name, value in {"speed": "1.5", "volume_db": "-6"}.items():
        page.locator(f"#{name}").fill(value)
    body = speak(page, "Hi.")
    wanted = {"seed": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "speed": 1.5, "volume_db": -6}
    common = {"input": "Hi.", "voice": "slt", "response_format": "pcm", "sample_rate": 16000, "stream": True}
    assert body == {**common, **wanted}
    page.fill("#temperature", "5")
    requests: list[Any] = []
    page.on("request", lambda request: requests.append(request))
    page.click("#speak")
    assert page.evaluate("document.activeElement.id") == "temperature", "the browser says what is wrong with it"
    assert not requests
    page.click("#reset")
    assert set(speak(page, takes=2)) == {*common, "seed"}


def test_what_the_model_lacks_is_not_offered_and_what_it_ignores_is_said(server: Server, visit: Any) -> None:
    """The model says that it has a repetition penalty, but neither speakers nor voices; minnow ignores the penalty."""

    def prepare(page: Any) -> None:
        (model,) = json.loads(server.ask("GET", "/v1/models").read())["data"]
        sampling = {**model["sampling"], "repetition_penalty": 1.2}
        other = {**model, "family": "Another", "languages": [], "speakers": False, "sampling": sampling}
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [other]}))
        page.route("**/v1/voices", lambda route: route.fulfill(json={"voices": [], "default_voice": None}))

    page = visit(server, prepare=prepare)
    assert page.inner_text("#model") == "minnow · Another · 16\u00a0kHz"
    assert page.is_hidden("#modes")
    assert page.locator("#voices label").all_inner_texts() == ["No voice\nthe model chooses one"]
    assert page.get_attribute("#repetition_penalty", "placeholder") == "1.2"
    page.fill("#repetition_penalty", "1.1")
    body = speak(page, "Hi.")
    assert "voice" not in body
    assert body["repetition_penalty"] == 1.1
    assert page.inner_text("#progress") == "Not used by this model: repetition_penalty."


def test_downloads_have_the_same_speech_in_each_format(server: Server, visit: Any) -> None:
    page = visit(server)
    body = speak(page, "Hi.")
    begins = {"mp3": b"\xff", "opus": b"OggS", "aac": b"\xff", "flac": b"fLaC", "wav": b"RIFF"}
    for format in ("wav", "mp3", "opus", "aac", "flac", "pcm"):
        with page.expect_download() as downloaded:
            page.click(f"#downloads button:text-is('{format}')")
        assert downloaded.value.suggested_filename == f"awb-{body['seed']}.{format}"
        data = Path(downloaded.value.path()).read_bytes()
        assert data.startswith(begins.get(format, b""))
        if format == "wav":
            with wave.open(io.BytesIO(data)) as file:
                data = file.readframes(file.getnframes())
        if format in ("wav", "pcm"):
            assert same(np.frombuffer(data, "<i2"), heard(page))


def test_the_microphone_gives_a_voice_that_speaks_and_is_kept(server: Server, visit: Any) -> None:
    page = visit(server)
    page.click("summary")
    assert "2 to 5 s" in page.inner_text("#advice")
    page.click("#record")
    until(page, "document.getElementById('level').value > 0.3")
    until(page, "parseFloat(document.getElementById('recorded').textContent) > 2.5")
    page.click("#record:text('Stop recording')")
    page.wait_for_selector("#preview")
    assert page.locator("#voices label").first.inner_text().strip() == "Your recording"
    assert page.is_checked("#voices li:first-child input")
    page.fill("#transcript", SAID)
    body = speak(page, "Hi.")
    assert body["ref_audio"].startswith("data:audio/webm")
    assert body["ref_text"] == SAID
    assert "voice" not in body
    assert "your recording" in page.inner_text("#history")
    page.fill("#name", "mine")
    page.click("#keep")
    page.wait_for_selector("#kept:text('Kept as mine.')")
    assert page.is_checked("input[value=mine]")
    assert speak(page, takes=2)["voice"] == "mine"
    with page.expect_response("**/v1/voices/mine/sample") as sampled:
        page.click("[aria-label='Hear mine']")
    assert sampled.value.status == 200
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("[aria-label='Delete mine']")
    until(page, "!document.querySelector('input[value=mine]')")


def test_a_file_is_a_reference_too(server: Server, visit: Any) -> None:
    page = visit(server)
    spoken = server.ask("POST", "/v1/audio/speech", {"input": SAID, "seed": 3, "response_format": "wav"}).read()
    page.click("summary")
    page.set_input_files("#upload", {"name": "me.wav", "mimeType": "audio/wav", "buffer": spoken})
    page.fill("#transcript", SAID)
    assert page.is_checked("#voices li:first-child input")
    assert speak(page, "Hi.")["ref_audio"].startswith("data:audio/wav;base64,")
    assert len(heard(page))


def test_errors_are_the_servers_words(server: Server, visit: Any) -> None:
    page = visit(server, expected="status of 400")
    page.fill("#text", " ")
    with page.expect_response("**/audio/speech") as replied:
        page.click("#speak")
    page.wait_for_selector("#error")
    assert page.inner_text("#error") == replied.value.json()["error"]["message"]
    assert page.is_enabled("#speak")
    speak(page, "Hi.")
    assert page.is_hidden("#error")
    page.click("summary")
    page.set_input_files("#upload", {"name": "me.wav", "mimeType": "audio/wav", "buffer": b"no sound"})
    page.click("#keep")
    page.wait_for_selector("#error")
    assert page.inner_text("#kept") == ""
    short = server.ask("POST", "/v1/audio/speech", {"input": "Hi.", "seed": 3, "response_format": "wav"}).read()
    page.set_input_files("#upload", {"name": "me.wav", "mimeType": "audio/wav", "buffer": short})
    page.fill("#transcript", "Hi.")
    page.fill("#name", "short")
    page.click("#keep")
    page.wait_for_selector("#kept:text('Kept as short. Warning: the recording is')")
    assert page.is_hidden("#error")
    server.ask("DELETE", "/v1/voices/short").read()


def test_a_server_that_goes_away_is_an_error_and_what_was_heard_stays(visit: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        page = visit(server, expected="ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION")
        page.fill("#text", LONG)
        page.click("#speak")
        until(page, "heard.length > 1")
        server.process.kill()
        page.wait_for_selector("#error:text('The server broke the speech off')")
        assert "broken off" in page.inner_text("#history")
        assert page.is_enabled("#play")
        page.click("#speak")
        page.wait_for_selector("#error:text('The server cannot be reached')")
        assert page.is_disabled("#stop")
        assert page.locator("#history li").count() == 1


def test_a_microphone_that_is_refused_is_an_error(server: Server, visit: Any) -> None:
    page = visit(server)
    page.evaluate("() => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('Permission denied') } }")
    page.click("summary")
    page.click("#record")
    page.wait_for_selector("#error:text('Permission denied')")
    assert page.is_enabled("#record:text('Record')")


def test_a_dialogue_has_a_speaker_for_each_voice(server: Server, visit: Any) -> None:
    page = visit(server)
    page.check("input[value=dialogue]", force=True)
    page.click("text=Add a line")
    words = ["Hi.", "Good morning.", "How are you?"]
    for n, (voice, text) in enumerate(zip(("slt", "rms", "slt"), words, strict=True)):
        page.locator(".line select").nth(n).select_option(voice)
        page.locator(".line textarea").nth(n).fill(text)
    body = speak(page)
    assert body["input"] == "<|speaker:0|>Hi.\n<|speaker:1|>Good morning.\n<|speaker:0|>How are you?"
    assert body["voice"] == ["slt", "rms"]
    assert same(heard(page), pcm(server, body))


def test_the_history_is_heard_again_without_the_server_and_comes_back(server: Server, visit: Any) -> None:
    page = visit(server)
    page.check("input[value=rms]")
    first = speak(page, "Hi.")
    samples = heard(page)
    page.check("input[value=awb]")
    speak(page, "Good morning.", takes=2)
    requests: list[Any] = []
    page.on("request", lambda request: requests.append(request) if request.method == "POST" else None)
    page.evaluate("heard = []")
    page.click("#history li:nth-child(2) button:text-is('Play')")
    assert np.array_equal(heard(page), samples)
    assert page.inner_text("#used-seed") == str(first["seed"])
    page.evaluate("heard = []")
    page.locator("#position").fill("0.1")
    assert np.array_equal(heard(page), samples[1600:])
    assert not requests
    page.click("#history li:nth-child(2) button:text-is('Use again')")
    assert page.input_value("#text") == "Hi."
    assert speak(page, takes=3) == first


def test_a_key_is_asked_for_and_kept_for_the_tab_only(visit: Any, tmp_path: Path) -> None:
    with serving(tmp_path, FISHRT_API_KEY="secret") as server:
        page = visit(server, expected="status of 401")
        assert page.is_visible("#key")
        page.click("#speak")
        page.wait_for_selector("#error:text('an API key is needed')")
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        page.click("#speak")
        page.wait_for_selector("#error:text('the API key is wrong')")
        page.fill("#key-value", "secret")
        page.keyboard.press("Enter")
        speak(page, "Hi.")
        with page.expect_response("**/sample") as sampled:
            page.click("[aria-label='Hear awb']")
        assert sampled.value.status == 200
        assert page.evaluate("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
        page.reload()
        page.wait_for_selector("#state[data-state=ok]")
        assert page.is_hidden("#key")
        speak(page, "Hi.")
        page.close()
        assert "secret" not in server.log


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_small_screen(server: Server, visit: Any, scheme: str) -> None:
    page = visit(server, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.click("summary")
    speak(page, "Hi. " + "Donaudampfschiff" * 5)
    page.evaluate("document.getElementById('error').textContent = 'x'.repeat(200)")
    page.evaluate("for (const each of document.querySelectorAll('[hidden]')) each.hidden = false")
    page.evaluate("document.querySelector('input[value=dialogue]').click()")
    wide = """[...document.querySelectorAll("body *")].filter((each) => each.getBoundingClientRect().right > 361)
        .map((each) => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_every_control_has_a_name_and_a_visible_focus(server: Server, visit: Any) -> None:
    page = visit(server)
    speak(page, "Hi.")
    page.click("summary")
    nameless = """[...document.querySelectorAll("button, input, textarea, select, meter")].filter((each) =>
        !each.ariaLabel && !each.textContent.trim() && !each.labels?.length).map((each) => each.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.focus("#text")
    ring = """for (let at = document.activeElement; at && at !== document.body; at = at.parentElement)
        if (getComputedStyle(at).outlineStyle !== "none") return true;
        return document.activeElement === document.body;"""
    for _ in range(25):
        page.keyboard.press("Tab")
        assert page.evaluate(f"() => {{ {ring} }}"), page.evaluate("document.activeElement.outerHTML")


def test_a_long_speech_is_given_to_the_loudspeaker_little_by_little(server: Server, visit: Any) -> None:
    page = visit(server)
    given = page.evaluate("""async () => {
        const { Player } = await import("/page/player.js");
        const player = new Player();
        player.open(16000);
        player.push(new Int16Array(100 * 16000));
        player.finish();
        const parts = heard.map(({ at, samples }) => [at, samples.length / 16000]);
        const playing = player.playing;
        player.stop();
        return { parts, playing, after: player.playing };
    }""")
    assert 30 <= sum(length for _, length in given["parts"]) <= 40
    assert all(
        abs(at + length - after) < 1e-6 for (at, length), (after, _) in zip(given["parts"], given["parts"][1:], strict=False)
    )
    assert (given["playing"], given["after"]) == (True, False)


def test_speech_that_comes_too_late_makes_a_pause_and_loses_nothing(server: Server, visit: Any) -> None:
    page = visit(server)
    given = page.evaluate("""async () => {
        const { Player } = await import("/page/player.js");
        const player = new Player();
        const ended = new Promise((resolve) => (player.onend = resolve));
        player.open(16000);
        player.push(new Int16Array(1600));
        while (player.position < 0.1) await new Promise((resolve) => setTimeout(resolve, 20));
        await new Promise((resolve) => setTimeout(resolve, 100));
        const waiting = player.playing;
        player.push(new Int16Array(1600));
        player.finish();
        await ended;
        return { gaps: player.gaps, waiting, playing: player.playing, heard: heard.map(({ at }) => at) };
    }""")
    assert (given["gaps"], given["waiting"], given["playing"]) == (1, True, False)
    assert given["heard"][1] > given["heard"][0] + 0.1
