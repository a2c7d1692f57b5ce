"The tile store under faults, and the readers under every trap we know of."
import inspect
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import rasterio.warp
import rasterio.windows
import zarr
from safetensors.numpy import save_file
from swapping import swap

from gac.core.files import GacError
from gac.core.run import Run
from gac.core.vocabulary import OPT_BANDS, S2_BANDS
from gac.data.arrays import crop_back, pad_to_multiple
from gac.data.convert import convert
from gac.data.geotiff import _geotiff_source
from gac.data.layouts import LAYOUTS, recognise
from gac.data.places import EARTH
from gac.data.shards import FORMAT, resize_array
from gac.data.splits import SplitRule, split_room, split_store
from gac.data.store import Store
from gac.data.stores import from_world, real_store, study_store, training_store
from gac.data.table import COLUMNS
from gac.data.units import s1_unit
from gac.data.world.scenes import draw_scene

sys.path.insert(0, str(Path(__file__).parent))
import tiles_layouts as layouts
import tiles_writer as writer


@pytest.fixture(scope='session')
def unbroken(tmp_path_factory) -> dict:
    "Return the bytes that an undisturbed writer leaves."
    path = tmp_path_factory.mktemp('unbroken')/'store'
    writer.work(path)
    return writer.tree(path)

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    "Flushing to the disk guards against a power cut, which no test can make; without it they are faster."
    monkeypatch.setattr(os, 'fsync', lambda fd: None)

# ---- a writer that is killed ----------------------------------------------------------------------------------------

