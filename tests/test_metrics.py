"Metrics: weight files from outside, properties that hold for any image, and many tiles."
import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st

from gac.core.files import GacError
from gac.measure.edges import (
    EDGE_EPS,
    SAR_MEASURES,
    edge_agreement,
    edge_recall,
    hallucination,
    image_edges,
    sar_edge,
    sar_edge_gap,
)
from gac.measure.metrics import mae, psnr, rmse, sam_deg, ssim
from gac.measure.perception import ALEXNET_FILE, LPIPS, rgb
from gac.measure.statistics import bootstrap_ci, paired_gain, summary
from gac.measure.tile_metrics import MEASURES, tile_metrics


def tiles(n=2, size=64, seed=0): return torch.rand(n, 4, size, size, generator=torch.Generator().manual_seed(seed))*.3


@pytest.fixture(scope='module')
def alexnet(tmp_path_factory):
    "Make a backbone file in torchvision's format, with random tensors."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('lpips')/'backbone.pth'
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


def test_lpips_equals_the_package_on_the_same_backbone(alexnet, tmp_path, monkeypatch):
    import lpips
    (tmp_path/'checkpoints').mkdir()
    os.link(alexnet, tmp_path/'checkpoints'/ALEXNET_FILE)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, '_get_torch_home', lambda: str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        reference = lpips.LPIPS(net='alex', verbose=False)  # loads the file through torchvision
    ours, a, b = LPIPS(alexnet), tiles(seed=1), tiles(seed=2)
    theirs = reference(rgb(a), rgb(b), normalize=True).flatten()  # its own way from [0, 1] to [-1, 1]
    assert torch.allclose(ours(a, b), theirs, atol=1e-6) and (theirs > 0).all()
    other_convention = reference(rgb(a), rgb(b)).flatten()
    assert ((other_convention - theirs).abs() > 1e-4).all()
    before = torch.get_rng_state()
    LPIPS(alexnet)
    assert torch.equal(before, torch.get_rng_state())


def test_lpips_looks_in_the_hub_cache_and_checks_the_published_name(alexnet, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr('gac.measure.perception.root', lambda: tmp_path)
    missing = LPIPS()
    assert not missing.available and ALEXNET_FILE in missing.reason and 'data' in missing.reason
    assert missing(tiles(), tiles()).isnan().all()
    (tmp_path/'checkpoints').mkdir()
    os.link(alexnet, tmp_path/'checkpoints'/ALEXNET_FILE)  # random tensors under the name of the published file
    with pytest.raises(GacError, match='SHA-256 does not begin with 7be5be79'): LPIPS()


def test_lpips_refuses_broken_files(alexnet, tmp_path):
    state = torch.load(alexnet, weights_only=True)
    small = {k: v for k, v in state.items() if k.startswith('features')}
    classifier = {k: torch.zeros(1).expand(v.shape) for k, v in state.items() if k.startswith('classifier')}
    cases = {'missing': (small, r"missing \['classifier.1.bias'"),
             'extra': (small | classifier | {'features.99.bias': torch.zeros(1)}, r"unexpected \['features.99.bias'\]"),
             'shape': (small | classifier | {'features.0.weight': torch.zeros(64, 3, 3, 3)},
                       r"misshapen \['features.0.weight'\]"), 'list': ([1, 2], 'holds a list')}
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path/f'{name}.pth')
        with pytest.raises(GacError, match=message): LPIPS(tmp_path/f'{name}.pth')
    (tmp_path/'cut.pth').write_bytes(alexnet.read_bytes()[:100_000])
    (tmp_path/'empty.pth').write_bytes(b'')
    for name in ('cut', 'empty'):
        with pytest.raises(GacError, match=rf'{name}\.pth is no readable Torch file'): LPIPS(tmp_path/f'{name}.pth')


class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ['BOMB'],)


def test_lpips_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path/'exploded'))
    torch.save({'features.0.weight': Bomb()}, tmp_path/'bomb.pth')
    with pytest.raises(GacError, match='no readable Torch file'): LPIPS(tmp_path/'bomb.pth')
    assert not (tmp_path/'exploded').exists()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(11, 40), noise=st.floats(1e-3, .5), n=st.integers(1, 3))
