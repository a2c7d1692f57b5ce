"Controls change pictures, in a kernel and in a browser's JupyterLab; papermill lists a notebook's parameters."
import base64
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gac.core.files import GacError, root
from gac.core.parameters import notebook_parameters, read_notebook
from gac.measure.widgets import ERROR_TOP, attention_viewer, tile_browser, training_monitor
from gac.runner.execute import strip_widgets
from gac.runner.plan import chain_notebooks

ROOT = root()
STAGES = chain_notebooks(ROOT/'nbs')
VIEW = 'application/vnd.jupyter.widget-view+json'

def pixels(explorer) -> np.ndarray: return plt.imread(io.BytesIO(explorer.image.value))[..., :3]

@pytest.fixture
def browser():
    "Three tiles: black on the left, white on the right of the line, both wrong by 0.05 in near infrared."
    def tile(name):
        truth = np.full((4, 20, 20), .1*int(name))
        return {'radar': np.zeros((20, 20, 3)), 'opt_v1': truth + np.array([0, 0, 0, .05])[:, None, None],
                'truth': truth}
    return tile_browser(['1', '2', '3'], tile, 'radar')

def share_white(explorer) -> float:
    "Share of white in the middle row, within the axes of the image."
    box = explorer.figure.axes[0].get_position()
    row = pixels(explorer)[::-1][round(pixels(explorer).shape[0]*(box.y0 + box.y1)/2)]
    return float((row[round(len(row)*box.x0) + 3:round(len(row)*box.x1) - 3] > .99).all(-1).mean())

def test_line_moves_between_two_images(browser):
    at = [share_white(browser.set(line=x)) for x in (0., .24, .5, .76, 1.)]
    assert np.allclose(at, [1, .75, .5, .25, 0], atol=.05), at

def test_every_control_changes_the_picture(browser):
    last = pixels(browser)
    for name, value in dict(white=.6, left='opt_v1', bands='B08', line=.8, tile='3', right='error of opt_v1').items():
        browser.controls[name].value = value  # as the front end does
        new = pixels(browser)
        assert new.shape == last.shape and not np.array_equal(new, last), name
        last = new

