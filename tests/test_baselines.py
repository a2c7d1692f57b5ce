"Baselines on tiles whose answer is known; U-Nets that learn, look where they may, and go on where they stopped."
import json
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from swapping import swap

from gac.core.config import UNetConfig
from gac.core.files import GacError, read_yaml, root, write_file
from gac.data.stores import from_world
from gac.data.world.noise import PRETRAIN_BASE
from gac.evaluation.floors import (
    MEAN,
    NEAREST,
    REGRESSIONS,
    MeanBy,
    MeanSpectrum,
    PixelRegression,
    Retrieval,
    descriptors,
    simple_baselines,
)
from gac.evaluation.learning_curve import best_unet, headline_contrasts, learning_curve, learning_curve_gains
from gac.evaluation.methods import pairs_of, stage_methods, unet_methods
from gac.evaluation.recalibration import LossRecalibration, fit_recalibrations
from gac.evaluation.results import compare_with_unets
from gac.evaluation.training_intervals import training_gain
from gac.measure import metrics
from gac.measure.tables import load_tiles, measure_methods, stored_method
from gac.stages.chain import brief_recipe, recipe_of
from gac.stages.grounding import build_stage3_model
from gac.stages.pretrain import load_stage, pretrain_all
from gac.stages.pretrain_objectives import PretrainPlan
from gac.stages.refiner import build_prithvi_refiner, forecast_memory
from gac.stages.unet import (
    brief_unet,
    draw_trials,
    equal_compute_unet_steps,
    fit_unet,
    load_unet,
    search_unet,
    slug,
    training_cost,
    unet_method,
    unet_step,
    with_trial,
)
from gac.stages.unet_model import (
    PRETRAINED,
    SIZE_TOLERANCE,
    build_unet,
    matched,
    pretrained_unet,
    weights_file,
    world_stats,
)
from gac.stages.unet_share import fit_share
from gac.training.checkpoints import load_checkpoint, save_checkpoint
from gac.training.int8 import weigh_memory
from gac.training.order import seeded


def V1(batch) -> np.ndarray: return batch['truth']*.8  # a Stage 1 that is too dark

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "Return a small procedural world."
    return from_world(tmp_path_factory.mktemp('store')/'tiles', 6, 2, 4, size=48)

def tile_batch(store, split='train') -> dict: return load_tiles(store, store.rows(split))

def psnr(images, batch) -> float: return float(metrics.psnr(images, batch['truth']).mean())

def test_retrieval_finds_its_own_tile_and_a_like_one_for_others(store):
    train, test = tile_batch(store), tile_batch(store, 'test')
    near = Retrieval().fit(train)
    assert near.found(train['s1']).tolist() == list(range(6))
    np.testing.assert_array_equal(near.predict(train), train['truth'])
    noisy = train['s1'] + np.random.default_rng(0).normal(0, .2, train['s1'].shape)
    assert near.found(noisy).tolist() == list(range(6))
    assert {t.tobytes() for t in near.predict(test)} <= {t.tobytes() for t in train['truth']}  # copies, never mixtures
    larger = test | dict(s1=np.tile(test['s1'], (1, 1, 2, 2)))
    assert near.predict(larger).shape == (4, 4, 96, 96)

def test_descriptors_do_not_depend_on_how_many_tiles_there_are(store):
    s1 = tile_batch(store)['s1']
    np.testing.assert_allclose(descriptors(s1)[2:3], descriptors(s1[2:3]), rtol=1e-5)
    moved = descriptors(s1 + 3) - descriptors(s1)
    np.testing.assert_allclose(moved[:, :10], 3, atol=1e-4)  # quantiles of VV and VH rise with them
    np.testing.assert_allclose(moved[:, 10:18], 0, atol=1e-4)  # those of the difference, and the roughness, do not

def test_floors_hold_the_retrieval(store):
    train = tile_batch(store)
    made = simple_baselines(train, pixels=2000)
    assert list(made) == ['band mean', 'mean by month', MEAN, NEAREST, *REGRESSIONS]
    np.testing.assert_array_equal(made[NEAREST](train), train['truth'])

def small(pairs=6, **settings) -> UNetConfig:
    "Return settings that fit a few tiles within seconds."
    steps = settings.pop('steps', 24)
    return brief_unet(pairs, **dict(steps=steps, val_every=steps, batch_size=3, lr=4e-3, width=8) | settings)

