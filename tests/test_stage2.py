"""Check Stage 2: killed trainings and precomputations, checkpoints of other models, other Prithvi backbones,
and the data that the refiner may learn from."""
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from swapping import swap
from torch import nn

from gac.core.config import Stage2Config
from gac.core.files import GacError, root
from gac.core.vocabulary import OPT_BANDS, REFLECTANCE
from gac.data.arrays import to_dn, to_reflectance
from gac.data.store import Store
from gac.data.stores import from_world
from gac.measure.metrics import psnr
from gac.measure.tables import load_tiles
from gac.models.mini import MINI_STATS
from gac.stages.commands import run_stage2
from gac.stages.conditions import CONDITIONED
from gac.stages.datasets import Pairs
from gac.stages.losses import Stage2Loss
from gac.stages.refiner import PrithviRefiner, build_prithvi_refiner
from gac.stages.stage2 import STAGE2_SETTINGS, train_stage2
from gac.stages.stage2_checkpoint import REFINER_FILE, fingerprint_stage2, load_stage2, read_stage2
from gac.stages.stage2_inference import precompute_stage2, refine
from gac.stages.tileset import Workload, derived_store, run_tileset
from gac.training.adapters import merge_lora
from gac.training.checkpoints import load_checkpoint, trained_state

SMALL = dict(width=16, depth=1)
QUICK = replace(STAGE2_SETTINGS, lr=3e-3, max_steps=8, batch_size=2, grad_accum_steps=2, val_every=2, save_every=2,
                log_every=1, warmup=2., accelerator='cpu')

def dim(batch): return batch['truth']*np.float32(.8) + np.float32(.02)  # a Stage 1 that is easy to correct

@pytest.fixture(scope='session')
def original(tmp_path_factory) -> Path:
    "12 small tiles in shards of 4, with opt_v1."
    store = from_world(tmp_path_factory.mktemp('stage2')/'tiles', 8, 2, 2, size=40, shard=4)
    store.ensure_array('opt_v1', (4, 40, 40), 'int16', dict(made='dim'))
    with store: store.write('opt_v1', list(range(12)), to_dn(dim(load_tiles(store, range(12)))))
    return store.path

@pytest.fixture
def copy(original, tmp_path):
    "Fresh copies of the tiles, by name."
    return lambda name: Store(shutil.copytree(original, tmp_path/name))

@pytest.fixture(scope='session')
def pairs(original):
    "Training and validation pairs."
    store = Store(original)
    return tuple(Pairs(store, store.rows(s), dim, crop, flips)
                 for s, crop, flips in (('train', 32, 'all'), ('val', 0, 'none')))

@pytest.fixture(scope='session')
def trained(pairs, tmp_path_factory):
    "Return a training that was not interrupted, and its folder."
    folder = tmp_path_factory.mktemp('trained')/'stage2'
    return train_stage2(build_prithvi_refiner(**SMALL), *pairs, QUICK, folder, every=0), folder

def in_child(work) -> int: # exit code; negative: the signal
    "Run something in a process that may be killed."
    pid = os.fork()
    if pid == 0:
        try: work()
        finally: os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

class Deadly(Stage2Loss):
    "Kills its process when it has been asked so many times."
    left = 0
    def forward(self, pred, truth):
        self.left -= 1
        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(pred, truth)

def test_killed_training_resumes_with_the_same_curve(pairs, trained, tmp_path):
    whole, folder = trained
    def work():
        loss = Deadly()
        loss.left = 17  # a round is 4 batches and one validation: this is in the middle of the fourth
        train_stage2(build_prithvi_refiner(**SMALL), *pairs, QUICK, tmp_path/'run', loss, every=0)
    assert in_child(work) == -signal.SIGKILL
    refiner = build_prithvi_refiner(**SMALL)
    fit = train_stage2(refiner, *pairs, QUICK, tmp_path/'run', every=0)
    assert 0 < fit.resumed_at < fit.steps == 8
    columns = [c for c in whole.curve if c != 'gpu_memory_mb']
    np.testing.assert_array_equal(fit.curve[columns], whole.curve[columns])
    unbroken = load_stage2(folder)
    for k, v in trained_state(unbroken).items():
        torch.testing.assert_close(trained_state(refiner)[k], v, rtol=0, atol=0)

