"Baselines on data whose answer is known, tables whose arithmetic is known, and the evaluation of real chips."
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from swapping import swap

from gac.core.files import GacError, read_json
from gac.core.run import start_run
from gac.core.vocabulary import OPT_BANDS
from gac.data.stores import from_world
from gac.evaluation.chain_variants import variant_methods
from gac.evaluation.floors import NEAREST, MeanBy, PixelRegression, pixel_features, simple_baselines
from gac.evaluation.learning_curve import learning_curve, learning_curve_gains, learning_curve_table
from gac.evaluation.methods import grounder, stage_methods, tiles_for_product
from gac.evaluation.recalibration import Recalibration
from gac.evaluation.results import by_rule, gains_of_stages, ranking, real_sets, results_table
from gac.measure.metrics import PSNR_MAX
from gac.measure.tables import RESULT_COLUMNS, load_tiles, measure_methods, stored_method
from gac.stages.chain import brief_recipe, fit_chain, fit_stage3, mean_of_seeds, recipe_of
from gac.stages.stage1 import build_terramind_generator, grid_store
from gac.stages.stage3_checkpoint import save_stage3


def batch(n:int, size:int=32, seed:int=0, months=None, truth=None) -> dict:
    "Random radar tiles with a truth of one colour, or a given one."
    r = np.random.default_rng(seed)
    s1 = r.normal((-12, -19), 3, (n, size, size, 2)).transpose(0, 3, 1, 2).astype('float32')
    truth = r.uniform(0, .4, (n, 4, size, size)).astype('float32') if truth is None else truth(s1).astype('float32')
    months = np.array(months if months is not None else [1]*n)
    return dict(idx=np.arange(n), id=np.array([f't{i}' for i in range(n)]), scene=np.array([f't{i}' for i in range(n)]),
                month=months, biome=months*0,
                s1=s1, truth=truth)

def linear(s1) -> np.ndarray:
    "Reflectance that depends on VV, VH and their 5×5 means, band by band differently."
    f = pixel_features(s1)
    return np.einsum('bf,nfhw->nbhw', [[.01, 0, 0, 0], [0, .01, 0, 0], [0, 0, .02, 0], [.005, 0, 0, -.01]], f) + .3

def test_regression_recovers_a_planted_relation_on_tiles_it_has_not_seen():
    ridge = PixelRegression().fit(batch(4, seed=1, truth=linear))
    test = batch(2, seed=2, truth=linear)
    assert np.abs(ridge.predict(test) - test['truth']).max() < 1e-3
    wrong = PixelRegression(window=9).fit(batch(4, seed=1, truth=linear))  # the wrong neighbourhood does not explain it
    assert np.abs(wrong.predict(test) - test['truth']).max() > .01

def test_local_mean_is_a_mean():
    s1 = batch(1)['s1']
    f = pixel_features(s1, window=3)
    np.testing.assert_allclose(f[0, 2, 7, 9], s1[0, 0, 6:9, 8:11].mean(), rtol=1e-4)
    np.testing.assert_array_equal(f[:, :2], s1)

def test_trees_follow_a_step_that_a_line_cannot():
    step = lambda s1: (s1[:, :1] > -12).repeat(4, 1)*.3
    train, test = batch(3, seed=1, truth=step), batch(1, seed=2, truth=step)
    error = {k: np.abs(PixelRegression(k).fit(train).predict(test) - test['truth']).mean()
             for k in ('ridge', 'boosted')}
    assert error['boosted'] < .01 < error['ridge']

def test_regressions_are_seeded_and_sample_their_pixels():
    train, test = batch(3, seed=1), batch(1, seed=2)
    fit = lambda **kw: PixelRegression(**kw).fit(train).predict(test)
    np.testing.assert_array_equal(fit(pixels=500, seed=3), fit(pixels=500, seed=3))
    assert np.abs(fit(pixels=500, seed=3) - fit(pixels=500, seed=4)).max() > 0

