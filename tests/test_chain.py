"The chain runner: skipping, resuming, refusing, reporting."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from swapping import swap

from gac.core.environment import provenance
from gac.core.files import GacError, root, write_file
from gac.core.run import Run, start_run
from gac.runner.chain import _recognise, run_chain
from gac.runner.page import write_page
from gac.runner.plan import folders_of
from gac.runner.verify import compare_reports, verify

ROWS = "import pandas as pd\nrun.save_table(pd.DataFrame({'x': range(n)}), 'rows', 'Some rows & more.')"
FIGURE = ("import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(2, 1))\nax.plot([0, 1, "
          "4])\nax.set_title('a line')\n"
          "run.save_figure(fig, 'line', 'A line.')")

@pytest.fixture
def chain(tmp_path, make_notebook):
    "Three toy notebooks; the second fails as long as a file says so."
    (tmp_path/'params').mkdir()
    (tmp_path/'params'/'toy.yaml').write_text('description: three toys\ncommon: {seed: 1}\n00_first: {n: 4}\n')
    make_notebook(tmp_path/'00_first.ipynb', 'n: int = 2  # rows [1, 9]', ROWS,
                  "run.artefact('rows.bin').write_bytes(bytes(n))")
    make_notebook(tmp_path/'01_second.ipynb', 'k: float = 1.  # a factor', "print('before')",
                  f"from pathlib import Path\nassert not Path({str(tmp_path/'break')!r}).exists(), 'told to fail'",
                  FIGURE)
    make_notebook(tmp_path/'02_third.ipynb', '',
                  "run.missing('lpips', 'no backbone <weights>')\nrun.note('seed', seed)")
    return tmp_path

def go(chain, profile='toy', **kw):
    return run_chain(profile, nbs=chain, reports=chain/'report', runs=chain/'run', **kw).status.tolist()

def test_chain_skips_resumes_and_reports(chain, capsys):
    (chain/'break').touch()
    with pytest.raises(GacError, match='(?s)01_second failed in cell.*told to fail.*01_second.failed.ipynb.*resumes'):
        go(chain)
    partial = json.loads((chain/'run/report/notebooks/01_second.failed.ipynb').read_text())
    assert any('before' in ''.join(o.get('text', '')) for c in partial['cells'] for o in c.get('outputs', []))
    assert not (chain/'report/index.html').exists()

    (chain/'break').unlink()
    assert go(chain) == ['unchanged', 'ran', 'ran']
    assert not list(chain.rglob('*.failed.ipynb')) and not (chain/'run/report').exists()
    printed = capsys.readouterr().out
    assert '[1/3] 00_first: unchanged' in printed and 'Done in' in printed and '| 02_third' in printed

    page = (chain/'report/index.html').read_text()
    for there in ('Some rows &amp; more.', 'figures/line.png', 'no backbone &lt;weights&gt;',
                  'notebooks/00_first.ipynb',
                  'provenance.json'):
        assert there in page
    about = json.loads((chain/'report/provenance.json').read_text())
    assert about['notebooks']['02_third']['notes'] == {'seed': 1}
    assert about['notebooks']['00_first']['parameters']['n'] == 4
    for text in (page, json.dumps(about), *(p.read_text() for p in (chain/'report/notebooks').glob('*.ipynb'))):
        assert str(root()) not in text and str(Path.home()) not in text

def test_a_first_run_expects_what_the_report_took(chain, capsys):
    go(chain, dry_run=True)
    assert 'about' not in capsys.readouterr().out  # nobody knows
    go(chain)
    shutil.rmtree(chain/'run')
    capsys.readouterr()
    assert go(chain,
              dry_run=True) == ['to run']*3 and 'for 3 of them by the last run or the report' in capsys.readouterr().out

