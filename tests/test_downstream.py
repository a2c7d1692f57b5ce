"Input configurations that differ in nothing else, the source of their images, and TerraTorch's command on them."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from swapping import swap

from gac.core.config import DownstreamConfig, config_of as settings_of
from gac.core.files import GacError, relative_to_root, root
from gac.core.vocabulary import OPT_BANDS
from gac.data.store import Store
from gac.data.stores import from_world
from gac.measure.classes import confusion, resample_scores, score_columns, segmentation_scores
from gac.measure.statistics import percentile_interval
from gac.models.blank import without_memory
from gac.models.mini import MINI_STATS
from gac.products.downstream_config import (
    DownstreamRecipe,
    SameStart,
    config_of,
    fit_config,
    hushed,
    model_config,
    open_config,
    statistics,
    terratorch,
    write_config,
)
from gac.products.downstream_images import recipe_of
from gac.products.downstream_runs import gradient_check, mark_of, predicted, run_arms, truth_of
from gac.products.labels import ARMS, LABEL_CODES, StoreData, as_classes
from gac.products.plateau import read_plateau
from gac.products.probe import ProbeSettings, draw_labels, fit_arm, probe_arms

SHORT = DownstreamRecipe(size=24, batch_size=2, steps=2, channels=(16, 12, 8, 8),
                         require=('opt_v1', 'opt_v2', 'opt_v3'))
DRAWN = ('opt_v1', 'opt_v2', 'opt_v3')

@pytest.fixture(scope='module')
def store(tmp_path_factory) -> Store:
    "Small tiles with three drawn images that are easily told apart, one tile lacking the third."
    made = from_world(tmp_path_factory.mktemp('downstream')/'tiles', 5, 2, 4, size=48, batch=11)
    r = np.random.default_rng(0)
    for k, name in enumerate(DRAWN):
        made.ensure_array(name, (4, 48, 48), 'int16', dict(bands=list(OPT_BANDS), trained=name))
        rows = np.arange(len(made))[:len(made) if k < 2 else -1]
        made.write(name, rows, (1000*(k + 1) + r.integers(0, 500, (len(rows), 4, 48, 48))).astype('int16'))
    made.close()
    return Store(made.path)

def config(store, arm:str, out, recipe=SHORT) -> dict:
    return config_of(ARMS[arm], recipe, str(store.path), out_dir=str(out))

def flat(x, name:str='') -> dict:
    "Every leaf of a configuration by its path."
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in flat(value, f'{name}.{key}').items()} if items else {name: x}

def data_of(store, arm:str, tmp_path, recipe=SHORT, **changes) -> StoreData:
    data = StoreData(**config(store, arm, tmp_path, recipe)['data']['init_args'] | changes)
    data.setup()
    return data

@pytest.mark.parametrize('name', ['terramind_mini', 'terramind_v1_base'])
def test_arms_differ_in_nothing_but_their_inputs(store, name):
    recipe = replace(SHORT, name=name)
    first = flat(config(store, 'bound', 'out', recipe))
    allowed = {'s1': ('.data.init_args.images', '.data.init_args.means', '.data.init_args.stds', 'backbone_modalities',
                      'backbone_bands'),
               'c': ('.data.init_args.images.S2L2A',), 'random': ('backbone_pretrained',),
               'b': ('.data.init_args.images', '.data.init_args.means', '.data.init_args.stds', 'backbone_modalities',
                     'backbone_bands', 'model_args.backbone', 'backbone_tim_'),
               'a': ('.data.init_args.bands', '.data.init_args.means', '.data.init_args.stds', 'backbone_bands')}
    for arm in ARMS:
        other = flat(config(store, arm, 'out', recipe))
        changed = {k for k in first.keys() | other.keys() if first.get(k) != other.get(k)}
        expected = {'c_v1': 'c', 'c_v2': 'c', 'c_v3': 'c', 's2': 's1'}.get(arm, arm)
        may = allowed.get(expected, ()) + (('.data.init_args.bands',) if arm == 's2' else ())
        assert not [k for k in changed if not any(m in k for m in may)], (arm, changed)
        assert changed or arm == 'bound', arm
    assert not [k for k in first if 'lulc' in str(first[k]).lower() and k != '.data.init_args.labels']