def test_unet_learns_its_tiles(store, tmp_path):
    train = tile_batch(store)
    floor = psnr(MeanBy().fit(train).predict(train), train)
    learnt = fit_unet(store, V1, 'U-Net from scratch', small(), tmp_path/'unet')
    assert psnr(learnt(train), train) > floor + .3
    kept, card = load_unet(tmp_path/'unet')
    np.testing.assert_array_equal(unet_method(kept)(train), learnt(train))
    assert (card['pairs'], card['params']['width'], card['steps']) == (6, 8, 24)

@pytest.mark.parametrize('variant, kind', [('U-Net from scratch', 'mean spectrum'), ('U-Net with opt_v1', 'opt_v1'),
                                           ('U-Net pretrained', 'pretrained weights')])
def test_a_unet_that_only_harms_stays_at_its_reference(store, tmp_path, variant, kind):
    "Let validation see truths that the reference meets exactly, and a training that leaves it."
    train, val, test = (tile_batch(store, s) for s in ('train', 'val', 'test'))
    images = lambda batch: batch['truth']  # a Stage 1 without error
    spoilt = fit_unet(store, images, variant, small(steps=2, lr=.05, lr_pretrained=.05, width=16), tmp_path/'unet')
    kept, card = load_unet(tmp_path/'unet')
    assert card['reference'] == kept.reference.kind == kind and card['share'] == kept.share
    assert card['metrics']['val_psnr_calibrated'] == pytest.approx(max(card['share_scores'].values()))
    reference = {'mean spectrum': MeanSpectrum().fit(train).predict, 'opt_v1': images,
                 'pretrained weights': unet_method(pretrained_unet())}[kind]
    assert card['share_scores']['0.0'] == pytest.approx(psnr(reference(val), val), abs=.01)
    assert psnr(unet_method(kept, images)(val), val) >= psnr(reference(val), val) - 1e-3  # never below its reference
    np.testing.assert_allclose(unet_method(kept, images)(test), spoilt(test), atol=1e-6)  # loading applies the share
    if kind == 'opt_v1':
        assert kept.share == 0
        np.testing.assert_allclose(unet_method(kept, images)(test), test['truth'], atol=1e-6)

def test_a_checkpoint_of_an_earlier_version_has_share_one(store, tmp_path):
    learnt = fit_unet(store, V1, 'U-Net from scratch', small(), tmp_path/'unet')
    model, _ = load_unet(tmp_path/'unet')
    state, card = load_checkpoint(tmp_path/'unet'/'unet.safetensors', 'unet')
    old = {k: v for k, v in state.items() if not k.startswith('reference.')}
    save_checkpoint(tmp_path/'old'/'unet.safetensors', old, 'unet', params=card['params'])
    again, _ = load_unet(tmp_path/'old')
    batch = tile_batch(store, 'test')
    s1 = torch.from_numpy(batch['s1'])
    assert (again.share, again.reference) == (1., None)
    whole = unet_method(again)(batch)
    reference = model.reference(s1, None, {k: batch[k] for k in ('month', 'biome', 'lat')}).numpy()
    np.testing.assert_allclose(learnt(batch), reference + model.share*(whole - reference), atol=1e-5)

def test_finetuning_has_a_rate_of_its_own(store, tmp_path):
    rate = lambda variant: json.loads((tmp_path/slug(variant)/'made.json').read_text())['settings']['lr']
    for variant in ('U-Net from scratch', 'U-Net pretrained'):
        fit_unet(store, V1, variant, small(steps=2, lr_pretrained=3e-5, width=16), tmp_path/slug(variant))
    assert (rate('U-Net from scratch'), rate('U-Net pretrained')) == (4e-3, 3e-5)

