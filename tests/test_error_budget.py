"Parts of the squared error: they add up, none is negative, and each holds what was planted."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from gac.core.vocabulary import OPT_INDEX, REFLECTANCE
from gac.data.world.scenes import draw_scene
from gac.measure.error_budget import PARTS, TOKEN, debias, error_parts, grid_energy, surface_errors, water_mask
from gac.measure.metrics import psnr
from gac.measure.statistics import pooled_psnr
from gac.measure.tile_metrics import tile_metrics


@pytest.fixture(scope='module')
def truth() -> np.ndarray: # (6, 4, 120, 120) reflectance
    scenes = [draw_scene(i, 120)['s2'][list(OPT_INDEX)] for i in range(6)]
    return np.stack(scenes).astype('float32')*np.float32(REFLECTANCE)


def blurred(x, s): return ndimage.gaussian_filter(x, (0, 0, s, s), mode='reflect')

def token_steps(shape, strength, seed=0):
    cells = np.random.default_rng(seed).normal(size=(*shape[:2], shape[2]//TOKEN, shape[3]//TOKEN))
    return (strength*cells.repeat(TOKEN, 2).repeat(TOKEN, 3)).astype('float32')

def shares(pred, truth):
    parts = {k: float(v.mean()) for k, v in error_parts(pred, truth).items()}
    return {k.removeprefix('mse_'): v/sum(parts.values()) for k, v in parts.items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([20, 32, 50, 61, 120]), st.sampled_from([6, 16]),
       st.floats(1e-4, .3))
def test_parts_add_up_and_none_is_negative(seed, size, token, noise):
    rng = torch.Generator().manual_seed(seed)
    truth = torch.rand(2, 4, size, size + 4, generator=rng)
    pred = truth + noise*torch.randn(truth.shape, generator=rng) + .1*torch.randn(2, 4, 1, 1, generator=rng)
    parts = error_parts(pred, truth, token)
    squared = (pred.double() - truth.double()).square().mean((1, 2, 3))
    assert tuple(parts) == PARTS and all((v >= 0).all() for v in parts.values())
    torch.testing.assert_close(sum(parts.values()), squared, rtol=1e-12, atol=0)
    assert all((v == 0).all() for v in error_parts(truth, truth, token).values())

def test_columns_of_the_table_add_up_to_mse(truth):
    table = tile_metrics(blurred(truth, 2) + .02, truth)
    np.testing.assert_allclose(table[list(PARTS)].sum(axis=1), table.mse, rtol=1e-5)
    np.testing.assert_allclose(table.psnr_debiased, psnr(debias(blurred(truth, 2) + .02, truth), truth), atol=1e-3)
    assert (table.psnr_debiased > table.psnr + .5).all()

def test_each_part_holds_what_was_planted(truth):
    y = np.cos(np.pi*(np.arange(120) + .5)/120*4)[:, None].astype('float32')  # 60 px long
    assert shares(truth + .03, truth)['colour'] > .999
    assert shares(truth + .03*y, truth)['coarse'] > .99
    rough = np.random.default_rng(0).normal(size=truth.shape).astype('float32')
    assert shares(truth + .02*rough, truth)['detail'] > .95
    frame = np.zeros((TOKEN, TOKEN), 'float32')
    frame[0] = frame[:, 0] = 1
    assert shares(truth + .01*np.tile(frame, (20, 20)), truth)['grid'] > .5

def test_grid_is_found_when_planted_and_absent_from_blur_and_noise(truth):
    rough = np.random.default_rng(1).normal(size=truth.shape).astype('float32')
    for image in (blurred(truth, 1.5), blurred(truth, 4), truth + .02*rough, blurred(truth, 2) + .01):
        assert shares(image, truth)['grid'] < .01
    smooth = blurred(truth, 3)
    steps = token_steps(truth.shape, .01)
    found = [float(grid_energy(smooth + k*steps).mean()) for k in (0, .5, 1, 2)]
    assert found[0] < .02*found[2] and found[1] < found[2] < found[3]
    assert .1 < found[2]/1e-4 < .45  # of a variance of 1e-4, of which 43 % are finer than two tokens
    elsewhere = np.roll(steps, (TOKEN//2, TOKEN//2), (2, 3))
    assert float(grid_energy(smooth + elsewhere).mean()) < .1*found[2]  # steps, but not of the tokens

def test_grid_starts_where_the_padding_puts_the_tokens():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(4, 4, 17, 17)).repeat(TOKEN, 2).repeat(TOKEN, 3)  # 102 px
    cut = wide[..., 1:-1, 1:-1]  # 100 px are padded by one on every side
    assert (grid_energy(cut) > .1).all() and (grid_energy(wide[..., :100, :100]) == 0).float().mean() > .5

def test_land_and_water_add_up_and_are_told_apart(truth):
    water = np.zeros((6, 120, 120), bool)
    water[:3, :30] = True
    pred = truth + np.where(water, .04, .01)[:, None].astype('float32')
    found = surface_errors(pred, truth, water)
    np.testing.assert_allclose(found['mse_land'] + found['mse_water'], ((pred - truth)**2).mean((1, 2, 3)), rtol=1e-4)
    assert pooled_psnr(found['mse_water'], found['share_water'])[0] == pytest.approx(-20*np.log10(.04), abs=1e-3)
    assert pooled_psnr(found['mse_land'], found['share_land'])[0] == pytest.approx(-20*np.log10(.01), abs=1e-3)
    assert max(found['mse_water_debiased']) < 1e-9
    codes = np.where(water, 1, 4)
    assert (water_mask(truth, codes).numpy() == water).all()
    unknown = water_mask(truth, np.zeros_like(codes))
    assert (unknown == water_mask(truth)).all()
