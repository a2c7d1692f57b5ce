"Files a GIS opens, and scenes of any size: what comes out, what a stop leaves, what is refused."
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from swapping import swap

from gac.cli import main
from gac.core.config import InferConfig
from gac.core.files import GacError
from gac.core.vocabulary import OPT_BANDS
from gac.data.arrays import tile_arrays, to_dn
from gac.data.convert import convert
from gac.data.store import Store
from gac.evaluation.methods import grounder
from gac.measure.panels import white_of
from gac.models.decoding import Decoding
from gac.products.blocks import draw_block
from gac.products.chain import SceneChain, introduce
from gac.products.cog import NODATA, OPTICAL, cog_faults, write_cog
from gac.products.infer import SPREAD, _alone, infer_scene, scene_figure
from gac.products.infer_tiles import AS_DRAWN, decoding_for, generator_for, infer_tiles
from gac.products.scene import open_scene
from gac.products.seams import seam_excess
from gac.products.tiles import ProductReader, export_tiles
from gac.products.tiling import Tiling
from gac.stages.commands import keep_decoding
from gac.stages.grounding import build_stage3_model
from gac.stages.stage3_checkpoint import save_stage3
from gac.stages.tileset import derived_store, stage1_settings

sys.path.insert(0, str(Path(__file__).parent))
import export_chains as chains
import tiles_layouts as layouts

SMALL = Tiling(48, 16, 96)

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)

@pytest.fixture(scope='module')
def chain(): return SceneChain()

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "Three tiles with two stages."
    path = tmp_path_factory.mktemp('store')
    s = Store.create(path/'s', tile_arrays(48, extra=()), dict(s1_product='S1GRD'))
    s.append([dict(id=f't.{i}', s1=layouts.radar(i, 48), s2=layouts.optical(i, 48), crs='EPSG:32629',
                   transform=(10, 0, 6e5 + 480*i, 0, -10, 5.8e6), split=('train', 'test', 'test')[i],
                   date='2017-06-17T11:33:21', month=6) for i in range(3)])
    s.close()
    first = dict(model='terramind_mini_generate', weights={'TerraMind.safetensors': '0123456789abcdef'}, timesteps=1,
                 tokens='expected', clamp='off', n_samples=1, seed=5)
    for name, n, attrs in (('opt_v1', 3, first), ('opt_v2', 2,
                                                  dict(refiner=dict(backbone='prithvi_mini'),
                                                       weights={'Prithvi.safetensors': 'feed'}, trained='beef',
                                                       source=first))):
        s.ensure_array(name, (4, 48, 48), 'int16', dict(bands=list(OPT_BANDS), **attrs))
        s.write(name, np.arange(n), np.stack([layouts.optical(10 + i, 48, 4).astype('int16') for i in range(n)]))
        s.close()
    return s

def scene(path:Path, h=130, w=170, change=lambda x: x, names=('VV', 'VH'), crs='EPSG:32633', pixel=10.,
          dated='2021-07-14T05:12:00', **more) -> Path:
    "Write a Sentinel-1 GeoTIFF in small blocks."
    r = np.random.default_rng(3)
    x = change(np.stack([r.normal(-11, 2, (h, w)), r.normal(-17.5, 2, (h, w))]).astype('float32'))
    return layouts.write_tif(path, x, crs, pixel, names=[n or '' for n in names], tags=dict(datetime=dated) if dated
                             else {},
                             tiled=True, blockxsize=64, blockysize=64, **more)

# ---- gac export -----------------------------------------------------------------------------------

def test_every_product_comes_back_from_its_file(store, tmp_path):
    report = export_tiles(store, tmp_path)
    # opt_v2 of the last tile was never made, nor its error
    assert report | dict(output='') == dict(written=13, skipped=0, missing=2, output='')
    truth = store.read('s2', [1], OPT_BANDS)[0].astype(int)
    want = dict(s1=store.read('s1', [1])[0], truth=truth, error=store.read('opt_v2', [1])[0] - truth,
                **{k: store.read(k, [1])[0] for k in ('opt_v1', 'opt_v2')})
    for product, values in want.items():
        path = tmp_path/product/'t.1.tif'
        assert cog_faults(path) == []
        with rasterio.open(path) as f:
            np.testing.assert_array_equal(f.read(), values)
            assert f.crs.to_string() == 'EPSG:32629' and tuple(f.transform)[:6] == (10, 0, 6e5 + 480, 0, -10, 5.8e6)
            if product == 's1':
                assert f.descriptions == ('VV', 'VH') and set(f.units) == {'dB'}
                assert np.isnan(f.nodata) and f.dtypes == ('float32',)*2
            else: assert f.scales == (1e-4,)*4 and set(f.units) == {'reflectance'} and f.nodata == NODATA
            if product == 'opt_v2':
                assert [(d, c.name) for d, c in zip(f.descriptions, f.colorinterp)] == [('B02', 'blue'),
                    ('B03', 'green'), ('B04', 'red'), ('B08', 'nir')]
                tags, stats = f.tags(), f.tags(3)
                assert (tags['GAC_ID'], tags['GAC_SPLIT'], tags['GAC_SEED'], tags['GAC_TRAINED']) == ('t.1', 'test',
                    '5', 'beef')
                assert (tags['GAC_MODEL'] == 'terramind_mini_generate > prithvi_mini'
                        and tags['GAC_DECODING'] == 'expected code, 1 step, no clamp')
                assert json.loads(tags['GAC_WEIGHTS']) == {'TerraMind.safetensors': '0123456789abcdef',
                                                           'Prithvi.safetensors': 'feed'}
                assert [s['weights']
                        for s in json.loads(tags['GAC_PROVENANCE'])] == [{'TerraMind.safetensors': '0123456789abcdef'},
                            {'Prithvi.safetensors': 'feed'}]
                assert tags['TIFFTAG_DATETIME'] == '2017:06:17 11:33:21'
                assert float(stats['STATISTICS_MAXIMUM']) == values[2].max()

