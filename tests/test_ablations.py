"Rows differ from the default in what they name and in nothing else; a grid that was stopped goes on where it was."
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from swapping import swap

from gac.core.files import GacError
from gac.core.run import start_run
from gac.data.stores import from_world
from gac.evaluation import setups
from gac.evaluation.ablation_gains import METRICS, ablation_table
from gac.evaluation.maker import STAGE_OUTPUTS, Maker, View, answers, budget, code_digest, middle
from gac.evaluation.setups import (
    BLIND,
    Row,
    Setup,
    _plain,
    changed,
    flatten_setup,
    rows_of,
    setup_differences,
    setup_of,
    with_steps,
)
from gac.measure.tables import load_tiles, measure_methods, stored_method
from gac.models.decoding import Decoding
from gac.stages.chain import brief_recipe, fit_chain
from gac.stages.datasets import Pairs
from gac.stages.stage1 import build_terramind_generator, precompute_stage1


def toy_setup(**changes) -> Setup:
    "Return a default of a few steps."
    setup = Setup(with_steps(brief_recipe(4)), Decoding(1, 'expected'))
    return changed(setup, changes)

@pytest.fixture(scope='module')
def study_run(tmp_path_factory):
    "Train all stages for two steps on four training tiles of 48 px; return the run and its store."
    home = tmp_path_factory.mktemp('ablations')
    run = start_run('14_ablations', 'smoke', 0, str(home/'run'), str(home/'report'))
    store = from_world(run.dir/'tiles', 4, 2, 3, size=48)
    precompute_stage1(store, build_terramind_generator(), **asdict(Decoding(1, 'expected')))
    fit_chain(store, stored_method(store), brief_recipe(4), run.dir, no_refinement=False)
    return run, store

GRID = [Row('metadata', 'none', {'recipe.stage2.metadata': []}, ('opt_v2',)),
        Row('adapters', 'rank 2', {'recipe.stage3.lora_rank': 2}, ('opt_v3',)),
        Row('loss', 'no sar', {'recipe.stage3.sar': 0.}, ('opt_v3',)),
        Row('size', '32 px', {'size': 32}, ('opt_v1', 'opt_v2'))]

@pytest.mark.parametrize('default',
                         [{}, {'recipe.stage2.depth': 0, 'decoding.timesteps': 10, 'decoding.tokens': 'sample'},
    {'recipe.stage3.route': 'tokens', 'recipe.stage3.lora_rank': 4, 'recipe.stage2.l1': 1.,
     'recipe.stage2.metadata': ['month']}], ids=['brief', 'colour alone', 'tokens'])
def test_a_row_changes_what_it_names_and_nothing_else(default):
    setup = toy_setup(**default)
    grid = rows_of(setup)
    asked = set(setups.GRID) - ({'clamp'} if setup.decoding.timesteps == 1 else set())  # one step needs no clamp
    assert {r.question for r in grid} == asked, 'every question has a row that differs from this default'
    for r in grid:
        new = changed(setup, r.change)
        found = setup_differences(setup, new)
        assert found and set(found) <= set(r.change), r.name
        for k, v in r.change.items(): assert _plain(flatten_setup(new)[k]) == _plain(v), r.name
        told = {k for k in r.change if k.endswith('.steps')}  # a row has other budgets only where it is about them
        assert not told or '960 steps' in r.row
        for k in {'recipe.stage2.steps', 'recipe.stage3.steps'} - told:
            assert flatten_setup(new)[k] == flatten_setup(setup)[k], r.name
    for r in grid:  # what is compared with the features and without differs in nothing else
        if r.row.endswith(BLIND) and (partner := [g for g in grid if g.name == r.name.removesuffix(BLIND)]):
            setups_of_pair = [changed(setup, x.change) for x in (partner[0], r)]
            assert set(setup_differences(*setups_of_pair)) == {'recipe.use_features'}