def test_a_recalibration_follows_its_biomes_and_validation_may_refuse_it(store):
    rng, n = np.random.default_rng(0), 40
    images = rng.uniform(.05, .3, (n, 4, 12, 12)).astype('float32')
    about = dict(month=rng.integers(1, 13, n), biome=np.repeat([4, 8], n//2), lat=np.full(n, 45.))
    warm = np.where(about['biome'] == 4, 1.3, .8)[:, None, None, None].astype('float32')
    batch = about | dict(truth=warm*images)
    error = lambda r: float(np.abs(r.apply(images, batch) - batch['truth']).mean())
    made = fit_recalibrations(images, batch, images, batch)
    assert error(made['Stage 1, recalibrated per biome']) < .2*error(made['Stage 1, recalibrated'])
    harmful = LossRecalibration(2).fit(images, batch, images, about | dict(truth=images))
    assert harmful.share == 0 and np.array_equal(harmful.apply(images, batch), images)
    stranger = about | dict(biome=np.full(n, 13))  # a biome without training tiles: the correction of all tiles
    np.testing.assert_allclose(LossRecalibration(3).fit(images, batch).correction(images, stranger)[0],
                               LossRecalibration(3).fit(images, batch).correction(images, stranger | dict(
                                   month=np.full(n, 1)))[0])

def test_a_recalibration_serves_every_tile_and_not_the_brightest():
    "Shift dark tiles and leave one bright tile with a large error: least squares follow the bright one."
    rng = np.random.default_rng(1)
    images = rng.uniform(.05, .15, (20, 4, 8, 8)).astype('float32')
    truth = images + .02
    images[0], truth[0] = .5, .9
    batch = dict(month=np.full(20, 7), biome=np.full(20, 4), truth=truth)
    made = fit_recalibrations(images, batch)
    dark = lambda name: float(np.square(made[name].apply(images, batch)[1:] - truth[1:]).mean())
    assert dark('Stage 1, recalibrated') < .1*dark('Stage 1, recalibrated by least squares')

def test_regressions_are_told_the_season_and_may_stay_at_the_mean(store):
    train, val = tile_batch(store), tile_batch(store, 'val')
    told = PixelRegression(pixels=3000).fit(train)
    other = val | dict(month=(val['month'] + 5) % 12 + 1)
    assert np.abs(told.predict(val) - told.predict(other)).max() > 1e-4
    flat = val | dict(truth=MeanSpectrum().fit(train).predict(val))
    still = PixelRegression(pixels=3000).fit(train, flat)
    assert still.share == 0
    np.testing.assert_allclose(still.predict(val), flat['truth'], atol=1e-6)

def test_intervals_hold_the_chance_of_trainings_and_need_five_scenes():
    rng = np.random.default_rng(2)
    tile, chance = rng.normal(25, 3, 60), rng.normal(0, .4, (5, 1))
    width = lambda a, b, **kw: np.subtract(*(training_gain(a, b, **kw)[k] for k in ('hi', 'lo')))
    assert width(tile + chance, np.stack([tile]*5)) > .2 > width((tile + chance)[:1], tile) + .15
    assert training_gain(tile + chance, tile)['trainings'] == 1
    scenes = np.repeat(np.arange(4), 15)
    assert np.isnan(training_gain(tile + 1, tile, scenes=scenes)['lo'])
    assert training_gain(tile + 1, tile, 'mae')['gain'] == pytest.approx(-1)  # lower is better
    # scenes are resampled for both sides together
    assert width(tile + .1, tile) < 1e-9 < width(tile + rng.normal(0, 1, 60), tile)

def test_the_rival_of_the_headline_is_chosen_on_validation_tiles():
    rows = [dict(pairs=32, variant=v, seed=s, output='opt_v3', id=f't{i}', scene=f's{i}', psnr=p + .1*i, val_psnr=q)
            for v, p, q in (('pretrained', 28., 28.), ('U-Net from scratch', 27., 26.), ('U-Net pretrained', 25., 27.))
            for s in (0, 1) for i in range(6)]
    told = pd.DataFrame(rows)
    assert best_unet(told, 32) == 'U-Net pretrained' and best_unet(told, 256) == ''
    row = headline_contrasts(told, (32, 256), 64).iloc[0]
    assert (row.rival, row.pairs, row.val_tiles, row.seeds, row.exploratory) == ('U-Net pretrained', 32, 64, 2, 'no')
    assert row.gain == pytest.approx(3)

def whole_correction(monkeypatch):
    "Use the whole output of every U-Net: after a few steps validation prefers the reference."
    swap(monkeypatch, 'gac.stages.unet_share', 'fit_share', partial(fit_share, shares=(1.,)))

def test_unet_sees_the_radar_and_opt_v1_only_where_it_is_told_to(store, tmp_path, monkeypatch):
    whole_correction(monkeypatch)
    batch = tile_batch(store, 'test')
    made = {k: fit_unet(store, V1, k, small(steps=4), tmp_path/slug(k))
            for k in ('U-Net from scratch', 'U-Net with opt_v1')}
    plain, fed = made.values()
    lie = batch | dict(truth=batch['truth']*.1)  # V1 follows it
    np.testing.assert_array_equal(plain(batch), plain(lie))
    assert np.abs(fed(batch) - fed(lie)).max() > .01
    for f in made.values(): assert np.abs(f(batch) - f(batch | dict(s1=batch['s1'][:, ::-1].copy()))).max() > 1e-4

def opened(**kw):
    "Return a U-Net whose last layers are not zero, as after some training."
    model = build_unet(width=8, **kw)
    with seeded(3), torch.no_grad():
        for layer in (*model.films, model.out):
            for p in layer.parameters(): torch.nn.init.normal_(p, std=.1)
    return model.eval()

def test_unet_uses_metadata_as_told():
    s1 = torch.randn(3, 2, 32, 32)
    full, month, none = (opened(metadata=m) for m in (('month', 'biome'), ('month',), ()))
    moves = lambda m, **kw: float((m(s1, metadata=kw) - m(s1)).detach().abs().max())
    assert moves(full, month=7) > 1e-4 and moves(full, biome=4) > 1e-4
    assert moves(month, month=7) > 1e-4 and moves(month, biome=4) == 0
    assert moves(none, month=7, biome=4) == 0
    torch.testing.assert_close(full(s1, metadata=dict(month=2, lat=-20.)), full(s1, metadata=dict(month=8)))
    assert not torch.equal(full(s1, metadata=dict(month=2, lat=20.)), full(s1, metadata=dict(month=8)))
    each = full(s1, metadata=dict(month=[1, 6, 9]))
    torch.testing.assert_close(each[1:2], full(s1[1:2], metadata=dict(month=6)))
    with pytest.raises(GacError, match='weather'): full(s1, metadata=dict(weather=1))
    full.train().condition.drop = 1.  # everything is hidden in training
    with seeded(0): a = full(s1, metadata=dict(month=7))
    with seeded(0): b = full(s1)
    torch.testing.assert_close(a, b)

@pytest.mark.parametrize('size', [(48, 48), (120, 120), (33, 50)])
def test_any_size_comes_back_as_it_went_in(size):
    assert opened()(torch.randn(1, 2, *size)).shape == (1, 4, *size)

def test_parameters_match_the_chain():
    chain = [build_prithvi_refiner(depth=0), build_stage3_model()]
    model = build_unet()
    own, theirs = (sum(p.numel() for m in models for p in m.parameters() if p.requires_grad)
                   for models in ([model], chain))
    assert matched(model, chain) == own/theirs and abs(own/theirs - 1) <= SIZE_TOLERANCE
    fed = build_unet(seen=('s1', 'opt_v1'))  # the same network but for the layers that read the image
    more = {k: v.numel() - dict(model.named_parameters())[k].numel() for k, v in fed.named_parameters()}
    assert {k for k, n in more.items() if n} == {'encoder.model.conv1.weight', 'fine.weight'}
    for width in (8, 24):
        with pytest.raises(GacError, match='Change its width'): matched(build_unet(width=width), chain)
    for trial in draw_trials(200):
        matched(build_unet(width=trial['width']), chain, SIZE_TOLERANCE)

def test_resumed_training_equals_an_unbroken_one(store, tmp_path, monkeypatch):
    whole_correction(monkeypatch)
    recipe = small(steps=6, val_every=2)
    whole = fit_unet(store, V1, 'U-Net from scratch', recipe, tmp_path/'whole')
    step, calls = unet_step, []
    def fragile(loss):
        inner = step(loss)
        def stop(model, batch):
            if model.training: calls.append(1)
            if len(calls) == 5: raise KeyboardInterrupt
            return inner(model, batch)
        return stop
    swap(monkeypatch, 'gac.stages.unet', 'unet_step', fragile)
    with pytest.raises((KeyboardInterrupt, SystemExit, GacError)):
        fit_unet(store, V1, 'U-Net from scratch', recipe, tmp_path/'broken')
    swap(monkeypatch, 'gac.stages.unet', 'unet_step', step)
    assert (tmp_path/'broken'/'last.ckpt').exists()
    batch = tile_batch(store, 'test')
    np.testing.assert_array_equal(fit_unet(store, V1, 'U-Net from scratch', recipe, tmp_path/'broken')(batch),
                                  whole(batch))
    before = (tmp_path/'whole'/'last.ckpt').stat().st_mtime_ns
    fit_unet(store, V1, 'U-Net from scratch', recipe, tmp_path/'whole')
    assert (tmp_path/'whole'/'last.ckpt').stat().st_mtime_ns == before  # loaded, not trained
    other = fit_unet(store, V1, 'U-Net from scratch', recipe, tmp_path/'whole', seed=1)
    assert np.abs(other(batch) - whole(batch)).max() > 1e-5  # another training replaces it

def test_pretraining_is_exported_and_fits_the_default_unet(tmp_path):
    plan = PretrainPlan('unet', steps=2, batch=2, lr=1e-3, warmup=1, first_seed=PRETRAIN_BASE, workers=0)
    card = pretrain_all([plan], tmp_path/'out', dest=tmp_path/'weights')[0]
    file = tmp_path/'weights'/f'{PRETRAINED}.safetensors'
    assert json.loads(file.with_suffix('.json').read_text()) == json.loads(json.dumps(card))
    assert (card['scenes_seen'], card['steps_done'], card['seeds'][1] - card['seeds'][0]) == (4, 2, 3)
    tuned, first = build_unet(5, str(file)), load_stage(tmp_path/'out', 'unet')
    for k, v in first.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[k].float(), v.float(), rtol=2e-3, atol=1e-3)
    with pytest.raises(GacError, match='does not fit'): build_unet(weights=str(file), width=8)
    with pytest.raises(GacError, match='missing'): build_unet(weights=str(tmp_path/'no.safetensors'))

def test_committed_weights_fit_the_default_unet_and_say_what_they_saw():
    model = build_unet(weights='mini')
    file = weights_file('mini')
    card = json.loads(file.with_suffix('.json').read_text())
    core = json.loads((file.parent/'terramind_mini.json').read_text())
    assert file.stat().st_size < 2e6 and card['scenes_seen'] == card['steps_done']*card['plan']['batch']
    assert card['scenes_seen'] == core['scenes_seen'] + 4760  # the first round of the core, which its card tells
    assert '4760 scenes' in core['history']
    assert card['parameters'] == sum(v.numel() for v in model.state_dict().values())
    np.testing.assert_allclose(model.mean.flatten(), world_stats()[0], rtol=2e-3)

def test_search_ranks_trials_and_goes_on_where_it_stopped(store, tmp_path, monkeypatch):
    trials, fit, done = draw_trials(3, space=dict(lr=(1e-4, 1e-3, 4e-3), width=(8,))), fit_unet, []
    def counted(*a, **kw):
        done.append(1)
        if len(done) == 2: raise KeyboardInterrupt
        return fit(*a, **kw)
    swap(monkeypatch, 'gac.stages.unet', 'fit_unet', counted)
    with pytest.raises(KeyboardInterrupt): search_unet(store, brief_unet(4), trials, tmp_path)
    table = search_unet(store, brief_unet(4), trials, tmp_path)
    assert len(done) == 4 and len(table) == 3 and table.val_psnr.is_monotonic_decreasing  # the interrupted one twice
    pd.testing.assert_frame_equal(table, search_unet(store, brief_unet(4), trials, tmp_path))
    assert len(done) == 4 and set(table.lr) == {1e-4, 1e-3, 4e-3}

def test_trials_are_different_and_seeded():
    trials = draw_trials(60, 1)
    assert (len({json.dumps(t, default=float) for t in trials}) == 60
            and trials == draw_trials(60, 1) != draw_trials(60, 2))
    recipe = with_trial(brief_unet(), dict(lr=.5, width=12, dropout=.3, weight_decay=.2, augment='none'))
    assert recipe == brief_unet(lr=.5, weight_decay=.2, width=12, dropout=.3, augment='none')

def test_equal_computing_is_counted_from_the_line_of_costs():
    assert (equal_compute_unet_steps({'a': (10., 1.), 'b': (0., 2.), 'U-Net': (5., .5)}, {'a': 40, 'b': 20}) == (
                10 + 40 + 40 - 5)/.5)
    ticks, run = iter([0., 12, 20, 52]), []  # 12 s for 5 steps, 32 s for 25
    assert training_cost(run.append, (5, 25), lambda: next(ticks)) == (7., 1.) and run == [5, 5, 25]  # once to warm up

@pytest.fixture(scope='module')
def chain(tmp_path_factory, brief_chain):
    "Return a run whose stages and U-Nets were briefly trained."
    run, own = brief_chain(tmp_path_factory.mktemp('chain'), '11_evaluate')
    recipe = brief_recipe(4)
    fit_unet(own, stored_method(own), 'U-Net from scratch', recipe.unet, run.dir/'unets'/'unet_from_scratch')
    write_file(run.dir/'unets'/'recipe.json', json.dumps(asdict(recipe.unet)))
    return run, own

def test_learning_curve_holds_the_unets_and_takes_what_the_run_has(chain, monkeypatch):
    run, own = chain
    recipe, fitted = recipe_of(run), []
    assert recipe.unet == brief_recipe(4).unet
    real = fit_unet
    swap(monkeypatch, 'gac.stages.unet', 'fit_unet',
         lambda *a, **kw: fitted.append((a[2], a[3].pairs, a[5])) or real(*a, **kw))
    ask = dict(pairs=[2, 4], seeds=[0, 1], variants=('pretrained', 'U-Net from scratch'), batch_size=4)
    told = learning_curve(run, own, own.rows('test'), recipe, **ask)
    # 4 pairs and seed 0 are those of the run
    assert fitted == [('U-Net from scratch', 2, 0), ('U-Net from scratch', 2, 1), ('U-Net from scratch', 4, 1)]
    net = told[(told.variant == 'U-Net from scratch') & (told.pairs == 4) & (told.seed == 0)].set_index('id').psnr
    batch = tile_batch(own, 'test')
    direct = metrics.psnr(unet_method(load_unet(run.dir/'unets'/'unet_from_scratch')[0])(batch), batch['truth'])
    np.testing.assert_allclose(net.loc[batch['id']], direct, atol=1e-4)
    with pytest.raises(GacError, match='99 pairs: tiles has 6 training tiles'):
        learning_curve(run, own, own.rows('test'), recipe, pairs=[99])
    gain = learning_curve_gains(told)
    assert set(gain.step) == {'U-Net from scratch → pretrained'} and set(gain.output) == {'opt_v3'}
    assert set(gain.pairs) == {2, 4}

def test_first_table_says_who_wins(chain):
    run, own = chain
    stages, rows = stage_methods(run, own, own.rows('test'))
    nets = unet_methods(run, stages['Stage 1'])
    assert list(nets) == ['U-Net from scratch'] and unet_methods(run, stages['Stage 1'], 'S1RTC') == {}
    for factor, word in ((.9, 'loses to'), (.2, 'beats')):
        fake = stages | {'U-Net from scratch': lambda b: b['truth']*factor, 'Stage 1+2+3': lambda b: b['truth']*.5}
        table, said = compare_with_unets(measure_methods(own, rows, fake), 'world')
        assert word in said and table.step.eq('U-Net from scratch → Stage 1+2+3').all(), said
    assert pairs_of(run, [*stages, *nets])['U-Net from scratch'] == 4

@pytest.mark.slow
@pytest.mark.parametrize('profile', ['mini', 'paper', 'lowvr', 'full'])
def test_unets_of_the_profiles_train_as_much_as_the_chain(profile):
    p = read_yaml(root()/'nbs'/'params'/f'{profile}.yaml')
    said = lambda room, keys: {k: p[room][k] for k in keys if k in p[room]}
    two = forecast_memory(p['08_stage2'].get('backbone', 'prithvi_mini'), p['08_stage2'].get('lora_rank', 8),
                          p['08_stage2'].get('lora_reach', 'attention'), width=48,
                          depth=p['08_stage2'].get('depth', 3))['trainable']
    three = build_stage3_model(pretrained=False,
                               **{'name': 'terramind_mini_generate'} | said('09_stage3', ['name', 'depth', 'lora_r']))
    own = weigh_memory(build_unet(**said('10_baselines', ['width'])))['trainable']
    assert own == pytest.approx(two + weigh_memory(three)['trainable'], rel=SIZE_TOLERANCE)