def shown(path:Path) -> tuple: # kind, bands, (low, high) of each
    "Read the style beside a file."
    from xml.etree import ElementTree
    r = ElementTree.parse(path.with_suffix('.qml')).find('pipe/rasterrenderer')
    stretches = [(float(e.find('minValue').text), float(e.find('maxValue').text))
                 for e in r if e.tag.lower().endswith('contrastenhancement')]
    assert all(e.find('algorithm').text == 'StretchToMinimumMaximum' for e in r
               if e.tag.lower().endswith('contrastenhancement'))
    return r.get('type'), {k.removesuffix('Band'): int(v) for k, v in r.attrib.items() if k.endswith('Band')
                           and k != 'alphaBand'}, stretches

def test_every_file_has_a_style_of_true_colours(store, tmp_path):
    "QGIS shows bands 1, 2, 3 as red, green, blue, unless a style file of the same name says otherwise."
    export_tiles(store, tmp_path, ids=['t.1'])
    assert {p.with_suffix('.qml').name for p in tmp_path.rglob('*.tif')} == {p.name
        for p in tmp_path.rglob('*.qml')} == {'t.1.qml'}
    for product in ('truth', 'opt_v1', 'opt_v2', 'error'):
        kind, bands, stretches = shown(tmp_path/product/'t.1.tif')
        with rasterio.open(tmp_path/product/'t.1.tif') as f:
            assert (kind, {k: f.descriptions[i - 1].split()[0]
                           for k, i in bands.items()}) == ('multibandcolor', dict(red='B04', green='B03', blue='B02'))
            x = f.read([3, 2, 1])*1e-4
        # as the picture beside it
        low, high = np.percentile(x, (2, 98)) if product == 'error' else (0, white_of(x[None]))
        if product == 'error': low, high = -max(-low, high), max(-low, high)  # no error is mid-grey
        np.testing.assert_allclose(stretches, [(low, high)]*3, rtol=1e-3)
    kind, bands, stretches = shown(tmp_path/'s1'/'t.1.tif')
    assert (kind, bands) == ('singlebandgray', dict(gray=1))
    np.testing.assert_allclose(stretches, [np.percentile(store.read('s1', [1])[0, 0], (2, 98))], rtol=1e-3)

def test_a_style_survives_files_without_data_and_goes_with_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    layer = dataclasses.replace(OPTICAL, bands=(*OPT_BANDS, SPREAD))
    x = np.full((5, 48, 48), NODATA, 'int16')
    assert shown(write_cog(tmp_path/'empty.tif', x, layer)) == ('multibandcolor', dict(red=3, green=2, blue=1),
                                                                [(0, 1)]*3)
    x[:, 9:] = 700
    low, high = shown(write_cog(tmp_path/'flat.tif', x, layer))[2][0]
    assert (low, high) == (0, .1)  # a dull scene stays dull
    replace = os.replace
    def full(src, dst):
        if str(dst).endswith('.tif'): raise OSError(28, 'No space left on device')
        return replace(src, dst)
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(GacError, match='x.tif: cannot be written'): write_cog(tmp_path/'x.tif', x, layer)
    assert not list(tmp_path.glob('*x.*'))

def test_export_goes_on_where_it_was(store, tmp_path, monkeypatch):
    write, count = write_cog, [0]
    def stops(*args):
        count[0] += 1
        if count[0] == 4: raise KeyboardInterrupt
        return write(*args)
    swap(monkeypatch, 'gac.products.cog', 'write_cog', stops)
    with pytest.raises(KeyboardInterrupt): export_tiles(store, tmp_path/'a', ('s1', 'opt_v1'))
    monkeypatch.undo()
    damaged = tmp_path/'a'/'s1'/'t.0.tif'
    damaged.write_bytes(damaged.read_bytes()[:-3000])
    for end in ('tif', 'qml'):
        (tmp_path/'a'/'s1'/f'.t.1.tif.{socket.gethostname()}-{2**22 + 1}.{end}').write_bytes(b'of a process that was '
                                                                                             b'killed')
    # three that were left, one that was damaged
    assert export_tiles(store, tmp_path/'a', ('s1', 'opt_v1'))['written'] == 4
    export_tiles(store, tmp_path/'b', ('s1', 'opt_v1'))
    tree = lambda d: {p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob('*') if p.is_file()}
    assert tree(tmp_path/'a') == tree(tmp_path/'b')  # and nothing half-written lies about

