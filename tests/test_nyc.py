"The New York data set from rasters of odd grids and a STAC catalogue, its refusals, and the configurations."
import datetime
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.transform import from_origin
from swapping import swap

from gac.core.files import GacError, root
from gac.core.manifest import setting_differences
from gac.core.vocabulary import S2_BANDS
from gac.models.build import build_model
from gac.nyc.build import BuildOptions, build_chips, stac_to_db
from gac.nyc.chips import Chips, assign_splits, chip_places, split_gap, write_chip
from gac.nyc.city import city, from_city
from gac.nyc.gate import gate, publish
from gac.nyc.series import from_series, map_with
from gac.nyc.sources import S2_ASSETS, Catalogue, Files, check_contents, stac_items
from gac.nyc.survey import (
    NO_LABEL,
    NYC_CLASSES,
    class_shares,
    class_table,
    majority,
    metres_per_pixel,
    utm_grid,
    warped,
)
from gac.nyc.thoughts import LULC_OF, generate_thoughts, write_true_thoughts
from gac.nyc.tim import (
    FAMILIES,
    THOUGHT,
    TIM_INPUTS,
    TIM_VARIANTS,
    equal_compute_steps,
    gflop,
    loadable_variant,
    nyc_scores,
    read_test,
    run_config,
    run_settings,
    standardisation,
)
from gac.products.downstream_config import at_root, open_config, write_config
from gac.products.plateau import StopRule, class_weights, read_plateau, until_plateau

DAYS = ('2021-01-12', '2021-04-15', '2021-07-20', '2021-10-23')
S1_DAYS = ('2021-01-10', '2021-04-16', '2021-07-18', '2021-10-22')
OPT = BuildOptions(size=32, per_block=2, guard=8, test=8, val=.15)
EAST, NORTH, N = 584_000, 4_510_000, 200  # the area: 2 km in UTM zone 18

def codes(x, y) -> np.ndarray: # metres in UTM
    "Return the code of the survey at a place: squares of 80 m of eight codes, water in the west."
    k = (np.floor((x - EAST)/80) + 3*np.floor((y - NORTH)/80)).astype(int) % 8 + 1
    return np.where(x < EAST + 500, 4, k).astype(np.uint8)

def save(path:Path, x:np.ndarray, crs:str, transform, **kw) -> Path: # x: (C, H, W)
    with rasterio.open(path, 'w', driver='GTiff', height=x.shape[1], width=x.shape[2], count=len(x), dtype=x.dtype,
                       crs=crs, transform=transform, **kw) as dst:
        dst.write(x)
    return path

def places(crs:str, transform, h:int, w:int) -> tuple: # UTM coordinates of the pixels of a raster
    col, row = np.meshgrid(np.arange(w) + .5, np.arange(h) + .5)
    x, y = transform*(col, row)
    return (x, y) if crs == 'EPSG:32618' else Transformer.from_crs(crs, 'EPSG:32618', always_xy=True).transform(x, y)

def optical(code, month:int, rng) -> np.ndarray: # (12, H, W)
    "Each code's own level in each month: the code can be read back from the image."
    level = np.array([0, 1800, 1500, 2500, 60, 3000, 1200, 1900, 1400])[code]*(1 + .1*np.sin(month + code))
    return np.stack([level*(1 + .03*b) for b in range(12)])*np.exp(rng.normal(0, .05, (12, *code.shape)))

def write_area(folder:Path, offset:int=0) -> Path: # of the YAML
    rng = np.random.default_rng(0)
    feet = 3937/1200
    t = Transformer.from_crs('EPSG:32618', 'EPSG:2263', always_xy=True)
    left, top = t.transform(EAST, NORTH + 2000)
    survey = from_origin(left, top, 5*feet, 5*feet)  # 5 m in feet, north up in the state plane: askew in UTM
    save(folder/'landcover.tif', codes(*places('EPSG:2263', survey, 400, 400))[None], 'EPSG:2263', survey, nodata=0)
    utm = from_origin(EAST - 300, NORTH + 2300, 10, 10)
    code = codes(*places('EPSG:32618', utm, 260, 260))
    dates = []
    for day, s1_day in zip(DAYS, S1_DAYS):
        month = int(day[5:7])
        x = np.clip(optical(code, month, rng) + offset, 1, 20_000).astype(np.uint16)
        x[:, :5] = 0  # no data along the northern edge
        scl = np.full((130, 130), 4, np.uint8)
        if month == 7: scl[40:50, 50:60] = 9
        save(folder/f's2_{day}.tif', x, 'EPSG:32618', utm, nodata=0)
        save(folder/f'scl_{day}.tif', scl[None], 'EPSG:32618', from_origin(EAST - 300, NORTH + 2300, 20, 20))
        degrees = from_origin(-74.02, 40.77, .0001, .0001)
        c1 = codes(*places('EPSG:4326', degrees, 500, 500))
        vv = np.where(c1 == 4, .006, np.where(c1 == 5, .4, .07))*rng.gamma(4, .25, c1.shape)
        save(folder/f's1_{day}.tif', np.stack([vv, vv/6]).astype(np.float32), 'EPSG:4326', degrees, nodata=-32768)
        dates.append(dict(date=day, s2=f's2_{day}.tif', scl=f'scl_{day}.tif', s1_date=s1_day, s1=f's1_{day}.tif'))
    coarse = from_origin(-74.05, 40.80, .0003, .0003)
    dem = np.add.outer(np.linspace(60, 0, 300), np.linspace(0, 20, 300)).astype(np.float32)
    save(folder/'dem.tif', dem[None], 'EPSG:4326', coarse)
    (folder/'sources.yaml').write_text(yaml.safe_dump(dict(landcover='landcover.tif', dem='dem.tif', dates=dates)))
    return folder/'sources.yaml'

@pytest.fixture(scope='module')
def area(tmp_path_factory) -> Path: return write_area(tmp_path_factory.mktemp('area'))

@pytest.fixture
def changed(area, tmp_path):
    "Copy the area and change its YAML by a function."
    def change(edit) -> Path:
        for f in area.parent.iterdir(): shutil.copy(f, tmp_path/f.name)
        spec = yaml.safe_load(area.read_text())
        edit(spec)
        (tmp_path/'sources.yaml').write_text(yaml.safe_dump(spec))
        return tmp_path/'sources.yaml'
    return change

@pytest.fixture(scope='module')
def built(area, tmp_path_factory) -> Chips:
    return build_chips(Files(area), tmp_path_factory.mktemp('built')/'nyc', opt=OPT)

