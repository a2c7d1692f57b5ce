"Baselines on data whose answer is known, tables whose arithmetic is known, and the evaluation of real chips."
import numpy as np
import pandas as pd
import pytest
from gac import evaluate, metrics, stage1, study, tiles

def batch(n:int, size:int=32, seed:int=0, months=None, truth=None) -> dict:
    "Random radar tiles with a truth of one colour, or a given one."
    r = np.random.default_rng(seed)
    s1 = r.normal((-12, -19), 3, (n, size, size, 2)).transpose(0, 3, 1, 2).astype('float32')
    truth = r.uniform(0, .4, (n, 4, size, size)).astype('float32') if truth is None else truth(s1).astype('float32')
    months = np.array(months if months is not None else [1]*n)
    return dict(idx=np.arange(n), id=np.array([f't{i}' for i in range(n)]), scene=np.array([f't{i}' for i in range(n)]), month=months, biome=months*0,
                s1=s1, truth=truth)

def linear(s1) -> np.ndarray:
    "Reflectance that depends on VV, VH and their 5×5 means, band by band differently."
    f = evaluate.pixel_features(s1)
    return np.einsum('bf,nfhw->nbhw', [[.01, 0, 0, 0], [0, .01, 0, 0], [0, 0, .02, 0], [.005, 0, 0, -.01]], f) + .3

def test_regression_recovers_a_planted_relation_on_tiles_it_has_not_seen():
    ridge = evaluate.PixelRegression().fit(batch(4, seed=1, truth=linear))
    test = batch(2, seed=2, truth=linear)
    assert np.abs(ridge.predict(test) - test['truth']).max() < 1e-3
    wrong = evaluate.PixelRegression(window=9).fit(batch(4, seed=1, truth=linear))  # the wrong neighbourhood does not explain it
    assert np.abs(wrong.predict(test) - test['truth']).max() > .01

def test_local_mean_is_a_mean():
    s1 = batch(1)['s1']
    f = evaluate.pixel_features(s1, window=3)
    np.testing.assert_allclose(f[0, 2, 7, 9], s1[0, 0, 6:9, 8:11].mean(), rtol=1e-4)
    np.testing.assert_array_equal(f[:, :2], s1)

def test_trees_follow_a_step_that_a_line_cannot():
    step = lambda s1: (s1[:, :1] > -12).repeat(4, 1)*.3
    train, test = batch(3, seed=1, truth=step), batch(1, seed=2, truth=step)
    error = {k: np.abs(evaluate.PixelRegression(k).fit(train).predict(test) - test['truth']).mean() for k in ('ridge', 'boosted')}
    assert error['boosted'] < .01 < error['ridge']

def test_regressions_are_seeded_and_sample_their_pixels():
    train, test = batch(3, seed=1), batch(1, seed=2)
    fit = lambda **kw: evaluate.PixelRegression(**kw).fit(train).predict(test)
    np.testing.assert_array_equal(fit(pixels=500, seed=3), fit(pixels=500, seed=3))
    assert np.abs(fit(pixels=500, seed=3) - fit(pixels=500, seed=4)).max() > 0

def test_means_know_what_they_are_told():
    colour = lambda values: (lambda s1: np.ones((len(s1), 4, 32, 32))*np.array(values)[:, None, None, None])
    train = batch(4, months=[1, 1, 7, 7], truth=colour([.1, .2, .4, .5]))
    plain, monthly = evaluate.MeanBy().fit(train), evaluate.MeanBy('month').fit(train)
    np.testing.assert_allclose(plain.predict(train)[:, 2, 5, 5], [.3]*4, rtol=1e-6)
    np.testing.assert_allclose(monthly.predict(train)[:, 2, 5, 5], [.15, .15, .45, .45], rtol=1e-6)
    unseen = batch(2, months=[12, 7], truth=colour([0, 0]))
    np.testing.assert_allclose(monthly.predict(unseen)[:, 0, 0, 0], [.3, .45], rtol=1e-6)  # an unknown month gets the mean of all
    both = evaluate.MeanBy('month', 'biome').fit(train | dict(biome=np.array([1, 2, 1, 1])))
    np.testing.assert_allclose(both.predict(train | dict(biome=np.array([1, 2, 1, 9])))[:, 0, 0, 0], [.1, .2, .45, .3], rtol=1e-6)