def test_drawn_arms_read_the_drawn_arrays(store, tmp_path):
    for arm, array in dict(c_v1='opt_v1', c_v2='opt_v2', c_v3='opt_v3', bound='s2').items():
        test = data_of(store, arm, tmp_path).sets['test']
        mean, std = (torch.tensor(x)[:, None, None] for x in statistics('terramind_mini', 'S2L2A', OPT_BANDS))
        dn = test[3]['image']['S2L2A']*std + mean
        there = store.read(array, test.rows[0], OPT_BANDS)[0][:, 24:, 24:]  # window 3 is the lower right
        np.testing.assert_allclose(dn, there, atol=.1)
        np.testing.assert_allclose(test[3]['image']['S1GRD'][0]*MINI_STATS['untok_sen1grd@224'][1][0]
                                   + MINI_STATS['untok_sen1grd@224'][0][0],
                                   store.read('s1', test.rows[0])[0][0, 24:, 24:], atol=1e-3)

def test_images_come_from_the_derived_store_where_the_store_has_none(store, tmp_path):
    plain = from_world(tmp_path/'plain', 5, 2, 4, size=48, batch=11)
    args = config(plain, 'c_v2', tmp_path)['data']['init_args']
    data = StoreData(**args | dict(derived=str(store.path)))
    data.setup()
    assert torch.equal(data.sets['test'][0]['image']['S2L2A'],
                       data_of(store, 'c_v2', tmp_path).sets['test'][0]['image']['S2L2A'])

def test_every_arm_sees_the_same_ground(store, tmp_path):
    "Tiles without one of the drawn images are left out of every arm, also of those that do not need it."
    names = {arm: [n for batch in data_of(store, arm, tmp_path).train_dataloader() for n in batch['filename']]
             for arm in ('s1', 'a', 'c_v3')}
    assert names['s1'] == names['a'] == names['c_v3']
    assert [n for batch in data_of(store, 's1', tmp_path, replace(SHORT, seed=1)).train_dataloader()
            for n in batch['filename']] != names['s1']
    assert [len(data_of(store, a, tmp_path).sets['test'].rows) for a in ('s1', 'c_v3')] == [3, 3]
    assert len(data_of(store, 's1', tmp_path, require=[]).sets['test'].rows) == 4

@pytest.mark.parametrize('images',
                         [{'S2L2A': 'lulc'}, {'LULC': 'lulc'}, {'S1GRD': 's1', 'S2L2A': 'ndvi'}, {'NDVI': 'ndvi'}])
def test_labels_are_never_an_input(store, tmp_path, images):
    with pytest.raises(GacError, match='input'): data_of(store, 's1', tmp_path, images=images)

def test_images_do_not_change_with_the_labels(store, tmp_path, monkeypatch):
    before = data_of(store, 'c_v1', tmp_path).sets['train'].tile(0)
    swap(monkeypatch, 'gac.products.labels', 'as_classes', lambda codes, known: np.full(np.shape(codes), 3))
    after = data_of(store, 'c_v1', tmp_path).sets['train'].tile(0)
    assert not np.array_equal(before[1], after[1]) and all(np.array_equal(before[0][m], after[0][m]) for m in before[0])

def test_unknown_ground_counts_nowhere():
    truth = as_classes([[[1, 0, 8, 2]]])
    assert confusion(truth, [[[0, 0, 0, 1]]], 8).sum() == 2

def test_what_is_wrong_is_said(store, tmp_path):
    with pytest.raises(GacError, match='do not fill'): data_of(store, 's1', tmp_path, size=36)
    with pytest.raises(GacError, match='S1GRD'):
        data_of(store, 's1', tmp_path, images={'S1RTC': 's1'}, means={'S1RTC': [0., 0.]}, stds={'S1RTC': [1., 1.]})
    with pytest.raises(GacError, match='no band B11'): data_of(store, 'c_v1', tmp_path, bands=['B11'])
    with pytest.raises(GacError, match='name of a TerraMind encoder'): DownstreamRecipe('prithvi').depths
    with pytest.raises(GacError, match='missing'): open_config(tmp_path/'nothing.yaml')

@pytest.mark.parametrize('arm', list(ARMS))
def test_full_scale_configurations_are_accepted(store, tmp_path, arm):
    full = DownstreamRecipe('terramind_v1_base', size=0, steps=1000, lr=1e-4, channels=(512, 256, 128, 64),
                            precision='16-mixed', val_every=100)
    path = write_config(tmp_path/'full.yaml', config_of(ARMS[arm], full, 'data/tiles'))
    parsed = open_config(path, build=False).config
    args = parsed.model.init_args.model_args
    assert args['backbone'] == ('terramind_v1_base_tim' if arm == 'b' else 'terramind_v1_base')
    if ARMS[arm].s2 and arm not in ('a', 's2'):
        assert args['backbone_bands'] == {'S2L2A': ['BLUE', 'GREEN', 'RED', 'NIR_BROAD']}
    wrong = yaml.safe_load(path.read_text())
    wrong['model']['init_args']['learning_rate'] = 1.
    with pytest.raises(GacError, match='learning_rate'):
        open_config(write_config(tmp_path/'wrong.yaml', wrong), build=False)

