"Check that `gac infer` and `gac data convert` read a raster file by the same rules, or refuse it with the same reason."
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from swapping import swap

from gac.cli import main
from gac.core.config import InferConfig
from gac.core.files import GacError, fingerprint_files, real_data, root, writable
from gac.core.run import Run
from gac.core.vocabulary import OPT_BANDS, OPT_INDEX, S2_BANDS
from gac.data.convert import _loaded, convert
from gac.data.dates import date_of
from gac.data.layouts import READERS, recognise
from gac.data.raster import check_order
from gac.data.readers import Options
from gac.data.records import _check_scale
from gac.data.store import Store
from gac.data.stores import real_store
from gac.data.units import check_negative
from gac.products.infer import _months, infer_scene
from gac.products.scene import open_scene
from gac.products.tiles import export_tiles
from gac.products.tiling import Tiling
from gac.runner.plan import _key, modules_used

sys.path.insert(0, str(Path(__file__).parent))
import tiles_layouts as layouts


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)

TEN = (10, 0, 6e5, 0, -10, 5.8e6)
DB, DN = layouts.radar(1), layouts.optical(1)

def write(path:Path, x, names=(), crs='EPSG:32629', transform=TEN, tags=None, scales=None, offsets=None, mask=None,
          alpha=False, side=False, **more) -> Path:
    "Write a GeoTIFF with given tags, scales, offsets and mask; side: the mask lies beside it as .msk."
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=not side):
        with rasterio.open(path, 'w', driver='GTiff', count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype,
                           crs=crs, transform=rasterio.Affine(*transform), **more) as f:
            if alpha: f.colorinterp = (*f.colorinterp[:-1], rasterio.enums.ColorInterp.alpha)
            f.write(x)
            for i, name in enumerate(names, 1): f.set_band_description(i, name)
            if scales: f.scales = scales
            if offsets: f.offsets = offsets
            if mask is not None: f.write_mask(mask)
            f.update_tags(**(tags or {}))
    return path

def pair(folder:Path, s1=None, s2=None, name='a0', **more) -> Path: # s1, s2: (values, how they are written)
    "Write one source in the layout of folders; return the folder."
    for kind, given, usual in (('S1GRD', s1, (DB, dict(names=('VV', 'VH')))),
                               ('S2L2A', s2, (DN, dict(names=S2_BANDS)))):
        x, how = given or usual
        write(folder/kind/f'{name}.tif', x, **{**how, **more})
    return folder

def both(folder:Path, x, how:dict, **options) -> tuple: # the scene, the tiles, or the two errors
    "Read the same radar file as a scene and as a source of tiles."
    src = pair(folder, (x, how))
    made = []
    for read in (lambda: open_scene(src/'S1GRD'/'a0.tif', say=False, **options).read(0, 0, *x.shape[1:]),
                 lambda: stored(src, folder/'store', **options)):
        try: made.append(read())
        except GacError as e: made.append(e)
    return tuple(made)

def stored(src:Path, dst:Path, **options) -> dict: # id -> (2, 120, 120)
    "Convert a folder and return its tiles, or raise the first error that the report names."
    report = convert(src, dst, **options)
    store = Store(dst)
    if not len(store): raise GacError(report['reason'].iloc[0])
    return dict(zip(store.table.id, store.read('s1', slice(None))))

# ---- gac infer and gac data convert agree, to the digit --------------------------------------------------------------

HOLE = np.zeros((120, 240), bool)
HOLE[:, :30] = True

def holed(x, value): return np.where(HOLE, np.asarray(value, x.dtype), x)

WIDE = layouts.radar(3, 240)[:, :120]
POWER = 10**(WIDE.astype('float64')/10)
NAMES = dict(names=('VV', 'VH'))
RADAR_FILES = {  # name -> (values, how they are written, options)
    'dB': (WIDE, NAMES, {}), 'dB, float64': (WIDE.astype('f8'), NAMES, {}),
    'VH first': (WIDE[::-1], dict(names=('VH', 'VV')), {}),
    'SNAP': (WIDE[::-1], dict(names=('Sigma0_VH_db', 'Sigma0_VV_db')), {}),
    'small letters': (WIDE, dict(names=('vv', 'vh')), {}),
    'unnamed': (WIDE, {}, {}), 'generic names': (WIDE, dict(names=('Band 1', 'Band 2')), {}),
    'named by option': (WIDE[::-1], dict(names=('x', 'y')), dict(s1_bands=('VH', 'VV'))),
    'with an angle': (np.concatenate([WIDE[:1]*0 + 38, WIDE]), dict(names=('angle', 'VV', 'VH')), {}),
    'power': (POWER.astype('f4'), NAMES, {}), 'power, float64': (POWER, NAMES, {}),
    'amplitude': (np.sqrt(POWER).astype('f4'), NAMES, {}),
    'power with values below zero': (np.where(np.arange(240) == 5, -1e-5, POWER).astype('f4'), NAMES, {}),
    'power said': (np.where(np.arange(240) == 5, 0, POWER).astype('f4'), NAMES, dict(s1_units='linear')),
    'hundredths': (np.rint(WIDE*100).astype('i2'), dict(NAMES, scales=(.01, .01)), {}),
    'hundredths by option': (np.rint(WIDE*100).astype('i2'), NAMES, dict(s1_scale=.01)),
    'scale and offset': (np.rint((WIDE + 50)*500).astype('u2'), dict(NAMES, scales=(.002, .002), offsets=(-50., -50.)),
                         {}),
    'a scale for each band': (np.stack([np.rint(WIDE[0]*100), np.rint(WIDE[1]*1000)]).astype('i2'),
                              dict(NAMES, scales=(.01, .001)), {}),
    'scale of floats': (WIDE/2, dict(NAMES, scales=(2., 2.)), {}),
    'NaN': (holed(WIDE, np.nan), NAMES, {}), 'infinite': (holed(WIDE, -np.inf), NAMES, {}),
    'zeros': (holed(WIDE, 0), NAMES, {}), 'zeros in VH alone': (np.stack([WIDE[0], holed(WIDE[1:], 0)[0]]), NAMES, {}),
    'tag': (holed(WIDE, -9999), dict(NAMES, nodata=-9999), {}),
    'tag of integers': (holed(np.rint(WIDE*100).astype('i2'), -32768), dict(NAMES, scales=(.01, .01), nodata=-32768),
                        {}),
    'mask': (WIDE, dict(NAMES, mask=~HOLE), {}), 'mask beside it': (WIDE, dict(NAMES, mask=~HOLE, side=True), {}),
    'alpha': (np.concatenate([WIDE, np.where(HOLE, 0, 255)[None]]).astype('f4'), dict(NAMES, alpha=True), {}),
    'no place': (WIDE, dict(NAMES, crs=None), {}),
    'south up': (WIDE, dict(NAMES, transform=(10, 0, 6e5, 0, 10, 5.8e6)), {}),
}

