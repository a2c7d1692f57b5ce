"The study on somebody's tiles: what it takes of them, what it says of them, and where it keeps it."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from swapping import swap

from gac.core.environment import provenance
from gac.core.figures import check_file_name, safe_name
from gac.core.files import GacError, root, write_file
from gac.core.parameters import read_notebook
from gac.core.run import Run, expect
from gac.core.vocabulary import OPT_BANDS, OPT_INDEX
from gac.data.arrays import to_reflectance
from gac.data.stores import from_world, shown_store, study_store, training_store, window_of
from gac.data.world.scenes import draw_scene
from gac.evaluation.claims import Tables, of_data
from gac.evaluation.claims_report import home
from gac.evaluation.learning_curve import fit_at
from gac.evaluation.results import compare_with_unets, own_spectrum, results_sentence
from gac.measure.metrics import psnr
from gac.measure.tables import RESULT_COLUMNS
from gac.models.true_tiles import true_tiles
from gac.products.downstream_images import divisor_of
from gac.runner.chain import run_chain
from gac.runner.page import write_page
from gac.runner.plan import chain_notebooks, claim_name, folders_of


def open_run(folder, data='') -> Run:
    return Run.open('07_stage1', 'smoke', 0, str(folder/'run'), str(folder/'report'), str(data))

def npz_tile(path:Path, number:int, size:int=120, **more) -> Path:
    "Save a procedural scene as a user would."
    s = draw_scene(number, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, s1=s['s1grd'].astype('float32'), s2=s['s2'].astype('uint16'), month=int(s['month']), **more)
    return path

# ---- places

@pytest.mark.parametrize('name, safe',
                         [('mes données (2024)', 'mes-donnees-2024'), ('tiles', 'tiles'), ('.hidden', 'hidden'),
                          ('a  b', 'a-b'), ('Ünï_1.2', 'Uni_1.2')])
def test_a_folder_of_any_name_gets_a_safe_one(name, safe):
    assert safe_name(name) == safe and check_file_name(safe_name(name)) == safe

def test_a_name_without_a_letter_that_is_left_gets_digits():
    assert re.fullmatch('[0-9a-f]{8}', safe_name('плитки')) and safe_name('плитки') != safe_name('瓦')

@pytest.fixture
def house(tmp_path, monkeypatch):
    "Use another root, so that nothing is written into the repository."
    (tmp_path/'house').mkdir()
    swap(monkeypatch, 'gac.core.files', 'root', lambda: tmp_path/'house')
    return tmp_path/'house'

def test_profiles_and_settings_have_folders_of_their_own(house, tmp_path):
    data = tmp_path/'mes données (2024)'
    data.mkdir()
    place = lambda profile='mini', sets=None, **kw: folders_of(profile, str(data), '', '', sets, **kw)
    report, run = place()
    assert (report, run) == (house/'reports/real/mes-donnees-2024', house/'runs/real/mes-donnees-2024/mini')
    smoke, larger, seeded = place('smoke')[1], place(sets={'02_tiles.tile_size': 96})[1], place(sets={'seed': 3})[1]
    assert len({run, smoke, larger, seeded}) == 4 and {p.parent for p in (smoke, larger, seeded)} == {run.parent}
    assert place('smoke')[0] == report
    elsewhere = folders_of('mini', str(data), str(tmp_path/'r'), '')[1]
    assert elsewhere != run and elsewhere.parent == run.parent
    # --from on top of what the profile has made, until these settings have made something
    assert place(sets={'seed': 3}, goes_on=True)[1] == run
    seeded.mkdir(parents=True)
    assert place(sets={'seed': 3}, goes_on=True)[1] == seeded
    assert folders_of('mini', '', '', '', {'seed': 3})[1] == house/'runs/mini'  # the procedural world, as before

def test_another_folder_of_the_same_name_is_told_apart(house, tmp_path):
    one, two = tmp_path/'a'/'tiles', tmp_path/'b'/'tiles'
    for p in (one, two): p.mkdir(parents=True)
    place = lambda p: folders_of('mini', str(p), '', '')
    claim_name(str(one))
    assert place(one)[0].name == 'tiles' and re.fullmatch('tiles-[0-9a-f]{6}', place(two)[0].name)
    claim_name(str(two))
    assert place(one)[1] != place(two)[1] and place(two)[0].name.startswith('tiles-')

@pytest.fixture
def toy(tmp_path, make_notebook):
    "Make a chain of one notebook and two profiles, and a store of a user's tiles."
    (tmp_path/'params').mkdir()
    for name, n in (('small', 2), ('large', 3)):
        (tmp_path/'params'/f'{name}.yaml').write_text(f'description: {name}\n00_first: {{n: {n}}}\n')
    make_notebook(tmp_path/'00_first.ipynb', 'n: int = 1  # rows',
                  "import pandas as pd\nrun.save_table(pd.DataFrame({'x': range(n)}), 'rows' if n < 3 else 'more', "
                  "'Rows.')")
    from_world(tmp_path/'given', 1, 1, 1, size=32)
    def go(profile):
        return run_chain(profile, str(tmp_path/'given'), tmp_path/'report', nbs=tmp_path,
                         runs=tmp_path/profile).status.tolist()
    return tmp_path, go

