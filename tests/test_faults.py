"Faults of disks, files and processes: nothing is lost, and the message names the file and the remedy."
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from odc.geo.geobox import GeoBox
from swapping import swap

from gac.core.files import GacError
from gac.core.parameters import read_notebook
from gac.core.run import start_run
from gac.core.tensors import read_safetensors, read_torch
from gac.core.vocabulary import OPT_BANDS
from gac.data.arrays import to_dn, to_reflectance
from gac.data.convert import convert
from gac.data.store import Store
from gac.data.stores import from_world
from gac.measure.tables import stored_method
from gac.nyc import chips
from gac.nyc.chips import save_geotiff
from gac.nyc.thoughts import anywhere_grid
from gac.products.cog import write_cog
from gac.products.infer import infer_scene
from gac.products.tiles import export_tiles
from gac.products.tiling import Tiling
from gac.runner.chain import run_chain
from gac.stages.datasets import Pairs, Triples
from gac.stages.grounding import build_stage3_model
from gac.stages.refiner import build_prithvi_refiner
from gac.stages.stage1 import build_terramind_generator, precompute_stage1
from gac.stages.stage2 import train_stage2
from gac.stages.stage3 import GroundingTraining, train_stage3
from gac.stages.tileset import derived_store
from gac.training.fit import export_best, fit_model
from gac.training.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
import export_chains as chains
import faults_disk as faults
import tiles_layouts as layouts

BRIEF = Settings(lr=1e-3, max_steps=8, batch_size=2, grad_accum_steps=1, val_every=2, save_every=2,
                 early_stopping=False, log_every=1, warmup=0., accelerator='cpu')
SMALL = dict(width=16, depth=1)

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)

@pytest.fixture(scope='module')
def given(tmp_path_factory) -> types.SimpleNamespace:
    "Make the inputs of the writers: tiles with the images of the first stages, models, files of every layout."
    home = tmp_path_factory.mktemp('given')
    store = from_world(home/'tiles', 4, 2, 2, size=48, shard=4)
    dim = to_dn(to_reflectance(store.read('s2', slice(None), OPT_BANDS))*.8 + .02)
    for name in ('opt_v1', 'opt_v2'):
        store.ensure_array(name, dim.shape[1:], 'int16', dict(bands=list(OPT_BANDS), model=name, seed=0))
        with store: store.write(name, slice(None), dim)
    scene = layouts.write_tif(home/'scene.tif', np.tile(layouts.radar(0, 60), (1, 2, 2)), names=('VV', 'VH'))
    return types.SimpleNamespace(home=home, store=store, scene=scene, npz=layouts.npz(home/'npz', 3),
                                 generator=build_terramind_generator(), toys=toys(home/'toys'))

def toys(folder:Path) -> Path:
    "Make a chain of two notebooks without prose."
    head = ("profile: str = 'toy'  # name\nseed: int = 0  # seed\nrun_dir: str = ''  # artefacts\nreports_dir: "
            "str = ''  # report\ndata: str = ''  # tiles")
    cell = lambda source, *tags: dict(cell_type='code', metadata=dict(tags=list(tags)), source=source, outputs=[],
                                      execution_count=None, id=f'c{len(source)}')
    (folder/'params').mkdir(parents=True)
    (folder/'params'/'toy.yaml').write_text('description: a toy\n')
    for name in ('00_first', '01_second'):
        open_run = f"from gac.core.run import Run\nrun = Run.open('{name}', profile, seed, run_dir, reports_dir, data)"
        table = (f"import pandas as pd\nrun.save_table(pd.DataFrame({{'x': range(300)}}), 'table_{name}', "
                 f"'Rows.')\nrun.artefact('{name}.bin').write_bytes(bytes(9999))")
        (folder/f'{name}.ipynb').write_text(json.dumps(dict(cells=[cell(head, 'parameters'), cell(open_run),
                                                                   cell(table)],
                                                            metadata={}, nbformat=4, nbformat_minor=5)))
    return folder

def in_this_process(source, to, values, **_) -> None:
    "Execute a notebook as papermill does, without a kernel."
    space, cells = dict(values), read_notebook(source)['cells'][1:]
    for cell in cells: exec(cell['source'], space)
    Path(to).write_text(Path(source).read_text())

# ---- the writers: each is called with a folder, and again to go on
# --------------------------------------------------------------------

def write_report(at, given):
    import papermill
    with pytest.MonkeyPatch.context() as m:
        m.setattr(papermill, 'execute_notebook', in_this_process)
        run_chain('toy', nbs=given.toys, reports=at/'report', runs=at/'run')

