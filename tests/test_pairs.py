"Training on one's own pairs, from a folder of chips to images: the recipe of docs/howto/tiles.md and its messages."
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import tiles_layouts as layouts
import torch

from gac.cli import main
from gac.core.files import GacError, root
from gac.data.convert import convert, frequent_reasons
from gac.data.readers import nested
from gac.data.splits import SPLIT_BY, SplitRule, deal_split, split_room, split_store
from gac.data.store import Store
from gac.data.table import GUARD, is_id
from gac.products.blocks import draw_block
from gac.products.cog import write_cog
from gac.products.scene import open_scene
from gac.products.tiling import Tiling
from gac.stages.stage3_parts import PARTS, ids_digest
from gac.stages.trained import begin_training
from gac.training.settings import Settings

RECIPE = Path(__file__).parents[1]/'docs'/'howto'/'tiles.md'
FAST = {'train-stage2': '--max-steps 2 --val-every 1 --save-every 1 --batch-size 2 --grad-accum-steps 1',
        'train-stage3': '--max-steps 2 --val-every 1 --save-every 1 --batch-size 2 --grad-accum-steps 1 '
                        '--freeze-backbone'}

def chips(root:Path, n:int=16, side:int=48, placed=lambda i: True, **more) -> Path:
    "NPZ chips in two nested folders, 30 km apart from one another."
    for i in range(n):
        place = dict(lon=20 + .5*(i % 8), lat=50 + .5*(i//8)) if placed(i) else {}
        (folder := root/('a' if i % 2 else 'b c')).mkdir(parents=True, exist_ok=True)
        np.savez(folder/f'{i:02d}.npz', s1=layouts.radar(i, side), s2=layouts.optical(i, side, 4), month=1 + i % 12,
                 **place, **more)
    return root

def commands(section:str) -> list[list[str]]: # words after `gac`
    "Return the commands in the first block of a section."
    text = RECIPE.read_text(encoding='utf-8').split(f'## {section}\n')[1].split('\n## ')[0]
    return [line.split('#')[0].split()[1:] for block in re.findall(r'```sh\n(.*?)```', text, re.S)[:1]
            for line in block.splitlines() if line.startswith('gac ')]

def test_the_recipe_of_the_guide_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chips(tmp_path/'my_tiles')
    shown = commands('Stage by stage')
    assert ([w[0] if w[0] != 'data' else ' '.join(w[:2]) for w in shown] == [
                'data convert', 'data split', 'data info', 'precompute', 'train-stage2', 'precompute-stage2',
                'train-stage3', 'infer'])
    for words in shown:
        words = ['auto' if before == '--tile-size' else w for before, w in zip(['', *words], words)]
        assert main(words + FAST.get(words[0], '').split()) == 0, (words, capsys.readouterr())
    table = Store('runs/mine/tiles').table
    assert table['split'].value_counts().to_dict() == dict(train=12, val=2, test=2)
    pictures = sorted(Path('runs/mine/images/opt_v3').glob('*.tif'))
    assert sorted(p.stem for p in pictures) == sorted(table.id[table.split == 'test'])
    for p in pictures:
        with rasterio.open(p) as f: assert (f.read() > 0).mean() > .5
    said = capsys.readouterr().out
    for line in ('Stage 1: terramind_mini_generate, a miniature, pretrained on', 'Stage 2: prithvi_mini',
                 'trained on 12 pairs of my_tiles, 2 steps',
                 'The radar is real, and Stage 1 knows the procedural world only'):
        assert line in said, line

def test_a_training_without_tiles_to_validate_on_says_so(tmp_path, capsys):
    chips(tmp_path/'c', 4)
    store = str(tmp_path/'s')
    convert(tmp_path/'c', store, size='auto', split='train')
    assert main(['precompute', '--data-dir', store, '--timesteps', '1', '--tokens', 'expected']) == 0
    assert (main(['train-stage2', '--data-dir', store, '--output-dir', str(tmp_path/'t'),
                  *FAST['train-stage2'].split()]) == 0)
    said = capsys.readouterr().out
    assert 'stage 2: no validation tiles (gac data split makes some), so it trains to the last step' in said
    assert 'no validation tiles: the last step is kept' in said and 'best on validation' not in said

def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path, capsys):
    chips(tmp_path/'c', 4)
    store = str(tmp_path/'s')
    convert(tmp_path/'c', store, size='auto')
    assert f'To train, make one: gac data split {store}' in capsys.readouterr().out
    train = lambda stage: (main([f'train-stage{stage}', '--data-dir', store, '--output-dir',
                                 str(tmp_path/f't{stage}')]),
                           capsys.readouterr().err)
    for stage, command in ((2, f'gac precompute --data-dir {store}'), (3, f'gac precompute-stage2 --data-dir {store}')):
        code, said = train(stage)
        assert code == 2 and command in said
    place = Store(store)
    for name in ('opt_v1', 'opt_v2'):
        place.ensure_array(name, (4, 48, 48), 'int16')
        with place: place.write(name, slice(None), np.zeros((4, 4, 48, 48), 'int16'))
    for stage in (2, 3):
        code, said = train(stage)
        assert code == 2 and f'no training tiles (4 test). Make some: gac data split {store}' in said
    with pytest.raises(GacError, match='gac data convert'): Store(tmp_path/'c')

@pytest.mark.parametrize('by', SPLIT_BY)
def test_splits_do_not_leak_and_follow_the_seed(by):
    r = np.random.default_rng(0)
    table = pd.DataFrame(dict(lon=r.uniform(10, 14, 600), lat=r.uniform(60, 62, 600),
                              scene=[f's{i//3}' for i in range(600)]))
    table.loc[500:, ['lon', 'lat']] = np.nan
    rule = SplitRule(by, guard=5., seed=3)
    table['split'], made = deal_split(table, rule)
    assert (table['split'].to_numpy() == deal_split(table, rule)[0]).all()
    assert (table['split'].to_numpy() != deal_split(table, SplitRule(by, guard=5., seed=4))[0]).any()
    counts = table['split'].value_counts()
    assert counts['train'] and counts['val'] >= 45 and counts['test'] >= 60, counts
    assert min(split_room(table).values()) >= 5*.98  # measured along the sphere, held along its axes
    if by != 'random': assert table[500:].groupby('scene')['split'].nunique().eq(1).all()
    if by == 'place': assert GUARD not in counts  # whole places go together, so none is near another split

def test_a_store_without_tiles_takes_other_options(tmp_path):
    chips(tmp_path/'c', 2)
    report = convert(tmp_path/'c', tmp_path/'s', size=120)
    assert report.status.tolist() == ['error']*2 and not len(Store(tmp_path/'s'))
    convert(tmp_path/'c', tmp_path/'s', size='auto')
    assert len(Store(tmp_path/'s')) == 2
    with pytest.raises(GacError, match='made with other settings'): convert(tmp_path/'c', tmp_path/'s', size=32)

def test_a_split_is_written_and_not_replaced_unasked(tmp_path, capsys):
    layouts.npz(tmp_path/'c', 20, lambda i: dict(lon=10 + i*.4, lat=50., month=6))
    convert(tmp_path/'c', tmp_path/'s')
    assert (main(['data', 'split', str(tmp_path/'s'), '--by', 'block', '--val', '.2', '--test', '.3', '--guard', '500m',
                  '--seed', '5']) == 0)
    store = Store(tmp_path/'s')
    assert store.table['split'].value_counts().to_dict() == dict(train=10, val=4, test=6)
    assert store.attrs['split'] == dict(by='block', val=.2, test=.3, guard=.5, block=20., seed=5)
    store.ensure_array('opt_v1', (4, 120, 120), 'int16', dict(tokens='expected'))
    split_store(tmp_path/'s')  # what Stage 1 drew stays valid
    assert 'opt_v1' in Store(tmp_path/'s').arrays
    store.refresh()
    store.ensure_array('opt_v2', (4, 120, 120), 'int16', dict(trained='feed'))
    with pytest.raises(GacError, match='tested on what they learnt from'): split_store(tmp_path/'s', SplitRule(seed=9))
    split_store(tmp_path/'s', SplitRule(seed=9), overwrite=True)
    assert {'opt_v1'} == set(Store(tmp_path/'s').arrays) - {'s1', 's2'}
    layouts.npz(tmp_path/'own', 3, lambda i: dict(split=('train', 'val', 'test')[i]))
    convert(tmp_path/'own', tmp_path/'o')
    with pytest.raises(GacError, match='a split of its own'): split_store(tmp_path/'o')
    assert '1 train, 1 val, 1 test, as the tiles came' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='2'): main(['data', 'split', str(tmp_path/'s'), '--val', '1.5'])
    assert '--val: 1.5: expected 0 to 1' in capsys.readouterr().err