def test_another_model_does_not_overwrite(store, tmp_path):
    other = derived_store(store, tmp_path/'other')
    other.ensure_array('opt_v1', (4, 48, 48), 'int16', dict(bands=list(OPT_BANDS), model='another', seed=5))
    other.write('opt_v1', [0, 1, 2], np.zeros((3, 4, 48, 48), 'int16'))
    other.close()
    export_tiles(store, tmp_path/'out', ('opt_v1',))
    reader = ProductReader
    with pytest.MonkeyPatch.context() as m:
        swap(m, 'gac.products.tiles', 'ProductReader', lambda store, stages: reader(other if stages else store))
        with pytest.raises(GacError, match='opt_v1.t.0.tif was computed by another model.*--overwrite'):
            export_tiles(store, tmp_path/'out', ('opt_v1',), [other])
    with rasterio.open(tmp_path/'out'/'opt_v1'/'t.0.tif') as f:
        assert f.tags()['GAC_MODEL'] == 'terramind_mini_generate'

def test_the_command_exports_stages_from_their_folder(store, tmp_path, capsys):
    other = derived_store(store, tmp_path/'other')
    other.ensure_array('opt_v3', (4, 48, 48), 'int16', dict(bands=list(OPT_BANDS),
                                                            model=dict(name='terramind_mini_generate'),
                                                            weights={}, trained='cafe',
                                                            source=dict(store.arrays['opt_v2'].attrs)))
    other.write('opt_v3', [0, 1], np.zeros((2, 4, 48, 48), 'int16'))
    other.close()
    assert main(['export', '--data-dir', str(store.path), '--stage3-dir', str(tmp_path/'other'), '--output-dir',
                     str(tmp_path/'out'), '--products', 'opt_v3,error', '--ids', 't.1']) == 0
    assert 'written 2' in capsys.readouterr().out and sorted(p.name
                                                             for p in (tmp_path/'out').rglob('*.tif')) == ['t.1.tif']*2
    with rasterio.open(tmp_path/'out'/'error'/'t.1.tif') as f:
        assert f.tags()['GAC_PRODUCT'] == 'opt_v3 less the truth' and f.tags()['GAC_TRAINED'] == 'beef > cafe'
        np.testing.assert_array_equal(f.read(), -store.read('s2', [1], OPT_BANDS)[0].astype(int))

@pytest.mark.parametrize('options, said', [(dict(products=('opt_v3',)), 'has no opt_v3 .*--stage3-dir'),
                                           (dict(products=('rgb',)), "product 'rgb'"),
                                           (dict(ids=['t.9']), 'no tile t.9'),
                                           (dict(split='val'), 'no tile in split val')])
def test_what_cannot_be_exported(store, tmp_path, options, said):
    with pytest.raises(GacError, match=said): export_tiles(store, tmp_path/'out', **options)

def test_an_id_leads_nowhere_else(store, tmp_path, monkeypatch):
    table = store.table.assign(id=['../../x', 't.1', 't.2'])
    monkeypatch.setattr(type(store), 'table', property(lambda self: table))
    with pytest.raises(GacError, match="Tile id '../../x'"): export_tiles(store, tmp_path/'out', ('s1',))
    assert not list(tmp_path.rglob('*.tif'))
    monkeypatch.setattr(type(store), 'table', property(lambda self: table.assign(id=['A', 'a', 'b'])))
    with pytest.raises(GacError, match='capitals alone'): export_tiles(store, tmp_path/'out', ('s1',))

def test_output_that_cannot_be_written(store, tmp_path):
    (tmp_path/'file').touch()
    source = scene(tmp_path/'s1.tif')
    for call in (lambda: export_tiles(store, tmp_path/'file'/'below'),
                 lambda: infer_scene(source, tmp_path/'file'/'o.tif', chains.Grey(), SMALL),
                 lambda: infer_tiles(store.path, tmp_path/'file', chains.of)):
        with pytest.raises(GacError, match='cannot be written to .*Give another output'): call()
    if os.name == 'posix' and os.geteuid():
        (tmp_path/'locked').mkdir(mode=0o500)
        with pytest.raises(GacError, match='locked.*cannot be written to'): export_tiles(store, tmp_path/'locked')

# ---- gac infer: scenes ----------------------------------------------------------------------------

