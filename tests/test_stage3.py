"Check Stage 3: places of adapters, training of each route, resumed trainings, files in and out, refused input."
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from swapping import swap

from gac.core.config import Stage3Config
from gac.core.files import GacError
from gac.core.vocabulary import OPT_BANDS
from gac.data.arrays import to_dn
from gac.data.store import Store
from gac.data.stores import from_world
from gac.measure.tables import load_tiles, stored_method
from gac.stages.commands import run_stage3
from gac.stages.datasets import Triples, remember
from gac.stages.grounding import build_stage3_model
from gac.stages.inference import grounding_report, infer_files, precompute_stage3, stage3_inference
from gac.stages.losses import validation_scores
from gac.stages.stage2_checkpoint import REFINER_FILE
from gac.stages.stage3 import GroundingTraining, stage3_step, train_stage3
from gac.stages.stage3_checkpoint import load_stage3, save_stage3
from gac.stages.stage3_parts import keep_constants
from gac.training.checkpoints import save_checkpoint
from gac.training.settings import Settings

SMALL = dict(width=16, depth=1, taps=2, lora_r=2)
QUICK = Settings(lr=5e-3, max_steps=4, batch_size=2, grad_accum_steps=1, val_every=2, save_every=2,
                 early_stopping=False, log_every=1, warmup=0.)

def blurred(batch) -> np.ndarray: # (n, 4, H, W)
    "Return the blurred truth in place of opt_v2."
    return torch.nn.functional.avg_pool2d(torch.from_numpy(batch['truth']).float(), 5, 1, 2,
                                          count_include_pad=False).numpy()

@pytest.fixture(scope='session')
def original(tmp_path_factory) -> Path:
    "12 small tiles in shards of 4, with an opt_v2."
    store = from_world(tmp_path_factory.mktemp('stage3')/'tiles', 8, 2, 2, size=48, shard=4)
    store.ensure_array('opt_v2', (4, 48, 48), 'int16', dict(made='by blurring the truth'))
    store.write('opt_v2', range(12), to_dn(blurred(load_tiles(store, range(12)))))
    store.close()
    return store.path

@pytest.fixture
def store(original, tmp_path): return Store(shutil.copytree(original, tmp_path/'tiles'))

def sets(store, lies=0.):
    "Training and validation tiles."
    images = stored_method(store, 'opt_v2')
    return Triples(store, store.rows('train'), images, lies), Triples(store, store.rows('val'), images)

def weights_of(model) -> dict: return {k: v.clone() for k, v in model.state_dict().items()}

@pytest.mark.parametrize('route, options', [('features', {}), ('tokens', {}), ('soft', dict(codes='rounded'))])
def test_every_route_changes_adapters_and_head_and_nothing_else(store, tmp_path, route, options):
    model = build_stage3_model(1, route=route, **SMALL, **options)
    before = weights_of(model)
    fit = train_stage3(model, *sets(store), QUICK, tmp_path/'out', how=GroundingTraining(crop=24, strength=False),
                       every=0)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith('head.') or ('cross_attn' in k and 'lora_' in k) for k in changed), changed
    assert any('lora_' in k for k in changed) and any(k.startswith('head.') for k in changed) == (route == 'features')
    assert fit.steps == 4 and {'val_psnr', 'val_psnr_v2', 'val_sar_edge_gap', 'val_monitor'} <= set(fit.curve)
    again = load_stage3(tmp_path/'out')
    for k, v in model.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k

@pytest.mark.parametrize('route, what', [('tokens', 'tokens'), ('features', 'features')])
def test_what_is_kept_with_the_tiles_is_of_the_model_that_trains(store, tmp_path, route, what):
    "A comparison trains one model after the other on the same tiles."
    some, other = (build_stage3_model(1, route=route, seed=1, pretrained=p, **SMALL) for p in (True, False))
    train, val = sets(store)
    for k, model in enumerate((other, some)):
        train_stage3(model, train, val, QUICK, tmp_path/str(k), how=GroundingTraining(1., 24, strength=False), every=0)
    own, _ = sets(store)
    assert torch.equal(train.more[what], remember(own, some, what).more[what])
    assert not torch.equal(train.more[what], remember(own, other, what).more[what])