def test_a_report_stays_as_it_was_until_a_run_has_ended(chain):
    "A run that fails after its first notebook changes no byte of the report and no other file in its folder."
    go(chain)
    (chain/'report/tables/older.csv').write_text('x')  # of a notebook that is gone: stays
    (chain/'report/mine.txt').write_text('mine')
    kept = lambda: {p.relative_to(chain).as_posix(): p.read_bytes() for p in (chain/'report').rglob('*') if p.is_file()}
    before = kept()
    (chain/'break').touch()
    with pytest.raises(GacError, match='(?s)run/report/notebooks.*The report is unchanged'): go(chain, sets={'n': 9})
    assert kept() == before and len((chain/'run/report/tables/rows.csv').read_text().split()) == 10
    assert go(chain, sets={'n': 9}, dry_run=True) == ['unchanged', 'to run', 'to run']  # goes on where it was
    (chain/'break').unlink()
    assert go(chain, sets={'n': 9}) == ['unchanged', 'ran', 'ran']
    assert kept().keys() == before.keys() and len((chain/'report/tables/rows.csv').read_text().split()) == 10
    assert json.loads((chain/'report/provenance.json').read_text())['notebooks']['00_first']['parameters']['n'] == 9
    assert sorted(p.name for p in (chain/'run').iterdir()) == ['chain.json', 'guard', 'notebooks', 'records',
                                                               'rows.bin']

def test_the_page_begins_with_results_and_ends_with_times(tmp_path):
    "The main table and figure come first, titles are sentences, and time and duration come last."
    entry = lambda tables, figures: dict(tables=tables, figures=figures, missing={}, seconds=62., commit='abc')
    about = dict(profile='toy', data='world', layout='', **provenance(), notebooks={
        '00_first': entry({'rows': 'Some rows. And more of them.'}, {}),
        '11_evaluate': entry({'results': 'Methods & floors on 3 tiles. Trained on: world.'},
                             {'stage_gains': 'What each stage adds. In dB.'})})
    write_file(tmp_path/'provenance.json', json.dumps(about))
    write_file(tmp_path/'tables/rows.csv', 'x\n1\n')
    write_file(tmp_path/'tables/results.csv', 'data,method,n_tiles,psnr,psnr_lo,psnr_hi,mse\nworld,Stage '
                                              '1,3,27.91,27.08,28.75,0.007\n')
    cells = [dict(cell_type='markdown', source=['# Evaluation\n', '\n', '> What it is worth'], metadata={})]
    write_file(tmp_path/'notebooks/11_evaluate.ipynb', json.dumps(dict(cells=cells)))
    page = write_page(tmp_path).read_text()
    order = ['<h2>Results</h2>', '<h3>Methods &amp; floors on 3 tiles.</h3>', '<td>27.91 [27.08, 28.75]</td>',
             'src="figures/stage_gains.png"',
             '<a href="#11_evaluate">Evaluation</a>: What it is worth', '<h3 id="rows">Some rows.</h3>',
             '<caption>And more of them.</caption>',
             '<h2 id="11_evaluate">Evaluation</h2>', '<td>0.007</td>', '<h2 id="run">This run</h2>',
             '<td>1 min 02 s</td>']
    places = [page.find(text) for text in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places))
    # words to the left, numbers to the right
    assert '<td class=w>Stage 1</td>' in page and '<th class=w>method</th>' in page and '<th>n_tiles</th>' in page
    assert page.count('id="stage_gains"') == 1 and '>rows<' not in page