@pytest.mark.parametrize('what', RADAR_FILES)
def test_infer_and_convert_read_the_same_radar(tmp_path, what):
    "Compare tiles and windows: each tile equals its window of the scene, and each window without a hole is a tile."
    x, how, options = RADAR_FILES[what]
    src = write(tmp_path/'src'/'S1GRD'/'a0.tif', x, **how).parents[1]
    write(src/'S2L2A'/'a0.tif', layouts.optical(3, 240)[:, :120], names=S2_BANDS,
          **{k: how[k] for k in ('crs', 'transform') if k in how})
    got = open_scene(src/'S1GRD'/'a0.tif', say=False, **options).read(0, 0, 120, 240)
    seen, made = np.isfinite(got).all(0), stored(src, tmp_path/'store', **options)
    for left in (0, 120):
        if seen[:, left:left + 120].all():
            np.testing.assert_array_equal(made[f'a0_0_{left}'], got[:, :, left:left + 120])
        else: assert f'a0_0_{left}' not in made
    empty = HOLE if what in ('NaN', 'infinite', 'zeros', 'zeros in VH alone', 'tag', 'tag of integers', 'mask',
                             'mask beside it', 'alpha') else HOLE & False
    if 'power ' in what and 'float' not in what: empty = np.broadcast_to(np.arange(240) == 5, HOLE.shape)
    np.testing.assert_array_equal(seen, ~empty)
    rounded = any(w in what for w in ('hundredths', 'scale', 'integers'))
    assert np.abs(got - WIDE)[:, seen].max() < (.0051 if rounded else 1e-4)

def test_a_mask_is_seen_though_gdal_was_told_not_to_look(tmp_path, monkeypatch):
    "TerraTorch's command line and others tell GDAL, for the whole process, not to list folders."
    x, how, _ = RADAR_FILES['mask beside it']
    path = write(tmp_path/'a.tif', x, **how)
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN='EMPTY_DIR'):
        seen = np.isfinite(open_scene(path, say=False).read(0, 0, 120, 240)).all(0)
    np.testing.assert_array_equal(seen, ~HOLE)

REFUSED = {  # name -> (values, how they are written, options, what both say)
    'hundredths without a tag': (np.rint(DB*100).astype('i2'), NAMES, {}, '--s1-scale 0.01'),
    'tenths': (DB*10, NAMES, {}, '--s1-scale 0.1'),
    'HH and HV': (DB, dict(names=('HH', 'HV')), {}, 'expected VV and VH once each'),
    'unknown names': (DB, dict(names=('x', 'y')), {}, 'the names x, y: .*--s1-bands'),
    'a ratio for VH': (DB, dict(names=('VV', 'VV/VH')), {}, 'no VH.*--s1-bands'),
    'named otherwise than said': (DB, NAMES, dict(s1_bands=('VH', 'VV')), 'band 1 is named VV, --s1-bands calls it VH'),
    'swapped': (DB[::-1], {}, {}, '--s1-bands VH,VV'),
    'scaled to 0…1': ((DB.clip(-20, 0) + 20)/20, NAMES, {}, 'look scaled'),
    'scaled for each band': (np.stack([(b - b.min())/(b.max() - b.min()) for b in DB]), NAMES, {},
                             'look scaled|fit no unit'),
    'scaled, no zero': ((DB.clip(-28, 0) + 28)/28, NAMES, {}, 'look scaled'),
    'degrees': (DB, dict(NAMES, crs='EPSG:4326', transform=(1e-4, 0, 10, 0, -1e-4, 50)), {}, 'counts in degrees'),
    'Web Mercator at 60° N': (DB, dict(NAMES, crs='EPSG:3857', transform=(10, 0, 1e6, 0, -10, 8.4e6)), {},
                              'm on the ground'),
    '20 m': (DB, dict(NAMES, transform=(20, 0, 6e5, 0, -20, 5.8e6)), {}, '20 × 20 m'),
    'feet': (DB, dict(NAMES, crs='EPSG:2263', transform=(10, 0, 1e6, 0, -10, 2e5)), {}, '3.05 × 3.05 m'),
    'rotated': (DB, dict(NAMES, transform=(9.8, 2, 6e5, 2, -9.8, 5.8e6)), {}, 'rotated or sheared'),
    'sheared': (DB, dict(NAMES, transform=(10, 3, 6e5, 0, -10, 5.8e6)), {}, 'rotated or sheared'),
    '20 m and no place': (DB, dict(NAMES, crs=None, transform=(20, 0, 6e5, 0, -20, 5.8e6)), {}, 'no coordinate system'),
    'a scale of nothing': (DB, dict(NAMES, scales=(0., 1.)), {}, 'band 1 has the tags scale 0'),
    'another scale than the tag': (np.rint(DB*100).astype('i2'), dict(NAMES, scales=(.01, .01)), dict(s1_scale=.1),
                                   'tags say scale 0.01'),
    'one value': (DB*0 - 12, NAMES, {}, 'one value everywhere|fit no unit'),
    'no negative dB': (-DB, NAMES, dict(s1_units='dB'), 'no negative value'),
    'unmarked no data': (np.where(np.arange(120) < 9, -9999, DB).astype('f4'), NAMES, {}, 'outside −100 to 60'),
    'complex': (DB.astype('complex64'), NAMES, {}, 'single-look complex')}

@pytest.mark.parametrize('what', REFUSED)
@pytest.mark.filterwarnings('ignore')
def test_infer_and_convert_refuse_the_same_radar(tmp_path, what):
    x, how, options, said = REFUSED[what]
    src = write(tmp_path/'S1GRD'/'a0.tif', x, **how).parents[1]
    write(src/'S2L2A'/'a0.tif', DN, names=S2_BANDS, **{k: how[k] for k in ('crs', 'transform') if k in how})
    with pytest.raises(GacError, match=said):
        open_scene(src/'S1GRD'/'a0.tif', say=False, **options).read(0, 0, 120, 120)
    with pytest.raises(GacError, match=said): stored(src, tmp_path/'store', **options)