def write_figures(at, given):
    import matplotlib.pyplot as plt
    run = start_run('00_toy', 'toy', 0, str(at/'run'), str(at/'report'))
    run.save_table(pd.DataFrame(dict(x=range(900))), 'table')
    fig, ax = plt.subplots()
    ax.imshow(np.random.default_rng(0).random((90, 90)))
    run.save_figure(fig, 'figure')
    plt.close(fig)

def train(at, given):
    torch.manual_seed(0)
    model, data = torch.nn.Linear(64, 64), torch.utils.data.TensorDataset(torch.rand(8, 64))
    fit_model(model, lambda m, b: {'loss': m(b[0]).square().mean()}, data, data, BRIEF, at/'run', every=0)
    export_best(at/'run', at/'model.safetensors', 'toy')

def train2(at, given):
    sets = (Pairs(given.store, given.store.rows(s), stored_method(given.store)) for s in ('train', 'val'))
    train_stage2(build_prithvi_refiner(**SMALL), *sets, BRIEF, at, every=0)

def train3(at, given):
    sets = (Triples(given.store, given.store.rows(s), stored_method(given.store, 'opt_v2')) for s in ('train', 'val'))
    train_stage3(build_stage3_model(**SMALL, taps=2, lora_r=2), *sets, BRIEF, at,
                 how=GroundingTraining(.5, 24), every=0)

def write_chip(at, given):
    from affine import Affine
    r, box = np.random.default_rng(0), GeoBox((48, 48), Affine(10, 0, 6e5, 0, -10, 4.5e6), 'EPSG:32618')
    chips.write_chip(at, 'c0', box, r.uniform(1, 9e3, (1, 12, 48, 48)), r.normal(-12, 3, (1, 2, 48, 48)),
                   r.uniform(0, 99, (48, 48)), np.zeros((48, 48), int), ['2021-07-18'])

def precompute(at, given):
    precompute_stage1(given.store, given.generator, into=derived_store(given.store, at/'stages'), timesteps=1,
                      tokens='expected', batch_size=2)

WRITERS = {
    'procedural tiles': lambda at, given: from_world(at/'tiles', 4, 1, 1, size=32, batch=2, shard=4),
    'converted tiles': lambda at, given: convert(given.npz, at/'tiles', size=60, batch=2),
    'images of Stage 1': precompute,
    'tables and figures': write_figures,
    'checkpoints': train,
    'Stage 2': train2,
    'Stage 3': train3,
    'GeoTIFFs of tiles': lambda at, given: export_tiles(given.store, at/'tif', ('s1', 'opt_v1')),
    'GeoTIFF of a scene': lambda at, given: infer_scene(given.scene, at/'scene.tif', chains.Grey(),
                                                               Tiling(48, 16, 96)),
    'chip of New York': write_chip,
    'chain and report': write_report,
}
# hold a date or a duration
TIMED = ('provenance.json', 'index.html', 'chain.json', 'chain.lock', 'refiner.json', 'grounding.json',
         'model.json')

def content(folder:Path) -> dict:
    "Return the contents of a folder: bytes, tensors of checkpoints, and the names of files that hold a date."
    def of(path):
        if path.name in TIMED: return b''
        if path.suffix == '.safetensors': return {k: v.numpy().tobytes() for k, v in read_safetensors(path)[0].items()}
        if path.suffix == '.ckpt': return {k: v.numpy().tobytes() for k, v in read_torch(path)['state_dict'].items()}
        return path.read_bytes()
    files = sorted(p for p in folder.rglob('*') if p.is_file() and p.suffix != '.lock' and p.name != 'lock')
    return {p.relative_to(folder).as_posix(): of(p) for p in files if not p.name.startswith('.')}

def differences(a:dict, b:dict) -> set: return {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
def half_written(folder:Path) -> list:
    return [p.name for p in folder.rglob('*') if p.is_file() and (p.name.startswith('.') or '.part' in p.name)]

@pytest.fixture(scope='module')
def unbroken(given) -> dict:
    "Return what an undisturbed writer leaves, its size and the number of files that it renames."
    made = {}
    def of(name):
        if name not in made:
            folder = given.home/name
            folder.mkdir()
            moves = faults.moves(lambda: WRITERS[name](folder, given))
            made[name] = content(folder), sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()), moves
        return made[name]
    return of