def test_labels_lie_where_the_images_do(built):
    assert built.about['crs'] == 'EPSG:32618' and built.about['s1_unit'] == 'linear' and built.about['offsets'] == [0]*4
    right = water = n = 0
    for name in built.ids('train')[:8]:
        label, s2, s1 = (built.read(name, m) for m in ('LABEL', 'S2L2A', 'S1RTC'))
        top, left = built.table.set_index('id').loc[name, ['top', 'left']]
        t = rasterio.Affine(*built.about['transform'])*rasterio.Affine.translation(left, top)
        code = codes(*places('EPSG:32618', t, *label.shape))
        truth = class_table()[code]
        ok = label >= 0
        right, n = right + (label == truth)[ok].sum(), n + ok.sum()
        inside = ok & (np.abs(s2[:, 0] - s2[:, 0].mean(0)).max(0) < 9e9) & (label == 2)
        water += (s2[0, 0][inside] < 500).sum() - .97*inside.sum()
        assert s2.shape == (4, 12, 32, 32) and s1.shape == (4, 2, 32, 32) and -40 < s1.min() < s1.max() < 15
    assert right/n > .97 and water >= 0

def test_rotated_edges_have_no_label(built, area):
    "A pixel has a label where the survey, askew in UTM, covers it, and where it does not it has none."
    with rasterio.open(area.parent/'landcover.tif') as src: inverse, shape, to = ~src.transform, src.shape, src.crs
    outside = 0
    for chip in built.table.itertuples():
        label = built.read(chip.id, 'LABEL')
        x, y = places('EPSG:32618',
                      rasterio.Affine(*built.about['transform'])*rasterio.Affine.translation(chip.left, chip.top),
                      *label.shape)
        col, row = inverse*Transformer.from_crs('EPSG:32618', to, always_xy=True).transform(x, y)
        deep = np.minimum.reduce([col, row, shape[1] - col, shape[0] - row])  # pixels of the survey to its nearest edge
        assert (label[deep < -2] == -1).all() and (label[deep > 2] >= 0).all()
        outside += (deep < -2).sum()
    assert outside > 50

@pytest.mark.parametrize('crs, turn, step', [('EPSG:2263', 0, 8.), ('EPSG:2263', -20, 12.), ('EPSG:32618', 33, 4.),
                                             ('EPSG:32618', 90, 4.), ('EPSG:4326', 0, 3e-5),
                                             ('EPSG:3857', 0, 30.)])
def test_a_survey_on_any_grid(tmp_path, crs, turn, step):
    "Labels match the codes in feet, in degrees, on rotated rasters, and on finer and coarser pixels than 10 m."
    x, y = Transformer.from_crs('EPSG:32618', crs, always_xy=True).transform(EAST + 800, NORTH + 1000)
    n = 40 if step == 30 else 200
    t = rasterio.Affine.translation(
        x, y)*rasterio.Affine.rotation(turn)*rasterio.Affine.scale(step, -step)*rasterio.Affine.translation(-n/2, -n/2)
    survey = save(tmp_path/'survey.tif', codes(*places(crs, t, n, n))[None], crs, t, nodata=0)
    with rasterio.open(survey) as src:
        assert metres_per_pixel(src) == pytest.approx(step*{'EPSG:2263': 1200/3937, 'EPSG:4326': 111_320}.get(crs, 1))
    grid = utm_grid(survey)
    label = majority(class_shares(survey, grid))
    known = label != NO_LABEL
    truth = class_table()[codes(*places('EPSG:32618', grid.affine, *grid.shape))]
    corners = np.array(Transformer.from_crs(crs, 'EPSG:32618', always_xy=True).transform(*t*(np.array([0, n, n, 0]),
                                                                                             np.array([0, 0, n, n]))))
    ground = abs(np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]))
    assert (label == truth)[known].mean() > (.75 if step == 30 else .9)
    assert known.sum()*100 == pytest.approx(ground, rel=.05)

def test_a_survey_that_does_not_fit_in_memory_is_read_in_strips(tmp_path, monkeypatch):
    "Four billion pixels of 6 inches, most of them never written: a chip is labelled by reads of its own size."
    import rasterio.vrt
    side, step = 64_000, .1524
    t = rasterio.transform.from_origin(EAST, NORTH + side*step, step, step)
    with rasterio.open(tmp_path/'big.tif', 'w', driver='GTiff', height=side, width=side, count=1, dtype='uint8',
                       crs='EPSG:32618', transform=t, nodata=0, tiled=True, blockxsize=512, blockysize=512,
                       compress='deflate', SPARSE_OK=True) as dst:
        dst.write(np.where(np.arange(2048) < 1024, 4, 5).astype(np.uint8)[None].repeat(2048, 0), 1,
                  window=((30_000, 32_048), (30_000, 32_048)))
    reads = []
    class Watched(rasterio.vrt.WarpedVRT):
        def read(self, *args, **kw):
            x = super().read(*args, **kw)
            reads.append(x.size)
            return x
    monkeypatch.setattr(rasterio.vrt, 'WarpedVRT', Watched)
    grid = utm_grid(tmp_path/'big.tif')
    top, left = 30_000*step/10, 30_000*step/10
    label = majority(class_shares(tmp_path/'big.tif',
                                  grid[int(top) - 96:int(top) + 128, int(left) - 96:int(left) + 128]))
    assert {2, 3, NO_LABEL} == set(np.unique(label))
    assert (label != NO_LABEL).sum()*100 == pytest.approx((2048*step)**2, rel=.1)
    assert len(reads) == 14 and max(reads) < 4_000_000 < side**2/1000

def test_split_and_manifest(built):
    about, table = built.about, built.table
    assert about['n']['test'] == 8 and split_gap(table, 32) >= 8 == about['gap_px']['train and test']
    assert not set(table.block[table.split == 'test']) & set(table.block[table.split == 'train'])
    boxes = {s: [(r.top, r.left) for r in table[table.split == s].itertuples()] for s in ('train', 'test')}
    apart = [max(abs(a - c), abs(b - d)) - 32 for a, b in boxes['test'] for c, d in boxes['train']]
    assert min(apart) >= 8  # counted anew, chip by chip
    assert (built.folder/'splits'/'test.txt').read_text().split() == built.ids('test')
    built.verify()
    victim = next(iter(table.files[0]))
    saved = (built.folder/'chips'/victim).read_bytes()
    (built.folder/'chips'/victim).write_bytes(saved[:-1] + b'x')
    with pytest.raises(GacError, match=victim): built.verify()
    (built.folder/'chips'/victim).write_bytes(saved)