def test_error_is_of_the_bands_that_are_shown(browser):
    dark = pixels(browser.set(left='error of opt_v1', line=1., bands='true colour'))
    bright = pixels(browser.set(bands='B08'))
    middle = tuple(n//2 for n in dark.shape[:2])
    assert dark[middle].sum() < .1 < bright[middle].sum()
    bar = browser.figure.axes[1]
    assert bar.get_ylabel() == 'mean absolute error of B08, reflectance' and bar.get_ylim() == (0, ERROR_TOP)

@pytest.mark.parametrize('wrong, message', [
    (dict(tile='4'), "tile is '4', expected one of 1, 2, 3"), (dict(line=-.1), 'expected 0 to 1'),
    (dict(left='opt_v9'), 'expected one of radar, opt_v1'),
    (dict(til='1'), 'Did you mean tile?')])
def test_out_of_range_is_refused_and_nothing_moves(browser, wrong, message):
    before, picture = browser.values, browser.image.value
    with pytest.raises(GacError, match=re.escape(message)): browser.set(**wrong)
    assert browser.values == before and browser.image.value == picture

def test_a_saved_notebook_keeps_the_picture_and_no_dead_widget(browser):
    out = browser._repr_mimebundle_(include=None, exclude=None)
    assert VIEW in out and 'JupyterLab' in out['text/plain']
    assert plt.imread(io.BytesIO(base64.b64decode(out['image/jpeg'])), format='jpeg').shape[2] == 3
    nb = strip_widgets(dict(metadata=dict(widgets={}),
                            cells=[dict(outputs=[dict(data=out), dict(text='printed')]), {}]))
    assert nb['metadata'] == {} and sorted(nb['cells'][0]['outputs'][0]['data']) == ['image/jpeg', 'text/plain']

def test_training_is_watched_while_it_writes(tmp_path):
    with pytest.raises(GacError, match='No training has written'): training_monitor(tmp_path)
    for place in ('stage2', 'stage3/head'):
        log = tmp_path/place/'curve'/'metrics.csv'
        log.parent.mkdir(parents=True)
        log.write_text('lr,step,train_loss,val_loss\n.1,1,3.,\n.1,2,2.,2.5\n')
    (tmp_path/'stage4'/'curve').mkdir(parents=True)
    (tmp_path/'stage4'/'curve'/'metrics.csv').touch()  # it has only just begun
    monitor = training_monitor(tmp_path, 'stage3')
    assert monitor.controls['training'].options == ('stage2', 'stage3/head')
    assert monitor.values['training'] == 'stage3/head'
    points = lambda: [line.get_xydata().tolist() for line in monitor.figure.axes[0].lines]
    assert points() == [[[1, 3], [2, 2]], [[2, 2.5]]]
    with open(log, 'a') as f: f.write('.1,3,1.,\n.1,4,0.')  # the last line is half there
    monitor.controls['refresh'].value += 1
    assert points() == [[[1, 3], [2, 2], [3, 1]], [[2, 2.5]]]

def test_attention_follows_query_and_layer():
    weights = np.full((2, 1, 16, 8), 1/8.)
    weights[1, 0, 5] = np.eye(8)[2]  # in layer 2 the query in row 1, column 1 reads one token of the radar
    viewer = attention_viewer(['a'], dict(on=weights), {k: np.zeros((1, 8, 8, 3)) for k in ('radar', 'opt_v2')}, 4)
    titles = lambda: [viewer.figure.axes[k].get_title() for k in (1, 3)]
    assert titles() == ['50% of the attention']*2
    viewer.set(layer='2', down=1, across=1)
    assert titles() == ['100% of the attention', '0% of the attention']
    assert viewer.figure.axes[1].images[0].get_array().tolist() == [[0, 0], [8, 0]]

def test_import_is_light():
    code = ("import sys; import gac.measure.widgets; print(sorted({'torch', 'pandas', 'matplotlib', "
            "'ipywidgets'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == '[]'

@pytest.mark.parametrize('name',
                         ['01_world', '02_tiles', '07_stage1', '08_stage2', '09_stage3', '11_evaluate', '13_trust',
                          'lib/measure/widgets'])
def test_notebook_ends_with_something_to_explore(name):
    cells = [c for c in read_notebook(ROOT/'nbs'/f'{name}.ipynb')['cells'] if c['cell_type'] == 'code']
    data = [o['data'] for c in cells[-3:] for o in c['outputs'] if 'image/jpeg' in o.get('data', {})]
    assert data and all('JupyterLab' in ''.join(d['text/plain']) for d in data)

WITH_PARAMETERS = [*STAGES, ROOT/'nbs'/'pretrain_mini.ipynb']

def test_the_other_notebooks_have_no_parameters():
    others = set((ROOT/'nbs').glob('*.ipynb')) - set(WITH_PARAMETERS)
    assert {p.stem for p in others} == {'index'}
    for p in others:
        assert not [c for c in read_notebook(p)['cells'] if 'parameters' in c['metadata'].get('tags', [])], p

@pytest.mark.parametrize('path', WITH_PARAMETERS, ids=lambda p: p.stem)
def test_papermill_tells_the_parameters(path):
    "What `papermill --help-notebook` prints: every parameter with its type, its default and what it is."
    from click.testing import CliRunner
    from papermill.cli import papermill
    from papermill.inspection import inspect_notebook
    told, declared = inspect_notebook(str(path)), notebook_parameters(path)
    assert list(told) == list(declared)
    for name, p in told.items():
        assert (p['inferred_type_name'], p['default'] != '') == (declared[name].kind, True) and len(p['help']) > 3, p
    said = CliRunner().invoke(papermill, ['--help-notebook', str(path)]).output
    for name, p in told.items():
        assert f"{name}: {p['inferred_type_name']}" in said and p['help'].split()[0] in said, name

# in JupyterLab

def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab as `make lab` starts it, on a copy of the notebooks; its address."
    home, port = tmp_path_factory.mktemp('lab'), free_port()
    shutil.copytree(ROOT/'nbs', home/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copy(ROOT/'settings.ini', home)
    (home/'settings'/'@jupyterlab'/'apputils-extension').mkdir(parents=True)
    (home/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings').write_text('{"fetchNews": '
                                                                                                       '"false"}')
    recipe = subprocess.run(['make', '-n', 'lab',
                             f'LAB=--no-browser --allow-root --port={port} --IdentityProvider.token=gac'],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = next(x for x in recipe.splitlines() if '/jupyter lab ' in x)
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(home/'config'), JUPYTER_RUNTIME_DIR=str(home/'runtime'),
               JUPYTERLAB_SETTINGS_DIR=str(home/'settings'), JUPYTER_PLATFORM_DIRS='1')
    with open(home/'log', 'w') as log:
        server = subprocess.Popen([str(Path(sys.executable).with_name('jupyter')), *shlex.split(line)[1:]], cwd=home,
                                  env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token=gac', timeout=5)
            except OSError: time.sleep(.5)
            else: break
            assert server.poll() is None, (home/'log').read_text()
        yield SimpleNamespace(url=f'http://127.0.0.1:{port}', token='gac', home=home)
    finally:
        server.terminate()
        server.wait(30)

@pytest.fixture(scope='module')
def page(lab):
    "Open a page of Chromium."
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium: apt-get install chromium')
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(180_000)
        yield page
        browser.close()

PICTURE = '''async image => { const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
                                const sum = await crypto.subtle.digest('SHA-256', bytes);
                                 return Array.from(new Uint8Array(sum)).join() }'''

@pytest.mark.slow
def test_slider_changes_the_picture_in_jupyterlab(lab, page):
    "JupyterLab opens the notebooks, runs one, and a key on the slider of the tile browser gives another picture."
    pictures = ROOT/'runs'/'lab'  # screenshots, to be looked at
    pictures.mkdir(parents=True, exist_ok=True)
    page.goto(f'{lab.url}/lab?token={lab.token}')
    page.get_by_role('listitem', name=re.compile('07_stage1.ipynb')).first.wait_for()
    page.screenshot(path=pictures/'1-opened.png')
    page.goto(f'{lab.url}/lab/tree/lib/measure/widgets.ipynb')
    page.locator('.jp-Notebook .jp-Cell').first.wait_for()
    page.get_by_text('Python 3').or_(page.get_by_text('python3')).first.wait_for()
    page.locator('.lm-MenuBar-item', has_text='Run').click()
    page.locator('[data-command="runmenu:run-all"]').click()
    images = page.locator('.jp-OutputArea .jupyter-widgets img')
    for _ in range(180):
        if images.count() >= 4: break
        page.wait_for_timeout(1000)
    assert images.count() == 4, (
        page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts())
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    for k in range(4):
        images.nth(k).scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        page.screenshot(path=pictures/f'2-widget-{k + 1}.png')
    box = page.locator('.jp-OutputArea .jupyter-widgets.widget-vbox').nth(1)
    image, sliders = box.locator('img'), box.locator('.noUi-handle')
    for name, slider in dict(tile=sliders.nth(0), line=sliders.nth(1)).items():
        before, shot = image.evaluate(PICTURE), image.screenshot()
        slider.press('ArrowRight')
        for _ in range(60):
            if image.evaluate(PICTURE) != before: break
            page.wait_for_timeout(500)
        assert image.evaluate(PICTURE) != before, f'the slider of the {name} changes nothing'
        page.wait_for_timeout(500)
        assert image.screenshot() != shot
        box.screenshot(path=pictures/f'3-{name}.png')