def test_chain_runs_again_what_it_must(chain):
    assert go(chain) == ['ran']*3
    plan = lambda **kw: go(chain, dry_run=True, **kw)
    assert plan() == ['unchanged']*3
    for lost in ('report/tables/rows.md', 'run/rows.bin', 'report/notebooks/00_first.ipynb'):
        (chain/lost).rename(chain/'aside')
        assert plan() == ['to run', 'unchanged', 'unchanged'], lost
        (chain/'aside').rename(chain/lost)
    assert plan(start='2') == ['left alone', 'left alone', 'to run']
    assert plan(only='00_first') == ['to run', 'left alone', 'left alone']
    assert plan(force=True) == ['to run']*3
    assert plan(sets={'k': 2}) == ['unchanged', 'to run', 'to run']
    assert plan(sets={'01_second.seed': 9}) == ['unchanged', 'to run', 'to run']

    # a table that is no longer made leaves the report
    path = chain/'00_first.ipynb'
    path.write_text(path.read_text().replace("'rows', 'Some", "'lines', 'Some"))
    assert plan() == ['to run']*3
    assert go(chain, only='2') == ['left alone', 'left alone', 'ran']  # on what the old notebooks left
    assert plan() == ['to run']*3
    assert go(chain, only='2', sets={'n': 7}) == ['left alone', 'left alone', 'ran']
    about = json.loads((chain/'report/provenance.json').read_text())
    first = about['notebooks']['00_first']  # what it ran with, not what was asked for since
    assert first['parameters']['n'] == 4 and (first['commit'], first['changed']) == (about['commit'], about['changed'])
    assert go(chain, only='0') == ['ran', 'left alone', 'left alone']
    assert {p.name for p in (chain/'report/tables').iterdir()} == {'lines.csv', 'lines.md', 'lines.tex'}
    assert plan() == ['unchanged', 'to run', 'to run']

def test_dead_kernel_is_told(chain, make_notebook):
    make_notebook(chain/'00_first.ipynb', 'n: int = 2  # rows', "import os\nos._exit(1)")
    with pytest.raises(GacError, match='(?s)00_first failed with its kernel.*00_first.failed.ipynb'): go(chain)
    assert (chain/'run/report/notebooks/00_first.failed.ipynb').exists()

@pytest.mark.parametrize('profile, kw, message', [
    ('mini!', {}, 'No profile'), ('bad_name', {}, 'Did you mean k?'),
    ('bad_type', {}, 'bad_type.yaml, 00_first: n is .many.'),
    ('bad_range', {}, 'expected 1 to 9'), ('bad_stage', {}, 'Did you mean 02_third?'),
    ('toy', dict(sets={'n': 12}), 'expected 1 to 9'),
    ('toy', dict(start='1', only='2'), '--from and --only'), ('toy', dict(start='7'), '--from 7'),
    ('toy', dict(only='one'), '--only one'),
    ('toy', dict(data='/nowhere/at/all'), 'does not exist'),
    ('bad_runner', {}, "'data'")])
def test_refused_before_anything_runs(chain, profile, kw, message):
    bad = {'bad_name': 'common: {kk: 2}', 'bad_type': '00_first: {n: many}', 'bad_range': '00_first: {n: 0}',
           'bad_stage': '02_thrid: {}', 'bad_runner': '00_first: {data: here}'}
    for name, text in bad.items(): (chain/'params'/f'{name}.yaml').write_text(f'description: wrong\n{text}\n')
    with pytest.raises(GacError, match=message): go(chain, profile, **kw)
    assert not (chain/'run').exists() and not (chain/'report').exists()

def test_two_parameters_cells_are_refused(chain, make_notebook):
    make_notebook(chain/'03_none.ipynb', '', tag='other')
    with pytest.raises(GacError, match='03_none.ipynb: 0 cells are tagged parameters'): go(chain)

def test_real_data_gets_its_own_report(chain, monkeypatch, tmp_path):
    folder = tmp_path/'some_tiles'
    folder.mkdir()
    monkeypatch.setattr('gac.data.layouts.recognise', lambda path: 'npz')
    report, run = folders_of('mini', _recognise(str(folder))[0], '', '')
    assert (report, run) == (root()/'reports/real/some_tiles', root()/'runs/real/some_tiles/mini')
    assert _recognise(str(folder))[1] == 'npz'

HOLDER = """
import json, pathlib, sys, time
from filelock import FileLock
run = pathlib.Path(sys.argv[1])
run.mkdir(parents=True, exist_ok=True)
lock = FileLock(run/'guard')
lock.acquire()
(run/'chain.lock').write_text(json.dumps(dict(pid=int(sys.argv[2]))))
print('holds', flush=True)
time.sleep(60)
"""