def test_exactly_64_test_chips_where_the_area_allows():
    places = chip_places((1400, 1400), 80, 2, 16)
    places[list(NYC_CLASSES)] = np.random.default_rng(0).dirichlet([1]*5, len(places))
    places['split'] = assign_splits(places)
    assert len(places) >= 192 and (places.split == 'test').sum() == 64
    few = places[:60].copy()
    few['split'] = assign_splits(few)
    assert (few.split == 'test').sum() == 20 and split_gap(few, 80) >= 16

def test_a_whole_data_set_has_exactly_64_test_chips(tmp_path):
    chips = from_city(tmp_path/'city', 1, 270, BuildOptions(size=16, guard=4, test=64, suffix='.npy'))
    assert chips.about['n']['test'] == len(chips.ids('test')) == 64
    assert len(set(chips.table.id)) == len(chips.table) >= 192
    assert (split_gap(chips.table, 16) >= 4 and not set(chips.table.block[chips.table.split == 'test']) & set(
                chips.table.block[chips.table.split == 'train']))

def test_four_timestamps_differ(built):
    assert len(set(built.days)) == len(set(built.about['s1_days'])) == 4
    for name in built.table.id:
        for m in ('S2L2A', 'S1RTC'):
            x = built.read(name, m)
            assert not any(np.array_equal(x[i], x[j]) for i in range(4) for j in range(i))

def test_clouds_are_filled_from_other_dates(built):
    cloudy = built.table[built.table.seen < 1]
    assert len(cloudy)
    for name in cloudy.id: assert (built.read(name, 'S2L2A') > 0).all()

def test_stops_and_goes_on(area, built, tmp_path, monkeypatch):
    real, calls = write_chip, []
    def twice(*a, **kw):
        calls.append(a[1])
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*a, **kw)
    swap(monkeypatch, 'gac.nyc.chips', 'write_chip', twice)
    with pytest.raises(KeyboardInterrupt): build_chips(Files(area), tmp_path/'nyc', opt=OPT)
    again = build_chips(Files(area), tmp_path/'nyc', opt=OPT)
    assert len(calls) == len(again.table) + 1  # only the one that failed was made twice
    assert (again.folder/'chips.csv').read_bytes() == (built.folder/'chips.csv').read_bytes()

def refused(path:Path, out:Path, match:str, opt=OPT):
    with pytest.raises(GacError, match=match): build_chips(Files(path), out/'nyc', opt=opt)

def test_one_date_four_times_is_refused(changed, tmp_path):
    def by_date(spec): spec['dates'][2]['date'] = spec['dates'][1]['date']
    refused(changed(by_date), tmp_path, f'{DAYS[1]} is used for 2 of 4 timestamps')

def test_three_dates_are_not_four(changed, tmp_path):
    refused(changed(lambda spec: spec['dates'].pop()), tmp_path, '3 timestamps .*expected 4')

def test_copies_under_other_dates_are_refused(changed, tmp_path):
    def by_content(spec):
        for d in spec['dates']: d.update(s2=f's2_{DAYS[0]}.tif', scl=f'scl_{DAYS[0]}.tif')
    refused(changed(by_content), tmp_path, 'hold the same image')

def test_copies_of_the_radar_are_refused(changed, tmp_path):
    def radar(spec): spec['dates'][3]['s1'] = spec['dates'][0]['s1']
    refused(changed(radar), tmp_path, 'Sentinel-1: .* hold the same image')

def test_zero_terrain_is_refused(changed, tmp_path):
    path = changed(lambda spec: None)
    with rasterio.open(path.parent/'dem.tif', 'r+') as dst: dst.write(np.zeros((1, 300, 300), np.float32))
    refused(path, tmp_path, 'every elevation is 0')

def test_missing_files_dates_and_bands_are_named(changed):
    with pytest.raises(GacError, match='s2_gone.tif is not there'):
        Files(changed(lambda s: s['dates'][0].update(s2='s2_gone.tif')))
    with pytest.raises(GacError, match=r'dates\[1\]: s1 missing'): Files(changed(lambda s: s['dates'][1].pop('s1')))
    with pytest.raises(GacError, match='is no date'): Files(changed(lambda s: s['dates'][1].update(date='spring')))
    with pytest.raises(GacError, match='band .*B12.* missing'):
        Files(changed(lambda s: s['dates'][0].update(s2={'B02': 'dem.tif'})))

def test_a_raster_without_a_place_is_refused(changed, tmp_path):
    path = changed(lambda spec: None)
    with rasterio.open(path.parent/'landcover.tif') as src: x = src.read()
    save(path.parent/'landcover.tif', x, None, from_origin(0, 0, 1, 1))
    refused(path, tmp_path, 'landcover.tif: no coordinate reference system')

def test_the_offset_of_baseline_4_is_taken_off(tmp_path):
    path = write_area(tmp_path, 1000)
    refused(path, tmp_path, '--s2-offset 1000')
    spec = yaml.safe_load(path.read_text())
    for d in spec['dates']: d['baseline'] = '05.00'
    path.write_text(yaml.safe_dump(spec))
    chips = build_chips(Files(path), tmp_path/'nyc', opt=OPT)
    assert chips.about['offsets'] == [1000]*4
    name = next(i for i in chips.table.id if (chips.read(i, 'LABEL') == 2).mean() > .3)
    assert np.median(chips.read(name, 'S2L2A')[0, 0][chips.read(name, 'LABEL') == 2]) < 200

def write_catalogue(area:Path, to:Path, days=DAYS, relative:bool=False) -> Path:
    "Write a static STAC catalogue of the area's files, bands by the names of a public catalogue."
    import pystac
    from shapely.geometry import box, mapping
    bbox = [-74.03, 40.71, -73.95, 40.78]
    cat = pystac.Catalog('test', 'a city')
    for name in ('sentinel-2-l2a', 'sentinel-1-rtc', 'cop-dem-glo-30'):
        when = datetime.datetime(2021, 1, 1)
        extent = pystac.Extent(pystac.SpatialExtent([bbox]), pystac.TemporalExtent([[when, None]]))
        cat.add_child(pystac.Collection(name, name, extent))
    def item(collection, name, day, assets, **properties):
        i = pystac.Item(name, mapping(box(*bbox)), bbox, datetime.datetime.fromisoformat(day + 'T15:51:00+00:00'),
                        properties)
        for key, file in assets.items(): i.add_asset(key, pystac.Asset(str(file)))
        cat.get_child(collection).add_item(i)
    def split(path:Path, names) -> dict: # one file per band, as catalogues have it
        with rasterio.open(path) as src:
            for n, name in enumerate(names, 1):
                save(to/f'{path.stem}_{name}.tif', src.read(n)[None], str(src.crs), src.transform, nodata=src.nodata)
        return {name: to/f'{path.stem}_{name}.tif' for name in names}
    to.mkdir()
    common = [S2_ASSETS[b][1] for b in S2_BANDS]
    for day, s1_day in zip(days, S1_DAYS):
        item('sentinel-2-l2a', f'S2_{day}', day,
             split(area.parent/f's2_{day}.tif', common) | {'scl': area.parent/f'scl_{day}.tif'},
             **{'eo:cloud_cover': 5})
        item('sentinel-1-rtc', f'S1_{day}', s1_day, split(area.parent/f's1_{day}.tif', ('vv', 'vh')))
    item('sentinel-2-l2a', 'S2_cloudy', '2021-04-18', {'blue': area}, **{'eo:cloud_cover': 90})
    item('cop-dem-glo-30', 'DEM', '2021-01-01', {'data': area.parent/'dem.tif'})
    cat.normalize_hrefs(str(to/'stac'))
    if relative: cat.make_all_asset_hrefs_relative()
    cat.save(pystac.CatalogType.SELF_CONTAINED if relative else pystac.CatalogType.ABSOLUTE_PUBLISHED)
    return to/'stac'/'catalog.json'

