"""Check the procedural world: seeds, speed, likeness to real chips, and a radar without seasons."""
import hashlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from swapping import swap

from gac.core.files import GacError, root
from gac.data.world.calibration import (
    CHANNELS,
    calibration,
    ks_table,
    lag_correlation,
    measure_pool,
    real_chips,
    window_looks,
)
from gac.data.world.noise import HELD_OUT_BASE, PRETRAIN_BASE, SPECKLE_LOOKS, STUDY_SEEDS, gamma_db, seed_rng
from gac.data.world.places import BIOME_PLACES, draw_place
from gac.data.world.scenes import draw_scene
from gac.data.world.stream import draw_batch
from gac.stages.pretrain_objectives import Scenes

KS_LIMIT = .2
SCENES = 240


def digest(s):
    "Return one checksum over all arrays of a scene."
    arrays = (np.ascontiguousarray(v).tobytes() for k, v in sorted(s.items()) if isinstance(v, np.ndarray))
    return hashlib.sha256(b''.join(arrays)).hexdigest()


@pytest.fixture(scope='module')
def scenes():
    return [draw_scene(seed) for seed in range(SCENES)]


# -- one seed, one scene

@pytest.mark.parametrize('threads', ['1', '2'])
def test_same_scene_in_another_process(threads):
    code = ("import sys; sys.path.insert(0, 'tests'); from test_world import digest; "
            "from gac.data.world import scenes; "
            "print(digest(scenes.draw_scene(4, clouds=True)), digest(scenes.draw_scene(10**8 + 7, 96)))")
    env = dict(os.environ, OMP_NUM_THREADS=threads, PYTHONHASHSEED=threads)
    done = subprocess.run([sys.executable, '-c', code], cwd=root(), env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == [digest(draw_scene(4, clouds=True)), digest(draw_scene(10**8 + 7, 96))]


def test_scene_does_not_depend_on_what_came_before():
    np.random.seed(0)
    before = digest(draw_scene(11))
    draw_scene(12, 64)
    np.random.random(7)
    assert digest(draw_scene(11)) == before != digest(draw_scene(12))


# Summaries of scenes of which the committed miniature weights were pretrained: a change of the world is noticed.
FROZEN = {  # seed: (landscape, biome, month), mean DN of the 12 bands, mean dB of GRD and RTC, mean elevation
    0: (('pasture', 4, 5), [144.3, 210.7, 507.3, 411.6, 951.1, 2611.5, 3073.6, 3380.5, 3496.5, 3521.4, 1804.6, 1089.7],
        [-16.1567, -15.588], 122.158),
    1: (('town', 4, 4), [575.4, 663.4, 894.2, 1001.2, 1282.0, 1890.6, 2208.7, 2273.5, 2297.8, 2267.9, 1791.9, 1387.3],
        [-14.0075, -13.4113], 154.271),
    5: (('coast', 12, 7), [596.6, 589.6, 788.2, 845.2, 960.5, 1229.7, 1396.4, 1460.5, 1475.2, 1393.8, 1319.6, 994.1],
        [-21.8051, -19.7868], 19.05),
    25: (('ice', 11, 4),
         [5589.0, 5821.8, 5541.6, 5852.6, 5933.1, 5889.5, 5761.1, 6244.4, 5657.1, 5648.2, 1170.6, 1086.4],
         [-17.1748, -16.509], 73.152),
    10**8: (('town', 4, 3),
            [320.0, 479.1, 750.5, 811.8, 1195.1, 2229.6, 2684.6, 2918.5, 3085.9, 3078.1, 2072.8, 1495.4],
            [-14.9289, -14.3354], 182.705),
    9*10**8: (('desert', 13, 12),
              [672.0, 782.8, 1229.8, 1681.5, 2072.5, 2486.0, 2774.1, 2922.4, 3099.6, 3224.4, 3918.0, 3195.1],
              [-18.7894, -17.8241], 561.151)}


@pytest.mark.parametrize('seed', FROZEN)
def test_the_world_is_frozen(seed):
    s = draw_scene(seed)
    at, s2, s1, dem = FROZEN[seed]
    assert (s['kind'], s['biome'], s['month']) == at
    np.testing.assert_allclose(s['s2'].mean((1, 2)), s2, rtol=1e-3)
    np.testing.assert_allclose([s['s1grd'].mean(), s['s1rtc'].mean()], s1, rtol=1e-4)
    np.testing.assert_allclose(s['dem'].mean(), dem, rtol=1e-4, atol=1e-4)


# -- contents

@pytest.mark.parametrize('size', [32, 64, 97, 120, 128, 256])
def test_any_size(size):
    s = draw_scene(3, size, clouds=True)
    kinds = dict(s1grd=(2, 'float32'), s1rtc=(2, 'float32'), s2=(12, 'uint16'), dem=(0, 'float32'), lulc=(0, 'uint8'),
                 ndvi=(0, 'float32'), cloud_mask=(0, 'bool'))
    for name, (bands, dtype) in kinds.items():
        assert s[name].shape == ((bands, size, size) if bands else (size, size)) and s[name].dtype == dtype, name
        assert np.isfinite(s[name]).all(), name
    assert 'cloud_mask' not in draw_scene(3, size)


def test_every_biome_in_every_month():
    for biome, (_, regions, kinds) in BIOME_PLACES.items():
        for month in range(1, 13):
            s = draw_scene(1000*biome + month, 64, month, biome)
            assert (s['biome'], s['month']) == (biome, month) and s['kind'] in kinds
            _, west, east, south, north = next(r for r in regions if r[0] == s['region'])
            assert west <= s['lon'] <= east and south <= s['lat'] <= north


def test_land_cover_codes_and_ndvi(scenes):
    codes = set(np.unique(np.stack([s['lulc'] for s in scenes])).tolist())
    assert codes == {1, 2, 3, 4, 5, 6, 7, 9}  # every TerraMesh class but no data and clouds
    for s in scenes[:20]:
        red, nir = s['s2'][3].astype(float), s['s2'][7].astype(float)
        np.testing.assert_allclose(s['ndvi'], (nir - red)/(nir + red), atol=1e-6)
        assert s['s2'].min() >= 1


def test_what_can_be_seen(scenes):
    "Water is dark in the infrared and in VH; trees are greener than bare ground and brighter in VH."
    def mean(code, values):
        return np.mean([values(s)[s['lulc'] == code].mean() for s in scenes if (s['lulc'] == code).sum() > 200])
    assert mean(1, lambda s: s['s2'][7]) < 600 < 1000 < mean(2, lambda s: s['s2'][7])
    vh = lambda s: s['s1grd'][1]
    assert mean(1, vh) < mean(6, vh) - 2 < mean(2, vh) - 7
    assert mean(2, lambda s: s['ndvi']) > mean(6, lambda s: s['ndvi']) + .2
    assert mean(5, lambda s: s['s1grd'][0]) > mean(4, lambda s: s['s1grd'][0])


# -- what the radar cannot know

def test_radar_knows_no_month():
    snow = 0
    for seed in range(12):
        year = [draw_scene(seed, 64, month) for month in range(1, 13)]
        for name in ('s1grd', 's1rtc', 'dem', 'lulc'):
            assert all(np.array_equal(s[name], year[0][name]) for s in year), name
        assert all(not np.array_equal(s['s2'], year[0]['s2']) for s in year[1:]) or year[0]['kind'] == 'sea'
        snow += any(s['s2'][1].mean() > 3000 for s in year)
    assert snow  # dry snow is invisible to the radar, and there was some


def test_radar_knows_no_colour(monkeypatch):
    "Whatever the optical stream draws (crops, soil colour, haze), the radar stays as it is."
    plain, stream = draw_scene(2), seed_rng
    swap(monkeypatch, 'gac.data.world.noise', 'seed_rng',
         lambda seed, purpose: stream(seed + 1 if purpose == 'optical' else seed, purpose))
    other = draw_scene(2)
    assert np.array_equal(plain['s1grd'], other['s1grd']) and np.array_equal(plain['lulc'], other['lulc'])
    assert not np.array_equal(plain['s2'], other['s2'])


def test_seasons_are_turned_south_of_the_equator():
    def summer_minus_winter(biome, region):
        gains = []
        for seed in range(400):
            p = draw_place(seed, biome=biome)
            if p['region'] != region or p['kind'] not in ('farms', 'pasture'): continue
            gains.append(draw_scene(seed, 64, 7, biome)['ndvi'].mean() - draw_scene(seed, 64, 1, biome)['ndvi'].mean())
            if len(gains) == 6: return np.mean(gains)
    assert summer_minus_winter(4, 'Western Europe') > .05 > -.05 > summer_minus_winter(4, 'Southern Chile')


# -- likeness to real chips

def test_distributions_agree_with_real_chips(scenes):
    table = ks_table(scenes)
    assert list(table.channel) == list(CHANNELS)
    assert table.ks.max() < KS_LIMIT, table.to_string()


def test_ks_notices_a_world_that_is_off(scenes):
    "The mark has teeth: 3 dB or a third of the reflectance is enough to fail it."
    off = [dict(s, s1grd=s['s1grd'] + 3, s2=(s['s2']*1.5).astype(np.uint16)) for s in scenes]
    table = ks_table(off).set_index('channel').ks
    assert (table[['VV grd', 'B03', 'B11']] > KS_LIMIT).all()


def test_neighbouring_pixels_agree_with_real_chips(scenes):
    for name, real in calibration()['correlation'].items():
        key, i = CHANNELS[name]
        own = np.median([lag_correlation(s[key][i], 2) for s in scenes[:120]], axis=0)
        assert np.abs(own - real[:2]).max() < .16, (name, own, real[:2])


def test_speckle_has_the_stated_looks():
    z = np.random.default_rng(0).standard_normal((512, 512))
    for looks in SPECKLE_LOOKS.values():
        power = 10**(gamma_db(z, looks)/10)
        assert abs(power.mean() - 1) < .01 and abs(1/power.var() - looks) < .15


def test_speckle_on_the_sea_agrees_with_real_sea():
    real = calibration()['sea']
    sea = [draw_scene(n) for n in range(250) if draw_place(n)['kind'] == 'sea']
    for product in SPECKLE_LOOKS:
        vv = [s[f's1{product}'][0] for s in sea]
        assert abs(np.median([window_looks(v) for v in vv]) - real['looks']) < .8
        assert np.abs(np.median([lag_correlation(v, 2) for v in vv], axis=0) - real['correlation'][:2]).max() < .06


def test_committed_statistics_are_those_of_the_chips(real_data):
    chips = real_chips(real_data)
    if len(chips) < 28: pytest.skip(f'{real_data} holds only part of the pool: {len(chips)} of 28 images')
    new, known = measure_pool(chips), calibration()
    assert new['pool'] == known['pool'] and new['sea']['chips'] == known['sea']['chips']
    for name in CHANNELS: np.testing.assert_allclose(new['quantiles'][name], known['quantiles'][name], atol=.11)
    for name in known['correlation']:
        np.testing.assert_allclose(new['correlation'][name], known['correlation'][name], atol=2e-3)


# -- seeds, speed, errors

def test_seeds_are_disjoint():
    assert STUDY_SEEDS.stop <= PRETRAIN_BASE < HELD_OUT_BASE
    seeds = [int(n) for batch in Scenes(PRETRAIN_BASE, 2, 0, 3) for n in batch['seed']]
    assert seeds == [PRETRAIN_BASE + i for i in range(6)] and not set(seeds) & set(STUDY_SEEDS)


def test_stream_gives_the_scenes():
    batch = draw_batch(range(HELD_OUT_BASE, HELD_OUT_BASE + 3), 64, wide=0.)
    for i in range(3):
        s = draw_scene(HELD_OUT_BASE + i, 64)
        for name in set(s) - {'region'}: assert np.array_equal(batch[name][i], s[name]), name


def test_fast_enough():
    "Draw at least 10 scenes per second of processor time: half of what is documented, as cores may be shared."
    draw_scene(0)
    start = time.process_time()
    for seed in range(30): draw_scene(seed)
    assert 30/(time.process_time() - start) > 10


@pytest.mark.parametrize('wrong, message',
                         [(dict(month=0), 'expected 1 to 12'), (dict(biome=2), 'the world has scenes for'),
                          (dict(size=16), 'at least 32'), (dict(seed=-1), 'numbered from 0')])
def test_wrong_wishes_are_refused(wrong, message):
    with pytest.raises(GacError, match=message): draw_scene(**{'seed': 1, **wrong})


def test_scenes_need_no_file(monkeypatch):
    "Scenes come from the code alone, wherever it is installed."
    monkeypatch.setattr('gac.data.world.calibration.root', lambda: pytest.fail('a scene asked for the repository'))
    draw_scene(1, 64)