def test_one_chain_at_a_time(chain):
    other = subprocess.Popen([sys.executable, '-c', HOLDER, str(chain/'run'), '12345'], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b'holds\n'
        with pytest.raises(GacError, match='process 12345 is running this chain'): go(chain)
    finally:
        other.kill()
        other.communicate()
    assert (chain/'run/chain.lock').exists()
    assert go(chain, only='2')[2] == 'ran'  # the lock of a dead process is free
    assert not (chain/'run/chain.lock').exists()

def span(tmp_path, name): return "import time, pathlib\n" \
    f"began = time.time(); time.sleep(2); " \
    f"pathlib.Path({str(tmp_path)!r}, {name!r}).write_text(f'{{began}} {{time.time()}}')"

@pytest.fixture
def forked(tmp_path, make_notebook):
    "Make a chain that forks: two notebooks depend on the first, one runs alone, one depends on all."
    (tmp_path/'params').mkdir()
    (tmp_path/'params'/'toy.yaml').write_text('description: five toys\n')
    says = {'00_first': '', '01_left': '#| reads: 00_first\n', '02_right': '#| reads: 00_first\n',
            '03_timed': '#| reads: nothing\n#| alone\n', '04_last': ''}
    for name, line in says.items():
        make_notebook(tmp_path/f'{name}.ipynb', 'n: int = 1  # a number', f"{line}print('here')", span(tmp_path, name),
                      f"from pathlib import Path\nassert not Path({str(tmp_path)!r}, 'break_{name}').exists(), 'told "
                      "to fail'")
    return tmp_path

def times(folder): return {p.name: tuple(map(float, p.read_text().split())) for p in folder.glob('0?_*')
                           if not p.suffix}

def test_what_builds_on_nothing_open_runs_side_by_side(forked):
    at = lambda a, b: seen[a][0] < seen[b][1] and seen[b][0] < seen[a][1]  # whether two overlap
    assert go(forked, jobs=2) == ['ran']*5
    seen = times(forked)
    assert at('01_left', '02_right')
    assert not any(at('03_timed', n) for n in seen if n != '03_timed')
    assert all(seen['00_first'][1] <= seen[n][0] for n in ('01_left', '02_right')) and all(v[1] <= seen['04_last'][0]
        for k, v in seen.items() if k != '04_last')
    kept = json.loads((forked/'run/chain.json').read_text())
    # notebooks that run at the same time share the clock: each waits two seconds, and half of them count
    assert kept['01_left']['seconds'] + .5 < kept['03_timed']['seconds']
    for p in times(forked): (forked/p).unlink()
    assert go(forked, jobs=1, force=True) == ['ran']*5
    seen = times(forked)
    assert not at('01_left', '02_right')

def test_a_change_runs_again_what_builds_on_it_and_nothing_else(forked, monkeypatch):
    assert go(forked) == ['ran']*5
    path = forked/'01_left.ipynb'
    path.write_text(path.read_text().replace("print('here')", "print('there')"))
    assert go(forked, dry_run=True) == ['unchanged', 'to run', 'unchanged', 'unchanged', 'to run']
    assert go(forked, dry_run=True, sets={'00_first.n': 3}) == ['to run', 'to run', 'to run', 'unchanged', 'to run']

def test_one_that_fails_lets_its_neighbour_end_and_starts_nothing_more(forked, capsys):
    (forked/'break_01_left').touch()
    path = forked/'02_right.ipynb'
    path.write_text(path.read_text().replace('time.sleep(2)', 'time.sleep(4)'))
    with pytest.raises(GacError, match='01_left failed'): go(forked, jobs=2)
    assert 'these still run to their end: 02_right' in capsys.readouterr().out
    (forked/'break_01_left').unlink()
    assert go(forked, dry_run=True) == ['unchanged', 'to run', 'unchanged', 'to run', 'to run']

def test_no_substitute_replaces_what_a_chain_should_have_computed(forked, tmp_path, capsys):
    "A notebook that declares no dependency and lacks an earlier output is refused in a chain, and prints a line alone."
    path = forked/'02_right.ipynb'
    path.write_text(path.read_text().replace('#| reads: 00_first', '#| reads: nothing').replace("print('here')",
        "run.note_fallback('opt_v1')"))
    with pytest.raises(GacError, match='(?s)02_right failed.*opt_v1 of .* is not there.*#. reads:'): go(forked)
    capsys.readouterr()
    Run.open('02_right', 'toy', 0, str(tmp_path/'own'), str(tmp_path/'own_report'), '').note_fallback('opt_v1')
    assert capsys.readouterr().out.startswith('opt_v1 of this run is missing')

def test_the_lock_file_of_a_killed_chain_does_not_count(tmp_path, capsys):
    "A notebook that runs alone computes a substitute beside the file, and is refused while a chain holds the lock."
    run = Run.open('02_right', 'toy', 0, str(tmp_path/'run'), str(tmp_path/'report'), '')
    chain = subprocess.Popen([sys.executable, '-c', HOLDER, str(run.dir), '12345'], stdout=subprocess.PIPE)
    try:
        assert chain.stdout.readline() == b'holds\n'
        with pytest.raises(GacError, match='has to run first'): run.note_fallback('opt_v1')
    finally:
        chain.kill()
        chain.communicate()
    assert (run.dir/'chain.lock').exists()
    run.note_fallback('opt_v1')
    assert capsys.readouterr().out.startswith('opt_v1 of this run is missing')

@pytest.mark.parametrize('line, message', [('#| reads: 00_frist', "reads '00_frist'.*Did you mean 00_first"),
                                           ('#| reads: 04_last', "reads '04_last': expected the full names of "
                                                                 "notebooks before it"),
                                           ('#| reads: nothing\\n#| reads: 00_first', 'has 2 lines'),
                                           ('#|reads: 00_first', 'expected .#. reads: NOTEBOOK')])
def test_a_wrong_place_in_the_chain_is_refused(forked, line, message):
    path = forked/'02_right.ipynb'
    path.write_text(path.read_text().replace('#| reads: 00_first', line))
    with pytest.raises(GacError, match=message): go(forked)
    assert not (forked/'run').exists()

def test_a_number_that_several_notebooks_have_is_refused_for_one(chain, make_notebook):
    make_notebook(chain/'02_other.ipynb', '')
    with pytest.raises(GacError, match='--only 2: which of 02_other, 02_third'): go(chain, only='2', dry_run=True)
    assert go(chain, start='2', dry_run=True) == ['never ran', 'never ran', 'to run', 'to run']

def test_a_notebook_without_what_it_builds_on_is_announced(chain, capsys):
    assert go(chain, only='02_third', dry_run=True) == ['never ran', 'never ran', 'to run']
    assert 'Not run yet, though others depend on it: 00_first, 01_second' in capsys.readouterr().out
    assert go(chain)[0] == 'ran' and go(chain, only='02_third', dry_run=True)[:2] == ['left alone', 'left alone']
    assert 'Never ran, though' not in capsys.readouterr().out

def test_the_page_tells_nothing_of_a_notebook_that_was_stopped(chain):
    (chain/'break').touch()
    with pytest.raises(GacError): go(chain)
    assert go(chain, only='02_third') == ['left alone', 'never ran', 'ran']
    assert list(json.loads((chain/'report/provenance.json').read_text())['notebooks']) == ['00_first', '02_third']
    assert '01_second' not in (chain/'report/index.html').read_text()
    assert not list((chain/'report').rglob('*.failed.ipynb'))

@pytest.mark.skipif(sys.platform != 'linux', reason='kernels are forked on Linux only')
@pytest.mark.parametrize('wait, slow', [(.3, 0), (1., 0), (3., 0), (6., 0), (2., 4)], ids=str)
def test_ctrl_c_at_any_moment_of_a_start_ends_at_once(forked, wait, slow):
    "Ctrl-C while kernels are imported, started (slow: s that takes) or run gives one line and leaves no process."
    import psutil
    for p in forked.glob('0?_*.ipynb'):
        p.write_text(p.read_text().replace('#| alone', '').replace('time.sleep(2)', 'time.sleep(300)'))
    code = ("import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom gac.runner.chain "
            "import run_chain\n"
            "from multiprocessing.context import ForkServerProcess as P\nstart = P.start\n"
            f"P.start = lambda self: (time.sleep({slow}), start(self))\n"
            f"try: run_chain('toy', nbs={str(forked)!r}, reports={str(forked/'report')!r}, runs={str(forked/'run')!r}, "
            "jobs=2)\n"
            "except KeyboardInterrupt: print('stopped')")
    process = subprocess.Popen([sys.executable, '-u', '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    below = []
    try:
        while 'runs …' not in (line := process.stdout.readline()): assert line
        time.sleep(wait)
        below = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[0]
        assert said.splitlines()[-1] == 'stopped' and 'Traceback' not in said, said
        assert not psutil.wait_procs(below, 15)[1]
    finally:
        for p in [process, *below]:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        process.wait()

@pytest.mark.skipif(sys.platform != 'linux', reason='kernels are forked on Linux only')
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP', 'SIGKILL'])
def test_a_stopped_chain_leaves_no_process_and_resumes(chain, name):
    "A chain stopped in its second and third notebook ends their kernels, keeps the first one and resumes."
    import psutil
    path = chain/'01_second.ipynb'
    text = path.read_text()
    path.write_text(text.replace("print('before')", "#| reads: 00_first\\nimport time, pathlib; "
                                                    "pathlib.Path('started').touch(); time.sleep(300)"))
    third = chain/'02_third.ipynb'
    old = third.read_text()
    third.write_text(old.replace("run.missing(", "#| reads: 00_first\\nimport time, pathlib; "
                                                 "pathlib.Path('beside').touch(); time.sleep(300)\\nrun.missing("))
    code = (f"from gac.runner.chain import run_chain; run_chain('toy', nbs={str(chain)!r}, "
            f"reports={str(chain/'report')!r}, runs={str(chain/'run')!r}, jobs=2)")
    process, below = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL), []
    try:
        for _ in range(600):
            if (chain/'started').exists() and (chain/'beside').exists(): break
            time.sleep(.1)
        assert (chain/'started').exists() and (chain/'beside').exists()
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) > 2  # two kernels, and the server they were forked from
        process.send_signal(getattr(signal, name))
        process.wait(15)
        left = psutil.wait_procs(below, 15)[1]
        assert not left, [p.cmdline() for p in left]
        assert (chain/'run/chain.lock').exists() == (name == 'SIGKILL')
    finally:
        for p in [process, *below]:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        process.wait()
    path.write_text(text)
    third.write_text(old)
    assert go(chain) == ['unchanged', 'ran', 'ran']

DETERMINISM = """
import sys, pandas as pd, numpy as np, matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
from gac.core.figures import style
from gac.core.run import Run
style()
run = Run.open('00_toy', 'toy', 3, sys.argv[1] + '/run', sys.argv[1] + '/report', '')
rng = np.random.default_rng(3)
df = pd.DataFrame({'method': ['a_b', 'c%'], 'psnr': rng.random(2)*30, 'n': [1, 2], 'none': [None, float('nan')]})
run.save_table(df, 'table', 'A caption, 50 %.')
fig, axs = plt.subplots(1, 2)
axs[0].imshow(rng.random((8, 8))); axs[1].plot(rng.random(9)); axs[1].set_title('title')
run.save_figure(fig, 'figure')
"""

def test_tables_and_figures_are_the_same_bytes_in_two_processes(tmp_path):
    for name in 'ab': subprocess.run([sys.executable, '-c', DETERMINISM, str(tmp_path/name)], check=True, cwd=root())
    files = sorted(p.relative_to(tmp_path/'a') for p in (tmp_path/'a/report').rglob('*.*'))
    assert [p.name for p in files] == ['figure.png', 'figure.svg', 'table.csv', 'table.md', 'table.tex']
    for p in files: assert (tmp_path/'a'/p).read_bytes() == (tmp_path/'b'/p).read_bytes(), p
    text = (tmp_path/'a/report/tables/table.csv').read_text()
    assert text.endswith('n/a\n') and '\r' not in text
    assert '50 \\%' in (tmp_path/'a/report/tables/table.tex').read_text()

@pytest.fixture
def house(tmp_path, make_notebook, monkeypatch):
    "Make a repository with one toy notebook and its report."
    (tmp_path/'settings.ini').write_text((root()/'settings.ini').read_text())
    (tmp_path/'gac').mkdir()
    make_notebook(tmp_path/'nbs/00_first.ipynb', 'n: int = 2  # rows [1, 9]',
                  "import pandas as pd\ndf = pd.DataFrame({'data': ['world', 'real: x'], 'method': ['a', 'b'], 'psnr': "
                  "[20., 30.]})\n"
                  "run.save_table(df, 'results')\nrun.save_table(df, 'efficiency')\nrun.save_table(df, "
                  "'efficiency_routes')")
    (tmp_path/'nbs/params').mkdir()
    (tmp_path/'nbs/params/toy.yaml').write_text('description: a toy\n')
    (tmp_path/'nbs/params/tolerances.yaml').write_text((root()/'nbs/params/tolerances.yaml').read_text())
    monkeypatch.chdir(tmp_path)
    assert root() == tmp_path
    run_chain('toy')
    return tmp_path

def test_verify(house, monkeypatch, capsys):
    monkeypatch.delenv('GAC_REAL_DATA', raising=False)
    (house/'reports/real/some_chips/tables').mkdir(parents=True)
    verify('toy')
    printed = capsys.readouterr().out
    assert 'reports/real/some_chips: skipped' in printed
    assert 'reports/toy/tables/results: byte for byte; conclusions hold' in printed
    assert 'efficiency' not in printed
    table, times = (house/f'reports/toy/tables/{name}.csv' for name in ('results', 'efficiency_routes'))
    times.write_text(times.read_text().replace('30.0000', '99.0000'))  # another machine is slower
    compare = lambda real: compare_reports(house/'reports/toy', house/'runs/verify/0-report', TOLERANCES, real)
    TOLERANCES = {'skip': ['efficiency'], 'default': {'abs': 1e-4}, 'columns': {'psnr': {'abs': 0.05}}}
    table.write_text(table.read_text().replace('20.0000', '20.0400').replace('30.0000', '31.0000'))
    assert compare(False) == {'results': []}, 'rows on real chips are skipped without them'
    assert compare(True) == {'results': ['row 2, psnr: 30.0000, expected 31.0000']}
    table.write_text(table.read_text().replace('20.0400', '21.0000'))
    with pytest.raises(GacError, match='reports/toy/tables/results: row 1, psnr: 20.0000, expected 21.0000'):
        verify('toy', digits=True)
    verify('toy', report=str(house/'runs/verify/0-report'))
    printed = capsys.readouterr().out
    assert 'Digits hold for 0 of 1 tables, 0 of them byte for byte; conclusions for 1 of 1.' in printed
    with pytest.raises(GacError, match='has no tables'): verify('mini')

def test_notebooks_that_run_alone_never_meet(tmp_path, monkeypatch):
    swap(monkeypatch, 'gac.core.files', 'root', lambda: tmp_path)
    first, second = (start_run(n).dir for n in ('07_stage1', '08_stage2'))  # nbdev_test runs them at the same time
    assert first != second and first not in second.parents and second not in first.parents
    # one run, one folder
    assert start_run('08_stage2', run_dir='runs/mini').dir == start_run('09_stage3', run_dir='runs/mini').dir