SPANS = ('2021-01-12', '2021-04-01/2021-04-30', '2021-07-20', '2021-10-01/2021-10-31')

def test_a_static_catalogue_gives_the_same_chips(area, tmp_path):
    url, survey = write_catalogue(area, tmp_path/'cat'), area.parent/'landcover.tif'
    grid = utm_grid(survey)[30:180, 30:180]
    source = Catalogue(url, grid, SPANS)
    assert [d.day for d in source.dates] == list(DAYS) and [d.s1_day for d in source.dates] == list(S1_DAYS)
    opt = BuildOptions(size=64, per_block=1, guard=8, test=1, val=.2)
    one, two = (build_chips(s, tmp_path/f'nyc{i}', survey, opt, grid=grid) for i, s in enumerate((Files(area), source)))
    assert len(one.table) == 4 and one.table.drop(columns='files').equals(two.table.drop(columns='files'))
    for name in one.table.id[one.table.seen == 1]:
        a, b = ({m: c.read(name, m).astype(float) for m in ('LABEL', 'S2L2A', 'S1RTC', 'DEM')} for c in (one, two))
        assert (a['LABEL'] == b['LABEL']).all() and np.abs(a['S2L2A'] - b['S2L2A']).max() <= 2
        assert np.abs(a['DEM'] - b['DEM']).max() < .1
        assert np.median(np.abs(a['S1RTC'] - b['S1RTC'])) < .5  # two resamplers weigh speckle in degrees differently

def test_missing_dates_are_named_all_at_once(area, tmp_path):
    url = write_catalogue(area, tmp_path/'cat', DAYS[:3])
    grid = utm_grid(area.parent/'landcover.tif')
    with pytest.raises(GacError, match='2021-10-01/2021-10-31; .*2022-01-01/2022-01-31'):
        Catalogue(url, grid, (*SPANS, '2022-01-01/2022-01-31'))
    with pytest.raises(GacError, match='2021-01-12 is used for 2 of 2'):
        Catalogue(url, grid, ('2021-01-12', '2021-01-01/2021-01-31'))
    with pytest.raises(GacError, match='no Sentinel-1 image within 1 days of 2021-01-12'):
        Catalogue(url, grid, ('2021-01-12',), s1_days=1)
    with pytest.raises(GacError, match='not a readable STAC catalogue'): Catalogue(tmp_path/'nothing.json', grid, SPANS)

@contextmanager
def served(catalogue:Path): # -> address, searches it was asked
    "Serve the items of a static catalogue by a STAC API."
    import pystac
    items, asked = list(pystac.Catalog.from_file(str(catalogue)).get_items(recursive=True)), []
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def answer(self, what):
            body = json.dumps(what).encode()
            self.send_response(200)
            for k, v in (('Content-Type', 'application/json'), ('Content-Length', str(len(body)))):
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)
        def do_GET(self):
            here = f'http://127.0.0.1:{self.server.server_port}/'
            self.answer(dict(type='Catalog', id='api', description='an API', stac_version='1.0.0',
                conformsTo=['https://api.stacspec.org/v1.0.0/core', 'https://api.stacspec.org/v1.0.0/item-search'],
                links=[dict(rel='self', href=here), dict(rel='root', href=here),
                       dict(rel='search', href=here + 'search', type='application/geo+json', method='POST')]))
        def do_POST(self):
            q = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            asked.append(q)
            first, _, last = q.get('datetime', '0000/9999').partition('/')
            hits = [i.to_dict(transform_hrefs=False) for i in items if i.collection_id in q['collections']
                    and first[:10] <= i.datetime.date().isoformat() <= last[:10]]
            self.answer(dict(type='FeatureCollection', features=[h | dict(links=[]) for h in hits], links=[]))
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/', asked
    finally: server.shutdown(); server.server_close()

def test_an_api_is_searched(area, tmp_path):
    static, grid = write_catalogue(area, tmp_path/'cat'), utm_grid(area.parent/'landcover.tif')[30:94, 30:94]
    with served(static) as (url, asked):
        api = Catalogue(url, grid, SPANS)
        # four optical, four radar, terrain
        assert len(asked) == 9 and asked[0]['collections'] == ['sentinel-2-l2a'] and len(asked[0]['bbox']) == 4
        walked = Catalogue(static, grid, SPANS)
        assert [(d.day, d.s1_day) for d in api.dates] == [(d.day, d.s1_day) for d in walked.dates]
        assert (np.array_equal(api.s2(api.dates[1], grid)[0], walked.s2(walked.dates[1], grid)[0])
                and np.array_equal(api.dem(grid), walked.dem(grid)))
        with pytest.raises(GacError, match='no Sentinel-2 image .*2023-01-01'): Catalogue(url, grid, ('2023-01-01',))

def test_a_catalogue_from_the_command_line(area, tmp_path, capsys):
    "A catalogue whose links and assets are relative, as one is that was copied to a disk."
    from gac.cli import main
    url = write_catalogue(area, tmp_path/'cat', relative=True)
    assert '"/' not in (url.parent/'sentinel-2-l2a'/f'S2_{DAYS[0]}'/f'S2_{DAYS[0]}.json').read_text()
    words = ['nyc', 'build', '--catalog', str(url), '--landcover', str(area.parent/'landcover.tif'), '--output-dir',
             str(tmp_path/'nyc'), '--tile-size', '64',
             '--guard', '8', '--test', '2', '--dates']
    assert main([*words, ','.join(SPANS)]) == 0
    chips = Chips(tmp_path/'nyc')
    chips.verify()
    assert "'test': 2" in capsys.readouterr().out and chips.days == list(DAYS) and split_gap(chips.table, 64) >= 8
    assert main([*words, ','.join(SPANS[:3])]) == 2 and 'expected 4' in capsys.readouterr().err