def test_means_know_what_they_are_told():
    colour = lambda values: (lambda s1: np.ones((len(s1), 4, 32, 32))*np.array(values)[:, None, None, None])
    train = batch(4, months=[1, 1, 7, 7], truth=colour([.1, .2, .4, .5]))
    plain, monthly = MeanBy().fit(train), MeanBy('month').fit(train)
    np.testing.assert_allclose(plain.predict(train)[:, 2, 5, 5], [.3]*4, rtol=1e-6)
    np.testing.assert_allclose(monthly.predict(train)[:, 2, 5, 5], [.15, .15, .45, .45], rtol=1e-6)
    unseen = batch(2, months=[12, 7], truth=colour([0, 0]))
    # an unknown month gets the mean of all
    np.testing.assert_allclose(monthly.predict(unseen)[:, 0, 0, 0], [.3, .45], rtol=1e-6)
    both = MeanBy('month', 'biome').fit(train | dict(biome=np.array([1, 2, 1, 1])))
    np.testing.assert_allclose(both.predict(train | dict(biome=np.array([1, 2, 1, 9])))[:, 0, 0, 0], [.1, .2, .45, .3],
                               rtol=1e-6)

def test_recalibration_undoes_gain_and_offset_and_nothing_else():
    train, test = batch(3, seed=1)['truth'], batch(2, seed=2)['truth']
    dull = lambda x: x*np.array([.5, 2, 1, .1], 'float32')[:, None, None] + .05
    np.testing.assert_allclose(Recalibration().fit(dull(train), train).apply(dull(test)), test, atol=1e-4)
    flat = np.full_like(train, .7)  # nothing to scale: the band mean remains
    np.testing.assert_allclose(Recalibration().fit(flat, train).apply(flat)[:, 1], train[:, 1].mean(), rtol=1e-4)

def measured(**psnr) -> pd.DataFrame:
    "Return a measured table with given PSNRs; two tiles to a scene."
    rows = [dict(method=m, id=f't{i}', scene=f's{i//2}', psnr=v, ssim=v/40, sam_deg=40 - v, rmse=1/v, mae=1/v,
                 lpips=np.nan, mse=1/v**2, sar_edge=.4 + 1/v, sar_edge_gap=1/v, edge_recall=v/100, hallucination=1/v)
            for m, values in psnr.items() for i, v in enumerate(values)]
    return pd.DataFrame(rows).set_index(['method', 'id'])

def test_gains_are_paired_and_positive_when_better():
    table = measured(a=[20., 24, 30, 28], b=[21., 25, 31, 29])
    gain = gains_of_stages(table, 'world', [('a', 'b')]).set_index('metric')
    # the tiles differ by 10 dB, the methods always by one
    assert gain.loc['psnr', ['gain', 'lo', 'hi']].tolist() == pytest.approx([1, 1, 1])
    assert (gain.gain.isna().tolist() == [m == 'lpips' for m in RESULT_COLUMNS] and (gain.gain.dropna() > 0).all()
            and gain.n_scenes.eq(2).all() and gain.loc['sam_deg', 'gain'] == pytest.approx(1))
    assert (gains_of_stages(table, 'world', [('b', 'a')]).gain.dropna() < 0).all()
    assert (gains_of_stages(table, 'world', {'1→2': ('a', 'b')},
                            seeds=3)[['step', 'seeds']].drop_duplicates().values.tolist() == [['1→2', 3]])

