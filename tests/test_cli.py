"The command line: help of every command, quick and complete; refusals in one line; the whole way from tiles to opt_v1."
import configparser
import json
import re
import resource
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import tiles_layouts
from swapping import swap

from gac.cli import COMMANDS, GROUPS, main
from gac.core.config import (
    LOSS2_FIELDS,
    DownstreamConfig,
    InferConfig,
    NycConfig,
    PrecomputeConfig,
    Stage2Config,
    Stage3Config,
    UncertaintyConfig,
    UNetConfig,
    config_parameters,
)
from gac.core.files import GacError, root
from gac.core.parameters import notebook_parameters
from gac.data.layouts import LAYOUTS
from gac.data.store import Store
from gac.data.stores import from_world
from gac.runner.plan import chain_notebooks
from gac.runner.profiles import profile_values

GAC = [sys.executable, '-c', 'import sys; from gac.cli import main; sys.exit(main())']

def call(capsys, *words) -> tuple: # exit code, stdout, stderr
    "Run a command in this process."
    try: code = main([str(w) for w in words])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()

@pytest.mark.parametrize('name', ['', *COMMANDS, *GROUPS])
def test_help(name, capsys):
    code, out, err = call(capsys, *name.split(), '--help')
    assert (code, err) == (0, '') and out.startswith(f'usage: gac {name}'.strip())

def test_the_top_lists_every_command(capsys):
    out = call(capsys, '--help')[1]
    for name in COMMANDS: assert re.search(rf'^\s+{name.split()[0]}\s+\S', out, re.M), name

def test_every_option_says_what_it_is():
    for name, (f, options) in COMMANDS.items():
        for names, kwargs in options: assert len(kwargs.get('help', '')) > 5, (name, names)

def test_stage1_options_are_those_of_the_documents(capsys):
    out = call(capsys, 'precompute', '--help')[1]
    for option in ('data-dir', 'output-dir', 'batch-size', 'timesteps', 'max-tiles', 'tokens', 'clamp', 'seed', 'rank',
                   'world-size', 'weights', 'name'):
        assert f'--{option}' in out, option
    assert 'diffusion steps (default: 10)' in ' '.join(out.split())

def test_help_loads_no_model_library():
    def call(code) -> tuple: # printed text, seconds of processor
        "Run Python in a process of its own."
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return out, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = ("import sys; from gac.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('numpy', 'torch', 'terratorch', 'pandas') if m in sys.modules])")
    out, seconds = call(code)
    assert out.splitlines()[-1] == '[]'
    assert seconds < call('import torch')[1]/3  # about a tenth of it

def test_the_package_installs_the_command():
    ini = configparser.ConfigParser()
    ini.read(root()/'settings.ini')
    assert ini['DEFAULT']['console_scripts'] == 'gac=gac.cli:main'