def test_from_the_command_line(area, tmp_path, capsys):
    from gac.cli import main
    size = ['--tile-size', '64', '--guard', '8', '--test', '1']
    assert main(['nyc', 'build', '--sources', str(area), '--output-dir', str(tmp_path/'nyc'), *size]) == 0
    assert "'test': 1" in capsys.readouterr().out and Chips(tmp_path/'nyc').size == 64
    assert main(['nyc', 'build', '--output-dir', str(tmp_path/'x')]) == 2
    assert 'either --sources' in capsys.readouterr().err
    assert main(['nyc', 'publish', '--run-dir', str(tmp_path), '--output-dir', str(tmp_path/'out')]) == 2
    assert 'no finished comparison' in capsys.readouterr().err

# ---- files by the rules of gac.data.raster

BOX = GeoBox((20, 20), rasterio.Affine(10, 0, EAST, 0, -10, NORTH), 'EPSG:32618')

def tagged(path:Path, x:np.ndarray, scales=(), offsets=(), names=(), mask=None, **kw) -> Path: # x: (C, 20, 20)
    "Write a file on BOX with tags."
    save(path, x, 'EPSG:32618', BOX.affine, **kw)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, 'r+') as f:
        if scales: f.scales, f.offsets = scales, offsets or (0.,)*len(scales)
        for i, n in enumerate(names, 1): f.set_band_description(i, n)
        if mask is not None: f.write_mask(mask)
    return path

def test_scale_tags_masks_and_infinite_values_are_read_as_elsewhere(tmp_path):
    top, ones = (np.arange(20) < 10)[:, None] & np.ones((20, 20), bool), np.ones((2, 20, 20))
    hundredths = tagged(tmp_path/'s1.tif', np.where(top, -32768, -1234*ones).astype('int16'), (.01, .01), nodata=-32768)
    x = warped(hundredths, BOX)
    assert np.isnan(x[:, :10]).all() and x[:, 10:] == pytest.approx(-12.34)
    s2 = np.full((12, 20, 20), 2500, 'uint16')
    reflectance = tagged(tmp_path/'s2.tif', s2, (1e-4,)*12, (-.1,)*12)
    assert warped(reflectance, BOX, [3], dn=True) == pytest.approx(1500)
    assert warped(reflectance, BOX, [3]) == pytest.approx(.15)
    assert warped(tagged(tmp_path/'plain.tif', s2), BOX, [3], dn=True) == pytest.approx(2500)
    masked = warped(tagged(tmp_path/'m.tif', s2, mask=np.where(top, 0, 255).astype('uint8')), BOX, [1])
    assert np.isnan(masked[0, :10]).all() and (masked[0, 10:] == 2500).all()
    assert np.isnan(warped(tagged(tmp_path/'dem.tif', np.where(top, np.inf, 5*ones[:1]).astype('f4')),
                           BOX)[0, :10]).all()
    with pytest.raises(GacError, match='band 2 has no scale or offset tag'):
        warped(tagged(tmp_path/'half.tif', s2[:2], (1e-4, 1.)), BOX)

def test_an_exact_zero_in_db_is_no_radar():
    x = np.full((2, 4, 4), -12., 'float32')
    x[1, :2] = 0
    assert np.isnan(stac_to_db(x, 'dB')[1, :2]).all() and (stac_to_db(x, 'dB')[1, 2:] == -12).all()

def test_a_named_band_is_read_by_its_name(changed):
    def named(spec):
        for d in spec['dates']: d.update(s1='s1_named.tif')
    path = changed(named)
    tagged(path.parent/'s1_named.tif', np.stack([np.full((20, 20), v, 'float32') for v in (-18, -11)]),
           names=('Sigma0_VH_db', 'Sigma0_VV_db'))
    source = Files(path)
    assert source.s1(source.dates[0], BOX)[:, 5, 5].tolist() == [-11, -18]
    tagged(path.parent/'s1_named.tif', np.ones((2, 20, 20), 'float32'), names=('HH', 'HV'))
    with pytest.raises(GacError, match=r's1_named.tif: bands HH, HV: expected VV and VH.*s1: \{VV: FILE, VH: FILE\}'):
        Files(path)

# ---- the experiment

@pytest.fixture(scope='module')
def town(tmp_path_factory) -> Chips:
    return from_city(tmp_path_factory.mktemp('town')/'data', 0, 210,
                         BuildOptions(size=48, guard=12, test=4, val=.1, suffix='.npy'))

def configured(town, out:Path, name:str, **kw) -> Path:
    c = run_settings(TIM_VARIANTS[name], str(town.folder), str(out/'run'),
                   **dict(steps=2, batch_size=2, suffix='.npy', thoughts=str(out/'thoughts'))
                   | kw)
    return write_config(out/'config.yaml', c)

def test_the_city_has_seasons_and_a_clean_split(town):
    assert len(set(town.days)) == 4
    for i in town.table.id: check_contents(town.read(i, 'S2L2A').astype(float), town.days)
    assert split_gap(town.table, 48) >= 12
    green = [np.median((x[7] - x[3])/(x[7] + x[3])) for x in np.concatenate([town.read(i, 'S2L2A').astype(float)
        for i in town.table.id[town.table.vegetation > .5]]).reshape(-1, 4, 12, 48, 48).mean(0)]
    assert green[2] > green[0] + .1  # July is greener than January
    again = from_city(town.folder, 0, 210, BuildOptions(size=48, guard=12, test=4, val=.1, suffix='.npy'))
    assert again.about == town.about
    with pytest.raises(GacError, match='city_seed was 0, now 1'): from_city(town.folder, 1, 210)

@pytest.mark.parametrize('family', FAMILIES)
def test_thinking_and_not_differ_in_the_thought_alone(family):
    plain = run_settings(TIM_VARIANTS['no TiM'], 'd', 'o', family=family)
    for name, v in TIM_VARIANTS.items():
        if v.tim and v.modalities == TIM_INPUTS:
            assert {*setting_differences(plain, run_settings(v, 'd', 'o', family=family))} == {*THOUGHT}, name
    alone = [run_settings(TIM_VARIANTS[n], 'd', 'o', family=family) for n in ('S1 alone', 'S1 alone, TiM LULC')]
    assert {*setting_differences(*alone)} == {*THOUGHT}
    longer = setting_differences(plain,
                                 run_settings(TIM_VARIANTS['no TiM, equal compute'], 'd', 'o', family=family,
                                              steps=150))
    assert {*longer} == {'trainer.max_steps', 'trainer.callbacks', 'model.init_args.scheduler_hparams.milestones'}

