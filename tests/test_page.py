"""The chat page in a real browser, driven through a conversation with a scripted model."""

import shutil
import time
from types import SimpleNamespace

import pytest
from conftest import TEXT, serving, tiny

from data.tokenizer import Tokenizer

sync_api = pytest.importorskip('playwright.sync_api')
pytest.importorskip('uvicorn')
from extras.serve import Endpoint, Server  # noqa: E402

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run']
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here')
LETTERS = Tokenizer.of_text(TEXT + 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'
                            '+-*/=?!,.()[]"\' سلامكيفحهعن')  # fmt: skip
ANSWERS = {
    'hi': 'Hello! I am a small model on this machine. Ask me to count or to compute.',
    'سلام': 'سلام! كيف حالك',
    'long': 'and on ' * 300,
}


@pytest.fixture(scope='module')
def server():
    def work(source):
        """Says the answer to the last word, a letter at a time; to others, how much it has read."""
        for request in source:
            if request is None:
                yield None
                continue
            asked = LETTERS.decode(request.prompt).split('<|user|>')[-1].split('<|end|>')[0]
            count = LETTERS.decode(request.prompt).count('<|user|>')
            answer = ANSWERS.get(asked, f'You have asked {count} times.')
            for token in [*LETTERS.encode(answer), LETTERS.special['<|end|>']]:
                if request.cancelled:
                    break
                request.ids.append(token)
                request.reason = 'end' if token in request.end else ''
                yield request
                time.sleep(0.002)
            if not request.reason:
                request.reason = 'cancelled'
                yield request

    model = tiny(vocab_size=LETTERS.vocab_size, block_size=4096)
    known = Endpoint(model, LETTERS, {'lineage': [{'stage': 'sft'}]}, 'out-talk')
    with serving(Server(known, work, '127.0.0.1', 0, 64)) as server:
        yield SimpleNamespace(url=f'http://127.0.0.1:{server.server_port}/')


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def say(page, text):
    page.fill('#text', text)
    page.press('#text', 'Enter')


def settled(page):
    sync_api.expect(page.locator('#send')).to_have_text('Send')
    return page.locator('.assistant').last.inner_text()


def test_a_conversation(server, browser, tmp_path):
    asked, wrong = [], []
    page = browser.new_page(viewport={'width': 900, 'height': 700})
    page.on('request', lambda request: asked.append(request.url))
    page.on('pageerror', lambda error: wrong.append(error))
    page.goto(server.url)
    sync_api.expect(page.locator('#name')).to_have_text('out-talk')
    say(page, 'hi')
    assert settled(page) == ANSWERS['hi']
    say(page, 'سلام')
    assert settled(page) == ANSWERS['سلام']
    sides = page.evaluate(
        '''() => [...document.querySelectorAll('.turn')].map(e => getComputedStyle(e).direction)'''
    )
    assert sides == ['ltr', 'ltr', 'rtl', 'rtl']
    right = [box.bounding_box()['x'] > 450 for box in page.locator('.turn').all()]
    assert right == [True, False, True, False]
    say(page, 'how often')
    assert settled(page) == 'You have asked 3 times.'
    page.screenshot(path=tmp_path / 'light.png')
    page.click('#fresh')
    assert page.locator('.turn').count() == 0
    say(page, '<img src=x onerror=alert(1)>')
    settled(page)
    assert page.locator('.user').inner_text() == '<img src=x onerror=alert(1)>'
    assert not wrong and all(url.startswith((server.url, 'data:')) for url in asked)
    page.close()


def test_stopping_an_answer_and_going_on(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    say(page, 'long')
    sync_api.expect(page.locator('.assistant')).to_contain_text('and on ' * 3)
    page.click('#send')
    cut = settled(page)
    assert 20 <= len(cut) < 2000
    say(page, 'and now')
    assert settled(page) == 'You have asked 2 times.'
    page.close()


def test_an_error_is_shown_and_the_talk_goes_on(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    say(page, '☃')
    assert "character '☃'" in settled(page)
    say(page, 'and now')
    assert settled(page) == 'You have asked 1 times.'
    page.close()


def test_who_types_before_the_name_is_there_loses_nothing(server, browser):
    page, held = browser.new_page(), []
    page.route('**/v1/models', lambda route: held.append(route))
    page.goto(server.url)
    say(page, 'hi')
    assert settled(page) == ANSWERS['hi']
    held[0].continue_()
    sync_api.expect(page.locator('#name')).to_have_text('out-talk')
    assert page.locator('.turn').count() == 2
    say(page, 'and now')
    assert settled(page) == 'You have asked 2 times.'
    page.close()


def test_a_phone_in_the_dark(server, browser, tmp_path):
    page = browser.new_page(viewport={'width': 360, 'height': 640}, color_scheme='dark')
    page.goto(server.url)
    say(page, 'hi')
    settled(page)
    wide = page.evaluate('document.documentElement.scrollWidth')
    assert wide <= 360 and page.locator('#name').bounding_box()['width'] > 50
    dark = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert sum(map(int, dark[4:-1].split(','))) < 150
    page.screenshot(path=tmp_path / 'dark.png')
    page.close()
