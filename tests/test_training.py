"Check killed runs, damaged checkpoints and trainings in several processes."
import multiprocessing
import os
import pickle
import random
import signal
from dataclasses import replace

import pytest
import torch
from swapping import swap
from torch import nn
from torch.utils.data import Dataset

from gac.core.files import GacError
from gac.core.tensors import read_torch
from gac.training.adapters import inject_lora, unfreeze
from gac.training.checkpoints import load_checkpoint, load_trained, trained_state
from gac.training.fit import export_best, fit_model
from gac.training.int8 import autocast_for, to_int8
from gac.training.loop import Task, trainer
from gac.training.order import Order
from gac.training.settings import Settings

SETTINGS = Settings(lr=.01, max_steps=11, batch_size=2, grad_accum_steps=2, warmup=.2, val_every=3, save_every=3,
                    log_every=1, num_workers=0, accelerator='cpu')


class Tiles(Dataset):
    "Small tiles, flipped and noised by all the generators an augmentation may use."
    def __init__(self, n): self.x = torch.rand(n, 4, 16, 16, generator=torch.Generator().manual_seed(n))
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        x = self.x[i].flip(-1) if random.random() < .5 else self.x[i]
        return x + .05*torch.randn_like(x), x.mean()[None]


def vit(int8=False):
    "Build a small vision transformer of timm with dropout; adapters and the head train."
    import timm
    torch.manual_seed(5)
    model = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, in_chans=4, num_classes=1, depth=2,
                              embed_dim=48, num_heads=3, drop_rate=.1)
    if int8: to_int8(model, skip=('head',))
    inject_lora(model, r'blocks\.\d+\.attn\.(qkv|proj)', r=2, dropout=.1)
    unfreeze(model, r'head\.')
    return model


def step(model, batch): return {'loss': (model(batch[0]) - batch[1]).square().mean()}


class Killer:
    "Kills its process with SIGKILL at one moment of a training."
    def __init__(self, moment, count): self.moment, self.count = moment, count

    def tick(self, moment):
        if moment != self.moment: return
        self.count -= 1
        if self.count == 0: os.kill(os.getpid(), signal.SIGKILL)

    def step(self, model, batch):
        self.tick('training' if model.training else 'validation')
        return step(model, batch)

    def replace(self, source, target):
        self.tick(f'before {os.path.basename(target)}')
        self.move(source, target)
        self.tick(f'after {os.path.basename(target)}')


def _attempt(folder, settings, int8, moment, count):
    killer = Killer(moment, count)
    killer.move, os.replace = os.replace, killer.replace
    torch.set_num_threads(1)
    fit_model(vit(int8), killer.step, Tiles(10), Tiles(6), settings, folder, every=0)


def attempt(*args):
    "Train in another process and return its exit code."
    process = multiprocessing.get_context('fork').Process(target=_attempt, args=args)
    process.start()
    process.join(120)
    return process.exitcode


DEATHS = [('training', 3, 0), ('validation', 2, 0), ('training', 9, 2), ('before last.ckpt', 1, 0),
          ('after best.ckpt', 1, 0), ('before last.ckpt', 2, 2), ('never', 0, 0)]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
@pytest.mark.parametrize('int8', [False, True], ids=['float32', 'int8'])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, int8):
    torch.set_num_threads(1)
    whole = fit_model(vit(int8), step, Tiles(10), Tiles(6), SETTINGS, tmp_path/'whole', every=0)
    broken = tmp_path/'broken'
    # dropout, augmentation and order must survive, with workers as without
    for moment, count, workers in DEATHS[3:] if int8 else DEATHS:
        code = attempt(broken, replace(SETTINGS, num_workers=workers), int8, moment, count)
        assert code == (0 if moment == 'never' else -signal.SIGKILL), (moment, code)
    again = fit_model(vit(int8), step, Tiles(10), Tiles(6), SETTINGS, broken, every=0)  # finished: only loaded
    assert again.steps == again.resumed_at == 11
    assert again.curve.to_csv() == whole.curve.to_csv()
    logged = [(p/'curve'/'metrics.csv').read_text() for p in (tmp_path/'whole', broken)]
    assert logged[0] == logged[1]
    for name in ('last.ckpt', 'best.ckpt'):
        a, b = (read_torch(p/name)['state_dict'] for p in (tmp_path/'whole', broken))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert not any('base_layer' in k for k in a)  # frozen weights stay out of the checkpoint


