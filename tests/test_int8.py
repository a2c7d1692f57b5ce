"8-bit layers give the same bytes whatever instructions the product of integers may use."
import os
import subprocess
import sys

import pytest

from gac.core.files import root
from gac.core.processor import release_processor

CODE = '''
import hashlib
import torch
from torch import nn
from gac.training.int8 import int8_product_is_exact, multiply_int8, to_int8
torch.manual_seed(0)
model = to_int8(nn.Sequential(nn.Linear(1536, 256), nn.ReLU(), nn.Linear(256, 8))).eval()
with torch.no_grad(): y = model(torch.randn(40, 1536))
a, b = (torch.randint(-127, 128, (n, 2500), dtype=torch.int8) for n in (40, 24))
assert torch.equal(multiply_int8(a, b).long(), a.long() @ b.long().t())
print(hashlib.sha256(y.numpy().tobytes()).hexdigest(), int8_product_is_exact(), torch._C._get_cpu_capability())
'''

def digest(**held) -> list[str]:
    "Return the digest of the layers' output, and whether torch._int_mm is exact, in a process of its own."
    env = dict(os.environ)
    release_processor(env)  # all instructions of the processor, but for those held back here
    done = subprocess.run([sys.executable, '-c', CODE], cwd=root(), env=env | held, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()

@pytest.mark.parametrize('held', [dict(ONEDNN_MAX_CPU_ISA='AVX2'), dict(ATEN_CPU_CAPABILITY='avx2')])
def test_eight_bits_give_the_same_bytes_with_fewer_instructions(held):
    assert digest(**held)[0] == digest()[0]