@pytest.mark.parametrize('name', WRITERS)
def test_a_full_or_read_only_disk_is_told_and_loses_nothing(name, given, unbroken, tmp_path, monkeypatch):
    # it would refuse before anything is written
    swap(monkeypatch, 'gac.stages.tileset', 'disk_forecast', lambda *args: dict(need=0, free=0))
    write, (want, size, _) = WRITERS[name], unbroken(name)
    held = []  # as a notebook holds the last error, and with it the store that was being written
    def refused(disk):
        with pytest.raises(GacError, match='cannot be written') as e: write(disk.folder, given)
        assert (str(disk.folder) in str(e.value)
                and any(w in str(e.value) for w in ('Make room', 'Give another output', 'Is there room'))), e.value
        held.append(e)
    def work():
        shut = faults.Disk(tmp_path/'shut', 16384)
        shut.shut()
        refused(shut)
        for share in (0., .6):
            disk = faults.Disk(tmp_path/f'full{share}', max(4, int(share*size/1024)))
            refused(disk)
            assert not half_written(disk.folder), half_written(disk.folder)
            disk.change()  # room is made
            write(disk.folder, given)
            assert not differences(content(disk.folder), want), differences(content(disk.folder), want)
        disk.fill()
        try: write(disk.folder, given)  # again, though nothing can be written: what was there stays
        except GacError as e: assert 'cannot be written' in str(e)
        disk.change()
        assert not differences(content(disk.folder), want), differences(content(disk.folder), want)
    work.folder = tmp_path
    faults.with_disks(work)

def test_a_geotiff_is_whole_or_refused_however_full_the_disk_is(tmp_path):
    "GDAL itself says nothing where the room ends while it closes a small file."
    x, box = layouts.optical(0, 48, 4).astype('int16'), anywhere_grid(48)
    def work():
        disk, path, said = faults.Disk(tmp_path/'disk', 4), tmp_path/'disk'/'x.tif', 0
        for write in (lambda: write_cog(path, x), lambda: save_geotiff(path, x.astype('uint16'), box)):
            for kb in range(4, 40, 4):
                disk.change(kb)
                try: write()
                except GacError as e:
                    said += 'x.tif: cannot be written' in str(e)
                    assert not list(disk.folder.iterdir())
                else:
                    with rasterio.open(path) as f: np.testing.assert_array_equal(f.read(), x)
                    for p in disk.folder.iterdir(): p.unlink()  # the file, and the style beside it
        assert said >= 6
    work.folder = tmp_path
    faults.with_disks(work)