@pytest.mark.parametrize('reach, parts', [('cross', {'decoder.cross_attn'}),
                                          ('attention', {'decoder.cross_attn', 'decoder.self_attn', 'encoder.attn'}),
    ('linear', {'decoder.cross_attn', 'decoder.self_attn', 'decoder.mlp', 'encoder.attn', 'encoder.mlp'})])
def test_reach(reach, parts):
    model = build_stage3_model(reach=reach, **SMALL)
    free = [n.split('.') for n, p in model.generator.named_parameters() if p.requires_grad]
    assert all(n[:3] == ['core', 'sampler', 'model'] and n[-3] in ('lora_A', 'lora_B') for n in free)
    assert {f'{n[3]}.{n[5]}' for n in free} == parts

def test_untrained_returns_its_input_and_control_does_not_see(store):
    train, _ = sets(store)
    s1, v2 = (train[0][k][None] for k in ('s1', 'opt_v2'))
    for see in (True, False):
        model = build_stage3_model(see=see, **SMALL)
        with torch.no_grad(): assert torch.equal(model(s1, v2, timesteps=8), v2)
        assert bool(model.features(s1, v2).abs().sum()) == see
    seeing, blind = (build_stage3_model(see=see, **SMALL) for see in (True, False))
    # one start
    for (k, a), (_, b) in zip(seeing.head.state_dict().items(), blind.head.state_dict().items()):
        assert torch.equal(a, b), k

def test_bands_are_given_by_name(store):
    "A model that is shown red as blue must read something else."
    train, _ = sets(store)
    s1, v2 = (train[0][k][None] for k in ('s1', 'opt_v2'))
    model = build_stage3_model(**SMALL)
    with torch.no_grad(): assert (model.features(s1, v2) - model.features(s1, v2.flip(1))).abs().max() > 1e-2
    read, _ = model.generator._read(model.inputs(s1, v2), None, 'S2L2A')
    optical = model.generator.inputs['S2L2A']
    placed = model.generator.units.outward(read[optical], optical, OPT_BANDS)
    assert torch.allclose(placed, v2, atol=1e-5)

def test_best_checkpoint_never_trades_psnr(store):
    train, _ = sets(store)
    batch = {k: torch.stack([train[i][k] for i in range(4)]) for k in ('s1', 'opt_v2', 'truth')}
    good = validation_scores(batch['truth'], batch['truth'], batch['opt_v2'], batch['s1'])
    # its edges are fine, its brightness is not
    bad = validation_scores(batch['truth'] + .2, batch['truth'], batch['opt_v2'], batch['s1'])
    same = validation_scores(batch['opt_v2'], batch['truth'], batch['opt_v2'], batch['s1'])
    assert good['monitor'] < same['monitor'] < bad['monitor']
    assert same['monitor'] == same['sar_edge_gap'] == same['monitor_v2'] and bad['monitor'] > 1

def test_a_harmful_training_leaves_the_image_as_it_is(store, tmp_path, capsys):
    model = build_stage3_model(**SMALL)
    train, val = sets(store)
    harmful = replace(QUICK, lr=3., max_steps=2)
    train_stage3(model, train, val, harmful, tmp_path/'out', how=GroundingTraining(1., 24), every=0)
    assert ('stays as it is' in capsys.readouterr().out
            and json.loads((tmp_path/'out'/'grounding.json').read_text())['strength'] == 0)
    s1, v2 = (train[0][k][None] for k in ('s1', 'opt_v2'))
    with torch.no_grad(): assert torch.equal(load_stage3(tmp_path/'out')(s1, v2), v2)