@pytest.mark.parametrize('reader', ['infer', 'geotiff', 'npz', 'bigearthnet', 'benv2'])
def test_every_reader_measures_pixels_on_the_ground(tmp_path, reader):
    "10 units of Web Mercator are 5 m at 60° N, in every layout."
    at = dict(crs='EPSG:3857', north=8.4e6)
    if reader == 'infer': read = lambda: open_scene(layouts.write_tif(tmp_path/'s.tif', DB, names=('VV', 'VH'), **at))
    elif reader == 'geotiff':
        read = lambda: convert(pair(tmp_path/'f', crs='EPSG:3857', transform=(10, 0, 0, 0, -10, 8.4e6)), tmp_path/'o')
    elif reader == 'npz':
        np.savez(tmp_path/'n.npz', s1=DB, s2=DN, crs='EPSG:3857', transform=(10, 0, 0, 0, -10, 8.4e6))
        read = lambda: convert(tmp_path/'n.npz', tmp_path/'o')
    elif reader == 'bigearthnet':
        layouts.bigearthnet(tmp_path/'b', 1)
        for p in (tmp_path/'b').rglob('*.tif'):
            with rasterio.open(p) as f: x, pixel = f.read(), f.transform.a
            layouts.write_tif(p, x, pixel=pixel, **at)
        read = lambda: convert(tmp_path/'b', tmp_path/'o')
    else:
        with pytest.MonkeyPatch.context() as m:
            whole = layouts.tif_bytes
            m.setattr(layouts, 'tif_bytes',
                      lambda x, pixel=10., west=6e5, north=5.8e6: whole(x, pixel, west, 8.4e6, 'EPSG:3857'))
            layouts.benv2(tmp_path/'b.tortilla', 1)
        read = lambda: convert(tmp_path/'b.tortilla', tmp_path/'o')
    with pytest.raises(GacError, match=r'pixels of 5\S* × 5\S* m on the ground'): read()

# ---- the optical truth -----------------------------------------------------------------------------------------------

OPTICAL_FILES = {  # name -> (values, how they are written, options)
    'DN': (DN, {}, {}), 'reflectance': (DN/np.float32(1e4), {}, {}),
    'colours': (DN[[1, 2, 3, 7]], dict(names=('blue', 'green', 'red', 'nir')), {}),
    'numbers and colours': (DN[[7, 3, 1, 2]],
                            dict(names=('Band 8 (nir)', 'Band 4 (red)', 'Band 2 (blue)', 'Band 3 (green)')), {}),
    'another order': (DN[::-1], dict(names=[f'b{n.lstrip("B0")}' for n in S2_BANDS[::-1]]), {}),
    'with a mask band': (np.concatenate([DN, DN[:1]*0 + 4]), dict(names=(*S2_BANDS, 'SCL')), {}),
    '65535 is 1.6, tagged': (np.rint(DN*2.5).astype('u2'), dict(scales=(4e-5,)*12), {}),
    '2e-5 by option': (np.rint(DN*5).astype('u2'), {}, dict(s2_scale=2e-5)),
    'scale and offset': (DN + 1000, dict(scales=(1e-4,)*12, offsets=(-.1,)*12), {}),
    'DN of another scale': (DN*2, dict(scales=(.5,)*12), {}), 'DN, said': (DN, {}, dict(s2_units='dn'))}

@pytest.mark.parametrize('what', OPTICAL_FILES)
def test_optical_numbers_come_out_as_dn(tmp_path, what):
    x, how, options = OPTICAL_FILES[what]
    src = pair(tmp_path/'src', s2=(np.asarray(x), dict(dict(names=S2_BANDS), **how)))
    report = convert(src, tmp_path/'store', **options)
    assert report['status'].tolist() == ['ok'], report['reason'].tolist()
    got = Store(tmp_path/'store').read('s2', [0], OPT_BANDS)[0].astype(int)
    assert np.abs(got - DN[list(OPT_INDEX)]).max() <= (1 if 'option' in what or 'tagged' in what else 0)

STEPS = np.rint((DN/3000*255).clip(0, 255)).astype('f4')
OPTICAL_REFUSED = {
    '8 bits divided by 255': (STEPS/np.float32(255), {}, {}, '8 bits.*--s2-scale'),
    'each band from 0 to 1': (np.stack([(b - b.min())/(b.max() - b.min()) for b in DN.astype('f4')]), {}, {},
                              'from 0 to 1.*--s2-scale'),
    'numbers in another order': (DN[[3, 2, 1, 7]], dict(names=('Band 4', 'Band 3', 'Band 2', 'Band 8')), {},
                                 'numbers are 4, 3, 2, 8.*--s2-bands'),
    'a scale for some bands': (DN, dict(scales=(1e-4,)*6 + (1.,)*6), {}, 'band 7 has no scale or offset tag'),
    '8 bits': ((DN/4000*255).astype('u1'), {}, {}, '8 bits.*--s2-scale'),
    '8 bits as floats': ((DN/4000*255).astype('f4'), {}, {}, '8 bits'),
    '65535 is 1': ((DN*6.5535).astype('u2'), {}, {}, 'above reflectance 1.6.*--s2-scale'),
    'percent': (DN.astype('f4')/100, {}, {}, '--s2-units'),
    'wrapped': ((DN.astype('i4') - 140).astype('u2'), {}, {}, 'without a sign'),
    'colours in the order of a screen': (DN[[3, 2, 1, 7]], dict(names=(), photometric='RGB'), {}, 'another order'),
    'a band twice': (DN, dict(names=('B02', *S2_BANDS[1:])), {}, 'B02 more than once'),
    'a band that is missing': (DN[:4], dict(names=('B02', 'B03', 'B04', 'x')), {}, 'no B08.*--s2-bands'),
    'unknown names': (DN[:4], dict(names=('p', 'q', 'r', 's')), {}, 'the names p, q, r, s.*--s2-bands')}

@pytest.mark.parametrize('what', OPTICAL_REFUSED)
def test_optical_numbers_that_cannot_be_right_are_refused(tmp_path, what):
    x, how, options, said = OPTICAL_REFUSED[what]
    src = pair(tmp_path/'src', s2=(np.asarray(x), dict(dict(names=S2_BANDS), **how)))
    with pytest.raises(GacError, match=said): stored(src, tmp_path/'store', **options)