def test_arms_begin_with_the_same_head_and_adapters(store, tmp_path):
    def start(arm, seed=0):
        run = open_config(write_config(tmp_path/f'{arm}.yaml', config(store, arm, tmp_path)))
        SameStart(seed).draw(run.model.model)
        return {k: v for k, v in run.model.model.state_dict().items() if not k.startswith('encoder.')
                or ('.lora_' in k and '.sampler.' not in k)}
    one, thinking, other = start('s1'), start('b'), start('s1', 1)
    assert one.keys() == thinking.keys() and all(torch.equal(one[k], thinking[k]) for k in one)
    weights = [k for k in one if k.startswith('head.') and k.endswith('weight') and one[k].ndim == 4]
    assert weights and not any(torch.equal(one[k], other[k]) for k in weights)

def test_thinking_arm_trains_its_encoder_and_not_the_generator(store, tmp_path):
    path = write_config(tmp_path/'b.yaml', config(store, 'b', tmp_path))
    table = gradient_check(path, 2).set_index('part')
    assert table.with_grad['adapters'] == table.trainable['adapters'] == 24576
    assert table.trainable['frozen encoder and generator'] == 0 and table.params['frozen encoder and generator'] > 2e6

def test_scores_agree_with_terratorch(store, tmp_path):
    run = fit_config(write_config(tmp_path/'c.yaml', config(store, 'bound', tmp_path/'out')))
    with hushed(): theirs = run.trainer.test(run.model, run.datamodule, verbose=False)[0]
    test = run.datamodule.sets['test']
    matrix = confusion(truth_of(test), predicted(run.model, test), len(LABEL_CODES)).sum(0)
    ours = dict(zip(score_columns(LABEL_CODES), segmentation_scores(matrix)))
    assert ours['pixel_accuracy'] == pytest.approx(theirs['test/Pixel_Accuracy'], abs=1e-5)
    for name in ('water', 'trees', 'crops', 'rangeland'):
        if not np.isnan(ours[f'iou_{name}']):
            assert ours[f'iou_{name}'] == pytest.approx(theirs[f'test/IoU_{name}'], abs=1e-5)

def test_bootstrap_draws_whole_scenes():
    "Tiles of one scene come and go together: with two opposite scenes a resample is one, the other, or the mean."
    # scene a: right twice, scene b: wrong
    matrices = np.array([[[[9, 0], [0, 1]], [[9, 0], [0, 1]], [[0, 9], [1, 0]]]])
    score = resample_scores(matrices, ['a', 'a', 'b'], 400)[:, 2]
    assert set(np.round(score, 6)) == {1., round(2/3, 6), 0.}
    assert set(np.round(resample_scores(matrices, ['a', 'c', 'b'], 400)[:, 2], 6)) > {1., 0.}

def test_seeds_are_resampled_too():
    right, wrong = np.array([[[4, 0], [0, 4]]]*6), np.array([[[0, 4], [4, 0]]]*6)
    lo, hi = percentile_interval(resample_scores(np.stack([right, wrong]), np.arange(6)))
    assert (lo[2], hi[2]) == (0, 1)

def test_a_stopped_comparison_goes_on_and_a_changed_one_does_not(store, tmp_path, monkeypatch):
    first = run_arms(tmp_path, store, store, SHORT, ('s1',))
    def refuse(path): raise RuntimeError('trained again')
    swap(monkeypatch, 'gac.products.downstream_config', 'fit_config', refuse)
    again = run_arms(tmp_path, store, store, SHORT, ('s1',))
    assert np.array_equal(first['s1', 0].maps, again['s1', 0].maps)
    with pytest.raises(RuntimeError, match='trained again'):
        run_arms(tmp_path, store, store, replace(SHORT, lr=1e-3), ('s1',))
    kept = next((tmp_path/'s1-0').glob('result-*.npz'))
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(GacError, match='damaged'): run_arms(tmp_path, store, store, SHORT, ('s1',))

def test_result_depends_on_the_drawn_images(store, tmp_path):
    mark = lambda arm, derived=store: mark_of(config(store, arm, tmp_path), store, derived)
    assert len({mark(a) for a in ARMS}) == len(ARMS)
    class Other: arrays = {a: type('array', (), dict(attrs=dict(trained='otherwise')))() for a in DRAWN}
    assert mark('c_v2', Other) != mark('c_v2') and mark('bound', Other) == mark('bound')