def test_tiles_without_coordinates_are_split_by_scene_and_that_is_said(tmp_path, capsys):
    chips(tmp_path/'c', 12, placed=lambda i: i < 6)
    convert(tmp_path/'c', tmp_path/'s', size='auto')
    counts = split_store(tmp_path/'s')
    assert set(counts) == {'train', 'val', 'test'}
    assert '6 of 12 tiles have no coordinates: they stay with their scene' in capsys.readouterr().out

def test_convert_says_why_as_the_shell_spells_it(tmp_path, capsys):
    layouts.npz(tmp_path/'c', 6,
                lambda i: dict(s1=layouts.radar(i, 96 - i), s2=layouts.optical(i, 96 - i, 4)) if i < 4 else dict(
                    s2=np.zeros((4, 120, 120), 'u2')) if i == 4 else {})
    report = convert(tmp_path/'c', tmp_path/'s')
    assert report.status.value_counts().to_dict() == dict(error=5, ok=1)
    first, second = frequent_reasons(report)
    assert first.startswith('4 × 96×96 px is smaller than a tile of 120 px. Say --tile-size 96 or less, or auto.')
    assert second.startswith('1 × Sentinel-2')
    assert first in capsys.readouterr().out

def test_no_message_spells_an_option_as_python_does():
    text = '\n'.join(p.read_text(encoding='utf-8') for p in (root()/'gac').rglob('*.py'))
    options = 'size|s1_units|s2_units|s1_bands|s2_bands|s2_offset|weights'
    found = re.findall(rf"""['"][^'"\n]*\b(?:Say|say|name|Or name[^'"\n]*) (?:{options})=[^'"\n]*""", text)
    assert not found, found

