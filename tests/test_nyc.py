"The New York data set: built from rasters of odd grids and from a STAC catalogue; what is refused; the experiment's configurations."
import datetime, json, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from pyproj import Transformer
from rasterio.transform import from_origin

from gac import downstream, nyc, study
from gac.study import GacError

DAYS = ('2021-01-12', '2021-04-15', '2021-07-20', '2021-10-23')
S1_DAYS = ('2021-01-10', '2021-04-16', '2021-07-18', '2021-10-22')
OPT = nyc.BuildOptions(size=32, per_block=2, guard=8, test=8, val=.15)
EAST, NORTH, N = 584_000, 4_510_000, 200  # the area: 2 km in UTM zone 18

def codes(x, y) -> np.ndarray: # metres in UTM
    "The city's raster as a function of the place: squares of 80 m of its eight codes, water in the west."
    k = (np.floor((x - EAST)/80) + 3*np.floor((y - NORTH)/80)).astype(int) % 8 + 1
    return np.where(x < EAST + 500, 4, k).astype(np.uint8)

def save(path:Path, x:np.ndarray, crs:str, transform, **kw) -> Path: # x: (C, H, W)
    with rasterio.open(path, 'w', driver='GTiff', height=x.shape[1], width=x.shape[2], count=len(x), dtype=x.dtype, crs=crs, transform=transform,
                       **kw) as dst: dst.write(x)
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
    "A copy of the area whose YAML a function has changed."
    def change(edit) -> Path:
        for f in area.parent.iterdir(): shutil.copy(f, tmp_path/f.name)
        spec = yaml.safe_load(area.read_text())
        edit(spec)
        (tmp_path/'sources.yaml').write_text(yaml.safe_dump(spec))
        return tmp_path/'sources.yaml'
    return change

@pytest.fixture(scope='module')
def built(area, tmp_path_factory) -> nyc.Chips: return nyc.build(nyc.Files(area), tmp_path_factory.mktemp('built')/'nyc', opt=OPT)

def test_labels_lie_where_the_images_do(built):
    assert built.about['crs'] == 'EPSG:32618' and built.about['s1_unit'] == 'linear' and built.about['offsets'] == [0]*4
    right = water = n = 0
    for name in built.ids('train')[:8]:
        label, s2, s1 = (built.read(name, m) for m in ('LABEL', 'S2L2A', 'S1RTC'))
        top, left = built.table.set_index('id').loc[name, ['top', 'left']]
        t = rasterio.Affine(*built.about['transform'])*rasterio.Affine.translation(left, top)
        code = codes(*places('EPSG:32618', t, *label.shape))
        truth = nyc.class_table()[code]
        ok = label >= 0
        right, n = right + (label == truth)[ok].sum(), n + ok.sum()
        inside = ok & (np.abs(s2[:, 0] - s2[:, 0].mean(0)).max(0) < 9e9) & (label == 2)
        water += (s2[0, 0][inside] < 500).sum() - .97*inside.sum()
        assert s2.shape == (4, 12, 32, 32) and s1.shape == (4, 2, 32, 32) and -40 < s1.min() < s1.max() < 15
    assert right/n > .97 and water >= 0

def test_rotated_edges_have_no_label(built):
    labels = np.stack([built.read(i, 'LABEL') for i in built.table.id])
    assert (labels == -1).any() and set(np.unique(labels)) == {-1, 0, 1, 2, 3, 4}
    edge = built.table[(built.table.top == 0)]
    assert len(edge) < 8 or (labels[built.table.top == 0] == -1).any()

def test_split_and_manifest(built):
    about, table = built.about, built.table
    assert about['n']['test'] == 8 and nyc.split_gap(table, 32) >= 8 == about['gap_px']['train and test']
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
    places = nyc.layout((1400, 1400), 80, 2, 16)
    places[list(nyc.CLASSES)] = np.random.default_rng(0).dirichlet([1]*5, len(places))
    places['split'] = nyc.deal(places)
    assert len(places) >= 192 and (places.split == 'test').sum() == 64
    few = places[:60].copy()
    few['split'] = nyc.deal(few)
    assert (few.split == 'test').sum() == 20 and nyc.split_gap(few, 80) >= 16

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
    real, calls = nyc.write_chip, []
    def twice(*a, **kw):
        calls.append(a[1])
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*a, **kw)
    monkeypatch.setattr(nyc, 'write_chip', twice)
    with pytest.raises(KeyboardInterrupt): nyc.build(nyc.Files(area), tmp_path/'nyc', opt=OPT)
    again = nyc.build(nyc.Files(area), tmp_path/'nyc', opt=OPT)
    assert len(calls) == len(again.table) + 1  # only the one that failed was made twice
    assert (again.folder/'chips.csv').read_bytes() == (built.folder/'chips.csv').read_bytes()

