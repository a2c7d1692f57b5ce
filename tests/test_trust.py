"Uncertainty of known answer, separate places, attention that adds up, and generations that survive a stop."
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from swapping import swap

from gac.cli import main
from gac.core.files import GacError, read_json
from gac.core.vocabulary import BIOMES
from gac.data.arrays import to_reflectance
from gac.data.store import Store
from gac.evaluation.attention import (
    RADAR_SWAPS,
    attention_of,
    attention_received,
    attention_rows,
    attention_table,
    cross_attention,
    grounded_by,
    other_radar,
    swap_rows,
    swap_table,
    token_places,
)
from gac.evaluation.errors import DISTANCE_NAMES, distance_class, edge_distance, errors_by_class, inner
from gac.evaluation.generations import generations, keep_generations, sample_arrays
from gac.evaluation.transfer import (
    exchanged,
    fit_fold,
    groups_of,
    held_out_tiles,
    place_gains,
    transfer,
    transfer_table,
)
from gac.evaluation.uncertainty import (
    ause,
    band_coverage,
    calibration_curve,
    calibration_error,
    coverage_table,
    in_ensemble_range,
    pixel_coverage,
    range_coverage,
    reliability,
    seasons,
    sparsification,
    spread_and_error,
    uncertainty_scores,
)
from gac.measure.metrics import psnr
from gac.measure.statistics import ratio_ci
from gac.measure.tables import load_tiles, measure_methods, stored_method
from gac.stages.chain import brief_recipe, fit_stage2, recipe_of
from gac.stages.grounding import build_stage3_model
from gac.stages.image_chain import run_chain
from gac.stages.inference import stage3_inference

RNG = lambda seed=0: np.random.default_rng(seed)

@pytest.fixture(scope='module')
def trained(tmp_path_factory, brief_chain):
    "Return a run with briefly trained Stages 2 and 3, the correction of Stage 3 large enough to be measured."
    recipe = brief_recipe(4)
    recipe = replace(recipe, stage3=replace(recipe.stage3, strength=False))
    run, store = brief_chain(tmp_path_factory.mktemp('trust'), '13_trust', (12, 4, 4), recipe)
    chain = run_chain(run)
    with torch.no_grad():
        chain.grounding.head.out.weight.normal_(0, .02, generator=torch.Generator().manual_seed(0))
        for k, p in chain.grounding.named_parameters():
            if 'lora_B' in k: p.normal_(0, .1, generator=torch.Generator().manual_seed(1))  # as after a long training
    return run, store, chain

def batch_of(trained, n=3):
    run, store, chain = trained
    batch = load_tiles(store, store.rows('test')[:n])
    return batch, stored_method(store)(batch), chain

# the value of doubt

def test_ause_is_zero_for_a_perfect_order_and_largest_for_a_reversed_one():
    error = RNG().gamma(1.5, .03, 5000)
    area = {k: ause(x, error) for k, x in dict(perfect=error*7 + 1, noisy=error*RNG(1).uniform(.2, 5, 5000),
                                                     constant=error*0 + 3, reversed=-error).items()}
    assert area['perfect']['ause'] == 0
    assert 0 < area['noisy']['ause'] < area['constant']['ause'] < area['reversed']['ause']
    # equals are taken away by chance, not by position
    assert area['constant']['ause'] == pytest.approx(area['constant']['ause_random'], abs=.02)
    falling = sparsification(error, np.sort(error))
    assert (ause(np.zeros(5000), np.sort(error))['ause'] == pytest.approx(ause(np.zeros(5000), error)['ause'], abs=.02)
            and falling[0] == 1)

def test_sparsification_is_the_error_of_what_is_left():
    error, doubt = np.array([.1, .2, .3, .4]), np.array([1., 4, 2, 3])
    curve = sparsification(doubt, error, (0, .25, .5, .75))
    rms = lambda *x: np.sqrt(np.mean(np.square(x)))
    np.testing.assert_allclose(curve*rms(*error), [rms(.1, .2, .3, .4), rms(.1, .3, .4), rms(.1, .3), .1])

