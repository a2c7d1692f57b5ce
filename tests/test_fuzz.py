"Readers of changed bytes and odd structures raise no error but the project's own."
import io
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from hypothesis.extra import numpy as sn
from safetensors.numpy import save_file

from gac.core.files import GacError, read_json
from gac.core.parameters import Parameter, check_value, notebook_parameters
from gac.core.tensors import read_torch
from gac.core.vocabulary import OPT_BANDS
from gac.data.arrays import tile_arrays
from gac.data.bigearthnet import read_bigearthnet
from gac.data.convert import _loaded
from gac.data.dates import parse_date
from gac.data.journal import read_journal
from gac.data.layouts import READERS
from gac.data.places import read_ecoregions
from gac.data.readers import Options
from gac.data.records import DatasetUnits, records_of
from gac.data.store import Store
from gac.data.table import COLUMNS, check_id
from gac.models.weights import read_weights
from gac.nyc.chips import Chips, finish
from gac.products.scene import open_scene
from gac.products.tiles import tile_file_name
from gac.runner.profiles import check_parameters, load_profile
from gac.stages.inference import radar_in, read_images
from gac.training.checkpoints import load_checkpoint, save_checkpoint
from gac.training.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
import tiles_layouts as layouts
import tiles_writer as writer

pytestmark = [pytest.mark.filterwarnings('ignore')]
CASES = pytest.mark.parametrize('cases', [12, pytest.param(int(os.environ.get('GAC_FUZZ_CASES') or 3000),
                                                           marks=pytest.mark.slow)])

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)