def test_the_true_thought_differs_in_its_place_alone(town, tmp_path):
    "The runs with the generated and with the true land cover read the same modality from two folders."
    given, true = (run_settings(TIM_VARIANTS[n], 'd', 'o', thoughts=t)
                   for n, t in (('LULC given', 'generated'), ('true LULC as thought', 'true')))
    assert {*setting_differences(given, true)} == {'data.init_args.data_root.LULC'}
    codes = write_true_thoughts(town, tmp_path/'true')
    name = town.ids('train')[0]
    label = town.read(name, 'LABEL')
    read = np.load(tmp_path/'true'/f'{name}_LULC.npy').reshape(4, -1, 48, 48)
    assert (read.sum(1) == 1).all() and (read.argmax(1) == codes[name]).all()
    for c, code in LULC_OF.items(): assert (codes[name][:, label == NYC_CLASSES.index(c)] == code).all()

def test_the_stop_rule_is_the_same_for_every_run(town, tmp_path):
    "It changes no difference between runs, ends a run that learns nothing, and keeps the best weights in final.ckpt."
    rule = StopRule(1, 1)
    plain, thinking = (until_plateau(run_settings(TIM_VARIANTS[n], 'd', 'o'), 'o', rule, [1., 2.])
                       for n in ('no TiM', 'TiM LULC'))
    assert {*setting_differences(plain, thinking)} == {*THOUGHT}
    path = configured(town, tmp_path, 'S1 alone', steps=30, lr=1e-12)
    c = until_plateau(yaml.safe_load(path.read_text()), str(tmp_path/'run'), rule, class_weights([.2]*5))
    tested = run_config(write_config(path, c))
    ended = read_plateau(tmp_path/'run')
    assert ended['plateau'] and ended['steps'] < 30 and (tmp_path/'run'/'final.ckpt').exists()
    assert tested['confusion'].sum() == 4*48*48

@pytest.mark.parametrize('profile', ['mini', 'paper'])
def test_committed_configurations_differ_in_the_thought_alone(profile):
    "The files of the committed reports, their folders of weights and predictions apart."
    folder, compared = root()/'reports'/profile/'configs', 0
    for given, thinking in (('no_TiM', 'TiM_LULC'), ('no_TiM', 'TiM_NDVI'), ('no_TiM', 'TiM_LULC_NDVI'),
                            ('S1_alone', 'S1_alone_TiM_LULC'), ('base_no_TiM', 'base_TiM_LULC')):
        for path in sorted(folder.glob(f'nyc_{thinking}*.yaml')):
            if not (end := path.stem.removeprefix(f'nyc_{thinking}')) == '' and not end[1:].isdigit(): continue
            text = (path.read_text(), (folder/f'nyc_{given}{end}.yaml').read_text())
            own = [t.replace(f'/{n.removeprefix("base_")}{e}', '/RUN') for t, n in zip(text, (thinking, given))
                   for e in [end]]
            assert {*setting_differences(*map(yaml.safe_load, own))} == {*THOUGHT}, path.name
            compared += 1
    assert compared >= 2

def test_the_paper_profile_has_every_run_and_three_seeds():
    paper = yaml.safe_load((root()/'nbs'/'params'/'paper.yaml').read_text())['16_new_york']
    assert set(paper['runs']) == set(TIM_VARIANTS) and len(set(paper['seeds'])) >= 3

@pytest.mark.parametrize('profile', ['mini', 'paper'])
def test_equal_compute_is_equal(town, tmp_path, profile):
    "The steps in the profile spend the arithmetic of the thinking run, counted anew."
    params = yaml.safe_load((root()/'nbs'/'params'/f'{profile}.yaml').read_text())['16_new_york']
    cost = [gflop(configured(town, tmp_path/str(i), name, batch_size=params['batch_size']))
            for i, name in enumerate(('TiM LULC', 'no TiM, equal compute'))]
    assert cost[0] > 1.3*cost[1] and params['equal_compute_steps'] == equal_compute_steps(params['steps'], *cost)

def test_four_dates_reach_the_model(town, tmp_path):
    "The batch holds the dates of a chip in their order, standardised, and no two of them are the same."
    cli = open_config(configured(town, tmp_path, 'no TiM'))
    with at_root():
        cli.datamodule.setup('test')
        batch = cli.datamodule.aug(next(iter(cli.datamodule.test_dataloader())))
    name, made = Path(batch['filename']['mask'][0]).name.rsplit('_', 1)[0], city(0, 210)
    top, left = town.table.set_index('id').loc[name, ['top', 'left']]
    seen = {m: np.asarray(x, np.float32)[..., top:top + 48, left:left + 48]
            for m, x in dict(S2L2A=made['s2'], S1RTC=made['s1'], DEM=made['dem'][None, None].repeat(4, 0)).items()}
    for m in TIM_INPUTS:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in standardisation('mini', m))
        x = batch['image'][m][0].numpy()  # (C, T, H, W)
        assert x.shape[1] == 4
        for t in range(4): np.testing.assert_allclose(x[:, t], (seen[m][t] - mean)/std, rtol=1e-3, atol=1e-3)
        if m != 'DEM': assert not any(np.allclose(x[:, i], x[:, j]) for i in range(4) for j in range(i))

def test_runs_start_alike_and_see_the_same_chips_in_the_same_order(town, tmp_path):
    import torch
    from lightning.pytorch import Callback
    class Watch(Callback):
        def __init__(self): self.seen, self.rates = [], []
        def on_train_batch_start(self, trainer, module, batch, i):
            if not self.seen: self.start = {k: v.clone() for k, v in module.model.state_dict().items()
                                            if k.startswith(('decoder.', 'head.', 'encoder.encoder.encoder.'))}
            self.seen.append([Path(f).name for f in batch['filename']['mask']])
            self.rates.append(trainer.optimizers[0].param_groups[0]['lr'])
        def on_train_end(self, trainer, module):
            self.moved = {k for k, p in module.model.named_parameters() if p.grad is not None and p.grad.any()}
    watched = []
    for name in ('S1 alone', 'S1 alone, TiM LULC'):
        cli = open_config(configured(town, tmp_path/name, name, steps=5))
        if watched:  # as where a builder has drawn more random numbers
            for k, p in cli.model.model.named_parameters():
                if not k.startswith('encoder.'): torch.nn.init.normal_(p)
        watched.append(Watch())
        cli.trainer.callbacks.append(watched[-1])
        with at_root(): cli.trainer.fit(cli.model, cli.datamodule)
    a, b = watched
    assert a.seen == b.seen and len(a.seen) == 5 and a.seen[0] != a.seen[-1]  # over more than one round
    assert a.start.keys() == b.start.keys() and all((a.start[k] == b.start[k]).all() for k in a.start)
    assert a.moved == b.moved and a.moved  # the same parts are trained
    assert a.rates == b.rates == pytest.approx([4e-3]*4 + [4e-4])  # the last fifth at a tenth