def test_a_mistake_is_one_line_without_traceback():
    done = subprocess.run([*GAC, 'data', 'info', 'no/such/folder'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('gac: ') and 'Traceback' not in done.stderr

@pytest.mark.parametrize('words, said', [
    (('run', '--profil', 'mini'), 'unrecognized arguments'), (('precompute',), 'required: --data-dir'),
    (('fly',), 'invalid choice'),
    (('precompute', '--data-dir', 'x', '--tokens', 'best'), 'invalid choice'),
    (('precompute', '--data-dir', 'x', '--batch-size', 'many'), 'invalid int'),
    (('world', '--output-dir', 'x', '--train', '-3'), '--train: -3: expected 0 or more'),
    (('precompute', '--data-dir', 'x', '--timesteps', '0'), '--timesteps: 0: expected 1 to 1000'),
    (('train-stage2', '--data-dir', 'x', '--output-dir', 'y', '--lr', 'nan'), '--lr: nan: expected 0 to 10'),
    (('bench', '--output-dir', 'x', '--timesteps', '1', '0'), '--timesteps: 0: expected 1 or more'),
    (('uncertainty', '--samples', '1'), 'expected 2 to 1000'),
    (('run', '--set', '07.x'), '--set 07.x: expected KEY=VALUE'),
    (('run', '--set', '07.x=3', '--dry-run'), "07_stage1 has no parameter 'x'"),
    (('data',), 'required: command'), ((), 'required: command'),
    (('precompute', '--data-dir', 'no/such'), 'does not exist'), (('run', '--profile', 'huge'), 'huge'),
    (('run', '--set', 'x'), 'KEY=VALUE'),
    (('run', '--profile', 'smoke', '--set', 'lerning_rate=1', '--dry-run'), 'lerning_rate'),
    (('info', 'terramind_v9'), 'terramind_v9'),
    (('pretrain', '--params', 'toaster'), 'toaster'), (('data', 'convert', 'no/such', 'x'), 'no/such'),
    (('data', 'examples', 'mars'), 'mars')])
def test_refusals(words, said, capsys):
    code, out, err = call(capsys, *words)
    assert code == 2 and said in err and 'Traceback' not in err

def test_several_lines_of_an_error_stay_lines(capsys, monkeypatch, tmp_path):
    def broken(*args, **kwargs): raise GacError('first\n  second')
    swap(monkeypatch, 'gac.runner.verify', 'verify', broken)
    assert call(capsys, 'verify') == (2, '', 'gac: first\n  second\n')
    lines = call(capsys, 'data', 'info', tmp_path)[2].splitlines()
    assert [line.split(':')[0].strip() for line in lines[1:]] == list(LAYOUTS)

@pytest.mark.parametrize('words, said', [
    (('info', 'terramind_larg'), 'Did you mean terramind_v1_large?'), (('info', 'nosuch'), 'Nearest of 31'),
    (('precompute', '--data-dir', 'no/such'), '--data-dir no/such: does not exist'),
    (('infer', 'no.tif', 'out.tif'), 'source no.tif: does not exist'),
    (('train-stage2', '--data-dir', '.', '--output-dir', 'x', '--backbone', 'prithvi'), 'Did you mean prithvi_'),
    (('claims', '--reports', 'no/such'), 'no/such is no report'),
    (('run', '--set', 'sed=3'), 'Did you mean seed? Nearest of')])
def test_a_wrong_name_or_path_is_refused_before_torch_is_loaded(words, said):
    code = f"import sys; from gac.cli import main; code = main({list(words)}); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root())
    assert done.stdout == '2 False\n' and said in done.stderr and len(done.stderr) < 300, done.stdout + done.stderr

def test_parameters_are_listed(capsys):
    code, out, _ = call(capsys, 'parameters', '7')
    assert code == 0 and out.startswith('07_stage1\n  seed: int = 0  # ') and 'reports_dir' not in out
    assert call(capsys, 'parameters')[1].count('  seed: int') == len(chain_notebooks(root()/'nbs'))

@pytest.mark.skipif(sys.platform == 'win32', reason='pipes of POSIX')
@pytest.mark.parametrize('words', [('--help',), ('parameters',)])
def test_a_reader_that_has_read_enough_is_no_error(words):
    with subprocess.Popen([*GAC, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == '' and process.wait() in (0, 141)  # argparse itself swallows it

def test_interruption(capsys, monkeypatch):
    def stopped(*args, **kwargs): raise KeyboardInterrupt
    swap(monkeypatch, 'gac.runner.chain', 'run_chain', stopped)
    code, _, err = call(capsys, 'run')
    assert code == 130 and 'continues' in err

def test_run_hands_everything_over(capsys, monkeypatch):
    seen, looked = {}, []
    swap(monkeypatch, 'gac.runner.chain', 'run_chain', lambda profile, **kw: seen.update(kw, profile=profile))
    swap(monkeypatch, 'gac.cost.preflight', 'preflight', lambda *given: looked.append(given))
    code, *_ = call(capsys, 'run', '--profile', 'paper', '--data', 'd', '--reports', 'r', '--from', '07', '--only',
                    '10', '--set',
                    'seed=3',
                    '--set', '07_stage1.steps=[1, 4]', '--force', '--jobs', '3', '--dry-run')
    assert code == 0
    assert seen == dict(profile='paper', data='d', reports='r', start='07', only='10',
                        sets={'seed': 3, '07_stage1.steps': [1, 4]}, force=True, dry_run=True, jobs=3)
    assert looked == [('paper', 'd', 'r', {'seed': 3, '07_stage1.steps': [1, 4]})]

def test_version(capsys):
    code, out, _ = call(capsys, 'version')
    assert code == 0 and re.match(r'gac \d+\.\d+\.\d+, torch ', out)

def test_info(capsys):
    code, out, _ = call(capsys, 'info')
    assert code == 0 and 'terramind_v1_large_generate' in out and 'prithvi_mini' in out
    code, out, _ = call(capsys, 'info', 'terramind_mini_generate', '--modalities', 'S1GRD,DEM')
    assert code == 0 and 'terramind_mini_tokenizer_s2l2a.safetensors' in out and 'int8' in out

def test_world_and_data_info(tmp_path, capsys):
    words = ('world', '--output-dir', tmp_path/'tiles', '--train', 2, '--val', 1, '--test', 1, '--tile-size', 48,
             '--seed', 3)
    assert call(capsys, *words)[0] == 0
    store = Store(tmp_path/'tiles')
    assert list(store.table.split) == ['train', 'train', 'val', 'test'] and store.table.id[0] == 'world-3000000'
    code, out, _ = call(capsys, 'data', 'info', tmp_path/'tiles')
    assert code == 0 and 's1_product: S1GRD' in out and 's2: 4 of 4 tiles' in out
    assert call(capsys, *words[:-1], 4)[0] == 2  # another seed does not go into the same store

def test_convert_reports_and_options_reach_the_reader(tmp_path, capsys):
    tiles_layouts.npz(tmp_path/'real', n=3)
    code, out, _ = call(capsys, 'data', 'convert', tmp_path/'real', tmp_path/'store', '--split', 'val', '--s1-units',
                        'dB',
                        '--s2-offset', '0')
    store = Store(tmp_path/'store')
    assert code == 0 and set(store.table.split) == {'val'} and store.attrs['options']['s2_offset'] == 0
    tiles_layouts.npz(tmp_path/'bad', n=3, change=lambda i: dict(s1=tiles_layouts.radar(i)*float('nan')) if i == 1
                      else {})
    assert call(capsys, 'data', 'convert', tmp_path/'bad', tmp_path/'some')[0] == 1  # one tile left out: done in part
    assert call(capsys, 'data', 'convert', tmp_path/'bad', tmp_path/'none', '--strict')[0] == 2

def test_a_direct_decoder_is_taught_and_used(tmp_path, capsys):
    "gac precompute --direct gives other images, which the attributes of the array name; a wrong folder is refused."
    from gac.data.stores import from_world
    store = from_world(tmp_path/'tiles', 3, 1, 1, size=48)
    assert main(['distill', '--data-dir', str(store.path), '--output-dir', str(tmp_path/'direct'), '--max-steps', '2',
                 '--batch-size', '2']) == 0
    draw = ['precompute', '--data-dir', str(store.path), '--timesteps', '1', '--tokens', 'expected']
    assert main([*draw, '--output', 'painted']) == 0
    assert main([*draw, '--output', 'unfolded', '--direct', str(tmp_path/'direct')]) == 0
    store.refresh()
    painted, unfolded = (store.read(a, slice(None)) for a in ('painted', 'unfolded'))
    assert not (painted == unfolded).all() and store.arrays['unfolded'].attrs['decoder'] == 'direct'
    assert main([*draw, '--output', 'none', '--direct', str(tmp_path/'nothing')]) != 0
    assert 'nothing' in capsys.readouterr().err

def test_later_stages_are_drawn_by_any_number_of_workers(tmp_path, capsys, monkeypatch):
    "Two workers compute what one computes; a tile without opt_v1 is listed by its worker."
    import torch

    from gac.stages.grounding import build_stage3_model
    from gac.stages.refiner import build_prithvi_refiner
    from gac.stages.stage2_checkpoint import save_stage2
    from gac.stages.stage3_checkpoint import save_stage3
    from gac.stages.tileset import derived_store
    store = from_world(tmp_path/'tiles', 6, 1, 1, size=48, shard=4)
    refiner, grounder = build_prithvi_refiner(), build_stage3_model()
    for model, seed in ((refiner, 0), (grounder, 1)):
        torch.nn.init.normal_(model.head.out.weight, std=.05, generator=torch.Generator().manual_seed(seed))
    save_stage2(refiner, tmp_path/'stage2', {})
    save_stage3(grounder, tmp_path/'stage3', {})
    at = ('--data-dir', store.path, '--batch-size', 2)
    second = ('precompute-stage2', *at, '--stage2-checkpoint', tmp_path/'stage2')
    code, _, said = call(capsys, *second)
    assert code == 2 and 'has no opt_v1. Make it: gac precompute' in said
    for name in ('one', 'two'):
        beside = derived_store(store, tmp_path/name)
        beside.ensure_array('opt_v1', (4, 48, 48), 'int16')
        with beside:
            beside.write('opt_v1', list(range(7)), store.read('s2', slice(0, 7))[:, [1, 2, 3, 7]].astype('int16'))
    third = ('precompute-stage3', *at, '--stage3-checkpoint', tmp_path/'stage3')
    assert call(capsys, *second, '--stage1-dir', tmp_path/'one')[0] == 1 == call(capsys, *third, '--stage2-dir',
        tmp_path/'one')[0]
    for rank, code in ((1, 1), (0, 0)):
        share = ('--rank', rank, '--world-size', 2)
        assert call(capsys, *second, '--stage1-dir', tmp_path/'two', *share)[0] == code
    for rank, code in ((0, 0), (1, 1)):
        assert call(capsys, *third, '--stage2-dir', tmp_path/'two', '--rank', rank, '--world-size', 2)[0] == code
    one, two = (Store(tmp_path/n) for n in ('one', 'two'))
    for array in ('opt_v2', 'opt_v3'):
        assert one.written(array).tolist() == [True]*7 + [False]
        assert (one.read(array, range(7)) == two.read(array, range(7))).all()
    assert (one.read('opt_v3', [0]) != one.read('opt_v2', [0])).any()
    assert store.table.id[7] in (tmp_path/'two'/'opt_v2_errors_1of2.csv').read_text()
    assert not list((tmp_path/'two').glob('*0of2.csv'))
    monkeypatch.setenv('WORLD_SIZE', '2')  # as torchrun does: two processes must not draw the same
    two.drop('opt_v2')
    code, _, said = call(capsys, 'train-stage3', '--data-dir', store.path, '--stage1-dir', beside.path,
                         '--stage2-checkpoint', tmp_path/'stage2',
                         '--output-dir', tmp_path/'x')
    assert code == 2 and 'gac precompute-stage2 first' in said

@pytest.mark.parametrize('stage', [2, 3])
def test_options_of_a_training_reach_its_settings(stage, tmp_path, capsys, monkeypatch):
    given = {}
    def noted(data_dir, output_dir, config, **options):
        given.update(options, config=config)
        return dict(steps=1, resumed_at=0, metrics={}, output='')
    monkeypatch.setattr('gac.stages.commands.run_stage%d' % stage, noted)
    assert call(capsys, f'train-stage{stage}', '--data-dir', tmp_path, '--output-dir', tmp_path/'x', '--checkpointing',
                '--devices', 2,
                '--num-nodes', 3, '--strategy', 'ddp')[0] == 0
    config = given['config']
    assert (config.checkpointing, config.devices, config.num_nodes, config.strategy) == (True, 2, 3, 'ddp')
    assert config.lr == type(config)().lr and config.steps == type(config)().steps  # what is not given is the recipe's

def test_what_a_notebook_wrote_down_is_asked_for(capsys, tmp_path):
    code, _, said = call(capsys, 'train-as', tmp_path/'training.json')
    assert code == 2 and 'training.json is missing' in said

@pytest.mark.parametrize('cls, notebook', [(Stage2Config, '08_stage2'), (Stage3Config, '09_stage3'),
                                           (UNetConfig, '10_baselines')])
def test_a_setting_is_declared_once(cls, notebook):
    "Compare types, ranges and comments with the parameter cell, and the defaults with profile mini."
    declared, known = notebook_parameters(root()/'nbs'/f'{notebook}.ipynb'), config_parameters(cls)
    # the loss is that of Stage 2
    if cls is UNetConfig: known = {k: p for k, p in known.items() if k not in LOSS2_FIELDS}
    for name, p in known.items():
        of = declared[name]
        assert (of.kind, of.help, of.low, of.high, of.choices) == (p.kind, p.help, p.low, p.high, p.choices), name
    mini = profile_values(notebook, 'mini')
    odd = {n for n, p in known.items() if n not in ('pairs', 'val_tiles') and mini[n] != p.default}
    assert not odd, f'profile mini trains {notebook} with another {odd} than {cls.__name__} says'

# command, notebook, names that differ
COMMAND_SETTINGS = [(PrecomputeConfig, '07_stage1', dict(compile='compiled')), (UncertaintyConfig, '13_trust', {}),
                    (InferConfig, '17_export', {}), (DownstreamConfig, '15_downstream', dict(name='encoder_name')),
                    (NycConfig, '16_new_york', {})]

@pytest.mark.parametrize('cls, notebook, names', COMMAND_SETTINGS, ids=[c.__name__ for c, *_ in COMMAND_SETTINGS])
def test_a_setting_of_a_command_is_declared_as_in_its_notebook(cls, notebook, names):
    "Compare types, ranges and comments of the settings that both declare, and the defaults with profile mini."
    declared, known = notebook_parameters(root()/'nbs'/f'{notebook}.ipynb'), config_parameters(cls)
    shared = {n: names.get(n, n) for n in known if n != 'seed' and names.get(n, n) in declared}
    assert shared
    for name, other in shared.items():
        of, p = declared[other], known[name]
        assert (of.kind, of.help, of.low, of.high, of.choices) == (p.kind, p.help, p.low, p.high, p.choices), name
    if cls not in (PrecomputeConfig, DownstreamConfig, NycConfig): return
    mini = profile_values(notebook, 'mini')
    assert {n: mini[other] for n, other in shared.items()} == {n: known[n].default for n in shared}

@pytest.mark.parametrize('stage', [2, 3])
def test_a_profile_gives_its_values_and_options_go_before_it(stage, tmp_path, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(f'gac.stages.commands.run_stage{stage}', lambda data_dir, output_dir, config,
                        **more: given.append(config) or dict(steps=1, resumed_at=0, metrics={}, output=''))
    words = (f'train-stage{stage}', '--data-dir', tmp_path, '--output-dir', tmp_path/'x')
    assert call(capsys, *words, '--profile', 'full')[0] == 0 == call(capsys, *words, '--profile', 'full', '--max-steps',
                                                                     7, '--no-early-stopping')[0]
    full = profile_values({2: '08_stage2', 3: '09_stage3'}[stage], 'full')
    assert asdict(given[0]) == {k: full[k] for k in asdict(given[0])}
    assert given[1] == replace(given[0], steps=7, early_stopping=False)
    code, _, said = call(capsys, *words, '--profile', 'fulll')
    assert code == 2 and 'Did you mean full' in said
    code, _, said = call(capsys, *words, '--dropout', '2')
    assert code == 2 and '--dropout: 2: expected 0 to 1' in said

# options whose negative values mean nothing
NOT_NEGATIVE = ('lr', 'steps', 'epochs', 'weight-decay', 'warmup', 'l1', 'lpips', 'lora-alpha')

@pytest.mark.parametrize('stage', [2, 3])
@pytest.mark.parametrize('name', NOT_NEGATIVE)
def test_a_negative_setting_of_a_training_is_refused_by_the_parser(stage, name, capsys, tmp_path):
    code, _, said = call(capsys, f'train-stage{stage}', '--data-dir', tmp_path, '--output-dir', tmp_path/'x',
                         f'--{name}=-1')
    assert code == 2 and re.search(rf'--{name}.*: -1: expected 0 to ', said), said

def test_a_negative_rate_of_a_distillation_is_refused_by_the_parser(capsys, tmp_path):
    code, _, said = call(capsys, 'distill', '--data-dir', tmp_path, '--output-dir', tmp_path/'x', '--lr=-1')
    assert code == 2 and '--lr: -1: expected more than 0' in said

def same_but_for_the_time(*files) -> None:
    "Every byte of the tensors, and the card without the time it was written."
    tensors, cards = [], []
    for f in files:
        data = f.read_bytes()
        size = int.from_bytes(data[:8], 'little')
        card = json.loads(json.loads(data[8:8 + size])['__metadata__']['gac'])
        card.pop('time')
        tensors.append(data[8 + size:])
        cards.append(card)
    assert tensors[0] == tensors[1] and cards[0] == cards[1]

def test_a_command_trains_what_the_chain_trains(tmp_path, capsys):
    "Compare the checkpoint of the notebook run by papermill with that of the command, by bytes."
    import papermill
    run = tmp_path/'run'
    for name in ('07_stage1', '08_stage2', '09_stage3'):
        papermill.execute_notebook(root()/'nbs'/f'{name}.ipynb', tmp_path/f'{name}.ipynb',
                                   dict(run_dir=str(run), reports_dir=str(tmp_path/'report')), cwd=root(),
                                   progress_bar=False)
    store = next(p.parent for p in run.rglob('table.parquet'))
    assert call(capsys, 'train-stage2', '--profile', 'smoke', '--data-dir', store, '--output-dir',
                tmp_path/'two')[0] == 0
    same_but_for_the_time(tmp_path/'two'/'refiner.safetensors', run/'stage2'/'refiner.safetensors')
    assert call(capsys, 'train-stage3', '--profile', 'smoke', '--data-dir', store, '--stage2-dir', store,
                '--stage2-checkpoint', run/'stage2', '--output-dir', tmp_path/'three')[0] == 0
    same_but_for_the_time(tmp_path/'three'/'grounding.safetensors', run/'stage3'/'grounding.safetensors')