def test_dropout_and_hidden_metadata_are_at_work_while_training(pairs, tmp_path):
    seen = []
    class Watch(Stage2Loss):
        def forward(self, pred, truth):
            seen.append(refiner.training)
            return super().forward(pred, truth)
    refiner = build_prithvi_refiner(**SMALL)
    train_stage2(refiner, *pairs, replace(QUICK, max_steps=2), tmp_path/'run', Watch(), every=0)
    assert seen == [True]*4 + [False] and not refiner.training  # four batches, one validation batch

def test_the_best_step_is_exported_not_the_last(pairs, tmp_path):
    # the worst is wanted
    fit = train_stage2(build_prithvi_refiner(**SMALL), *pairs, replace(QUICK, mode='min'), tmp_path/'run', every=0)
    values = fit.curve.val_psnr.dropna()
    card = read_stage2(tmp_path/'run')[1]
    assert values.idxmin() != values.index[-1]
    assert (card['metrics']['val_psnr'] == pytest.approx(values.min())
            and card['steps'] == fit.curve.step[values.idxmin()])
    refiner = load_stage2(tmp_path/'run')
    made = [psnr(torch.from_numpy(refine(refiner, t['opt_v1'][None], {k: t[k] for k in CONDITIONED if k in t})),
                         t['truth'][None])[0]
            for t in map(pairs[1].tile, range(2))]
    assert float(np.mean(made)) == pytest.approx(card['metrics']['val_psnr_calibrated'], abs=1e-3)
    assert card['metrics']['val_psnr_calibrated'] >= values.min()

def test_killed_precomputation_leaves_the_same_bytes(copy, trained):
    refiner, whole, broken = load_stage2(trained[1]), copy('whole'), copy('broken')
    precompute_stage2(whole, refiner, batch_size=2)
    def work():
        asked, forward = [], refiner.forward
        def die(*args):
            asked.append(1)
            if len(asked) == 4: os.kill(os.getpid(), signal.SIGKILL)
            return forward(*args)
        refiner.forward = die
        precompute_stage2(broken, refiner, batch_size=2)
    assert in_child(work) == -signal.SIGKILL
    broken = Store(broken.path)
    assert 0 < len(broken.pending('opt_v2')) < 12
    report = precompute_stage2(broken, refiner, batch_size=2)
    assert report['skipped'] == 4 and report['processed'] == 8 and report['errors'] == 0  # a shard of 4 was full
    files = [{p.relative_to(s.path): p.read_bytes() for p in (s.path/'arrays'/'opt_v2').rglob('*') if p.is_file()}
             for s in (whole, broken)]
    assert files[0] == files[1]

def test_ranks_and_batch_sizes_agree(copy, trained):
    refiner, one, two = load_stage2(trained[1]), copy('one'), copy('two')
    precompute_stage2(one, refiner, batch_size=4)
    for rank in (1, 0): precompute_stage2(Store(two.path), refiner, batch_size=3, rank=rank, world_size=2)
    values = [Store(s.path).read('opt_v2', slice(None)).astype(int) for s in (one, two)]
    three = copy('three')
    reports = [precompute_stage2(Store(three.path), refiner, batch_size=4, rank=r, world_size=2) for r in (1, 0)]
    assert [r['processed'] for r in reports] == [4, 8]  # whole shards are dealt out
    assert (Store(three.path).read('opt_v2', slice(None)) == values[0]).all()
    assert np.abs(values[0] - values[1]).max() <= 1 and np.abs(values[0] - one.read('opt_v1', slice(None))).max() > 5

def test_half_precision_is_told_by_the_array_and_changes_it_by_its_rounding(copy, trained):
    refiner, exact, half = load_stage2(trained[1]), copy('exact'), copy('half')
    precompute_stage2(exact, refiner, batch_size=4)
    precompute_stage2(half, refiner, batch_size=4, precision='bf16-mixed')
    a, b = (s.read('opt_v2', slice(None)).astype(int) for s in (exact, half))
    assert 0 < np.abs(a - b).max() < 100 and np.abs(a - b).mean() < 5
    assert [s.arrays['opt_v2'].attrs['precision'] for s in (exact, half)] == ['32-true', 'bf16-mixed']
    with pytest.raises(GacError, match='opt_v2 was made with other settings'): precompute_stage2(half, refiner)
    with pytest.raises(GacError, match='32-true, bf16-mixed, 16-mixed'):
        precompute_stage2(exact, refiner, overwrite=True, precision='16-true')

