"""The page to try a model, in a real browser."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from diffmoe.capacity.calibration import EVERY_TOKEN
from diffmoe.capacity.meter import CapacityMeter
from diffmoe.capacity.thresholds import Calibrated, store, stored
from diffmoe.clock import Clock
from diffmoe.data.manifest import TextContent
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.latent_spec import LatentSpec
from diffmoe.routing_report.demo import build_page
from diffmoe.sampling.dial import Dial
from diffmoe.sampling.passes import trajectory_passes
from diffmoe.sampling.sampler import Origin, Sampler
from diffmoe.text.prompts import create_prompts, encoder_of
from tests.helpers.networks import CONFIG, network_of
from tests.helpers.processes import free_port
from tests.helpers.runs import pack, run_config, train
from tests.helpers.tiny import BYTES, tiny_config
from tests.helpers.tools import tool

ROOT = Path(__file__).parents[2]


def opened(folder: Path, config=CONFIG) -> Sampler:
    """As if it had been opened from a folder."""
    latents = LatentSpec(shape=(2, 8, 8))
    origin = Origin(folder, "ema", latents, (), Clock(samples=0, step=0, skipped=0))
    return Sampler(network_of(config), config, origin=origin)


@pytest.mark.slow
def test_the_dial_takes_any_capacity_between_calibrated_ones(tmp_path):
    sampler = opened(tmp_path)
    said: list[str] = []
    dial = Dial.of(sampler, report=said.append)
    assert dial.capacities == [0.25, 0.5, 1.0, 1.5, 2.0]
    assert said[0] == "calibrating capacity 0.25"
    assert list(stored(tmp_path)) == [f"dial {capacity:g}" for capacity in dial.capacities]
    again = Dial.of(opened(tmp_path), report=pytest.fail)
    assert torch.equal(again.at(0.7).calibrated_LE, dial.at(0.7).calibrated_LE)
    settings = SamplingSettings(steps=20, guidance=1.5)
    passes = trajectory_passes(sampler, [k % 5 for k in range(16)], 16, settings)
    met = []
    for capacity in (0.1, 0.25, 0.7, 1.0, 1.3, 2.0, 9.0):
        meter = CapacityMeter()
        with sampler.network.routed(dial.at(capacity)):
            passes.run(meter)
        met.append(meter.read().average)
    assert met == sorted(met)
    assert met == pytest.approx([0.25, 0.25, 0.7, 1.0, 1.3, 2.0, 2.0], rel=0.1)
    between = dial.at(0.75).calibrated_LE
    for capacity, closer in ((0.5, torch.less), (1.0, torch.greater)):
        assert closer(between, dial.at(capacity).calibrated_LE).all()


def entry(capacity: float, log_odds: float) -> Calibrated:
    return Calibrated(
        weights="ema", capacity=capacity, measured=capacity, common=True, over="noise", samples=1,
        log_odds=[[log_odds] * 4] * 2,
    )  # fmt: skip


def test_every_stored_capacity_is_on_the_dial(tmp_path):
    for capacity, log_odds in ((0.5, 1.0), (1.0, 0.5), (4.0, EVERY_TOKEN)):
        store(tmp_path, f"{capacity:g}", entry(capacity, log_odds))
    dial = Dial.of(opened(tmp_path))
    assert dial.capacities == [0.5, 1.0, 4.0]
    found = []
    for capacity in (0.5, 0.75, 1.0, 2.5, 4.0):
        found.append(float(dial.at(capacity).calibrated_LE[1, 3]))
    assert found == [1.0, 0.75, 0.5, (0.5 - 16) / 2, EVERY_TOKEN]


def test_stored_capacities_stay_when_others_are_calibrated(tmp_path):
    store(tmp_path, "0.5", entry(0.5, 3.25))
    dial = Dial.of(opened(tmp_path))
    assert dial.capacities == [0.25, 0.5, 1.0, 1.5, 2.0]
    assert dial.at(0.5).calibrated_LE.unique().tolist() == [3.25]


def test_capacities_of_adapters_lie_with_these(tmp_path):
    (base := tmp_path / "base").mkdir()
    (adapters := tmp_path / "adapters").mkdir()
    for folder, log_odds in ((base, 1.0), (adapters, 3.25)):
        store(folder, "0.5", entry(0.5, log_odds))
    sampler = opened(base)
    dial = Dial.of(replace(sampler, origin=sampler.model._replace(adapters=adapters)))
    assert dial.at(0.5).calibrated_LE.unique().tolist() == [3.25]
    assert list(stored(base)) == ["0.5"]
    assert {"0.5", "dial 1", "dial 2"} < stored(adapters).keys()


def test_a_model_without_label_dropout_is_calibrated_without_guidance(tmp_path):
    config, said = tiny_config(training__label_dropout=0), []
    dial = Dial.of(opened(tmp_path, config), report=said.append)
    assert said[0].startswith("guidance 1: the model was trained without label dropout")
    assert dial.capacities == [0.25, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("text", "dropout", "told", "visible"),
    [
        (None, 0.0, "label dropout, so it cannot be guided", False),
        (BYTES, 0.0, "label dropout, so only a negative prompt guides it", True),
        (None, 0.1, "", True),
    ],
)
def test_the_page_says_how_a_model_can_be_guided(text, dropout, told, visible, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio")
    config = tiny_config(model__text=text, training__label_dropout=dropout)
    prompts = create_prompts(config, encoder_of(config), ["red"] if text else [])
    dial = Dial({0.25: torch.ones(2, 4), 1.0: torch.zeros(2, 4)})
    page = build_page(replace(opened(tmp_path, config), prompts=prompts), dial, "a model")
    parts = page.get_config_file()["components"]
    heading = next(part["props"]["value"] for part in parts if part["type"] == "markdown")
    assert heading.startswith("## a model")
    assert told in heading
    assert ("trained without" in heading) == (dropout == 0)
    (slider,) = [part["props"] for part in parts if part["props"].get("label") == "Guidance"]
    assert slider["visible"] == visible
    assert slider["value"] == (1.5 if dropout else 1)


@contextlib.contextmanager
def served(folder: Path, *words: str, text: TextContent | None = None, **changes) -> Iterator[str]:
    """The address of the page on a run of a few steps."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    pack(folder / "data", shape=(3, 8, 8), **({} if text is None else {"text": text}))
    config = run_config(folder, 3, model__in_channels=3, **changes)
    train(config)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "tools/demo.py", config.output, "--port", str(port), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        for _ in range(120):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def page(tmp_path):
    with served(tmp_path) as address:
        yield address