def test_one_tile_on_another_scale_costs_that_tile(tmp_path):
    src = tmp_path/'src'
    for name, x in dict(a0=DN, a1=(DN*6.5535).astype('u2'), a2=(DN/4000*255).astype('u1'), a3=DN).items():
        pair(src, s2=(x, dict(names=S2_BANDS)), name=name)
    report = convert(src, tmp_path/'store')
    assert report['status'].tolist() == ['ok', 'error', 'error', 'ok']
    assert 'above reflectance 1.6' in report['reason'][1] and '8 bits' in report['reason'][2]

@pytest.mark.parametrize('kind', ['uint16', 'int16', 'float32'])
@pytest.mark.parametrize('how', ['tag', 'mask', 'zeros'])
def test_no_data_of_the_truth_costs_the_tiles_it_is_in(tmp_path, kind, how):
    "The same answer for whole numbers and floats, whatever marks the pixels."
    x, there = layouts.optical(1, 360).astype(kind), np.ones((360, 360), bool)
    there[:20, :20] = False
    if how != 'mask': x = np.where(there, x, x.dtype.type(dict(tag=7, zeros=0)[how]))
    src = pair(tmp_path/'src', (layouts.radar(1, 360), dict(names=('VV', 'VH'))),
               (x, dict(names=S2_BANDS, **dict(tag=dict(nodata=7), mask=dict(mask=there), zeros={})[how])))
    report = convert(src, tmp_path/'store')
    assert (report['status'] == 'ok').sum() == 8 and report.query('status == "error"')['id'].tolist() == ['a0_0_0']
    assert '400 px' in report['reason'][0]

@pytest.mark.parametrize('odd, said',
                         [('amplitude', 'fits amplitude, in a data set of linear'),
                          ('linear', 'fits linear, in a data set of amplitude'),
                          ('tenth', 'fits no unit, in a data set of dB')])
def test_one_source_in_another_unit_costs_that_source(tmp_path, odd, said):
    "Power among amplitude, amplitude among power, scaled dB among dB: each was taken for the unit of the others."
    power = 10**(DB.astype('f8')/10)
    most, one = dict(amplitude=(power, power**.5), linear=(power**.5, power), tenth=(DB, DB/10))[odd]
    for i, x in enumerate([most]*4 + [one]): pair(tmp_path/'src', (x, NAMES), name=f'a{i}')
    report = convert(tmp_path/'src', tmp_path/'store')
    assert report['status'].tolist() == ['ok']*4 + ['error'] and said in report['reason'][4]
    np.testing.assert_allclose(Store(tmp_path/'store').read('s1', slice(None)), np.stack([DB]*4), atol=1e-4)

def test_one_stretched_source_costs_that_source(tmp_path):
    for i, x in enumerate([DN.astype('f4')]*3 + [STEPS]):
        pair(tmp_path/'src', s2=(x, dict(names=S2_BANDS)), name=f'a{i}')
    report = convert(tmp_path/'src', tmp_path/'store')
    assert report['status'].tolist() == ['ok']*3 + ['error'] and '8 bits' in report['reason'][3]

@pytest.mark.parametrize('date, want',
                         [(np.datetime64('2021-07-14T10:00:00', 'ns'), '2021-07-14T10:00:00'),
                          (np.datetime64('NaT'), ''), (20210714, '20210714')])
def test_a_date_of_a_catalogue_may_be_a_time_a_number_or_none(tmp_path, date, want):
    np.savez(tmp_path/'n.npz', s1=DB, s2=DN, date=date)
    stored(tmp_path/'n.npz', tmp_path/'o')
    assert Store(tmp_path/'o').table[['date', 'month']].values.tolist() == [[want, 7 if want else 0]]

def test_an_odd_fact_of_a_catalogue_costs_its_source(tmp_path):
    np.savez(tmp_path/'n.npz', s1=np.stack([DB]*2), s2=np.stack([DN]*2), lon=np.array(['12.5', 'east']))
    assert convert(tmp_path/'n.npz', tmp_path/'o')['status'].tolist() == ['ok', 'error']
    assert Store(tmp_path/'o').table['lon'].tolist() == [12.5]

# ---- place and date --------------------------------------------------------------------------------------------------

def test_a_transform_without_a_coordinate_system_is_carried_on(tmp_path):
    src = pair(tmp_path/'src', crs=None)
    convert(src, tmp_path/'store')
    assert (list(Store(tmp_path/'store').table['transform'][0]) == list(TEN)
            and Store(tmp_path/'store').table['crs'][0] == '')
    export_tiles(Store(tmp_path/'store'), tmp_path/'out', ('s1',))
    with rasterio.open(tmp_path/'out'/'s1'/'a0.tif') as f: assert (f.crs, tuple(f.transform)[:6]) == (None, TEN)

SENTINEL = 'S1A_IW_GRDH_1SDV_20210714T051200_20210714T051225_038781'

def test_a_local_system_lies_nowhere_and_is_read(tmp_path):
    "Its tiles have no longitude; a scene has no biome of its place."
    src = pair(tmp_path/'src', crs='LOCAL_CS["site",UNIT["metre",1]]')
    scene = open_scene(src/'S1GRD'/'a0.tif', say=False)
    assert np.isnan(scene.place_of(0, 0, 120)).all() and _months(scene, 0, 0) == (0, 0)
    np.testing.assert_array_equal(stored(src, tmp_path/'store')['a0'], DB)
    assert Store(tmp_path/'store').table['lon'].isna().all()

def test_a_sentinel_name_goes_before_a_tag_and_the_difference_is_said(tmp_path, capsys):
    tags = dict(TIFFTAG_DATETIME='2022:01:03 10:00:00')
    src = pair(tmp_path/'src', name=SENTINEL, tags=tags)
    assert open_scene(src/'S1GRD'/f'{SENTINEL}.tif').date == '2021-07-14T05:12:00'
    said = 'its name says 2021-07-14, its TIFFTAG_DATETIME 2022-01-03'
    assert said in capsys.readouterr().out
    convert(src, tmp_path/'store')
    assert said in capsys.readouterr().out and Store(tmp_path/'store').table['month'][0] == 7
    assert date_of('harbour', (tags,)) == ('2022-01-03T10:00:00', '')

