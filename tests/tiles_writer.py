"""A writer of tiles that tests may kill.

It reads lines `path` or `path rank ranks`, forks a writer for each, prints its pid, then how it ended.
"""
import os
import sys
from pathlib import Path

import numpy as np

from gac.data.store import Store

N, SHARD, BATCH = 28, 8, 3  # tiles, tiles in a shard, tiles in a batch
ARRAYS = dict(s1=((2, 16, 16), 'float32', dict(bands=['VV', 'VH'])), s2=((4, 16, 16), 'uint16', {}))

def record(i:int) -> dict:
    "Return the i-th tile."
    r = np.random.default_rng(i)
    return dict(id=f't{i:03d}', split=('train', 'val', 'test')[i % 3], month=1 + i % 12, lon=float(r.uniform(-9, 30)),
                lat=float(r.uniform(40, 60)), crs='EPSG:32629',
                transform=(10., 0., 6e5 + i, 0., -10., 5e6), s1=r.normal(-12, 3, (2, 16, 16)).astype('f4'),
                s2=r.integers(0, 9000, (4, 16, 16)).astype('u2'))

def drawn(rows) -> np.ndarray:
    "Return what a later stage makes of some tiles; every seventh is all zeros."
    return np.stack([np.random.default_rng(1000 + int(i)).integers(-99, 9999, (4, 16, 16)).astype('i2')*(int(i) % 7 > 0)
                     for i in rows])

def add_tiles(path) -> Store:
    "Add the tiles that a store lacks, and declare a later array."
    there = (Path(path)/'table.parquet').exists()
    store = Store(path) if there else Store.create(path, ARRAYS, dict(source='test'), SHARD)
    with store:
        for at in range(len(store), N, BATCH): store.append([record(i) for i in range(at, min(at + BATCH, N))])
    store.ensure_array('opt_v1', (4, 16, 16), 'int16', dict(timesteps=3))
    return store

def fill(store:Store, rank:int=0, ranks:int=1) -> None:
    "Write a rank's share of the later array."
    with store:
        while len(rows := store.pending('opt_v1', rank, ranks)[:BATCH]):
            store.write('opt_v1', rows, drawn(rows), rank, ranks)

def work(path, ranks:int=1) -> Store:
    "Fill the store and a later array, from whatever state they are in."
    store = add_tiles(path)
    for rank in range(ranks): fill(store, rank, ranks)
    return store

def tree(path) -> dict:
    "Return what a store holds, byte by byte; locks are empty files."
    path = Path(path)
    files = (p for p in sorted(path.rglob('*')) if p.is_file() and p.suffix != '.lock')
    return {str(p.relative_to(path)): p.read_bytes() for p in files}

if __name__ == '__main__':
    if len(sys.argv) > 1: sys.exit(fill(Store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    print('ready', flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.stdout = open(os.devnull, 'w')
            path, *share = line.split()
            try:
                if share: fill(Store(path), *map(int, share))
                else: work(path)
            except BaseException: os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