def test_truth_that_is_one_of_the_generations_is_calibrated():
    N, scale = 5, RNG(1).uniform(.01, .1, (40, 1, 4, 12, 12))
    drawn = RNG().normal(.2, scale, (40, N + 1, 4, 12, 12))
    several, truth = drawn[:, :N], drawn[:, N]
    mean, spread = spread_and_error(several)
    curve = calibration_curve(spread, np.abs(mean - truth), 6)
    assert np.sqrt(np.square(mean - truth).mean())/np.sqrt(np.square(spread).mean()) == pytest.approx(1, abs=.01)
    assert curve.share.sum() == pytest.approx(1) and curve.spread.is_monotonic_increasing and len(curve) == 6
    assert in_ensemble_range(several, truth).mean() == pytest.approx((N - 1)/(N + 1), abs=.01)
    twice = calibration_curve(spread, 2*np.abs(mean - truth), 6)
    np.testing.assert_allclose(twice.ratio, 2*curve.ratio)
    perfect = calibration_curve(spread, spread, 6)
    assert calibration_error(perfect) == 0 and calibration_error(twice) > calibration_error(curve)
    with pytest.raises(GacError, match='two or more'): spread_and_error(several[:, :1])

def test_coverage_of_a_constant_is_nothing_and_of_the_truth_is_all():
    truth = RNG().gamma(2, .05, (3, 4, 24, 24))
    assert band_coverage(np.full_like(truth, truth.mean()), truth).tolist() == [0]*4
    assert band_coverage(truth, truth).tolist() == [1]*4
    assert range_coverage(truth + 5, truth) == 0  # as wide, and elsewhere
    half = range_coverage(truth*.5, truth)
    assert .3 < half < .6 and range_coverage(truth*3 - .2, truth) > .95
    assert np.isnan(range_coverage(truth, np.ones(9)))

def test_range_of_a_pixel_is_that_of_its_generations():
    real = np.stack([np.full((4, 2, 2), v) for v in (.1, .3)])[None]  # (1, 2, 4, 2, 2)
    span = lambda *values: pixel_coverage(np.stack([np.full((4, 2, 2), v) for v in values])[None], real)[0, 0]
    assert [round(span(*v), 6) for v in ((.1, .3), (.2, .3), (.0, .5), (.2, .2), (.4, .5))] == [1, .5, 1, 0, 0]

def test_ground_of_a_scene_changes_with_the_month_alone(trained):
    _, store, _ = trained
    ids = store.table.id.iloc[store.rows('test')[:1]]
    ground = seasons(ids, 48)
    own = load_tiles(store, store.rows('test')[:1])
    np.testing.assert_allclose(ground[0, own['month'][0] - 1], own['truth'][0], atol=1e-6)
    assert np.abs(ground[0, 0] - ground[0, 6]).mean() > .005

# generations