def test_two_profiles_share_a_report_and_each_keeps_its_own(toy):
    folder, go = toy
    tables = lambda: [p.stem for p in (folder/'report/tables').glob('*.csv')]
    assert go('small') == ['ran'] and tables() == ['rows']
    assert go('large') == ['ran'] and tables() == ['more'], 'what the other profile made is not this one\'s'
    assert go('small') == ['unchanged'] and tables() == ['rows'], ('nothing to do, and the report is that of this '
                                                                   'profile again')
    assert json.loads((folder/'report/provenance.json').read_text())['profile'] == 'small'

# ---- what is taken of them

def test_eight_training_tiles_are_enough_and_seven_are_not(tmp_path):
    for n, label in ((8, 'real: of 8'), (7, 'world')):
        from_world(tmp_path/f'of {n}', n, 1, 1, size=32)
        run = open_run(tmp_path/str(n), tmp_path/f'of {n}')
        study_store(run, 8, 1, 1, size=32)
        assert training_store(run)[0] == label
        seen, store, rows = shown_store(run)
        assert seen == f'real: of {n}' and len(rows) == (1 if n == 8 else 9), 'what is not trained on is shown whole'
    assert 'gac data split' in run.record['missing']['training on real: of 7']
    alone = open_run(tmp_path/'alone')
    study_store(alone, 8, 1, 1, size=32)
    assert shown_store(alone, 'val')[0] == 'world' and len(shown_store(alone, 'val')[2]) == 1

def test_windows_are_no_larger_than_the_tiles(tmp_path):
    store = from_world(tmp_path/'w', 1, 1, 1, size=40)
    assert [window_of(store, n) for n in (0, 24, 40, 96)] == [0, 24, 40, 40]
    assert [divisor_of(side, 60) for side in (120, 80, 128, 60, 48, 127)] == [60, 40, 32, 60, 48, 127]
    assert divisor_of(120, 0) == 0

@pytest.mark.parametrize('asked, there, had',
                         [([256], 64, [64]), ([32, 256, 2048], 64, [32, 64]), ([4], 44, [4]), ([32, 256], 8, [8])])
def test_numbers_of_pairs_fit_what_is_there(asked, there, had): assert fit_at(asked, there) == had

def test_a_folder_nothing_can_be_read_of_is_refused_before_anything_runs(toy, make_notebook):
    folder, _ = toy
    make_notebook(folder/'02_tiles.ipynb', 'tile_size: int = 32  # px')
    npz_tile(folder/'bad/a.npz', 5, 32)
    np.savez(folder/'bad/a.npz', s1=np.zeros((2, 16, 32), 'f4'), s2=np.zeros((12, 16, 32), 'u2'))
    with pytest.raises(GacError, match='(?s)bad'):
        run_chain('small', str(folder/'bad'), folder/'report', nbs=folder, runs=folder/'run')
    assert not (folder/'run/chain.json').exists() and not (folder/'report/index.html').exists()

def test_a_run_says_first_what_it_takes(toy, make_notebook, capsys):
    folder, _ = toy
    make_notebook(folder/'02_tiles.ipynb', 'tile_size: int = 32  # px')
    make_notebook(folder/'08_stage2.ipynb', 'pairs: int = 256  # pairs\nval_tiles: int = 64  # tiles')
    from_world(folder/'own', 8, 1, 2, size=32)
    for dry in (True, False):
        run_chain('small', str(folder/'own'), folder/'report', nbs=folder, runs=folder/'run', dry_run=dry)
        said = capsys.readouterr().out
        assert 'own: 8 train, 1 val, 2 test tiles of 32 px' in said
        assert re.search(r'08_stage2 +\| pairs +\| 256 +\| 8 +\| 8 train', said)
        assert said.index('own: 8 train') < said.index('00_first' if dry else '[1/3] 00_first')
    page = (folder/'report/index.html').read_text()
    assert page.index('own: 8 train') < page.index('<h2>Contents')
    few = folder/'few.npz'
    npz_tile(few, 7, 32)
    run_chain('small', str(few), folder/'report2', nbs=folder, runs=folder/'run2', dry_run=True)
    assert 'trained on the procedural world and tested on all 1 of them' in capsys.readouterr().out
    assert not (folder/'run2').exists()

# ---- what is said of them