def test_measures_for_any_image(seed, size, noise, n):
    truth = tiles(n, size, seed)
    pred = truth + noise*torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    for name, f in MEASURES.items():
        value = f(pred, truth)
        assert value.shape == (n,) and value.isfinite().all(), name
        # no tile sees another
        assert torch.allclose(value, torch.cat([f(pred[i:i + 1], truth[i:i + 1]) for i in range(n)]), rtol=1e-4,
                              atol=1e-5), (name)
        # nor which side is left
        assert torch.allclose(value, f(pred.flip(-1), truth.flip(-1)), rtol=1e-3, atol=1e-4), name
    assert (mae(pred, truth) <= rmse(pred, truth) + 1e-6).all()
    assert ((ssim(pred, truth) <= 1).all() and (0 <= sam_deg(pred, truth)).all()
            and (sam_deg(pred, truth) <= 180).all())
    assert torch.allclose(psnr(pred, truth), -20*rmse(pred, truth).log10(), atol=1e-3)
    assert (psnr(truth + (pred - truth)*2, truth) < psnr(pred, truth)).all()  # twice the error is 6 dB worse


def test_non_finite_tile_is_named_by_every_measure():
    truth = tiles(3)
    for bad in (torch.nan, torch.inf, -torch.inf):
        pred = truth.clone()
        pred[2, 1, 0, 0] = bad
        for f in MEASURES.values():
            with pytest.raises(GacError, match='Tile 2: 1 values of the prediction are not finite'): f(pred, truth)
        with pytest.raises(GacError, match=r'Tile 2 \(x_2\)'): tile_metrics(pred, truth, ['x_0', 'x_1', 'x_2'])
    with pytest.raises(GacError, match='Expected the 4 bands'): tile_metrics(truth[:, :3], truth[:, :3])


def test_table_does_not_depend_on_chunks_or_type():
    pred, truth, none = tiles(7, seed=1), tiles(7, seed=2), LPIPS.__new__(LPIPS)
    none.net = None
    tables = [tile_metrics(p, t, lpips=none, per_band=True, chunk=c)
              for p, t, c in ((pred, truth, 32), (pred.numpy(), truth.numpy(), 3), (pred.double(), truth, 1))]
    for table in tables[1:]: pd.testing.assert_frame_equal(tables[0], table, check_exact=False, rtol=1e-5)


def test_bootstrap_covers_the_truth():
    "95 % intervals of 200 samples of known mean contain it about 95 % of the time."
    rng = np.random.default_rng(0)
    covered = np.mean([lo <= 1. <= hi for _, lo, hi in (bootstrap_ci(rng.normal(1, 1, 60), n=400, seed=i)
                                                        for i in range(200))])
    assert .88 <= covered <= .99


def test_bootstrap_of_many_columns_and_uneven_scenes():
    rng = np.random.default_rng(1)
    x, scenes = rng.normal(size=(90, 3)), rng.integers(0, 9, 90).astype(str)
    mean, lo, hi = bootstrap_ci(x, n=300, scenes=scenes)
    # one resample for all columns
    for k in range(3): assert np.allclose((mean[k], lo[k], hi[k]), bootstrap_ci(x[:, k], n=300, scenes=scenes))
    draws = []
    rng = np.random.default_rng(0)
    groups = [x[scenes == s, 0] for s in pd.unique(scenes)]
    for _ in range(300):
        draws.append(np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))]).mean())
    assert np.allclose((lo[0], hi[0]), np.quantile(draws, [.025, .975]))  # the same, drawn one by one
    with pytest.raises(GacError, match='There are no tiles'): bootstrap_ci([])
    with pytest.raises(GacError, match='2 scenes for 3 tiles'): bootstrap_ci([1., 2., 3.], scenes=['a', 'b'])