def test_a_run_is_not_made_twice_and_its_score_is_terratorchs(town, tmp_path):
    path = configured(town, tmp_path, 'S1 alone')
    one = run_config(path)
    made = (tmp_path/'run'/'test.npz').stat().st_mtime_ns
    two = run_config(path)
    assert (tmp_path/'run'/'test.npz').stat().st_mtime_ns == made and (one['confusion'] == two['confusion']).all()
    assert sorted(one['id']) == sorted(town.ids('test'))
    theirs, mine = json.loads((tmp_path/'run'/'metrics.json').read_text()), nyc_scores(one['confusion'].sum(0))
    for a, b in (('mIoU', 'miou'), ('Pixel_Accuracy', 'pixel_accuracy'), ('F1_Score', 'f1'),
                 ('IoU_water', 'iou_water')):
        assert abs(theirs[f'test/{a}'] - mine[b]) < 1e-4, a
    again = run_config(configured(town, tmp_path/'again', 'S1 alone'))
    assert (again['confusion'] == one['confusion']).all()

def test_a_thought_that_does_not_load_is_said_and_given_instead(tmp_path):
    v = TIM_VARIANTS['TiM LULC']
    instead, status = loadable_variant(v, weights=str(tmp_path))
    assert status.startswith('fallback, LULC given: ') and 'terramind_mini.safetensors' in status
    assert loadable_variant(v) == (v, 'ran')
    c = run_settings(instead, 'd', 'o', thoughts='t')
    assert c['data']['init_args']['data_root']['LULC'] == 't'
    assert c['model']['init_args']['model_args']['backbone'] == 'terramind_mini'

def test_the_fallback_gives_every_thought_that_was_asked_for(town, tmp_path, monkeypatch):
    "Land cover and NDVI generated in advance equal those of the backbone that generates them, and are trained on."
    real = build_model
    def broken(name, *args, **kw):
        if name.endswith('_tim'): raise RuntimeError('size mismatch')
        return real(name, *args, **kw)
    swap(monkeypatch, 'gac.models.build', 'build_model', broken)
    instead, status = loadable_variant(TIM_VARIANTS['TiM LULC+NDVI'])
    assert ((instead.given, instead.tim, status) == (('LULC', 'NDVI'), (),
                                                     'fallback, LULC and NDVI given: size mismatch'))
    found = generate_thoughts(town, tmp_path/'thoughts', wanted=instead.given)
    name = town.ids('test')[0]
    lulc, ndvi = (np.load(tmp_path/'thoughts'/f'{name}_{m}.npy') for m in instead.given)
    assert ((lulc.reshape(4, -1, 48, 48).argmax(1) == found[name]).all() and ndvi.shape == (4, 48, 48)
            and -1.2 < ndvi.min() < ndvi.max() < 1.2)
    c = run_settings(instead, str(town.folder), str(tmp_path/'run'), 1, 2, suffix='.npy',
                     thoughts=str(tmp_path/'thoughts'))
    assert c['data']['init_args']['modalities'] == [*TIM_INPUTS, 'LULC', 'NDVI']
    assert run_config(write_config(tmp_path/'config.yaml', c))['confusion'].sum() == 4*48*48

def test_a_run_with_other_weights_is_made_anew(town, tmp_path, monkeypatch):
    path = configured(town, tmp_path, 'S1 alone', steps=1)
    run_config(path)
    mark = (tmp_path/'run'/'made_of.txt').read_text()
    swap(monkeypatch, 'gac.models.build', 'weights_checksums',
         lambda *args, **kw: {'terramind_mini.safetensors': 'other'})
    run_config(path)
    assert (tmp_path/'run'/'made_of.txt').read_text() != mark

def test_the_gate_draws_seeds_and_blocks():
    "A gain of one seed alone, or of one block alone, is no certain gain, however large the mean."
    good, bad = np.diag([90]*5) + 1, np.diag([40]*5) + 11
    a, b = (np.stack([[c]*12 for c in per_seed]) for per_seed in ((good, bad, bad), (bad, bad, bad)))
    blocks = np.repeat(np.arange(6), 2)
    one_seed = gate(a, b, blocks)
    assert one_seed['gain'] > 10 and one_seed['lo'] == 0 and (one_seed['verdict'], one_seed['seeds']) == ('open', 3)
    c = np.stack([[good if k == 0 else bad for k in blocks]]*3)
    one_block = gate(c, b, blocks)
    assert one_block['gain'] > 2 and (one_block['lo'], one_block['verdict']) == (0, 'open')
    assert gate(np.stack([[good]*12]*3), b, blocks)['verdict'] == 'strong'

def test_a_class_of_one_block_does_not_move_the_gate_by_its_absence():
    "Bare ground is in one block and neither run finds it; one pixel predicted elsewhere is no lost class."
    chip = np.diag([50, 0, 50, 50, 50])
    a = np.stack([[chip]*12]).astype(int)
    a[0, :2, 1, 0] = 9  # bare, called vegetation
    b = a.copy()
    b[0, 2:, 0, 0] -= 1
    b[0, 2:, 0, 1] += 1  # a pixel of vegetation called bare
    g = gate(a, b, np.repeat(np.arange(6), 2))
    assert 0 < g['gain'] < 1 and g['hi'] < 1

def test_a_given_thought_runs(town, tmp_path):
    found = generate_thoughts(town, tmp_path/'thoughts')
    assert set(found) == set(town.table.id[town.table.split != 'spare'])
    assert next(iter(found.values())).shape == (4, 48, 48)
    assert run_config(configured(town, tmp_path, 'LULC given', steps=1))['confusion'].sum() == 4*48*48

def test_the_parser_refuses_what_terratorch_does_not_know(tmp_path):
    c = run_settings(TIM_VARIANTS['TiM LULC'], 'd', 'o', family='base')
    assert open_config(write_config(tmp_path/'good.yaml', c),
                                  build=False).config.model.init_args.model_args['backbone'] == 'terramind_v1_base_tim'
    c['trainer']['max_step'] = 3
    with pytest.raises(GacError, match='max_step'):
        open_config(write_config(tmp_path/'bad.yaml', c), build=False)