def test_recalibration_undoes_gain_and_offset_and_nothing_else():
    train, test = batch(3, seed=1)['truth'], batch(2, seed=2)['truth']
    dull = lambda x: x*np.array([.5, 2, 1, .1], 'float32')[:, None, None] + .05
    np.testing.assert_allclose(evaluate.Recalibration().fit(dull(train), train).apply(dull(test)), test, atol=1e-4)
    flat = np.full_like(train, .7)  # nothing to scale: the band mean remains
    np.testing.assert_allclose(evaluate.Recalibration().fit(flat, train).apply(flat)[:, 1], train[:, 1].mean(), rtol=1e-4)

def measured(**psnr) -> pd.DataFrame:
    "A measured table with given PSNRs; two tiles to a scene."
    rows = [dict(method=m, id=f't{i}', scene=f's{i//2}', psnr=v, ssim=v/40, sam_deg=40 - v, rmse=1/v, mae=1/v, lpips=np.nan, mse=1/v**2)
            for m, values in psnr.items() for i, v in enumerate(values)]
    return pd.DataFrame(rows).set_index(['method', 'id'])

def test_gains_are_paired_and_positive_when_better():
    table = measured(a=[20., 24, 30, 28], b=[21., 25, 31, 29])
    gain = evaluate.gains(table, 'world', [('a', 'b')]).set_index('metric')
    assert gain.loc['psnr', ['gain', 'lo', 'hi']].tolist() == pytest.approx([1, 1, 1])  # the tiles differ by 10 dB, the methods always by one
    assert (gain.gain > 0).all() and gain.n_scenes.eq(2).all() and gain.loc['sam_deg', 'gain'] == pytest.approx(1)
    assert (evaluate.gains(table, 'world', [('b', 'a')]).gain < 0).all()

def test_results_have_the_columns_of_the_study():
    table = evaluate.results(measured(a=[20., 24, 30, 28]), 'world', {'a': 7})
    expected = ['data', 'method', 'pairs', 'n_tiles', *(f'{m}{e}' for m in stage1.COLUMNS for e in ('', '_lo', '_hi')), 'seeds']
    assert list(table.columns) == expected
    row = table.iloc[0]
    assert (row.pairs, row.n_tiles, row.psnr) == (7, 4, 25.5) and 20 <= row.psnr_lo < 25.5 < row.psnr_hi <= 30 and np.isnan(row.lpips)

def test_panels_follow_the_rule():
    assert evaluate.by_rule(pd.Series([5., 1, 9, 7, 3], list('abcde'))) == dict(best='c', median='a', worst='b')

def test_rows_measured_are_those_asked_for(tmp_path):
    store = tiles.from_world(tmp_path/'tiles', 3, 1, 5, size=48)
    rows = store.rows('test')[[3, 0, 4]]
    half = lambda b: b['truth']*.5
    one, two = (stage1.measure(store, rows, {'half': half, 'truth': lambda b: b['truth']}, n) for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert list(one.loc['half'].index) == list(store.table.id.iloc[rows]) and (one.loc['truth'].psnr == metrics.PSNR_MAX).all()
    truth = store.read('s2', rows, study.OPT_BANDS)*1e-4
    np.testing.assert_allclose(one.loc['half'].rmse, np.sqrt(((truth/2)**2).mean((1, 2, 3))), rtol=1e-4)

def test_real_chips_are_found_and_measured(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv('GAC_REAL_DATA', str(real_data))
    run = study.start('10_evaluate', 'smoke', 0, str(tmp_path/'run'), str(tmp_path/'reports'))
    sets = evaluate.real_sets(run)
    assert {k: len(s) for k, s in sets.items()} == {'real: terramesh_tiles': 20, 'real: bigearthnet_v2': 3}
    assert sets['real: terramesh_tiles'].attrs['s1_product'] == 'S1RTC'
    store = sets['real: bigearthnet_v2']
    table = stage1.measure(store, store.rows(), evaluate.floors(stage1.read_tiles(store, store.rows()), pixels=2000))
    assert table.psnr.between(10, 60).all() and len(table) == 12
    given = study.start('10_evaluate', 'smoke', 0, str(tmp_path/'given'), str(tmp_path/'reports'), str(real_data/'bigearthnet_v2'))
    assert list(evaluate.real_sets(given)) == ['real: bigearthnet_v2']

def test_without_real_chips_there_are_no_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'real_data', lambda: None)
    assert evaluate.real_sets(study.start('10_evaluate', 'smoke', 0, str(tmp_path/'run'), str(tmp_path/'reports'))) == {}