def test_gain_is_positive_where_better():
    better, worse = np.full(20, 2.) + np.linspace(0, .1, 20), np.full(20, 1.)
    assert (paired_gain(better, worse, 'psnr')[1] > 0 and paired_gain(better, worse, 'psnr_B08')[1] > 0
            and paired_gain(better, worse, 'ssim_std')[1] > 0)
    for measure in ('mse', 'rmse', 'mae', 'sam_deg', 'lpips', 'rmse_B02', 'mae_std'):
        assert paired_gain(better, worse, measure)[2] < 0, measure
    with pytest.raises(GacError, match='the same tiles'): paired_gain(better, worse[:3])


def test_summary_is_one_row_of_a_table():
    table = pd.DataFrame({'psnr': [20., 30., 40.], 'lpips': [np.nan]*3})
    row = summary(table, n=200)
    assert row['n_tiles'] == 3 and row['psnr'] == 30. and row['psnr_lo'] < 30 < row['psnr_hi']
    assert np.isnan(row['lpips_lo'])


def radar(n=2, size=64, seed=0):
    "Radar tiles in dB with a bright field each, under speckle."
    g = torch.Generator().manual_seed(seed)
    s1 = torch.full((n, 2, size, size), -14.)
    for i in range(n):
        r, c = torch.randint(12, size - 28, (2,), generator=g).tolist()
        s1[i, :, r:r + 16, c:c + 16] += 6
    return s1 + 1.5*torch.randn(s1.shape, generator=g)


def as_image(s1, contrast=.12): return (torch.exp(contrast*(s1.mean(1, keepdim=True) + 20))*.05).repeat(1, 4, 1, 1)


def test_edge_agreement_orders_what_it_must():
    s1 = radar(8, 96)
    clean = as_image(torch.nn.functional.avg_pool2d(s1, 5, 1, 2, count_include_pad=False))
    order = [clean, clean.roll((3, 3), (-2, -1)), clean.roll((20, 14), (-2, -1)), torch.full_like(clean, .2)]
    values = torch.stack([sar_edge(x, s1).mean() for x in order])
    assert (values[:3].diff() > .05).all() and values[2] <= values[3] + 1e-6 and values[3] == pytest.approx(1, abs=1e-4)
    assert values[0] < .4
    assert ((0 <= values) & (values <= 1)).all()


def test_edge_measures_by_hand():
    "The correlation of gradients of a smoothed image, as SciPy computes them."
    from scipy import ndimage
    s1, x = radar(1, 48, 3).double(), tiles(1, 48, 4).double()
    def strength(a):
        g = [ndimage.gaussian_filter(c, 2, order=o, truncate=3) for c in a for o in ((0, 1), (1, 0))]
        return np.sqrt(np.square(g).sum(0)/len(a))[6:-6, 6:-6]
    by_hand = 1 - np.corrcoef(strength(s1[0].numpy()).ravel(), strength(np.log(x[0].numpy() + .02)).ravel())[0, 1]
    assert float(edge_agreement(x, s1)) == pytest.approx(by_hand, abs=5e-3)


def test_copy_of_the_radar_has_a_low_value_and_a_large_gap():
    s1 = radar(6, 96)
    truth, copy = as_image(radar(6, 96) * 0 + torch.nn.functional.avg_pool2d(
                               s1, 9, 1, 4, count_include_pad=False)) + .02*tiles(6, 96, 9), as_image(s1)
    raw, gap = sar_edge(copy, s1), sar_edge_gap(copy, truth, s1)
    assert (raw < sar_edge(truth, s1)).all() and (gap > .05).all()
    assert torch.allclose(sar_edge_gap(truth, truth, s1), torch.zeros(6))
    assert torch.allclose(gap, (raw - sar_edge(truth, s1)).abs())