def anything(cases:int, strategy, check) -> None:
    "Call check with so many examples of a strategy, the same ones every time."
    @settings(max_examples=cases, deadline=None, database=None, derandomize=cases < 100,
              suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
    @given(strategy)
    def check_all(example): check(example)
    check_all()

def tried(f, *args):
    "Return the result of a reader, or None if it refuses; any other error is a failure."
    try: return f(*args)
    except GacError as e:
        assert len(str(e)) > 10
        return None

def spoilt(good:bytes):
    "Bytes of a file, changed in a few places, cut short, or something else altogether."
    n = len(good)
    one = st.tuples(st.sampled_from(('put', 'cut', 'drop', 'insert', 'zero', 'copy')), st.integers(0, max(n - 1, 0)),
                    st.integers(0, max(n - 1, 0)), st.binary(min_size=1, max_size=9))
    def change(edits):
        x = good
        for kind, i, j, some in edits:
            if kind == 'put': x = x[:i] + some + x[i + len(some):]
            elif kind == 'cut': x = x[:i]
            elif kind == 'drop': x = x[:i] + x[i + len(some):]
            elif kind == 'insert': x = x[:i] + some + x[i:]
            elif kind == 'zero': x = x[:i] + bytes(min(64, max(0, len(x) - i))) + x[i + 64:]
            else: x = x[:i] + x[j:j + 64] + x[i + 64:]
        return x
    return st.one_of(st.lists(one, min_size=1, max_size=4).map(change), st.binary(max_size=64))

# ---- bytes -----------------------------------------------------------------------------------------------------------
# --------------------

def load(layout, src, opt=Options(size=40)):
    "Every tile of a data set, as conversion reads it."
    arrays = {n: (shape, dtype, *rest) for n, (shape, dtype, *rest) in tile_arrays(40, OPT_BANDS, ()).items()}
    for job in READERS[layout](src, opt):
        source = tried(_loaded, job)
        if source is not None: tried(lambda: list(records_of(source, DatasetUnits('dB', 'dn', 0, False), opt, arrays)))

def torch_bytes(x) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()

def read_chain(folder):
    stages = {'00_x': notebook_parameters(folder/'00_x.ipynb')}
    return check_parameters(stages, load_profile('toy', folder))

def whole_store(path): return Store(path).read('s1', slice(None))

def journalled(path:Path) -> None:
    "Write a batch as an earlier version journalled it."
    (path/'journal').mkdir(parents=True)
    save_file(dict(rows=np.arange(3), s1=np.ones((3, 2, 4, 4), 'f4')),
              path/'journal'/'tiles.0of1.000000000.0-2.safetensors',
              dict(table=json.dumps([dict(id=f't{i}') for i in range(3)])))

def notebook(path:Path) -> Path:
    cell = dict(cell_type='code', source='k: int = 3  # a number [1, 9]\nname: str = "a"  # one of {a, b}\n',
                metadata=dict(tags=['parameters']))
    path.write_text(json.dumps(dict(cells=[cell])))
    return path

def city(folder:Path) -> Path:
    "Make the tables of a data set of chips."
    chips = pd.DataFrame([dict(id=f'c{i}', top=0, left=90*i, split=s, files={})
                          for i, s in enumerate(('train', 'val', 'test'))])
    finish(folder, chips, dict(size=48, crs='EPSG:32618', days=['2021-07-18']))
    return folder

PROFILE = 'description: a toy\nneeds: {gpu: 1}\n00_x: {k: 4}\ncommon:\n  name: b\n'
ECOREGIONS = dict(type='FeatureCollection', features=[
    dict(type='Feature', properties=dict(BIOME=4), geometry=dict(type='Point', coordinates=[5, 50]))])
FILES = {  # name -> (what makes it in a folder, the file that is changed, the reader of the folder)
    'GeoTIFF': (lambda d: layouts.geotiff(d, 1, 40, dem=False), 'S2L2A/a0.tif', partial(load, 'geotiff')),
    'NPZ': (lambda d: np.savez(d/'n.npz', s1=layouts.radar(0, 40), s2=layouts.optical(0, 40, 4), month=3, id='t'),
            'n.npz', partial(load, 'npz')),
    'tortilla': (lambda d: layouts.benv2(d/'b.tortilla', 1), 'b.tortilla', partial(load, 'benv2')),
    'table of BigEarthNet': (lambda d: layouts.bigearthnet(d, 1), 'metadata.parquet',
                             lambda d: read_bigearthnet(d, Options())),
    'table of a store': (writer.work, 'table.parquet', whole_store),
    'zarr.json of a store': (writer.work, 'arrays/zarr.json', whole_store),
    'zarr.json of an array': (writer.work, 'arrays/s1/zarr.json', whole_store),
    'shard': (writer.work, 'arrays/s1/c/1/0/0/0', whole_store),
    'journal': (journalled, 'journal/tiles.0of1.000000000.0-2.safetensors', read_journal),
    'Torch file': (lambda d: (d/'x.pt').write_bytes(torch_bytes(dict(s1=torch.zeros(1, 2, 9, 9), n=3, s='x'))), 'x.pt',
                   lambda d: read_torch(d/'x.pt')),
    'safetensors': (lambda d: save_checkpoint(d/'x.safetensors', dict(a=torch.zeros(3, 3)), 'toy'), 'x.safetensors',
                    lambda d: load_checkpoint(d/'x.safetensors', 'toy')),
    'weights': (lambda d: (d/'x.pt').write_bytes(torch_bytes(dict(a=torch.zeros(3)))), 'x.pt',
                lambda d: read_weights(d/'x.pt')),
    'profile': (lambda d: (notebook(d/'00_x.ipynb'), (d/'toy.yaml').write_text(PROFILE)), 'toy.yaml', read_chain),
    'notebook': (lambda d: (notebook(d/'00_x.ipynb'), (d/'toy.yaml').write_text('description: a toy\n00_x: {k: 4}\n')),
                 '00_x.ipynb', read_chain),
    'state of the chain': (lambda d: (d/'chain.json').write_text('{"00_x": {"key": "a", "seconds": 3}}'), 'chain.json',
                           lambda d: read_json(d/'chain.json').get('00_x')),
    'scene': (lambda d: layouts.write_tif(d/'s.tif', layouts.radar(0, 60), names=('VV', 'VH')), 's.tif',
              lambda d: open_scene(d/'s.tif').read(0, 0, 60, 60)),
    'images in NPZ': (lambda d: np.savez(d/'n.npz', s1=layouts.radar(0, 9)), 'n.npz',
                      lambda d: radar_in(read_images(d/'n.npz'), 'n.npz')),
    'images in a Torch file': (lambda d: (d/'x.pt').write_bytes(torch_bytes(torch.zeros(1, 2, 9, 9))), 'x.pt',
                               lambda d: radar_in(read_images(d/'x.pt'), 'x.pt')),
    'manifest of chips': (city, 'manifest.json', Chips),
    'table of chips': (city, 'chips.csv', Chips),
    'map of ecoregions': (lambda d: (d/'e.geojson').write_text(json.dumps(ECOREGIONS)), 'e.geojson',
                          lambda d: read_ecoregions(d/'e.geojson')),
}

@CASES
@pytest.mark.parametrize('name', FILES)
def test_bytes(name, cases, tmp_path):
    make, file, read = FILES[name]
    folder = tmp_path/'there'
    if name not in ('table of a store', 'zarr.json of a store', 'zarr.json of an array', 'shard', 'journal'):
        folder.mkdir()
    make(folder)
    path = folder/file
    good = path.read_bytes()
    read(folder)  # as it is, it can be read
    def check(content):
        path.write_bytes(content)
        tried(read, folder)
        assert sorted(p.name for p in tmp_path.iterdir()) == ['there']
    anything(cases, spoilt(good), check)

# ---- structures ----

plain = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-10**400, 10**400), st.floats(),
                               st.text(max_size=9), st.dates(), st.binary(max_size=4)),
                     lambda inner: st.one_of(st.lists(inner, max_size=3),
                                             st.dictionaries(st.text(max_size=5), inner, max_size=3)),
                     max_leaves=5)