def test_caller_keeps_its_random_numbers(store, tmp_path):
    path = write_config(tmp_path/'c.yaml', config(store, 's1', tmp_path))
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1]
    open_config(path, build=False)
    fit_config(path)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])

def test_command_writes_the_files(store, tmp_path, capsys):
    from gac.cli import main
    words = ['downstream', '--data-dir', str(store.path), '--output-dir', str(tmp_path/'out'), '--arms', 's1,c_v2',
             '--seeds', '0,1', '--tile-size', '24', '--max-steps', '7', '--configs-only']
    assert not main(words)
    names = ['s1-0', 's1-1', 'c_v2-0', 'c_v2-1']
    assert sorted(p.stem for p in (tmp_path/'out').glob('*.yaml')) == sorted(names)
    assert all(n in capsys.readouterr().out for n in names[:1])
    made = yaml.safe_load((tmp_path/'out'/'c_v2-1.yaml').read_text())
    assert ((made['seed_everything'], made['trainer']['max_steps'], made['data']['init_args']['images']['S2L2A']) == (
                1, 7, 'opt_v2'))

def test_a_profile_trains_what_the_notebook_trains(store, tmp_path, capsys):
    "The file of `gac downstream --profile mini` is that of 15_downstream but for folders; options replace values."
    from gac.cli import main
    from gac.runner.profiles import profile_values
    words = ['downstream', '--data-dir', str(store.path), '--output-dir', str(tmp_path/'out'), '--arms', 's1,c_v3',
             '--profile', 'mini', '--tile-size', '24', '--configs-only']
    assert not main(words)
    values = profile_values('15_downstream', 'mini') | dict(name='terramind_mini', size=24)
    recipe = recipe_of(store, settings_of(DownstreamConfig, values), ['opt_v3'])
    made = yaml.safe_load((tmp_path/'out'/'c_v3-0.yaml').read_text())
    place = relative_to_root((tmp_path/'out'/'c_v3-0').resolve())
    expected = config_of(ARMS['c_v3'], recipe, relative_to_root(store.path), relative_to_root(store.path), place)
    assert flat(made) == {k: list(v) if isinstance(v, tuple) else v for k, v in flat(expected).items()}
    assert made['trainer']['val_check_interval'] == values['val_every'] and len(recipe.class_weights) > 2
    assert not main([*words, '--max-steps', '7'])
    assert yaml.safe_load((tmp_path/'out'/'c_v3-0.yaml').read_text())['trainer']['max_steps'] == 7

def test_rare_classes_weigh_more_in_the_loss(store):
    recipe = recipe_of(store, DownstreamConfig())
    pixels = np.bincount(as_classes(store.read('lulc', store.rows('train')), recipe.classes).ravel() + 1)[1:]
    w = np.array(recipe.class_weights)
    assert (np.diff(w[np.argsort(pixels)]) <= 0).all() and w.max() > w.min()
    assert (w*pixels).sum()/pixels.sum() == pytest.approx(1, abs=1e-4)

def test_a_training_keeps_the_weights_of_its_best_validation(store, tmp_path):
    "A head that a raised learning rate ruins after its best validation is tested with the best weights."
    recipe = replace(SHORT, steps=6, val_every=1, patience=50)
    run = open_config(write_config(tmp_path/'c.yaml', config(store, 'bound', tmp_path/'out', recipe)))
    class Ruin(Callback):
        def on_train_batch_start(self, trainer, task, batch, i):
            if trainer.global_step == 3:
                for p in task.model.head.parameters(): torch.nn.init.normal_(p, std=50.)
    run.trainer.callbacks.insert(0, Ruin())
    with hushed(): run.trainer.fit(run.model, run.datamodule)
    ended = read_plateau(tmp_path/'out')
    assert (ended['steps'], ended['plateau'], len(ended['curve'])) == (6, False, 6)
    best = max(ended['curve'], key=lambda r: r['miou'])
    assert ended['best_step'] == best['step'] and ended['val_miou'] == best['miou']
    with hushed(): again = run.trainer.validate(run.model, run.datamodule, verbose=False)[0]
    assert again['val/mIoU'] == pytest.approx(best['miou'], abs=1e-4)
    kept = torch.load(tmp_path/'out'/'trained.ckpt', map_location='cpu', weights_only=False)['state_dict']
    now = run.model.state_dict()
    assert all(torch.equal(kept[k], now[k]) for k in kept if k.startswith('model.head.'))