def test_nested_folders_and_several_of_them_go_into_one_store(tmp_path, capsys):
    chips(tmp_path/'one', 4), chips(tmp_path/'two'/'validation', 4), layouts.geotiff(tmp_path/'flat', 1)
    (tmp_path/'one'/'a'/'._01.npz').write_bytes(b'no chip')
    for again in range(2):
        assert (main(['data', 'convert', str(tmp_path/'one'), str(tmp_path/'two'), str(tmp_path/'s'), '--tile-size',
                      '48']) == 0)
        table = Store(tmp_path/'s').table
        assert (sorted(table.id) == ['a_01', 'a_03', 'b_c_00', 'b_c_02',
                                     *(f'validation_{n}' for n in ('a_01', 'a_03', 'b_c_00', 'b_c_02'))])
        assert table['split'].value_counts().to_dict() == dict(test=4, val=4)
    assert pd.read_csv(tmp_path/'s'/'report.csv').status.tolist() == ['ok']*8
    with pytest.raises(GacError, match='--append'): convert(tmp_path/'flat', tmp_path/'s')
    with pytest.raises(GacError, match='--tile-size 48'): convert(tmp_path/'flat', tmp_path/'s', append=True)
    deep = tmp_path/'deep'
    for k in ('S1GRD', 'S2L2A'):
        (tmp_path/'flat'/k).rename((deep/k/'train').parent.mkdir(parents=True) or deep/k/'train')
    convert(deep, tmp_path/'d')
    assert Store(tmp_path/'d').table[['id', 'split']].values.tolist() == [['train_a0', 'train']]