def test_an_expectation_stops_the_study_and_not_somebodys_run(tmp_path):
    own, alone = open_run(tmp_path/'a', '/some/tiles'), open_run(tmp_path/'b')
    with pytest.raises(AssertionError, match='no rise'): expect(alone, np.bool_(False), 'no rise')
    with pytest.raises(KeyError): expect(alone, lambda: {}['gain'], 'no row')
    assert expect(own, np.bool_(True), 'x') and not expect(own, np.nan > 1, 'no rise')
    assert not expect(own, lambda: {}['gain'], 'no row')
    assert json.loads(own.record_path.read_text())['remarks'] == ['no rise', 'no row']

def asserted_names(source:str) -> set: # code of a cell
    "Return the names in the assertions of a cell."
    tests = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assert) or isinstance(n, ast.Call)
             and isinstance(n.func, ast.Name) and n.func.id in ('test_eq', 'test_close', 'test_fail', 'test_ne')]
    return {m.id for n in tests for m in ast.walk(n) if isinstance(m, ast.Name)}

def names_set(source:str) -> set: # code of a cell
    "Return the names that a cell assigns."
    return {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

@pytest.mark.parametrize('path', chain_notebooks(root()/'nbs'), ids=lambda p: p.stem)
def test_no_notebook_stops_at_what_somebodys_tiles_do_otherwise(path):
    "An expectation of what comes from the run is run.expect, which stops at the procedural world; examples are free."
    cells = read_notebook(path)['cells']
    first = next(i for i, c in enumerate(cells) if 'parameters' in c.get('metadata', {}).get('tags', []))
    code = [''.join(c['source']) for c in cells[first + 1:]
            if c['cell_type'] == 'code' and '#| export' not in ''.join(c['source'])]
    of_run = {'run'}
    for source in code:
        if re.search(r'\brun = start_run\(|\brun\.\w+\(', source): of_run |= names_set(source)
        else: of_run -= names_set(source)
        assert not of_run & asserted_names(source), path.stem

def test_what_is_procedural_says_so(tmp_path):
    run, table = open_run(tmp_path, '/some/tiles'), pd.DataFrame({'x': [1]})
    run.save_table(table, 'a', 'Decodings.', about='world')
    run.save_table(table, 'b', 'Procedural scenes.', about='world')
    run.save_table(table, 'c', 'Decodings.', about='real: tiles')
    run.save_table(table, 'd', 'Counts.')
    assert (run.record['tables'] == dict(a='Procedural world: Decodings.', b='Procedural scenes.', c='Decodings.',
                                         d='Counts.'))
    assert run.record['procedural'] == ['a', 'b']
    alone = open_run(tmp_path/'alone')
    alone.save_table(table, 'a', 'Decodings.', about='world')
    assert alone.record['tables'] == dict(a='Decodings.') and 'procedural' not in alone.record

def test_the_page_is_about_the_tiles_first(tmp_path):
    entry = lambda tables, **more: dict(tables=tables, figures={}, missing={}, seconds=1., commit='abc') | more
    about = dict(profile='toy', data='own', layout='npz', run='1',
                 given=dict(says=['own: 2 test tiles.'], uses=[dict(notebook='11_evaluate', takes='2')]),
                 **provenance(),
                 notebooks={'01_world': entry({'scenes': 'Procedural scenes.'}, procedural=['scenes']),
                            '11_evaluate': entry({'steps': 'Procedural world: steps.', 'results': 'Methods.'},
                                                 procedural=['steps'], given=['results'],
                                                 remarks=['The shift is nearer.'])})
    write_file(tmp_path/'provenance.json', json.dumps(about))
    for t in ('scenes', 'steps'): write_file(tmp_path/f'tables/{t}.csv', 'x\n1\n')
    write_file(tmp_path/'tables/results.csv',
               'data,method,n_tiles,psnr\nreal: own,Stage 1,2,17.1\nworld,Stage 1,3,27.9\n')
    page = write_page(tmp_path).read_text()
    order = ['own: 2 test tiles.', '<h2>Results</h2>', 'real: own', '<h2 id="11_evaluate">', 'The shift is nearer.',
             '<h3 id="results">', '<h3 id="steps">', '<h2>What stays procedural</h2>', '<h2 id="01_world">',
             '<h2 id="run">']
    places = [page.find(text) for text in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places))