def test_a_training_ends_at_its_plateau(store, tmp_path):
    recipe = replace(SHORT, steps=60, val_every=1, patience=1, lr=1e-12)  # nothing is learnt
    fit_config(write_config(tmp_path/'c.yaml', config(store, 's1', tmp_path/'out', recipe)))
    ended = read_plateau(tmp_path/'out')
    assert ended['plateau'] and ended['steps'] < 10 and [c['event'] for c in ended['curve']][-1] == 'stop'

def test_probes_of_all_arms_have_the_same_labels_and_see_the_image(store, tmp_path):
    rows = {s: store.rows(s) for s in ('train', 'val', 'test')}
    found = probe_arms(tmp_path, store, store, SHORT, ProbeSettings((2, 5), 2), ['s1', 'bound'], rows)
    one, two = (found[found.arm == a] for a in ('s1', 'bound'))
    assert one[['labels', 'draw']].values.tolist() == two[['labels', 'draw']].values.tolist()
    assert found.gradient.max() < .01  # at the optimum
    truth = [np.stack(a.matrices).sum((1, 3)) for a in (one, two)]
    assert np.array_equal(*truth)

def test_probe_reads_the_labels_of_its_tiles_alone(store):
    "Other labels of tiles that are not in the draw leave the probe as it is."
    r = np.random.default_rng(0)
    features = {s: r.normal(size=(4, 64, 8)).astype('float16') for s in ('train', 'val', 'test')}
    shares = {s: np.eye(3, dtype='float32')[r.integers(0, 3, (4, 64))] for s in ('train', 'val')}
    truth, settings = r.integers(0, 3, (4, 48, 48)), ProbeSettings((2,), 1)
    taken = draw_labels(4, settings)[0][2]
    other = {**shares, 'train': shares['train'].copy()}
    other['train'][np.setdiff1d(range(4), taken)] = np.eye(3)[0]
    a, b = (fit_arm(features, s, truth, settings, 6).matrices.iloc[0] for s in (shares, other))
    assert np.array_equal(a, b)
    other['train'][taken] = np.eye(3)[0]
    assert not np.array_equal(a, fit_arm(features, other, truth, settings, 6).matrices.iloc[0])

@pytest.mark.slow
def test_terratorch_runs_the_same_file(store, tmp_path):
    "`terratorch fit` and `terratorch test` on the file a notebook writes give what this process gives."
    path = write_config(tmp_path/'c_v2.yaml', config(store, 'c_v2', tmp_path/'out'))
    done = terratorch('fit', '--config', path)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path/'out'/'trained.ckpt', map_location='cpu', weights_only=False)['state_dict']
    ours = fit_config(write_config(tmp_path/'here.yaml', config(store, 'c_v2', tmp_path/'here'))).model.state_dict()
    assert theirs.keys() == ours.keys()
    for k in theirs: torch.testing.assert_close(theirs[k], ours[k], rtol=1e-4, atol=1e-5, msg=k)
    done = terratorch('test', '--config', path, '--ckpt_path', tmp_path/'out'/'trained.ckpt')
    assert done.returncode == 0 and 'test/mIoU' in done.stdout, done.stderr[-2000:]

@pytest.mark.slow
@pytest.mark.parametrize('arm', ['c_v1', 'b'])
def test_full_scale_models_are_built_from_the_file(arm):
    "The published encoder, without memory and weights, takes the adapters and the head of the configuration."
    from terratorch.models import EncoderDecoderFactory
    full = DownstreamRecipe('terramind_v1_base', channels=(512, 256, 128, 64))
    args = model_config(replace(ARMS[arm], pretrained=False), full)['init_args']['model_args']
    with without_memory(), hushed(): model = EncoderDecoderFactory().build_model('segmentation', **args)
    trained = [k for k, p in model.named_parameters() if p.requires_grad and k.startswith('encoder.')]
    assert trained and all('.lora_' in k and '.sampler.' not in k for k in trained)
    assert len(trained) == 12*2*2  # blocks, layers, factors

@pytest.mark.parametrize('profile', ['mini', 'paper'])
def test_the_report_names_the_classes_that_nobody_learnt(profile):
    "mIoU over classes of which several stay at nothing says less than it seems."
    folder = root()/'reports'/profile
    best = pd.read_csv(folder/'tables'/'downstream.csv').filter(regex='^iou_(?!.*_(lo|hi)$)').max()
    notebooks = json.loads((folder/'provenance.json').read_text())['notebooks']
    # whatever its number was
    caption = next(n for name, n in notebooks.items() if name.endswith('_downstream'))['tables']['downstream']
    told = caption.split('0.05 for ')[1].split(': mIoU')[0].split(', ') if '0.05 for ' in caption else []
    assert told == [k.removeprefix('iou_').replace('_', ' ') for k in best.index if best[k] < .05]