# the kernels a model may use are a switch of the whole process: one thread
@pytest.mark.parametrize('ahead, threads', [(2, 1), (3, 1)])
def test_batches_begun_ahead_leave_the_same_bytes(copy, trained, ahead, threads):
    "On a GPU the next batch is read and computed while the last one is written."
    refiner, plain, hurried = load_stage2(trained[1]), copy('plain'), copy('hurried')
    def fill(store, **how):
        v1 = lambda rows: (to_reflectance(store.read('opt_v1', rows)), np.asarray(rows), {})
        return run_tileset(store, 'opt_v2', (4, 40, 40), {}, v1, lambda x, rows: refine(refiner, x, batch_size=2),
                    Workload(2, **how), source='opt_v1')
    fill(plain), fill(hurried, ahead=ahead, threads=threads)
    files = [{p.relative_to(s.path): p.read_bytes() for p in (s.path/'arrays'/'opt_v2').rglob('*') if p.is_file()}
             for s in (plain, hurried)]
    assert files[0] == files[1] and len(files[0]) > 1

def test_opt_v2_depends_on_what_was_trained(copy, trained):
    store = copy('tiles')
    precompute_stage2(store, load_stage2(trained[1]))
    with pytest.raises(GacError, match='opt_v2 was made with other settings'):
        precompute_stage2(store, build_prithvi_refiner(**SMALL))
    assert precompute_stage2(store, build_prithvi_refiner(**SMALL), overwrite=True)['processed'] == 12
    # untrained: nothing is changed
    np.testing.assert_array_equal(store.read('opt_v2', slice(None)), store.read('opt_v1', slice(None)))
    for k in ('opt_v1', 'opt_v2'): store.drop(k)
    store.ensure_array('opt_v1', (4, 40, 40), 'int16')
    with store: store.write('opt_v1', [0, 2, 5], to_dn(dim(load_tiles(store, [0, 2, 5]))))
    report = precompute_stage2(store, build_prithvi_refiner(**SMALL), max_tiles=4)
    assert (report['processed'], report['errors'], set(report['failed'].error)) == (2, 2, {'it has no opt_v1'})
    assert list(report['failed'].id) == [store.table.id[1], store.table.id[3]]
    with pytest.raises(GacError, match='has no opt_v9'):
        precompute_stage2(store, build_prithvi_refiner(**SMALL), source='opt_v9')

def tampered(folder:Path, to:Path, **card) -> Path:
    "Copy a checkpoint with entries of its card changed."
    shutil.copytree(folder, to)
    state, meta = load_checkpoint(to/REFINER_FILE)
    meta |= card
    save_file(state, to/REFINER_FILE, metadata={'format': 'pt', 'gac': json.dumps(meta)})
    return to

def test_checkpoints_that_do_not_belong_are_refused(trained, tmp_path):
    folder = trained[1]
    with pytest.raises(GacError, match="backbone is 'prithvi_mini', expected 'prithvi_eo_v2_300'"):
        load_stage2(folder, 'prithvi_eo_v2_300')
    with pytest.raises(GacError, match=r"bands is \['B02', 'B03', 'B04', 'B08'\], expected"):
        read_stage2(folder, bands=OPT_BANDS[::-1])
    with pytest.raises(GacError, match="kind is 'stage3'"):
        load_stage2(tampered(folder, tmp_path/'kind', kind='stage3'))
    with pytest.raises(GacError, match='other weights of prithvi_mini'):
        load_stage2(tampered(folder, tmp_path/'weights', weights={'prithvi_mini.safetensors': '0'*16}))
    with pytest.raises(GacError, match='is missing'): load_stage2(tmp_path/'nothing')
    broken = shutil.copytree(folder, tmp_path/'broken')
    (broken/'adapter_model.safetensors').write_bytes(b'x'*100)
    with pytest.raises(GacError, match='no readable safetensors'): load_stage2(broken)
    state, _ = load_checkpoint(folder/REFINER_FILE)
    short = shutil.copytree(folder, tmp_path/'short')
    meta = load_checkpoint(short/REFINER_FILE)[1]
    save_file({k: v for k, v in state.items() if k != 'head.out.bias'}, short/REFINER_FILE,
                       metadata={'gac': json.dumps(meta)})
    with pytest.raises(GacError, match='head.out.bias'): load_stage2(short)