def refused(path:Path, out:Path, match:str, opt=OPT):
    with pytest.raises(GacError, match=match): nyc.build(nyc.Files(path), out/'nyc', opt=opt)

def test_one_date_four_times_is_refused(changed, tmp_path):
    def by_date(spec): spec['dates'][2]['date'] = spec['dates'][1]['date']
    refused(changed(by_date), tmp_path, f'{DAYS[1]} is used for 2 of 4 timestamps')

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
    with pytest.raises(GacError, match='s2_gone.tif is not there'): nyc.Files(changed(lambda s: s['dates'][0].update(s2='s2_gone.tif')))
    with pytest.raises(GacError, match=r'dates\[1\]: s1 missing'): nyc.Files(changed(lambda s: s['dates'][1].pop('s1')))
    with pytest.raises(GacError, match='is no date'): nyc.Files(changed(lambda s: s['dates'][1].update(date='spring')))
    with pytest.raises(GacError, match='band .*B12.* missing'): nyc.Files(changed(lambda s: s['dates'][0].update(s2={'B02': 'dem.tif'})))

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
    chips = nyc.build(nyc.Files(path), tmp_path/'nyc', opt=OPT)
    assert chips.about['offsets'] == [1000]*4
    name = next(i for i in chips.table.id if (chips.read(i, 'LABEL') == 2).mean() > .3)
    assert np.median(chips.read(name, 'S2L2A')[0, 0][chips.read(name, 'LABEL') == 2]) < 200

def write_catalogue(area:Path, to:Path, days=DAYS) -> Path:
    "A static STAC catalogue of the area's files, bands by the names of a public catalogue."
    import pystac
    from shapely.geometry import box, mapping
    bbox = [-74.03, 40.71, -73.95, 40.78]
    cat = pystac.Catalog('test', 'a city')
    for name in ('sentinel-2-l2a', 'sentinel-1-rtc', 'cop-dem-glo-30'):
        when = datetime.datetime(2021, 1, 1)
        extent = pystac.Extent(pystac.SpatialExtent([bbox]), pystac.TemporalExtent([[when, None]]))
        cat.add_child(pystac.Collection(name, name, extent))
    def item(collection, name, day, assets, **properties):
        i = pystac.Item(name, mapping(box(*bbox)), bbox, datetime.datetime.fromisoformat(day + 'T15:51:00+00:00'), properties)
        for key, file in assets.items(): i.add_asset(key, pystac.Asset(str(file)))
        cat.get_child(collection).add_item(i)
    def split(path:Path, names) -> dict: # one file per band, as catalogues have it
        with rasterio.open(path) as src:
            for n, name in enumerate(names, 1): save(to/f'{path.stem}_{name}.tif', src.read(n)[None], str(src.crs), src.transform, nodata=src.nodata)
        return {name: to/f'{path.stem}_{name}.tif' for name in names}
    to.mkdir()
    common = [nyc.S2_ASSETS[b][1] for b in study.S2_BANDS]
    for day, s1_day in zip(days, S1_DAYS):
        item('sentinel-2-l2a', f'S2_{day}', day, split(area.parent/f's2_{day}.tif', common) | {'scl': area.parent/f'scl_{day}.tif'},
             **{'eo:cloud_cover': 5})
        item('sentinel-1-rtc', f'S1_{day}', s1_day, split(area.parent/f's1_{day}.tif', ('vv', 'vh')))
    item('sentinel-2-l2a', 'S2_cloudy', '2021-04-18', {'blue': area}, **{'eo:cloud_cover': 90})
    item('cop-dem-glo-30', 'DEM', '2021-01-01', {'data': area.parent/'dem.tif'})
    cat.normalize_and_save(str(to/'stac'), pystac.CatalogType.ABSOLUTE_PUBLISHED)
    return to/'stac'/'catalog.json'

