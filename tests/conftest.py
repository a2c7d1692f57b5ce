"Fixtures and marks that every test file shares."
import os

# before torch: several tests fork, and a pool of OpenMP threads does not survive that
os.environ['OMP_NUM_THREADS'] = '1'

import json
from pathlib import Path

import pytest

from gac.core import files
from gac.core.run import start_run

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)

HEAD = """profile: str = 'smoke'  # name of the profile
seed: int = 0  # reaches every random number
run_dir: str = ''  # artefacts of this run
reports_dir: str = ''  # tables and figures
data: str = ''  # folder of real tiles
"""

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes longer than a change should wait for (make test-slow)')

def pytest_collection_modifyitems(items):
    "Run the longest test first, so that the other worker has all the rest."
    items.sort(key=lambda item: item.path.name != 'test_study.py')

@pytest.fixture(scope='session')
def real_data() -> Path:
    "Return the folder of real chips; skip the test if there is none."
    folder = files.real_data()
    if folder is None: pytest.skip('no real chips: set GAC_REAL_DATA or run `gac data examples`')
    return folder

@pytest.fixture
def make_notebook():
    "Write a small stage notebook: parameters, start of the run, then the given cells."
    def make(path:Path, parameters:str, *cells:str, tag:str='parameters') -> Path:
        def code(source, tags=()):
            return dict(cell_type='code', id=f'c{abs(hash(source)) % 10**8}', source=source, outputs=[],
                        execution_count=None, metadata=dict(tags=list(tags)) if tags else {})
        begin = (f"from gac.core.run import Run\nrun = Run.open('{path.stem}', profile, seed, run_dir, reports_dir, "
                 f"data)")
        cells = [code(HEAD + parameters, [tag]), code(begin), *map(code, cells)]
        spec = dict(name='python3', display_name='python3', language='python')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)))
        return path
    return make

@pytest.fixture(scope='session')
def brief_chain():
    "Make a run with a store, Stage 1 and briefly trained Stages 2 and 3."
    def make(home:Path, notebook:str, tiles_of=(6, 2, 4), recipe=None) -> tuple: # run, store
        from gac.data.stores import study_store
        from gac.measure.tables import stored_method
        from gac.stages.chain import brief_recipe, fit_chain
        from gac.stages.stage1 import build_terramind_generator, precompute_stage1
        run = start_run(notebook, 'smoke', 0, str(home/'run'), str(home/'reports'))
        store = study_store(run, *tiles_of, size=48)
        precompute_stage1(store, build_terramind_generator(), timesteps=1, tokens='expected')
        fit_chain(store, stored_method(store), recipe or brief_recipe(4), run.dir, 0, no_refinement=False)
        return run, store
    return make