def test_edges_nobody_else_has_are_hallucinations_and_lost_ones_are_missed():
    clean = radar(1, 80)*0 - 14
    clean[..., 20:36, 20:36] += 6
    s1 = clean + .3*torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    truth = as_image(clean)
    road = truth.clone()
    road[..., 60:66, :] *= 3
    lost = as_image(clean*0 - 14)
    assert hallucination(road, truth, s1) > .3 and hallucination(truth, truth, s1) == 0
    assert hallucination(lost, truth, s1) == 0
    assert edge_recall(truth, s1) > .9 and edge_recall(lost, s1) == 0
    assert hallucination(road, road, s1) == 0  # the truth backs it
    seen = s1.clone()
    seen[..., 60:66, :] += 9
    assert hallucination(road, truth, seen) < .15  # so does the radar


def test_recall_is_a_share_of_the_radars_edges():
    two = torch.full((1, 2, 80, 80), -14.)
    two[..., 14:30, 14:30] += 6
    one = two.clone()
    two[..., 48:64, 48:64] += 6
    assert edge_recall(as_image(two), two) > .95 and .3 < edge_recall(as_image(one), two) < .7
    assert edge_recall(as_image(two), one) > .7  # what else the image shows costs only its share of the tenth


def test_gradient_of_the_agreement_lowers_it_and_never_breaks():
    s1 = radar(2, 48)
    x = (tiles(2, 48, 7) + .05).requires_grad_()
    before = edge_agreement(x, s1)
    grad, = torch.autograd.grad(before.sum(), x)
    assert grad.isfinite().all() and (grad.flatten(1).norm(dim=1) > 0).all()
    after = edge_agreement(x.detach() - 1e-3*grad/grad.abs().max(), s1)
    assert (after < before).all()
    for dull in (torch.zeros(2, 4, 48, 48), torch.full((2, 4, 48, 48), -.1), torch.full((2, 4, 48, 48), .3)):
        x = dull.requires_grad_()
        edge_agreement(x, s1).sum().backward()
        assert x.grad.isfinite().all()
    edges = image_edges(x := torch.full((1, 4, 48, 48), .3, requires_grad=True))
    edges.sum().backward()
    assert (edges > .9*EDGE_EPS).all() and x.grad.abs().max() < 1  # a flat image has no direction to go
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(edge_agreement(tiles(2, 48, 7), s1), edge_agreement(tiles(2, 48, 7), s1).float())
    with torch.autocast('cpu', torch.bfloat16): half = edge_agreement(tiles(2, 48, 7), s1)
    assert torch.allclose(half, edge_agreement(tiles(2, 48, 7), s1), atol=1e-5)


def test_edge_columns_and_their_direction():
    none = LPIPS.__new__(LPIPS)
    none.net = None
    s1, truth = radar(5, 48), tiles(5, 48, 1)
    pred = truth + .05*tiles(5, 48, 2)
    whole, parts = (tile_metrics(pred, truth, lpips=none, s1=s1, chunk=c) for c in (32, 2))
    pd.testing.assert_frame_equal(whole, parts, check_exact=False, rtol=1e-4)
    assert set(SAR_MEASURES) <= set(whole) and not set(SAR_MEASURES) & set(tile_metrics(pred, truth, lpips=none))
    np.testing.assert_allclose(whole.edge_recall, edge_recall(pred, s1), atol=1e-6)
    np.testing.assert_allclose(whole.hallucination, hallucination(pred, truth, s1), atol=1e-6)
    better, worse = np.full(20, .6) + np.linspace(0, .1, 20), np.full(20, .3)
    assert paired_gain(better, worse, 'edge_recall')[1] > 0
    for measure in ('sar_edge', 'sar_edge_gap', 'hallucination'):
        assert paired_gain(better, worse, measure)[2] < 0, measure
    broken = s1.clone()
    broken[3, 0, 0, 0] = torch.nan
    for bad, message in ((10**(s1/10), 'linear power'), (s1[:, :, :40], 'VV and VH'), (broken, 'Tile 3')):
        with pytest.raises(GacError, match=message): tile_metrics(pred, truth, lpips=none, s1=bad)
    with pytest.raises(GacError, match='24 px or more'):
        tile_metrics(pred[..., :20, :20], truth[..., :20, :20], lpips=none, s1=s1[..., :20, :20])