def kill_at_random(path, delay:float, tries:int, seed:int=0, share:str='') -> int: # writers that were killed
    "Start a writer again and again, and kill each after a random time."
    rng, kills = random.Random(seed), 0
    nursery = subprocess.Popen([sys.executable, writer.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    try:
        assert nursery.stdout.readline() == 'ready\n'
        for _ in range(tries):
            nursery.stdin.write(f'{path}{share}\n'), nursery.stdin.flush()
            pid = int(nursery.stdout.readline())
            time.sleep(rng.uniform(0, delay))
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
            if int(nursery.stdout.readline()) == 0: break  # it was done before the signal
            kills += 1
            if (path/'table.parquet').exists():
                there = Store(path)
                assert len(there) % writer.SHARD == 0 or len(there) == writer.N  # whole shards only
                for name in there.arrays: there.read(name, there.written(name))  # every tile is whole
    finally: nursery.stdin.close(), nursery.wait()
    return kills

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_killed_writers_leave_the_bytes_of_an_unbroken_run(tmp_path, unbroken):
    assert kill_at_random(tmp_path/'store', .1, 20) >= 3  # an unbroken run takes tenths of a second
    writer.work(tmp_path/'store')
    assert writer.tree(tmp_path/'store') == unbroken

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_ranks_that_are_killed_fill_one_array_together(tmp_path, unbroken):
    "Three processes fill an array at the same time; each is killed and started again."
    path = tmp_path/'store'
    writer.add_tiles(path)
    with ThreadPoolExecutor(3) as pool:
        kills = list(pool.map(lambda r: kill_at_random(path, .03, 6, r, f' {r} 3'), range(3)))
    assert sum(kills) >= 3
    with ThreadPoolExecutor(3) as pool:
        command = [sys.executable, writer.__file__, str(path)]
        ends = list(pool.map(lambda r: subprocess.run([*command, str(r), '3']).returncode, range(3)))
    assert ends == [0]*3 and Store(path).complete('opt_v1')
    assert writer.tree(path) == unbroken

class Stopped(BaseException): "What a kill looks like from inside."

@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_stop_before_any_step_on_the_disk_is_harmless(tmp_path, unbroken, monkeypatch):
    real = {name: getattr(os, name) for name in ('replace', 'unlink', 'fsync')}
    left = [0]
    def counted(name):
        def step(*args, **kw):
            left[0] -= 1
            if left[0] == 0: raise Stopped(name)
            if left[0] < 0 and name != 'fsync': raise Stopped(name)  # a dead process does nothing more
            return real[name](*args, **kw)
        return step
    def run(steps, path):
        left[0] = steps
        with monkeypatch.context() as m:
            for name in real: m.setattr(os, name, counted(name))
            try: writer.work(path)
            except BaseException:  # what follows a stop in a live process does not count
                if left[0] > 0: raise
                return False
        return True
    assert run(10**6, tmp_path/'all')
    total = 10**6 - left[0]
    assert writer.tree(tmp_path/'all') == unbroken
    for n, steps in enumerate([*range(1, total - 9, 5), *range(total - 9, total)]):
        path = tmp_path/f's{n}'
        finished = run(steps, path)
        assert not finished
        writer.work(path)
        assert writer.tree(path) == unbroken, f'stopped before step {steps} of {total}'

def test_an_interrupt_at_any_line_of_an_append_is_harmless(tmp_path, monkeypatch):
    "Ctrl-C, unlike a kill, lets `close` run: the table and the shards must agree then, and the next writer goes on."
    monkeypatch.setattr('gac.data.shards.os.fsync', lambda f: None)
    arrays, left, file = dict(s2=((2, 4, 4), 'uint16')), [0], inspect.getsourcefile(Store)
    watched = ('append', '_flush_tiles', '_refresh_table', '_forget')
    tiles = [dict(id=f't{i}', s2=np.full((2, 4, 4), i, 'u2')) for i in range(3)]
    def trace(frame, event, arg):
        if frame.f_code.co_filename != file or frame.f_code.co_name not in watched: return None
        if event == 'line':
            left[0] -= 1
            if left[0] == 0: raise KeyboardInterrupt
        return trace
    def add(path):
        store = Store(path)
        with store: store.append(tiles[len(store):])
    def interrupted(path, steps):
        Store.create(path, arrays, shard=2)
        left[0], tracer = steps, sys.gettrace()
        sys.settrace(trace)
        try: add(path)
        except KeyboardInterrupt: pass
        finally: sys.settrace(tracer)
        return 0 if left[0] > 0 else steps
    interrupted(tmp_path/'all', 10**6)
    total = 10**6 - left[0]
    for steps in range(1, total):
        path = tmp_path/f's{steps}'
        assert interrupted(path, steps)
        there = Store(path)
        assert there.table['id'].tolist() == [f't{i}' for i in range(len(there))], f'step {steps} of {total}'
        assert (there.read('s2', slice(None))[:, 0, 0, 0] == np.arange(len(there))).all()
        add(path)
        assert writer.tree(path) == writer.tree(tmp_path/'all'), f'step {steps} of {total}'

def test_tiles_of_a_stopped_writer_do_not_come_back(tmp_path):
    "A writer that is stopped before the table leaves chunks and room for them; the next one begins with other tiles."
    path = tmp_path/'s'
    with Store.create(path, writer.ARRAYS, shard=8) as store: store.append([writer.record(0)])
    with pytest.MonkeyPatch.context() as m:
        m.setattr('gac.data.store.write_table', lambda *args: os._exit(1))
        if (pid := os.fork()) == 0:
            store = Store(path)
            store.append([writer.record(i) for i in range(1, 20)])
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert len(Store(path)) == 1 and zarr.open_array(path/'arrays'/'s1', mode='r').shape[0] > 1
    assert Store(path).xarray().sizes['tile'] == 1
    with Store(path) as store: store.append([writer.record(50)])
    with Store.create(tmp_path/'t', writer.ARRAYS, shard=8) as other:
        other.append([writer.record(0), writer.record(50)])
    assert writer.tree(path) == writer.tree(tmp_path/'t')

def test_ranks_write_the_bytes_of_one_writer(tmp_path, unbroken):
    writer.work(tmp_path/'s', ranks=3)
    assert writer.tree(tmp_path/'s') == unbroken

def test_a_finished_tile_waits_a_minute_at_most(tmp_path, monkeypatch):
    path, now = tmp_path/'s', [0.]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    store = Store.create(path, writer.ARRAYS, shard=8)
    for i in range(2):
        store.append([writer.record(i)])
        now[0] += 61
    assert len(Store(path)) == 2 and len(store) == 2
    store.ensure_array('opt_v1', (4, 16, 16), 'int16')
    for i in range(2):
        store.write('opt_v1', [0], writer.drawn([0]))
        assert Store(path).written('opt_v1').tolist() == [i == 1, False]
        now[0] += 61

# ---- stores of earlier versions -------------------------------------------------------------------------------------

def with_journal(path:Path) -> None:
    "Write a store as an earlier version left it: full shards, half a shard, and batches in the journal."
    with Store.create(path, writer.ARRAYS, dict(source='test'), writer.SHARD) as store:
        store.append([writer.record(i) for i in range(16)])
    store.ensure_array('opt_v1', (4, 16, 16), 'int16', dict(timesteps=3))
    with store: store.write('opt_v1', [1, 2, 3, 9], writer.drawn([1, 2, 3, 9]))
    journal = path/'journal'
    journal.mkdir()
    for name in ('guard', 'begin'): (journal/name).touch()
    (journal/'tiles.0of1.lock').write_text(json.dumps(dict(pid=2**22 + 1, host=socket.gethostname(), started=0.)))
    (journal/'opt_v1.0of1.000000007.12-14.part').write_bytes(b'half a batch')
    def entry(array, number, rows, values, table=()):
        facts = dict(table=json.dumps(list(table)))
        save_file(dict(rows=np.array(rows), **values),
                  journal/f'{array}.0of1.{number:09d}.{min(rows)}-{max(rows)}.safetensors', facts)
    for number, rows in ((4, [13, 14, 15]), (5, [16, 17, 18]), (6, [19, 20])):  # the first one was moved already
        tiles = [writer.record(i) for i in rows]
        table = [{**COLUMNS, **{k: v for k, v in t.items() if k not in writer.ARRAYS}, 'scene': t['id']} for t in tiles]
        entry('tiles', number, rows, {n: np.stack([t[n] for t in tiles]) for n in writer.ARRAYS}, table)
    entry('opt_v1', 2, [4, 0], dict(opt_v1=writer.drawn([4, 0])))
    entry('opt_gone', 0, [4], dict(opt_gone=writer.drawn([4])))

def test_a_journal_of_an_earlier_version_is_read_once(tmp_path, unbroken):
    path = tmp_path/'s'
    with_journal(path)
    store = Store(path)
    assert len(store) == 21 and not (path/'journal').exists()
    for n in writer.ARRAYS:
        np.testing.assert_array_equal(store.read(n, slice(13, 21)),
                                      np.stack([writer.record(i)[n] for i in range(13, 21)]))
    np.testing.assert_array_equal(store.read('opt_v1', [0, 1, 4, 9]), writer.drawn([0, 1, 4, 9]))
    assert np.flatnonzero(store.written('opt_v1')).tolist() == [0, 1, 2, 3, 4, 9]
    writer.work(path)
    assert writer.tree(path) == unbroken

def test_a_journal_in_a_folder_that_is_read_only_is_read_where_it_is(tmp_path, monkeypatch):
    path = tmp_path/'s'
    with_journal(path)
    before = writer.tree(path)
    def refuse(folder): raise GacError(f'{folder}: cannot be written to (Read-only file system).')
    swap(monkeypatch, 'gac.core.files', 'writable', refuse)
    store = Store(path)
    assert len(store) == 21 and store.table['id'].tolist() == [f't{i:03d}' for i in range(21)]
    np.testing.assert_array_equal(store.read('s1', [20])[0], writer.record(20)['s1'])
    np.testing.assert_array_equal(store.read('opt_v1', [4, 9]), writer.drawn([4, 9]))
    data = store.xarray()
    assert data.sizes['tile'] == 21 and data['id'].values.tolist() == store.table['id'].tolist()
    for name in writer.ARRAYS:
        np.testing.assert_array_equal(data[name].values, store.read(name, slice(None)))
    np.testing.assert_array_equal(data['opt_v1'].values[[1, 4, 9]], writer.drawn([1, 4, 9]))
    assert data['opt_v1'].values[20].max() == 0  # without a value
    del store
    assert writer.tree(path) == before

def test_a_damaged_batch_of_a_journal_is_named(tmp_path):
    path = tmp_path/'s'
    writer.work(path)
    (path/'journal').mkdir()
    (path/'journal'/'opt_v1.0of1.000000099.0-3.safetensors').write_bytes(b'junk')
    with pytest.raises(GacError, match='damaged journal entry'): Store(path)

# ---- locks -----------------------------------------------------------------------------------------------------------

def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    path = tmp_path/'s'
    Store.create(path, writer.ARRAYS, shard=8)
    hold = ('import sys; from gac.data.store import Store; s = Store(sys.argv[1]); s.acquire(); '
            'print("held", flush=True); '
            'sys.stdin.read()')
    other = subprocess.Popen([sys.executable, '-c', hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(GacError, match='is being written: another process.* writes tiles'):
            Store(path).append([writer.record(0)])
        with pytest.raises(GacError, match='writes tiles'): Store(path).acquire('opt_v1')
        assert len(Store(path)) == 0  # readers are welcome
    finally: other.kill(), other.wait()
    with Store(path) as store: store.append([writer.record(0)])  # its process is gone
    assert len(Store(path)) == 1

def test_what_was_collected_is_written_when_a_store_or_its_process_ends(tmp_path):
    path = tmp_path/'s'
    store = Store.create(path, writer.ARRAYS)
    store.append([writer.record(0)])
    del store  # a notebook cell run twice
    Store(path).append([writer.record(1)])
    assert len(Store(path)) == 2
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import tiles_writer as w; '
            f'from gac.data.store import Store; s = Store({str(path)!r}); s.append([w.record(2)])')
    subprocess.run([sys.executable, '-c', code], check=True)
    np.testing.assert_array_equal(Store(path).read('s1', [2])[0], writer.record(2)['s1'])

def test_a_forked_process_writes_nothing_of_its_parent(tmp_path):
    path = tmp_path/'s'
    store = Store.create(path, writer.ARRAYS)
    store.append([writer.record(0)])
    if (pid := os.fork()) == 0:
        store.close()
        os._exit(len(Store(path)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with pytest.raises(GacError, match='is being written'): Store(path).append([writer.record(1)])
    store.close()
    assert len(Store(path)) == 1
    if (pid := os.fork()) == 0:  # it may write itself, with the same object
        try: store.append([writer.record(1)])
        finally: store.close(), os._exit(len(store))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2 == len(Store(path))

# ---- reading ---------------------------------------------------------------------------------------------------------

def test_values_come_back_before_and_after_they_are_written(tmp_path):
    path = tmp_path/'s'
    writer.work(path)
    store = Store(path)
    order = np.random.default_rng(0).integers(0, writer.N, 60)
    want = {n: np.stack([writer.record(i)[n] for i in order]) for n in ('s1', 's2')}
    for n in want: np.testing.assert_array_equal(store.read(n, order), want[n])
    np.testing.assert_array_equal(store.read('opt_v1', order), writer.drawn(order))
    for n in ('s1', 's2', 'opt_v1'):
        np.testing.assert_array_equal(zarr.open_array(path/'arrays'/n, mode='r')[:], store.read(n, slice(None)))
    # as loader workers do
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read('s1', order), want['s1'])
    reader = Store(path)
    store.append([writer.record(i) for i in (90, 91)])
    np.testing.assert_array_equal(store.read('s1', [-1])[0], writer.record(91)['s1'])
    store.close()
    reader.refresh()
    np.testing.assert_array_equal(reader.read('s1', [-1])[0], writer.record(91)['s1'])
    assert store.pending('opt_v1').tolist() == [writer.N, writer.N + 1] and not store.complete('opt_v1')
    with pytest.raises(GacError, match='opt_v1 is not written for 2 of the 3 tiles'):
        store.read('opt_v1', [0, writer.N, -1])

def test_damage_is_named(tmp_path):
    path = tmp_path/'s'
    writer.work(path)
    shard = path/'arrays/s1/c/0/0/0/0'
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    with pytest.raises(GacError, match='shard is damaged'): Store(path).read('s1', [0])
    shard.write_bytes(b'\xff'*64 + whole[64:])
    with pytest.raises(GacError, match='tile 0 of s1 is damaged'): Store(path).read('s1', [0])
    # in the values or in what the codec says of them: the checksum speaks before the codec, which might end the process
    for at in (20, 99):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(GacError, match='tile 0 of s1 is damaged .it fails the checksum'):
            Store(path).read('s1', [0])

def test_xarray_writes_what_was_collected(tmp_path):
    store = Store.create(tmp_path/'s', writer.ARRAYS, shard=8)
    store.append([writer.record(i) for i in range(5)])
    data = store.xarray()
    np.testing.assert_array_equal(data['s2'].values, store.read('s2', slice(None)))
    assert data['id'].values.tolist() == [f't{i:03d}' for i in range(5)] and data['transform'].values[3, 2] == 6e5 + 3

def test_xarray_reads_a_store_whose_arrays_were_lengthened_in_part(tmp_path):
    "A writer that is killed while the arrays grow leaves them of unequal length."
    with Store.create(tmp_path/'s', writer.ARRAYS, shard=8) as store:
        store.append([writer.record(i) for i in range(3)])
    resize_array(tmp_path/'s'/'arrays'/'s2', 8, 8)
    data = Store(tmp_path/'s').xarray()
    assert data.sizes['tile'] == 3 and set(data) == {'s1', 's2'}
    np.testing.assert_array_equal(data['s2'][2], writer.record(2)['s2'])

def test_padding_and_cropping_are_exact():
    rng = np.random.default_rng(0)
    for _ in range(200):
        h, w, m = rng.integers(1, 70, 3)
        x = rng.normal(size=(h, w))
        y, crop = pad_to_multiple(x, int(m))
        assert y.shape == (-(-h//m)*m, -(-w//m)*m)
        np.testing.assert_array_equal(crop_back(y, crop), x)
        if min(h, w) > m:
            margins = [((-n % m)//2, -n % m - (-n % m)//2) for n in (h, w)]
            np.testing.assert_array_equal(y, np.pad(x, margins, mode='reflect'))

def test_a_world_that_was_stopped_goes_on(tmp_path, monkeypatch):
    calls = []
    scene = draw_scene
    def stops(seed, size):
        calls.append(seed)
        if len(calls) == 6: raise KeyboardInterrupt
        return scene(seed, size)
    swap(monkeypatch, 'gac.data.world.scenes', 'draw_scene', stops)
    with pytest.raises(KeyboardInterrupt): from_world(tmp_path/'a', 4, 2, 2, size=32, batch=2)
    assert len(Store(tmp_path/'a')) == 4
    from_world(tmp_path/'a', 4, 2, 2, size=32, batch=2)
    monkeypatch.undo()
    from_world(tmp_path/'b', 4, 2, 2, size=32, batch=3)
    assert writer.tree(tmp_path/'a') == writer.tree(tmp_path/'b')
    assert sorted(set(calls)) == [0, 1, 2, 3, 800_000, 800_001, 900_000, 900_001]

# ---- readers: what is right is taken ---------------------------------------------------------------------------------

def errors(report:pd.DataFrame) -> dict:
    "id -> reason of the tiles that were not taken."
    bad = report[report['status'] == 'error']
    return dict(zip(bad['id'], bad['reason']))

def test_bigearthnet(tmp_path):
    table = layouts.bigearthnet(tmp_path/'ben', 4, contains_cloud_or_shadow=[False, False, False, True])
    assert recognise(tmp_path/'ben') == 'bigearthnet_v2'
    report = convert(tmp_path/'ben', tmp_path/'out')
    assert report['status'].tolist() == ['ok']*3 + ['excluded'] and report['reason'].iloc[3] == 'cloud or shadow'
    store = Store(tmp_path/'out')
    assert (store.table['split'].tolist() == ['train', 'val', 'test'] and store.table['month'].tolist() == [6]*3
            and store.table['biome'].tolist() == [4]*3)
    np.testing.assert_array_equal(store.read('s1', [1])[0], layouts.radar(1))
    np.testing.assert_array_equal(store.read('s2', [2], OPT_BANDS)[0], layouts.optical(2)[[1, 2, 3, 7]])
    b05 = layouts.optical(2)[4, ::2, ::2].repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(store.read('s2', [2], ('B05',))[0, 0], b05)
    assert store.table['transform'].iloc[2][2] == 6e5 + 2400 and store.attrs['s1_product'] == 'S1GRD'
    assert len(convert(tmp_path/'ben', tmp_path/'all', keep_snow_cloud=True).query('status == "ok"')) == len(table)

def test_bigearthnet_with_the_official_table_and_a_part_of_the_folders(tmp_path):
    table = layouts.bigearthnet(tmp_path/'ben', 2)
    more = table.assign(patch_id=table['patch_id'].str.replace('29UPU', '29UPV'),
                        s1_name=table['s1_name'].str.replace('29UPU', '29UPV'))
    pd.concat([table, more]).to_parquet(tmp_path/'ben'/'metadata.parquet')
    report = convert(tmp_path/'ben', tmp_path/'out', strict=True)
    assert report['status'].tolist() == ['ok', 'ok', 'excluded'] and report['reason'].iloc[2].startswith('2 rows')

def test_geotiff_cut_with_its_georeference(tmp_path):
    layouts.geotiff(tmp_path/'tif', 2, size=224)
    report = convert(tmp_path/'tif', tmp_path/'out')
    assert (report['id'].tolist()[:4] == ['a0_0_0', 'a0_0_104', 'a0_104_0', 'a0_104_104']
            and (report['status'] == 'ok').all())
    store = Store(tmp_path/'out')
    np.testing.assert_array_equal(store.read('s2', [6])[0], layouts.optical(1, 224)[:, 104:, :120])
    row = store.table.iloc[6]
    assert list(row['transform']) == [10, 0, 6e5 + 2240, 0, -10, 5.8e6 - 1040]
    lon, lat = rasterio.warp.transform('EPSG:32629', 'EPSG:4326', [6e5 + 2240 + 600], [5.8e6 - 1040 - 600])
    assert abs(row['lon'] - lon[0]) < 1e-6 and abs(row['lat'] - lat[0]) < 1e-6
    assert row['month'] == 8 and row['scene'] == 'a1' and row['split'] == 'test'  # the optical image's month
    assert store.read('dem', [7])[0, 0, 0] == 51

@pytest.mark.parametrize('how', ['one file, stacked', 'folder', 'vv and vh'])
def test_npz(tmp_path, how):
    s1, s2 = (np.stack([f(i) for i in range(3)]) for f in (layouts.radar, lambda i: layouts.optical(i, count=4)))
    if how == 'folder': src = layouts.npz(tmp_path/'npz')
    else:
        src = tmp_path/'c.npz'
        given = dict(s1_vv=s1[:, 0], s1_vh=s1[:, 1], s2_real=s2) if how == 'vv and vh' else dict(s1=s1, s2=s2)
        np.savez(src, month=[1, 2, 3], ids=['x', 'y', 'z'], biome=[4, 4, 6], **given)
    assert (convert(src, tmp_path/'out')['status'] == 'ok').all()
    store = Store(tmp_path/'out')
    np.testing.assert_array_equal(store.read('s1', slice(None)), s1)
    np.testing.assert_array_equal(store.read('s2', slice(None), OPT_BANDS), s2)
    assert store.table['month'].tolist() == [1, 2, 3]

@pytest.mark.parametrize('how', ['a file', 'a folder of parts'])
def test_benv2(tmp_path, how):
    src = layouts.benv2(tmp_path/'b'/'benv2.0000.part.tortilla')
    if how == 'a folder of parts':
        layouts.benv2(tmp_path/'b'/'benv2.0001.part.tortilla', 1,
                      lambda i: dict(patch_id='S2A_MSIL2A_20170617T113321_N9999_R080_T29UPU_90_90',
                                     contains_seasonal_snow=True))
        src = src.parent
    assert recognise(src) == 'benv2'
    report = convert(src, tmp_path/'out')
    assert (report['status'].tolist() == ['ok']*3 + ['excluded']*(how != 'a file')
            and set(report['reason']) <= {'', 'seasonal snow'})
    store = Store(tmp_path/'out')
    # the name of the patch in BigEarthNet
    assert store.table['id'].tolist() == [f'S2A_MSIL2A_20170617T113321_N9999_R080_T29UPU_{i:02d}_05' for i in range(3)]
    assert (store.table['split'].tolist() == ['train', 'val', 'test'] and store.table['month'].tolist() == [6]*3
            and store.attrs['s1_product'] == 'S1GRD')
    # VV before VH
    np.testing.assert_array_equal(store.read('s1', slice(None)), np.stack([layouts.radar(i) for i in range(3)]))
    np.testing.assert_array_equal(store.read('s2', slice(None)), np.stack([layouts.optical(i) for i in range(3)]))
    # 10 m
    assert [list(t) for t in store.table['transform']] == [[10, 0, 6e5 + 1200*i, 0, -10, 5.8e6] for i in range(3)]
    assert (store.table['date'].tolist() == ['2017-06-17T11:33:21']*3
            and store.table['labels'][0] == 'Pastures|Arable land')

def test_units_are_converted_and_said(tmp_path, capsys):
    layouts.geotiff(tmp_path/'a', s1=lambda x, i: 10**(x/10), s2=lambda x, i: x.astype('f4')/1e4)
    convert(tmp_path/'a', tmp_path/'A')
    assert 'Sentinel-1 in linear; Sentinel-2 as reflectance, offset 0' in capsys.readouterr().out
    layouts.geotiff(tmp_path/'b', s2=lambda x, i: x + 1000)
    convert(tmp_path/'b', tmp_path/'B', s2_offset=1000)
    for out in 'AB':
        store = Store(tmp_path/out)
        np.testing.assert_allclose(store.read('s1', [2])[0], layouts.radar(2), atol=1e-4)
        np.testing.assert_array_equal(store.read('s2', [2])[0], layouts.optical(2))

def test_bands_come_by_name(tmp_path):
    layouts.geotiff(tmp_path/'a', 1, s1=lambda x, i: x[::-1], names=('VH', 'VV'))
    (tmp_path/'a/S2L2A/a0.tif').unlink()
    layouts.write_tif(tmp_path/'a/S2L2A/a0.tif', layouts.optical(0)[::-1], names=S2_BANDS[::-1])
    convert(tmp_path/'a', tmp_path/'out', strict=True)
    store = Store(tmp_path/'out')
    np.testing.assert_array_equal(store.read('s1', [0])[0], layouts.radar(0))
    np.testing.assert_array_equal(store.read('s2', [0])[0], layouts.optical(0))

def test_radar_bands_taken_by_their_order_are_said(tmp_path, capsys):
    "Once, with the first file and the way to name them; not where names, keys or an option say which is which."
    apart = lambda i: dict(s1=None, s1_vv=layouts.radar(i)[0], s1_vh=layouts.radar(i)[1])
    sources = dict(a=layouts.geotiff(tmp_path/'a', 2), b=layouts.npz(tmp_path/'b', 2),
                   c=layouts.npz(tmp_path/'c', 2, apart), d=layouts.geotiff(tmp_path/'d', 2, names=('VV', 'VH')))
    for name, said in dict(a='S1GRD/a0.tif', b='n0.npz', c='', d='').items():
        convert(sources[name], tmp_path/f'{name}.out', strict=True)
        out = capsys.readouterr().out
        assert out.count('no names') == bool(said), out
        assert not said or f'{said}: its radar bands' in out and '--s1-bands VH,VV' in out, out
    convert(sources['a'], tmp_path/'named.out', s1_bands=('VV', 'VH'))
    assert 'no names' not in capsys.readouterr().out

def test_a_stopped_conversion_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    layouts.geotiff(tmp_path/'tif', 5)
    convert(tmp_path/'tif', tmp_path/'whole', batch=2)
    load = _geotiff_source
    def stops(name, *rest):
        if name == 'a4' and stops.armed: raise KeyboardInterrupt
        return load(name, *rest)
    swap(monkeypatch, 'gac.data.convert', '_samples', lambda jobs, n=16: [j.load() for j in jobs[:2]])
    swap(monkeypatch, 'gac.data.geotiff', '_geotiff_source', stops)
    stops.armed = True
    with pytest.raises(KeyboardInterrupt): convert(tmp_path/'tif', tmp_path/'part', batch=2)
    assert len(Store(tmp_path/'part')) == 4 and not (tmp_path/'part'/'report.csv').exists()
    stops.armed = False
    report = convert(tmp_path/'tif', tmp_path/'part', batch=2)
    assert (report['status'] == 'ok').all() and sorted(report['id']) == [f'a{i}' for i in range(5)]
    a, b = (writer.tree(tmp_path/n) for n in ('whole', 'part'))
    a.pop('report.csv'), b.pop('report.csv')
    assert a == b

def test_a_repeated_conversion_keeps_the_notes_of_its_report(tmp_path):
    layouts.geotiff(tmp_path/'tif', 3, s2=lambda x, i: x//10*10 if i == 1 else x)
    first = convert(tmp_path/'tif', tmp_path/'s')
    assert first['reason'].str.contains('multiple of').any()
    again = convert(tmp_path/'tif', tmp_path/'s')
    pd.testing.assert_frame_equal(again, first)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'s'/'report.csv', keep_default_na=False), first)

def test_a_run_keeps_its_real_store_until_data_or_options_change(tmp_path, monkeypatch, capsys):
    run = Run('02_tiles', 'smoke', 0, tmp_path/'run', tmp_path/'reports', str(layouts.npz(tmp_path/'npz')))
    assert len(real_store(run)) == 3
    capsys.readouterr()
    assert len(real_store(run)) == 3 and capsys.readouterr().out == ''
    assert real_store(run, size=96).arrays['s1'].shape[0] == 12
    assert len(real_store(run, str(layouts.npz(tmp_path/'other'/'npz', 2)), size=96)) == 8
    run.data = ''
    assert real_store(run) is None

def test_tiles_of_an_earlier_format_are_made_anew_by_their_run_and_refused_elsewhere(tmp_path, capsys):
    run = Run('02_tiles', 'smoke', 0, tmp_path/'run', tmp_path/'reports')
    store = study_store(run, 2, 1, 1, size=32)
    want, group = store.read('s1', slice(None)), store.path/'arrays'/'zarr.json'
    group.write_text(group.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(GacError, match='format 1, this version reads 2. Convert the tiles again'): Store(store.path)
    np.testing.assert_array_equal(study_store(run, 2, 1, 1, size=32).read('s1', slice(None)), want)
    assert 'tiles of format 1 are made again in format 2' in capsys.readouterr().out
    group.write_text('{"attributes": []}')  # damaged, and not taken for old
    with pytest.raises(GacError): study_store(run)
    assert group.exists()

# ---- readers: what is wrong is a row of the report, and the rest goes on ---------------------------------------------

def geotiff_trap(path:Path, trap:str) -> tuple: # the id that fails, what the report says
    "GeoTIFF folders in which one of three sources is wrong."
    x1, x2 = layouts.radar(1), layouts.optical(1)
    f = layouts.geotiff(path)
    put = lambda kind, x, **kw: layouts.write_tif(f/kind/'a1.tif', x, **{**dict(west=6e5 + 1200), **kw})
    if trap == 'NaN': put('S1GRD', np.where(x1 > -9, np.nan, x1))
    elif trap == 'nodata': put('S1GRD', np.where(x1 > -9, -9999, x1), nodata=-9999)
    elif trap == 'integer nodata': put('S2L2A', np.where(x2 < 200, 7, x2).astype('u2'), nodata=7)
    elif trap == 'S2 zero': put('S2L2A', x2*(np.arange(120) > 5).astype('u2'))
    elif trap == 'S1 zero': put('S1GRD', x1*(np.arange(120) > 5).astype('f4'))
    elif trap == 'missing file': (f/'S1GRD'/'a1.tif').unlink()
    elif trap == 'missing band': put('S2L2A', x2[:11])
    elif trap == 'size': put('S1GRD', x1[:, :100], north=5.8e6)
    elif trap == 'CRS': put('S1GRD', x1, crs='EPSG:32630')
    elif trap == 'place': put('S1GRD', x1, west=6e5 + 1260)
    elif trap == 'duplicate': put('S1GRD', x1).rename(f/'S1GRD'/'a1.tiff'), put('S1GRD', x1)
    elif trap == 'truncated': (f/'S2L2A'/'a1.tif').write_bytes((f/'S2L2A'/'a1.tif').read_bytes()[:9000])
    elif trap == 'not a TIFF': (f/'S2L2A'/'a1.tif').write_bytes(b'hello')
    elif trap == 'linear among dB': put('S1GRD', 10**(x1/10))
    elif trap == 'offset among none': put('S2L2A', x2 + 1000)
    elif trap == 'swapped': put('S1GRD', x1[::-1])
    elif trap == 'small':
        [put(k, x[..., :90, :90]) for k, x in (('S1GRD', x1), ('S2L2A', x2), ('DEM', np.zeros((120, 120), 'i2')))]
    elif trap == 'DEM': put('DEM', np.full((120, 120), -32768, 'i2'))
    elif trap == 'not finite': put('S2L2A', np.where(x2 < 200, np.inf, x2).astype('f4'))
    return f

GEOTIFF_TRAPS = {'NaN': 'px are NaN', 'nodata': 'px are NaN or without data',
                 'integer nodata': 'px are NaN or without data', 'S2 zero': '720 px are 0 in every band',
    'S1 zero': 'px are exactly 0', 'missing file': 'missing file a1.tif', 'missing band': '11 bands without names',
    'size': '100×120 px', 'CRS': 'CRS EPSG:32630, expected EPSG:32629',
    'place': 'expected the place of', 'duplicate': 'duplicate id a1', 'truncated': 'cannot be read',
    'not a TIFF': 'cannot be read', 'linear among dB': 'say --s1-units dB',
    'offset among none': '--s2-offset 1000', 'swapped': '--s1-bands VH,VV', 'small': '--tile-size 90',
    'DEM': 'outside -500 to 9000', 'not finite': 'px are NaN'}

@pytest.mark.parametrize('trap', GEOTIFF_TRAPS)
def test_geotiff_traps(tmp_path, trap):
    src = geotiff_trap(tmp_path/'tif', trap)
    report = convert(src, tmp_path/'out')
    assert list(errors(report)) == ['a1'] and GEOTIFF_TRAPS[trap] in errors(report)['a1']
    assert Store(tmp_path/'out').table['id'].tolist() == ['a0', 'a2']  # the rest goes on
    with pytest.raises(GacError, match='a1'): convert(src, tmp_path/'strict', strict=True)

def ben_trap(path:Path, trap:str) -> None:
    "BigEarthNet in which the second of three patches is wrong."
    table = layouts.bigearthnet(path)
    s2, s1 = table['patch_id'][1], table['s1_name'][1]
    f2 = path/'BigEarthNet-S2'/s2.rsplit('_', 2)[0]/s2
    f1 = path/'BigEarthNet-S1'/s1.rsplit('_', 3)[0]/s1
    if trap == 'missing band': (f2/f'{s2}_B11.tif').unlink()
    elif trap == 'missing folder': f1.rename(path/'away')
    elif trap == 'native size': layouts.write_tif(f2/f'{s2}_B05.tif', layouts.optical(1)[4], west=6e5 + 1200)
    elif trap == 'CRS': layouts.write_tif(f1/f'{s1}_VV.tif', layouts.radar(1)[0], crs='EPSG:32635', west=6e5 + 1200)
    elif trap == 'path': table.loc[1, 'patch_id'] = '../../outside_00_01'
    elif trap == 's1 path': table.loc[1, 's1_name'] = '/etc/passwd_1_2_3'
    elif trap == 'split': table.loc[1, 'split'] = 'somewhere'
    elif trap == 'duplicate': table = pd.concat([table, table.iloc[[1]]])
    table.to_parquet(path/'metadata.parquet')

BEN_TRAPS = {'missing band': 'missing band B11', 'missing folder': 'missing file', 'native size': 'expected 60×60',
             'CRS': 'CRS EPSG:32635', 'path': 'field id', 's1 path': 'field id',
             'split': "split 'somewhere'", 'duplicate': 'duplicate id'}

@pytest.mark.parametrize('trap', BEN_TRAPS)
def test_bigearthnet_traps(tmp_path, trap):
    ben_trap(tmp_path/'ben', trap)
    report = convert(tmp_path/'ben', tmp_path/'out')
    (reason,) = errors(report).values()
    assert BEN_TRAPS[trap] in reason and len(Store(tmp_path/'out')) == (3 if trap == 'duplicate' else 2)
    with pytest.raises(GacError): convert(tmp_path/'ben', tmp_path/'strict', strict=True)

NPZ_TRAPS = {'pickled': (dict(s1=np.array([{}, None], object)), 'pickled objects'),
             'no s1': (dict(s1=None), 'missing array s1'), 'bands': (dict(s2=layouts.optical(1, count=5)), '5 bands'),
    'NaN': (dict(s1=np.full((2, 120, 120), np.nan)), 'NaN'), 'escaping id': (dict(id='../../x'), 'field id'),
    'absolute id': (dict(id='/etc/x'), 'field id'), 'duplicate id': (dict(id='n0'), 'duplicate id n0'),
    'month': (dict(month=13), 'month 13'), 'sizes': (dict(s1=layouts.radar(1, 100)), 'of one size')}

@pytest.mark.parametrize('trap', NPZ_TRAPS)
def test_npz_traps(tmp_path, trap):
    change, reason = NPZ_TRAPS[trap]
    src = layouts.npz(tmp_path/'npz', change=lambda i: change if i == 1 else {})
    report = convert(src, tmp_path/'out')
    assert (len(errors(report)) == 1 and reason in report.loc[report['status'] == 'error', 'reason'].iloc[0]
            and len(Store(tmp_path/'out')) == 2)
    assert errors(convert(src, tmp_path/'out')) == errors(report)  # the second time too

BENV2_TRAPS = {  # what is wrong with the second of three samples -> what the report says
    'offset outside': (dict(row=lambda i: {'tortilla:offset': 10**9} if i == 1 else {}), 'damaged or not whole'),
    'negative offset': (dict(row=lambda i: {'tortilla:offset': -5} if i == 1 else {}), 'damaged or not whole'),
    'part outside its sample': (dict(part=lambda i: {'tortilla:length': 10**7} if i == 1 else {}),
                                'damaged or not whole'),
    'escaping id': (dict(row=lambda i: dict(patch_id='../../x') if i == 1 else {}), 'field id'),
    'swapped': (dict(s1=lambda x, i: x if i == 1 else x[::-1]), '--s1-bands VH,VV'),
    'split': (dict(row=lambda i: {'tortilla:data_split': 'somewhere'} if i == 1 else {}), "split 'somewhere'"),
    'elsewhere': (dict(pixel2=30.), 'expected the place of'), 'other parts': (dict(names=('s1', 'hls')), 'no part s2')}

@pytest.mark.parametrize('trap', BENV2_TRAPS)
def test_benv2_traps(tmp_path, trap):
    change, reason = BENV2_TRAPS[trap]
    src = layouts.benv2(tmp_path/'b.tortilla', **change)
    if trap in ('elsewhere', 'other parts'):  # every sample
        with pytest.raises(GacError, match=reason): convert(src, tmp_path/'out')
        return
    report = convert(src, tmp_path/'out')
    assert (len(errors(report)) == 1 and reason in next(iter(errors(report).values()))
            and len(Store(tmp_path/'out')) == 2)
    assert not [p for p in tmp_path.rglob('*x*') if p.suffix == '.tif']

@pytest.mark.parametrize('cut', [10, 150, 100_000, -5])
def test_a_tortilla_that_is_not_whole(tmp_path, cut):
    src = layouts.benv2(tmp_path/'b.tortilla')
    src.write_bytes(src.read_bytes()[:cut])
    with pytest.raises(GacError, match='b.tortilla.*(damaged or not whole|no tortilla)'): convert(src, tmp_path/'out')

def test_a_pickle_in_disguise_is_never_loaded(tmp_path):
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    layouts.npz(tmp_path/'npz', 2)
    (tmp_path/'npz'/'n1.npz').write_bytes(pickle.dumps(Evil()))
    assert 'pickled' in errors(convert(tmp_path/'npz', tmp_path/'out'))['n1'] and not (tmp_path/'ran').exists()

# ---- what is ambiguous for the whole data set is refused, with the option that settles it ----------------------------

@pytest.mark.parametrize('change, asks, settle', [
    (dict(s2=lambda x, i: x + 1000), '--s2-offset 1000', dict(s2_offset=1000)),
    (dict(s2=lambda x, i: x/1000), '--s2-units dn', dict(s2_units='dn', s2_offset=0)),
    (dict(s1=lambda x, i: -x), '--s1-units dB', None),
    (dict(s1=lambda x, i: (10**(x/20)*1e4).astype('u2')), '--s1-units dB, linear', None)])
def test_ambiguous_units(tmp_path, change, asks, settle):
    src = layouts.geotiff(tmp_path/'tif', **change)
    with pytest.raises(GacError, match=asks) as e: convert(src, tmp_path/'out')
    assert str(src) in str(e.value) and ' to ' in str(e.value)  # the place and the range seen
    assert not (tmp_path/'out').exists()
    if settle: assert (convert(src, tmp_path/'out', **settle)['status'] == 'ok').all()

def test_no_layout_and_no_option_by_guess(tmp_path):
    (tmp_path/'x').mkdir()
    (tmp_path/'x'/'photo.jpg').touch()
    with pytest.raises(GacError, match='photo.jpg') as e: recognise(tmp_path/'x')
    assert all(k in str(e.value) for k in LAYOUTS)
    src = layouts.npz(tmp_path/'npz', 1)
    with pytest.raises(GacError, match='there are size'): convert(src, tmp_path/'o', tile_size=96)
    for wrong in (dict(s1_units='decibel'), dict(s2_units='raw'), dict(s2_offset='yes')):
        with pytest.raises(GacError, match='--' + next(iter(wrong)).replace('_', '-')):
            convert(src, tmp_path/'o', **wrong)
    np.savez(tmp_path/'npz'/'n0.npz', s1=np.zeros(3))
    with pytest.raises(GacError, match='no tile of 1 can be read'): convert(src, tmp_path/'o')

# ---- real chips ------------------------------------------------------------------------------------------------------

def test_real_terramesh(tmp_path, real_data):
    report = convert(real_data/'terramesh_tiles', tmp_path/'out')
    assert (report['status'] == 'ok').all() and len(report) == 20
    store = Store(tmp_path/'out')
    assert (store.attrs['s1_product'] == 'S1RTC' and set(store.arrays) == {'s1', 's2', 'dem', 'lulc', 'ndvi'}
            and set(store.table['split']) == {'test'})
    first = store.table.groupby('scene').first()
    assert first['month'].to_dict() == {'282D_485L_3_3': 7, '38D_378R_2_3': 6, '433D_629L_3_1': 4, '609U_541L_3_0': 1,
                                        '637U_59R_1_3': 10}
    i = store.table.index[store.table['id'] == '38D_378R_2_3_104_0'][0]
    with rasterio.open(real_data/'terramesh_tiles/S1RTC/38D_378R_2_3.tif') as f:
        np.testing.assert_array_equal(store.read('s1', [i])[0], f.read()[:, 104:, :120].astype('f4'))
        assert np.allclose(list(f.window_transform(rasterio.windows.Window(0, 104, 120, 120)))[:6],
                           store.table['transform'][i])

def test_the_stray_offset_of_a_public_chip_is_seen(tmp_path, real_data, monkeypatch):
    swap(monkeypatch, 'gac.data.units', 'KNOWN_OFFSETS', {})
    report = convert(real_data/'terramesh_tiles', tmp_path/'out')
    assert list(errors(report)) == ['433D_629L_3_1'] and '969 to 7668' in errors(report)['433D_629L_3_1']
    report = convert(real_data/'terramesh_tiles', tmp_path/'settled', s2_offset={'433D_629L_3_1': 1000})
    store = Store(tmp_path/'settled')
    rows = {s: np.flatnonzero(store.table['scene'] == s) for s in ('282D_485L_3_3', '433D_629L_3_1', '637U_59R_1_3')}
    trees = {s: np.median(store.read('s2', i, ('B04',))[:, 0][store.read('lulc', i) == 2]) for s, i in rows.items()}
    assert not errors(report) and all(100 < v < 500 for v in trees.values())  # red of trees: alike once it is off

def test_real_bigearthnet(tmp_path, real_data):
    report = convert(real_data/'bigearthnet_v2', tmp_path/'out')
    assert report['status'].tolist() == ['ok', 'ok', 'ok', 'excluded'] and report['reason'].iloc[3] == 'seasonal snow'
    store = Store(tmp_path/'out')
    assert (store.table['split'].tolist() == ['train', 'train', 'val'] and store.table['month'].tolist() == [6, 6, 9]
            and store.table['biome'].tolist() == [4, 4, 6])
    s1 = store.read('s1', [1])[0]
    # VV before VH, in dB, not cut to whole numbers
    assert (np.median(s1[0]), np.median(s1[1])) == (pytest.approx(-11.159, abs=1e-3), pytest.approx(-16.117, abs=1e-3))
    assert store.read('s2', [1], ('B02', 'B08')).max(axis=(0, 2, 3)).tolist() == [2013, 7525]

def test_real_benv2(tmp_path, real_data):
    report = convert(real_data/'geobench_benv2', tmp_path/'out')
    assert (report['status'] == 'ok').all() and len(report) == 9
    store = Store(tmp_path/'out')
    assert store.table['country'].value_counts().to_dict() == dict(Ireland=3, Finland=3, Lithuania=2, Serbia=1)
    assert store.table['split'].tolist() == ['train', 'val', 'val', 'test', 'test'] + ['train']*4
    assert store.table['month'].tolist() == [5, 3, 2, 9, 9, 6, 10, 4, 2]
    vv, vh = np.median(store.read('s1', slice(None)), (2, 3)).T
    assert (vv > vh + 3).all()  # the file has VH first
    assert {t[0] for t in store.table['transform']} == {10.}
    import pyarrow as pa
    import pyarrow.parquet as pq  # the place in the table of the file is that of its radar
    blob = (real_data/'geobench_benv2'/'benv2.tortilla').read_bytes()
    own = pq.read_table(pa.BufferReader(blob[int.from_bytes(blob[2:10], 'little'):])).to_pandas()
    assert np.abs(store.table[['lon', 'lat']].to_numpy() - own[['lon', 'lat']].to_numpy()).max() < 1e-5
    s2 = store.read('s2', slice(None)).astype(float)
    fine = s2.reshape(9, 12, 20, 6, 20, 6).std((3, 5)).mean((0, 2, 3))/s2.std((0, 2, 3))  # inside 60 m
    # the 60 m bands lie where the order of S2L2A has them
    assert set(np.argsort(fine)[:2]) == {S2_BANDS.index('B01'), S2_BANDS.index('B09')}

def test_real_power_and_amplitude_are_told_apart(real_data):
    chips = []
    for path in sorted((real_data/'terramesh_tiles'/'S1RTC').glob('*.tif')):
        with rasterio.open(path) as f: chips.append(f.read())
    for x in ([c] for c in chips):
        assert s1_unit(x) == 'dB' and s1_unit([10**(x[0]/10)]) == 'linear' and s1_unit([10**(x[0]/20)]) == 'amplitude'

def test_a_run_trains_on_the_tiles_it_is_given_where_they_suffice(tmp_path, monkeypatch):
    from_world(tmp_path/'given', 5, 2, 2, size=48)
    from_world(tmp_path/'run/tiles', 3, 1, 1, size=48)
    run = Run.open('08_stage2', 'smoke', 0, str(tmp_path/'run'), str(tmp_path/'reports'), str(tmp_path/'given'))
    swap(monkeypatch, 'gac.data.stores', 'MIN_PAIRS', 5)
    label, store = training_store(run)
    assert (label, len(store.rows('train'))) == ('real: given', 5) and not run.record['missing']
    swap(monkeypatch, 'gac.data.stores', 'MIN_PAIRS', 6)
    label, store = training_store(run)
    assert (label, len(store.rows('train'))) == ('world', 3)
    assert '5 train, 2 val, 2 test tiles; 6 to train on' in str(run.record['missing'])

def test_a_converted_folder_is_kept_whoever_asks(tmp_path):
    "Later notebooks ask for the real tiles without options: they take what 02_tiles made of them."
    (tmp_path/'npz').mkdir()
    r = np.random.default_rng(0)
    s1 = r.normal([[[-11]], [[-17]]], 2, (2, 96, 96)).astype('f4')
    np.savez(tmp_path/'npz'/'a.npz', s1=s1, s2=r.integers(200, 4000, (4, 96, 96)).astype('u2'), month=5)
    run = Run.open('02_tiles', 'smoke', 0, str(tmp_path/'run'), str(tmp_path/'reports'), str(tmp_path/'npz'))
    assert real_store(run, size=96).arrays['s1'].shape == (1, 2, 96, 96)
    made = (tmp_path/'run/real/table.parquet').stat().st_mtime_ns
    assert (real_store(run).arrays['s1'].shape == (1, 2, 96, 96)
            and (tmp_path/'run/real/table.parquet').stat().st_mtime_ns == made)
    assert real_store(run, size=48).arrays['s1'].shape[0] == 4

# ---- splits and several data sets in one store

def chips_at(root:Path, kms, size:int=32, **more) -> Path:
    "GeoTIFF chips along a line, their corners so many km from its beginning."
    for i, x in enumerate(kms):
        place = dict(west=6e5 + 1000.*x)
        layouts.write_tif(root/'S1GRD'/f'c{x}.tif', layouts.radar(i, size), names=('VV', 'VH'),
                          tags=dict(datetime='2021-07-21T08:40:10'), **place)
        layouts.write_tif(root/'S2L2A'/f'c{x}.tif', layouts.optical(i, size), tags=dict(datetime='2021-08-23T13:22:41'),
                          **place)
    return root

@pytest.mark.parametrize('step', ['gac.data.splits.note_attributes', 'gac.data.table.write_table'])
def test_a_split_that_was_cut_short_is_made_by_the_next_call(tmp_path, monkeypatch, step):
    "It is not taken for a split that came with the tiles."
    convert(chips_at(tmp_path/'c', range(0, 60, 5)), tmp_path/'s', size=32)
    def stop(*args, **more): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        swap(m, *step.rsplit('.', 1), stop)
        with pytest.raises(KeyboardInterrupt): split_store(tmp_path/'s', SplitRule('place', guard=1.))
    assert split_store(tmp_path/'s', SplitRule('place', guard=1.)) == dict(train=8, val=2, test=2)
    assert Store(tmp_path/'s').attrs['split']['by'] == 'place'

def test_tiles_that_join_what_a_split_keeps_apart_are_taken_and_said(tmp_path, capsys):
    "The conversion has gone well; that the split has to be made again is a line of its report."
    convert(chips_at(tmp_path/'c', range(0, 30, 5)), tmp_path/'s', size=32)
    split_store(tmp_path/'s', SplitRule('place'))
    report = convert(chips_at(tmp_path/'d', (2.5, 7.5, 12.5, 17.5, 22.5)), tmp_path/'s', size=32, append=True)
    assert report.status.tolist() == ['ok']*5
    said = capsys.readouterr().out
    assert f'tiles came since it was made: gac data split {tmp_path/"s"} again before you train or test' in said

def test_tiles_of_one_place_have_no_guard_distance_to_make_smaller(tmp_path):
    convert(layouts.npz(tmp_path/'c', 6, lambda i: dict(lon=10., lat=50.)), tmp_path/'s')
    with pytest.raises(GacError, match='overlaps one of val or test, so all are of one place') as e:
        split_store(tmp_path/'s', SplitRule('random'))
    assert '--guard' not in str(e.value)
    with pytest.raises(GacError, match='--guard nan'): SplitRule(guard=float('nan'))
    with pytest.raises(GacError, match='--seed -1'): SplitRule(seed=-1)

def test_room_between_splits_is_that_of_their_edges():
    "Refuse overlap by edges: tiles of 1.2 km overlap on the diagonal though their centres are 1.3 km apart."
    km = 180/np.pi/EARTH
    table = lambda *at: pd.DataFrame(dict(split=['train', *['test']*(len(at) - 1)], lon=[x*km for x, _ in at],
                                          lat=[y*km for _, y in at]))
    assert split_room(table((0, 0), (.92, .92)))['train, test'] == pytest.approx(.92 - 1.2, abs=1e-4)
    assert split_room(table((0, 0), (2.5, 0), (1.9, 1.9)))['train, test'] == pytest.approx(1.9 - 1.2, abs=1e-3)

def test_a_split_with_few_tiles_to_train_on_says_so_and_what_it_dropped(tmp_path, capsys):
    convert(chips_at(tmp_path/'c', range(0, 60, 2)), tmp_path/'s', size=32)
    counts = split_store(tmp_path/'s', SplitRule('random', guard=3.))
    assert (counts['train'] < 10
            and f'train has {counts["train"]} tiles where 21 were asked for' in capsys.readouterr().out)
    Store(tmp_path/'s').ensure_array('opt_v2', (4, 32, 32), 'int16', dict(trained='feed'))
    split_store(tmp_path/'s', SplitRule('random', seed=3), overwrite=True)
    assert 'opt_v2 dropped. Train the stages that computed them again' in capsys.readouterr().out

def test_a_store_is_no_folder_above_its_tiles(tmp_path):
    layouts.npz(tmp_path/'all'/'my_tiles', 2)
    for above in ('all', 'all/my_tiles/..'):
        with pytest.raises(GacError, match='a folder above the tiles'):
            convert(tmp_path/'all'/'my_tiles', tmp_path/above)
    assert [p.name for p in (tmp_path/'all').iterdir()] == ['my_tiles']
    for _ in range(2): convert(tmp_path/'all'/'my_tiles', tmp_path/'all'/'my_tiles'/'store')
    assert len(Store(tmp_path/'all'/'my_tiles'/'store')) == 2

def test_advice_on_another_radar_product_can_be_followed(tmp_path):
    convert(layouts.geotiff(tmp_path/'a', 1, dem=False), tmp_path/'s')
    with pytest.raises(GacError, match='one store is of one product. Choose another store') as e:
        convert(layouts.geotiff(tmp_path/'b', 1, product='S1RTC', dem=False), tmp_path/'s', append=True)
    assert '--s1-product' not in str(e.value), 'the name of the folder says it'

def test_a_place_that_cannot_be_written_to_is_refused_before_tiles_are_read(tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    layouts.npz(tmp_path/'c', 1)
    swap(monkeypatch, 'gac.data.convert', '_loaded', lambda job: pytest.fail('tiles were read'))
    with pytest.raises(GacError, match=f'{tmp_path/"file"}: cannot be written to'):
        convert(tmp_path/'c', tmp_path/'file'/'deep'/'s')
    with monkeypatch.context() as m:
        def shut(dir): raise PermissionError(13, 'Permission denied', str(dir))
        m.setattr(tempfile, 'TemporaryFile', shut)
        with pytest.raises(GacError, match=f'{tmp_path}: cannot be written to .Permission denied'):
            convert(tmp_path/'c', tmp_path/'new'/'s')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['c', 'file'], 'nothing is left'

def test_radar_arrays_that_are_named_are_never_taken_for_swapped(tmp_path):
    "Wet snow or a double bounce may be brighter in VH; where arrays are named, their order is no question."
    vv, vh = layouts.radar(0)
    src = layouts.npz(tmp_path/'npz', 1, s1=None, s1_vv=vh, s1_vh=vv)
    assert convert(src, tmp_path/'store')['status'].tolist() == ['ok']
    np.testing.assert_allclose(Store(tmp_path/'store').read('s1', [0])[0], [vh, vv], atol=1e-3)
