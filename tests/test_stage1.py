"Check Stage 1 over a tile set: killed and resumed, shared by ranks, bad tiles, full disks, wrong settings."
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiles_layouts
import torch
from swapping import swap

from gac.cli import main
from gac.core.files import GacError
from gac.data.arrays import to_dn
from gac.data.shards import shard_index, write_shard
from gac.data.store import Store
from gac.data.stores import from_world
from gac.measure.browser import browser
from gac.models.build import save_weights
from gac.models.decoding import Decoding, generate_tiles
from gac.models.mini import mini_core, mini_tokenizer
from gac.stages.stage1 import build_terramind_generator, precompute_stage1
from gac.stages.tileset import Workload, derived_store, open_tiles, run_tileset, stage1_settings

QUICK = dict(timesteps=1, batch_size=3)
GAC = [sys.executable, '-c', 'import sys; from gac.cli import main; sys.exit(main())']

@pytest.fixture(scope='session')
def shelf(tmp_path_factory) -> Path:
    "Weights of the miniature generator with random numbers."
    folder = tmp_path_factory.mktemp('shelf')
    torch.manual_seed(0)
    tokenizer = mini_tokenizer('s2l2a')
    torch.nn.init.normal_(tokenizer.decoder.out[-1].weight, std=.02)  # untrained, it is zero and every image the same
    save_weights(folder/'terramind_mini.safetensors', mini_core().state_dict())
    save_weights(folder/'terramind_mini_tokenizer_s2l2a.safetensors', tokenizer.state_dict())
    return folder

@pytest.fixture(scope='session')
def model(shelf): return build_terramind_generator(weights=str(shelf))

@pytest.fixture(scope='session')
def original(tmp_path_factory) -> Path:
    "30 small tiles in shards of 8."
    store = from_world(tmp_path_factory.mktemp('original')/'tiles', 20, 5, 5, size=48, shard=8)
    return store.path

@pytest.fixture
def copy(original, tmp_path):
    "Fresh copies of the tiles, by name."
    return lambda name: Store(shutil.copytree(original, tmp_path/name))

@pytest.fixture(scope='session')
def reference(original, model, tmp_path_factory) -> np.ndarray:
    "opt_v1 of an unbroken run."
    store = Store(shutil.copytree(original, tmp_path_factory.mktemp('reference')/'tiles'))
    precompute_stage1(store, model, **QUICK)
    return store.read('opt_v1', slice(None))

