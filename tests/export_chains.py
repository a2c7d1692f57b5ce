"Chains that stand in for a trained one where the models are not what is tested."
import time

import numpy as np

from gac.models.decoding import tile_number


class Grey:
    "Each tile in one grey of its own: the worst that can happen to a seam."
    product, output, steps = 'S1GRD', 'opt_v1', [dict(model='grey', weights={}, seed=0)]
    def __call__(self, batch, sampled=False):
        grey = np.float32([.15 + .1*(tile_number(i) % 1000)/1000 for i in batch['id']])
        return dict(opt_v1=np.ones((len(grey), 4, *batch['s1'].shape[2:]), 'float32')*grey[:, None, None, None])

class Mirror:
    "The radar as an image, a little brighter or darker by tile; slow if that is wanted."
    product, output, steps = 'S1GRD', 'opt_v1', [dict(model='mirror', weights={}, seed=0)]
    def __init__(self, seconds=0.): self.seconds = seconds
    def __call__(self, batch, sampled=False):
        time.sleep(self.seconds)
        return dict(opt_v1=np.repeat((batch['s1'] + 40)/100, 2, 1) + batch['s1'].mean((1, 2, 3), keepdims=True)/1000)

class Stops(Grey):
    "Interrupts itself after some tiles."
    def __init__(self, after): self.left = after
    def __call__(self, batch, sampled=False):
        self.left -= len(batch['id'])
        if self.left < 0: raise KeyboardInterrupt
        return super().__call__(batch)

def of(product): return Grey()
