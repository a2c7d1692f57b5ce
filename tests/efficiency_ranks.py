"""Programs that run in several processes.

`train OUT DEVICES BATCH STEPS [KILL]` uses Lightning's DDP, `draw STORE RANK RANKS [KILL] [STAGE]` ranks of its own."""
import os
import signal
import sys

import torch
from torch.utils.data import Dataset

from gac.data.store import Store
from gac.stages.grounding import build_stage3_model
from gac.stages.inference import precompute_stage3
from gac.stages.losses import Stage2Loss
from gac.stages.refiner import build_prithvi_refiner
from gac.stages.stage1 import build_terramind_generator, precompute_stage1
from gac.stages.stage2 import stage2_step
from gac.stages.stage2_inference import precompute_stage2
from gac.training.checkpoints import trained_state
from gac.training.fit import fit_model
from gac.training.order import process_rank
from gac.training.settings import Settings


class Pairs(Dataset):
    "Eight small pairs, the same in every process."
    def __len__(self): return 8
    def __getitem__(self, i):
        own = torch.Generator().manual_seed(i)
        truth = torch.rand(4, 48, 48, generator=own)*.3
        return dict(opt_v1=truth + .05*torch.randn(4, 48, 48, generator=own), truth=truth, month=1 + i, biome=1 + i)

def train(out:str, devices:int, batch:int, steps:int, kill:int=0):
    "Train a miniature refiner without dropout; the process of the last rank dies after `kill` steps."
    refiner = build_prithvi_refiner(dropout=0., hide=0.).train()
    torch.nn.init.normal_(refiner.head.colour.net.out.weight, std=.01, generator=torch.Generator().manual_seed(0))
    settings = Settings(lr=1e-3, max_steps=steps, batch_size=batch, grad_accum_steps=2, val_every=1, save_every=1,
                                 log_every=1, early_stopping=False,
                                 accelerator='cpu', devices=devices, strategy='ddp' if devices > 1 else 'auto')
    step, seen = stage2_step(Stage2Loss(ms_ssim=0.)), [0]
    def watched(model, one):
        if model.training:
            seen[0] += 1
            if kill and seen[0] > 2*kill and process_rank()[0] == devices - 1: os.kill(os.getpid(), signal.SIGKILL)
        return step(model, one)
    fit = fit_model(refiner, watched, Pairs(), Pairs(), settings, out, every=0)
    if process_rank()[0] == 0:
        torch.save(dict(steps=fit.steps, resumed=fit.resumed_at, psnr=fit.metrics['val_psnr'],
                        state=trained_state(refiner)), f'{out}/end.pt')

def draw(store:str, rank:int, ranks:int, kill:int=0, stage:int=1):
    "Precompute one rank's share of a stage; the process dies when it has written `kill` batches."
    store, count = Store(store), [0]
    write = store.write
    def counted(*args):
        write(*args)
        count[0] += 1
        if count[0] == kill: os.kill(os.getpid(), signal.SIGKILL)
    store.write = counted
    share = dict(batch_size=2, rank=rank, world_size=ranks)
    if stage == 1: return print(precompute_stage1(store, build_terramind_generator(), timesteps=1, **share))
    model = build_prithvi_refiner() if stage == 2 else build_stage3_model()
    torch.nn.init.normal_(model.head.out.weight, std=.05, generator=torch.Generator().manual_seed(0))
    print((precompute_stage2 if stage == 2 else precompute_stage3)(store, model, **share))

if __name__ == '__main__':
    what, where, *numbers = sys.argv[1:]
    dict(train=train, draw=draw)[what](where, *map(int, numbers))