def test_interrupted_training_gives_the_same_curve(store, tmp_path):
    def trained(out, stop=None):
        model = build_stage3_model(**SMALL)
        original_step = stage3_step
        def fragile(*args, **kw):
            step, seen = original_step(*args, **kw), []
            def f(m, b):
                if m.training:
                    seen.append(1)
                    if stop and len(seen) > stop: raise KeyboardInterrupt
                return step(m, b)
            return f
        sys.modules['gac.stages.stage3'].stage3_step = fragile
        try:
            return train_stage3(model, *sets(store, .5), replace(QUICK, max_steps=8), out,
                                how=GroundingTraining(.5, 24, strength=False), every=0), model
        finally: sys.modules['gac.stages.stage3'].stage3_step = original_step
    whole, a = trained(tmp_path/'whole')
    with pytest.raises(BaseException): trained(tmp_path/'broken', stop=3)  # in the first part
    with pytest.raises(BaseException): trained(tmp_path/'broken', stop=5)
    resumed, b = trained(tmp_path/'broken')
    for k in ('train_loss', 'val_psnr'): np.testing.assert_allclose(resumed.curve[k], whole.curve[k], rtol=1e-5)
    for k, v in a.state_dict().items(): torch.testing.assert_close(v, b.state_dict()[k])
    with pytest.raises(GacError, match='crop was 24, now 36'):
        train_stage3(b, *sets(store, .5), replace(QUICK, max_steps=8), tmp_path/'whole',
                     how=GroundingTraining(.5, 36, strength=False))

def test_features_are_kept_for_the_next_training_that_sees_the_same(store):
    train, _ = sets(store)
    made = lambda **kw: build_stage3_model(width=8, depth=0, **kw)
    first = made()
    keep_constants(train, first, 'head')
    kept = train.more['features']
    keep_constants(train, made(lora_r=0), 'head')  # adapters that have not moved change nothing
    assert train.more['features'] is kept
    keep_constants(train, made(pretrained=False), 'head')
    assert not torch.equal(train.more['features'], kept)
    keep_constants(train, first, 'head')
    assert torch.equal(train.more['features'], kept)
    with torch.no_grad():
        for k, v in first.named_parameters():
            if 'lora_B' in k: v.normal_(std=.1)
    keep_constants(train, first, 'head')
    assert not torch.equal(train.more['features'], kept)
    keep_constants(train, first, 'adapters')
    assert 'features' not in train.more

def test_lies_are_the_tiles_own(store):
    train, val = sets(store, 1.)
    for i in range(3):
        a, b = train[i]['opt_v2'], train[i]['opt_v2']
        assert torch.equal(a, b) and not torch.equal(a, train.tile(i)['opt_v2'])
        assert torch.equal(train[i]['truth'], train.tile(i)['truth'])
    assert torch.equal(val[0]['opt_v2'], val.tile(0)['opt_v2'])
    other = Triples(store, store.rows('train'), train.images, 1., seed=1)
    assert any(not torch.equal(train[i]['opt_v2'], other[i]['opt_v2']) for i in range(8))

def test_precompute_resumes_and_leaves_the_same_values(store, tmp_path, monkeypatch):
    model = build_stage3_model(**SMALL)
    with torch.no_grad(): model.head.out.weight.normal_(std=.05)
    whole = Store(shutil.copytree(store.path, tmp_path/'whole'))
    assert precompute_stage3(whole, model, batch_size=2)['processed'] == 12
    calls, real = [], stage3_inference
    def fragile(*args, **kw):
        calls.append(1)
        if len(calls) > 3: raise KeyboardInterrupt
        return real(*args, **kw)
    swap(monkeypatch, 'gac.stages.inference', 'stage3_inference', fragile)
    with pytest.raises(KeyboardInterrupt): precompute_stage3(store, model, batch_size=2)
    swap(monkeypatch, 'gac.stages.inference', 'stage3_inference', real)
    report = precompute_stage3(Store(store.path), model, batch_size=2)
    assert (report['processed'], report['skipped'], report['errors']) == (6, 6, 0)
    np.testing.assert_array_equal(Store(store.path).read('opt_v3', slice(None)), whole.read('opt_v3', slice(None)))
    two = Store(shutil.copytree(store.path, tmp_path/'two'))
    two.drop('opt_v3')
    reports = [precompute_stage3(Store(two.path), model, batch_size=2, rank=r, world_size=2) for r in (1, 0)]
    assert sum(r['processed'] for r in reports) == 12 and 0 < reports[0]['processed'] < 12
    np.testing.assert_array_equal(Store(two.path).read('opt_v3', slice(None)), whole.read('opt_v3', slice(None)))
    with torch.no_grad(): model.head.out.weight.normal_(std=.05)
    with pytest.raises(GacError, match='trained'): precompute_stage3(whole, model)  # another model does not mix in
    assert precompute_stage3(whole, model, overwrite=True)['processed'] == 12

