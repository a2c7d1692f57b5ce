"The study at profile smoke, in a process of its own with forked kernels."
import json
import re
import subprocess
import sys
import time

import pandas as pd
import pytest

from gac.core.files import root
from gac.runner.plan import chain_notebooks


def run(home, data='') -> tuple: # status of each notebook, seconds
    "Run the chain, reports and artefacts in `home`."
    options = dict(data=str(data), reports=str(home/'report'), runs=str(home/'run'))
    began = time.perf_counter()
    done = subprocess.run([sys.executable, '-c',
                           f"from gac.runner.chain import run_chain\nrun_chain('smoke', **{options})"],
                          capture_output=True, text=True, cwd=root())
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r'(?m)^\| \d\d_\w+ +\| (\w+)', done.stdout), time.perf_counter() - began

def overwritten(run) -> list: # files
    "Return the files that a notebook listed and a later one overwrote."
    return [a for r in (run/'records').glob('*.json') for a in json.loads(r.read_text())['artefacts']
            if (run/a).is_file() and (run/a).stat().st_mtime > r.stat().st_mtime]

def test_every_notebook_runs_in_order_and_then_there_is_nothing_to_do(tmp_path):
    status, whole = run(tmp_path)
    assert status == ['ran']*len(chain_notebooks(root()/'nbs'))
    status, seconds = run(tmp_path)
    assert set(status) == {'unchanged'} and seconds < whole/4
    assert (tmp_path/'report/index.html').exists()
    assert not overwritten(tmp_path/'run')
    tables = {p.stem for p in (tmp_path/'report/tables').glob('*.csv')}
    for name in (t for t in tables if not t.startswith('efficiency')):
        columns = pd.read_csv(tmp_path/f'report/tables/{name}.csv', nrows=1).columns
        timed = [c for c in columns if c in ('seconds', 'time', 'ms_per_tile', 'tiles_per_s', 'minutes')]
        assert not timed, f'{name}.csv holds times ({timed}): they belong to efficiency.csv'

@pytest.mark.slow
def test_the_study_trains_on_tiles_it_is_given(tmp_path):
    "Enough tiles of somebody's store: every stage learns from them, and the report is about them."
    from gac.data.stores import MIN_PAIRS, from_world
    from_world(tmp_path/'given', MIN_PAIRS, 8, 8, size=80)  # windows of 64 px to train on and of 40 for land cover
    run(tmp_path, tmp_path/'given')
    assert set(pd.read_csv(tmp_path/'report/tables/results.csv').data) == {'real: given'}
    about = json.loads((tmp_path/'report/provenance.json').read_text())['notebooks']
    assert not [m for n in about.values() for m in n['missing'] if m.startswith('training on')]
    assert 'real: given' in about['08_stage2']['tables']['stage2']
    assert 'real: given' in about['09_stage3']['tables']['stage3']