def test_generations_follow_seed_tile_and_number(trained):
    batch, _, chain = batch_of(trained)
    made = generations(chain.generator, batch, 3, chain.decoding, 0)
    assert made.shape == (3, 3, 4, 48, 48)
    assert min(np.abs(made[i] - made[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    np.testing.assert_allclose(generations(chain.generator, {k: v[2:] for k, v in batch.items()}, 2, chain.decoding,
                                                 0)[:, 0], made[:2, 2], atol=1e-4)
    assert np.abs(generations(chain.generator, batch, 1, chain.decoding, 1)[0] - made[0]).mean() > 1e-3

def test_stopped_generations_go_on_and_leave_the_same_values(trained, tmp_path, monkeypatch):
    run, store, chain = trained
    rows, arrays = store.rows('test'), sample_arrays(chain)
    assert list(arrays) == ['Stage 1', 'Stage 1+2', 'Stage 1+2+3']
    whole = keep_generations(chain, store, rows, tmp_path/'whole', 2, batch_size=2)
    real, calls = generations, []
    def stopped(*a, **kw):
        calls.append(len(a[1]['id']))
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*a, **kw)
    swap(monkeypatch, 'gac.evaluation.generations', 'generations', stopped)
    with pytest.raises(KeyboardInterrupt): keep_generations(chain, store, rows, tmp_path/'stopped', 2, batch_size=2)
    again = keep_generations(chain, store, rows, tmp_path/'stopped', 2, batch_size=2)
    assert calls == [2, 2, 2]  # the first batch was not drawn twice
    for a in arrays.values(): np.testing.assert_array_equal(whole.read(a, rows), again.read(a, rows))
    swap(monkeypatch, 'gac.evaluation.generations', 'generations', real)
    other = keep_generations(chain, store, rows[:1], tmp_path/'stopped', 2, seed=5)
    assert other.written(arrays['Stage 1']).sum() == 1  # another seed: made anew
    assert (other.read(arrays['Stage 1'], rows[:1]) != whole.read(arrays['Stage 1'], rows[:1])).any()

def test_scores_of_one_generation_are_the_mean_of_all_and_the_mean_scores_better(trained, tmp_path):
    run, store, chain = trained
    rows, a = store.rows('test'), sample_arrays(chain)['Stage 1']
    kept = keep_generations(chain, store, rows, tmp_path/'several', 4)
    known = uncertainty_scores(store, kept, a, rows, stored_method(store), every=1)
    several = to_reflectance(kept.read(a, rows))
    truth = load_tiles(store, rows)['truth']
    one = np.mean([psnr(several[:, k], truth).numpy() for k in range(4)], 0)
    scores = known['scores']
    np.testing.assert_allclose(scores.loc['one generation'].psnr, one, atol=1e-4)
    np.testing.assert_allclose(scores.loc['mean of generations'].psnr, psnr(several.mean(1), truth).numpy(), atol=1e-4)
    np.testing.assert_allclose(scores.loc['as decoded'].psnr,
                               psnr(stored_method(store)(load_tiles(store, rows)), truth).numpy(), atol=1e-4)
    assert (scores.loc['mean of generations'].psnr > scores.loc['one generation'].psnr).all()
    row = reliability(known)
    assert (row['n_tiles'] == 4 and row['samples'] == 4
            and row['rmse'] == pytest.approx(np.sqrt(np.square(several.mean(1) - truth).mean()), rel=1e-4))
    cover = coverage_table(known, 'world', 'Stage 1').set_index(['method', 'range', 'band']).coverage
    # averaging narrows
    assert cover['mean of generations', 'all tiles', 'B08'] < cover['one generation', 'all tiles', 'B08']

def test_command_leaves_mean_and_spread_beside_the_tiles(trained, tmp_path, capsys):
    run, store, chain = trained
    words = ('uncertainty', '--data-dir', store.path, '--output-dir', tmp_path/'out', '--stage2-checkpoint',
             run.dir/'stage2', '--split', 'test', '--max-tiles', 1)
    assert main([str(w) for w in (*words, '--samples', 2)]) == 0
    said, row = capsys.readouterr().out, store.rows('test')[:1]
    assert 'tiles: 1\n' in said and 'ause: ' in said and (tmp_path/'out'/'reliability.csv').exists()
    out = Store(tmp_path/'out')
    several = out.read('several_opt_v2', row).astype(float)
    np.testing.assert_allclose(out.read('mean_several_opt_v2', row), several.mean(1), atol=.6)  # whole digital numbers
    np.testing.assert_allclose(out.read('spread_several_opt_v2', row), several.std(1, ddof=1)*np.sqrt(3/2), atol=.6)
    with pytest.raises(SystemExit, match='2'): main([str(w) for w in (*words, '--samples', 1)])
    assert '--samples: 1: expected 2 to 1000' in capsys.readouterr().err

# places

def places(n=12) -> pd.DataFrame:
    biome = np.resize([4, 6, 11, 13], n)
    return pd.DataFrame(dict(id=[f't{i}' for i in range(n)], biome=biome, lon=np.resize([-60., 10, 100], n),
                             country=np.resize(['Alps', 'Finland', ''], n)))

def test_groups_and_their_gains():
    table = places()
    assert groups_of(table, 'sector').tolist()[:3] == ['Americas', 'Europe and Africa', 'Asia and Australia']
    assert groups_of(table, 'region').tolist()[:3] == ['Alps', 'Finland', 'unknown']
    rows = [dict(method=m, id=f't{i}', scene=f't{i}', psnr=20. + i + (m == 'b')*(table.biome[i] == 6)) for m in 'ab'
            for i in range(12)]
    measured = pd.DataFrame(rows).set_index(['method', 'id'])
    got = place_gains(measured, groups_of(table, 'biome'), 'world', {'a→b': ('a', 'b')}, ('psnr',)).set_index('group')
    assert (got.gain[BIOMES[6]] == 1 and got.gain.drop(BIOMES[6]).eq(0).all() and got.n_tiles.eq(3).all()
            and got.few.eq('yes').all())
    assert got.before[BIOMES[4]] == pytest.approx(np.mean([20, 24, 28]))
    assert got[['lo', 'hi']].isna().to_numpy().all(), 'three scenes are no interval'
    whole = place_gains(measured.loc[measured.index.repeat(1)], pd.Series('all', index=table.id), 'world',
                        {'a→b': ('a', 'b')}, ('psnr',))
    assert not whole.few.eq('yes').any() and whole.lo.notna().all()

@pytest.mark.parametrize('fold', ['cold', 'Americas', 'Finland'])
def test_held_out_places_never_reach_a_training_elsewhere(fold):
    table = places(400)
    held = held_out_tiles(table, fold)
    assert 0 < held.sum() < 400
    made = exchanged(np.arange(400)[::2], held, 60, 3)
    assert not held[made['elsewhere']].any() and [len(set(x)) for x in made.values()] == [60, 60]
    share = held[::2].mean()
    assert held[made['everywhere']].mean() == pytest.approx(share, abs=.01)
    common = set(made['elsewhere']) & set(made['everywhere'])
    assert len(common) == 60 - held[made['everywhere']].sum()  # beside the exchanged tiles the two are the same
    with pytest.raises(GacError, match='Take fewer pairs'): exchanged(np.arange(400)[::2], held, 199, 3)
    with pytest.raises(GacError, match='no tile lies there'): held_out_tiles(table, 'Atlantis')

def test_both_trainings_of_a_fold_get_those_tiles_and_validate_on_no_others(trained, tmp_path, monkeypatch):
    run, store, chain = trained
    held, seen = held_out_tiles(store.table, 'dry'), {}
    real = fit_stage2
    def fit(some, v1, recipe, out_dir, seed):
        seen[out_dir.parent.name] = (some.rows('train'), some.rows('val'), recipe.pairs)
        return real(some, v1, recipe, out_dir, seed)
    swap(monkeypatch, 'gac.stages.chain', 'fit_stage2', fit)
    recipe = recipe_of(run).with_both(pairs=4, val_tiles=2)
    made = fit_fold(store, stored_method(store), recipe, 'dry', tmp_path, 0)
    assert list(seen) == ['elsewhere', 'everywhere']
    assert held[store.rows('val')[:2]].any() and not held[np.concatenate(seen['elsewhere'][:2])].any()
    assert held[seen['everywhere'][0]].any()
    np.testing.assert_array_equal(seen['elsewhere'][1], seen['everywhere'][1])  # steered by the same tiles
    assert [len(x) for x in seen['elsewhere'][:2]] == [len(x) for x in seen['everywhere'][:2]] == [4, 2]
    cards = {w: read_json(tmp_path/w/'stage2'/'made.json') for w in seen}
    assert cards['elsewhere']['train'] != cards['everywhere']['train']  # the tiles did reach the trainings
    batch = load_tiles(store, store.rows('test'))
    images = {k: f(batch) for k, f in made.items()}
    assert np.abs(images['elsewhere, Stage 1+2'] - images['everywhere, Stage 1+2']).max() > 0
    other = batch | dict(biome=np.resize([1, 13], 4), id=np.array([f'{i}x' for i in batch['id']]))
    np.testing.assert_array_equal(made['elsewhere, Stage 1+2, biome not told'](other),
                                  images['elsewhere, Stage 1+2, biome not told'])

def test_transfer_goes_on_where_it_stopped(trained, monkeypatch):
    run, store, chain = trained
    asked = []
    def quick(store, v1, recipe, fold, out_dir, seed, grounding):
        asked.append((fold, seed))
        if len(asked) == 2: raise KeyboardInterrupt
        scaled = lambda x: lambda b: b['truth']*x
        return {'Stage 1': scaled(.7), 'everywhere, Stage 1+2': scaled(.9), 'elsewhere, Stage 1+2': scaled(.8),
                'everywhere, Stage 1+2, biome not told': scaled(.9),
                'elsewhere, Stage 1+2, biome not told': scaled(.8)}
    swap(monkeypatch, 'gac.evaluation.transfer', 'fit_fold', quick)
    ask = (run, store, store.rows('test'), recipe_of(run), ['temperate', 'cold'], (0, 1))
    with pytest.raises(KeyboardInterrupt): transfer(*ask)
    told = transfer(*ask)
    assert len(asked) == 5 and len(set(asked)) == 4  # the interrupted one twice
    transfer(*ask)
    assert len(asked) == 5
    held = pd.Series(held_out_tiles(store.table, 'cold'), index=store.table.id)
    part = told[told.fold == 'cold']
    there = held.iloc[store.rows('test')].sum()
    assert part.id.nunique() == there + min(max(1, there), 4 - there)  # as many of the others
    assert (part.held == held.loc[part.id].to_numpy()).all()
    table = transfer_table(told, 'world', 4)
    price = table[(table.metric == 'psnr') & (table.step == 'Stage 1+2: everywhere → elsewhere')]
    assert (price.gain < -1).all() and price.seeds.eq(2).all()
    assert {'held-out places', 'other places'} >= set(price.tested)
    assert price.n_tiles.sum() == told.drop_duplicates(['fold', 'id']).shape[0]
    shutil.rmtree(run.dir/'trust')

# attention

def test_attention_adds_up_is_what_the_layer_used_and_moves_with_the_radar(trained):
    batch, v2, chain = batch_of(trained)
    model, kept = chain.grounding, {}
    layer = model.generator.net.decoder[-1].cross_attn
    hook = layer.register_forward_hook(lambda m, i, o: kept.update(x=i[0], context=i[1], out=o))
    weights = attention_of(model, batch['s1'], v2)
    hook.remove()
    assert weights.shape == (len(model.generator.net.decoder), 3, 64, 128)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-4, rtol=0)
    with torch.no_grad():
        w = cross_attention(layer, kept['x'], kept['context'])
        v = layer.kv(kept['context'])[..., kept['x'].shape[-1]:].unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        torch.testing.assert_close(layer.proj((w @ v).transpose(1, 2).flatten(2)), kept['out'], atol=1e-4, rtol=1e-4)
    moved = attention_of(model, np.roll(batch['s1'], 12, -1), v2)
    assert (moved - weights).abs().max() > .01
    off = attention_of(model, batch['s1'], v2, adapters=False)
    assert (off - weights).abs().max() > 1e-3
    torch.testing.assert_close(attention_of(model, batch['s1'], v2), weights)  # and they are on again

def test_attention_statistics_of_known_weights(trained, monkeypatch):
    batch, v2, chain = batch_of(trained)
    places = token_places(chain.grounding, 48)
    n = len(places['query'])
    assert ({k: len(v) for k, v in places.items()} == dict(S1GRD=64, S2L2A=64, query=64)
            and places['query'][0].tolist() == [3, 3] and places['S1GRD'][-1].tolist() == [45, 45])
    known = dict(even=torch.full((2, 3, n, 2*n), 1/(2*n)),
                 here=torch.cat([.75*torch.eye(n), .25*torch.eye(n)], 1).expand(2, 3, n, 2*n))
    rows = {}
    for name, w in known.items():
        swap(monkeypatch, 'gac.evaluation.attention', 'attention_of', lambda *a, w=w: w)
        rows[name] = attention_rows(chain.grounding, batch, v2)
    even, here = (rows[k].drop(columns=['id', 'scene']).mean() for k in known)
    assert (even.share_radar == pytest.approx(.5) and even.distance_radar == pytest.approx(even.distance_even)
            and here.share_radar == pytest.approx(.75) and here.distance_radar == 0)
    table = attention_table(rows, 'world')
    assert table[table.layer == 'all'].n_tiles.eq(3).all() and len(table) == 6 and table.uniform.eq(.5).all()
    maps = attention_received(known['here'], places)
    assert maps['S1GRD'].shape == (2, 3, 8, 8) and float(maps['S1GRD'].mean()) == pytest.approx(1.5)

def test_exchanged_radar_changes_only_what_reads_it(trained):
    batch, v2, chain = batch_of(trained)
    model, other = chain.grounding, other_radar(batch, "another tile's")
    assert (all((other[i] != batch['s1'][i]).any() for i in range(3))
            and np.ptp(other_radar(batch, 'constant'), axis=(2, 3)).max() < 1e-5)
    own = stage3_inference(model, batch['s1'], v2).numpy()
    by = lambda where, radar=other: grounded_by(model, batch['s1'], radar, v2, where, batch_size=2)
    for where in RADAR_SWAPS:
        np.testing.assert_allclose(by(where, batch['s1']), own, atol=1e-5)
        assert np.abs(by(where) - own).max() > 1e-4, where
    # without TerraMind's features only the head's pixels read the radar
    features, model.use_features = model.use_features, False
    try:
        blind = stage3_inference(model, batch['s1'], v2).numpy()
        np.testing.assert_allclose(by("in TerraMind's features"), blind, atol=1e-6)
        assert np.abs(by("in the head's pixels") - blind).max() > 1e-4
    finally: model.use_features = features
    measured, change = swap_rows(model, batch, v2)
    table = swap_table(measured, change, 'world').set_index(['step', 'metric'])
    assert change.loc['own radar'].eq(0).all() and change.loc['opt_v2'].to_numpy() == pytest.approx(1, abs=1e-4)
    assert len(table) == 7*3
    with pytest.raises(GacError, match='two scenes'):
        other_radar({k: v[:1] for k, v in batch.items()}, "another tile's")

@pytest.mark.slow
def test_attention_of_terratorchs_own_tiny_model():
    model = build_stage3_model(pretrained=False, name='terramind_v1_tiny_generate')
    r = RNG()
    s1, v2 = r.normal(-15, 4, (1, 2, 96, 96)).astype('float32'), r.uniform(0, .4, (1, 4, 96, 96)).astype('float32')
    weights = attention_of(model, s1, v2)
    assert weights.shape == (4, 1, 36, 72)  # 16-px tokens
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 1, 36), atol=1e-4, rtol=0)
    rows = attention_rows(model, dict(s1=s1, id=['a'], scene=['a']), v2)
    assert len(rows) == 4 and rows.uniform.eq(.5).all() and token_places(model, 96)['query'][0].tolist() == [8, 8]