def test_a_stage3_training_sees_that_the_split_changed(tmp_path):
    "Not only how many tiles there are and which is the first."
    class Some:
        def __init__(self, ids):
            self.store, self.rows = type('S', (), dict(table=pd.DataFrame(dict(id=ids)))), np.arange(3)
        def __len__(self): return 3
    begin = lambda ids: begin_training(tmp_path, dict(tiles=ids_digest(Some(ids))), Settings(), PARTS)
    assert begin(['a', 'b', 'c'])
    (tmp_path/'head').mkdir()
    torch.save(dict(gac={}), tmp_path/'head'/'last.ckpt')
    assert begin(['a', 'b', 'c'])
    with pytest.raises(GacError, match='tiles was'): begin(['a', 'b', 'd'])

class Framed:
    "A chain with what real ones have: darker at a tile's border, and a pattern of 2 px."
    product, output, steps = 'S1GRD', 'opt_v1', [dict(model='framed', weights='random', seed=0)]
    def __call__(self, batch, sampled=False):
        x = np.full((len(batch['s1']), 4, *batch['s1'].shape[2:]), .2, 'float32')
        x[..., :12, :] = x[..., -12:, :] = x[..., :, :12] = x[..., :, -12:] = .15
        return dict(opt_v1=x + .004*(np.arange(x.shape[-1]) % 2).astype('float32'))

@pytest.mark.parametrize('h, w', [(300, 260), (130, 40), (20, 30)])
def test_a_scene_has_no_frame_and_no_chequer(tmp_path, h, w):
    file = layouts.write_tif(tmp_path/'s.tif',
                             np.random.default_rng(0).normal(-12, 2, (2, h, w)).astype('float32')
                             - np.array([0, 6], 'float32')[:, None, None],
                             names=('VV', 'VH'))
    scene = open_scene(file)
    draw = lambda *tiling: draw_block(scene, (0, 0, h, w), Framed(), Tiling(*tiling))/1e4
    plain, infer = draw(120, 40, 960), draw(120, 40, 960, 40, True)
    turn = 1 - 2*(np.arange(w) % 2)
    assert abs((plain*turn).mean()) > .0015 and abs((infer*turn).mean()) < .0002
    assert plain[:, 0].mean() < .16 and infer[:, 0].mean() > .195 and infer[..., -1].mean() > .195
    parts = draw(120, 40, 120, 40, True)
    for b in Tiling(120, 40, 120).blocks(h, w):
        part = draw_block(scene, b, Framed(), Tiling(120, 40, 120, 40, True))/1e4
        np.testing.assert_allclose(part, parts[:, b[0]:b[0] + b[2], b[1]:b[1] + b[3]], atol=1e-4)

def test_the_style_of_a_dull_scene_is_dull(tmp_path):
    x = np.random.default_rng(0).integers(400, 500, (4, 64, 64)).astype('int16')
    write_cog(tmp_path/'dull.tif', x)
    style = (tmp_path/'dull.qml').read_text()
    assert style.count('<minValue>0</minValue><maxValue>0.1</maxValue>') == 3

def test_convert_takes_real_chips_smaller_than_a_tile(tmp_path, real_data, capsys):
    src = tmp_path/'gelos'
    src.mkdir()
    for p in sorted((real_data/'pairs'/'gelos_ethiopia').glob('*.npz'))[:6]: os.symlink(p, src/p.name)
    report = convert(src, tmp_path/'s')
    assert (report.status == 'error').all()
    assert '6 × 96×93 px is smaller than a tile of 120 px. Say --tile-size 93' in capsys.readouterr().out
    assert (convert(src, tmp_path/'auto', size='auto').status == 'ok').sum() == 6  # one tile of each, no near copies
    assert Store(tmp_path/'auto').attrs['size'] == 93

def test_a_name_with_accents_and_spaces_is_taken(tmp_path):
    "What an id cannot hold goes from the name; two that become alike stay apart, and a plain name stays as it is."
    for name in ('scène été 1', 'scene ete 1', 'plain_2'): (tmp_path/f'{name}.npz').touch()
    names = {p.stem: n for p, n in nested(tmp_path, ('.npz',)).items()}
    assert names['plain_2'] == 'plain_2' and len(set(names.values())) == 3
    assert all(is_id(n) and n.startswith(('scene_ete_1', 'plain')) for n in names.values())