def test_what_a_default_has_is_no_row():
    names = {r.name for r in rows_of(toy_setup())}
    assert 'head of Stage 2: with 3 blocks of structure' not in names and 'head of Stage 2: colour alone' in names
    no_structure = {r.name for r in rows_of(toy_setup(**{'recipe.stage2.depth': 0}))}
    assert 'head of Stage 2: with 3 blocks of structure' in no_structure
    assert not {n for n in names if n.startswith('loss of Stage 2: no l')} - {'loss of Stage 2: no log_mse'}, (
        'a term of weight 0 cannot be switched off')
    assert ('training pairs: 512' not in {r.name for r in rows_of(toy_setup(), pairs=256)}
            and 'tile size: 96 px' not in {r.name for r in rows_of(toy_setup(), side=96)})

def test_typing_errors_are_refused():
    with pytest.raises(GacError, match='recipe.stage2.depth'): changed(toy_setup(), {'recipe.stage2.depht': 1})
    with pytest.raises(GacError, match='metadata: none'): rows_of(toy_setup(), ['metadata: non'])

def test_budgets_are_those_of_the_run_or_those_asked_for():
    long = brief_recipe(pairs=8, steps=0, epochs=4., batch_size=2, val_every=4, save_every=4)
    own, short = with_steps(long), with_steps(long, 8, 6)
    assert (own.stage2.steps, own.stage2.val_every) == (16, 4), (
        'epochs become steps, so that more pairs do not mean more of them')
    assert (short.stage2.steps, short.stage2.val_every, short.stage3.steps, short.stage3.val_every) == (8, 2, 6, 1)
    setup = Setup(short, Decoding())
    assert [budget(setup, o) for o in STAGE_OUTPUTS] == [0, 8, 14]
    assert budget(replace(setup, stages=(3,)), 'opt_v3') == 6 and budget(replace(setup, stages=(2,)), 'opt_v3') == 8

def test_a_killed_grid_goes_on_with_what_is_missing(study_run, monkeypatch, tmp_path):
    run, store = study_run
    default, rows = setup_of(run), store.rows('test')
    code_digest()  # of the functions as they are, before they are counted
    trained, measured, measure = [], [], measure_methods
    for name in ('fit_stage2', 'fit_stage3'):
        fit = getattr(sys.modules['gac.stages.chain'], name)
        swap(monkeypatch, 'gac.stages.chain', name,
             lambda *a, fit=fit, name=name, **kw: trained.append(name) or fit(*a, **kw))
    def until(n):
        def counted(*a, **kw):
            if len(measured) == n: raise KeyboardInterrupt
            measured.append(1)
            return measure(*a, **kw)
        return counted
    swap(monkeypatch, 'gac.measure.tables', 'measure_methods', until(2))
    with pytest.raises(KeyboardInterrupt): answers(run, store, rows, default, GRID, batch_size=2)
    before = list(trained)
    assert len(measured) == 2 and before
    swap(monkeypatch, 'gac.measure.tables', 'measure_methods', until(99))
    told = answers(run, store, rows, default, GRID, batch_size=2)
    assert len(measured) == 2 + 4, 'two of six measurements were there (the default, and its middle, count as well)'
    assert sorted(trained) == ['fit_stage2']*2 + ['fit_stage3']*2, (
        'no metadata, 32 px; rank 2, no sar: each trained once; the default is the run itself')
    again = answers(run, store, rows, default, GRID, batch_size=2)
    pd.testing.assert_frame_equal(told, again)
    assert len(measured) == 6 and len(trained) == 4, 'the second time nothing is made'
    assert not list((run.dir/'ablations').rglob('*.ckpt')), 'checkpoints of finished trainings are gone'
    grown = answers(run, store, rows, default,
                    [*GRID, Row('decoding', '2 steps', {'decoding.timesteps': 2}, ('opt_v1',))], batch_size=2)
    assert len(measured) == 8 and len(trained) == 4 and len(grown) == len(told) + 6, (
        'a new row is measured, with opt_v1 of the default')

def test_what_the_run_has_trained_is_not_trained_again(study_run):
    run, store = study_run
    default, other = setup_of(run), setup_of(run, 1, 1)
    maker = Maker(run, store, default)
    assert maker.ran(default, 2) and maker.ran(default, 3) and maker.trained(default, 2, None) == run.dir/'stage2'
    for setup, seed in ((other, 0), (default, 1), (replace(default, reseed=100), 0)):
        assert not Maker(run, store, default, seed).ran(setup, 2) and not Maker(run, store, default, seed).ran(setup, 3)
    small = changed(default, {'recipe.stage3.lora_rank': 2})
    assert maker.ran(small, 2) and not maker.ran(small, 3)

