"A trained folder is one that peft and the Hugging Face Hub read: its card is true and its code runs."
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file

from gac.cli import main
from gac.core.files import GacError
from gac.core.vocabulary import OPT_BANDS
from gac.models.registry import model_entry
from gac.stages.commands import keep_decoding, read_decoding
from gac.stages.grounding import build_stage3_model
from gac.stages.refiner import build_prithvi_refiner
from gac.stages.stage2_checkpoint import fingerprint_stage2, load_stage2, read_stage2, save_stage2
from gac.stages.stage3_checkpoint import load_stage3, save_stage3
from gac.training.adapters import ADAPTER_FILES
from gac.training.checkpoints import load_checkpoint, write_card

SMALL = dict(width=16, depth=1)
MEASURED = dict(val_psnr=27.25, val_psnr_calibrated=28.125, val_ssim=.75, val_sar_edge=.5, val_loss=-3.,
                val_psnr_v2=float('nan'))
HEADS = dict(stage2='refiner', stage3='grounding')

def drawn(model):
    "Return a model whose head and adapters change the output."
    r = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for k, p in model.named_parameters():
            if p.requires_grad and p.ndim > 1: p.add_(torch.randn(p.shape, generator=r)*.05)
    return model.eval()

@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp('sharing')
    two, three = drawn(build_prithvi_refiner(**SMALL)), drawn(build_stage3_model(taps=2, lora_r=2, **SMALL))
    more = dict(steps=40, pairs=12, data='procedural world')
    return dict(stage2=save_stage2(two, home/'two', MEASURED, **more),
                stage3=save_stage3(three, home/'three', MEASURED,
                                          stage2=dict(backbone='prithvi_mini', bands=list(OPT_BANDS)), **more))

@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    "Make a Hugging Face cache with both folders, and no network."
    def put(name, folder, revision='main', commit='0'*40):
        at = tmp_path/'hub'/f'models--{name.replace("/", "--")}'
        shutil.copytree(folder, at/'snapshots'/commit)
        (at/'refs').mkdir(exist_ok=True)
        (at/'refs'/revision).write_text(commit)
    for stage, folder in folders.items(): put(f'someone/gac-{stage}.v1', folder)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    # for peft: it was imported before
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    return put

def images() -> dict:
    r = np.random.default_rng(0)
    x = r.uniform(0, .3, (1, 4, 48, 48)).astype('float32')
    return dict(opt_v1=x, opt_v2=x, s1=r.normal(-14, 3, (1, 2, 48, 48)).astype('float32'))

def run_card(folder:Path, name='') -> dict: # what its code leaves
    "Run the code of a card as it stands there."
    code, space = re.search(r'```python\n(.*?)```', (folder/'README.md').read_text(encoding='utf-8'), re.S)[1], images()
    exec(code.replace('FOLDER', name or str(folder)), space)
    return space

@pytest.mark.parametrize('stage', HEADS)
def test_the_card_is_one_of_the_hub_and_tells_what_was_measured(folders, stage):
    folder = folders[stage]
    assert (sorted(p.name for p in folder.iterdir()) == sorted(['README.md', 'adapter_config.json',
                                                                'adapter_model.safetensors', f'{HEADS[stage]}.json',
                                                                f'{HEADS[stage]}.safetensors']))
    card, head = ModelCard.load(folder/'README.md'), metadata_load(folder/'README.md')
    assert (head['library_name'], head['license'], head['pipeline_tag']) == ('peft', 'apache-2.0', 'image-to-image')
    assert {stage, 'gac', 'lora'} <= set(head['tags'])
    told = {r.metric_type: r.metric_value for r in card.data.eval_results}
    # no loss, and nothing that is no number
    assert told == dict(psnr=27.25, psnr_calibrated=28.125, ssim=.75, sar_edge=.5)
    assert ({(r.dataset_name, r.dataset_split, r.task_type) for r in card.data.eval_results} == {
                ('procedural world', 'validation', 'image-to-image')})
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() and yaml.safe_load(card.data.to_yaml()) == head
    for said in ('| PSNR, dB | 27.2500 |', '| pairs | `12` |', 'They look like observations, but they are not'):
        assert said in card.text, said
    meta = json.loads((folder/f'{HEADS[stage]}.json').read_text())
    assert all(f'`{k}` ({v})' in card.text for k, v in meta['weights'].items())

@pytest.mark.parametrize('stage, name', [('stage2', 'prithvi_eo_v2_600'), ('stage3', 'terramind_v1_large_generate')])
def test_the_base_model_is_a_repository_of_the_hub(folders, tmp_path, stage, name):
    "Real backbones have one, miniatures have none."
    repository = model_entry(name).repo
    validate_repo_id(repository)
    meta = json.loads((folders[stage]/f'{HEADS[stage]}.json').read_text()) | dict(backbone=name)
    head = metadata_load(write_card(tmp_path, meta, 'A title', 'It does.', 'code', repository))
    assert (head['base_model'], head['base_model_relation']) == (repository, 'adapter')
    assert 'base_model' not in metadata_load(folders[stage]/'README.md')
    assert (json.loads((folders[stage]/'adapter_config.json').read_text())['base_model_name_or_path'] == meta[
                'params'].get('backbone', meta['params'].get('name')))

