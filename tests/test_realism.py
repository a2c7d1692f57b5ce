"Realism: gradient energy, and distances in the features of the frozen Prithvi, on known distortions."
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.linalg import sqrtm

from gac.core.files import GacError
from gac.core.vocabulary import OPT_INDEX, REFLECTANCE
from gac.data.world.scenes import draw_scene
from gac.measure.realism import FeatureSums, PrithviRealism, frechet_distance, gradient_energy


@pytest.fixture(scope='module')
def truth() -> np.ndarray: # (6, 4, 120, 120) reflectance
    scenes = [draw_scene(i, 120)['s2'][list(OPT_INDEX)] for i in range(6)]
    return np.stack(scenes).astype('float32')*np.float32(REFLECTANCE)

@pytest.fixture(scope='module')
def judge() -> PrithviRealism: return PrithviRealism()

def blurred(x, s): return ndimage.gaussian_filter(x, (0, 0, s, s), mode='reflect')


def test_distances_rise_with_blur_and_noise(truth, judge):
    noise = np.random.default_rng(0).normal(size=truth.shape).astype('float32')
    blurs = [truth, *(blurred(truth, s) for s in (.5, 1, 2, 4))]
    for images in (blurs, [truth + s*noise for s in (0, .005, .02, .05)]):
        own = PrithviRealism(judge.encoder)
        paired = [float(own(x, truth, str(i)).mean()) for i, x in enumerate(images)]
        sets = [frechet_distance(own.sums['0'], s) for s in own.sums.values()]
        assert paired == sorted(paired) and paired[0] < 1e-5 < paired[-1]
        assert sets == sorted(sets) and sets[0] < 1e-3 < sets[-1]
        energy = [float(gradient_energy(x, truth).mean()) for x in images]
        assert abs(energy[0] - 1) < 1e-6 and energy in (sorted(energy), sorted(energy)[::-1])

def test_colour_is_put_right_and_a_shift_is_seen_by_the_pair_alone(truth, judge):
    own = PrithviRealism(judge.encoder)
    own(truth, truth, 'truth')
    assert float(own(truth + .1, truth, 'lighter').max()) < 1e-4
    moved = np.roll(truth, (3, 3), (2, 3))
    assert float(own(moved, truth, 'moved').mean()) > .01
    other = own(blurred(truth, 2), truth, 'blurred')
    at = {k: frechet_distance(own.sums['truth'], s) for k, s in own.sums.items()}
    assert len(other) == 6 and at['lighter'] < at['moved'] < .5*at['blurred']

def test_order_of_batches_does_not_matter(truth, judge):
    whole, parts = PrithviRealism(judge.encoder), PrithviRealism(judge.encoder)
    whole(blurred(truth, 1), truth, 'x')
    for i in (4, 0, 2): parts(blurred(truth, 1)[i:i + 2], truth[i:i + 2], 'x')
    assert whole.sums['x'].tiles == parts.sums['x'].tiles == 6
    np.testing.assert_allclose(whole.sums['x'].covariance, parts.sums['x'].covariance, atol=1e-5)

def test_frechet_distance_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(5, 5))
    a, b = (FeatureSums(5).add(torch.as_tensor(x)[None]) for x in (rng.normal(size=(400, 5)),
                                                                  rng.normal(size=(300, 5)) @ mix + 1))
    expected = ((a.mean - b.mean)**2).sum() + np.trace(a.covariance + b.covariance
                                                        - 2*sqrtm(a.covariance @ b.covariance).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    with pytest.raises(GacError, match='measure more tiles'):
        frechet_distance(a, FeatureSums(5).add(torch.zeros(1, 4, 5)))