def test_a_scene_keeps_its_place_and_its_holes(tmp_path):
    def holes(x):
        x[:, :20, :50] = -9999
        x[0, 100:, 60] = np.nan  # one band alone
        x[:, 40:44, 100:104] = 0
        return x
    report = infer_scene(scene(tmp_path/'s1.tif', change=holes, nodata=-9999), tmp_path/'o.tif', chains.Grey(), SMALL,
                         InferConfig(uncertainty=2, visualise=True))
    assert (report['blocks'] == 4 and report['month'] == 7 and cog_faults(tmp_path/'o.tif') == []
            and (tmp_path/'o.png').stat().st_size > 5000)
    with Image.open(tmp_path/'o.png') as picture: assert picture.width >= 1200  # px
    axes = scene_figure(open_scene(tmp_path/'s1.tif'), tmp_path/'o.tif').axes
    assert [ax.get_xlabel() for ax in axes[:4]] == ['km']*4 and all(ax.get_title() for ax in axes[:4])
    assert [ax.get_ylabel() for ax in axes[4:]] == ['reflectance of each band']*2 + ['reflectance']  # the scales
    missing = np.zeros((130, 170), bool)
    missing[:20, :50] = missing[100:, 60] = missing[40:44, 100:104] = True
    with rasterio.open(tmp_path/'o.tif') as f, rasterio.open(tmp_path/'s1.tif') as g:
        x = f.read()
        assert (f.crs, f.transform, f.shape, f.descriptions) == (g.crs, g.transform, g.shape, (*OPT_BANDS, 'spread'))
        assert (f.tags()['GAC_TILING'] == '{"block": 96, "margin": 0, "notch": false, "overlap": 16, "tile": 48}'
                and f.tags()['TIFFTAG_DATETIME'] == '2021:07:14 05:12:00')
    np.testing.assert_array_equal(x == NODATA, np.broadcast_to(missing, x.shape))
    assert ((x[:4, ~missing] >= 1500) & (x[:4, ~missing] <= 2500)).all() and (x[4, ~missing] > 0).any()

@pytest.mark.parametrize('h, w', [(30, 170), (48, 48), (5, 7)])
def test_a_scene_smaller_than_a_tile(tmp_path, h, w):
    infer_scene(scene(tmp_path/'s1.tif', h, w), tmp_path/'o.tif', chains.Grey(), SMALL)
    with rasterio.open(tmp_path/'o.tif') as f: assert f.shape == (h, w) and (f.read() > 1000).all()

def test_missing_pixels_change_only_the_tiles_they_are_in(tmp_path):
    whole, hole = (tmp_path/f'{n}.tif' for n in ('whole', 'hole'))
    def cut(x):
        x[:, 100:104, 4:9] = np.nan
        return x
    for path, change in ((whole, lambda x: x), (hole, cut)):
        infer_scene(scene(path, change=change), path.with_suffix('.o.tif'), chains.Mirror(), SMALL)
    a, b = (rasterio.open(p.with_suffix('.o.tif')).read() for p in (whole, hole))
    near = np.zeros((130, 170), bool)
    for r in SMALL.starts(130):
        for c in SMALL.starts(170):
            if r < 104 and r + 48 > 100 and c < 9 and c + 48 > 4: near[r:r + 48, c:c + 48] = True
    np.testing.assert_array_equal(a[:, ~near], b[:, ~near])
    assert (b[:, 100:104, 4:9] == NODATA).all() and (b != NODATA).sum() == b.size - 4*20
    there = b != NODATA
    # DN: the tile reads the nearest pixels instead, no marks of missing data
    assert 0 < np.abs(a[there].astype(int) - b[there]).max() <= 5

def test_units_and_bands_are_told_apart(tmp_path, capsys):
    made = {}
    for name, change, names in (('dB', lambda x: x, ('VV', 'VH')),
                                ('linear', lambda x: 10**(x[::-1]/10), ('Gamma0_VH', 'Gamma0_VV')),
                                ('amplitude', lambda x: 10**(x/20), (None, None))):
        source = scene(tmp_path/f'{name}.tif', change=change, names=names)
        assert open_scene(source).unit == name
        guessed = f'{source}: its radar bands have no names and are taken as VV, VH'
        assert (guessed in capsys.readouterr().out) == (names == (None, None))
        infer_scene(source, tmp_path/f'{name}.o.tif', chains.Mirror(), SMALL)
        made[name] = rasterio.open(tmp_path/f'{name}.o.tif').read().astype(int)
    assert all(np.abs(x - made['dB']).max() <= 1 for x in made.values())

def test_what_a_scene_does_not_tell_is_said(tmp_path, capsys):
    without = ('without a coordinate system, so its pixels are taken as 10 m and the biome as unknown (--biome)',
               'without a date, so the season is unknown to Stage 2 (--month)')
    told = {}
    for name, known in dict(all=dict(), none=dict(crs=None, dated='')).items():
        infer_scene(scene(tmp_path/f'{name}.tif', **known), tmp_path/f'{name}.o.tif', chains.Grey(), SMALL)
        told[name] = capsys.readouterr().out
    assert [[s in told[k] for s in without] for k in ('all', 'none')] == [[False]*2, [True]*2]
    infer_scene(tmp_path/'none.tif', tmp_path/'said.o.tif', chains.Grey(), SMALL, InferConfig(month=7))
    assert '--month' not in capsys.readouterr().out

@pytest.mark.parametrize('option, said', [('stage2', 'refiner.safetensors is missing: expected the output of gac '
                                                     'train-stage2'),
                                          ('stage3', 'grounding.safetensors is missing: '
                                                     'expected the output of gac train-stage3')])
def test_a_folder_without_a_checkpoint_says_what_makes_one(tmp_path, capsys, option, said):
    assert main(['infer', str(scene(tmp_path/'s1.tif')), str(tmp_path/'o.tif'), f'--{option}-checkpoint',
                 str(tmp_path)]) == 2
    assert said in capsys.readouterr().err