# precompute, Stage 2, tiles and GeoTIFFs: test_stage1, test_stage2, test_tiles, test_export
KILLED = ['converted tiles', 'Stage 3', 'chain and report', 'chip of New York']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
@pytest.mark.parametrize('name', KILLED)
def test_killed_at_any_file_it_goes_on_to_the_same_end(name, given, unbroken, tmp_path):
    write, (want, _, moves) = WRITERS[name], unbroken(name)
    for step in sorted({1, 2*moves//3, moves}):  # of Stage 3 the second is in the middle of a part
        folder = tmp_path/str(step)
        folder.mkdir()
        assert faults.killed(lambda: write(folder, given), step) == -signal.SIGKILL
        assert faults.forked(lambda: write(folder, given)) == 0
        assert not differences(content(folder), want), (step, differences(content(folder), want))

def test_a_command_on_a_full_disk_is_one_line(capsys, monkeypatch):
    import errno

    from gac.cli import main
    def full(*args, **kw): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'some/file')
    swap(monkeypatch, 'gac.runner.verify', 'verify', full)
    assert main(['verify']) == 2
    assert capsys.readouterr().err.startswith('gac: some/file: cannot be written (No space left on device). Make room')

# ---- files that were cut short, see test_fuzz for all the rest
# ------------------------------------------------------------------------

@pytest.mark.parametrize('file', ['table.parquet', 'arrays/zarr.json', 'arrays/s1/zarr.json', 'arrays/s1/c/0/0/0/0'])
def test_a_store_that_was_cut_short_names_the_file(given, tmp_path, file):
    path = shutil.copytree(given.store.path, tmp_path/'tiles')/file
    whole = path.read_bytes()
    for keep in (0, len(whole)//2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(GacError, match='(?i)damaged|cannot be read') as e:
            Store(tmp_path/'tiles').read('s1', slice(None))
        assert (path.name if file.startswith('t') else 'arrays') in str(e.value)
        assert ('estore' in str(e.value) or 'again' in str(e.value))
    path.unlink()
    with pytest.raises(GacError): Store(tmp_path/'tiles').read('s1', slice(None))
    path.write_bytes(whole)
    assert len(Store(tmp_path/'tiles').read('s1', slice(None))) == 8

def test_a_table_of_bigearthnet_that_was_cut_short_is_named(tmp_path):
    layouts.bigearthnet(tmp_path/'ben', 1)
    table = tmp_path/'ben'/'metadata.parquet'
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(GacError, match='metadata.parquet: cannot be read as Parquet.*fetch it again'):
        convert(tmp_path/'ben', tmp_path/'out')

# ---- tiles that show nothing or are scaled otherwise than their data set
# ------------------------------------------------------------------

RADAR, OPTICAL = layouts.radar(1), layouts.optical(1, count=4)
TILES = {'radar NaN in one pixel': (dict(s1=np.where(np.arange(120) == 7, np.nan, RADAR)),
                                    'Sentinel-1: 120 px are NaN'),
         'radar infinite': (dict(s1=RADAR*np.float32('inf')), 'Sentinel-1: 14400 px are NaN'),
         'radar all zero': (dict(s1=RADAR*0), 'Sentinel-1: VV or VH is one value everywhere'),
         'radar constant': (dict(s1=np.stack([RADAR[0], RADAR[1]*0 - 17])),
                            'Sentinel-1: VV or VH is one value everywhere'),
         'radar as power': (dict(s1=10**(RADAR/10)),
                            'fits linear, in a data set of dB. Convert it apart, or say --s1-units dB if it is'),
         'radar times 100': (dict(s1=RADAR*100), 'outside −100 to 60 dB'),
         'swapped': (dict(s1=RADAR[::-1]), 'look swapped. Say --s1-bands VH,VV'),
         'image NaN': (dict(s2=OPTICAL*np.nan), 'Sentinel-2: 14400 px are NaN'),
         'image infinite': (dict(s2=OPTICAL*np.inf), 'Sentinel-2: 14400 px are NaN'),
         'image all zero': (dict(s2=OPTICAL*0), 'Sentinel-2: 14400 px are 0 in every band'),
         'image constant': (dict(s2=OPTICAL*0 + 900), 'Sentinel-2: 900 everywhere'),
         'image as reflectance': (dict(s2=OPTICAL/1e4), 'no DN but reflectance? Say --s2-units'),
         'image times 100': (dict(s2=OPTICAL*100.), 'Sentinel-2 from 1.2e+04 to 3.999e+05'),
         'image with the offset': (dict(s2=OPTICAL + 1000), 'Convert n1 apart with --s2-offset 1000 or 0')}

@pytest.mark.parametrize('what', TILES)
@pytest.mark.filterwarnings('ignore:divide by zero', 'ignore:invalid value')
def test_a_tile_that_cannot_be_right_is_left_out_and_said(tmp_path, what):
    change, said = TILES[what]
    report = convert(layouts.npz(tmp_path/'npz', change=lambda i: change if i == 1 else {}), tmp_path/'out')
    assert report['status'].tolist() == ['ok', 'error', 'ok'] and said in report['reason'][1], report['reason'][1]
    assert Store(tmp_path/'out').table['id'].tolist() == ['n0', 'n2'] and 'n1.npz' in report['file'][1]

def test_a_training_on_values_that_are_not_finite_stops_at_once(tmp_path):
    data = torch.utils.data.TensorDataset(torch.full((4, 8), torch.nan))
    with pytest.raises(GacError, match='The loss is nan in step 0: inspect the batch, or lower lr'):
        fit_model(torch.nn.Linear(8, 8), lambda m, b: {'loss': m(b[0]).square().mean()}, data, None, BRIEF, tmp_path,
                  every=0)

# ---- the soak --------------------------------------------------------------------------------------------------------
# --------------------

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_soak_of_kills_at_random_moments(given, unbroken, tmp_path):
    "Repeated kills at random moments change neither arrays nor weights; GAC_SOAK_MINUTES, or 30 minutes."
    import random
    import threading
    import time
    until, rng, kills, rounds = (time.monotonic() + 60*float(os.environ.get('GAC_SOAK_MINUTES') or 30),
                                 random.Random(0), 0, 0)
    while rounds == 0 or time.monotonic() < until:
        for name in ('images of Stage 1', 'Stage 2', 'Stage 3', 'converted tiles'):
            folder, write, want = tmp_path/f'{rounds}'/name, WRITERS[name], unbroken(name)[0]
            folder.mkdir(parents=True)
            for patience in range(1, 99):  # seconds until the kill grow, so that it ends
                def doomed():
                    def die():
                        time.sleep(rng.uniform(0, .3*patience))
                        os.kill(os.getpid(), signal.SIGKILL)
                    threading.Thread(target=die, daemon=True).start()
                    write(folder, given)
                code = faults.forked(doomed)
                rng.random()
                assert code in (0, -signal.SIGKILL), (name, code)
                if code == 0: break
                kills += 1
            assert not differences(content(folder), want), (name, rounds, differences(content(folder), want))
            shutil.rmtree(folder)
        rounds += 1
    print(f'{kills} kills in {rounds} rounds')
    assert kills > 4*rounds