SPANS = ('2021-01-12', '2021-04-01/2021-04-30', '2021-07-20', '2021-10-01/2021-10-31')

def test_a_static_catalogue_gives_the_same_chips(area, tmp_path):
    url, survey = write_catalogue(area, tmp_path/'cat'), area.parent/'landcover.tif'
    grid = nyc.utm_grid(survey)[30:180, 30:180]
    source = nyc.Catalogue(url, grid, SPANS)
    assert [d.day for d in source.dates] == list(DAYS) and [d.s1_day for d in source.dates] == list(S1_DAYS)
    opt = nyc.BuildOptions(size=64, per_block=1, guard=8, test=1, val=.2)
    one, two = (nyc.build(s, tmp_path/f'nyc{i}', survey, opt, grid=grid) for i, s in enumerate((nyc.Files(area), source)))
    assert len(one.table) == 4 and one.table.drop(columns='files').equals(two.table.drop(columns='files'))
    for name in one.table.id[one.table.seen == 1]:
        a, b = ({m: c.read(name, m).astype(float) for m in ('LABEL', 'S2L2A', 'S1RTC', 'DEM')} for c in (one, two))
        assert (a['LABEL'] == b['LABEL']).all() and np.abs(a['S2L2A'] - b['S2L2A']).max() <= 2 and np.abs(a['DEM'] - b['DEM']).max() < .1
        assert np.median(np.abs(a['S1RTC'] - b['S1RTC'])) < .5  # two resamplers weigh speckle in degrees differently

def test_missing_dates_are_named_all_at_once(area, tmp_path):
    url = write_catalogue(area, tmp_path/'cat', DAYS[:3])
    grid = nyc.utm_grid(area.parent/'landcover.tif')
    with pytest.raises(GacError, match='2021-10-01/2021-10-31; .*2022-01-01/2022-01-31'): nyc.Catalogue(url, grid, (*SPANS, '2022-01-01/2022-01-31'))
    with pytest.raises(GacError, match='2021-01-12 is used for 2 of 2'): nyc.Catalogue(url, grid, ('2021-01-12', '2021-01-01/2021-01-31'))
    with pytest.raises(GacError, match='no Sentinel-1 image within 1 days of 2021-01-12'): nyc.Catalogue(url, grid, ('2021-01-12',), s1_days=1)
    with pytest.raises(GacError, match='not a readable STAC catalogue'): nyc.Catalogue(tmp_path/'nothing.json', grid, SPANS)

def test_from_the_command_line(area, tmp_path, capsys):
    from gac.cli import main
    size = ['--tile-size', '64', '--guard', '8', '--test', '1']
    assert main(['nyc', 'build', '--sources', str(area), '--output-dir', str(tmp_path/'nyc'), *size]) == 0
    assert "'test': 1" in capsys.readouterr().out and nyc.Chips(tmp_path/'nyc').size == 64
    assert main(['nyc', 'build', '--output-dir', str(tmp_path/'x')]) == 2 and 'either --sources' in capsys.readouterr().err
    assert main(['nyc', 'publish', '--run-dir', str(tmp_path), '--output-dir', str(tmp_path/'out')]) == 2
    assert 'no finished comparison' in capsys.readouterr().err

# ---- the experiment

@pytest.fixture(scope='module')
def town(tmp_path_factory) -> nyc.Chips:
    return nyc.from_city(tmp_path_factory.mktemp('town')/'data', 0, 210, nyc.BuildOptions(size=48, guard=12, test=4, val=.1, suffix='.npy'))

def configured(town, out:Path, name:str, **kw) -> Path:
    c = nyc.config(nyc.VARIANTS[name], str(town.folder), str(out/'run'), **dict(steps=2, batch_size=2, suffix='.npy', thoughts=str(out/'thoughts'))
                   | kw)
    return downstream.write_config(out/'config.yaml', c)