# ---- tables, hidden files, sources that change -----------------------------------------------------------------------

@pytest.mark.parametrize('column, value',
                         [('patch_id', None), ('s1_name', None), ('split', None), ('split', 'somewhere'),
                          ('contains_cloud_or_shadow', None), ('contains_seasonal_snow', 'perhaps')])
def test_an_odd_value_of_a_table_costs_its_row(tmp_path, column, value):
    table = layouts.bigearthnet(tmp_path/'ben')
    table[column] = pd.Series([table[column][0], value, table[column][2]], dtype=object)
    if value == 'perhaps': table[column] = table[column].astype(str)  # a column of a Parquet table has one type
    table.to_parquet(tmp_path/'ben'/'metadata.parquet')
    report = convert(tmp_path/'ben', tmp_path/'out')
    assert sorted(report['status']) == ['error', 'ok', 'ok'] and len(Store(tmp_path/'out')) == 2
    assert (column.split('_')[0] in report.query('status == "error"')['reason'].iloc[0]
            or 'row 1' in report.query('status == "error"')['reason'].iloc[0])

@pytest.mark.parametrize('values', [('False', 'True', 'False'), ('0', '1', '0'), (0, 1, 0), (0., 1., 0.)])
def test_flags_are_read_as_what_they_say(tmp_path, values):
    layouts.bigearthnet(tmp_path/'ben', contains_cloud_or_shadow=list(values))
    assert convert(tmp_path/'ben', tmp_path/'out')['status'].tolist() == ['ok', 'excluded', 'ok']

def test_a_band_of_bigearthnet_that_is_named_otherwise_costs_its_patch(tmp_path):
    layouts.bigearthnet(tmp_path/'ben')
    file = sorted((tmp_path/'ben').rglob('*_VV.tif'))[1]
    with rasterio.open(file, 'r+') as f: f.set_band_description(1, 'Sigma0_VH')
    report = convert(tmp_path/'ben', tmp_path/'out')
    assert (sorted(report['status']) == ['error', 'ok', 'ok']
            and 'is named Sigma0_VH, the file VV' in ' '.join(report['reason']))

def test_generic_names_do_not_turn_the_order_of_benv2(tmp_path, monkeypatch):
    "Its radar is VH, VV; `Band 1` names nothing."
    whole = layouts.tif_bytes
    def named(x, *args, **kw):
        (tmp_path/'x.tif').write_bytes(whole(x, *args, **kw))
        with rasterio.open(tmp_path/'x.tif', 'r+') as f:
            for i in f.indexes: f.set_band_description(i, f'Band {i}')
        return (tmp_path/'x.tif').read_bytes()
    monkeypatch.setattr(layouts, 'tif_bytes', named)
    convert(layouts.benv2(tmp_path/'b.tortilla', 1), tmp_path/'out')
    np.testing.assert_array_equal(Store(tmp_path/'out').read('s1', [0])[0], layouts.radar(0))

def test_missing_facts_of_a_table_are_empty_and_labels_as_text_are_labels(tmp_path):
    layouts.bigearthnet(tmp_path/'ben', country=[None, 'Ireland', 'Ireland'],
                        labels=["['Pastures' 'Arable land']", 'Pastures', "['Pastures', 'Arable land']"])
    assert convert(tmp_path/'ben', tmp_path/'out')['status'].tolist() == ['ok']*3
    table = Store(tmp_path/'out').table
    assert (table['country'].tolist() == ['', 'Ireland', 'Ireland']
            and table['labels'].tolist() == ['Pastures|Arable land', 'Pastures', 'Pastures|Arable land'])

def test_an_odd_row_of_a_tortilla_costs_its_row(tmp_path):
    src = layouts.benv2(tmp_path/'b.tortilla',
                        row=lambda i: {'stac:time_start': ('x', '1497700000', '1497700000')[i], 'patch_id': None})
    report = convert(src, tmp_path/'out')
    assert (sorted(report['status']) == ['error', 'ok', 'ok']
            and 'row 0 of the table' in report.query('status == "error"')['reason'].iloc[0])

@pytest.mark.parametrize('layout', ['geotiff', 'npz', 'benv2', 'bigearthnet'])
def test_hidden_files_are_passed_over(tmp_path, layout):
    make = dict(geotiff=lambda d: layouts.geotiff(d, 2), npz=lambda d: layouts.npz(d, 2),
                benv2=lambda d: layouts.benv2(d/'b.tortilla', 2).parent,
                bigearthnet=lambda d: layouts.bigearthnet(d, 2))
    make[layout](tmp_path/'src')
    for p in [p for p in (tmp_path/'src').rglob('*') if p.is_file()]:
        (p.parent/f'._{p.name}').write_bytes(b'\0\5\x16\7')
        (p.parent/'.DS_Store').write_bytes(b'\0\0\0\1Bud1')
    assert convert(tmp_path/'src', tmp_path/'out', strict=True)['status'].tolist() == ['ok']*2

def test_a_corrected_source_is_not_taken_for_the_old_one(tmp_path, capsys):
    src = layouts.npz(tmp_path/'npz', 3)
    convert(src, tmp_path/'out')
    assert 'npz: 3 ok' in capsys.readouterr().out
    os.utime(src/'n0.npz', (1, 1))  # touched, with the same values
    report = convert(src, tmp_path/'out')
    out = capsys.readouterr().out
    assert report['status'].tolist() == ['ok']*3 and 'npz: 3 there before' in out and ' ok' not in out
    np.savez(src/'n1.npz', s1=layouts.radar(9), s2=layouts.optical(9, count=4), month=2)
    report = convert(src, tmp_path/'out')
    assert (report['status'].tolist() == ['ok', 'error', 'ok']
            and 'has changed since it was converted' in report['reason'][1])
    out = capsys.readouterr().out
    assert '2 there before' in out and '1 error' in out and ' ok' not in out
    assert main(['data', 'convert', str(src), str(tmp_path/'out')]) == 1

def test_a_run_converts_data_that_changed_again(tmp_path):
    src = layouts.npz(tmp_path/'npz', 2)
    run = Run('02_tiles', 'smoke', 0, tmp_path/'run', tmp_path/'reports', str(src))
    before = real_store(run).read('s1', [1])
    np.savez(src/'n1.npz', s1=layouts.radar(9), s2=layouts.optical(9, count=4), month=2)
    np.testing.assert_array_equal(real_store(run).read('s1', [1])[0], layouts.radar(9))
    assert not np.array_equal(before[0], layouts.radar(9))