@pytest.mark.slow
def test_a_text_model_draws_the_caption_in_its_box(tmp_path):
    client = pytest.importorskip("gradio_client", reason="the page needs gradio")
    content = TextContent(encoder="bytes", length=BYTES["length"])
    with served(tmp_path, "--prompt", "no 7", text=content, model__text=BYTES) as address:
        view = client.Client(address, verbose=False, download_files=False)
        boxes = [part["props"] for part in view.config["components"] if part["type"] == "textbox"]
        assert ("Caption", "no 7") in [(box.get("label"), box.get("value")) for box in boxes]
        images = []
        for away in ("", "no 3"):
            image, *_, told = view.predict("7", away, 0, 3, 4.0, 1.0, fn_index=0)
            assert re.fullmatch(r"capacity [\d.]+: .* work on an average token", told)
            images.append(urlopen(image["url"]).read())
    assert images[0] != images[1]


@pytest.mark.browser
@pytest.mark.slow
def test_the_slider_changes_the_picture_and_the_capacity(page):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = shutil.which("chromium")
    if browser_path is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    asked: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        view = browser.new_page()
        view.on("request", lambda request: asked.append(request.url))
        view.goto(page)
        view.get_by_label("Steps").first.fill("4")

        def generate(capacity: str) -> tuple[float, bytes]:
            """The capacity that the page tells, and the image's bytes."""
            box, image = view.locator("textarea").first, view.locator("#image img")
            before = box.input_value(), image.get_attribute("src") if image.count() else None
            view.get_by_label("Capacity").first.fill(capacity)
            view.get_by_label("Capacity").first.press("Enter")
            view.get_by_role("button", name="Generate").click()
            for _ in range(200):
                now = box.input_value(), image.get_attribute("src") if image.count() else None
                if now[0] != before[0] and now[1] != before[1]:
                    break
                view.wait_for_timeout(100)
            assert now[0] != before[0], "no new picture came"
            told = re.fullmatch(r"capacity ([\d.]+): .* work on an average token", now[0])
            return float(told[1]), view.request.get(now[1]).body()

        high, picture = generate("2")
        low, other = generate("0.25")
        again, same = generate("2")
        assert view.locator("#compute img").count() == view.locator("#course img").count() == 1
        browser.close()
    assert low < 0.6 < 1.4 < high
    assert again == high
    assert picture != other
    assert same == picture
    hosts = {url.split("/")[2] for url in asked if url.startswith("http")}
    assert hosts == {page.split("/")[2]}  # nothing from elsewhere


def test_a_port_that_is_taken_is_told_before_the_model_is_opened(tmp_path: Path):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tool("demo", tmp_path / "no model", "--port", port)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot listen at 127.0.0.1:{port}; choose another")