def test_the_file_in_the_folder_is_a_path_too(trained):
    a, b = load_stage2(trained[1]), load_stage2(trained[1]/REFINER_FILE)
    assert fingerprint_stage2(a) == fingerprint_stage2(b)

def test_adapters_are_pefts_and_can_be_merged(trained):
    from peft import LoraConfig
    config = LoraConfig.from_pretrained(str(trained[1]))
    assert (config.r, config.lora_alpha) == (8, 16)
    assert all(k.startswith('base_model.model.blocks.') for k in load_file(trained[1]/'adapter_model.safetensors'))
    refiner, x = load_stage2(trained[1]), torch.rand(1, 4, 40, 40)*.3
    with torch.no_grad():
        before = refiner(x)
        merge_lora(refiner.encoder)
        torch.testing.assert_close(refiner(x), before, rtol=0, atol=1e-5)
    assert not any('lora_' in k for k in refiner.state_dict())

@pytest.mark.parametrize('options', [dict(load_in_8bit=True), dict(unfreeze_last_n_blocks=2),
                                     dict(load_in_8bit=True, unfreeze_last_n_blocks=1, reach='wider'),
                                     dict(lora_r=0), dict(metadata=()), dict(pretrained=False)], ids=str)
def test_every_kind_of_refiner_trains_and_comes_back(options, pairs, tmp_path):
    refiner = build_prithvi_refiner(**options, **SMALL)
    frozen = {k: p.detach().clone() for k, p in refiner.named_parameters() if not p.requires_grad}
    start = {k: p.detach().clone() for k, p in refiner.named_parameters() if p.requires_grad}
    train_stage2(refiner, *pairs, replace(QUICK, max_steps=4), tmp_path/'run', every=0)
    assert all(torch.equal(p, frozen[k]) for k, p in refiner.named_parameters() if k in frozen)
    moved = {k for k, p in refiner.named_parameters() if k in start and not torch.equal(p, start[k])}
    assert 'head.out.weight' in moved and any('lora_B' in k for k in moved) == bool(options.get('lora_r', 8))
    last_block = any(k.startswith('encoder.blocks.5.mlp.fc1.weight') for k in moved)
    assert last_block == bool(options.get('unfreeze_last_n_blocks'))
    x = pairs[1].tile(0)['opt_v1'][None]
    with torch.no_grad():
        torch.testing.assert_close(load_stage2(tmp_path/'run')(x, {'month': 5}), refiner(x, {'month': 5}), rtol=0,
                                   atol=1e-6)

def test_reach_of_the_adapters():
    for reach, names in (('attention', {'attn.qkv', 'attn.proj'}),
                         ('wider', {'attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'})):
        encoder = build_prithvi_refiner(reach=reach, **SMALL).encoder
        hit = [k.split('.lora_A')[0] for k, _ in encoder.named_parameters() if '.lora_A.' in k]
        assert {'.'.join(k.split('.')[2:]) for k in hit} == names and len(hit) == 6*len(names)

def test_bands_come_in_their_order_with_their_weights():
    encoder = build_prithvi_refiner(**SMALL).encoder
    file = load_file(root()/'data'/'weights'/'mini'/'prithvi_mini.safetensors')
    # (D, 6, 1, 8, 8)
    whole = next(v for k, v in file.items() if k.endswith('patch_embed.proj.weight') and 'decoder' not in k).float()
    # B02, B03, B04 and the narrow near infrared for B08
    torch.testing.assert_close(encoder.patch_embed.proj.weight.detach(), whole[:, :4])
    mean = np.array(MINI_STATS['prithvi'][0])[:4]*REFLECTANCE
    seen = []
    encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    build_prithvi_refiner(**SMALL)
    refiner = PrithviRefiner(encoder, (), **SMALL).eval()
    with torch.no_grad(): refiner(torch.tensor(mean, dtype=torch.float32)[None, :, None, None].expand(1, 4, 16, 16))
    assert seen[0].abs().max() < 1e-4  # the mean of every band becomes zero: no band has another's statistics