def test_files_and_refusals(store, tmp_path):
    model = build_stage3_model(**SMALL)
    save_stage3(model, tmp_path/'ckpt', stage2=dict(backbone='prithvi_mini', bands=list(OPT_BANDS)))
    card = json.loads((tmp_path/'ckpt'/'grounding.json').read_text())
    kinds = card['kind'], card['backbone'], card['stage2']['backbone']
    assert kinds == ('stage3', 'terramind_mini_generate', 'prithvi_mini')
    assert (tmp_path/'ckpt'/'adapter_model.safetensors').exists()
    for backbone, bands, said in (('prithvi_eo_v2_600_tl', OPT_BANDS, 'backbone'),
                                  ('prithvi_mini', ('B02', 'B03', 'B04', 'B8A'), 'bands')):
        save_checkpoint(tmp_path/said/REFINER_FILE, {'x': torch.zeros(1)}, 'stage2', backbone, bands)
        with pytest.raises(GacError, match=f'{said} is'): load_stage3(tmp_path/'ckpt', tmp_path/said)
    train, _ = sets(store)
    s1, v2 = (torch.stack([train[i][k] for i in range(2)]) for k in ('s1', 'opt_v2'))
    np.savez(tmp_path/'in.npz', s1_vv=s1[:, 0], s1_vh=s1[:, 1], opt_v2=v2, s2_real=v2)
    report = infer_files(tmp_path/'in.npz', tmp_path/'out.npz', tmp_path/'ckpt', timesteps=8)
    with np.load(tmp_path/'out.npz', allow_pickle=False) as z:
        assert (sorted(z.files) == ['opt_v3', 's1_vh', 's1_vv'] and np.array_equal(z['opt_v3'], v2.numpy())
                and np.array_equal(z['s1_vv'], s1[:, 0].numpy()))
    assert report['tiles'] == 2 and report['mse_v3'] == 0
    torch.save(dict(s1=s1), tmp_path/'s1.pt')
    torch.save(v2[:, :3], tmp_path/'three.pt')
    (tmp_path/'cut.pt').write_bytes(b'PK')
    with pytest.raises(GacError, match='expected \\(tiles, 4'):
        infer_files(tmp_path/'s1.pt', tmp_path/'o.pt', tmp_path/'ckpt', tmp_path/'three.pt')
    with pytest.raises(GacError, match='no readable Torch file'):
        infer_files(tmp_path/'cut.pt', tmp_path/'o.pt', tmp_path/'ckpt')
    with pytest.raises(GacError, match='missing'): infer_files(tmp_path/'none.npz', tmp_path/'o.pt', tmp_path/'ckpt')
    assert 'cross' in grounding_report(tmp_path/'ckpt')

def test_command_line_bodies(store, tmp_path):
    with pytest.raises(GacError, match='no opt_v2'):
        bare = from_world(tmp_path/'bare', 1, 1, 1, size=48)
        run_stage3(bare.path, tmp_path/'x')
    few = Stage3Config(steps=2, batch_size=2, val_every=2, crop=24, lora_rank=2)
    report = run_stage3(store.path, tmp_path/'out', few, save_visualizations=True)
    assert (report['steps'] == 2 and np.isfinite(report['metrics']['val_psnr'])
            and (tmp_path/'out'/'panels.png').exists())
    assert run_stage3(store.path, tmp_path/'out', few)['resumed_at'] > 0  # nothing left to do