def test_results_have_the_columns_of_the_study():
    table = results_table(measured(a=[20., 24, 30, 28]), 'world', {'a': 7})
    expected = ['data', 'method', 'pairs', 'n_tiles', *(f'{m}{e}' for m in (*RESULT_COLUMNS, 'psnr_pooled')
                                                  for e in ('', '_lo', '_hi')), 'seeds']
    assert list(table.columns) == expected
    row = table.iloc[0]
    assert (row.pairs, row.n_tiles, row.psnr) == (7, 4, 25.5) and 20 <= row.psnr_lo < 25.5 < row.psnr_hi <= 30
    assert np.isnan(row.lpips)
    # the worst tile decides: 10·log10 of the mean of 1/PSNR², which stands for the MSE here
    assert row.psnr_pooled == pytest.approx(-10*np.log10(np.mean([v**-2 for v in (20., 24, 30, 28)])))
    realism = dict(psnr_debiased=30., gradient_energy=[.01, 1, 1, 100])
    more = results_table(measured(a=[20., 24, 30, 28]).assign(**realism), 'world', {})
    assert (more.psnr_debiased[0], more.gradient_energy[0]) == (30, pytest.approx(1))  # a geometric mean

def test_panels_follow_the_rule():
    assert by_rule(pd.Series([5., 1, 9, 7, 3], list('abcde'))) == dict(best='c', median='a', worst='b')