def test_stage1_draws_as_stage2_was_trained(tmp_path, capsys):
    "The decoding a training wrote down; another one is refused."
    for none, said in (('', False), (tmp_path, True)):
        assert decoding_for(none) == Decoding(1, 'expected')
        assert ('stage1.json is missing beside the checkpoints' in capsys.readouterr().out) == said
    assert str(decoding_for('', 3, 'argmax', 'off')) == 'argmax, 3 steps, no clamp'
    drawn = Decoding(4, 'sample', 'off', 2)
    file = keep_decoding(tmp_path, dict(asdict(drawn), model='another fact of the array'))
    capsys.readouterr()
    assert decoding_for(tmp_path) == decoding_for(tmp_path/'refiner.safetensors') == drawn
    assert decoding_for(tmp_path, 4, 'sample') == drawn and capsys.readouterr().out == ''
    for asked in (dict(timesteps=1), dict(tokens='argmax'), dict(clamp='pretraining')):
        with pytest.raises(GacError, match='trained on images of other sampling settings .*leave --'
                           + next(iter(asked))): decoding_for(tmp_path, **asked)
    for bad in ('{', '[]', '{"timesteps": 1}', json.dumps(asdict(drawn) | dict(timesteps='4'))):
        file.write_text(bad)
        with pytest.raises(GacError, match='stage1.json does not say how Stage 1 drew'): decoding_for(tmp_path)
    file.write_text(json.dumps(asdict(drawn) | dict(tokens='best')))
    with pytest.raises(GacError, match="stage1.json: tokens is 'best'"): decoding_for(tmp_path)
    assert keep_decoding(tmp_path, dict(model='another program')) is None and decoding_for(tmp_path) == Decoding(1,
        'expected')

def test_stage1_draws_with_the_generator_of_the_checkpoints(tmp_path, chain):
    "The generator, weights and precision that are written beside a checkpoint; another one is refused."
    made = stage1_settings(chain.generator, chain.decoding, 0)
    keep_decoding(tmp_path, made)
    name, drawn = generator_for(tmp_path)
    assert (name, drawn) == ('terramind_mini_generate', {k: made[k] for k in ('model', 'weights', 'precision')})
    assert generator_for('', '', '') == ('terramind_mini_generate', {}) and generator_for('', '', 'x') == ('x', {})
    with pytest.raises(GacError, match='--name terramind_v1_large_generate: .* trained on images of '
                                       'terramind_mini_generate. Leave --name out'):
        generator_for(tmp_path, '', 'terramind_v1_large_generate')
    keep_decoding(tmp_path, made | dict(model='terramind_v1_large_generate'))
    assert generator_for(tmp_path)[0] == 'terramind_v1_large_generate'  # never the miniature in its place
    keep_decoding(tmp_path, made | dict(decoder='direct'))
    with pytest.raises(GacError, match='--direct'): generator_for(tmp_path)
    SceneChain(drawn=drawn)
    with pytest.raises(GacError, match='trained on images drawn with x.pt .0123.*--weights'):
        SceneChain(drawn=drawn | dict(weights={'x.pt': '0123'}))
    assert SceneChain(drawn=drawn | dict(precision='bf16-true, compiled')).generator.precision == 'bf16-true'

WRONG = {'one band': (dict(change=lambda x: x[:1], names=()), 'gdal_merge.py -separate'),
         'three bands': (dict(change=lambda x: np.concatenate([x, x[:1]]), names=()), '3 bands without names'),
    'three with other names': (dict(change=lambda x: np.concatenate([x, x[:1]]), names=('red', 'green', 'blue')),
                               '3 bands with the names red, green, blue'),
    'HH and HV': (dict(names=('HH', 'HV')), 'bands HH, HV: expected VV and VH once each'),
    'swapped': (dict(change=lambda x: x[::-1], names=()), '--s1-bands VH,VV'),
    'degrees': (dict(crs='EPSG:4326', pixel=1e-4), 'counts in degrees.*gdalwarp'),
    '20 m': (dict(pixel=20.), '20 × 20 m.*gdalwarp'), 'counts': (dict(change=lambda x: (x + 500).astype('u2')),
                                                                 '--s1-units'),
    'nothing': (dict(change=lambda x: x*0), 'no pixel with data'),
    'unmarked': (dict(change=lambda x: np.where(np.arange(170) < 9, -9999, x).astype('f4')), 'gdal_edit.py -a_nodata'),
    'complex': (dict(change=lambda x: x.astype('complex64')), 'complex')}

@pytest.mark.parametrize('what', WRONG)
def test_scenes_that_are_refused(tmp_path, what):
    change, said = WRONG[what]
    source = scene(tmp_path/'s1.tif', **change)
    with pytest.raises(GacError, match=said) as e: infer_scene(source, tmp_path/'o.tif', chains.Grey(), SMALL)
    assert 's1.tif' in str(e.value) and not (tmp_path/'o.tif').exists()