def test_interrupted_and_called_again_equals_uninterrupted(tmp_path, capsys):
    "Ctrl-C says what is kept and reaches the caller as what it is; the handler of the process is its own again."
    steps, before = iter(range(1, 1000)), signal.getsignal(signal.SIGINT)
    def stopped(model, batch):
        if model.training and next(steps) == 15: os.kill(os.getpid(), signal.SIGINT)
        return step(model, batch)
    with pytest.raises(KeyboardInterrupt):
        fit_model(vit(), stopped, Tiles(12), Tiles(4), SETTINGS, tmp_path/'a', name='toy')
    assert ('toy: interrupted at step 7; step 6 is kept.' in capsys.readouterr().out
            and signal.getsignal(signal.SIGINT) is before)
    again = fit_model(vit(), step, Tiles(12), Tiles(4), SETTINGS, tmp_path/'a')
    whole = fit_model(vit(), step, Tiles(12), Tiles(4), SETTINGS, tmp_path/'b')
    assert (again.resumed_at == 6
            and again.curve.drop(columns='gpu_memory_mb').equals(whole.curve.drop(columns='gpu_memory_mb')))

def test_mixed_precision_trains_adapters_on_8_bit_weights(tmp_path):
    result = fit_model(vit(int8=True), step, Tiles(10), Tiles(6), replace(SETTINGS, precision='bf16-mixed'), tmp_path,
                       every=0)
    assert result.curve.train_loss.iloc[-3:].mean() < result.curve.train_loss.iloc[:3].mean()


def test_beginning_anew_forgets_the_old(tmp_path):
    fit_model(vit(), step, Tiles(10), Tiles(6), SETTINGS, tmp_path, every=0)
    with pytest.raises(ZeroDivisionError):
        fit_model(vit(), lambda m, b: 1/0, Tiles(10), Tiles(6), SETTINGS, tmp_path, resume=False, every=0)
    assert not (tmp_path/'last.ckpt').exists() and not (tmp_path/'best.ckpt').exists()


def test_rounds_follow_one_sequence(tmp_path):
    class Recorded(Tiles):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)
    seen = []
    fit_model(vit(), step, Recorded(10), None, SETTINGS, tmp_path, every=0)
    assert seen == [i for i, _ in Order(10, per_round=11*2*2)]  # four full passes and a piece, over four rounds


def test_early_stopping_is_final(tmp_path):
    settings = replace(SETTINGS, lr=0., max_steps=60, early_stopping_patience=2)  # nothing moves, so nothing improves
    result = fit_model(vit(), step, Tiles(10), Tiles(6), settings, tmp_path, every=0)
    assert result.steps == 9  # the first validation and two without improvement
    again = fit_model(vit(), step, Tiles(10), Tiles(6), settings, tmp_path, every=0)
    assert (again.steps, again.resumed_at) == (9, 9)


def test_no_validation_needs_no_best(tmp_path):
    result = fit_model(vit(), step, Tiles(10), None, SETTINGS, tmp_path, every=0)
    assert result.best is None and result.steps == 11 and list(result.curve.step) == list(range(1, 12))
    state, meta = load_checkpoint(export_best(tmp_path, tmp_path/'out.safetensors', 'stage2', 'vit'), kind='stage2')
    load_trained(vit(), state)
    assert meta['steps'] == 11 and meta['params']['lr'] == .01
    with pytest.raises(GacError, match='does not fit the model: missing'): load_trained(nn.Linear(3, 2), state)


def test_broken_training_checkpoint_is_named(tmp_path):
    fit_model(vit(), step, Tiles(10), None, SETTINGS, tmp_path, every=0)
    last = tmp_path/'last.ckpt'
    last.write_bytes(last.read_bytes()[:3000])
    with pytest.raises(GacError, match=r'last\.ckpt is no readable Torch file'):
        fit_model(vit(), step, Tiles(10), None, SETTINGS, tmp_path, every=0)
    torch.save({'state_dict': {}}, last)
    with pytest.raises(GacError, match='not written by this study'):
        fit_model(vit(), step, Tiles(10), None, SETTINGS, tmp_path, every=0)


class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ['BOMB'],)


def test_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path/'exploded'))
    torch.save({'state_dict': Bomb()}, tmp_path/'last.ckpt')
    (tmp_path/'plain.ckpt').write_bytes(pickle.dumps(Bomb()))
    for name in ('last.ckpt', 'plain.ckpt'):
        with pytest.raises(GacError, match=name.replace('.', r'\.')): read_torch(tmp_path/name)
    assert not (tmp_path/'exploded').exists()


@pytest.mark.parametrize('world', [2, 3])
def test_devices_share_the_sequence(monkeypatch, world):
    order, whole = Order(7, per_round=4, seed=1), Order(7, per_round=4*world, seed=1)
    for r in range(3):
        shares = []
        for rank in range(world):
            swap(monkeypatch, 'gac.training.order', 'process_rank', lambda: (rank, world))
            order.set_epoch(r)
            shares.append(list(order))
        swap(monkeypatch, 'gac.training.order', 'process_rank', lambda: (0, 1))
        whole.set_epoch(r)
        assert [item for turn in zip(*shares) for item in turn] == list(whole)