def test_rows_measured_are_those_asked_for(tmp_path):
    store = from_world(tmp_path/'tiles', 3, 1, 5, size=48)
    rows = store.rows('test')[[3, 0, 4]]
    half = lambda b: b['truth']*.5
    one, two = (measure_methods(store, rows, {'half': half, 'truth': lambda b: b['truth']}, n) for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert list(one.loc['half'].index) == list(store.table.id.iloc[rows]) and (one.loc['truth'].psnr == PSNR_MAX).all()
    truth = store.read('s2', rows, OPT_BANDS)*1e-4
    np.testing.assert_allclose(one.loc['half'].rmse, np.sqrt(((truth/2)**2).mean((1, 2, 3))), rtol=1e-4)

def test_real_chips_are_found_and_measured(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv('GAC_REAL_DATA', str(real_data))
    run = start_run('11_evaluate', 'smoke', 0, str(tmp_path/'run'), str(tmp_path/'reports'))
    sets = real_sets(run)
    assert {k: len(s) for k, s in sets.items()} == {'real: terramesh_tiles': 20, 'real: bigearthnet_v2': 3}
    assert sets['real: terramesh_tiles'].attrs['s1_product'] == 'S1RTC'
    store = sets['real: bigearthnet_v2']
    table = measure_methods(store, store.rows(), simple_baselines(load_tiles(store, store.rows()), pixels=2000))
    # the nearest of tiles it was fitted on is the tile itself
    assert table.drop(index=NEAREST, level='method').psnr.between(10, 60).all() and len(table) == 18
    given = start_run('11_evaluate', 'smoke', 0, str(tmp_path/'given'), str(tmp_path/'reports'),
                        str(real_data/'bigearthnet_v2'))
    assert list(real_sets(given)) == ['real: bigearthnet_v2']

def test_without_real_chips_there_are_no_sets(tmp_path, monkeypatch):
    swap(monkeypatch, 'gac.core.files', 'real_data', lambda: None)
    assert real_sets(start_run('11_evaluate', 'smoke', 0, str(tmp_path/'run'), str(tmp_path/'reports'))) == {}

def test_ranks_follow_the_gap_and_not_the_raw_value():
    table = measured(copy=[20., 21, 22, 23], honest=[25., 26, 27, 28], truth=[100.]*4)
    table['sar_edge'] = [.1]*4 + [.45]*4 + [.5]*4
    table['sar_edge_gap'] = [.4]*4 + [.05]*4 + [0.]*4
    table = table.rename(index=dict(copy='Stage 1', honest='Stage 1+2'))
    ranks = ranking(table, 'world').set_index('method')
    expected = {'Stage 1': (2, 1, 2), 'Stage 1+2': (1, 2, 1)}  # by the gap, by the raw value, by PSNR
    assert {m: tuple(r) for m, r in ranks[['rank', 'rank_raw', 'rank_psnr']].iterrows()} == expected
    assert ranks.sar_edge_truth.eq(.5).all()
    kept = results_table(table, 'world', {}, seeds=3).set_index('method')
    # nothing is trained in Stage 1
    assert 'truth' not in kept.index and kept.seeds.to_dict() == {'Stage 1': 1, 'Stage 1+2': 3}

def test_mean_of_seeds_is_taken_tile_by_tile():
    one, two = measured(a=[20., 24, 30, 28]), measured(a=[22., 24, 30, 20])
    mean = mean_of_seeds([one, two])
    assert mean.psnr.tolist() == [21, 24, 30, 24] and list(mean.scene) == list(one.scene)
    assert list(mean.index) == list(one.index)

@pytest.fixture(scope='module')
def trained(tmp_path_factory, brief_chain):
    "Return a run with a store, Stage 1 and briefly trained Stages 2 and 3."
    return brief_chain(tmp_path_factory.mktemp('trained'), '11_evaluate')

def test_recipe_is_read_back_and_repeats_the_training(trained, tmp_path):
    run, store = trained
    recipe = recipe_of(run)
    assert (recipe.stage2, recipe.stage3) == (brief_recipe(4).stage2, brief_recipe(4).stage3) and recipe.pairs == 4
    again = fit_chain(store, stored_method(store), recipe, tmp_path, 0, no_refinement=False)
    stages, rows = stage_methods(run, store, store.rows('test'))
    batch = load_tiles(store, rows)
    assert list(stages) == ['Stage 1', 'Stage 1+2', 'Stage 1+2+3']
    for name in again: np.testing.assert_allclose(again[name](batch), stages[name](batch), atol=1e-5)
    fit_stage3(store, again['Stage 1+2'], recipe, tmp_path/'other', 5)
    made = read_json(tmp_path/'other'/'made.json')
    # another seed reaches everything
    assert (made['settings']['seed'], made['model']['seed'], made['train'][-1]) == (5, 5, 5)

def test_stored_images_are_preferred_and_missing_ones_leave_the_tile_out(trained):
    run, store = trained
    place = grid_store(run, store)
    place.ensure_array('opt_v3_no2', (4, 48, 48), 'int16', {})
    rows = store.rows('test')
    try:
        with place: place.write('opt_v3_no2', rows[:2], np.full((2, 4, 48, 48), 1234, 'int16'))
        stages, seen = stage_methods(run, store, rows)
        assert list(seen) == list(rows[:2]) and np.allclose(stages['Stage 1+3'](load_tiles(store, seen)), .1234)
    finally: place.drop('opt_v3_no2')

def test_grounding_of_the_other_radar_product_keeps_what_was_learned(trained, tmp_path):
    run, store = trained
    same, other = (grounder(run.dir/'stage3', product) for product in ('S1GRD', 'S1RTC'))
    assert (same.radar, other.radar) == ('S1GRD', 'S1RTC')
    for p in same.parameters(): p.data.add_(.01)
    same.residual_scale.fill_(.7)
    save_stage3(same, tmp_path/'stage3')
    same, other = (grounder(tmp_path/'stage3', product) for product in ('S1GRD', 'S1RTC'))
    learned = {k: v for k, v in same.state_dict().items() if 'lora_' in k or k.startswith('head.') or k == 'strength'}
    assert (any('lora_' in k for k in learned) and float(other.residual_scale) == pytest.approx(.7)
            and any(k == 'head.out.weight' for k in learned))
    for k, v in learned.items(): assert torch.equal(other.state_dict()[k], v), k

def test_floors_see_the_radar_product_of_the_tiles(trained):
    run, store = trained
    model = build_terramind_generator(('S1RTC',))
    train, v1 = tiles_for_product(run, store, 'S1RTC', 'train', 4, model)
    own = load_tiles(store, store.rows('train')[:1])
    assert len(train['idx']) == 1 and v1.shape == own['truth'].shape
    assert np.abs(train['s1'] - own['s1']).mean() > .1  # the same scene, another product
    np.testing.assert_array_equal(train['truth'], own['truth'])

def test_random_chain_holds_no_pretrained_weight_and_controls_see_what_they_say(trained, tmp_path, monkeypatch):
    run, store = trained
    asked = []
    for place, name in (('gac.stages.stage1', 'build_terramind_generator'),
                        ('gac.stages.refiner', 'build_prithvi_refiner'),
                        ('gac.stages.grounding', 'build_stage3_model')):
        real = getattr(sys.modules[place], name)
        swap(monkeypatch, place, name, lambda *a, real=real, who=name, **kw: asked.append((who, kw)) or real(*a, **kw))
    recipe = recipe_of(run)
    random = variant_methods(run, store, 'random', recipe, tmp_path, 0)
    assert (list(random) == ['opt_v1', 'opt_v2', 'opt_v3']
            and {n for n, _ in asked} == {'build_terramind_generator', 'build_prithvi_refiner', 'build_stage3_model'})
    assert all(kw['pretrained'] is False for _, kw in asked)
    asked.clear()
    blind = variant_methods(run, store, 'pixel head on S1 alone', recipe, tmp_path, 0)
    assert list(blind) == ['opt_v3'] and [kw['see'] for n, kw in asked if n == 'build_stage3_model'] == [False]
    batch = load_tiles(store, store.rows('test')[:2])
    # no image gets in
    np.testing.assert_array_equal(blind['opt_v3'](batch),
                                  blind['opt_v3'](batch | dict(id=batch['id'].copy(), truth=batch['truth']*.1)))
    with pytest.raises(GacError, match='expected one of pretrained'):
        variant_methods(run, store, 'x', recipe, tmp_path)

def test_pretrained_chain_of_the_comparison_starts_from_the_stored_opt_v1(trained, tmp_path):
    run, store = trained
    recipe, batch = recipe_of(run), load_tiles(store, store.rows('test'))
    chain, blind = (variant_methods(run, store, v, recipe, tmp_path, 0)
                    for v in ('pretrained', 'head without TerraMind features'))
    np.testing.assert_array_equal(chain['opt_v1'](batch), stored_method(store)(batch))
    assert list(blind) == ['opt_v3'] and (tmp_path/'stage2').is_dir() and not (tmp_path/'stage2_random').exists()

def test_knowledge_goes_on_where_it_stopped_and_starts_anew_when_asked_for_something_else(trained, monkeypatch):
    run, store = trained
    trained_ = []
    def quick(run, store, variant, recipe, out_dir, seed=0):
        trained_.append((recipe.pairs, seed, variant))
        if len(trained_) == 3: raise KeyboardInterrupt
        return dict(opt_v3=lambda b: b['truth']*(.9 if variant == 'pretrained' else .8))
    swap(monkeypatch, 'gac.evaluation.learning_curve', 'variant_methods', quick)
    recipe, rows, ask = recipe_of(run), store.rows('test'), dict(pairs=[2, 4], seeds=[0, 1],
                                                                 variants=('pretrained', 'random'))
    with pytest.raises(KeyboardInterrupt): learning_curve(run, store, rows, recipe, **ask)
    told = learning_curve(run, store, rows, recipe, **ask)
    assert len(trained_) == 9 and len(set(trained_)) == 8  # the interrupted one twice
    learning_curve(run, store, rows, recipe, **ask)
    assert len(trained_) == 9
    learning_curve(run, store, rows, replace(recipe, stage3=replace(recipe.stage3, lies=.5)),
                   **ask | dict(pairs=[2], seeds=[0]))
    assert len(trained_) == 11
    table, gain = learning_curve_table(told), learning_curve_gains(told)
    assert len(table) == 8 and list(table)[:6] == ['pairs', 'val_tiles', 'variant', 'seed', 'output', 'n_tiles']
    assert table.n_tiles.eq(4).all()
    gain = gain[gain.metric == 'psnr']
    assert gain.seeds.eq(2).all() and gain.pairs.tolist() == [2, 4]
    assert gain.gain.tolist() == pytest.approx([20*np.log10(2)]*2, abs=1e-4)