def test_the_code_of_a_card_runs_and_peft_reads_the_adapters(folders):
    two, three = run_card(folders['stage2']), run_card(folders['stage3'])
    x, given = torch.rand(1, 4, 48, 48)*.3, images()
    with torch.no_grad():
        for a, b in zip(two['encoder'].base_model.model(x[:, :, None]), two['refiner'].encoder(x[:, :, None])):
            torch.testing.assert_close(a, b)
    assert not np.allclose(two['image'], given['opt_v1'], atol=1e-3)
    assert not np.allclose(three['image'], given['opt_v2'], atol=1e-3)
    adapted = {k: v for k, v in three['generator'].state_dict().items() if 'lora_' in k}
    kept = load_file(folders['stage3']/'adapter_model.safetensors')
    assert len(adapted) == len(kept) > 0
    for k, v in adapted.items(): torch.testing.assert_close(v, kept[k.replace('.default', '')], rtol=0, atol=0)

def test_the_name_of_a_repository_is_enough(folders, hub, capsys):
    for stage, what in (('stage2', 'refiner'), ('stage3', 'model')):
        here, there = run_card(folders[stage]), run_card(folders[stage], f'someone/gac-{stage}.v1')
        np.testing.assert_array_equal(here['image'], there['image'])
    assert main(['stage3', 'info', '--stage3-checkpoint', 'someone/gac-stage3.v1']) == 0
    assert 'val_psnr' in capsys.readouterr().out
    other = build_prithvi_refiner(lora_r=0, **SMALL)
    hub('someone/gac-stage2.v1', save_stage2(other, Path('plain')), 'plain', '1'*40)
    assert (load_stage2('someone/gac-stage2.v1@plain').config['lora_r'] == 0
            and load_stage2('someone/gac-stage2.v1').config['lora_r'] == 8)
    shutil.copytree(folders['stage2'], 'someone/gac-stage2.v1')  # a folder of that name comes first
    state, meta = load_checkpoint('someone/gac-stage2.v1/refiner.safetensors')
    assert read_stage2('someone/gac-stage2.v1')[1] == meta

def test_what_is_nowhere_is_told_with_repository_and_files(hub, monkeypatch, capsys):
    with pytest.raises(GacError,
                       match=r'nobody/nothing is no folder here and not in the Hugging Face cache \(HF_HUB_OFFLINE is '
                             r'set\)') as e:
        load_stage2('nobody/nothing')
    assert 'refiner.safetensors' in str(e.value) and 'hf download nobody/nothing' in str(e.value)
    assert main(['stage3', 'info', '--stage3-checkpoint', 'nobody/nothing']) == 2
    assert 'needs grounding.safetensors' in capsys.readouterr().err
    # it is of another stage
    with pytest.raises(GacError, match=r'needs grounding.safetensors'): load_stage3('someone/gac-stage2.v1')
    monkeypatch.delenv('HF_HUB_OFFLINE')
    asked = []
    def download(repo_id, local_files_only, **more):
        asked.append((repo_id, local_files_only, more['revision']))
        raise OSError('no route')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    with pytest.raises(GacError, match='the Hub gave OSError'): load_stage2('nobody/nothing@main')
    assert asked == [('nobody/nothing', True, 'main'), ('nobody/nothing', False, 'main')]
    Path('runs').mkdir()
    # a slip in a path is not asked of the Hub
    for place in ('runs/stage2', 'a/b/c', '../x/y', 'nothing', './some/one'):
        with pytest.raises(GacError, match='is missing'): load_stage2(place)
    assert len(asked) == 2

def test_adapters_of_earlier_versions_lie_one_below(folders, tmp_path):
    old = shutil.copytree(folders['stage2'], tmp_path/'old')
    (old/'adapters').mkdir()
    for name in ADAPTER_FILES: shutil.move(old/name, old/'adapters'/name)
    assert fingerprint_stage2(load_stage2(old)) == fingerprint_stage2(load_stage2(folders['stage2']))
    shutil.rmtree(old/'adapters')
    with pytest.raises(GacError, match='old/adapter_config.json is missing'): load_stage2(old)

def test_how_stage1_drew_comes_with_the_repository(hub, folders, tmp_path, monkeypatch):
    "From the cache where it is there; one without it is no error; and what is fetched is a whole checkpoint."
    assert read_decoding('someone/gac-stage2.v1') is None
    told = shutil.copytree(folders['stage2'], tmp_path/'told')
    keep_decoding(told, dict(timesteps=3, tokens='argmax', clamp='off', n_samples=1))
    hub('someone/told', told)
    assert str(read_decoding('someone/told')) == 'argmax, 3 steps, no clamp'
    asked = []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download',
                        lambda **k: asked.append(set(k['allow_patterns'])) or str(told))
    read_decoding('someone/other')
    assert asked == [{p.name for p in told.iterdir()}]