def test_a_truncated_scene_says_so_and_keeps_what_is_drawn(tmp_path):
    whole = scene(tmp_path/'s1.tif', 300, 300).read_bytes()
    for cut in (200, len(whole)//2):
        (tmp_path/'s1.tif').write_bytes(whole[:cut])
        with pytest.raises(GacError, match='s1.tif: cannot be read .*Fetch or write it again'):
            infer_scene(tmp_path/'s1.tif', tmp_path/'o.tif', chains.Grey(), SMALL)
    assert not (tmp_path/'o.tif').exists()

def test_a_virtual_raster_cannot_read_other_files(tmp_path):
    (tmp_path/'s1.tif').write_text('<VRTDataset rasterXSize="9" '
                                   f'rasterYSize="9"><VRTRasterBand><SimpleSource><SourceFilename>{scene(tmp_path/"a.tif")}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>')
    with pytest.raises(GacError, match='Is it a GeoTIFF'): open_scene(tmp_path/'s1.tif')

def test_blocks_of_another_scene_or_model_are_refused(tmp_path):
    source = scene(tmp_path/'s1.tif')
    with pytest.raises(KeyboardInterrupt): infer_scene(source, tmp_path/'o.tif', chains.Stops(12), SMALL)
    assert list((tmp_path/'o.tif.parts').glob('*.block'))
    with pytest.raises(GacError, match='other settings .tiling was .*--overwrite'):
        infer_scene(source, tmp_path/'o.tif', chains.Grey(), Tiling(48, 8, 96))
    with pytest.raises(GacError, match='other settings .steps was '):
        infer_scene(source, tmp_path/'o.tif', chains.Mirror(), SMALL)
    with _alone(tmp_path/'o.tif.parts'):
        with pytest.raises(GacError, match='another process'):
            infer_scene(source, tmp_path/'o.tif', chains.Grey(), SMALL)
    infer_scene(source, tmp_path/'o.tif', chains.Mirror(), SMALL, InferConfig(overwrite=True))
    assert not (tmp_path/'o.tif.parts').exists()
    with pytest.raises(GacError, match='o.tif exists and was computed with other settings'):
        infer_scene(source, tmp_path/'o.tif', chains.Grey(), SMALL)
    scene(tmp_path/'s1.tif', change=lambda x: x + 1)  # the scene itself has changed
    with pytest.raises(GacError, match='computed with other settings'):
        infer_scene(source, tmp_path/'o.tif', chains.Mirror(), SMALL)

def test_a_block_that_was_cut_short_is_drawn_again(tmp_path):
    source = scene(tmp_path/'s1.tif')
    infer_scene(source, tmp_path/'a.tif', chains.Grey(), SMALL)
    with pytest.raises(KeyboardInterrupt): infer_scene(source, tmp_path/'o.tif', chains.Stops(30), SMALL)
    block = sorted((tmp_path/'o.tif.parts').glob('*.block'))[0]
    block.write_bytes(block.read_bytes()[:40])
    infer_scene(source, tmp_path/'o.tif', chains.Grey(), SMALL)
    assert (tmp_path/'o.tif').read_bytes() == (tmp_path/'a.tif').read_bytes()

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_a_killed_run_ends_on_the_bytes_of_an_unbroken_one(tmp_path):
    source, kills = scene(tmp_path/'s1.tif', 260, 260), 0
    infer_scene(source, tmp_path/'whole.tif', chains.Mirror(), SMALL)
    drawn = lambda: len(list((tmp_path/'o.tif.parts').glob('*.block')))
    for _ in range(30):
        before, pid = drawn(), os.fork()
        if not pid:  # the child
            try:
                infer_scene(source, tmp_path/'o.tif', chains.Mirror(.02), SMALL)
                os._exit(0)
            finally: os._exit(1)
        until = time.time() + 20
        while drawn() <= before and time.time() < until and not (tmp_path/'o.tif').exists(): time.sleep(.005)
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if (tmp_path/'o.tif').exists() and not (tmp_path/'o.tif.parts').exists(): break
    infer_scene(source, tmp_path/'o.tif', chains.Mirror(), SMALL)
    assert kills >= 3 and (tmp_path/'o.tif').read_bytes() == (tmp_path/'whole.tif').read_bytes()
    assert (tmp_path/'o.qml').read_bytes() == (tmp_path/'whole.qml').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['o.qml', 'o.tif', 's1.tif', 'whole.qml', 'whole.tif']

def test_seams_are_measured_and_blending_takes_them_away(tmp_path):
    opened, r = open_scene(scene(tmp_path/'s1.tif', 240, 240)), np.random.default_rng(0)
    texture = r.normal(0, .01, (4, 240, 240))
    measured = {o: seam_excess(texture + 1e-4*draw_block(opened, (0, 0, 240, 240), chains.Grey(), Tiling(48, o)),
                                      Tiling(48, o)) for o in (0, 24)}
    assert measured[0]['excess'] > 1 > 10*abs(measured[0]['hi'])
    assert abs(measured[24]['excess']) < .05*measured[0]['excess']
    none = seam_excess(texture, Tiling(48, 24))
    assert none['lo'] - .02 < none['excess'] < none['hi'] + .02

# ---- gac infer: the trained chain -----------------------------------------------------------------

def test_a_tile_of_a_scene_does_not_depend_on_its_neighbours(chain, tmp_path):
    opened = open_scene(scene(tmp_path/'s1.tif', 150, 150))
    one, many = (draw_block(opened, (0, 0, 150, 150), chain, Tiling(64, 16), 7, 4, batch_size=n).astype(int)
                 for n in (1, 5))
    assert np.abs(one - many).max() <= 1  # rounding of floats alone
    r = opened.read(0, 0, 64, 64)[None]
    batch = dict(id=['0,0'], s1=r, month=np.array([7]), biome=np.array([4]))
    corner = to_dn(chain(batch)['opt_v1'][0])
    assert np.abs(one[:, :48, :48] - corner[:, :48, :48]).max() <= 1  # where no other tile is, it is the tile itself

def test_the_command_on_a_scene_and_on_tiles(store, tmp_path, capsys):
    source = scene(tmp_path/'s1.tif', 100, 90)
    args = ['--tile-size', '64', '--overlap', '16', '--uncertainty', '2', '--visualise']
    assert main(['infer', str(source), str(tmp_path/'o.tif'), *args]) == 0
    with rasterio.open(tmp_path/'o.tif') as f:
        x, tags = f.read(), f.tags()
        assert f.count == 5 and (x[4] > 0).all() and tags['GAC_MODEL'] == 'terramind_mini_generate'
        assert json.loads(tags['GAC_WEIGHTS'])
    assert (tmp_path/'o.png').exists()
    capsys.readouterr()
    for said in ('drawn 2', 'drawn 0'):
        assert main(['infer', str(store.path), str(tmp_path/'tiles'), '--split', 'test', '--visualise']) == 0
        assert said in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path/'tiles').rglob('*.*')) == ['panels.png', 't.1.qml', 't.1.tif', 't.2.qml',
                                                                       't.2.tif']
    with rasterio.open(tmp_path/'tiles'/'opt_v1'/'t.2.tif') as f:
        assert f.tags()['GAC_ID'] == 't.2' and tuple(f.transform)[:6] == (10, 0, 6e5 + 960, 0, -10, 5.8e6)
    assert main(['infer', str(tmp_path/'nowhere.tif'),
                 str(tmp_path/'p.tif')]) == 2 and 'does not exist' in capsys.readouterr().err