def test_the_fingerprint_of_data_sees_every_file(tmp_path):
    layouts.bigearthnet(tmp_path/'ben', 1)
    file = sorted((tmp_path/'ben').rglob('*_VV.tif'))[0]
    seen = [fingerprint_files(tmp_path/'ben')]
    def change(how):
        how()
        seen.append(fingerprint_files(tmp_path/'ben'))
    stat = file.stat()
    change(lambda: os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1)))  # a nanosecond
    change(lambda: file.write_bytes(file.read_bytes() + b'0'))
    change(lambda: file.rename(file.with_name('x.tif')))
    change(lambda: (tmp_path/'ben'/'deep'/'er').mkdir(parents=True))
    change(lambda: (tmp_path/'ben'/'deep'/'er'/'y').touch())
    assert len({json.dumps(s) for s in seen}) == 5 and seen[3] == seen[4]  # an empty folder holds nothing
    for name in ('.DS_Store', '._x.tif', 'tiles.lock'): change(lambda: (tmp_path/'ben'/name).touch())
    (tmp_path/'ben'/'loop').symlink_to(tmp_path/'ben')
    assert seen[5] == seen[-1] and fingerprint_files(tmp_path/'nowhere') == []

def test_a_change_of_the_door_changes_the_keys_of_what_reads_through_it(tmp_path):
    "gac/data/raster.py is part of every notebook that imports the tiles."
    import shutil
    package = shutil.copytree(root()/'gac', tmp_path/'gac', ignore=shutil.ignore_patterns('__pycache__'))
    path = root()/'nbs'/'02_tiles.ipynb'
    key = lambda: _key(path, dict(data=''), {}, package, {})
    first = key()
    used = modules_used('from gac.data import convert', package)
    assert key() == first and {'data', 'data.raster', 'data.units', 'data.dates'} <= used
    for name in ('raster', 'units', 'dates', '__init__'):
        file, before = package/'data'/f'{name}.py', key()
        file.write_text(file.read_text(encoding='utf-8') + '\n# changed\n', encoding='utf-8')
        assert key() != before, name

# ---- outputs ---------------------------------------------------------------------------------------------------------

def ways(tmp_path:Path, file:Path) -> dict: # other names of one file
    (tmp_path/'link.tif').symlink_to(file)
    os.link(file, tmp_path/'hard.tif')
    return dict(itself=file, relative=Path(os.path.relpath(file)), symbolic=tmp_path/'link.tif',
                hard=tmp_path/'hard.tif')

def test_an_output_that_is_the_input_is_refused_before_anything_is_read(tmp_path, capsys):
    file = write(tmp_path/'a'/'s1.tif', DB, ('VV', 'VH'))
    whole = file.read_bytes()
    for path in ways(tmp_path, file).values():
        assert main(['infer', str(file), str(path), '--overwrite', '--month', '6']) == 2
        assert 'is the input itself' in capsys.readouterr().err and file.read_bytes() == whole
    src = layouts.npz(tmp_path/'npz', 1)
    for words in (['data', 'convert', str(src), str(src)], ['infer', str(src), str(src)]):
        assert main(words) == 2 and 'is the input itself' in capsys.readouterr().err
    assert sorted(p.name for p in src.iterdir()) == ['n0.npz']

def test_an_output_that_cannot_be_one_is_refused_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    swap(monkeypatch, 'gac.products.chain', 'SceneChain', lambda *args: pytest.fail('models are built'))
    file = write(tmp_path/'s1.tif', DB, ('VV', 'VH'))
    (tmp_path/'folder').mkdir()
    before = sorted(tmp_path.rglob('*'))
    for out, said in (('folder', 'is a folder'), ('o.png', 'ends in .tif'), ('s1.tif/o.tif', 'cannot be written')):
        assert main(['infer', str(file), str(tmp_path/out), '--overwrite', '--month', '6']) == 2
        assert said in capsys.readouterr().err and sorted(tmp_path.rglob('*')) == before

def test_what_was_said_is_not_asked_for(tmp_path, capsys):
    "No message asks for an option that was given."
    src = layouts.npz(tmp_path/'npz', change=lambda i: dict(s1=10**(layouts.radar(i)/10)*(1 if i else -1)))
    report = convert(src, tmp_path/'out', s1_units='linear')
    assert report['status'].tolist() == ['error', 'ok', 'ok'] and '--s1-units' not in report['reason'][0]
    scene = write(tmp_path/'s.tif', DB, ('VV', 'VH'), crs=None)
    import export_chains as chains
    infer_scene(scene, tmp_path/'o.tif', chains.Grey(), Tiling(48, 16, 96), InferConfig(month=6, biome=4))
    assert not {'--biome', '--month'} & set(capsys.readouterr().out.replace(')', ' ').replace('(', ' ').split())

# ---- numbers on another scale, an offset taken off twice -------------------------------------------------------------

LAND_DN = np.array([400, 350, 600, 650, 1000, 2000, 2400, 2600, 2700, 2800, 2000, 1200])[:, None, None]
LAND = np.random.default_rng(7).normal(LAND_DN, 90,
                                       (12, 120, 120)).clip(20).round().astype('u2')
SNOW = np.random.default_rng(8).normal(8000, 900, (12, 120, 120)).round().astype('u2')
SEA = np.random.default_rng(9).normal(np.array([260, 200, 150, 90, 80, 70, 60, 50, 50, 40, 20, 15])[:, None, None], 9,
                                      (12, 120, 120)).clip(1).round().astype('u2')

ROUND = {  # name -> (sources, options, what is said; empty: it is taken)
    'reflectance × 1000': ([LAND/np.float32(10)]*2, {}, '--s2-scale 0.001'),
    'whole numbers × 1000': ([(LAND/10).astype('u2')], {}, '--s2-scale 0.001'),
    'percent': ([LAND/np.float32(100)], {}, '--s2-scale 0.01'),
    'reflectance a tenth': ([LAND/np.float32(1e5)], {}, 'darker than land'),
    'DN × 2, two sources': ([LAND*2, LAND[:, ::-1]*2], {}, 'multiples of 2.*--s2-scale'),
    'DN × 4, one source': ([LAND*4], {}, 'multiples of 4.*--s2-scale'),
    'said': ([(LAND/10).astype('u2')], dict(s2_units='dn'), ''), 'DN × 4, said': ([LAND*4], dict(s2_units='dn'), ''),
    'thousandths by option': ([(LAND/10).astype('u2')], dict(s2_scale=.001), ''),
    'sea': ([SEA], {}, ''), 'snow': ([SNOW], dict(s2_offset=0), ''), 'land': ([LAND], {}, ''),
    'reflectance of three digits': ([(LAND/np.float32(1e4)).round(3)], {}, '')}