def test_the_city_has_seasons_and_a_clean_split(town):
    assert len(set(town.days)) == 4
    for i in town.table.id: nyc.check_contents(town.read(i, 'S2L2A').astype(float), town.days)
    assert nyc.split_gap(town.table, 48) >= 12
    green = [np.median((x[7] - x[3])/(x[7] + x[3])) for x in np.concatenate([town.read(i, 'S2L2A').astype(float)
        for i in town.table.id[town.table.vegetation > .5]]).reshape(-1, 4, 12, 48, 48).mean(0)]
    assert green[2] > green[0] + .1  # July is greener than January
    again = nyc.from_city(town.folder, 0, 210, nyc.BuildOptions(size=48, guard=12, test=4, val=.1, suffix='.npy'))
    assert again.about == town.about
    with pytest.raises(GacError, match='other options'): nyc.from_city(town.folder, 1, 210)

@pytest.mark.parametrize('family', nyc.FAMILIES)
def test_thinking_and_not_differ_in_the_thought_alone(family):
    plain = nyc.config(nyc.VARIANTS['no TiM'], 'd', 'o', family=family)
    for name, v in nyc.VARIANTS.items():
        if v.tim and v.modalities == nyc.INPUTS: assert nyc.differences(plain, nyc.config(v, 'd', 'o', family=family)) == set(nyc.THOUGHT), name
    alone = [nyc.config(nyc.VARIANTS[n], 'd', 'o', family=family) for n in ('S1 alone', 'S1 alone, TiM LULC')]
    assert nyc.differences(*alone) == set(nyc.THOUGHT)

def test_runs_start_alike_and_see_the_same_chips_in_the_same_order(town, tmp_path):
    from lightning.pytorch import Callback
    class Watch(Callback):
        def __init__(self): self.seen = []
        def on_train_batch_start(self, trainer, module, batch, i):
            if not self.seen: self.start = {k: v.clone() for k, v in module.model.state_dict().items()
                                            if k.startswith(('decoder.', 'head.', 'encoder.encoder.encoder.'))}
            self.seen.append([Path(f).name for f in batch['filename']['mask']])
        def on_train_end(self, trainer, module): self.moved = {k for k, p in module.model.named_parameters() if p.grad is not None and p.grad.any()}
    watched = []
    for name in ('S1 alone', 'S1 alone, TiM LULC'):
        cli = downstream.open_config(configured(town, tmp_path/name, name, steps=5))
        watched.append(Watch())
        cli.trainer.callbacks.append(watched[-1])
        with downstream.at_root(): cli.trainer.fit(cli.model, cli.datamodule)
    a, b = watched
    assert a.seen == b.seen and len(a.seen) == 5 and a.seen[0] != a.seen[-1]  # over more than one round
    assert a.start.keys() == b.start.keys() and all((a.start[k] == b.start[k]).all() for k in a.start)
    assert a.moved == b.moved and a.moved  # the same parts are trained

def test_a_run_is_not_made_twice_and_its_score_is_terratorchs(town, tmp_path):
    path = configured(town, tmp_path, 'S1 alone')
    one = nyc.run_config(path)
    made = (tmp_path/'run'/'test.npz').stat().st_mtime_ns
    two = nyc.run_config(path)
    assert (tmp_path/'run'/'test.npz').stat().st_mtime_ns == made and (one['confusion'] == two['confusion']).all() and sorted(one[
        'id']) == sorted(town.ids('test'))
    theirs, mine = json.loads((tmp_path/'run'/'metrics.json').read_text()), nyc.scores(one['confusion'].sum(0))
    for a, b in (('mIoU', 'miou'), ('Pixel_Accuracy', 'pixel_accuracy'), ('F1_Score', 'f1'), ('IoU_water', 'iou_water')):
        assert abs(theirs[f'test/{a}'] - mine[b]) < 1e-4, a
    again = nyc.run_config(configured(town, tmp_path/'again', 'S1 alone'))
    assert (again['confusion'] == one['confusion']).all()

def test_a_thought_that_does_not_load_is_said_and_given_instead(tmp_path):
    why = nyc.usable(nyc.VARIANTS['TiM LULC'], weights=str(tmp_path))
    assert 'terramind_mini.safetensors' in why and not nyc.usable(nyc.VARIANTS['TiM LULC'])
    instead = nyc.fallback(nyc.VARIANTS['TiM LULC'])
    c = nyc.config(instead, 'd', 'o', thoughts='t')
    assert c['data']['init_args']['data_root']['LULC'] == 't' and c['model']['init_args']['model_args']['backbone'] == 'terramind_mini'