PEAK = """
import sys; sys.path.insert(0, sys.argv[1])
import export_chains
from gac.products.infer import infer_scene
from gac.products.tiling import Tiling
peak = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])/1024
before = peak()
infer_scene(sys.argv[2], sys.argv[3], export_chains.Grey(), Tiling(120, 40, 480))
print(before, peak())
"""

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='the peak of the resident memory is read from /proc')
def test_memory_does_not_grow_with_the_scene(tmp_path):
    "Peak resident memory of whole runs at two sizes 16 times apart."
    peak = {}
    for side in (1024, 4096):
        path, r = tmp_path/f'{side}.tif', np.random.default_rng(0)
        with rasterio.open(path, 'w', driver='GTiff', height=side, width=side, count=2, dtype='float32',
                           crs='EPSG:32633',
                           tiled=True,
                           transform=rasterio.Affine(10, 0, 4e5, 0, -10, 5.3e6)) as f:
            for i in range(0, side, 256):
                f.write(np.stack([r.normal(m, 2, (256, side)) for m in (-11, -17.5)]).astype('float32'),
                        window=rasterio.windows.Window(0, i, side, 256))
        done = subprocess.run([sys.executable, '-c', PEAK, str(Path(__file__).parent), str(path),
                               str(tmp_path/f'{side}.o.tif')],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak[side] = [float(v) for v in done.stdout.splitlines()[-1].split()]
        print(f'{side} px: {peak[side][0]:.0f} MB after the imports, {peak[side][1]:.0f} MB at the peak')
    # MB: GDAL's cache of 64, and noise; the scene itself has 134, the output another 134
    assert peak[4096][1] - peak[1024][1] < 100

# ---- stages of one chain --------------------------------------------------------------------------

DRAWN = dict(asdict(Decoding(1, 'expected')), model='terramind_mini_generate', weights={'a.pt': '01'},
             precision='32-true')

@pytest.mark.parametrize('differs, said', [(dict(timesteps=10), '10 steps'), (dict(tokens='sample'), 'sampled'),
                                           (dict(model='terramind_v1_large_generate'), 'terramind_v1_large_generate'),
                                           (dict(weights={'b.pt': '02'}), 'b.pt'), (dict(decoder='direct'), 'direct')])
def test_stages_of_two_chains_do_not_draw_together(tmp_path, differs, said):
    "What is written beside Stage 3's checkpoint counts as much as what is beside Stage 2's."
    two, three = tmp_path/'two', tmp_path/'three'
    keep_decoding(two, DRAWN), keep_decoding(three, DRAWN)
    def both(): return decoding_for(two, stage3_checkpoint=three), generator_for(two, three)[0]
    assert both() == (Decoding(1, 'expected'), 'terramind_mini_generate')
    keep_decoding(three, DRAWN | dict(precision='bf16-true'))
    assert both()[1] == 'terramind_mini_generate', 'another precision draws the same images but for rounding'
    keep_decoding(three, DRAWN | differs)
    with pytest.raises(GacError, match=f'three.*{said}'): both()

@pytest.mark.parametrize('stage', [2, 3])
def test_a_stage_is_not_given_images_of_another_generator(store, tmp_path, capsys, stage):
    "opt_v1 or opt_v2 of a store against what the checkpoint says it learnt from; before a model is loaded."
    made = store.arrays['opt_v1'].attrs
    said = {k: made[k] for k in ('model', 'weights', 'timesteps', 'tokens', 'clamp', 'n_samples')}
    folder = tmp_path/'checkpoint'
    run = lambda: (main([f'precompute-stage{stage}', '--data-dir', str(store.path), f'--stage{stage}-checkpoint',
                         str(folder)]), capsys.readouterr().err)
    keep_decoding(folder, said | dict(timesteps=10, model='terramind_v1_large_generate'))
    code, err = run()
    assert code == 2
    assert 'model terramind_v1_large_generate, here terramind_mini_generate; timesteps 10, here 1' in err
    assert 'gac precompute' in err
    keep_decoding(folder, said)
    assert 'is missing' in run()[1], 'there is no model here, and that is all that is wrong'

def test_both_trainings_of_the_chain_write_down_how_their_images_were_drawn():
    for name, call in (('08_stage2', "keep_decoding(run.dir/'stage2'"),
                       ('09_stage3', "keep_decoding(run.dir/'stage3'")):
        assert call in (Path(__file__).parents[1]/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8')

def test_stage3_reads_the_product_of_the_tiles_and_the_weights_that_are_named(tmp_path, monkeypatch, capsys):
    "As gac infer does: a Stage 3 that was trained on S1GRD reads S1RTC by TerraMind's own embedding of it."
    layouts.geotiff(tmp_path/'c', 1, 32, product='S1RTC', dem=False)
    convert(tmp_path/'c', tmp_path/'s', size=32)
    place = Store(tmp_path/'s')
    place.ensure_array('opt_v2', (4, 32, 32), 'int16', dict(trained='beef'))
    with place: place.write('opt_v2', [0], layouts.optical(5, 32, 4).astype('int16')[None])
    model = build_stage3_model()
    save_stage3(model, tmp_path/'three', {})
    assert main(['precompute-stage3', '--data-dir', str(tmp_path/'s'), '--stage3-checkpoint',
                 str(tmp_path/'three')]) == 0
    place.refresh()
    assert place.arrays['opt_v3'].attrs['model']['radar'] == 'S1RTC'
    asked, build = [], build_stage3_model
    swap(monkeypatch, 'gac.stages.grounding', 'build_stage3_model', lambda *a, weights='', **k: asked.append(weights)
         or build(*a, **k))
    grounder(tmp_path/'three', 'S1RTC', weights='somewhere')
    assert asked == ['somewhere']*2

def test_stage3_without_stage2_says_what_it_was_trained_on(tmp_path, chain):
    save_stage3(build_stage3_model(), tmp_path/'three', {})
    alone = SceneChain('', tmp_path/'three')
    assert any('trained on images of Stage 2 and is given those of Stage 1' in line
               for line in introduce(alone, '', tmp_path/'three'))

def test_a_training_is_refused_its_folder_before_a_model_is_built(store, tmp_path, monkeypatch, capsys):
    (tmp_path/'file').touch()
    for room, name in (('gac.stages.stage2', 'load_stage2'), ('gac.stages.refiner', 'build_prithvi_refiner'),
                       ('gac.stages.grounding', 'build_stage3_model')):
        swap(monkeypatch, room, name, lambda *a, **k: pytest.fail('a model was built'))
    for stage, more in ((2, []), (3, ['--stage2-checkpoint', str(tmp_path)])):
        assert main([f'train-stage{stage}', '--data-dir', str(store.path), '--output-dir', str(tmp_path/'file'/'out'),
                     *more]) == 2
        assert f'{tmp_path/"file"}: cannot be written to' in capsys.readouterr().err

def test_tiles_are_written_as_they_were_drawn_and_that_is_said(store, tmp_path, capsys):
    "The files of tiles hold what the tables measure; a scene has Stage 3's pattern of 2 px taken off."
    class Third(chains.Grey):
        output = 'opt_v3'
        def __call__(self, batch, sampled=False):
            n, (h, w) = len(batch['s1']), batch['s1'].shape[2:]
            return dict(opt_v3=.2 + .004*(np.indices((n, 4, h, w)).sum(0) % 2).astype('float32'))
    infer_tiles(store.path, tmp_path/'tiles', lambda product: Third(), InferConfig(max_tiles=1))
    assert AS_DRAWN in capsys.readouterr().out
    with rasterio.open(next((tmp_path/'tiles'/'opt_v3').glob('*.tif'))) as f:
        assert set(np.unique(f.read())) == {2000, 2040}
    infer_scene(scene(tmp_path/'s1.tif', 60, 60), tmp_path/'o.tif', Third(), Tiling(48, 16, 96, notch=True))
    with rasterio.open(tmp_path/'o.tif') as f: assert np.ptp(f.read()) <= 1
    assert AS_DRAWN not in capsys.readouterr().out