def test_a_month_that_matters_is_learnt_and_only_by_who_is_told():
    g, tiles_ = torch.Generator().manual_seed(0), []
    for i in range(16):
        x = torch.rand(4, 32, 32, generator=g)*.2
        tiles_.append(dict(opt_v1=x, truth=x + (.05 if i % 2 else -.05), month=7 if i % 2 else 1, biome=4))
    settings = replace(QUICK, lr=1e-2, max_steps=40, batch_size=8, grad_accum_steps=1, val_every=20, save_every=20)
    def error(metadata, folder):
        refiner = build_prithvi_refiner(metadata=metadata, hide=0., dropout=0., **SMALL)
        train_stage2(refiner, tiles_, tiles_[:4], settings, folder,
                            Stage2Loss(log_mse=0., l1=1., ms_ssim=0., sam=0.), every=0)
        made = refine(refiner, torch.stack([t['opt_v1'] for t in tiles_]), {'month': [t['month'] for t in tiles_]})
        return float(np.abs(made - torch.stack([t['truth'] for t in tiles_]).numpy()).mean())
    import tempfile
    with tempfile.TemporaryDirectory() as tmp:
        told, deaf = error(('month',), Path(tmp)/'told'), error(('biome',), Path(tmp)/'deaf')
    assert told < .02 < .04 < deaf

def test_south_of_the_equator_the_year_runs_half_a_year_late(tmp_path):
    g, tiles_ = torch.Generator().manual_seed(0), []
    for i in range(16):  # what counts is summer, whichever the month
        x, south, summer = torch.rand(4, 32, 32, generator=g)*.2, i % 2 == 1, i % 4 < 2
        tiles_.append(dict(opt_v1=x, truth=x + (.05 if summer else -.05), month=7 if summer != south else 1, biome=4,
                           lat=-40. if south else 40.))
    settings = replace(QUICK, lr=1e-2, max_steps=40, batch_size=8, grad_accum_steps=1, val_every=20, save_every=20)
    refiner = build_prithvi_refiner(metadata=('month',), hide=0., dropout=0., **SMALL)
    train_stage2(refiner, tiles_, tiles_[:4], settings, tmp_path, Stage2Loss(log_mse=0., l1=1., ms_ssim=0., sam=0.),
                        every=0)
    x, truth = (torch.stack([t[k] for t in tiles_]) for k in ('opt_v1', 'truth'))
    months = {'month': [t['month'] for t in tiles_]}
    error = lambda **more: float(np.abs(refine(refiner, x, months | more) - truth.numpy()).mean())
    assert error(lat=[t['lat'] for t in tiles_]) < .02 < .04 < error()

def test_native_date_reaches_the_encoder_and_unknown_dates_do_not():
    refiner = build_prithvi_refiner(**SMALL)
    x = torch.rand(3, 4, 32, 32, generator=torch.Generator().manual_seed(0))*.3
    padded = torch.zeros(3, 4, 32, 32)
    with torch.no_grad():
        told = refiner.features(padded, **refiner.coords(torch.tensor([1, 7, 0]), {}))[-1]
        none = refiner.features(padded)[-1]
    assert (told[0] - told[1]).abs().max() > 1e-4 and (told[0] - none[0]).abs().max() > 1e-4
    torch.testing.assert_close(told[2], none[2])
    # place is not asked for
    assert refiner.coords(torch.tensor([1]), {'lat': 10., 'lon': 5.}).keys() == {'temporal_coords'}
    placed = build_prithvi_refiner(metadata=('place',), **SMALL)
    with torch.no_grad():
        a, b = (placed.features(padded, **placed.coords(torch.zeros(3, dtype=int), {'lat': lat, 'lon': 5.}))[-1]
                for lat in (10., float('nan')))
    assert (a - none).abs().max() > 1e-4
    torch.testing.assert_close(b, none)
    assert torch.equal(placed(x, {'lat': 10., 'lon': [1., 2., 3.]}), x)