def test_publishing_needs_a_certain_gain(tmp_path):
    import huggingface_hub
    import torch
    from safetensors.torch import load_file
    run = tmp_path/'run'/'nyc'
    (run/'runs'/'TiM_LULC_0').mkdir(parents=True)
    status = {'TiM LULC': 'ran'}
    torch.save(dict(state_dict={'model.head.weight': torch.ones(2)}), run/'runs'/'TiM_LULC_0'/'final.ckpt')
    (run/'runs'/'TiM_LULC_0'/'config.yaml').write_text('seed_everything: 0\n')
    row = dict(run='TiM LULC', against='no TiM', gain=1.6, lo=-.2, hi=3., verdict='open', blocks=16, seeds=3)
    dearer = row | dict(against='no TiM, equal compute', gain=-3.2, lo=-5., hi=-1., verdict='negative')
    kept = lambda **kw: (run/'gate.json').write_text(json.dumps(dict(data='a city', seed=0,
                                                                     folders={'TiM LULC': 'runs/TiM_LULC_0'},
                                                                     status=status, gate=[row | kw, dearer])))
    kept()
    with pytest.raises(GacError, match='Nothing to publish.*TiM LULC .1.6'): publish(tmp_path/'run', tmp_path/'out')
    kept(lo=.3, verdict='stable')
    out = publish(tmp_path/'run', tmp_path/'out')
    assert load_file(out/'model.safetensors')['head.weight'].tolist() == [1, 1] and (out/'config.yaml').exists()
    card = (out/'README.md').read_text()
    about = huggingface_hub.ModelCard(card).data
    assert about.library_name == 'terratorch' and about.pipeline_tag == 'image-segmentation'
    # what speaks against it stands there too
    assert '**stable**' in card and '+1.60 points of mIoU [+0.30, +3.00]' in card and '-3.2' in card
    (run/'gate.json').write_text(json.dumps(dict(data='', seed=0, folders={'TiM LULC': '../../../etc'}, status=status,
                                                 gate=[row | dict(lo=.3)])))
    with pytest.raises(GacError, match='outside the run'): publish(tmp_path/'run', tmp_path/'out')

def test_a_published_model_draws_the_maps_of_the_run(town, tmp_path):
    "Weights and configuration of the published folder, loaded key by key, give the test's predictions."
    import torch
    from safetensors.torch import load_file
    path, run = configured(town, tmp_path/'run'/'nyc', 'TiM LULC'), tmp_path/'run'/'nyc'
    tested = run_config(path)
    shutil.copy(path, run/'run'/'config.yaml')
    row = dict(run='TiM LULC', against='no TiM', gain=1.6, lo=.3, hi=3., verdict='stable', blocks=16, seeds=3)
    (run/'gate.json').write_text(json.dumps(dict(data='a city', seed=0, folders={'TiM LULC': 'run'},
                                                 status={'TiM LULC': 'ran'}, gate=[row])))
    out = publish(tmp_path/'run', tmp_path/'out')
    cli = open_config(out/'config.yaml')
    cli.model.model.load_state_dict(load_file(out/'model.safetensors'), strict=True)
    with at_root(), torch.no_grad():
        cli.datamodule.setup('test')
        for batch in map(cli.datamodule.aug, cli.datamodule.test_dataloader()):
            pred = cli.model.model.eval()({k: x.float() for k, x in batch['image'].items()}).output.argmax(1).numpy()
            for f, p in zip(batch['filename']['mask'], pred):
                assert (p == tested['prediction'][list(tested['id']).index(Path(f).name.rsplit('_', 1)[0])]).all()

def test_the_real_time_series_goes_through(real_data, town, tmp_path):
    there = from_series(real_data/'time_series_belgium'/'worldcereal_preprocessed_inputs.nc', tmp_path/'series')
    assert len(set(there.days)) == 4 and len(there.table) == 4
    x = there.read(there.table.id[0], 'S1RTC')
    assert x.shape == (4, 2, 48, 48) and -35 < x.min() < x.max() < 15
    assert 100 < there.read(there.table.id[0], 'DEM').mean() < 200
    path = configured(town, tmp_path, 'TiM LULC', steps=1)
    run_config(path)
    maps = map_with(path, there)
    assert set(maps) == set(there.table.id) and all(m.shape == (48, 48) and m.max() < 5 for m in maps.values())

@pytest.mark.slow
def test_terratorch_runs_the_same_file(town, tmp_path):
    "terratorch fit and test, in processes of their own, give the numbers of the run inside this one."
    import os
    import subprocess
    import sys
    path = configured(town, tmp_path, 'S1 alone, TiM LULC')
    here = run_config(path)['confusion']
    shutil.move(tmp_path/'run', tmp_path/'kept')
    start = 'import gac, sys; from terratorch.__main__ import main; sys.argv[0] = "terratorch"; main()'
    env = os.environ | dict(PYTHONPATH=str(root()))
    for words in (['fit', '--config', str(path)],
                  ['test', '--config', str(path), '--ckpt_path', str(tmp_path/'run'/'final.ckpt')]):
        done = subprocess.run([sys.executable, '-c', start, *words], cwd=root(), env=env, capture_output=True,
                              text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (read_test(tmp_path/'run')['confusion'] == here).all() and not (root()/'config.yaml').exists()

@pytest.mark.parametrize('what', ['mask', 'place'])
def test_what_lies_beside_a_raster_is_seen_though_gdal_was_told_not_to_look(tmp_path, what):
    "A process without GDAL's listing of folders still reads masks (.msk) and georeferencing (.aux.xml)."
    x, there = np.arange(1, 3601, dtype='float32').reshape(1, 60, 60), np.arange(60)[:, None] + np.zeros(60, int) >= 20
    path, driver = (tmp_path/'a.tif', 'GTiff') if what == 'mask' else (tmp_path/'a.png', 'PNG')
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        with rasterio.open(path, 'w', driver=driver, count=1, height=60, width=60,
                           dtype='float32' if what == 'mask' else 'uint8', crs='EPSG:32618',
                           transform=from_origin(5e5, 4.5e6, 10, 10)) as f:
            f.write(x if what == 'mask' else (x % 251).astype('uint8'))
            if what == 'mask': f.write_mask(there)
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN='EMPTY_DIR'):
        box = utm_grid(path)
        assert tuple(box.shape) == (60, 60)
        if what == 'mask': np.testing.assert_array_equal(np.isnan(warped(path, box, how='nearest')[0]), ~there)

def test_a_json_that_is_no_catalogue_is_named(tmp_path):
    (tmp_path/'odd.json').write_text('{"type": "Nothing", "id": "x", "links": []}')
    with pytest.raises(GacError, match='odd.json: not a readable STAC catalogue'):
        stac_items(tmp_path/'odd.json', '', (0, 0, 1, 1), '')