def test_a_given_thought_runs(town, tmp_path):
    found = nyc.think(town, tmp_path/'thoughts')
    assert set(found) == set(town.table.id[town.table.split != 'spare']) and next(iter(found.values())).shape == (4, 48, 48)
    assert nyc.run_config(configured(town, tmp_path, 'LULC given', steps=1))['confusion'].sum() == 4*48*48

def test_the_parser_refuses_what_terratorch_does_not_know(tmp_path):
    c = nyc.config(nyc.VARIANTS['TiM LULC'], 'd', 'o', family='base')
    assert downstream.open_config(downstream.write_config(tmp_path/'good.yaml', c), build=False).config.model.init_args.model_args['backbone'] == 'terramind_v1_base_tim'
    c['trainer']['max_step'] = 3
    with pytest.raises(GacError, match='max_step'): downstream.open_config(downstream.write_config(tmp_path/'bad.yaml', c), build=False)

def test_publishing_needs_a_certain_gain(tmp_path):
    import torch
    from safetensors.torch import load_file
    run = tmp_path/'run'/'nyc'
    (run/'runs'/'TiM_LULC_0').mkdir(parents=True)
    torch.save(dict(state_dict={'model.head.weight': torch.ones(2)}), run/'runs'/'TiM_LULC_0'/'final.ckpt')
    (run/'runs'/'TiM_LULC_0'/'config.yaml').write_text('seed_everything: 0\n')
    row = dict(run='TiM LULC', against='no TiM', gain=1.6, lo=-.2, hi=3., verdict='open', blocks=16, seeds=3)
    kept = lambda **kw: (run/'gate.json').write_text(json.dumps(dict(data='a city', seed=0, folders={'TiM LULC': 'runs/TiM_LULC_0'},
        gate=[row | kw])))
    kept()
    with pytest.raises(GacError, match='Nothing to publish.*TiM LULC .1.6'): nyc.publish(tmp_path/'run', tmp_path/'out')
    kept(lo=.3, verdict='stable')
    out = nyc.publish(tmp_path/'run', tmp_path/'out')
    assert load_file(out/'model.safetensors')['head.weight'].tolist() == [1, 1] and (out/'config.yaml').exists() and '**stable**' in (out/
        'README.md').read_text()
    (run/'gate.json').write_text(json.dumps(dict(data='', seed=0, folders={'TiM LULC': '../../../etc'}, gate=[row | dict(lo=.3)])))
    with pytest.raises(GacError, match='outside the run'): nyc.publish(tmp_path/'run', tmp_path/'out')

def test_the_real_time_series_goes_through(real_data, town, tmp_path):
    there = nyc.from_series(real_data/'time_series_belgium'/'worldcereal_preprocessed_inputs.nc', tmp_path/'series')
    assert len(set(there.days)) == 4 and len(there.table) == 4
    x = there.read(there.table.id[0], 'S1RTC')
    assert x.shape == (4, 2, 48, 48) and -35 < x.min() < x.max() < 15 and 100 < there.read(there.table.id[0], 'DEM').mean() < 200
    path = configured(town, tmp_path, 'TiM LULC', steps=1)
    nyc.run_config(path)
    maps = nyc.map_with(path, there)
    assert set(maps) == set(there.table.id) and all(m.shape == (48, 48) and m.max() < 5 for m in maps.values())

@pytest.mark.slow
def test_terratorch_runs_the_same_file(town, tmp_path):
    "terratorch fit and test, in processes of their own, give the numbers of the run inside this one."
    import os, subprocess, sys
    path = configured(town, tmp_path, 'S1 alone, TiM LULC')
    here = nyc.run_config(path)['confusion']
    shutil.move(tmp_path/'run', tmp_path/'kept')
    start = 'import gac.study, sys; from terratorch.__main__ import main; sys.argv[0] = "terratorch"; main()'
    env = os.environ | dict(PYTHONPATH=str(study.root()))
    for words in (['fit', '--config', str(path)], ['test', '--config', str(path), '--ckpt_path', str(tmp_path/'run'/'final.ckpt')]):
        done = subprocess.run([sys.executable, '-c', start, *words], cwd=study.root(), env=env, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (nyc.read_test(tmp_path/'run')['confusion'] == here).all() and not (study.root()/'config.yaml').exists()