def test_frozen_weights_do_not_move(tmp_path):
    model = vit()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit_model(model, step, Tiles(10), None, SETTINGS, tmp_path, every=0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_checkpointed_training_is_the_same_training(tmp_path):
    "Stop a training with dropout and 8 bits and resume it with another setting: curve and weights stay the same."
    def trained(folder, *rounds):
        called = []
        for options in rounds:
            model = vit(int8=True)
            model.blocks[0].mlp.register_forward_pre_hook(lambda *_: called.append(torch.is_grad_enabled()))
            done = fit_model(model, step, Tiles(10), Tiles(6), replace(SETTINGS, **options), tmp_path/folder, every=0)
            assert not any('forward' in vars(m) for m in model.modules())
        return done, model, sum(called)
    plain, a, once = trained('plain', {})
    saving, b, twice = trained('saving', dict(checkpointing=True))
    assert twice == 2*once == 44
    columns = [c for c in plain.curve if c != 'gpu_memory_mb']
    assert (plain.curve[columns].fillna(0) == saving.curve[columns].fillna(0)).all(axis=None)
    for k, v in trained_state(a).items(): assert torch.equal(v, trained_state(b)[k]), k
    seen = []
    def stopped(model, batch):
        seen.append(model.training)
        if sum(seen) > 15: raise KeyboardInterrupt
        return step(model, batch)
    with pytest.raises(KeyboardInterrupt):
        fit_model(vit(int8=True), stopped, Tiles(10), Tiles(6), SETTINGS, tmp_path/'changed', every=0)
    changed, c, _ = trained('changed', dict(checkpointing=True))
    assert 0 < changed.resumed_at < 11 and changed.curve.train_loss.tolist() == plain.curve.train_loss.tolist()


def test_checkpointing_is_refused_where_no_blocks_are_named(tmp_path):
    with pytest.raises(GacError, match='Linear names no blocks'):
        fit_model(nn.Linear(2, 2), step, Tiles(10), None, replace(SETTINGS, checkpointing=True), tmp_path, every=0)


@pytest.mark.parametrize('given, env, said', [
    (dict(devices=2), {}, 'this process can train on one device only. Use gac train-stage2'),
    (dict(num_nodes=3), {}, 'num_nodes=3'),
    (dict(), dict(WORLD_SIZE='2'), '2 processes were started together, but devices=1 x num_nodes=1 is 1'),
    (dict(devices=2), dict(SLURM_STEP_NUM_TASKS='8'), '8 processes were started together, but devices=2')])
def test_a_console_says_how_several_devices_train(monkeypatch, tmp_path, given, env, said):
    monkeypatch.setattr('sys.ps1', '>>> ', raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    with pytest.raises(GacError, match=said):
        fit_model(vit(), step, Tiles(10), None, replace(SETTINGS, **given), tmp_path, every=0)


def test_unknown_strategies_are_refused():
    with pytest.raises(GacError, match="strategy='ddp_spawn': expected one of"): Settings(strategy='ddp_spawn')


def test_resumed_accounts_for_every_key():
    task = Task(vit(), step, SETTINGS, 11)
    checkpoint = {'state_dict': {k: v for k, v in trained_state(task).items() if 'lora_B' not in k}}
    with pytest.raises(GacError, match='missing: .*lora_B'): task.on_load_checkpoint(checkpoint)

def test_the_curve_shows_the_loss_whatever_a_step_gathers(tmp_path):
    def both(model, batch): return (terms := step(model, batch)) | dict(term=terms['loss'].detach())
    for n in (1, 3):
        curve = fit_model(vit(), both, Tiles(12), None,
                          replace(SETTINGS, grad_accum_steps=n, max_steps=2, val_every=2, save_every=2, log_every=1),
                    tmp_path/str(n), every=0).curve
        assert curve.train_loss.tolist() == pytest.approx(curve.train_term.tolist(), rel=1e-5), n

@pytest.mark.skipif(torch.cuda.is_available(), reason='asks what a CPU refuses')
def test_float16_on_a_cpu_is_refused_before_a_step(tmp_path):
    "Lightning would train in bfloat16 there, and the card would say float16."
    for accelerator in ('auto', 'cpu'):
        with pytest.raises(GacError, match='--precision 16-mixed needs a GPU'):
            trainer(replace(SETTINGS, precision='16-mixed', accelerator=accelerator), tmp_path/'out', 1)
    with pytest.raises(GacError, match='--precision 16-mixed needs a GPU'): autocast_for('cpu', '16-mixed')
    assert not (tmp_path/'out').exists()