@pytest.mark.parametrize('size', [120, 33])
def test_a_published_prithvi_by_its_name(size):
    refiner = build_prithvi_refiner('prithvi_eo_v2_tiny_tl', pretrained=False, **SMALL)
    x = torch.rand(1, 4, size, size)*.3
    assert torch.equal(refiner(x, {'month': 6, 'biome': 3}), x)
    nn.init.normal_(refiner.head.out.weight)
    assert ((refiner(x) - x)[..., [0, -1], [0, -1]] != 0).all()

def test_lpips_takes_part_where_it_can_and_is_named_where_it_cannot(monkeypatch, capsys):
    class Fake:
        def __init__(self, weights):
            self.available, self.reason = bool(weights), 'no backbone weights'
            self.net = nn.Sequential(nn.Conv2d(3, 1, 1))
    class Net(nn.Module):
        def forward(self, a, b): return (a - b).square().mean((1, 2, 3))
    swap(monkeypatch, 'gac.measure.perception', 'LPIPS', Fake)
    without = Stage2Loss(lpips=.5)
    assert 'goes without LPIPS: no backbone weights' in capsys.readouterr().out
    x = (torch.rand(1, 4, 32, 32)*.2).requires_grad_()
    assert 'lpips' not in without(x, x*.9)
    loss = Stage2Loss(log_mse=0., l1=0., ms_ssim=0., sam=0., lpips=.5, lpips_weights='file')
    loss.perceptual.net = Net()
    terms = loss(x, x.detach()*.9)
    terms['loss'].backward()
    assert float(terms['lpips'].detach()) > 0 and x.grad[:, :3].abs().sum() > 0 and x.grad[:, 3].abs().sum() == 0

def test_small_tiles_are_said_once(capsys):
    loss, x = Stage2Loss(), torch.rand(1, 4, 20, 20)
    for _ in range(3): loss(x, x)
    assert capsys.readouterr().out.count('SSIM instead') == 1

def test_command(copy, tmp_path):
    store = copy('tiles')
    beside = derived_store(store, tmp_path/'beside')
    beside.ensure_array('opt_v1', (4, 40, 40), 'int16', {})
    with beside: beside.write('opt_v1', list(range(5)), store.read('opt_v1', slice(0, 5)))
    options = dict(stage1_dir=tmp_path/'beside', accelerator='cpu')
    few = Stage2Config(steps=2, batch_size=2, val_every=2, save_every=2)
    done = run_stage2(store.path, tmp_path/'out', replace(few, unfreeze_last_n_blocks=1, lora_rank=4), **options)
    card = read_stage2(tmp_path/'out')[1]
    assert card['pairs'] == 5 and card['params']['lora_r'] == 4 and done['steps'] == 2  # only tiles that have opt_v1
    with pytest.raises(GacError, match='refiner.lora_r was 4, now 8'):
        run_stage2(store.path, tmp_path/'out', few, **options)
    assert run_stage2(store.path, tmp_path/'out', few, overwrite=True, **options)['resumed_at'] == 0
    assert run_stage2(store.path, tmp_path/'out', few, **options)['resumed_at'] == 2

def test_short_sequences_are_attended_to_alike(monkeypatch):
    from torch.nn.attention import SDPBackend
    refiner, used = build_prithvi_refiner(depth=0), []
    room = sys.modules['gac.stages.refiner']
    x, real = torch.rand(2, 4, 96, 96), room.sdpa_kernel
    monkeypatch.setattr(room, 'sdpa_kernel', lambda kind: used.append(kind) or real(kind))
    with torch.no_grad():
        plain = refiner.features(x)
        assert used == [SDPBackend.MATH]
        swap(monkeypatch, 'gac.stages.refiner', 'SHORT', 0)
        fused = refiner.features(x)
    assert len(used) == 1
    for a, b in zip(plain, fused): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