# errors

def test_distance_counts_from_the_strong_edges_of_the_truth():
    image = np.full((1, 4, 60, 60), .1, 'float32')
    image[..., 30:] = .4
    far = edge_distance(image)[0]
    assert far.shape == (48, 48) and far[:, 23:25].max() == 0 and far[20, 0] > 16
    assert np.isinf(edge_distance(image*0 + .1)).all()
    assert distance_class(np.array([0, 1, 1.5, 2, 4, 8, 15.9, 16, np.inf])).tolist() == [0, 1, 1, 2, 3, 4, 4, 5, 6]
    assert list(DISTANCE_NAMES) == list(range(7))
    at = inner(np.arange(3600).reshape(60, 60))  # an error map is cut to where the edge map lies
    assert at.shape == far.shape and at[0, 0] == 6*60 + 6 and at[-1, -1] == 53*60 + 53

def test_errors_of_classes_make_up_the_error_of_the_tiles(trained):
    run, store, chain = trained
    rows = store.rows('test')
    methods = {'Stage 1': stored_method(store), 'half': lambda b: (stored_method(store)(b) + b['truth'])/2}
    table = errors_by_class(store, rows, methods, 'world', batch_size=3)
    measured = measure_methods(store, rows, methods)
    for m in methods:
        part = table[(table.by == 'land cover') & (table.method == m)]
        assert ((part.mae*part['share']).sum() == pytest.approx(measured.loc[m].mae.mean(), rel=1e-4)
                and part['share'].sum() == pytest.approx(1))
    half = table[table.method == 'half']
    np.testing.assert_allclose(half.gain, half.mae, rtol=1e-4)  # half the error is gone
    wide = table[table.n_tiles > 1]
    assert ((wide.lo <= wide.mae).all() and (wide.mae <= wide.hi).all() and table[table.n_tiles == 1].lo.isna().all()
            and set(table.by) == {'land cover', 'distance to edge'})

def test_ratio_is_weighted_by_pixels():
    mae, lo, hi = ratio_ci(np.array([[10.], [1]]), np.array([100, 1]), ['a', 'b'])
    assert mae[0] == pytest.approx(11/101) and lo[0] == pytest.approx(.1) and hi[0] == pytest.approx(1)