@pytest.mark.parametrize('what', ROUND)
def test_a_round_scale_is_not_taken_for_dn(tmp_path, what):
    sources, options, said = ROUND[what]
    for i, x in enumerate(sources): pair(tmp_path/'src', s2=(x, dict(names=S2_BANDS)), name=f'a{i}')
    if not said: assert convert(tmp_path/'src', tmp_path/'o', **options)['status'].tolist() == ['ok']*len(sources)
    else:
        with pytest.raises(GacError, match=said): convert(tmp_path/'src', tmp_path/'o', **options)
        assert not (tmp_path/'o'/'table.parquet').exists()

def test_one_source_on_a_round_scale_costs_that_source(tmp_path):
    for i, x in enumerate([LAND, LAND[:, ::-1], (LAND/10).astype('u2'), SEA]):
        pair(tmp_path/'src', s2=(x, dict(names=S2_BANDS)), name=f'a{i}')
    report = convert(tmp_path/'src', tmp_path/'o')
    assert report['status'].tolist() == ['ok', 'ok', 'error', 'ok'] and 'darker than land' in report['reason'][2]

@pytest.mark.parametrize('what', ['floats', 'whole numbers', 'by option', 'put back'])
def test_an_offset_taken_off_twice_is_refused(tmp_path, what):
    "Reflectance of about −0.1 is no reflectance; −1000 puts the offset back."
    low = LAND.astype('i4') - 1000
    x = dict(floats=(low/1e4).astype('f4'),
             **{'whole numbers': low.astype('i2'), 'by option': LAND, 'put back': low.astype('i2')})[what]
    options = dict(s2_offset={'by option': 1000, 'put back': -1000}[what]) if 'by' in what or 'put' in what else {}
    src = pair(tmp_path/'src', s2=(x, dict(names=S2_BANDS)))
    if what == 'put back':
        stored(src, tmp_path/'o', **options)
        return np.testing.assert_array_equal(Store(tmp_path/'o').read('s2', [0])[0], LAND)
    with pytest.raises(GacError, match='taken off twice.*--s2-offset'): stored(src, tmp_path/'o', **options)

@pytest.mark.parametrize('where', ['pairs', 'bigearthnet_v2', 'geobench_benv2', 'terramesh_tiles'])
def test_no_real_chip_is_taken_for_another_scale(where):
    "Dark sea, snow, and a chip that happens to have even values alone: all are DN, each as a data set of its own."
    if not (real_data() and (real_data()/where).exists()): pytest.skip('shared/real is not here')
    folder = real_data()/where
    for src in sorted(p for p in folder.iterdir() if p.is_dir()) if where == 'pairs' else [folder]:
        for job in READERS[recognise(src)](src, Options(keep_snow_cloud=True)):
            if job.load is None: continue
            try: source = _loaded(job)
            except GacError: continue
            _check_scale([source], 'dn')
            x = source.s2.astype('f8')
            check_negative(x, 0)
            if source.name == 'S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_29_83':
                with pytest.raises(GacError, match='taken off twice'): check_negative(x, 1000)

@pytest.mark.parametrize('kind, band, said',
                         [('S2', 'B02', '_B01.tif: no scale or offset tag'),
                          ('S1', 'VV', '_VH.tif: no scale or offset tag')])
def test_a_scale_that_some_files_of_a_patch_lack_costs_the_patch(tmp_path, kind, band, said):
    layouts.bigearthnet(tmp_path/'ben')
    for file in sorted((tmp_path/'ben').rglob(f'*_{band}.tif'))[1:2]:
        with rasterio.open(file, 'r+') as f: f.scales = (.1,)
    report = convert(tmp_path/'ben', tmp_path/'out')
    assert sorted(report['status']) == ['error', 'ok', 'ok']
    assert re.search(said, report.query("status == \"error\"")["reason"].iloc[0])

def test_scales_of_the_files_of_a_patch_are_applied_file_by_file(tmp_path):
    layouts.bigearthnet(tmp_path/'ben', 1)
    for file in (tmp_path/'ben').rglob('*.tif'):
        factor = 2. if file.stem.endswith(('_B02', '_VH')) else 4.
        with rasterio.open(file) as f: x, place = f.read(), f.transform
        layouts.write_tif(file, x/np.float32(factor), pixel=place.a, west=place.c)
        with rasterio.open(file, 'r+') as f: f.scales = (factor,)
    convert(tmp_path/'ben', tmp_path/'out')
    np.testing.assert_array_equal(Store(tmp_path/'out').read('s2', [0], OPT_BANDS)[0],
                                  layouts.optical(0)[list(OPT_INDEX)])
    np.testing.assert_allclose(Store(tmp_path/'out').read('s1', [0])[0], layouts.radar(0))

# ---- dates of a pair, mirrored grids, sea among land -----------------------------------------------------------------

@pytest.mark.parametrize('layout', ['geotiff', 'bigearthnet', 'npz'])
@pytest.mark.parametrize('late', [False, True])
def test_radar_and_truth_of_other_times_are_said(tmp_path, capsys, layout, late):
    "The pair is kept: on radar of another year a field may have been mown, and nobody should wonder why."
    day = '20190621' if late else '20170621'
    if layout == 'npz': layouts.npz(tmp_path/'src', 1, date='2017-06-17T11:33:21', s1_date=day)
    elif layout == 'geotiff':
        for kind, when in (('S1GRD', day), ('S2L2A', '2017-06-17')):
            x, names = (DB, ('VV', 'VH')) if kind == 'S1GRD' else (DN, S2_BANDS)
            write(tmp_path/'src'/kind/'a0.tif', x, names, tags=dict(datetime=f'{when}T10:00:00'))
    else:
        table = layouts.bigearthnet(tmp_path/'src', 1)
        for p in sorted((tmp_path/'src'/'BigEarthNet-S1').rglob('*20170617*'), key=lambda p: -len(p.parts)):
            p.rename(p.with_name(p.name.replace('20170617', day)))
        renamed = table.assign(s1_name=table['s1_name'].str.replace('20170617', day))
        renamed.to_parquet(tmp_path/'src'/'metadata.parquet')
    report = convert(tmp_path/'src', tmp_path/'o')
    said = 'Sentinel-1 is of 2019-06-21 and Sentinel-2 of 2017-06-17, 734 days apart'
    assert (report['status'].tolist() == ['ok'] and (said in report['reason'][0]) == late
            and (said in capsys.readouterr().out) == late)