def test_a_sentence_for_each_data_set_against_its_own_mean_spectrum(tmp_path):
    store = from_world(tmp_path/'s', 1, 1, 3, size=40)
    rows = store.rows('test')
    truth = to_reflectance(store.read('s2', rows, OPT_BANDS))
    own = own_spectrum(store, rows)
    other = truth[1:].mean((0, 2, 3))[:, None, None]*np.ones_like(truth[:1])
    assert own.psnr.iloc[0] == pytest.approx(float(psnr(other, truth[:1])[0]))
    single = own_spectrum(store, rows[:1])
    assert (single.psnr.iloc[0] == pytest.approx(float(psnr(truth[:1].mean((2, 3), keepdims=True) + 0*truth[:1],
                                                            truth[:1])[0])))
    ids = store.table.id.to_numpy()[rows]
    index = pd.MultiIndex.from_product([['Stage 1', 'Stage 1+2+3', 'U-Net from scratch'], ids], names=['method', 'id'])
    measured = pd.DataFrame(dict(psnr=[10.]*3 + [12.]*3 + [13.]*3, scene=[*ids]*3), index=index)
    said = results_sentence(measured, 'real: own', store, False)
    gain = 12 - own.psnr.mean()
    assert said.startswith(f'On real: own (3 tiles) Stage 1+2+3 reaches 12.00 dB, {gain:+.2f}')
    assert f'({own.psnr.mean():.2f})' in said
    assert 'U-Net from scratch reaches 13.00: it leads.' in said
    table, verdict = compare_with_unets(measured.assign(**{c: 0. for c in RESULT_COLUMNS if c != 'psnr'}), 'real: own')
    assert verdict.startswith('On real: own in PSNR the chain loses to')

def test_claims_are_held_against_the_tiles_the_stages_were_trained_on(tmp_path):
    write_file(tmp_path/'tables/results.csv',
               "data,method,psnr\nreal: it's (trained on world),Stage 1,17\nworld,Stage 1,27\n")
    assert home(Tables(tmp_path/'tables', {})) == 'world'
    frame = pd.DataFrame({'data': ["real: it's", 'world'], 'x': [1, 2]})
    assert frame.query(of_data("data == '{data}'", "real: it's")).x.tolist() == [1]

def test_the_clamp_is_measured_on_given_tiles(tmp_path):
    store = from_world(tmp_path/'s', 1, 1, 3, size=32)
    label, found = true_tiles(2, given=store)
    assert label == 'real: given' and list(found) == [store.table.id.iloc[0], store.table.id.iloc[-1]]
    bands = list(OPT_INDEX)
    assert np.array_equal(found[store.table.id.iloc[0]][bands], store.read('s2', [0], OPT_BANDS)[0])

# ---- all of it

def smoke(home:Path, data:Path, **sets) -> dict: # provenance
    "Run the chain at profile smoke on a user's tiles, in a process of its own."
    options = dict(data=str(data), reports=str(home/'report'), runs=str(home/'run'), sets=sets)
    done = subprocess.run([sys.executable, '-c',
                           f"from gac.runner.chain import run_chain\nrun_chain('smoke', **{options})"],
                          capture_output=True, text=True, cwd=root())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((home/'report/provenance.json').read_text())

@pytest.mark.slow
def test_a_single_tile_gets_a_report(tmp_path):
    npz_tile(tmp_path/'une tuile (été)'/'tuile.npz', 4_000_003)
    about = smoke(tmp_path, tmp_path/'une tuile (été)')
    results = pd.read_csv(tmp_path/'report/tables/results.csv')
    assert results.data.iloc[0] == 'real: une tuile (été) (trained on world)'
    assert set(results.n_tiles[results.data == results.data.iloc[0]]) == {1}
    for notebook, figure in (('02_tiles', 'tiles_real'), ('11_evaluate', 'panels'), ('17_export', 'scene'),
                             ('07_stage1', 'stage1_samples')):
        entry = about['notebooks'][notebook]
        assert 'une tuile' in entry['figures'][figure] and figure not in entry.get('procedural', []), figure
    assert 'On real: une tuile (été)' in about['notebooks']['11_evaluate']['tables']['results']
    assert all(c.startswith('Procedural') for n, c in about['notebooks']['12_learning_curve']['tables'].items())

@pytest.mark.slow
def test_eight_training_tiles_are_enough_for_a_profile_that_asks_for_more(tmp_path):
    for k in range(10):
        npz_tile(tmp_path/'own'/f't{k}.npz', 4_000_010 + k, 112, split='train' if k < 8 else ('val', 'test')[k - 8])
    about = smoke(tmp_path, tmp_path/'own',
                  **{'02_tiles.tile_size': 112, '08_stage2.pairs': 256, '08_stage2.batch_size': 12,
                     '09_stage3.pairs': 256, '09_stage3.batch_size': 12, '12_learning_curve.pairs': [32, 256],
                     '08_stage2.crop': 120, '08_stage2.val_tiles': 64, '18_efficiency.batch': 12})
    assert set(pd.read_csv(tmp_path/'report/tables/results.csv').data) == {'real: own'}
    assert set(pd.read_csv(tmp_path/'report/tables/knowledge.csv').pairs) == {8, 4}
    assert 'there are 8 training tiles' in about['notebooks']['12_learning_curve']['missing']['more pairs']