def test_gains_are_paired_with_the_default_on_the_same_pixels(study_run):
    run, store = study_run
    default, rows = setup_of(run), store.rows('test')
    told = answers(run, store, rows, default, GRID, batch_size=2)
    table = ablation_table(told, GRID, default)
    assert len(table) == 5*len(METRICS) and table.n_scenes.eq(3).all() and table.seeds.eq(1).all()
    maker = Maker(run, store, default)
    small = View(store, 32)
    cut = lambda batch: middle(maker.opt_v1(default)(load_tiles(store, batch['idx'])), 32)
    own = measure_methods(small, rows, {'drawn': maker.opt_v1(replace(default, size=32)), 'cut': cut}, 2)
    row = table[(table.question == 'size') & (table.output == 'opt_v1') & (table.metric == 'psnr')].iloc[0]
    assert row.gain == pytest.approx((own.psnr.loc['drawn'] - own.psnr.loc['cut']).mean(), abs=1e-6) and row.gain != 0
    psnr_of = lambda chosen: told[chosen].set_index('id').psnr
    adapters = psnr_of(told.question == 'adapters') - psnr_of((told.row == 'default') & (told.output == 'opt_v3'))
    gain = table[(table.question == 'adapters') & (table.metric == 'psnr')].gain.iloc[0]
    assert gain == pytest.approx(adapters.mean(), abs=1e-9)

def test_trainings_are_shared_only_where_nothing_differs(study_run):
    run, store = study_run
    default = setup_of(run)
    maker, other = Maker(run, store, default), Maker(run, store, default, seed=1)
    change = lambda **kw: changed(default, {k.replace('__', '.'): v for k, v in kw.items()})
    assert (maker.mark(default, 2) == maker.mark(change(recipe__stage3__lora_rank=2), 2)
            != maker.mark(change(recipe__stage2__lora_rank=2), 2))
    assert maker.mark(default, 3) != maker.mark(change(recipe__stage2__lora_rank=2), 3), (
        'Stage 3 depends on the Stage 2 before it')
    assert maker.mark(default, 2) != other.mark(default, 2) == maker.mark(change(reseed=1), 2)
    assert maker.mark(default, 3) == maker.mark(change(delta=False), 3), 'decoding is no training'
    for k in ('recipe.stage2.pairs', 'season', 'size', 'decoding.tokens'):
        new = {'recipe.stage2.pairs': 2, 'season': False, 'size': 32, 'decoding.tokens': 'argmax'}[k]
        assert maker.mark(default, 2) != maker.mark(changed(default, {k: new}), 2), k

def test_a_hidden_latitude_leaves_the_calendar_month(study_run, monkeypatch):
    run, store = study_run
    seen, told = View(store, 0, ('lat', 'lon')), []
    refine = lambda batch: told.append(sorted(batch)) or batch['truth']
    measure_methods(seen, store.rows('test')[:1], {'x': refine})
    assert 'month' in told[0] and not {'lat', 'lon'} & set(told[0])
    pairs = Pairs(seen, store.rows('train')[:1], lambda batch: batch['truth'])
    assert 'lat' not in pairs[0] and 'month' in pairs[0] and np.isfinite(pairs[0]['truth']).all()
    tested = []
    monkeypatch.setattr(Maker, 'trained', lambda *a: None)
    swap(monkeypatch, 'gac.stages.stage2', 'load_stage2', lambda folder: None)
    swap(monkeypatch, 'gac.stages.stage2', 'stage2_method',
         lambda refiner, images: lambda batch: tested.append('lat' in batch) or images(batch))
    answers(run, store, store.rows('test')[:1], setup_of(run),
                      [Row('metadata', 'calendar month', {'season': False}, ('opt_v2',))])
    assert tested == [True, False], 'the default is told where a tile lies when it is tested, the row is not'
