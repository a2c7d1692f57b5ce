"""A writer of tiles that tests may kill: reads `path` lines, forks a writer for each, prints its pid, then how it ended."""
import os
import sys
from pathlib import Path

import numpy as np

from gac.data.store import Store

N, SHARD, BATCH = 28, 8, 3  # tiles, tiles in a shard, tiles in a batch
ARRAYS = dict(s1=((2, 16, 16), 'float32', dict(bands=['VV', 'VH'])), s2=((4, 16, 16), 'uint16', {}))

def record(i:int) -> dict:
    "The i-th tile."
    r = np.random.default_rng(i)
    return dict(id=f't{i:03d}', split=('train', 'val', 'test')[i % 3], month=1 + i % 12, lon=float(r.uniform(-9, 30)),
                lat=float(r.uniform(40, 60)), crs='EPSG:32629',
                transform=(10., 0., 6e5 + i, 0., -10., 5e6), s1=r.normal(-12, 3, (2, 16, 16)).astype('f4'),
                s2=r.integers(0, 9000, (4, 16, 16)).astype('u2'))

def drawn(rows) -> np.ndarray:
    "What a later stage makes of some tiles; every seventh is nothing but zeros."
    return np.stack([np.random.default_rng(1000 + int(i)).integers(-99, 9999, (4, 16, 16)).astype('i2')*(int(i) % 7 > 0)
                     for i in rows])

def work(path, ranks:int=1) -> Store:
    "Make the store and a later array, going on with whatever is there."
    store = Store(path) if (Path(path)/'table.parquet').exists() else Store.create(path, ARRAYS, dict(source='test'), SHARD)
    with store:
        for at in range(len(store), N, BATCH): store.append([record(i) for i in range(at, min(at + BATCH, N))])
    store.ensure_array('opt_v1', (4, 16, 16), 'int16', dict(timesteps=3))
    for rank in range(ranks):
        with store:
            while len(rows := store.pending('opt_v1', rank, ranks)[:BATCH]): store.write('opt_v1', rows, drawn(rows), rank, ranks)
    return store

def tree(path) -> dict:
    "What a store holds, byte by byte."
    path = Path(path)
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob('*')) if p.is_file() and p.name != 'guard'}

if __name__ == '__main__':
    print('ready', flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.stdout = open(os.devnull, 'w')
            try: work(line.strip())
            except BaseException: os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
