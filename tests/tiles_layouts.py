"Small data sets in the layouts the readers know, made on the spot; every trap is a change to one of them."
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio

from gac.core.vocabulary import S2_BANDS
from gac.data.bigearthnet import BEN_PIXELS


def radar(seed:int, size:int=120) -> np.ndarray:
    "(2, size, size) dB."
    r = np.random.default_rng(seed)
    return np.stack([r.normal(-11, 2, (size, size)), r.normal(-17.5, 2, (size, size))]).astype('float32')

def optical(seed:int, size:int=120, count:int=12) -> np.ndarray:
    "(count, size, size) DN."
    return np.random.default_rng(100 + seed).integers(120, 4000, (count, size, size)).astype('uint16')

def write_tif(path:Path, x:np.ndarray, crs='EPSG:32629', pixel=10., west=6e5, north=5.8e6, names=(), tags=None,
              **more) -> Path:
    "Write a GeoTIFF of (C, H, W)."
    path.parent.mkdir(parents=True, exist_ok=True)
    x = x[None] if x.ndim == 2 else x
    with rasterio.open(path, 'w', driver='GTiff', height=x.shape[1], width=x.shape[2], count=len(x), dtype=x.dtype,
                       crs=crs, transform=rasterio.Affine(pixel, 0, west, 0, -pixel, north), **more) as f:
        f.write(x)
        for i, name in enumerate(names, 1): f.set_band_description(i, name)
        f.update_tags(**(tags or {}))
    return path

def bigearthnet(root:Path, n:int=3, **columns) -> pd.DataFrame:
    "Write BigEarthNet v2 with n patches; return its table."
    rows = []
    for i in range(n):
        patch, s1 = (f'S2A_MSIL2A_20170617T113321_N9999_R080_T29UPU_{i:02d}_05',
                     f'S1A_IW_GRDH_1SDV_20170617T064724_29UPU_{i}_5')
        rows.append(dict(patch_id=patch, labels=['Pastures', 'Arable land'],
                         split=('train', 'validation', 'test')[i % 3], country='Ireland', s1_name=s1,
                         contains_seasonal_snow=False, contains_cloud_or_shadow=False))
        place = dict(west=6e5 + 1200*i)
        for b, x in zip(S2_BANDS, optical(i)):
            step = 120//BEN_PIXELS[b]
            write_tif(root/'BigEarthNet-S2'/patch.rsplit('_', 2)[0]/patch/f'{patch}_{b}.tif', x[::step, ::step],
                      pixel=10.*step, **place)
        for p, x in zip(('VV', 'VH'), radar(i)):
            write_tif(root/'BigEarthNet-S1'/s1.rsplit('_', 3)[0]/s1/f'{s1}_{p}.tif', x, **place)
    table = pd.DataFrame(rows)
    for name, values in columns.items(): table[name] = values
    table.to_parquet(root/'metadata.parquet')
    return table

def geotiff(root:Path, n:int=3, size:int=120, product='S1GRD', s1=lambda x, i: x, s2=lambda x, i: x, dem=True,
            **more) -> Path:
    "Write GeoTIFF folders with n sources named a0, a1, …"
    for i in range(n):
        place = dict(west=6e5 + 10.*size*i)
        write_tif(root/product/f'a{i}.tif', s1(radar(i, size), i), tags=dict(datetime='2021-07-21T08:40:10'),
                  **{**place, **more})
        write_tif(root/'S2L2A'/f'a{i}.tif', s2(optical(i, size), i), tags=dict(datetime='2021-08-23T13:22:41'), **place)
        if dem: write_tif(root/'DEM'/f'a{i}.tif', np.full((size, size), 50 + i, 'int16'), **place)
    return root

def npz(root:Path, n:int=3, change=lambda i: {}, **common) -> Path:
    "Write a folder of NPZ files with one source each."
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        arrays = {**dict(s1=radar(i), s2=optical(i, count=4), month=1 + i), **common, **change(i)}
        np.savez(root/f'n{i}.npz', **{k: v for k, v in arrays.items() if v is not None})
    return root

def tif_bytes(x:np.ndarray, pixel=10., west=6e5, north=5.8e6, crs='EPSG:32629') -> bytes:
    "Return the bytes of a GeoTIFF of (C, H, W)."
    with rasterio.MemoryFile() as m:
        with m.open(driver='GTiff', height=x.shape[1], width=x.shape[2], count=len(x), dtype=x.dtype, crs=crs,
                    transform=rasterio.Affine(pixel, 0, west, 0, -pixel, north)) as f: f.write(x)
        return m.read()

def tortilla(rows:list, parts:list) -> bytes:
    "Return a container of parts and a table with one row each; missing offsets and lengths are filled in."
    import io
    at, table = 200, []
    for row, content in zip(rows, parts):
        table.append({'tortilla:offset': at, 'tortilla:length': len(content), **row})
        at += len(content)
    footer = io.BytesIO()
    pd.DataFrame(table).to_parquet(footer)
    numbers = at, footer.getbuffer().nbytes, 1
    head = b'#y' + b''.join(n.to_bytes(8, 'little') for n in numbers)
    return head.ljust(200, b'\0') + b''.join(parts) + footer.getvalue()

def benv2(path:Path, n:int=3, row=lambda i: {}, part=lambda i: {}, s1=lambda x, i: x[::-1], pixel2=60.,
          names=('s1', 's2')) -> Path:
    "Write a tortilla as GEO-Bench-2 packs benv2: VH before VV, and 60 m in the transform of Sentinel-2."
    rows, samples = [], []
    for i in range(n):
        place = dict(west=6e5 + 1200*i)
        files = [tif_bytes(s1(radar(i), i), **place), tif_bytes(optical(i), pixel2, **place)]
        samples.append(tortilla([{'tortilla:id': k, 'tortilla:file_format': 'GTiff', **part(i)} for k in names], files))
        rows.append({'tortilla:id': f'sample_{i}', 'tortilla:file_format': 'TORTILLA',
                     'tortilla:data_split': ('train', 'validation', 'test')[i % 3],
                     'stac:time_start': 1497700000., 'country': 'Ireland', 'contains_seasonal_snow': False,
                     'contains_cloud_or_shadow': False,
                     'labels': ['Pastures', 'Arable land'],
                     'patch_id': f'S2A_MSIL2A_20170617T113321_N9999_R080_T29UPU_{i:02d}_05', **row(i)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tortilla(rows, samples))
    return path