KINDS = ('int', 'float', 'str', 'bool', 'list', 'list[int]', 'list[float]', 'tuple[str, ...]', 'dict', 'int | None',
         'float | None')

@CASES
def test_values_of_parameters(cases):
    limits = st.sampled_from([{}, dict(low=0., high=9.), dict(choices=('a', 'b'))])
    def check(args):
        kind, value, more = args
        got = tried(check_value, Parameter('k', kind, None, 'a number', **more), value, 'toy.yaml')
        if got is not None and more and isinstance(got, (int, float)): assert 0 <= got <= 9 or 'choices' in more
    anything(cases*4, st.tuples(st.sampled_from(KINDS), plain, limits), check)

@CASES
def test_profiles_of_any_structure(cases, tmp_path):
    stages = {'00_x': {'k': Parameter('k', 'int', 3), 'profile': Parameter('profile', 'str', '')}}
    def check(sections):
        (tmp_path/'toy.yaml').write_text(json.dumps(dict(description='a toy') | sections, default=str))
        tried(lambda: check_parameters(stages, load_profile('toy', tmp_path)))
    anything(cases,
             st.dictionaries(st.sampled_from(('common', '00_x', '00_y', '')),
                             st.one_of(plain, st.dictionaries(st.sampled_from(('k', 'profile', 'z')), plain)),
                             max_size=3),
             check)

@CASES
def test_settings_of_a_training(cases):
    names = st.sampled_from(list(Settings.__dataclass_fields__))
    anything(cases*2, st.dictionaries(names, plain, max_size=3), lambda some: tried(lambda: Settings(**some).steps(9)))

@CASES
def test_dates_and_ids(cases, tmp_path):
    def check(text):
        date = parse_date(text)
        assert date == '' or 1 <= int(date[5:7]) <= 12
        if (name := tried(check_id, text)):
            assert (tmp_path/f'{name}.tif').resolve().parent == tmp_path.resolve() and tile_file_name(name)
    anything(cases*4, st.one_of(st.text(max_size=30), st.from_regex(r'[0-9T:._/\\-]{1,30}'),
                                st.sampled_from(('..', '.', 'a/../b', 'a\n', 'con', 'a\0b', '~', '-rf'))), check)

@CASES
def test_arrays_of_any_type_and_shape(cases, tmp_path):
    kinds = st.one_of(*(st.just(np.dtype(k))
                        for k in ('u1', 'i2', 'u2', 'i8', 'f4', 'f8', 'f2', 'c8', '?', 'U3', 'S3', 'M8[s]')))
    array = kinds.flatmap(lambda k: sn.arrays(k,
                                              st.one_of(sn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
                                                        st.sampled_from([(2, 40, 40), (4, 40, 40), (1, 12, 40, 40)]))))
    def check(arrays):
        np.savez(tmp_path/'n.npz', **arrays)
        load('npz', tmp_path/'n.npz')
        if 's1' in arrays or 's1_vv' in arrays: tried(lambda: radar_in(read_images(tmp_path/'n.npz'), 'n.npz'))
    anything(cases*2,
             st.dictionaries(st.sampled_from(('s1', 's1_vv', 's1_vh', 's2', 'id', 'month', 'transform', 'crs', 'lulc',
                                              'lon', 'date', 'split')),
                             array, max_size=5),
             check)

@CASES
def test_facts_about_a_tile(cases, tmp_path):
    "Whatever a record says, the store takes it and gives it back, or refuses it and goes on."
    path, n = tmp_path/'s', [0]
    with Store.create(path, writer.ARRAYS, shard=4) as store:
        def check(facts):
            before = len(store)
            tried(store.append, [writer.record(n[0] % 90) | dict(id=f'i{n[0]}') | facts])
            n[0] += 1
            assert len(store.table) == len(store) in (before, before + 1)
        anything(cases, st.dictionaries(st.sampled_from((*COLUMNS, 'more', 's1', 's2')), plain, max_size=2), check)
    assert len(Store(path).read('s1', slice(None))) == len(store)