def shards(store) -> dict:
    "Bytes of every file of opt_v1."
    folder = store.path/'arrays'/'opt_v1'
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def spoil(store, row:int, value) -> None:
    "Put something into the radar of a tile that no reader would have let in."
    write_shard(store._shard_file('s1', row//store.shard), store.shard,
                      {row % store.shard: np.full((2, 48, 48), value, 'float32')})

def test_killed_twice_and_resumed_gives_the_same_bytes(copy, shelf, model):
    whole, broken = copy('whole'), copy('broken')
    settings = dict(timesteps=6, batch_size=2)
    precompute_stage1(whole, model, **settings)
    command = [*GAC, 'precompute', '--data-dir', str(broken.path), '--timesteps', '6', '--batch-size', '2', '--weights',
               str(shelf)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {'OMP_NUM_THREADS': '1'})
    deadline = time.monotonic() + 900
    shard = broken.path/'arrays'/'opt_v1'/'c'/'0'/'0'/'0'/'0'
    while process.poll() is None and not shard.exists() and time.monotonic() < deadline:
        time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    broken = Store(broken.path)
    left = broken.pending('opt_v1')
    assert 0 < len(left) < len(broken), said
    pid = os.fork()  # a second kill, in the middle of what the first left
    if pid == 0:
        seen = []
        def die(*args, **kwargs):
            seen.append(1)
            if len(seen) > 5: os.kill(os.getpid(), signal.SIGKILL)  # a shard of 8 tiles is full after 4 batches
            return generate(*args, **kwargs)
        generate, model.generate = model.generate, die
        try: precompute_stage1(Store(broken.path), model, **settings)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    broken = Store(broken.path)
    assert 0 < len(broken.pending('opt_v1')) < len(left)
    report = precompute_stage1(broken, model, **settings)
    assert report['processed'] + report['skipped'] == len(broken) and report['skipped'] > 0 and not report['errors']
    assert broken.read('opt_v1', slice(None)).tobytes() == whole.read('opt_v1', slice(None)).tobytes()
    assert shards(broken) == shards(whole)

def test_ranks_together_are_the_single_run(copy, model, reference):
    store = copy('ranks')
    reports = [precompute_stage1(Store(store.path), model, rank=r, world_size=2, **QUICK) for r in (1, 0)]
    assert [r['processed'] for r in reports] == [14, 16]
    assert Store(store.path).read('opt_v1', slice(None)).tobytes() == reference.tobytes()

def at_once(n:int, work) -> list: # exit codes
    "Run something in processes that begin at the same moment."
    begin, pids = time.time() + .3, []
    for rank in range(n):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                time.sleep(max(0, begin - time.time()))
                work(rank)
                code = 0
            finally: os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

def test_workers_may_begin_at_the_same_moment(copy, tmp_path):
    "Let several workers begin a derived store and an array, and replace an array of other settings, at once."
    store = copy('source')
    values = np.arange(30)[:, None, None, None]*np.ones((1, 4, 48, 48))
    def fill(made, **kw):
        def work(rank, ranks=3):
            into = derived_store(Store(store.path), tmp_path/'beside')
            run_tileset(into, 'opt_v1', (4, 48, 48), dict(made=made), lambda rows: (None, np.asarray(rows), {}),
                        lambda _, rows: values[rows]*made/1e4, Workload(2, 0, rank, ranks), **kw)
        return work
    for made, kw in ((1, {}), (2, dict(overwrite=True)), (3, dict(overwrite=True))):
        assert at_once(3, fill(made, **kw)) == [0]*3
        beside = Store(tmp_path/'beside')
        assert len(beside) == 30 and beside.arrays['opt_v1'].attrs['made'] == made
        assert (beside.read('opt_v1', slice(None)) == values*made).all()
    assert at_once(2, fill(4)) == [1, 1]  # other settings are refused where nobody asked to replace

def test_a_rank_leaves_the_tiles_of_others_alone(copy, model):
    store = copy('one')
    precompute_stage1(store, model, rank=0, world_size=2, **QUICK)
    assert store.written('opt_v1').tolist() == [r//8 % 2 == 0 for r in range(30)]

@pytest.mark.parametrize('tokens', ['sample', 'expected'])
def test_batch_size_does_not_matter(model, original, tokens):
    store = Store(original)
    s1, ids = store.read('s1', slice(0, 7)), list(store.table.id[:7])
    images = [np.concatenate([generate_tiles(model, s1[i:i + n], ids[i:i + n], Decoding(2, tokens))
                              for i in range(0, 7, n)])
              for n in (1, 3, 7)]
    for other in images[1:]: assert np.abs(to_dn(other).astype(int) - to_dn(images[0])).max() <= 1

def test_order_and_seed(model, original):
    store = Store(original)
    s1, ids = store.read('s1', slice(0, 4)), list(store.table.id[:4])
    images = generate_tiles(model, s1, ids, Decoding(1))
    np.testing.assert_allclose(generate_tiles(model, s1[::-1], ids[::-1], Decoding(1))[::-1], images, atol=1e-4)
    assert np.abs(generate_tiles(model, s1, ids, Decoding(1), seed=1) - images).max() > .01
    assert np.abs(generate_tiles(model, s1, ids[::-1], Decoding(1)) - images).max() > .01  # the noise follows the name

def test_bad_tiles_are_listed_and_the_others_go_on(copy, model, reference):
    store = copy('bad')
    for row, value in ((4, np.nan), (9, np.inf), (17, 1e6), (25, -20.)): spoil(store, row, value)
    report = precompute_stage1(store, model, **QUICK)
    assert (report['processed'], report['errors']) == (26, 4)
    assert list(report['failed'].id) == [store.table.id[r] for r in (4, 9, 17, 25)]
    assert [w in e for w, e in zip(('4608 values that are not finite', 'not finite', 'expected dB', 'everywhere'),
                                   report['failed'].error)] == [True]*4
    assert store.pending('opt_v1').tolist() == [4, 9, 17, 25]
    good = [r for r in range(30) if r not in (4, 9, 17, 25)]
    assert np.abs(store.read('opt_v1', good).astype(int) - reference[good]).max() <= 1
    again = precompute_stage1(store, model, **QUICK)  # they are looked at again, nothing else is drawn
    assert (again['processed'], again['errors'], again['skipped']) == (0, 4, 26)

def test_a_damaged_chunk_costs_one_tile(copy, model):
    store = copy('damaged')
    path = store._shard_file('s1', 1)
    with open(path, 'r+b') as f:
        offset, length = shard_index(f, store.shard)[4]
        f.seek(int(offset))
        f.write(bytes(int(length)))
    report = precompute_stage1(store, model, **QUICK)
    assert (report['processed'], report['errors']) == (29, 1) and store.pending('opt_v1').tolist() == [12]
    assert report['failed'].id[0] == store.table.id[12] and 'damaged' in report['failed'].error[0]

def test_what_the_model_draws_is_checked(copy, model, monkeypatch):
    store, draw = copy('nan'), generate_tiles
    def spoilt(*args):
        images = draw(*args)
        images[0, 0, 0, 0] = np.nan
        return images
    swap(monkeypatch, 'gac.models.decoding', 'generate_tiles', spoilt)
    report = precompute_stage1(store, model, max_tiles=4, timesteps=1, batch_size=4)
    assert (report['processed'], report['errors']) == (3, 1) and 'returned values' in report['failed'].error[0]

def test_out_of_memory_says_what_to_do(copy, model, monkeypatch):
    store = copy('memory')
    def full(*args): raise torch.OutOfMemoryError('no more')
    swap(monkeypatch, 'gac.models.decoding', 'generate_tiles', full)
    with pytest.raises(GacError, match='--batch-size'): precompute_stage1(store, model, **QUICK)

def test_a_short_disk_is_refused_before_anything_is_written(copy, model, monkeypatch):
    store = copy('disk')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(GacError, match='30 tiles need up to 0.000553 GB and 0.0001 GB are free'):
        precompute_stage1(store, model, **QUICK)
    assert 'opt_v1' not in Store(store.path).arrays
    precompute_stage1(store, model, max_tiles=5, **QUICK)  # fewer fit

def test_other_settings_do_not_mix(copy, model):
    store = copy('mix')
    precompute_stage1(store, model, max_tiles=3, **QUICK)
    for change in (dict(timesteps=2), dict(tokens='argmax'), dict(clamp='off'), dict(seed=1), dict(n_samples=2)):
        with pytest.raises(GacError, match=f'{next(iter(change))} was .*now'):
            precompute_stage1(store, model, **QUICK | change)
    random = build_terramind_generator(pretrained=False)
    with pytest.raises(GacError, match="weights was .*now 'random'"): precompute_stage1(store, random, **QUICK)
    precompute_stage1(store, model, output='opt_other', max_tiles=3, **QUICK | dict(timesteps=2))
    assert precompute_stage1(store, model, overwrite=True, max_tiles=3, **QUICK | dict(timesteps=2))['processed'] == 3
    assert (store.read('opt_v1', [0, 1, 2]) == store.read('opt_other', [0, 1, 2])).all()
    # the same settings: kept
    assert precompute_stage1(store, model, overwrite=True, max_tiles=3, **QUICK | dict(timesteps=2))['skipped'] == 3

@pytest.mark.parametrize('wrong, said',
                         [(dict(batch_size=0), 'at least 1'), (dict(rank=2, world_size=2), 'ranks go from 0 to 1'),
                          (dict(timesteps=0), 'expected 1 to 1000'),
                          (dict(tokens='best'), 'expected sample'), (dict(clamp='no'), 'expected pretraining'),
                          (dict(n_samples=0), 'at least 1')])
def test_nonsense_is_refused(copy, model, wrong, said):
    with pytest.raises(GacError, match=said): precompute_stage1(copy('nonsense'), model, **QUICK | wrong)

def test_half_precision_does_not_mix_with_float32(copy, shelf, model):
    store, half = copy('tiles'), build_terramind_generator(weights=str(shelf), precision='bf16-true')
    precompute_stage1(store, half, max_tiles=3, **QUICK)
    assert store.arrays['opt_v1'].attrs['precision'] == 'bf16-true'
    with pytest.raises(GacError, match='opt_v1 was made with other settings'): precompute_stage1(store, model, **QUICK)
    before = store.read('opt_v1', slice(0, 3)).astype(int)
    precompute_stage1(store, model, max_tiles=3, overwrite=True, **QUICK)
    assert 0 < np.abs(store.read('opt_v1', slice(0, 3)) - before).max()

def test_two_writers_of_one_array_are_refused(copy, model):
    store, other = copy('two'), None
    other = Store(store.path)
    other.ensure_array('opt_v1', (4, 48, 48), 'int16', stage1_settings(model, Decoding(1), 0))
    other.acquire('opt_v1')
    with pytest.raises(GacError, match='is being written'): precompute_stage1(store, model, **QUICK)
    other.close()

def test_missing_weights_are_named(tmp_path):
    with pytest.raises(GacError, match='terramind_mini.safetensors'):
        build_terramind_generator(weights=str(tmp_path))

def test_companion_holds_only_the_new_array(copy, model, reference, tmp_path):
    store = copy('source')
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob('*') if p.is_file()}
    source, into = open_tiles(store.path, tmp_path/'out')
    precompute_stage1(source, model, into=into, **QUICK)
    assert set(Store(into.path).arrays) == {'opt_v1'} and (into.read('opt_v1', slice(None)) == reference).all()
    assert before == {p: p.stat().st_mtime_ns for p in store.path.rglob('*') if p.is_file()}
    _, again = open_tiles(store.path, tmp_path/'out')
    assert precompute_stage1(source, model, into=again, **QUICK)['processed'] == 0

def test_command_converts_other_layouts_first(shelf, tmp_path, capsys):
    tiles_layouts.geotiff(tmp_path/'real', n=2, product='S1RTC')
    words = ['precompute', '--data-dir', str(tmp_path/'real'), '--timesteps', '1', '--weights', str(shelf)]
    assert main(words) == 2 and '--output-dir' in capsys.readouterr().err
    assert main([*words, '--output-dir', str(tmp_path/'out')]) == 0
    store = Store(tmp_path/'out'/'tiles')
    assert store.complete('opt_v1') and store.arrays['opt_v1'].attrs['inputs'] == ['S1RTC']
    assert main([*words, '--output-dir', str(tmp_path/'out')]) == 0 and 'already there 2' in capsys.readouterr().out

def test_command_lists_errors_and_says_so_in_its_exit_code(copy, shelf, capsys):
    store = copy('errors')
    spoil(store, 2, np.nan)
    assert main(['precompute', '--data-dir', str(store.path), '--timesteps', '1', '--max-tiles', '4', '--weights',
                     str(shelf)]) == 1
    assert 'processed 3, already there 0, errors 1' in capsys.readouterr().out
    assert store.table.id[2] in (store.path/'opt_v1_errors.csv').read_text()

def test_real_chips(real_data, shelf, tmp_path, capsys):
    out = tmp_path/'out'
    assert main(['precompute', '--data-dir', str(real_data/'bigearthnet_v2'), '--output-dir', str(out), '--timesteps',
                 '1',
                     '--weights', str(shelf)]) == 0
    assert 'processed 3' in capsys.readouterr().out

def test_stage_images_are_browsed(tmp_path):
    store = from_world(tmp_path/'tiles', 2, 1, 1, size=32)
    calls = []
    browse = browser(store, store.rows()[1:3], dict(opt_v1=lambda batch: calls.append(batch['id'][0])
                                                           or batch['truth']*.5))
    names = list(store.table.id)
    assert browse.controls['tile'].options == tuple(names[1:3])
    assert browse.controls['right'].options == ('radar', 'opt_v1', 'truth', 'error of opt_v1')
    browse.set(line=.2, tile=names[2], white=.3)
    assert calls == names[1:3]  # each drawn once, whatever else moves
    with pytest.raises(GacError, match='tile is'): browse.set(tile=names[0])