@pytest.mark.parametrize('e', [-10, 10])
def test_a_grid_from_east_to_west_is_refused(tmp_path, e):
    place = dict(transform=(-10, 0, 6e5, 0, e, 5.8e6))
    src = pair(tmp_path/'src', **place)
    for read in (lambda: open_scene(src/'S1GRD'/'a0.tif'), lambda: stored(src, tmp_path/'o')):
        with pytest.raises(GacError, match='a0.tif: its columns run from east to west.*gdalwarp'): read()

def sea(vv:float, vh:float, seed:int=3) -> np.ndarray: # (2, 120, 120) dB
    "Water: its medians, and the speckle of a GRD."
    return np.random.default_rng(seed).normal(np.array([vv, vh])[:, None, None], 1.9, (2, 120, 120))

@pytest.mark.parametrize('vv, vh', [(-8, -18), (-3, -14), (-12, -27), (-18, -31)])
@pytest.mark.parametrize('unit', ['dB', 'linear', 'amplitude'])
def test_a_sea_among_land_is_taken_in_the_unit_of_the_others(tmp_path, vv, vh, unit):
    "Sea is 10 to 16 dB brighter in VV than in VH: read as power, such an amplitude looks like land."
    as_unit = dict(dB=lambda x: x, linear=lambda x: 10**(x/10), amplitude=lambda x: 10**(x/20))[unit]
    for i, x in enumerate([DB.astype('f8')]*4 + [sea(vv, vh)]): pair(tmp_path/'src', (as_unit(x), NAMES), name=f'a{i}')
    report = convert(tmp_path/'src', tmp_path/'o')
    assert report['status'].tolist() == ['ok']*5, report['reason'].tolist()
    np.testing.assert_allclose(Store(tmp_path/'o').read('s1', [4])[0], sea(vv, vh), atol=1e-4)

def test_an_amplitude_of_the_sea_alone_is_not_taken_for_power(tmp_path):
    src = pair(tmp_path/'src', (10**(sea(-14, -26)/20), NAMES))
    for read in (lambda **o: open_scene(src/'S1GRD'/'a0.tif', say=False, **o),
                 lambda **o: convert(src, tmp_path/'o', **o)):
        with pytest.raises(GacError, match='fit linear and amplitude.*--s1-units'): read()
        read(s1_units='amplitude')
    assert open_scene(write(tmp_path/'p.tif', 10**(sea(-14, -20)/10), ('VV', 'VH')), say=False).unit == 'linear'

@pytest.mark.filterwarnings('error')
def test_radar_of_zeros_is_refused_without_a_warning(tmp_path):
    "NumPy's `All-NaN slice encountered` helps nobody."
    src = pair(tmp_path/'src', (DB*0, {}))
    for read in (lambda: open_scene(src/'S1GRD'/'a0.tif', say=False), lambda: stored(src, tmp_path/'o')):
        with pytest.raises(GacError, match='a0.tif|exactly 0|no unit'): read()
    check_order([]), check_order([DB*0])

# ---- paths -----------------------------------------------------------------------------------------------------------

def test_a_file_in_the_way_of_an_output_is_named(tmp_path):
    (tmp_path/'note').touch()
    for out in ('note', 'note/deep/er'):
        said = r'cannot be written to \(.*note is a file, and a folder is needed there.*Give another output'
        with pytest.raises(GacError, match=said) as e:
            writable(tmp_path/out)
        assert 'exists' not in str(e.value) and 'permission' not in str(e.value)

@pytest.mark.skipif(os.name != 'posix', reason='of POSIX shells')
@pytest.mark.parametrize('name, code', [('données'.encode(), 0), ('données'.encode('latin-1'), 2)])
def test_a_path_with_accents_works_in_a_shell_of_ascii(tmp_path, name, code):
    "A name in UTF-8 just works; one in another encoding is refused by what is wrong with it."
    import subprocess
    layouts.geotiff(tmp_path/'src', 1)
    try: os.rename(os.fsencode(tmp_path/'src'), os.fsencode(tmp_path) + b'/' + name)
    except OSError: pytest.skip('this disk takes names in UTF-8 only')
    run_main = 'import sys; from gac.cli import main; sys.exit(main())'
    done = subprocess.run([os.fsencode(w) for w in (sys.executable, '-c', run_main, 'data', 'convert')]
                          + [os.fsencode(tmp_path) + b'/' + name, os.fsencode(tmp_path) + b'/o_' + name],
                          capture_output=True,
                          env=dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'))
    assert done.returncode == code, done.stderr.decode('utf-8', 'replace')
    if code: assert b'bytes that are no UTF-8' in done.stderr and b'Rename' in done.stderr
    else: assert len(Store(tmp_path/f'o_{name.decode()}')) == 1

@pytest.mark.skipif(os.name != 'posix', reason='of POSIX disks')
@pytest.mark.parametrize('layout, status', [('geotiff', ['ok', 'error']), ('npz', ['ok', 'ok'])])
def test_a_name_that_is_no_utf8_costs_at_most_its_file(tmp_path, layout, status):
    "GDAL cannot open it; NumPy can."
    getattr(layouts, layout)(tmp_path/'src', 2)
    for path in [p for p in (tmp_path/'src').rglob('*') if p.stem in ('a1', 'n1')]:
        try: os.rename(path, os.fsencode(path).replace(b'1.', b'1\xe9.'))
        except OSError: pytest.skip('this disk takes names in UTF-8 only')
    report = convert(tmp_path/'src', tmp_path/'o')
    assert report['status'].tolist() == status and len(pd.read_csv(tmp_path/'o'/'report.csv')) == 2
    if 'error' in status: assert 'bytes that are no UTF-8' in report['reason'][1]
